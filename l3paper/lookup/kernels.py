"""The grouped lookup as three Triton kernels, for CUDA: no matrix of scores, no sorted copy.

Sorted by token, the positions of a batch fall into groups. A group is a rectangle of scores: its
token's positions by its token's rows. A tile is a strip of one rectangle, a few positions by all rows
or a few rows by all positions, and one program walks along it. So a program sees one token only,
reads the rows where they lie, and is the only one to write its results: nothing is added atomically,
and two runs on one device give the same bits.

    kernel        tile of    along       writes
    ------        ------     ----------  ------
    _forward      POSITIONS  rows        output, and the logsumexp of the scores
    _grad_query   POSITIONS  rows        grad_query, and delta = sum(grad_output * output)
    _grad_table   ROWS       positions   grad_keys or grad_values; when tied, their sum

The softmax is running: one maximum and one sum per position, by which earlier sums are rescaled. The
backward kernels compute the scores again and get the weights from the logsumexp. The tiles of a token
run one after the other, so that the cache serves all but the first of them.

A program accumulates at most BLOCK_BYTES of a row; a wider row takes several programs, and each
computes the scores again. Products are of the tables' type (tensor cores in bfloat16, never TF32),
sums and softmax in float32; all is float64 if the tables are.
"""

from __future__ import annotations  # Triton reads the annotations; without Triton, nothing does

from typing import NamedTuple

import torch
from torch import Tensor

from l3paper.parts.device import float32_or_better

try:
    import triton
    import triton.language as tl
except ImportError:  # Triton is optional
    triton = None

POSITIONS = 16
"""Positions of a tile. Most tokens of a batch have few, and a tensor core takes at least 16."""

ROWS = 32
"""Rows of a tile. More rows would use each loaded position more often, but 32 fill the registers."""

STEP_BYTES = 64
"""Bytes of a column that a program processes at a time: 16 float32 or 32 bfloat16 rows or positions."""

BLOCK_BYTES = 2048
"""Bytes of a row that one program accumulates: 1,024 bfloat16 numbers, the paper's width."""

CHUNK_BYTES = 256
"""Bytes of a row that are multiplied at a time into scores: whole cache lines, while the next load."""

WARPS = 8
"""Warps of a program. 32 rows of 1,024 float32 sums are then 128 registers per thread, half of them."""


class Tiles(NamedTuple):
    """How the programs divide a batch.

    A tile is four int32 numbers: the first of its strip and one past the last, then the first and one
    past the last along the strip. Empty tiles (first >= last) pad both lists to a length
    that the shapes alone give.
    """

    order: Tensor  # (N,) long, sorts the positions by token
    positions: Tensor  # (T, 4) places in the sorted order, then rows of the table
    rows: Tensor  # (T', 4) rows of the table, then places in the sorted order


def make_tiles(token_ids: Tensor, bounds: Tensor, n_rows: int) -> Tiles:
    """Cut a batch of positions with these ids (N,); token t owns the rows bounds[t] : bounds[t + 1].

    n_rows is v, the rows of the whole table. Every token of the vocabulary has a rectangle here, if an
    empty one, so that the shapes alone give all lengths and the host never waits for the device.
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
    # The longest strips first, so that none starts when the other programs end.
    longest = along[1].argsort(descending=True)
    (first, size), (begin, way) = ([x[longest] for x in side] for side in (across, along))
    n_tiles = present + (total - present) // block  # the most there can be
    n_blocks = (size + block - 1) // block
    end = n_blocks.cumsum(0)
    tile = torch.arange(n_tiles, device=size.device)
    # Beyond the last tile: the last group again, past its end, which is an empty tile.
    group = torch.searchsorted(end, tile, right=True).clamp(max=len(size) - 1)  # (T,)
    start = first[group] + (tile - (end - n_blocks)[group]) * block
    stop = torch.minimum(start + block, (first + size)[group])
    return torch.stack([start, stop, begin[group], (begin + way)[group]], dim=1).int()


def available(device: torch.device) -> bool:
    """Whether the kernels can serve tensors there: on CUDA with Triton, or anywhere in its interpreter.

    The interpreter cannot multiply bfloat16.
    """
    if triton is None:
        return False
    return device.type == "cuda" or not isinstance(_forward, triton.JITFunction)


def forward(
    query: Tensor, keys: Tensor, values: Tensor | None, order: Tensor, positions: Tensor, rows: Tensor
) -> tuple[Tensor, Tensor]:
    """The lookup of `l3paper.lookup.reference`, and the logsumexp (N,) of the scores for `backward`.

    query (N, d_in), keys (v, d_in) and values (v, d_emb), or None for the keys, are of one floating
    type on a device that is `available`; the others are `Tiles`.
    """
    query, keys = query.contiguous(), keys.contiguous()
    values = keys if values is None else values.contiguous()
    output = query.new_empty(len(query), values.shape[1])
    logsumexp = query.new_empty(len(query), dtype=float32_or_better(query.dtype))
    _launch(_forward, positions, (query, keys, values, order, logsumexp), output)
    return output, logsumexp


def backward(
    grad_output: Tensor,
    query: Tensor,
    keys: Tensor,
    values: Tensor | None,
    order: Tensor,
    positions: Tensor,
    rows: Tensor,
    output: Tensor,
    logsumexp: Tensor,
) -> list[Tensor]:
    """The gradients of query, keys and, unless they are None, values; rows of absent tokens get 0."""
    tied = values is None
    query, keys = query.contiguous(), keys.contiguous()
    values = keys if tied else values.contiguous()
    delta = torch.empty_like(logsumexp)
    inputs = query, keys, values, order, logsumexp, delta, grad_output.contiguous()
    gradients = [torch.empty_like(query), torch.zeros_like(keys)]
    _launch(_grad_query, positions, (*inputs, output), gradients[0])
    _launch(_grad_table, rows, inputs, gradients[1], KEYS=True, VALUES=tied)
    if not tied:
        gradients.append(torch.zeros_like(values))
        _launch(_grad_table, rows, inputs, gradients[2], KEYS=False, VALUES=True)
    return gradients


def _launch(kernel, tiles: Tensor, inputs, result: Tensor, **flags: bool) -> None:
    """Run the kernel on all tiles, one program per (tile, column block) of the result (., width)."""
    query, _, values, *_ = inputs
    width, d_in, d_emb = result.shape[1], query.shape[1], values.shape[1]
    nbytes = query.element_size()
    block = _fit(width, BLOCK_BYTES // nbytes)
    with torch.cuda.device_of(query):
        kernel[(len(tiles) * triton.cdiv(width, block),)](
            *inputs,
            result,
            tiles,
            D_IN=d_in,
            D_EMB=d_emb,
            TILE=ROWS if kernel is _grad_table else POSITIONS,
            STEP=max(16, STEP_BYTES // nbytes),
            CHUNK=_fit(max(d_in, d_emb), CHUNK_BYTES // nbytes),
            BLOCK=block,
            num_warps=WARPS,
            **flags,
        )


def _fit(width: int, most: int) -> int:
    """The power of two that holds `width`, between the 16 of a tensor core and `most`."""
    return min(most, max(16, triton.next_power_of_2(width)))


_jit = triton.jit if triton else lambda function: function


@_jit
def _forward(
    query,
    keys,
    values,
    order,
    logsumexp,
    output,
    tiles,
    D_IN: tl.constexpr,
    D_EMB: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    BLOCKS: tl.constexpr = (D_EMB + BLOCK - 1) // BLOCK
    block = tl.program_id(0) % BLOCKS
    start, stop, row, row_stop = _tile(tiles, tl.program_id(0) // BLOCKS)
    if start >= stop:
        return
    positions, mask = _positions(order, start, stop, TILE)
    columns = block * BLOCK + tl.arange(0, BLOCK)
    largest = tl.full((TILE,), float("-inf"), logsumexp.dtype.element_ty)
    total = tl.full((TILE,), 0, logsumexp.dtype.element_ty)
    sums = tl.full((TILE, BLOCK), 0, logsumexp.dtype.element_ty)
    for step in range(row, row_stop, STEP):
        rows = step + tl.arange(0, STEP)
        own = rows < row_stop
        scores = _products(query, positions, mask, keys, rows, own, D_IN, CHUNK, sums.dtype)
        scores = tl.where(own[None, :], scores, float("-inf"))
        larger = tl.maximum(largest, tl.max(scores, 1))
        shrink = tl.exp(largest - larger)
        weights = tl.exp(scores - larger[:, None])
        total = total * shrink + tl.sum(weights, 1)
        value = _load(values, rows, own, columns, D_EMB)
        sums = _dot(weights.to(value.dtype), value, sums * shrink[:, None])
        largest = larger
    _store(output, positions, mask, columns, D_EMB, sums / total[:, None])
    if block == 0:
        tl.store(logsumexp + positions, largest + tl.log(total), mask=mask)


@_jit
def _grad_query(
    query,
    keys,
    values,
    order,
    logsumexp,
    delta,
    grad_output,
    output,
    grad_query,
    tiles,
    D_IN: tl.constexpr,
    D_EMB: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    BLOCKS: tl.constexpr = (D_IN + BLOCK - 1) // BLOCK
    block = tl.program_id(0) % BLOCKS
    start, stop, row, row_stop = _tile(tiles, tl.program_id(0) // BLOCKS)
    if start >= stop:
        return
    positions, mask = _positions(order, start, stop, TILE)
    normaliser = tl.load(logsumexp + positions, mask=mask, other=0.0)
    # The gradient of a score is weight * (grad - mean). Its grad is that of its weight,
    # grad_output . value; mean is their mean under the weights, grad_output . output.
    # _grad_table, which runs next, reads it too.
    mean = tl.full((TILE,), 0, normaliser.dtype)
    for chunk in range(0, D_EMB, CHUNK):
        columns = chunk + tl.arange(0, CHUNK)
        grad = _load(grad_output, positions, mask, columns, D_EMB).to(mean.dtype)
        mean += tl.sum(grad * _load(output, positions, mask, columns, D_EMB), 1)
    if block == 0:
        tl.store(delta + positions, mean, mask=mask)
    columns = block * BLOCK + tl.arange(0, BLOCK)
    sums = tl.full((TILE, BLOCK), 0, mean.dtype)
    for step in range(row, row_stop, STEP):
        rows = step + tl.arange(0, STEP)
        own = rows < row_stop
        scores = _products(query, positions, mask, keys, rows, own, D_IN, CHUNK, sums.dtype)
        scores = tl.where(own[None, :], scores, float("-inf"))
        weights = tl.exp(scores - normaliser[:, None])
        grad = _products(grad_output, positions, mask, values, rows, own, D_EMB, CHUNK, sums.dtype)
        key = _load(keys, rows, own, columns, D_IN)
        sums = _dot((weights * (grad - mean[:, None])).to(key.dtype), key, sums)
    _store(grad_query, positions, mask, columns, D_IN, sums)


@_jit
def _grad_table(
    query,
    keys,
    values,
    order,
    logsumexp,
    delta,
    grad_output,
    grad_table,
    tiles,
    D_IN: tl.constexpr,
    D_EMB: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
):
    """The gradient of one table, through its use as keys, as values, or as both."""
    WIDTH: tl.constexpr = D_IN if KEYS else D_EMB
    BLOCKS: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    block = tl.program_id(0) % BLOCKS
    row, row_stop, start, stop = _tile(tiles, tl.program_id(0) // BLOCKS)
    if row >= row_stop:
        return
    rows = row + tl.arange(0, TILE)
    own = rows < row_stop
    columns = block * BLOCK + tl.arange(0, BLOCK)
    sums = tl.full((TILE, BLOCK), 0, logsumexp.dtype.element_ty)
    for step in range(start, stop, STEP):
        positions, mask = _positions(order, step, stop, STEP)
        # Padding has a query and grad_output of zero, which add nothing to any row.
        normaliser = tl.load(logsumexp + positions, mask=mask, other=0.0)
        scores = _products(keys, rows, own, query, positions, mask, D_IN, CHUNK, sums.dtype)
        weights = tl.exp(scores - normaliser[None, :])
        if VALUES:
            grad = _load(grad_output, positions, mask, columns, D_EMB)
            sums = _dot(weights.to(grad.dtype), grad, sums)
        if KEYS:
            mean = tl.load(delta + positions, mask=mask, other=0.0)
            grad = _products(values, rows, own, grad_output, positions, mask, D_EMB, CHUNK, sums.dtype)
            asked = _load(query, positions, mask, columns, D_IN)
            sums = _dot((weights * (grad - mean[None, :])).to(asked.dtype), asked, sums)
    _store(grad_table, rows, own, columns, WIDTH, sums)


@_jit
def _tile(tiles, index):
    """The four numbers of a tile."""
    tile = tiles + 4 * index
    return tl.load(tile), tl.load(tile + 1), tl.load(tile + 2), tl.load(tile + 3)


@_jit
def _positions(order, start, stop, SIZE: tl.constexpr):
    """The positions at SIZE places of the sorted order, and a mask of the places before stop."""
    places = start + tl.arange(0, SIZE)
    mask = places < stop
    return tl.load(order + places, mask=mask, other=0), mask


@_jit
def _load(table, rows, mask, columns, WIDTH: tl.constexpr):
    """table[rows, columns], zero where a row is masked or a column is past the width."""
    # In 64 bits: a table may have more than 2^31 numbers.
    places = rows[:, None].to(tl.int64) * WIDTH + columns[None, :]
    return tl.load(table + places, mask=mask[:, None] & (columns < WIDTH)[None, :], other=0.0)


@_jit
def _store(table, rows, mask, columns, WIDTH: tl.constexpr, numbers):
    """table[rows, columns] = numbers, where _load would load."""
    places = rows[:, None].to(tl.int64) * WIDTH + columns[None, :]
    numbers = numbers.to(table.dtype.element_ty)
    tl.store(table + places, numbers, mask=mask[:, None] & (columns < WIDTH)[None, :])


@_jit
def _products(
    a, a_rows, a_mask, b, b_rows, b_mask, WIDTH: tl.constexpr, CHUNK: tl.constexpr, DTYPE: tl.constexpr
):
    """a[a_rows] @ b[b_rows].T, a chunk of the width at a time."""
    sums = tl.zeros((a_rows.shape[0], b_rows.shape[0]), DTYPE)
    for chunk in range(0, WIDTH, CHUNK):
        columns = chunk + tl.arange(0, CHUNK)
        left = _load(a, a_rows, a_mask, columns, WIDTH)
        right = _load(b, b_rows, b_mask, columns, WIDTH)
        sums = _dot(left, tl.trans(right), sums)
    return sums


@_jit
def _dot(a, b, sums):
    """sums + a @ b, with exact products if the type allows."""
    return tl.dot(a, b, sums, input_precision="ieee", out_dtype=sums.dtype)
