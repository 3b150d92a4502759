"""The byte-level BPE: nothing is lost, nothing is unknown, and training is repeatable."""

import signal
import time
from itertools import repeat

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from l3paper.data import tokenizer as tokenizer_module
from l3paper.data.tokenizer import (
    END_OF_TEXT,
    END_OF_TEXT_ID,
    encode_documents,
    parse_tokenizer,
    token_bytes,
    token_text,
    train_tokenizer,
)

TEXTS = ["the cat and the hat\n", "el niño y la niña\n", "\tthe end, the end <|endoftext|>\n"] * 3


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 280)


unicode_text = given(text=st.text())


@unicode_text
@example(text=f"a {END_OF_TEXT} b{END_OF_TEXT}")
@example(text=" \r\n\t\x00 \u2028é́🙂")
def test_round_trip_is_exact(tokenizer, text):
    ids = encode_documents(tokenizer, [text])
    assert ids[0] == END_OF_TEXT_ID
    assert END_OF_TEXT_ID not in ids[1:]
    assert tokenizer.decode(ids[1:].tolist()) == text


@unicode_text
@example(text=END_OF_TEXT)
def test_token_bytes_add_up_to_the_text(tokenizer, text):
    sizes = token_bytes(tokenizer)
    assert sizes.shape == (280,)
    assert sizes[encode_documents(tokenizer, [text])].sum() == len(text.encode())


def test_documents_follow_each_other_behind_their_marks(tokenizer):
    texts = [f"text {i} the\n" for i in range(150)]  # more than one batch of the encoder
    stream = encode_documents(tokenizer, texts)
    documents = np.split(stream, np.flatnonzero(stream == END_OF_TEXT_ID)[1:])
    assert [tokenizer.decode(ids.tolist()) for ids in documents] == texts


def test_no_documents_make_an_empty_stream(tokenizer):
    assert encode_documents(tokenizer, []).shape == (0,)


@pytest.mark.parametrize("vocab_size", [257, 280])
def test_vocabulary_has_the_size_asked_for(vocab_size):
    assert train_tokenizer(TEXTS, vocab_size).get_vocab_size() == vocab_size


def test_training_merges_what_is_frequent(tokenizer):
    words = [token_text(tokenizer, int(i)) for i in encode_documents(tokenizer, [" the end\n"])]
    assert words == [END_OF_TEXT, "␣the", "␣end", "⏎"]


def test_vocabulary_below_the_bytes_is_refused():
    with pytest.raises(ValueError, match=r"vocab_size is 256; .* need 257"):
        train_tokenizer(TEXTS, 256)


def test_vocabulary_above_what_the_text_supports_is_refused():
    with pytest.raises(ValueError, match=r"vocab_size is 5000, but this text supports only \d+"):
        train_tokenizer(TEXTS, 5000)


def test_a_word_of_megabytes_does_not_hold_training_up():
    letters = np.random.default_rng(0).integers(97, 123, 1_000_000, dtype=np.uint8).tobytes().decode()
    begin = time.perf_counter()
    assert train_tokenizer([letters], 400).get_vocab_size() == 400
    assert time.perf_counter() - begin < 60  # uncut, it takes several minutes


def test_long_texts_have_the_tokens_that_they_have_uncut(tokenizer):
    random = np.random.default_rng(0)
    parts = [
        "the",
        " cat",
        "\n",
        "\n\n",
        "  ",
        "\t",
        "niño",
        " 12",
        "!",
        ".\n    ",
        "\r\n",
        "\u2003",
        "\x1c",
    ]
    text = "".join(random.choice(parts, 30_000))
    assert encode_documents(tokenizer, [text])[1:].tolist() == tokenizer.encode(text).ids


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="Windows has no timers")
def test_a_signal_ends_training_at_once():
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    begin = time.perf_counter()
    try:
        with pytest.raises(KeyboardInterrupt):
            train_tokenizer(repeat("the cat and the hat\n" * 1000), 280)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert time.perf_counter() - begin < 10


def test_what_goes_wrong_with_a_text_ends_training():
    with pytest.raises(ValueError, match="'e'"):
        train_tokenizer((str(int(letter)) for letter in "12e"), 280)


def test_a_written_tokenizer_is_read_as_it_was(tokenizer):
    again = parse_tokenizer(tokenizer.to_str(), "a.json")
    assert again.to_str() == tokenizer.to_str()
    assert np.array_equal(*(encode_documents(each, TEXTS) for each in (again, tokenizer)))


def test_training_is_repeatable(tokenizer):
    assert train_tokenizer(TEXTS, 280).to_str() == train_tokenizer(iter(TEXTS), 280).to_str()


@pytest.mark.parametrize(("vocab_size", "dtype"), [(2**16, np.uint16), (2**16 + 1, np.uint32)])
def test_ids_take_two_bytes_while_they_fit(tokenizer, monkeypatch, vocab_size, dtype):
    class Wide:
        get_vocab_size = staticmethod(lambda: vocab_size)
        encode_batch_fast = staticmethod(tokenizer.encode_batch_fast)

    assert encode_documents(Wide(), ["the"]).dtype == dtype


def test_token_text_shows_white_space(tokenizer):
    assert token_text(tokenizer, END_OF_TEXT_ID) == END_OF_TEXT
    shown = {token_text(tokenizer, i) for i in range(tokenizer_module.MIN_VOCAB_SIZE)}
    assert {"␣", "⏎", "⇥", "a"} <= shown
