"""Sequence length warmup for the Trainer of Hugging Face transformers, version 5 (extra `hf`).

The length belongs to an optimizer step, so it cannot be chosen in the collator: workers of the data loader collate
batches ahead, before it is known which step will use them. `SeqlenWarmupTrainer` cuts them where Trainer takes all
micro-batches of a step from its loader, and before it counts the labels by which it divides the loss. (Cut later, in
`compute_loss` or the model, a short step would be divided by the labels of a full one, and its gradient shrink.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from megatron.config import Config, require
from megatron.pacing import Progress, Schedules, StepPlan

TOKEN_KEYS = ("input_ids", "labels", "attention_mask", "token_type_ids", "position_ids", "shift_labels")
"""Tensors of a batch with a value for each token: [batch, length]."""
RECORD = "seqlen_warmup"
"""Where the `Progress` lies in `TrainerState.stateful_callbacks`, which Trainer saves in trainer_state.json."""


def truncate(batch: Mapping[str, Any], seqlen: int, seq_length: int) -> dict[str, Any]:
    """`batch` with the first `seqlen` tokens of every sample; what has no value for each token stays as it is.

    Args:
        batch: what a collator returns, with "input_ids" [batch, length] int64.
        seqlen: length of the step. A shorter batch is left whole.
        seq_length: full length, which no sample may exceed.

    Raises:
        UserError: for longer samples, packed ones of varying lengths, and tensors that cannot be cut with certainty.
    """
    length = batch["input_ids"].shape[1]
    require(
        length <= seq_length,
        f"a batch has samples of {length} tokens, seq_length of the configuration is {seq_length}: make them equal",
    )
    require(
        "cu_seq_lens_q" not in batch,
        "a batch holds cu_seq_lens_q, samples joined to one: give DataCollatorWithFlattening up, or the warmup",
    )
    cut: dict[str, Any] = {}
    for key, value in batch.items():
        axes = [axis for axis in range(1, value.dim()) if value.shape[axis] == length] if torch.is_tensor(value) else []
        has_tokens = key in TOKEN_KEYS and value.dim() > 1
        require(
            axes == ([1] if has_tokens else []),
            f"a batch holds {key!r} of shape {list(getattr(value, 'shape', []))} beside samples of {length} tokens: "
            f"expected [batch, {length}] of {', '.join(TOKEN_KEYS)}, and of nothing else; drop it in the collator",
        )
        cut[key] = value[:, :seqlen].contiguous() if has_tokens else value
    return cut


def _saved(state: TrainerState) -> dict[str, Any]:
    """What a Trainer's checkpoints keep beside the counters. (Its type says a list: that is what it is made from.)"""
    return cast(dict[str, Any], state.stateful_callbacks)


class SeqlenWarmupCallback(TrainerCallback):
    """Counts what is trained on, in the state that Trainer saves, and ends the run where `schedules` do."""

    def __init__(self, schedules: Schedules) -> None:
        self.schedules = schedules
        self.samples = self.tokens = 0
        """What the step that is being taken trains on, over all ranks."""

    @staticmethod
    def progress(state: TrainerState) -> Progress:
        """How far the run of `state` has come."""
        return Progress(**_saved(state).get(RECORD, {}))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse the checkpoint of a run without sequence length warmup, or one that went on without."""
        counted = self.progress(state).iteration
        require(
            counted == state.global_step,
            f"the checkpoint is at step {state.global_step}, of which {counted} were made with sequence length warmup: "
            "resume from one that SeqlenWarmupTrainer saved, or load its weights only",
        )

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count the step, before Trainer asks for the learning rate of the next one."""
        progress = self.progress(state)
        progress.advance(samples=self.samples, tokens=self.tokens, lr_warmup=self.schedules.lr_warmup)
        _saved(state)[RECORD] = progress.to_dict()
        if self.schedules.finished(progress):
            state.max_steps = progress.iteration  # Trainer then evaluates, saves and stops as at any last step


class SeqlenWarmupTrainer(Trainer):
    """A Trainer whose optimizer steps have the length that `config` gives them. Evaluation is at full length.

    Args:
        config: pacing, seq_length, global_batch_size, and where training ends (`training`): by tokens, mostly, since
            short steps have few. `max_steps` of the training arguments must not be less than the steps of the run,
            `plan_run(config).progress.iteration`. Of the other sections nothing is read but, with `schedule_lr`,
            `learning_rate`.
        schedule_lr: take the learning rate from `config` too, in the place of `lr_scheduler_type`: Trainer can decay
            over steps only, and the paper decays over tokens. (A step that fp16 skips for an overflow is followed by
            one at the same learning rate.)

    The other arguments are Trainer's own. It logs `seqlen` of the last step, `consumed_tokens` and `consumed_samples`
    (of all ranks, padding included) beside the loss. To add the warmup to another Trainer, derive from both, this one
    first: `class Mine(SeqlenWarmupTrainer, SFTTrainer)`.

    Raises:
        UserError: where `config` and the training arguments disagree, or `config` asks for what Trainer cannot do.
    """

    def __init__(self, *args: Any, config: Config, schedule_lr: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.schedules = Schedules(config)
        self.step_plan: StepPlan | None = None
        """The step that is being taken, or was last."""
        self._seq_length = config.model.seq_length
        self._peak_lr = config.learning_rate.lr if schedule_lr else None
        self._check(config)
        self._counter = SeqlenWarmupCallback(self.schedules)
        self.add_callback(self._counter)

    @property
    def progress(self) -> Progress:
        """Steps, samples and tokens trained on."""
        return self._counter.progress(self.state)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Mapping[str, Any]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], torch.Tensor | int | None]:
        """The micro-batches of the next optimizer step at its length, and the labels in them; none after the end."""
        progress = self.progress
        if self.schedules.finished(progress):  # a finished run was started again
            self.control.should_training_stop = True
            return [], None
        step = self.step_plan = self.schedules.plan(progress)
        shortened = (truncate(batch, step.seqlen, self._seq_length) for batch in epoch_iterator)
        batches, labels = super().get_batch_samples(shortened, num_batches, device)
        # Counted, not planned: the last step of an epoch may have fewer samples.
        self._counter.samples = self._ranks() * sum(len(batch["input_ids"]) for batch in batches)
        self._counter.tokens = self._ranks() * sum(batch["input_ids"].numel() for batch in batches)
        return batches, labels

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LRScheduler:
        """As Trainer's; with `schedule_lr` the learning rate follows from the progress."""
        if self._peak_lr is not None and self.lr_scheduler is None:
            peak = self._peak_lr or 1.0
            self.lr_scheduler = LambdaLR(
                cast(Optimizer, optimizer or self.optimizer), lambda _: self.schedules.plan(self.progress).lr / peak
            )
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As Trainer's, with the length and the tokens beside a training loss."""
        if "loss" in logs and self.step_plan is not None:
            progress = self.progress
            logs |= {
                "seqlen": self.step_plan.seqlen,
                "consumed_tokens": progress.consumed_tokens,
                "consumed_samples": progress.consumed_samples,
            }
        super().log(logs, start_time)

    def _ranks(self) -> int:
        """Data parallel ranks."""
        args = self.args
        return self.get_total_train_batch_size(args) // (self._train_batch_size * args.gradient_accumulation_steps)

    def _check(self, config: Config) -> None:
        """Raise UserError unless Trainer can do what `config` says, and its arguments say the same."""
        args, pacing = self.args, config.seqlen_warmup
        require(
            pacing.seqlen_warmup != "adaptive",
            "seqlen_warmup adaptive goes by validations and loss ratios, that Trainer has not: choose another pacing",
        )
        require(
            pacing.seqlen_realisation == "truncate",
            f"seqlen_realisation {pacing.seqlen_realisation}: with Trainer samples can only be truncated",
        )
        require(
            config.batch_size_warmup.batch_size_warmup == "none",
            f"batch_size_warmup {config.batch_size_warmup.batch_size_warmup}: the batch size of Trainer is fixed",
        )
        require(not args.auto_find_batch_size, "auto_find_batch_size changes the batch size of the plan: turn it off")
        require(self.get_sp_size() == 1, "sequence parallelism shares samples out before they are cut: turn it off")
        found, expected = self.get_total_train_batch_size(args), config.training.global_batch_size
        require(
            found == expected,
            f"global_batch_size of the configuration is {expected}, the training arguments make it {found} "
            f"(per_device_train_batch_size {args.per_device_train_batch_size}, gradient_accumulation_steps "
            f"{args.gradient_accumulation_steps}, {self._ranks()} ranks): make them equal",
        )
        require(
            self._peak_lr is None or self.lr_scheduler is None,
            "schedule_lr and a learning rate scheduler in `optimizers` exclude each other: give one",
        )
        require(
            self._peak_lr in (None, args.learning_rate),
            f"lr of the configuration is {self._peak_lr}, learning_rate of the training arguments "
            f"{args.learning_rate}: with schedule_lr make them equal",
        )
