"""The split: how much is held out, by name or by size, and that no near copy is."""

from collections import Counter

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from l3paper.data.sources import TRAIN, Document, open_source
from l3paper.data.split import describe, plan_split

HUNDRED = [Document(f"file{i}.txt#0", f"text {i}") for i in range(100)]
HELD_OUT = [f"file{i}.txt#0" for i in (91, 19, 3, 8, 18, 4)]
"""Those of them whose names have the smallest hashes: the same everywhere."""


def divide(documents):
    """(training, held out), each in the order of the documents."""
    placed = list(plan_split(documents).divide(documents))
    train = [document for side, document in placed if side == TRAIN]
    return train, [document for side, document in placed if side != TRAIN]


def names(documents):
    return {document.name for document in documents}


def joined(documents):
    """(name, text) of every document, the one that was cut put together."""
    texts = {}
    for name, text in sorted(documents):
        whole = name.removesuffix(" (end)")
        texts[whole] = texts.get(whole, "") + text
    return sorted(texts.items())


@given(st.lists(st.tuples(st.integers(20, 5000), st.booleans()), min_size=1, max_size=40))
@example([(20, False)])
@example([(5 * 3**i, True) for i in range(10)])
@example([(1000, False), (1000, False)])
def test_split_holds_out_a_twentieth_of_the_text_and_loses_nothing(sizes):
    documents = [
        Document(f"{number}", (f"{number} " * size)[:size].replace(" ", "\n" if lines else " "))
        for number, (size, lines) in enumerate(sizes)
    ]
    train, held_out = divide(documents)
    assert joined(train + held_out) == sorted(documents)
    total = sum(len(document.text) for document in documents)
    assert 0.04 * total - 1 <= sum(len(document.text) for document in held_out) <= 0.06 * total + 1
    assert train
    assert held_out


def test_split_depends_on_names_alone_and_not_on_their_order():
    for documents in (HUNDRED, HUNDRED[::-1]):
        train, held_out = divide(documents)
        assert names(held_out) == set(HELD_OUT)
        assert train + held_out == sorted(documents, key=lambda d: (d in held_out, documents.index(d)))


def test_a_long_document_is_cut_at_a_line_end():
    [train], [held_out] = divide([Document("book", "ten bytes\n" * 100)])
    assert train.text == "ten bytes\n" * 95
    assert held_out == Document("book (end)", "ten bytes\n" * 5)


@pytest.mark.parametrize(
    ("documents", "numbers"),
    [
        ([Document("a", "1"), Document("b", "2")], "2 documents with 2 characters"),
        ([Document(str(i), f"text {i % 9}") for i in range(27)], "as 27 are"),
    ],
    ids=["too short", "all are copies"],
)
def test_nothing_to_hold_out_is_refused(documents, numbers):
    with pytest.raises(ValueError, match=f"nothing can be held out of .*{numbers}"):
        divide(documents)


def near_copy(number):
    own = f"what only document {number} has\n"
    return Document(f"near{number}.txt#0", "a line that is shared\n" * 2 + own)


def test_near_copies_are_never_held_out():
    copies = [near_copy(number) for number in range(50)]
    twins = [Document(f"twin{number}.txt#0", "sh\nort\n" * 9) for number in range(2)]
    halves = [Document(f"half{i}.txt#0", f"a line that is shared\n{i:022}") for i in range(100)]
    train, held_out = divide(copies + twins + halves)
    assert names(copies + twins) <= names(train)
    assert held_out
    assert names(held_out) <= names(halves)


def test_names_of_files_decide():
    files = ["wiki-valid.txt", "ptb.train.txt", "validation-00000-of-00001.parquet", "train/a.txt"]
    files += ["sub/dev/a.jsonl.gz", "Eval.TXT", "book.txt", "trainer/prevalidated.txt"]
    documents = [Document(f"{file}#{i}", "the same") for i, file in enumerate(files)]
    train, held_out = divide(documents)
    assert held_out == [documents[i] for i in (0, 2, 4, 5)]
    assert train == [documents[i] for i in (1, 3, 6, 7)]


@pytest.mark.parametrize("name", ["train.txt", "valid.txt", "stdlib/val.py"])
def test_names_that_leave_one_side_empty_do_not_decide(name):
    documents = [Document(f"{name}#{i}", f"text {i}") for i in range(100)]
    assert len(divide(documents)[1]) == pytest.approx(5, abs=1)


def test_documents_that_changed_in_between_are_refused():
    split = plan_split(HUNDRED)
    changed = [*HUNDRED[:7], Document(HUNDRED[7].name, "other"), *HUNDRED[8:]]
    with pytest.raises(ValueError, match=r"file7\.txt#0 has changed since it was read first"):
        list(split.divide(changed))


def test_description_has_the_numbers():
    shared = Document("val.txt#0", "a line that is shared\nand one that is not..\n")
    train = Document("train.txt#0", "a line that is shared\n" + "x" * 78)
    told = describe(plan_split([train, shared]), [train, shared])
    assert "training: 1 documents, 100 characters" in told
    assert "held out: 1 documents, 44 characters, 30.6% of the text" in told
    assert "chosen by the names of the files" in told
    assert "50.0% stand in lines that training also has" in told
    assert "near copies of other documents: 0, 0.0% of the text, 0 of them held out" in told


def test_a_twentieth_of_the_standard_library_is_held_out_and_no_near_copy():
    source = open_source()
    split = plan_split(source)
    _, held_out = divide(source)
    assert 0.04 < sum(len(d.text) for d in held_out) / split.sizes.sum() < 0.06
    assert split.near_copies.sum() > 20
    assert not split.near_copies[split.kept < split.sizes].any()
    # The rule once more, as one would write it.
    having = Counter(line for _, text in source for line in {x.strip() for x in text.split("\n")})
    for name, text in held_out:
        lines = [x for x in text.split("\n") if len(x.strip()) >= 9 and having[x.strip()] > 1]
        assert sum(map(len, lines)) <= len(text) / 2, name


def test_a_file_named_for_training_is_never_held_out():
    sizes = {"train.txt#0": 15_000, "extra.txt#0": 300_000, "more.txt#0": 14_000}
    documents = [Document(name, (name + " ") * (size // 12)) for name, size in sizes.items()]
    train, held_out = divide(documents)
    assert "train.txt#0" in names(train)
    assert held_out


def test_a_text_that_grows_between_two_readings_is_refused():
    split = plan_split(HUNDRED)
    for changed in (HUNDRED[:-1], [*HUNDRED, Document("new", "text")]):
        with pytest.raises(ValueError, match="has changed since it was read first"):
            list(split.divide(changed))
