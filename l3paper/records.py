"""Records of runs: one JSON file per run, with all one needs to judge and repeat it; and tables."""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterable, Sequence
from itertools import zip_longest
from pathlib import Path

import torch

from l3paper.files import atomic_write, cache_folder

_CHECKOUT = Path(__file__).parents[1] / "figures" / "data"
RECORDS = _CHECKOUT if _CHECKOUT.is_dir() else cache_folder() / "records"
"""The folder of recorded runs: the checkout's or, for an installed package, the user's own."""


def environment(device: torch.device) -> dict[str, str | None]:
    """Describe what a run ran on: device, versions, and the commit of the code.

    The commit is $L3_COMMIT, for copies of a checkout without its history; else the checkout's, or None
    outside of one.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {
        "device": f"{device.type}: {name}",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": _commit(),
    }


def write_record(path: Path, record: dict) -> None:
    """Write `record` as JSON: whole, or not at all."""
    with atomic_write(path) as file:
        json.dump(record, file, indent=1)
        file.write("\n")


def read_record(path: Path) -> dict:
    """Read what `write_record` wrote."""
    return json.loads(path.read_text(encoding="utf-8"))


def markdown(rows: Iterable[Sequence[object]]) -> str:
    """Format a table as Markdown; the first row is its head."""
    head, *body = rows
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def aligned(rows: Iterable[Sequence[object]], width: int | None = None) -> str:
    """Format a table as columns, numbers to the right; the first row is its head.

    If it is wider than `width` characters (by default, the terminal's), the text in its widest columns
    wraps, and blank lines part the rows.
    """
    cells = [[str(cell) for cell in row] for row in rows]
    columns = list(zip(*cells, strict=True))
    widths = [max(map(len, column)) for column in columns]
    room = (width or shutil.get_terminal_size().columns) - 2 * (len(columns) - 1)
    wraps = sum(widths) > room
    while sum(widths) > room and max(widths) > 8:
        widths[widths.index(max(widths))] -= 1
    number = re.compile(r"[-+]?\d\S*( \S+)?|-?")  # with a unit, or left out
    numeric = [all(map(number.fullmatch, column[1:])) for column in columns]
    lines = []
    for row in cells:
        wrapped = [textwrap.wrap(cell, size) for cell, size in zip(row, widths, strict=True)]
        for parts in zip_longest(*wrapped, fillvalue=""):
            padded = [
                part.rjust(size) if right else part.ljust(size)
                for part, size, right in zip(parts, widths, numeric, strict=True)
            ]
            lines.append("  ".join(padded).rstrip())
        lines += [""] * wraps
    return "\n".join(lines).rstrip()


def for_stdout(rows: Iterable[Sequence[object]]) -> str:
    """Format a table for stdout: aligned columns for a terminal, Markdown for a file or a pipe."""
    return aligned(rows) if sys.stdout.isatty() else markdown(rows)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _commit() -> str | None:
    if given := os.environ.get("L3_COMMIT"):
        return given

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", __file__)  # fails in a checkout of something else
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "*.py")
        return git("rev-parse", "HEAD") + (" (changed)" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None
