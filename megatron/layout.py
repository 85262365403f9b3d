"""How the ranks of a run are arranged: tensor parallel ranks are neighbours, data parallel ranks stride over them.

Rank r is (r // tp, r % tp) on the mesh (dp, tp); dp itself is (replicate, shard), its ranks in that order.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron.config import Config, require


@dataclass(frozen=True)
class Layout:
    """Sizes of the axes of the mesh."""

    replicate: int = 1
    """Copies of the sharded state."""
    shard: int = 1
    """Ranks over which each copy is sharded."""
    tp: int = 1
    """Tensor parallel ranks."""

    @property
    def dp(self) -> int:
        """Data parallel ranks: each has its own share of the batch."""
        return self.replicate * self.shard

    @property
    def world_size(self) -> int:
        """All ranks."""
        return self.dp * self.tp

    def __str__(self) -> str:
        return f"dp {self.dp} x tp {self.tp}"


def layout_of(config: Config, world_size: int) -> Layout:
    """The layout of `world_size` ranks.

    Raises:
        UserError: where tp does not divide the ranks, the data parallel ranks do not divide the batch, or a setting for
            several of them has no effect on a single one.
    """
    parallel, batch = config.parallel, config.training.global_batch_size
    tp = parallel.tensor_model_parallel_size
    require(
        world_size % tp == 0,
        f"--tensor-model-parallel-size {tp} must divide the number of ranks, found {world_size} (torchrun's "
        "--nnodes times --nproc-per-node)",
    )
    dp = world_size // tp
    require(
        not parallel.grad_reduce_in_bf16 or dp > 1,
        f"--grad-reduce-in-bf16 has no effect on a single data parallel rank (ranks {world_size}, tp {tp}), whose "
        "gradients are sent to no other: drop it, or start more ranks",
    )
    require(
        batch >= dp,
        f"there are more data parallel ranks ({dp}) than sequences in a step: raise --global-batch-size {batch}, "
        "start fewer ranks, or raise --tensor-model-parallel-size",
    )
    require(batch % dp == 0, f"--global-batch-size {batch} must be a multiple of the {dp} data parallel ranks")
    for flag, value in config.batch_size_warmup.divisors():
        require(value % dp == 0, f"{flag} {value} must be a multiple of the {dp} data parallel ranks")
    size = config.training.micro_batch_size
    require(
        size is None or batch // dp % size == 0,
        f"--global-batch-size {batch} must be a multiple of --micro-batch-size {size} times the {dp} data parallel "
        "ranks",
    )
    if parallel.zero_stage == 0:
        return Layout(replicate=dp, tp=tp)
    shard = parallel.data_parallel_shard_size or dp
    require(dp % shard == 0, f"--data-parallel-shard-size {shard} must divide the {dp} data parallel ranks")
    return Layout(replicate=dp // shard, shard=shard, tp=tp)


def padded_vocabulary(config: Config, vocab_size: int) -> int:
    """The vocabulary's padded size. Raises UserError unless the tensor parallel ranks divide it."""
    padded, tp = config.model.padded_vocab_size(vocab_size), config.parallel.tensor_model_parallel_size
    require(
        padded % tp == 0,
        f"--tensor-model-parallel-size {tp} must divide the padded vocabulary, found {padded:,}: give a "
        f"--make-vocab-size-divisible-by that is a multiple of {tp}, such as {128 * tp}",
    )
    return padded
