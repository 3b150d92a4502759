"""Timings that can be compared, and a check of the lookups: `python -m l3paper.bench WHAT`."""

import argparse
import sys
from collections.abc import Sequence

import torch

from l3paper.bench.correctness import check_lookups
from l3paper.bench.decoding import bench_decode
from l3paper.bench.lookup import SETTINGS, bench_allocation, bench_lookup, bench_optimizer
from l3paper.bench.report import as_table
from l3paper.bench.training import SIZES, bench_throughput, bench_train_step
from l3paper.data.sources import fingerprint, open_source
from l3paper.errors import at_least, command, nonempty_path
from l3paper.experiments.catalogue import EXPERIMENTS
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
    "repeats": dict(type=int, default=7, metavar="N", help="rounds (default: 7)"),
}

BENCHMARKS = {
    "correctness": (check_lookups, ()),
    "lookup": (bench_lookup, ("setting", "repeats", "dtype")),
    "optimizer": (bench_optimizer, ("setting", "repeats")),
    "train-step": (bench_train_step, ("preset", "experiment", "repeats")),
    "throughput": (bench_throughput, ("size", "repeats")),
    "allocation": (bench_allocation, ("repeats",)),
    "decode": (bench_decode, ("preset", "repeats", "sweep")),
}
"""The functions, which take `device` as well, and the flags that are their arguments."""


@command("python -m l3paper.bench")
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code is 1 if a lookup is wrong."""
    parser = argparse.ArgumentParser(prog="python -m l3paper.bench", description=__doc__)
    subparsers = parser.add_subparsers(dest="what", metavar="WHAT", required=True)
    for name, (function, flags) in BENCHMARKS.items():
        title = function.__doc__.partition("\n")[0]
        subparser = subparsers.add_parser(name, help=title, description=title)
        for flag in flags:
            subparser.add_argument(f"--{flag}", **FLAGS[flag])
        subparser.add_argument("--device", default="auto", help="cpu, cuda or auto (default)")
        subparser.add_argument(
            "--json", type=nonempty_path, metavar="FILE", help="write the results there, too"
        )
    options = parser.parse_args(arguments)
    function, flags = BENCHMARKS[options.what]
    setting = {flag: getattr(options, flag) for flag in flags}
    at_least(1, repeats=setting.get("repeats", 1))
    device = pick_device(options.device)
    if options.json:
        require_writable(options.json)
    torch.manual_seed(SEED)
    results = function(**setting, device=device)
    print(as_table(results))
    if options.json:
        record = {"bench": options.what, "setting": setting, "seed": SEED, "results": results}
        if options.what != "correctness":  # which reads no text
            text = open_source()
            record["corpus"] = {"name": text.name, "sha256": fingerprint(text)}
        write_record(options.json, record | {"environment": environment(device)})
    return int(any(row.get("verdict") == "WRONG" for row in results))


if __name__ == "__main__":
    sys.exit(main())
