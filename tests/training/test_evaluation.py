"""Losses on held-out text, and the perplexity per word."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from l3paper import GPT
from l3paper.data.batches import validation_batches
from l3paper.data.sources import VALIDATION, open_source
from l3paper.data.split import plan_split
from l3paper.train import train
from l3paper.training.evaluation import evaluate, word_perplexity

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
    assert evaluate(model, corpus.validation, corpus.token_bytes, batch_size=3) == pytest.approx(
        (last["loss"], last["bits_per_byte"]), rel=1e-5
    )


TEXT = " = Title = \n\n the <unk> model is , by word , compared .\n"


@EVERY
def test_word_perplexity_spreads_all_nats_over_words_and_line_ends(run_of, kind):
    model, corpus = run_of(kind).model, run_of(kind).corpus
    found = word_perplexity(model, corpus, TEXT, batch_size=2)
    ids = torch.tensor([0, *corpus.tokenizer.encode(TEXT).ids])
    nats = 0.0
    with torch.no_grad():
        for start in range(0, len(ids) - 1, 16):
            window = ids[start : start + 17]
            nats += F.cross_entropy(model(window[None, :-1])[0], window[1:], reduction="sum").item()
    assert found["words"] == (3 + 1) + 1 + (10 + 1)
    assert found["tokens"] == len(ids) - 1
    assert found["perplexity"] == pytest.approx(math.exp(nats / found["words"]), rel=1e-4)
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / len(TEXT), rel=1e-5)


def test_a_perplexity_beyond_all_numbers_is_infinite(run_of):
    run = run_of("dense")
    found = word_perplexity(run.model, run.corpus, 600 * "Q", 4)
    assert found["perplexity"] == math.inf


def test_words_are_part_of_the_record(tiny, tmp_path):
    file = tmp_path / "words.txt"
    file.write_text(TEXT)
    record = train(replace(tiny("dense"), words=str(file)), show_progress=False).record
    assert record["config"]["words"] == record["words"]["name"] == "words.txt"
    assert 1 < record["words"]["perplexity"] < math.inf


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "No such file"), (b" \n\n", "holds no words"), (b"\xff", "not UTF-8")],
)
def test_bad_words_are_refused_before_training(refused, tmp_path, content, message):
    file = tmp_path / "words.txt"
    if content is not None:
        file.write_bytes(content)
    code, text = refused("--words", str(file))
    assert (code, message in text) == (2, True)


@pytest.fixture
def evaluated(run_of, monkeypatch):
    """The numbers of the batches of 2 x 16 tokens that an evaluation takes, and how many there are."""
    model, corpus = run_of("dense").model, run_of("dense").corpus
    every = [idx for idx, _ in validation_batches(corpus.validation, 2, 16)]

    def call(max_tokens):
        taken = []
        monkeypatch.setattr(GPT, "forward", lambda _, idx, targets: taken.append(idx) or torch.ones(()))
        evaluate(model, corpus.validation, corpus.token_bytes, 2, max_tokens)
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
