"""Pretrain GPT-2, with or without sequence length warmup: python pretrain_gpt2.py --config RECIPE [flags]."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from megatron.arguments import build_parser, parse_config
from megatron.config import ModelConfig
from megatron.data.batch import Batch
from megatron.errors import run
from megatron.model.gpt2 import GPT2Model
from megatron.training.pretrain import pretrain

if TYPE_CHECKING:
    from torch import Tensor


def model_provider(config: ModelConfig, vocab_size: int) -> GPT2Model:
    """The model, before its weights are shared out, initialised or loaded."""
    return GPT2Model(config, vocab_size)


def forward_step(model: GPT2Model, batch: Batch, seqlen: int) -> tuple[Tensor, Tensor | None]:
    """Truncate to the step's sequence length, on the host, then run the model.

    Returns:
        Losses [sequences, seqlen], unreduced, and the mask of those that count (None: all).
    """
    batch = batch.truncate(seqlen).to(model.device, non_blocking=True)
    hidden = model(batch.tokens, batch.position_ids, batch.segment_ids)  # [sequences * seqlen, hidden]
    losses = model.loss(hidden, batch.labels.flatten())
    return losses.view(batch.tokens.shape), batch.loss_mask


def main() -> int:
    """Parse the command line and train."""
    parser = build_parser(__doc__)
    config, _ = parse_config(parser, sys.argv[1:])
    return pretrain(config, model_provider, forward_step)


if __name__ == "__main__":
    run(main)
