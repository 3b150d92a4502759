"""The scan of notebook 01 to step through: every step, as the package takes it.

The notebook shows an animation. The book puts these steps beside it, and static/scan.js draws them.
"""

from collections.abc import Sequence
from typing import Any

from l3paper.allocation import allocate_by_codewords, count_phrases, give_rows, scan_codewords
from l3paper.notebooks.drawings.allocation import lay_out

# The toy corpus of notebook 01; a test holds the two together.
VOCABULARY = ["the", "light", "is", "on", "red", "bag"]
TEXT = ["the light is on", "the light is red", "the red bag is light"] + ["the red light is on"] * 2
N_EMB, K_MAX = 12, 3


def scan_data() -> dict[str, Any]:
    """What the widget draws: the words, the trie with a place for every node, and the steps."""
    documents = [[VOCABULARY.index(word) for word in line.split()] for line in TEXT]
    phrases = list(count_phrases(documents, len(VOCABULARY)))
    number = {phrase: node for node, phrase in enumerate(phrases)} | {(): -1}
    place = lay_out(dict.fromkeys(phrases))
    return {
        "vocabulary": VOCABULARY,
        "documents": documents,
        "root": place[()],
        "trie": [{"word": p[-1], "parent": number[p[:-1]], "at": place[p]} for p in phrases],
        "steps": [
            {**step, "node": number[step["node"]]} for step in (*reading(documents), *giving(documents))
        ],
    }


def reading(documents: Sequence[Sequence[int]]) -> list[dict[str, Any]]:
    """One step per token of the text, in order; `counts` is the dictionary in order of creation.

    Each state is `count_phrases` of the text up to here. A prefix ends a piece if it made the
    dictionary grow or if its document is over; otherwise the scan still reads, and has counted nothing.
    """
    counts = count_phrases([], len(VOCABULARY))
    one_row = [1] * len(VOCABULARY)
    said = "Nothing is read yet. The dictionary knows every single token, with count 0."
    steps = [{"counts": list(counts.values()), "rows": one_row, "node": (), "said": said}]
    for number, document in enumerate(documents):
        start = 0
        for end in range(1, len(document) + 1):
            prefix = [*documents[:number], document[:end]]
            after = count_phrases(prefix, len(VOCABULARY))
            phrase, known = tuple(document[start:end]), len(after) == len(counts)
            ends = not known or end == len(document)
            if ends:
                counts = after
            said = f"{_words(phrase)} is known"
            if not known:
                said = f"{_words(phrase)} is new: it enters, and {_words(phrase[:-1])} counts once more"
            elif ends:
                said += ", and the document ends: it counts once more"
            steps.append(
                {
                    "piece": [number, start, end],
                    "ends": ends,
                    "counts": list(counts.values()),
                    "rows": one_row,
                    "node": phrase,
                    "said": said + ("." if ends else ": read on."),
                }
            )
            if ends:
                start = end
    return steps


def giving(documents: Sequence[Sequence[int]]) -> list[dict[str, Any]]:
    """One step per codeword, by descending count, until all rows are given."""
    codebook = scan_codewords(documents, len(VOCABULARY))
    counts, steps, lasts = codebook.counts.tolist(), [], []
    rows = [1] * len(VOCABULARY)
    for phrase, count in codebook.codewords():
        if sum(rows) == N_EMB:
            break
        lasts.append(phrase[-1])
        before, rows = rows, give_rows(lasts, len(VOCABULARY), N_EMB, K_MAX)
        word = f"“{VOCABULARY[phrase[-1]]}”"
        gift = f"{word} owns {K_MAX} rows already" if rows == before else f"{word} gets a row"
        said = f"{_words(phrase)} was counted {_times(count)}: {gift}."
        steps.append({"counts": counts, "rows": rows, "node": phrase, "said": said})
    assert rows == allocate_by_codewords(codebook, N_EMB, K_MAX)
    said = f"All {N_EMB} rows are given."
    return [*steps, {"counts": counts, "rows": rows, "node": (), "said": said}]


def _words(phrase: Sequence[int]) -> str:
    return "“" + " ".join(VOCABULARY[token] for token in phrase) + "”"


def _times(count: int) -> str:
    return {1: "once", 2: "twice"}.get(count, f"{count} times")
