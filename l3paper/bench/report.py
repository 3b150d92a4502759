"""Tables of what the benchmarks found."""

from pathlib import Path

from l3paper.records import read_record

SPEEDS = {
    "model": "{model}",
    "active": "{active_parameters:,.0f}",
    "total": "{total_parameters:,.0f}",
    "tokens/s": "{tokens_per_second:,.0f}",
    "of dense": "{speed_of_dense:.1%}",
    "utilisation": "{utilisation:.1%}",
    "lookup": "{lookup_share:.1%}",
    "projections": "{projections_share:.1%}",
    "optimizer": "{optimizer_share:.1%}",
    "bytes beyond weights": "{peak_bytes:,.0f}",
}
PROFILE = {"operation": "{operation:.60}", "calls": "{calls}", "share of the time": "{share:.1%}"}
DECODING = {
    "decoding": "{model}",
    "batch": "{batch}",
    "tokens/s": "{tokens_per_second:,.0f}",
    "of the resident tables'": "{of_resident:.0%}",
}
"""The heads of a table's columns, and how each column shows a row of results."""


def tables(folder: Path) -> dict[str, list[list[str]]]:
    """Tables of the benchmarks recorded in `folder`, by title; the first row of each is its head."""
    found = {}
    for name, columns in (
        ("throughput", SPEEDS),
        ("throughput-large", SPEEDS),
        ("decode", DECODING),
    ):
        if not (path := folder / f"{name}.json").exists():
            continue
        record = read_record(path)
        title = f"{name}, {record['environment']['device']}"
        found[title] = _rows(columns, record["results"])
        for row in record["results"]:
            if "profile" in row:
                found[f"{title}: {row['model']}"] = _rows(PROFILE, row["profile"][:5])
    return found


def _rows(columns: dict[str, str], results: list[dict]) -> list[list[str]]:
    return [[*columns], *([text.format(**row) for text in columns.values()] for row in results)]


def as_table(results: list[dict]) -> str:
    """Results as aligned columns: times in ms, bytes in kB or MB. Lists are left out."""
    names = [name for name, value in results[0].items() if not isinstance(value, list)]
    rows = [[name.replace("_", " ") for name in names]]
    rows += [[_cell(name, row[name]) for name in names] for row in results]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows
    )


def _cell(name: str, value: float | str | None) -> str:
    if value is None or isinstance(value, str):
        return value or "-"
    if name == "seconds":
        return f"{1e3 * value:,.1f} ms"
    if name.endswith("bytes"):
        return f"{value / 1e6:,.1f} MB" if value >= 1e6 else f"{value / 1e3:,.2f} kB"
    return f"{value:,.0f}" if isinstance(value, int) or value > 100 else f"{value:.2f}"
