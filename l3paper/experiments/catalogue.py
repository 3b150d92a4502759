"""The experiments, as data: a question, the paper's section, and what each family of models changes.

A family is one configuration, which `l3paper.experiments.runs` repeats over seeds at the learning rate
that a search chose. Families that are equal in two experiments are trained once.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from l3paper.training.config import PRESETS, TrainConfig

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
from 0, and its rows are given out by LZW."""

DENSE = {"l3_after_layers": ""}

ENGLISH = "english (public domain).txt"
"""The text of the records on English prose; figures/data/english.md lists its sources."""

ENGLISH_TOKENS = "english-16384.npz"
"""The same kind of text, more of it, tokenized for the runs on a GPU."""


@dataclass(frozen=True)
class Experiment:
    question: str
    section: str
    """Of the paper; or that the paper has none."""
    families: Callable[[TrainConfig], dict[str, dict]]
    """What each family changes in the preset's configuration. The first is what others are held to."""
    presets: dict[str, TrainConfig] = field(default_factory=lambda: SMALL)
    seeds: int = 3
    shared_search: bool = False
    """Whether variations of one model take the learning rate found for that model, unchanged.

    For ablations, which change little else, and for maps around one point.
    """

    def configs(self, preset: str, data: str) -> dict[str, TrainConfig]:
        """The configuration of every family, at seed 0 and the learning rates as they are."""
        base = replace(self.presets[preset], data=data)
        return {name: replace(base, **changes) for name, changes in self.families(base).items()}

    def searched(self, config: TrainConfig, preset: str) -> TrainConfig:
        """The configuration whose search gives `config`, a family's, its learning rate."""
        if not self.shared_search:
            return config
        base = replace(self.presets[preset], data=config.data, stand_in=config.stand_in)
        return replace(base, **DENSE) if config.kind == "dense" else base


def _rows(base: TrainConfig, factor: int) -> dict:
    return {"l3_n_emb": factor * base.vocab_size}


def _rates(rate: float) -> tuple[float, ...]:
    """Five to search, the given one first."""
    return tuple(float(f"{rate * factor:.2g}") for factor in (1, 1 / 10, 1 / 3, 10 / 3, 10))


def spread(base: TrainConfig, layers: int) -> str:
    """`l3_after_layers` for that many L3 layers, spread evenly."""
    return ",".join(str(base.depth * (i + 1) // (layers + 1)) for i in range(layers))


def without_and_with(config: TrainConfig) -> dict[str, TrainConfig]:
    """The model of this run without its L3 layers, and with them."""
    return {"dense": replace(config, **DENSE), "L3": config}


RIVALS = {
    "dense, deeper": {"stand_in": "deeper"},
    "dense, wider": {"stand_in": "wider"},
    "L3": {},
}


def against_rivals(points: dict[str, dict]) -> dict[str, dict]:
    """L3 and the dense models of equal operations at every point of a map."""
    return {
        f"{point}: {model}": changes | stand_in
        for point, changes in points.items()
        for model, stand_in in RIVALS.items()
    }


EXPERIMENTS = {
    "main": Experiment(
        "At equal operations, tokens or time: is L3 better than dense models and than an MoE?",
        "results",
        lambda base: {
            "dense": DENSE,
            "dense, wider": {"stand_in": "wider"},
            "dense, deeper": {"stand_in": "deeper"},
            "MoE": {"stand_in": "moe"},
            "L3": {},
            "L3, two layers": {"l3_after_layers": spread(base, 2)},
        },
    ),
    "table_lr": Experiment(
        "How fast should the tables learn, beside everything else?",
        "not in the paper",
        lambda base: {f"{rate:g}": {"table_lr": rate} for rate in _rates(base.table_lr)},
        shared_search=True,
    ),
    "router_lr": Experiment(
        "How fast should the routers of the MoE learn, beside everything else?",
        "not in the paper",
        lambda base: {
            f"{rate:g}": {"stand_in": "moe", "router_lr": rate} for rate in _rates(base.router_lr)
        },
        shared_search=True,
    ),
    "allocation": Experiment(
        "Is it the LZW scan that makes the rows worth having?",
        "ablations",
        lambda base: {
            "LZW": {},
            "textbook LZW": {"l3_allocation": "lzw-textbook"},
            "as listed": {"l3_allocation": "lzw-listing"},
            "frequency": {"l3_allocation": "frequency"},
            "uniform": {"l3_allocation": "uniform"},
            "one row a token": {"l3_n_emb": base.vocab_size},
            "dense": DENSE,
        },
        shared_search=True,
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
    ),
    "rows": Experiment(
        "How does the gain grow with the rows of the table?",
        "ablations",
        lambda base: {
            "dense": DENSE,
            **{f"{n} a token": _rows(base, n) for n in (1, 2, 4, 8, 16)},
        },
        shared_search=True,
    ),
    "tying": Experiment(
        "Do keys and values need tables of their own?",
        "ablations",
        lambda base: {"tied": {}, "untied": {"l3_untied": True}},
        shared_search=True,
    ),
    "placement": Experiment(
        "Behind which block does the layer belong?",
        "ablations",
        lambda base: {f"after {i}": {"l3_after_layers": str(i)} for i in range(base.depth)},
        shared_search=True,
    ),
    "count": Experiment(
        "One layer with 8 rows a token, or several that share them?",
        "ablations",
        lambda base: {
            "1 x v": _rows(base, 8),
            **{
                f"{n} x v / {n}": {"l3_after_layers": spread(base, n), **_rows(base, 8 // n)}
                for n in (2, 4)
                if n <= base.depth
            },
        },
        shared_search=True,
    ),
    "d_up": Experiment(
        "How wide must the up-projection be?",
        "section 3",
        lambda base: {
            "4 x width": {},
            **{f"{n} x width": {"l3_d_up": n * base.n_embd} for n in (1, 8)},
        },
        shared_search=True,
    ),
    "parts": Experiment(
        "Which parts of the layer are needed?",
        "not in the paper",
        lambda base: {
            "as published": {},
            **{
                name.replace("-", " "): {"l3_variant": name}
                for name in (
                    "no-up",
                    "no-residual",
                    "normalised-residual",
                    "scaled-softmax",
                    "normalised-keys",
                    "random-start",
                )
            },
        },
        shared_search=True,
    ),
    "tokens": Experiment(
        "When does it pay: after how many tokens?",
        "not in the paper",
        lambda base: against_rivals(
            {
                f"{f:g} x tokens": {"num_iterations": int(f * base.num_iterations)}
                for f in (1, 0.25, 0.5, 2)
            }
        ),
        shared_search=True,
    ),
    "width": Experiment(
        "When does it pay: in how wide a model?",
        "not in the paper",
        lambda base: against_rivals(
            {f"{f:g} x width": {"n_embd": int(f * base.n_embd)} for f in (1, 0.5, 1.5)}
        ),
        shared_search=True,
    ),
    "vocabulary": Experiment(
        "When does it pay: with how many tokens in the vocabulary?",
        "not in the paper",
        lambda base: against_rivals(
            {
                f"{f:g} x vocabulary": {
                    "vocab_size": f * base.vocab_size,
                    "l3_n_emb": f * base.l3_n_emb,
                }
                for f in (1, 2)
            }
        ),
        shared_search=True,
    ),
}
