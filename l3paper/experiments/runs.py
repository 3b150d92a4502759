"""A recorded run: where its record lies, how it is read and checked, and its losses."""

import hashlib
import json
import math
from collections.abc import Collection, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from l3paper.data.sources import corpus_name
from l3paper.records import RECORDS, read_record
from l3paper.training.config import TrainConfig

RUNS = RECORDS / "runs"

_RATES_OF_ONE_KIND = {"table_lr": "l3", "router_lr": "moe"}
"""Learning rates that change nothing in models of any other kind."""


class MissingRun(ValueError):
    """Records that were asked for do not exist; `runs` are the configurations to train next."""

    def __init__(self, message: str, runs: Sequence[TrainConfig] = ()):
        super().__init__(message)
        self.runs = runs


def record_path(config: TrainConfig, folder: Path) -> Path:
    """The path of this run's record. Its name hashes every setting that differs from its default.

    The device, the text of words and the folder of the training text do not change the name.
    """
    defaults = asdict(TrainConfig())
    settings = {name: value for name, value in _settings(config).items() if value != defaults[name]}
    settings["data"] = corpus_name(config.data)
    for name in ("device", "words"):
        settings.pop(name, None)
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    return folder / f"{config.kind}-lr{config.lr_scale:g}-seed{config.seed}-{digest}.json"


def _settings(config: TrainConfig) -> dict:
    """All settings, with the default places of the L3 layers resolved."""
    return asdict(config) | {"l3_after_layers": config.model_config().l3_after_layers}


def read_run(path: Path, config: TrainConfig, texts: Collection[str] | None = None) -> dict:
    """Read a record and check that it is of this configuration.

    Raises ValueError, naming the file, if a setting differs (a default may have changed), if the
    SHA-256 of its text is not among `texts` (None allows any), or if the configuration names a text of
    words and the record lacks its perplexity.
    """
    record = read_record(path)
    ignored = {"device", "data", "words"}
    ignored |= {name for name, kind in _RATES_OF_ONE_KIND.items() if kind != config.kind}
    recorded = _settings(replace(TrainConfig(), **record["config"]))
    differing = [
        f"{name} = {recorded[name]!r}, not {value!r}"
        for name, value in _settings(config).items()
        if name not in ignored and recorded[name] != value
    ]
    if differing:
        raise ValueError(f"{path} records a run with {', '.join(differing)}: move it away")
    if texts is not None and record["corpus"]["sha256"] not in texts:
        raise ValueError(f"{path} records a run on another text: move it away, or use --folder")
    if config.words and not {"words", "diverged"} & set(record):
        raise ValueError(f"{path} has no perplexity per word: move it away, or use --folder")
    return record


def read_runs(
    configs: Sequence[TrainConfig], folder: Path, texts: Collection[str] | None = None
) -> list[dict]:
    """Read the records of several runs.

    Raises MissingRun if some do not exist, and ValueError for records that `read_run` refuses.
    """
    paths = {record_path(config, folder): config for config in configs}
    missing = {path: config for path, config in paths.items() if not path.exists()}
    records = [read_run(path, paths[path], texts) for path in paths if path not in missing]
    if missing:
        name = next(iter(missing)).name
        raise MissingRun(
            f"the run {name} is not recorded: its experiment has not finished", [*missing.values()]
        )
    return records


def final_loss(record: dict) -> float:
    """Nats per token on all held-out text at the end of the run; infinite if the run diverged."""
    loss = record["evaluations"][-1]["loss"]
    return math.inf if math.isnan(loss) else loss


def loss_curve(record: dict) -> dict[int, float]:
    """Nats per token on a fixed sample of the held-out text, by tokens trained, without the start."""
    evaluations = [e for e in record["evaluations"] if e["step"] and not e["everything"]]
    return {e["tokens"]: e["loss"] for e in evaluations}
