"""A run described by names: what the command line gives, and what a run needs to be resumed by name."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from layerwise.errors import DataError, ModelError, PlanError
from layerwise.layers.randomness import seed_everything
from layerwise.plans.plan import Plan
from layerwise.training.fit import fit
from layerwise.training.options import check_options
from layerwise.training.result import Result

if TYPE_CHECKING:
    from layerwise.layers.layermap import LayerMap
    from layerwise.sources.images import ImageData
    from layerwise.sources.imageset import ImageSet
    from layerwise.sources.opened import OpenedModel
    from layerwise.sources.preprocessing import Preprocessing
    from layerwise.training.dryrun import DryRun
    from layerwise.training.text_job import PreparedText

DEMO_DATA = "demo:elpv"
"""Data of this name are the packaged solar cells; ``demo:elpv:800/400/600`` says how many of them."""
NAMED = ("demo:", "hf:")
"""How the names of data sets that are no paths begin."""
IMAGE_TABLE = ("path_column", "label_column", "split_column", "skip_bad_rows")
"""What can be said of a table of images (`layerwise.sources.images.open_images`)."""


@dataclass(frozen=True)
class Job:
    """Everything that defines a run, as plain data.

    Attributes:
        model: spec of the model (``"timm:resnet18"``).
        data: folder or table of images, or `DEMO_DATA`.
        strategy: a strategy with its options (``"top_k:k=2"``); exactly one of this and `plan`.
        plan: path of a plan file.
        weights: path of a weights file; None is the library's own pretrained ones.
        mismatched: what to do with `weights` for other classes: ``"error"``, or ``"drop_head"``: take all but
            the output layer.
        pretrained: False starts from random weights.
        granularity: of the layer map, for `strategy`; a plan file has its own.
        epochs: length of the plan, for `strategy`; None is the strategy's default.
        schedule: name of a schedule's shape, for `strategy`.
        norms: name of a norm policy, for `strategy`.
        input_size: side of the images in pixels; None is the model's own.
        val_frac: share of train to validate on, where the data has no part for it.
        test_frac: share of train to test on at the end, likewise.
        augment: random variation of the training images.
        skip_bad_images: leave out images that cannot be read.
        options: of `layerwise.fit`, those that are not its defaults.
        text: what is said of a table: fields of `layerwise.training.text_job.TextOptions` where the model
            reads texts, those of `IMAGE_TABLE` where it takes images; None for nothing.
    """

    model: str
    data: str
    strategy: str | None = None
    plan: str | None = None
    weights: str | None = None
    mismatched: str = "error"
    pretrained: bool = True
    granularity: str = "blocks"
    epochs: int | None = None
    schedule: str | None = None
    norms: str | None = None
    input_size: int | None = None
    val_frac: float = 0.2
    test_frac: float = 0.0
    augment: str = "none"
    skip_bad_images: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    text: dict[str, Any] | None = None

    @property
    def seed(self) -> int:
        """Seed of the split, the new head and the run."""
        return int(self.options.get("seed", 0))


@dataclass(frozen=True)
class Prepared:
    """A job with its model and data open.

    Attributes:
        job: as given.
        opened: the model and its preprocessing.
        data: train, val and test.
        layers: the model's layer map at the plan's granularity.
        plan: what to do.
        about: what ``run.json`` shall tell of all this.
        notes: what was chosen on the way, for people.
    """

    job: Job
    opened: OpenedModel
    data: ImageData
    layers: LayerMap
    plan: Plan
    about: dict[str, Any]
    notes: tuple[str, ...]

    def fit(self, **more: Any) -> Result:
        """Carry the job out; `more` are further options of `layerwise.fit`, such as `out`."""
        return fit(
            self.opened.model,
            self.data.train,
            self.data.val,
            test=self.data.test,
            plan=self.plan,
            layers=self.layers,
            classes=self.data.classes,
            about=self.about,
            **{**self.job.options, **more},
        )

    def dry_run(self) -> DryRun:
        """Return what the job would do, measured on a few steps (see `layerwise.training.dryrun`)."""
        from layerwise.training.dryrun import dry_run

        return dry_run(
            self.opened.model,
            self.data.train,
            self.data.val,
            plan=self.plan,
            layers=self.layers,
            classes=self.data.classes,
            **self.job.options,
        )


def open_job(job: Job, *, plan: Plan | None = None, **more: Any) -> Prepared | PreparedText:
    """Open the model and the data of a job, on texts where the model reads them, else on images.

    See `prepare` and `prepare_text`. Names and options are looked at before the data are read.

    Args:
        job: what to do.
        plan: to use instead of what the job names.
        more: options that its ``fit`` will be given besides (`workers`), to be looked at with the job's own.

    Raises:
        TrainingError: options of `fit` cannot be used; all are listed.
        LayerwiseError: as `prepare` says.
    """
    from layerwise.sources.modelnames import check_name
    from layerwise.sources.models import takes_texts
    from layerwise.sources.weights import check_weights

    plan = plan if plan is not None else _named_plan(job)
    defaults = {name: option.default for name, option in inspect.signature(fit).parameters.items()}
    check_options({**defaults, **job.options, **more})
    check_name(job.model, pretrained=job.pretrained and job.weights is None)  # data may take long to read
    if job.weights is not None:
        check_weights(job.weights)
    if not takes_texts(job.model):
        return prepare(job, plan=plan)
    from layerwise.training.text_job import prepare_text

    return prepare_text(job, plan=plan)


def _named_plan(job: Job) -> Plan | None:
    """Return the plan in the file that a job names, None for a strategy.

    Raises:
        PlanError: not exactly one of the two is given, or with options of its own, or the file is wrong.
    """
    if (job.strategy is None) == (job.plan is None):
        got = "both are given" if job.strategy else "neither is given"
        raise PlanError(f"exactly one of a strategy and a plan file says what learns; {got}.")
    from layerwise.plans.parsing import check_strategy, load_alone

    common = {"epochs": job.epochs, "schedule": job.schedule, "norms": job.norms}
    if job.plan is None:
        check_strategy(str(job.strategy), **common)  # what is quick to find wrong comes first
        return None
    return load_alone(job.plan, **common)


def prepare(job: Job, *, plan: Plan | None = None) -> Prepared:
    """Open the model and the data of a job, and lay out its plan.

    The new head is initialised from ``job.seed``, so two calls give the same model.

    Args:
        job: what to do.
        plan: to use instead of what the job names (the one of a run that is resumed).

    Raises:
        LayerwiseError: model, weights, data or plan cannot be opened, or do not fit each other.
    """
    from layerwise.sources.models import open_model
    from layerwise.sources.opened import in_order_of_outputs
    from layerwise.sources.preprocessing import Preprocessing

    plan = plan if plan is not None else _named_plan(job)
    if for_texts := [name for name in job.text or {} if name not in IMAGE_TABLE]:
        raise ModelError(
            f"texts need a model that brings its tokenizer; {job.model!r} takes images. Give "
            f"hf:FOLDER_OR_ID, or leave {', '.join(map(option_name, for_texts))} out."
        )

    # The data says how many classes the head must tell apart, the model how it wants its images; so the
    # images are opened first and get their preprocessing afterwards.
    any_size = Preprocessing(crop=(32, 32), resize=None)
    any_size.transform(cast(Any, job.augment))  # refuses an unknown name before the data are read
    found = _open_data(job, any_size)
    seed_everything(job.seed)
    opened = open_model(
        job.model,
        num_classes=len(found.classes),
        weights=job.weights,
        pretrained=job.pretrained,
        input_size=job.input_size,
        mismatched=cast(Any, job.mismatched),
    )
    if opened.preprocessing is None:
        raise ModelError(f"{job.model!r} takes no images; give a model that does (timm:, torchvision:, hf:).")
    classes, told = in_order_of_outputs(found.classes, opened)
    prepared: dict[str, Any] = {
        name: _prepared(part, opened.preprocessing, classes) for name, part in found.parts().items()
    }
    data = dataclasses.replace(found, **prepared, classes=classes, notes=(*found.notes, *told))
    layers, plan = lay_out(job, opened, plan)
    about = {
        "model": opened.to_dict(),
        "data": {
            "source": job.data,
            "classes": list(data.classes),
            "samples": {name: len(part) for name, part in data.parts().items()},
            "digest": {name: _digest(part) for name, part in data.parts().items()},
            "augment": job.augment,
            "skipped": [list(entry) for entry in data.skipped],
        },
        "job": dataclasses.asdict(job),
    }
    skipped = [f"left out {path}: {reason}" for path, reason in data.skipped]
    return Prepared(job, opened, data, layers, plan, about, (*opened.notes, *data.notes, *skipped))


def lay_out(job: Job, opened: OpenedModel, plan: Plan | None) -> tuple[LayerMap, Plan]:
    """Return an opened model's layer map at the plan's granularity, and the plan; None is the job's strategy.

    Raises:
        PlanError: they do not fit each other.
    """
    from layerwise.layers.mapping import layer_map
    from layerwise.plans.parsing import parse_strategy

    granularity = cast(Any, plan.granularity if plan is not None else job.granularity)
    layers = layer_map(opened.model, opened.example_input, granularity=granularity)
    if plan is None:
        plan = parse_strategy(
            cast(str, job.strategy), layers, epochs=job.epochs, schedule=job.schedule, norms=job.norms
        )
    plan.check(layers)
    return layers, plan


def _open_data(job: Job, preprocessing: Preprocessing) -> ImageData:
    from layerwise.sources.demo import elpv_images
    from layerwise.sources.images import open_images
    from layerwise.sources.splits import fracs_to_split

    augment = cast(Any, job.augment)
    if job.text and (job.data.startswith(DEMO_DATA) or Path(job.data).is_dir()):
        given = ", ".join(map(option_name, job.text))
        raise DataError(f"{given}: {job.data!r} is no table. Leave it out, or give a table.")
    if job.data.startswith(NAMED) and not job.data.startswith(DEMO_DATA):
        raise DataError(
            f"data {job.data!r} is no set of images: named are {DEMO_DATA} alone, and hf: data are "
            "texts, for hf: models that read them. Give a folder with a folder of images a class, or a table."
        )
    if not job.data.startswith(DEMO_DATA):
        return open_images(
            job.data,
            preprocessing,
            val_frac=job.val_frac,
            test_frac=job.test_frac,
            seed=job.seed,
            augment=augment,
            skip_bad_images=job.skip_bad_images,
            **(job.text or {}),
        )
    counts = job.data.removeprefix(DEMO_DATA).lstrip(":").split("/")
    sizes = {}
    if counts != [""]:
        if len(counts) != 3 or not all(count.isdecimal() for count in counts):
            raise DataError(
                f"data {job.data!r}: expected {DEMO_DATA} or {DEMO_DATA}:TRAIN/VAL/TEST, three numbers."
            )
        sizes = {f"{part}_samples": int(count) for part, count in zip(("train", "val", "test"), counts)}
    data = elpv_images(preprocessing, seed=job.seed, augment=augment, **sizes)
    _, unused = fracs_to_split(data.parts(), val_frac=job.val_frac, test_frac=job.test_frac)
    return dataclasses.replace(data, notes=(*data.notes, *unused))


def data_name(data: str | Path) -> str:
    """Return data as a job keeps them: names of data sets as they are, paths absolute."""
    name = str(data)
    return name if name.startswith(NAMED) else str(Path(name).resolve())


def option_name(name: str) -> str:
    """Return what the command line calls a field of `Job.text`."""
    return f"--{name.replace('_', '-')}{'-data' if name in ('val', 'test') else ''}"


def _prepared(part: ImageSet, preprocessing: Preprocessing, classes: tuple[str, ...]) -> ImageSet:
    from layerwise.sources.imageset import ImageSet

    made = ImageSet(part.paths, part.targets, part.classes, preprocessing, augment=part.augment)
    return made.in_order(classes)


def _digest(part: ImageSet) -> str:
    """Return a hash of names, sizes and labels, so that a run is not resumed on other data."""
    digest = hashlib.sha256()
    for path, target in zip(part.paths, part.targets):
        file = Path(path)
        digest.update(
            f"{file.parent.name}/{file.name}\0{file.stat().st_size}\0{target}\n".encode(
                errors="surrogateescape"
            )
        )
    return digest.hexdigest()[:16]
