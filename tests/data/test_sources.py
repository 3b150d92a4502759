"""Documents: every kind of source, and what is left out of a folder."""

import json
import os
import sys

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from l3paper.data.sources import Document, fingerprint, list_folder, open_source

documents_of = st.lists(st.builds(Document, st.text(max_size=8), st.text(max_size=8)), min_size=2)


def read(source="stdlib", data_bytes=None):
    """All documents of a source."""
    return list(open_source(str(source), data_bytes))


def fill(folder, *names):
    """Write files that hold their own names."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"text": name}) if ".jsonl" in name else name)


def names_of(folder):
    return [document.name.removesuffix("#0") for document in read(folder)]


def test_folder_gives_its_files_in_order_of_their_names(tmp_path):
    fill(tmp_path, "b.jsonl", "a.txt", "sub/d.TXT", "c.txt")
    (tmp_path / "c.txt").write_text("one\n<|endoftext|>\n<|endoftext|>\ntwo")
    assert read(tmp_path) == [
        ("a.txt#0", "a.txt"),
        ("b.jsonl#0", "b.jsonl"),
        ("c.txt#0", "one\n"),
        ("c.txt#2", "two"),
        ("sub/d.TXT#0", "sub/d.TXT"),
    ]


def test_a_folder_says_what_it_leaves_out(tmp_path):
    fill(tmp_path, "a.txt", "notes.md", "b.csv", "c.csv", "LICENSE", "test.txt", "sub/x.test.jsonl")
    (tmp_path / "sub" / "again").symlink_to(tmp_path)
    names, told = list_folder(tmp_path)
    assert names == ["a.txt"]
    parts = sorted(told.partition(": left out ")[2].split(", "))
    assert parts == [
        "1 .md files",
        "1 linked folders",
        "1 other files",
        "2 .csv files",
        "2 test files",
    ]


def test_hidden_names_are_skipped_and_not_mentioned(tmp_path):
    fill(tmp_path, "a.txt", "._a.txt", ".ipynb_checkpoints/a-checkpoint.txt")
    (tmp_path / "._a.txt").write_bytes(b"\0\xff")
    assert names_of(tmp_path) == ["a.txt"]
    assert open_source(str(tmp_path)).left_out == ""


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["train.txt", "val.txt", "LICENSE.txt"], ["train.txt", "val.txt"]),
        (["train.txt", "book.txt"], ["book.txt", "train.txt"]),
        (["dev.txt", "zoo.txt"], ["zoo.txt", "dev.txt"]),
        (["train/a.txt", "validation/a.txt", "test/train.txt", "train/test.txt"], None),
    ],
    ids=["both sides", "one side", "the other", "a file's own name decides"],
)
def test_names_choose_and_order_the_files(tmp_path, names, expected):
    fill(tmp_path, *names)
    assert names_of(tmp_path) == (expected or ["test/train.txt", "train/a.txt", "validation/a.txt"])


def test_a_file_that_is_named_by_itself_is_read(tmp_path):
    fill(tmp_path, "test.txt")
    assert names_of(tmp_path / "test.txt") == ["test.txt"]
    with pytest.raises(ValueError, match=r"has no file to train on. .*left out 1 test files"):
        open_source(str(tmp_path))


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_names_that_are_not_utf8(tmp_path):
    (tmp_path / os.fsdecode(b"caf\xe9.txt")).write_text("text")
    documents = read(tmp_path)
    assert documents == [(r"caf\xe9.txt#0", "text")]
    assert len(fingerprint(documents)) == 64
    assert open_source(str(tmp_path / os.fsdecode(b"caf\xe9.txt"))).name == r"caf\xe9.txt"


def test_what_cannot_be_opened_is_named(tmp_path):
    (tmp_path / "a.txt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"a\.txt cannot be read: it is not a regular file"):
        read(tmp_path)


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may read everything")
def test_unreadable_folder_is_named(tmp_path):
    fill(tmp_path, "a.txt", "closed/b.txt")
    (tmp_path / "closed").chmod(0)
    with pytest.raises(ValueError, match=r"a folder of the data cannot be read: .*closed"):
        open_source(str(tmp_path))


@pytest.fixture(scope="module")
def offline(tmp_path_factory):
    """Before `datasets` is imported: no network, and a cache of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_DATASETS_OFFLINE", "1")
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hub")))
        yield


def test_hub_streams_a_dataset(offline, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "first"}\n{"text": null}\n{"text": "zweite"}\n')
    name = f"hf:{tmp_path}"
    assert [text for _, text in read(name, 10_000)] == ["first", "zweite"]
    assert [text for _, text in read(name, 7)] == ["first", "zw"]


@pytest.mark.parametrize("row", ['{"body": "no text"}', '{"text": 3}'])
def test_hub_dataset_without_text_is_refused(offline, tmp_path, row):
    (tmp_path / "a.jsonl").write_text(row)
    with pytest.raises(ValueError, match="text"):
        read(f"hf:{tmp_path}", 100)


@pytest.mark.parametrize("name", ["", "nobody/nothing"])
def test_unknown_hub_dataset_is_refused(offline, name):
    with pytest.raises(ValueError, match=f"dataset '{name}'"):
        read(f"hf:{name}", 100)


def test_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"the extra l3paper\[hf\]: pip install datasets"):
        read("hf:some/set", 100)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "data is '': not a file or folder, nor 'stdlib' or 'hf:NAME'"),
        ("nowhere", "data is 'nowhere': not a file or folder"),
        ("a.md", r"'a.md' must end in .txt or .jsonl \(or .gz"),
        ("empty.txt", "'empty.txt' holds no text"),
        ("folder", "'folder' has no file to train on. .*left out 1 .doc files"),
    ],
)
def test_unusable_source_is_refused(tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    fill(tmp_path, "a.md", "folder/a.doc")
    (tmp_path / "empty.txt").write_text("<|endoftext|>\n")
    with pytest.raises(ValueError, match=message):
        read(name)


def test_data_bytes_is_checked():
    with pytest.raises(ValueError, match="data_bytes is 0; it must be at least 1"):
        read("stdlib", 0)
    with pytest.raises(ValueError, match="data_bytes is needed with 'hf:some/set'"):
        read("hf:some/set")


@given(full=st.lists(st.text(min_size=1, max_size=6), min_size=1, max_size=5), limit=st.integers(1, 60))
@example(full=["aé", "b"], limit=2)
@example(full=["a", "é"], limit=2)
def test_data_bytes_cuts_between_characters(tmp_path_factory, full, limit):
    path = tmp_path_factory.getbasetemp() / "cut.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in full))
    assume(len(full[0][0].encode()) <= limit)
    cut = [text for _, text in read(path, limit)]
    whole, kept = "".join(full), "".join(cut)
    rest = whole[len(kept) :]
    assert all(cut), "a document lost all of its text and stayed"
    assert whole.startswith(kept)
    assert len(kept.encode()) <= limit
    assert not rest or len((kept + rest[0]).encode()) > limit


def test_data_bytes_below_the_first_character_leaves_no_text(tmp_path):
    (tmp_path / "a.txt").write_text("é", encoding="utf-8")
    with pytest.raises(ValueError, match="holds no text"):
        read(tmp_path / "a.txt", 1)


def test_standard_library_is_large_fixed_and_without_tests():
    documents = read()
    assert len(documents) > 300
    assert len({document.name for document in documents}) == len(documents)
    assert fingerprint(documents) == fingerprint(open_source("stdlib"))
    folders = {part for document in documents for part in document.name.split("/")[:-1]}
    assert {"json", "asyncio"} <= folders
    assert not folders & {"test", "tests", "idle_test", "site-packages", "dist-packages"}
    assert "pydoc_data/topics.py" not in {document.name for document in documents}


def test_the_first_bytes_of_the_standard_library_are_a_sample_of_all_of_it():
    documents = read("stdlib", 800_000)
    initials = [document.name[0] for document in documents]
    assert max(initials.count(letter) for letter in set(initials)) < len(initials) / 2
    assert documents[:-1] == read()[: len(documents) - 1]


def test_generated_files_are_left_out(tmp_path, monkeypatch):
    (tmp_path / "config-3").mkdir()
    for name, text in {
        "_sysconfigdata__linux.py": "# system configuration generated and used by sysconfig\n",
        "tables.py": '"""Codec.\n\nAuto-Generated from a table."""\n',
        "config-3/python-config.py": "x = 1\n",
        "written.py": "a = 1\n" * 9 + "# generated\n",
    }.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path))
    assert [document.name for document in read()] == ["written.py"]


@given(one=documents_of, other=documents_of)
@example(one=[Document("a", "bc")], other=[Document("ab", "c")])
@example(one=[Document("a", ""), Document("b", "")], other=[Document("a", "b"), Document("", "")])
def test_fingerprints_are_equal_exactly_for_equal_documents(one, other):
    assert (fingerprint(one) == fingerprint(other)) == (one == other)
