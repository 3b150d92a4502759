"""The book and the packaging: what could silently fall out of either."""

import importlib.util
import re
import tomllib
from pathlib import Path

import nbformat
import pytest
import yaml

import l3paper
from l3paper.allocation import compute_lzw_allocation, count_phrases
from l3paper.notebooks import NOTEBOOKS

ROOT = Path(__file__).parents[1]
CONFIGURATION = (ROOT / ".book" / "conf.py").read_text()
README = (ROOT / "README.md").read_text()


@pytest.fixture(scope="module")
def steps():
    spec = importlib.util.spec_from_file_location("steps", ROOT / ".book" / "steps.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_book_has_every_notebook_and_document():
    contents = re.findall(r"^([\w/*]+)$", CONFIGURATION.partition('CONTENTS = """')[2], re.MULTILINE)
    pages = {*NOTEBOOKS.glob("*.ipynb"), *ROOT.glob("*.md"), *ROOT.glob("[a-z]*/README.md")}
    for page in pages - {ROOT / "README.md"}:  # the README has the contents
        assert any(map(page.relative_to(ROOT).with_suffix("").match, contents)), page


def test_reference_names_modules_that_exist_and_all_of_the_paper():
    named = re.findall(r"[a-z_.]+", CONFIGURATION.partition("MODULES = {")[2].partition("}")[0])
    modules = {name for name in named if (ROOT / "l3paper" / name.partition(".")[0]).exists()}
    modules |= {name for name in named if (ROOT / "l3paper" / f"{name}.py").exists()}
    assert {"allocation", "layer", "gpt", "lookup.table", "train", "generate"} <= modules
    for name in modules:
        assert importlib.util.find_spec(f"l3paper.{name}"), name


def test_scan_in_the_book_is_that_of_the_notebook(steps):
    cells = nbformat.read(NOTEBOOKS / "01_lzw_allocation.ipynb", as_version=4).cells
    (toy,) = [cell.source for cell in cells if cell.source.startswith("VOCABULARY = ")]
    names = {}
    exec(toy, names)
    assert (names["VOCABULARY"], names["TEXT"]) == (steps.VOCABULARY, steps.TEXT)
    prose = "\n".join(cell.source for cell in cells)
    assert "figures/01_scan.gif" in prose
    assert f"n_emb={steps.N_EMB}, k_max={steps.K_MAX}" in prose


def test_scan_in_the_book_reads_every_token_and_ends_as_the_package_does(steps):
    data = steps.scan_data()
    documents, taken = data["documents"], data["steps"]
    size = len(data["vocabulary"])
    counts = count_phrases(documents, size)
    read = [step for step in taken if "piece" in step]
    assert [step["piece"][0::2] for step in read] == [
        [number, end] for number, ids in enumerate(documents) for end in range(1, len(ids) + 1)
    ]
    for number, ids in enumerate(documents):
        pieces = [s["piece"][1:] for s in read if s["piece"][0] == number and s["ends"]]
        assert [token for start, end in pieces for token in ids[start:end]] == ids
        assert {tuple(ids[start:end]) for start, end in pieces} <= counts.keys()
    assert taken[-1]["counts"] == list(counts.values())
    assert taken[-1]["rows"] == compute_lzw_allocation(documents, size, steps.N_EMB, steps.K_MAX)
    for node, phrase in zip(data["trie"], counts, strict=True):
        spelled = [node["word"]]
        while node["parent"] >= 0:
            node = data["trie"][node["parent"]]
            spelled.insert(0, node["word"])
        assert tuple(spelled) == phrase


def test_citation_agrees_with_the_project_and_the_readme():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert citation["version"] == l3paper.__version__
    assert f"## {l3paper.__version__}" in (ROOT / "CHANGELOG.md").read_text()
    assert citation["license"] == project["license"] == "MIT"
    assert citation["authors"] == project["authors"]
    paper = citation["preferred-citation"]
    names = " and ".join(f"{each['given-names']} {each['family-names']}" for each in paper["authors"])
    for words in (paper["title"], names, str(paper["year"])):
        assert f"{{{words}}}" in README
    assert paper["identifiers"][0]["value"].removeprefix("arXiv:") in README
