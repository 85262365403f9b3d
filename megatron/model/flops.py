"""Floating point operations of training and size of the model. No torch."""

from __future__ import annotations

from megatron.config import ModelConfig


def training_flops(
    config: ModelConfig, vocab_size: int, *, tokens: int, token_seqlen_sum: int, recompute: bool = False
) -> int:
    """Floating point operations, forward and backward, of training on `tokens` tokens.

    Per token 72 L h^2 + 6 V h + 12 L h s, attention counted dense, plus one forward of the layers where
    activations are recomputed (the cost model of the paper's setting; V is the true vocabulary).

    Args:
        token_seqlen_sum: sum over steps of tokens * sequence length, in place of tokens * s.
    """
    layers, hidden = config.num_layers, config.hidden_size
    dense, attention = 72 * layers * hidden**2 * tokens, 12 * layers * hidden * token_seqlen_sum
    total = dense + attention + 6 * vocab_size * hidden * tokens
    return total + (dense + attention) // 3 if recompute else total


def parameter_count(config: ModelConfig, vocab_size: int) -> int:
    """Parameters of GPT-2, without the padding of the vocabulary."""
    layers, hidden = config.num_layers, config.hidden_size
    block = 12 * hidden**2 + 13 * hidden
    return layers * block + (vocab_size + config.positions) * hidden + 2 * hidden
