"""A model's weights without a training around them: out of a run's checkpoint, and back into one.

Hugging Face's directories and Megatron-LM's checkpoints are read into the same `Weights`.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import megatron
from megatron.arguments import read_config, yaml_value
from megatron.checkpointing.checkpoint import CONFIG, Checkpoint, find_whole, load_checkpoint, save_checkpoint
from megatron.checkpointing.commit import CHECKPOINTS, checkpoints_in
from megatron.checkpointing.tensors import read_tensors
from megatron.config import DataConfig, ModelConfig, TokenizerConfig
from megatron.data.vocabulary import noted_vocabulary, prefixes_of, require_same_end
from megatron.errors import CommandLineError, UserError
from megatron.files import explain
from megatron.model.flops import parameter_count
from megatron.model.gpt2 import GPT2Model
from megatron.tokenizer.base import Tokenizer
from megatron.tokenizer.build import first_difference, named_tokenizer, names_files

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PREFIX = "model."
"""Of the weights' names in a checkpoint."""
WORDS = "word_embeddings.weight"
NO_FLAGS = TokenizerConfig()
"""Tokenizer flags of which none is given."""
_FINGERPRINT = re.compile(r"[0-9a-f]{64}")
ASK = "give --vocab-file and --merge-file, or --tokenizer-file"


@dataclass(frozen=True)
class Vocabulary:
    """The ids of a model's tokens and, where its files are at hand, the tokenizer."""

    size: int
    """Before padding."""
    eod: int | None
    """The id that ends a document, where it is known."""
    fingerprint: str
    """What a run remembers of its tokenizer."""
    tokenizer: Tokenizer | None = None
    files: TokenizerConfig = NO_FLAGS
    """The flags that name it."""


Before = Callable[[ModelConfig, Vocabulary], object]
"""What is done between reading what a model is and reading its weights; it may raise UserError."""


@dataclass(frozen=True)
class Weights:
    """All that makes up a model: shape, vocabulary, values."""

    config: ModelConfig
    vocabulary: Vocabulary
    tensors: dict[str, Tensor]
    """By the names of GPT2Model's parameters, fp32, on the CPU; padded rows of the vocabulary are zero."""
    source: Path


def read_run(path: Path, tokenizer: TokenizerConfig = NO_FLAGS, before: Before = lambda *_: None) -> Weights:
    """The weights of a checkpoint of ours, saved in any layout.

    Args:
        path: a run, a directory of checkpoints (the newest is taken) or one checkpoint.
        tokenizer: flags that go before those of the run, as `flags_over` has it.
        before: called before the large files are read, to find there what would make that vain.

    Raises:
        UserError: where there is no whole checkpoint, or the tokenizer is missing, changed or not the model's, or ends
            documents with another token than the run's data.
    """
    checkpoint = find_weights(path, tensors=False)
    config = read_config(checkpoint.path / CONFIG, "model", "tokenizer", "data")
    noted = checkpoint.state.get("settings", {}).get("tokenizer")
    flags = flags_over(tokenizer, config.tokenizer)
    given = named_vocabulary(flags) if names_vocabulary(tokenizer) else None
    vocabulary = given or _vocabulary_of(flags, config.data, checkpoint.path, noted)
    before(config.model, vocabulary)
    load_checkpoint(checkpoint.path)
    tensors = read_named(checkpoint.path)
    shapes = parameter_shapes(config.model, vocabulary.size)
    if missing := sorted(shapes.keys() - tensors.keys()):
        raise UserError(f"{checkpoint.path}: expected the weights of a GPT-2, found none of {missing[0]}")
    if vocabulary.fingerprint != noted:
        require_size(vocabulary, _used_rows(tensors[WORDS]), f"{checkpoint.path}")
    if given is not None and given.tokenizer is not None and noted is not None and _FINGERPRINT.fullmatch(noted):
        _require_same_tokenizer(given, config.tokenizer, checkpoint.path, noted)
    if vocabulary.tokenizer is not None:
        require_same_end(vocabulary.tokenizer.eod, prefixes_of(config.data))
    shapes[WORDS] = (config.model.padded_vocab_size(vocabulary.size), config.model.hidden_size)
    for name, shape in shapes.items():
        require_floating(tensors[name], f"{checkpoint.path}: {name}")
        require_shape(tensors[name], shape, f"{checkpoint.path}: {name}")
    return Weights(config.model, vocabulary, tensors, checkpoint.path)


def find_weights(path: Path, *, tensors: bool = True) -> Checkpoint:
    """The newest checkpoint of a run or a directory, or the one that `path` is. Raises UserError if there is none.

    `tensors`: whether they are checked too.
    """
    checkpoint = find_whole(checkpoints_in(path), fallback=False, tensors=tensors)
    if checkpoint is None:
        raise UserError(f"--load {path}: no whole checkpoint found there; give a run, its checkpoints or one of them")
    return checkpoint


def read_named(checkpoint: Path) -> dict[str, Tensor]:
    """The weights in the checkpoint's shards, by the model's names for them. Raises UserError for unreadable shards."""
    return {name.removeprefix(PREFIX): tensor for name, tensor in read_tensors(checkpoint, PREFIX).items()}


def names_vocabulary(flags: TokenizerConfig) -> bool:
    """Whether `flags` name a vocabulary: a tokenizer's files, or a size. An end of text alone is none."""
    return names_files(flags) or flags.vocab_size is not None


def flags_over(given: TokenizerConfig, own: TokenizerConfig) -> TokenizerConfig:
    """The flags `given` before a model's `own`, as one: files or a size replace all but the end of text, which is the
    one given, else the model's; given alone, it goes with the model's files.
    """
    base = given if names_vocabulary(given) else own
    keeps = given.eod_token is None and names_files(base)
    return replace(base, eod_token=own.eod_token if keeps else given.eod_token)


def named_vocabulary(flags: TokenizerConfig) -> Vocabulary | None:
    """The vocabulary that tokenizer flags name; None where they name none.

    Raises:
        UserError: for a file that is missing or no tokenizer, for --vocab-size beside files, and for an --eod-token
            without them.
    """
    tokenizer = named_tokenizer(flags)
    if tokenizer is not None:
        files = replace(flags, tokenizer_type=tokenizer.name)  # type: ignore[arg-type] # a name is one of its values
        return Vocabulary(tokenizer.vocab_size, tokenizer.eod, tokenizer.fingerprint, tokenizer, files)
    if flags.vocab_size is not None:
        return sized(flags.vocab_size)
    return None


def sized(vocab_size: int) -> Vocabulary:
    """A vocabulary of which only the size is known."""
    return Vocabulary(vocab_size, None, f"vocabulary of {vocab_size}", files=TokenizerConfig(vocab_size=vocab_size))


def build_model(weights: Weights, dtype: torch.dtype = torch.float32) -> GPT2Model:
    """The model, on the CPU, in evaluation mode. In fp32 it shares the memory of `weights`."""
    with torch.device("meta"):
        model = GPT2Model(weights.config, weights.vocabulary.size)
    model.load_state_dict({name: tensor.to(dtype) for name, tensor in weights.tensors.items()}, assign=True)
    return model.eval()


def parameter_shapes(config: ModelConfig, vocab_size: int) -> dict[str, tuple[int, ...]]:
    """Name -> shape of each parameter of the model, but for the word embedding without the vocabulary's padding."""
    with torch.device("meta"):
        shapes = {name: tuple(part.shape) for name, part in GPT2Model(config, vocab_size).named_parameters()}
    return shapes | {WORDS: (vocab_size, config.hidden_size)}


def require_shape(tensor: Tensor, expected: tuple[int, ...], where: str) -> None:
    """Raise UserError unless the tensor, named by `where`, has the shape that the model's settings lead to."""
    if tuple(tensor.shape) != expected:
        raise UserError(
            f"{where}: expected the shape {list(expected)} that its settings lead to, found {list(tensor.shape)}"
        )


def require_floating(tensor: Tensor, where: str) -> None:
    """Raise UserError unless the tensor, named by `where`, holds floating point numbers, as weights do."""
    if not tensor.is_floating_point():
        found = str(tensor.dtype).removeprefix("torch.")
        raise UserError(f"{where}: expected floating point values, found {found}: convert the weights to fp32 or bf16")


def pad_rows(embedding: Tensor, config: ModelConfig) -> Tensor:
    """[vocabulary, hidden] -> [padded vocabulary, hidden], with rows of zeros."""
    missing = config.padded_vocab_size(len(embedding)) - len(embedding)
    return torch.cat([embedding, embedding.new_zeros(missing, embedding.shape[1])])


def save_weights(weights: Weights, home: Path) -> Path:
    """Write `weights` as the checkpoint of step 0 in `home`, from which a run may start with --finetune; its path.

    Raises:
        UserError: where `home` is there already and not empty, or cannot be written.
    """
    require_free(home)
    model, vocabulary = weights.config, weights.vocabulary
    settings = {
        "num_attention_heads": model.num_attention_heads,
        "norm_epsilon": model.norm_epsilon,
        "tokenizer": vocabulary.fingerprint,
    }
    state = {"settings": settings, "versions": {"megatron": megatron.__version__, "torch": torch.__version__}}
    return save_checkpoint(
        home / CHECKPOINTS,
        iteration=0,
        tensors={PREFIX + name: tensor for name, tensor in weights.tensors.items()},
        state=state,
        config_text=_recipe(model, vocabulary.files),
    )


def _recipe(model: ModelConfig, files: TokenizerConfig) -> str:
    """The model's flags and its tokenizer's for --config, whose files are then found from anywhere.

    There is no goal, batch or learning rate among them: they are of the run that goes on from the weights.
    """
    names = ("vocab_file", "merge_file", "tokenizer_file")
    paths: dict[str, Any] = {
        name: str(Path(path).absolute()) for name in names if (path := getattr(files, name)) is not None
    }
    lines = ["# The model of a checkpoint without a training; --config takes it."]
    for section in (model, replace(files, **paths)):
        values = {f.name: yaml_value(getattr(section, f.name)) for f in fields(section)}
        lines += [f"{name.replace('_', '-')}: {text}" for name, text in values.items() if text is not None]
    return "\n".join(lines) + "\n"


def load_pickled(path: Path, what: str, known: Sequence[Any] = ()) -> Any:
    """The content of a file of torch.save, on the CPU. No code in it is run: it may hold tensors and plain values.

    Args:
        what: what is expected there, for the message.
        known: what else it may name while it is read, as torch.serialization.safe_globals takes it.

    Raises:
        UserError: where the file is missing, damaged, or names anything else.
    """
    try:
        with open(path, "rb") as stream, torch.serialization.safe_globals(list(known)):
            return torch.load(stream, map_location="cpu", weights_only=True)
    except OSError as error:
        raise explain(error, "read", path) from error
    except Exception as error:  # damaged bytes can lead the unpickler into any
        named = re.search(r"GLOBAL (\S+)", str(error))
        found = f"{named[1]}, which could run code" if named else "damaged bytes or another kind of file"
        raise UserError(f"{path}: expected {what}, found {found}") from error


def describe(weights: Weights) -> str:
    """What `weights` are, in one line."""
    config, values = weights.config, parameter_count(weights.config, weights.vocabulary.size)
    positions = "" if config.positions == config.seq_length else f" of {config.positions} positions"
    return (
        f"{config.num_layers} layers, hidden {config.hidden_size}, {config.num_attention_heads} heads, "
        f"length {config.seq_length}{positions}, vocabulary {weights.vocabulary.size:,}, {values:,} parameters, "
        f"from {weights.source}"
    )


def cast(tensors: Mapping[str, Tensor], dtype: str | None) -> dict[str, Tensor]:
    """What is floating point in `tensors`, in another type: one of DTYPES, or None for its own.

    Raises:
        UserError: where the type cannot hold a value.
    """
    converted = dict(tensors)
    for name, tensor in tensors.items():
        if dtype is not None and tensor.is_floating_point():
            converted[name] = tensor.to(DTYPES[dtype])
            if not torch.equal(converted[name].isfinite(), tensor.isfinite()):
                raise UserError(f"--dtype {dtype} cannot hold the values of {name}: use bf16 or fp32")
    return converted


def require_free(output: Path) -> None:
    """Raise UserError where something stands under the name `output` already, other than an empty directory."""
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise UserError(f"--save {output} exists: choose another name, or move it away")


def require_apart(flag: str, output: Path | None, inputs: Mapping[str, Path | None]) -> None:
    """Raise CommandLineError where the `output` of `flag` is one of the files that other flags name to be read."""
    for other, path in inputs.items():
        if output is not None and path is not None and output.exists() and path.exists() and output.samefile(path):
            raise CommandLineError(f"{flag} {output} would be written over {other} {path}: name another file")


def require_size(vocabulary: Vocabulary, size: int, where: str) -> None:
    """Raise UserError unless `vocabulary` has the `size` that a model, named by `where`, has."""
    if vocabulary.size != size:
        raise UserError(
            f"{_flags(vocabulary.files)}: expected the {size:,} tokens of {where}, found {vocabulary.size:,}: give the "
            "tokenizer that the model was trained with"
        )


def _vocabulary_of(flags: TokenizerConfig, data: DataConfig, path: Path, noted: str | None) -> Vocabulary:
    """What the run's tokenizer flags, else what preprocessing noted beside its data, say of the vocabulary."""
    try:
        vocabulary = named_vocabulary(flags)
    except UserError as error:
        raise UserError(f"{path / CONFIG}: {error}; {ASK} as they are now, or --vocab-size alone") from error
    if vocabulary is not None:
        _require_trained_with(vocabulary, path, noted)
        return vocabulary
    of_data = noted_vocabulary(data)
    if of_data is not None:
        return replace(sized(of_data.size), eod=of_data.eod, fingerprint=of_data.fingerprint)
    raise UserError(
        f"{path / CONFIG} names no tokenizer, and no data that says which one made it: {ASK}, or --vocab-size"
    )


def _require_trained_with(vocabulary: Vocabulary, path: Path, noted: str | None) -> None:
    """Refuse another tokenizer's files than those whose fingerprint the checkpoint notes, be its size the same."""
    if noted is not None and vocabulary.fingerprint != noted:
        raise UserError(
            f"{_flags(vocabulary.files)}: expected the tokenizer with the fingerprint {noted[:16]} that {path} was "
            f"trained with, found {vocabulary.fingerprint[:16]}; {ASK} that it was trained with"
        )


def _require_same_tokenizer(given: Vocabulary, own: TokenizerConfig, path: Path, noted: str) -> None:
    """Refuse files whose tokens are not those of the tokenizer, with the fingerprint `noted`, of the checkpoint `path`.

    Files of another kind have another fingerprint, be they the same tokenizer: their tokens are compared with those of
    the run's `own`, as far as these are there.
    """
    if given.fingerprint == noted:
        return
    try:
        trained = named_vocabulary(own)
    except UserError:
        trained = None
    if given.files.tokenizer_type == (own if trained is None else trained.files).tokenizer_type:
        _require_trained_with(given, path, noted)
    if trained is not None and trained.fingerprint == noted:
        require_same_tokens(given.files, own, str(path))
    else:
        warn_unchecked(given.files, f"the one that {path} was trained with is of another kind or not at hand")


def require_same_tokens(given: TokenizerConfig, own: TokenizerConfig, where: str) -> None:
    """Raise UserError where the files `given` have another token for an id than the `own` ones of the model `where`."""
    if difference := first_difference(given, own):
        raise UserError(
            f"{_flags(given)}: {difference}, as in the tokenizer of {where}: give the one that the model was trained "
            "with"
        )


def warn_unchecked(files: TokenizerConfig, reason: str) -> None:
    """Say, once for all ranks, that a tokenizer of the right size may be another one than the model's."""
    if int(os.environ.get("RANK") or 0) == 0:
        print(f"warning: {_flags(files)}: only its size could be checked: {reason}", file=sys.stderr)


def _flags(files: TokenizerConfig) -> str:
    """The flag and the file by which the user knows a tokenizer."""
    if files.tokenizer_file:
        return f"--tokenizer-file {files.tokenizer_file}"
    return f"--vocab-file {files.vocab_file}" if files.vocab_file else f"--vocab-size {files.vocab_size}"


def _used_rows(embedding: Tensor) -> int:
    """Rows of the word embedding up to the last that is not zero: padded ones are, as no gradient ever reaches them."""
    used = embedding.any(1).nonzero()
    return int(used.max()) + 1 if len(used) else 0
