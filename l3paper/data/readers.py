"""Files in: the texts of the documents in one file, plain or compressed."""

import bz2
import gzip
import importlib
import io
import json
import lzma
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import IO

SEPARATOR = "<|endoftext|>"
"""A line of a .txt file that holds only this divides two documents."""

MAX_DOCUMENT = 2**30
"""The most characters that a document, or a line of JSON, may have: one is held in memory."""

_CHUNK = 2**20  # characters of a line that are read at once
_READABLE = re.compile(r"(?s:.*)\.(?:(txt|jsonl)(?:\.(gz|bz2|xz|zst))?|(parquet))")


def is_readable(name: str) -> bool:
    """Whether `read_texts` knows the ending, in whatever case."""
    return _READABLE.fullmatch(name.lower()) is not None


def read_texts(path: Path, name: str, limit: int = MAX_DOCUMENT) -> Iterator[str]:
    """Yield the texts of a file's documents; a missing text is empty.

    The file is .txt, divided at SEPARATOR, or .jsonl (field "text"), both plain or compressed (.gz,
    .bz2, .xz, .zst), or .parquet (column "text"). Raises ValueError, which calls the file `name` and
    gives the line or row, for what cannot be read, is not UTF-8 text, or is longer than `limit`; and
    ImportError, naming the extra to install, if an optional package is missing.
    """
    kind, compression, parquet = _READABLE.fullmatch(path.name.lower()).groups()
    reader = _parquet if parquet else {"txt": _txt, "jsonl": _jsonl}[kind]
    try:
        with _opened(path, compression) as file:
            yield from reader(file, limit)
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise ValueError(f"{name} cannot be read: {error}") from error
    except ValueError as error:
        raise ValueError(f"{name}, {error}") from error


def read_text(path: Path) -> str:
    """The whole text of a plain file. Raises ValueError, naming the file, if it is not UTF-8."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path.name} is not UTF-8 text: {error}") from error


def optional(package: str, extra: str) -> ModuleType:
    """Import a package. Raises ImportError, naming the extra to install, if it is missing."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        name = package.partition(".")[0]
        raise ImportError(f"this needs the extra l3paper[{extra}]: pip install {name}") from error


def checked_text(value: object, where: str, limit: int = MAX_DOCUMENT) -> str:
    """Return the text that a row holds, which is empty for None.

    Raises ValueError, naming `where` the row is, if `value` is not a string, cannot be written as
    UTF-8, or has more than `limit` characters.
    """
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"{where}: 'text' is {str(value)[:40]!r}, not a string")
    if len(value) > limit:
        raise ValueError(f"{where}: a document of more than {limit:,} characters; divide it")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: not UTF-8 text, at character {error.start + 1}") from error
    return value


def _opened(path: Path, compression: str | None) -> IO[bytes]:
    if compression == "zst":
        pyarrow = optional("pyarrow", "parquet")
        return io.BufferedReader(pyarrow.CompressedInputStream(open(path, "rb"), "zstd"))
    return {None: open, "gz": gzip.open, "bz2": bz2.open, "xz": lzma.open}[compression](path, "rb")


def _lines(file: IO[bytes], limit: int) -> Iterator[tuple[int, str]]:
    """Yield (number, line with its end), without the byte order mark that a file may begin with."""
    # Bytes that are not UTF-8 come as lone surrogates, which `checked_text` refuses.
    text = io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape", newline="\n")
    number, line = 1, ""
    while chunk := text.readline(_CHUNK):
        if "\0" in chunk:
            raise ValueError(f"line {number}: a NUL byte; this is not text")
        line += checked_text(chunk, f"line {number}")
        if len(line) > limit:
            raise ValueError(f"line {number}: longer than {limit:,} characters; divide it")
        if line.endswith("\n"):
            yield number, line
            number, line = number + 1, ""
    if line:
        yield number, line


def _txt(file: IO[bytes], limit: int) -> Iterator[str]:
    lines, left = [], limit
    for number, line in _lines(file, limit):
        if line.strip() == SEPARATOR:
            yield "".join(lines)
            lines, left = [], limit
        else:
            lines.append(line)
            left -= len(line)
            if left < 0:
                raise ValueError(
                    f"line {number}: a document of more than {limit:,} characters; "
                    f"divide it by lines {SEPARATOR}"
                )
    yield "".join(lines)


def _jsonl(file: IO[bytes], limit: int) -> Iterator[str]:
    for number, line in _lines(file, limit):
        if line.strip():
            try:
                value = json.loads(line)["text"]
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise ValueError(f"line {number}: not a JSON object with a string 'text'") from error
            yield checked_text(value, f"line {number}")


def _parquet(file: IO[bytes], limit: int) -> Iterator[str]:
    pyarrow = optional("pyarrow", "parquet")
    parquet = optional("pyarrow.parquet", "parquet")
    row = 0
    try:
        with parquet.ParquetFile(file, buffer_size=2**20) as table:
            if "text" not in table.schema_arrow.names:
                raise ValueError("which has no column 'text'")
            # A few rows at a time: a thousand bytes of a file may stand for a gigabyte of text.
            for batch in table.iter_batches(batch_size=4, columns=["text"]):
                for value in batch.column(0):
                    row += 1
                    yield checked_text(value.as_py(), f"row {row}", limit)
    except UnicodeDecodeError as error:
        raise ValueError(f"row {row}: not UTF-8 text: {error}") from error
    except pyarrow.ArrowException as error:
        raise ValueError(f"after row {row}: not a readable .parquet file: {error}") from error
