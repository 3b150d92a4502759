"""All that needs a GPU, in parts: `make gpu`, or `python -m l3paper.gpu PART ...`.

Every part is a command of this package in a process of its own. Experiments record every run,
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
from l3paper.errors import command, nonempty_path, one_of
from l3paper.files import require_writable
from l3paper.parts.device import pick_device
from l3paper.records import RECORDS, environment, markdown, read_record, write_record

UNFINISHED = 75
"""The exit code if the time was over before the parts were done: the same command resumes."""

PATIENCE = 20
"""Seconds that a part may take to stop when its time is over, before it is killed."""


class Part(NamedTuple):
    minutes: float
    """Predicted for one H200."""
    command: list[str]
    """Arguments of the Python interpreter; the last is where the results go."""
    resumes: bool
    """Whether the part resumes where it was interrupted."""


def parts(folder: Path, toy: bool = False, data: str = "stdlib") -> dict[str, Part]:
    """All parts by name; the cheap ones, which may show that the rest is not worth running, are first.

    A benchmark NAME writes `gpu/NAME.json` in `folder`, an experiment its runs into `runs`. Toy parts
    are for the CPU. Experiments train on `data`.
    """
    device, rounds, seeds = ("cpu", "--repeats 1", "1") if toy else ("cuda", "--repeats 7", "3")
    setting, size, large, preset = ["smoke"] * 4 if toy else ("paper", "100M", "400M", "gpu")
    text = ["--data", data, "--seeds", seeds, "--jobs", "1"]
    all_parts = {}
    for name, minutes, command_line in (
        ("correctness", 1, "bench correctness"),
        ("lookup", 3, f"bench lookup {rounds} --setting {setting} --dtype bfloat16"),
        ("throughput", 5, f"bench throughput {rounds} --size {size}"),
        ("rivals", 33, f"experiments rivals --preset {preset}"),
        ("throughput-large", 8, f"bench throughput {rounds} --size {large}"),
        ("many_rows", 14, f"experiments many_rows --preset {preset}"),
        ("k_max", 5, f"experiments k_max --preset {preset}"),
        ("decode", 4, f"bench decode {rounds} --preset {preset}"),
        ("decode-places", 6, f"bench decode {rounds} --preset {preset} --sweep"),
    ):
        module, *flags = command_line.split()
        if resumes := module == "experiments":
            flags += [*text, "--folder", str(folder / "runs")]
        else:
            flags += ["--device", device, "--json", str(folder / "gpu" / f"{name}.json")]
        all_parts[name] = Part(minutes, ["-m", f"l3paper.{module}", *flags], resumes)
    return all_parts


def run_parts(chosen: dict[str, Part], folder: Path, minutes: float = math.inf) -> int:
    """Run parts in turn, for `minutes` at most, and print the results that `folder` holds then.

    Return 1 if a part failed, else UNFINISHED if one was stopped or skipped for lack of time, else 0.
    """
    deadline = time.monotonic() + 60 * minutes
    codes = [_run_part(name, part, folder, deadline) for name, part in chosen.items()]
    for title, rows in tables(folder / "gpu").items():
        print(title, markdown(rows), sep="\n", end="\n\n")
    print(overview(folder))
    return 1 if any(codes) else UNFINISHED if None in codes else 0


def _run_part(name: str, part: Part, folder: Path, deadline: float) -> int | None:
    """Run a part, unless this command has done it; the exit code, or None if time does not suffice.

    The record `gpu/parts/NAME.json` says whether the part is done, and by which command. The last
    word of the command is left out, so that the folder can be moved.
    """
    before, command_line = _outcome(folder, name), part.command[:-1]
    begin = time.monotonic()
    if before["command"] != command_line:
        before = _NOT_STARTED
    if before["done"]:
        print(f"{name}: done already, in {before['minutes']:.1f} minutes", flush=True)
        return 0
    if deadline - begin < (0 if part.resumes else 60 * part.minutes):
        print(f"{name}: skipped, it needs {part.minutes:g} minutes", flush=True)
        return None
    print(f"{name}: about {part.minutes:g} minutes on an H200", flush=True)
    code = _run(part.command, deadline - begin)
    if code:
        print(f"{name} failed with exit code {code}", file=sys.stderr)
    record = {
        "done": code == 0,
        "minutes": before["minutes"] + (time.monotonic() - begin) / 60,
        "command": command_line,
    }
    write_record(folder / "gpu" / "parts" / f"{name}.json", record)
    return code


def _run(arguments: list[str], seconds: float) -> int | None:
    """Run the interpreter with these arguments; the exit code, or None if it was stopped by then."""
    # A session of its own, so that all processes that the part starts can be stopped with it.
    process = subprocess.Popen([sys.executable, *arguments], start_new_session=True)
    try:
        return process.wait(None if seconds == math.inf else seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(PATIENCE)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


_NOT_STARTED = {"done": False, "minutes": 0.0, "command": None}


def _outcome(folder: Path, name: str) -> dict:
    path = folder / "gpu" / "parts" / f"{name}.json"
    return read_record(path) if path.exists() else _NOT_STARTED


def overview(folder: Path = RECORDS) -> str:
    """A table of all parts: whether they are done, and the minutes that were predicted and taken."""
    rows = [("part", "done", "minutes predicted", "minutes taken")]
    for name, part in parts(folder).items():
        outcome = _outcome(folder, name)
        done = "yes" if outcome["done"] else "no"
        rows.append((name, done, f"{part.minutes:g}", f"{outcome['minutes']:.1f}"))
    return markdown(rows)


@command("python -m l3paper.gpu")
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code is that of `run_parts`."""
    names = list(parts(RECORDS))
    parser = argparse.ArgumentParser(
        prog="python -m l3paper.gpu",
        description="Check, time and train on a GPU, a part at a time; without a PART, all of them.",
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(names))
    parser.add_argument("--skip", nargs="*", default=[], metavar="PART", help="leave these out")
    parser.add_argument("--minutes", type=float, default=math.inf, metavar="N", help="stop after these")
    parser.add_argument("--data", default="stdlib", help="text of the experiments, as of l3paper.train")
    parser.add_argument("--folder", type=nonempty_path, help="of all records (default: figures/data)")
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
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the parts inherit it
    elif environment(pick_device("cuda"))["commit"] is None:
        raise ValueError("the commit is unknown here, and records name it: set L3_COMMIT")
    folder = options.folder or RECORDS
    require_writable(folder / "gpu" / "any")
    available = parts(folder, options.dry_run, options.data)
    wanted = [name for name in options.parts or names if name not in options.skip]
    return run_parts({name: available[name] for name in wanted}, folder, options.minutes)


if __name__ == "__main__":
    sys.exit(main())
