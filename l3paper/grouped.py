"""The lookup without waste: every distinct token is one small dense attention over its own rows.

Sorted by token, the positions of a batch fall into groups that share their rows, and a token's rows
are a contiguous slice of the table. So a group needs no gather, no mask and no padding: two products
with a slice. The backward pass writes the table's gradient straight into slices of one tensor, which
autograd would build from one full-sized tensor a slice.

Products with a few rows cost more to launch than to compute. Groups with few rows and few positions
are therefore put together by size, rounded up to powers of two, and each size is one batched product.
A token with one row needs no product at all: its softmax is 1.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding  # gathers rows several times faster than x[index]

SMALL = 64
"""A group with fewer rows and fewer positions than this is batched with others of its size."""


class Bucket(NamedTuple):
    """G small groups of at most P positions and R rows each."""

    positions: Tensor  # (G, P) places in the sorted order; N, one past the last, where there is none
    rows: Tensor  # (G, R) rows of the table; the group's first again where there is none
    own: Tensor  # (G, R) False where there is none


class Plan(NamedTuple):
    """How a batch of N positions is divided. It depends on the token ids and the bounds alone."""

    order: Tensor  # (N,) sorts the positions by token
    inverse: Tensor  # (N,) puts them back
    single_positions: Tensor  # places in the sorted order whose token owns one row, and
    single_rows: Tensor  # that row
    slices: list[list[int]]  # of large groups: first position, last + 1, first row, last + 1
    buckets: list[Bucket]


def make_plan(token_ids: Tensor, bounds: Tensor) -> Plan:
    """Divide the positions with these ids (N,) into groups by token, and the groups by size."""
    order = token_ids.argsort(stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device)
    tokens, count = token_ids[order].unique_consecutive(return_counts=True)  # (groups,)
    start = count.cumsum(0) - count
    first, length = bounds[tokens], bounds.diff()[tokens]
    single = length == 1
    large = ~single & ((length >= SMALL) | (count >= SMALL))
    single_positions = single.repeat_interleave(count).nonzero().flatten()
    slices = torch.stack([start, start + count, first, first + length], dim=1)[large].tolist()
    size = torch.stack([_exponent(count), _exponent(length)], dim=1)
    buckets = []
    for shape in size[~single & ~large].unique(dim=0).tolist():
        group = (~single & ~large & (size == size.new_tensor(shape)).all(dim=1)).nonzero()  # (G, 1)
        place, row = (torch.arange(2**exponent, device=order.device) for exponent in shape)
        real, own = place < count[group], row < length[group]
        positions = torch.where(real, start[group] + place, len(order))
        rows = torch.where(own, first[group] + row, first[group])
        buckets.append(Bucket(positions, rows, own))
    single_rows = first.repeat_interleave(count)[single_positions]
    return Plan(order, inverse, single_positions, single_rows, slices, buckets)


def _exponent(number: Tensor) -> Tensor:
    """The smallest e with 2^e >= number."""
    return (number - 1).float().frexp().exponent


@torch.compiler.disable  # the plan reads the ids on the host; a compiled model breaks its graph here
def grouped(query: Tensor, token_ids: Tensor, bounds: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """One dense attention a distinct token, over a slice of the table; see the top of this module.

    Under autocast the lookup keeps the precision of the table. Its gradients cannot be
    differentiated again: a second backward pass raises RuntimeError.
    """
    with torch.autocast(query.device.type, enabled=False):
        plan = make_plan(token_ids, bounds)
        found = _Grouped.apply(query.to(keys.dtype), keys, values, values is keys, plan)
    return found.to(query.dtype)


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, keys, values, tied, plan):
        ctx.plan, ctx.tied = plan, tied
        # One row more than there are positions: where the padding of small groups reads and writes.
        q = _padded_sort(query, plan)  # (N + 1, d_in)
        output = q.new_empty(len(q), values.shape[1])
        weights = []
        for a, b, first, last in plan.slices:
            weight = (q[a:b] @ keys[first:last].T).softmax(dim=-1)  # (n, d_t)
            torch.mm(weight, values[first:last], out=output[a:b])
            weights.append(weight)
        for positions, rows, own in plan.buckets:
            key = embedding(rows, keys)  # (G, R, d_in)
            value = key if tied else embedding(rows, values)  # (G, R, d_emb)
            scores = embedding(positions, q) @ key.mT  # (G, P, R)
            weight = scores.masked_fill_(~own[:, None], -torch.inf).softmax(dim=-1)
            output.index_copy_(0, positions.flatten(), (weight @ value).flatten(0, 1))
            weights.append(weight)
        output.index_copy_(0, plan.single_positions, embedding(plan.single_rows, values))
        ctx.save_for_backward(q, keys, values, *weights)
        return embedding(plan.inverse, output)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        plan, tied = ctx.plan, ctx.tied
        q, keys, values, *weights = ctx.saved_tensors
        g = _padded_sort(grad_output, plan)  # (N + 1, d_emb)
        grad_q, grad_keys = torch.zeros_like(q), torch.zeros_like(keys)
        grad_values = grad_keys if tied else torch.zeros_like(values)
        for (a, b, first, last), weight in zip(plan.slices, weights, strict=False):
            grad_scores = _softmax_backward(g[a:b] @ values[first:last].T, weight)  # (n, d_t)
            torch.mm(grad_scores, keys[first:last], out=grad_q[a:b])
            grad_keys[first:last].addmm_(grad_scores.T, q[a:b])
            grad_values[first:last].addmm_(weight.T, g[a:b])
        for bucket, weight in zip(plan.buckets, weights[len(plan.slices) :], strict=True):
            positions, rows = bucket.positions, bucket.rows
            x, grad, key = embedding(positions, q), embedding(positions, g), embedding(rows, keys)
            value = key if tied else embedding(rows, values)
            grad_scores = _softmax_backward(grad @ value.mT, weight)  # (G, P, R)
            grad_q.index_copy_(0, positions.flatten(), (grad_scores @ key).flatten(0, 1))
            # Where a group has no row, weight and grad_scores are zero, and zero is added.
            grad_keys.index_add_(0, rows.flatten(), (grad_scores.mT @ x).flatten(0, 1))
            grad_values.index_add_(0, rows.flatten(), (weight.mT @ grad).flatten(0, 1))
        grad_values.index_add_(0, plan.single_rows, embedding(plan.single_positions, g))
        return embedding(plan.inverse, grad_q), grad_keys, None if tied else grad_values, None, None


def _padded_sort(x: Tensor, plan: Plan) -> Tensor:
    """The rows of x (N, d) in the plan's order, and a row of zeros: (N + 1, d)."""
    padded = x.new_zeros(len(x) + 1, x.shape[1])
    torch.index_select(x, 0, plan.order, out=padded[:-1])
    return padded


def _softmax_backward(grad_weights: Tensor, weights: Tensor) -> Tensor:
    """The gradient of the scores from that of their softmax, both (..., d_t)."""
    grad_weights -= (grad_weights * weights).sum(dim=-1, keepdim=True)
    return grad_weights.mul_(weights)
