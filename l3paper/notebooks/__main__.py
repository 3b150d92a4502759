"""Execute the notebooks in order and keep their outputs: `python -m l3paper.notebooks [01 ...]`."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from l3paper.errors import command
from l3paper.notebooks import NOTEBOOKS


def execute_all(numbers: Sequence[str], folder: Path = NOTEBOOKS) -> int:
    """Execute the notebooks of `folder` with these numbers, or all; return 1 if a cell fails, else 0.

    Raises ValueError without that folder or number, ImportError without the packages it takes.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not there: run this in a checkout of the repository")
    paths = [path for path in sorted(folder.glob("*.ipynb")) if path.name[:2] in numbers or not numbers]
    if missing := set(numbers) - {path.name[:2] for path in paths}:
        raise ValueError(f"no notebook begins with {', '.join(sorted(missing))}")
    try:
        from l3paper.notebooks.execution import CellExecutionError, execute
    except ImportError as error:
        raise ImportError(f"{error}: pip install '.[notebooks]' brings it") from error
    os.environ["L3_FIGURES"] = str(folder.parent / "figures")  # the kernels inherit it
    for i, path in enumerate(paths, start=1):
        print(f"[{i}/{len(paths)}] {path.name} ... ", end="", flush=True)
        try:
            print(f"{execute(path):.0f} s", flush=True)
        except CellExecutionError as error:
            print(f"failed\n{error}", file=sys.stderr)
            return 1
    return 0


@command("python -m l3paper.notebooks")
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line: one progress line per notebook."""
    parser = argparse.ArgumentParser(
        prog="python -m l3paper.notebooks",
        description="Execute the notebooks in order, rewriting their outputs and figures/*.png.",
    )
    parser.add_argument("numbers", nargs="*", metavar="NN", help="such as 01 (default: all)")
    return execute_all(parser.parse_args(arguments).numbers)


if __name__ == "__main__":
    sys.exit(main())
