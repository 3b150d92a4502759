"""Documents: every kind of source, what is left out, and what goes wrong."""

import bz2
import codecs
import gzip
import io
import json
import lzma
import os
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from l3paper.data.readers import read_texts
from l3paper.data.sources import Document, fingerprint, open_source, read_documents

TEXTS = ["first\nstory\n", "zweite Geschichte: süß", "第三"]

documents_of = st.lists(st.builds(Document, st.text(max_size=8), st.text(max_size=8)), min_size=2)


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
        ("a.md", b"text", r"'a.md' must end in .txt or .jsonl"),
        ("a.txt", b"caf\xe9", "a.txt, line 1: not UTF-8 text"),
        ("a.txt", b"", "holds no text"),
        ("a.txt", b"<|endoftext|>\n", "holds no text"),
        ("a.txt", b"one\ntwo\0", "a.txt, line 2: a NUL byte"),
        ("a.jsonl", b'{"text": "caf\xe9"}', "a.jsonl, line 1: not UTF-8 text"),
        ("a.jsonl", b'{"text": "x"}\n\n{"text": \n', "a.jsonl, line 3: not a JSON object"),
        ("a.jsonl", b'{"body": "x"}\n', "a.jsonl, line 1: .* string 'text'"),
        ("a.jsonl", b'{"text": 3}\n', "a.jsonl, line 1: 'text' is '3', not a string"),
        ("a.jsonl", b'["text"]\n', "a.jsonl, line 1: .* string 'text'"),
        ("a.parquet", b"PAR1 no more", "a.parquet, after row 0: not a readable .parquet file"),
        ("a.parquet", parquet({"body": ["x"]}), "a.parquet, which has no column 'text'"),
        ("a.parquet", parquet({"text": [1, 2]}), "a.parquet, row 1: 'text' is '1', not a string"),
        ("a.parquet", parquet({"text": [""]}), "holds no text"),
    ],
)
def test_bad_file_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_documents(str(tmp_path / name))


def test_missing_path_and_empty_folder_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere': not a file or folder, nor 'stdlib' or 'hf:NAME'"):
        read_documents(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"' has no file to train on"):
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


# Files of other people


def compress(name, data):
    if name.endswith(".zst"):
        return pa.compress(data, codec="zstd", asbytes=True)
    kinds = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
    return kinds.get(name[name.rindex(".") :], lambda same: same)(data)


TEXT_OF_A_FILE = st.text(
    st.characters(exclude_characters="\0\r", codec="utf-8"), min_size=1, max_size=40
)


@settings(max_examples=30)
@given(st.lists(TEXT_OF_A_FILE.map(lambda text: text + "\n"), min_size=1, max_size=5), st.booleans())
def test_every_format_gives_the_same_documents(tmp_path_factory, documents, marked):
    folder = tmp_path_factory.mktemp("formats")
    assume(all("<|endoftext|>" not in text and not text.startswith("\ufeff") for text in documents))
    mark = codecs.BOM_UTF8 if marked else b""
    contents = {
        ".txt": mark + "<|endoftext|>\n".join(documents).encode(),
        ".jsonl": mark + jsonl({"text": text} for text in documents),
        ".parquet": parquet({"text": documents}),
    }
    for ending, content in contents.items():
        for compression in ("", ".gz", ".bz2", ".xz", ".zst") if ending != ".parquet" else ("",):
            path = folder / f"A{ending.upper()}{compression}"
            path.write_bytes(compress(path.name.lower(), content))
            assert texts(path) == documents


def test_names_that_begin_with_a_dot_and_other_kinds_are_left_out_and_said(tmp_path):
    for name in ("a.txt", ".ipynb_checkpoints/a.txt", "._a.txt", "b.TXT", "c.pdf", "d.pdf"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"text of {name}")
    (tmp_path / "again").symlink_to(tmp_path)
    source = open_source(str(tmp_path))
    assert [document.name for document in source] == ["a.txt#0", "b.TXT#0"]
    assert source.left_out == (
        f"data folder '{tmp_path}': left out 2 .pdf files, 1 folders linked twice"
    )


def test_linked_folders_are_read_once(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "a.txt").write_text("text")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "link").symlink_to(tmp_path / "there")
    assert texts(tmp_path / "data") == ["text"]


def test_what_cannot_be_opened_is_named(tmp_path):
    (tmp_path / "a.txt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"a\.txt cannot be read"):
        texts(tmp_path)


def test_a_file_name_that_is_not_utf8_is_read_and_named(tmp_path):
    path = os.path.join(os.fsencode(tmp_path), b"caf\xe9.txt")
    with open(path, "wb") as file:
        file.write(b"one\n\xff\n")
    with pytest.raises(ValueError, match=r"caf\\xe9\.txt, line 2: not UTF-8 text"):
        texts(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "where"),
    [
        ("a.parquet", lambda: broken_parquet(), "a.parquet, row 2: not UTF-8"),
        ("a.jsonl", lambda: jsonl([{"text": "x"}, {"text": "y" * 100}]), "a.jsonl, line 2: a document"),
        ("a.parquet", lambda: parquet({"text": ["x", "y" * 100]}), "a.parquet, row 2: a document"),
        ("a.txt", lambda: b"x\n<|endoftext|>\n" + b"y\n" * 50, "a.txt, line 3.*: a document"),
        ("a.txt.gz", lambda: b"\x1f\x8b nothing", "a.txt.gz cannot be read"),
    ],
)
def test_errors_name_file_and_row_and_one_rule_holds_for_long_documents(tmp_path, name, content, where):
    path = tmp_path / name
    path.write_bytes(content())
    with pytest.raises(ValueError, match=where):
        list(read_texts(path, name, limit=60))


def broken_parquet():
    """Its second row is not UTF-8, although its type says so."""
    wrong = pa.array([b"fine", b"caf\xe9"]).view(pa.string())
    buffer = io.BytesIO()
    pq.write_table(pa.table({"text": wrong}), buffer)
    return buffer.getvalue()


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_a_file_that_stands_for_much_more_text_needs_little_memory(tmp_path):
    """60 documents of 2 MB each, 120 MB in all, in a file of a few kB."""
    path = tmp_path / "a.parquet"
    text = "the same line again and again\n" * 70_000
    pq.write_table(pa.table({"text": [f"{i}\n{text}" for i in range(60)]}), path, compression="zstd")
    assert path.stat().st_size < 400_000
    script = (
        "import re, sys; from l3paper.data.split import plan_split; "
        "from l3paper.data.sources import open_source; import pyarrow.parquet; "
        "read = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]); "
        "before = read(); split = plan_split(open_source(sys.argv[1])); print(1024 * (read() - before))"
    )
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True)
    assert "near copies of each other" in done.stderr or int(done.stdout) < 90e6


@pytest.mark.parametrize("given", ["", "nowhere"])
def test_empty_and_missing_sources_are_refused(given):
    with pytest.raises(ValueError, match="not a file or folder, nor 'stdlib' or 'hf:NAME'"):
        read_documents(given)
