"""A tokenized corpus: from a source, from the cache, and in a file of its own."""

import math
import os
import shutil
import signal

import numpy as np
import pytest

from helpers import flip
from l3paper.data.__main__ import main
from l3paper.data.sources import TRAIN, VALIDATION, open_source
from l3paper.data.split import plan_split
from l3paper.data.streams import TokenizedCorpus, load_corpus, pack_corpus
from l3paper.data.tokenizer import train_tokenizer


def same(one, other):
    return (
        one.tokenizer.to_str() == other.tokenizer.to_str()
        and np.array_equal(one.train, other.train)
        and np.array_equal(one.validation, other.validation)
    )


def texts_of(path):
    """(the training texts, the held-out ones) of a file."""
    documents = open_source(str(path))
    split = plan_split(documents)
    return [list(split.texts(documents, side)) for side in (TRAIN, VALIDATION)]


@pytest.fixture(scope="module")
def pristine(text_file, tmp_path_factory):
    """(a cache that holds woods.txt, what loading it gave)."""
    cache = tmp_path_factory.mktemp("pristine")
    return cache, load_corpus(str(text_file), 300, cache=cache)


@pytest.fixture
def cache(pristine, tmp_path):
    """A copy of the pristine cache, to be damaged."""
    return shutil.copytree(pristine[0], tmp_path / "cache")


def test_corpus_holds_the_documents_of_its_source(pristine, text_file):
    corpus = pristine[1]
    train, validation = texts_of(text_file)
    decode = corpus.tokenizer.decode_batch
    assert decode([ids.tolist() for ids in corpus.documents()]) == train
    assert corpus.tokenizer.decode(corpus.validation.tolist()) == "".join(validation)
    assert corpus.name == "woods.txt"
    assert corpus.vocab_size == 300
    assert corpus.token_bytes[corpus.train].sum() == len("".join(train).encode())
    assert np.array_equal(np.repeat(np.arange(300), corpus.token_counts), np.sort(corpus.train))


def test_tokenizer_knows_only_the_training_documents(pristine, text_file):
    train, _ = texts_of(text_file)
    assert pristine[1].tokenizer.to_str() == train_tokenizer(train, 300).to_str()


def test_first_build_is_silent(text_file, tmp_path, capsys):
    load_corpus(str(text_file), 300, cache=tmp_path / "not there yet")
    assert capsys.readouterr() == ("", "")


def test_cache_answers_for_the_same_text_wherever_it_is(pristine, text_file, tmp_path, cache, capsys):
    [file] = cache.iterdir()
    written = file.stat()
    moved = shutil.copy(text_file, tmp_path)
    corpus = load_corpus(str(moved), 300, cache=cache)
    assert same(corpus, pristine[1])
    assert corpus.tokenizer.encode("<|endoftext|>").ids != [0]
    assert capsys.readouterr() == ("", "")
    assert list(cache.iterdir()) == [file]
    # Not the whole of `stat`: reading a file may change the time of its last access.
    assert (file.stat().st_ino, file.stat().st_mtime_ns) == (written.st_ino, written.st_mtime_ns)


@pytest.mark.parametrize("change", [dict(vocab_size=299), dict(data_bytes=5000)], ids=str)
def test_cache_keeps_other_settings_apart(pristine, text_file, cache, change):
    arguments = dict(source=str(text_file), vocab_size=300) | change
    assert not same(load_corpus(cache=cache, **arguments), pristine[1])
    assert len(list(cache.iterdir())) == 2


@pytest.mark.parametrize(
    "damage",
    [
        flip,
        lambda path: os.truncate(path, 999),
        lambda path: path.write_bytes(b"\x93NUMPY not really"),
        lambda path: path.write_bytes(b""),
    ],
    ids=["flipped", "cut", "something else", "empty"],
)
def test_damaged_cache_is_reported_and_made_again(pristine, text_file, cache, capsys, damage):
    [file] = cache.iterdir()
    damage(file)
    assert same(load_corpus(str(text_file), 300, cache=cache), pristine[1])
    assert f"the cache is not usable ({file.name} is not a valid" in capsys.readouterr().err
    assert same(load_corpus(str(text_file), 300, cache=cache), pristine[1])
    assert capsys.readouterr().err == ""
    assert list(cache.iterdir()) == [file]


def test_a_text_that_cannot_be_read_to_its_end_leaves_nothing(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n' * 30 + "{")
    with pytest.raises(ValueError, match="line 31"):
        load_corpus(str(path), 300, cache=tmp_path / "cache")
    assert not list(tmp_path.rglob("*.npz"))


def test_a_full_disk_names_the_cache_and_leaves_nothing(text_file, tmp_path):
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(OSError, match=rf"{tmp_path}.*\.npz"):
            load_corpus(str(text_file), 300, cache=tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert list(tmp_path.iterdir()) == []


def test_environment_places_the_cache(text_file, tmp_path, monkeypatch):
    monkeypatch.setenv("L3_CACHE", str(tmp_path / "here"))
    load_corpus(str(text_file), 300)
    [file] = (tmp_path / "here").iterdir()
    assert file.suffix == ".npz"


def test_what_a_folder_leaves_out_is_told_once(text_file, tmp_path, capsys):
    shutil.copy(text_file, tmp_path / "woods.txt")
    (tmp_path / "test.txt").write_text("not to be read")
    load_corpus(str(tmp_path), 300)
    assert capsys.readouterr().err == f"data folder {str(tmp_path)!r}: left out 1 test files\n"


def test_named_sides_are_the_streams(text_file, tmp_path):
    shutil.copy(text_file, tmp_path / "train.txt")
    (tmp_path / "val.txt").write_text("hazelbark hazelleaf\n")
    corpus = load_corpus(str(tmp_path), 300)
    assert corpus.tokenizer.decode(corpus.validation.tolist()) == "hazelbark hazelleaf\n"
    assert len(corpus.documents()) == 40


def test_unigram_entropy_of_a_known_text(pristine):
    stream = np.array([0, 0, 1, 2], np.uint16)  # shares 1/2, 1/4, 1/4: one and a half bits
    corpus = TokenizedCorpus("four", "", pristine[1].tokenizer, stream, stream)
    assert corpus.unigram_entropy() == pytest.approx(1.5 * math.log(2))


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


def test_command_line_packs(text_file, tmp_path, pristine, capsys):
    assert main([str(text_file), str(tmp_path / "a.npz"), "--vocab-size", "300"]) == 0
    assert f"{len(pristine[1].train):,} training and" in capsys.readouterr().out
    assert same(load_corpus(str(tmp_path / "a.npz"), 300), pristine[1])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "must end in .npz"),
        (["a.npy"], "must end in .npz"),
        (["a.npz", "--vocab-size", "9"], "vocab_size is 9"),
    ],
)
def test_bad_flags_pack_nothing(text_file, tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    assert main([str(text_file), *flags]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_command_line_describes(text_file, tmp_path, capsys):
    shutil.copy(text_file, tmp_path / "a.txt")
    (tmp_path / "b.csv").touch()
    assert main(["--describe", str(tmp_path)]) == 0
    said, errors = capsys.readouterr()
    assert errors == ""
    assert said.startswith(f"{tmp_path.name}: 40 documents, ")
    assert "left out 1 .csv files" in said
    assert "held out: 2 documents, " in said
    assert "near copies of other documents: 0, " in said
    assert main(["--describe", str(tmp_path / "b.csv")]) == 2


def rewritten(path, **changes):
    with np.load(path) as file:
        arrays = dict(file) | changes
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: path.write_bytes(b"nothing"), "not a valid tokenized corpus"),
        (lambda path: path.write_bytes(path.read_bytes()[:-300]), "not a valid tokenized corpus"),
        (lambda path: path.unlink(), "No such file"),
        (lambda path: rewritten(path, train=None), "not a valid tokenized corpus: .*train"),
        (lambda path: rewritten(path, train=np.array([300], np.uint16)), "ids without a token"),
        (lambda path: rewritten(path, train=np.array([-1])), "ids without a token"),
        (lambda path: rewritten(path, train=np.array([[1]], np.uint16)), "ids without a token"),
        (lambda path: rewritten(path, train=np.array([{}])), "not a valid tokenized corpus"),
        (lambda path: rewritten(path, tokenizer=np.arange(9, dtype=np.uint8)), "not a valid tokenizer"),
        (
            lambda path: rewritten(path, tokenizer=np.array([255], np.uint8)),
            "not a valid tokenized corpus",
        ),
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
        load_corpus(str(packed), 300, data_bytes=5)
