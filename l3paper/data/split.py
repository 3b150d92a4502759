"""Which side each document is on: training or held out, and how clean the two sides are."""

import io
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np

from l3paper.data.sources import TRAIN, VALIDATION, Document, name_hash, named_side

MIN_LINE = 9
"""Shorter lines, without the white space around them, are shared by chance."""


@dataclass(frozen=True)
class Split:
    """The sides of a text's documents. All arrays have the shape (documents,)."""

    names: list[str]
    sizes: np.ndarray
    """Characters of each document."""
    near_copies: np.ndarray
    """Whether more than half of its characters stand in lines that other documents also have."""
    kept: np.ndarray
    """How many of its characters, from its beginning, training keeps; the others are held out."""
    by_name: bool
    """Whether the names of the files decided it."""

    def divide(self, documents: Iterable[Document]) -> Iterator[tuple[str, Document]]:
        """Yield (side, document) for the documents that this split was made for.

        A document that is on both sides is cut at a line end, if there is one nearby.
        """
        again = zip_longest(documents, self.names, self.sizes, self.kept)
        for document, name, size, kept in again:
            if document is None or document.name != name or len(document.text) != size:
                raise ValueError(f"{name or 'the text'} has changed since it was read first")
            text = document.text
            if 0 < kept < size:
                kept = text.rfind("\n", max(0, kept - (size - kept) // 5), kept) + 1 or kept
                yield TRAIN, Document(name, text[:kept])
                yield VALIDATION, Document(f"{name} (end)", text[kept:])
            else:
                yield TRAIN if kept else VALIDATION, document

    def texts(self, documents: Iterable[Document], side: str) -> Iterator[str]:
        """Yield the texts of one side."""
        return (document.text for place, document in self.divide(documents) if place == side)


def plan_split(documents: Iterable[Document]) -> Split:
    """Decide in one pass, which keeps hashes of the lines, which side each document is on.

    If names of files put some on the validation side and others not, that is the split. Otherwise a
    twentieth of the text, give or take a hundredth, is held out: in the order of a hash of their
    names, documents are held out until they are that much. Never held out are near copies, files that
    are named for training beside others, and a document that would take that side past 6 %. If less
    than 4 % is held out then, the first that is long enough loses its end to that side. Raises
    ValueError if nothing can be held out.
    """
    names, sizes, lines, hashes, characters = ([], *(array("q") for _ in range(4)))
    for name, text in documents:
        counts = Counter({hash(text): len(text)})  # so that a copy is one, however short its lines
        counts.update(_lines(text))
        names.append(name)
        sizes.append(len(text))
        lines.append(len(counts))
        hashes.extend(counts)
        characters.extend(counts.values())
    _, line, found = np.unique(hashes, return_inverse=True, return_counts=True)
    shared = np.where(found[line] > 1, characters, 0)
    owners = np.repeat(np.arange(len(names)), lines)
    sizes = np.array(sizes)
    near_copies = 2 * np.bincount(owners, shared, len(names)) > sizes
    held_out = np.array([_side(name) == VALIDATION for name in names])
    by_name = bool(held_out.any() and not held_out.all())
    kept = np.where(held_out, 0, sizes) if by_name else _hold_out(names, sizes, near_copies)
    return Split(names, sizes, near_copies, kept, by_name)


def _side(document: str) -> str | None:
    """The side that the name of the document's file names, if it does."""
    return named_side(document.rpartition("#")[0])


def _hold_out(names: list[str], sizes: np.ndarray, near_copies: np.ndarray) -> np.ndarray:
    total, size, kept = sizes.sum(), 0, sizes.copy()
    sides = [_side(name) for name in names]
    free = ~near_copies & (all(side == TRAIN for side in sides) | (np.array(sides) != TRAIN))
    by_hash = sorted(np.flatnonzero(free), key=lambda i: name_hash("split", names[i]))
    for i in by_hash:
        if size < 0.05 * total and size + sizes[i] <= 0.06 * total:
            kept[i] = 0
            size += sizes[i]
    if size < 0.04 * total:
        missing = max(1, round(0.05 * total) - size)
        for i in by_hash:
            if kept[i] > missing:
                kept[i] -= missing
                break
    if np.array_equal(kept, sizes):
        raise ValueError(
            f"nothing can be held out of {len(names):,} documents with {total:,} characters: they are "
            f"too short, or near copies of each other, as {near_copies.sum():,} are"
        )
    return kept


def _lines(text: str) -> Counter:
    """A hash of each line that is long enough -> the characters of the text that stand in it.

    The hashes differ from process to process; which of them are equal does not.
    """
    counts = Counter()
    for line in io.StringIO(text):
        if len(stripped := line.strip()) >= MIN_LINE:
            counts[hash(stripped)] += len(line)
    return counts


def describe(split: Split, documents: Iterable[Document]) -> str:
    """What is held out, how much of it the training side has as well, and the near copies, in lines."""
    number, size = Counter(), Counter()
    hashes, characters = ({TRAIN: array("q"), VALIDATION: array("q")} for _ in range(2))
    for side, (_, text) in split.divide(documents):
        lines = _lines(text)
        number[side] += 1
        size[side] += len(text)
        hashes[side].extend(lines)
        characters[side].extend(lines.values())
    seen = np.isin(hashes[VALIDATION], hashes[TRAIN]) @ np.asarray(characters[VALIDATION])
    near, out = split.near_copies, size[VALIDATION]
    return (
        f"training: {number[TRAIN]:,} documents, {size[TRAIN]:,} characters\n"
        f"held out: {number[VALIDATION]:,} documents, {out:,} characters, {out / size.total():.1%} of "
        f"the text, chosen by {'the names of the files' if split.by_name else 'a hash of the names'}\n"
        f"of the held-out characters, {seen / out:.1%} stand in lines that training also has\n"
        f"near copies of other documents: {near.sum():,}, {split.sizes[near].sum() / size.total():.1%} "
        f"of the text, {(near & (split.kept < split.sizes)).sum():,} of them held out"
    )
