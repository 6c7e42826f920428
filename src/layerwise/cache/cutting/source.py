"""`Source`: what a value of a recorded pass is made of, from which it gets its name."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from layerwise.cache.cutting.doors import Read
from layerwise.layers.recording import Recording


@dataclass(frozen=True)
class Source:
    """What the value at a site is made of: the basis of its fingerprint.

    Attributes:
        tensors: names of the parameters and buffers that it depends on.
        structure: hash of the operations that it depends on, with their order, inputs and module calls.
    """

    tensors: tuple[str, ...]
    structure: str


def source_of(recording: Recording, value: Read) -> Source:
    """Return what a value of a recorded pass is made of."""
    ancestors: set[int] = set()
    stack = [value.writer]
    while stack:
        index = stack.pop()
        if index is not None and index not in ancestors:
            ancestors.add(index)
            stack.extend(recording.ops[index].sources)
    position = {index: number for number, index in enumerate(sorted(ancestors))}
    digest = hashlib.sha256()
    tensors: set[str] = set()
    for index, number in position.items():
        op = recording.ops[index]
        tensors |= {*op.parameters, *op.buffers}
        sources = [position[source] for source in op.sources]
        where = op.call.path if op.call is not None else ""
        constants = [recording.values[key].content for key in op.reads if recording.values[key].content]
        read = f"{op.inputs} {op.parameters} {op.buffers} {sources} {op.constants} {constants}"
        digest.update(f"{number} {op.name} {where} {read}\n".encode())
    digest.update(str(position.get(value.writer if value.writer is not None else -1)).encode())
    return Source(tuple(sorted(tensors)), digest.hexdigest())
