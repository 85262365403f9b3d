"""A model to use, from a run of ours or from a Hugging Face directory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from megatron.checkpointing.huggingface import is_huggingface, read_huggingface
from megatron.checkpointing.weights import ASK, DTYPES, NO_FLAGS, Before, build_model, read_run
from megatron.config import ModelConfig, TokenizerConfig
from megatron.errors import UserError
from megatron.model.cpu import keep_freed_memory
from megatron.model.gpt2 import GPT2Model
from megatron.tokenizer.base import Tokenizer


@dataclass(frozen=True)
class Loaded:
    """A model that is ready to be asked."""

    model: GPT2Model
    """In evaluation mode, on its device."""
    tokenizer: Tokenizer | None
    """None where no files of it are known; `require_tokenizer` then says what to give."""
    config: ModelConfig
    vocab_size: int
    """Before padding."""
    source: Path
    """The checkpoint or the directory that was read."""

    def require_tokenizer(self) -> Tokenizer:
        """The tokenizer. Raises UserError where there is none."""
        return require_tokenizer(self.tokenizer, self.source)


def require_tokenizer(tokenizer: Tokenizer | None, source: Path) -> Tokenizer:
    """The tokenizer of the model `source`. Raises UserError where there is none."""
    if tokenizer is None:
        raise UserError(f"{source} names no files of its tokenizer: {ASK}")
    return tokenizer


def load_model(
    path: Path,
    *,
    tokenizer: TokenizerConfig = NO_FLAGS,
    device: str = "auto",
    dtype: str = "fp32",
    before: Before = lambda *_: None,
) -> Loaded:
    """Read a model for evaluation.

    Args:
        path: a run, a directory of checkpoints (the newest is taken), one checkpoint, saved in any layout, or a
            Hugging Face GPT-2 directory (config.json beside *.safetensors).
        tokenizer: its flags; where they name none, what the run, its data or the Hugging Face directory says.
        device: auto, cpu or cuda; auto is CUDA where there is one.
        dtype: fp32, bf16 or fp16, of the weights and of what is computed with them.
        before: called before the weights are read, which may take minutes.

    Raises:
        UserError: naming the flag or file: no whole model there, not a GPT-2, no such device, a tokenizer that is
            missing, broken, changed or of another size than the model's vocabulary.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device must be auto, cpu or cuda, not {device!r}")
    if dtype not in DTYPES:
        raise UserError(f"--dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no CUDA device is available; use --device cpu, or install torch for CUDA")
    weights = (read_huggingface if is_huggingface(path) else read_run)(path, tokenizer, before)
    place = torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")
    if place.type == "cpu":
        keep_freed_memory()
    vocabulary = weights.vocabulary
    model = build_model(weights, DTYPES[dtype]).to(place)
    return Loaded(model, vocabulary.tokenizer, weights.config, vocabulary.size, weights.source)
