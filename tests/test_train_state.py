"""The state of a run through JSON and back: every part of it, and each missed when it is left out."""

from __future__ import annotations

import json
from typing import Any

import pytest

from megatron.config import SeqlenWarmupConfig, TrainingConfig
from megatron.errors import UserError
from megatron.instability.loss_ratio import PositionMatchedLossRatio
from megatron.optimizer.loss_scale import LossScaler
from megatron.pacing.seqlen_warmup import AdaptivePacing
from megatron.progress import Progress
from megatron.training.state import TrainState, check_settings

WRITTEN_ONLY = {"layout", "rng", "settings", "versions"}
"""What load_dict leaves to others."""


def fresh() -> TrainState:
    return TrainState(
        model=None,  # type: ignore[arg-type]
        optimizer=None,  # type: ignore[arg-type]
        scaler=LossScaler(TrainingConfig(train_iters=1, fp16=True)),
        matched_ratio=PositionMatchedLossRatio(32),
        adaptive=AdaptivePacing(SeqlenWarmupConfig(seqlen_warmup="adaptive"), limit=1.2),
    )


def parts(state: TrainState) -> dict[str, Any]:
    written = json.loads(json.dumps(state.to_dict({}, layout="", rng=None)))
    return {name: part for name, part in written.items() if name not in WRITTEN_ONLY}


def used() -> TrainState:
    """A state of which no part is as at the start."""
    state = fresh()
    state.progress = Progress(3, 40, 500, 60, 2)
    state.scaler.update(overflow=True)
    state.loss_ratio.update(2.5)
    state.matched_ratio.update([2000.0], [512])
    state.adaptive.trained(1.1)
    state.adaptive.validated(state.progress, 3.0)
    state.validation_due, state.spiking, state.nonfinite_steps = True, True, 2
    state.skipped_samples, state.training_seconds, state.elapsed_seconds = [[8, 16]], 1.5, 2.5
    return state


def test_every_part_comes_back() -> None:
    state, resumed = used(), fresh()
    resumed.load_dict(parts(state))
    assert parts(resumed) == parts(state)


@pytest.mark.parametrize("left_out", sorted(parts(fresh())))
def test_each_part_is_missed(left_out: str) -> None:
    state, resumed = used(), fresh()
    resumed.load_dict(parts(state) | {left_out: parts(fresh())[left_out]})
    assert parts(resumed) != parts(state)


def test_no_override_gives_weights_other_shapes() -> None:
    saved, now = (
        {"lr": 1.0, "hidden_size": 64, "lr_decay": "9 iters"},
        {"lr": 2.0, "hidden_size": 32, "lr_decay": "8 iters"},
    )
    same = saved | {"lr": 2.0}
    assert check_settings(saved, same, ("lr",), "it") == ["lr: 1.0 -> 2.0"]
    with pytest.raises(UserError, match=r"lr: checkpoint 1.0, now 2.0. .* or allow the change with --override lr$"):
        check_settings(saved, same, (), "it")
    with pytest.raises(UserError, match=r"hidden_size: checkpoint 64, now 32. Use .* the shapes of its hidden_size$"):
        check_settings(saved, now, ("lr", "hidden-size", "lr_decay"), "it")
    with pytest.raises(UserError, match=r"now 8 iters \(it follows the length of the run where no --lr-decay-tokens"):
        check_settings(saved, now, ("lr",), "it")
