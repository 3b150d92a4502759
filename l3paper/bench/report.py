"""Tables of benchmark results."""

from pathlib import Path

from l3paper.records import aligned, read_record


def rows(results: list[dict]) -> list[list[str]]:
    """Results as the cells of a table, whose first row is its head. Lists are left out."""
    names = [name for name, value in results[0].items() if not isinstance(value, list)]
    head = [name.replace("_", " ") for name in names]
    return [head, *([_cell(name, row[name]) for name in names] for row in results)]


def _cell(name: str, value: float | str | None) -> str:
    if value is None or isinstance(value, str):
        return value or "-"
    if name == "seconds":
        return f"{1e3 * value:,.1f} ms"
    if name.endswith("bytes"):
        return f"{value / 1e6:,.1f} MB" if value >= 1e6 else f"{value / 1e3:,.2f} kB"
    if name.endswith("share"):
        return f"{value:.1%}"
    return f"{value:,.0f}" if isinstance(value, int) or value > 100 else f"{value:.2f}"


def as_table(results: list[dict]) -> str:
    """Results as aligned columns of text, one line per result however wide the terminal is."""
    return aligned(rows(results), width=1000)


def tables(folder: Path) -> dict[str, list[list[str]]]:
    """Tables of the throughput and decoding recorded in `folder`, by title; the first row is the head.

    The profile of each model follows, with its five longest operations.
    """
    titled = {}
    for path in (folder / f"{name}.json" for name in ("throughput", "throughput-large", "decode")):
        if not path.exists():
            continue
        record = read_record(path)
        title = f"{path.stem}, {record['environment']['device']}"
        titled[title] = rows(record["results"])
        for row in record["results"]:
            if "profile" in row:
                titled[f"{title}: {row['model']}"] = rows(row["profile"][:5])
    return titled
