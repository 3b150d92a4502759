"""All that needs a GPU, in parts: `make gpu`, or `python -m l3paper.gpu PART ...`.

Every part is a command of this package in a process of its own. A part that is done is passed over.
Experiments write a record a run and go on, when interrupted, from their last checkpoints; a benchmark
writes its record at its end, and begins anew.
"""

import argparse
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from l3paper.experiments.runs import RUNS
from l3paper.files import require_writable
from l3paper.parts.device import pick_device
from l3paper.records import RECORDS, environment, markdown, read_record, write_record

UNFINISHED = 75
"""Exit code where the minutes were over before the parts were done: the same command goes on."""

PATIENCE = 20
"""Seconds that a part has to stop in, before it is killed."""


@dataclass(frozen=True)
class Scale:
    """How large the parts are, and where they write."""

    device: str = "cuda"
    lookup: str = "paper"
    sizes: tuple[str, str] = ("100M", "400M")
    preset: str = "gpu"
    seeds: int = 3
    repeats: int = 7
    data: str = "stdlib"
    words: str = ""
    folder: Path = RECORDS / "gpu"
    runs: Path = RUNS


SCALE = Scale()
TOY = Scale("cpu", "smoke", ("smoke", "smoke"), "smoke", seeds=1, repeats=1)


@dataclass(frozen=True)
class Part:
    minutes: float
    """Predicted for one H200; the record has the measured ones beside it."""
    command: Callable[[Scale], list[str]]
    """What follows `python -m`."""
    resumes: bool = False
    """Whether it goes on where it was interrupted."""


def _bench(what: str, *flags: str) -> list[str]:
    return ["l3paper.bench", what, *flags]


def _experiment(name: str) -> Callable[[Scale], list[str]]:
    def command(scale: Scale) -> list[str]:
        words = ["--words", scale.words] if scale.words else []
        sizes = ["--preset", scale.preset, "--seeds", str(scale.seeds), "--jobs", "1"]
        places = ["--data", scale.data, *words, "--folder", str(scale.runs)]
        return ["l3paper.experiments", name, *sizes, *places]

    return command


PARTS: dict[str, Part] = {
    "correctness": Part(1, lambda scale: _bench("correctness")),
    "lookup": Part(3, lambda s: _bench("lookup", "--setting", s.lookup, "--dtype", "bfloat16")),
    "throughput": Part(5, lambda s: _bench("throughput", "--size", s.sizes[0])),
    "main": Part(20, _experiment("main"), resumes=True),
    "throughput-large": Part(8, lambda s: _bench("throughput", "--size", s.sizes[1])),
    "allocation": Part(9, _experiment("allocation"), resumes=True),
    "k_max": Part(5, _experiment("k_max"), resumes=True),
    "decode": Part(4, lambda s: _bench("decode", "--preset", s.preset)),
    "decode-places": Part(6, lambda s: _bench("decode", "--preset", s.preset, "--sweep")),
}
"""In the order in which they run: what is cheap and says whether the rest is worth running first."""


def command_of(name: str, scale: Scale) -> list[str]:
    """The command line of a part, complete."""
    command = [sys.executable, "-m", *PARTS[name].command(scale)]
    if command[2] == "l3paper.bench":
        command += ["--device", scale.device, "--repeats", str(scale.repeats)]
        command += ["--json", str(scale.folder / f"{name}.json")]
    return command


def run_part(name: str, scale: Scale, deadline: float, again: bool = False) -> bool:
    """Run a part until it is done or the deadline, a time of `time.monotonic`; whether it is done.

    Its outcome is in `parts/NAME.json` of the scale's folder, with the command, without the folders in
    it; done by another command, it is not done. Raises CalledProcessError where it fails.
    """
    path, part, command = _outcome(name, scale), PARTS[name], command_of(name, scale)
    before = read_record(path) if path.exists() and not again else {}
    done_as = ["python", *(Path(word).name if os.sep in word else word for word in command[1:])]
    if before.get("command") != done_as:
        before = {"done": False, "minutes": 0.0}
    if before["done"]:
        print(f"{name}: done already, in {before['minutes']:.1f} minutes", flush=True)
        return True
    print(f"{name}: about {part.minutes:g} minutes on an H200", flush=True)
    if not part.resumes and deadline - time.monotonic() < 60 * part.minutes:
        print(f"{name}: not begun, for there are not as many minutes left", flush=True)
        return False
    begin = time.monotonic()
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if scale.device == "cpu" else {}
    # A session of its own, so that what it starts can be stopped with it.
    with subprocess.Popen(command, env=os.environ | hidden, start_new_session=True) as process:
        try:
            code = process.wait(None if deadline == math.inf else max(0.0, deadline - begin))
        except subprocess.TimeoutExpired:
            _stop(process)
            code = None
        except BaseException:
            _stop(process)
            raise
    outcome = {
        "part": name,
        "done": code == 0,
        "minutes": before["minutes"] + (time.monotonic() - begin) / 60,
        "predicted_minutes": part.minutes,
        "command": done_as,
        "environment": environment(pick_device(scale.device)),
    }
    write_record(path, outcome)
    if code:
        raise subprocess.CalledProcessError(code, command)
    return code == 0


def _outcome(name: str, scale: Scale) -> Path:
    return scale.folder / "parts" / f"{name}.json"


def _stop(process: subprocess.Popen) -> None:
    """Let a part and all it has started leave their checkpoints, but not for long."""
    os.killpg(process.pid, signal.SIGINT)
    with suppress(subprocess.TimeoutExpired):
        process.wait(PATIENCE)
    with suppress(ProcessLookupError):  # its runs may be left, or have ended with it
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def overview(scale: Scale) -> str:
    """What is done, and the minutes that were predicted and taken."""
    rows = [("part", "done", "minutes predicted", "minutes taken")]
    for name, part in PARTS.items():
        path = _outcome(name, scale)
        found = read_record(path) if path.exists() else {"done": False, "minutes": 0.0}
        done = "yes" if found["done"] else "no"
        rows.append((name, done, f"{part.minutes:g}", f"{found['minutes']:.1f}"))
    return markdown(rows)


def tables(folder: Path) -> dict[str, list[Sequence[object]]]:
    """What the benchmarks' records in `folder` say, by title: rows, the first of which is the head."""
    found = {}
    for name in ("throughput", "throughput-large"):
        path = folder / f"{name}.json"
        if path.exists():
            record = read_record(path)
            where = record["environment"]["device"]
            found[f"training, {record['setting']['size']}, {where}"] = _speeds(record["results"])
            found[f"where its time goes, {record['setting']['size']}"] = _profiles(record["profile"])
    path = folder / "decode.json"
    if path.exists():
        record = read_record(path)
        head = ["decoding", "batch", "tokens/s", "of the resident tables'"]
        rows = [
            [
                row["model"],
                row["batch"],
                f"{row['tokens_per_second']:,.0f}",
                f"{row['of_resident']:.0%}",
            ]
            for row in record["results"]
        ]
        found[f"decoding, {record['environment']['device']}"] = [head, *rows]
    return found


def _speeds(results: list[dict]) -> list[Sequence[object]]:
    head = ["model", "active", "total", "tokens/s", "of dense", "utilisation"]
    shares = ["lookup_share", "projections_share", "optimizer_share"]
    rows = [[*head, "lookup", "projections", "optimizer", "GB beyond weights"]]
    for row in results:
        sizes = [f"{row[name]:,.0f}" for name in ("active_parameters", "total_parameters")]
        speed = [f"{row['tokens_per_second']:,.0f}", f"{row['speed_of_dense']:.1%}"]
        parts = [f"{row[name]:.1%}" for name in ("utilisation", *shares)]
        rows.append([row["model"], *sizes, *speed, *parts, f"{row['peak_bytes'] / 1e9:.1f}"])
    return rows


def _profiles(profiles: dict[str, list[dict]], longest: int = 5) -> list[Sequence[object]]:
    rows = [["model", "operation", "calls", "share of the time"]]
    for model, operations in profiles.items():
        for one in operations[:longest]:
            rows.append([model, one["operation"][:60], one["calls"], f"{one['share']:.1%}"])
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line.

    Exit code 2, and one line on stderr, for input that cannot be used; 1 where a part failed; 75 where
    the minutes were over before the end.
    """
    parser = argparse.ArgumentParser(
        prog="python -m l3paper.gpu",
        description="Check, time and train on a GPU, a part at a time; without a PART, all of them.",
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--skip", nargs="*", default=[], metavar="PART", help="leave these out")
    parser.add_argument(
        "--minutes",
        type=float,
        metavar="N",
        help="stop then; the same command goes on (default: never)",
    )
    parser.add_argument(
        "--again",
        action="store_true",
        help="parts that are done, too; recorded runs are kept as they are",
    )
    parser.add_argument("--data", default="stdlib", help="text of the experiments, as of l3paper.train")
    parser.add_argument("--words", default="", metavar="FILE", help="as of l3paper.train")
    parser.add_argument("--folder", type=Path, help="of all records (default: figures/data)")
    parser.add_argument(
        "--dry-run", action="store_true", help="every part on the CPU at toy size; needs --folder"
    )
    given = parser.parse_args(arguments)
    try:
        scale = _scale(given)
        for name in (*given.parts, *given.skip):
            if name not in PARTS:
                raise ValueError(f"part is {name!r}; choose out of {', '.join(PARTS)}")
        if given.minutes is not None and not given.minutes > 0:
            raise ValueError(f"minutes is {given.minutes:g}; it must be above 0")
        require_writable(_outcome("any", scale))
    except ValueError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    deadline = time.monotonic() + 60 * given.minutes if given.minutes else math.inf
    failed = unfinished = False
    for name in given.parts or PARTS:
        if name in given.skip:
            continue
        if time.monotonic() >= deadline:
            unfinished = True
            break
        try:
            unfinished |= not run_part(name, scale, deadline, given.again)
        except subprocess.CalledProcessError as error:
            print(f"{parser.prog}: {name} failed with exit code {error.returncode}", file=sys.stderr)
            failed = True
        except KeyboardInterrupt:
            print(f"{parser.prog}: interrupted; the same command goes on from here", file=sys.stderr)
            return 130
    for title, rows in tables(scale.folder).items():
        print(title, markdown(rows), sep="\n", end="\n\n")
    print(overview(scale))
    return 1 if failed else UNFINISHED if unfinished else 0


def _scale(given: argparse.Namespace) -> Scale:
    if given.dry_run and given.folder is None:
        raise ValueError("--dry-run needs --folder: its records are no results")
    base = TOY if given.dry_run else SCALE
    if not given.dry_run:
        device = pick_device("cuda")
        if environment(device)["commit"] is None:
            raise ValueError("the commit is unknown here, and records name it: set L3_COMMIT")
    changes = {"data": given.data, "words": given.words}
    if given.folder:
        changes |= {"folder": given.folder / "gpu", "runs": given.folder / "runs"}
    return replace(base, **changes)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # stop the part, too
    sys.exit(main())
