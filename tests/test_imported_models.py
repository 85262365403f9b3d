"""What a foreign model becomes: its recipe, its tokenizer, and what is said where that cannot be the model's."""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from random_models import SMALL, random_weights
from safetensors.torch import load_file, save_file

from megatron.arguments import build_parser, parse_config
from megatron.checkpointing.huggingface import read_huggingface
from megatron.checkpointing.huggingface_export import export_huggingface
from megatron.checkpointing.weights import Weights, build_model, describe, named_vocabulary, read_run, save_weights
from megatron.config import CheckpointConfig, TokenizerConfig
from megatron.console import ProgressLine
from megatron.distributed.world import ALONE
from megatron.errors import UserError
from megatron.evaluation.loading import load_model
from megatron.tokenizer.training import TrainedTokenizer, train_bpe
from megatron.training.home import find_checkpoint

ROOT = Path(__file__).parents[1]


def both_kinds(tokenizer: TrainedTokenizer) -> dict[str, TokenizerConfig]:
    """The flags of the two forms in which a tokenizer is written."""
    return {
        "GPT2BPETokenizer": TokenizerConfig(vocab_file=str(tokenizer.vocab_file), merge_file=str(tokenizer.merge_file)),
        "HFTokenizer": TokenizerConfig("HFTokenizer", tokenizer_file=str(tokenizer.tokenizer_file)),
    }


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> TrainedTokenizer:
    """Another tokenizer of as many tokens."""
    text = (ROOT / "README.md").read_text() + (ROOT / "CONTRIBUTING.md").read_text()
    trained = train_bpe(iter([text]), 400, tmp_path_factory.mktemp("other"))
    assert trained.vocab_size == 400
    return trained


def weights_with(flags: TokenizerConfig) -> Weights:
    vocabulary = named_vocabulary(flags)
    assert vocabulary is not None
    return random_weights(vocabulary=vocabulary)


KINDS = pytest.mark.parametrize(
    ("own", "given"),
    [("GPT2BPETokenizer", "HFTokenizer"), ("HFTokenizer", "GPT2BPETokenizer"), ("HFTokenizer", "HFTokenizer")],
)


@KINDS
def test_another_tokenizer_of_the_same_size_is_refused(
    own: str, given: str, tiny_tokenizer: TrainedTokenizer, other: TrainedTokenizer, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    weights = weights_with(both_kinds(tiny_tokenizer)[own])
    save_weights(weights, tmp_path / "run")
    export_huggingface(weights, tmp_path / "hf")
    for path in (tmp_path / "run", tmp_path / "hf"):
        message = r"(expected '.*' for the id \d+, found '.*', as in the tokenizer of|expected the tokenizer with the)"
        with pytest.raises(UserError, match=rf"--(vocab|tokenizer)-file .*: {message}"):
            load_model(path, tokenizer=both_kinds(other)[given])
        loaded = load_model(path, tokenizer=both_kinds(tiny_tokenizer)[given])
        assert loaded.require_tokenizer().name == given
    assert capsys.readouterr().err == ""


def test_a_tokenizer_that_cannot_be_compared_is_told(
    tiny_tokenizer: TrainedTokenizer,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(tiny_tokenizer.vocab_file.parent / name, tmp_path / name)
    moved = TokenizerConfig(vocab_file=str(tmp_path / "vocab.json"), merge_file=str(tmp_path / "merges.txt"))
    save_weights(weights_with(moved), tmp_path / "run")
    (tmp_path / "vocab.json").unlink()
    whole = both_kinds(tiny_tokenizer)["HFTokenizer"]
    read_run(tmp_path / "run", whole)
    told = capsys.readouterr().err
    assert told.startswith(f"warning: --tokenizer-file {whole.tokenizer_file}: only its size could be checked: the one")
    assert told.count("\n") == 1
    monkeypatch.setenv("RANK", "1")
    read_run(tmp_path / "run", whole)
    assert capsys.readouterr().err == ""


def test_the_recipe_leaves_the_run_to_its_flags(
    tiny_tokenizer: TrainedTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny_tokenizer.vocab_file.parent)
    weights = weights_with(TokenizerConfig(vocab_file="vocab.json", merge_file="merges.txt"))
    path = save_weights(weights, tmp_path / "run") / "config.yaml"
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="nothing says when to stop"):
        parse_config(build_parser(), ["--config", str(path)])
    config, _ = parse_config(build_parser(), ["--config", str(path), "--train-iters", "10"])
    assert (config.training.train_iters, config.training.train_tokens) == (10, None)
    assert (config.model, config.tokenizer.vocab_file) == (weights.config, str(tiny_tokenizer.vocab_file))
    assert load_model(tmp_path / "run").require_tokenizer().fingerprint == weights.vocabulary.fingerprint


def test_a_tokenizer_file_alone_says_what_it_is(tiny_tokenizer: TrainedTokenizer, tmp_path: Path) -> None:
    alone = TokenizerConfig(tokenizer_file=str(tiny_tokenizer.tokenizer_file))
    path = save_weights(weights_with(alone), tmp_path / "run") / "config.yaml"
    assert "tokenizer-type: HFTokenizer\n" in path.read_text()
    assert load_model(tmp_path / "run", tokenizer=alone).require_tokenizer().name == "HFTokenizer"


def test_parameters_are_counted_without_padding() -> None:
    weights = random_weights()
    expected = sum(tensor.numel() for tensor in weights.tensors.values()) - (384 - 300) * 48
    assert f"vocabulary 300, {expected:,} parameters" in describe(weights)


def test_another_epsilon_is_computed_with(tmp_path: Path) -> None:
    """Tiny weights, so that the variance under the norm's root is of the epsilon's size."""
    tokens = torch.arange(20)[None]
    small, plain = random_weights(std=1e-3), random_weights(replace(SMALL, norm_epsilon=1e-5), std=1e-3)
    export_huggingface(small, tmp_path / "hf")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["layer_norm_epsilon"] == 1e-2
    with torch.no_grad():
        ours, read, usual = (build_model(one)(tokens) for one in (small, read_huggingface(tmp_path / "hf"), plain))
    assert torch.equal(ours, read) and (ours - usual).abs().max() > 0.1 * usual.abs().max()


def test_a_nan_in_a_tied_embedding_is_no_other_embedding(tmp_path: Path) -> None:
    export_huggingface(random_weights(), tmp_path / "hf")
    file = tmp_path / "hf" / "model.safetensors"
    tensors = load_file(file)
    tensors["transformer.wte.weight"][3, 4] = torch.nan
    save_file(tensors | {"lm_head.weight": tensors["transformer.wte.weight"].clone()}, file)
    assert read_huggingface(tmp_path / "hf").tensors["word_embeddings.weight"][3, 4].isnan()


def test_training_says_how_to_go_on_from_hugging_face(tmp_path: Path) -> None:
    export_huggingface(random_weights(), tmp_path / "hf")
    config = CheckpointConfig(load=str(tmp_path / "hf"))
    with pytest.raises(UserError, match=r"it looks like a Hugging Face model: make a .* --from hf --load .*/hf --save"):
        find_checkpoint(config, ALONE, ProgressLine("x", target_tokens=1, silent=True))


@pytest.fixture
def convert(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """tools/convert_checkpoint.py, within this process."""

    def call(*arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", ["convert_checkpoint.py", *map(str, arguments)])
        runpy.run_path(str(ROOT / "tools" / "convert_checkpoint.py"))["main"]()

    return call


def test_types_of_the_tool(convert: Callable[..., None], tmp_path: Path) -> None:
    save_weights(random_weights(), tmp_path / "run")
    convert("--load", tmp_path / "run", "--to", "safetensors", "--output", tmp_path / "w", "--dtype", "bf16")
    assert {tensor.dtype for tensor in load_file(tmp_path / "w").values()} == {torch.bfloat16}
    convert("--load", tmp_path / "run", "--to", "hf", "--save", tmp_path / "hf", "--dtype", "fp16")
    assert {tensor.dtype for tensor in load_file(tmp_path / "hf" / "model.safetensors").values()} == {torch.float16}


def test_a_checkpoints_own_files_are_not_written_over(convert: Callable[..., None], tmp_path: Path) -> None:
    path = save_weights(random_weights(), tmp_path / "run")
    shard = next(path.glob("*.safetensors"))
    before = shard.read_bytes()
    with pytest.raises(
        UserError, match=r"--output .*safetensors would be among a checkpoint's own files: name another"
    ):
        convert("--load", tmp_path / "run", "--to", "safetensors", "--output", shard, "--force")
    assert shard.read_bytes() == before
