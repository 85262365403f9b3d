"""A model from anywhere: which checkpoint is taken, which tokenizer, and what is said where one is missing or wrong."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from random_models import SMALL, random_weights

from megatron.arguments import build_parser, parse_config, to_yaml
from megatron.checkpointing.checkpoint import save_checkpoint
from megatron.checkpointing.huggingface import read_huggingface
from megatron.checkpointing.huggingface_export import export_huggingface
from megatron.checkpointing.weights import NO_FLAGS, Vocabulary, find_weights, named_vocabulary, save_weights, sized
from megatron.config import Config, DataConfig, TokenizerConfig
from megatron.data.indexed_writer import IndexedDatasetWriter
from megatron.data.vocabulary import find_vocabulary
from megatron.distributed.world import World
from megatron.errors import UserError
from megatron.evaluation.loading import load_model
from megatron.tokenizer.training import TrainedTokenizer, train_bpe
from megatron.training.home import require_state


@pytest.fixture
def files(tiny_tokenizer: TrainedTokenizer, tmp_path: Path) -> TokenizerConfig:
    """The flags of a tokenizer of 400 tokens, whose files the test may damage."""
    for path in (tiny_tokenizer.vocab_file, tiny_tokenizer.merge_file):
        shutil.copy(path, tmp_path / path.name)
    return TokenizerConfig(vocab_file=str(tmp_path / "vocab.json"), merge_file=str(tmp_path / "merges.txt"))


def vocabulary_of(files: TokenizerConfig) -> Vocabulary:
    vocabulary = named_vocabulary(files)
    assert vocabulary is not None
    return vocabulary


def corpus(directory: Path, files: TokenizerConfig) -> str:
    """The prefix of a dataset that says which tokenizer made it."""
    tokenizer = vocabulary_of(files).tokenizer
    assert tokenizer is not None
    with IndexedDatasetWriter(directory / "corpus", np.uint16, tokenizer=tokenizer) as writer:
        writer.add_document(np.arange(50))
    return str(directory / "corpus")


def save_run(
    home: Path, config: Config, fingerprint: str, *, vocabulary: int = 400, steps: int = 1, instead: str = ""
) -> Path:
    """A run with a checkpoint a step, each of other weights, as the trainer saves them; `instead` are lines for those
    of the same settings in its config.yaml."""
    changed = {line.split(":")[0] for line in instead.splitlines()}
    lines = [line for line in to_yaml(config).splitlines() if line.split(":")[0] not in changed]
    for step in range(1, steps + 1):
        weights = random_weights(config.model, vocabulary, seed=step)
        save_checkpoint(
            home / "checkpoints",
            iteration=step,
            tensors={f"model.{name}": tensor for name, tensor in weights.tensors.items()}
            | {"optim.final_norm.bias.step": torch.tensor(1.0)},
            state={"settings": {"tokenizer": fingerprint}},
            config_text="\n".join([*lines, instead]) + "\n",
        )
    return home


def test_run_its_checkpoints_or_one_of_them(tmp_path: Path, files: TokenizerConfig) -> None:
    run = save_run(tmp_path / "run", Config(model=SMALL, tokenizer=files), vocabulary_of(files).fingerprint, steps=2)
    for below, step in {".": 2, "checkpoints": 2, "checkpoints/iter_0000001": 1}.items():
        loaded = load_model(run / below, device="cpu")
        expected = random_weights(vocabulary=400, seed=step).tensors
        for name, parameter in loaded.model.named_parameters():
            assert torch.equal(parameter, expected[name]), name
        assert loaded.source == run / "checkpoints" / f"iter_000000{step}"
    assert not loaded.model.training and loaded.model.device == torch.device("cpu")
    assert (loaded.config, loaded.vocab_size, loaded.model.vocab_size) == (SMALL, 400, 400)
    assert loaded.require_tokenizer().fingerprint == vocabulary_of(files).fingerprint


@pytest.mark.parametrize(
    "instead",
    [
        "seqlen-warmup: cosine\nseqlen-cosine-ends: [0.1, 0.9]",  # of a checkout with this pacing
        "seqlen-start: 16",  # without a warmup, which trainers have taken
        "global-batch-size: 0\nlr: fast\nsave: [nested, {a: b}]",
    ],
)
def test_how_a_model_was_trained_is_not_asked(tmp_path: Path, files: TokenizerConfig, instead: str) -> None:
    config = Config(model=SMALL, tokenizer=files)
    run = save_run(tmp_path / "run", config, vocabulary_of(files).fingerprint, instead=instead)
    loaded = load_model(run)
    assert (loaded.config, loaded.vocab_size) == (SMALL, 400) and loaded.tokenizer is not None
    with pytest.raises(UserError):
        parse_config(build_parser(), ["--config", str(loaded.source / "config.yaml")])


@pytest.mark.parametrize(("instead", "message"), [
    ("rotary: true\nseqlen-warmup: cosine", "unknown flag --rotary"),
    ("hidden-dropout: 2", "--hidden-dropout 2.0 must be in"),
])  # fmt: skip
def test_a_model_that_is_not_known_here_is_refused(tmp_path: Path, instead: str, message: str) -> None:
    run = save_run(tmp_path / "run", Config(model=SMALL), "vocabulary of 400", instead=instead)
    with pytest.raises(UserError, match=rf"^--config {run}/checkpoints/iter_0000001/config.yaml: {message}"):
        load_model(run)


def test_hugging_face_directory_with_its_own_tokenizer(tmp_path: Path, files: TokenizerConfig) -> None:
    weights = random_weights(vocabulary=vocabulary_of(files))
    export_huggingface(weights, tmp_path / "hf")
    loaded = load_model(tmp_path / "hf", dtype="bf16")
    assert loaded.source == tmp_path / "hf" and loaded.vocab_size == 400 and loaded.config == SMALL
    assert loaded.require_tokenizer().decode(loaded.require_tokenizer().encode("x = 1")) == "x = 1"
    for name, parameter in loaded.model.named_parameters():
        assert torch.equal(parameter.cpu(), weights.tensors[name].bfloat16()), name


@pytest.fixture(params=["tokenizer.json", "vocab.json"])
def ends_otherwise(request: pytest.FixtureRequest, tmp_path: Path, tiny_tokenizer: TrainedTokenizer) -> Path:
    """A Hugging Face directory whose tokenizer has </s>, id 399, and no <|endoftext|>; nothing in it says so."""
    directory = tmp_path / "hf"
    export_huggingface(random_weights(vocabulary=400), directory)
    file = tiny_tokenizer.tokenizer_file.parent / request.param
    (directory / request.param).write_text(file.read_text().replace("<|endoftext|>", "</s>"))
    if request.param == "vocab.json":
        shutil.copy(tiny_tokenizer.merge_file, directory / "merges.txt")
    return directory


def test_an_end_of_text_that_nothing_names(ends_otherwise: Path) -> None:
    with pytest.raises(UserError, match=r"has no token '<\|endoftext\|>' .*; name the one it has with --eod-token"):
        load_model(ends_otherwise)
    assert load_model(ends_otherwise, tokenizer=TokenizerConfig(eod_token="</s>")).require_tokenizer().eod == 399


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config.json", '{"eos_token": "</s>"}'),
        ("tokenizer_config.json", '{"eos_token": {"content": "</s>"}}'),
        ("special_tokens_map.json", '{"eos_token": {"content": "</s>"}}'),
        ("generation_config.json", '{"eos_token_id": 399}'),
        ("generation_config.json", '{"eos_token_id": [399]}'),
        ("config.json", None),
    ],
)
def test_hugging_face_says_what_ends_a_text(ends_otherwise: Path, name: str, content: str | None) -> None:
    if content is None:
        settings = json.loads((ends_otherwise / name).read_text())
        content = json.dumps(settings | {"eos_token_id": 399})
        # What transformers writes where nobody said anything: no token of this vocabulary, so no word about it.
        (ends_otherwise / "generation_config.json").write_text('{"eos_token_id": 50256}')
    (ends_otherwise / name).write_text(content)
    tokenizer = load_model(ends_otherwise).require_tokenizer()
    assert tokenizer.eod == 399 and tokenizer.decode([399]) == "</s>"
    other = load_model(ends_otherwise, tokenizer=TokenizerConfig(eod_token="a")).require_tokenizer()
    assert other.decode([other.eod]) == "a"


def test_several_ends_of_text_are_refused(ends_otherwise: Path) -> None:
    (ends_otherwise / "generation_config.json").write_text('{"eos_token_id": [399, 3]}')
    with pytest.raises(
        UserError, match=r"generation_config.json: eos_token_id: expected one token, found \[399, 3\]: na"
    ):
        load_model(ends_otherwise)
    assert load_model(ends_otherwise, tokenizer=TokenizerConfig(eod_token="</s>")).require_tokenizer().eod == 399


def test_an_end_of_text_stays_with_the_model(ends_otherwise: Path, tmp_path: Path) -> None:
    weights = read_huggingface(ends_otherwise, TokenizerConfig(eod_token="</s>"))
    path = save_weights(weights, tmp_path / "run")
    assert load_model(tmp_path / "run").require_tokenizer().eod == 399
    config, _ = parse_config(build_parser(), ["--config", str(path / "config.yaml"), "--train-iters", "1"])
    prefix = corpus(tmp_path, config.tokenizer)
    assert find_vocabulary(config.tokenizer, [prefix]).eod == 399, "what pretrain masks"

    moved = tmp_path / "moved"
    shutil.copytree(ends_otherwise, moved)
    flags = TokenizerConfig(
        **{
            field: str(moved / Path(file).name) if file and field.endswith("_file") else file
            for field, file in vars(replace(config.tokenizer, eod_token=None)).items()
        }
    )
    assert load_model(tmp_path / "run", tokenizer=flags).require_tokenizer().eod == 399

    export_huggingface(weights, tmp_path / "again")
    assert json.loads((tmp_path / "again" / "tokenizer_config.json").read_text())["eos_token"] == "</s>"
    assert load_model(tmp_path / "again").require_tokenizer().eod == 399


def test_data_that_end_otherwise_than_the_tokenizer(tmp_path: Path, files: TokenizerConfig) -> None:
    prefix = corpus(tmp_path, replace(files, eod_token="a"))
    end = vocabulary_of(replace(files, eod_token="a")).eod
    message = (
        rf"--eod-token: expected the token id {end} that preprocessing put at the end of documents in .*, found 399"
    )
    with pytest.raises(UserError, match=message):
        find_vocabulary(files, [prefix])
    assert (
        find_vocabulary(replace(files, eod_token="a"), [prefix]).eod == find_vocabulary(NO_FLAGS, [prefix]).eod == end
    )
    with pytest.raises(UserError, match="--eod-token a is a tokenizer's: give --vocab-file"):
        find_vocabulary(TokenizerConfig(eod_token="a"), [prefix])
    config = Config(model=SMALL, data=DataConfig(data_path=(prefix,)))
    run = save_run(tmp_path / "run", config, vocabulary_of(files).fingerprint)
    with pytest.raises(UserError, match=message):
        load_model(run, tokenizer=files)
    assert load_model(run, tokenizer=replace(files, eod_token="a")).require_tokenizer().eod == end
    with pytest.raises(UserError, match=r"config.yaml: --eod-token a is a tokenizer's"):
        load_model(run, tokenizer=TokenizerConfig(eod_token="a"))


def test_data_say_the_size_and_flags_the_tokenizer(tmp_path: Path, files: TokenizerConfig) -> None:
    config = Config(model=SMALL, data=DataConfig(data_path=(corpus(tmp_path, files),)))
    run = save_run(tmp_path / "run", config, vocabulary_of(files).fingerprint)
    loaded = load_model(run)
    assert loaded.vocab_size == 400 and loaded.tokenizer is None
    with pytest.raises(UserError, match=r"iter_0000001 names no files of its tokenizer: give --vocab-file"):
        loaded.require_tokenizer()
    assert load_model(run, tokenizer=files).require_tokenizer().vocab_size == 400
    (tmp_path / "corpus.json").unlink()
    with pytest.raises(
        UserError, match=r"config.yaml names no tokenizer, and no data .*: give --vocab-file .*--vocab-size"
    ):
        load_model(run)
    assert load_model(run, tokenizer=TokenizerConfig(vocab_size=400)).vocab_size == 400


def test_size_of_the_vocabulary_alone(tmp_path: Path) -> None:
    weights = random_weights(vocabulary=sized(300))
    save_weights(weights, tmp_path)
    assert (load_model(tmp_path).vocab_size, load_model(tmp_path).tokenizer) == (300, None)
    for wrong in (299, 301, 800):
        with pytest.raises(UserError, match=rf"--vocab-size {wrong}: expected the 300 tokens of .*found {wrong}"):
            load_model(tmp_path, tokenizer=TokenizerConfig(vocab_size=wrong))


def test_tokenizer_that_is_gone_changed_or_of_another_size(tmp_path: Path, files: TokenizerConfig) -> None:
    fingerprint = vocabulary_of(files).fingerprint
    run = save_run(tmp_path / "run", Config(model=SMALL, tokenizer=files), fingerprint)
    other = train_bpe(iter(["some other text, and some more of it"] * 3), 280, tmp_path / "other")
    smaller = TokenizerConfig(vocab_file=str(other.vocab_file), merge_file=str(other.merge_file))
    with pytest.raises(
        UserError, match=rf"--vocab-file {other.vocab_file}: expected the 400 tokens of .*found {other.vocab_size}"
    ):
        load_model(run, tokenizer=smaller)
    with pytest.raises(UserError, match=r"--vocab-size is for a model without a tokenizer's files"):
        load_model(run, tokenizer=replace(files, vocab_size=400))
    merges = tmp_path / "merges.txt"
    merges.write_text("".join(merges.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(UserError, match=rf"vocab.json: expected the tokenizer with the fingerprint {fingerprint[:16]}"):
        load_model(run)
    with pytest.raises(UserError, match=rf"vocab.json: expected the tokenizer with the fingerprint {fingerprint[:16]}"):
        load_model(run, tokenizer=files)  # of the same size, given by flags
    merges.unlink()
    with pytest.raises(UserError, match=r"config.yaml: --merge-file .*cannot be read.*; give --vocab-file"):
        load_model(run)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"device": "tpu"}, "--device must be auto, cpu or cuda, not 'tpu'"),
        ({"dtype": "int8"}, "--dtype must be one of fp32, bf16, fp16, not 'int8'"),
    ],
)
def test_settings_that_there_are_not(tmp_path: Path, settings: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_model(tmp_path, **settings)  # type: ignore[arg-type]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_gpu_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--device cuda: no CUDA device is available"):
        load_model(tmp_path, device="cuda")


def test_checkpoint_of_another_shape_or_model(tmp_path: Path) -> None:
    config = Config(model=replace(SMALL, seq_length=40), tokenizer=TokenizerConfig(vocab_size=300))
    tensors = random_weights().tensors
    for name, state in {"shape": tensors, "model": {"final_norm.bias": torch.zeros(48)}}.items():
        save_checkpoint(
            tmp_path / name,
            iteration=1,
            tensors={f"model.{key}": tensor for key, tensor in state.items()},
            state={},
            config_text=to_yaml(config),
        )
    with pytest.raises(
        UserError, match=r"position_embeddings.weight: expected the shape \[40, 48\] .*, found \[32, 48\]"
    ):
        load_model(tmp_path / "shape")
    with pytest.raises(
        UserError, match=r"expected the weights of a GPT-2, found none of blocks.0.attention.output.bias"
    ):
        load_model(tmp_path / "model")


def test_weights_that_are_not_floating_point(tmp_path: Path) -> None:
    weights = random_weights()
    weights.tensors["blocks.1.mlp.up.bias"] = torch.ones(192, dtype=torch.int8)
    save_weights(weights, tmp_path)
    with pytest.raises(
        UserError, match=r"iter_0000000: blocks.1.mlp.up.bias: expected floating point values, found int8: convert"
    ):
        load_model(tmp_path)


def test_nothing_there_and_a_damaged_shard(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--load .*: no whole checkpoint found there"):
        load_model(tmp_path / "missing")
    save_weights(random_weights(), tmp_path / "run")
    shard = next((tmp_path / "run").rglob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    with pytest.raises(UserError, match=rf"{shard.name}: damaged, expected crc32"):
        load_model(tmp_path / "run")


def test_weights_alone_start_a_run_only_where_that_is_asked_for(tmp_path: Path) -> None:
    path = save_weights(random_weights(), tmp_path / "run")
    checkpoint = find_weights(tmp_path / "run")
    require_state(checkpoint, {"settings"}, World())
    with pytest.raises(UserError, match=r"--load .*: holds weights only; give --finetune to start a run from them"):
        require_state(checkpoint, {"settings", "progress", "rng"}, World())
    assert path.exists()


def test_an_export_into_the_directory_that_one_is_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = random_weights()
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    export_huggingface(weights, Path("."), dtype=None)
    assert (tmp_path / "out" / "config.json").exists()
