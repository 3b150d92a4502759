"""The README's snippets run, its links lead somewhere, and its table names the notebooks there are."""

import re
import shlex
from pathlib import Path

import nbformat
import pytest
import torch

from l3paper.notebooks import NOTEBOOKS
from l3paper.train import command_line
from l3paper.training.config import from_flags

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", TEXT, re.DOTALL)
NOTEBOOK_TEXTS = [
    "\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells)
    for path in sorted(NOTEBOOKS.glob("*.ipynb"))
]
TRAININGS = [
    flags
    for text in (TEXT, *NOTEBOOK_TEXTS)
    for flags in re.findall(r"^python -m l3paper\.train(.*)$", text, re.MULTILINE)
]


def test_python_snippet_runs():
    (snippet,) = [code for kind, code in BLOCKS if kind == "python"]
    assert len([line for line in snippet.splitlines() if line.strip()]) <= 10
    names = {}
    exec(snippet, names)
    assert names["x"].shape == (2, 9, 64)
    assert sum(names["alloc"]) == 20
    assert not torch.any(names["layer"](names["x"], names["token_ids"]))  # "a fresh layer adds zero"


@pytest.mark.parametrize("flags", TRAININGS)
def test_training_commands_of_readme_and_notebooks_are_valid(flags):
    assert not flags.rstrip().endswith("\\")
    flags = shlex.split(flags, comments=True)
    if "--help" not in flags:
        from_flags(command_line().parse_args(flags))


def test_links_lead_somewhere():
    targets = re.findall(r"\]\(([^)]+)\)", TEXT)
    assert targets
    assert [t for t in targets if not t.startswith("http") and not (ROOT / t).exists()] == []


def test_table_names_every_notebook():
    named = set(re.findall(r"\(notebooks/(\w+\.ipynb)\)", TEXT))
    assert named == {path.name for path in NOTEBOOKS.glob("*.ipynb")}


def test_every_entry_of_the_package_is_named():
    tree = TEXT.partition("## The package")[2].partition("```")[2].partition("```")[0]
    entries = {path.name for path in (ROOT / "l3paper").iterdir() if not path.name.startswith("__")}
    named = {word.rstrip("/") for word in re.findall(r"[\w.]+/?", tree)}
    assert {entry for entry in entries if not {entry, entry.removesuffix(".py")} & named} == set()


def test_make_targets_exist():
    targets = re.findall(r"^make (\w+)", TEXT, re.MULTILINE)
    makefile = (ROOT / "Makefile").read_text()
    assert targets
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)
