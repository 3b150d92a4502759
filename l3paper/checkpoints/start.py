"""The saved model that a run starts from, in place of random weights.

Whatever the saved model has, the run's model must have, too; L3 layers, or rivals, that only the run's
model has stay as they were drawn, and add nothing to the residual stream at first.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from l3paper.checkpoints.model import load_model, read_description
from l3paper.gpt import GPT, GPTConfig

SHARED = ("depth", "n_embd", "n_head", "n_kv_head", "n_experts", "experts_per_token", "mlp_width")
SHARED_L3 = ("l3_d_up", "l3_tie_kv", "l3_d_emb", "l3_variant")
SHARED_RIVAL = ("rival", "rival_after_layers", "rival_rows", "rival_d_emb", "rival_d_up")
"""Settings that both models must have in common: always, with L3 layers, and with rivals."""

_RESOLVED = {"depth": "n_layer", "mlp_width": "hidden_width", "l3_d_up": "d_up", "l3_d_emb": "d_emb"}
"""Attributes of GPTConfig that hold a setting under another name, or with its default resolved."""


@dataclass(frozen=True)
class Start:
    """A saved model whose weights have not been read yet."""

    folder: Path
    config: GPTConfig
    tokenizer: Tokenizer
    sha256: str
    """Of its `sums.json`, which holds the SHA-256 of every other file."""

    @property
    def name(self) -> str:
        """The name of its folder, without the way to it."""
        return self.folder.absolute().name


def read_start(folder: Path, vocab_size: int) -> Start:
    """Read everything about a saved model but its weights.

    Raises ValueError, naming the folder, if it holds no intact model, or one of another vocabulary.
    """
    try:
        config, tokenizer = read_description(folder)
        sums = (folder / "sums.json").read_bytes()
    except (OSError, ValueError) as error:
        raise ValueError(
            f"init_from is {str(folder)!r}; it must be the folder of a saved model: {error}"
        ) from error
    if vocab_size != config.vocab_size:
        raise ValueError(
            f"vocab_size is {vocab_size}; the model in init_from = {str(folder)!r} has "
            f"{config.vocab_size}, and so must the run"
        )
    return Start(folder, config, tokenizer, hashlib.sha256(sums).hexdigest())


def require_fit(start: Start, config: GPTConfig) -> None:
    """Raise ValueError, naming both values, unless a model of this configuration can start from it."""
    model = f"the model in init_from = {str(start.folder)!r}"
    if set(start.config.l3_blocks) - set(config.l3_blocks):
        raise ValueError(
            f"l3_after_layers is {config.l3_after_layers!r}; it must include "
            f"{start.config.l3_after_layers!r}, where {model} has L3 layers"
        )
    names = SHARED + (SHARED_L3 if start.config.l3_blocks else ())
    for name in names + (SHARED_RIVAL if start.config.rival else ()):
        attribute = _RESOLVED.get(name, name)
        ours, theirs = getattr(config, attribute), getattr(start.config, attribute)
        if ours != theirs:
            raise ValueError(f"{name} is {ours!r}; {model} has {theirs!r}, and so must the run")


@torch.no_grad()
def load_start(start: Start, model: GPT) -> None:
    """Copy the saved weights into a fresh model, for which `require_fit` has raised nothing.

    The allocation stays the model's own. In an L3 layer that both have, every token keeps as many of
    its saved rows as it owns now; rows beyond those stay as they were drawn.
    """
    saved, _ = load_model(start.folder, torch.device("cpu"))
    state = saved.state_dict()
    for name, layer in saved.l3_layers.items():
        own = model.l3_layers[name]
        to, of = shared_rows(own.bounds, state.pop(f"l3_layers.{name}.bounds"))
        for table in layer.table_names():
            rows = getattr(own, table)
            rows[to] = state.pop(f"l3_layers.{name}.{table}")[of].to(rows.dtype)
    model.load_state_dict(model.state_dict() | state)


def shared_rows(bounds: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """The first rows of every token, as many as it owns under both bounds (vocab_size + 1,).

    Returns their numbers in the one table and in the other, both (rows,).
    """
    counts = torch.minimum(bounds.diff(), others.diff())
    # The place of a row among its token's: 0, 1, ..., counts[t] - 1 for every token t.
    places = torch.arange(int(counts.sum())) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    return tuple(starts[:-1].repeat_interleave(counts) + places for starts in (bounds, others))
