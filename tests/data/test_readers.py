"""Files: every format gives the same documents, and what cannot be read is named."""

import bz2
import gzip
import io
import json
import lzma
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from l3paper.data.readers import SEPARATOR, read_text, read_texts


def txt(texts):
    return f"\n{SEPARATOR}\n".join(texts).encode()


def jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def parquet(columns):
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


def zstd(content):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as file:
        file.write(content)
    return sink.getvalue().to_pybytes()


COMPRESSIONS = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstd,
}


def read(folder, name, content, **limit):
    path = folder / name
    path.write_bytes(content)
    return list(read_texts(path, name, **limit))


TEXTS = st.lists(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=50).filter(
        lambda text: (
            not text.startswith("\ufeff")
            and all(line.strip() != SEPARATOR for line in text.encode().decode().split("\n"))
        )
    ),
    min_size=1,
    max_size=5,
)


@settings(max_examples=60)
@given(TEXTS)
def test_every_format_gives_the_same_documents(tmp_path_factory, texts):
    folder = tmp_path_factory.getbasetemp()
    for ending, compress in COMPRESSIONS.items():
        rows = jsonl({"text": text, "title": "-"} for text in texts)
        assert read(folder, "a.jsonl" + ending, compress(rows)) == texts
        # The line end before a separator is the document's, since it must have one.
        lines = [text + "\n" for text in texts[:-1]] + texts[-1:]
        assert read(folder, "A.TXT" + ending.upper(), compress(txt(texts))) == lines
    columns = {"title": ["-"] * len(texts), "text": texts}
    assert read(folder, "a.Parquet", parquet(columns)) == texts


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("one\n<|endoftext|>\ntwo\n", ["one\n", "two\n"]),
        ("one\n  <|endoftext|> \r\ntwo", ["one\n", "two"]),
        ("<|endoftext|>\none\n<|endoftext|>\n<|endoftext|>\n", ["", "one\n", "", ""]),
        ("\ufeff<|endoftext|>\none \ufeff\n", ["", "one \ufeff\n"]),
        ("\ufeffone", ["one"]),
        ("one <|endoftext|> two\n", ["one <|endoftext|> two\n"]),
        ("windows\r\nlines\r\n", ["windows\r\nlines\r\n"]),
    ],
    ids=["divides", "spaces", "empty", "mark", "mark before text", "inside a line", "line ends stay"],
)
def test_txt_is_divided_at_separator_lines(tmp_path, content, expected):
    assert read(tmp_path, "a.txt", content.encode()) == expected


def test_rows_may_lack_a_text_and_jsonl_may_begin_with_a_mark(tmp_path):
    assert read(tmp_path, "a.jsonl", b'\xef\xbb\xbf{"text": "x"}\n\n{"text": null}') == ["x", ""]
    assert read(tmp_path, "a.parquet", parquet({"text": ["x", None]})) == ["x", ""]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
def test_one_rule_for_long_documents(tmp_path, name):
    write = {"txt": txt, "jsonl": lambda texts: jsonl({"text": text} for text in texts)}
    write["parquet"] = lambda texts: parquet({"text": texts})
    for text in ("x" * 99, "x\n" * 49 + "x"):
        content = write[name.partition(".")[2]]([text])
        assert read(tmp_path, name, content, limit=200) == [text]
        with pytest.raises(ValueError, match=rf"{name}, (line|row) \d+: .* 98 characters"):
            read(tmp_path, name, content, limit=98)


BAD_UTF8 = pa.array([b"fine", b"caf\xe9"]).view(pa.string())
ROW = r"a.jsonl, line 1: .* string 'text'"
TRUNCATED = "cannot be read: .*"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"one\n<|endoftext|>\ntwo\ncaf\xe9", "a.txt, line 4: not UTF-8 text"),
        ("a.txt", b"one\ntwo\0", "a.txt, line 2: a NUL byte"),
        ("a.jsonl", b'{"text": "caf\xe9"}', "a.jsonl, line 1: not UTF-8 text"),
        ("a.jsonl", b'{"text": "\\ud800"}', "a.jsonl, line 1: not UTF-8 text"),
        ("a.jsonl", b'{"text": "x"}\n\n{"text": \n', "a.jsonl, line 3: not a JSON object"),
        ("a.jsonl", b'{"body": "x"}\n', ROW),
        ("a.jsonl", b'["text"]\n', ROW),
        ("a.jsonl", b'{"text": 3}\n', "a.jsonl, line 1: 'text' is '3', not a string"),
        ("a.parquet", parquet({"text": [1, 2]}), "a.parquet, row 1: 'text' is '1', not a string"),
        ("a.parquet", parquet({"text": BAD_UTF8}), "a.parquet, row 2: not UTF-8 text"),
        ("a.parquet", b"version https://git-lfs", "a.parquet, after row 0: not a readable .parquet"),
        ("a.parquet", parquet({"body": ["x"]}), "a.parquet, which has no column 'text'"),
        ("a.txt.gz", gzip.compress(b"one", mtime=0)[:-9], "a.txt.gz cannot be read: "),
        ("a.txt.gz", b"plain", "a.txt.gz cannot be read: "),
        ("a.txt.bz2", bz2.compress(b"one")[:-9], "a.txt.bz2 cannot be read: "),
        ("a.jsonl.xz", lzma.compress(b"one")[:-9], "a.jsonl.xz cannot be read: "),
        ("a.jsonl.zst", zstd(b"one")[:-3], "a.jsonl.zst cannot be read: "),
    ],
)
def test_bad_file_is_refused(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, name, content)


def test_a_small_file_that_holds_much_text_is_read_in_little_memory(tmp_path):
    texts = ["the same old story\n" * 500_000] * 40  # 380 MB
    content = parquet({"text": texts})
    assert len(content) < 2**20
    (tmp_path / "a.parquet").write_bytes(content)
    pool, before = pa.default_memory_pool(), pa.total_allocated_bytes()
    held = [pool.bytes_allocated() - before for _ in read_texts(tmp_path / "a.parquet", "a")]
    assert len(held) == 40
    assert max(held) < 2**28


def test_missing_package_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for name in ("a.parquet", "a.txt.zst"):
        with pytest.raises(ImportError, match=r"the extra l3paper\[parquet\]: pip install pyarrow"):
            read(tmp_path, name, b"")


def test_whole_text_of_a_file(tmp_path):
    (tmp_path / "a").write_bytes(b"\xef\xbb\xbfone\r\n<|endoftext|>\n")
    assert read_text(tmp_path / "a") == "one\r\n<|endoftext|>\n"
    (tmp_path / "a").write_bytes(b"one\n\xff")
    with pytest.raises(ValueError, match="a is not UTF-8 text"):
        read_text(tmp_path / "a")
