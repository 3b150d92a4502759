"""The paper's claims, held against the records: `python -m l3paper.claims`."""

import argparse
import sys
from collections.abc import Sequence

from l3paper.errors import command
from l3paper.experiments.claims import short_table, table
from l3paper.experiments.runs import RUNS
from l3paper.records import for_stdout

PROGRAM = "python -m l3paper.claims"


@command(PROGRAM)
def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table of claims; ValueError if there are no records to hold them against."""
    parser = argparse.ArgumentParser(PROGRAM, description=__doc__)
    parser.add_argument("--short", action="store_true", help="the claims that the README shows")
    flags = parser.parse_args(arguments)
    if not any(RUNS.glob("*.jsonl")):
        raise ValueError(
            f"there are no records in {str(RUNS)!r}: run this in a checkout, which holds the recorded "
            "runs, or record your own with python -m l3paper.experiments and name their folder in "
            "$L3_RECORDS"
        )
    print(for_stdout(short_table() if flags.short else table()))


if __name__ == "__main__":
    sys.exit(main())
