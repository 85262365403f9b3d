"""Hugging Face's GPT-2, both ways: transformers itself is the oracle, of values, of logits and of tokens."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from random_models import SMALL, Canary, assert_same, random_weights
from safetensors.torch import load_file, save_file
from whole_runs import ENVIRONMENT, log_of, toy_corpus

from megatron.checkpointing import huggingface_export
from megatron.checkpointing.huggingface import read_huggingface
from megatron.checkpointing.huggingface_export import export_huggingface
from megatron.checkpointing.weights import Weights, build_model, named_vocabulary, read_run, save_weights
from megatron.config import MODEL_SIZES, ModelConfig, TokenizerConfig
from megatron.errors import UserError
from megatron.evaluation.loading import load_model
from megatron.tokenizer.training import TrainedTokenizer

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers", reason="needs transformers: pip install -e '.[hf]'")

ROOT = Path(__file__).parents[1]
LAYERS = {"117M": 12, "gpt3-125M": 12}
"""The other presets are tested at their full width with one layer, so that a test takes a second or two; with all of
them in a slow test."""
TEXT = "Tokens, tokens:\n\tdef f(x): return x + 1  # naïve\n"


def their_model(config: ModelConfig, vocabulary: int, seed: int = 3) -> Any:
    """A GPT-2 of transformers with random values in every tensor."""
    torch.manual_seed(seed)
    settings = transformers.GPT2Config(
        n_layer=config.num_layers,
        n_embd=config.hidden_size,
        n_head=config.num_attention_heads,
        n_positions=config.seq_length,
        vocab_size=vocabulary,
        resid_pdrop=config.hidden_dropout,
        layer_norm_epsilon=config.norm_epsilon,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = transformers.GPT2LMHeadModel(settings).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    return model


def logits_of(weights: Weights, tokens: torch.Tensor) -> torch.Tensor:
    """[sequences, seqlen, vocabulary], through our own model."""
    model = build_model(weights)
    with torch.inference_mode():
        return model.logits(model(tokens)).view(*tokens.shape, -1)[..., : weights.vocabulary.size]


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    """A directory of transformers, 300 tokens, without a tokenizer."""
    their_model(SMALL, 300).save_pretrained(tmp_path / "theirs")
    return tmp_path / "theirs"


def read_with_their_logits(size: str, layers: int, directory: Path) -> Weights:
    """What we read of a random model of a preset's width, its logits compared with theirs."""
    _, hidden, heads = MODEL_SIZES[size]
    config = ModelConfig(num_layers=layers, hidden_size=hidden, num_attention_heads=heads, seq_length=64)
    model = their_model(config, 257)
    model.save_pretrained(directory)
    tokens = torch.randint(257, (2, 48), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = model(tokens).logits
    del model  # before ours is there: each takes 6 GB for 1.5B
    assert float(expected.std()) > 0.3
    weights = read_huggingface(directory)
    torch.testing.assert_close(logits_of(weights, tokens), expected, rtol=0, atol=1e-5)
    return weights


@pytest.mark.slow
@pytest.mark.parametrize("size", [size for size in MODEL_SIZES if size not in LAYERS])
def test_logits_are_theirs_with_all_layers_of_the_larger_presets(size: str, tmp_path: Path) -> None:
    read_with_their_logits(size, MODEL_SIZES[size][0], tmp_path)


@pytest.mark.parametrize("size", MODEL_SIZES)
def test_logits_are_theirs_for_the_shapes_of_the_presets_and_their_values_come_back(size: str, tmp_path: Path) -> None:
    weights = read_with_their_logits(size, LAYERS.get(size, 1), tmp_path / "theirs")
    assert weights.config.num_layers <= MODEL_SIZES[size][0]
    export_huggingface(weights, tmp_path / "ours")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "ours"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name


def test_ours_to_theirs_to_ours_is_the_same_to_the_bit(tmp_path: Path) -> None:
    weights = random_weights()
    save_weights(weights, tmp_path / "ours")
    report = export_huggingface(read_run(tmp_path / "ours"), tmp_path / "theirs")
    assert "0 (by our reader), " in report and "(by transformers); 32 tokens" in report
    save_weights(read_huggingface(tmp_path / "theirs"), tmp_path / "again")
    assert_same(read_run(tmp_path / "again"), weights)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "ours", "theirs"]


def test_the_trained_length_comes_back_where_there_are_more_positions(
    tiny_tokenizer: TrainedTokenizer,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    flags = TokenizerConfig("HFTokenizer", tokenizer_file=str(tiny_tokenizer.tokenizer_file))
    vocabulary = named_vocabulary(flags)
    assert vocabulary is not None
    weights = random_weights(replace(SMALL, seq_length=16, max_position_embeddings=32), vocabulary)
    save_weights(weights, tmp_path / "ours")
    export_huggingface(read_run(tmp_path / "ours"), tmp_path / "theirs")
    convert(monkeypatch, "--from", "hf", "--load", tmp_path / "theirs", "--save", tmp_path / "again")
    assert "4 heads, length 16 of 32 positions, vocabulary 400" in capsys.readouterr().out
    assert_same(read_run(tmp_path / "again"), weights)
    assert load_model(tmp_path / "theirs").config == weights.config

    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "theirs")
    tokens = torch.randint(400, (1, 32), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = model(tokens).logits
    torch.testing.assert_close(logits_of(weights, tokens), expected, rtol=0, atol=1e-4)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "theirs").model_max_length == 16
    model.save_pretrained(tmp_path / "resaved")
    assert read_huggingface(tmp_path / "resaved").config.seq_length == 16


@pytest.mark.parametrize(("n_ctx", "length"), [(32, 32), (1024, 32), (None, 32), (24, 24)])
def test_length_of_other_peoples_models(theirs: Path, n_ctx: int | None, length: int) -> None:
    path = theirs / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"n_ctx": n_ctx}))
    config = read_huggingface(theirs).config
    assert (config.seq_length, config.positions) == (length, 32)


@pytest.mark.parametrize("kind", ["vocab.json and merges.txt", "tokenizer.json"])
def test_transformers_takes_model_tokenizer_and_end_of_text(
    kind: str, tiny_tokenizer: TrainedTokenizer, tmp_path: Path
) -> None:
    if kind == "tokenizer.json":
        flags = TokenizerConfig("HFTokenizer", tokenizer_file=str(tiny_tokenizer.tokenizer_file))
    else:
        flags = TokenizerConfig(vocab_file=str(tiny_tokenizer.vocab_file), merge_file=str(tiny_tokenizer.merge_file))
    vocabulary = named_vocabulary(flags)
    assert vocabulary is not None and vocabulary.tokenizer is not None
    weights = random_weights(vocabulary=vocabulary)
    assert f"tokenizer: {kind.replace(' and', ',')}" in export_huggingface(weights, tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = vocabulary.tokenizer.encode(TEXT)
    assert tokenizer(TEXT)["input_ids"] == ids and tokenizer.decode(ids) == TEXT
    assert tokenizer.eos_token_id == model.generation_config.eos_token_id == vocabulary.eod
    assert (len(tokenizer), tokenizer.model_max_length, model.config.resid_pdrop) == (vocabulary.size, 32, 0.2)
    with torch.inference_mode():
        expected = model(torch.tensor([ids[:30]])).logits
    read = read_huggingface(tmp_path / "out")
    torch.testing.assert_close(logits_of(read, torch.tensor([ids[:30]])), expected, rtol=0, atol=1e-4)
    assert read.vocabulary.tokenizer is not None and read.vocabulary.fingerprint == vocabulary.fingerprint


def test_type_of_the_weights(tmp_path: Path) -> None:
    weights = random_weights()
    report = export_huggingface(weights, tmp_path / "out", dtype="bf16")
    assert "bf16" in report and "\nlargest difference of logits: 0 (by our reader), " in report
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    rounded = {name: tensor.bfloat16().float() for name, tensor in weights.tensors.items()}
    assert_same(read_huggingface(tmp_path / "out"), replace(weights, tensors=rounded))
    weights.tensors["blocks.0.mlp.up.bias"][3] = 1e6
    with pytest.raises(UserError, match=r"--dtype fp16 cannot hold the values of blocks.0.mlp.up.bias"):
        export_huggingface(weights, tmp_path / "other", dtype="fp16")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_several_files_and_a_pickle_hold_the_same(theirs: Path, tmp_path: Path) -> None:
    expected = read_huggingface(theirs)
    model = transformers.GPT2LMHeadModel.from_pretrained(theirs)
    model.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert_same(read_huggingface(tmp_path / "shards"), expected)
    table = {name.removeprefix("transformer."): tensor for name, tensor in model.state_dict().items()}
    table["h.0.attn.bias"] = torch.ones(1, 1, 32, 32).tril()  # as OpenAI's own files
    table["h.1.attn.bias"] = table["h.0.attn.bias"].to(torch.uint8)  # as later ones
    torch.save(table, tmp_path / "shards" / "pytorch_model.bin")
    for path in (tmp_path / "shards").glob("model*"):
        path.unlink()
    assert_same(read_huggingface(tmp_path / "shards"), expected)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_weights_that_are_not_floating_point_are_refused(theirs: Path, name: str) -> None:
    tensors = load_file(theirs / "model.safetensors")
    tensors["transformer.h.1.mlp.c_fc.bias"] = torch.arange(192)
    (theirs / "model.safetensors").unlink()
    (save_file if name.endswith(".safetensors") else torch.save)(tensors, theirs / name)
    with pytest.raises(
        UserError, match=rf"{name}: transformer.h.1.mlp.c_fc.bias: expected floating point values, found int64: convert"
    ):
        read_huggingface(theirs)


def test_code_in_a_pickle_is_not_run(theirs: Path, tmp_path: Path) -> None:
    (theirs / "model.safetensors").unlink()
    torch.save({"wte.weight": Canary(tmp_path / "ran")}, theirs / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model.bin: expected tensors and nothing else"):
        read_huggingface(theirs)
    assert not (tmp_path / "ran").exists()
    torch.load(theirs / "pytorch_model.bin", weights_only=False)
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model_type", "llama", r"config.json: model_type: expected 'gpt2', found 'llama': only plain GPT-2"),
        ("scale_attn_by_inverse_layer_idx", True, r"scale_attn_by_inverse_layer_idx: expected False, found True"),
        ("reorder_and_upcast_attn", True, r"reorder_and_upcast_attn: expected False, found True"),
        ("scale_attn_weights", False, r"scale_attn_weights: expected True, found False"),
        ("tie_word_embeddings", False, r"tie_word_embeddings: expected True, found False"),
        ("activation_function", "relu", r"activation_function: expected 'gelu_new', found 'relu'"),
        ("n_inner", 100, r"n_inner: expected null or 4 x n_embd = 192, found 100"),
        ("n_layer", "two", r"n_layer: expected a positive whole number, found 'two'"),
        ("n_head", 5, r"config.json: --hidden-size 48 must be a multiple of --num-attention-heads 5"),
        ("n_ctx", 0, r"n_ctx: expected a positive whole number, found 0"),
        ("attn_pdrop", None, r"attn_pdrop: expected a number, found None"),
        ("n_layer", 1, r"expected the tensors of a GPT-2, found h.1.attn.c_attn.bias too"),
        ("n_layer", 3, r"expected the tensor transformer.h.2.ln_1.weight, found none"),
        ("n_layer", 10**9, r"expected the tensor transformer.h.999999999.ln_1.weight, found none"),
        ("n_embd", 10**9, r"wte.weight: expected the shape \[300, 1000000000\] that its settings lead to, found"),
        ("vocab_size", 301, r"wte.weight: expected the shape \[301, 48\] that its settings lead to, found \[300, 48\]"),
    ],
)
def test_other_models_are_refused_by_the_key(theirs: Path, key: str, value: object, message: str) -> None:
    path = theirs / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(UserError, match=message):
        read_huggingface(theirs)


def test_head_that_is_not_the_embedding_is_refused(theirs: Path) -> None:
    tensors = load_file(theirs / "model.safetensors")
    save_file(tensors | {"lm_head.weight": tensors["transformer.wte.weight"] + 1}, theirs / "model.safetensors")
    with pytest.raises(UserError, match=r"lm_head.weight is not wte.weight: expected a GPT-2 whose output"):
        read_huggingface(theirs)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "model.safetensors").write_bytes(b"\x08"), r"cannot read the tensors of .*model.safetensors"),
        (lambda d: os.truncate(d / "model.safetensors", 5000), r"cannot read the tensors of .*model.safetensors"),
        (lambda d: (d / "model.safetensors").unlink(), r"expected model.safetensors, .* found none of them"),
        (lambda d: (d / "config.json").write_text("{"), r"config.json: is not valid JSON"),
        (lambda d: (d / "config.json").write_text("[1]"), r"config.json: expected a JSON object"),
        (
            lambda d: (d / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../x.safetensors"}}'),
            r"index.json: '../x.safetensors' is not a plain file name",
        ),
        (
            lambda d: (d / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}'),
            r"cannot read .*gone.safetensors",
        ),
        (
            lambda d: (d / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model.safetensors"}}'),
            r"model.safetensors: expected the tensor a, found none",
        ),
    ],
)
def test_damaged_directories_are_refused_by_the_file(theirs: Path, damage: Any, message: str) -> None:
    damage(theirs)
    with pytest.raises(UserError, match=message) as caught:
        read_huggingface(theirs)
    assert "\n" not in str(caught.value)


def test_tokenizer_of_another_size_is_refused(theirs: Path, tiny_tokenizer: TrainedTokenizer) -> None:
    for name in ("vocab.json", "merges.txt"):
        (theirs / name).write_bytes((tiny_tokenizer.vocab_file.parent / name).read_bytes())
    with pytest.raises(
        UserError, match=r"--vocab-file .*vocab.json: expected the 300 tokens of .*config.json .*found 400"
    ):
        read_huggingface(theirs)


def test_what_stands_there_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    export_huggingface(random_weights(), tmp_path / "out")  # an empty directory is free
    before = (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns
    with pytest.raises(UserError, match=r"--save .*out exists: choose another name"):
        export_huggingface(random_weights(), tmp_path / "out")
    with pytest.raises(UserError, match=r"--save .*out exists: choose another name"):
        save_weights(random_weights(), tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns == before


def test_export_whose_logits_differ_is_not_handed_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = huggingface_export.to_huggingface

    def wrong(*args: Any) -> dict[str, torch.Tensor]:
        tensors = right(*args)
        return tensors | {"transformer.h.1.mlp.c_fc.bias": tensors["transformer.h.1.mlp.c_fc.bias"].flip(0)}

    monkeypatch.setattr(huggingface_export, "to_huggingface", wrong)
    with pytest.raises(UserError, match=r"its logits differ by .* \(by our reader\), expected at most"):
        export_huggingface(random_weights(), tmp_path / "out")
    monkeypatch.undo()
    broken = random_weights()
    broken.tensors["final_norm.bias"][0] = torch.nan
    with pytest.raises(UserError, match=r"its logits differ by nan"):
        export_huggingface(broken, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_without_transformers_it_says_that_only_one_reader_was_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    report = export_huggingface(random_weights(), tmp_path / "out")
    assert "0 (by our reader), transformers is not installed, so it was not asked; 32 tokens" in report
    monkeypatch.undo()
    assert_same(read_huggingface(tmp_path / "out"), random_weights())


def convert(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    """The tool, in this process."""
    tool = str(ROOT / "tools" / "convert_checkpoint.py")
    monkeypatch.setattr(sys, "argv", [tool, *map(str, arguments)])
    runpy.run_path(tool)["main"]()


def test_the_tool_both_ways_and_a_run_that_goes_on_from_theirs(
    theirs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ours, back, run = tmp_path / "ours", tmp_path / "back", tmp_path / "run"
    convert(monkeypatch, "--from", "hf", "--load", theirs, "--save", ours)
    assert "2 layers, hidden 48, 4 heads, length 32, vocabulary 300" in capsys.readouterr().out
    convert(monkeypatch, "--to", "hf", "--load", ours, "--save", back)
    assert "(by transformers)" in capsys.readouterr().out
    assert_same(read_huggingface(back), read_huggingface(theirs))
    corpus = toy_corpus(tmp_path, documents=40, tokens=100, vocabulary=300)
    command = (
        f"pretrain_gpt2.py --config {ours}/checkpoints/iter_0000000/config.yaml --load {ours} "
        f"--finetune --save {run} --data-path {corpus} --train-iters 1 --global-batch-size 2 --micro-batch-size 2 "
        "--eval-iters 1 --lr-warmup-iters 0 --lr 1e-9 --no-tensorboard --compile off"
    )
    done = subprocess.run(
        [sys.executable, *command.split()],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "weights of" in done.stdout + done.stderr
    after, before = read_run(run), read_huggingface(theirs)
    for name, tensor in before.tensors.items():
        torch.testing.assert_close(after.tensors[name], tensor, rtol=0, atol=1e-7)
    (step,) = (entry for entry in log_of(run, float) if "event" not in entry)
    assert 5 < step["loss"] < 8


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--to hf --output x", "--to hf needs --save DIR, to write to"),
        ("--from hf", "--from hf needs --save DIR, to write to"),
        ("--to hf --save x --output x", "--to hf writes to --save, not to --output: drop that"),
        ("--to safetensors --save x", "--to safetensors needs --output FILE, to write to"),
        ("", "one of the arguments --to --from is required; see --help"),
        ("--from hf --save x", "--load nowhere: no such directory, and nothing is downloaded here: fetch .* hf downl"),
        ("--from hf --save x --dtype bf16", "--dtype has no effect here"),
        ("--to hf --save x --force", "--force has no effect here"),
        ("--to safetensors --output x --vocab-file v", "--vocab-file is for --to hf and --from, not --to safetensors"),
        ("--to safetensors --output x --vocab-size 3", "--vocab-size is for --to hf and --from, not --to safetensors"),
        ("--to safetensors --output x --eod-token a", "--eod-token is for --to hf and --from, not --to safetensors"),
        ("--to hf --save x --tokenizer-type HFTokenizer", "--tokenizer-type HFTokenizer needs --tokenizer-file"),
    ],
)
def test_flags_that_do_not_go_together(flags: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=message):
        convert(monkeypatch, "--load", "nowhere", *flags.split())
