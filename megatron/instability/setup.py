"""What was compared: what the runs have in common, and the settings in which they differ, from their config.yaml."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from pathlib import Path

from megatron.arguments import flat, read_config, yaml_value
from megatron.config import BatchSizeWarmupConfig, Config, SeqlenWarmupConfig
from megatron.console import format_count
from megatron.data.indexed_dataset import Sidecar, paths_of
from megatron.data.vocabulary import prefixes_of, vocabulary_size
from megatron.errors import UserError
from megatron.in_words import batch_size_pacing, learning_rate, seqlen_pacing
from megatron.instability.summary import Run
from megatron.instability.tables import ABSENT, MARK, Row, Table
from megatron.model.flops import parameter_count

PLACES = {"save", "load", "data_cache_path", "tensorboard_dir"} | {
    f"wandb_{name}" for name in ("project", "entity", "name", "mode")
}
"""Settings that say where something is written, and change nothing of a run."""


@dataclass(frozen=True)
class Setup:
    """What a report says of the runs before any result."""

    facts: tuple[tuple[str, str], ...]
    """Label and text of what all runs have in common."""
    table: Table
    """A row a run, a column a setting in which they differ."""


def setup_of(runs: Sequence[Run]) -> Setup:
    """The setup of the runs. A run whose settings cannot be read is named in a footnote, and left out of the rest."""
    found = [_read(run) for run in runs]
    configs = [config for config in found if isinstance(config, Config)]
    settings = [_settings(config) for config in configs]
    effective = [_without_effect(own) for own in settings]
    facts = [(label, [text(config) for config in configs]) for label, text in FACTS]
    # A warmup's settings that a run without it has too differ in their effect, but were not chosen.
    names = [name for name in settings[0] if all(_differ(name, of) for of in (settings, effective))] if settings else []
    # What follows from several settings is told run by run too.
    derived = [label for label, texts in facts if label == "parameters" and len(set(texts)) > 1]
    rows = []
    for place, (run, config) in enumerate(zip(runs, found, strict=True)):
        if isinstance(config, Config):
            own = _without_effect(_settings(config))
            cells = [*(own[name] for name in names), *(text(config) for label, text in FACTS if label in derived)]
            mark = ""
        else:
            cells, mark = [ABSENT] * (len(names) + len(derived)), f" {MARK}"
        rows.append(Row((run.name, *cells, _written(run) + mark), place))
    flags = (f"--{name.replace('_', '-')}" for name in names)
    return Setup(
        tuple((label, texts[0]) for label, texts in facts if len(set(texts)) == 1),
        Table(
            "Setup",
            f"{_opening(len(configs), bool(names))}A run's config.yaml has all of its settings, and runs it again with "
            "pretrain_gpt2.py --config. On what machine it ran, and with which versions, its files do not say.",
            ("run", *flags, *derived, "log last written (UTC)"),
            tuple(rows),
            tuple(
                f"{MARK} {run.name}: {fault}"
                for run, fault in zip(runs, found, strict=True)
                if not isinstance(fault, Config)
            ),
        ),
    )


def _opening(known: int, differ: bool) -> str:
    if known < 2:
        return ""
    places = "but for where things are written"
    if differ:
        return f"The settings in which the runs differ, {places} ({ABSENT}: not set, or without effect). "
    return f"No setting differs, {places}. "


def _read(run: Run) -> Config | str:
    """The run's settings, or why they are not known."""
    path = run.path and run.path.with_name("config.yaml")
    if path is None or not path.is_file():
        return "no config.yaml beside its log, so that its settings are not known"
    try:
        return read_config(path)
    except UserError as error:
        return f"its settings cannot be read: {error}"


def _differ(name: str, settings: Sequence[dict[str, str]]) -> bool:
    return len({own[name] for own in settings}) > 1


def _settings(config: Config) -> dict[str, str]:
    """Field -> its value as a text, ABSENT where it is not set."""
    texts = {name: yaml_value(value) for name, value in flat(config).items() if name not in PLACES}
    return {name: (text or ABSENT).strip('"') for name, text in texts.items()}


def _without_effect(settings: dict[str, str]) -> dict[str, str]:
    """The settings, ABSENT those of a warmup that is off or of another kind."""
    if settings["seqlen_warmup"] in ("discrete", "mixed"):  # their lengths stand in the stages and the cycle
        settings = settings | {"seqlen_start": ABSENT}
    for switch, section in (("seqlen_warmup", SeqlenWarmupConfig), ("batch_size_warmup", BatchSizeWarmupConfig)):
        if settings[switch] == "none":
            settings = settings | {f.name: ABSENT for f in fields(section) if f.name != switch}
    return settings


def _written(run: Run) -> str:
    if run.path is None or not run.path.is_file():
        return ABSENT
    return f"{datetime.fromtimestamp(run.path.stat().st_mtime, UTC):%Y-%m-%d %H:%M}"


def _model(config: Config) -> str:
    model = config.model
    return f"{model.num_layers} layers, hidden size {model.hidden_size:,}, {model.num_attention_heads} attention heads"


def _parameters(config: Config) -> str:
    try:
        size = vocabulary_size(config)
    except UserError:
        size = None
    if size is None:
        return "not known without the data or the tokenizer"
    return f"{format_count(parameter_count(config.model, size))} with a vocabulary of {size:,}"


def _data(config: Config) -> str:
    try:
        prefixes = prefixes_of(config.data)
    except UserError:  # nothing that a run could have trained on
        return " ".join(config.data.data_path)
    parts = []
    for prefix in prefixes:
        sidecar = Sidecar.read(paths_of(prefix)[2])
        counts = "" if sidecar is None else f" ({format_count(sidecar.tokens)} tokens, {sidecar.documents:,} documents)"
        parts.append(Path(prefix).name + counts)
    return f"{', '.join(parts) or ABSENT}; training, validation and test split {config.data.split}"


def _numbers(config: Config) -> str:
    return "fp16" if config.training.fp16 else "bf16" if config.training.bf16 else "fp32"


def _end(config: Config) -> str:
    ends = config.training.ends()
    units = {"tokens": "tokens", "iters": "steps", "samples": "samples"}
    return " or ".join(f"{format_count(end.value)} {units[end.unit]}" for end in ends) or ABSENT


FACTS: tuple[tuple[str, Callable[[Config], str]], ...] = (
    ("model", _model),
    ("parameters", _parameters),
    ("full length", lambda c: f"{c.model.seq_length:,} tokens"),
    ("data", _data),
    ("trained for", _end),
    ("length warmup", seqlen_pacing),
    ("batch", lambda c: f"{c.training.global_batch_size:,} sequences{batch_size_pacing(c)}"),
    ("learning rate", learning_rate),
    ("arithmetic", _numbers),
    ("seed", lambda c: str(c.training.seed)),
)
"""Label -> text of a fact; it is shown where all runs have the same."""
