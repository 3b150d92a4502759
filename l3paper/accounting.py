"""What a GPT costs: parameters, floating-point operations and bytes, from its configuration alone.

Conventions. A product of (m, k) and (k, n) is 2mkn operations; only matrix products count, as in
`torch.utils.flop_counter`. Attention counts the full T x T square, causal or not. A backward pass
costs twice the forward pass. Embedding and head count as active, as in the paper's tables. For the
rows of L3, which differ from token to token, the mean is weighted by how often each token occurs:
frequent tokens own many rows, so the plain mean would be far too low.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from l3paper.gpt import GPTConfig


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

    @property
    def total_parameters(self) -> int:
        return sum(self.parameters.values())

    @property
    def active_parameters(self) -> float:
        """Parameters that one token uses: all but the tables, and its own rows of those."""
        idle = self.parameters["l3 tables"]
        return self.total_parameters - idle + self.l3_layers * self.mean_rows * self.row_numbers

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
    time = config.sequence_len if sequence_len is None else sequence_len
    kv_width = config.n_kv_head * config.head_dim
    d_up, d_emb = config.l3_d_up or 4 * c, config.l3_d_emb or c
    row_numbers = c if config.l3_tie_kv else c + d_emb
    matrices = {
        "attention projections": layers * (2 * c * c + 2 * c * kv_width),
        "mlp": layers * 8 * c * c,
        "l3 projections": l3_layers * (d_emb * d_up + (d_up + c) * c),
        "head": c * config.vocab_size,
    }
    return Accounting(
        parameters={
            "embedding": c * config.vocab_size,
            **matrices,
            "l3 tables": l3_layers * config.l3_n_emb * row_numbers,
        },
        flops={
            **{name: 2.0 * size for name, size in matrices.items()},
            "attention scores": 4.0 * layers * c * time,
            "l3 lookup": 2.0 * l3_layers * mean_rows * (c + d_emb),
        },
        mean_rows=mean_rows if l3_layers else 0.0,
        row_numbers=row_numbers,
        l3_layers=l3_layers,
    )


def weighted_mean_rows(alloc: Sequence[int], token_counts: np.ndarray) -> float:
    """Mean of d_t over the positions of a text: sum of count_t * d_t over sum of count_t."""
    return float(np.average(alloc, weights=token_counts))
