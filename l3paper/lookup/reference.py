"""The ragged softmax at the heart of L3 (paper, section 3), as one would write it first.

Every lookup, here and in `l3paper.lookup.grouped`, has the same signature:

    lookup(query, token_ids, bounds, keys, values) -> output

    query      (N, d_in)   one row per position, already normalised: x̂ in the paper
    token_ids  (N,)        long
    bounds     (V + 1,)    long; token t owns the table rows bounds[t] : bounds[t + 1], at least one
    keys       (v, d_in)   W_K in the paper; the rows of token t are K_t
    values     (v, d_emb)  W_V; the same tensor as keys where they are tied
    output     (N, d_emb)  V_t^T softmax(K_t query), where t is the position's own token

Lookups trust their inputs; `l3paper.lookup.table` checks them.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Lookup = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(eq=False)  # compared by identity: torch.compile would recompile for every batch's contents
class Plan:
    """How one batch is looked up: `plan(query, keys, values)`. It depends on ids and bounds alone.

    So it can be made before the first decoder block, and L3 layers with equal bounds can share it.
    """

    lookup: Lookup
    token_ids: Tensor  # (N,)
    bounds: Tensor  # (V + 1,)

    tables = None
    """The rows (keys, values) that the plan brings along, or None for those of the layer."""

    def __call__(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return self.lookup(query, self.token_ids, self.bounds, keys, values)


def loop(query: Tensor, token_ids: Tensor, bounds: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """One position at a time: the equation of section 3. The specification of all other lookups."""
    output = query.new_empty(len(query), values.shape[1])  # (N, d_emb)
    for i, token in enumerate(token_ids.tolist()):
        rows = slice(bounds[token], bounds[token + 1])
        scores = query[i : i + 1] @ keys[rows].T  # (1, d_t)
        output[i] = (scores.softmax(dim=-1) @ values[rows])[0]
    return output


def padded(query: Tensor, token_ids: Tensor, bounds: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Gather every position's rows, padded to the longest, and mask the padding, as nanochat does.

    Needs N * max(d_t) * (d_in + d_emb) numbers of memory.
    """
    start = bounds[token_ids]  # (N,)
    length = bounds[token_ids + 1] - start  # (N,)
    longest = int(length.max()) if len(length) else 0
    place = torch.arange(longest, device=query.device)
    own = place < length[:, None]  # (N, L)
    rows = torch.where(own, start[:, None] + place, 0)  # (N, L)
    scores = torch.einsum("nd,nld->nl", query, keys[rows])  # (N, L)
    weights = scores.masked_fill(~own, -torch.inf).softmax(dim=-1)
    return torch.einsum("nl,nld->nd", weights, values[rows])


def blocked(
    query: Tensor,
    token_ids: Tensor,
    bounds: Tensor,
    keys: Tensor,
    values: Tensor,
    block_size: int = 128,
) -> Tensor:
    """Sort the positions by token, then one masked dense attention per block (paper, section 3).

    Neighbours in the sorted order share rows, so a block of positions needs one contiguous span of
    the table; the mask leaves each position its own part of the span. The paper's block on a GPU is
    512 positions; on a CPU, smaller blocks waste fewer products.
    """
    if len(query) == 0:
        return query.new_empty(0, values.shape[1])
    order = token_ids.argsort(stable=True)  # (N,)
    blocks = []
    for block in order.split(block_size):
        ids = token_ids[block]  # (n,)
        first, last = int(bounds[ids[0]]), int(bounds[ids[-1] + 1])
        row = torch.arange(first, last, device=query.device)  # (span,)
        foreign = (row < bounds[ids, None]) | (row >= bounds[ids + 1, None])  # (n, span)
        scores = query[block] @ keys[first:last].T  # (n, span)
        weights = scores.masked_fill(foreign, -torch.inf).softmax(dim=-1)
        blocks.append(weights @ values[first:last])
    # The inverse of the sorting permutation restores the order of the positions.
    return torch.cat(blocks)[order.argsort()]
