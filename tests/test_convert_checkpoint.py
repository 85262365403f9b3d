"""Exported weights: the model's values and names, in one file that is there whole or not at all."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from megatron.checkpointing.checkpoint import save_checkpoint
from megatron.checkpointing.export import export_weights
from megatron.errors import UserError

TOOL = Path(__file__).parents[1] / "tools" / "convert_checkpoint.py"
WEIGHTS = {"a.weight": torch.tensor([[1.0, 2**-20], [3.0, -70000.0]]), "b": torch.tensor([2, 3])}


def save(directory: Path, iteration: int, factor: int = 1) -> Path:
    tensors = {f"model.{name}": tensor * factor for name, tensor in WEIGHTS.items()}
    tensors |= {"optim.a.weight.exp_avg": torch.ones(2, 2), "optim.a.weight.step": torch.tensor(3.0)}
    return save_checkpoint(directory, iteration=iteration, tensors=tensors, state={}, config_text="")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A run with checkpoints of the steps 1 and 2; the weights of step 1 are twice as large."""
    save(tmp_path / "run" / "checkpoints", 1, 2)
    save(tmp_path / "run" / "checkpoints", 2)
    return tmp_path / "run"


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )


@pytest.mark.parametrize(("below", "factor"), [("", 1), ("checkpoints", 1), ("checkpoints/iter_0000001", 2)])
def test_run_its_checkpoints_or_one_of_them(home: Path, tmp_path: Path, below: str, factor: int) -> None:
    output = tmp_path / "out.safetensors"
    line = export_weights(home / below, output, dtype=None, force=False)
    assert same(load_file(output), {name: tensor * factor for name, tensor in WEIGHTS.items()})
    with safe_open(output, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    path = home / "checkpoints" / ("iter_0000001" if factor == 2 else "iter_0000002")
    assert line == f"{output}: 2 tensors, 6 parameters, {output.stat().st_size} bytes, from {path}"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.safetensors", "run"]


def test_the_directory_of_the_weights_is_made(home: Path, tmp_path: Path) -> None:
    output = tmp_path / "new" / "one" / "weights.safetensors"
    export_weights(home, output, dtype=None, force=False)
    assert output.stat().st_size > 0


def test_dtype_is_that_of_what_is_floating_point(home: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.safetensors"
    export_weights(home, output, dtype="bf16", force=False)
    expected = {"a.weight": WEIGHTS["a.weight"].bfloat16(), "b": WEIGHTS["b"]}
    assert same(load_file(output), expected)


def test_values_that_a_type_cannot_hold_are_refused(home: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.safetensors"
    with pytest.raises(UserError, match=r"--dtype fp16 cannot hold the values of a.weight: use bf16 or fp32"):
        export_weights(home, output, dtype="fp16", force=False)
    assert not output.exists()


def test_nothing_is_overwritten_without_force(home: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.safetensors"
    output.write_text("precious")
    with pytest.raises(UserError, match=r"out.safetensors exists: give --force"):
        export_weights(home, output, dtype=None, force=False)
    assert output.read_text() == "precious"
    export_weights(home, output, dtype=None, force=True)
    assert same(load_file(output), WEIGHTS)


def test_damaged_checkpoint_is_refused(home: Path, tmp_path: Path) -> None:
    shard = next((home / "checkpoints" / "iter_0000002").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    with pytest.raises(UserError, match=rf"{shard.name}: damaged, expected crc32.*iter_0000001"):
        export_weights(home, tmp_path / "out.safetensors", dtype=None, force=False)


def test_write_that_fails_leaves_nothing_behind(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **named: object) -> None:
        Path(str(args[1])).write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("megatron.checkpointing.tensors.save_file", full)
    with pytest.raises(UserError, match=r"cannot write .*out.safetensors: disk full"):
        export_weights(home, tmp_path / "out.safetensors", dtype=None, force=False)
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("load", ["", "missing"])
def test_directory_without_a_checkpoint_is_refused(tmp_path: Path, load: str) -> None:
    with pytest.raises(UserError, match=r"--load .*: no whole checkpoint found there"):
        export_weights(tmp_path / load, tmp_path / "out.safetensors", dtype=None, force=False)


def test_program(home: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.safetensors"
    command = [sys.executable, str(TOOL), "--load", str(home), "--to", "safetensors", "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith(f"{output}: 2 tensors, 6 parameters")
    again = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert again.returncode == 1 and again.stderr.startswith("error: --output ") and again.stdout == ""
