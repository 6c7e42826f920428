"""Frozen batch-norm in the peers: each fault is built with the peer's own code, the audit finds it, and
layerwise's own way is free of it. The faults are those that users have open issues about.
"""

import copy

import pytest
import torch
from torch import nn

import layerwise
from parity.peers import BackboneNet, grave, images, run, tuned

# What the peers warn of in their own code is not the subject here.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def net():
    torch.manual_seed(0)
    return BackboneNet()


def features_differ_between_modes(net):
    """Return whether the frozen part gives the head other features in training than in evaluation."""
    body = copy.deepcopy(net.backbone)
    trained = copy.deepcopy(body).train()(images())
    return not torch.equal(trained, body.eval()(images()))


def statistics_drift(net):
    net = copy.deepcopy(net).train()
    with layerwise.watch(net) as watched:
        net(images())
    return bool(watched.report.buffers_moved)


def test_layerwise_own_path_has_none_of_the_faults_below(net):
    assert features_differ_between_modes(net)  # the helpers reject a network that nobody froze
    assert statistics_drift(net)
    tuner = tuned(net, epochs=2)
    assert layerwise.audit(net, tuner.optimizer, layers=tuner.layers, loader=[images()]).findings == ()
    with layerwise.watch(net, optimizer=tuner.optimizer) as watched:
        run(tuner, net)
    watched.report.raise_if_frozen_moved()
    assert watched.report.moved == ("head.2.weight", "head.2.bias")
    assert watched.report.buffers_moved == ()
    assert not features_differ_between_modes(net)


def test_lightning_freeze_normalises_by_the_batch(net):
    callbacks = pytest.importorskip("lightning.pytorch.callbacks")
    callbacks.BaseFinetuning.freeze(net.backbone, train_bn=False)
    assert not statistics_drift(net)
    assert features_differ_between_modes(net)
    assert "frozen-norm-uses-batch" in grave(layerwise.audit(net))


def test_lightning_backbone_finetuning_forgets_its_own_flag(net):
    # Lightning #13902, #21531
    callbacks = pytest.importorskip("lightning.pytorch.callbacks")
    callback = callbacks.BackboneFinetuning(train_bn=False)
    callback.freeze_before_training(net)
    assert statistics_drift(net)
    report = layerwise.audit(net)
    assert [(f.code, f.module) for f in report] == [("norm-trains-in-frozen-part", "backbone.1")]


def test_finetuning_scheduler_lets_frozen_statistics_drift(net, tmp_path):
    fts = pytest.importorskip("finetuning_scheduler")
    pl = pytest.importorskip("lightning.pytorch")
    found, drift = [], []

    class Look(pl.Callback):
        def on_train_batch_start(self, trainer, module, batch, index):
            found.append(grave(layerwise.audit(module.net, trainer.optimizers)))
            drift.append(statistics_drift(module.net))

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = net

        def training_step(self, batch, index):
            return self.net(batch[0]).square().mean()

        def configure_optimizers(self):
            learning = [p for p in self.parameters() if p.requires_grad]
            return torch.optim.SGD(learning, lr=0.1)

    schedule = tmp_path / "schedule.yaml"
    schedule.write_text("0:\n  params:\n  - net.head.*\n1:\n  params:\n  - net.backbone.*\n")
    trainer = pl.Trainer(
        max_epochs=1,
        limit_train_batches=1,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        callbacks=[fts.FinetuningScheduler(ft_schedule=str(schedule)), Look()],
    )
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images()), 16)
    trainer.fit(Module(), loader, loader)
    assert drift == [True]
    assert found[0] & {"frozen-norm-trains", "norm-trains-in-frozen-part"}


def test_hugging_face_trainer_undoes_eval_at_every_step(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ResNetConfig(
        embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=2
    )
    data = [{"pixel_values": torch.randn(3, 16, 16), "labels": i % 2} for i in range(8)]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
    )

    def train(model):
        with layerwise.watch(model) as watched:
            transformers.Trainer(model, arguments, train_dataset=data).train()
        return watched.report

    by_hand = transformers.ResNetForImageClassification(config)
    by_hand.resnet.requires_grad_(False)
    by_hand.train()
    by_hand.resnet.eval()  # what forums advise
    report = layerwise.audit(by_hand)
    assert grave(report) == {"frozen-norm-eval-undone"}
    assert train(by_hand).frozen_buffers_moved

    ours = transformers.ResNetForImageClassification(config)
    layerwise.freeze(ours, "resnet")
    assert grave(layerwise.audit(ours)) == set()
    after = train(ours)
    after.raise_if_frozen_moved()
    assert "classifier.1.weight" in after.moved


def test_peft_lets_the_base_drift_and_does_not_save_it(tmp_path):
    peft = pytest.importorskip("peft")
    from safetensors.torch import load_file

    torch.manual_seed(0)
    base = nn.Sequential()
    base.add_module("conv", nn.Conv2d(3, 4, 1))
    base.add_module("bn", nn.BatchNorm2d(4))
    base.add_module("head", nn.Conv2d(4, 2, 1))
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["conv"], modules_to_save=["head"]))
    assert "frozen-norm-trains" in grave(layerwise.audit(model))
    assert statistics_drift_of(model)
    model.save_pretrained(tmp_path)
    assert not any("running" in name for name in load_file(tmp_path / "adapter_model.safetensors"))
    layerwise.freeze_batchnorm(model)
    assert grave(layerwise.audit(model)) == set()
    assert not statistics_drift_of(model)


def statistics_drift_of(peft_model):
    peft_model.train()
    with layerwise.watch(peft_model) as watched:
        peft_model.base_model.model(images())
    return bool(watched.report.frozen_buffers_moved)


def test_timm_freezes_batch_norm_2d_only():
    utils = pytest.importorskip("timm.utils")
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    utils.freeze(net, ["0", "1"])
    assert grave(layerwise.audit(net)) == {"frozen-norm-trains"}
    ours = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    layerwise.freeze(ours, "0", "1")
    assert layerwise.audit(ours).findings == ()


def test_timm_swaps_modules_and_loses_parameters_on_unfreezing():
    utils = pytest.importorskip("timm.utils")

    def build():
        net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
        return net, torch.optim.SGD(net.parameters(), lr=0.1)

    theirs, optimizer = build()
    keys = list(theirs.state_dict())
    utils.freeze(theirs)
    assert list(theirs.state_dict()) != keys
    utils.unfreeze(theirs)
    report = layerwise.audit(theirs, optimizer)
    assert grave(report) == {"optimizer-holds-strangers", "trainable-not-in-optimizer"}

    ours, optimizer = build()
    layerwise.freeze(ours)
    assert list(ours.state_dict()) == keys
    layerwise.unfreeze(ours)
    assert layerwise.audit(ours, optimizer).findings == ()


def test_fastai_misses_sync_batch_norm_and_crashes_on_affine_free():
    training = pytest.importorskip("fastai.callback.training")
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.SyncBatchNorm(4), nn.Conv2d(4, 2, 1))
    net[:2].requires_grad_(False)
    net.train()
    training.set_bn_eval(net)
    assert net[1].training
    assert grave(layerwise.audit(net)) == {"frozen-norm-trains"}
    layerwise.freeze_batchnorm(net)
    assert layerwise.audit(net).findings == ()

    affine_free = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, affine=False))
    with pytest.raises(StopIteration):
        training.set_bn_eval(affine_free)
    assert layerwise.freeze_batchnorm(affine_free).names == ("1",)


def test_fastai_trains_batch_norm_in_its_frozen_body(net):
    learner = pytest.importorskip("fastai.learner")
    fastai = pytest.importorskip("fastai.basics")
    data = torch.utils.data.TensorDataset(images(), torch.zeros(16, dtype=torch.long))
    loaders = fastai.DataLoaders(fastai.DataLoader(data, 8), fastai.DataLoader(data, 8))
    learn = learner.Learner(
        loaders,
        net,
        loss_func=nn.CrossEntropyLoss(),
        splitter=lambda m: [fastai.params(m.backbone), fastai.params(m.head)],
    )
    learn.freeze()
    assert not net.backbone[0].weight.requires_grad
    assert net.backbone[1].weight.requires_grad
    assert "norm-trains-in-frozen-part" in grave(layerwise.audit(net))
    assert statistics_drift(net)
