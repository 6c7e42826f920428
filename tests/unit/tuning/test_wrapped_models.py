"""The Tuner on models and optimisers that somebody wrapped."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn import functional as F

from helpers import batches, changed, map_by_children, snapshot, tiny_cnn, tiny_mlp
from layerwise.errors import ModelError
from layerwise.plans.strategies import full, linear_probe, top_k
from layerwise.plans.unfreezing import gradual_unfreezing, lp_ft
from layerwise.tuning.audit import audit
from layerwise.tuning.audit_graph import COMPILE_NOTICES_SINCE
from layerwise.tuning.tuner import Tuner
from layerwise.tuning.watch import watch


def run(model: nn.Module, tuner: Tuner, *, shape: tuple[int, ...] = (6,), classes: int = 3) -> None:
    for epoch in tuner.epochs():
        for inputs, labels in batches(2, shape, classes=classes, seed=epoch):
            F.cross_entropy(model(inputs), labels).backward()
            tuner.step()


@pytest.fixture
def process_group(tmp_path: Any) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def plain_result() -> dict[str, torch.Tensor]:
    model = tiny_mlp()
    layers = map_by_children(model)
    run(
        model,
        Tuner(model, lp_ft(layers, epochs=2), torch.optim.AdamW, lr=0.1, steps_per_epoch=2, layers=layers),
    )
    return snapshot(model)


@pytest.mark.usefixtures("process_group")
def test_ddp_through_all_phases_equals_the_plain_model() -> None:
    """One DistributedDataParallel, built before anything is frozen, carries a plan that unfreezes."""
    model = tiny_mlp()
    layers = map_by_children(model)
    wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    tuner = Tuner(
        wrapped, lp_ft(layers, epochs=2), torch.optim.AdamW, lr=0.1, steps_per_epoch=2, layers=layers
    )
    run(wrapped, tuner)
    assert not changed(plain_result(), snapshot(model))


@pytest.mark.usefixtures("process_group")
def test_ddp_may_be_built_after_the_tuner() -> None:
    """Inside all_phases() everything that ever learns requires gradients, and not outside."""
    model = tiny_mlp()
    layers = map_by_children(model)
    tuner = Tuner(model, lp_ft(layers, epochs=2), torch.optim.AdamW, lr=0.1, steps_per_epoch=2, layers=layers)
    with tuner.all_phases():
        assert all(parameter.requires_grad for parameter in model.parameters())
        wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["head.weight", "head.bias"]
    run(wrapped, tuner)
    assert not changed(plain_result(), snapshot(model))


@pytest.mark.usefixtures("process_group")
@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`")
def test_fsdp_and_checkpoint_wrappers_are_looked_through() -> None:
    """Tuner, audit and watch see the model that a layer map is of; over one process it trains alike."""
    model = tiny_mlp()
    layers = map_by_children(model)
    wrapped = checkpoint_wrapper(
        FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    )
    with watch(wrapped) as watched:
        tuner = Tuner(
            wrapped, lp_ft(layers, epochs=2), torch.optim.AdamW, lr=0.1, steps_per_epoch=2, layers=layers
        )
        run(wrapped, tuner)
    assert not audit(wrapped, tuner.optimizer, layers=layers).errors
    assert set(watched.report.moved) == {name for group in layers for name in group.parameters}
    assert not changed(plain_result(), snapshot(model))


def test_a_model_of_the_users_is_no_wrapper_for_its_name() -> None:
    """What is called DataParallel holds a module."""

    class OwnDataParallel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.b0, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    model = OwnDataParallel()
    layers = map_by_children(model)
    tuner = Tuner(model, full(layers), torch.optim.SGD, lr=0.1, steps_per_epoch=2, layers=layers)
    assert len(tuner.trainable_names()) == 4


@pytest.mark.usefixtures("process_group")
def test_ddp_that_waits_for_frozen_gradients_is_refused() -> None:
    """Without find_unused_parameters a freezing plan is an error at once; a plan that trains all is fine."""
    model = tiny_mlp()
    layers = map_by_children(model)
    wrapped = nn.parallel.DistributedDataParallel(model)
    with pytest.raises(ModelError, match="find_unused_parameters=True"):
        Tuner(wrapped, linear_probe(layers), torch.optim.SGD, lr=0.1, steps_per_epoch=1, layers=layers)
    Tuner(wrapped, full(layers), torch.optim.SGD, lr=0.1, steps_per_epoch=1, layers=layers)


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("tuner_first", [False, True])
def test_ddp_that_does_not_average_what_is_unfrozen_is_refused(tuner_first: bool) -> None:
    """Built while a group is frozen, it leaves that group's gradients to each process."""
    model = tiny_mlp()
    layers = map_by_children(model)
    model.requires_grad_(False)
    model.get_submodule("head").requires_grad_(True)
    bystander = nn.parallel.DistributedDataParallel(nn.Linear(2, 2))
    wrapped: nn.Module = model
    if not tuner_first:
        wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    plan = lp_ft(layers, epochs=2)
    tuner = Tuner(wrapped, plan, torch.optim.AdamW, lr=0.1, steps_per_epoch=2, layers=layers)
    if tuner_first:
        wrapped = nn.parallel.DistributedDataParallel(model)
    with pytest.raises(ModelError, match=r"phase 'tune'.*2 parameters.*8 learn now.*tuner\.all_phases"):
        run(wrapped, tuner)
    assert tuner.step_count == 2  # those of the first phase

    again = nn.parallel.DistributedDataParallel(model)  # wrapped anew, the phase can begin
    for inputs, labels in batches(2, (6,), classes=3, seed=1):
        F.cross_entropy(again(inputs), labels).backward()
        tuner.step()
    assert (tuner.phase_index, tuner.step_in_phase) == (1, 2)
    del bystander  # it lived until here, and is not of this model


@pytest.mark.skipif(os.environ.get("LAYERWISE_SKIP_COMPILE") == "1", reason="no compiler")
@pytest.mark.skipif(
    torch.__version__ < COMPILE_NOTICES_SINCE, reason="compiled code of this torch is blind to it"
)
def test_a_compiled_model_trains_what_is_unfrozen_later() -> None:
    """Compiled before the plan unfreezes, the model still trains the joiners (pytorch #139476)."""
    model = tiny_mlp()
    layers = map_by_children(model)
    compiled = torch.compile(model, backend="aot_eager")
    tuner = Tuner(
        compiled, lp_ft(layers, epochs=2), torch.optim.AdamW, lr=0.1, steps_per_epoch=2, layers=layers
    )
    before = snapshot(model)
    run(compiled, tuner)  # type: ignore[arg-type]
    assert changed(before, snapshot(model)) == set(before)
    assert all(
        torch.allclose(value, snapshot(model)[name], atol=1e-4) for name, value in plain_result().items()
    )


def test_accelerates_optimizer_is_stepped_through() -> None:
    """tuner.optimizer may be replaced by Accelerate's wrapper; phases change inside it."""
    from accelerate import Accelerator

    model = tiny_mlp()
    layers = map_by_children(model)
    tuner = Tuner(model, lp_ft(layers, epochs=2), torch.optim.AdamW, lr=0.1, steps_per_epoch=2, layers=layers)
    tuner.optimizer = Accelerator(cpu=True).prepare_optimizer(tuner.optimizer)
    assert type(tuner.optimizer).__name__ == "AcceleratedOptimizer"
    run(model, tuner)
    assert not changed(plain_result(), snapshot(model))


def test_a_grad_scaler_may_skip_steps() -> None:
    """With a scaler the gradients are unscaled before the step, and infinite ones move nothing."""
    model = tiny_mlp()
    layers = map_by_children(model)
    tuner = Tuner(model, full(layers, epochs=1), torch.optim.SGD, lr=0.1, steps_per_epoch=2, layers=layers)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    (inputs, labels), *_ = batches(1, (6,), classes=3)
    by_hand = tiny_mlp()
    F.cross_entropy(by_hand(inputs), labels).backward()
    torch.optim.SGD(by_hand.parameters(), lr=0.1).step()
    next(tuner.epochs())
    scaler.scale(F.cross_entropy(model(inputs), labels)).backward()
    tuner.step(scaler=scaler)
    assert torch.allclose(model.head.weight, by_hand.head.weight, atol=1e-6)
    before = snapshot(model)
    scaler.scale(F.cross_entropy(model(inputs), labels) * float("inf")).backward()
    tuner.step(scaler=scaler)
    assert not changed(before, snapshot(model))
    assert tuner.step_count == 2


def test_peft_adapters_learn_and_what_peft_froze_stays() -> None:
    """A plan made before PEFT wrapped the model moves the adapters of its groups, and no base weight."""
    peft = pytest.importorskip("peft")
    model = tiny_cnn()
    layers = map_by_children(model)
    config = peft.LoraConfig(r=2, target_modules=["layer1.0", "layer2.0"], modules_to_save=["fc"])
    wrapped = peft.get_peft_model(model, config)
    plan = top_k(layers, k=2, epochs=1)
    tuner = Tuner(wrapped, plan, torch.optim.AdamW, lr=0.1, steps_per_epoch=2, layers=layers)
    wrapped.train()
    before = snapshot(wrapped)
    run(wrapped, tuner, shape=(3, 8, 8), classes=4)
    moved = changed(before, snapshot(wrapped))
    assert any("layer2" in name and "lora_B" in name for name in moved)
    assert any("fc.modules_to_save" in name for name in moved)
    assert all("lora_" in name or "modules_to_save" in name for name in moved)
    assert not any("layer1" in name for name in moved)


def test_the_map_of_a_peft_model_works_too() -> None:
    """Mapped after wrapping, the groups are found inside of PEFT's own names."""
    peft = pytest.importorskip("peft")
    from layerwise.layers.mapping import layer_map

    images = torch.randn(2, 3, 8, 8)
    plan = gradual_unfreezing(layer_map(tiny_cnn(), images, granularity="stages"), last_epochs=1)
    config = peft.LoraConfig(r=2, target_modules=["layer1.0", "layer2.0", "stem.0"], modules_to_save=["fc"])
    wrapped = peft.get_peft_model(tiny_cnn(), config)
    tuner = Tuner(
        wrapped,
        plan,
        torch.optim.AdamW,
        lr=0.1,
        steps_per_epoch=2,
        layers=layer_map(wrapped, images, "stages"),
    )
    before = snapshot(wrapped)
    run(wrapped, tuner, shape=(3, 8, 8), classes=4)
    moved = changed(before, snapshot(wrapped.eval()))
    assert {name.split(".")[2] for name in moved} == {"stem", "layer1", "layer2", "fc"}
    assert all("lora_" in name or "modules_to_save" in name for name in moved)


def test_a_phase_that_peft_leaves_nothing_to_is_told() -> None:
    """A plan whose first phase is the head, which has no adapter, is an error that names the way out."""
    peft = pytest.importorskip("peft")
    model = tiny_cnn()
    layers = map_by_children(model)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["layer1.0"]))
    with pytest.raises(ModelError, match=r"'train' trains nothing in this model: .*modules_to_save"):
        Tuner(wrapped, linear_probe(layers), torch.optim.SGD, lr=0.1, steps_per_epoch=1, layers=layers)


def test_an_adapter_outside_of_the_map_is_told() -> None:
    """PEFT may add parameters that adapt no module of the map: prompts of the model as a whole."""
    peft = pytest.importorskip("peft")
    model = tiny_cnn()
    layers = map_by_children(model)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["layer1.0"]))
    wrapped.register_parameter("prompt", nn.Parameter(torch.zeros(2)))
    with pytest.raises(ModelError, match=r"'prompt' belongs to no group.*layerwise.layer_map\(model\)"):
        Tuner(wrapped, top_k(layers, k=2), torch.optim.SGD, lr=0.1, steps_per_epoch=1, layers=layers)
