"""Small GPT-2s with random values in every tensor, so that no two of them may be mistaken for one another; a canary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megatron.checkpointing.weights import Vocabulary, Weights, parameter_shapes, sized
from megatron.config import ModelConfig
from megatron.model.initialisation import generator_for

SMALL = ModelConfig(
    num_layers=2, hidden_size=48, num_attention_heads=4, seq_length=32, hidden_dropout=0.2, norm_epsilon=1e-2
)
"""With no setting that is a default."""


def random_weights(
    config: ModelConfig = SMALL, vocabulary: Vocabulary | int = 300, *, std: float = 0.3, seed: int = 1
) -> Weights:
    """Weights of N(0, std), those of the layer norms around 1; padded rows of the vocabulary are zero."""
    vocabulary = sized(vocabulary) if isinstance(vocabulary, int) else vocabulary
    tensors = {}
    for name, shape in parameter_shapes(config, vocabulary.size).items():
        values = torch.empty(shape).normal_(std=std, generator=generator_for(seed, name))
        tensors[name] = values + 1 if "norm.weight" in name else values
    words = tensors["word_embeddings.weight"]
    padded = torch.zeros(config.padded_vocab_size(len(words)), config.hidden_size)
    padded[: len(words)] = words
    return Weights(config, vocabulary, tensors | {"word_embeddings.weight": padded}, Path("made up"))


def assert_same(left: Weights, right: Weights) -> None:
    """Shape and every bit of the values."""
    assert left.config == right.config and left.vocabulary.size == right.vocabulary.size
    assert left.tensors.keys() == right.tensors.keys()
    for name, tensor in left.tensors.items():
        assert tensor.dtype == right.tensors[name].dtype and torch.equal(tensor, right.tensors[name]), name


class Canary:
    """A pickle of it touches a file when it is loaded with code allowed."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)
