"""All that a resume needs, in one place."""

from __future__ import annotations

import platform
import re
from dataclasses import dataclass, field, fields
from typing import Any

import torch

import megatron
from megatron.arguments import flat
from megatron.config import (
    BatchSizeWarmupConfig,
    Config,
    LearningRateConfig,
    ModelConfig,
    OptimizerConfig,
    SeqlenWarmupConfig,
)
from megatron.errors import UserError
from megatron.instability.loss_ratio import LossRatio, PositionMatchedLossRatio
from megatron.model.gpt2 import GPT2Model
from megatron.optimizer.loss_scale import LossScaler
from megatron.pacing.seqlen_warmup import AdaptivePacing
from megatron.progress import Progress

GUARDED = (
    {
        f.name
        for s in (ModelConfig, SeqlenWarmupConfig, BatchSizeWarmupConfig, LearningRateConfig, OptimizerConfig)
        for f in fields(s)
    }
    | {"seed", "global_batch_size", "fp16", "bf16", "split", "eod_mask_loss", "reset_position_ids"}
    | {"reset_attention_mask"}
) - {"model_size", "moment_statistics_interval"}
"""Settings that a resume must not change unnoticed."""
NEEDED_BY_WEIGHTS = ("num_attention_heads", "norm_epsilon", "tokenizer")
"""Settings that give the same weights another meaning, and that their shapes do not tell."""
SHAPES = ("num_layers", "hidden_size", "max_position_embeddings")
"""Settings that give the weights their shapes, so that no --override helps."""


@dataclass
class TrainState:
    """What changes while a run goes on."""

    model: GPT2Model
    optimizer: torch.optim.AdamW
    scaler: LossScaler
    matched_ratio: PositionMatchedLossRatio
    adaptive: AdaptivePacing
    loss_ratio: LossRatio = field(default_factory=LossRatio)
    progress: Progress = field(default_factory=Progress)
    validation_due: bool = False
    """A stop cut the validation after the last step short."""
    nonfinite_steps: int = 0
    """Steps in a row, up to the last one, that were skipped for a loss or gradient that was not finite."""
    spiking: bool = False
    """The last step's loss ratio was above the limit."""
    skipped_samples: list[list[int]] = field(default_factory=list)
    """[first, end] of the samples that rollbacks skip, rising: a sample's number is its place among the others."""
    training_seconds: float = 0.0
    """Wall time spent in steps."""
    elapsed_seconds: float = 0.0
    """Wall time of the whole run up to the last checkpoint, evaluation and saving included."""

    def sample_number(self, consumed_samples: int) -> int:
        """The number of the first sample of a step before which `consumed_samples` were drawn."""
        number = consumed_samples
        for first, end in self.skipped_samples:
            if number >= first:
                number += end - first
        return number

    def to_dict(self, settings: dict[str, Any], *, layout: str, rng: list[dict[str, Any]] | None) -> dict[str, Any]:
        """Everything but the tensors, as JSON values; `rng` are the generators of all ranks, in their order."""
        return {
            "progress": self.progress.to_dict(),
            "loss_scaler": self.scaler.state_dict(),
            "loss_ratio": self.loss_ratio.state_dict(),
            "position_matched_loss_ratio": self.matched_ratio.state_dict(),
            "adaptive_pacing": self.adaptive.state_dict(),
            "validation_due": self.validation_due,
            "nonfinite_steps": self.nonfinite_steps,
            "spiking": self.spiking,
            "skipped_samples": self.skipped_samples,
            "training_seconds": self.training_seconds,
            "elapsed_seconds": self.elapsed_seconds,
            "layout": layout,
            "rng": rng,
            "settings": settings,
            "versions": {
                "megatron": megatron.__version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
        }

    def load_dict(self, state: dict[str, Any]) -> None:
        """Take over `to_dict`'s values; the generators are left to the caller, who knows the rank."""
        self.progress = Progress(**state["progress"])
        self.scaler.load_state_dict(state["loss_scaler"])
        self.loss_ratio.load_state_dict(state["loss_ratio"])
        self.matched_ratio.load_state_dict(state["position_matched_loss_ratio"])
        self.adaptive.load_state_dict(state["adaptive_pacing"])
        self.validation_due = state["validation_due"]
        self.nonfinite_steps = state["nonfinite_steps"]
        self.spiking = state["spiking"]
        self.skipped_samples = state["skipped_samples"]
        self.training_seconds = state["training_seconds"]
        self.elapsed_seconds = state["elapsed_seconds"]


def guarded_settings(config: Config, *, data: str, tokenizer: str) -> dict[str, Any]:
    """What a checkpoint remembers of its run, to compare at a resume.

    Args:
        data: fingerprint of the corpora, their weights and splits.
        tokenizer: fingerprint of the tokenizer, or the vocabulary's size where there is none.
    """
    settings = {name: value for name, value in flat(config).items() if name in GUARDED}
    settings["max_position_embeddings"] = config.model.positions
    decay = config.learning_rate.decay(config.training)
    if config.learning_rate.lr_decay_style != "constant":
        settings["lr_decay"] = f"{decay.value} {decay.unit}"
    return settings | {"data": data, "tokenizer": tokenizer}


WHENCE = {"lr_decay": " (it follows the length of the run where no --lr-decay-tokens or the like is given)"}
"""Where a setting comes from that is no flag."""


def check_settings(saved: dict[str, Any], current: dict[str, Any], override: tuple[str, ...], where: str) -> list[str]:
    """Compare a checkpoint's settings with the run's.

    Returns:
        A line for each difference that --override allows.

    Raises:
        UserError: listing every other difference, the checkpoint's value and the run's side by side.
    """
    allowed = {name.replace("-", "_") for name in override}
    differences = {n: (_short(saved.get(n)), _short(v)) for n, v in current.items() if saved.get(n) != v}
    refused = {n: d for n, d in differences.items() if n not in allowed or n in SHAPES}
    if refused:
        lines = "; ".join(f"{n}: checkpoint {old}, now {new}{WHENCE.get(n, '')}" for n, (old, new) in refused.items())
        fixed = [n for n in refused if n in SHAPES]
        advice = f"allow the change with --override {' '.join(refused)}"
        if fixed:
            advice = f"start another run in a new --save: its weights have the shapes of its {' and '.join(fixed)}"
        raise UserError(f"{where} was made with other settings: {lines}. Use the checkpoint's, or {advice}")
    return [f"{n}: {old} -> {new}" for n, (old, new) in differences.items()]


def _short(value: Any) -> Any:
    """A digest by its first digits, as other messages have it; any other value as it is."""
    return value[:12] if isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) else value
