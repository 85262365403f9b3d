"""GPT-2: pre-layer-norm Transformer, learned positions, tied output embedding, tanh GELU.

The trunk works on [tokens, hidden], all sequences of a micro-batch in a row; only attention views it as
[sequences, seqlen, heads, dim]. The model returns hidden states; `loss` and `logits` are asked for separately.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatron.config import ModelConfig


class Attention(nn.Module):
    """Causal self-attention. The rows of the fused projection are laid out (head, q/k/v, dim)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.dropout = config.attention_dropout
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.output = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, sequences: int, mask: Tensor | None) -> Tensor:
        """[tokens, hidden] -> [tokens, hidden]. `mask` [sequences, 1, seqlen, seqlen] replaces plain causality."""
        tokens = x.shape[0]
        # The number of heads is left to view(), so that a column split of qkv works on its share of heads.
        qkv = self.qkv(x).view(sequences, tokens // sequences, -1, 3, self.head_dim)
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(3))  # each [sequences, heads, seqlen, dim]
        attended = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, dropout_p=self.dropout if self.training else 0.0
        )
        return self.output(attended.transpose(1, 2).reshape(tokens, -1))


class MLP(nn.Module):
    """Two projections with a tanh GELU between them, four times as wide inside."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.hidden_size, 4 * config.hidden_size)
        self.down = nn.Linear(4 * config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """[tokens, hidden] -> [tokens, hidden]."""
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class Block(nn.Module):
    """One Transformer block: attention and MLP, each behind a layer norm and beside a residual."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.norm_epsilon)
        self.attention = Attention(config)
        self.mlp_norm = nn.LayerNorm(config.hidden_size, eps=config.norm_epsilon)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, x: Tensor, sequences: int, mask: Tensor | None) -> Tensor:
        """[tokens, hidden] -> [tokens, hidden]."""
        x = x + self.dropout(self.attention(self.attention_norm(x), sequences, mask))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class GPT2Model(nn.Module):
    """GPT-2 over a vocabulary that is padded to a round size; padded tokens have probability zero.

    Parameters are uninitialised until `initialisation.initialise` fills them.
    """

    padding_bias: Tensor | None

    def __init__(self, config: ModelConfig, vocab_size: int, *, recompute: bool = False) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = vocab_size
        self.recompute = recompute
        padded = config.padded_vocab_size(vocab_size)
        self.word_embeddings = nn.Embedding(padded, config.hidden_size)
        self.position_embeddings = nn.Embedding(config.positions, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.final_norm = nn.LayerNorm(config.hidden_size, eps=config.norm_epsilon)
        bias = None
        if padded > vocab_size:
            bias = torch.zeros(padded)
            bias[vocab_size:] = float("-inf")
        self.register_buffer("padding_bias", bias, persistent=False)

    def forward(self, tokens: Tensor, position_ids: Tensor | None = None, segment_ids: Tensor | None = None) -> Tensor:
        """Hidden states after the last layer norm.

        Args:
            tokens: [sequences, seqlen] int64.
            position_ids: [sequences, seqlen] int64; 0..seqlen-1 where not given.
            segment_ids: [sequences, seqlen] int64; tokens of different segments do not attend to one another.

        Returns:
            [sequences * seqlen, hidden].
        """
        sequences, seqlen = tokens.shape
        words = self.word_embeddings(tokens)  # [sequences, seqlen, hidden]
        if position_ids is None:
            positions = self.position_embeddings.weight[:seqlen]  # [seqlen, hidden], broadcast over sequences
        else:
            positions = self.position_embeddings(position_ids)
        x = self.dropout((words + positions).flatten(0, 1))
        mask = None if segment_ids is None else segment_mask(segment_ids)
        for block in self.blocks:
            if self.recompute and self.training:
                x = checkpoint(block, x, sequences, mask, use_reentrant=False)
            else:
                x = block(x, sequences, mask)
        return self.final_norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """[rows, hidden] -> [rows, padded vocabulary]; padded tokens are -inf."""
        return F.linear(hidden, self.word_embeddings.weight, self.padding_bias)

    def loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Cross entropy of each position, unreduced, in fp32: [tokens, hidden], [tokens] -> [tokens]."""
        return F.cross_entropy(self.logits(hidden).float(), labels, reduction="none")

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.word_embeddings.weight.device


def segment_mask(segment_ids: Tensor) -> Tensor:
    """Causal attention within segments: [sequences, seqlen] -> bool [sequences, 1, seqlen, seqlen]."""
    seqlen = segment_ids.shape[1]
    causal = torch.ones(seqlen, seqlen, dtype=torch.bool, device=segment_ids.device).tril()
    same = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
    return same & causal
