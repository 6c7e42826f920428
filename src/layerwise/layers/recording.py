"""`record`: one forward pass of any model, seen operation by operation and call by call."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import nn

from layerwise.errors import RecordingError
from layerwise.layers.forms import without_data
from layerwise.layers.graph import Call, Op, Recording, Value
from layerwise.layers.isolation import (
    check_ready,
    fill_meta_tensors,
    plain_execution,
    untouched,
    unwrap,
    was_replaced,
)
from layerwise.layers.memory import Attributes, Change, kept_tensors, watched
from layerwise.layers.randomness import drawn_outside_torch
from layerwise.layers.recorder import Recorder
from layerwise.layers.structures import Arguments, map_tensors, tensors_in

_MAX_FILLED_BYTES = 4 * 2**30

__all__ = ["Call", "Op", "Recording", "Value", "record"]


def record(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    fake: bool = True,
    grad: bool = False,
    mode: Literal["keep", "eval"] = "keep",
) -> Recording:
    """Return what one forward pass of `model` does: each operation, module call and value.

    The pass runs on fake tensors, which have shapes and no data: it costs neither floating-point work
    nor activation memory, and works for models on meta. Small integer and boolean inputs keep their
    values. Where a branch depends on data that fake tensors do not have, the pass is run once more for
    real, on the first two samples (`Recording.how` is then ``"real"`` and `Recording.notes` says why);
    a model on meta of up to 4 GiB gets random weights for that pass.

    The model is left exactly as it was: parameters, buffers, modes, hooks, cached attributes; so is the
    random state of Python, numpy and torch. Wrappers (``torch.compile``, DDP, FSDP) are taken off first.

    What cannot be seen: numpy code, and Python code that reads data by ``item()`` (such an operation is
    marked `Op.syncs`; what was made of the number is not linked to it).

    Args:
        model: any module, on any device, in any mode and precision.
        args: positional arguments of its forward, batch dimension first. Two samples are enough.
            Tensors are moved to the model's device.
        kwargs: keyword arguments of its forward.
        fake: False records a real pass at once.
        grad: record with autograd on. Matters only to models that ask whether gradients are needed.
        mode: ``"keep"`` records in the modes that the modules are in; ``"eval"`` as if all of them were
            in evaluation mode.

    Returns:
        The recording; see `layerwise.layers.graph` for its words.

    Raises:
        ModelError: the model is TorchScript, or has lazy modules that have not seen a batch yet.
        RecordingError: the forward pass raised, on fake tensors and on real samples.

    >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> recording = record(net, (torch.zeros(2, 4),))
    >>> [(op.name, op.parameters, op.sources) for op in recording.ops]
    [('addmm', ('0.bias', '0.weight'), ()), ('relu', (), (0,)), ('addmm', ('2.bias', '2.weight'), (1,))]
    >>> [call.path for call in recording.calls]
    ['', '0', '1', '2']
    """
    model = unwrap(model)
    check_ready(model)
    arguments = (tuple(args), dict(kwargs or {}))
    if not fake:
        return _attempt(model, arguments, fake=False, grad=grad, mode=mode)
    on_meta = sum(t.nbytes for t in [*model.parameters(), *model.buffers()] if t.device.type == "meta")
    try:
        return _attempt(model, arguments, fake=True, grad=grad, mode=mode)
    except Exception as error:  # anything: it is the model's own code that runs
        why = one_line(error)
        if on_meta > _MAX_FILLED_BYTES:
            raise RecordingError(
                f"the forward pass of {type(model).__name__} could not be recorded on tensors without data "
                f"({why}), and the model is on meta and too large ({on_meta / 2**30:.1f} GiB) to be filled "
                f"with random weights and run for real. Check the example input, or make the model on a "
                f"real device."
            ) from error
    try:
        recording = _attempt(model, _two_real_samples(arguments), fake=False, grad=grad, mode=mode)
    except RecordingError:
        raise
    except Exception as error:
        told = one_line(error)
        if _batch_size(arguments) > 2 and why != told:
            told = f"{why}; with the first two samples alone {told}"
        raise RecordingError(
            f"the forward pass of {type(model).__name__} failed with this example input "
            f"({described(arguments)}): {told}. Pass example_input= as the model's forward takes it, batch "
            f"dimension first: a tensor, a tuple of positional arguments, or a dict of keyword arguments (to "
            f"fit, layers=layerwise.layer_map(model, example))."
        ) from error
    filled = ", with random weights for those on meta" if on_meta else ""
    recording.notes += (
        f"recorded on {min(2, recording.batch_size)} real samples{filled}: fake tensors do not suffice "
        f"({why})",
    )
    return recording


def record_without_data(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, most_ops: int
) -> Recording | None:
    """Return a recording on fake tensors in evaluation mode; None where the model does not take these.

    None as well where it takes more than `most_ops` operations.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            arguments = tuple(args), dict(kwargs)
            return _attempt(model, arguments, fake=True, grad=False, mode="eval", most_ops=most_ops)
    except Exception:  # anything: it is the model's own code that runs
        return None


def _attempt(
    model: nn.Module,
    arguments: Arguments,
    *,
    fake: bool,
    grad: bool,
    mode: Literal["keep", "eval"],
    draws: bool = False,
    most_ops: int | None = None,
) -> Recording:
    arguments = map_tensors(arguments, lambda tensor: _on_device_of(model, tensor))
    with untouched(model), plain_execution(model):
        if not fake:
            fill_meta_tensors(model)
        if mode == "eval":
            for module in model.modules():
                if not isinstance(module, torch.jit.ScriptModule):
                    module.training = False
        hooked = watched(model)
        inputs = list(map(without_data, tensors_in(arguments)))
        contents = {name: (p, p.detach()) for name, p in model.named_parameters()}
        undrawn = drawn_outside_torch()
        recorder, output, changes = _pass(
            model, arguments, fake=fake, grad=grad, draws=draws, most_ops=most_ops
        )
        has_drawn = drawn_outside_torch() != undrawn
        keeping = {
            module: tuple(names) for module, names in changes.items() if Change.MOVED not in names.values()
        }
        kept = [t for module, names in keeping.items() for t in kept_tensors(module, names)]
        if keeping and not _only_keeps(model, arguments, recorder, set(keeping), fake=fake, grad=grad):
            keeping, kept = {}, []
        recording = Recording(
            model=model,
            how="fake" if fake else "real",
            ops=recorder.ops,
            calls=recorder.calls,
            values=recorder.values.all,
            inputs=inputs,
            output=output,
            output_keys=tuple(recorder.values.key(tensor) for tensor in tensors_in(output)),
            names=recorder.values.names,
            batch_size=_batch_size(arguments),
            remembering={
                module: max(names, key=names.__getitem__)
                for module, names in changes.items()
                if module not in keeping
            },
            keeping=keeping,
            kept_keys=tuple(recorder.values.key(tensor) for tensor in kept if recorder.is_of_batch(tensor)),
            watched=hooked,
            rewritten=recorder.rewritten()
            | {name for name, (parameter, content) in contents.items() if was_replaced(parameter, content)},
            drawn_from=recorder.drawn_from,
        )
    if has_drawn and not draws:
        return _attempt(model, arguments, fake=fake, grad=grad, mode=mode, draws=True, most_ops=most_ops)
    return recording


def _pass(
    model: nn.Module,
    arguments: Arguments,
    *,
    fake: bool,
    grad: bool,
    draws: bool = False,
    most_ops: int | None = None,
) -> tuple[Recorder, Any, dict[nn.Module, dict[str, Change]]]:
    """Return a recorder that has seen one forward pass, its output, and what became of attributes."""
    recorder = Recorder(model, fake=fake, draws=draws, most_ops=most_ops)
    args, kwargs = map_tensors(arguments, recorder.add_input)
    attributes = Attributes(model)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_without_log("torch._subclasses.fake_tensor"))  # we report the failure
        stack.callback(recorder.undo_writes)
        stack.enter_context(torch.set_grad_enabled(grad))
        stack.enter_context(recorder.hooks())
        stack.enter_context(recorder.python_reads())
        stack.enter_context(recorder)
        output = model(*args, **kwargs)
    return recorder, output, attributes.changes(recorder.has_seen, recorder.is_of_batch)


def _only_keeps(
    model: nn.Module,
    arguments: Arguments,
    first: Recorder,
    keeping: set[nn.Module],
    *,
    fake: bool,
    grad: bool,
) -> bool:
    """Return whether a second pass does what the first did, and reads nothing that `keeping` modules keep."""
    try:
        second, _, changes = _pass(model, arguments, fake=fake, grad=grad)
    except Exception:  # it mixes what it kept of one pass with the other, or does not survive being run twice
        return False
    again = {change for module in keeping for change in changes.get(module, {}).values()}
    return again <= {Change.KEPT} and _told(first.ops) == _told(second.ops)


def _told(ops: list[Op]) -> list[Any]:
    return [
        (op.name, op.call.path if op.call else "", op.sources, op.parameters, op.inputs, op.constants)
        for op in ops
    ]


@contextlib.contextmanager
def _without_log(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _on_device_of(model: nn.Module, tensor: torch.Tensor) -> torch.Tensor:
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) != 1 or tensor.device in devices or "meta" in {d.type for d in (*devices, tensor.device)}:
        return tensor  # a model spread over devices moves its inputs itself
    return tensor.to(devices.pop())


def _two_real_samples(arguments: Arguments) -> Arguments:
    """Cut the example to two samples and give meta tensors a content."""
    batch = _batch_size(arguments)
    generator = torch.Generator().manual_seed(0)

    def real(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.device.type == "meta":
            like = torch.zeros(tensor.shape, dtype=tensor.dtype)
            tensor = like.normal_(generator=generator) if tensor.is_floating_point() else like + 1
        return tensor[:2] if batch > 2 and tensor.ndim and len(tensor) == batch else tensor

    mapped: Arguments = map_tensors(arguments, real)
    return mapped


def _batch_size(arguments: Arguments) -> int:
    """Return the number of samples: the length of the first tensor, or of the first list of tensors."""
    args, kwargs = arguments
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor) and value.ndim:
            return len(value)
        if isinstance(value, list) and tensors_in(value):
            return len(value)  # of images of different sizes, as detection models take them
    return 1


def one_line(error: Exception) -> str:
    """Return an error's class and the beginning of what it says, to stand in a sentence."""
    text = " ".join(str(error).split()).removesuffix(".")
    return f"{type(error).__name__}: {text[:160]}{'...' if len(text) > 160 else ''}"


def described(value: Any) -> str:
    """Return the shapes and types of the tensors in a value, for a message."""
    shapes = [f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in tensors_in(value)]
    return ", ".join(shapes) or "no tensors"
