"""The ragged softmax at the heart of L3, several ways that all give the same result.

Every function here, and `grouped` in a module of its own, has the same signature:

    lookup(query, token_ids, bounds, keys, values) -> output

    query      (N, d_in)   one row a position, already normalised
    token_ids  (N,)        long
    bounds     (V + 1,)    long; token t owns the table rows bounds[t] : bounds[t + 1], at least one
    keys       (v, d_in)   W_K in the paper
    values     (v, d_emb)  W_V; the same tensor as keys where they are tied
    output     (N, d_emb)  V_t^T softmax(K_t query), t the position's own token (paper, section 3)

Inputs are trusted here; `L3Layer` checks them.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from l3paper.lookup.grouped import grouped

Lookup = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def loop(query: Tensor, token_ids: Tensor, bounds: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """One position at a time: the equation, word for word. The specification of all the others."""
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
    real = place < length[:, None]  # (N, L)
    rows = torch.where(real, start[:, None] + place, 0)  # (N, L)
    scores = torch.einsum("nd,nld->nl", query, keys[rows])  # (N, L)
    weights = scores.masked_fill(~real, -torch.inf).softmax(dim=-1)
    return torch.einsum("nl,nld->nd", weights, values[rows])


def blocked(
    query: Tensor,
    token_ids: Tensor,
    bounds: Tensor,
    keys: Tensor,
    values: Tensor,
    block_size: int = 128,
) -> Tensor:
    """Sort the positions by token, then one masked dense attention a block (paper, section 3).

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
    # In the sorted order so far; the inverse permutation puts every position back.
    return torch.cat(blocks)[order.argsort()]


LOOKUPS: dict[str, Lookup] = {
    "loop": loop,
    "padded": padded,
    "blocked": blocked,
    "grouped": grouped,
}
