"""One set of versions: pyproject's extra "pinned", environment.yml, and the loose bounds."""

import re
import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


def version(text):
    return tuple(int(part) for part in re.findall(r"\d+", text))


def test_conda_users_get_the_pinned_versions():
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    (pip,) = [entry["pip"] for entry in conda if isinstance(entry, dict)]
    assert pip == [*EXTRAS["pinned"], "--editable ."]


def test_every_pin_is_exact_but_that_of_triton_which_pytorch_chooses():
    (triton,) = [pin for pin in EXTRAS["pinned"] if pin.startswith("triton")]
    assert triton == "triton>=3.5; sys_platform == 'linux'"
    pins = [*EXTRAS["pinned"], *EXTRAS["book"]]
    assert all(re.fullmatch(r"[a-z-]+==[\d.]+", pin) for pin in pins if pin != triton)


def test_pins_satisfy_the_loose_bounds():
    pins = dict(pin.split("==") for pin in EXTRAS["pinned"] if "==" in pin)
    loose = [
        *PROJECT["dependencies"],
        *(x for name in EXTRAS if name not in ("pinned", "book") for x in EXTRAS[name]),
    ]
    for requirement in loose:
        name, least = requirement.split(">=")
        assert version(pins[name]) >= version(least), requirement


def test_conda_python_is_allowed():
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    (python,) = [entry for entry in conda if str(entry).startswith("python=")]
    assert version(python) >= version(PROJECT["requires-python"])


def test_ci_runs_the_command_of_the_readme():
    commands = [
        line
        for line in (ROOT / ".ci" / "run").read_text().splitlines()
        if line and not line.startswith(("#", "set ", "cd "))
    ]
    assert commands == ["make test"]
    assert "make test" in (ROOT / "README.md").read_text()
