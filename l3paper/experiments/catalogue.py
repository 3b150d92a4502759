"""The experiments, as data: a question, the paper's section, and what each family of models changes.

A family is one configuration, repeated over seeds at the learning rate that a search chose. Families
that are equal in two experiments are trained once.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from l3paper.parts.variants import VARIANTS
from l3paper.training.config import PRESETS, TrainConfig

Changes = dict[str, Any]
"""New values for settings of a TrainConfig, by name."""

SMALL = {
    "smoke": TrainConfig(
        data_bytes=800_000,
        vocab_size=512,
        depth=2,
        n_embd=32,
        sequence_len=64,
        batch_size=8,
        num_iterations=10,
        l3_n_emb=1024,
        l3_k_max=16,
        eval_every=5,
        eval_tokens=2048,
    ),
    "laptop": TrainConfig(vocab_size=1024, n_embd=64, l3_n_emb=4096, eval_tokens=16384),
    "gpu": replace(
        PRESETS["gpu"],
        vocab_size=16384,
        depth=4,
        n_embd=512,
        n_head=8,
        sequence_len=512,
        accumulate=1,
        num_iterations=800,
        l3_n_emb=131072,
        eval_every=100,
    ),
}
"""The smallest models that can answer, by preset. Their L3 layer is behind block `depth // 2`, counted
from 0, and LZW allocates its rows."""

ENGRAM_LR, PER_LAYER_LR = 0.03, 0.1
"""The learning rates of these layers' tables, at width 768: the best of those that the experiment
`learning_rates` tries on English, as 0.003 is for L3 tables."""

DENSE: Changes = {"l3_after_layers": ""}

ENGLISH = "english (public domain).txt"
"""The text of the records on English prose; figures/data/english.md lists its sources."""

LONG_ENGLISH = "english, 48 MB (public domain).txt"
"""Three times as much of it: eight times the steps read a token once on average."""

SOURCE = "stdlib"
"""The second text, which every reader has: the source of Python's standard library."""

TEXT = os.environ.get("L3_TEXT") or ENGLISH
"""The text whose records carry the claims: the reader's own, if $L3_TEXT names it."""

LONG_TEXT = os.environ.get("L3_TEXT") or LONG_ENGLISH
"""The text of the long runs: the reader's own, too."""


class Planned(NamedTuple):
    """A family of an experiment, as it is to be trained."""

    config: TrainConfig
    """At seed 0, with the preset's learning rates."""
    searched: TrainConfig
    """The configuration whose search finds the family's learning rate."""
    seeds: int


@dataclass(frozen=True)
class Experiment:
    """A question, and the families of models that answer it."""

    question: str
    section: str
    """The section of the paper, or "not in the paper"."""
    families: Callable[[TrainConfig], dict[str, Changes]]
    """Each family's changes of the preset's configuration. The first is compared with the others.

    `init_from` names another family, whose trained models the family continues, seed by seed.
    """
    shared_search: bool = False
    """Whether variations of one model take the learning rate found for that model, unchanged.

    For ablations, which change little else, and for maps around one point.
    """
    search_keeps: tuple[str, ...] = ("data", "stand_in")
    """The settings of a family that its shared search has as well."""
    seeds: int = 3
    more_seeds: dict[str, int] = field(default_factory=dict)
    """The families that have more seeds than the others, and how many."""
    text: str = TEXT
    """The text of its records."""
    presets: dict[str, TrainConfig] = field(default_factory=lambda: SMALL)

    def configs(self, preset: str, data: str) -> dict[str, TrainConfig]:
        """Each family's configuration at seed 0, with the preset's learning rates."""
        base = replace(self.presets[preset], data=data)
        return {name: replace(base, **changes) for name, changes in self.families(base).items()}

    def plan(self, preset: str, data: str, seeds: int | None = None) -> dict[str, Planned]:
        """All families by name; `seeds`, if given, takes the place of the planned numbers."""
        return {
            name: Planned(
                config,
                self._searched(config, preset),
                seeds or self.more_seeds.get(name, self.seeds),
            )
            for name, config in self.configs(preset, data).items()
        }

    def _searched(self, config: TrainConfig, preset: str) -> TrainConfig:
        if not self.shared_search:
            return config
        kept = {name: getattr(config, name) for name in self.search_keeps}
        return replace(self.presets[preset], **kept, **(DENSE if config.kind == "dense" else {}))


def spread(base: TrainConfig, layers: int) -> str:
    """`l3_after_layers` for that many L3 layers, spread evenly over the blocks."""
    return ",".join(str(base.depth * (i + 1) // (layers + 1)) for i in range(layers))


def without_and_with(config: TrainConfig) -> dict[str, TrainConfig]:
    """The model of this configuration without its L3 layers, and with them."""
    return {"dense": replace(config, **DENSE), "L3": config}


def rows_per_token(base: TrainConfig, rows: int) -> Changes:
    """A table with that many rows per token of the vocabulary."""
    return {"l3_n_emb": rows * base.vocab_size}


def rivals(base: TrainConfig) -> dict[str, Changes]:
    """What may be added to a dense model, at the FLOPs of one L3 layer.

    MoE, Engram and per-layer embeddings have its total parameters, too.
    """
    return {
        "L3": {},
        "dense": DENSE,
        "dense, longer": {"stand_in": "longer"},
        "dense, wider": {"stand_in": "wider"},
        "dense, deeper": {"stand_in": "deeper"},
        "MLP in place": {"stand_in": "mlp"},
        "MoE": {"stand_in": "moe"},
        "Engram": {"stand_in": "engram", "table_lr": ENGRAM_LR},
        "per-layer embedding": {"stand_in": "per-layer-embedding", "table_lr": PER_LAYER_LR},
        "L3, two layers": {"l3_after_layers": spread(base, 2)},
    }


def only(families: dict[str, Changes], *names: str) -> dict[str, Changes]:
    """Some of the families, in this order."""
    return {name: families[name] for name in names}


def rates(rate: float) -> list[float]:
    """Five learning rates to try, the one given first."""
    return [float(f"{rate * factor:.2g}") for factor in (1, 1 / 10, 1 / 3, 10 / 3, 10)]


def retrofits(base: TrainConfig) -> dict[str, Changes]:
    """The dense family of `rivals`, and what continues its trained models for as many steps again."""
    return {
        "continued": DENSE | {"init_from": "dense"},
        "continued with L3": {"init_from": "dense"},
        "dense": DENSE,
    }


EXPERIMENTS = {
    "rivals": Experiment(
        "At equal FLOPs, and where it has tables at equal parameters: which addition is the best?",
        "results",
        rivals,
        seeds=8,
        more_seeds={"L3": 16, "MoE": 16, "Engram": 16},
    ),
    "source": Experiment(
        "Does the answer hold for source code, the second text?",
        "results",
        lambda base: only(
            rivals(base), "L3", "dense", "dense, longer", "dense, wider", "MoE", "Engram"
        ),
        seeds=5,
        text=SOURCE,
    ),
    "retrofit": Experiment(
        "Does an L3 layer that is added to a trained dense model help as it trains on?",
        "not in the paper",
        retrofits,
        seeds=8,
    ),
    "learning_rates": Experiment(
        "How fast should tables and routers learn, relative to everything else?",
        "not in the paper",
        lambda base: {
            f"{name}: {rate:g}": {"stand_in": stand_in, setting: rate}
            for name, stand_in, setting, beyond in (
                ("L3", "", "table_lr", []),
                ("Engram", "engram", "table_lr", [0.1, 0.3]),
                ("per-layer embedding", "per-layer-embedding", "table_lr", [0.1, 0.3]),
                ("MoE", "moe", "router_lr", []),
            )
            for rate in [*rates(getattr(base, setting)), *beyond]
        },
        shared_search=True,
        seeds=1,
    ),
    "many_rows": Experiment(
        "With 16 rows per token: does the allocation matter, and does L3 lead an MoE of equal size?",
        "ablations",
        lambda base: {
            name: rows_per_token(base, 16) | changes
            for name, changes in {
                "LZW": {},
                "uniform": {"l3_allocation": "uniform"},
                "frequency": {"l3_allocation": "frequency"},
                "MoE": {"stand_in": "moe"},
            }.items()
        },
        seeds=8,
    ),
    "long": Experiment(
        "Does the lead last for eight times the steps?",
        "results",
        lambda base: {
            name: {"num_iterations": 8 * base.num_iterations} | changes
            for name, changes in only(rivals(base), "L3", "dense", "dense, wider", "Engram").items()
        },
        shared_search=True,
        search_keeps=("data", "stand_in", "table_lr"),  # the search of `rivals`, but on more text
        text=LONG_TEXT,
    ),
    "places": Experiment(
        "Behind which block does the layer belong, and may two in the middle share its rows?",
        "ablations",
        lambda base: {
            **{f"after {i}": {"l3_after_layers": str(i)} for i in range(base.depth)},
            "two of half the rows": {"l3_after_layers": f"{base.depth // 2 - 1},{base.depth // 2}"}
            | rows_per_token(base, 2),
        },
        shared_search=True,
        seeds=8,
    ),
    "allocation": Experiment(
        "Does it matter how Algorithm 1 is read, and is it the LZW scan that makes rows worth having?",
        "ablations",
        lambda base: {
            "LZW": {},
            "textbook LZW": {"l3_allocation": "lzw-textbook"},
            "as listed": {"l3_allocation": "lzw-listing"},
            "frequency": {"l3_allocation": "frequency"},
            "uniform": {"l3_allocation": "uniform"},
        },
        shared_search=True,
        seeds=5,
    ),
    "k_max": Experiment(
        "How many rows may one token own?",
        "ablations",
        lambda base: {
            f"k = {base.l3_k_max}": {},
            **{f"k = {k}": {"l3_k_max": k} for k in (base.l3_k_max // 8, base.l3_k_max // 4)},
            "no cap": {"l3_k_max": base.l3_n_emb},
        },
        shared_search=True,
        seeds=5,
    ),
    "tying": Experiment(
        "Do keys and values need separate tables?",
        "ablations",
        lambda base: {"tied": {}, "untied": {"l3_untied": True}},
        shared_search=True,
        seeds=8,
    ),
    "d_up": Experiment(
        "How wide must the up-projection be?",
        "section 3",
        lambda base: {
            "4 x width": {},
            **{f"{n} x width": {"l3_d_up": n * base.n_embd} for n in (1, 8)},
        },
        shared_search=True,
        seeds=5,
    ),
    "parts": Experiment(
        "Which parts of the layer are needed?",
        "not in the paper",
        lambda base: {
            name.replace("-", " ") or "as published": {"l3_variant": name} for name in VARIANTS
        },
        shared_search=True,
        seeds=5,
    ),
    "rows_width": Experiment(
        "How does the gain depend on the rows of the table, in narrower and wider models?",
        "not in the paper",
        lambda base: {
            f"{f:g} x width, {n} rows: {model}": {"n_embd": int(f * base.n_embd), "stand_in": stand_in}
            | rows_per_token(base, n)
            for f in (0.5, 1.5)
            for n in (1, 4, 16)
            for model, stand_in in {"L3": "", "dense, wider": "wider"}.items()
        },
        shared_search=True,
        seeds=5,
    ),
    "large_vocabulary": Experiment(
        "Does the allocation matter more with a vocabulary of eight times the tokens?",
        "ablations",
        lambda base: {
            name: {"vocab_size": 8 * base.vocab_size, "l3_n_emb": 8 * base.l3_n_emb} | changes
            for name, changes in {
                "LZW": {},
                "uniform": {"l3_allocation": "uniform"},
                "dense": DENSE,
            }.items()
        },
        shared_search=True,
        seeds=4,
    ),
}
