"""Batches cut from a stream of ids: at random places for training, all of it for evaluation."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from l3paper.data.tokenizer import END_OF_TEXT_ID


def training_batch(
    stream: np.ndarray, batch_size: int, sequence_len: int, seed: int, step: int
) -> tuple[Tensor, Tensor]:
    """Inputs and targets, each (batch_size, sequence_len) long, from random places of `stream`.

    The places depend on (seed, step) alone, so a run can resume from any step.
    Raises ValueError for a stream too short to hold one sequence and its last target.
    """
    starts = batch_starts(stream, batch_size, sequence_len, seed, step)
    windows = stream[starts[:, None] + np.arange(sequence_len + 1)].astype(np.int64)
    batch = torch.from_numpy(windows)
    return batch[:, :-1], batch[:, 1:]


def batch_starts(
    stream: np.ndarray, batch_size: int, sequence_len: int, seed: int, step: int
) -> np.ndarray:
    """The places where the sequences of `training_batch` begin, shape (batch_size,)."""
    require_length(stream, sequence_len, "training text")
    return np.random.default_rng([seed, step]).integers(len(stream) - sequence_len, size=batch_size)


def documents_at(stream: np.ndarray, starts: np.ndarray, length: int) -> list[int]:
    """The documents, counted from 0, that the windows of `length` tokens at `starts` touch."""
    begins = np.flatnonzero(stream == END_OF_TEXT_ID)
    first, last = (np.searchsorted(begins, at, "right") - 1 for at in (starts, starts + length - 1))
    return sorted({i for a, b in zip(first, last, strict=True) for i in range(a, b + 1)})


def require_length(stream: np.ndarray, sequence_len: int, what: str) -> None:
    """Raise ValueError, naming `what`, unless `stream` holds one sequence and its last target."""
    if len(stream) <= sequence_len:
        raise ValueError(
            f"the {what} has {len(stream)} tokens; sequence_len = {sequence_len} needs "
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
