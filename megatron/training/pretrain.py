"""The training loop, and the run around it."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron.arguments import to_yaml
from megatron.checkpointing.checkpoint import check_space, load_checkpoint, save_checkpoint
from megatron.checkpointing.commit import damaged_checkpoints, find_latest, reap_temporary, set_aside_newer
from megatron.checkpointing.state import collect, restore
from megatron.config import CheckpointConfig, Config
from megatron.console import ProgressLine, format_count
from megatron.data.batch import Batch
from megatron.data.blending import parse_data_path
from megatron.data.datasets import Datasets, build_datasets
from megatron.data.gpt2_dataset import Dataset
from megatron.data.sampler import SampleLoader
from megatron.errors import EXIT_FINISHED, EXIT_STOPPED, UserError
from megatron.files import write_atomic
from megatron.metrics import METRICS_FILE, MetricsLogger
from megatron.model.flops import parameter_count
from megatron.optimizer.moment_statistics import MomentStatistics, moment_statistics
from megatron.pacing.plan import Schedules, StepPlan, plan_run
from megatron.progress import Duration, Progress
from megatron.training.evaluation import evaluate
from megatron.training.setup import (
    ModelProvider,
    build_state,
    choose_device,
    find_vocabulary,
    seed_generators,
)
from megatron.training.state import NEEDED_BY_WEIGHTS, TrainState, check_settings, guarded_settings
from megatron.training.step import ForwardStep, NonFiniteError, StepResult, TrainStep
from megatron.training.stop import StopRequest

CHECKPOINTS = "checkpoints"
"""Folder of the checkpoints below --save."""


def pretrain(config: Config, model_provider: ModelProvider, forward_step: ForwardStep) -> int:
    """Train as `config` says, from scratch or from the newest checkpoint below --load.

    Returns:
        EXIT_FINISHED, or EXIT_STOPPED where a signal or --exit-interval ended it with its state saved.
    """
    check_homes(config.checkpoint)
    device = choose_device(config.training)
    seed_generators(config.training.seed)
    vocabulary = find_vocabulary(config.tokenizer, [prefix for _, prefix in parse_data_path(config.data.data_path)])
    datasets = build_datasets(
        config.data, seq_length=config.model.seq_length, seed=config.training.seed, vocab_size=vocabulary.size
    )
    settings = guarded_settings(config, data=datasets.fingerprint, tokenizer=vocabulary.fingerprint)
    name = Path(config.checkpoint.save).name if config.checkpoint.save else "pretrain"
    with (
        ProgressLine(name, target_tokens=target_tokens(config), log_interval=config.logging.log_interval) as console,
        StopRequest() as stop,
    ):
        state = build_state(config, vocabulary.size, device, model_provider, console.message)
        resume(state, config.checkpoint, settings, console)
        home = open_home(config, state, console)
        console.message(describe(config, datasets, vocabulary.size, str(device), state.progress))
        with (
            MetricsLogger(
                home, tensorboard=config.logging.tensorboard, tensorboard_dir=config.logging.tensorboard_dir
            ) as metrics,
            SampleLoader(datasets.train, config.data.num_workers) as loader,
        ):
            metrics.truncate_to(state.progress.iteration, consumed_tokens=state.progress.consumed_tokens)
            run = Run(
                config, state, datasets, vocabulary.eod, loader, metrics, console, forward_step, settings, home, stop
            )
            return run.train()


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
        forward_step: ForwardStep,
        settings: dict[str, Any],
        home: Path | None,
        stop: StopRequest,
    ) -> None:
        self.config = config
        self.state = state
        self.schedules = Schedules(config)
        self._datasets = datasets
        self._eod = eod
        self._loader = loader
        self._metrics = metrics
        self._console = console
        self._forward_step = forward_step
        self._settings = settings
        self._home = home
        self._stop = stop
        self._train_step = TrainStep(
            state.model, state.optimizer, state.scaler, forward_step, config.training, config.optimizer
        )
        self._started = time.monotonic() - state.elapsed_seconds
        self._saved_iteration: int | None = None

    def train(self) -> int:
        """Step until a limit is reached or a stop is asked for."""
        schedules, progress = self.schedules, self.state.progress
        if self.state.model.device.type == "cuda" and not schedules.finished(progress):
            self._train_step.reserve_memory(self._largest_batch())
        if self.state.validation_due:
            self._validate()
        while not schedules.finished(progress):
            before = replace(progress)
            self.step(schedules.plan(progress))
            if schedules.finished(progress):
                break
            if crossed(self.config.evaluation.interval(), before, progress):
                self._validate()
            if crossed(self.config.checkpoint.interval(), before, progress):
                self.save()
            if reason := self._stop_reason():
                self.save()
                return self._stopped(reason)
        return self._finish()

    def _finish(self) -> int:
        """Save the end of the run, then evaluate what the log does not hold yet: a rerun completes what was cut off."""
        self._console.print_last()
        self.save()
        done = self._metrics.events_at(self.state.progress.iteration)
        if "validation" not in done:
            self._evaluate(self._datasets.validation, "validation")
        if self.config.evaluation.test and "test" not in done:
            self._evaluate(self._datasets.test, "test")
        return self._stopped(self._stop.reason) if self._stop.reason else EXIT_FINISHED

    def _stopped(self, reason: str) -> int:
        """Say that and where the run was stopped."""
        self._console.print_last()
        saved = f"saved at step {self.state.progress.iteration:,}" if self._home else "nothing saved: no --save"
        self._console.message(f"stopped by {reason}; {saved}; start again with --load to go on")
        return EXIT_STOPPED

    def step(self, plan: StepPlan) -> None:
        """One optimizer step, counted and logged."""
        state = self.state
        progress = state.progress
        started = time.monotonic()
        samples = self._loader.batch(progress.consumed_samples, plan.global_batch_size)
        self._loader.prefetch(progress.consumed_samples + plan.global_batch_size, plan.global_batch_size)
        try:
            result = self._train_step(self._batch(samples), plan)
        except NonFiniteError as error:
            first, last = progress.consumed_samples, progress.consumed_samples + plan.global_batch_size - 1
            raise UserError(
                f"step {progress.iteration + 1:,}: {error} on samples {first:,} to {last:,} (sequence length "
                f"{plan.seqlen}, lr {plan.lr:.3g}); nothing was updated. Lower --lr, lengthen the warmups, or go "
                "back to a checkpoint"
            ) from None
        self.schedules.advance(progress, plan)
        interval = self.config.optimizer.moment_statistics_interval
        due = interval > 0 and progress.iteration % interval == 0
        moments = moment_statistics(state.optimizer) if due else None
        seconds = time.monotonic() - started
        state.training_seconds += seconds
        self._log(plan, result, moments, seconds)

    def _log(self, plan: StepPlan, result: StepResult, moments: MomentStatistics | None, seconds: float) -> None:
        """One object of metrics.jsonl, and the progress line."""
        state = self.state
        progress = state.progress
        entry: dict[str, Any] = {
            "iteration": progress.iteration,
            "consumed_samples": progress.consumed_samples,
            "consumed_tokens": progress.consumed_tokens,
            "seqlen": plan.seqlen,
            "global_batch_size": plan.global_batch_size,
            "lr": plan.lr,
            "loss": result.loss,
            "loss_ratio": state.loss_ratio.update(result.loss),
            "position_matched_loss_ratio": state.matched_ratio.update(result.bucket_losses, result.bucket_tokens),
            "loss_by_position": state.matched_ratio.losses(result.bucket_losses, result.bucket_tokens),
            "grad_norm": result.grad_norm,
            "clipped": result.clipped,
            "skipped": result.skipped,
            "loss_scale": result.loss_scale,
            "adam_variance_norm": moments.adam_variance_norm if moments else None,
            "adam_variance_max": moments.adam_variance_max if moments else None,
            "adam_momentum_norm": moments.adam_momentum_norm if moments else None,
            "tokens_per_second": plan.global_batch_size * plan.seqlen / seconds,
            "seconds": state.training_seconds,
            "elapsed_seconds": self._elapsed(),
        }
        self._metrics.log_step(entry)
        self._console.update(entry)

    def _validate(self) -> None:
        """Validate between two steps; where a stop cuts it short, a resume begins with it."""
        self.state.validation_due = not self._evaluate(self._datasets.validation, "validation")

    def _evaluate(self, dataset: Dataset | None, event: str) -> bool:
        """Loss at full length, logged; nothing where there is no such split. False where a stop cut it short."""
        if dataset is None:
            return True
        result = evaluate(
            self.state.model,
            self._forward_step,
            dataset,
            self._batch,
            samples=self.config.evaluation.eval_iters * self.config.training.global_batch_size,
            training=self.config.training,
            interrupted=lambda: self._stop.reason is not None,
        )
        if result is None:
            return False
        progress = self.state.progress
        entry = {
            "iteration": progress.iteration,
            "consumed_samples": progress.consumed_samples,
            "consumed_tokens": progress.consumed_tokens,
            **result.to_dict(),
            "seconds": self.state.training_seconds,
            "elapsed_seconds": self._elapsed(),
        }
        self._metrics.log_validation(entry, event=event)
        self._console.validation(entry, event=event)
        return True

    def save(self) -> None:
        """Save a checkpoint of this step, unless there is one or no --save was given."""
        state, checkpoint = self.state, self.config.checkpoint
        iteration = state.progress.iteration
        if self._home is None or self._saved_iteration == iteration:
            return
        state.elapsed_seconds = self._elapsed()
        path = save_checkpoint(
            self._home / CHECKPOINTS,
            iteration=iteration,
            tensors=collect(state.model, state.optimizer if checkpoint.save_optim else None),
            state=state.to_dict(self._settings, rng=checkpoint.save_rng),
            config_text=to_yaml(self.config),
        )
        self._saved_iteration = iteration
        self._console.message(f"saved {path}")

    def _stop_reason(self) -> str | None:
        interval = self.config.training.exit_interval
        if self._stop.reason is None and interval and self.state.progress.iteration % interval == 0:
            return f"--exit-interval {interval}"
        return self._stop.reason

    def _largest_batch(self) -> Batch:
        """A full-length step of zeros, with the masks that this run uses."""
        return self._batch(
            np.zeros((self.schedules.global_batch_size, self.config.model.seq_length + 1), dtype=np.int64)
        )

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


def crossed(interval: Duration | None, before: Progress, after: Progress) -> bool:
    """Whether a multiple of `interval` lies in the step from `before` to `after`."""
    if interval is None:
        return False
    return interval.position(before) // interval.value != interval.position(after) // interval.value


def check_homes(config: CheckpointConfig) -> None:
    """Refuse, before anything is built, a --save that is not given or that holds another run."""
    if config.save is None:
        if config.save_interval is not None or config.save_interval_tokens is not None:
            raise UserError("--save-interval needs --save DIR, the directory to save to")
        return
    home = Path(config.save)
    log = home / METRICS_FILE
    if not any((home / CHECKPOINTS).glob("iter_*")) and not (log.exists() and log.stat().st_size):
        return
    if not continues(config):
        raise UserError(
            f"--save {home} already holds a run: add --load {home} to continue it, or choose another directory"
        )
    if config.finetune:
        raise UserError(f"--finetune starts a new run, but --save {home} already holds one: choose another directory")


def continues(config: CheckpointConfig) -> bool:
    """Whether --load lies in --save: the run, its checkpoints or one of them."""
    if config.load is None or config.save is None:
        return False
    load, home = Path(config.load).resolve(), Path(config.save).resolve()
    return load == home or home / CHECKPOINTS in (load, load.parent)


def resume(state: TrainState, config: CheckpointConfig, settings: dict[str, Any], console: ProgressLine) -> None:
    """Take over the newest checkpoint below --load, or the one that it names."""
    if config.load is None:
        return
    directory = Path(config.load)
    if (directory / CHECKPOINTS).is_dir():
        directory = directory / CHECKPOINTS
    path = find_latest(directory, console.message) if directory.is_dir() else None
    if path is None:
        if not continues(config):
            raise UserError(f"--load {config.load}: no checkpoint found there; give the run's directory or drop --load")
        if damaged := damaged_checkpoints(directory):
            raise UserError(
                f"--load {config.load}: none of its {len(damaged)} checkpoints is whole (newest: {damaged[0].name}); "
                "repair one, or move the directory away to start from scratch"
            )
        console.message(f"--load {config.load}: no checkpoint yet, starting from scratch")
        return
    checkpoint = load_checkpoint(path)
    guarded = {n: v for n, v in settings.items() if n in NEEDED_BY_WEIGHTS} if config.finetune else settings
    for line in check_settings(checkpoint.state["settings"], guarded, config.override, str(path)):
        console.message(f"--override {line}")
    weights_only = config.finetune or not config.load_optim
    restore(state.model, None if weights_only else state.optimizer, checkpoint.tensors)
    if config.finetune:
        console.message(f"weights of {path}")
        return
    state.load_dict(checkpoint.state, rng=config.load_rng)
    console.message(f"resumed from {path}: step {checkpoint.iteration:,}")


def open_home(config: Config, state: TrainState, console: ProgressLine) -> Path | None:
    """The run's directory, with its config.yaml; None where no --save is given.

    Raises:
        UserError: where it cannot take a checkpoint.
    """
    if config.checkpoint.save is None:
        return None
    home = Path(config.checkpoint.save)
    directory = home / CHECKPOINTS
    reap_temporary(directory, console.message)
    set_aside_newer(directory, state.progress.iteration, console.message)
    check_space(directory, collect(state.model, state.optimizer if config.checkpoint.save_optim else None))
    write_atomic(home / "config.yaml", to_yaml(config))
    return home


def target_tokens(config: Config) -> int | None:
    """Tokens at the end of the run, where a limit in tokens or the plan says it."""
    limit = config.training.train_tokens
    if limit is not None and config.training.train_iters is None and config.training.train_samples is None:
        return limit
    return plan_run(config).progress.consumed_tokens


def warnings(config: Config) -> list[str]:
    """What a user may not have meant."""
    notes = []
    if config.checkpoint.save is None:
        notes.append("no --save DIR: nothing of this run will be kept")
    if plan_run(config).full_length_iteration is None:
        notes.append(f"the run ends before its sequence length reaches --seq-length {config.model.seq_length}")
    return notes


def describe(config: Config, datasets: Datasets, vocab_size: int, device: str, progress: Progress) -> str:
    """What is about to happen, in a few lines."""
    warmup = config.seqlen_warmup
    pacing: str = warmup.seqlen_warmup
    if pacing in ("linear", "root"):
        duration = warmup.duration()
        pacing += f" from {warmup.seqlen_start} over {duration.value:,} {duration.unit}"
    elif pacing == "discrete":
        pacing += f" {warmup.seqlen_stages}"
    parameters = parameter_count(config.model, vocab_size)
    per_epoch = datasets.train.num_samples_per_epoch
    lines = [
        f"model      {config.model.num_layers} layers, hidden {config.model.hidden_size}, "
        f"{config.model.num_attention_heads} heads, {format_count(parameters)} parameters, vocabulary {vocab_size:,}",
        f"data       {datasets.num_tokens[0]:,} training tokens, {per_epoch:,} samples an epoch",
        f"length     {config.model.seq_length}, sequence length warmup: {pacing}",
        f"batch      {config.training.global_batch_size} sequences a step, on {device}, "
        f"from step {progress.iteration + 1:,}",
        *(f"note       {note}" for note in [*datasets.notes, *warnings(config)]),
    ]
    return "\n".join(lines)
