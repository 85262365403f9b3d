"""What stands before the first step: vocabulary, generators, model, state."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from megatron.config import Config, ModelConfig, ParallelConfig, TokenizerConfig
from megatron.data.indexed_dataset import IndexedDataset
from megatron.distributed.parallelize import parallelize
from megatron.distributed.world import World
from megatron.errors import UserError
from megatron.instability.loss_ratio import SPIKE, PositionMatchedLossRatio
from megatron.layout import padded_vocabulary
from megatron.model.gpt2 import GPT2Model
from megatron.model.initialisation import generator_for
from megatron.optimizer.adamw import build_optimizer
from megatron.optimizer.loss_scale import LossScaler
from megatron.pacing.seqlen_warmup import AdaptivePacing
from megatron.tokenizer.build import build_tokenizer
from megatron.training.state import TrainState

ModelProvider = Callable[[ModelConfig, int], GPT2Model]
"""(model config, vocabulary size) -> model; it is called on the meta device, where tensors have no values."""


@dataclass(frozen=True)
class Vocabulary:
    """What training needs to know of the tokenizer."""

    size: int
    """Before padding."""
    eod: int | None
    fingerprint: str


def find_vocabulary(config: TokenizerConfig, prefixes: list[str]) -> Vocabulary:
    """The vocabulary that the tokenizer flags name, else --vocab-size, else what preprocessing noted of the data.

    Raises:
        UserError: where none of them says it, or two corpora disagree.
    """
    if config.vocab_file or config.merge_file or config.tokenizer_file:
        if config.vocab_size is not None:
            raise UserError("--vocab-size is for training without a tokenizer's files: drop it")
        tokenizer = build_tokenizer(config.tokenizer_type, config.vocab_file, config.merge_file, config.tokenizer_file)
        return Vocabulary(tokenizer.vocab_size, tokenizer.eod, tokenizer.fingerprint)
    if config.vocab_size is not None:
        return Vocabulary(config.vocab_size, None, f"vocabulary of {config.vocab_size}")
    noted = {prefix: IndexedDataset(prefix).sidecar for prefix in prefixes}
    found = set()
    for prefix, sidecar in noted.items():
        if sidecar is None or sidecar.vocab_size is None:
            raise UserError(
                f"{prefix} does not say which tokenizer made it: give --vocab-file and --merge-file, "
                "--tokenizer-file, or --vocab-size"
            )
        found.add(Vocabulary(sidecar.vocab_size, sidecar.eod, sidecar.tokenizer_fingerprint or ""))
    if len(found) != 1:
        raise UserError(f"--data-path: the corpora were made with different tokenizers: {', '.join(prefixes)}")
    return found.pop()


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
