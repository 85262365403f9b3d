"""Reading Hugging Face's GPT-2 directories, and the layout of what stands there, both ways.

The two models are the same function of the same numbers. Only names and layouts differ: Hugging Face keeps a linear
layer as [in, out] (its Conv1D), and the columns of the fused projection as (q/k/v, head, dim), ours are rows of
(head, q/k/v, dim); its vocabulary has no padding.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron.checkpointing.tensors import storage_errors
from megatron.checkpointing.weights import (
    NO_FLAGS,
    WORDS,
    Before,
    Vocabulary,
    Weights,
    flags_over,
    load_pickled,
    named_vocabulary,
    pad_rows,
    parameter_shapes,
    require_floating,
    require_same_tokens,
    require_shape,
    require_size,
    sized,
    warn_unchecked,
)
from megatron.config import ModelConfig, TokenizerConfig
from megatron.errors import UserError
from megatron.files import file_errors
from megatron.tokenizer.build import names_files, tokens_of
from megatron.tokenizer.gpt2_bpe import GPT2BPETokenizer
from megatron.tokenizer.huggingface import HFTokenizer

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
PICKLED = "pytorch_model.bin"
VOCAB, MERGES, TOKENIZER, TOKENIZER_CONFIG = "vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json"
GENERATION, SPECIAL_TOKENS = "generation_config.json", "special_tokens_map.json"
TRAINED_LENGTH = "n_ctx"
"""Key of config.json for our --seq-length, which may be less than n_positions. In OpenAI's own files the two are
the same; transformers keeps it and computes nothing with it."""
_TOP = {WORDS: "wte.weight", "position_embeddings.weight": "wpe.weight"}
_PARTS = {
    "attention_norm": "ln_1",
    "attention.qkv": "attn.c_attn",
    "attention.output": "attn.c_proj",
    "mlp_norm": "ln_2",
    "mlp.up": "mlp.c_fc",
    "mlp.down": "mlp.c_proj",
}
EXPECTED: dict[str, Any] = {
    "model_type": "gpt2",
    "activation_function": "gelu_new",
    "tie_word_embeddings": True,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "add_cross_attention": False,
}
"""Keys of config.json that change what is computed, and their one value here; but for the first it is the default."""
_MASKS = (".attn.bias", ".attn.masked_bias")
_IGNORED = (*_MASKS, "lm_head.weight")
"""Endings of the names of what some files hold beside the weights: causal masks, and the tied embedding once more."""


def is_huggingface(path: Path) -> bool:
    """Whether `path` looks like a Hugging Face directory."""
    return (path / CONFIG).is_file()


def read_huggingface(
    directory: Path, tokenizer: TokenizerConfig = NO_FLAGS, before: Before = lambda *_: None
) -> Weights:
    """The weights in a Hugging Face GPT-2 directory: safetensors, in one file or several, or pytorch_model.bin.

    Of a pickle only tensors are read (torch's weights_only), and no code in it is run. Where `tokenizer` names none,
    the directory's is taken, if it has one. `before` is called before the weights are read.

    Raises:
        UserError: where config.json is not a GPT-2's, a file is missing or damaged, a tensor is missing, unexpected or
            of another shape, or the tokenizer has another size than the model's vocabulary.
    """
    if not directory.is_dir():
        raise UserError(
            f"--load {directory}: no such directory, and nothing is downloaded here: fetch a model first, as by "
            "hf download openai-community/gpt2 --local-dir gpt2"
        )
    path = directory / CONFIG
    settings = read_json(path)
    config, vocab_size = _config_from(settings, path)
    vocabulary = _vocabulary(directory, tokenizer, vocab_size)
    before(config, vocabulary)
    found = {name.removeprefix("transformer."): tensor for name, tensor in _read_tensors(directory).items()}
    words, last = (
        _present(found, name, directory) for name in ("wte.weight", f"h.{config.num_layers - 1}.ln_1.weight")
    )
    # Before a model of an absurd size is described.
    require_shape(words, (vocab_size, config.hidden_size), f"{directory}: wte.weight")
    require_shape(last, (config.hidden_size,), f"{directory}: h.{config.num_layers - 1}.ln_1.weight")
    head = found.get("lm_head.weight")
    if head is not None and not _same_values(head, words):
        raise UserError(
            f"{directory}: lm_head.weight is not wte.weight: expected a GPT-2 whose output embedding is tied"
        )
    found = {name: tensor for name, tensor in found.items() if not name.endswith(_IGNORED)}
    tensors = {}
    shapes = parameter_shapes(config, vocab_size)
    for name, theirs in huggingface_names(config).items():
        tensor = _present(found, theirs, directory)
        del found[theirs]
        require_shape(tensor, shapes[name][::-1] if is_linear(name) else shapes[name], f"{directory}: {theirs}")
        tensors[name] = _swap_layout(name, tensor.float(), config, from_theirs=True)
    if found:
        raise UserError(f"{directory}: expected the tensors of a GPT-2, found {min(found)} too")
    tensors[WORDS] = pad_rows(tensors[WORDS], config)
    return Weights(config, vocabulary, tensors, directory)


def _present(tensors: Mapping[str, Tensor], name: str, directory: Path) -> Tensor:
    if name not in tensors:
        raise UserError(f"{directory}: expected the tensor transformer.{name}, found none")
    return tensors[name]


def _same_values(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors hold the same; what is no number equals itself, and is left for those who compute with it."""
    same_shape = left.shape == right.shape
    return same_shape and torch.allclose(left.float(), right.float(), rtol=0, atol=0, equal_nan=True)


def huggingface_names(config: ModelConfig) -> dict[str, str]:
    """Our name of each parameter -> Hugging Face's, without the "transformer." before it."""
    names = dict(_TOP)
    for layer in range(config.num_layers):
        for ours, theirs in _PARTS.items():
            names |= {f"blocks.{layer}.{ours}.{kind}": f"h.{layer}.{theirs}.{kind}" for kind in ("weight", "bias")}
    return names | {f"final_norm.{kind}": f"ln_f.{kind}" for kind in ("weight", "bias")}


def to_huggingface(weights: Weights, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`tensors`, the weights in any type, by Hugging Face's names and in its layout, the vocabulary without padding."""
    named = {}
    for name, theirs in huggingface_names(weights.config).items():
        values = _swap_layout(name, tensors[name], weights.config, from_theirs=False)
        named[f"transformer.{theirs}"] = values[: weights.vocabulary.size] if theirs == "wte.weight" else values
    return named


def is_linear(name: str) -> bool:
    """Whether a parameter of ours is the matrix of a linear layer, [out, in]; Hugging Face keeps it as [in, out]."""
    return name.endswith(("qkv.weight", "output.weight", "up.weight", "down.weight"))


def _swap_layout(name: str, tensor: Tensor, config: ModelConfig, *, from_theirs: bool) -> Tensor:
    """One tensor from Hugging Face's layout to ours, or back."""
    if is_linear(name) and from_theirs:
        tensor = tensor.t()
    if ".qkv." in name:
        heads = config.num_attention_heads
        order = (3, heads) if from_theirs else (heads, 3)
        tensor = tensor.unflatten(0, (*order, -1)).transpose(0, 1).flatten(0, 2)
    return (tensor.t() if is_linear(name) and not from_theirs else tensor).contiguous()


def _config_from(settings: Mapping[str, Any], path: Path) -> tuple[ModelConfig, int]:
    """Model and size of the vocabulary from the content of config.json. Raises UserError that names the key."""

    def size(key: str) -> int:
        value = settings.get(key)
        if type(value) is not int or value < 1:
            raise UserError(f"{path}: {key}: expected a positive whole number, found {value!r}")
        return value

    def number(key: str, default: float) -> float:
        value = settings.get(key, default)
        if type(value) not in (int, float):
            raise UserError(f"{path}: {key}: expected a number, found {value!r}")
        return float(value)

    for key, expected in EXPECTED.items():
        found = settings.get(key, None if key == "model_type" else expected)
        if found != expected:
            raise UserError(f"{path}: {key}: expected {expected!r}, found {found!r}: only plain GPT-2 can be read")
    hidden = size("n_embd")
    if settings.get("n_inner") not in (None, 4 * hidden):
        raise UserError(f"{path}: n_inner: expected null or 4 x n_embd = {4 * hidden}, found {settings['n_inner']!r}")
    layers, heads, positions, vocab_size = (size(key) for key in ("n_layer", "n_head", "n_positions", "vocab_size"))
    length = min(size(TRAINED_LENGTH), positions) if settings.get(TRAINED_LENGTH) is not None else positions
    dropouts = number("resid_pdrop", 0.1), number("attn_pdrop", 0.1)
    std, epsilon = number("initializer_range", 0.02), number("layer_norm_epsilon", 1e-5)
    try:
        config = ModelConfig(
            num_layers=layers,
            hidden_size=hidden,
            num_attention_heads=heads,
            seq_length=length,
            max_position_embeddings=positions if positions > length else None,
            hidden_dropout=dropouts[0],
            attention_dropout=dropouts[1],
            init_method_std=std,
            norm_epsilon=epsilon,
        )
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return config, vocab_size


def _vocabulary(directory: Path, flags: TokenizerConfig, vocab_size: int) -> Vocabulary:
    """The tokenizer that the flags name, else the directory's, else the size alone.

    What ends a text is said by the flags, else by the directory, whose files the tokenizer may be or not.
    """
    vocab, merges, whole = (directory / name for name in (VOCAB, MERGES, TOKENIZER))
    own = NO_FLAGS
    if vocab.is_file() and merges.is_file():
        own = TokenizerConfig(GPT2BPETokenizer.name, vocab_file=str(vocab), merge_file=str(merges))  # type: ignore[arg-type]
    elif whole.is_file():
        own = TokenizerConfig(HFTokenizer.name, tokenizer_file=str(whole))  # type: ignore[arg-type]
    given, flags = flags, flags_over(flags, own)
    if names_files(flags) and flags.eod_token is None:
        flags = replace(flags, eod_token=_end_of_text(directory, flags))
    vocabulary = named_vocabulary(flags) or sized(vocab_size)
    require_size(vocabulary, vocab_size, f"{directory / CONFIG} (vocab_size)")
    if names_files(given) and names_files(own):
        try:
            tokens_of(own)
        except UserError as error:
            warn_unchecked(given, f"the model's own cannot be read ({error})")
        else:
            require_same_tokens(given, own, str(directory))
    return vocabulary


def _end_of_text(directory: Path, flags: TokenizerConfig) -> str | None:
    """The token that ends a text: by its name in the tokenizer's settings, else by its id in the model's.

    None where neither says it. An id that the files of `flags` do not have says nothing: transformers writes GPT-2's
    50256 for any model whose maker gave none. Raises UserError for several ids.
    """
    for path in (directory / TOKENIZER_CONFIG, directory / SPECIAL_TOKENS):
        token = read_json(path).get("eos_token") if path.is_file() else None
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            return token
    for path in (directory / GENERATION, directory / CONFIG):
        ids = read_json(path).get("eos_token_id") if path.is_file() else None
        ids = ids if isinstance(ids, list) else [ids]
        if len(ids) > 1:
            raise UserError(f"{path}: eos_token_id: expected one token, found {ids}: name one with --eod-token")
        if ids and type(ids[0]) is int and ids[0] >= 0 and (token := tokens_of(flags).get(ids[0])) is not None:
            return token
    return None


def _read_tensors(directory: Path) -> dict[str, Tensor]:
    """Every tensor of the directory's files. Raises UserError where one is missing or damaged."""
    if (directory / INDEX).is_file():
        table = read_json(directory / INDEX).get("weight_map")
        if not isinstance(table, dict) or not all(isinstance(name, str) for name in table.values()):
            raise UserError(f"{directory / INDEX}: weight_map: expected an object of tensors and files")
        files = sorted(set(table.values()))
        for name in files:
            if Path(name).name != name:
                raise UserError(
                    f"{directory / INDEX}: {name!r} is not a plain file name: it may not leave the directory"
                )
        tensors: dict[str, Tensor] = {}
        for name in files:
            tensors |= _read_file(directory / name)
        if missing := sorted(table.keys() - tensors.keys()):
            raise UserError(f"{directory / table[missing[0]]}: expected the tensor {missing[0]}, found none")
        return tensors
    for name in (WEIGHTS, PICKLED):
        if (directory / name).is_file():
            return _read_file(directory / name)
    raise UserError(f"{directory}: expected {WEIGHTS}, {INDEX} or {PICKLED}, found none of them")


def _read_file(path: Path) -> dict[str, Tensor]:
    """The tensors of one file, on the CPU. Raises UserError for weights that are not floating point."""
    if path.name.endswith(".safetensors"):
        with storage_errors("read", path):
            loaded = load_file(path)
    else:
        loaded = load_pickled(path, "tensors and nothing else")
        if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
            raise UserError(f"{path}: expected a table of tensors")
    for name, tensor in loaded.items():
        if not name.endswith(_MASKS):
            require_floating(tensor, f"{path}: {name}")
    return loaded


def read_json(path: Path) -> dict[str, Any]:
    with file_errors("read", path):
        content = path.read_bytes()
    try:
        parsed = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not valid JSON ({error})") from None
    if not isinstance(parsed, dict):
        raise UserError(f"{path}: expected a JSON object")
    return parsed
