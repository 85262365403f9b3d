"""Training steps of the same GPT-2 by several programs, to be timed against one another.

`lean` is the loop that a person writes in an afternoon of plain PyTorch, with what is known to be fast: SDPA, a fused
projection, autocast, fused AdamW. `huggingface` is transformers' GPT2LMHeadModel in the loop of its documentation.
Both cut a step into micro-batches of a fixed number of sequences, as all such loops do, and clip the gradient.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from flags import positive
from measure import timed
from torch import Tensor, nn

from megatron.config import MODEL_SIZES, Config, ModelConfig, TrainingConfig
from megatron.data.batch import Batch
from megatron.distributed.launch import choose_device
from megatron.distributed.parallelize import place
from megatron.distributed.world import World
from megatron.errors import UserError
from megatron.model.flops import training_flops
from megatron.model.initialisation import initialise
from megatron.optimizer.adamw import gradients, scale_and_clip, squared_norm
from megatron.pacing.plan import StepPlan
from megatron.training.setup import build_state
from megatron.training.step import TrainStep
from pretrain_gpt2 import forward_step, model_provider

LR = 1e-4
SMALL = ("10M", 6, 320, 5, 8192)
"""Name, layers, hidden size, heads, vocabulary of the model that a CPU trains."""
Step = Callable[[np.ndarray, int], None]
"""One optimizer step on the first `seqlen` tokens of rows [sequences, seq_length + 1]."""


def model_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags that say what is trained."""
    parser.add_argument("--model-size", default="10M", choices=["10M", *MODEL_SIZES])
    parser.add_argument("--num-layers", type=positive, help="instead of the model size's")
    parser.add_argument("--hidden-size", type=positive, help="instead of the model size's")
    parser.add_argument("--num-attention-heads", type=positive, help="instead of the model size's")
    parser.add_argument("--vocab-size", type=positive, help="default: 8,192 for 10M, else GPT-2's 50,257")
    parser.add_argument("--seq-length", type=positive, default=1024)
    parser.add_argument("--precision", choices=["auto", "bf16", "fp32"], default="auto")


def model_of(arguments: argparse.Namespace) -> tuple[ModelConfig, int]:
    """The model that `model_arguments` describe, without dropout, and its vocabulary."""
    if arguments.model_size == SMALL[0]:
        _, layers, hidden, heads, vocab_size = SMALL
    else:
        layers, hidden, heads = MODEL_SIZES[arguments.model_size]
        vocab_size = 50257
    config = ModelConfig(
        num_layers=arguments.num_layers or layers,
        hidden_size=arguments.hidden_size or hidden,
        num_attention_heads=arguments.num_attention_heads or heads,
        seq_length=arguments.seq_length,
        attention_dropout=0.0,
        hidden_dropout=0.0,
    )
    return config, arguments.vocab_size or vocab_size


def use_bf16(precision: str, has_bf16: bool) -> bool:
    """Whether to compute in bf16: where the machine multiplies it itself, unless told."""
    return precision == "bf16" or (precision == "auto" and (has_bf16 or torch.cuda.is_available()))


def random_rows(sequences: int, seq_length: int, vocab_size: int) -> np.ndarray:
    """[sequences, seq_length + 1] random tokens."""
    return np.random.default_rng(0).integers(0, vocab_size, (sequences, seq_length + 1))


def step_flops(config: ModelConfig, vocab_size: int, sequences: int, seqlen: int) -> int:
    """Of one step, as the planner counts them."""
    tokens = sequences * seqlen
    return training_flops(config, vocab_size, tokens=tokens, token_seqlen_sum=tokens * seqlen)


class Ours:
    """This repository's training step, without the program around it."""

    def __init__(
        self, model: ModelConfig, vocab_size: int, *, sequences: int, bf16: bool, compile: bool, **training: Any
    ) -> None:
        """`training`: of TrainingConfig, such as micro_batch_tokens."""
        options = TrainingConfig(
            train_iters=1,
            global_batch_size=sequences,
            bf16=bf16,
            compile="on" if compile else "off",
            **training,
        )
        config = Config(model=model, training=options)
        world = World(device=choose_device(options))
        state = build_state(config, vocab_size, world, model_provider, print)
        initialise(state.model, 1, place)
        self.state, self.world = state, world
        self.train_step = TrainStep(
            state.model, state.optimizer, state.scaler, forward_step, options, config.optimizer, config.parallel, world
        )

    def clip_and_update(self) -> Callable[[], None]:
        """What a step does once, whatever its tokens: norm, clipping and update, here with gradients of zero."""
        for parameter in self.state.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        grads = gradients(self.state.model.parameters())

        def update() -> None:
            scale_and_clip(grads, squared_norm(grads).sqrt(), loss_scale=1.0, max_norm=1.0)
            self.state.optimizer.step()

        return update

    def __call__(self, rows: np.ndarray, seqlen: int) -> None:
        self.train_step(Batch.from_samples(rows), StepPlan(seqlen, len(rows), LR))


class LeanBlock(nn.Module):
    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.qkv, self.out = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
        self.up, self.down = nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        n, s, h = x.shape
        q, k, v = (p.view(n, s, self.heads, -1).transpose(1, 2) for p in self.qkv(self.norm1(x)).split(h, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(n, s, h))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class LeanGPT2(nn.Module):
    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.words = nn.Embedding(config.padded_vocab_size(vocab_size), hidden)
        self.positions = nn.Embedding(config.seq_length, hidden)
        self.blocks = nn.ModuleList(LeanBlock(hidden, config.num_attention_heads) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(hidden)
        self.head = nn.Linear(hidden, self.words.num_embeddings, bias=False)
        self.head.weight = self.words.weight
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        x = self.words(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


class PlainLoop:
    """Forward, backward over micro-batches of `micro_batch` sequences, clip, step."""

    def __init__(self, model: nn.Module, loss: Callable[..., Tensor], micro_batch: int, bf16: bool) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = model.to(self.device).train()
        self.loss = loss
        self.micro_batch = micro_batch
        self.bf16 = bf16
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.01, fused=True)

    def _autocast(self) -> AbstractContextManager[object]:
        return torch.autocast(self.device.type, dtype=torch.bfloat16) if self.bf16 else nullcontext()

    def __call__(self, rows: np.ndarray, seqlen: int) -> None:
        parts = torch.from_numpy(rows[:, : seqlen + 1]).split(self.micro_batch)
        for part in parts:
            part = part.to(self.device)  # noqa: PLW2901
            with self._autocast():
                loss = self.loss(part[:, :-1].contiguous(), part[:, 1:].contiguous())
            (loss / len(parts)).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def lean(config: ModelConfig, vocab_size: int, *, micro_batch: int, bf16: bool, compile: bool) -> PlainLoop:
    """The plain PyTorch loop."""
    model = LeanGPT2(config, vocab_size)
    return PlainLoop(model, torch.compile(model) if compile else model, micro_batch, bf16)


def huggingface(config: ModelConfig, vocab_size: int, *, micro_batch: int, bf16: bool, compile: bool) -> PlainLoop:
    """transformers' GPT-2 in a plain loop."""
    try:
        import transformers  # noqa: PLC0415  (an optional dependency)
    except ImportError as error:
        raise UserError(
            "transformers is not installed: pip install transformers, or leave it out of --contestants"
        ) from error

    transformers.logging.set_verbosity_error()
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=vocab_size,
            n_positions=config.seq_length,
            n_embd=config.hidden_size,
            n_layer=config.num_layers,
            n_head=config.num_attention_heads,
            attn_pdrop=0.0,
            embd_pdrop=0.0,
            resid_pdrop=0.0,
            use_cache=False,
            bos_token_id=vocab_size - 1,
            eos_token_id=vocab_size - 1,
        )
    )
    forward = torch.compile(model) if compile else model
    # shift_labels: predictions of all positions, as the others; transformers would drop the last.
    return PlainLoop(
        model, lambda tokens, labels: forward(tokens, labels=labels, shift_labels=labels).loss, micro_batch, bf16
    )


def peak_flops(bf16: bool) -> float:
    """FLOP/s of large square products, the fastest of 8: what a CPU's utilisation is measured by."""
    size = 2048
    a, b = torch.randn(2, size, size, dtype=torch.bfloat16 if bf16 else torch.float32)
    return 2 * size**3 / min(timed(lambda: a @ b) for _ in range(8))


MAKERS: dict[str, Callable[..., Step]] = {"ours": Ours, "lean": lean, "huggingface": huggingface}


def stopwatch(name: str, model: ModelConfig, vocab_size: int, most: int, **options: Any) -> Callable[..., Any]:
    """What a contestant's process answers: seconds of a step on `sequences` (of at most `most`) of `seqlen` tokens.

    Asked for "graphs", the number of graphs that torch.compile has made so far; for "update", the seconds of clipping
    and updating alone (ours only).
    """
    torch.manual_seed(0)
    step = MAKERS[name](model, vocab_size, **options)
    rows = random_rows(most, model.seq_length, vocab_size)

    def answer(what: str, seqlen: int = 0, sequences: int = 0) -> float:
        if what == "graphs":
            return torch._dynamo.utils.counters["stats"]["unique_graphs"]
        if what == "update":
            assert isinstance(step, Ours)
            update = step.clip_and_update()
            return timed(lambda: _finish(update()))
        return timed(lambda: _finish(step(rows[:sequences], seqlen)))

    return answer


def _finish(_: None) -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
