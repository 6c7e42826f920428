"""Open models of the transformers library: a local folder or a hub id, with tokenizer or image settings.

Code that comes with a model on a hub is never run: ``trust_remote_code`` stays off in every call.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerwise.errors import ModelError, plural
from layerwise.sources.fitting import Mismatched, load_file, tell_unused
from layerwise.sources.image_processors import check_pixels, from_image_processor
from layerwise.sources.opened import TASKS, OpenedModel, ReplacedHead, Task, example_image
from layerwise.sources.preprocessing import Preprocessing
from layerwise.sources.transformers_files import import_transformers, local_folder, quiet, read

if TYPE_CHECKING:
    from torch import Tensor, nn

PROBLEMS = ("single_label_classification", "multi_label_classification", "regression")
AUTO_CLASSES: dict[Task, str] = {
    "image_classification": "AutoModelForImageClassification",
    "text_classification": "AutoModelForSequenceClassification",
    "token_classification": "AutoModelForTokenClassification",
    "causal_lm": "AutoModelForCausalLM",
    "masked_lm": "AutoModelForMaskedLM",
}
WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin", "*.index.json")
DEFAULT_MAX_LENGTH = 512
EXAMPLE_TEXTS = ["A short text.", "Another text, which is somewhat longer than the first."]


def open_model(
    spec: str,
    name: str,
    *,
    num_classes: int | None,
    weights: str | Path | None,
    pretrained: bool,
    input_size: int | tuple[int, int] | None,
    preprocessing: Preprocessing | None,
    task: Task | None,
    problem: str | None,
    mismatched: Mismatched,
) -> OpenedModel:
    """Return the transformers model at `name`; see `layerwise.sources.models.open_model`.

    The output layer is made by transformers itself, so that the configuration says the right number of
    labels and `save_pretrained` writes a folder that others can load. Weights are float32, whatever they
    are stored in: see `layerwise.fit` for training in mixed precision.
    """
    transformers = import_transformers(spec)
    folder = local_folder(name)
    name = str(folder or name)
    config = read(spec, lambda: transformers.AutoConfig.from_pretrained(name, trust_remote_code=False))
    task = task or _task_of(spec, config)
    _check_wanted(task, num_classes, problem)
    labelled = task.endswith("classification")
    old_classes = config.num_labels if labelled else None
    if num_classes is not None and num_classes != config.num_labels:
        config.num_labels = num_classes
    if problem is not None:
        config.problem_type = problem
    notes = _told_of_precision(config)
    auto = getattr(transformers, AUTO_CLASSES[task])
    download = pretrained and weights is None
    if download:
        if folder is not None:
            _require_weights(folder)
        model, replaced, told = _pretrained(spec, auto, name, config, old_classes, num_classes)
    else:
        model, replaced, told = _from_config(spec, auto, config, weights, num_classes, mismatched)
    notes += told
    if replaced is not None:
        notes.append(str(replaced))

    tokenizer: Any = None
    example: Any = None
    if task == "image_classification":
        if preprocessing is None:
            channels = getattr(config, "num_channels", None)
            preprocessing = _image_settings(spec, name, transformers, channels)
        if input_size is not None:
            preprocessing = preprocessing.at(input_size)
        example = example_image(preprocessing)
    else:
        tokenizer = open_tokenizer(spec, name, model, notes)
        example = dict(tokenizer(EXAMPLE_TEXTS, padding=True, return_tensors="pt"))
        if task == "causal_lm":
            _require_causal(spec, model, tokenizer(EXAMPLE_TEXTS[0], return_tensors="pt")["input_ids"])
    return OpenedModel(
        model=model.eval(),
        spec=spec,
        task=task,
        weights=str(weights) if weights is not None else "pretrained" if download else "random",
        num_classes=config.num_labels if labelled else None,
        preprocessing=preprocessing if task == "image_classification" else None,
        tokenizer=tokenizer,
        example_input=example,
        replaced_head=replaced,
        notes=tuple(notes),
        max_length=None if tokenizer is None else max_length_of(model, tokenizer),
        problem=problem,
    )


def _check_wanted(task: str, num_classes: int | None, problem: str | None) -> None:
    if task not in TASKS:
        raise ModelError(f"task is {task!r}; expected one of {', '.join(TASKS)}.")
    if problem not in (None, *PROBLEMS):
        raise ModelError(f"problem is {problem!r}; expected one of {', '.join(PROBLEMS)}.")
    if num_classes is not None and not task.endswith("classification"):
        raise ModelError(f"num_classes is {num_classes}, but a model for {task} has no classes.")


def _told_of_precision(config: Any) -> list[str]:
    """Return a line about weights of half precision, none of others.

    In half precision an optimiser's steps are mostly smaller than the weights' last bit.
    """
    import torch

    stored = getattr(config, "dtype", None)
    if stored not in (torch.float16, torch.bfloat16):
        return []
    return [f"weights are stored as {str(stored).removeprefix('torch.')}; opened as float32, to learn"]


def _pretrained(
    spec: str, auto: Any, name: str, config: Any, old_classes: int | None, num_classes: int | None
) -> tuple[nn.Module, ReplacedHead | None, list[str]]:
    """Return the model at `name` with its own weights, its output layer if that is new, and notes."""
    import torch

    model, info = read(
        spec,
        lambda: auto.from_pretrained(
            name,
            config=config,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            dtype=torch.float32,
        ),
    )
    return model, *_loading_notes(spec, model, info, old_classes, num_classes)


def _from_config(
    spec: str,
    auto: Any,
    config: Any,
    weights: str | Path | None,
    num_classes: int | None,
    mismatched: Mismatched,
) -> tuple[nn.Module, ReplacedHead | None, list[str]]:
    """Return a model of random weights, or of those in a file; see `_pretrained`."""
    import torch

    made = read(spec, lambda: auto.from_config(config, trust_remote_code=False, dtype=torch.float32))
    model: nn.Module = made.float()  # transformers 4.56 asks the configuration all the same
    if weights is None:
        return model, None, []
    loaded = load_file(
        spec,
        model,
        Path(weights),
        num_classes=num_classes,
        outputs=lambda: (*_head_modules(model), *_poolers(model)),
        resize=None,  # its labels are set by the configuration, before it is built
        mismatched=mismatched,
    )
    replaced = None
    if loaded.head_is_new and num_classes is not None:
        replaced = ReplacedHead(loaded.new or _head_modules(model), None, num_classes)
    return model, replaced, [*loaded.notes]


def task_of(spec: str, name: str) -> Task:
    """Return what the model at `name` is for, as its configuration says.

    Raises:
        ModelError: there is none, or it classifies neither images nor texts.
    """
    transformers = import_transformers(spec)
    name = str(local_folder(name) or name)
    config = read(spec, lambda: transformers.AutoConfig.from_pretrained(name, trust_remote_code=False))
    return _task_of(spec, config)


def max_length_of(model: nn.Module, tokenizer: Any) -> int:
    """Return how many tokens `model` and `tokenizer` take at most; 512 where neither sets a limit.

    A table of learned positions sets one, less the rows before the first position that RoBERTa's kind
    leaves out (its index starts after the padding index).
    """
    limits = []
    if tokenizer.model_max_length < 10**9:  # transformers writes 1e30 for "none"
        limits.append(int(tokenizer.model_max_length))
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions:
        padding = [
            table.padding_idx
            for name, table in model.named_modules()
            if name.endswith("position_embeddings") and getattr(table, "padding_idx", None) is not None
        ]
        limits.append(int(positions) - (padding[0] + 1 if padding else 0))
    return min(limits, default=DEFAULT_MAX_LENGTH)


def open_tokenizer(spec: str, name: str, model: nn.Module, notes: list[str]) -> Any:
    """Return the tokenizer at `name`, checked against `model`; it is given a padding token if it has none.

    Args:
        spec: for messages.
        name: folder or hub id.
        model: a transformers model; its configuration gets the id of the padding token.
        notes: gets a line where something was chosen.

    Raises:
        ModelError: there is no tokenizer, or it makes ids that the model has no embedding for.
    """
    tokenizer = read_tokenizer(spec, name)
    rows = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    vocabulary = tokenizer.get_vocab()
    if set(vocabulary) <= set(tokenizer.all_special_tokens):
        raise ModelError(
            f"the tokenizer of {spec!r} has no vocabulary. Expected tokenizer.json, vocab.txt or the like "
            f"beside config.json."
        )
    highest = max(vocabulary.values())
    if highest >= rows:
        raise ModelError(
            f"the tokenizer of {spec!r} does not fit its model: its ids go up to {highest}, and the model "
            f"has {rows} embeddings. Expected the tokenizer that the model was trained with; put its files "
            f"into the model's folder."
        )
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ModelError(
                f"the tokenizer of {spec!r} has neither a padding nor an end token; expected one, to make "
                f"texts of one length. Set pad_token in its tokenizer_config.json."
            )
        tokenizer.pad_token = tokenizer.eos_token
        notes.append(f"the tokenizer has no padding token: the end token {tokenizer.eos_token!r} is used")
    config: Any = model.config
    if getattr(config, "pad_token_id", None) is None:
        # Decoders that classify look for the last token that is no padding.
        config.pad_token_id = tokenizer.pad_token_id
    return tokenizer


def read_tokenizer(spec: str, name: str) -> Any:
    """Return the tokenizer at `name` (folder or hub id) as it is.

    Raises:
        ModelError: there is none, or it cannot be read.
    """
    transformers = import_transformers(spec)
    return read(
        spec, lambda: transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False), "tokenizer"
    )


def _task_of(spec: str, config: Any) -> Task:
    """Return what a configuration's model is for, as its library's own tables say."""
    from transformers.models.auto import modeling_auto as tables

    for architecture in config.architectures or ():
        for ending, task in (
            ("ForImageClassification", "image_classification"),
            ("ForSequenceClassification", "text_classification"),
            ("ForTokenClassification", "token_classification"),
        ):
            if architecture.endswith(ending):
                return task  # type: ignore[return-value]
    if config.model_type in tables.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES:
        return "image_classification"
    if config.model_type in tables.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES:
        return "text_classification"
    raise ModelError(
        f"{spec!r} is a {config.model_type!r} model, which transformers has no image or text classifier for. "
        f"Name another task (task=), or give FILE.py:FUNCTION."
    )


def _require_weights(folder: Path) -> None:
    if any(found for pattern in WEIGHT_FILES for found in folder.glob(pattern)):
        return
    inside = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8])
    raise ModelError(
        f"folder {str(folder)!r} has no weights (it holds {inside}). Expected model.safetensors beside "
        f"config.json. Give a file (--weights FILE), or start from "
        f"random weights: --no-pretrained (pretrained=False)."
    )


def _loading_notes(
    spec: str, model: nn.Module, info: Mapping[str, Any], old_classes: int | None, num_classes: int | None
) -> tuple[ReplacedHead | None, list[str]]:
    """Return the output layer that is new, and lines about other tensors that did not match.

    Raises:
        ModelError: tensors of the network's body have no weights.
    """
    mismatched = {entry[0] if isinstance(entry, tuple) else entry for entry in info["mismatched_keys"]}
    new = sorted(set(info["missing_keys"]) | mismatched)
    # A pooler counts as head: encoders pretrained on words alone are published without one.
    body = f"{model.base_model_prefix}."
    in_body = [name for name in new if name.startswith(body) and "pooler" not in name]
    if in_body:
        count = plural(len(in_body), "tensor of the body is", "tensors of the body are")
        raise ModelError(
            f"the weights of {spec!r} do not fit its configuration: {count} missing or of another shape "
            f"({', '.join(in_body[:5])}). Expected weights and config.json of one model."
        )
    notes = tell_unused(sorted(info["unexpected_keys"]))
    modules = tuple(dict.fromkeys(n.rpartition(".")[0] for n in new))
    if not modules:
        return None, notes
    from_file = old_classes if mismatched else None
    new_classes = num_classes or old_classes
    if new_classes is None:  # a language model
        new_classes = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    return ReplacedHead(modules, from_file, new_classes), notes


def _head_modules(model: nn.Module) -> tuple[str, ...]:
    """Return the paths of the modules with parameters outside the network's body."""
    body = str(model.base_model_prefix) + "."
    names = [name for name, _ in model.named_parameters() if not name.startswith(body)]
    return tuple(dict.fromkeys(name.rpartition(".")[0] for name in names))


def _poolers(model: nn.Module) -> tuple[str, ...]:
    """Return the paths of the body's poolers, which count as head (see `_loading_notes`)."""
    return tuple(path for path, _ in model.named_modules() if path.endswith("pooler"))


def _require_causal(spec: str, model: nn.Module, ids: Tensor) -> None:
    """Raise `ModelError` if what `model` says at the first of `ids` (1, n) depends on later tokens."""
    import torch

    ids = ids.repeat(1, 2)  # so that there are two
    others = (ids == 0).to(ids)
    others[0, 0] = ids[0, 0]
    training = model.training
    with quiet(), torch.no_grad():
        first, other = (model.eval()(input_ids=given).logits[0, 0] for given in (ids, others))
    model.train(training)
    if not torch.allclose(first, other, rtol=1e-4, atol=1e-5):
        raise ModelError(
            f"{spec!r} reads a text in both directions, so as a causal language model it would see the "
            "tokens that it is to predict. Expected a decoder; for this model take --task masked_lm (task=), "
            'or set "is_decoder": true in its config.json where its class has that.'
        )


def _image_settings(spec: str, name: str, transformers: Any, channels: int | None) -> Preprocessing:
    """Return what the model's own image processor does, checked on a picture."""
    # Made by transformers, since files leave out what their class has as default.
    processor = read(
        spec,
        lambda: transformers.AutoImageProcessor.from_pretrained(name, trust_remote_code=False),
        "image processor",
    )
    settings = from_image_processor(processor.to_dict(), channels)
    with quiet():
        check_pixels(processor, settings)
    return settings
