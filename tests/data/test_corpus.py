"""Documents: every kind of source, what goes wrong with it, and the split by name."""

import io
import json
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from l3paper.data.corpus import Document, fingerprint, read_documents, split_documents

TEXTS = ["first\nstory\n", "zweite Geschichte: süß", "第三"]

documents_of = st.lists(st.builds(Document, st.text(max_size=8), st.text(max_size=8)), min_size=2)
HUNDRED = [Document(f"file{i}.txt#0", f"text {i}") for i in range(100)]
VALIDATING = [f"file{i}.txt#0" for i in (91, 19, 3, 8, 18, 4)]
"""Those of them whose names have the smallest hashes: the same everywhere."""


def jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def parquet(columns):
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


def texts(source, max_bytes=None):
    return [document.text for document in read_documents(str(source), max_bytes)]


SOURCES = {
    "a.txt": "\n<|endoftext|>\n".join(TEXTS).encode(),
    "b.jsonl": jsonl({"text": text, "title": "-"} for text in TEXTS),
    "c.parquet": parquet({"title": ["-"] * 3, "text": TEXTS}),
}


@pytest.fixture
def folder(tmp_path):
    for name, content in SOURCES.items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


@pytest.mark.parametrize("name", ["b.jsonl", "c.parquet"])
def test_file_gives_its_documents(folder, name):
    assert read_documents(str(folder / name)) == [(f"{name}#{i}", text) for i, text in enumerate(TEXTS)]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("one\n<|endoftext|>\ntwo\n", ["one\n", "two\n"]),
        ("one\n  <|endoftext|> \r\ntwo", ["one\n", "two"]),
        ("<|endoftext|>\none\n<|endoftext|>\n<|endoftext|>\n", ["one\n"]),
        ("one <|endoftext|> two\n", ["one <|endoftext|> two\n"]),
        ("windows\r\nlines\r\n", ["windows\r\nlines\r\n"]),
    ],
    ids=["divides", "with spaces", "empty documents go", "inside a line it is text", "line ends stay"],
)
def test_txt_is_divided_at_separator_lines(tmp_path, content, expected):
    (tmp_path / "a.txt").write_bytes(content.encode())
    assert texts(tmp_path / "a.txt") == expected


def test_folder_gives_its_files_in_order_of_their_names(folder):
    (folder / "sub").mkdir()
    (folder / "sub" / "d.txt").write_text("fourth")
    (folder / "ignored.md").write_text("never read")
    names = [document.name for document in read_documents(str(folder))]
    assert names == [f"{file}#{i}" for file in SOURCES for i in range(3)] + ["sub/d.txt#0"]


def test_empty_and_missing_texts_are_left_out(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\n{"text": ""}\n\n{"text": "x"}\n')
    (tmp_path / "b.parquet").write_bytes(parquet({"text": ["", None, "y"]}))
    assert texts(tmp_path) == ["x", "y"]


@pytest.fixture(scope="module")
def offline(tmp_path_factory):
    """Before `datasets` is imported: no network, and a cache of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_DATASETS_OFFLINE", "1")
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hub")))
        yield


@pytest.mark.parametrize("name", ["b.jsonl", "c.parquet"])
def test_hub_streams_a_dataset(offline, tmp_path, name):
    (tmp_path / name).write_bytes(SOURCES[name])
    source = f"hf:{tmp_path}"
    assert texts(source, 10_000) == TEXTS
    assert texts(source, 14) == [TEXTS[0], "zw"]


@pytest.mark.parametrize(
    "rows", [[{"body": "no text"}], [{"text": 3}]], ids=["no column text", "text is a number"]
)
def test_hub_dataset_without_text_is_refused(offline, tmp_path, rows):
    (tmp_path / "a.jsonl").write_bytes(jsonl(rows))
    with pytest.raises(ValueError, match="text"):
        read_documents(f"hf:{tmp_path}", 100)


@pytest.mark.parametrize("name", ["", "nobody/nothing"])
def test_unknown_hub_dataset_is_refused(offline, name):
    with pytest.raises(ValueError, match=f"dataset '{name}'"):
        read_documents(f"hf:{name}", 100)


@pytest.mark.parametrize(
    ("module", "source", "extra"),
    [("pyarrow", "c.parquet", "parquet"), ("datasets", "hf:some/set", "hf")],
)
def test_missing_package_names_the_extra(folder, monkeypatch, module, source, extra):
    monkeypatch.chdir(folder)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"the extra l3paper\[{extra}\]: pip install {module}"):
        read_documents(source, 100)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.md", b"text", r"'a.md' must end in one of .txt, .jsonl, .parquet"),
        ("a.txt", b"caf\xe9", "a.txt, line 1: not UTF-8 text"),
        ("a.txt", b"", "holds no text"),
        ("a.txt", b"<|endoftext|>\n", "holds no text"),
        ("a.txt", b"one\ntwo\0", "a.txt, line 2: a NUL byte"),
        ("a.jsonl", b'{"text": "caf\xe9"}', "a.jsonl, line 1: not UTF-8 text"),
        ("a.jsonl", b'{"text": "x"}\n\n{"text": \n', "a.jsonl, line 3: no JSON object"),
        ("a.jsonl", b'{"body": "x"}\n', "a.jsonl, line 1: .* string 'text'"),
        ("a.jsonl", b'{"text": 3}\n', "a.jsonl, line 1: .* string 'text'"),
        ("a.jsonl", b'["text"]\n', "a.jsonl, line 1: .* string 'text'"),
        ("a.parquet", b"PAR1 no more", "'a.parquet' has no readable column 'text'"),
        ("a.parquet", parquet({"body": ["x"]}), "'a.parquet' has no readable column 'text'"),
        ("a.parquet", parquet({"text": [1, 2]}), "'a.parquet' has no readable column 'text'"),
        ("a.parquet", parquet({"text": [""]}), "holds no text"),
    ],
)
def test_bad_file_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_documents(str(tmp_path / name))


def test_missing_path_and_empty_folder_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere' is no file or folder, nor 'stdlib' or 'hf:NAME'"):
        read_documents(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"' has no file .txt or .jsonl or .parquet"):
        read_documents(str(tmp_path))


def test_max_bytes_is_checked():
    with pytest.raises(ValueError, match="max_bytes is 0; it must be at least 1"):
        read_documents("stdlib", 0)
    with pytest.raises(ValueError, match="max_bytes is needed with 'hf:some/set'"):
        read_documents("hf:some/set")


@given(full=st.lists(st.text(min_size=1, max_size=6), min_size=1, max_size=5), limit=st.integers(1, 60))
@example(full=["aé", "b"], limit=2)
@example(full=["a", "é"], limit=2)
def test_max_bytes_cuts_between_characters(tmp_path_factory, full, limit):
    path = tmp_path_factory.getbasetemp() / "cut.jsonl"
    path.write_bytes(jsonl({"text": text} for text in full))
    assume(len(full[0][0].encode()) <= limit)
    cut = texts(path, limit)
    whole, kept = "".join(full), "".join(cut)
    rest = whole[len(kept) :]
    assert all(cut), "a document lost all of its text and stayed"
    assert whole.startswith(kept)
    assert len(kept.encode()) <= limit
    assert not rest or len((kept + rest[0]).encode()) > limit


def test_max_bytes_below_the_first_character_leaves_no_text(tmp_path):
    (tmp_path / "a.txt").write_text("é")
    with pytest.raises(ValueError, match="holds no text"):
        read_documents(str(tmp_path / "a.txt"), 1)


def test_standard_library_is_large_fixed_and_without_tests():
    documents = read_documents()
    assert len(documents) > 300
    assert len({document.name for document in documents}) == len(documents)
    assert fingerprint(documents) == fingerprint(read_documents("stdlib"))
    folders = {part for document in documents for part in document.name.split("/")[:-1]}
    assert {"json", "asyncio"} <= folders
    assert not folders & {"test", "tests", "idle_test", "site-packages", "dist-packages"}
    assert "pydoc_data/topics.py" not in {document.name for document in documents}


@given(one=documents_of, other=documents_of)
@example(one=[Document("a", "bc")], other=[Document("ab", "c")])
@example(one=[Document("a", ""), Document("b", "")], other=[Document("a", "b"), Document("", "")])
def test_fingerprints_are_equal_exactly_for_equal_documents(one, other):
    assert (fingerprint(one) == fingerprint(other)) == (one == other)


def pieces(documents):
    """(name, text) of every document, those that were cut put together again."""
    whole = [d for d in documents if not d.name.endswith(" (end)")]
    ends = [(d.name.removesuffix(" (end)"), d.text) for d in documents if d not in whole]
    for name, end in ends:
        place = next(i for i, d in enumerate(whole) if d.name == name)
        whole[place] = Document(name, whole[place].text + end)
    return sorted(whole)


@given(
    st.lists(st.builds(Document, st.uuids().map(str), st.text(min_size=50, max_size=5000)), min_size=1)
)
@example([Document("book", "no line end")])
@example([Document("book", "".join(f"line {i:02}\n" for i in range(100)))])
@example([Document(str(i), "text " * 3**i) for i in range(10)])
@example([Document("a", "1" * 1000), Document("b", "2" * 1000)])
def test_split_holds_out_a_twentieth_of_the_text_and_loses_nothing(documents):
    train, validation = split_documents(documents)
    assert pieces(train + validation) == sorted(documents)
    total = sum(len(d.text) for d in documents)
    held_out = sum(len(d.text) for d in validation)
    assert 0.04 * total - 1 <= held_out <= 0.06 * total + 1
    assert train
    assert validation


def test_split_depends_on_names_alone_and_not_on_their_order():
    sides = [{d.name for d in side} for side in split_documents(HUNDRED)]
    assert [{d.name for d in side} for side in split_documents(HUNDRED[::-1])] == sides
    assert sides[1] == set(VALIDATING)


def test_a_long_document_is_cut_at_a_line_end():
    [train], [validation] = split_documents([Document("book", "ten bytes\n" * 100)])
    assert train.text == "ten bytes\n" * 95
    assert validation == Document("book (end)", "ten bytes\n" * 5)


def test_a_text_too_short_to_divide_is_refused():
    with pytest.raises(ValueError, match="the text has 2 characters; that is too short"):
        split_documents([Document("a", "1"), Document("b", "2")])


def test_the_first_bytes_of_the_standard_library_are_a_sample_of_all_of_it():
    documents = read_documents("stdlib", 800_000)
    initials = [document.name[0] for document in documents]
    assert max(initials.count(letter) for letter in set(initials)) < len(initials) / 2
    assert documents[:-1] == read_documents()[: len(documents) - 1]


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
    assert [document.name for document in read_documents()] == ["written.py"]
