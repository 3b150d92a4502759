"""Records of runs, and what they say about the machine."""

import platform
import re

import pytest
import torch

from l3paper.records import environment, read_record, write_record


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
