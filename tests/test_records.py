"""Records of runs, and what they say about the machine."""

import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import l3paper
from l3paper.records import RECORDS, aligned, environment, markdown, read_record, write_record


def test_round_trip(tmp_path):
    record = {"loss": 0.1, "text": "süß\n", "list": [1, None, True]}
    path = tmp_path / "runs" / "a.json"
    write_record(path, record)
    assert read_record(path) == record


def test_record_that_is_no_json_leaves_the_old_one(tmp_path):
    path = tmp_path / "runs" / "a.json"
    write_record(path, {"old": 1})
    with pytest.raises(TypeError):
        write_record(path, {"new": object()})
    assert read_record(path) == {"old": 1}


def test_environment_names_device_versions_and_commit():
    found = environment(torch.device("cpu"))
    assert re.fullmatch(r"cpu: .+", found["device"])
    assert found["torch"] == torch.__version__
    assert found["python"] == platform.python_version()
    assert found["commit"] is None or re.fullmatch(r"[0-9a-f]{40}( \(changed\))?", found["commit"])
    assert len(found) == 4


def test_environment_takes_the_commit_that_it_is_given(monkeypatch):
    monkeypatch.setenv("L3_COMMIT", "0123abc")
    assert environment(torch.device("cpu"))["commit"] == "0123abc"


def test_environment_without_git_has_no_commit(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment(torch.device("cpu"))["commit"] is None


ROWS = [
    ["claim", "gain"],
    ["L3 is better than a dense model of equal operations", "+0.0378"],
    ["keys", "-1.5 ms"],
    ["none", "-"],
]


def test_tables_for_terminals_align_and_wrap():
    assert aligned([["a", "bc"], ["word", 1], ["x", 10]], width=80).splitlines() == [
        "a     bc",
        "word   1",
        "x     10",
    ]
    lines = aligned(ROWS, width=40).splitlines()
    assert max(map(len, lines)) <= 40
    assert lines[0] == "claim" + " " * 27 + "    gain"
    assert lines[2:5] == [
        "L3 is better than a dense model  +0.0378",
        "of equal operations",
        "",
    ]


def test_every_cell_of_a_wrapped_table_is_there():
    words = " ".join(cell for row in ROWS for cell in row).split()
    assert sorted(aligned(ROWS, width=30).split()) == sorted(words)


def test_tables_for_files_are_markdown():
    assert markdown([["a", "b"], [1, "x"]]) == "| a | b |\n| --- | --- |\n| 1 | x |"


def test_records_are_those_of_the_checkout():
    checkout = Path(__file__).parents[1]
    assert RECORDS.relative_to(checkout) == Path("figures", "data")


def test_an_installed_package_keeps_records_in_the_cache_and_says_what_claims_need(tmp_path):
    installed, cache = tmp_path / "site-packages", tmp_path / "cache"
    shutil.copytree(Path(l3paper.__file__).parent, installed / "l3paper")
    program = (
        "from l3paper.records import RECORDS; from l3paper.claims import main; print(RECORDS); main([])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={"PATH": "", "PYTHONPATH": str(installed), "L3_CACHE": str(cache)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.stdout == f"{cache / 'records'}\n"
    assert done.stderr.startswith("python -m l3paper.claims: error: there are no records in")
    assert done.stderr.count("\n") == 1
    runs = Path(__file__).parents[1] / "figures" / "data" / "runs"
    own = {"PATH": "", "PYTHONPATH": str(installed), "L3_CACHE": str(cache), "L3_RECORDS": str(runs)}
    command = [sys.executable, "-m", "l3paper.claims", "--short"]
    done = subprocess.run(command, env=own, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "agrees" in done.stdout
