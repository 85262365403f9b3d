"""Made-up and damaged input for parsers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron.errors import UserError

EXAMPLES = pytest.mark.parametrize(
    "examples", [100, pytest.param(10_000, marks=[pytest.mark.faults, pytest.mark.timeout(3600)])]
)
NUMBERS = [0, 1, 2, 3, 4, 5, 255, 2**31 - 1, 2**31, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 1]


def law(examples: int, **strategies: st.SearchStrategy) -> Callable[[Callable[..., None]], None]:
    """Check the decorated function over so many examples, now."""

    def check(function: Callable[..., None]) -> None:
        settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))(
            given(**strategies)(function)
        )()

    return check


@st.composite
def damaged(draw: st.DrawFn, content: bytes, puts: st.SearchStrategy[bytes] | None = None) -> bytes:
    """`content` with up to four changes: bytes replaced, put in, taken out, or the rest cut off."""
    data = bytearray(content)
    put = st.binary(max_size=6) if puts is None else st.one_of(st.binary(max_size=6), puts)
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(data)))
        new = draw(put)
        taken = draw(st.sampled_from([0, 1, len(new), len(new), len(new), 8, len(data)]))
        data[at : at + taken] = new
    return bytes(data)


def outcome(function: Callable[..., object], *arguments: object) -> object:
    """What `function` returns, or the UserError that it raises, in one line."""
    try:
        return function(*arguments)
    except UserError as error:
        assert str(error) and "\n" not in str(error)
        return error


DEEPSPEED_KEYS = {
    "train_batch_size": "global_batch_size",
    "train_micro_batch_size_per_gpu": "micro_batch_size",
    "steps_per_print": "log_interval",
    "gradient_clipping": "clip_grad",
    "optimizer.params.lr": "lr",
    "optimizer.params.eps": "adam_eps",
    "optimizer.params.weight_decay": "weight_decay",
    "fp16.loss_scale_window": "loss_scale_window",
    "fp16.hysteresis": "hysteresis",
    "fp16.min_loss_scale": "min_loss_scale",
    "zero_optimization.stage": "zero_stage",
    "bf16.enabled": "bf16",
    "curriculum_learning.min_difficulty": "seqlen_start",
    "curriculum_learning.schedule_config.total_curriculum_step": "seqlen_warmup_iters",
    "curriculum_learning.schedule_config.difficulty_step": "seqlen_multiple",
    "curriculum_learning.schedule_config.root_degree": "seqlen_root_degree",
}
"""Key of a DeepSpeed configuration -> the setting with the same value."""


def value_at(document: Any, key: str) -> Any:
    """The value under a dotted key; None where there is none."""
    for name in key.split("."):
        document = document.get(name) if isinstance(document, dict) else None
    return document


@st.composite
def deepspeed_documents(draw: st.DrawFn) -> tuple[dict[str, Any], dict[str, Any]]:
    """A whole DeepSpeed configuration, and the settings that it stands for."""
    whole, real = st.integers(1, 2**40), st.floats(0, 1e6) | st.integers(0, 9)
    multiple = draw(st.sampled_from([1, 3, 8, 16]))
    start, growth = draw(st.integers(1, 99)) * multiple, draw(st.integers(0, 99)) * multiple
    degree = draw(st.none() | st.integers(1, 16))
    schedule = {"total_curriculum_step": draw(whole), "difficulty_step": multiple}
    document: dict[str, Any] = {
        "train_batch_size": draw(whole),
        "train_micro_batch_size_per_gpu": draw(whole),
        "steps_per_print": draw(whole),
        "gradient_clipping": draw(real),
        "optimizer": {
            "type": draw(st.sampled_from(["Adam", "AdamW", "adamw"])),
            "params": {"lr": draw(real), "eps": draw(real), "weight_decay": draw(real)},
        },
        "fp16": {"enabled": True, "loss_scale_window": draw(whole), "hysteresis": 3, "min_loss_scale": draw(real)},
        "zero_optimization": {"stage": draw(st.sampled_from([0, 2, 3]))},
        "bf16": {"enabled": False},
        "curriculum_learning": {
            "enabled": True,
            "curriculum_type": "seqlen",
            "min_difficulty": start,
            "max_difficulty": start + growth,
            "schedule_type": "fixed_linear" if degree is None else "fixed_root",
            "schedule_config": schedule if degree is None else {**schedule, "root_degree": degree},
        },
    }
    settings = {name: value for key, name in DEEPSPEED_KEYS.items() if (value := value_at(document, key)) is not None}
    for name in ("fp16", "zero_optimization", "bf16", "optimizer"):
        if not draw(st.integers(0, 3)):
            for key, setting in DEEPSPEED_KEYS.items():
                if key.startswith(f"{name}."):
                    del settings[setting]
            del document[name]
    return document, settings
