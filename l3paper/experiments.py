"""Recorded comparisons: each family's learning rate searched the same way, then three seeds.

`python -m l3paper.experiments dense_vs_l3` writes one JSON record a run into figures/data/NAME.
A run whose record is there already is not repeated.
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from l3paper.config import PRESETS, TrainConfig
from l3paper.records import RECORDS, write_record
from l3paper.train import train

SEEDS = (0, 1, 2)
LR_SCALES = (0.5, 1.0, 2.0)
"""Where every search begins. While the best is at an edge, the next factor of 2 is tried too."""

LR_LIMITS = (1 / 16, 16)


@dataclass(frozen=True)
class Experiment:
    """A question, and the families of models whose comparison answers it."""

    question: str
    families: dict[str, Callable[[TrainConfig], TrainConfig]]
    """What each family changes in the preset's configuration."""


EXPERIMENTS = {
    "dense_vs_l3": Experiment(
        question="Does one L3 layer lower the held-out loss of the same model, at equal tokens?",
        families={
            "dense": lambda config: replace(config, l3_after_layers=""),
            "l3": lambda config: config,
        },
    ),
}


def run_experiment(name: str, preset: str, folder: Path, only: str | None = None) -> None:
    """Search, then seeds, for every family of the experiment (or `only` one); records in `folder`."""
    for family, change in EXPERIMENTS[name].families.items():
        if only not in (None, family):
            continue
        base = change(PRESETS[preset])

        def loss(lr_scale: float, seed: int = SEEDS[0], family=family, base=base) -> float:
            config = replace(base, lr_scale=lr_scale, seed=seed)
            return final_loss(_recorded(config, name, family, folder))

        best = search_learning_rate(loss)
        losses = [loss(best, seed) for seed in SEEDS]
        print(
            f"{name}, {family}: {statistics.mean(losses):.4f} nats/token over {len(SEEDS)} seeds, "
            f"from {min(losses):.4f} to {max(losses):.4f}, learning rates x {best:g}"
        )


def search_learning_rate(loss: Callable[[float], float]) -> float:
    """The factor of lowest loss: tried are LR_SCALES, and beyond them until both neighbours are worse.

    Nothing outside LR_LIMITS is tried.
    """
    tried = {lr_scale: loss(lr_scale) for lr_scale in LR_SCALES}
    while True:
        best = min(tried, key=lambda lr_scale: _nan_last(tried[lr_scale]))
        step = 2.0 if best == max(tried) else 0.5 if best == min(tried) else None
        if step is None or not LR_LIMITS[0] <= best * step <= LR_LIMITS[1]:
            return best
        tried[best * step] = loss(best * step)


def seeded_runs(records: list[dict], family: str) -> list[dict]:
    """The family's runs at its best learning rate, one a seed; `records` as `read_records` gives.

    Raises ValueError where a seed is missing.
    """
    runs = [r for r in records if r["family"] == family]
    search = [r for r in runs if r["config"]["seed"] == SEEDS[0]]
    best = min(search, key=lambda r: _nan_last(final_loss(r)), default=None)
    chosen = [r for r in runs if best and r["config"]["lr_scale"] == best["config"]["lr_scale"]]
    if [r["config"]["seed"] for r in chosen] != list(SEEDS):
        raise ValueError(f"family {family!r} lacks runs: its experiment has not finished")
    return chosen


def final_loss(record: dict) -> float:
    """Nats a token on all held-out text at the end of the run."""
    return record["evaluations"][-1]["loss"]


def _nan_last(loss: float) -> float:
    return math.inf if math.isnan(loss) else loss


def _recorded(config: TrainConfig, name: str, family: str, folder: Path) -> dict:
    """The record of this run: read where it is there already, made where it is not."""
    path = folder / f"{family}-lr{config.lr_scale:g}-seed{config.seed}.json"
    if path.exists():
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["config"] | {"data": config.data} != asdict(config):  # records hide the folder
            raise ValueError(f"{path} records another configuration: move it away to run this one")
        return record
    print(f"{name}: {path.stem}", file=sys.stderr)
    record = {"experiment": name, "family": family, **train(config).record}
    write_record(path, record)
    return record


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; exit code 2, and one line on stderr, for input that cannot be used."""
    parser = argparse.ArgumentParser(
        prog="python -m l3paper.experiments",
        description="Run a recorded comparison: " + EXPERIMENTS["dense_vs_l3"].question,
    )
    parser.add_argument("name", choices=EXPERIMENTS)
    parser.add_argument("--preset", choices=PRESETS, default="laptop", help="(default: laptop)")
    parser.add_argument("--family", help="run only this family (default: all)")
    parser.add_argument("--folder", type=Path, help="for the records (default: figures/data/NAME)")
    given = parser.parse_args(arguments)
    families = EXPERIMENTS[given.name].families
    if given.family not in (None, *families):
        parser.error(f"--family is {given.family!r}; choose one of {', '.join(families)}")
    try:
        run_experiment(given.name, given.preset, given.folder or RECORDS / given.name, given.family)
    except (ValueError, ImportError, OSError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
