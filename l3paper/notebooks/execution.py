"""Execute the notebooks in order and keep their outputs: `python -m l3paper.notebooks [01 ...]`.

Outputs are written without timings, paths or the machine's metadata, so that running a notebook
again changes only what it computed. A digest of what went in makes stale outputs detectable.
"""

import argparse
import hashlib
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode

from l3paper.files import atomic_write
from l3paper.records import RECORDS
from l3paper.training.config import PRESETS

_READERS = b"l3paper.experiments", b"l3paper.insight.record"
"""Modules that read recorded runs."""

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"


def execute(path: Path) -> float:
    """Run a notebook in a fresh kernel and write its outputs back into it; the seconds it took.

    Its exercises' solutions run behind it, each against its checker, and leave no trace.
    Raises CellExecutionError, and leaves the file alone, when a cell or a solution fails.
    """
    notebook = nbformat.read(path, as_version=4)
    shown = notebook.cells
    notebook.cells = shown + [nbformat.v4.new_code_cell(code) for code in solutions(notebook)]
    begin = time.perf_counter()
    NotebookClient(
        notebook,
        timeout=None,  # the larger presets train inside a cell
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,
        extra_arguments=["--log-level=ERROR"],
        resources={"metadata": {"path": str(path.parent)}},
    ).execute()
    seconds = time.perf_counter() - begin
    notebook.cells = shown
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"},
            "language_info": {"name": "python"},
            "l3paper": {"digest": digest(notebook)},
        }
    )
    with atomic_write(path) as file:
        nbformat.write(notebook, file)
    return seconds


def solutions(notebook: NotebookNode) -> list[str]:
    """The folded solutions of the exercises, each followed by a call of its checker.

    Exercise N is a cell that sets `attempt_N = None` and defines `check_N(answer)`, which asserts.
    """
    prose = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    blocks = re.findall(
        r"<summary>Solution</summary>(?:(?!</details>).)*?```python\n(.*?)```", prose, re.DOTALL
    )
    return [
        f"{block}\nassert attempt_{n} is not None\ncheck_{n}(attempt_{n})"
        for n, block in enumerate(blocks, start=1)
    ]


def digest(notebook: NotebookNode) -> str:
    """SHA-256 of a notebook's code and solutions, the presets and, where it reads any, recorded runs.

    That is what outputs depend on. The rest of the package is left out: its tests, and the asserts in
    every notebook, watch over that.
    """
    parts = [cell.source.encode() for cell in notebook.cells if cell.cell_type == "code"]
    parts += [code.encode() for code in solutions(notebook)]
    parts.append(repr(PRESETS).encode())
    if any(module in part for part in parts for module in _READERS):
        parts += [path.read_bytes() for path in sorted(RECORDS.rglob("*.json"))]
    joined = hashlib.sha256()
    for part in parts:
        joined.update(len(part).to_bytes(8, "little") + part)
    return joined.hexdigest()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: one progress line a notebook; exit code 1 when a cell fails."""
    parser = argparse.ArgumentParser(
        prog="python -m l3paper.notebooks",
        description="Execute the notebooks in order, rewriting their outputs and figures/*.png.",
    )
    parser.add_argument(
        "numbers", nargs="*", metavar="NN", help="only these, such as 01 (default: all)"
    )
    numbers = parser.parse_args(arguments).numbers
    paths = [p for p in sorted(NOTEBOOKS.glob("*.ipynb")) if not numbers or p.name[:2] in numbers]
    if missing := set(numbers) - {p.name[:2] for p in paths}:
        parser.error(f"no notebook begins with {', '.join(sorted(missing))}")
    os.environ["L3_FIGURES"] = str(NOTEBOOKS.parent / "figures")  # the kernels inherit it
    for i, path in enumerate(paths, start=1):
        print(f"[{i}/{len(paths)}] {path.name} ... ", end="", flush=True)
        try:
            print(f"{execute(path):.0f} s", flush=True)
        except CellExecutionError as error:
            print(f"failed\n{error}", file=sys.stderr)
            return 1
    return 0
