"""The schedules of a run, in words."""

from __future__ import annotations

from typing import get_args

from megatron.config import Config
from megatron.console import format_count
from megatron.growth import Growth
from megatron.progress import Duration


def seqlen_pacing(config: Config) -> str:
    """The sequence length warmup in words."""
    warmup = config.seqlen_warmup
    words: str = warmup.seqlen_warmup
    if words in get_args(Growth):
        words += f" from {warmup.seqlen_start} over {_span(warmup.duration())}"
    elif words in ("discrete", "mixed"):
        words += f" {warmup.seqlen_stages or warmup.seqlen_cycle} ({warmup.seqlen_stages_unit})"
    elif words == "adaptive":
        step = warmup.adaptive_step(config.model.seq_length)
        words += f" from {warmup.seqlen_start} by {step} after good validations"
    return words if warmup.seqlen_realisation == "truncate" else f"{words}, by {warmup.seqlen_realisation}"


def batch_size_pacing(config: Config) -> str:
    """The batch size warmup in words, as a clause."""
    warmup = config.batch_size_warmup
    if warmup.batch_size_warmup == "linear":
        return f" (from {warmup.batch_size_start} over {_span(warmup.duration())})"
    return f" ({warmup.batch_size_stages})" if warmup.batch_size_warmup == "stages" else ""


def learning_rate(config: Config) -> str:
    """Peak, decay and warmup of the learning rate in words."""
    rate = config.learning_rate
    words, over = f"{_short(rate.lr)} {rate.lr_decay_style}", _span(rate.decay(config.training))
    if rate.lr_decay_style == "wsd":
        over = f"the last {100 * rate.lr_wsd_fraction:g}% of {over}"
    if rate.lr_decay_style != "constant":
        words += f" to {_short(rate.min_lr)} over {over}"
    warmup = rate.warmup(config.training)
    return f"{words}, warmup {_span(warmup)}" if warmup.value else f"{words}, no warmup"


def _span(duration: Duration) -> str:
    if duration.unit == "tokens":
        return f"{format_count(duration.value)} tokens"
    unit = "steps" if duration.unit == "iters" else duration.unit
    return f"{duration.value:,} {unit if duration.value != 1 else unit[:-1]}"


def _short(rate: float) -> str:
    """As one would write it: 6e-4."""
    digits, _, power = f"{rate:.5e}".partition("e")
    return f"{float(digits):g}e{int(power)}" if rate else "0"
