"""Tokenize a text into one file, or describe it: `python -m l3paper.data --help`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from l3paper import files
from l3paper.data.sources import open_source
from l3paper.data.split import describe, plan_split
from l3paper.data.streams import load_corpus, pack_corpus
from l3paper.errors import command

PROGRAM = "python -m l3paper.data"


@command(PROGRAM)
def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Tokenize a text once, into one file that --data can read in its place, also on "
        "another machine; or, with --describe, say what is read, left out and held out.",
    )
    parser.add_argument("data", help="as --data of l3paper.train")
    parser.add_argument("file", type=Path, nargs="?", help="to write; its name must end in .npz")
    parser.add_argument("--describe", action="store_true", help="write no file")
    parser.add_argument("--vocab-size", type=int, default=16384, metavar="N", help="(default: 16384)")
    parser.add_argument("--data-bytes", type=int, metavar="N", help="as of l3paper.train")
    given = parser.parse_args(arguments)
    if given.describe:
        if given.data.endswith(".npz"):
            raise ValueError(
                f"data is {given.data!r}, which is tokenized: describe the text it is from"
            )
        documents = open_source(given.data, given.data_bytes)
        split = plan_split(documents)
        print(f"{documents.name}: {len(split.names):,} documents, {split.sizes.sum():,} characters")
        if documents.left_out:
            print(documents.left_out)
        print(describe(split, documents))
        return 0
    if given.file is None:
        raise ValueError("file is missing: its name must end in .npz, or give --describe")
    if given.file.suffix != ".npz":
        raise ValueError(f"file is {str(given.file)!r}; its name must end in .npz")
    files.require_writable(given.file)
    corpus = load_corpus(given.data, given.vocab_size, given.data_bytes)
    pack_corpus(corpus, given.file)
    held_out = len(corpus.validation)
    print(f"{len(corpus.train):,} training and {held_out:,} held-out tokens: {given.file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
