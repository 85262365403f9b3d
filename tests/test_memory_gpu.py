"""The memory estimate against the allocator of a GPU."""

import pytest
import torch

from megatron.config import MODEL_SIZES, Config, ModelConfig, TrainingConfig
from megatron.layout import Layout
from megatron.model.gpt2 import GPT2Model
from megatron.model.initialisation import initialise
from megatron.model.memory import estimate_memory
from megatron.optimizer.adamw import build_optimizer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
VOCAB, SEQUENCES, LENGTH = 50257, 8, 1024


@pytest.mark.parametrize("compiled", ["off", "on"])
def test_a_step_takes_what_was_estimated(compiled):
    """The second of two steps of two micro-batches: moments and gradients are there when the loss is computed."""
    from megatron.distributed.parallelize import compile_model

    layers, hidden, heads = MODEL_SIZES["gpt3-125M"]
    config = Config(
        model=ModelConfig(num_layers=layers, hidden_size=hidden, num_attention_heads=heads, seq_length=LENGTH),
        training=TrainingConfig(
            train_iters=2, global_batch_size=2 * SEQUENCES, micro_batch_size=SEQUENCES, bf16=True, compile=compiled
        ),
    )
    device = torch.device("cuda")
    model = GPT2Model(config.model, VOCAB)
    initialise(model, 1)
    model.to(device)
    compile_model(model, device, config.training, print)
    optimizer = build_optimizer(model, config.optimizer)
    tokens = torch.randint(0, VOCAB, (SEQUENCES, LENGTH), device=device)
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        for _ in range(2):
            with torch.autocast("cuda", dtype=torch.bfloat16):
                losses = model.loss(model(tokens), tokens.flatten())
            losses.mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    estimate = estimate_memory(config, Layout(), VOCAB)
    assert estimate.total == pytest.approx(torch.cuda.max_memory_allocated(), rel=0.1)
