"""What stands before the first step: generators, model, state."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import torch

from megatron.config import Config, ModelConfig, ParallelConfig
from megatron.distributed.parallelize import parallelize
from megatron.distributed.world import World
from megatron.instability.loss_ratio import SPIKE, PositionMatchedLossRatio
from megatron.layout import padded_vocabulary
from megatron.model.cpu import keep_freed_memory
from megatron.model.gpt2 import GPT2Model
from megatron.model.initialisation import generator_for
from megatron.optimizer.adamw import build_optimizer
from megatron.optimizer.loss_scale import LossScaler
from megatron.pacing.seqlen_warmup import AdaptivePacing
from megatron.training.state import TrainState

ModelProvider = Callable[[ModelConfig, int], GPT2Model]
"""(model config, vocabulary size) -> model; it is called on the meta device, where tensors have no values."""


def seed_generators(seed: int, world: World, parallel: ParallelConfig) -> None:
    """Seed every global generator; only dropout draws from them.

    Ranks that share a layer draw alike, as they hold the same rows between the layers, but under sequence parallelism.
    """
    place = world.rank if parallel.sequence_parallel else world.dp_rank * world.layout.tp
    own = generator_for(seed, f"rank/{place}").initial_seed() if place else seed
    random.seed(own)
    np.random.seed(own % 2**32)
    torch.manual_seed(own)


def build_state(
    config: Config, vocab_size: int, world: World, model_provider: ModelProvider, report: Callable[[str], None]
) -> TrainState:
    """A run before its first step, spread over `world`. Its weights have no values yet: initialise or restore them."""
    padded_vocabulary(config, vocab_size)
    if world.device.type == "cpu":
        keep_freed_memory()
    with torch.device("meta"):
        model = model_provider(config.model, vocab_size)
    parallelize(model, world, config.parallel, config.training, report)
    return TrainState(
        model=model,
        optimizer=build_optimizer(model, config.optimizer),
        scaler=LossScaler(config.training),
        matched_ratio=PositionMatchedLossRatio(config.model.seq_length),
        adaptive=AdaptivePacing(config.seqlen_warmup, limit=SPIKE),
    )
