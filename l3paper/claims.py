"""The paper's claims, compared with the records: `python -m l3paper.claims`."""

import argparse
import sys
from collections.abc import Sequence

from l3paper.errors import command
from l3paper.experiments.claims import table
from l3paper.experiments.report import print_table

PROGRAM = "python -m l3paper.claims"


@command(PROGRAM)
def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table of claims."""
    argparse.ArgumentParser(
        prog=PROGRAM, description="Print the paper's claims beside what the recorded runs say."
    ).parse_args(arguments)
    print_table(table())
    return 0


if __name__ == "__main__":
    sys.exit(main())
