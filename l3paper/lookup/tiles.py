"""A batch cut into tiles, one a program of the CUDA kernels.

Sorted by token, the positions of a batch fall into groups, and every group is a rectangle: its token's
positions by its token's rows. One list of tiles cuts the rectangles by positions, the other by rows.
Every token of the vocabulary has a rectangle here, if an empty one, so that all lengths are known from
the shapes and the host never waits for the device.
"""

from typing import NamedTuple

import torch
from torch import Tensor

POSITIONS = 16
"""Positions of a tile. Most tokens of a batch have few, and the least a tensor core takes is 16."""

ROWS = 32
"""Rows of a tile. More would make more of every position loaded, but 32 already fill the registers."""


class Tiles(NamedTuple):
    """How the programs divide a batch; all L3 layers of a model can share them.

    A tile is four int32 numbers: the first of its strip and one past the last, then the first and one
    past the last of what the strip goes along. Empty tiles (first >= last) pad both lists to a length
    that the shapes alone give.
    """

    order: Tensor  # (N,) long, sorts the positions by token
    positions: Tensor  # (T, 4) places in the sorted order, then rows of the table
    rows: Tensor  # (T', 4) rows of the table, then places in the sorted order


def make_tiles(token_ids: Tensor, bounds: Tensor, n_rows: int) -> Tiles:
    """Cut a batch of positions with these ids (N,); token t owns the rows bounds[t] : bounds[t + 1].

    n_rows is v, the rows of the whole table.
    """
    ordered, order = token_ids.sort(stable=True)
    token = torch.arange(len(bounds), device=ordered.device, dtype=ordered.dtype)
    edges = torch.searchsorted(ordered, token)  # (V + 1,) where each token's positions begin
    count = edges.diff()  # (V,)
    positions = edges[:-1], count
    rows = bounds[:-1], bounds.diff().where(count > 0, 0)
    present = min(len(count), len(order))  # tokens, at most
    return Tiles(
        order,
        _cut(positions, rows, POSITIONS, present, len(order)),
        _cut(rows, positions, ROWS, present, n_rows),
    )


def _cut(
    across: tuple[Tensor, Tensor],
    along: tuple[Tensor, Tensor],
    block: int,
    present: int,
    total: int,
) -> Tensor:
    """Tiles (T, 4) of G groups, given as (first, size), each (G,), cut across into blocks.

    At most `present` of the sizes across are not zero, and they add up to at most `total`.
    """
    # The longest way first, that no program be left to start on it when the others end.
    longest = along[1].argsort(descending=True)
    (first, size), (begin, way) = ([x[longest] for x in side] for side in (across, along))
    n_tiles = present + (total - present) // block  # as many as there can be
    n_blocks = (size + block - 1) // block
    end = n_blocks.cumsum(0)
    tile = torch.arange(n_tiles, device=size.device)
    # Past the last tile, the last group again, and beyond its end: an empty tile.
    group = torch.searchsorted(end, tile, right=True).clamp(max=len(size) - 1)  # (T,)
    start = first[group] + (tile - (end - n_blocks)[group]) * block
    stop = torch.minimum(start + block, (first + size)[group])
    return torch.stack([start, stop, begin[group], (begin + way)[group]], dim=1).int()
