"""All that needs a GPU, in parts: `make gpu`, or `python -m l3paper.gpu PART ...`.

Every part is a command of this package in a process of its own. Experiments write one record per run,
and resume from their last checkpoints; a benchmark writes its record at its end, and restarts.
"""

import argparse
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from l3paper.bench.report import tables
from l3paper.errors import command, one_of
from l3paper.files import require_writable
from l3paper.parts.device import pick_device
from l3paper.records import RECORDS, environment, markdown, read_record, write_record

UNFINISHED = 75
"""The exit code if the time was over before the parts were done: the same command resumes."""


class Part(NamedTuple):
    minutes: float
    """Predicted for one H200; the record has the measured minutes beside them."""
    command: list[str]
    """Arguments of the Python interpreter. The last is where the results go, and not compared when
    the part is asked for again."""
    resumes: bool = False
    """Whether the part resumes where it was interrupted."""


def parts(folder: Path, toy: bool = False, data: str = "stdlib", words: str = "") -> dict[str, Part]:
    """All parts by name, in the order in which they run: the cheap ones that might stop the rest first.

    A benchmark NAME writes `gpu/NAME.json` in `folder`, an experiment its runs into `runs/`. `toy`
    parts run on the CPU. Experiments train on `data` and are evaluated on `words`.
    """
    device, repeats, seeds = ("cpu", "1", "1") if toy else ("cuda", "7", "3")
    preset, setting, size, large = ("smoke",) * 4 if toy else ("gpu", "paper", "100M", "400M")

    def bench(name: str, what: str, *flags: str) -> list[str]:
        shared = ["--device", device, "--repeats", repeats, "--json", f"{folder / 'gpu' / name}.json"]
        return ["-m", "l3paper.bench", what, *flags, *shared]

    def experiment(name: str) -> list[str]:
        text = ["--data", data, "--words", words]
        size = ["--preset", preset, "--seeds", seeds, "--jobs", "1"]
        return ["-m", "l3paper.experiments", name, *size, *text, "--folder", str(folder / "runs")]

    return {
        "correctness": Part(1, bench("correctness", "correctness")),
        "lookup": Part(3, bench("lookup", "lookup", "--setting", setting, "--dtype", "bfloat16")),
        "throughput": Part(5, bench("throughput", "throughput", "--size", size)),
        "main": Part(20, experiment("main"), resumes=True),
        "throughput-large": Part(8, bench("throughput-large", "throughput", "--size", large)),
        "allocation": Part(9, experiment("allocation"), resumes=True),
        "k_max": Part(5, experiment("k_max"), resumes=True),
        "decode": Part(4, bench("decode", "decode", "--preset", preset)),
        "decode-places": Part(6, bench("decode-places", "decode", "--preset", preset, "--sweep")),
    }


def run_part(part: Part, record: Path, deadline: float, patience: float = 20) -> int | None:
    """Run a part unless `record` says that it is done; return its exit code.

    None: `deadline`, a time of `time.monotonic`, stopped the part, or too little time was left for a
    part that cannot resume. A part that does not stop is killed after `patience` seconds.
    """
    before = read_record(record) if record.exists() else {}
    if before.get("command") != part.command[:-1]:
        before = {"done": False, "minutes": 0.0}
    if before["done"]:
        print(f"{record.stem}: done already, in {before['minutes']:.1f} minutes", flush=True)
        return 0
    begin = time.monotonic()
    left = deadline - begin
    if left <= 0 or (not part.resumes and left < 60 * part.minutes):
        print(f"{record.stem}: skipped, it needs {part.minutes:g} minutes", flush=True)
        return None
    print(f"{record.stem}: about {part.minutes:g} minutes on an H200", flush=True)
    # A session of its own, so that all processes that the part starts can be stopped with it.
    process = subprocess.Popen([sys.executable, *part.command], start_new_session=True)
    try:
        code = process.wait(None if left == math.inf else left)
    except subprocess.TimeoutExpired:
        code = None
    finally:
        if process.poll() is None:
            _stop(process, patience)
    minutes = before["minutes"] + (time.monotonic() - begin) / 60
    outcome = {"done": code == 0, "minutes": minutes, "predicted_minutes": part.minutes}
    write_record(record, outcome | {"command": part.command[:-1]})
    return code


def _stop(process: subprocess.Popen, patience: float) -> None:
    """Let a part and all its processes write their checkpoints, then kill those that are left."""
    os.killpg(process.pid, signal.SIGINT)
    with suppress(subprocess.TimeoutExpired):
        process.wait(patience)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_parts(
    chosen: dict[str, Part], folder: Path, minutes: float = math.inf, patience: float = 20
) -> int:
    """Run parts in turn, and print what `folder` holds then; return the exit code.

    Each part's outcome is recorded in `gpu/parts/NAME.json`.
    """
    deadline = time.monotonic() + 60 * minutes
    codes = {}
    for name, part in chosen.items():
        codes[name] = run_part(part, _outcome(folder, name), deadline, patience)
        if codes[name]:
            print(f"{name} failed with exit code {codes[name]}", file=sys.stderr)
    for title, rows in tables(folder / "gpu").items():
        print(title, markdown(rows), sep="\n", end="\n\n")
    print(overview(folder))
    return 1 if any(codes.values()) else UNFINISHED if None in codes.values() else 0


def _outcome(folder: Path, name: str) -> Path:
    return folder / "gpu" / "parts" / f"{name}.json"


def overview(folder: Path = RECORDS) -> str:
    """A table of all parts: what is done, and the minutes that were predicted and taken."""
    rows = [("part", "done", "minutes predicted", "minutes taken")]
    for name, part in parts(folder).items():
        path = _outcome(folder, name)
        outcome = read_record(path) if path.exists() else {"done": False, "minutes": 0.0}
        done = "yes" if outcome["done"] else "no"
        rows.append((name, done, f"{part.minutes:g}", f"{outcome['minutes']:.1f}"))
    return markdown(rows)


@command("python -m l3paper.gpu")
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; exit code 1 if a part failed, 75 if `--minutes` ended before the parts."""
    names = list(parts(RECORDS))
    parser = argparse.ArgumentParser(
        prog="python -m l3paper.gpu",
        description="Check, time and train on a GPU, a part at a time; without a PART, all of them.",
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(names))
    parser.add_argument("--skip", nargs="*", default=[], metavar="PART", help="leave these out")
    parser.add_argument(
        "--minutes",
        type=float,
        default=math.inf,
        metavar="N",
        help="stop then; the same command resumes",
    )
    parser.add_argument("--data", default="stdlib", help="text of the experiments, as of l3paper.train")
    parser.add_argument("--words", default="", metavar="FILE", help="as of l3paper.train")
    parser.add_argument("--folder", type=Path, help="of all records (default: figures/data)")
    parser.add_argument(
        "--dry-run", action="store_true", help="every part on the CPU at toy size; needs --folder"
    )
    options = parser.parse_args(arguments)
    for name in (*options.parts, *options.skip):
        one_of(names, part=name)
    if not options.minutes > 0:
        raise ValueError(f"minutes is {options.minutes:g}; it must be above 0")
    if options.dry_run:
        if options.folder is None:
            raise ValueError("--dry-run needs --folder: its records are not results")
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # for the parts, which inherit it
    elif environment(pick_device("cuda"))["commit"] is None:
        raise ValueError("the commit is unknown here, and records name it: set L3_COMMIT")
    folder = options.folder or RECORDS
    require_writable(_outcome(folder, "any"))
    available = parts(folder, options.dry_run, options.data, options.words)
    wanted = [name for name in options.parts or names if name not in options.skip]
    return run_parts({name: available[name] for name in wanted}, folder, options.minutes)


if __name__ == "__main__":
    sys.exit(main())
