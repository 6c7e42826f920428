"""Lightning carries a plan out: the same weights as the Tuner's own loop, also interrupted, also in DDP."""

import copy
import itertools
import os
import textwrap

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import layerwise
from forked import Forked, free_port, script
from layerwise.errors import LayerwiseWarning, ModelError

pl = pytest.importorskip("lightning.pytorch")
lightning = pytest.importorskip("layerwise.integrations.lightning")

pytestmark = [
    # Lightning's own advice on workers, logging intervals and the like
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*"),
]


@pytest.fixture(autouse=True)
def _no_process_group_left():
    """Lightning leaves its process group open, and its address in the environment."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE"):
            patch.setenv(name, "")  # so that it is remembered, and put back as it was
            patch.delenv(name)
        yield
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU())
        self.fc = nn.Linear(4, 2)

    def forward(self, x):
        return self.fc(self.body(x))


class Module(pl.LightningModule):
    def __init__(self, net, tuner=None):
        super().__init__()
        self.net = net
        self.tuner = tuner
        self.scores = iter([0.5, 0.4, 0.3, 0.2, 0.1, 0.0])

    def training_step(self, batch, index):
        self.train()  # some modules do
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, index):
        self.log("score", next(self.scores))

    def configure_optimizers(self):
        return self.tuner.optimizer


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(24, 3, generator=generator)
    return TensorDataset(x, (x[:, 0] > 0).long())


def start():
    torch.manual_seed(0)
    return Net()


def tuner_of(net, data, plan=None, steps_per_epoch=3, **options):
    layers = layerwise.layer_map(net, torch.randn(2, 3))
    plan = plan or layerwise.gradual_unfreezing(layers, decay=0.5, epochs_per_group=1, last_epochs=2)
    return layerwise.Tuner(
        net, plan, torch.optim.AdamW, lr=0.05, steps_per_epoch=steps_per_epoch, layers=layers, **options
    )


def fit(
    tuner, net, data, folder, *, epochs=3, checkpoint=None, validate=False, monitor=None, more=(),
    every_n_train_steps=None, cache=None, callback=None, **options,
):  # fmt: skip
    module = Module(net, tuner)
    keep = pl.callbacks.ModelCheckpoint(
        dirpath=folder,
        filename="{step}" if every_n_train_steps else "{epoch}",
        save_top_k=-1,
        every_n_train_steps=every_n_train_steps,
    )
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=folder,
        callbacks=[callback or lightning.TunerCallback(tuner, monitor=monitor), keep, *more],
        **options,
    )
    loader = DataLoader(data, 8) if cache is None else cache.as_loader(DataLoader(data, 8))
    held_out = DataLoader(validate, 8) if isinstance(validate, Dataset) else loader if validate else None
    trainer.fit(module, loader, held_out, ckpt_path=checkpoint)
    return trainer


def plain(data):
    """Return the weights that the Tuner's own loop ends in."""
    net = start()
    tuner = tuner_of(net, data)
    for _ in tuner.epochs():
        for x, y in DataLoader(data, 8):
            net.train()
            nn.functional.cross_entropy(net(x), y).backward()
            tuner.step()
    return net.state_dict()


def assert_same(one, two):
    assert list(one) == list(two)
    assert all(torch.equal(value, two[name]) for name, value in one.items())


def test_lightning_ends_in_the_weights_of_the_plain_loop(data, tmp_path):
    net = start()
    before = copy.deepcopy(net.state_dict())
    tuner = tuner_of(net, data)
    fit(tuner, net, data, tmp_path)
    assert tuner.done
    assert not torch.equal(before["body.0.weight"], net.body[0].weight)
    assert_same(net.state_dict(), plain(data))


class Quiet(Module):
    """Leaves the modes to Lightning, as most modules do."""

    def training_step(self, batch, index):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def test_step(self, batch, index):
        self.net(batch[0])


@pytest.mark.parametrize("sanity_steps", [0, 1])
@pytest.mark.parametrize("first", [None, "validate", "test"])
def test_a_group_that_joins_after_validation_is_in_train_mode(data, tmp_path, first, sanity_steps):
    # Lightning's validation calls eval(), and then assigns the modes that it saw, of which a held module does
    # not hear; its batch-norm has to move all the same once it is unfrozen
    net = start()
    tuner = tuner_of(net, data)
    trainer = pl.Trainer(
        max_epochs=3, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, default_root_dir=tmp_path, num_sanity_val_steps=sanity_steps,
        callbacks=[lightning.TunerCallback(tuner)],
    )  # fmt: skip
    module = Quiet(net, tuner)
    module.scores = itertools.repeat(0.5)
    loader = DataLoader(data, 8)
    if first is not None:
        getattr(trainer, first)(module, loader, verbose=False)
    trainer.fit(module, loader, loader)
    assert tuner.done
    assert net.body[1].training
    assert net.body[1].num_batches_tracked == 6
    assert_same(net.state_dict(), plain(data))


def test_what_the_user_holds_in_eval_mode_stays_there(data, tmp_path):
    # a batch-norm in eval mode from before the run keeps its statistics in the phase that unfreezes it, and a
    # warning says so
    net = start()
    net.body[1].eval()
    tuner = tuner_of(net, data)
    trainer = pl.Trainer(
        max_epochs=3, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, default_root_dir=tmp_path, callbacks=[lightning.TunerCallback(tuner)],
    )  # fmt: skip
    module = Quiet(net, tuner)
    module.scores = itertools.repeat(0.5)
    with pytest.warns(LayerwiseWarning, match=r"statistics of 'body\.1' should move, but .* in eval mode"):
        trainer.fit(module, DataLoader(data, 8), DataLoader(data, 8))
    assert tuner.done
    assert not net.body[1].training
    assert net.body[1].num_batches_tracked == 0


class Endless(IterableDataset):
    """The same samples again and again, without a length."""

    def __init__(self, samples):
        self.samples = samples

    def __iter__(self):
        while True:
            yield from self.samples


@pytest.mark.parametrize("monitor", [None, "score"])
def test_an_endless_stream_ends_in_the_weights_of_the_plain_loop(data, tmp_path, monitor):
    # Lightning sees one long epoch: those of the plan are counted in steps, and its end stops the training
    net = start()
    tuner = tuner_of(net, data)
    options = {"validate": data, "val_check_interval": 3, "limit_val_batches": 1} if monitor else {}
    trainer = fit(tuner, net, Endless(data), tmp_path, monitor=monitor, **options)
    assert tuner.done
    assert trainer.global_step == tuner.step_count == 9
    assert_same(net.state_dict(), plain(data))


def test_the_rates_of_the_groups_are_logged_where_asked_for(data, tmp_path):
    # by the names of the groups, those of the last step; 0 is frozen
    net = start()
    tuner = tuner_of(net, data, layerwise.linear_probe(layerwise.layer_map(net, torch.randn(2, 3)), epochs=1))
    callback = lightning.TunerCallback(tuner, log_rates=True)
    trainer = fit(tuner, net, data, tmp_path, epochs=1, callback=callback)
    logged = {name: float(value) for name, value in trainer.logged_metrics.items()}
    assert logged == {f"lr/{name}": pytest.approx(rate) for name, rate in tuner.rates().items()}
    assert sorted(logged.values())[0] == 0 < logged["lr/fc"]


def test_a_trial_run_of_one_batch_is_no_error(data, tmp_path):
    # its epoch has one step whatever the data have, which is neither the Tuner's nor worth a warning
    net = start()
    tuner = tuner_of(net, data)
    fit(tuner, net, data, tmp_path, fast_dev_run=True)
    assert tuner.step_count == 1


def test_to_validate_alone_changes_no_gradients(data, tmp_path):
    # Trainer.validate sets the same callbacks up, and trains nothing
    net = start()
    tuner = tuner_of(net, data)
    before = [parameter.requires_grad for parameter in net.parameters()]
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path,
        callbacks=[lightning.TunerCallback(tuner)],
    )  # fmt: skip
    trainer.validate(Module(net, tuner), DataLoader(data, 8), verbose=False)
    assert [parameter.requires_grad for parameter in net.parameters()] == before
    assert not all(before)


def test_the_frozen_phase_moves_nothing_frozen(data, tmp_path):
    net = start()
    tuner = tuner_of(net, data)
    with (
        layerwise.watch(net) as watched,
        pytest.warns(LayerwiseWarning, match="stops after .* optimiser steps"),
    ):
        fit(tuner, net, data, tmp_path, epochs=1)
    assert watched.report.moved == ("fc.weight", "fc.bias")
    assert watched.report.buffers_moved == ()


@pytest.mark.parametrize("epoch", [0, 1])
@pytest.mark.parametrize("validate", [False, True])
def test_resumed_after_any_epoch_it_ends_in_the_same_weights(data, tmp_path, epoch, validate):
    # before the unfreezing and after it; with validation, Lightning saves before the epoch has ended
    first = start()
    fit(tuner_of(first, data), first, data, tmp_path, validate=validate)
    second = start()
    tuner = tuner_of(second, data)
    saved = str(tmp_path / f"epoch={epoch}.ckpt")
    fit(tuner, second, data, tmp_path / "again", checkpoint=saved, validate=validate)
    assert tuner.done
    assert tuner.step_count == 9
    assert_same(second.state_dict(), first.state_dict())


@pytest.mark.parametrize("step", [2, 3, 4])
def test_resumed_in_mid_epoch_it_stands_in_the_phase_and_step_where_it_stood(data, tmp_path, step):
    # not the same weights: Lightning does not wind a plain loader forward
    first = start()
    fit(tuner_of(first, data), first, data, tmp_path, every_n_train_steps=1)
    second = start()
    tuner = tuner_of(second, data)
    seen = []

    class Look(pl.Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            moments = tuner.optimizer.state[second.fc.weight]["step"]
            seen.append((tuner.phase_index, tuner.step_count, int(moments), second.body[1].training))

    saved = str(tmp_path / f"step={step}.ckpt")
    fit(tuner, second, data, tmp_path / "again", checkpoint=saved, more=[Look()], every_n_train_steps=1)
    assert seen[0] == (step // 3, step, step, step >= 3)
    assert tuner.done
    assert tuner.step_count == 9


def test_ddp_is_built_knowing_what_learns_later(data, tmp_path):
    net = start()
    tuner = tuner_of(net, data)
    found = []

    class Look(pl.Callback):
        def on_train_epoch_end(self, trainer, module):
            wrapped = trainer.strategy.model
            assert isinstance(wrapped, nn.parallel.DistributedDataParallel)
            found.append(int(wrapped._get_ddp_logging_data()["num_parameter_tensors"]))

    module = Module(net, tuner)
    trainer = pl.Trainer(
        max_epochs=3,
        accelerator="cpu",
        devices=1,
        strategy="ddp_find_unused_parameters_true",
        use_distributed_sampler=False,  # it would shuffle
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=[lightning.TunerCallback(tuner), Look()],
    )
    trainer.fit(module, DataLoader(data, 8))
    assert found == [6, 6, 6]
    assert_same(net.state_dict(), plain(data))


def test_plain_ddp_is_refused_with_the_setting_to_use(data, tmp_path):
    net = start()
    with pytest.raises(ModelError, match="ddp_find_unused_parameters_true"):
        fit(tuner_of(net, data), net, data, tmp_path, strategy="ddp", devices=1)


def test_a_phase_ends_when_the_monitored_metric_stalls(data, tmp_path):
    net = start()
    layers = layerwise.layer_map(net, torch.randn(2, 3))
    plan = layerwise.gradual_unfreezing(layers, epochs_per_group=5, patience_epochs=1, last_epochs=1)
    tuner = tuner_of(net, data, plan)
    fit(tuner, net, data, tmp_path, epochs=6, validate=True, monitor="score")
    assert tuner.done
    assert tuner.epoch < plan.total_epochs(3)  # the score only falls


@pytest.mark.parametrize("accumulated", [1, 3])
def test_lightning_trains_from_a_cache(data, tmp_path, accumulated):
    ends = []
    for cached in (False, True):
        net = start()
        plan = layerwise.top_k(layerwise.layer_map(net, torch.randn(2, 3)), k=1, epochs=3)
        tuner = tuner_of(net, data, plan, steps_per_epoch=3 // accumulated)
        cache = layerwise.PrefixCache(net, tuner=tuner, storage="memory")
        options = {"cache": cache} if cached else {}
        fit(tuner, net, data, tmp_path / str(cached), accumulate_grad_batches=accumulated, **options)
        ends.append(net.state_dict())
    assert_same(*ends)
    assert "cut at" in cache.describe()
    (supply,) = cache._supplies
    assert supply.replays == 3


class Aging(nn.Module):
    """Computes something else in each epoch, where it knows of them."""

    owner = ()

    def forward(self, x):
        return x * (1 + sum(module.current_epoch for module in self.owner))


class Whole(pl.LightningModule):
    """Is the network itself."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(Aging(), Net().body).requires_grad_(False).eval()
        self.fc = nn.Linear(4, 2)

    def forward(self, x):
        return self.fc(self.body(x))

    def training_step(self, batch, index):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, index):
        self(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.fc.parameters(), 0.1)


@pytest.mark.parametrize("watched", ["module", "body"])
@pytest.mark.parametrize("ages", [False, True])
def test_a_module_that_is_the_network_itself_trains_from_a_cache(data, watched, ages):
    # Lightning notes in it which of its methods runs: another one when a batch is made than when it comes. Of
    # epochs the trainer knows, and a frozen part may ask the module
    ends = []
    for cached in (False, True):
        torch.manual_seed(0)
        module = Whole()
        module.body[0].owner = (module,) if ages else ()
        cache = layerwise.PrefixCache(module.body if watched == "body" else module, storage="memory")
        loaders = [DataLoader(data, 8, shuffle=True), DataLoader(data, 8)]
        trainer = pl.Trainer(
            max_epochs=3, accelerator="cpu", logger=False, enable_progress_bar=False,
            enable_checkpointing=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(module, *(map(cache.as_loader, loaders) if cached else loaders))
        ends.append(module.state_dict())
    assert_same(*ends)
    knows = ages or watched == "module"  # each epoch begins with a look
    assert [supply.replays for supply in cache._supplies] == [2, 2] if knows else [3, 3]


@pytest.mark.filterwarnings("ignore:You requested to overfit")
@pytest.mark.parametrize("cached", [False, True])
def test_a_few_batches_can_be_overfitted(data, tmp_path, cached):
    # an epoch has so many steps; the same batches in each
    net = start()
    plan = layerwise.top_k(layerwise.layer_map(net, torch.randn(2, 3)), k=1, epochs=3)
    tuner = tuner_of(net, data, plan, steps_per_epoch=2)
    cache = layerwise.PrefixCache(net, tuner=tuner, storage="memory") if cached else None
    fit(tuner, net, data, tmp_path, cache=cache, overfit_batches=2)
    assert (tuner.done, tuner.step_count) == (True, 6)


@pytest.mark.parametrize("loop", ["one", "two", "anew"])
def test_batches_of_a_cache_come_in_lightnings_order(data, tmp_path, loop):
    # also of several loaders, and where Lightning sets them up in every epoch; it tries whether what it does
    # not know can be iterated over, and that draws nothing
    def seen(cached):
        orders = []

        class Seeing(Module):
            def training_step(self, batch, index):
                orders.append([labels.tolist() for _, labels in batch])
                return sum(nn.functional.cross_entropy(self.net(x), y) for x, y in batch)

            def configure_optimizers(self):
                return torch.optim.SGD(self.net.parameters(), 0.1)

        net = start()
        net.body.requires_grad_(False).eval()
        cache = layerwise.PrefixCache(net, storage="memory")
        loaders = [DataLoader(data, 8, shuffle=True) for _ in range(2 if loop == "two" else 1)]
        trainer = pl.Trainer(
            max_epochs=3, accelerator="cpu", logger=False, enable_progress_bar=False,
            enable_checkpointing=False, enable_model_summary=False, default_root_dir=tmp_path,
            reload_dataloaders_every_n_epochs=int(loop == "anew"),
        )  # fmt: skip
        trainer.fit(Seeing(net), list(map(cache.as_loader, loaders)) if cached else loaders)
        return orders, torch.get_rng_state().tolist(), net.fc.weight.tolist()

    assert seen(cached=True) == seen(cached=False)


@pytest.mark.filterwarnings("ignore:You requested to overfit")
@pytest.mark.parametrize("part", ["train", "val", "hook"])
def test_shuffled_batches_of_a_cache_are_not_overfitted_and_the_error_says_so(data, tmp_path, part):
    # Lightning makes the loader anew, without shuffling; what stands for a loader it cannot make
    net = start()
    tuner = tuner_of(net, data, steps_per_epoch=2)
    cache = layerwise.PrefixCache(net, tuner=tuner, storage="memory")
    shuffled, plain = cache.as_loader(DataLoader(data, 8, shuffle=True)), DataLoader(data, 8)
    module = Module(net, tuner)
    if part == "hook":
        module.train_dataloader = lambda: shuffled
    trainer = pl.Trainer(
        max_epochs=3, accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False,
        enable_model_summary=False, num_sanity_val_steps=0, default_root_dir=tmp_path, overfit_batches=2,
        callbacks=[lightning.TunerCallback(tuner)],
    )  # fmt: skip
    given = {"train": (shuffled, None), "val": (plain, shuffled), "hook": ()}[part]
    error, message = (ValueError, "PrefixCache.as_loader") if part == "hook" else (ModelError, "not shuffle")
    with pytest.raises(error, match=message):
        trainer.fit(module, *given)


TWO_PROCESSES = """
    import sys
    import torch
    import lightning.pytorch as pl
    from torch import nn
    from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
    import layerwise
    from layerwise.integrations.lightning import TunerCallback

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = net

        def training_step(self, batch, index):
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return tuner.optimizer

        def train_dataloader(self):
            shares = {"all": None, "share": DistributedSampler(data)}
            return cache.as_loader(DataLoader(data, 4, sampler=shares[sys.argv[1]]))

    torch.manual_seed(0)
    data = TensorDataset(torch.randn(16, 3), torch.arange(16) % 2)
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    plan = layerwise.top_k(layerwise.layer_map(net, torch.randn(4, 3)), k=1, epochs=2)
    tuner = layerwise.Tuner(net, plan, torch.optim.SGD, lr=0.1, steps_per_epoch=2)
    cache = layerwise.PrefixCache(net, tuner=tuner, storage="memory")
    pl.Trainer(
        max_epochs=2, accelerator="cpu", devices=2, strategy="ddp_find_unused_parameters_true", logger=False,
        enable_progress_bar=False, enable_checkpointing=False, callbacks=[TunerCallback(tuner)],
    ).fit(Module())
    print(tuner.step_count, "steps;", cache.describe())
"""


@pytest.mark.parametrize("gets", ["all", "share"])
def test_a_cache_gives_each_process_its_share_or_says_how(gets, tmp_path):
    # Lightning puts a DistributedSampler into a plain loader, and leaves any other one as it is
    path = tmp_path / "train.py"
    path.write_text(textwrap.dedent(TWO_PROCESSES))
    here = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "NODE_RANK": "0"}
    started = [
        Forked(script, path, gets, environment={**os.environ, **here, "LOCAL_RANK": rank}, folder=tmp_path)
        for rank in "01"
    ]
    for done in [process.finish() for process in started]:
        if gets == "share":
            assert "4 steps; prefix cache: memory" in done.stdout, done.stderr
        else:
            assert "each process would train on all 16 samples" in done.stderr


def test_accumulated_batches_count_as_one_step(data, tmp_path):
    net = start()
    tuner = tuner_of(net, data, steps_per_epoch=2)
    fit(tuner, net, data, tmp_path, accumulate_grad_batches=2)
    assert tuner.done
    assert tuner.step_count == 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("steps", "steps_per_epoch=3"),
        ("other", "not the Tuner's"),
        ("scheduler", "returned a scheduler"),
        ("manual", "automatic_optimization"),
        ("monitor", "was not logged"),
    ],
)
def test_wrong_set_ups_are_refused(data, tmp_path, change, message, monkeypatch):
    net = start()
    tuner = tuner_of(net, data, steps_per_epoch=7 if change == "steps" else 3)
    if change == "other":
        monkeypatch.setattr(
            Module, "configure_optimizers", lambda self: torch.optim.SGD(self.net.fc.parameters(), lr=0.1)
        )
    if change == "scheduler":
        scheduled = lambda self: (  # noqa: E731
            [self.tuner.optimizer],
            [torch.optim.lr_scheduler.StepLR(self.tuner.optimizer, 1)],
        )
        monkeypatch.setattr(Module, "configure_optimizers", scheduled)
    if change == "manual":
        monkeypatch.setattr(Module, "automatic_optimization", False)
    with pytest.raises(ModelError, match=message):
        fit(
            tuner,
            net,
            data,
            tmp_path,
            validate=change == "monitor",
            monitor="oops" if change == "monitor" else None,
        )


def test_when_the_plan_is_over_nothing_moves_any_more(data, tmp_path):
    # a plan by steps ends inside an epoch
    net, other = start(), start()
    plan = layerwise.linear_probe(layerwise.layer_map(net, torch.randn(2, 3)), steps=2)
    tuner, again = tuner_of(net, data, plan), tuner_of(other, data, plan)
    fit(tuner, net, data, tmp_path)
    again.begin_epoch()
    for x, y in itertools.islice(DataLoader(data, 8), 2):
        nn.functional.cross_entropy(other(x), y).backward()
        again.step()
    assert tuner.done
    assert_same(net.state_dict(), other.state_dict())
