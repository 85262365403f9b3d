"""Round trips: what was saved is what is loaded, bit for bit, and a resumed run is the run."""

from __future__ import annotations

import copy
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from small_training import SmallModel, Training, newest_whole
from torch import Tensor, nn

from megatron import files
from megatron.arguments import build_parser, parse_config
from megatron.checkpointing import tensors as shards
from megatron.checkpointing.checkpoint import check_space, find_whole, load_checkpoint, save_checkpoint
from megatron.checkpointing.commit import LATEST
from megatron.checkpointing.rng import capture_rng, restore_rng
from megatron.checkpointing.state import collect, restore
from megatron.checkpointing.tensors import own_pieces, read_tensors, write_pieces
from megatron.distributed.parallelize import parallelize
from megatron.distributed.world import ALONE
from megatron.errors import UserError
from megatron.model.gpt2 import GPT2Model

N = 3


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """Equal names, types and bits."""
    return left.keys() == right.keys() and all(bits(left[name]) == bits(right[name]) for name in left)


def bits(tensor: Tensor) -> tuple[object, ...]:
    return tensor.dtype, tensor.shape, tensor.contiguous().numpy().tobytes()


def snapshot(training: Training) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in collect(training.model, training.optimizer).items()}


def write(directory: Path, tensors: dict[str, Tensor]) -> Path:
    """The shards of `tensors`, and nothing else."""
    directory.mkdir(exist_ok=True)
    write_pieces(directory, own_pieces(tensors, ALONE), 0)
    return directory


@pytest.fixture
def odd_tensors() -> dict[str, Tensor]:
    """Every type and shape that training state has, and values that a careless path would change."""
    big = torch.arange(24.0).reshape(4, 6)
    return {
        "bfloat16": torch.randn(5).bfloat16().float(),
        "empty": torch.zeros(0, 3),
        "int64": torch.tensor([2**62, -1]),
        "nan": torch.tensor([float("nan"), float("inf"), -0.0, 1e-45]),
        "scalar": torch.tensor(3.0),
        "transposed": big.t(),
        "uint8": torch.arange(256, dtype=torch.uint8),
        "view": big[1:3],
    }


def test_tensors_come_back_bit_for_bit(tmp_path: Path, odd_tensors: dict[str, Tensor], monkeypatch) -> None:
    monkeypatch.setattr(shards, "FILE_BYTES", 64)
    write(tmp_path, odd_tensors)
    assert len(list(tmp_path.iterdir())) > 2
    assert same(odd_tensors, read_tensors(tmp_path))
    assert list(read_tensors(tmp_path, "un")) == []
    assert list(read_tensors(tmp_path, "u")) == ["uint8"]


def test_bfloat16_comes_back(tmp_path: Path) -> None:
    value = torch.randn(7).bfloat16()
    write(tmp_path, {"x": value})
    assert torch.equal(read_tensors(tmp_path)["x"].view(torch.int16), value.view(torch.int16))


def test_checkpoint_is_plain_files_without_pickle(tmp_path: Path) -> None:
    path = Training().save(tmp_path)
    assert path == tmp_path / "iter_0000000"
    assert sorted(p.name for p in path.iterdir()) == [
        "config.yaml",
        "manifest.json",
        "shard-00001-model-00001-of-00001.safetensors",
        "state.json",
    ]
    assert (tmp_path / LATEST).read_text() == "iter_0000000\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["iter_0000000", LATEST]
    modes = {p.stat().st_mode & 0o777 for p in path.iterdir()}
    assert len(modes) == 1, "all files can be read by the same people"


@pytest.mark.parametrize("fused", [False, True])
def test_round_trip_of_weights_moments_steps_and_generators(tmp_path: Path, fused: bool) -> None:
    training = Training(fused=fused)
    training.run(N)
    before, drawn_from = snapshot(training), capture_rng()
    path = training.save(tmp_path)
    checkpoint = load_checkpoint(path)
    other = Training(fused=fused)
    assert not same(before, snapshot(other))
    other.take(path)
    assert same(before, snapshot(other))
    assert capture_rng() == drawn_from
    assert checkpoint.iteration == N
    assert checkpoint.config_text == "lr: 1e-2\n"


@pytest.mark.parametrize("fused", [False, True])
def test_resumed_run_equals_straight_run(tmp_path: Path, fused: bool) -> None:
    straight = Training(fused=fused)
    expected = straight.run(2 * N)
    first = Training(fused=fused)
    assert first.run(N) == expected[:N]
    path = first.save(tmp_path)
    second = Training(fused=fused)
    second.take(path)
    assert second.run(2 * N) == expected[N:]
    assert same(snapshot(straight), snapshot(second))
    assert capture_rng() is not None and straight.progress == second.progress


def test_resume_in_a_fresh_process_equals_straight_run(tmp_path: Path) -> None:
    def run(until: int) -> list[str]:
        program = Path(__file__).with_name("small_training.py")
        command = [sys.executable, str(program), str(tmp_path / "resumed"), str(until)]
        paths = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": paths}, timeout=120
        )
        return json.loads(done.stdout)

    straight = Training()
    expected = straight.run(2 * N)
    assert run(N) + run(2 * N) == expected
    path = straight.save(tmp_path / "straight")
    resumed = tmp_path / "resumed" / path.name
    assert (resumed / "manifest.json").read_bytes() == (path / "manifest.json").read_bytes(), "equal in every file"


FIELDS = ["python", "numpy", "torch", "progress", "exp_avg", "exp_avg_sq", "step", "model"]


@pytest.mark.parametrize("field", FIELDS)
def test_negative_control_each_field_left_out_changes_the_run(tmp_path: Path, field: str) -> None:
    first = Training()
    first.run(N)
    path = first.save(tmp_path)
    expected = first.run(2 * N)
    second = Training()
    fresh_tensors, fresh_state = snapshot(second), second.state()
    second.take(path)
    tensors, state = collect(second.model, second.optimizer), copy.deepcopy(load_checkpoint(path).state)
    if field in ("python", "numpy", "torch"):
        state["rng"][field] = fresh_state["rng"][field]
    elif field == "progress":
        state["progress"]["iteration"] = N - 1
    else:
        chosen = [n for n in tensors if n.endswith("." + field) or n.startswith(field + ".")]
        assert chosen
        for name in chosen:
            tensors[name].copy_(fresh_tensors[name])
    second.take_state(state)
    assert second.run(2 * N)[-N:] != expected


def test_tied_weight_is_stored_once_and_stays_tied(tmp_path: Path) -> None:
    training = Training()
    names = collect(training.model, training.optimizer)
    assert "model.embedding.weight" in names and "model.head.weight" not in names
    restore(training.model, training.optimizer, training.save(tmp_path))
    assert training.model.head.weight is training.model.embedding.weight


def test_buffers_are_stored_if_they_persist() -> None:
    names = collect(SmallModel())
    assert "model.seen" in names and "model.scratch" not in names


def test_names_do_not_depend_on_compilation_and_recomputation() -> None:
    names = []
    for flags in ("", "--compile on --recompute-granularity full"):
        shape = "--num-layers 2 --hidden-size 16 --num-attention-heads 2 --seq-length 8 --train-iters 1"
        config, _ = parse_config(build_parser(), f"{shape} {flags}".split())
        with torch.device("meta"):
            model = GPT2Model(config.model, 64)
        parallelize(model, ALONE, config.parallel, config.training, print)
        names.append(list(collect(model)))
    assert names[0] == names[1]
    assert "model.blocks.1.mlp.up.weight" in names[0], names[0]


def test_names_do_not_depend_on_which_parameters_had_gradients() -> None:
    training = Training()
    before = list(collect(training.model, training.optimizer))
    training.run(1)
    assert list(collect(training.model, training.optimizer)) == before
    assert "optim.unused.exp_avg_sq" in before


def test_restored_zeros_act_like_an_optimizer_without_state(tmp_path: Path) -> None:
    plain, restored = Training(fused=True), Training(fused=True)
    state = restored.state()
    restored.take(restored.save(tmp_path))
    losses = restored.run(N)
    restore_rng(state["rng"])
    assert plain.run(N) == losses


def test_weights_alone_can_be_loaded(tmp_path: Path) -> None:
    trained, fresh = Training(), SmallModel()
    trained.run(1)
    restore(fresh, None, trained.save(tmp_path))
    assert same(collect(fresh), collect(trained.model))


def test_weights_without_optimizer_state_are_refused_for_a_resume(tmp_path: Path) -> None:
    training = Training()
    with pytest.raises(UserError, match=r"18 missing: optim.*saved without optimizer state"):
        restore(training.model, training.optimizer, write(tmp_path, collect(training.model)))


def test_mismatches_are_listed_and_nothing_is_changed(tmp_path: Path) -> None:
    destination = nn.ParameterDict({name: torch.zeros(size) for name, size in (("a", 2), ("b", 3), ("c", 1), ("d", 1))})
    saved = {"a": torch.ones(2), "b": torch.ones(4), "d": torch.ones(1).double(), "z": torch.ones(1)}
    with pytest.raises(UserError) as caught:
        restore(destination, None, write(tmp_path, {f"model.{name}": tensor for name, tensor in saved.items()}))
    message = str(caught.value)
    assert "1 missing: model.c" in message and "1 unexpected: model.z" in message
    assert "model.b (expected (3,) float32, found (4,) float32)" in message
    assert "model.d (expected (1,) float32, found (1,) float64)" in message
    assert destination["a"].sum() == 0


def test_foreign_optimizer_state_is_not_dropped_silently() -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters(), amsgrad=True)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    with pytest.raises(ValueError, match="max_exp_avg_sq"):
        collect(model, optimizer)


def test_generators_continue_through_json() -> None:
    random.gauss(0, 1), np.random.randn()  # both now hold a second, cached number
    state = json.loads(json.dumps(capture_rng()))

    def draw() -> list[float]:
        return [random.gauss(0, 1), random.random(), np.random.randn(), np.random.rand(), torch.rand(1).item()]

    expected = draw()
    restore_rng(state)
    assert draw() == expected


@pytest.mark.parametrize("change", [{"python": None}, {"numpy": [1]}, {"torch": "not base64!"}, {"torch": "AAAA"}])
def test_unusable_generator_state_is_refused(change: dict[str, object]) -> None:
    before = capture_rng()
    with pytest.raises(UserError, match="--no-load-rng"):
        restore_rng(before | change)
    restore_rng(before)


def test_saving_the_same_state_again_keeps_what_is_there(tmp_path: Path) -> None:
    training = Training()
    path = training.save(tmp_path)
    inode = path.stat().st_ino
    assert training.save(tmp_path).stat().st_ino == inode
    training.run(1)
    training.progress.iteration = 0
    training.save(tmp_path)
    load_checkpoint(path)
    assert same(read_tensors(path), snapshot(training))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["iter_0000000", LATEST]


def test_damaged_checkpoint_of_the_same_iteration_is_replaced(tmp_path: Path) -> None:
    training = Training()
    path = training.save(tmp_path)
    (path / "state.json").write_text("{}")
    training.save(tmp_path)
    assert load_checkpoint(path).state["progress"]["iteration"] == 0


def test_state_that_json_cannot_hold_is_refused_before_writing(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        save_checkpoint(
            tmp_path / "run", iteration=1, tensors={"x": torch.ones(1)}, state={"a": object()}, config_text=""
        )
    assert not (tmp_path / "run").exists()


def test_newest_by_number_not_by_text_or_time(tmp_path: Path) -> None:
    for iteration in (12_345_678, 9_999_999, 500):
        save_checkpoint(
            tmp_path, iteration=iteration, tensors={"x": torch.ones(1)}, state={"low": float("inf")}, config_text=""
        )
    found = find_whole(tmp_path, fallback=False)
    assert found is not None and found.path.name == "iter_12345678"
    assert found.state == {"low": float("inf")}
    assert newest_whole(tmp_path / "iter_0000500") == tmp_path / "iter_0000500"
    assert newest_whole(tmp_path / "nowhere") is None


def test_new_directories_are_on_the_disk_before_anything_is_written_into_them(tmp_path: Path, monkeypatch) -> None:
    """A power cut must not take away the directory in which a checkpoint stands."""
    order: list[tuple[str, Path]] = []
    mkdir, sync = os.mkdir, files.fsync_file
    monkeypatch.setattr(os, "mkdir", lambda path, *mode: (order.append(("mkdir", Path(path))), mkdir(path, *mode)))
    monkeypatch.setattr(files, "fsync_file", lambda path: (order.append(("fsync", path)), sync(path)))
    directory = tmp_path / "runs" / "mine" / "checkpoints"
    save_checkpoint(directory, iteration=1, tensors={"x": torch.ones(1)}, state={}, config_text="")
    made = [tmp_path / "runs", tmp_path / "runs/mine", directory]
    assert order[:6] == [step for path in made for step in (("mkdir", path), ("fsync", path.parent))]
    assert order[6][0] == "mkdir" and ".tmp-" in order[6][1].name
    save_checkpoint(directory, iteration=2, tensors={"x": torch.ones(1)}, state={}, config_text="")
    assert ("fsync", directory.parent) not in order[7:], "only what is new"


def test_check_space(tmp_path: Path, monkeypatch) -> None:
    check_space(tmp_path / "new", {"x": torch.ones(4)})
    assert list((tmp_path / "new").iterdir()) == []
    with pytest.raises(UserError, match=r"disk full: a checkpoint in .* takes 4000000.00 GB"):
        check_space(tmp_path, {"x": torch.empty(10**15, device="meta")})
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*file"):
        check_space(tmp_path / "file", {})
