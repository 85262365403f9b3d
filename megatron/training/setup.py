"""What stands before the first step: device, vocabulary, model, state."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from megatron.config import Config, ModelConfig, TokenizerConfig, TrainingConfig
from megatron.data.indexed_dataset import IndexedDataset
from megatron.errors import UserError
from megatron.instability.loss_ratio import PositionMatchedLossRatio
from megatron.model.gpt2 import GPT2Model
from megatron.model.initialisation import initialise
from megatron.optimizer.adamw import build_optimizer
from megatron.optimizer.loss_scale import LossScaler
from megatron.tokenizer.build import build_tokenizer
from megatron.training.state import TrainState

ModelProvider = Callable[[ModelConfig, int, bool], GPT2Model]
"""(model config, vocabulary size, recompute activations) -> model without values."""


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


def choose_device(training: TrainingConfig) -> torch.device:
    """The device that --device names; refuses a precision that it does not have, and several processes."""
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        raise UserError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}: this version trains in one process on one device; start it "
            "with python, not with torchrun or srun"
        )
    available = torch.cuda.is_available()
    if training.device == "cuda" and not available:
        raise UserError("--device cuda: no CUDA device is available; use --device cpu, or install torch for CUDA")
    device = torch.device("cuda" if available and training.device != "cpu" else "cpu")
    if training.fp16 and device.type == "cpu":
        raise UserError("--fp16 needs a GPU: use --bf16 or neither on the CPU")
    if training.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it, before its first use
        torch.use_deterministic_algorithms(True)
    return device


def seed_generators(seed: int) -> None:
    """Seed every global generator; only dropout draws from them."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def build_state(
    config: Config, vocab_size: int, device: torch.device, model_provider: ModelProvider, report: Callable[[str], None]
) -> TrainState:
    """A run before its first step."""
    training = config.training
    model = model_provider(config.model, vocab_size, training.recompute_granularity == "full")
    initialise(model, training.seed)
    model.to(device)
    compile_model(model, training, report)
    return TrainState(
        model=model,
        optimizer=build_optimizer(model, config.optimizer),
        scaler=LossScaler(training),
        matched_ratio=PositionMatchedLossRatio(config.model.seq_length),
    )


def compile_model(model: GPT2Model, training: TrainingConfig, report: Callable[[str], None]) -> None:
    """Compile each block and the loss, for any length, where --compile asks for it or a GPU makes it pay.

    All blocks share their code, so that this costs a few compilations a run, whatever the depth and the lengths.
    """
    on_gpu = model.device.type == "cuda"
    if training.compile == "off" or (training.compile == "auto" and not on_gpu):
        return
    if not on_gpu and shutil.which("g++") is None and shutil.which("clang++") is None:
        report("--compile on: no C++ compiler found (g++), which torch.compile needs on the CPU; running eagerly")
        return
    for block in model.blocks:
        block.compile(dynamic=True)
    model.loss = torch.compile(model.loss, dynamic=True)  # type: ignore[method-assign]
