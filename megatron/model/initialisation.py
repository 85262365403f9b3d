"""Initial weights, each tensor from its own generator, so that no layout of ranks can change them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from megatron.model.gpt2 import GPT2Model


def initialise(model: GPT2Model, seed: int, place: Callable[[Tensor, Tensor], object] = Tensor.copy_) -> None:
    """Fill every parameter: matrices N(0, std), outputs of residual branches N(0, std / sqrt(2 * layers)),
    layer norms 1, biases 0, padded rows of the vocabulary 0 (GPT-2, and Megatron's scaled_init_method).

    A tensor's values depend on (seed, its name, its shape) alone. `place(parameter, values)` puts the whole tensor's
    values into a parameter, of which a rank may hold only a part.
    """
    config = model.config
    residual_std = config.init_method_std / math.sqrt(2 * config.num_layers)
    norms = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in norms:
                values = torch.ones(parameter.shape)
            elif name.endswith("bias"):
                values = torch.zeros(parameter.shape)
            else:
                residual = name.endswith(("attention.output.weight", "mlp.down.weight"))
                std = residual_std if residual else config.init_method_std
                # Drawn on the CPU: a GPU's generator gives other numbers.
                values = torch.empty(parameter.shape).normal_(std=std, generator=generator_for(seed, name))
            if name == "word_embeddings.weight":
                values[model.vocab_size :] = 0
            place(parameter, values)


def generator_for(seed: int, name: str) -> torch.Generator:
    """A CPU generator that (seed, name) decide."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
