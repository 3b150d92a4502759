"""Checkers for the exercises of notebook 07."""

from collections.abc import Callable, Collection, Sequence


def check_1(answer: Callable[[list[float], float], Collection[int]]) -> None:
    """`answer(chances, top_p)` is the set of tokens among which top_p sampling draws."""
    chances = [0.1, 0.5, 0.15, 0.25]
    kept = set(answer(chances, 0.6))
    assert 1 in kept, "token 1 is the most probable one, so it is always kept"
    assert sum(chances[token] for token in kept) >= 0.6, "the chances kept must add up to top_p"
    assert len(kept) == 2, "keep the fewest tokens that suffice"
    assert kept == {1, 3}, "keep the most probable tokens"
    assert set(answer(chances, 0.5)) == {1}, "one token that reaches top_p by itself is enough"
    assert set(answer(chances, 1.0)) == {0, 1, 2, 3}, "for top_p = 1, all tokens stay"


def check_2(answer: Callable[[Sequence[int], int, int, int], tuple[int, int]]) -> None:
    """`answer(bounds, token, width, bytes_per_number)` is (first byte, number of bytes) of the file."""
    bounds = [0, 4, 5, 7, 10]
    first, count = answer(bounds, 2, 64, 4)
    assert count != 2 * 64, "count bytes, not numbers"
    assert count == 512, "token 2 owns two rows of 64 numbers of 4 bytes"
    assert first != 5 * 4, "a row has `width` numbers, and each takes `bytes_per_number`"
    assert first == 1280, "five rows stand before those of token 2"
    assert answer(bounds, 0, 64, 4) == (0, 1024), "the rows of token 0 begin the file"
    assert answer([0, 512], 0, 1024, 2) == (0, 2**20), "try numbers of 2 bytes"


def check_3(answer: Callable, alloc: Sequence[int], token_counts: Sequence[int]) -> None:
    """`answer(alloc, token_counts, budget)` is the set of tokens whose rows stay on the device.

    Right is any choice whose savings come within 1 % of those of the best choice.
    """
    cases = [([8, 4, 4], [10, 12, 12], 8), ([1, 64, 3], [50, 40, 60], 4)]
    cases.append((alloc, token_counts, sum(alloc) // 20))
    for rows, counts, budget in cases:
        kept = set(answer(rows, counts, budget))
        used = sum(rows[token] for token in kept)
        assert used <= budget, f"you keep {used} rows, and there is room for {budget}"
        saved = sum(rows[token] * counts[token] for token in kept)
        most = _most_saved(rows, counts, budget)
        assert saved >= 0.99 * most, (
            f"with {budget} rows, you save {saved / most:.0%} of the row transfers that can be saved: "
            "how many does one kept row save?"
        )


def _most_saved(rows: Sequence[int], counts: Sequence[int], budget: int) -> int:
    """The most transfers that `budget` rows could save if a token could keep some of its rows only."""
    saved = 0
    for count, own in sorted(zip(counts, rows, strict=True), reverse=True):
        saved += count * min(own, budget)
        budget -= min(own, budget)
    return int(saved)


def check_4(answer: Callable[[float, float, float, float], int]) -> None:
    """`answer(copy_bytes, speed, start_seconds, block_seconds)` is how many blocks hide the copy."""
    assert answer(1e6, 25e9, 0, 20e-6) == 2, "1 MB at 25 GB/s takes 40 microseconds, or two such blocks"
    assert answer(300e6, 25e9, 0, 1e-3) == 12, "a batch of 300 moves more, and its blocks take longer"
    needed = answer(1e6, 25e9, 10e-6, 20e-6)
    assert needed != 2, "the copy also needs start_seconds before the first byte travels"
    assert needed == 3, "blocks are whole: 50 microseconds need three blocks of 20"
    assert answer(0, 25e9, 0, 1e-3) == 0, "if nothing travels, no block is needed"
