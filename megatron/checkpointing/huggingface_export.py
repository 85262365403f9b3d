"""Writing a directory that transformers' from_pretrained takes."""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.checkpointing.commit import make_directory
from megatron.checkpointing.huggingface import (
    CONFIG,
    EXPECTED,
    GENERATION,
    MERGES,
    TOKENIZER,
    TOKENIZER_CONFIG,
    TRAINED_LENGTH,
    VOCAB,
    WEIGHTS,
    read_huggingface,
    to_huggingface,
)
from megatron.checkpointing.tensors import storage_errors, write_safetensors
from megatron.checkpointing.weights import Vocabulary, Weights, build_model, cast, require_free
from megatron.config import TokenizerConfig
from megatron.errors import UserError
from megatron.files import commit_directory, file_errors
from megatron.tokenizer.base import END_OF_TEXT

SAMPLE = 64
"""Tokens of the sample on which an export is compared."""
TOLERANCE = 1e-4
"""Difference of logits, relative to the largest of them, above which an export is not handed out."""


def export_huggingface(weights: Weights, output: Path, *, dtype: str | None = None) -> str:
    """Write `weights` as the directory `output`, that transformers' from_pretrained takes: whole or not at all.

    Before it gets its name it is read back, by our reader and, where it is installed, by transformers, and its logits
    are compared with those of `weights` on a sample.

    Args:
        dtype: one of DTYPES, for the weights; None: fp32. The logits compared are those of the rounded weights.

    Returns:
        What was written and the largest differences, for the user.

    Raises:
        UserError: where `output` is there already and not empty, cannot be written or cannot hold the values; or where
            the logits differ.
    """
    output = output.resolve()  # "." has no name to stand beside
    require_free(output)
    tensors = cast(weights.tensors, dtype)
    rounded = Weights(weights.config, weights.vocabulary, {n: t.float() for n, t in tensors.items()}, weights.source)
    temporary = output.with_name(f".{output.name}.tmp-{secrets.token_hex(4)}")
    try:
        with file_errors("write", output):
            make_directory(output.parent)
            temporary.mkdir()
            files = _write_tokenizer(weights, temporary)
            _write_json(temporary / CONFIG, _config_to(weights, dtype))
            _write_json(temporary / GENERATION, _special_ids(weights.vocabulary))
        with storage_errors("write", output):
            write_safetensors(temporary / WEIGHTS, to_huggingface(weights, tensors), {"format": "pt"})
        differences = _compare(rounded, temporary, output)
        commit_directory(temporary, output)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return (
        f"{output}: {len(tensors):,} tensors, {dtype or 'fp32'}, from {weights.source}; {files}\n"
        f"largest difference of logits: {differences}"
    )


def _config_to(weights: Weights, dtype: str | None) -> dict[str, Any]:
    """The content of config.json."""
    config = weights.config
    return {
        "architectures": ["GPT2LMHeadModel"],
        **EXPECTED,
        "vocab_size": weights.vocabulary.size,
        "n_positions": config.positions,
        TRAINED_LENGTH: config.seq_length,
        "n_embd": config.hidden_size,
        "n_layer": config.num_layers,
        "n_head": config.num_attention_heads,
        "n_inner": None,
        "resid_pdrop": config.hidden_dropout,
        "embd_pdrop": config.hidden_dropout,
        "attn_pdrop": config.attention_dropout,
        "layer_norm_epsilon": config.norm_epsilon,
        "initializer_range": config.init_method_std,
        **_special_ids(weights.vocabulary),
        "torch_dtype": {"bf16": "bfloat16", "fp16": "float16"}.get(dtype or "", "float32"),
    }


def _special_ids(vocabulary: Vocabulary) -> dict[str, int | None]:
    """The one special token of GPT-2, in both its parts; null where it is not known."""
    return {"bos_token_id": vocabulary.eod, "eos_token_id": vocabulary.eod}


def _write_tokenizer(weights: Weights, directory: Path) -> str:
    """Copy the tokenizer's files, if they are known; what was done, in words."""
    files = weights.vocabulary.files
    copies = {VOCAB: files.vocab_file, MERGES: files.merge_file, TOKENIZER: files.tokenizer_file}
    given = {name: path for name, path in copies.items() if path is not None}
    if not given:
        return "no tokenizer: none is known, give its files to have them there"
    for name, path in given.items():
        shutil.copyfile(path, directory / name)
    end = END_OF_TEXT if files.eod_token is None else files.eod_token
    tokens = dict.fromkeys(("bos_token", "eos_token", "unk_token"), end)
    kind = "PreTrainedTokenizerFast" if TOKENIZER in given else "GPT2Tokenizer"
    _write_json(
        directory / TOKENIZER_CONFIG,
        {"tokenizer_class": kind, "add_prefix_space": False, "model_max_length": weights.config.seq_length, **tokens},
    )
    return f"tokenizer: {', '.join(given)}"


def _compare(weights: Weights, directory: Path, output: Path) -> str:
    """The largest differences of logits on a sample, in words. Raises UserError where one is beyond rounding."""
    size = weights.vocabulary.size
    length = min(SAMPLE, weights.config.positions)
    tokens = torch.randint(size, (1, length), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = _logits(weights, tokens)
        sized_only = TokenizerConfig(vocab_size=size)
        found = {"by our reader": _logits(read_huggingface(directory, sized_only), tokens)}
        theirs = _transformers_logits(directory, tokens)
    if theirs is not None:
        found["by transformers"] = theirs
    limit = TOLERANCE * max(1.0, float(expected.abs().max()))
    words = []
    for reader, logits in found.items():
        difference = float((logits - expected).abs().max())
        if not difference <= limit:
            raise UserError(
                f"--save {output}: its logits differ by {difference:.3g} ({reader}), expected at most {limit:.3g}: "
                "nothing was written; the weights may hold values that are not finite"
            )
        words.append(f"{difference:.3g} ({reader})")
    if theirs is None:
        words.append("transformers is not installed, so it was not asked")
    return ", ".join(words) + f"; {length} tokens, largest logit {float(expected.abs().max()):.3g}"


def _logits(weights: Weights, tokens: Tensor) -> Tensor:
    """[sequences, seqlen] -> [sequences * seqlen, vocabulary], in fp32."""
    model = build_model(weights)
    return model.logits(model(tokens))[:, : weights.vocabulary.size]


def _transformers_logits(directory: Path, tokens: Tensor) -> Tensor | None:
    """What transformers computes from `directory`, in fp32; None where it is not installed."""
    try:
        from transformers import GPT2LMHeadModel  # noqa: PLC0415 # an extra, and slow to import
        from transformers.utils.logging import disable_progress_bar  # noqa: PLC0415
    except ImportError:
        return None
    disable_progress_bar()
    model = GPT2LMHeadModel.from_pretrained(directory, local_files_only=True)  # nosec B615 # nothing is fetched
    logits: Tensor = model.float().eval()(tokens).logits
    return logits.flatten(0, 1)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
