"""Tokens out: a corpus as two cached streams of ids, and batches cut from them.

`python -m l3paper.data TEXT FILE.npz` tokenizes a text once, to take it to a machine that trains.
"""

import argparse
import hashlib
import json
import lzma
import sys
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import tokenizers
import torch
from tokenizers import Tokenizer
from torch import Tensor

from l3paper import files
from l3paper.data.corpus import fingerprint, read_documents, split_documents
from l3paper.data.tokenizer import (
    END_OF_TEXT_ID,
    encode_documents,
    load_tokenizer,
    parse_tokenizer,
    token_bytes,
    train_tokenizer,
)

_FORMAT = 2  # of the cache; a higher number leaves older folders unused
_STREAMS = ("train", "validation")


@dataclass(frozen=True)
class TokenizedCorpus:
    """A corpus after tokenizing. `train` and `validation` are id streams, shape (tokens,)."""

    name: str
    sha256: str
    tokenizer: Tokenizer
    train: np.ndarray
    validation: np.ndarray

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.get_vocab_size()

    @cached_property
    def tokenizer_sha256(self) -> str:
        return hashlib.sha256(self.tokenizer.to_str().encode()).hexdigest()

    @cached_property
    def token_bytes(self) -> np.ndarray:
        """Bytes of text behind every token, shape (vocab_size,)."""
        return token_bytes(self.tokenizer)

    @cached_property
    def token_counts(self) -> np.ndarray:
        """How often each token occurs in `train`, shape (vocab_size,)."""
        return np.bincount(self.train, minlength=self.vocab_size)

    def unigram_entropy(self) -> float:
        """Nats a token of the training stream when only token frequencies are known."""
        share = self.token_counts[self.token_counts > 0] / len(self.train)
        return float(-(share * np.log(share)).sum())

    def documents(self) -> list[np.ndarray]:
        """The training stream cut into documents, each beginning with its end-of-text token."""
        return np.split(self.train, np.flatnonzero(self.train == END_OF_TEXT_ID)[1:])


def load_corpus(
    source: str = "stdlib",
    vocab_size: int = 4096,
    max_bytes: int | None = None,
    cache: Path | None = None,
) -> TokenizedCorpus:
    """Read `source` (see `read_documents`), and split and tokenize it or take that from the cache.

    The tokenizer is trained on the training documents. It and the two streams are kept in a folder
    of `cache` (by default `files.cache_folder()`) whose name hashes all that went in. A folder that
    is damaged or was made by something else is reported on stderr and built anew.

    A source that ends in .npz has been tokenized, see `pack_corpus`, and must have this vocabulary.
    Raises what `read_documents`, `split_documents` and `train_tokenizer` raise, and ValueError for
    an .npz file that cannot be used.
    """
    if source.endswith(".npz"):
        return _unpack(Path(source), vocab_size, max_bytes)
    documents = read_documents(source, max_bytes)
    sha256 = fingerprint(documents)
    version = tokenizers.__version__  # another one may train another tokenizer
    key = hashlib.sha256(f"{_FORMAT} {version} {sha256} {vocab_size}".encode()).hexdigest()[:24]
    folder = (cache or files.cache_folder()) / key
    name = corpus_name(source)
    with files.locked(folder.parent):  # a second process waits for the first, and finds its result
        if folder.exists():
            try:
                return _load(folder, name, sha256)
            except (ValueError, OSError) as error:
                print(f"cache {folder.name} is not usable ({error}): building it anew", file=sys.stderr)
        train, validation = split_documents(documents)
        tokenizer = train_tokenizer((d.text for d in train), vocab_size)
        with files.atomic_folder(folder) as new:
            (new / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
            for stream, part in zip(_STREAMS, (train, validation), strict=True):
                np.save(new / f"{stream}.npy", encode_documents(tokenizer, [d.text for d in part]))
            sums = {path.name: files.sha256(path) for path in sorted(new.iterdir())} | {"key": key}
            (new / "sums.json").write_text(json.dumps(sums))
        return _load(folder, name, sha256)


def pack_corpus(corpus: TokenizedCorpus, path: Path) -> None:
    """Write the tokenizer and both streams, compressed, into one .npz file: whole, or not at all."""
    with files.atomic_write(path, "wb") as file:
        np.savez_compressed(
            file,
            **{stream: getattr(corpus, stream) for stream in _STREAMS},
            tokenizer=np.frombuffer(corpus.tokenizer.to_str().encode(), np.uint8),
            name=corpus.name,
            sha256=corpus.sha256,
        )


def _unpack(path: Path, vocab_size: int, max_bytes: int | None) -> TokenizedCorpus:
    if max_bytes is not None:
        raise ValueError(f"data_bytes is {max_bytes}, but {path.name} is tokenized: leave it out")
    try:
        with np.load(path, allow_pickle=False) as file:
            text = file["tokenizer"].tobytes().decode()
            name, sha256, *streams = (file[part] for part in ("name", "sha256", *_STREAMS))
    except FileNotFoundError:
        raise ValueError(f"data is {str(path)!r}, which is not there") from None
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        OSError,
        EOFError,
        RuntimeError,
        BadZipFile,
        zlib.error,
        lzma.LZMAError,
    ) as error:
        raise ValueError(f"{path.name} is no tokenized corpus: {error}") from None
    corpus = TokenizedCorpus(str(name), str(sha256), parse_tokenizer(text, path.name), *streams)
    for stream in streams:
        if stream.ndim != 1 or stream.dtype.kind != "u" or np.any(stream >= corpus.vocab_size):
            raise ValueError(f"{path.name} is no tokenized corpus: its streams are not of its tokens")
        if len(stream) < 2:
            raise ValueError(f"{path.name} is no tokenized corpus: it has a stream without text")
    if corpus.vocab_size != vocab_size:
        raise ValueError(
            f"vocab_size is {vocab_size}, but {path.name} is tokenized with {corpus.vocab_size}"
        )
    return corpus


def corpus_name(source: str) -> str:
    """What records call a source: a file or folder without the way to it."""
    return source if source == "stdlib" or source.startswith("hf:") else Path(source).name


def _load(folder: Path, name: str, sha256: str) -> TokenizedCorpus:
    sums = json.loads((folder / "sums.json").read_text())
    if not isinstance(sums, dict) or sums.get("key") != folder.name:
        raise ValueError("sums.json is not of this folder")
    for file in ("tokenizer.json", *(f"{stream}.npy" for stream in _STREAMS)):
        if files.sha256(folder / file) != sums.get(file):
            raise ValueError(f"{file} is damaged")
    streams = [np.load(folder / f"{stream}.npy", mmap_mode="r") for stream in _STREAMS]
    return TokenizedCorpus(name, sha256, load_tokenizer(folder / "tokenizer.json"), *streams)


def training_batch(
    stream: np.ndarray, batch_size: int, sequence_len: int, seed: int, step: int
) -> tuple[Tensor, Tensor]:
    """Inputs and targets, each (batch_size, sequence_len) long, from random places of `stream`.

    The places depend on (seed, step) alone, so a run can go on from any step.
    Raises ValueError for a stream too short to hold one sequence and its last target.
    """
    starts = batch_starts(stream, batch_size, sequence_len, seed, step)
    windows = stream[starts[:, None] + np.arange(sequence_len + 1)].astype(np.int64)
    batch = torch.from_numpy(windows)
    return batch[:, :-1], batch[:, 1:]


def batch_starts(
    stream: np.ndarray, batch_size: int, sequence_len: int, seed: int, step: int
) -> np.ndarray:
    """Where the sequences of `training_batch` begin, shape (batch_size,)."""
    require_length(stream, sequence_len)
    return np.random.default_rng([seed, step]).integers(len(stream) - sequence_len, size=batch_size)


def documents_at(stream: np.ndarray, starts: np.ndarray, length: int) -> list[int]:
    """The documents, counted from 0, that the windows of `length` tokens at `starts` touch."""
    begins = np.flatnonzero(stream == END_OF_TEXT_ID)
    first, last = (np.searchsorted(begins, at, "right") - 1 for at in (starts, starts + length - 1))
    return sorted({i for a, b in zip(first, last, strict=True) for i in range(a, b + 1)})


def require_length(stream: np.ndarray, sequence_len: int) -> None:
    """Raise ValueError unless `stream` holds one sequence and its last target."""
    if len(stream) <= sequence_len:
        raise ValueError(
            f"the text has {len(stream)} tokens; sequence_len = {sequence_len} needs "
            f"{sequence_len + 1} or more"
        )


def validation_batches(
    stream: np.ndarray, batch_size: int, sequence_len: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Every token of `stream` but the first as a target exactly once; -1 fills up the last batch.

    All batches have one shape, so that a compiled model need not compile once more for the last.
    """
    targets_left = len(stream) - 1
    rows = -(-targets_left // (batch_size * sequence_len)) * batch_size
    padded = np.zeros(rows * sequence_len + 1, np.int64)
    padded[: len(stream)] = stream
    inputs = torch.from_numpy(padded[:-1].reshape(rows, sequence_len))
    padded_targets = padded[1:].copy()
    padded_targets[targets_left:] = -1
    targets = torch.from_numpy(padded_targets.reshape(rows, sequence_len))
    yield from zip(inputs.split(batch_size), targets.split(batch_size), strict=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; exit code 2, and one line on stderr, for input that cannot be used."""
    parser = argparse.ArgumentParser(
        prog="python -m l3paper.data",
        description="Tokenize a text once, into one file that --data takes wherever it is taken.",
    )
    parser.add_argument("data", help="as --data of l3paper.train")
    parser.add_argument("file", type=Path, help="to write; its name must end in .npz")
    parser.add_argument("--vocab-size", type=int, default=16384, metavar="N", help="(default: 16384)")
    parser.add_argument("--data-bytes", type=int, metavar="N", help="as of l3paper.train")
    given = parser.parse_args(arguments)
    try:
        if given.file.suffix != ".npz":
            raise ValueError(f"file is {str(given.file)!r}; its name must end in .npz")
        files.require_writable(given.file)
        corpus = load_corpus(given.data, given.vocab_size, given.data_bytes)
        pack_corpus(corpus, given.file)
    except (ValueError, ImportError, OSError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    print(
        f"{len(corpus.train):,} training and {len(corpus.validation):,} held-out tokens: {given.file}"
    )
    return 0
