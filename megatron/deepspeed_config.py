"""A DeepSpeed configuration file as settings of ours: its `curriculum_learning` block, and what else has a counterpart.

DeepSpeed's names for the warmup (min_difficulty, total_curriculum_step, ...) live only here; the source is its tutorial
"Curriculum Learning". DeepSpeed sets the length of a step by the number of that step counted from 1 (global_steps + 1),
which is our t too. It works it out in floats, where a length that comes out whole may end just below, and be a multiple
shorter at that one step; ours is exact.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import asdict, dataclass
from math import gcd
from pathlib import Path
from typing import Any, NoReturn

from megatron.config import SeqlenWarmupConfig
from megatron.errors import UserError

COUNTERPARTS: dict[str, tuple[str, type]] = {
    "train_batch_size": ("global_batch_size", int),
    "train_micro_batch_size_per_gpu": ("micro_batch_size", int),
    "gradient_clipping": ("clip_grad", float),
    "steps_per_print": ("log_interval", int),
    "optimizer.params.lr": ("lr", float),
    "optimizer.params.eps": ("adam_eps", float),
    "optimizer.params.weight_decay": ("weight_decay", float),
}
"""Key -> (setting, type). Those of a block that is switched on or off, or of another form, have a function below."""

BATCH = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
"""Keys of which the first is the product of the others and the data parallel ranks."""

SCALING: dict[str, tuple[str, type]] = {
    "fp16.loss_scale_window": ("loss_scale_window", int),
    "fp16.hysteresis": ("hysteresis", int),
    "fp16.min_loss_scale": ("min_loss_scale", float),
}
"""The same, read only where fp16 is enabled."""

GROWTH: dict[str, str] = {
    "min_difficulty": "seqlen_start",
    "schedule_config.total_curriculum_step": "seqlen_warmup_iters",
    "schedule_config.difficulty_step": "seqlen_multiple",
}
"""Key of the curriculum -> setting, for fixed_linear and fixed_root."""

METRICS = {"seqlen_truncate": "truncate", "seqlen_reshape": "reshape"}
"""Metric of the data_efficiency block's curriculum -> --seqlen-realisation."""

REFUSED: dict[str, str] = {
    "scheduler": "give --lr-warmup-iters, --lr-decay-style and --lr-decay-tokens or --lr-decay-iters in its place",
    "amp": "enable bf16 or fp16 in its place",
    "progressive_layer_drop": "every layer is trained in every step here",
    "sparse_attention": "attention is dense here",
    "quantize_training": "there is no quantised training here",
}
"""Block that changes what is trained and has no counterpart -> what to do. Switched off it is ignored."""

KEY_OF_FLAG = {
    "--seqlen-start": "min_difficulty",
    "--seq-length": "max_difficulty",
    "--seqlen-multiple": "schedule_config.difficulty_step",
    "--seqlen-root-degree": "schedule_config.root_degree",
    "--seqlen-stages": "schedule_config",
}
"""Flag that a check of the schedule may name -> the key that it came from."""

KINDS: dict[type, str] = {
    bool: "true or false",
    int: "a positive whole number",
    float: "a number, not negative",
    str: "a text",
    list: "a list of positive whole numbers",
    dict: "an object",
    object: "a value",
}
"""Kind of value that a key may have -> its name in messages."""


@dataclass(frozen=True)
class DeepSpeedConfig:
    """What a DeepSpeed configuration file says."""

    path: Path
    settings: dict[str, Any]
    """Field of config.py -> value. A curriculum, enabled or not, sets all that makes the sequence length warmup."""
    seq_length: int | None
    """Length that the curriculum leads to; None without one."""
    notes: list[str]
    """Lines to show: what is read as something else, and the keys that are ignored."""

    def check_seq_length(self, seq_length: int) -> None:
        """Raise UserError unless the curriculum leads to --seq-length, the length that DeepSpeed does not know."""
        if self.seq_length not in (None, seq_length):
            raise UserError(
                f"--deepspeed-config {self.path}: curriculum_learning.max_difficulty {self.seq_length} must equal "
                f"--seq-length {seq_length}: give --seq-length {self.seq_length}, or correct the file"
            )


def read_deepspeed_config(path: Path) -> DeepSpeedConfig:
    """Read the DeepSpeed configuration file (JSON) at `path`.

    Raises:
        UserError: naming the file and the key, where the file is missing or no JSON, where a key stands twice, is
            missing or has a value of another type, and where curriculum or optimizer is none that there is here.
    """
    document = _Document(path)
    for block, instead in REFUSED.items():
        if document.switched_on(block):
            document.fail(block, f"changes what is trained, and is not read: {instead}")
    settings = document.settings(COUNTERPARTS)
    notes = _batch_notes(document)
    full_length = None
    if document.has("optimizer"):
        settings |= _optimizer(document)
    settings |= _precision(document)
    if document.has("zero_optimization"):
        stage = document.choose("zero_optimization.stage", 0, 1, 2, 3)
        settings["zero_stage"] = 2 if stage == 1 else stage
        if stage == 1:
            notes.append("zero_optimization.stage 1 is read as 2, which shares out gradients too")
        settings |= _offload(document)
    warmup: dict[str, Any] = {}
    if document.has("curriculum_learning"):
        block = "curriculum_learning"
        if document.need(f"{block}.enabled", bool):
            document.choose(f"{block}.curriculum_type", "seqlen")
            warmup, full_length = _curriculum(document, block)
        else:
            warmup = asdict(SeqlenWarmupConfig())
    if metric := _data_efficiency_metric(document):
        if full_length is not None:
            document.fail("data_efficiency", "expected it switched off beside curriculum_learning: keep one of them")
        warmup, full_length = _curriculum(document, metric)
        warmup["seqlen_realisation"] = METRICS[metric.rpartition(".")[2]]
    settings |= warmup
    if ignored := document.ignored():
        notes.append(f"ignored: {', '.join(ignored)}")
    return DeepSpeedConfig(path, settings, full_length, [f"{document.name}: {note}" for note in notes])


def _batch_notes(document: _Document) -> list[str]:
    """What is to be said of the batch; raises where its three keys contradict each other, as DeepSpeed does."""
    batch, micro, steps = (document.get(key, int) for key in BATCH)
    if batch is None and micro is not None:
        shown = f"{micro} x {steps or 1} x its data parallel ranks"
        return [f"without train_batch_size, --global-batch-size decides (DeepSpeed takes {shown})"]
    if steps is None:
        return []
    product = (micro or 1) * steps
    if batch is not None and batch % product:
        shown = " and ".join(f"{key} {value}" for key, value in zip(BATCH[1:], (micro, steps), strict=True) if value)
        document.fail("train_batch_size", f"expected a multiple of {shown} together, {product}, found {batch}")
    ranks = f" ({batch // product} in DeepSpeed)" if batch and micro else ""
    return [f"gradient_accumulation_steps {steps} is not read: it follows from both batches and the ranks{ranks}"]


def _precision(document: _Document) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for block in ("bfloat16", "bf16"):  # the first is the older name
        if document.has(block):
            settings["bf16"] = document.need(f"{block}.enabled", bool)
    if document.has("fp16"):
        settings |= _fp16(document)
    if settings.get("bf16") and settings.get("fp16"):
        document.fail("fp16.enabled", "expected false where bf16.enabled is true: keep one of them")
    return settings


def _offload(document: _Document) -> dict[str, Any]:
    """Weights and optimizer state go to the host's memory together here."""
    block, devices = "zero_optimization", []
    for part in ("offload_optimizer", "offload_param"):
        if document.get(f"{block}.{part}.device", object) is not None:
            devices.append(document.choose(f"{block}.{part}.device", "none", "cpu"))
    return {"optimizer_cpu_offload": "cpu" in devices} if devices else {}


def _data_efficiency_metric(document: _Document) -> str | None:
    """The key of the metric by which the data_efficiency block's curriculum truncates; None without one."""
    block = "data_efficiency"
    if not document.has(block) or not document.need(f"{block}.enabled", bool):
        return None
    if document.get(f"{block}.data_routing.enabled", bool):
        document.fail(f"{block}.data_routing.enabled", "expected false: there is no random layer-token drop here")
    learning = f"{block}.data_sampling.curriculum_learning"
    if not all(document.get(f"{part}.enabled", bool) for part in (learning.rpartition(".")[0], learning)):
        return None
    metrics = f"{learning}.curriculum_metrics"
    names = list(document.need(metrics, dict))
    if len(names) != 1 or names[0] not in METRICS:
        document.fail(metrics, f"expected {' or '.join(METRICS)} alone, found {_shown(names)}")
    document.choose(f"{metrics}.{names[0]}.difficulty_type", "value")
    return f"{metrics}.{names[0]}"


def _optimizer(document: _Document) -> dict[str, Any]:
    name = document.need("optimizer.type", str)
    if name.lower() not in ("adam", "adamw"):  # DeepSpeed's Adam decouples the weight decay too, by default
        document.fail("optimizer.type", f"expected Adam or AdamW, found {_shown(name)}")
    if document.get("optimizer.params.adam_w_mode", bool) is False:
        document.fail("optimizer.params.adam_w_mode", "expected true, found false: weight decay is decoupled here")
    betas = document.get("optimizer.params.betas", object)
    if betas is None:
        return {}
    if not isinstance(betas, list) or len(betas) != 2 or not all(_is(beta, float) for beta in betas):
        document.fail("optimizer.params.betas", f"expected two numbers, not negative, found {_shown(betas)}")
    return {"adam_beta1": float(betas[0]), "adam_beta2": float(betas[1])}


def _fp16(document: _Document) -> dict[str, Any]:
    """Of a block that is switched off nothing else is read: `loss_scale` would need --fp16."""
    if not document.need("fp16.enabled", bool):
        return {"fp16": False, "loss_scale": None}
    settings = {"fp16": True} | document.settings(SCALING)
    scale = document.get("fp16.loss_scale", float)
    if scale is not None:
        settings["loss_scale"] = scale or None  # 0 is dynamic
    power = document.get("fp16.initial_scale_power", object)
    if power is not None:
        if type(power) is not int or not 0 <= power <= 127:
            document.fail("fp16.initial_scale_power", f"expected a whole number from 0 to 127, found {_shown(power)}")
        settings["initial_loss_scale"] = 2.0**power
    return settings


def _curriculum(document: _Document, block: str) -> tuple[dict[str, Any], int]:
    """The settings of the sequence length warmup of the curriculum in `block`, and the length that it leads to."""
    schedule = document.choose(f"{block}.schedule_type", "fixed_linear", "fixed_root", "fixed_discrete")
    full_length = document.need(f"{block}.max_difficulty", int)
    if schedule == "fixed_discrete":
        settings = _stages(document, block, full_length)
    else:
        settings = {name: document.need(f"{block}.{key}", int) for key, name in GROWTH.items()}
        settings["seqlen_warmup"] = schedule.removeprefix("fixed_")
        if schedule == "fixed_root":
            settings["seqlen_root_degree"] = document.need(f"{block}.schedule_config.root_degree", int)
    warmup = SeqlenWarmupConfig(**settings)
    try:
        warmup.check(full_length)
    except UserError as error:
        document.fail(block, re.sub(r"--[a-z-]+", lambda flag: KEY_OF_FLAG.get(flag[0], flag[0]), str(error)))
    settings = asdict(warmup)
    del settings["seqlen_realisation"]  # how a sample is made short is no matter of the schedule
    return settings, full_length


def _stages(document: _Document, block: str, full_length: int) -> dict[str, Any]:
    """fixed_discrete: difficulty [1, 2, 3] and max_step [5, 10] are length 1 in steps 1-5, 2 in 6-10, and then 3."""
    key = f"{block}.schedule_config.difficulty"
    start = document.need(f"{block}.min_difficulty", int)
    lengths = document.need(key, list)
    ends = document.need(f"{block}.schedule_config.max_step", list)
    if len(lengths) != len(ends) + 1:
        document.fail(key, f"expected one value more than in max_step, which has {len(ends)}, found {len(lengths)}")
    if (lengths[0], lengths[-1]) != (start, full_length):
        document.fail(
            key,
            f"expected the first to be min_difficulty {start} and the last max_difficulty {full_length}, "
            f"found {lengths[0]} and {lengths[-1]}",
        )
    if max(lengths[:-1], default=0) >= full_length:
        document.fail(key, f"expected only the last to be max_difficulty {full_length}: DeepSpeed would stay there")
    stages = [f"{length}:{end}" for length, end in zip(lengths, ends, strict=False)] + [str(full_length)]
    return {
        "seqlen_warmup": "discrete",
        "seqlen_stages": ",".join(stages),
        "seqlen_multiple": gcd(SeqlenWarmupConfig.seqlen_multiple, *lengths),  # DeepSpeed asks for no multiple here
    }


class _Document:
    """The content of a file, by keys such as fp16.loss_scale; it knows which keys nobody has asked for."""

    def __init__(self, path: Path) -> None:
        self.name = f"--deepspeed-config {path}"
        self._content = self._load(path)
        self._asked: set[tuple[str, ...]] = set()

    def fail(self, key: str, message: str) -> NoReturn:
        """Raise the UserError for `key`."""
        raise UserError(f"{self.name}: {key}: {message}")

    def has(self, block: str) -> bool:
        """Whether the file has this block."""
        return block in self._content

    def switched_on(self, block: str) -> bool:
        """Whether the file has this block, and does not switch it off."""
        content = self._content.get(block)
        return bool(content) and not (isinstance(content, dict) and content.get("enabled") is False)

    def get(self, key: str, kind: type) -> Any:
        """The value of `key`, one of KINDS, or None where the file has no such key."""
        path = tuple(key.split("."))
        self._asked.add(path)
        content = self._content
        for depth, name in enumerate(path[:-1], start=1):
            content = content.get(name, {})
            if not isinstance(content, dict):
                self.fail(".".join(path[:depth]), f"expected an object, found {_shown(content)}")
        if path[-1] not in content:
            return None
        value = content[path[-1]]
        if not _is(value, kind):
            self.fail(key, f"expected {KINDS[kind]}, found {_shown(value)}")
        return float(value) if kind is float else value

    def need(self, key: str, kind: type) -> Any:
        """As `get`, for a key that must be there."""
        value = self.get(key, kind)
        if value is None:
            self.fail(key, f"missing; expected {KINDS[kind]}")
        return value

    def choose(self, key: str, *choices: Any) -> Any:
        """The value of a key that must be there and be one of `choices`."""
        value = self.need(key, object)
        if not any(type(value) is type(choice) and value == choice for choice in choices):
            self.fail(key, f"expected {' or '.join(map(str, choices))}, found {_shown(value)}")
        return value

    def settings(self, counterparts: dict[str, tuple[str, type]]) -> dict[str, Any]:
        """The settings for those of the keys that the file has."""
        values = {name: self.get(key, kind) for key, (name, kind) in counterparts.items()}
        return {name: value for name, value in values.items() if value is not None}

    def ignored(self) -> list[str]:
        """The keys that nobody has asked for, a block of which nothing is known as one."""
        return [".".join(map(_shown_key, path)) for path in self._unasked(self._content, ())]

    def _unasked(self, content: dict[str, Any], above: tuple[str, ...]) -> list[tuple[str, ...]]:
        paths: list[tuple[str, ...]] = []
        for key, value in content.items():
            path = (*above, key)
            if any(asked[: len(path)] == path for asked in self._asked - {path}):
                paths += self._unasked(value, path)
            elif path not in self._asked:
                paths.append(path)
        return paths

    def _load(self, path: Path) -> dict[str, Any]:
        """The object that the file holds; NaN, Infinity and a key that stands twice are refused."""

        def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
            found: dict[str, Any] = {}
            for key, value in pairs:
                if key in found:
                    self.fail(_shown_key(key), "is given twice; keep one")
                found[key] = value
            return found

        def refuse(constant: str) -> NoReturn:
            raise ValueError(f"{constant} is no number of JSON")

        try:
            content = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=unique, parse_constant=refuse)
        except FileNotFoundError:
            raise UserError(f"{self.name}: no such file") from None
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{self.name}: cannot be read: {error}") from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{self.name}: not valid JSON: {error}") from None
        if not isinstance(content, dict):
            raise UserError(f"{self.name}: expected an object {{...}}, found {_shown(content)}")
        return content


def _is(value: Any, kind: type) -> bool:
    """Whether a value of JSON is of a kind: true is no number there, 1e999 none either, and null nothing."""
    if kind is object:
        return value is not None
    if kind is list:
        return isinstance(value, list) and all(_is(item, int) for item in value)
    if kind is float:
        return type(value) in (int, float) and 0 <= value <= sys.float_info.max
    if kind is int:
        return type(value) is int and value > 0
    return type(value) is kind


def _shown(value: object) -> str:
    """A value for a message: on one line, and short."""
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        items = ["..." if isinstance(item, (list, dict)) else _shown(item) for item in value[:4]]
        return f"[{', '.join(items)}{', ...' * (len(value) > 4)}]"
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


def _shown_key(key: str) -> str:
    """A key for a message: as it is where it is a word, else as in the file."""
    return key if key.isidentifier() else _shown(key)
