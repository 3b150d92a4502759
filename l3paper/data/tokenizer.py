"""Byte-level BPE: text to token ids and back, without ever meeting an unknown character."""

import json
import re
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice, takewhile
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"
"""The one special token. It has id 0 and stands before every document."""

END_OF_TEXT_ID = 0
MIN_VOCAB_SIZE = 257
"""256 bytes and the special token."""

_PIECE = re.compile(r"(?s:.{1,8192})(?:(?<=\S)(?=[ \t\r\n])|\Z)|(?s:.{8192})")
"""Long texts are trained on and encoded in pieces, so that memory stays small and a signal is heard.

A piece ends before white space, where no token can cross. Only a word of 8,192 characters is cut:
training takes the square of a word's length, and would never end with one of a megabyte.
"""


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE of exactly `vocab_size` tokens.

    Raises ValueError for a vocabulary below 257, or above what the texts support.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(f"vocab_size is {vocab_size}; the 256 bytes and one special token need 257")
    tokenizer = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # The library asks for texts in threads of its own, and signals wait until it returns. So another
    # thread calls it; when a signal ends this one's wait, the texts end, and soon the training.
    stopped = threading.Event()
    pieces = takewhile(lambda _: not stopped.is_set(), (p for text in texts for p in _pieces(text)))
    with ThreadPoolExecutor(1) as thread:
        training = thread.submit(tokenizer.train_from_iterator, pieces, trainer)
        try:
            training.result()
        finally:
            stopped.set()
    if tokenizer.get_vocab_size() < vocab_size:
        raise ValueError(
            f"vocab_size is {vocab_size}, but this text supports only {tokenizer.get_vocab_size()}"
        )
    return tokenizer


def load_tokenizer(path: Path) -> Tokenizer:
    """Read a serialized tokenizer. Raises ValueError, mentioning the file, if it is invalid."""
    return parse_tokenizer(path.read_text(encoding="utf-8"), path.name)


def parse_tokenizer(text: str | bytes, name: str) -> Tokenizer:
    """Parse what `Tokenizer.to_str` returns for a tokenizer that `train_tokenizer` made.

    Raises ValueError, mentioning `name`, for anything else. Only the vocabulary and the merges are
    taken from the text: the rest of a tokenizer's file (padding, normalizers, patterns) could fill the
    memory or take forever.
    """
    try:
        return _rebuild(json.loads(text))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is not a valid tokenizer: {error}") from error


def _rebuild(written: object) -> Tokenizer:
    """Make the tokenizer from its vocabulary and merges, and compare the rest with `written`."""
    match written:
        case {"model": {"vocab": dict(vocab), "merges": list(merges)}}:
            pass
        case _:
            raise ValueError("it has no vocabulary or no merges")
    if not all(type(i) is int for i in vocab.values()) or {*vocab.values()} != {*range(len(vocab))}:
        raise ValueError("its ids have gaps")
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    if vocab.get(END_OF_TEXT) != END_OF_TEXT_ID or not vocab.keys() >= alphabet >= set("".join(vocab)):
        raise ValueError(f"its vocabulary is not made of the 256 bytes and {END_OF_TEXT}")
    for merge in merges:
        match merge:
            case [str(left), str(right)] if {left, right, left + right} <= vocab.keys():
                pass
            case _:
                raise ValueError(
                    f"it merges {merge!r:.80}, which is not a pair of tokens that make one"
                )
    tokenizer = _byte_level(models.BPE(vocab, [tuple(merge) for merge in merges]))
    tokenizer.add_special_tokens([END_OF_TEXT])
    own, parts = json.loads(tokenizer.to_str()), written | written["model"]
    for part, expected in (own | own.pop("model")).items():
        if (parts.get(part) or None) != (expected or None):  # an absent part is an empty one
            raise ValueError(f"its {part} is not that of a byte-level BPE of this package")
    tokenizer.encode_special_tokens = True  # not part of the file; the special token's words are text
    return tokenizer


def _byte_level(model: models.BPE) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def encode_documents(tokenizer: Tokenizer, texts: Iterable[str]) -> np.ndarray:
    """Encode texts as one stream of ids, shape (tokens,), uint16 or uint32, each behind an END_OF_TEXT.

    The words of the special token, if a text contains them, are encoded as plain text.
    """
    dtype = np.uint16 if tokenizer.get_vocab_size() <= 2**16 else np.uint32
    tokenizer.encode_special_tokens = True
    stream = [np.empty(0, dtype)]
    pieces = (piece for text in texts for piece in enumerate(_pieces(text)))
    while batch := list(islice(pieces, 256)):  # encodings are far larger than their ids
        encodings = tokenizer.encode_batch_fast([text for _, text in batch], add_special_tokens=False)
        ids = []
        for (number, _), encoding in zip(batch, encodings, strict=True):
            ids += encoding.ids if number else [END_OF_TEXT_ID, *encoding.ids]
        stream.append(np.array(ids, dtype))
    return np.concatenate(stream)


def _pieces(text: str) -> list[str]:
    return _PIECE.findall(text) or [""]


def token_bytes(tokenizer: Tokenizer) -> np.ndarray:
    """How many bytes of text each token stands for, shape (vocab_size,), int64; END_OF_TEXT: 0."""
    tokens = [tokenizer.id_to_token(i) for i in range(tokenizer.get_vocab_size())]
    lengths = np.array([len(token) for token in tokens])  # one character of this alphabet is a byte
    lengths[END_OF_TEXT_ID] = 0
    return lengths


def token_text(tokenizer: Tokenizer, token_id: int) -> str:
    """A token as a reader should see it: its text, with white space made visible."""
    text = END_OF_TEXT if token_id == END_OF_TEXT_ID else tokenizer.decode([token_id])
    return text.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥")
