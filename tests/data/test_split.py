"""Which side each document is on, and how clean the two sides are."""

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from l3paper.data.__main__ import main
from l3paper.data.sources import Document, open_source, read_documents
from l3paper.data.split import plan_split, split_documents

HUNDRED = [Document(f"file{i}.txt#0", f"text {i}") for i in range(100)]


def pieces(documents):
    """(name, text) of every document, those that were cut put together again."""
    whole = [d for d in documents if not d.name.endswith(" (end)")]
    ends = [(d.name.removesuffix(" (end)"), d.text) for d in documents if d not in whole]
    for name, end in ends:
        place = next(i for i, d in enumerate(whole) if d.name == name)
        whole[place] = Document(name, whole[place].text + end)
    return sorted(whole)


@given(
    st.lists(
        st.builds(Document, st.uuids().map(str), st.text(min_size=50, max_size=5000)),
        min_size=1,
        unique_by=lambda document: document.text.strip(),
    )
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
    assert sides[1] == {f"file{i}.txt#0" for i in (91, 19, 3, 8, 18, 4)}


def test_a_long_document_is_cut_at_a_line_end():
    [train], [validation] = split_documents([Document("book", "ten bytes\n" * 100)])
    assert train.text == "ten bytes\n" * 95
    assert validation == Document("book (end)", "ten bytes\n" * 5)


def test_a_text_too_short_to_divide_is_refused():
    with pytest.raises(ValueError, match="nothing can be held out of 2 documents with 2 characters"):
        split_documents([Document("a", "1"), Document("b", "2")])


FOLDERS = {
    "by name": (["train.txt", "val.txt"], ["val.txt"], []),
    "other words": (
        ["ptb.train.txt", "ptb.valid.txt", "ptb.test.txt"],
        ["ptb.valid.txt"],
        ["ptb.test.txt"],
    ),
    "dev": (["en-train.jsonl", "en-dev.jsonl"], ["en-dev.jsonl"], []),
    "a hub's shards": (
        [
            "data/train-00000-of-00002.txt",
            "data/train-00001-of-00002.txt",
            "data/validation-00000-of-00001.txt",
            "data/test-00000-of-00001.txt",
        ],
        ["data/validation-00000-of-00001.txt"],
        ["data/test-00000-of-00001.txt"],
    ),
    "folders": (
        ["train/a.txt", "validation/a.txt", "test/a.txt"],
        ["validation/a.txt"],
        ["test/a.txt"],
    ),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_files_that_name_their_side_are_on_it(tmp_path, kind):
    names, held_out, neither = FOLDERS[kind]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        text = f"the text of {name} and no other\n"
        content = json.dumps({"text": text}) if name.endswith("jsonl") else text
        (tmp_path / name).write_text(content)
    source = open_source(str(tmp_path))
    train, validation = split_documents(list(source))
    assert [document.name for document in validation] == [f"{name}#0" for name in held_out]
    expected = [name for name in names if name not in held_out + neither]
    assert [document.name for document in train] == [f"{name}#0" for name in expected]
    assert ("test files" in source.left_out) == bool(neither)


def test_with_training_files_alone_a_part_of_them_is_held_out(tmp_path):
    (tmp_path / "train.txt").write_text("".join(f"line {i} of many\n" for i in range(200)))
    train, validation = split_documents(read_documents(str(tmp_path)))
    assert [train[0].name, validation[0].name] == ["train.txt#0", "train.txt#0 (end)"]


def documents_with_copies():
    own = [Document(f"{i}", "".join(f"line {j} of {i} alone\n" for j in range(20))) for i in range(60)]
    return [*own, *(Document(f"{i} again", own[i].text) for i in range(20)), *near_copies(own)]


def near_copies(own):
    """Documents more than half of whose text stands in other documents, too."""
    return [Document(f"{i} edited", own[i].text + f"and more of {i}\n" * 5) for i in range(20, 25)]


def test_copies_and_near_copies_are_never_held_out():
    documents = documents_with_copies()
    _, validation = split_documents(documents)
    names = {document.name.removesuffix(" (end)") for document in validation}
    assert names <= {str(i) for i in range(25, 60)}
    size = sum(len(document.text) for document in validation)
    assert 0.04 < size / sum(len(document.text) for document in documents) < 0.06


def test_a_text_of_copies_alone_is_refused():
    with pytest.raises(ValueError, match=r"nothing can be held out of 9 documents .* near copies"):
        split_documents([Document(str(i), "the same line\n" * 9) for i in range(9)])


def test_the_standard_library_is_divided_cleanly(capsys):
    split = plan_split(open_source())
    held_out = split.sizes - split.kept
    assert 0.04 < held_out.sum() / split.sizes.sum() < 0.06
    assert not held_out[split.near_copies].any()
    assert main(["stdlib", "--describe"]) == 0
    told = capsys.readouterr().out
    assert "held out, by a hash of the documents' names" in told
    assert "0 of them are held out" in told


def test_describe_says_what_is_left_out(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("".join(f"line {i} of many\n" for i in range(200)))
    (tmp_path / "b.doc").write_text("text")
    assert main([str(tmp_path), "--describe"]) == 0
    assert "left out 1 .doc files" in capsys.readouterr().out
