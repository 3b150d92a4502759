"""How an L3 layer chooses among its rows, and what each row holds."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from l3paper.gpt import GPT
from l3paper.insight.lens import streams
from l3paper.layer import L3Layer, rms_norm


def row_weights(layer: L3Layer, x: Tensor, token_ids: Tensor) -> Tensor:
    """The softmax of every position over its token's rows: (N, k), padded with zeros.

    x (N, n_embd) is the stream that enters the layer, token_ids (N,); k is the most rows that one of
    these tokens owns. Raises ValueError for a variant of the layer, which may choose in another way.
    """
    if type(layer) is not L3Layer:
        raise ValueError(f"layer is a {type(layer).__name__}; only an L3Layer as published can be read")
    keys, _ = layer.tables()
    start = layer.bounds[token_ids]
    length = layer.bounds[token_ids + 1] - start
    place = torch.arange(int(length.max()), device=x.device)
    owned = place < length[:, None]
    own_keys = keys[torch.where(owned, start[:, None] + place, 0)]  # (N, k, n_embd)
    scores = torch.einsum("nd,nkd->nk", rms_norm(x), own_keys)
    return scores.masked_fill(~owned, -torch.inf).softmax(dim=-1)


def distance_from_uniform(weights: Tensor, rows: Tensor) -> Tensor:
    """KL(softmax || uniform) in nats (N,) of weights (N, k) over `rows` (N,): log d_t minus entropy.

    0 is an even average of the rows, log d_t the choice of a single one.
    """
    return rows.log() + torch.special.xlogy(weights, weights).sum(dim=-1)


@dataclass(frozen=True)
class Choice:
    """How the positions of a text choose rows in one L3 layer.

    On average over a token's positions, `distance` is `bias` plus `information`.
    """

    token_ids: Tensor  # (N,)
    rows: Tensor  # (N,) how many rows the position's token owns
    distance: Tensor  # (N,) KL(softmax || uniform) in nats
    bias: Tensor  # (N,) KL(mean softmax of the token || uniform): rows that win whatever the context
    information: Tensor  # (N,) KL(softmax || mean softmax of the token): what the context chooses
    mean_weights: Tensor  # (vocab_size, k) the mean softmax of every token, zeros if it is not there

    def dead_rows(self, least_positions: int = 20) -> tuple[int, int]:
        """(dead rows, rows) of the tokens that own several rows and have so many positions.

        A row is dead if its mean weight is below a tenth of an equal share.
        """
        counts = self.token_ids.bincount(minlength=len(self.mean_weights))
        owned = torch.zeros_like(counts).index_put((self.token_ids,), self.rows)
        place = torch.arange(self.mean_weights.shape[1], device=owned.device)
        eligible = (counts >= least_positions) & (owned > 1)
        real = (place < owned[:, None]) & eligible[:, None]
        dead = real & (self.mean_weights < 0.1 / owned[:, None].clamp(min=1))
        return int(dead.sum()), int(real.sum())


def choice_of(weights: Tensor, token_ids: Tensor, rows: Tensor, vocab_size: int) -> Choice:
    """Measure weights (N, k) of tokens (N,) that own `rows` (N,)."""
    counts = token_ids.bincount(minlength=vocab_size).clamp(min=1)
    totals = weights.new_zeros(vocab_size, weights.shape[1]).index_add(0, token_ids, weights)
    means = totals / counts[:, None]
    own = means[token_ids]  # (N, k)
    # Where a weight is above 0, so is the mean: 0 log 0 is the only case to take care of.
    information = torch.special.xlogy(weights, weights / own.clamp(min=1e-30)).sum(dim=-1)
    distance, bias = (distance_from_uniform(of, rows) for of in (weights, own))
    return Choice(token_ids, rows, distance, bias, information, means)


@torch.no_grad()
def choices(model: GPT, idx: Tensor) -> dict[int, Choice]:
    """The choices of every L3 layer on ids (B, T), by the block behind which the layer sits.

    Raises ValueError for a model with a variant of the layer.
    """
    idx = idx.to(model.device)
    by_depth, _ = streams(model, idx)
    ids = idx.flatten()
    by_block = {}
    for block in model.config.l3_blocks:
        layer = model.l3_layers[str(block)]
        weights = row_weights(layer, by_depth[f"block {block}"].flatten(0, 1), ids)
        by_block[block] = choice_of(weights, ids, layer.bounds.diff()[ids], model.config.vocab_size)
    return by_block


class Occurrence(NamedTuple):
    """A position of the text at which a row is chosen."""

    weight: float
    """The row's, in the softmax at this position."""
    sequence: int
    position: int


class Row(NamedTuple):
    """One row of one token: where it is chosen, and what it promotes."""

    mean_weight: float
    contexts: list[Occurrence]
    """The positions that weight it most, heaviest first."""
    promotes: list[int]
    """The token ids whose logits its value raises most, strongest first."""


@torch.no_grad()
def explore(model: GPT, block: int, token: int, idx: Tensor, most: int = 5) -> list[Row]:
    """What the rows of `token` hold, in the L3 layer behind `block`, judged on ids (B, T).

    A row promotes what the head reads from its value v alone: W_mix[:, :d_up] Norm(W_up v). Raises
    ValueError if the text does not contain the token, and for a variant of the layer.
    """
    idx = idx.to(model.device)
    sequence, position = (idx == token).nonzero(as_tuple=True)
    if not len(sequence):
        raise ValueError(f"token is {token}, which the text does not contain")
    layer = model.l3_layers[str(block)]
    by_depth, _ = streams(model, idx)
    x = by_depth[f"block {block}"][sequence, position]
    weights = row_weights(layer, x, idx[sequence, position])  # (N, d_t)
    _, values = layer.tables()
    own = values[layer.bounds[token] : layer.bounds[token + 1]]  # (d_t, d_emb)
    delta = rms_norm(layer.w_up(own)) @ layer.w_mix.weight[:, : layer.d_up].T  # (d_t, n_embd)
    promoted = model.lm_head(delta).argsort(dim=-1, descending=True)
    heaviest = weights.argsort(dim=0, descending=True)[:most]  # (most, d_t)
    rows = []
    for row in range(len(own)):
        contexts = [
            Occurrence(float(weights[n, row]), int(sequence[n]), int(position[n]))
            for n in heaviest[:, row].tolist()
        ]
        rows.append(Row(float(weights[:, row].mean()), contexts, promoted[row, :most].tolist()))
    return rows
