"""The token cache, and batches cut from a stream."""

import math
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from l3paper.data import streams as data
from l3paper.data.corpus import read_documents, split_documents
from l3paper.data.streams import (
    TokenizedCorpus,
    load_corpus,
    main,
    pack_corpus,
    training_batch,
    validation_batches,
)
from l3paper.data.tokenizer import train_tokenizer

CACHE_FILES = ["tokenizer.json", "train.npy", "validation.npy", "sums.json"]


def same(one, other):
    return (
        one.tokenizer.to_str() == other.tokenizer.to_str()
        and np.array_equal(one.train, other.train)
        and np.array_equal(one.validation, other.validation)
    )


def stop(*arguments):
    raise KeyboardInterrupt


@pytest.fixture(scope="module")
def pristine(text_file, tmp_path_factory):
    """(a cache that holds woods.txt, what loading it gave)."""
    cache = tmp_path_factory.mktemp("pristine")
    return cache, load_corpus(str(text_file), 300, cache=cache)


@pytest.fixture
def cache(pristine, tmp_path):
    """A copy of the pristine cache, to be damaged."""
    return shutil.copytree(pristine[0], tmp_path / "cache")


@pytest.fixture
def load(text_file, cache):
    return lambda: load_corpus(str(text_file), 300, cache=cache)


@pytest.fixture
def no_training(monkeypatch):
    """From here on only the cache can answer."""
    return lambda: monkeypatch.setattr(data, "train_tokenizer", stop)


def test_corpus_holds_the_documents_of_its_source(pristine, text_file):
    corpus = pristine[1]
    train, validation = split_documents(read_documents(str(text_file)))
    decode = corpus.tokenizer.decode_batch
    assert decode([ids.tolist() for ids in corpus.documents()]) == [d.text for d in train]
    assert corpus.tokenizer.decode(corpus.validation.tolist()) == "".join(d.text for d in validation)
    assert corpus.name == "woods.txt"
    assert corpus.vocab_size == 300
    assert corpus.token_bytes[corpus.train].sum() == sum(len(d.text.encode()) for d in train)
    assert np.array_equal(np.repeat(np.arange(300), corpus.token_counts), np.sort(corpus.train))


def test_tokenizer_knows_only_the_training_documents(pristine, text_file):
    train, _ = split_documents(read_documents(str(text_file)))
    assert pristine[1].tokenizer.to_str() == train_tokenizer([d.text for d in train], 300).to_str()


def test_first_build_is_silent(text_file, tmp_path, capsys):
    load_corpus(str(text_file), 300, cache=tmp_path / "not there yet")
    assert capsys.readouterr() == ("", "")


def test_cache_answers_without_training(pristine, load, no_training, capsys):
    no_training()
    assert same(load(), pristine[1])
    assert capsys.readouterr() == ("", "")


def test_cache_serves_the_same_text_at_another_place(pristine, text_file, tmp_path, cache, no_training):
    no_training()
    moved = shutil.copy(text_file, tmp_path)
    assert same(load_corpus(str(moved), 300, cache=cache), pristine[1])


@pytest.mark.parametrize("change", [dict(vocab_size=299), dict(max_bytes=5000)], ids=str)
def test_cache_keeps_other_settings_apart(pristine, text_file, cache, change):
    arguments = dict(source=str(text_file), vocab_size=300) | change
    assert not same(load_corpus(cache=cache, **arguments), pristine[1])
    assert len(list(cache.iterdir())) == 2


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def put_something_else(path):
    path.write_bytes(b"[1, 2]" if path.suffix == ".json" else b"\x93NUMPY not really")


def put_no_text(path):
    path.write_bytes(b"\xff\xfe")


def remove(path):
    path.unlink()


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, put_something_else, put_no_text, remove])
@pytest.mark.parametrize("name", CACHE_FILES)
def test_damaged_cache_is_reported_and_built_anew(
    pristine, cache, load, no_training, capsys, name, damage
):
    [folder] = cache.iterdir()
    damage(folder / name)
    assert same(load(), pristine[1])
    assert f"cache {folder.name} is not usable" in capsys.readouterr().err
    assert [path.name for path in cache.iterdir()] == [folder.name]
    no_training()
    assert same(load(), pristine[1])


def test_plain_file_in_the_place_of_a_cache_folder_is_replaced(pristine, cache, load, capsys):
    [folder] = cache.iterdir()
    shutil.rmtree(folder)
    folder.write_text("not a folder")
    assert same(load(), pristine[1])
    assert "is not usable" in capsys.readouterr().err
    assert list(cache.iterdir()) == [folder]


def test_interrupted_build_leaves_nothing(text_file, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "encode_documents", stop)
    with pytest.raises(KeyboardInterrupt):
        load_corpus(str(text_file), 300, cache=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_environment_places_the_cache(text_file, tmp_path, monkeypatch):
    monkeypatch.setenv("L3_CACHE", str(tmp_path / "here"))
    load_corpus(str(text_file), 300)
    [folder] = (tmp_path / "here").iterdir()
    assert sorted(path.name for path in folder.iterdir()) == sorted(CACHE_FILES)


def test_unigram_entropy_of_a_known_text(pristine):
    stream = np.array([0, 0, 1, 2], np.uint16)  # shares 1/2, 1/4, 1/4: one and a half bits
    corpus = TokenizedCorpus("four", "", pristine[1].tokenizer, stream, stream)
    assert corpus.unigram_entropy() == pytest.approx(1.5 * math.log(2))


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
    with pytest.raises(ValueError, match="has 10 tokens; sequence_len = 10 needs 11 or more"):
        training_batch(np.arange(10), 3, 10, seed=0, step=0)


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


# A corpus in one file


@pytest.fixture
def packed(pristine, tmp_path):
    path = tmp_path / "woods.npz"
    pack_corpus(pristine[1], path)
    return path


def test_packed_corpus_is_the_corpus(pristine, packed):
    found, expected = load_corpus(str(packed), 300), pristine[1]
    assert same(found, expected)
    assert (found.name, found.sha256) == (expected.name, expected.sha256)
    assert found.train.dtype == expected.train.dtype
    text = "a text with <|endoftext|> in it"
    assert found.tokenizer.encode(text).ids == expected.tokenizer.encode(text).ids
    assert packed.stat().st_size < expected.train.nbytes


def test_command_line_packs(text_file, tmp_path, pristine, capsys):
    assert main([str(text_file), str(tmp_path / "a.npz"), "--vocab-size", "300"]) == 0
    assert f"{len(pristine[1].train):,} training and" in capsys.readouterr().out
    assert same(load_corpus(str(tmp_path / "a.npz"), 300), pristine[1])


@pytest.mark.parametrize(
    ("flags", "message"),
    [(["a.npy"], "must end in .npz"), (["a.npz", "--vocab-size", "9"], "vocab_size is 9")],
)
def test_bad_flags_pack_nothing(text_file, tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    assert main([str(text_file), *flags]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def rewritten(path, **changes):
    with np.load(path) as file:
        arrays = dict(file) | changes
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: path.write_bytes(b"nothing"), "no tokenized corpus"),
        (lambda path: path.write_bytes(path.read_bytes()[:-300]), "no tokenized corpus"),
        (lambda path: path.unlink(), "is not there"),
        (lambda path: rewritten(path, train=None), "no tokenized corpus: .*train"),
        (lambda path: rewritten(path, train=np.array([300], np.uint16)), "not of its tokens"),
        (lambda path: rewritten(path, train=np.array([-1])), "not of its tokens"),
        (lambda path: rewritten(path, train=np.array([[1]], np.uint16)), "not of its tokens"),
        (lambda path: rewritten(path, train=np.array([{}])), "no tokenized corpus"),
        (lambda path: rewritten(path, tokenizer=np.arange(9, dtype=np.uint8)), "not a valid tokenizer"),
        (lambda path: rewritten(path, tokenizer=np.array([255], np.uint8)), "no tokenized corpus"),
    ],
)
def test_unusable_packed_corpus(packed, change, message):
    change(packed)
    with pytest.raises(ValueError, match=message):
        load_corpus(str(packed), 300)


def test_packed_corpus_has_its_own_vocabulary_and_length(packed):
    with pytest.raises(ValueError, match=r"vocab_size is 301, but woods\.npz is tokenized with 300"):
        load_corpus(str(packed), 301)
    with pytest.raises(ValueError, match=r"data_bytes is 5, but woods\.npz is tokenized"):
        load_corpus(str(packed), 300, max_bytes=5)
