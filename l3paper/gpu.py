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
from l3paper.errors import command, nonempty_path, one_of
from l3paper.files import require_writable
from l3paper.parts.device import pick_device
from l3paper.records import RECORDS, environment, markdown, read_record, write_record

UNFINISHED = 75
"""The exit code if the time was over before the parts were done: the same command resumes."""


class Part(NamedTuple):
    minutes: float
    """Predicted for one H200; the record has the measured minutes beside them."""
    command: list[str]
    """Arguments of the Python interpreter; the last is where the results go."""
    resumes: bool
    """Whether the part resumes where it was interrupted."""


def parts(folder: Path, toy: bool = False, data: str = "stdlib", words: str = "") -> dict[str, Part]:
    """All parts by name; the cheap ones, which may show that the rest is not worth running, are first.

    A benchmark NAME writes `gpu/NAME.json` in `folder`, an experiment its runs into `runs`. Toy parts
    are for the CPU. Experiments train on `data` and are evaluated on `words`.
    """
    device, rounds, seeds = ("cpu", "--repeats 1", "1") if toy else ("cuda", "--repeats 7", "3")
    setting, size, large, preset = ["smoke"] * 4 if toy else ("paper", "100M", "400M", "gpu")
    text = ["--data", data, "--words", words, "--seeds", seeds, "--jobs", "1"]
    all_parts = {}
    for name, minutes, words_of_command in (
        ("correctness", 1, "bench correctness"),
        ("lookup", 3, f"bench lookup {rounds} --setting {setting} --dtype bfloat16"),
        ("throughput", 5, f"bench throughput {rounds} --size {size}"),
        ("main", 20, f"experiments main --preset {preset}"),
        ("throughput-large", 8, f"bench throughput {rounds} --size {large}"),
        ("allocation", 9, f"experiments allocation --preset {preset}"),
        ("k_max", 5, f"experiments k_max --preset {preset}"),
        ("decode", 4, f"bench decode {rounds} --preset {preset}"),
        ("decode-places", 6, f"bench decode {rounds} --preset {preset} --sweep"),
    ):
        module, *flags = words_of_command.split()
        if resumes := module == "experiments":
            flags += [*text, "--folder", str(folder / "runs")]
        else:
            flags += ["--device", device, "--json", str(folder / "gpu" / f"{name}.json")]
        all_parts[name] = Part(minutes, ["-m", f"l3paper.{module}", *flags], resumes)
    return all_parts


def run_parts(
    chosen: dict[str, Part], folder: Path, minutes: float = math.inf, patience: float = 20
) -> int:
    """Run parts in turn, for `minutes` at most, and print what `folder` holds then.

    Return 1 if a part failed, else UNFINISHED if one was stopped or skipped for lack of time, else 0.
    The record `gpu/parts/NAME.json` says whether a part is done, by which command, but for its last
    word; a part that is done is skipped. See `_run` for `patience`.
    """
    deadline, codes = time.monotonic() + 60 * minutes, []
    for name, (predicted, arguments, resumes) in chosen.items():
        record = _outcome(folder, name)
        begin = time.monotonic()
        if record["command"] == arguments[:-1] and record["done"]:
            print(f"{name}: done already, in {record['minutes']:.1f} minutes", flush=True)
        elif deadline - begin < (0 if resumes else 60 * predicted):
            print(f"{name}: skipped, it needs {predicted:g} minutes", flush=True)
            codes.append(None)
        else:
            print(f"{name}: about {predicted:g} minutes on an H200", flush=True)
            codes.append(_run(arguments, deadline - begin, patience))
            if codes[-1]:
                print(f"{name} failed with exit code {codes[-1]}", file=sys.stderr)
            before = record["minutes"] if record["command"] == arguments[:-1] else 0.0
            record = {
                "done": codes[-1] == 0,
                "minutes": before + (time.monotonic() - begin) / 60,
                "predicted_minutes": predicted,
                "command": arguments[:-1],
            }
            write_record(folder / "gpu" / "parts" / f"{name}.json", record)
    for title, rows in tables(folder / "gpu").items():
        print(title, markdown(rows), sep="\n", end="\n\n")
    print(overview(folder))
    return 1 if any(codes) else UNFINISHED if None in codes else 0


def _run(arguments: list[str], seconds: float, patience: float) -> int | None:
    """Run the interpreter with these arguments; return its exit code, or None if it was stopped.

    After `seconds`, it is asked to stop, and killed if it has not within `patience` seconds more.
    """
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
                process.wait(patience)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _outcome(folder: Path, name: str) -> dict:
    path = folder / "gpu" / "parts" / f"{name}.json"
    return read_record(path) if path.exists() else {"done": False, "minutes": 0.0, "command": None}


def overview(folder: Path = RECORDS) -> str:
    """A table of all parts: what is done, and the minutes that were predicted and taken."""
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
    parser.add_argument("--words", default="", metavar="FILE", help="as of l3paper.train")
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
    available = parts(folder, options.dry_run, options.data, options.words)
    wanted = [name for name in options.parts or names if name not in options.skip]
    return run_parts({name: available[name] for name in wanted}, folder, options.minutes)


if __name__ == "__main__":
    sys.exit(main())
