"""Steps that go wrong: written down, skipped, or undone by going back to a checkpoint."""

from __future__ import annotations

import json
from dataclasses import asdict
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from megatron.checkpointing.commit import make_directory
from megatron.checkpointing.saver import Saver
from megatron.config import Config
from megatron.console import ProgressLine
from megatron.data.gpt2_dataset import Dataset
from megatron.distributed.world import World
from megatron.errors import UserError
from megatron.files import file_errors, write_atomic
from megatron.metrics import MetricsLogger, json_safe
from megatron.pacing.plan import StepPlan
from megatron.training.home import find_checkpoint, take_over
from megatron.training.state import TrainState
from megatron.training.step import NonFiniteError

FAULTS = "faults"
"""Folder below --save."""


class FaultHandler:
    """Answers losses that are not finite, and spikes, as FaultConfig says. All ranks call it alike."""

    def __init__(
        self,
        config: Config,
        state: TrainState,
        world: World,
        dataset: Dataset,
        saver: Saver,
        metrics: MetricsLogger,
        console: ProgressLine,
    ) -> None:
        self._config = config
        self._state = state
        self._world = world
        self._dataset = dataset
        self._saver = saver
        self._metrics = metrics
        self._console = console

    def nonfinite(self, plan: StepPlan, first: int, error: NonFiniteError) -> UserError | None:
        """Write the step's batch down. What the run is to end with when the step is logged; None where
        --on-nonfinite skip still allows to go on."""
        faults, iteration = self._config.faults, self._state.progress.iteration + 1
        self._state.nonfinite_steps += 1
        last = first + plan.global_batch_size - 1
        what = (
            f"step {iteration:,}: {error} on samples {first:,} to {last:,} (sequence length {plan.seqlen}, "
            f"lr {plan.lr:.3g}); nothing was updated"
        )
        where = ""
        if self._config.checkpoint.save is not None:
            facts = {"fault": str(error), "seqlen": plan.seqlen, "lr": plan.lr}
            where = self._record(iteration, first, plan.global_batch_size, facts)
        if faults.on_nonfinite == "stop":
            return self._world.fault(f"{what}{where}. Lower --lr, lengthen the warmups, or go back to a checkpoint")
        if self._state.nonfinite_steps >= faults.nonfinite_limit:
            return self._world.fault(
                f"{what}{where}; that is --nonfinite-limit {faults.nonfinite_limit} steps in a row. "
                "Lower --lr, lengthen the warmups, or go back to a checkpoint"
            )
        self._console.message(f"{what}, skipped{where}")
        return None

    def _record(self, iteration: int, first: int, sequences: int, facts: dict[str, Any]) -> str:
        """Write the samples of a step into the run's directory; a clause that says where."""
        home = Path(self._config.checkpoint.save or "")
        path = self._world.on_main(
            lambda: str(
                record_batch(home, self._dataset, iteration=iteration, first=first, sequences=sequences, facts=facts)
            )
        )
        return f"; the batch is in {path}"

    def look_for_spike(self, plan: StepPlan, first: int, ratio: float | None) -> None:
        """Log where a spike of the loss begins, and roll back if that is asked for and still allowed."""
        state, faults = self._state, self._config.faults
        was, state.spiking = state.spiking, ratio is not None and ratio > faults.spike_ratio
        if not state.spiking or was or ratio is None:
            return
        end = first + plan.global_batch_size
        iteration = state.progress.iteration
        entry = {
            **state.progress.position(),
            "loss_ratio": ratio,
            "samples": [first, end],
        }
        self._metrics.log_event(entry, event="spike")
        self._console.message(
            f"step {iteration:,}: loss ratio {ratio:.3f} on samples {first:,} to {end - 1:,} (a jump of the loss above "
            "its smallest so far: harmless if it does not come back)"
        )
        if faults.on_spike == "rollback":
            self._roll_back(entry)

    def _roll_back(self, spike: dict[str, Any]) -> None:
        """Go back to the last checkpoint, to come here again without the samples of the step that spiked.

        What follows is determined by that checkpoint alone: a crash before the next one leads to the same rollback.
        """
        state, limit = self._state, self._config.faults.max_rollbacks
        if len(state.skipped_samples) >= limit:
            self._console.message(f"no rollback: --max-rollbacks {limit} have been made")
            return
        self._saver.wait()
        checkpoint = find_checkpoint(self._config.checkpoint.rolling_back(), self._world, self._console)
        if checkpoint is None:
            self._console.message("no rollback: there is no checkpoint yet")
            return
        skipped = sorted([*state.skipped_samples, spike["samples"]])
        take_over(state, checkpoint, self._config, self._world)
        state.skipped_samples = skipped
        self._world.on_main(
            lambda: self._metrics.truncate_to(state.progress.iteration, consumed_tokens=state.progress.consumed_tokens)
        )
        entry = spike | {
            "iteration": state.progress.iteration + 1,
            "spiked_at": spike["iteration"],
            "skipped_samples": skipped,  # an earlier rollback to the same checkpoint is no longer in the log
        }
        self._metrics.log_event(entry, event="rollback")
        self._console.message(f"rolled back to {checkpoint.path}; the samples of the spike will be skipped")


def record_batch(
    home: Path, dataset: Dataset, *, iteration: int, first: int, sequences: int, facts: dict[str, Any]
) -> Path:
    """Write SAVE/faults/step_NNNNNNN.json and .npy for the step that read samples first .. first + sequences.

    The JSON has `facts`, and for each sample the documents, offsets and lengths that it is made of; the .npy has its
    tokens, [sequences, seq_length + 1] int32. Raises UserError where it cannot be written.
    """
    path = home / FAULTS / f"step_{iteration:07d}.json"
    numbers = range(first, first + sequences)
    samples = [{"sample": n, "pieces": [asdict(piece) for piece in dataset.documents_of(n)]} for n in numbers]
    tokens = BytesIO()
    np.save(tokens, dataset.samples(np.array(numbers, dtype=np.int64)).astype(np.int32), allow_pickle=False)
    with file_errors("write", path):
        make_directory(path.parent)
    write_atomic(path.with_suffix(".npy"), tokens.getvalue())
    write_atomic(path, json.dumps(json_safe({"iteration": iteration, **facts, "samples": samples})) + "\n")
    return path
