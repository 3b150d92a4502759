"""The notebooks as documents: executed, up to date, small, clean, on the template, well linked."""

import ast
import re
import statistics
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import nbformat
import pytest

from l3paper.notebooks import NOTEBOOKS, plots
from l3paper.notebooks.__main__ import execute_all, main
from l3paper.notebooks.execution import CellExecutionError, digest, execute, solutions
from l3paper.training.config import PRESETS

ROOT = Path(__file__).parents[2]
PATHS = sorted(NOTEBOOKS.glob("*.ipynb"))
EVERY = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)


def read(path):
    return nbformat.read(path, as_version=4)


def code_cells(path):
    return [cell for cell in read(path).cells if cell.cell_type == "code"]


def outputs_as_text(path):
    texts = []
    for cell in code_cells(path):
        for output in cell.outputs:
            texts.append(output.get("text", ""))
            texts += [v for k, v in output.get("data", {}).items() if k.startswith("text/")]
    return "\n".join(texts)


def test_they_are_numbered_without_gaps():
    assert [path.name[:3] for path in PATHS] == [f"{i:02d}_" for i in range(1, len(PATHS) + 1)]
    assert len(PATHS) >= 4


@EVERY
def test_outputs_are_one_run_from_top_to_bottom(path):
    counts = [cell.execution_count for cell in code_cells(path)]
    assert counts == list(range(1, len(counts) + 1))


@EVERY
def test_outputs_are_not_stale(path):
    notebook = read(path)
    assert notebook.metadata["l3paper"]["digest"] == digest(notebook), "run: make figures"


def test_what_outputs_depend_on_makes_them_stale(tmp_path):
    notebook = read(PATHS[0])
    presets = PRESETS | {"smoke": replace(PRESETS["smoke"], table_lr=0.5)}
    digests = {digest(notebook, records=tmp_path), digest(notebook, presets, tmp_path)}
    (tmp_path / "run.json").write_text("{}")
    digests.add(digest(notebook, records=tmp_path))
    notebook.cells.append(nbformat.v4.new_markdown_cell("Prose counts for nothing."))
    digests.add(digest(notebook, records=tmp_path))
    notebook.cells.append(nbformat.v4.new_code_cell("1"))
    digests.add(digest(notebook, records=tmp_path))
    assert len(digests) == 4


@EVERY
def test_outputs_are_clean(path):
    assert path.stat().st_size < 600_000
    kinds = {output.output_type for cell in code_cells(path) for output in cell.outputs}
    assert "error" not in kinds
    assert not any(o.get("name") == "stderr" for cell in code_cells(path) for o in cell.outputs)
    text = outputs_as_text(path)
    assert not re.search(r"(?<![\w.<])/(root|home|tmp|usr|work|Users|opt)/", text), "a path"
    assert "Warning" not in text or path.name.startswith("01_")  # which shows one on purpose
    assert not re.search(r"\d%\|", text), "a progress bar"


@EVERY
def test_metadata_names_no_machine(path):
    notebook = read(path)
    assert set(notebook.metadata) == {"kernelspec", "language_info", "l3paper"}
    assert notebook.metadata.kernelspec.name == "python3"
    assert not any("execution" in cell.metadata for cell in notebook.cells)


@EVERY
def test_cells_are_short_and_install_nothing(path):
    lengths = [len(cell.source.splitlines()) for cell in code_cells(path)]
    assert max(lengths) <= 25
    assert statistics.median(lengths) < 8
    for cell in code_cells(path):
        assert not re.search(r"^\s*[!%]", cell.source, re.MULTILINE)


@EVERY
def test_template(path):
    cells = read(path).cells
    prose = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    assert cells[0].source.startswith(f"# {path.name[:2]} · ")
    parts = ["will be able to", "Prerequisites", "Paper", "Preset", "**Reading time.**", "](README.md"]
    parts += ["> **Predict.**", "**Exercise", "iffers from the paper"]
    for part in parts:
        assert part in prose, part
    assert "assert" in code_cells(path)[-1].source
    assert "raises-exception" not in str([cell.metadata for cell in cells])


@EVERY
def test_every_exercise_has_a_checked_solution(path):
    code = "\n".join(cell.source for cell in code_cells(path))
    attempts = re.findall(r"^attempt_(\d+) = None$", code, re.MULTILINE)
    answers = solutions(read(path))
    assert attempts == [str(n + 1) for n in range(len(answers))]
    assert len(answers) >= 3
    for number, solution in enumerate(answers, start=1):
        assert re.search(rf"^(def )?attempt_{number}\b", solution, re.MULTILINE)


@EVERY
def test_links_lead_somewhere(path):
    prose = "\n".join(cell.source for cell in read(path).cells if cell.cell_type == "markdown")
    for target in re.findall(r"\]\(([^)#]+)\)", prose):
        if not target.startswith("http"):
            assert (path.parent / target).exists(), target


@EVERY
def test_figures_are_saved_under_the_notebooks_number(path):
    code = "\n".join(cell.source for cell in code_cells(path))
    saved = re.findall(r'\b(save|save_animation)\([^"]*(?:"[^"]*"[^"]*)*?"(\d\d_\w+)"', code)
    assert saved
    for function, name in saved:
        ending = "png" if function == "save" else "gif"
        assert name.startswith(path.name[:3])
        assert (ROOT / "figures" / f"{name}.{ending}").exists(), "run: make figures"


def test_no_figure_without_a_notebook():
    saved = "\n".join(cell.source for path in PATHS for cell in code_cells(path))
    for figure in (ROOT / "figures").glob("[!.]*.*"):
        assert f'"{figure.stem}"' in saved, figure.name


def test_figures_are_saved_only_for_make_figures(monkeypatch, tmp_path):
    monkeypatch.delenv("L3_FIGURES", raising=False)
    monkeypatch.chdir(tmp_path)
    fig, _ = plots.figure()
    plots.save(fig, "nothing")
    assert not list(tmp_path.rglob("*"))
    monkeypatch.setenv("L3_FIGURES", str(tmp_path))
    plots.save(fig, "something")
    assert (tmp_path / "something.png").exists()


def test_plots_import_little_of_the_package():
    tree = ast.parse(Path(plots.__file__).read_text())
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    ours = {name for name in modules if name.startswith("l3paper")}
    assert ours == {"l3paper.files", "l3paper.records"}


@pytest.fixture
def notebook(tmp_path):
    """Write a notebook of these cells: code, or Markdown if it begins with "<"."""

    def write(*sources):
        path = tmp_path / "notebooks" / "00_new.ipynb"
        path.parent.mkdir(exist_ok=True)
        cells = [
            nbformat.v4.new_markdown_cell(source)
            if source.startswith("<")
            else nbformat.v4.new_code_cell(source)
            for source in sources
        ]
        nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
        return path

    return write


def test_a_failing_cell_leaves_the_notebook_alone(notebook, monkeypatch, capsys):
    monkeypatch.setenv("L3_FIGURES", "")  # which the command sets
    path = notebook("1 / 0")
    before = path.read_bytes()
    assert execute_all([], path.parent) == 1
    said = capsys.readouterr()
    assert said.out.startswith("[1/1] 00_new.ipynb ... ")
    assert "ZeroDivisionError" in said.err
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(("answer", "fails"), [(4, False), (5, True)])
def test_a_wrong_solution_fails(notebook, answer, fails):
    path = notebook(
        "def check(number, answer):\n    assert answer in (None, 4)",
        'attempt_1 = None\ncheck("00.1", attempt_1)',
        f"<details><summary>Solution</summary>\n\n```python\nattempt_1 = {answer}\n```\n</details>",
    )
    with pytest.raises(CellExecutionError) if fails else nullcontext():
        execute(path)
    assert len(read(path).cells) == 3


def test_executing_again_changes_nothing(notebook):
    path = notebook("print(6 * 7)")
    execute(path)
    first = path.read_bytes()
    execute(path)
    assert path.read_bytes() == first
    assert b"42" in first


def test_the_command_says_what_it_needs(tmp_path, notebook, monkeypatch, capsys):
    with pytest.raises(ValueError, match="nowhere is not there: run this in a checkout"):
        execute_all([], tmp_path / "nowhere")
    monkeypatch.setitem(sys.modules, "l3paper.notebooks.execution", None)  # it cannot be imported
    with pytest.raises(ImportError, match=r"pip install '.\[notebooks\]'"):
        execute_all([], notebook("1").parent)
    assert main(["98", "99"]) == 2
    said = capsys.readouterr().err
    assert said == "python -m l3paper.notebooks: error: no notebook begins with 98, 99\n"
