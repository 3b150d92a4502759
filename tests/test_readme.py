"""The README and the manual: snippets run, links lead somewhere, and documented commands exist."""

import re
import runpy
import shlex
import sys
from pathlib import Path

import nbformat
import pytest
import torch

from l3paper.notebooks import NOTEBOOKS
from l3paper.train import command_line
from l3paper.training.config import from_flags

ROOT = Path(__file__).parents[1]
README, MANUAL = PATHS = ROOT / "README.md", ROOT / "l3paper" / "README.md"
TEXTS = [path.read_text(encoding="utf-8") for path in PATHS]
NOTEBOOK_TEXTS = {
    path.name: "\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells)
    for path in sorted(NOTEBOOKS.glob("*.ipynb"))
}
COMMANDS = [
    (name, tuple(shlex.split(arguments, comments=True)))
    for text in (*TEXTS, *NOTEBOOK_TEXTS.values())
    for name, arguments in re.findall(
        r"^(?:python|torchrun .*) -m l3paper\.(\w+)(.*)$", text, re.MULTILINE
    )
]


def anchors(path):
    """The fragments that GitHub makes of a file's headings."""
    headings = re.findall(r"^#+ (.*)", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_python_snippets_run():
    (snippet,), manual = (re.findall(r"```python\n(.*?)```", text, re.DOTALL) for text in TEXTS)
    assert len([line for line in snippet.splitlines() if line.strip()]) <= 10
    names = {}
    exec(snippet, names)
    assert names["x"].shape == (2, 9, 64)
    assert sum(names["alloc"]) == 20
    assert not torch.any(names["layer"](names["x"], names["token_ids"]))  # "a fresh layer adds zero"
    for continued in manual:
        exec(continued, names)
    parameters = [p for group in names["optimizer"].param_groups for p in group["params"]]
    assert {*parameters} == {*names["layer"].parameters()}
    assert torch.equal(names["restored"].bounds, names["layer"].bounds)


@pytest.mark.parametrize("arguments", [words for name, words in COMMANDS if name == "train"])
def test_training_commands_are_valid(arguments):
    if "--help" not in arguments:
        from_flags(command_line().parse_args(arguments))


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
@pytest.mark.parametrize(("name", "arguments"), [c for c in COMMANDS if c[0] != "train"])
def test_other_commands_have_the_words_that_are_documented(name, arguments, monkeypatch, capsys):
    subcommand = arguments[:1] if name == "bench" else ()
    monkeypatch.setattr(sys, "argv", [name, *subcommand, "--help"])
    with pytest.raises(SystemExit):
        runpy.run_module(f"l3paper.{name}", run_name="__main__")
    described = capsys.readouterr().out
    words = arguments[:1] if name == "experiments" else ()
    words = {*words, *(word for word in arguments if word.startswith("-"))}
    assert {word for word in words if not re.search(rf"(?<![\w-]){word}(?![\w-])", described)} == set()


@pytest.mark.parametrize("path", PATHS)
def test_links_lead_somewhere(path):
    targets = re.findall(r"\]\(([^)]+)\)", path.read_text())
    assert targets
    for target in targets:
        file, _, fragment = target.partition("#")
        if not file.startswith("http"):
            found = path.parent / file if file else path
            assert found.exists(), target
            assert not fragment or fragment in anchors(found), target


def test_table_names_every_notebook_with_its_reading_time():
    named = dict(re.findall(r"^\|.*\(notebooks/(\w+\.ipynb)\).*\| (\d+) \|$", TEXTS[0], re.MULTILINE))
    assert named.keys() == NOTEBOOK_TEXTS.keys()
    for name, text in NOTEBOOK_TEXTS.items():
        stated = re.search(r"\*\*Reading time\.\*\* (\d+) minutes", text)
        assert stated is None or stated[1] == named[name], name


def test_every_entry_of_the_package_is_named():
    tree = TEXTS[0].partition("## The package")[2].partition("```")[2].partition("```")[0]
    paths = [path for path in (ROOT / "l3paper").iterdir() if path.suffix == ".py" or path.is_dir()]
    entries = {path.name for path in paths if not path.name.startswith("__")}
    named = {word.rstrip("/") for word in re.findall(r"[\w.]+/?", tree)}
    assert {entry for entry in entries if not {entry, entry.removesuffix(".py")} & named} == set()


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = {
        target for text in TEXTS for target in re.findall(r"(?:^|`)make (\w+)", text, re.MULTILINE)
    }
    assert {
        target for target in targets if not re.search(rf"^{target}:", makefile, re.MULTILINE)
    } == set()
    assert {"figures", "test", "quick", "gpu"} <= targets
