"""Records of runs, and what they say about the machine."""

import platform
import re

import pytest
import torch

from l3paper.records import environment, read_records, write_record


def test_round_trip_in_the_order_of_the_names(tmp_path):
    records = {"b": {"loss": 0.1, "text": "süß\n"}, "a": {"list": [1, None, True]}, "c": {}}
    for name, record in records.items():
        write_record(tmp_path / "runs" / f"{name}.json", record)
    (tmp_path / "runs" / "notes.txt").write_text("no record")
    assert read_records("runs", tmp_path) == [records["a"], records["b"], records["c"]]


def test_missing_records_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no records in figures/data/runs: run the experiment first"):
        read_records("runs", tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(ValueError, match="no records in figures/data/runs"):
        read_records("runs", tmp_path)


def test_record_that_is_no_json_leaves_the_old_one(tmp_path):
    write_record(tmp_path / "runs" / "a.json", {"old": 1})
    with pytest.raises(TypeError):
        write_record(tmp_path / "runs" / "a.json", {"new": object()})
    assert read_records("runs", tmp_path) == [{"old": 1}]


def test_environment_names_device_versions_and_commit():
    found = environment(torch.device("cpu"))
    assert re.fullmatch(r"cpu: .+", found["device"])
    assert found["torch"] == torch.__version__
    assert found["python"] == platform.python_version()
    assert found["commit"] is None or re.fullmatch(r"[0-9a-f]{40}( \(changed\))?", found["commit"])
    assert len(found) == 4


def test_environment_without_git_has_no_commit(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment(torch.device("cpu"))["commit"] is None
