"""The lookup without waste: one small dense attention per distinct token, over its own rows.

Sorted by token, the positions of a batch fall into groups that share their rows, and a token's rows
are a contiguous slice of the table. So a large group is two products with a slice, without a copy, a
mask or padding. A product with a few rows takes longer to launch than to compute, so small groups are
gathered by size, rounded up, and each size is one masked batched product. A token with one row needs
no product at all: its softmax is 1.

The backward pass writes into slices of one gradient of the table; autograd would add up one full-sized
tensor per slice.

On CUDA with Triton, the kernels of `l3paper.lookup.kernels` do the same for all groups at once.
"""

from itertools import chain
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding  # gathers rows several times faster than x[index]

from l3paper.lookup.reference import padded

POSITIONS, ROWS = (1, 4, 16, 32), (8, 16, 32, 64)
"""Sizes that small groups are rounded up to: a finer choice pads less, a coarser one launches less."""

FEW = 2**18
"""The most numbers, with padding, that are gathered to look up few positions without grouping them.

There, both ways take the same time on two CPU cores, at widths from 64 to 1,024.
"""


def check_range(least: Tensor, most: Tensor, vocab_size: int) -> None:
    """Raise ValueError unless the least and the most of all ids are in 0 .. vocab_size - 1."""
    if least < 0 or most >= vocab_size:
        raise ValueError(
            f"token_ids span {int(least)} .. {int(most)}; they must be in 0 .. {vocab_size - 1}"
        )


class Bucket(NamedTuple):
    """G small groups of at most P positions and R rows each."""

    positions: Tensor  # (G, P) places in the sorted order; padded with N, one past the last
    rows: Tensor  # (G, R) rows of the table; padded with the group's first
    target: Tensor  # (G, R) the same; padded with n_emb, one past the last
    padding_mask: Tensor | None  # (G, 1, R) True for padding, for the forward pass


class Parts(NamedTuple):
    """The groups by size, for PyTorch's own products."""

    order: Tensor  # (N,) sorts the positions by token
    inverse: Tensor  # (N,) restores their order
    single_positions: Tensor  # places in the sorted order whose token owns one row, and
    single_rows: Tensor  # that row
    slices: list[list[int]]  # of large groups: first position, last + 1, first row, last + 1
    buckets: list[Bucket]


def make_parts(token_ids: Tensor, bounds: Tensor, n_emb: int) -> Parts:
    """Group positions with these ids (N,) by token, G groups, and divide the groups by size.

    Token t owns the rows bounds[t] : bounds[t + 1] of a table of n_emb. Raises ValueError for ids
    outside the vocabulary and tokens without rows: sorted, both are seen at once.
    """
    device, order = token_ids.device, token_ids.argsort(stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=device)
    tokens, count = token_ids[order].unique_consecutive(return_counts=True)  # (G,)
    if len(tokens):
        check_range(tokens[0], tokens[-1], len(bounds) - 1)
    first = bounds[tokens]
    length = bounds[tokens + 1] - first
    if (length < 1).any():
        raise ValueError("bounds are not set or not valid: a token of the batch owns no row")
    start = count.cumsum(0) - count
    single = length == 1
    large = ~single & ((count > POSITIONS[-1]) | (length > ROWS[-1]))
    slices = torch.stack([start, start + count, first, first + length], dim=1)[large].tolist()
    small = (~single & ~large).nonzero()  # (groups, 1)
    height = torch.bucketize(count[small], torch.tensor(POSITIONS, device=device))
    width = torch.bucketize(length[small], torch.tensor(ROWS, device=device))
    shapes = [(p, r) for p in POSITIONS for r in ROWS]
    shape, by_shape = (height * len(ROWS) + width).flatten().sort()
    sizes = shape.bincount(minlength=len(shapes)).tolist()
    buckets = []
    for (p, r), group in zip(shapes, small[by_shape].split(sizes), strict=True):
        if not len(group):
            continue
        place, row = torch.arange(p, device=device), torch.arange(r, device=device)
        own, rows = row < length[group], first[group] + row  # (G, r)
        positions = torch.where(place < count[group], start[group] + place, len(order))  # (G, p)
        target = torch.where(own, rows, n_emb)
        buckets.append(Bucket(positions, torch.where(own, rows, first[group]), target, ~own[:, None]))
    single_positions = single.repeat_interleave(count).nonzero().flatten()
    single_rows = first.repeat_interleave(count)[single_positions]
    return Parts(order, inverse, single_positions, single_rows, slices, buckets)


def pack(parts: Parts) -> Tensor:
    """All parts in one tensor (n,), for an operator to return."""
    shapes = [[*bucket.positions.shape, bucket.rows.shape[1]] for bucket in parts.buckets]
    header = len(shapes), len(parts.slices), len(parts.single_rows)
    numbers = torch.tensor([*header, *chain(*shapes, *parts.slices)], device=parts.order.device)
    buckets = [x.flatten() for bucket in parts.buckets for x in bucket[:3]]
    return torch.cat([numbers, *parts[:4], *buckets])


def unpack(packed: Tensor, n_positions: int) -> Parts:
    """What `pack` packed, without the padding masks."""
    n_buckets, n_slices, n_single = packed[:3].tolist()
    start = 3 + 3 * n_buckets + 4 * n_slices
    numbers = packed[3:start].tolist()
    shapes = [numbers[i : i + 3] for i in range(0, 3 * n_buckets, 3)]
    slices = [numbers[i : i + 4] for i in range(3 * n_buckets, len(numbers), 4)]
    sizes = [start, n_positions, n_positions, n_single, n_single]
    sizes += [size for g, p, r in shapes for size in (g * p, g * r, g * r)]
    _, order, inverse, single_positions, single_rows, *rest = packed.split(sizes)
    buckets = [
        Bucket(*(x.view(shape[0], -1) for x in rest[3 * i : 3 * i + 3]), None)
        for i, shape in enumerate(shapes)
    ]
    return Parts(order, inverse, single_positions, single_rows, slices, buckets)


def forward(
    query: Tensor,
    token_ids: Tensor,
    bounds: Tensor,
    keys: Tensor,
    values: Tensor | None,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The lookup of `l3paper.lookup.reference`, and what `backward` needs: the queries in the sorted
    order, all softmax weights, flattened, and the parts, packed.

    Values of None are the keys. Without `training` the three are empty, and few positions are gathered
    as in `padded`.
    """
    tied, values = values is None, keys if values is None else values
    if not training and _few(token_ids, bounds, keys.shape[1]):
        return padded(query, token_ids, bounds, keys, values), *_nothing(query)
    parts = make_parts(token_ids, bounds, len(keys))
    # One row more than there are positions: where the padding of small groups reads and writes.
    q = _padded_sort(query, parts.order)  # (N + 1, d_in)
    output = q.new_empty(len(q), values.shape[1])
    weights = []
    for a, b, first, last in parts.slices:
        weight = (q[a:b] @ keys[first:last].T).softmax(dim=-1)  # (n, d_t)
        torch.mm(weight, values[first:last], out=output[a:b])
        weights.append(weight)
    for positions, rows, _, padding_mask in parts.buckets:
        key = embedding(rows, keys)  # (G, R, d_in)
        value = key if tied else embedding(rows, values)  # (G, R, d_emb)
        scores = embedding(positions, q) @ key.mT  # (G, P, R)
        weight = scores.masked_fill_(padding_mask, -torch.inf).softmax(dim=-1)
        output.index_copy_(0, positions.flatten(), (weight @ value).flatten(0, 1))
        weights.append(weight)
    output.index_copy_(0, parts.single_positions, embedding(parts.single_rows, values))
    if not training:
        return embedding(parts.inverse, output), *_nothing(query)
    flat = torch.cat([q.new_empty(0), *(weight.flatten() for weight in weights)])
    return embedding(parts.inverse, output), q, flat, pack(parts)


def backward(
    grad_output: Tensor, keys: Tensor, values: Tensor | None, q: Tensor, flat: Tensor, packed: Tensor
) -> list[Tensor]:
    """The gradients of query, keys and, unless they are None, values, by what `forward` kept."""
    tied, values = values is None, keys if values is None else values
    parts = unpack(packed, len(q) - 1)
    g = _padded_sort(grad_output, parts.order)  # (N + 1, d_emb)
    weights = _unflatten(flat, parts)
    grad_q = torch.zeros_like(q)
    # One row more than the table has: where the padding of small groups writes.
    grad_keys = keys.new_zeros(len(keys) + 1, keys.shape[1])
    grad_values = grad_keys if tied else values.new_zeros(len(values) + 1, values.shape[1])
    for (a, b, first, last), weight in zip(parts.slices, weights, strict=False):
        grad_scores = _softmax_backward(g[a:b] @ values[first:last].T, weight)  # (n, d_t)
        torch.mm(grad_scores, keys[first:last], out=grad_q[a:b])
        torch.mm(grad_scores.T, q[a:b], out=grad_keys[first:last])
        grad_values[first:last].addmm_(weight.T, g[a:b])
    for bucket, weight in zip(parts.buckets, weights[len(parts.slices) :], strict=True):
        positions, rows, target, _ = bucket
        x, grad, key = embedding(positions, q), embedding(positions, g), embedding(rows, keys)
        value = key if tied else embedding(rows, values)
        grad_scores = _softmax_backward(grad @ value.mT, weight)  # (G, P, R)
        grad_q.index_copy_(0, positions.flatten(), (grad_scores @ key).flatten(0, 1))
        grad_key, grad_value = grad_scores.mT @ x, weight.mT @ grad  # (G, R, d_in or d_emb)
        if tied:
            grad_key += grad_value
        else:
            grad_values.index_copy_(0, target.flatten(), grad_value.flatten(0, 1))
        grad_keys.index_copy_(0, target.flatten(), grad_key.flatten(0, 1))
    grad_values.index_add_(0, parts.single_rows, embedding(parts.single_positions, g))
    gradients = [embedding(parts.inverse, grad_q), grad_keys[:-1]]
    return gradients if tied else [*gradients, grad_values[:-1]]


def _nothing(query: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(0, query.shape[1]), query.new_empty(0), query.new_empty(0, dtype=torch.long)


def _few(token_ids: Tensor, bounds: Tensor, width: int) -> bool:
    """Whether gathering these ids' keys (rows, width) beats grouping, in decoding on a CPU."""
    positions = len(token_ids)
    if token_ids.is_cuda or not 0 < positions * width <= FEW:
        return False
    check_range(*token_ids.aminmax(), len(bounds) - 1)
    longest = int((bounds[token_ids + 1] - bounds[token_ids]).max())
    return positions * longest * width <= FEW


def _unflatten(flat: Tensor, parts: Parts) -> list[Tensor]:
    """The softmax weights of every slice (n, d_t), then of every bucket (G, P, R)."""
    shapes = [(b - a, last - first) for a, b, first, last in parts.slices]
    shapes += [(*bucket.positions.shape, bucket.rows.shape[1]) for bucket in parts.buckets]
    split = flat.split([prod(shape) for shape in shapes]) if shapes else ()
    return [part.view(shape) for part, shape in zip(split, shapes, strict=True)]


def _padded_sort(x: Tensor, order: Tensor) -> Tensor:
    """The rows of x (N, d) in the sorted order, and a row of zeros: (N + 1, d)."""
    padded = x.new_zeros(len(x) + 1, x.shape[1])
    torch.index_select(x, 0, order, out=padded[:-1])
    return padded


def _softmax_backward(grad_weights: Tensor, weights: Tensor) -> Tensor:
    """The gradient of the scores from that of their softmax, both (..., d_t)."""
    grad_weights -= (grad_weights * weights).sum(dim=-1, keepdim=True)
    return grad_weights.mul_(weights)
