"""Megatron-LM's checkpoints, written here by a splitter of its own: the order of rows by version, ranks, names."""

from __future__ import annotations

import argparse
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from random_models import SMALL, Canary, assert_same, random_weights

from megatron.checkpointing.megatron_v1 import read_megatron
from megatron.checkpointing.weights import Weights
from megatron.config import TokenizerConfig
from megatron.errors import UserError

GIVEN = TokenizerConfig(vocab_size=300)
EXPECTED = random_weights(replace(SMALL, hidden_dropout=0.1))
HEADS, DIM = 4, 12


def qkv_of_rank(rows: torch.Tensor, version: float, heads: range) -> torch.Tensor:
    """Rows of some heads in the order of a version, picked one by one from ours: ((head * 3) + q/k/v) * dim + i."""
    at = {(h, part, i): (3 * h + part) * DIM + i for h in heads for part in range(3) for i in range(DIM)}
    if version == 0:
        order = [(h, part, i) for part in range(3) for h in heads for i in range(DIM)]
    elif version == 1.0:
        order = [(h, part, i) for h in heads for i in range(DIM) for part in range(3)]
    else:
        order = [(h, part, i) for h in heads for part in range(3) for i in range(DIM)]
    return rows[[at[key] for key in order]]


def rank_file(
    weights: Weights, rank: int, ranks: int, version: float | None, trunk: str, attention: str
) -> dict[str, Any]:
    """What Megatron-LM writes for one tensor parallel rank."""
    hidden, layers = 48, {}
    share = hidden // ranks
    mine, wide = slice(rank * share, (rank + 1) * share), slice(rank * 4 * share, (rank + 1) * 4 * share)
    heads = range(rank * HEADS // ranks, (rank + 1) * HEADS // ranks)
    t = weights.tensors
    for n in range(2):
        ours, theirs = f"blocks.{n}.", f"layers.{n}."
        for kind in ("weight", "bias"):
            layers[f"{theirs}input_layernorm.{kind}"] = t[f"{ours}attention_norm.{kind}"]
            layers[f"{theirs}post_attention_layernorm.{kind}"] = t[f"{ours}mlp_norm.{kind}"]
            qkv = qkv_of_rank(t[f"{ours}attention.qkv.{kind}"], version or 0, heads)
            layers[f"{theirs}{attention}.query_key_value.{kind}"] = qkv
            layers[f"{theirs}mlp.dense_h_to_4h.{kind}"] = t[f"{ours}mlp.up.{kind}"][wide]
        layers[f"{theirs}{attention}.dense.weight"] = t[f"{ours}attention.output.weight"][:, mine]
        layers[f"{theirs}{attention}.dense.bias"] = t[f"{ours}attention.output.bias"]
        layers[f"{theirs}mlp.dense_4h_to_h.weight"] = t[f"{ours}mlp.down.weight"][:, wide]
        layers[f"{theirs}mlp.dense_4h_to_h.bias"] = t[f"{ours}mlp.down.bias"]
    layers["final_layernorm.weight"], layers["final_layernorm.bias"] = t["final_norm.weight"], t["final_norm.bias"]
    padded = torch.full((384, hidden), 7.0)  # padded by their rule, and not with zeros
    padded[:300] = t["word_embeddings.weight"][:300]
    words = padded[rank * 384 // ranks : (rank + 1) * 384 // ranks]
    embedding = {
        "word_embeddings": {"weight": words},
        "position_embeddings": {"weight": t["position_embeddings.weight"]},
    }
    arguments = argparse.Namespace(
        num_layers=2, hidden_size=hidden, num_attention_heads=HEADS, max_position_embeddings=32,
        layernorm_epsilon=weights.config.norm_epsilon, params_dtype=torch.half, data_path=["x"],
    )  # fmt: skip
    content: dict[str, Any] = {
        "iteration": 5,
        "args": arguments,
        "model": {"language_model": {"embedding": embedding, trunk: {k: v.clone() for k, v in layers.items()}}},
        "random_rng_state": (3, (1, 2), None),
        "np_rng_state": np.random.RandomState(1).get_state(),
        "torch_rng_state": torch.get_rng_state(),
    }
    return content if version is None else content | {"checkpoint_version": version}


def write(
    directory: Path,
    *,
    weights: Weights = EXPECTED,
    ranks: int = 1,
    version: float | None = 2.0,
    trunk: str = "transformer",
    attention: str = "attention",
    iteration: str = "5",
    zipped: bool = True,
    **changes: Any,
) -> Path:
    """A checkpoint in `directory`, each rank's file updated with `changes`; the first rank's file."""
    folder = directory / (iteration if iteration == "release" else "iter_0000005")
    for rank in range(ranks):
        path = folder / f"mp_rank_{rank:02d}" / "model_optim_rng.pt"
        path.parent.mkdir(parents=True)
        content = rank_file(weights, rank, ranks, version, trunk, attention) | changes
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
    (directory / "latest_checkpointed_iteration.txt").write_text(iteration)
    return folder / "mp_rank_00" / "model_optim_rng.pt"


@pytest.mark.parametrize("version", [None, 0, 1.0, 2.0, 3.0])
@pytest.mark.parametrize("ranks", [1, 2])
def test_weights_are_merged_and_put_into_our_order(tmp_path: Path, ranks: int, version: float | None) -> None:
    write(tmp_path, ranks=ranks, version=version)
    assert_same(read_megatron(tmp_path, GIVEN), EXPECTED)


def test_names_of_version_2_a_release_the_old_file_format_and_fp16(tmp_path: Path) -> None:
    halves = replace(EXPECTED, tensors={name: tensor.half() for name, tensor in EXPECTED.tensors.items()})
    write(tmp_path, weights=halves, trunk="encoder", attention="self_attention", iteration="release", zipped=False)
    expected = {name: tensor.half().float() for name, tensor in EXPECTED.tensors.items()}
    read = read_megatron(tmp_path, GIVEN)
    assert_same(read, replace(EXPECTED, tensors=expected))
    assert_same(read_megatron(tmp_path / "release", GIVEN), read)


def test_loss_scaler_of_version_1_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("megatron.fp16.loss_scaler")
    scaler = type("DynamicLossScaler", (), {"__module__": module.__name__})
    module.DynamicLossScaler = scaler  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    value = scaler()
    value.cur_scale = 65536.0
    write(tmp_path, optimizer={"loss_scaler": value})
    monkeypatch.undo()
    assert_same(read_megatron(tmp_path, GIVEN), EXPECTED)


def test_code_in_a_file_is_not_run_and_nothing_stays_allowed(tmp_path: Path) -> None:
    path = write(tmp_path, optimizer=Canary(tmp_path / "ran"))
    allowed = set(torch.serialization.get_safe_globals())
    with pytest.raises(UserError, match=r"rng.pt: expected tensors .*, found \S+, which could run code") as caught:
        read_megatron(tmp_path, GIVEN)
    assert not (tmp_path / "ran").exists() and "\n" not in str(caught.value)
    torch.load(path, weights_only=False)
    assert (tmp_path / "ran").exists()
    assert set(torch.serialization.get_safe_globals()) == allowed


def edit(path: Path, **arguments: Any) -> None:
    """Change arguments in a rank's file; None removes one."""
    content = torch.load(path, weights_only=False)
    for name, value in arguments.items():
        setattr(content["args"], name, value)
    torch.save(content, path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_layers": None}, r"args.num_layers: expected a whole number, found None"),
        ({"num_layers": 1}, r"expected the weights of a GPT-2, found blocks.1.attention.output.bias too"),
        ({"num_layers": 3}, r"expected the weights of blocks.2.attention_norm.weight, found none"),
        ({"hidden_size": 96}, r"expected the shape \[384, 96\] that its settings lead to, found \[384, 48\]"),
        ({"num_attention_heads": 5}, r"args: --hidden-size 48 must be a multiple of --num-attention-heads 5"),
        ({"max_position_embeddings": 64}, r"position_embeddings.weight: expected the shape \[64, 48\]"),
        ({"ffn_hidden_size": 100}, r"args.ffn_hidden_size: expected 4 x hidden_size = 192, found 100"),
        ({"bias_gelu_fusion": False}, r"args.bias_gelu_fusion: expected True, found False: that is the exact GELU"),
        ({"apply_residual_connection_post_layernorm": True}, r"post_layernorm: expected False, found True"),
        ({"squared_relu": True}, r"args.squared_relu: expected False, found True: only plain GPT-2 can be read"),
        ({"normalization": "RMSNorm"}, r"args.normalization: expected 'LayerNorm', found 'RMSNorm'"),
        ({"position_embedding_type": "rope"}, r"args.position_embedding_type: expected 'learned_absolute', found 'ro"),
        ({"layernorm_epsilon": "x"}, r"args.layernorm_epsilon: expected a number, found 'x'"),
        ({"num_layers": 10**9}, r"expected the weights of blocks.999999999.attention_norm.weight, found none"),
        ({"hidden_size": 10**9, "num_attention_heads": 10}, r"expected the shape \[384, 1000000000\]"),
    ],
)
def test_arguments_that_do_not_fit_are_named(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    edit(write(tmp_path), **arguments)
    with pytest.raises(UserError, match=message):
        read_megatron(tmp_path, GIVEN)


@pytest.mark.parametrize(("seq_length", "length"), [(16, 16), (32, 32), (64, 32), (None, 32), (0, 32)])
def test_the_trained_length_may_be_less_than_the_positions(tmp_path: Path, seq_length: int | None, length: int) -> None:
    edit(write(tmp_path), seq_length=seq_length, swiglu=False, normalization="LayerNorm", num_experts=None)
    config = read_megatron(tmp_path, GIVEN).config
    assert (config.seq_length, config.positions) == (length, 32)


def test_tanh_form_of_the_gelu_without_its_fused_kernel_is_read(tmp_path: Path) -> None:
    edit(write(tmp_path), bias_gelu_fusion=False, openai_gelu=True)
    assert_same(read_megatron(tmp_path, GIVEN), EXPECTED)


def drop_rank(directory: Path) -> None:
    (directory / "iter_0000005" / "mp_rank_00").rename(directory / "iter_0000005" / "mp_rank_02")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda d: (d / "latest_checkpointed_iteration.txt").unlink(),
            r"latest_checkpointed_iteration.txt, found none",
        ),
        (lambda d: (d / "latest_checkpointed_iteration.txt").write_text("../x"), r"or release, found '../x'"),
        (
            lambda d: (d / "latest_checkpointed_iteration.txt").write_text("6"),
            r"iter_0000006: expected the ranks .* none",
        ),
        (drop_rank, r"expected the ranks mp_rank_00 and on, found \[2\]"),
        (lambda d: (d / "iter_0000005/mp_rank_00").rename(d / "iter_0000005/mp_rank_00_000"), r"pipeline parallelism"),
        (lambda d: (d / "iter_0000005/mp_rank_00/model_optim_rng.pt").unlink(), r"cannot read .*model_optim_rng.pt"),
        (lambda d: (d / "iter_0000005/mp_rank_00/model_optim_rng.pt").write_bytes(b"junk"), r"model_optim_rng.pt"),
        (lambda d: (d / "iter_0000005/mp_rank_00/model_optim_rng.pt").write_bytes(b""), r"model_optim_rng.pt"),
    ],
)
def test_missing_and_damaged_files_are_named(tmp_path: Path, damage: Any, message: str) -> None:
    write(tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        read_megatron(tmp_path, GIVEN)
    assert "\n" not in str(caught.value)


def test_other_contents_are_named(tmp_path: Path) -> None:
    write(tmp_path / "a", model={"module": {}})
    with pytest.raises(UserError, match=r"the entry model.language_model, found none"):
        read_megatron(tmp_path / "a", GIVEN)
    write(tmp_path / "b", version=7.0)
    with pytest.raises(UserError, match=r"checkpoint_version: expected 0, 1.0, 2.0 or 3.0, found 7.0"):
        read_megatron(tmp_path / "b", GIVEN)


def test_weights_that_are_not_floating_point_are_named(tmp_path: Path) -> None:
    path = write(tmp_path)
    content = torch.load(path, weights_only=False)
    content["model"]["language_model"]["transformer"]["final_layernorm.bias"] = torch.arange(48)
    torch.save(content, path)
    message = r"model_optim_rng.pt: transformer.final_layernorm.bias: expected floating point values, found int64"
    with pytest.raises(UserError, match=message):
        read_megatron(tmp_path, GIVEN)


def test_ranks_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a", ranks=2)
    write(tmp_path / "b", ranks=2, weights=random_weights(EXPECTED.config, seed=2))
    other = tmp_path / "b" / "iter_0000005" / "mp_rank_01" / "model_optim_rng.pt"
    other.replace(tmp_path / "a" / "iter_0000005" / "mp_rank_01" / "model_optim_rng.pt")
    with pytest.raises(UserError, match=r"position_embeddings.weight: expected the same values on all ranks"):
        read_megatron(tmp_path / "a", GIVEN)


def test_vocabulary_has_to_be_said_and_to_fit(tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(UserError, match=r"--from megatron needs the vocabulary: give --vocab-file"):
        read_megatron(tmp_path)
    with pytest.raises(UserError, match=r"fewer than 128 rows of padding after the vocabulary's 30, found 384 in all"):
        read_megatron(tmp_path, TokenizerConfig(vocab_size=30))
    with pytest.raises(UserError, match=r"at least the 385 rows of the vocabulary given, found 384"):
        read_megatron(tmp_path, TokenizerConfig(vocab_size=385))
