"""The learning-rate search, and the runs that a family of models needs.

Every family gets the same care: a search over learning rates at seed 0, then the best rate at all
seeds. Variations of one model may share its search. The records decide what comes next: a family whose
records are not complete raises MissingRun, which carries the runs to train next. A family that
continues the models of another one waits until that is complete.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from l3paper.experiments.catalogue import EXPERIMENTS, Planned
from l3paper.experiments.runs import RUNS, MissingRun, final_loss, read_runs
from l3paper.training.config import TrainConfig

LR_SCALES = (0.5, 1.0, 2.0)
"""Factors on the learning rates that every search tries first. While the best one is at an edge, the
search tries the next factor of 2 beyond it."""

LR_LIMITS = (1 / 16, 16)

OTHER_BATCHES = 1000
"""What is added to the seed of a run that continues a model: its seed's own batches are used up."""


class Family(NamedTuple):
    """The records of one family of an experiment."""

    search: dict[float, dict]
    """Records at seed 0, of the model that was searched, by the factor on the learning rates."""
    runs: list[dict]
    """Records at the best factor, by seed."""

    def losses(self, evaluation: int = -1) -> dict[int, float]:
        """Nats per token by seed: on all held-out text at the end, or at another evaluation."""
        if evaluation == -1:
            return {run["config"]["seed"]: final_loss(run) for run in self.runs}
        return {run["config"]["seed"]: run["evaluations"][evaluation]["loss"] for run in self.runs}


def next_scales(losses: dict[float, float]) -> tuple[float, ...]:
    """The factors that a search tries after these losses by factor: empty if it has ended.

    A search ends if both neighbours of the best factor are worse, or at LR_LIMITS.
    """
    if not losses:
        return LR_SCALES
    best = _best(losses)
    beyond = 2 * best if best == max(losses) else best / 2 if best == min(losses) else None
    return (beyond,) if beyond and LR_LIMITS[0] <= beyond <= LR_LIMITS[1] else ()


def _best(losses: dict[float, float]) -> float:
    """The factor of the lowest loss; the lowest factor among equals, as when all have diverged."""
    return min(losses, key=lambda scale: (losses[scale], scale))


def run_at(config: TrainConfig, scale: float, seed: int, start: Family | None = None) -> TrainConfig:
    """The run of a family at a learning rate and a seed.

    If the family continues the models of another one, `start`, `init_from` becomes the name of a run of
    that, of the same seed; it stays the name of the family while that is not complete.
    """
    if config.init_from:
        name = start.runs[seed]["name"] if start else config.init_from
        config, seed = replace(config, init_from=name), seed + OTHER_BATCHES
    return replace(config, lr_scale=scale, seed=seed)


Read = Callable[[list[TrainConfig]], list[dict]]
"""Returns the records of several runs, or raises MissingRun."""


def read_family(planned: Planned, read: Read, start: Family | None = None) -> Family:
    """Walk through the search, then read the family's runs at the best rate, all seeds.

    A MissingRun of `read` ends the walk. `start` is the family whose models this one continues, if it
    does.
    """
    config, searched, seeds = planned
    search: dict[float, dict] = {}
    losses: dict[float, float] = {}
    while scales := next_scales(losses):
        records = read([run_at(searched, scale, 0, start) for scale in scales])
        search |= zip(scales, records, strict=True)
        losses = {scale: final_loss(record) for scale, record in search.items()}
    best = _best(losses)
    runs = read([run_at(config, best, seed, start) for seed in range(seeds)])
    return Family(dict(sorted(search.items())), runs)


def read_families(plan: dict[str, Planned], read: Read) -> tuple[dict[str, Family], list[MissingRun]]:
    """All families of an experiment whose records are complete, and what the others raise."""
    families, missing = {}, []
    for name, planned in sorted(plan.items(), key=lambda item: item[1].config.init_from is not None):
        origin = planned.config.init_from
        if origin and origin not in families:
            continue  # what it continues is among the missing
        try:
            families[name] = read_family(planned, read, families.get(origin))
        except MissingRun as error:
            missing.append(error)
    return {name: families[name] for name in plan if name in families}, missing


def results(
    name: str,
    preset: str = "laptop",
    data: str | None = None,
    seeds: int | None = None,
    folder: Path = RUNS,
) -> dict[str, Family]:
    """Read the families of a recorded experiment: by default on its own text, with the planned seeds.

    Raises MissingRun, a ValueError, if a run is not recorded yet.
    """
    experiment = EXPERIMENTS[name]
    plan = experiment.plan(preset, data or experiment.text, seeds)
    families, missing = read_families(plan, partial(read_runs, folder=folder))
    if missing:
        raise missing[0]
    return families
