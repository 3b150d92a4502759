"""Documents: every kind of source, what goes wrong with it, and the split by name."""

import io
import json
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from l3paper.corpus import Document, fingerprint, read_documents, split_documents

TEXTS = ["first\nstory\n", "zweite Geschichte: süß", "第三"]

documents_of = st.lists(st.builds(Document, st.text(max_size=8), st.text(max_size=8)), min_size=2)
HUNDRED = [Document(f"file{i}.txt#0", f"text {i}") for i in range(100)]
VALIDATING = ["file1.txt#0", "file33.txt#0", "file40.txt#0", "file88.txt#0"]
"""Those of them whose name's SHA-256 begins below a twentieth of its range: the same everywhere."""


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


@given(documents_of)
def test_split_loses_nothing_and_leaves_no_side_empty(documents):
    train, validation = split_documents(documents)
    assert train
    assert validation
    assert sorted(train + validation) == sorted(documents)


def test_split_takes_one_in_twenty_by_hash_alone():
    train, validation = split_documents(HUNDRED)
    assert [document.name for document in validation] == VALIDATING
    assert train == [document for document in HUNDRED if document not in validation]
    thousands = [Document(f"name {i}", "") for i in range(4000)]
    assert 0.04 < len(split_documents(thousands)[1]) / 4000 < 0.06


@given(st.lists(st.builds(Document, st.text(max_size=8), st.just("new")), max_size=20))
def test_split_is_stable_when_documents_are_added(added):
    train, validation = split_documents(HUNDRED)
    larger_train, larger_validation = split_documents(added + HUNDRED)
    assert set(train) <= set(larger_train)
    assert set(validation) <= set(larger_validation)


def test_split_of_few_documents_validates_on_the_smallest_hash():
    few = [document for document in HUNDRED if document.name not in VALIDATING][:4]
    train, validation = split_documents(few)
    assert [document.name for document in validation] == ["file3.txt#0"]
    assert len(train) == 3


@given(st.text(alphabet="ab\né", min_size=2))
@example("".join(f"line {i:02}\n" for i in range(100)))
def test_single_document_is_cut_at_the_last_line_end_before_95_percent(text):
    limit = len(text) * 95 // 100
    assume("\n" in text[:limit])
    [train], [validation] = split_documents([Document("book", text)])
    assert train.text + validation.text == text
    assert train.text.endswith("\n")
    assert len(train.text) <= limit
    assert "\n" not in validation.text[: limit - len(train.text)]
    assert validation.text
    assert train.name != validation.name


def test_single_document_of_one_line_is_refused():
    with pytest.raises(ValueError, match="'book' is the only one and has no line end"):
        split_documents([Document("book", "no line end but the last\n")])
