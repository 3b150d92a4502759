"""Recorded comparisons: `python -m l3paper.experiments NAME` runs one of the catalogue.

Every family gets the same care: at seed 0 a search over learning rates, then the best rate at all
seeds; variations of one model may share its search. Each run writes one JSON record into
figures/data/runs when it ends; a run whose record is there is not repeated. An experiment that was
interrupted goes on with what is missing, and its runs in flight from their last checkpoints.
"""

import argparse
import gc
import hashlib
import json
import math
import multiprocessing
import os
import shutil
import statistics
import sys
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from l3paper.checkpoints.run import Checkpoints
from l3paper.data.streams import corpus_name, load_corpus
from l3paper.experiments.catalogue import EXPERIMENTS
from l3paper.files import cache_folder, locked
from l3paper.records import RECORDS, markdown, read_record, write_record
from l3paper.train import train
from l3paper.training.config import PRESETS, TrainConfig
from l3paper.training.signals import Interrupted
from l3paper.training.steps import Diverged

RUNS = RECORDS / "runs"

LR_SCALES = (0.5, 1.0, 2.0)
"""Where every search begins. While the best is at an edge, the next factor of 2 is tried too."""

LR_LIMITS = (1 / 16, 16)

EVERY = 500
"""Steps from one checkpoint to the next, beside those that a signal asks for: a table with its moments
takes seconds to write."""

RATES_OF_ONE_KIND = {"table_lr": "l3", "router_lr": "moe"}
"""Settings that do nothing in models of any other kind."""


class MissingRun(ValueError):
    """An experiment whose records are asked for has not finished."""


class Family(NamedTuple):
    """The records of one family of an experiment."""

    search: dict[float, dict]
    """By the factor on the learning rates, ascending, all at seed 0; of the model that was searched."""
    runs: list[dict]
    """At the best factor, by seed."""


Plan = Generator[list[TrainConfig], list[dict], Family]


def family_plan(config: TrainConfig, searched: TrainConfig, seeds: int) -> Plan:
    """Yields the runs to do next, receives their records, and returns the family.

    The learning rate is the best of a search with `searched`, which may be `config` itself.
    """
    search, wanted = {}, LR_SCALES
    while wanted:
        records = yield [replace(searched, lr_scale=scale, seed=0) for scale in wanted]
        search |= zip(wanted, records, strict=True)
        wanted = next_scales({scale: final_loss(record) for scale, record in search.items()})
    best = min(search, key=lambda scale: (final_loss(search[scale]), scale))
    runs = yield [replace(config, lr_scale=best, seed=seed) for seed in range(seeds)]
    return Family(dict(sorted(search.items())), runs)


def next_scales(losses: dict[float, float]) -> tuple[float, ...]:
    """What a search should try next: the factor beyond the edge that is best so far, or nothing.

    Nothing outside LR_LIMITS is tried.
    """
    best = min(losses, key=lambda scale: (losses[scale], scale))  # the lower, where all diverged
    step = 2.0 if best == max(losses) else 0.5 if best == min(losses) else None
    inside = step and LR_LIMITS[0] <= best * step <= LR_LIMITS[1]
    return (best * step,) if inside else ()


def final_loss(record: dict) -> float:
    """Nats a token on all held-out text at the end of the run; infinite where it diverged."""
    loss = record["evaluations"][-1]["loss"]
    return math.inf if math.isnan(loss) else loss


def results(
    name: str,
    preset: str = "laptop",
    data: str = "stdlib",
    seeds: int | None = None,
    folder: Path = RUNS,
) -> dict[str, Family]:
    """The recorded families of an experiment; MissingRun, a ValueError, where a run is missing.

    `seeds` is by default the experiment's own number.
    """

    def read(config: TrainConfig) -> dict:
        path = record_path(config, folder)
        if not path.exists():
            raise MissingRun(f"{name} lacks the run {path.name}: its experiment has not finished")
        return read_run(path, config)

    return {
        family: follow(plan, lambda wanted: [read(config) for config in wanted])
        for family, plan in _plans(name, preset, data, seeds).items()
    }


def _plans(name: str, preset: str, data: str, seeds: int | None) -> dict[str, Plan]:
    experiment = EXPERIMENTS[name]
    return {
        family: family_plan(config, experiment.searched(config, preset), seeds or experiment.seeds)
        for family, config in experiment.configs(preset, data).items()
    }


def follow(plan: Plan, get: Callable[[list[TrainConfig]], list[dict]]) -> Family:
    """Give the plan the records it asks for, to its end."""
    wanted = next(plan)
    while True:
        try:
            wanted = plan.send(get(wanted))
        except StopIteration as end:
            return end.value


def record_path(config: TrainConfig, folder: Path) -> Path:
    """Where the record of this run lies: named by what of the configuration is no default.

    The device is not part of the name, nor the folder that a text lies in, nor what else the model is
    evaluated on.
    """
    defaults = asdict(TrainConfig())
    settings = {key: value for key, value in _settings(config).items() if value != defaults[key]}
    settings["data"] = corpus_name(config.data)
    for name in ("device", "words"):
        settings.pop(name, None)
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    return folder / f"{config.kind}-lr{config.lr_scale:g}-seed{config.seed}-{digest}.json"


def _settings(config: TrainConfig) -> dict:
    """With the places of L3 layers worked out, where the configuration leaves them to the depth."""
    return asdict(config) | {"l3_after_layers": config.model_config().l3_after_layers}


def read_run(path: Path, config: TrainConfig) -> dict:
    """The record; ValueError where it is of another configuration, as when a default has changed."""
    record = read_record(path)
    passing = {"device", "data", "words"}
    passing |= {name for name, kind in RATES_OF_ONE_KIND.items() if kind != config.kind}
    made_with = _settings(replace(TrainConfig(), **record["config"]))
    differing = [
        f"{name} = {made_with[name]!r}, not {value!r}"
        for name, value in _settings(config).items()
        if name not in passing and made_with[name] != value
    ]
    if differing:
        raise ValueError(f"{path} records a run with {', '.join(differing)}: move it away")
    return record


def run_experiment(
    name: str, preset: str, data: str, seeds: int, jobs: int, folder: Path, words: str = ""
) -> dict[str, Family]:
    """Make every record that is missing, `jobs` runs at a time, and return all of them.

    `words` is a text to take every run's perplexity by the word on. Raises ValueError for data that
    cannot be used, and for records made with another text or without the perplexity.
    """
    experiment = EXPERIMENTS[name]
    configs = experiment.configs(preset, data)
    sha256 = {}
    for config in configs.values():  # build each corpus once, before the runs compete for it
        key = config.vocab_size, config.data_bytes
        sha256[key] = sha256.get(key) or load_corpus(data, *key).sha256
    plans = _plans(name, preset, data, seeds)
    searched = [experiment.searched(config, preset) for config in configs.values()]
    least = [replace(config, lr_scale=scale) for config in searched for scale in LR_SCALES]
    least += [replace(config, seed=seed) for config in configs.values() for seed in range(seeds)]
    context = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(jobs, context, initializer=_end_with_parent) as pool,
        ThreadPoolExecutor(len(plans)) as threads,  # one a family, to wait for its runs
        tqdm(unit="run", desc=name, total=len({record_path(run, folder) for run in least})) as bar,
    ):
        runs, lock = {}, threading.Lock()  # by path: families that share a run ask for it once

        def run(config: TrainConfig) -> Future:
            path = record_path(config, folder)
            with lock:
                if path not in runs:
                    text = sha256[config.vocab_size, config.data_bytes]
                    runs[path] = pool.submit(recorded, replace(config, words=words), path, text)
                    runs[path].add_done_callback(lambda _: bar.update())
                    bar.total = max(bar.total, len(runs))
            return runs[path]

        def get(wanted: list[TrainConfig]) -> list[dict]:
            return [future.result() for future in [run(config) for config in wanted]]

        try:
            return dict(
                zip(plans, threads.map(lambda plan: follow(plan, get), plans.values()), strict=True)
            )
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def recorded(config: TrainConfig, path: Path, sha256: str) -> dict:
    """The record of this run: read where it is there already, made where it is not."""
    torch.set_num_threads(1)  # sums come out the same, however many runs go on beside this one
    where = hashlib.sha256(str(path.absolute()).encode()).hexdigest()[:24]
    unfinished = cache_folder() / "unfinished" / where
    with locked(unfinished):  # another experiment may share the run, and be at it
        if not path.exists():
            checkpoints = Checkpoints(unfinished / "run", EVERY, resume=True)
            try:
                record = train(config, show_progress=False, checkpoints=checkpoints).record
            except Diverged as error:
                record = error.record
            gc.collect()  # compiling leaves cycles, and they hold whole tables
            write_record(path, record)
        shutil.rmtree(unfinished, ignore_errors=True)
    record = read_run(path, config)
    if record["corpus"]["sha256"] != sha256:
        raise ValueError(f"{path} records a run on another text: move it away, or use --folder")
    if config.words and not {"words", "diverged"} & set(record):
        raise ValueError(f"{path} has no perplexity by the word: move it away, or use --folder")
    return record


def _end_with_parent() -> None:
    """Let no run outlive the command that asked for it, however that ends."""
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def loss_curve(record: dict) -> dict[int, float]:
    """Nats a token by tokens trained, after the start, on the same sample of the held-out text."""
    evaluations = [e for e in record["evaluations"] if e["step"] and not e["everything"]]
    return {e["tokens"]: e["loss"] for e in evaluations}


def summary(families: dict[str, Family]) -> str:
    """One line a family: loss over the seeds, the difference to the first family by seed, and costs.

    Tokens a second are those of the record that is the median, against the first family's; where runs
    went on beside each other, they say little. The perplexity by the word is there where it was taken.
    """
    first = next(iter(families.values())).runs
    words = all("words" in run for family in families.values() for run in family.runs)
    head = ["", "nats/token", "from", "to", "less the first", "bits/byte"]
    head += ["perplexity by the word"] * words + ["rates x", "parameters", "active", "FLOPs/token"]
    rows = [[*head, "tokens/s of the first"]]
    for name, family in families.items():
        run, losses = family.runs[0], [final_loss(run) for run in family.runs]
        gap = statistics.fmean(x - final_loss(y) for x, y in zip(losses, first, strict=True))
        row = [name, *(f"{x:.4f}" for x in (statistics.fmean(losses), min(losses), max(losses)))]
        bits = statistics.fmean(run["evaluations"][-1]["bits_per_byte"] for run in family.runs)
        row += [f"{gap:+.4f}", f"{bits:.4f}"]
        if words:
            row.append(f"{statistics.fmean(run['words']['perplexity'] for run in family.runs):,.1f}")
        row.append(f"{run['config']['lr_scale']:g}")
        counts = ("total_parameters", "active_parameters", "flops_training_per_token")
        row += [f"{run['model'][key]:,.0f}" for key in counts]
        rows.append([*row, f"{_speed(family.runs) / _speed(first):.0%}"])
    return markdown(rows)


def _speed(runs: list[dict]) -> float:
    return statistics.median(run["tokens_per_second"] for run in runs)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; exit code 2, and one line on stderr, for input that cannot be used."""
    parser = argparse.ArgumentParser(
        prog="python -m l3paper.experiments",
        description="Run a recorded comparison; records that are there already are not made again.",
        epilog="\n".join(f"{name}: {e.question}" for name, e in EXPERIMENTS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", choices=EXPERIMENTS)
    parser.add_argument("--preset", choices=PRESETS, default="laptop", help="(default: laptop)")
    parser.add_argument("--data", default="stdlib", help="as of l3paper.train (default: stdlib)")
    parser.add_argument(
        "--words", default="", metavar="FILE", help="as of l3paper.train (default: none)"
    )
    parser.add_argument("--seeds", type=int, metavar="N", help="(default: as the experiment says)")
    cores = 1 if torch.cuda.is_available() else os.cpu_count() or 1
    parser.add_argument(
        "--jobs", type=int, default=cores, metavar="N", help=f"runs at a time (default here: {cores})"
    )
    parser.add_argument("--folder", type=Path, default=RUNS, help="(default: figures/data/runs)")
    given = parser.parse_args(arguments)
    try:
        seeds = EXPERIMENTS[given.name].seeds if given.seeds is None else given.seeds
        for flag, value in {"seeds": seeds, "jobs": given.jobs}.items():
            if value < 1:
                raise ValueError(f"{flag} is {value}; it must be at least 1")
        families = run_experiment(
            given.name,
            given.preset,
            given.data,
            seeds,
            given.jobs,
            given.folder,
            given.words,
        )
    except (ValueError, ImportError, OSError, BrokenExecutor) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, Interrupted):
        print(f"{parser.prog}: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    print(EXPERIMENTS[given.name].question)
    print(summary(families))
    return 0
