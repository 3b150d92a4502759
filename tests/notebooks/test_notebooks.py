"""The notebooks as documents: executed, up to date, small, clean, on the template, well linked."""

import re
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import nbformat
import pytest

from l3paper.notebooks import execution as notebooks

ROOT = Path(__file__).parents[2]
PATHS = sorted(notebooks.NOTEBOOKS.glob("*.ipynb"))
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
    assert notebook.metadata["l3paper"]["digest"] == notebooks.digest(notebook), "run: make figures"


def test_another_default_makes_outputs_stale(monkeypatch):
    notebook = read(PATHS[0])
    before = notebooks.digest(notebook)
    changed = replace(notebooks.PRESETS["smoke"], table_lr=0.5)
    monkeypatch.setitem(notebooks.PRESETS, "smoke", changed)
    assert notebooks.digest(notebook) != before


@EVERY
def test_outputs_are_clean(path):
    assert path.stat().st_size < 250_000
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
    for cell in code_cells(path):
        assert len(cell.source.splitlines()) <= 40
        assert not re.search(r"^\s*[!%]", cell.source, re.MULTILINE)


@EVERY
def test_template(path):
    cells = read(path).cells
    prose = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    assert cells[0].source.startswith(f"# {path.name[:2]} · ")
    for part in (
        "will be able to",
        "Prerequisites",
        "Paper",
        "Preset",
        "Exercises",
        "differs from the paper",
    ):
        assert part in prose, part
    assert "assert" in code_cells(path)[-1].source
    assert "raises-exception" not in str([cell.metadata for cell in cells])


@EVERY
def test_every_exercise_has_a_checked_solution(path):
    code = "\n".join(cell.source for cell in code_cells(path))
    attempts = re.findall(r"^attempt_(\d+) = None$", code, re.MULTILINE)
    solutions = notebooks.solutions(read(path))
    assert attempts == [str(n + 1) for n in range(len(solutions))]
    assert len(solutions) >= 3
    for number, solution in enumerate(solutions, start=1):
        assert re.search(rf"^(def )?attempt_{number}\b", solution, re.MULTILINE)


@EVERY
def test_links_lead_somewhere(path):
    prose = "\n".join(cell.source for cell in read(path).cells if cell.cell_type == "markdown")
    for target in re.findall(r"\]\(([^)#]+)\)", prose):
        if not target.startswith("http"):
            assert (path.parent / target).exists(), target


@EVERY
def test_figures_are_saved_under_the_notebooks_number(path):
    names = re.findall(
        r"save\(fig\w*, [\"'](\w+)[\"']\)", "\n".join(c.source for c in code_cells(path))
    )
    assert names
    for name in names:
        assert name.startswith(path.name[:3])
        assert (ROOT / "figures" / f"{name}.png").exists(), "run: make figures"


def test_no_figure_without_a_notebook():
    saved = "\n".join(cell.source for path in PATHS for cell in code_cells(path))
    for figure in (ROOT / "figures").glob("*.png"):
        assert f'"{figure.stem}"' in saved, figure.name


def test_running_outside_make_figures_saves_nothing(monkeypatch, tmp_path):
    from l3paper.notebooks import plots

    monkeypatch.delenv("L3_FIGURES", raising=False)
    monkeypatch.chdir(tmp_path)
    fig, _ = plots.figure()
    plots.save(fig, "nothing")
    assert not list(tmp_path.rglob("*"))
    monkeypatch.setenv("L3_FIGURES", str(tmp_path))
    plots.save(fig, "something")
    assert (tmp_path / "something.png").exists()


def test_a_failing_cell_leaves_the_notebook_alone(tmp_path):
    path = tmp_path / "00_broken.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 / 0")]), path)
    before = path.read_bytes()
    with pytest.raises(notebooks.CellExecutionError, match="ZeroDivisionError"):
        notebooks.execute(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_wrong_solution_fails(tmp_path):
    path = tmp_path / "00_exercise.ipynb"
    checker = "def check_1(answer):\n    assert answer == 4\n    return 'right'\nattempt_1 = None"
    for answer, fails in ((4, False), (5, True)):
        solution = (
            f"<details><summary>Solution</summary>\n\n```python\nattempt_1 = {answer}\n```\n</details>"
        )
        cells = [nbformat.v4.new_code_cell(checker), nbformat.v4.new_markdown_cell(solution)]
        nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
        with pytest.raises(notebooks.CellExecutionError) if fails else nullcontext():
            notebooks.execute(path)
    notebook = read(path)
    assert len(notebook.cells) == 2


def test_executing_again_changes_nothing(tmp_path):
    path = tmp_path / "00_steady.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("print(6 * 7)")]), path)
    notebooks.execute(path)
    first = path.read_bytes()
    notebooks.execute(path)
    assert path.read_bytes() == first
    assert b"42" in first
