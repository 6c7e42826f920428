"""Where each parameter stands in the flow from input to output."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from layerwise.layers.flops import COUNTED
from layerwise.layers.graph import Op, Recording

PRODUCTS = COUNTED | {
    "_addmm_activation",
    "_int_mm",
    "_scaled_mm",
    "_cudnn_rnn",
    "cudnn_convolution",
    "linear",
    "miopen_convolution",
    "mkldnn_convolution",
    "mkldnn_linear",
}
"""Operations by which a layer's weights act on its input: matrix products, convolutions, fused RNNs."""


@dataclass(frozen=True)
class Order:
    """The order of the parameters in one recording.

    Attributes:
        position: parameter -> index of the first operation that depends on the input and needs it. A
            parameter that an operation reads only to prepare another constant (weight standardisation,
            an interpolated position table) stands where that constant first meets the input.
            Parameters that no operation reads are missing.
        needed: for each input-dependent operation the parameters that it needs, read directly first,
            then those behind prepared constants; empty for others.
    """

    position: dict[str, int]
    needed: list[tuple[str, ...]]

    def weights(self, op: Op) -> tuple[str, ...]:
        """Return the parameters by which `op` multiplies its input; empty for other operations."""
        return self.needed[op.index] if op.name in PRODUCTS else ()

    def without(self, names: Collection[str]) -> Order:
        """Return the order of the other parameters, as if no operation read `names`."""
        position = {name: index for name, index in self.position.items() if name not in names}
        return Order(position, [tuple(n for n in needed if n not in names) for needed in self.needed])


def order_of(recording: Recording) -> Order:
    """Return where each parameter stands: registration order and module order play no part.

    One pass over the operations, which are in an order of execution and so in a topological one.
    """
    depends = recording.input_dependent
    position: dict[str, int] = {}
    constant_only: dict[str, int] = {}
    carried: dict[int, tuple[str, ...]] = {}  # constant operation -> parameters behind its result
    needed: list[tuple[str, ...]] = [()] * len(recording.ops)
    for op in recording.ops:
        behind = [name for source in op.sources for name in carried.get(source, ())]
        names = tuple(dict.fromkeys([*op.parameters, *behind]))
        if not names:
            continue
        if depends[op.index]:
            needed[op.index] = names
            for name in names:
                position.setdefault(name, op.index)
        else:
            carried[op.index] = names
            for name in names:
                constant_only.setdefault(name, op.index)
    return Order(constant_only | position, needed)
