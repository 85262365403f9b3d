"""Reading GPT-2 checkpoints of Megatron-LM, versions 1.1.5 and 2.x, as tensor parallel training wrote them.

A file `iter_NNNNNNN/mp_rank_RR/model_optim_rng.pt` (or `release/...`) holds one rank's share of every layer: columns
of the first projections and the vocabulary's rows are cut, rows of the second projections too, and the rest is alike
on all ranks. The rows of the fused projection are ordered by `checkpoint_version`: (q/k/v, head, dim) within a rank in
version 0, (head, dim, q/k/v) in 1.0, (head, q/k/v, dim) since 2.0, which is ours.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.checkpointing.weights import (
    NO_FLAGS,
    WORDS,
    Weights,
    load_pickled,
    named_vocabulary,
    pad_rows,
    parameter_shapes,
    require_floating,
    require_shape,
)
from megatron.config import ModelConfig, TokenizerConfig
from megatron.errors import UserError
from megatron.files import file_errors

TRACKER, FILE = "latest_checkpointed_iteration.txt", "model_optim_rng.pt"
_RANK = re.compile(r"mp_rank_(\d+)(_\d+)?")
_TRUNK = re.compile(r"(?:transformer|encoder)\.(?:layers\.(\d+)\.)?(.+)\.(weight|bias)")
_PARTS = {
    "input_layernorm": "attention_norm",
    "attention.query_key_value": "attention.qkv",
    "attention.dense": "attention.output",
    "post_attention_layernorm": "mlp_norm",
    "mlp.dense_h_to_4h": "mlp.up",
    "mlp.dense_4h_to_h": "mlp.down",
}
_EMBEDDINGS = {
    "embedding.word_embeddings.weight": WORDS,
    "embedding.position_embeddings.weight": "position_embeddings.weight",
}
_PLAIN: dict[str, Any] = {
    "apply_residual_connection_post_layernorm": False,
    "apply_layernorm_1p": False,
    "normalization": "LayerNorm",
    "position_embedding_type": "learned_absolute",
    "add_position_embedding": True,
    "use_rotary_position_embeddings": False,
    "squared_relu": False,
    "swiglu": False,
    "add_bias_linear": True,
    "group_query_attention": False,
    "untie_embeddings_and_output_weights": False,
    "num_experts": None,
    "window_size": None,
}
"""Arguments of later versions that change what is computed, each with its one value here, which is the default."""
_CUT_ROWS = (WORDS, "attention.qkv.weight", "attention.qkv.bias", "mlp.up.weight", "mlp.up.bias")
_CUT_COLUMNS = ("attention.output.weight", "mlp.down.weight")


class _Unread:
    """Stands where a file has an object of a class that is not wanted here, and holds nothing of it."""

    def __init__(self, *args: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


_STAND_INS = (
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray._reconstruct",
    "numpy.ndarray",
    "numpy.dtype",
    *(
        f"{module}.loss_scaler.{name}"
        for module in ("fp16", "megatron.fp16", "megatron.fp16_deprecated")
        for name in ("LossScaler", "DynamicLossScaler")
    ),
)
"""What these files name beside tensors and the arguments: random states, the loss scaler. None of it is made."""


def read_megatron(directory: Path, tokenizer: TokenizerConfig = NO_FLAGS) -> Weights:
    """The weights of a Megatron-LM checkpoint, merged over its tensor parallel ranks.

    No code in the files is run: torch's weights_only, that knows argparse.Namespace beside tensors while it reads.

    Args:
        directory: what Megatron-LM was given as --save, one iteration in it, or `release`.
        tokenizer: the flags that name the vocabulary, whose padding the file does not tell apart.

    Raises:
        UserError: where a file is missing, damaged or holds something else; for pipeline parallelism; where a tensor is
            missing, unexpected or of another shape than the checkpoint's arguments say; without a vocabulary.
    """
    vocabulary = named_vocabulary(tokenizer)
    if vocabulary is None:
        raise UserError("--from megatron needs the vocabulary: give --vocab-file and --merge-file, or --vocab-size")
    folder = _iteration(directory)
    paths = _rank_files(folder)
    ranks = [_read(path) for path in paths]
    config = _config(ranks[0], len(ranks), paths[0])
    version = ranks[0].get("checkpoint_version", 0)
    if type(version) not in (int, float) or not (version in (0, 1) or 2 <= version <= 3):
        raise UserError(f"{paths[0]}: checkpoint_version: expected 0, 1.0, 2.0 or 3.0, found {version!r}")
    shares = [_by_our_names(rank, path) for rank, path in zip(ranks, paths, strict=True)]
    for share, path in zip(shares, paths, strict=True):  # before a model of an absurd size is described
        for name in (WORDS, f"blocks.{config.num_layers - 1}.attention_norm.weight"):
            if name not in share:
                raise UserError(f"{path}: expected the weights of {name}, found none")
        require_shape(share[WORDS], (*share[WORDS].shape[:1], config.hidden_size), f"{path}: {WORDS}")
    tensors = {}
    for name, shape in parameter_shapes(config, vocabulary.size).items():
        for share, path in zip(shares, paths, strict=True):
            if name not in share:
                raise UserError(f"{path}: expected the weights of {name}, found none")
        where = f"{folder}: {name}"
        parts = [share.pop(name).float() for share in shares]
        if ".qkv." in name:
            parts = [_order_qkv(part, version, config, len(parts), where) for part in parts]
        merged = _merge(name, parts, where)
        if name == WORDS:
            if len(merged) < vocabulary.size:
                raise UserError(
                    f"{where}: expected at least the {vocabulary.size:,} rows of the vocabulary given, found "
                    f"{len(merged):,}; give the tokenizer that the model was trained with"
                )
            multiple = getattr(ranks[0].get("args"), "make_vocab_size_divisible_by", None)
            padding = (multiple if type(multiple) is int else 128) * len(ranks)
            if len(merged) - vocabulary.size >= padding:
                raise UserError(
                    f"{where}: expected fewer than {padding:,} rows of padding after the vocabulary's "
                    f"{vocabulary.size:,}, found {len(merged):,} in all; give the tokenizer that it was trained with"
                )
            merged = merged[: vocabulary.size]
        require_shape(merged, shape, where)
        tensors[name] = pad_rows(merged, config) if name == WORDS else merged.contiguous()
    for share, path in zip(shares, paths, strict=True):
        if share:
            raise UserError(f"{path}: expected the weights of a GPT-2, found {min(share)} too")
    return Weights(config, vocabulary, tensors, folder)


def _iteration(directory: Path) -> Path:
    """The directory of the iteration that the tracker names, or `directory` where it is one."""
    if any(directory.glob("mp_rank_*")):
        return directory
    tracker = directory / TRACKER
    if not tracker.is_file():
        raise UserError(f"--load {directory}: expected a Megatron-LM checkpoint with {TRACKER}, found none")
    with file_errors("read", tracker):
        word = tracker.read_text(errors="replace").strip()
    if word != "release" and not re.fullmatch(r"[0-9]{1,12}", word):
        raise UserError(f"{tracker}: expected an iteration or release, found {word[:40]!r}")
    return directory / (word if word == "release" else f"iter_{int(word):07d}")


def _rank_files(folder: Path) -> list[Path]:
    """The file of each tensor parallel rank, in their order."""
    matches = [match for path in sorted(folder.glob("mp_rank_*")) if (match := _RANK.fullmatch(path.name))]
    for match in matches:
        if match[2]:
            raise UserError(
                f"{folder / match[0]}: saved with pipeline parallelism, expected tensor parallelism alone: merge it "
                "with Megatron-LM's own tools first"
            )
    numbers = sorted(int(match[1]) for match in matches)
    if not numbers or numbers != list(range(len(numbers))):
        raise UserError(f"{folder}: expected the ranks mp_rank_00 and on, found {numbers or 'none'}")
    return [folder / match[0] / FILE for match in sorted(matches, key=lambda match: int(match[1]))]


def _read(path: Path) -> dict[str, Any]:
    """The content of one rank's file, in which no code is run."""
    known = [argparse.Namespace, *((_Unread, name) for name in _STAND_INS)]
    content = load_pickled(path, "tensors and arguments of a Megatron-LM checkpoint", known)
    model = content.get("model") if isinstance(content, dict) else None
    if not isinstance(model, dict) or not isinstance(model.get("language_model"), dict):
        raise UserError(f"{path}: expected a Megatron-LM checkpoint with the entry model.language_model, found none")
    return content


def _config(content: Mapping[str, Any], ranks: int, path: Path) -> ModelConfig:
    """The model's shape, from the arguments that Megatron-LM keeps beside the weights."""
    arguments = vars(content["args"]) if isinstance(content.get("args"), argparse.Namespace) else {}
    names = ("num_layers", "hidden_size", "num_attention_heads", "max_position_embeddings")
    for name in names:
        if type(arguments.get(name)) is not int:
            raise UserError(f"{path}: args.{name}: expected a whole number, found {arguments.get(name)!r}")
    layers, hidden, heads, positions = (arguments[name] for name in names)
    ffn = arguments.get("ffn_hidden_size") or 4 * hidden
    if ffn != 4 * hidden:
        raise UserError(f"{path}: args.ffn_hidden_size: expected 4 x hidden_size = {4 * hidden}, found {ffn!r}")
    for name, plain in _PLAIN.items():
        if (found := arguments.get(name, plain)) != plain:
            raise UserError(f"{path}: args.{name}: expected {plain!r}, found {found!r}: only plain GPT-2 can be read")
    epsilon = arguments.get("layernorm_epsilon", 1e-5)
    if type(epsilon) not in (int, float):
        raise UserError(f"{path}: args.layernorm_epsilon: expected a number, found {epsilon!r}")
    trained = arguments.get("seq_length")  # may be less than the positions
    length = trained if type(trained) is int and 0 < trained < positions else positions
    if arguments.get("bias_gelu_fusion", True) is False and not arguments.get("openai_gelu", False):
        raise UserError(
            f"{path}: args.bias_gelu_fusion: expected True, found False: that is the exact GELU, not its tanh form"
        )
    if heads % ranks:
        raise UserError(f"{path.parent.parent}: expected ranks that divide the {heads} attention heads, found {ranks}")
    try:
        return ModelConfig(
            num_layers=layers,
            hidden_size=hidden,
            num_attention_heads=heads,
            seq_length=length,
            max_position_embeddings=positions if positions > length else None,
            norm_epsilon=epsilon,
        )
    except UserError as error:
        raise UserError(f"{path}: args: {error}") from error


def _by_our_names(content: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    """One rank's tensors, by our names for them; what is unknown keeps its own."""
    tensors = {}
    for key, value in _flatten(content["model"]["language_model"]):
        if not isinstance(value, Tensor):
            raise UserError(f"{path}: {key}: expected a tensor, found {type(value).__name__}")
        require_floating(value, f"{path}: {key}")
        tensors[_our_name(key)] = value
    return tensors


def _our_name(key: str) -> str:
    """Our name for a tensor of the language model, or `key` where there is none."""
    match = _TRUNK.fullmatch(key)
    if match is None:
        return _EMBEDDINGS.get(key, key)
    layer, part, kind = match.groups()
    if layer is None:
        return f"final_norm.{kind}" if part == "final_layernorm" else key
    ours = _PARTS.get(part.replace("self_attention.", "attention."))
    return f"blocks.{int(layer)}.{ours}.{kind}" if ours else key


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """(dotted name, value) of nested tables."""
    found = []
    for key, value in tree.items():
        found += _flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [(f"{prefix}{key}", value)]
    return found


def _order_qkv(rows: Tensor, version: float, config: ModelConfig, ranks: int, where: str) -> Tensor:
    """A rank's rows of the fused projection, from the order of `version` to (head, q/k/v, dim)."""
    require_shape(rows, (3 * config.hidden_size // ranks, *rows.shape[1:]), f"{where} of each rank")
    if version >= 2:
        return rows
    heads = config.num_attention_heads // ranks
    if version == 0:
        ordered = rows.unflatten(0, (3, heads, -1)).transpose(0, 1)
    else:
        ordered = rows.unflatten(0, (heads, -1, 3)).transpose(1, 2)
    return ordered.flatten(0, 2)


def _merge(name: str, parts: list[Tensor], where: str) -> Tensor:
    """The whole tensor from the ranks' shares of it."""
    for rank, part in enumerate(parts):
        require_shape(part, tuple(parts[0].shape), f"{where} of rank {rank}")
    if name.endswith(_CUT_ROWS):
        return torch.cat(parts)
    if name.endswith(_CUT_COLUMNS):
        return torch.cat(parts, dim=-1)
    for rank, part in enumerate(parts):
        if not torch.equal(part, parts[0]):
            raise UserError(
                f"{where}: expected the same values on all ranks, those of rank {rank} differ from rank 0's"
            )
    return parts[0]
