"""Tokens out: a corpus as two streams of ids, in a cache or in a file to take elsewhere."""

import hashlib
import sys
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import Tokenizer

from l3paper import files
from l3paper.data.sources import TRAIN, VALIDATION, fingerprint, open_source
from l3paper.data.split import plan_split
from l3paper.data.tokenizer import (
    END_OF_TEXT_ID,
    encode_documents,
    parse_tokenizer,
    token_bytes,
    train_tokenizer,
)

_FORMAT = 3  # of the cache, and of the split; a higher number leaves older files unused


@dataclass(frozen=True, eq=False)
class TokenizedCorpus:
    """A corpus after tokenizing. `train` and `validation` are id streams, shape (tokens,).

    Corpora of the same text and tokenizer are equal.
    """

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

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TokenizedCorpus):
            return NotImplemented
        return (self.sha256, self.tokenizer_sha256) == (other.sha256, other.tokenizer_sha256)

    def __hash__(self) -> int:
        return hash((self.sha256, self.tokenizer_sha256))

    @cached_property
    def token_bytes(self) -> np.ndarray:
        """Bytes of text behind every token, shape (vocab_size,)."""
        return token_bytes(self.tokenizer)

    @cached_property
    def token_counts(self) -> np.ndarray:
        """How often each token occurs in `train`, shape (vocab_size,)."""
        return np.bincount(self.train, minlength=self.vocab_size)

    def unigram_entropy(self) -> float:
        """Nats per token of the training stream if only the token frequencies are known."""
        share = self.token_counts[self.token_counts > 0] / len(self.train)
        return float(-(share * np.log(share)).sum())

    def documents(self) -> list[np.ndarray]:
        """The training stream cut into documents, each beginning with its end-of-text token."""
        return np.split(self.train, np.flatnonzero(self.train == END_OF_TEXT_ID)[1:])


def load_corpus(
    source: str = "stdlib",
    vocab_size: int = 4096,
    data_bytes: int | None = None,
    cache: Path | None = None,
    tokenizer: Tokenizer | None = None,
) -> TokenizedCorpus:
    """Read `source` (see `open_source`), and split and tokenize it or take that from the cache.

    The tokenizer is trained on the training documents, if none is given. The result is kept in a file
    of `cache` (by default `files.cache_folder()`) whose name hashes all that it depends on. A file that
    is damaged is reported on stderr and made again; so are files of a folder that are left out. The
    text is read several times, and never held whole, unless it is a stream.

    A source that ends in .npz has been tokenized, see `pack_corpus`, and must have this vocabulary
    and, if one is given, this tokenizer. Raises what `open_source`, `plan_split` and `train_tokenizer`
    raise, and ValueError for an .npz file that cannot be used.
    """
    if source.endswith(".npz"):
        if data_bytes is not None:
            raise ValueError(
                f"data_bytes is {data_bytes}, but {Path(source).name} is tokenized: leave it out"
            )
        corpus = _unpack(Path(source), vocab_size)
        if tokenizer and corpus.tokenizer.to_str() != tokenizer.to_str():
            raise ValueError(
                f"data is {source!r}, which was tokenized by another tokenizer than that of the model "
                "to start from; give the text itself, or a file that this tokenizer made"
            )
        return corpus
    documents = open_source(source, data_bytes)
    if documents.left_out:
        print(documents.left_out, file=sys.stderr)
    sha256 = fingerprint(documents)
    version = tokenizers.__version__  # another one may train another tokenizer
    depends = [_FORMAT, version, sha256, vocab_size, *([tokenizer.to_str()] if tokenizer else [])]
    key = hashlib.sha256(" ".join(map(str, depends)).encode()).hexdigest()[:24]
    path = (cache or files.cache_folder()) / f"{key}.npz"
    # A second process that needs this text waits for the first, and finds its result.
    with nullcontext() if path.exists() else files.locked(path.parent):
        if path.exists():
            try:
                return replace(_unpack(path, vocab_size), name=documents.name)
            except ValueError as error:
                print(f"the cache is not usable ({error}): making it again", file=sys.stderr)
        split = plan_split(documents)
        if split.by_name:
            print("held out: the documents whose file names say so", file=sys.stderr)
        tokenizer = tokenizer or train_tokenizer(split.texts(documents, TRAIN), vocab_size)
        streams = (
            encode_documents(tokenizer, split.texts(documents, side)) for side in (TRAIN, VALIDATION)
        )
        corpus = TokenizedCorpus(documents.name, sha256, tokenizer, *streams)
        pack_corpus(corpus, path)
        return corpus


def pack_corpus(corpus: TokenizedCorpus, path: Path) -> None:
    """Write the tokenizer and both streams into one .npz file: whole, or not at all."""
    with files.atomic_write(path, "wb") as file:
        np.savez(
            file,
            train=corpus.train,
            validation=corpus.validation,
            tokenizer=np.frombuffer(corpus.tokenizer.to_str().encode(), np.uint8),
            name=corpus.name,
            sha256=corpus.sha256,
        )


def _unpack(path: Path, vocab_size: int) -> TokenizedCorpus:
    try:
        with np.load(path, allow_pickle=False) as file:
            text = file["tokenizer"].tobytes().decode()
            train, validation = streams = file["train"], file["validation"]
            name, sha256 = str(file["name"]), str(file["sha256"])
    except Exception as error:  # a damaged file can raise nearly anything
        raise ValueError(f"{path.name} is not a valid tokenized corpus: {error}") from error
    corpus = TokenizedCorpus(name, sha256, parse_tokenizer(text, path.name), train, validation)
    for stream in streams:
        if stream.ndim != 1 or stream.dtype.kind != "u" or np.any(stream >= corpus.vocab_size):
            raise ValueError(f"{path.name} is not a valid tokenized corpus: ids without a token")
        if len(stream) < 2:
            raise ValueError(f"{path.name} is not a valid tokenized corpus: a stream without text")
    if corpus.vocab_size != vocab_size:
        raise ValueError(
            f"vocab_size is {vocab_size}, but {path.name} is tokenized with {corpus.vocab_size}"
        )
    return corpus
