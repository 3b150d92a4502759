"""The grouped lookup as three Triton kernels, for CUDA: no matrix of scores, no sorted copy.

A token of the batch is a rectangle, its positions by its rows, and every cell of it is one score. A
kernel gives each program a tile of `l3paper.lookup.tiles`: a strip of one rectangle, a few positions
by all rows or a few rows by all positions, along which it goes step by step. So a program sees one
token only, reads the rows as they lie, and owns what it writes: nothing is added atomically, and two
runs on one device give the same bits.

    kernel        a tile     goes along  writes
    ------        ------     ----------  ------
    _forward      POSITIONS  rows        output, and the logsumexp of the scores
    _grad_query   POSITIONS  rows        grad_query, and delta = sum(grad_output * output)
    _grad_table   ROWS       positions   grad_keys or grad_values; when tied, their sum

The softmax is running: a maximum and a sum a position, by which what was accumulated is rescaled. The
backward kernels compute the scores again and get the weights from the logsumexp. Positions are read
and written through `tiles.order`.

What must move through memory, with N positions and R rows of present tokens out of v:

    kernel        reads                                    writes
    ------        -----                                    ------
    _forward      N queries, R keys, R values              N outputs
    _grad_query   the same, N grad_outputs and N outputs   N grad_queries
    _grad_table   N queries, N grad_outputs, R keys and    R rows a table, after v rows of zeros
                  R values

Tied keys and values are one read. The tiles of a token run together, so that the cache serves all but
the first of them. At the paper's size, bfloat16 and 1,024 wide, 32,768 positions are 67 MB a tensor
and 710,000 rows 1.45 GB: the table is what moves. A row of 2 KB meets the n positions of its token in
4 * 1,024 * n operations of the forward pass, 2 n a byte; with fewer than some 150 positions a token,
an H100 waits for memory.

An accumulator holds at most BLOCK_BYTES of a row; a wider row takes several programs, and each
computes the scores again. Products are of the tables' type (tensor cores in bfloat16, never TF32),
sums and softmax in float32; all is float64 where the tables are.
"""

from __future__ import annotations  # Triton reads the annotations; without Triton, nobody does

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from l3paper.lookup.tiles import POSITIONS, ROWS, Tiles

try:
    import triton
    import triton.language as tl
except ImportError:  # Triton is optional
    triton = None

STEP_BYTES = 64
"""Of a column, what a program meets at a time: 32 rows or positions, 16 where registers multiply."""

BLOCK_BYTES = 2048
"""Of a row, what one program accumulates: the paper's 1,024 numbers, so no score is computed twice."""

CHUNK_BYTES = 256
"""Of a row, what is multiplied at a time to scores: whole cache lines, the next loading meanwhile."""

WARPS = 8
"""Of a program. 32 rows of 1,024 float32 sums are then 128 registers a thread, half of what it has."""


def available(device: torch.device) -> bool:
    """Whether `attend` can serve tensors there: on CUDA with Triton, or anywhere in its interpreter.

    The interpreter cannot multiply bfloat16.
    """
    if triton is None:
        return False
    return device.type == "cuda" or not isinstance(_forward, triton.JITFunction)


def attend(query: Tensor, keys: Tensor, values: Tensor, tiles: Tiles) -> Tensor:
    """softmax(K_t query) V_t for every position, t its token: the lookup of `l3paper.lookup.reference`.

    query (N, d_in), keys (v, d_in), values (v, d_emb) to output (N, d_emb), all of one floating type
    on a device that is `available`. Values that are the keys' very tensor are tied: the gradient of
    both is one tensor. Rows of absent tokens get exactly zero gradient. The gradients cannot be
    differentiated again: a second backward pass raises RuntimeError.
    """
    return _Attend.apply(query, keys, values, values is keys, tiles)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, keys, values, tied, tiles):
        ctx.tied, ctx.tiles = tied, tiles
        query, keys, values = query.contiguous(), keys.contiguous(), values.contiguous()
        output = query.new_empty(len(query), values.shape[1])
        sums = torch.promote_types(query.dtype, torch.float32)
        logsumexp = query.new_empty(len(query), dtype=sums)
        _launch(_forward, tiles.positions, (query, keys, values, tiles.order, logsumexp), output)
        ctx.save_for_backward(query, keys, values, tiles.order, logsumexp, output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        tied, tiles = ctx.tied, ctx.tiles
        *inputs, output = ctx.saved_tensors
        query, keys, values, _, logsumexp = inputs
        inputs += [torch.empty_like(logsumexp), grad_output.contiguous()]  # the first is delta
        grad_query, grad_keys = torch.empty_like(query), torch.zeros_like(keys)
        _launch(_grad_query, tiles.positions, (*inputs, output), grad_query)
        _launch(_grad_table, tiles.rows, inputs, grad_keys, KEYS=True, VALUES=tied)
        if tied:
            return grad_query, grad_keys, None, None, None
        grad_values = torch.zeros_like(values)
        _launch(_grad_table, tiles.rows, inputs, grad_values, KEYS=False, VALUES=True)
        return grad_query, grad_keys, grad_values, None, None


def _launch(kernel, tiles: Tensor, inputs, result: Tensor, **flags: bool) -> None:
    """Run the kernel on all tiles, with a program a tile and block of the result (., width)."""
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
    """A power of two for width numbers: `most` at most, and at least the 16 of a tensor core."""
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
    positions, real = _positions(order, start, stop, TILE)
    columns = block * BLOCK + tl.arange(0, BLOCK)
    largest = tl.full((TILE,), float("-inf"), logsumexp.dtype.element_ty)
    total = tl.full((TILE,), 0, logsumexp.dtype.element_ty)
    sums = tl.full((TILE, BLOCK), 0, logsumexp.dtype.element_ty)
    for step in range(row, row_stop, STEP):
        rows = step + tl.arange(0, STEP)
        own = rows < row_stop
        scores = tl.full((TILE, STEP), 0, largest.dtype)
        scores = _add_products(scores, query, positions, real, keys, rows, own, D_IN, CHUNK)
        scores = tl.where(own[None, :], scores, float("-inf"))
        larger = tl.maximum(largest, tl.max(scores, 1))
        shrink = tl.exp(largest - larger)
        weights = tl.exp(scores - larger[:, None])
        total = total * shrink + tl.sum(weights, 1)
        value = _load(values, rows, own, columns, D_EMB)
        sums = _dot(weights.to(value.dtype), value, sums * shrink[:, None])
        largest = larger
    _store(output, positions, real, columns, D_EMB, sums / total[:, None])
    if block == 0:
        tl.store(logsumexp + positions, largest + tl.log(total), mask=real)


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
    positions, real = _positions(order, start, stop, TILE)
    normaliser = tl.load(logsumexp + positions, mask=real, other=0.0)
    # The scores' gradient is weight * (grad_weight - the mean of grad_weight under the weights), and
    # that mean is grad_output . output. _grad_table, which runs next, reads it too.
    mean = tl.full((TILE,), 0, normaliser.dtype)
    for chunk in range(0, D_EMB, CHUNK):
        columns = chunk + tl.arange(0, CHUNK)
        grad = _load(grad_output, positions, real, columns, D_EMB).to(mean.dtype)
        mean += tl.sum(grad * _load(output, positions, real, columns, D_EMB), 1)
    if block == 0:
        tl.store(delta + positions, mean, mask=real)
    columns = block * BLOCK + tl.arange(0, BLOCK)
    sums = tl.full((TILE, BLOCK), 0, mean.dtype)
    for step in range(row, row_stop, STEP):
        rows = step + tl.arange(0, STEP)
        own = rows < row_stop
        scores = tl.full((TILE, STEP), 0, mean.dtype)
        scores = _add_products(scores, query, positions, real, keys, rows, own, D_IN, CHUNK)
        scores = tl.where(own[None, :], scores, float("-inf"))
        weights = tl.exp(scores - normaliser[:, None])
        # grad_output . value - mean, one number a score
        gap = tl.full((TILE, STEP), 0, mean.dtype) - mean[:, None]
        gap = _add_products(gap, grad_output, positions, real, values, rows, own, D_EMB, CHUNK)
        key = _load(keys, rows, own, columns, D_IN)
        sums = _dot((weights * gap).to(key.dtype), key, sums)
    _store(grad_query, positions, real, columns, D_IN, sums)


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
    """The gradient through the keys, the values, or both: one table's, whichever it serves as."""
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
        positions, real = _positions(order, step, stop, STEP)
        # Where there is no position, query and grad_output are zero, and add nothing to any row.
        normaliser = tl.load(logsumexp + positions, mask=real, other=0.0)
        scores = tl.full((TILE, STEP), 0, sums.dtype)
        scores = _add_products(scores, keys, rows, own, query, positions, real, D_IN, CHUNK)
        weights = tl.exp(scores - normaliser[None, :])
        if VALUES:
            grad = _load(grad_output, positions, real, columns, D_EMB)
            sums = _dot(weights.to(grad.dtype), grad, sums)
        if KEYS:
            mean = tl.load(delta + positions, mask=real, other=0.0)
            gap = tl.full((TILE, STEP), 0, sums.dtype) - mean[None, :]
            gap = _add_products(gap, values, rows, own, grad_output, positions, real, D_EMB, CHUNK)
            asked = _load(query, positions, real, columns, D_IN)
            sums = _dot((weights * gap).to(asked.dtype), asked, sums)
    _store(grad_table, rows, own, columns, WIDTH, sums)


@_jit
def _tile(tiles, index):
    """The four numbers of a tile."""
    tile = tiles + 4 * index
    return tl.load(tile), tl.load(tile + 1), tl.load(tile + 2), tl.load(tile + 3)


@_jit
def _positions(order, start, stop, SIZE: tl.constexpr):
    """The positions at SIZE places of the sorted order, and which of the places come before stop."""
    places = start + tl.arange(0, SIZE)
    real = places < stop
    return tl.load(order + places, mask=real, other=0), real


@_jit
def _load(table, rows, real, columns, WIDTH: tl.constexpr):
    """table[rows, columns], zero where a row is not real or a column past the width."""
    # In 64 bits: a table may have more than 2^31 numbers.
    places = rows[:, None].to(tl.int64) * WIDTH + columns[None, :]
    return tl.load(table + places, mask=real[:, None] & (columns < WIDTH)[None, :], other=0.0)


@_jit
def _store(table, rows, real, columns, WIDTH: tl.constexpr, numbers):
    """table[rows, columns] = numbers, where _load would load."""
    places = rows[:, None].to(tl.int64) * WIDTH + columns[None, :]
    numbers = numbers.to(table.dtype.element_ty)
    tl.store(table + places, numbers, mask=real[:, None] & (columns < WIDTH)[None, :])


@_jit
def _add_products(sums, a, a_rows, a_real, b, b_rows, b_real, WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    """sums + a[a_rows] @ b[b_rows].T, a chunk of the width at a time."""
    for chunk in range(0, WIDTH, CHUNK):
        columns = chunk + tl.arange(0, CHUNK)
        left = _load(a, a_rows, a_real, columns, WIDTH)
        right = _load(b, b_rows, b_real, columns, WIDTH)
        sums = _dot(left, tl.trans(right), sums)
    return sums


@_jit
def _dot(a, b, sums):
    """sums + a @ b, exact products where the type allows."""
    return tl.dot(a, b, sums, input_precision="ieee", out_dtype=sums.dtype)
