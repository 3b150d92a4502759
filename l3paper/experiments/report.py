"""Tables of recorded experiments."""

import statistics

from l3paper.experiments.runs import final_loss
from l3paper.experiments.search import Family


def summary(families: dict[str, Family]) -> list[list[str]]:
    """A head and one row per family: loss over the seeds, difference to the first family, and costs.

    The speed is the median over a family's runs, relative to the first family's; it says little if
    several runs shared the machine. Differences are over the seeds that both families have.
    """
    first = next(iter(families.values())).runs
    head = ["", "nats/token", "from", "to", "minus the first", "bits/byte"]
    head += ["learning rates x", "parameters", "active", "FLOPs/token", "tokens/s of the first"]
    rows = [head]
    for name, family in families.items():
        losses = [final_loss(run) for run in family.runs]
        gaps = [ours - final_loss(run) for ours, run in zip(losses, first, strict=False)]
        bits = statistics.fmean(run["evaluations"][-1]["bits_per_byte"] for run in family.runs)
        row = [name, *(f"{loss:.4f}" for loss in (statistics.fmean(losses), min(losses), max(losses)))]
        row += [f"{statistics.fmean(gaps):+.4f}", f"{bits:.4f}"]
        config, model = family.runs[0]["config"], family.runs[0]["model"]
        row.append(f"{config['lr_scale']:g}")
        for count in ("total_parameters", "active_parameters", "flops_training_per_token"):
            row.append(f"{model[count]:,.0f}")
        rows.append([*row, f"{_speed(family.runs) / _speed(first):.0%}"])
    return rows


def _speed(runs: list[dict]) -> float:
    return statistics.median(run["tokens_per_second"] for run in runs)
