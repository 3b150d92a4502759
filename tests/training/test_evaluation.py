"""Losses on held-out text: of all of it, of its documents, and of a sample."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from l3paper import GPT
from l3paper.data.batches import validation_batches
from l3paper.data.sources import VALIDATION, open_source
from l3paper.data.split import plan_split
from l3paper.data.tokenizer import END_OF_TEXT_ID
from l3paper.training.evaluation import evaluate

EVERY = pytest.mark.parametrize("kind", ["dense", "l3 tied", "l3 untied"])


@EVERY
def test_evaluation_equals_cross_entropy_of_the_logits(run_of, text_file, kind):
    model, corpus = run_of(kind).model, run_of(kind).corpus
    stream = torch.from_numpy(corpus.validation.astype(np.int64))
    nats = 0.0
    with torch.no_grad():
        for start in range(0, len(stream) - 1, 16):
            window = stream[start : start + 17]
            nats += F.cross_entropy(model(window[None, :-1])[0], window[1:], reduction="sum").item()
    documents = open_source(str(text_file))
    held_out = "".join(plan_split(documents).texts(documents, VALIDATION))
    text_bytes = len(held_out.encode())
    last = run_of(kind).record["evaluations"][-1]
    assert last["loss"] == pytest.approx(nats / (len(stream) - 1), rel=1e-5)
    assert last["bits_per_byte"] == pytest.approx(nats / math.log(2) / text_bytes, rel=1e-5)
    again = evaluate(model, corpus.validation, batch_size=3)
    assert again.loss == pytest.approx(last["loss"], rel=1e-5)
    assert again.bits_per_byte(corpus.token_bytes) == pytest.approx(last["bits_per_byte"], rel=1e-5)


@EVERY
def test_documents_have_their_own_losses(run_of, kind):
    model, corpus = run_of(kind).model, run_of(kind).corpus
    last = run_of(kind).record["evaluations"][-1]
    tokens, nats = last["documents"]["tokens"], last["documents"]["nats"]
    begins = np.flatnonzero(corpus.validation == END_OF_TEXT_ID)
    assert tokens == np.diff([1, *begins[1:], len(corpus.validation)]).tolist()
    assert sum(nats) / sum(tokens) == pytest.approx(last["loss"], rel=1e-4)
    stream = torch.from_numpy(corpus.validation.astype(np.int64))
    losses = []
    with torch.no_grad():
        for start in range(0, len(stream) - 1, 16):
            window = stream[start : start + 17]
            losses += F.cross_entropy(
                model(window[None, :-1])[0], window[1:], reduction="none"
            ).tolist()
    assert nats[0] == pytest.approx(sum(losses[: begins[1] - 1]), abs=0.01)  # losses[i]: stream[i + 1]


@EVERY
def test_the_last_step_is_evaluated_on_the_sample_and_on_everything(run_of, kind):
    sample, everything = run_of(kind).record["evaluations"][-2:]
    assert sample["step"] == everything["step"]
    assert (sample["everything"], everything["everything"]) == (False, True)


@pytest.fixture
def evaluated(run_of, monkeypatch):
    """The numbers of the batches of 2 x 16 tokens that an evaluation takes, and how many there are."""
    model, corpus = run_of("dense").model, run_of("dense").corpus
    every = [idx for idx, _ in validation_batches(corpus.validation, 2, 16)]

    def call(max_tokens):
        taken = []

        def token_losses(_, idx, targets):
            taken.append(idx)
            return torch.ones(idx.shape)

        monkeypatch.setattr(GPT, "token_losses", token_losses)
        evaluate(model, corpus.validation, 2, max_tokens)
        return [next(i for i, idx in enumerate(every) if idx.equal(one)) for one in taken], len(every)

    return call


@pytest.mark.parametrize("max_tokens", [None, 10**9])
def test_evaluation_takes_everything_without_a_lower_limit(evaluated, max_tokens):
    taken, count = evaluated(max_tokens)
    assert taken == list(range(count))


@pytest.mark.parametrize("wanted", [1, 2, 5, 12])
def test_evaluation_of_a_sample_is_spread_over_the_text(evaluated, wanted):
    taken, count = evaluated(32 * wanted)
    assert len(taken) == wanted
    assert np.diff([*taken, count]).max() <= 2 * count / wanted
