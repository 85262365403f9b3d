"""The training loop: steps, and what is done between them."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron.arguments import to_yaml
from megatron.checkpointing.rng import capture_rng
from megatron.checkpointing.saver import Saver
from megatron.checkpointing.state import collect
from megatron.config import Config
from megatron.console import ProgressLine
from megatron.data.batch import Batch
from megatron.data.datasets import Datasets
from megatron.data.gpt2_dataset import Dataset
from megatron.data.sampler import SampleLoader
from megatron.distributed.watch import Watch
from megatron.distributed.world import World
from megatron.errors import EXIT_FINISHED, EXIT_STOPPED
from megatron.metrics import MetricsLogger
from megatron.optimizer.moment_statistics import MomentStatistics, moment_statistics
from megatron.pacing.plan import Schedules, StepPlan
from megatron.progress import crossed
from megatron.training.evaluation import EvaluationResult, evaluate
from megatron.training.faults import FaultHandler
from megatron.training.home import (
    layout_name,
    write_exit,
)
from megatron.training.state import TrainState
from megatron.training.step import ForwardStep, NonFiniteError, StepResult, TrainStep
from megatron.training.stop import StopRequest

OTHER_RANK = "a signal to another rank"


class Run:
    """One run under way: the loop, and what it does between steps."""

    def __init__(
        self,
        config: Config,
        state: TrainState,
        datasets: Datasets,
        eod: int | None,
        loader: SampleLoader,
        metrics: MetricsLogger,
        console: ProgressLine,
        saver: Saver,
        forward_step: ForwardStep,
        settings: dict[str, Any],
        world: World,
        watch: Watch,
        stop: StopRequest,
        *,
        saved: bool,
    ) -> None:
        """`saved`: --save holds a checkpoint of `state` as it is."""
        self.config = config
        self.state = state
        self.schedules = Schedules(config)
        self._datasets = datasets
        self._eod = eod
        self._loader = loader
        self._metrics = metrics
        self._console = console
        self._saver = saver
        self._forward_step = forward_step
        self._settings = settings
        self._world = world
        self._watch = watch
        self._stop = stop
        self._stop_asked = False
        """Some rank has been asked to stop, and all know."""
        self._train_step = TrainStep(
            state.model, state.optimizer, state.scaler, forward_step,
            config.training, config.optimizer, config.parallel, world, config.seqlen_warmup.seqlen_realisation,
        )  # fmt: skip
        self._faults = FaultHandler(config, state, world, datasets.train, saver, metrics, console)
        self._started = time.monotonic() - state.elapsed_seconds
        self._began = state.progress.iteration
        self._saved_iteration = self._began if saved else None

    def train(self) -> int:
        """Step until a limit is reached or a stop is asked for."""
        schedules, state = self.schedules, self.state
        if self._world.device.type == "cuda" and not schedules.finished(state.progress):
            self._train_step.reserve_memory(self._largest_batch())
        while not schedules.finished(state.progress):
            if state.validation_due:  # a stop has cut it short, before this process or a rollback to its checkpoint
                self._validate(logged="validation" in self._logged())
                self.save()
                if reason := self._stop_reason():
                    return self._stopped(reason)
            before = replace(state.progress)
            self.step(schedules.plan(state.progress))
            state.validation_due |= crossed(self.config.evaluation.interval(), before, state.progress)
            if schedules.finished(state.progress):
                break
            if state.validation_due:
                self._validate()
            if crossed(self.config.checkpoint.interval(), before, state.progress):
                self.save()
            if reason := self._stop_reason():
                self.save()
                return self._stopped(reason)
        return self._finish()

    def _finish(self) -> int:
        """Save the end of the run, then evaluate what the log does not hold yet: a rerun completes what was cut off."""
        self._console.print_last()
        # Adaptive pacing has yet to hear of a validation that is due, should the run be made longer; the others need it
        # only for the log.
        if self.state.validation_due and not self.state.adaptive.on:
            self.state.validation_due, self._saved_iteration = False, None
        worked = self.save() or self.state.progress.iteration > self._began
        done = self._logged()
        if self.state.validation_due:
            self._validate(logged="validation" in done)
            worked |= self.save()
        elif "validation" not in done:
            worked |= self._evaluate(self._datasets.validation, "validation") is not None
        if self.config.evaluation.test and "test" not in done:
            worked |= self._evaluate(self._datasets.test, "test") is not None
        if self._world.any(self._stop.reason is not None):
            return self._stopped(self._stop.reason or OTHER_RANK)
        self._leave("finished", None)
        step = f"{self.state.progress.iteration:,}"
        self._console.message(
            f"finished with step {step}" if worked else f"nothing left to do: the run has ended with step {step}"
        )
        return EXIT_FINISHED

    def _stopped(self, reason: str) -> int:
        """Say that and where the run was stopped."""
        self._console.print_last()
        kept = self.config.checkpoint.save is not None
        self._leave("stopped", reason)
        if self._world.is_main:
            self._stop.answered()
        step, again = (
            self.state.progress.iteration,
            f"start it again with --load {self.config.checkpoint.save} to go on",
        )
        self._console.message(
            f"stopped by {reason}; saved at step {step:,}; {again}"
            if kept
            else f"stopped by {reason}; nothing saved: no --save"
        )
        return EXIT_STOPPED

    def _leave(self, status: str, reason: str | None) -> None:
        """Note in SAVE/exit.json that, and how, the run has ended in order, when all of it is on the disk."""
        self._watch.at("the last save")
        self._saver.wait()
        self._note_end(status, reason)

    def _note_end(self, status: str, reason: str | None) -> None:
        if self.config.checkpoint.save is not None:
            home, iteration = Path(self.config.checkpoint.save), self.state.progress.iteration
            self._world.on_main(lambda: write_exit(home, status, iteration, reason))

    def step(self, plan: StepPlan) -> None:
        """One optimizer step, counted and logged."""
        state = self.state
        progress = state.progress
        self._watch.at(f"step {progress.iteration + 1:,}")
        started = time.monotonic()
        batch, ranks = plan.global_batch_size, (self._world.dp_rank, self._world.layout.dp)
        first = state.sample_number(progress.consumed_samples)
        samples = self._loader.batch(first, batch, *ranks)
        if not self.schedules.finished(later := self.schedules.after(progress, plan)):
            self._loader.prefetch(first + batch, self.schedules.plan(later).global_batch_size, *ranks)
        fatal = None
        try:
            asked = self._stop.reason is not None or self._saver.failed  # which the save at the stop then raises
            result = self._train_step(self._batch(samples), plan, stop_asked=asked)
            state.nonfinite_steps = 0
        except NonFiniteError as error:
            fatal = self._faults.nonfinite(plan, first, error)
            result = error.result
        # Of many ranks all must know, which they do with the next step.
        self._stop_asked = result.stop_asked or (self._world.size == 1 and self._stop.reason is not None)
        self.schedules.advance(progress, plan)
        interval = self.config.optimizer.moment_statistics_interval
        due = interval > 0 and progress.iteration % interval == 0
        moments = moment_statistics(state.optimizer, self._world) if due else None
        seconds = time.monotonic() - started
        state.training_seconds += seconds
        ratio = self._log(plan, result, moments, seconds)
        if fatal is not None:
            self._note_end("diverged", str(fatal))
            raise fatal
        self._faults.look_for_spike(plan, first, ratio)

    def _log(
        self, plan: StepPlan, result: StepResult, moments: MomentStatistics | None, seconds: float
    ) -> float | None:
        """One object of metrics.jsonl, and the progress line; returns the loss ratio."""
        state = self.state
        progress = state.progress
        matched = state.matched_ratio.update(result.bucket_losses, result.bucket_tokens)
        state.adaptive.trained(matched)
        entry: dict[str, Any] = {
            **progress.position(),
            "seqlen": plan.seqlen,
            "global_batch_size": plan.global_batch_size,
            "lr": plan.lr,
            "loss": result.loss,
            "loss_ratio": state.loss_ratio.update(result.loss),
            "position_matched_loss_ratio": matched,
            "loss_by_position": state.matched_ratio.losses(result.bucket_losses, result.bucket_tokens),
            "grad_norm": result.grad_norm,
            "clipped": result.clipped,
            "skipped": result.skipped,
            "loss_scale": result.loss_scale,
            "adam_variance_norm": moments.adam_variance_norm if moments else None,
            "adam_variance_max": moments.adam_variance_max if moments else None,
            "adam_momentum_norm": moments.adam_momentum_norm if moments else None,
            "tokens_per_second": plan.tokens / seconds,
            "step_seconds": seconds,
            "seconds": state.training_seconds,
            "elapsed_seconds": self._elapsed(),
        }
        self._metrics.log_step(entry)
        self._console.update(entry)
        ratio: float | None = entry["loss_ratio"]
        return ratio

    def _logged(self) -> list[str]:
        """The evaluations of this step that the log holds. It is read whole: not for every step."""
        return self._world.on_main(lambda: sorted(self._metrics.events_at(self.state.progress.iteration)))

    def _validate(self, *, logged: bool = False) -> None:
        """Validate after a step; where a stop cuts it short it stays due, and a resume begins with it."""
        state, validated = self.state, self._evaluate(self._datasets.validation, "validation", logged=logged)
        if validated is not None:
            state.adaptive.validated(state.progress, validated.loss)
        state.validation_due = validated is None and self._datasets.validation is not None
        self._stop_asked |= state.validation_due
        self._saved_iteration = None  # what a checkpoint of this step would hold has changed

    def _evaluate(self, dataset: Dataset | None, event: str, *, logged: bool = False) -> EvaluationResult | None:
        """Loss at full length, into the log unless it is there; None without such a split, or where a stop cut it
        short."""
        if dataset is None:
            return None
        self._watch.at(f"{event} after step {self.state.progress.iteration:,}")
        result = evaluate(
            self.state.model,
            self._forward_step,
            dataset,
            self._batch,
            samples=self.config.evaluation.eval_iters * self.config.training.global_batch_size,
            training=self.config.training,
            world=self._world,
            interrupted=self._interrupted,
        )
        if result is None:
            return None
        progress = self.state.progress
        entry = {
            **progress.position(),
            **result.to_dict(),
            "seconds": self.state.training_seconds,
            "elapsed_seconds": self._elapsed(),
        }
        if not logged:
            self._metrics.log_validation(entry, event=event)
        self._console.validation(entry, event=event)
        return result

    def save(self) -> bool:
        """Save a checkpoint of this step, unless there is one or no --save was given; whether it did."""
        state, checkpoint = self.state, self.config.checkpoint
        iteration = state.progress.iteration
        if checkpoint.save is None or self._saved_iteration == iteration:
            return False
        self._watch.at(f"saving step {iteration:,}")
        state.elapsed_seconds = self._elapsed()
        rng = self._world.gather(capture_rng()) if checkpoint.save_rng else None
        self._saver.save(
            iteration=iteration,
            tensors=collect(state.model, state.optimizer if checkpoint.save_optim else None),
            state=state.to_dict(self._settings, layout=layout_name(self.config, self._world), rng=rng),
            config_text=to_yaml(self.config),
        )
        self._saved_iteration = iteration
        return True

    def _stop_reason(self) -> str | None:
        interval = self.config.training.exit_interval
        if not self._stop_asked and interval and self.state.progress.iteration % interval == 0:
            return f"--exit-interval {interval}"
        return (self._stop.reason or OTHER_RANK) if self._stop_asked else None

    def _interrupted(self) -> bool:
        """Whether a validation is to be cut short on this rank; one forward pass of it is some progress."""
        self._watch.at("validation")
        return self._stop.reason is not None

    def _largest_batch(self) -> Batch:
        """This rank's share of a full-length step, of zeros, with the masks that this run uses."""
        sequences = self.config.training.global_batch_size // self._world.layout.dp
        return self._batch(np.zeros((sequences, self.config.model.seq_length + 1), dtype=np.int64))

    def _batch(self, samples: np.ndarray) -> Batch:
        data = self.config.data
        return Batch.from_samples(
            samples,
            eod=self._eod,
            eod_mask_loss=data.eod_mask_loss,
            reset_position_ids=data.reset_position_ids,
            reset_attention_mask=data.reset_attention_mask,
        )

    def _elapsed(self) -> float:
        return time.monotonic() - self._started
