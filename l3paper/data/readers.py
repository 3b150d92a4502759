"""Files in: the texts of the documents in one file, plain or compressed."""

import bz2
import codecs
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
"""The most bytes that a document may take in its file, in every format: one is held in memory."""

_CHUNK = 2**24  # bytes of a line that are read at once
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
    UTF-8, or has more than `limit` bytes.
    """
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"{where}: 'text' is {str(value)[:40]!r}, not a string")
    try:
        size = len(value.encode())
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: not UTF-8 text: {error}") from error
    if size > limit:
        raise ValueError(f"{where}: a document of more than {limit:,} bytes; divide it")
    return value


def _opened(path: Path, compression: str | None) -> IO[bytes]:
    if compression == "zst":
        pyarrow = optional("pyarrow", "parquet")
        return io.BufferedReader(pyarrow.CompressedInputStream(open(path, "rb"), "zstd"))
    return {None: open, "gz": gzip.open, "bz2": bz2.open, "xz": lzma.open}[compression](path, "rb")


def _lines(file: IO[bytes], limit: int) -> Iterator[tuple[int, bytes]]:
    """Yield (number, line with its end), without the byte order mark that a file may begin with."""
    number, line = 1, b""
    while chunk := file.readline(_CHUNK):
        if b"\0" in chunk:
            raise ValueError(f"line {number}: a NUL byte; this is not text")
        line += chunk
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if len(line) > limit:
            raise ValueError(f"line {number}: longer than {limit:,} bytes; divide it")
        if line.endswith(b"\n"):
            yield number, line
            number, line = number + 1, b""
    if line:
        yield number, line


def _decoded(data: bytes, number: int) -> str:
    """The text of `data`, which begins at line `number`."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        number += data.count(b"\n", 0, error.start)
        raise ValueError(f"line {number}: not UTF-8 text: {error}") from error


def _txt(file: IO[bytes], limit: int) -> Iterator[str]:
    first, data = 1, bytearray()
    for number, line in _lines(file, limit):
        if line.strip() == SEPARATOR.encode():
            yield _decoded(data, first)
            first, data = number + 1, bytearray()
        else:
            data += line
            if len(data) > limit:
                raise ValueError(
                    f"line {number}: a document of more than {limit:,} bytes; "
                    f"divide it by lines {SEPARATOR}"
                )
    yield _decoded(data, first)


def _jsonl(file: IO[bytes], limit: int) -> Iterator[str]:
    for number, line in _lines(file, limit):
        if text := _decoded(line, number).strip():
            try:
                value = json.loads(text)["text"]
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
