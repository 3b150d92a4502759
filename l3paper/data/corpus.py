"""Text in: documents from the standard library, from files, or streamed from a dataset hub.

A document is a name and a text. A hash of the names decides which documents are held out, so the
split of a text is the same on every machine.
"""

import hashlib
import json
import re
import sysconfig
from collections.abc import Iterable, Iterator
from itertools import chain, count
from pathlib import Path
from typing import NamedTuple

SEPARATOR = "<|endoftext|>"
"""A line of a .txt file that holds only this divides two documents."""

MAX_LINE = 2**24
"""Bytes. A line is held in memory whole, and may be one word to the tokenizer: there must be an end."""

_SUFFIXES = (".txt", ".jsonl", ".parquet")
_LEFT_OUT = {"test", "tests", "idle_test", "lib2to3", "site-packages", "dist-packages"}
_LEFT_OUT |= {"pydoc_data"}  # generated, and one of its files is as long as all validation documents
_GENERATED = re.compile(r"\bgenerated\b", re.IGNORECASE)


class Document(NamedTuple):
    name: str
    text: str


def read_documents(source: str = "stdlib", max_bytes: int | None = None) -> list[Document]:
    """All documents of `source`, empty ones left out, in a fixed order.

    `source` is one of
        "stdlib"            the source files of Python's standard library, without its tests and
                            generated files, in the order of a hash of their names
        a path              a .txt, .jsonl (field "text") or .parquet (column "text") file, or a
                            folder of such files
        "hf:NAME[:CONFIG]"  the column "text" of a dataset's split "train", streamed

    `max_bytes` stops the reading after that many bytes of UTF-8 text; a stream needs it.

    Raises ValueError for a source that cannot be read or holds no text, and ImportError, naming the
    extra to install, where an optional package is missing.
    """
    if max_bytes is not None and max_bytes < 1:
        raise ValueError(f"max_bytes is {max_bytes}; it must be at least 1")
    if source == "stdlib":
        documents = _standard_library()
    elif source.startswith("hf:"):
        if max_bytes is None:
            raise ValueError(f"max_bytes is needed with {source!r}: a stream is read up to there")
        documents = _hub(source.removeprefix("hf:"))
    else:
        documents = _path(Path(source))
    documents = list(_first_bytes(documents, max_bytes))
    if not documents:
        raise ValueError(f"data source {source!r} holds no text")
    return documents


def fingerprint(documents: Iterable[Document]) -> str:
    """SHA-256 over names and texts: two corpora with the same fingerprint are the same."""
    digest = hashlib.sha256()
    for part in chain.from_iterable(documents):
        data = part.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def split_documents(documents: list[Document]) -> tuple[list[Document], list[Document]]:
    """Divide into (train, validation): a twentieth of the text, give or take a hundredth, is held out.

    Both sides are in the order of a hash of their names. In that order, documents are held out until
    they are a twentieth of the text; one that would take that side past 6 % stays in training. Where
    all that are left are so long that less than 4 % is held out, the first of them loses its end to
    that side. Raises ValueError for a text too short to divide.
    """
    total = sum(len(document.text) for document in documents)
    by_hash = sorted(documents, key=lambda document: _name_hash("split", document.name))
    train, validation, size = [], [], 0
    for document in by_hash:
        if size < 0.05 * total and size + len(document.text) <= 0.06 * total:
            validation.append(document)
            size += len(document.text)
        else:
            train.append(document)
    if size < 0.04 * total:
        missing = max(1, round(0.05 * total) - size)
        place = next((i for i, d in enumerate(train) if len(d.text) > missing), None)
        if place is None:
            raise ValueError(f"the text has {total} characters; that is too short to hold out a part")
        train[place], end = _cut(train[place], missing)
        validation.append(end)
    return train, validation


def _cut(document: Document, missing: int) -> tuple[Document, Document]:
    """Cut off about `missing` characters: at the nearest line end before, where there is one nearby."""
    name, text = document
    place = len(text) - missing
    place = text.rfind("\n", max(0, place - missing // 5), place) + 1 or place
    return Document(name, text[:place]), Document(f"{name} (end)", text[place:])


def _name_hash(purpose: str, name: str) -> bytes:
    """A digest to sort names by, in another order for every purpose."""
    return hashlib.sha256(f"{purpose} {name}".encode(errors="surrogateescape")).digest()


def _first_bytes(documents: Iterable[Document], max_bytes: int | None) -> Iterator[Document]:
    left = max_bytes
    for name, text in documents:
        if left is not None:
            data = text.encode()
            text = data[:left].decode(errors="ignore")  # a cut character is dropped
            left -= len(data)
        if text:
            yield Document(name, text)
        if left is not None and left <= 0:
            return


def _standard_library() -> Iterator[Document]:
    """In the order of a hash of the names, so that the first bytes are a fair sample of the whole.

    Generated files, which say so in their first lines, depend on how this Python was built.
    """
    root = Path(sysconfig.get_path("stdlib"))
    names = [path.relative_to(root) for path in root.rglob("*.py")]
    for name in sorted(names, key=lambda name: _name_hash("order", name.as_posix())):
        if _LEFT_OUT.intersection(name.parts) or name.parts[0].startswith("config-"):
            continue
        text = read_text(root / name)
        if not _GENERATED.search("".join(text.splitlines(keepends=True)[:3])):
            yield Document(name.as_posix(), text)


def _path(root: Path) -> Iterator[Document]:
    if root.is_dir():
        paths = sorted(p for p in root.rglob("*") if p.suffix in _SUFFIXES and p.is_file())
        names = [p.relative_to(root).as_posix() for p in paths]
        if not paths:
            raise ValueError(f"data folder {str(root)!r} has no file {' or '.join(_SUFFIXES)}")
    elif not root.is_file():
        raise ValueError(f"data source {str(root)!r} is no file or folder, nor 'stdlib' or 'hf:NAME'")
    elif root.suffix not in _SUFFIXES:
        raise ValueError(f"data file {root.name!r} must end in one of {', '.join(_SUFFIXES)}")
    else:
        paths, names = [root], [root.name]
    for path, name in zip(paths, names, strict=True):
        texts = {".txt": _txt, ".jsonl": _jsonl, ".parquet": _parquet}[path.suffix](path)
        for i, text in enumerate(texts):
            yield Document(f"{name}#{i}", text)


def read_text(path: Path) -> str:
    """The text of a file; ValueError as of `read_lines`."""
    return "".join(read_lines(path))


def read_lines(path: Path) -> Iterator[str]:
    """The lines of a file, with their ends.

    Raises ValueError, naming file and line, for one of more than MAX_LINE bytes and for what is not
    UTF-8 text.
    """
    with open(path, "rb") as file:
        for number in count(1):
            line = file.readline(MAX_LINE + 1)
            if not line:
                return
            if len(line) > MAX_LINE:
                raise ValueError(f"{path.name}, line {number}: longer than {MAX_LINE:,} bytes")
            if b"\0" in line:
                raise ValueError(f"{path.name}, line {number}: a NUL byte; this is no text")
            try:
                yield line.decode()
            except UnicodeDecodeError as error:
                raise ValueError(f"{path.name}, line {number}: not UTF-8 text: {error}") from None


def _txt(path: Path) -> Iterator[str]:
    lines: list[str] = []
    for line in read_lines(path):
        if line.strip() == SEPARATOR:
            yield "".join(lines)
            lines = []
        else:
            lines.append(line)
    yield "".join(lines)


def _jsonl(path: Path) -> Iterator[str]:
    for number, line in enumerate(read_lines(path), start=1):
        if line.strip():
            try:
                text = json.loads(line)["text"]
                text.encode()
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                raise ValueError(
                    f"{path.name}, line {number}: no JSON object with a string 'text'"
                ) from None
            yield text


def _parquet(path: Path) -> Iterator[str]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ImportError(
            "reading .parquet needs the extra l3paper[parquet]: pip install pyarrow"
        ) from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(columns=["text"]):
                for text in batch.column("text").to_pylist():
                    yield _as_text(text)
    except (pyarrow.ArrowException, KeyError, OSError, TypeError) as error:
        raise ValueError(f"data file {path.name!r} has no readable column 'text': {error}") from None


def _hub(name: str) -> Iterator[Document]:
    try:
        import datasets
    except ImportError:
        raise ImportError(
            "streaming 'hf:' data needs the extra l3paper[hf]: pip install datasets"
        ) from None
    dataset, _, config = name.partition(":")
    try:
        rows = datasets.load_dataset(dataset, config or None, split="train", streaming=True)
        for i, row in enumerate(rows):
            yield Document(f"{name}#{i}", _as_text(row["text"]))
    except (OSError, KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"dataset {name!r} cannot be streamed: {error}") from error


def _as_text(value: object) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    if len(value) > MAX_LINE and max(map(len, value.split("\n"))) > MAX_LINE:
        raise ValueError(f"a line is longer than {MAX_LINE:,} characters")
    return value
