"""`OpenedModel`: a model with all that is needed to feed it and to open it again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

from layerwise.errors import shorten
from layerwise.sources.preprocessing import Preprocessing

if TYPE_CHECKING:
    from torch import Tensor, nn

Task = Literal[
    "image_classification", "text_classification", "token_classification", "causal_lm", "masked_lm"
]
TASKS: tuple[str, ...] = get_args(Task)


@dataclass(frozen=True)
class ReplacedHead:
    """What a new output layer took the place of.

    Attributes:
        modules: paths of the output layers that are new.
        old_classes: how many outputs they had; None where that is not known.
        new_classes: how many they have now.
    """

    modules: tuple[str, ...]
    old_classes: int | None
    new_classes: int

    def __str__(self) -> str:
        old = "" if self.old_classes is None else f"{self.old_classes} -> "
        outputs = "output" if self.new_classes == 1 else "outputs"
        return f"new output layer {', '.join(self.modules)}: {old}{self.new_classes} {outputs}"


@dataclass
class OpenedModel:
    """A model opened by name, and what goes with it.

    Attributes:
        model: the network, on the CPU, in eval mode; of weights that are loaded already.
        spec: the name that opened it (``"timm:resnet18"``).
        task: what it does: ``"image_classification"``, ``"text_classification"``, ...
        weights: where its weights come from: ``"pretrained"``, ``"random"``, or the path of a file.
        num_classes: how many outputs it has; None where that is not known (no head, a language model).
        preprocessing: of images; None for text.
        tokenizer: of text, a transformers tokenizer; None for images.
        example_input: one input, to record the model with: a float tensor (1, C, H, W), or a dict of
            integer tensors (2, T) for text; None where no example can be made up.
        replaced_head: what a new output layer replaced; None where the head is the loaded one.
        notes: what was chosen or could not be done, for people.
        max_length: how many tokens the model and its tokenizer take at most; None for images.
        problem: transformers' ``problem_type`` where one was asked for.
    """

    model: nn.Module = field(repr=False)
    spec: str
    task: Task
    weights: str
    num_classes: int | None = None
    preprocessing: Preprocessing | None = None
    tokenizer: Any = None
    example_input: Any = field(default=None, repr=False)
    replaced_head: ReplacedHead | None = None
    notes: tuple[str, ...] = field(default=())
    max_length: int | None = None
    problem: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return what a run keeps of it, as plain data: all but the model, tokenizer and example.

        `layerwise.sources.models.reopen` builds the same network from it.
        """
        return {
            "spec": self.spec,
            "task": self.task,
            "weights": self.weights,
            "num_classes": self.num_classes,
            "preprocessing": None if self.preprocessing is None else self.preprocessing.to_dict(),
            "replaced_head": None if self.replaced_head is None else str(self.replaced_head),
            "notes": list(self.notes),
            "max_length": self.max_length,
            "problem": self.problem,
        }


def in_order_of_outputs(classes: Sequence[str], opened: OpenedModel) -> tuple[tuple[str, ...], list[str]]:
    """Return the names of classes in the order of the output layer that a published model brings, and notes.

    Where the model's configuration names the same classes, upper and lower case apart, that is its order: one
    of MNLI may begin with "entailment". Else they stay as they are. Of a layer that is kept and was for other
    classes there is a note; names that transformers makes up (``LABEL_0``) say nothing.

    Args:
        classes: of the data, sorted.
        opened: the model.
    """
    named = getattr(getattr(opened.model, "config", None), "id2label", None) or {}
    outputs = [str(named[index]) for index in sorted(named)]
    if len(outputs) != len(classes) or all(name.startswith("LABEL_") for name in outputs):
        return tuple(classes), []
    fold = str.casefold if len(set(map(str.casefold, outputs))) == len(outputs) else str
    place = {fold(name): index for index, name in enumerate(outputs)}
    if set(map(fold, classes)) == set(place):
        ordered = tuple(sorted(classes, key=lambda name: place[fold(name)]))
        is_new = ordered != tuple(classes)
        told = f"classes in the order of the model's own output layer: {shorten(ordered, 4)}"
        return ordered, [told] if is_new else []
    if opened.replaced_head is not None or opened.weights == "random":
        return tuple(classes), []
    return tuple(classes), [
        f"the output layer is kept: it was for the classes {shorten(outputs, 4)}, and goes on as that for "
        f"{shorten(classes, 4)}, in this order"
    ]


def example_image(preprocessing: Preprocessing) -> Tensor:
    """Return one made-up input of shape (1, C, H, W): normal noise, the same each time.

    Its generator is its own: to open a model must not change the caller's random numbers.
    """
    import torch

    return torch.randn(1, *preprocessing.input_size, generator=torch.Generator().manual_seed(0))
