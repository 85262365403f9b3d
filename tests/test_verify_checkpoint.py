"""tools/verify_checkpoint.py: what it finds, what it counts, and how it ends."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from megatron.checkpointing import tensors as shards
from megatron.checkpointing.checkpoint import save_checkpoint
from megatron.checkpointing.manifest import MANIFEST, Manifest, describe, read_manifest
from megatron.checkpointing.tensors import Piece, write_pieces
from megatron.checkpointing.verification import Box, covers, verify_checkpoint

TOOL = Path(__file__).parents[1] / "tools" / "verify_checkpoint.py"
SHARD = "shard-00001-model-00001-of-00001.safetensors"
NAN, INF = float("nan"), float("inf")
TENSORS = {
    "model.a": torch.tensor([[0.5, -7.25], [1.0, 2.0]]),
    "model.half": torch.tensor([3.0, 1.0], dtype=torch.bfloat16),
    "model.seen": torch.tensor(1000),
    "model.empty": torch.zeros(0, 3),
    "optim.a.exp_avg": torch.full((2, 2), 9.0),
    "optim.a.step": torch.tensor(100.0),
}


def save(directory: Path, iteration: int = 10, **tensors: Tensor) -> Path:
    return save_checkpoint(
        directory, iteration=iteration, tensors=TENSORS | tensors, state={"i": iteration}, config_text="lr: 6e-4\n"
    )


def describe_again(path: Path) -> None:
    """Make the manifest agree with files that were changed."""
    names = [file.name for file in path.iterdir() if file.name != MANIFEST]
    (path / MANIFEST).write_bytes(Manifest(10, describe(path, names)).to_bytes())


def program(*arguments: object) -> tuple[int, str, str]:
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    return done.returncode, done.stdout, done.stderr


def test_whole_checkpoint_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "FILE_BYTES", 16)
    path = save(tmp_path)
    assert len(list(path.glob("*.safetensors"))) == 3
    size = sum(file.stat().st_size for file in path.iterdir() if file.name != MANIFEST)
    verdict = verify_checkpoint(path)
    assert verdict.lines() == [f"{path}: ok, iteration 10, 6 tensors, {size:,} bytes, largest weight 7.25"]


def test_largest_weight_where_there_is_none(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, iteration=1, tensors={"model.x": torch.tensor(2)}, state={}, config_text="")
    assert verify_checkpoint(path).lines()[0].endswith(" bytes, largest weight none")


def test_values_that_are_not_finite_are_counted_in_every_tensor(tmp_path: Path) -> None:
    bad = {"model.half": torch.tensor([NAN, 1.0]).bfloat16(), "optim.a.exp_avg": torch.tensor([[NAN, -INF], [INF, 0]])}
    path = save(tmp_path, **bad)
    assert verify_checkpoint(path).lines() == [
        f"{path / SHARD}: model.half holds 1 NaN and 0 infinite values",
        f"{path / SHARD}: optim.a.exp_avg holds 1 NaN and 2 infinite values",
    ]
    assert verify_checkpoint(path).largest_weight is None


def overwrite(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda path: (path / name).write_bytes(content)


def short_header(path: Path) -> None:
    content = (path / SHARD).read_bytes()
    (path / SHARD).write_bytes(content.replace(b'"shape":[2,2]', b'"shape":[2,3]', 1))


def without_note(path: Path) -> None:
    save_file({"model.a": torch.ones(2)}, path / SHARD)


def noted(offsets: object) -> Callable[[Path], object]:
    note = {"DCP_SHARDING_INFO": json.dumps({"model.a": {"saved_offsets": offsets}})}
    return lambda path: save_file({"model.a": torch.ones(2)}, path / SHARD, metadata=note)


@pytest.mark.parametrize(
    ("change", "name", "told"),
    [
        (overwrite("state.json", b"{"), "state.json", "not valid JSON"),
        (overwrite("state.json", b"\xff"), "state.json", "not valid JSON"),
        (overwrite("state.json", b"[" * 100_000), "state.json", "not valid JSON"),
        (overwrite("state.json", b"[]"), "state.json", "expected an object, found a list"),
        (overwrite("config.yaml", b"a: [1"), "config.yaml", "not valid YAML"),
        (overwrite("config.yaml", b"- a"), "config.yaml", "expected lines of `flag: value`"),
        (overwrite(SHARD, b"\xff" * 64), SHARD, "cannot read the tensors"),
        (short_header, SHARD, "cannot read the tensors"),
        (without_note, SHARD, "cannot read the tensors"),
        (noted([0, 0]), SHARD, "model.a cannot lie at (0, 0)"),
        (noted([-1]), SHARD, "model.a cannot lie at (-1,)"),
        (noted("x"), SHARD, "cannot read the tensors"),
        (noted([1]), "iter_0000010", "the 1 pieces of model.a in its shards do not make up a whole tensor"),
        (lambda path: (path / "state.json").unlink(), MANIFEST, "expected a state.json, found none"),
    ],
)
def test_content_that_agrees_with_its_digest_is_read_too(
    tmp_path: Path, change: Callable[[Path], object], name: str, told: str
) -> None:
    path = save(tmp_path)
    change(path)
    describe_again(path)
    (fault,) = verify_checkpoint(path).faults
    assert name in fault and told in fault and "\n" not in fault


def test_every_damaged_file_is_told_of_at_once(tmp_path: Path) -> None:
    path = save(tmp_path)
    (path / "state.json").unlink()
    (path / "config.yaml").write_text("lr: 6e-5\n")
    (path / SHARD).write_bytes((path / SHARD).read_bytes()[:-1])
    shutil.copy(path / SHARD, path / "shard-00002-model-00001-of-00001.safetensors")
    begins = ["missing", "not in the", "damaged, expected crc32", "damaged, expected"]
    names = ["state.json", "shard-00002-model-00001-of-00001.safetensors", "config.yaml", SHARD]
    faults = verify_checkpoint(path).faults
    assert len(faults) == 4
    for name, words in zip(names, begins, strict=True):
        assert any(fault.startswith(f"{path / name}: {words}") for fault in faults)


def test_name_of_another_iteration_is_a_fault(tmp_path: Path) -> None:
    shutil.copytree(save(tmp_path), tmp_path / "iter_0000020")
    assert verify_checkpoint(tmp_path / "iter_0000020").faults == [
        f"{tmp_path / 'iter_0000020' / MANIFEST}: expected iteration 20, found 10"
    ]


def test_pieces_of_other_types_or_twice_there_do_not_make_a_tensor(tmp_path: Path) -> None:
    path = save(tmp_path)
    told = f"{path}: the 2 pieces of model.a in its shards do not make up a whole tensor"
    single, double = torch.ones(2), torch.ones(2, dtype=torch.float64)
    for second, start, faults in [(single, 2, []), (double, 2, [told]), (single, 1, [told]), (single, 3, [told])]:
        write_pieces(path, [Piece("model.a", (0,), single)], 0)
        write_pieces(path, [Piece("model.a", (start,), second)], 1)
        describe_again(path)
        assert verify_checkpoint(path).faults == faults


@st.composite
def layouts(draw: st.DrawFn) -> list[Box]:
    """Boxes that came from cutting a tensor again and again, and some of them moved, dropped or doubled."""
    whole = tuple(draw(st.lists(st.integers(0, 4), max_size=3)))
    boxes = [((0,) * len(whole), whole)]
    for _ in range(draw(st.integers(0, 3)) if whole else 0):
        offsets, shape = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        d = draw(st.integers(0, len(whole) - 1))
        n = draw(st.integers(0, shape[d]))
        boxes.append((offsets, (*shape[:d], n, *shape[d + 1 :])))
        boxes.append(((*offsets[:d], offsets[d] + n, *offsets[d + 1 :]), (*shape[:d], shape[d] - n, *shape[d + 1 :])))
    if draw(st.booleans()):
        index = draw(st.integers(0, len(boxes) - 1))
        offsets, shape = boxes[index]
        boxes[index] = tuple(o + draw(st.integers(0, 1)) for o in offsets), shape
        boxes += draw(st.lists(st.sampled_from(boxes), max_size=1))
    return [Box(offsets, shape, torch.float32) for offsets, shape in boxes]


@given(layouts())
def test_cover_is_that_of_counting_every_value(boxes: list[Box]) -> None:
    size = [max(b.offsets[d] + b.shape[d] for b in boxes) for d in range(len(boxes[0].shape))]
    count = torch.zeros(size)
    for box in boxes:
        count[tuple(slice(o, o + n) for o, n in zip(box.offsets, box.shape, strict=True))] += 1
    assert covers(boxes) == bool((count == 1).all())


def test_program_over_a_run(tmp_path: Path) -> None:
    directory = tmp_path / "run" / "checkpoints"
    for iteration in (5, 10):
        save(directory, iteration)
    (directory / "iter_0000020.tmp-0123abcd").mkdir()
    status, output, errors = program(tmp_path / "run")
    assert (
        status == 0 and errors == f"{directory / 'iter_0000020.tmp-0123abcd'}: ignored, a save that was not finished\n"
    )
    assert [line.split(", ")[:2] for line in output.splitlines()] == [
        [f"{directory / 'iter_0000010'}: ok", "iteration 10"],
        [f"{directory / 'iter_0000005'}: ok", "iteration 5"],
    ]
    os.unlink(directory / "iter_0000005" / MANIFEST)
    status, output, _ = program(directory / "iter_0000005")
    assert status == 1 and output.startswith(f"{directory / 'iter_0000005' / MANIFEST}: not found")


def test_program_as_json(tmp_path: Path) -> None:
    save(tmp_path, 5, **{"model.a": torch.tensor([NAN])})
    size = sum(entry.size for entry in read_manifest(save(tmp_path, 10)).files.values())
    status, output, errors = program(tmp_path, "--json")
    found = json.loads(output)
    assert (status, errors, found["whole"]) == (1, "", False)
    assert found["checkpoints"][0] == {
        "path": str(tmp_path / "iter_0000010"),
        "faults": [],
        "iteration": 10,
        "tensors": 6,
        "bytes": size,
        "largest_weight": 7.25,
    }
    assert found["checkpoints"][1]["iteration"] == 5 and len(found["checkpoints"][1]["faults"]) == 1


@pytest.mark.parametrize("name", ["", "nowhere"])
def test_program_without_a_checkpoint(tmp_path: Path, name: str) -> None:
    status, output, errors = program(tmp_path / name)
    assert (status, output) == (1, "")
    assert errors.startswith(f"error: {tmp_path / name}: no checkpoint found there; give a run")
