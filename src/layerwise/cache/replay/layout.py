"""How one value of a batch is taken apart into one row a sample, and put together again, bit for bit.

The physical order of the dimensions in memory (channels_last, for example) survives: a convolution may
choose another kernel, and so other last bits, for another order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from layerwise.errors import CacheError


@dataclass(frozen=True)
class Layout:
    """Which dimension of a tensor counts samples, and how its dimensions lie in memory.

    Attributes:
        dim: the dimension that grows with the batch.
        per_sample: entries of that dimension for one sample: 1, or the number of windows for a tensor of
            ``batch * windows`` rows.
        apart: these entries lie a whole batch apart, as ``torch.cat([view, other_view])`` lays them.
        order: dimensions from the outermost in memory to the innermost.
        strides: of a tensor with gaps in memory, such as a slice of a longer sequence; None without gaps.
        repeated: dimensions along which one number stands for all, as ``expand`` makes them -> their size.
        is_view: the tensor is a view of another: gradients take another way through what is written into it.
    """

    dim: int
    per_sample: int
    order: tuple[int, ...]
    strides: tuple[int, ...] | None = None
    repeated: tuple[tuple[int, int], ...] = ()
    apart: bool = False
    is_view: bool = False

    def to_rows(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the tensor as (batch, per_sample, ...): the other dimensions in memory order; a view.

        Of repeated numbers one is returned.
        """
        for dim, _ in self.repeated:
            tensor = tensor.narrow(dim, 0, 1)
        physical = tensor.permute(self.order).movedim(self.order.index(self.dim), 0)
        samples = physical.shape[0] // self.per_sample
        if self.apart:
            return physical.unflatten(0, (self.per_sample, samples)).movedim(1, 0)  # type: ignore[no-untyped-call,no-any-return]
        return physical.unflatten(0, (samples, self.per_sample))  # type: ignore[no-untyped-call,no-any-return]

    def from_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """Return what `to_rows` took apart; a view of `rows` where the sample dimension lies outermost."""
        physical = (rows.movedim(1, 0) if self.apart else rows).flatten(0, 1)
        if self.order[0] != self.dim:
            physical = physical.movedim(0, self.order.index(self.dim)).contiguous()
        physical = physical.permute([self.order.index(dim) for dim in range(len(self.order))])
        if self.repeated:
            sizes = dict(self.repeated)
            return physical.expand([sizes.get(dim, size) for dim, size in enumerate(physical.shape)])
        if self.strides is None:
            return physical
        return physical.new_empty_strided(physical.shape, self.strides).copy_(physical)

    def shape(self, recorded: tuple[int, ...], batch: int) -> tuple[int, ...]:
        """Return the shape of the tensor for another batch size."""
        return (*recorded[: self.dim], batch * self.per_sample, *recorded[self.dim + 1 :])


def memory_order(tensor: torch.Tensor) -> tuple[int, ...]:
    """Return the dimensions of `tensor` from the outermost in memory to the innermost.

    >>> memory_order(torch.empty(2, 3, 4, 5).to(memory_format=torch.channels_last))
    (0, 2, 3, 1)
    """
    strides = tensor.stride()
    return tuple(sorted(range(tensor.dim()), key=lambda dim: (-strides[dim], dim)))


def lies_in(tensor: torch.Tensor, order: tuple[int, ...]) -> bool:
    """Return whether the dimensions lie in memory in this order; of one of size 1 nobody can tell."""
    strides, shape = tensor.stride(), tensor.shape
    if len(strides) != len(order):
        return False
    lying = [strides[dim] for dim in order if shape[dim] != 1]
    return lying == sorted(lying, reverse=True)


def in_order(tensor: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
    """Return the same values with the dimensions in this order in memory."""
    if lies_in(tensor, order):
        return tensor
    return tensor.permute(order).contiguous().permute([order.index(dim) for dim in range(len(order))])


def has_gaps(tensor: torch.Tensor) -> bool:
    """Return whether numbers of other tensors lie between those of a tensor, none of which is repeated."""
    innermost = [dim for dim in memory_order(tensor)[::-1] if tensor.shape[dim] > 1]
    reach, gaps = 1, False
    for dim in innermost:
        stride = tensor.stride(dim)
        if stride < reach:
            return False
        gaps |= stride > reach
        reach = stride * tensor.shape[dim]
    return gaps


def repeated_dims(tensor: torch.Tensor) -> list[int]:
    """Return the dimensions along which one number of memory stands for all."""
    return [dim for dim, stride in enumerate(tensor.stride()) if stride == 0 and tensor.shape[dim] > 1]


def copied(tensor: torch.Tensor) -> torch.Tensor:
    """Return a detached copy that lies in memory as the tensor does: kernels look at gaps and repetitions.

    Of a view it is a view, see `Layout`.
    """
    was_view, tensor = tensor._is_view(), tensor.detach()
    repeated = repeated_dims(tensor)
    if repeated:
        once = tensor
        for dim in repeated:
            once = once.narrow(dim, 0, 1)
        return once.clone().expand(tensor.shape)
    if has_gaps(tensor):
        made = tensor.new_empty_strided(tensor.shape, tensor.stride()).copy_(tensor)
    else:
        made = tensor.clone()
    return made.view_as(made) if was_view else made


def find_layout(
    one: torch.Tensor, batch: int, other: torch.Tensor, other_batch: int, *, where: str
) -> Layout | None:
    """Compare a value at two batch sizes; return how it depends on them, or None if it does not.

    `where` says what the value is, for the message.

    Raises:
        CacheError: the shape depends on the batch size in another way than samples side by side along
            one dimension.
    """
    if one.shape == other.shape:
        return None
    if one.dim() == other.dim():
        differ = [dim for dim in range(one.dim()) if one.shape[dim] != other.shape[dim]]
        dim, per_sample = differ[0], one.shape[differ[0]] // batch
        grows = one.shape[dim] == per_sample * batch and other.shape[dim] == per_sample * other_batch
        if len(differ) == 1 and grows:
            order = memory_order(one)
            repeated = tuple((d, one.shape[d]) for d in repeated_dims(one) if d != dim)
            if repeated and repeated_dims(other) == repeated_dims(one):
                return Layout(dim, per_sample, order, None, repeated, is_view=True)
            keeps = has_gaps(one) and order[0] == dim  # else strides depend on the batch size
            strides = one.stride() if keeps else None
            return Layout(dim, per_sample, order, strides, is_view=one._is_view())
    raise CacheError(
        f"{where} has the shape {tuple(one.shape)} for {batch} samples and {tuple(other.shape)} for "
        f"{other_batch}: it cannot be taken apart into samples."
    )
