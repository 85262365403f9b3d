"""Decoding with a cache of keys and values: prompts are computed once, then one token of each sequence at a time.

The rows of a batch may differ in length. Prompts are padded on the right, where causal attention never looks, and each
row goes on from its own length, over its padding in the cache: its positions and what it attends to are those of the
prompt alone, and so are the results, up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import cast

import torch
from torch import Tensor

from megatron.errors import UserError
from megatron.model.gpt2 import Attention, GPT2Model

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""`Attention.attend`: q, k, v, mask -> attended values."""


class Decoder:
    """A batch of sequences, and the keys and values of their tokens.

    The model, which must be in evaluation mode, is only borrowed for the time of a call.
    """

    logits: Tensor
    """Of each row's next token: fp32 [rows, vocabulary], without the vocabulary's padding."""

    def __init__(self, model: GPT2Model, prompts: Sequence[Sequence[int]], capacity: int) -> None:
        """Allocate the cache and compute `prompts`.

        Args:
            capacity: tokens that a row has room for, its prompt among them. The cache is
                [layers, key or value, rows, heads, capacity, dim] in the type of the weights.

        Raises:
            UserError: for an empty prompt or one that there is no room for; for a `capacity` beyond the positions.
        """
        config = model.config
        lengths = [len(prompt) for prompt in prompts]
        if min(lengths) < 1:
            raise UserError("a prompt has no token: give at least one, such as the end of text")
        if not max(lengths) <= capacity <= config.positions:
            raise UserError(
                f"prompts of up to {max(lengths):,} tokens and room for {capacity:,} do not fit the model's "
                f"{config.positions:,} positions: shorten the prompts, or generate less"
            )
        self._model = model
        self._lengths = lengths
        heads = config.num_attention_heads
        # Zeros: what is masked is still multiplied by 0, and memory as it is found may hold a NaN.
        self._cache = torch.zeros(
            (config.num_layers, 2, len(prompts), heads, capacity, config.hidden_size // heads),
            dtype=model.word_embeddings.weight.dtype,
            device=model.device,
        )
        self._prefill(prompts)

    @torch.no_grad()
    def _prefill(self, prompts: Sequence[Sequence[int]]) -> None:
        longest = max(self._lengths)
        tokens = torch.tensor([[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts])
        with self._attending(_attend_prompt):
            hidden = self._model(tokens.to(self._model.device))
        last = [row * longest + length - 1 for row, length in enumerate(self._lengths)]
        self._predict(hidden[torch.tensor(last, device=hidden.device)])

    @torch.no_grad()
    def step(self, tokens: Tensor) -> None:
        """Append one token to each row, `tokens` [rows] int64, and compute `logits` anew.

        Raises:
            UserError: where a row has no room left.
        """
        capacity = self._cache.shape[4]
        keys = max(self._lengths) + 1
        if keys > capacity:
            raise UserError(f"a sequence has filled the {capacity:,} tokens that it had room for: generate less")
        positions = torch.tensor(self._lengths, device=self._model.device)
        mask = torch.arange(keys, device=positions.device) <= positions[:, None]
        with self._attending(partial(_attend_token, positions=positions, mask=mask[:, None, None])):
            hidden = self._model(tokens.to(self._model.device)[:, None], position_ids=positions[:, None])
        self._lengths = [length + 1 for length in self._lengths]
        self._predict(hidden)

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows only, in this order."""
        index = torch.tensor(rows, dtype=torch.int64, device=self._cache.device)
        self._cache, self.logits = self._cache.index_select(2, index), self.logits[index]
        self._lengths = [self._lengths[row] for row in rows]

    def _predict(self, hidden: Tensor) -> None:
        """Logits from the hidden states of each row's last token, [rows, hidden]."""
        self.logits = self._model.logits(hidden)[:, : self._model.vocab_size].float()

    @contextmanager
    def _attending(self, attend: Callable[..., Tensor]) -> Iterator[None]:
        """Within it each layer of the model attends by `attend(own, cache, q, k, v, mask)`: its own way, its cache."""
        layers = [cast(Attention, block.attention) for block in self._model.blocks]
        before = [vars(layer).get("attend") for layer in layers]
        try:
            for layer, cache in zip(layers, self._cache, strict=True):
                layer.attend = partial(attend, layer.attend, cache)  # type: ignore[method-assign]
            yield
        finally:
            for layer, own in zip(layers, before, strict=True):
                vars(layer).pop("attend", None)  # the class's method shows again
                if own is not None:
                    layer.attend = own  # type: ignore[method-assign]


def _attend_prompt(own: Attend, cache: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Plain attention over whole prompts, [rows, heads, seqlen, dim], whose keys and values go into `cache`."""
    cache[:, :, :, : k.shape[2]] = torch.stack((k, v))
    return own(q, k, v, mask)


def _attend_token(
    own: Attend,
    cache: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    _: Tensor | None,
    *,
    positions: Tensor,
    mask: Tensor,
) -> Tensor:
    """Attention of one token a row, [rows, heads, 1, dim], at `positions` [rows], to what `mask` shows of `cache`."""
    rows = torch.arange(len(positions), device=positions.device)
    cache[0, rows, :, positions] = k[:, :, 0]
    cache[1, rows, :, positions] = v[:, :, 0]
    keys, values = cache[:, :, :, : mask.shape[-1]]
    return own(q, keys, values, mask)
