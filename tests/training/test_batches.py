"""The batches of a run, cut ahead of their step."""

import pytest
import torch

from l3paper.data.batches import batch_starts, documents_at, training_batch
from l3paper.data.streams import load_corpus
from l3paper.training.batches import Batches
from l3paper.training.config import TrainConfig
from l3paper.training.distributed import Group

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def small(text_file):
    return load_corpus(str(text_file), 300)


def config(**changes):
    return TrainConfig(vocab_size=300, sequence_len=16, batch_size=12, **changes)


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("size", [1, 2])
def test_processes_and_passes_share_a_steps_batch(small, accumulate, size):
    whole = training_batch(small.train, 12, 16, seed=5, step=7)
    found = []
    for rank in range(size):
        passes = Batches(config(seed=5, accumulate=accumulate), small, Group(rank, size), CPU).take(7)
        assert len(passes) == accumulate
        assert all(part.shape == (12 // accumulate // size, 16) for pair in passes for part in pair)
        found += passes
    for parts, expected in zip(zip(*found, strict=True), whole, strict=True):
        assert torch.equal(torch.cat(parts), expected)


def test_any_order_of_steps_gives_the_same(small):
    batches = Batches(config(), small, Group(), CPU)
    for step in (0, 1, 2, 9, 4):
        ((inputs, targets),) = batches.take(step)
        expected = training_batch(small.train, 12, 16, 0, step)
        assert torch.equal(inputs, expected[0])
        assert torch.equal(targets, expected[1])


def test_one_batch_again_and_again(small):
    batches = Batches(config(overfit_batch=True), small, Group(), CPU)
    assert torch.equal(batches.take(0)[0][0], batches.take(8)[0][0])


def test_documents_are_those_of_the_step(small):
    batches = Batches(config(), small, Group(), CPU)
    starts = batch_starts(small.train, 12, 16, 0, 3)
    assert batches.documents(3) == documents_at(small.train, starts, 17)
    assert batches.documents(3) != batches.documents(4)
