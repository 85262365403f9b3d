"""Every knob of a run, one frozen dataclass a section, each with its check and its help text under it.

`arguments.py` turns these classes into flags: `num_layers` is `--num-layers`, the text under the field is
its help, a `bool` is `--x/--no-x`. A room of the program gets its section, never the whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Literal, get_args

from megatron.counts import parse_pairs, require_rising
from megatron.errors import UserError
from megatron.growth import Growth
from megatron.progress import Duration, Unit

Pacing = Literal["none", Growth, "discrete", "mixed", "adaptive"]
Count = int
"""An int that may be written as 157e9, 300K, 30B or 1_000 on the command line."""

MODEL_SIZES: dict[str, tuple[int, int, int]] = {
    "117M": (12, 768, 12),
    "345M": (24, 1024, 16),
    "774M": (36, 1280, 20),
    "1.5B": (48, 1600, 25),
    "gpt3-125M": (12, 768, 12),
}
"""name -> (layers, hidden size, attention heads). gpt3-125M differs from 117M in its recipe, not its shape."""


def require(condition: bool, message: str) -> None:
    """Raise UserError with `message` unless `condition` holds."""
    if not condition:
        raise UserError(message)


def require_owners(
    section: SeqlenWarmupConfig | BatchSizeWarmupConfig, kind: str, owners: dict[str, Sequence[str]]
) -> None:
    """Raise UserError where a setting of `section` is given that goes only with other values of its setting `kind`.

    Whether it is given shows where it differs from its default: one that does not changes nothing.
    """
    chosen = getattr(section, kind)
    misfits = {
        name.replace("_", "-"): kinds
        for name, kinds in owners.items()
        if getattr(section, name) != getattr(type(section), name) and chosen not in kinds
    }
    if not misfits:
        return
    named = [f"--{name} (for {' or '.join(kinds)})" for name, kinds in misfits.items()]
    them = "it" if len(named) == 1 else "them"
    raise UserError(
        f"--{kind.replace('_', '-')} {chosen} takes no {' and no '.join(named)}: choose another or drop {them}; "
        f"where a recipe has set {them}, add {' '.join(f'--unset {name}' for name in misfits)}"
    )


@dataclass(frozen=True)
class ModelConfig:
    """Model"""

    model_size: Literal["117M", "345M", "774M", "1.5B", "gpt3-125M"] | None = None
    """Preset for --num-layers, --hidden-size and --num-attention-heads; what is given after it wins."""
    num_layers: int = 12
    """Transformer blocks."""
    hidden_size: int = 768
    """Width of the residual stream."""
    num_attention_heads: int = 12
    """Attention heads; must divide --hidden-size."""
    seq_length: int = 1024
    """Full sequence length: samples are indexed at it, evaluation runs at it, the warmup ends at it."""
    max_position_embeddings: int | None = None
    """Rows of the position embedding (default: --seq-length)."""
    make_vocab_size_divisible_by: int = 128
    """The vocabulary is padded to a multiple of this; padded tokens have probability zero."""
    hidden_dropout: float = 0.1
    """Dropout of embeddings and of each residual branch."""
    attention_dropout: float = 0.1
    """Dropout of attention probabilities."""
    init_method_std: float = 0.02
    """Standard deviation of the initial weights; outputs of residual branches get std / sqrt(2 * layers)."""
    norm_epsilon: float = 1e-5
    """Epsilon of the layer norms."""

    def __post_init__(self) -> None:
        for name in ("num_layers", "hidden_size", "num_attention_heads", "seq_length", "make_vocab_size_divisible_by"):
            require(getattr(self, name) >= 1, f"--{name.replace('_', '-')} {getattr(self, name)} must be at least 1")
        require(
            self.hidden_size % self.num_attention_heads == 0,
            f"--hidden-size {self.hidden_size} must be a multiple of --num-attention-heads {self.num_attention_heads}",
        )
        require(
            self.max_position_embeddings is None or self.max_position_embeddings >= self.seq_length,
            f"--max-position-embeddings {self.max_position_embeddings} must be at least --seq-length {self.seq_length}",
        )
        for name in ("init_method_std", "norm_epsilon"):
            value = getattr(self, name)
            require(value > 0, f"--{name.replace('_', '-')} {value} must be positive")
        for name in ("hidden_dropout", "attention_dropout"):
            value = getattr(self, name)
            require(0 <= value < 1, f"--{name.replace('_', '-')} {value} must be in [0, 1)")

    @property
    def positions(self) -> int:
        """Rows of the position embedding."""
        return self.max_position_embeddings or self.seq_length

    def padded_vocab_size(self, vocab_size: int) -> int:
        """`vocab_size` rounded up to a multiple of --make-vocab-size-divisible-by."""
        multiple = self.make_vocab_size_divisible_by
        return -(-vocab_size // multiple) * multiple


@dataclass(frozen=True)
class SeqlenWarmupConfig:
    """Sequence length warmup"""

    seqlen_warmup: Pacing = "none"
    """Pacing function: how the sequence length grows from --seqlen-start to --seq-length (docs/pacing.md)."""
    seqlen_start: int = 8
    """Sequence length at the start of a pacing that grows: any but discrete and mixed."""
    seqlen_warmup_iters: Count | None = None
    """T: optimizer steps until full length."""
    seqlen_warmup_tokens: Count | None = None
    """T in tokens instead: the position is the tokens trained on before the step."""
    seqlen_multiple: int = 8
    """Every length is a multiple of this: 8 for Tensor Cores, 16 for int8."""
    seqlen_root_degree: int = 2
    """Degree d of the root pacing: (t/T)^(1/d)."""
    seqlen_stages: str | None = None
    """Lengths and the end of each, for discrete pacing: 128:20000,1024 is two-stage (Shortformer)."""
    seqlen_cycle: str | None = None
    """Lengths and the duration of each, again and again, for mixed pacing: 128:900,1024:100."""
    seqlen_stages_unit: Literal["iters", "tokens"] = "iters"
    """What --seqlen-stages and --seqlen-cycle count: steps, or the tokens trained on before the step."""
    seqlen_adaptive_step: int | None = None
    """Tokens by which adaptive pacing lengthens at a time (default: a sixteenth of the way to --seq-length)."""
    seqlen_adaptive_tolerance: float = 0.01
    """Adaptive pacing lengthens after a validation whose loss exceeds the least one by no more than this share."""
    seqlen_realisation: Literal["truncate", "reshape", "window"] = "truncate"
    """How a sample is made short: truncate drops its tail, as the paper did; reshape cuts it into sequences; window
    keeps it whole and limits attention to blocks. The last two train on all tokens."""

    def duration(self) -> Duration:
        """T of the pacings in growth.py."""
        if self.seqlen_warmup_tokens is not None:
            return Duration(self.seqlen_warmup_tokens, "tokens")
        return Duration(self.seqlen_warmup_iters or 0, "iters")

    def stages(self) -> tuple[list[int], list[int]]:
        """Lengths of discrete pacing, and the end of each but the last."""
        return parse_pairs("--seqlen-stages", self.seqlen_stages or "", open_end=True)

    def cycle(self) -> tuple[list[int], list[int]]:
        """Lengths of mixed pacing, and their durations."""
        return parse_pairs("--seqlen-cycle", self.seqlen_cycle or "", open_end=False)

    def adaptive_step(self, seq_length: int) -> int:
        """Tokens by which adaptive pacing lengthens: rounded up to the multiple where it is the default."""
        if self.seqlen_adaptive_step is not None:
            return self.seqlen_adaptive_step
        multiple = self.seqlen_multiple
        return multiple * max(1, -(-(seq_length - self.seqlen_start) // (16 * multiple)))

    def check(self, seq_length: int) -> None:
        """Raise UserError unless this pacing leads from its start to `seq_length`."""
        pacing, multiple = self.seqlen_warmup, self.seqlen_multiple
        known = get_args(Pacing)
        require(pacing in known, f"--seqlen-warmup {pacing}: expected one of {', '.join(known)}")
        require(multiple >= 1, f"--seqlen-multiple {multiple} must be at least 1")
        self._check_owners()
        if pacing == "none":
            return
        require(
            seq_length % multiple == 0,
            f"--seq-length {seq_length} must be a multiple of --seqlen-multiple {multiple}, else it is never reached",
        )
        if pacing == "discrete":
            require(self.seqlen_stages is not None, "--seqlen-warmup discrete needs --seqlen-stages: 128:20000,1024")
            lengths, ends = self.stages()
            self._check_lengths("--seqlen-stages", self.seqlen_stages, lengths, seq_length)
            require_rising("--seqlen-stages", self.seqlen_stages or "", ends)
            require(
                lengths[-1] == seq_length,
                f"--seqlen-stages {self.seqlen_stages}: the last stage must be the full --seq-length {seq_length}, "
                f"found {lengths[-1]}",
            )
        elif pacing == "mixed":
            require(self.seqlen_cycle is not None, "--seqlen-warmup mixed needs --seqlen-cycle: 128:900,1024:100")
            self._check_lengths("--seqlen-cycle", self.seqlen_cycle, self.cycle()[0], seq_length)
        else:
            self._check_growth(seq_length)

    def _check_owners(self) -> None:
        """Raise UserError where a setting is given that belongs to another pacing."""
        owners: dict[str, Sequence[str]] = {
            "seqlen_start": (*get_args(Growth), "adaptive"),
            "seqlen_warmup_iters": get_args(Growth),
            "seqlen_warmup_tokens": get_args(Growth),
            "seqlen_root_degree": ("root",),
            "seqlen_stages": ("discrete",),
            "seqlen_cycle": ("mixed",),
            "seqlen_stages_unit": ("discrete", "mixed"),
            "seqlen_adaptive_step": ("adaptive",),
            "seqlen_adaptive_tolerance": ("adaptive",),
            "seqlen_realisation": (*get_args(Growth), "discrete", "mixed", "adaptive"),
        }
        require_owners(self, "seqlen_warmup", owners)

    def _check_lengths(self, flag: str, text: str | None, lengths: list[int], seq_length: int) -> None:
        for value in lengths:
            require(
                self.seqlen_multiple <= value <= seq_length and value % self.seqlen_multiple == 0,
                f"{flag} {text}: length {value} must be a multiple of --seqlen-multiple {self.seqlen_multiple} "
                f"from {self.seqlen_multiple} to --seq-length {seq_length}",
            )

    def _check_growth(self, seq_length: int) -> None:
        """Of the pacings that grow."""
        start, multiple = self.seqlen_start, self.seqlen_multiple
        require(start >= multiple, f"--seqlen-start {start} must be at least --seqlen-multiple {multiple}")
        require(start % multiple == 0, f"--seqlen-start {start} must be a multiple of --seqlen-multiple {multiple}")
        require(start <= seq_length, f"--seqlen-start {start} must not exceed --seq-length {seq_length}")
        if self.seqlen_warmup == "adaptive":
            step, tolerance = self.adaptive_step(seq_length), self.seqlen_adaptive_tolerance
            require(
                step >= 1 and step % multiple == 0,
                f"--seqlen-adaptive-step {step} must be a multiple of --seqlen-multiple {multiple}",
            )
            require(tolerance >= 0, f"--seqlen-adaptive-tolerance {tolerance} must not be negative")
            return
        given = [v for v in (self.seqlen_warmup_iters, self.seqlen_warmup_tokens) if v is not None]
        require(
            len(given) == 1,
            f"--seqlen-warmup {self.seqlen_warmup} needs one of --seqlen-warmup-iters and --seqlen-warmup-tokens, "
            f"found {'both' if given else 'neither'}",
        )
        require(given[0] >= 1, f"the duration of the sequence length warmup must be at least 1, found {given[0]}")
        require(1 <= self.seqlen_root_degree <= 16, f"--seqlen-root-degree {self.seqlen_root_degree} must be 1 to 16")


@dataclass(frozen=True)
class BatchSizeWarmupConfig:
    """Batch size warmup"""

    batch_size_warmup: Literal["none", "linear", "stages"] = "none"
    """How the sequences a step grow to --global-batch-size."""
    batch_size_start: int | None = None
    """Sequences of the first step (linear)."""
    batch_size_increment: int = 1
    """Sequences by which the batch grows at a time (linear); with several data parallel ranks a multiple of them."""
    batch_size_warmup_iters: Count | None = None
    """Optimizer steps until the full batch (linear)."""
    batch_size_warmup_tokens: Count | None = None
    """Tokens until the full batch, as GPT-3 (linear)."""
    batch_size_warmup_samples: Count | None = None
    """Samples until the full batch, as Megatron-LM's --rampup-batch-size (linear)."""
    batch_size_stages: str | None = None
    """Batch sizes, and the tokens until which each is used: 128:1B,256:4B,512 (stages)."""

    def duration(self) -> Duration:
        """Length of the linear warmup."""
        return next(Duration(value, unit) for value, unit in self._durations() if value is not None)

    def stages(self) -> tuple[list[int], list[int]]:
        """Batch sizes, and the tokens at which each but the last ends."""
        return parse_pairs("--batch-size-stages", self.batch_size_stages or "", open_end=True)

    def divisors(self) -> list[tuple[str, int]]:
        """The settings, each with its value, of which the data parallel ranks must divide every one."""
        if self.batch_size_warmup == "linear":
            return [
                ("--batch-size-start", self.batch_size_start or 0),
                ("--batch-size-increment", self.batch_size_increment),
            ]
        if self.batch_size_warmup == "stages":
            return [(f"--batch-size-stages {self.batch_size_stages}: batch size", size) for size in self.stages()[0]]
        return []

    def check(self, global_batch_size: int) -> None:
        """Raise UserError unless this warmup leads to `global_batch_size`."""
        warmup, start, increment = self.batch_size_warmup, self.batch_size_start, self.batch_size_increment
        linear = ("start", "increment", "warmup_iters", "warmup_tokens", "warmup_samples")
        owners: dict[str, Sequence[str]] = {f"batch_size_{name}": ("linear",) for name in linear}
        require_owners(self, "batch_size_warmup", owners | {"batch_size_stages": ("stages",)})
        if warmup == "stages":
            require(self.batch_size_stages is not None, "--batch-size-warmup stages needs --batch-size-stages")
            sizes, ends = self.stages()
            require_rising("--batch-size-stages", self.batch_size_stages or "", ends)
            require(
                sizes[-1] == global_batch_size,
                f"--batch-size-stages {self.batch_size_stages}: the last stage must be --global-batch-size "
                f"{global_batch_size}, found {sizes[-1]}",
            )
            require(
                max(sizes) == global_batch_size,
                f"--batch-size-stages {self.batch_size_stages}: no stage may exceed --global-batch-size "
                f"{global_batch_size}",
            )
        if warmup != "linear":
            return
        if start is None:
            raise UserError("--batch-size-warmup linear needs --batch-size-start, the sequences of the first step")
        require(
            1 <= start <= global_batch_size,
            f"--batch-size-start {start} must be from 1 to --global-batch-size {global_batch_size}",
        )
        require(increment >= 1, f"--batch-size-increment {increment} must be at least 1")
        require(
            (global_batch_size - start) % increment == 0,
            f"--batch-size-increment {increment} must lead from --batch-size-start {start} to --global-batch-size "
            f"{global_batch_size}: their difference {global_batch_size - start} is no multiple of it",
        )
        durations = [value for value, _ in self._durations() if value is not None]
        require(
            len(durations) == 1,
            "--batch-size-warmup linear needs one of --batch-size-warmup-iters, -tokens and -samples, "
            f"found {len(durations) or 'none'}",
        )
        require(durations[0] >= 1, f"the duration of the batch size warmup must be at least 1, found {durations[0]}")

    def _durations(self) -> list[tuple[int | None, Unit]]:
        return [
            (self.batch_size_warmup_iters, "iters"),
            (self.batch_size_warmup_tokens, "tokens"),
            (self.batch_size_warmup_samples, "samples"),
        ]


@dataclass(frozen=True)
class TrainingConfig:
    """Training"""

    train_tokens: Count | None = None
    """Stop at the first step where the tokens trained on reach this."""
    train_iters: Count | None = None
    """Stop after this many optimizer steps."""
    train_samples: Count | None = None
    """Stop at the first step where the samples drawn reach this."""
    exit_interval: Count | None = None
    """Save and leave after every so many iterations, to be started again."""
    exit_duration_in_mins: float | None = None
    """Save and leave after so many minutes, to be started again."""
    global_batch_size: int = 512
    """Sequences an optimizer step, over all micro-batches."""
    micro_batch_size: int | None = None
    """Sequences of full length in one forward pass: sets the token budget to this times --seq-length (default 4)."""
    micro_batch_tokens: Count | None = None
    """Token budget of one forward pass: at sequence length s it holds floor(budget / s) sequences."""
    fixed_micro_batch: bool = False
    """Keep --micro-batch-size sequences a forward pass at every length, as the original did (for comparison)."""
    seed: int = 1234
    """Seed of initial weights, dropout and the order of samples."""
    fp16: bool = False
    """Train in fp16 with dynamic loss scaling, on a GPU (weights and optimizer stay fp32)."""
    bf16: bool = False
    """Train in bf16 (weights and optimizer stay fp32)."""
    loss_scale: float | None = None
    """Fixed loss scale for fp16 (default, and 0: dynamic)."""
    initial_loss_scale: float = 2.0**32
    """First dynamic loss scale."""
    min_loss_scale: float = 1.0
    """Smallest dynamic loss scale."""
    loss_scale_window: int = 1000
    """Steps without overflow before the loss scale doubles."""
    hysteresis: int = 2
    """Overflows tolerated before the loss scale halves."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto takes the GPU where there is one."""
    recompute_granularity: Literal["none", "selective", "full"] = "none"
    """Activation checkpointing: full recomputes each block in the backward pass, selective only what lies between its
    matrix products."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile with dynamic shapes; auto compiles on a GPU, and runs eagerly on the CPU."""
    deterministic: bool = False
    """Ask torch for deterministic kernels on a GPU, at a cost in speed (the CPU always is)."""

    def __post_init__(self) -> None:
        require(
            any(v is not None for v in (self.train_tokens, self.train_iters, self.train_samples)),
            "nothing says when to stop: give --train-tokens, --train-iters or --train-samples",
        )
        for name in (
            "train_tokens",
            "train_iters",
            "train_samples",
            "exit_interval",
            "micro_batch_size",
            "micro_batch_tokens",
        ):
            value = getattr(self, name)
            require(value is None or value >= 1, f"--{name.replace('_', '-')} {value} must be at least 1")
        minutes = self.exit_duration_in_mins
        require(minutes is None or minutes > 0, f"--exit-duration-in-mins {minutes} must be positive")
        require(self.global_batch_size >= 1, f"--global-batch-size {self.global_batch_size} must be at least 1")
        require(
            self.micro_batch_size is None or self.micro_batch_tokens is None,
            "--micro-batch-size and --micro-batch-tokens both set the size of a forward pass: give one",
        )
        require(
            not (self.fixed_micro_batch and self.micro_batch_tokens is not None),
            "--fixed-micro-batch counts sequences: give --micro-batch-size, not --micro-batch-tokens",
        )
        if self.micro_batch_size is not None:
            require(
                self.global_batch_size % self.micro_batch_size == 0,
                f"--global-batch-size {self.global_batch_size} must be a multiple of "
                f"--micro-batch-size {self.micro_batch_size}",
            )
        require(not (self.fp16 and self.bf16), "--fp16 and --bf16 exclude each other: give one")
        require(0 <= self.seed < 2**63, f"--seed {self.seed} must be from 0 to 2^63 - 1")
        require(self.loss_scale is None or self.fp16, "--loss-scale has no effect without --fp16")
        require(self.loss_scale is None or self.loss_scale >= 0, f"--loss-scale {self.loss_scale} must not be negative")
        for name in ("initial_loss_scale", "min_loss_scale", "loss_scale_window", "hysteresis"):
            value = getattr(self, name)
            require(value > 0, f"--{name.replace('_', '-')} {value} must be positive")

    def ends(self) -> list[Duration]:
        """Every limit given; the run stops at the first that is reached."""
        limits: list[tuple[int | None, Unit]] = [
            (self.train_tokens, "tokens"),
            (self.train_iters, "iters"),
            (self.train_samples, "samples"),
        ]
        return [Duration(value, unit) for value, unit in limits if value is not None]

    def micro_batch_sequences(self, seqlen: int, seq_length: int) -> int:
        """Sequences of `seqlen` tokens in one forward pass, at least 1."""
        size = self.micro_batch_size or min(4, self.global_batch_size)
        if self.fixed_micro_batch:
            return size
        budget = self.micro_batch_tokens or size * seq_length
        return max(1, budget // seqlen)


@dataclass(frozen=True)
class FaultConfig:
    """Faults of training"""

    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What to do when a loss or a gradient is NaN or infinite: end the run before the update, or skip the update. The
    batch is written to SAVE/faults either way."""
    nonfinite_limit: int = 10
    """With --on-nonfinite skip, end the run after so many such steps in a row."""
    on_spike: Literal["log", "rollback"] = "log"
    """What to do when the loss ratio exceeds --spike-ratio: log it, or go back to the last checkpoint and skip the
    samples of that step."""
    spike_ratio: float = 1.5
    """Loss of a step over the least one before it, from which it is a spike."""
    max_rollbacks: int = 3
    """With --on-spike rollback, only log spikes after so many rollbacks."""

    def __post_init__(self) -> None:
        require(self.nonfinite_limit >= 1, f"--nonfinite-limit {self.nonfinite_limit} must be at least 1")
        require(self.spike_ratio > 1, f"--spike-ratio {self.spike_ratio} must be above 1")
        require(self.max_rollbacks >= 1, f"--max-rollbacks {self.max_rollbacks} must be at least 1")


@dataclass(frozen=True)
class ParallelConfig:
    """Parallelism (under torchrun; one process needs none of it)"""

    tensor_model_parallel_size: int = 1
    """Ranks that share each layer (tp); must divide the heads and the padded vocabulary."""
    sequence_parallel: bool = False
    """Also split what lies between the parallel layers, by tokens, over the tensor parallel ranks."""
    zero_stage: int = 2
    """What data parallel ranks share out: 0 nothing, 2 optimizer state and gradients, 3 the weights too."""
    data_parallel_shard_size: int | None = None
    """Hybrid sharding: share out over so many neighbouring ranks, a node's say, and replicate over the rest."""
    grad_reduce_in_bf16: bool = False
    """Reduce gradients over data parallel ranks in bf16: half the bytes, and sums of 8 bits. A rank adds up its
    micro-batches in fp32 all the same."""
    optimizer_cpu_offload: bool = False
    """Keep weights and optimizer state in the host's memory, and step there (GPU)."""
    distributed_timeout_minutes: float = 10.0
    """Minutes that ranks wait for one another before the run ends with an error."""

    def __post_init__(self) -> None:
        tp, shard = self.tensor_model_parallel_size, self.data_parallel_shard_size
        require(tp >= 1, f"--tensor-model-parallel-size {tp} must be at least 1")
        require(
            self.zero_stage in (0, 2, 3),
            f"--zero-stage {self.zero_stage}: expected 0, 2 or 3",
        )
        require(not self.sequence_parallel or tp > 1, "--sequence-parallel needs --tensor-model-parallel-size above 1")
        require(shard is None or shard >= 1, f"--data-parallel-shard-size {shard} must be at least 1")
        require(
            shard is None or self.zero_stage != 0,
            f"--data-parallel-shard-size {shard} has no effect with --zero-stage 0, which shares out nothing",
        )
        minutes = self.distributed_timeout_minutes
        require(minutes > 0, f"--distributed-timeout-minutes {minutes} must be positive")


@dataclass(frozen=True)
class LearningRateConfig:
    """Learning rate"""

    lr: float = 1.5e-4
    """Peak learning rate."""
    min_lr: float = 0.0
    """Floor of the decay."""
    lr_floor: Literal["clip", "interpolate"] = "clip"
    """clip: max(decayed, min_lr), as the paper's runs; interpolate: decay from the peak to min_lr."""
    lr_decay_style: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """Shape of the decay after the warmup; wsd is constant, then linear over the last --lr-wsd-fraction."""
    lr_warmup_iters: Count | None = None
    """Linear warmup over this many steps: step t uses peak * t / W."""
    lr_warmup_tokens: Count | None = None
    """Linear warmup over this many tokens."""
    lr_warmup_samples: Count | None = None
    """Linear warmup over this many samples."""
    lr_warmup_fraction: float | None = None
    """Linear warmup over this fraction of the decay span, in its unit."""
    lr_decay_tokens: Count | None = None
    """Decay over tokens, until this many (default: --train-tokens)."""
    lr_decay_iters: Count | None = None
    """Decay over steps, until this many (default: --train-iters where no tokens are given)."""
    lr_decay_samples: Count | None = None
    """Decay over samples, until this many."""
    lr_wsd_fraction: float = 0.1
    """Share of the decay span that wsd spends decaying, at its end."""

    def __post_init__(self) -> None:
        require(self.lr >= 0, f"--lr {self.lr} must not be negative")
        require(0 <= self.min_lr <= self.lr, f"--min-lr {self.min_lr} must lie between 0 and --lr {self.lr}")
        warmups = [n for n in ("iters", "tokens", "samples", "fraction") if getattr(self, f"lr_warmup_{n}") is not None]
        require(
            len(warmups) <= 1,
            "give one length of the learning rate warmup, found " + " and ".join(f"--lr-warmup-{n}" for n in warmups),
        )
        for name in warmups:
            value = getattr(self, f"lr_warmup_{name}")
            require(value >= 0, f"--lr-warmup-{name} {value} must not be negative")
        fraction = self.lr_warmup_fraction
        require(fraction is None or fraction < 1, f"--lr-warmup-fraction {fraction} must be below 1")
        decays = [n for n in ("tokens", "iters", "samples") if getattr(self, f"lr_decay_{n}") is not None]
        require(
            len(decays) <= 1,
            "give one length of the learning rate decay, found " + " and ".join(f"--lr-decay-{n}" for n in decays),
        )
        require(0 < self.lr_wsd_fraction <= 1, f"--lr-wsd-fraction {self.lr_wsd_fraction} must be in (0, 1]")

    def decay(self, training: TrainingConfig) -> Duration:
        """Where the decay ends; the run's own end where no --lr-decay-* is given."""
        options: list[tuple[int | None, Unit]] = [
            (self.lr_decay_tokens, "tokens"),
            (self.lr_decay_iters, "iters"),
            (self.lr_decay_samples, "samples"),
        ]
        for value, unit in options:
            if value is not None:
                return Duration(value, unit)
        return training.ends()[0]

    def warmup(self, training: TrainingConfig) -> Duration:
        """Where the warmup ends; 0 steps where none is given."""
        if self.lr_warmup_fraction is not None:
            decay = self.decay(training)
            return Duration(int(self.lr_warmup_fraction * decay.value), decay.unit)
        if self.lr_warmup_tokens is not None:
            return Duration(self.lr_warmup_tokens, "tokens")
        if self.lr_warmup_samples is not None:
            return Duration(self.lr_warmup_samples, "samples")
        return Duration(self.lr_warmup_iters or 0, "iters")


@dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer"""

    adam_beta1: float = 0.9
    """Decay of the momentum."""
    adam_beta2: float = 0.999
    """Decay of the variance."""
    adam_eps: float = 1e-8
    """Added to the denominator."""
    weight_decay: float = 0.01
    """Decoupled weight decay of matrices; biases and layer norms have none."""
    decay_embeddings: bool = True
    """Also decay the embeddings, as the paper's runs did."""
    clip_grad: float = 1.0
    """Largest global gradient norm; 0 turns clipping off."""
    moment_statistics_interval: int = 1
    """Compute the norms of Adam's variance and momentum every so many steps; 0 turns them off."""

    def __post_init__(self) -> None:
        for name in ("adam_beta1", "adam_beta2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"--{name.replace('_', '-')} {value} must be in [0, 1)")
        require(self.adam_eps > 0, f"--adam-eps {self.adam_eps} must be positive")
        for name in ("weight_decay", "clip_grad", "moment_statistics_interval"):
            value = getattr(self, name)
            require(value >= 0, f"--{name.replace('_', '-')} {value} must not be negative")


@dataclass(frozen=True)
class DataConfig:
    """Data"""

    data_path: tuple[str, ...] = ()
    """Prefix of a preprocessed corpus (without .bin/.idx), or weights and prefixes in turn: 0.3 wiki 0.7 web."""
    split: str = "949,50,1"
    """Shares of documents for training, validation and test."""
    data_cache_path: str | None = None
    """Where sample indices are cached (default: a folder index-cache beside each corpus, for large indices only)."""
    num_workers: int = 1
    """Threads that read ahead; 0 reads in the training thread."""
    eod_mask_loss: bool = False
    """Do not train on predictions made from the end-of-document token."""
    reset_position_ids: bool = False
    """Restart positions after each end-of-document token."""
    reset_attention_mask: bool = False
    """Forbid attention across end-of-document tokens."""

    def __post_init__(self) -> None:
        require(0 <= self.num_workers <= 64, f"--num-workers {self.num_workers} must be from 0 to 64")


@dataclass(frozen=True)
class TokenizerConfig:
    """Tokenizer"""

    tokenizer_type: Literal["GPT2BPETokenizer", "HFTokenizer"] = "GPT2BPETokenizer"
    """GPT2BPETokenizer reads --vocab-file and --merge-file, HFTokenizer reads --tokenizer-file."""
    vocab_file: str | None = None
    """vocab.json of the GPT-2 BPE."""
    merge_file: str | None = None
    """merges.txt of the GPT-2 BPE."""
    tokenizer_file: str | None = None
    """tokenizer.json of Hugging Face tokenizers."""
    eod_token: str | None = None
    """The tokenizer's token that ends a document (default: <|endoftext|>)."""
    vocab_size: int | None = None
    """Train without a tokenizer: the vocabulary's size before padding."""

    def __post_init__(self) -> None:
        require(self.vocab_size is None or self.vocab_size >= 1, f"--vocab-size {self.vocab_size} must be at least 1")


@dataclass(frozen=True)
class EvaluationConfig:
    """Evaluation"""

    eval_interval: Count | None = None
    """Validate every so many steps (default 1000 where no --eval-interval-tokens is given; 0: only at the end)."""
    eval_interval_tokens: Count | None = None
    """Validate every so many tokens, so that curves of different runs share their x-values."""
    eval_iters: int = 100
    """Batches of --global-batch-size samples a validation; the same samples every time, at full length."""
    test: bool = True
    """Evaluate on the test split when training ends."""

    def __post_init__(self) -> None:
        require(
            self.eval_interval is None or self.eval_interval_tokens is None,
            "--eval-interval and --eval-interval-tokens both say when to validate: give one",
        )
        for name in ("eval_interval", "eval_interval_tokens"):
            value = getattr(self, name)
            require(value is None or value >= 0, f"--{name.replace('_', '-')} {value} must not be negative")
        require(self.eval_iters >= 1, f"--eval-iters {self.eval_iters} must be at least 1")

    def interval(self) -> Duration | None:
        """Distance between validations; None for only at the end."""
        if self.eval_interval_tokens is not None:
            return Duration(self.eval_interval_tokens, "tokens") if self.eval_interval_tokens else None
        steps = 1000 if self.eval_interval is None else self.eval_interval
        return Duration(steps, "iters") if steps else None


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints"""

    save: str | None = None
    """The run's home: config.yaml, metrics.jsonl, tensorboard/ and checkpoints."""
    load: str | None = None
    """Resume from the newest checkpoint below this directory, or from this checkpoint. Where --load is --save and holds
    none yet, train from scratch."""
    save_interval: Count | None = None
    """Save every so many steps (default 1000 where no --save-interval-tokens is given), and always at the end."""
    save_interval_tokens: Count | None = None
    """Save every so many tokens."""
    finetune: bool = False
    """Load weights only and start at step 0, in a new --save directory."""
    keep_last: int | None = None
    """Delete older checkpoints after a save, but for the newest so many whole ones (default: keep all)."""
    keep_every: Count | None = None
    """Never delete the checkpoint of an iteration that is a multiple of this."""
    load_fallback: bool = False
    """Where the newest checkpoint is damaged, go back to an older whole one."""
    async_save: bool = False
    """Write checkpoints in the background while training goes on."""
    save_optim: bool = True
    """Save the optimizer state too; without it a checkpoint can be evaluated but not resumed."""
    load_optim: bool = True
    """Load the optimizer state too."""
    save_rng: bool = True
    """Save the state of the random number generators."""
    load_rng: bool = True
    """Load the state of the random number generators."""
    override: tuple[str, ...] = ()
    """Settings that may differ from the checkpoint's on resume, by name: --override lr global_batch_size."""

    def __post_init__(self) -> None:
        require(
            self.save_interval is None or self.save_interval_tokens is None,
            "--save-interval and --save-interval-tokens both say when to save: give one",
        )
        require(not self.async_save or self.save is not None, "--async-save needs --save DIR, the directory to save to")
        require(
            self.keep_last is None or self.keep_last >= 2,
            f"--keep-last {self.keep_last} must be at least 2: should the newest be damaged, there is another",
        )
        require(
            self.keep_every is None or self.keep_last is not None,
            "--keep-every names exceptions from --keep-last: give that too",
        )
        for name in ("save_interval", "save_interval_tokens", "keep_every"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"--{name.replace('_', '-')} {value} must be at least 1")

    def rolling_back(self) -> CheckpointConfig:
        """To load from what this run has saved itself."""
        return replace(self, load=self.save)

    def interval(self) -> Duration | None:
        """Distance between checkpoints; None where nothing is saved."""
        if self.save is None:
            return None
        if self.save_interval_tokens is not None:
            return Duration(self.save_interval_tokens, "tokens")
        return Duration(self.save_interval or 1000, "iters")


@dataclass(frozen=True)
class LoggingConfig:
    """Logging"""

    log_interval: int = 100
    """Print a progress line every so many steps, with their mean loss (metrics.jsonl has every step)."""
    tensorboard: bool = True
    """Write TensorBoard events to SAVE/tensorboard."""
    tensorboard_dir: str | None = None
    """Another place for TensorBoard events."""
    wandb_project: str | None = None
    """Send the same numbers to this project of Weights & Biases (the extra [wandb]); a resume goes on with its run."""
    wandb_entity: str | None = None
    """The user or team that the project belongs to, where it is not W&B's default for you."""
    wandb_name: str | None = None
    """What W&B calls the run; by default the last part of --save."""
    wandb_mode: Literal["online", "offline"] | None = None
    """offline: only write files below SAVE/wandb, which `wandb sync` can send later; by default as WANDB_MODE says."""

    def __post_init__(self) -> None:
        require(self.log_interval >= 1, f"--log-interval {self.log_interval} must be at least 1")
        for name in ("wandb_entity", "wandb_name", "wandb_mode"):
            require(
                self.wandb_project is not None or getattr(self, name) is None,
                f"--{name.replace('_', '-')} {getattr(self, name)} needs --wandb-project NAME, which turns W&B on",
            )


@dataclass(frozen=True)
class Config:
    """A whole run. Checks that span sections are made here."""

    model: ModelConfig = field(default_factory=ModelConfig)
    seqlen_warmup: SeqlenWarmupConfig = field(default_factory=SeqlenWarmupConfig)
    batch_size_warmup: BatchSizeWarmupConfig = field(default_factory=BatchSizeWarmupConfig)
    training: TrainingConfig = field(default_factory=lambda: TrainingConfig(train_tokens=1))
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    faults: FaultConfig = field(default_factory=FaultConfig)
    learning_rate: LearningRateConfig = field(default_factory=LearningRateConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    def __post_init__(self) -> None:
        self.seqlen_warmup.check(self.model.seq_length)
        self.batch_size_warmup.check(self.training.global_batch_size)
        require(
            self.seqlen_warmup.seqlen_warmup != "adaptive" or self.evaluation.interval() is not None,
            "--seqlen-warmup adaptive lengthens after validations: give --eval-interval",
        )
        require(
            self.faults.on_spike == "log" or self.checkpoint.save is not None,
            "--on-spike rollback goes back to checkpoints: give --save DIR",
        )
        heads, tp = self.model.num_attention_heads, self.parallel.tensor_model_parallel_size
        divisors = [str(n) for n in range(1, heads + 1) if heads % n == 0]
        require(
            heads % tp == 0,
            f"--tensor-model-parallel-size {tp} must divide --num-attention-heads {heads}: use {', '.join(divisors)}",
        )
        warmup = self.learning_rate.warmup(self.training)
        decay = self.learning_rate.decay(self.training)
        if self.learning_rate.lr_decay_style != "constant" and warmup.value:
            require(
                decay.unit in (warmup.unit, "tokens"),
                f"a decay over {decay.unit} needs a learning rate warmup in {decay.unit}, found {warmup.unit}: "
                f"give --lr-warmup-{decay.unit}, or decay over tokens with --lr-decay-tokens",
            )
            require(
                warmup.unit != decay.unit or warmup.value < decay.value,
                f"the learning rate warmup ({warmup.value:,} {warmup.unit}) must end before "
                f"its decay does ({decay.value:,} {decay.unit})",
            )
        known = {f.name for section in fields(self) for f in fields(getattr(self, section.name))}
        known |= {"lr_decay", "data", "tokenizer"}
        for name in self.checkpoint.override:
            require(name.replace("-", "_") in known, f"--override {name}: there is no such setting")
