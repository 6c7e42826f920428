"""Learning-rate ratios in the peers: each fault is built with the peer's own code, the audit finds it, and
layerwise's own way is free of it.
"""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

import layerwise
from parity.peers import BackboneNet, grave, images, tuned

pytestmark = pytest.mark.filterwarnings("ignore")  # what the peers warn of in their own code

LATE = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 1, 0.5),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 10),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, 1, 10),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 10),
}


@pytest.fixture
def net():
    torch.manual_seed(0)
    return BackboneNet()


def join_late(net, make_scheduler):
    """Train the head for two steps, then add the backbone at the head's first rate / 2.6, and go on."""
    net.backbone.requires_grad_(False)
    optimizer = torch.optim.SGD(net.head.parameters(), lr=0.1, momentum=0.9)
    scheduler = make_scheduler(optimizer)
    for step in range(5):
        if step == 2:
            net.backbone.requires_grad_(True)
            optimizer.add_param_group({"params": list(net.backbone.parameters()), "lr": 0.1 / 2.6})
        optimizer.step()
        scheduler.step()
    head, backbone = (group["lr"] for group in optimizer.param_groups)
    return optimizer, scheduler, head / backbone


@pytest.mark.parametrize("name", LATE)
def test_torch_schedulers_lose_the_ratio_of_a_group_that_joins(net, name):
    # the other six crash: tests/unit/tuning/test_audit.py
    optimizer, scheduler, ratio = join_late(net, LATE[name])
    assert ratio != pytest.approx(2.6, rel=0.05)
    assert "late-group-off-schedule" in grave(layerwise.audit(net, optimizer, scheduler=scheduler))


def test_layerwise_keeps_the_ratio_at_every_step_of_every_phase():
    torch.manual_seed(0)
    net = BackboneNet()
    tuner = tuned(
        net,
        lambda layers: layerwise.gradual_unfreezing(
            layers, decay=1 / 2.6, schedule=layerwise.Schedule(shape="cosine", warmup_frac=0.2), join_steps=0
        ),
    )
    ratios = []
    for _ in tuner.epochs():
        for _ in range(2):
            rates = list(tuner.rates().values())
            ratios += [b / a for a, b in itertools.pairwise(rates) if a > 0]
            found = layerwise.audit(net, tuner.optimizer, layers=tuner.layers)
            assert grave(found) == set()
            net(images()).square().mean().backward()
            tuner.step()
    assert len(ratios) >= 4
    assert ratios == [pytest.approx(2.6)] * len(ratios)


def test_finetuning_scheduler_loses_the_ratio_under_a_step_schedule():
    supporters = pytest.importorskip("finetuning_scheduler.fts_supporters")

    class Module(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)

    class Bag:
        pass

    module, config = Module(), Bag()
    module.a.requires_grad_(False)
    optimizer = torch.optim.SGD(module.b.parameters(), lr=0.1, momentum=0.9)
    config.scheduler = lr_scheduler.StepLR(optimizer, 2, 0.5)
    module.trainer = Bag()
    module.trainer.lr_scheduler_configs = [config]
    for step in range(8):
        if step == 4:
            module.a.requires_grad_(True)
            supporters.ScheduleImplMixin.add_optimizer_groups(
                module, optimizer, ["a.weight", "a.bias"], lr=0.1 / 2.6
            )
        optimizer.step()
        config.scheduler.step()
    head, lower = (group["lr"] for group in optimizer.param_groups)
    assert head / lower == pytest.approx(0.65)
    assert grave(layerwise.audit(module, optimizer)) & {"late-group-off-schedule", "ratio-broken"}


def test_timm_layer_decay_is_ignored_by_torchs_schedulers():
    factory = pytest.importorskip("timm.optim")
    timm = pytest.importorskip("timm")
    model = timm.create_model("resnet18", num_classes=2)
    optimizer = factory.create_optimizer_v2(model, opt="adamw", lr=1e-3, layer_decay=0.5)
    scheduler = lr_scheduler.CosineAnnealingLR(optimizer, 10)
    for _ in range(2):
        optimizer.step()
        scheduler.step()
    assert len({group["lr"] for group in optimizer.param_groups}) == 1
    assert "lr-scale-ignored" in grave(layerwise.audit(model, optimizer, scheduler=scheduler))


def test_timm_layer_decay_does_nothing_for_other_models(net):
    factory = pytest.importorskip("timm.optim")
    optimizer = factory.create_optimizer_v2(net, opt="adamw", lr=1e-3, layer_decay=0.75)
    assert {group["lr_scale"] for group in optimizer.param_groups} == {1.0}
    assert "layer-decay-without-effect" in grave(layerwise.audit(net, optimizer))
    tuner = tuned(net, lambda layers: layerwise.discriminative(layers, decay=0.75, epochs=1))
    assert len(set(tuner.rates().values())) > 1
    assert layerwise.audit(net, tuner.optimizer, layers=tuner.layers).findings == ()


def test_a_multiplier_of_zero_is_not_freezing(net):
    # mmdetection #6599: lr_mult=0, here as its warm-up sees it: the rate of the group is not 0 for a while
    before = copy.deepcopy(net.backbone.state_dict())
    groups = [
        {"params": net.backbone.parameters(), "lr": 0.0, "lr_mult": 0.0},
        {"params": net.head.parameters()},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.1, weight_decay=0.1)
    net.train()
    net(images()).square().mean().backward()
    optimizer.step()
    assert not torch.equal(before["1.running_mean"], net.backbone[1].running_mean)
    assert "rate-zero-is-not-frozen" in grave(layerwise.audit(net, optimizer))

    ours = BackboneNet()
    tuner = tuned(ours, epochs=1)
    assert not any(p.requires_grad for p in ours.backbone.parameters())
    assert layerwise.audit(ours, tuner.optimizer, layers=tuner.layers).findings == ()


def test_hugging_face_trainer_decays_batch_norm(tmp_path):
    transformers = pytest.importorskip("transformers")
    timm = pytest.importorskip("timm")
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), weight_decay=0.1, report_to=[], use_cpu=True
    )
    # the names that slip through its list: `bn1`, `downsample.1`
    model = timm.create_model("resnet18", num_classes=2)
    optimizer = transformers.Trainer(model, arguments).create_optimizer()
    (found,) = [f for f in layerwise.audit(model, optimizer) if f.code == "decay-on-norms"]
    assert "bn1.weight" in found.modules
    tuner = tuned(model, layerwise.full, torch.randn(2, 3, 32, 32), epochs=1)
    assert layerwise.audit(model, tuner.optimizer, layers=tuner.layers).findings == ()


def test_electras_off_by_one_shows_in_the_table_of_rates():
    # google-research/electra #51, #64: with head depth n_layers + 2 the top layer is decayed twice
    transformers = pytest.importorskip("transformers")
    config = transformers.ElectraConfig(
        vocab_size=16,
        embedding_size=8,
        hidden_size=8,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=8,
    )
    model = transformers.ElectraForSequenceClassification(config)
    layers = layerwise.layer_map(model)

    def depth(name):
        if "embeddings" in name:
            return 0
        return int(name.split(".layer.")[1].split(".")[0]) + 1 if ".layer." in name else 4 + 2

    groups = [
        {"params": [p], "lr": 1e-4 * 0.8 ** (4 + 2 - depth(name))} for name, p in model.named_parameters()
    ]
    report = layerwise.audit(model, torch.optim.Adam(groups), layers=layers)
    (found,) = [f for f in report if f.code == "uneven-layer-decay"]
    assert found.modules[1] == layers.head.name
    plan = layerwise.discriminative(layers, decay=0.8, epochs=1)
    tuner = layerwise.Tuner(model, plan, torch.optim.AdamW, lr=1e-4, steps_per_epoch=1, layers=layers)
    report = layerwise.audit(model, tuner.optimizer, layers=layers)
    assert report.findings == ()
    rates = [row.lr[0] for row in report.rates]
    assert [b / a for a, b in itertools.pairwise(rates)] == [pytest.approx(1 / 0.8)] * (len(rates) - 1)
