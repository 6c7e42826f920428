"""Show that no sample reads the others of its batch, whatever they hold.

Some operations mix samples for some inputs only: an expert passes over tokens once it is full, a missing
value is filled with the batch's mean, a batch is scaled down where a number in it is large. The first batch
need not show it. So some of its samples are computed again beside copies of themselves, beside a sample of
missing values (NaN) and beside one of large numbers. The compiled code of other libraries than torch need not
survive such numbers (torchvision's deformable convolution reads at a place that it computes of a NaN): where
it runs, there are only the copies.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

import torch

from layerwise.cache.comparing import is_near
from layerwise.cache.cutting.cut import Site
from layerwise.cache.proof.mixing import MixedError
from layerwise.cache.replay.layout import Layout
from layerwise.errors import CacheError

logger = logging.getLogger("layerwise.cache")

_LARGE = 1e4  # times what a sample holds
_FIRST, _LAST, _MISSING, _HUGE = range(4)
_ONE_BATCH = (_FIRST, _LAST, _MISSING, _HUGE)
_OTHER_BATCH = (_MISSING, _FIRST, _FIRST, _FIRST)


def check_companions(
    layouts: Mapping[Site, Layout],
    values: Mapping[Site, torch.Tensor],
    leaves: Sequence[torch.Tensor],
    inputs: Sequence[int | None],
    run: Callable[[list[torch.Tensor], int], Mapping[Site, torch.Tensor]],
    *,
    copies_only: bool,
) -> None:
    """Compute samples beside strange ones, and compare; last bits do not count.

    Args:
        layouts: of the sites to compare.
        values: what the sites hold for some samples.
        leaves: the tensors of these samples.
        inputs: which of them reach the model.
        run: gives the values for other samples, under a seed.
        copies_only: have nothing but copies of the samples beside them.

    Raises:
        MixedError: a sample's values depend on its companions.
    """
    kinds = [
        _kinds(leaf) if number in inputs and not copies_only else leaf[[0, -1, 0, -1]]
        for number, leaf in enumerate(leaves)
    ]
    try:
        one, other = (run([kind[list(batch)] for kind in kinds], 4) for batch in (_ONE_BATCH, _OTHER_BATCH))
    except CacheError:
        raise
    except Exception as error:  # a model may refuse such samples, and then need not be asked
        logger.debug("prefix cache: strange samples were not computed: %s", error)
        return
    for site, layout in layouts.items():
        if site not in one or site not in other:
            continue  # with such samples the model takes another way
        known = layout.to_rows(values[site])[[0, -1]]
        rows, other_rows = layout.to_rows(one[site]), layout.to_rows(other[site])
        pairs = [(rows[0], known[0]), (rows[1], known[1]), (rows[2], other_rows[0])]
        pairs += [(row, known[0]) for row in other_rows[1:]]
        if not all(is_near(a, b) for a, b in pairs):
            raise MixedError(
                f"the value at {site} of one sample depends on the other samples of its batch: not in the "
                f"first batch, but beside copies of itself, or samples that hold NaN or large numbers.",
                site,
            )


def _kinds(leaf: torch.Tensor) -> torch.Tensor:
    """Return four samples: the first, the last, one of missing values, one of large numbers."""
    kinds = leaf[[0, -1, 0, -1]].clone()
    if kinds.is_floating_point():
        kinds[_MISSING] = float("nan")
        kinds[_HUGE] *= _LARGE
    return kinds
