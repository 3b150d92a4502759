"""Batches cut from a stream: where they begin, and that a pass over held-out text covers it once."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from l3paper.data.batches import require_length, training_batch, validation_batches


def test_training_targets_follow_their_inputs():
    inputs, targets = training_batch(np.arange(100, dtype=np.uint16), 32, 10, seed=0, step=0)
    assert inputs.shape == targets.shape == (32, 10)
    assert inputs.dtype == targets.dtype == torch.long
    assert torch.equal(targets, inputs + 1)
    assert torch.equal(inputs, inputs[:, :1] + torch.arange(10))


def test_training_batch_depends_on_seed_and_step_alone():
    stream = np.arange(1000)

    def batch(seed, step):
        return training_batch(stream, 8, 5, seed, step)[0]

    first = batch(3, 7)
    np.random.default_rng(0).random()
    torch.manual_seed(5)
    assert torch.equal(first, batch(3, 7))
    assert not torch.equal(first, batch(4, 7))
    assert not torch.equal(first, batch(3, 8))
    assert not torch.equal(first, batch(7, 3))


def test_training_reaches_both_ends_of_the_stream():
    inputs, targets = training_batch(np.arange(12), 64, 10, seed=0, step=0)
    assert (inputs.min(), targets.max()) == (0, 11)


def test_training_takes_a_stream_of_exactly_one_window():
    inputs, _ = training_batch(np.arange(11), 3, 10, seed=0, step=0)
    assert torch.equal(inputs, torch.arange(10).expand(3, 10))


def test_training_refuses_a_stream_too_short():
    with pytest.raises(ValueError, match="training text has 10 tokens; sequence_len = 10 needs 11"):
        training_batch(np.arange(10), 3, 10, seed=0, step=0)
    with pytest.raises(ValueError, match="held-out text has 10 tokens"):
        require_length(np.arange(10), 10, "held-out text")


@given(length=st.integers(2, 90), batch_size=st.integers(1, 5), sequence_len=st.integers(1, 12))
def test_validation_covers_every_target_once(length, batch_size, sequence_len):
    stream = np.arange(length, dtype=np.uint16)
    batches = list(validation_batches(stream, batch_size, sequence_len))
    inputs, targets = (torch.cat(part) for part in zip(*batches, strict=True))
    real = targets >= 0
    assert torch.equal(targets[real], torch.arange(1, length))
    assert torch.equal(inputs[real], torch.arange(length - 1))
    assert (targets[~real] == -1).all()
    assert (~real).sum() < batch_size * sequence_len
    assert all(part.shape == (batch_size, sequence_len) for batch in batches for part in batch)
