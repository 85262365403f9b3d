"""GPT-2: pre-layer-norm Transformer, learned positions, tied output embedding, tanh GELU.

The trunk works on [tokens, hidden], all sequences of a micro-batch in a row; only attention views it as
[sequences, seqlen, heads, dim]. The model returns hidden states; `loss` and `logits` are asked for separately.

Where each layer is shared by several ranks, another room replaces the parts that differ: the linear layers, layer norms
and embeddings, `Attention.attend` and `GPT2Model.head`. Between them a rank may then hold other rows than all tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.config import ModelConfig
from megatron.model.cpu import causal_attention


class Attention(nn.Module):
    """Causal self-attention. The rows of the fused projection are laid out (head, q/k/v, dim)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.dropout = config.attention_dropout
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.output = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, sequences: int, seqlen: int, mask: Tensor | None) -> Tensor:
        """[tokens, hidden] -> [tokens, hidden]. `mask` [sequences, 1, seqlen, seqlen] replaces plain causality."""
        tokens = sequences * seqlen
        # The number of heads is left to view(), so that a column split of qkv works on its share of heads; it may give
        # rows beyond the last token, to round their number up.
        qkv = self.qkv(x)[:tokens].view(sequences, seqlen, -1, 3, self.head_dim)
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(3))  # each [sequences, heads, seqlen, dim]
        return self.output(self.attend(q, k, v, mask).transpose(1, 2).reshape(tokens, -1))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """[sequences, heads, seqlen, dim] each -> the same shape."""
        dropout = self.dropout if self.training else 0.0
        if q.device.type == "cpu" and q.dtype == torch.bfloat16 and mask is None and not dropout:
            return causal_attention(q, k, v)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, dropout_p=dropout)


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

    def forward(self, x: Tensor, sequences: int, seqlen: int, mask: Tensor | None) -> Tensor:
        """[tokens, hidden] -> [tokens, hidden]."""
        x = x + self.dropout(self.attention(self.attention_norm(x), sequences, seqlen, mask))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class PositionEmbedding(nn.Embedding):
    """Learned positions, added to what it is given."""

    def forward(self, words: Tensor, sequences: int, seqlen: int, position_ids: Tensor | None) -> Tensor:  # type: ignore[override]
        """[tokens, hidden] -> [tokens, hidden]. `position_ids` [sequences, seqlen]; None: 0 .. seqlen - 1 in each."""
        if position_ids is not None:
            return words + super().forward(position_ids.flatten())
        # Repeated: a sum broadcast and flattened is a view, for which torch.compile would compile block 0 once more.
        return words + self.weight[:seqlen].repeat(sequences, 1)


class Head(nn.Module):
    """From hidden states to logits and losses, by the word embedding, whose rows beyond the vocabulary do not count."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.vocab_size = vocab_size

    def logits(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """[rows, hidden], [padded vocabulary, hidden] -> [rows, padded vocabulary]; -inf beyond the vocabulary."""
        return F.linear(hidden, weight, padding_bias(weight, self.vocab_size))

    def loss(self, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        """Cross entropy of each position, unreduced, in fp32: [tokens, hidden], [tokens] -> [tokens]."""
        return F.cross_entropy(self.logits(hidden, weight).float(), labels, reduction="none")


class GPT2Model(nn.Module):
    """GPT-2 over a vocabulary that is padded to a round size; padded tokens have probability zero.

    Parameters are uninitialised until `initialisation.initialise` fills them.
    """

    computes_on: torch.device | None = None
    """Where the weights are brought for use, if they are kept elsewhere."""

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = vocab_size
        self.word_embeddings = nn.Embedding(config.padded_vocab_size(vocab_size), config.hidden_size)
        self.position_embeddings = PositionEmbedding(config.positions, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.final_norm = nn.LayerNorm(config.hidden_size, eps=config.norm_epsilon)
        self.head = Head(vocab_size)

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
        words = self.word_embeddings(tokens.flatten())  # [tokens, hidden]
        x = self.dropout(self.position_embeddings(words, sequences, seqlen, position_ids))
        mask = None if segment_ids is None else segment_mask(segment_ids)
        for block in self.blocks:
            x = block(x, sequences, seqlen, mask)
        hidden = self.final_norm(x)
        rows = sequences * seqlen
        return hidden if hidden.shape[0] == rows else hidden[:rows].clone()

    def logits(self, hidden: Tensor) -> Tensor:
        """[rows, hidden] -> [rows, padded vocabulary]; padded tokens are -inf."""
        return self.head.logits(hidden, self.word_embeddings.weight)

    def loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Cross entropy of each position, unreduced, in fp32: [tokens, hidden], [tokens] -> [tokens]."""
        return self.head.loss(hidden, self.word_embeddings.weight, labels)

    @property
    def device(self) -> torch.device:
        """Where to put what the model is given."""
        return self.computes_on or self.word_embeddings.weight.device


def segment_mask(segment_ids: Tensor) -> Tensor:
    """Causal attention within segments: [sequences, seqlen] -> bool [sequences, 1, seqlen, seqlen]."""
    seqlen = segment_ids.shape[1]
    causal = torch.ones(seqlen, seqlen, dtype=torch.bool, device=segment_ids.device).tril()
    same = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
    return same & causal


def padding_bias(weight: Tensor, vocab_size: int, first: int = 0) -> Tensor | None:
    """What to add to the logits of `weight`'s rows, the first of them being token `first`, so that those beyond the
    vocabulary are -inf: [rows]. None where there are none."""
    rows = weight.shape[0]
    if first + rows <= vocab_size:
        return None
    beyond = torch.arange(first, first + rows, device=weight.device) >= vocab_size
    return torch.zeros(rows, dtype=weight.dtype, device=weight.device).masked_fill_(beyond, float("-inf"))
