"""Execute a notebook and keep its outputs.

Outputs are written without timings, paths or the machine's metadata, so that running a notebook
again changes only what it computed. A digest of what they depend on makes stale outputs detectable.
"""

import hashlib
import re
import time
from collections.abc import Mapping
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError as CellExecutionError
from nbformat import NotebookNode

from l3paper.files import atomic_write
from l3paper.records import RECORDS
from l3paper.training.config import PRESETS, TrainConfig


def execute(path: Path) -> float:
    """Run a notebook in a fresh kernel and write its outputs back into it; return the seconds it took.

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
    """The folded solutions of the exercises, each followed by its call of `check`.

    The cell of an exercise sets `attempt_N = None` and ends with `check("0X.N", attempt_N)`, which may
    have more arguments (`l3paper.notebooks.exercises`).
    """
    prose = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    code = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    blocks = re.findall(
        r"<summary>Solution</summary>(?:(?!</details>).)*?```python\n(.*?)```", prose, re.DOTALL
    )
    calls = re.findall(r'^check\("[\d.]+", attempt_\d+.*\)$', code, re.MULTILINE)
    return [
        f"{block}\nassert attempt_{n} is not None\n{call}"
        for n, (block, call) in enumerate(zip(blocks, calls, strict=True), start=1)
    ]


def digest(
    notebook: NotebookNode, presets: Mapping[str, TrainConfig] = PRESETS, records: Path = RECORDS
) -> str:
    """SHA-256 of what outputs depend on: the notebook's code and solutions, presets, recorded runs.

    Every record counts, whether or not this notebook reads it, and every recorded run for a notebook
    that uses `l3paper.experiments`. The rest of the package does not: its tests, and the asserts in
    every notebook, watch over that.
    """
    parts = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    kinds = ("*.json", "*.jsonl") if "l3paper.experiments" in "".join(parts) else ("*.json",)
    parts += [*solutions(notebook), repr(presets)]
    files = sorted(path for kind in kinds for path in records.rglob(kind))
    parts += [path.read_text(encoding="utf-8") for path in files]
    return hashlib.sha256(repr(parts).encode()).hexdigest()
