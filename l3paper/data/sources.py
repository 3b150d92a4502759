"""Sources of text: the standard library, files, folders, and datasets of a hub, as documents."""

import hashlib
import os
import re
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from l3paper.data.readers import checked_text, is_readable, optional, read_text, read_texts
from l3paper.errors import at_least

TRAIN, VALIDATION, TEST = "train", "validation", "test"
_SIDES = {
    TEST: {"test", "tests", "testing"},
    VALIDATION: {"val", "valid", "validation", "dev", "eval"},
    TRAIN: {"train", "training"},
}

_LEFT_OUT = {"test", "tests", "idle_test", "lib2to3", "site-packages", "dist-packages"}
_LEFT_OUT |= {"pydoc_data"}  # generated, and one of its files is as long as all validation documents
_GENERATED = re.compile(r"\bgenerated\b", re.IGNORECASE)


class Document(NamedTuple):
    name: str
    text: str


@dataclass(frozen=True)
class Source:
    """Documents that are read again, one at a time, whenever the source is iterated over."""

    name: str
    read: Callable[[], Iterable[Document]]
    data_bytes: int | None = None
    left_out: str = ""
    """A sentence about the files of a folder that are not read, if there are any."""

    def __iter__(self) -> Iterator[Document]:
        """Yield documents that hold text, up to `data_bytes`. A terminal is shown how far this is."""
        empty, left = True, self.data_bytes
        shown = dict(unit=" characters", unit_scale=True, disable=None, delay=1, leave=False)
        with tqdm(desc=f"reading {self.name}", **shown) as bar:
            for name, text in self.read():
                if left is not None:
                    data = text.encode()
                    text = data[:left].decode(errors="ignore")  # a cut character is dropped
                    left -= len(data)
                if text:
                    empty = False
                    yield Document(name, text)
                    bar.update(len(text))
                if left is not None and left <= 0:
                    break
        if empty:
            raise ValueError(f"data source {self.name!r} holds no text. {self.left_out}".strip())


def open_source(source: str = "stdlib", data_bytes: int | None = None) -> Source:
    """Find the documents of `source`, which come in a fixed order.

    `source` is one of
        "stdlib"            the source files of Python's standard library, without its tests and
                            generated files, in the order of a hash of their names
        a path              a file that `read_texts` reads, or a folder of such files, in the order
                            of their names, held-out files last; see `list_folder`
        "hf:NAME[:CONFIG]"  the column "text" of a dataset's split "train", streamed into memory

    `data_bytes` stops the reading after that many bytes of UTF-8 text; a stream needs it.

    Raises ValueError, here or while it is read, for a source that cannot be read or holds no text,
    and ImportError, naming the extra to install, if an optional package is missing.
    """
    if data_bytes is not None:
        at_least(1, data_bytes=data_bytes)
    if source == "stdlib":
        return Source(source, _standard_library, data_bytes)
    if source.startswith("hf:"):
        if data_bytes is None:
            raise ValueError(f"data_bytes is needed with {source!r}: a stream is read up to there")
        documents = list(Source(source, lambda: _hub(source.removeprefix("hf:")), data_bytes))
        return Source(source, lambda: documents)
    path = Path(source)
    if not source or not (path.is_file() or path.is_dir()):
        raise ValueError(f"data is {source!r}: not a file or folder, nor 'stdlib' or 'hf:NAME'")
    folder, names, left_out = path.parent, [path.name], ""
    if path.is_dir():
        folder, (names, left_out) = path, list_folder(path)
    elif not is_readable(path.name):
        raise ValueError(
            f"data file {path.name!r} must end in .txt or .jsonl (or .gz, .bz2, .xz, .zst after "
            "either) or .parquet"
        )
    return Source(corpus_name(source), lambda: _files(folder, names), data_bytes, left_out)


def corpus_name(source: str) -> str:
    """The name of a source in records: of a file or folder, without the way to it."""
    if source == "stdlib" or source.startswith("hf:"):
        return source
    return _printable(Path(source).absolute().name)


def fingerprint(documents: Iterable[Document]) -> str:
    """SHA-256 over names and texts: two corpora with the same fingerprint are the same."""
    digest = hashlib.sha256()
    for part in chain.from_iterable(documents):
        data = part.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def name_hash(purpose: str, name: str) -> bytes:
    """A digest to sort names by, in another order for every purpose."""
    return hashlib.sha256(f"{purpose} {name}".encode()).digest()


@cache
def named_side(name: str) -> str | None:
    """The side that a word in a file's name names, or else one in the names of its folders."""
    for part in reversed(name.split("/")):
        words = set(re.findall("[a-z]+", part.lower()))
        for side, of_side in _SIDES.items():
            if words & of_side:
                return side
    return None


def list_folder(root: Path) -> tuple[list[str], str]:
    """(the names of the files to read, a sentence about what is left out or "").

    Files of other kinds, linked folders and test files are left out, and, if both sides are named,
    files whose names put them on neither. Names that begin with a dot do not count. Raises ValueError
    if a folder cannot be opened or no file remains.
    """
    names, left_out = [], Counter()
    for folder, folders, files in os.walk(root, onerror=_refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        left_out["linked folders"] += sum(Path(folder, name).is_symlink() for name in folders)
        for name in files:
            if name.startswith("."):
                continue
            if is_readable(name):
                names.append(Path(folder, name).relative_to(root).as_posix())
            else:
                left_out[f"{_printable(Path(name).suffix) or 'other'} files"] += 1
    both = {TRAIN, VALIDATION} <= set(map(named_side, names))
    for name in names.copy():
        if named_side(name) == TEST or (both and named_side(name) is None):
            names.remove(name)
            left_out["test files" if named_side(name) else "files named for neither side"] += 1
    # Held-out files come last, so that `data_bytes` never leaves them alone, to be trained on.
    names.sort(key=lambda name: (named_side(name) == VALIDATION, Path(name)))
    told = ", ".join(f"{number} {what}" for what, number in (+left_out).most_common(9))
    told = f"data folder {_printable(str(root))!r}: left out {told}" if told else ""
    if not names:
        raise ValueError(f"data folder {_printable(str(root))!r} has no file to train on. {told}")
    return names, told


def _refuse(error: OSError) -> None:
    raise ValueError(f"a folder of the data cannot be read: {error}") from error


def _printable(name: str) -> str:
    """A file's name in which bytes that are not UTF-8 are written as escapes."""
    return os.fsencode(name).decode(errors="backslashreplace")


def _files(root: Path, names: list[str]) -> Iterator[Document]:
    for name in names:
        path, name = root / name, _printable(name)
        if not path.is_file():
            raise ValueError(f"{name} cannot be read: it is not a regular file, or a broken link")
        for number, text in enumerate(read_texts(path, name)):
            yield Document(f"{name}#{number}", text)


def _standard_library() -> Iterator[Document]:
    """The order by a hash of the names makes the first bytes a fair sample of the whole.

    Generated files, which say so in their first lines, depend on how this Python was built.
    """
    root = Path(sysconfig.get_path("stdlib"))
    names = [path.relative_to(root) for path in root.rglob("*.py")]
    for name in sorted(names, key=lambda name: name_hash("order", name.as_posix())):
        if _LEFT_OUT.intersection(name.parts) or name.parts[0].startswith("config-"):
            continue
        text = read_text(root / name)
        if not _GENERATED.search("".join(text.splitlines(keepends=True)[:3])):
            yield Document(name.as_posix(), text)


def _hub(name: str) -> Iterator[Document]:
    datasets = optional("datasets", "hf")
    dataset, _, config = name.partition(":")
    try:
        rows = datasets.load_dataset(dataset, config or None, split="train", streaming=True)
        for number, row in enumerate(rows):
            yield Document(f"{name}#{number}", checked_text(row["text"], f"row {number + 1}"))
    except (OSError, KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"dataset {name!r} cannot be streamed: {error}") from error
