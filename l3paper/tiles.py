"""The groups of a batch cut into tiles, one a program of the CUDA kernels.

Every group is a rectangle, its token's positions by its token's rows. One list of tiles cuts the
rectangles by positions, the other by rows.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from l3paper.groups import Groups

POSITIONS = 16
"""Positions of a tile. Most tokens of a batch have few, and the least a tensor core takes is 16."""

ROWS = 32
"""Rows of a tile. More would make more of every position loaded, but 32 already fill the registers."""


class Tiles(NamedTuple):
    """How the programs divide the groups; all L3 layers of a model can share them.

    A tile is four int32 numbers: the first of its strip and one past the last, then the first and one
    past the last of what the strip goes along. Empty tiles (first >= last) pad both lists to a length
    that the shapes alone give, so that the host need not wait for the device.
    """

    positions: Tensor  # (T, 4) places in the sorted order, then rows of the table
    rows: Tensor  # (T', 4) rows of the table, then places in the sorted order


def make_tiles(groups: Groups, n_rows: int) -> Tiles:
    """Cut the groups of a batch into tiles; n_rows is v, the rows of the whole table."""
    positions, rows = (groups.start, groups.count), (groups.first, groups.length)
    return Tiles(
        _cut(positions, rows, POSITIONS, len(groups.order)),
        _cut(rows, positions, ROWS, n_rows),
    )


def _cut(across: tuple[Tensor, Tensor], along: tuple[Tensor, Tensor], block: int, total: int) -> Tensor:
    """Tiles (T, 4) of G groups, given as (first, size), each (G,), cut across into blocks.

    The sizes across are at least 1 and add up to at most `total`.
    """
    # The longest way first, that no program be left to start on it when the others end.
    longest = along[1].argsort(descending=True)
    (first, size), (begin, way) = ([x[longest] for x in side] for side in (across, along))
    n_groups = len(size)
    n_tiles = n_groups + (total - n_groups) // block if n_groups else 0  # as many as there can be
    n_blocks = (size + block - 1) // block
    end = n_blocks.cumsum(0)
    tile = torch.arange(n_tiles, device=size.device)
    # Past the last tile, the last group again, and beyond its end: an empty tile.
    group = torch.searchsorted(end, tile, right=True).clamp(max=n_groups - 1)  # (T,)
    start = first[group] + (tile - (end - n_blocks)[group]) * block
    stop = torch.minimum(start + block, (first + size)[group])
    return torch.stack([start, stop, begin[group], (begin + way)[group]], dim=1).int()
