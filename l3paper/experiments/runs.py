"""Recorded runs: one file per experiment, one line per run.

A run is found by its name, in whichever file of the folder it is: experiments share runs.
"""

import hashlib
import json
import math
import os
from collections.abc import Collection, Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

from l3paper.data.sources import corpus_name
from l3paper.files import atomic_write, locked
from l3paper.records import RECORDS
from l3paper.training.config import TrainConfig

RUNS = Path(os.environ.get("L3_RECORDS") or RECORDS / "runs")
"""The folder of the recorded runs: the reader's own, if $L3_RECORDS names it."""

_RATES_OF_KINDS = {"table_lr": ("l3", "engram", "per-layer-embedding"), "router_lr": ("moe",)}
"""Learning rates that change nothing in models of other kinds."""

OPEN = "not recorded yet"
"""What tables say of a MissingRun."""


class MissingRun(ValueError):
    """Records that were asked for do not exist; `runs` are the configurations to train next."""

    def __init__(self, message: str, runs: Sequence[TrainConfig] = ()):
        super().__init__(message)
        self.runs = runs


def run_name(config: TrainConfig) -> str:
    """The name of this run, which hashes every setting that differs from its default.

    The device and the folder of the training text do not change the name.
    """
    defaults = asdict(TrainConfig())
    settings = {name: value for name, value in _settings(config).items() if value != defaults[name]}
    settings["data"] = corpus_name(config.data)
    settings.pop("device", None)
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    return f"{config.kind}-lr{config.lr_scale:g}-seed{config.seed}-{digest}"


def _settings(config: TrainConfig) -> dict:
    """All settings, with the default places of the L3 layers resolved."""
    return asdict(config) | {"l3_after_layers": config.model_config().l3_after_layers}


def read_records(folder: Path) -> dict[str, dict]:
    """All records of a folder's files, by the name of the run. Raises ValueError for other lines."""
    records = {}
    for path in sorted(folder.glob("*.jsonl")):
        state = path.stat()
        records |= _read_file(path, (state.st_ino, state.st_mtime_ns, state.st_size))
    return records


@lru_cache(maxsize=128)  # one table of results reads the same files many times
def _read_file(path: Path, state: tuple[int, int, int]) -> dict[str, dict]:
    """The records of one file, by the name of the run; `state` tells a changed file from the same."""
    records = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            record = json.loads(line)
            records[record["name"]] = record
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path}, line {number} is not a recorded run: move it away") from error
    return records


def add_record(path: Path, name: str, record: dict) -> None:
    """Add a run to an experiment's file, which is rewritten as a whole, or not at all.

    The sample text is left out, the training loss thinned, and losses are rounded.
    """
    kept = {"name": name} | {part: value for part, value in record.items() if part != "sample"}
    kept["train_loss"] = kept["train_loss"][4::5]
    with locked(path.parent):
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        lines.append(json.dumps(_rounded(kept), separators=(",", ":")))
        with atomic_write(path) as file:
            file.writelines(f"{line}\n" for line in sorted(lines))


def _rounded(value: Any) -> Any:
    """The same with all numbers rounded to five decimals, if they are not tiny."""
    match value:
        case dict():
            return {name: _rounded(part) for name, part in value.items()}
        case list():
            return [_rounded(part) for part in value]
        case float() if abs(value) > 0.01:
            return round(value, 5)
    return value


def check_run(
    name: str, record: dict, config: TrainConfig, texts: Collection[str] | None = None
) -> None:
    """Raise ValueError, naming the run, unless its record is of this configuration.

    That is so if a setting differs (a default may have changed) or is unknown, or if the SHA-256 of its
    text is not among `texts` (None allows any).
    """
    ignored = {"device", "data"}
    ignored |= {rate for rate, kinds in _RATES_OF_KINDS.items() if config.kind not in kinds}
    try:
        recorded = _settings(TrainConfig(**record["config"]))
    except TypeError as error:
        raise ValueError(f"{name} records a run of another version: {error}; move it away") from error
    differing = [
        f"{setting} = {recorded[setting]!r}, not {value!r}"
        for setting, value in _settings(config).items()
        if setting not in ignored and recorded[setting] != value
    ]
    if differing:
        raise ValueError(f"{name} records a run with {', '.join(differing)}: move it away")
    if texts is not None and record["corpus"]["sha256"] not in texts:
        raise ValueError(f"{name} records a run on another text: move it away, or use --folder")


def read_runs(
    configs: Sequence[TrainConfig], folder: Path, texts: Collection[str] | None = None
) -> list[dict]:
    """Read the records of several runs.

    Raises MissingRun if some do not exist, and ValueError for records that `check_run` refuses.
    """
    records, wanted = read_records(folder), {run_name(config): config for config in configs}
    missing = {name: config for name, config in wanted.items() if name not in records}
    for name in wanted.keys() - missing.keys():
        check_run(name, records[name], wanted[name], texts)
    if missing:
        raise MissingRun(
            f"the run {next(iter(missing))} is not recorded: its experiment has not finished",
            [*missing.values()],
        )
    return [records[name] for name in wanted]


def final_loss(record: dict) -> float:
    """Nats per token on all held-out text at the end of the run; infinite if the run diverged."""
    loss = record["evaluations"][-1]["loss"]
    return math.inf if math.isnan(loss) else loss


def loss_curve(record: dict) -> dict[int, float]:
    """Nats per token on a sample of the held-out text, by tokens trained, without the start."""
    evaluations = [e for e in record["evaluations"] if e["step"] and not e["everything"]]
    return {e["tokens"]: e["loss"] for e in evaluations}
