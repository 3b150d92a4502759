"""Timings that can be compared, and a check of the lookups: `python -m l3paper.bench WHAT`."""

import argparse
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch

from l3paper.bench.correctness import check_lookups
from l3paper.bench.decoding import bench_decode
from l3paper.bench.lookup import SETTINGS, bench_allocation, bench_lookup, bench_optimizer
from l3paper.bench.report import as_table
from l3paper.bench.training import SIZES, bench_throughput, bench_train_step
from l3paper.data.streams import load_corpus
from l3paper.errors import at_least, command
from l3paper.experiments.catalogue import EXPERIMENTS, without_and_with
from l3paper.files import require_writable
from l3paper.parts.device import pick_device
from l3paper.records import environment, write_record
from l3paper.training.config import PRESETS

SEED = 0
"""The seed of weights and batches."""

FLAGS = {
    "setting": dict(choices=SETTINGS, default="laptop", help="size of the table (default: laptop)"),
    "dtype": dict(choices=("float32", "bfloat16"), default="float32", help="(default: float32)"),
    "preset": dict(choices=PRESETS, default="laptop", help="size of the model (default: laptop)"),
    "experiment": dict(choices=EXPERIMENTS, help="(default: the preset without L3, and with it)"),
    "size": dict(choices=SIZES, default="smoke", help="active parameters (default: smoke)"),
    "sweep": dict(action="store_true", help="the L3 layer behind every block in turn, at batch 1"),
}


SIZES_BY_FLAG = {"setting": SETTINGS, "preset": PRESETS, "size": SIZES}


class Benchmark(NamedTuple):
    title: str
    flags: tuple[str, ...]
    run: Callable[[Namespace, torch.device], list[dict]]


def _train_step(options: Namespace, device: torch.device) -> list[dict]:
    configs = without_and_with(PRESETS[options.preset])
    if options.experiment:
        configs = EXPERIMENTS[options.experiment].configs(options.preset, "stdlib")
    return bench_train_step(configs, options.repeats, device)


BENCHMARKS = {
    "correctness": Benchmark(
        "check every lookup against the loop in float64", (), lambda o, device: check_lookups(device)
    ),
    "lookup": Benchmark(
        "time the lookups, beside the floors of arithmetic and memory",
        ("setting", "dtype"),
        lambda o, device: bench_lookup(SETTINGS[o.setting], o.repeats, device, getattr(torch, o.dtype)),
    ),
    "optimizer": Benchmark(
        "time the update of a table",
        ("setting",),
        lambda o, device: bench_optimizer(SETTINGS[o.setting], o.repeats, device),
    ),
    "train-step": Benchmark(
        "time a training step of a preset's models, or of an experiment's",
        ("preset", "experiment"),
        _train_step,
    ),
    "throughput": Benchmark(
        "time and profile the parts of a training step",
        ("size",),
        lambda o, device: bench_throughput(o.size, o.repeats, device),
    ),
    "allocation": Benchmark(
        "time the LZW scan and the allocation of rows",
        (),
        lambda o, device: bench_allocation(o.repeats),
    ),
    "decode": Benchmark(
        "time decoding with the tables in each place",
        ("preset", "sweep"),
        lambda o, device: bench_decode(o.preset, o.repeats, device, o.sweep),
    ),
}


@command("python -m l3paper.bench")
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code is 1 if a lookup is wrong."""
    parser = argparse.ArgumentParser(prog="python -m l3paper.bench", description=__doc__)
    what = parser.add_subparsers(dest="what", metavar="WHAT", required=True)
    for name, benchmark in BENCHMARKS.items():
        flags = what.add_parser(name, help=benchmark.title, description=benchmark.title)
        for flag in benchmark.flags:
            flags.add_argument(f"--{flag}", **FLAGS[flag])
        flags.add_argument("--repeats", type=int, default=7, metavar="N", help="rounds (default: 7)")
        flags.add_argument(
            "--device", default="auto", metavar="NAME", help="cpu, cuda or auto (default)"
        )
        flags.add_argument("--json", type=Path, metavar="FILE", help="write the results there, too")
    options = parser.parse_args(arguments)
    at_least(1, repeats=options.repeats)
    device = pick_device(options.device)
    if options.json:
        require_writable(options.json)
    torch.manual_seed(SEED)
    _, flags, run = BENCHMARKS[options.what]
    results = run(options, device)
    print(as_table(results))
    if options.json:
        setting = {flag: getattr(options, flag) for flag in flags}
        for flag in SIZES_BY_FLAG.keys() & flags:
            if not setting.get("experiment"):  # which has sizes of its own
                setting |= asdict(SIZES_BY_FLAG[flag][setting[flag]])
        record = {"bench": options.what, "setting": setting, "seed": SEED, "results": results}
        if options.what != "correctness":
            corpus = load_corpus(vocab_size=setting.get("vocab_size", 4096))
            record["corpus"] = {"name": corpus.name, "sha256": corpus.sha256}
        write_record(options.json, record | {"environment": environment(device)})
    return int(any(row.get("verdict") == "WRONG" for row in results))


if __name__ == "__main__":
    sys.exit(main())
