"""What a GPT costs, from its configuration alone: parameters, FLOPs (floating-point operations), bytes.

Conventions. A product of (m, k) and (k, n) is 2mkn FLOPs; only matrix products count, as in
`torch.utils.flop_counter`. Attention counts the full T x T square, causal or not. A backward pass
costs twice the forward pass. Embedding and head count as active, as in the paper's tables. For the
rows of L3, which differ from token to token, the mean is weighted by how often each token occurs:
frequent tokens own many rows, so the plain mean would be far too low.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from l3paper.gpt import GPT, GPTConfig
from l3paper.parts.rivals import KERNEL, TABLES, table_sizes


@dataclass(frozen=True)
class Accounting:
    """Costs of one model. `parameters` and `flops` (forward, per token) are broken down by part."""

    parameters: dict[str, int]
    flops: dict[str, float]
    mean_rows: float
    """Rows a token touches in one L3 layer, averaged over the text: the frequency-weighted d_t."""
    row_numbers: int
    """Numbers in one key row and its value row: n_embd when tied, n_embd + d_emb when not."""
    l3_layers: int
    rival_used: int
    """Numbers in the rows that a token reads of the tables of rivals, in all layers together."""
    idle_expert_parameters: int
    """Parameters of the experts that a token does not choose, in all blocks together."""

    @property
    def total_parameters(self) -> int:
        return sum(self.parameters.values())

    @property
    def active_parameters(self) -> float:
        """Parameters that one token uses: of the tables its own rows, of the experts its own choice."""
        tables = self.parameters["l3 tables"] + self.parameters.get("rival tables", 0)
        used = self.total_parameters - tables - self.idle_expert_parameters + self.rival_used
        return used + self.l3_layers * self.mean_rows * self.row_numbers

    @property
    def flops_forward(self) -> float:
        """Per token."""
        return sum(self.flops.values())

    @property
    def flops_training(self) -> float:
        """Per token, forward and backward."""
        return 3 * self.flops_forward

    def table_bytes(self, bytes_per_number: int = 4) -> int:
        """Memory of all L3 tables."""
        return self.parameters["l3 tables"] * bytes_per_number

    def touched_bytes(self, bytes_per_number: int = 4) -> float:
        """Table bytes one token touches, all L3 layers together, on average."""
        return self.l3_layers * self.mean_rows * self.row_numbers * bytes_per_number

    def summary(self) -> dict[str, float]:
        """The totals, for a record."""
        return {
            "total_parameters": self.total_parameters,
            "active_parameters": self.active_parameters,
            "flops_forward_per_token": self.flops_forward,
            "flops_training_per_token": self.flops_training,
            "mean_rows": self.mean_rows,
            "table_bytes": self.table_bytes(),
            "touched_bytes_per_token": self.touched_bytes(),
        }


def account(config: GPTConfig, mean_rows: float = 0.0, sequence_len: int | None = None) -> Accounting:
    """The costs of GPT(config) at `sequence_len` (by default the longest the model takes).

    mean_rows: from `weighted_mean_rows`. Raises ValueError where the model has L3 layers and
    mean_rows is below 1, since every token owns a row.
    """
    if config.l3_blocks and mean_rows < 1:
        raise ValueError(f"mean_rows is {mean_rows}; with L3 layers it must be at least 1")
    c, layers, l3_layers = config.n_embd, config.n_layer, len(config.l3_blocks)
    rivals, (rival_rows, rows_read) = len(config.rival_blocks), _rival_rows(config)
    time = config.sequence_len if sequence_len is None else sequence_len
    kv_width = config.n_kv_head * config.head_dim
    d_up, d_emb, row_numbers = config.d_up, config.d_emb, config.row_numbers
    mlp = layers * 2 * c * config.hidden_width  # or one expert per block
    if config.n_experts:
        mlps = {"router": layers * c * config.n_experts, "experts": config.n_experts * mlp}
        idle = (config.n_experts - config.experts_per_token) * mlp
    else:
        mlps, idle = {"mlp": mlp}, 0
    matrices = {
        "attention projections": layers * (2 * c * c + 2 * c * kv_width),
        **mlps,
        "l3 projections": l3_layers * _l3_projections(config.l3_variant, c, d_emb, d_up),
        "head": c * config.vocab_size,
    }
    rival_tables = {}
    if rivals:
        matrices["rival projections"] = rivals * _rival_projections(config)
        rival_tables = {"rival tables": rivals * rival_rows * config.rival_d_emb}
    if config.rival == "engram":
        rival_tables["convolution"] = rivals * KERNEL * c
    flops = {name: 2.0 * size for name, size in matrices.items()}
    if config.n_experts:
        flops["experts"] -= 2.0 * idle
    return Accounting(
        parameters={
            "embedding": c * config.vocab_size,
            **matrices,
            "l3 tables": l3_layers * config.l3_n_emb * row_numbers,
            **rival_tables,
        },
        flops={
            **flops,
            "attention scores": 4.0 * layers * c * time,
            "l3 lookup": 2.0 * l3_layers * mean_rows * (c + d_emb),
        },
        mean_rows=mean_rows if l3_layers else 0.0,
        row_numbers=row_numbers,
        l3_layers=l3_layers,
        rival_used=rivals * rows_read * config.rival_d_emb,
        idle_expert_parameters=idle,
    )


def weighted_mean_rows(alloc: Sequence[int], token_counts: np.ndarray) -> float:
    """Mean of d_t over the positions of a text: sum of count_t * d_t over sum of count_t."""
    return float(np.average(alloc, weights=token_counts))


def predicted_bytes(model: GPT, steps: Iterable[Tensor]) -> float:
    """Table bytes that travel when the rows of a model come from elsewhere, all L3 layers together.

    `steps` are the ids (...) of each forward pass: within one, the rows of an id travel once.
    """
    if not model.l3_layers:
        return 0.0
    distinct = torch.cat([step.unique() for step in steps])
    layer = next(iter(model.l3_layers.values()))
    counts = distinct.bincount(minlength=model.config.vocab_size).cpu().numpy()
    costs = account(model.config, weighted_mean_rows(layer.bounds.diff().tolist(), counts))
    return costs.touched_bytes(model.lm_head.weight.element_size()) * len(distinct)


def exchanged_bytes(
    config: GPTConfig, positions: int, processes: int, bytes_per_number: int = 4
) -> dict[str, float]:
    """The bytes that one process sends per step for the gradients of all L3 tables.

    "positions" is what `SharedLookup` of `l3paper.training.distributed` sends where each process has
    `positions` positions: ids, queries and output gradients to all others. "dense" is what a ring of
    all-reduces takes (each process sends everything but its own part, twice), and what sharded tables
    take for gathering and for dividing the gradient.
    """
    others, layers = processes - 1, len(config.l3_blocks)
    a_position = 8 + bytes_per_number * (config.n_embd + config.d_emb)
    table_bytes = bytes_per_number * config.l3_n_emb * config.row_numbers
    return {
        "positions": layers * others * positions * a_position,
        "dense": layers * 2 * others / processes * table_bytes,
    }


def _l3_projections(variant: str, c: int, d_emb: int, d_up: int) -> int:
    if variant == "no-up":
        return (d_emb + c) * c
    return d_emb * d_up + (d_up + (c if variant != "no-residual" else 0)) * c


def _rival_projections(config: GPTConfig) -> int:
    c, d_emb, d_up = config.n_embd, config.rival_d_emb, config.rival_d_up
    match config.rival:
        case "mlp":
            return 2 * c * d_up
        case "per-layer-embedding":
            return d_emb * d_up + (d_up + c) * c
        case "engram":
            return 2 * TABLES * d_emb * c
        case _:
            return 0


def _rival_rows(config: GPTConfig) -> tuple[int, int]:
    """(rows of a rival's tables, rows that a token reads)."""
    match config.rival:
        case "per-layer-embedding":
            return config.vocab_size, 1
        case "engram":
            return sum(table_sizes(config.rival_rows)), TABLES
        case _:
            return 0, 0
