"""Unfreezing and resuming in the peers: each fault is built with the peer's own code, the audit or the watch
finds it, and layerwise's own way is free of it. Composer's fault is left out: it needs an older torch.
"""

import copy

import pytest
import torch
from torch import nn

import layerwise
from parity.peers import BackboneNet, grave, images, run, tuned

pytestmark = pytest.mark.filterwarnings("ignore")  # what the peers warn of in their own code


@pytest.fixture
def net():
    torch.manual_seed(0)
    return BackboneNet()


def two_phases(layers):
    return layerwise.lp_ft(layers, probe_epochs=1, epochs=3)


def test_lightning_freezes_the_backbone_again_on_resume(tmp_path):
    # Lightning #21901; our callback's own resume: tests/unit/integrations/test_lightning.py
    pl = pytest.importorskip("lightning.pytorch")
    callbacks = pytest.importorskip("lightning.pytorch.callbacks")

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.backbone, self.head = nn.Linear(4, 4), nn.Linear(4, 1)

        def training_step(self, batch, index):
            return self.head(torch.tanh(self.backbone(batch[0]))).square().mean()

        def configure_optimizers(self):
            return torch.optim.Adam(self.head.parameters(), lr=1e-2)

    def fit(module, epochs, checkpoint=None):
        trainer = pl.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
            callbacks=[
                callbacks.BackboneFinetuning(unfreeze_backbone_at_epoch=1, lambda_func=lambda e: 1.0),
                callbacks.ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", save_top_k=-1),
            ],
        )
        trainer.fit(module, torch.utils.data.DataLoader(data, 8), ckpt_path=checkpoint)
        return trainer.optimizers[0]

    data = torch.utils.data.TensorDataset(torch.randn(16, 4))
    first, second = Module(), Module()
    fit(first, 3)
    assert first.backbone.weight.requires_grad
    optimizer = fit(second, 5, str(tmp_path / "epoch=2.ckpt"))
    assert not second.backbone.weight.requires_grad
    (found,) = [f for f in layerwise.audit(second, optimizer) if f.code == "frozen-with-state"]
    assert found.modules == ("backbone.weight", "backbone.bias")


def test_a_resumed_tuner_has_the_backbone_unfrozen_and_ends_in_the_same_weights(net):
    tuner = tuned(net, two_phases)
    start = copy.deepcopy(net)
    run(tuner, net)

    half = copy.deepcopy(start)
    first = tuned(half, two_phases)
    epochs = first.epochs()
    for _ in range(2):
        next(epochs)
        for _ in range(2):
            half(images()).square().mean().backward()
            first.step()
    first.end_epoch()
    saved = copy.deepcopy((half.state_dict(), first.state_dict()))

    resumed = copy.deepcopy(start)
    second = tuned(resumed, two_phases)
    resumed.load_state_dict(saved[0])
    second.load_state_dict(saved[1])
    assert resumed.backbone[0].weight.requires_grad
    assert grave(layerwise.audit(resumed, second.optimizer, layers=second.layers)) == set()
    run(second, resumed)
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in net.state_dict().items())


def test_lightning_leaves_out_parameters_that_equal_others_in_value():
    callbacks = pytest.importorskip("lightning.pytorch.callbacks")
    net = nn.Sequential(nn.LayerNorm(8), nn.LayerNorm(8))
    optimizer = torch.optim.Adam(net[0].parameters(), lr=1e-3)
    callbacks.BaseFinetuning.unfreeze_and_add_param_group(net[1], optimizer)
    report = layerwise.audit(net, optimizer)
    assert [(f.code, f.modules) for f in report] == [("trainable-not-in-optimizer", ("1.weight", "1.bias"))]

    ours = nn.Sequential(nn.LayerNorm(8), nn.LayerNorm(8), nn.Linear(8, 2))
    tuner = tuned(ours, layerwise.full, torch.randn(2, 8), epochs=1)
    assert layerwise.audit(ours, tuner.optimizer, layers=tuner.layers).findings == ()


def test_fastai_wipes_the_moments_at_each_freeze(net):
    learner = pytest.importorskip("fastai.learner")
    fastai = pytest.importorskip("fastai.basics")
    data = torch.utils.data.TensorDataset(images(), torch.zeros(16, dtype=torch.long))
    learn = learner.Learner(
        fastai.DataLoaders(fastai.DataLoader(data, 8), fastai.DataLoader(data, 8)),
        net,
        loss_func=nn.CrossEntropyLoss(),
        splitter=lambda m: [fastai.params(m.backbone), fastai.params(m.head)],
        opt_func=lambda params, **options: fastai.OptimWrapper(params, torch.optim.AdamW),
    )
    learn.unfreeze()
    net(images()).sum().backward()
    learn.opt.step()
    with layerwise.watch(net, optimizer=learn.opt.opt) as watched:
        learn.freeze()
    assert "head.2.weight" in watched.report.lost_state

    ours = BackboneNet()
    tuner = tuned(ours, two_phases)
    with layerwise.watch(ours, optimizer=tuner.optimizer) as watched:
        run(tuner, ours)  # the head trains on through the unfreezing of the backbone
    assert watched.report.lost_state == ()
    steps = tuner.optimizer.state[ours.head[2].weight]["step"]
    assert int(steps) == tuner.step_count == 6


def test_hugging_face_optimizer_steps_only_what_was_trainable_when_it_was_built(net, tmp_path):
    # LMFlow #726, ms-swift PR #10140
    transformers = pytest.importorskip("transformers")
    arguments = transformers.TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True)
    net.backbone.requires_grad_(False)
    optimizer = transformers.Trainer(net, arguments).create_optimizer()
    net.backbone.requires_grad_(True)
    report = layerwise.audit(net, optimizer)
    assert "trainable-not-in-optimizer" in grave(report)

    ours = BackboneNet()
    tuner = tuned(ours, two_phases)
    with layerwise.watch(ours) as watched:
        run(tuner, ours)
    assert "backbone.0.weight" in watched.report.moved
    assert layerwise.audit(ours, tuner.optimizer, layers=tuner.layers).findings == ()


def test_deepspeeds_zero_ignores_what_is_unfrozen(monkeypatch, tmp_path):
    # DeepSpeed #5639; layerwise's own way is that of the test above
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    deepspeed = pytest.importorskip("deepspeed")
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "1" if name == "WORLD_SIZE" else "0")  # it asks whether they are there
    net = nn.ModuleDict({"backbone": nn.Linear(4, 4), "head": nn.Linear(4, 2)})
    net.forward = lambda x: net["head"](net["backbone"](x))
    net["backbone"].requires_grad_(False)
    before = net["backbone"].weight.clone()
    settings = {
        "train_batch_size": 8,
        "zero_optimization": {"stage": 1},
        "optimizer": {"type": "AdamW", "params": {"lr": 0.1, "torch_adam": True, "weight_decay": 0.0}},
    }
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        engine, optimizer, *_ = deepspeed.initialize(
            model=net, model_parameters=list(net.parameters()), config=settings
        )
        assert grave(layerwise.audit(engine, optimizer)) == set()
        net["backbone"].requires_grad_(True)
        for _ in range(2):
            engine.backward(engine(torch.randn(8, 4)).square().mean())
            engine.step()
        assert torch.equal(net["backbone"].weight, before)
        (found,) = layerwise.audit(engine, optimizer).errors
    finally:
        torch.distributed.destroy_process_group()
    assert found.code == "trainable-not-in-optimizer"
    assert found.modules == ("module.backbone.weight", "module.backbone.bias")


def test_ddp_with_lightnings_backbone_finetuning_does_not_average_the_backbone(net, tmp_path):
    # Lightning #20340, shown here on one process: the set of averaged parameters is fixed at wrapping
    callbacks = pytest.importorskip("lightning.pytorch.callbacks")
    callbacks.BaseFinetuning.freeze(net.backbone, train_bn=False)
    optimizer = torch.optim.SGD(net.head.parameters(), lr=0.1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(net)
        callbacks.BaseFinetuning.unfreeze_and_add_param_group(net.backbone, optimizer)
        assert "ddp-built-for-other-parameters" in grave(layerwise.audit(wrapped, optimizer))

        ours = BackboneNet()
        tuner = tuned(ours, two_phases)
        with tuner.all_phases():  # wrapped once for all phases
            wrapped = nn.parallel.DistributedDataParallel(ours, find_unused_parameters=True)
        run(tuner, wrapped)
        assert grave(layerwise.audit(wrapped, tuner.optimizer, layers=tuner.layers)) == set()
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("reentrant", [True, False])
def test_reentrant_checkpointing_in_transformers_gives_no_gradients(reentrant):
    # transformers #21381
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=8,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=8,
        image_size=8,
        patch_size=4,
    )
    model = transformers.ViTForImageClassification(config)
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": reentrant})  # the second is transformers 4's name
    layerwise.freeze(model, "vit.embeddings")
    model.train()
    x = torch.randn(2, 3, 8, 8)
    model(pixel_values=x).logits.square().mean().backward()
    gets_none = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert bool(gets_none) == reentrant
    model.zero_grad()
    for loader in (None, [{"pixel_values": x}]):
        codes = grave(layerwise.audit(model, loader=loader))
        assert ("reentrant-checkpointing" in codes) == reentrant


def test_compiling_before_unfreezing(net):
    # pytorch #139476; on this version of torch it is mended, and the audit says since when
    from layerwise.tuning.audit_graph import COMPILE_NOTICES_SINCE

    torch._dynamo.reset()
    net.backbone.requires_grad_(False)
    layerwise.freeze_batchnorm(net)
    compiled = torch.compile(net, backend="aot_eager")
    compiled(images()).square().mean().backward()
    assert "compiled-before-unfreezing" in layerwise.audit(compiled).codes
    net.backbone[0].requires_grad_(True)
    net.zero_grad()
    compiled(images()).square().mean().backward()
    trains = net.backbone[0].weight.grad is not None
    notices = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= COMPILE_NOTICES_SINCE
    assert trains or not notices
