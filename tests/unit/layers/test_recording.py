"""One forward pass, seen operation by operation; and nothing changed by looking."""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from layer_nets import SmallResNet, Tokens, image
from layerwise.errors import ModelError, RecordingError
from layerwise.layers.recording import record
from layerwise.layers.structures import map_tensors, tensors_in
from versions import needs_operators_in_modes


def _op(recording: Any, name: str, nth: int = 0) -> Any:
    return [op for op in recording.ops if op.name == name][nth]


# -- what is recorded -------------------------------------------------------------------------------


def test_operations_know_parameters_sources_and_their_module() -> None:
    # each operation names the parameters it reads, the operations it reads from and its innermost module
    recording = record(nn.Sequential(nn.Linear(4, 3), nn.ReLU()), (torch.zeros(2, 4),))
    linear, relu = recording.ops
    assert (linear.name, set(linear.parameters), linear.sources, linear.inputs) == (
        "addmm",
        {"0.weight", "0.bias"},
        (),
        (0,),
    )
    assert (relu.name, relu.parameters, relu.sources, relu.inputs) == ("relu", (), (0,), ())
    assert (linear.call.path, relu.call.path) == ("0", "1")
    assert linear.flops == 2 * 2 * 3 * 4


def test_calls_form_a_tree_and_know_inputs_and_outputs() -> None:
    # the value that a child returns is the value that the next one takes
    net = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU(), nn.Linear(4, 2)))
    root, first, inner, relu, last = record(net, (torch.zeros(2, 4),)).calls
    assert [call.path for call in root.walk()] == ["", "0", "1", "1.0", "1.1"]
    assert inner.children == [relu, last]
    assert first.output_keys == inner.input_keys == relu.input_keys
    assert last.output_keys == inner.output_keys == root.output_keys
    assert (inner.start, inner.end) == (1, 3)
    assert last.output_ops == (2,)
    assert inner.input_ops == (0,)
    assert root.input_ops == (None,)


def test_a_module_called_twice_has_two_calls() -> None:
    # calls of one module are counted
    layer = nn.Linear(4, 4)
    calls = record(nn.Sequential(layer, layer), (torch.zeros(2, 4),)).calls
    assert [(call.path, call.nth) for call in calls] == [("", 0), ("0", 0), ("0", 1)]


@pytest.mark.parametrize(
    ("module", "training", "effect"),
    [
        (nn.Dropout(), True, "random"),
        (nn.Dropout(), False, None),
        (nn.BatchNorm1d(4), True, "batch"),
        (nn.BatchNorm1d(4), False, None),
        (nn.InstanceNorm1d(4), True, None),
        (nn.LayerNorm(4), True, None),
        (nn.MultiheadAttention(4, 2, dropout=0.1, batch_first=True), True, "random"),
        (nn.MultiheadAttention(4, 2, dropout=0.1, batch_first=True), False, None),
    ],
)
def test_random_and_batch_dependent_operations_are_marked(
    module: nn.Module, training: bool, effect: str | None
) -> None:
    # dropout is random and batch-norm depends on the batch, in training only; instance norm never does
    x = torch.randn(3, 4, 4)
    args = (x, x, x) if isinstance(module, nn.MultiheadAttention) else (x,)
    effects = {op.effect for op in record(module.train(training), args).ops}
    assert effects - {None} == ({effect} if effect else set())


def test_running_statistics_count_as_written_in_training() -> None:
    # batch-norm's write into its buffers is seen though old schemas do not say so
    recording = record(nn.BatchNorm1d(4).train(), (torch.zeros(3, 4),))
    written = {recording.values[key].name for op in recording.ops for key in op.mutates}
    assert {"running_mean", "running_var"} <= written


def test_a_value_handed_to_python_is_marked() -> None:
    # item() ends what can be seen, so the operation says so
    class Branches(nn.Module):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return ids * 2 if ids.sum().item() > 3 else ids

    recording = record(Branches(), (torch.tensor([[1, 2], [3, 4]]),))
    assert [op.name for op in recording.ops if op.syncs] == ["_local_scalar_dense"]
    assert _op(recording, "mul").index == len(recording.ops) - 1  # the real sum decided the branch
    assert recording.how == "fake"


def test_flops_of_known_layers() -> None:
    # grouped and transposed convolutions and attention are counted by their formulas
    assert _op(record(nn.Conv2d(8, 8, 3, groups=8), (torch.zeros(2, 8, 6, 6),)), "convolution").flops == (
        2 * 2 * 8 * 4 * 4 * 9
    )
    assert _op(record(nn.ConvTranspose2d(4, 6, 2, 2), (torch.zeros(1, 4, 3, 3),)), "convolution").flops == (
        2 * 4 * 9 * 6 * 4
    )

    class Attends(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.scaled_dot_product_attention(x, x, x)

    recording = record(Attends(), (torch.zeros(2, 3, 5, 4),))
    assert sum(op.flops for op in recording.ops) == 2 * 2 * 3 * 5 * 5 * (4 + 4)


def test_outputs_in_containers_are_copied() -> None:
    # what a module returned stays what it was, though the model changes the list later
    class Lists(nn.Module):
        def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
            return [x + 1]

    class Grows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lists = Lists()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            features = self.lists(x)
            features.append(x)
            return features[0]

    call = record(Grows(), (torch.zeros(2),)).calls[1]
    assert len(call.output) == 1


def test_structures_of_all_kinds() -> None:
    # tensors are found in, and rebuilt into, lists, dicts, named tuples and model outputs
    transformers = pytest.importorskip("transformers")
    output = transformers.modeling_outputs.SequenceClassifierOutput(logits=torch.ones(2), hidden_states=None)
    structure = {"a": [torch.zeros(1)], "b": (output, 3)}
    assert len(tensors_in(structure)) == 2
    mapped = map_tensors(structure, lambda t: t + 1)
    assert mapped["a"][0].item() == 1
    assert type(mapped["b"][0]) is type(output)
    assert mapped["b"][0].logits[0] == 2
    assert output.logits[0] == 1


# -- fake and real ----------------------------------------------------------------------------------


class Routes(nn.Module):
    """Control flow that depends on computed values, as in a mixture of experts."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.left, self.right = nn.Linear(4, 1), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.left(x) if self.gate(x).sum() > 0 else self.right(x)


def test_a_branch_on_computed_values_falls_back_to_two_real_samples() -> None:
    # the recording says that it is real and why, and was made on two samples
    recording = record(Routes(), (torch.randn(7, 4),))
    assert recording.how == "real"
    assert recording.batch_size == 2
    assert "real samples" in recording.notes[0]
    assert len(recording.unread) == 2  # the expert not taken


@needs_operators_in_modes
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("fake", [True, False])
def test_an_operator_that_takes_functions_is_seen_operation_by_operation(fake: bool) -> None:
    from torch.nn.attention.flex_attention import flex_attention

    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.bias = nn.Linear(4, 12), nn.Parameter(torch.zeros(5))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = self.qkv(x).reshape(-1, 5, 3, 1, 4).permute(2, 0, 3, 1, 4)
            return flex_attention(q, k, v, score_mod=lambda s, b, h, i, j: s + self.bias[i])

    recording = record(Attends().requires_grad_(False), (torch.randn(2, 5, 4),), fake=fake)
    assert recording.how == ("fake" if fake else "real")
    assert any("softmax" in op.name for op in recording.ops)
    assert any("bias" in op.parameters for op in recording.ops)  # which only the function reads
    assert not any(recording.values[key].kind == "constant" for op in recording.ops for key in op.mutates)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(dtype: torch.dtype) -> None:
    # half precision is recorded on the CPU as well
    recording = record(SmallResNet().to(dtype), (image().to(dtype),), mode="eval")
    assert recording.output.dtype == dtype


def test_wrong_input_gives_one_error_with_the_shapes() -> None:
    # the message names the model, what it was given and what to pass
    with pytest.raises(RecordingError, match=r"Linear failed.*\(2, 5\) float32.*example_input"):
        record(nn.Linear(4, 2), (torch.zeros(2, 5),))


def test_a_single_image_gives_an_error_that_asks_for_a_batch() -> None:
    # what stands first is not taken for the batch in the message, and it says what is missing
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    with pytest.raises(RecordingError, match=r"\(3, 8, 8\) float32.*got 3D input.*batch dimension first"):
        record(net, (torch.zeros(3, 8, 8),))


def test_a_branch_on_computed_values_of_a_meta_model() -> None:
    # random weights stand in for one pass; afterwards the model is on meta again, tied weights tied
    model = Routes().to("meta")
    model.right.weight = model.left.weight
    recording = record(model, (torch.randn(3, 4),))
    assert recording.how == "real"
    assert "random weights" in recording.notes[0]
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert model.right.weight is model.left.weight
    assert recording.names["left.weight"] == ("left.weight", "right.weight")


def test_a_large_meta_model_is_not_run_for_real() -> None:
    # rather than fill the memory, the message says what to do
    class Large(Routes):
        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.Embedding(2**26, 32)

    with torch.device("meta"):
        model = Large()
    with pytest.raises(RecordingError, match=r"on meta and too large \(8\.0 GiB\)"):
        record(model, (torch.zeros(2, 4),))


def test_lazy_modules_are_refused() -> None:
    # parameters without a shape cannot be grouped
    with pytest.raises(ModelError, match=r"lazy modules.*0\.weight.*Run one real batch"):
        record(nn.Sequential(nn.LazyLinear(3)), (torch.zeros(2, 4),))


@pytest.mark.filterwarnings("ignore:.torch.jit.trace:FutureWarning")  # deprecated, and still in use
def test_script_modules_count_to_their_caller() -> None:
    # a ScriptModule takes no hooks; its operations and parameters are seen all the same
    scripted = torch.jit.trace(nn.Linear(4, 3), torch.zeros(2, 4))
    recording = record(nn.Sequential(scripted, nn.Linear(3, 2)), (torch.zeros(2, 4),))
    assert recording.unread == ()
    assert [call.path for call in recording.calls] == ["", "1"]


@pytest.mark.filterwarnings("ignore:.torch.jit.trace:FutureWarning")
def test_a_model_that_is_wholly_torchscript_is_refused() -> None:
    # no call of it can be seen, and so no layer
    scripted = torch.jit.trace(nn.Linear(4, 3), torch.zeros(2, 4))
    with pytest.raises(ModelError, match=r"TopLevelTracedModule is TorchScript.*Give the Python model"):
        record(scripted, (torch.zeros(2, 4),))


# -- leaves no trace --------------------------------------------------------------------------------


class Caches(nn.Module):
    """Caches a tensor in eval, counts calls in a buffer, a list and an attribute, and draws numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("count", torch.zeros(()))
        self.seen: list[int] = []
        self.memory: dict[str, torch.Tensor] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.table = self.linear.weight.sum()
        self.count += 1
        self.seen.append(len(x))
        self.memory["last"] = x
        self.linear.extra = random.random() + np.random.rand() + torch.rand(())
        if not hasattr(self, "fresh"):
            self.register_buffer("fresh", x.mean())
        return self.norm(self.linear(x)) * self.table


def _state(model: nn.Module) -> dict[str, Any]:
    return {
        f"{path}:{name}": value
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if not isinstance(value, dict) or name == "memory"
    }


@pytest.mark.parametrize("fake", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_exactly_as_it_was(fake: bool, training: bool) -> None:
    # parameters, buffers, modes, attributes, hooks and all random states are what they were
    model = Caches().train(training)
    model.linear.eval()
    hook = model.linear.register_forward_hook(lambda *_: None)
    before = copy.deepcopy(_state(model))
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    identities = {name: id(value) for name, value in model.state_dict(keep_vars=True).items()}
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    recording = record(model, (torch.randn(3, 4),), fake=fake, mode="eval")
    assert len(recording.ops) > 5
    torch.manual_seed(1)  # the sample above was drawn after the states were taken
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (random.getstate(), np.random.get_state()[1].tolist())
    assert _state(model) == before
    assert {n: id(v) for n, v in model.state_dict(keep_vars=True).items()} == identities
    assert all(torch.equal(value, tensors[name]) for name, value in model.state_dict().items())
    assert list(model.linear._forward_hooks) == [hook.id]
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_torch_random_state_is_restored() -> None:
    # a forward pass that draws random numbers does not move the global generator
    model = nn.Dropout().train()
    before = torch.get_rng_state()
    record(model, (torch.ones(2, 4),), fake=False)
    assert torch.equal(before, torch.get_rng_state())


def test_the_message_of_a_model_stands_in_ours_with_one_full_stop() -> None:
    """timm's assertions end in a full stop of their own."""

    class Picky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise AssertionError("Input height (224) doesn't match model (64).")

    with pytest.raises(RecordingError, match=r"doesn't match model \(64\)\. Pass example_input="):
        record(Picky(), (torch.zeros(2, 2),))


class Mapped(nn.Module):
    """Calls a module inside a transform of torch.func."""

    def __init__(self, transform: Callable[[nn.Module, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.fc, self.transform = nn.Linear(2, 2), transform

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.transform(self.fc, x)


def with_stacked_weights(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    weights, _ = torch.func.stack_module_state([module, module])
    return torch.vmap(lambda w: torch.func.functional_call(module, w, (x,)))(weights).mean(0)


@pytest.mark.parametrize("fake", [True, False])
@pytest.mark.parametrize(
    "transform",
    [
        lambda module, x: torch.vmap(module)(x),
        lambda module, x: torch.func.grad(lambda v: module(v).sum())(x),
        with_stacked_weights,
    ],
)
def test_a_module_called_inside_a_transform_is_named(transform: Any, fake: bool) -> None:
    # The input is not to blame.
    message = r"of Mapped calls the module 'fc' inside a transform of torch\.func.*Call it outside"
    with pytest.raises(RecordingError, match=message):
        record(Mapped(transform), (torch.zeros(3, 2),), fake=fake)


def test_transforms_without_modules_and_modules_with_other_weights_are_recorded() -> None:
    def forward(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        weights = {name: 2 * weight for name, weight in module.named_parameters()}
        return torch.vmap(torch.sin)(torch.func.functional_call(module, weights, (x,)))

    recording = record(Mapped(forward), (torch.zeros(3, 2),))
    assert {name for op in recording.ops for name in op.parameters} == {"fc.weight", "fc.bias"}


def test_the_model_is_restored_after_an_error() -> None:
    # a pass that raises in the middle leaves no hooks and the modes as they were
    class Fails(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.halfway = self.linear(x)
            raise ValueError("no")

    model = Fails().train()
    with pytest.raises(RecordingError, match="no"):
        record(model, (torch.zeros(2, 4),), mode="eval")
    assert model.training
    assert model.linear.training
    assert not hasattr(model, "halfway")
    assert not model.linear._forward_hooks


class EntersAutocast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.linear(x)


def test_autocast_does_not_remember_weights_of_a_recording() -> None:
    # the outer autocast would hand the fake weight that the inner one cast to the next real forward
    model = EntersAutocast()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        record(model, (torch.zeros(2, 4),), grad=True)
        assert type(model(torch.ones(2, 4))) is torch.Tensor
        assert torch.is_autocast_cache_enabled()


def test_modes_are_kept_or_set_to_eval() -> None:
    # "keep" records dropout as it is, "eval" as in evaluation, and both put the modes back
    model = Tokens()
    model.blocks[0].up = nn.Sequential(model.blocks[0].up, nn.Dropout())
    model.train()
    kept = record(model, (image(),), mode="keep")
    evaluated = record(model, (image(),), mode="eval")
    assert any(op.effect == "random" for op in kept.ops)
    assert not any(op.effect == "random" for op in evaluated.ops)
    assert all(module.training for module in model.modules())


class Probed(nn.Module):
    """A classifier on features of a network that may run in inference mode."""

    def __init__(self, inference: bool) -> None:
        super().__init__()
        self.net, self.fc, self.inference = SmallResNet(), nn.Linear(5, 2), inference

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode() if self.inference else contextlib.nullcontext():
            features = self.net(x)
        return self.fc(features)


@pytest.mark.parametrize("fake", [True, False])
@pytest.mark.parametrize("inside", [True, False])
def test_inference_mode_hides_no_operation(fake: bool, inside: bool) -> None:
    # layers, costs and effects are seen in inference mode too, whether the caller or the model enters it
    def told(net: nn.Module) -> list[Any]:
        ops = record(net, (image(),), fake=fake).ops
        return [(op.parameters, op.effect, op.flops) for op in ops if op.parameters or op.effect]

    net = Probed(inference=inside)
    with contextlib.nullcontext() if inside else torch.inference_mode():
        found = told(net)
    assert found == told(Probed(inference=False))
    assert {effect for _, effect, _ in found} == {"batch", "random", None}
