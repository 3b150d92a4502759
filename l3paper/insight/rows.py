"""How an L3 layer chooses among its rows, and what each row holds."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from l3paper.gpt import GPT
from l3paper.insight.lens import streams
from l3paper.layer import L3Layer, rms_norm


def row_weights(layer: L3Layer, x: Tensor, token_ids: Tensor) -> Tensor:
    """The softmax of every position over its token's rows: (N, k), filled up with zeros.

    x (N, n_embd) is the stream that enters the layer, token_ids (N,); k is the most rows that one of
    these tokens owns.
    """
    start = layer.bounds[token_ids]
    length = layer.bounds[token_ids + 1] - start
    place = torch.arange(int(length.max()), device=x.device)
    real = place < length[:, None]
    keys, _ = layer.prepare(*layer.tables())
    rows = keys[torch.where(real, start[:, None] + place, 0)]  # (N, k, n_embd)
    scores = torch.einsum("nd,nkd->nk", rms_norm(x), rows)
    return scores.masked_fill(~real, -torch.inf).softmax(dim=-1)


def distance_from_uniform(weights: Tensor, rows: Tensor) -> Tensor:
    """KL(softmax || uniform) in nats (N,) of weights (N, k) over `rows` (N,): log d_t less entropy.

    0 is an even average of the rows, log d_t the choice of a single one.
    """
    return rows.log() + torch.special.xlogy(weights, weights).sum(dim=-1)


@dataclass(frozen=True)
class Choice:
    """How the positions of a text choose rows in one L3 layer; all (N,)."""

    token_ids: Tensor
    rows: Tensor
    """How many rows the position's token owns."""
    distance: Tensor
    """From uniform, in nats."""


@torch.no_grad()
def choices(model: GPT, idx: Tensor) -> dict[int, Choice]:
    """For ids (B, T), by the block behind which the layer sits."""
    idx = idx.to(model.device)
    found, _ = streams(model, idx)
    result = {}
    for i in model.config.l3_blocks:
        layer, ids = model.l3_layers[str(i)], idx.flatten()
        weights = row_weights(layer, found[f"block {i}"].flatten(0, 1), ids)
        rows = layer.bounds[ids + 1] - layer.bounds[ids]
        result[i] = Choice(ids, rows, distance_from_uniform(weights, rows))
    return result


class Occurrence(NamedTuple):
    weight: float
    """Of the row, in the softmax at this position."""
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

    A row promotes what the head reads from its value alone: W_mix[:, :d_up] Norm(W_up v), for a layer
    as published. Raises ValueError where the text does not contain the token.
    """
    idx = idx.to(model.device)
    sequence, position = (idx == token).nonzero(as_tuple=True)
    if not len(sequence):
        raise ValueError(f"token is {token}, which the text does not contain")
    layer = model.l3_layers[str(block)]
    found, _ = streams(model, idx)
    x = found[f"block {block}"][sequence, position]
    weights = row_weights(layer, x, idx[sequence, position])  # (N, d_t)
    own = slice(int(layer.bounds[token]), int(layer.bounds[token + 1]))
    _, values = layer.tables()
    up = rms_norm(layer.w_up(values[own]))  # (d_t, d_up)
    promoted = model.lm_head(up @ layer.w_mix.weight[:, : up.shape[-1]].T).argsort(
        dim=-1, descending=True
    )
    order = weights.argsort(dim=0, descending=True)[:most]  # (most, d_t)
    return [
        Row(
            float(weights[:, row].mean()),
            [
                Occurrence(float(weights[n, row]), int(sequence[n]), int(position[n]))
                for n in order[:, row].tolist()
            ],
            promoted[row, :most].tolist(),
        )
        for row in range(own.stop - own.start)
    ]
