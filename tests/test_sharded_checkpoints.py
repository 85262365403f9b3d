"""Real processes over gloo: what ranks of one layout saved, any other reads bit for bit; a fault is everybody's."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_ranks import ALL, LAYOUTS, SHAPES, load_all, same, save_all
from safetensors.torch import load_file
from small_training import newest_whole

from megatron.checkpointing import checkpoint as checkpoints
from megatron.checkpointing.commit import reap_temporary
from megatron.checkpointing.export import export_weights
from megatron.checkpointing.manifest import read_manifest
from megatron.checkpointing.saver import Saver
from megatron.checkpointing.tensors import read_tensors, stored_tensors
from megatron.checkpointing.verification import verify_checkpoint
from megatron.distributed.world import World
from megatron.errors import UserError

PROGRAM = Path(__file__).with_name("checkpoint_ranks.py")
RETENTION = Path(__file__).with_name("retention_ranks.py")
PATHS = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
ENVIRONMENT = os.environ | {"PYTHONPATH": PATHS, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
SECONDS = 120
ALONE = {"alone": World()}


def run(
    parts: str, directory: Path, ranks: int, statuses: tuple[int, ...] | None = None, program: Path = PROGRAM
) -> list[dict[str, Any]]:
    """What each of `ranks` processes printed; they must end with `statuses` (default: 0)."""
    processes = [
        subprocess.Popen(
            [sys.executable, str(program), parts, str(directory), str(rank), str(ranks)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=ENVIRONMENT,
        )
        for rank in range(ranks)
    ]
    deadline = time.monotonic() + SECONDS
    try:
        told = [process.communicate(timeout=max(1.0, deadline - time.monotonic())) for process in processes]
    finally:
        for process in processes:
            process.kill()
    found = tuple(process.returncode for process in processes)
    assert found == (statuses or (0,) * ranks), "\n".join(errors for _, errors in told)
    return [json.loads(output) if output else {} for output, _ in told]


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of four ranks saw of each fault."""
    return run("faults", tmp_path_factory.mktemp("faults"), 4)


def test_every_layout_loads_what_every_layout_saved(tmp_path: Path) -> None:
    """One test, since its processes take long to start: bits, shards and exports of all layouts."""
    save_all(tmp_path, ALONE)
    run("save", tmp_path, 2)
    of_four = run("save+load", tmp_path, 4)
    of_two = run("load", tmp_path, 2)
    of_one = [load_all(tmp_path, ALONE)]
    seen = {pair: [s[pair] for s in ranks] for ranks in (of_one, of_two, of_four) for pair in ranks[0]}
    sizes = {name: ranks for ranks, layouts in LAYOUTS.items() for name in layouts}
    assert seen == {f"{a} to {b}": [True] * sizes[b] for a in ALL for b in ALL}
    for name in ALL:
        path = tmp_path / name / "iter_0000002"
        files = [file for file in read_manifest(path).files if file.startswith("shard-")]
        assert files == [f"shard-{n:05d}-model-00001-of-00001.safetensors" for n in range(1, sizes[name] + 1)]
        stored = stored_tensors(path)  # refuses a tensor of which a value is missing or there twice
        assert len(stored) == 4 * len(SHAPES) + 1
        verdict = verify_checkpoint(path)
        assert (verdict.faults, verdict.tensors) == ([], len(stored)), (
            "the pieces of every layout make up whole tensors"
        )
        export_weights(tmp_path / name, tmp_path / "out.safetensors", dtype=None, force=True)
        exported, expected = load_file(tmp_path / "out.safetensors"), load_file(tmp_path / f"{name}.expected")
        weights = {key.removeprefix("model."): value for key, value in expected.items() if key.startswith("model.")}
        assert same(exported, weights)


def test_rank_that_cannot_write_fails_the_save_of_all(faults: list[dict[str, Any]]) -> None:
    assert [seen["write"][0] for seen in faults] == ["SharedError", "SharedError", "UserError", "SharedError"]
    for seen in faults:
        assert "iter_0000002.tmp-" in seen["write"][1] and "disk full" in seen["write"][1]
        assert seen["write"][2], "nothing is left behind, and the old checkpoint is whole"


def test_commit_that_fails_on_rank_0_fails_the_save_of_all(faults: list[dict[str, Any]]) -> None:
    assert [seen["commit"][0] for seen in faults] == ["UserError", "SharedError", "SharedError", "SharedError"]
    assert all("disk full" in seen["commit"][1] and seen["commit"][2] for seen in faults)


def test_damaged_file_is_refused_by_every_rank(faults: list[dict[str, Any]]) -> None:
    shards = [f"shard-{rank:05d}-model-00001-of-00001.safetensors" for rank in range(1, 5)]
    told_by = set()
    for name in [*shards, "config.yaml", "state.json"]:
        kinds = [seen[f"damaged {name}"][0] for seen in faults]
        assert sorted(kinds) == ["SharedError"] * 3 + ["UserError"]
        told_by.add(kinds.index("UserError"))
        for seen in faults:
            assert name in seen[f"damaged {name}"][1] and "expected crc32" in seen[f"damaged {name}"][1]
    assert len(told_by) > 1, "ranks share the work"
    assert all(seen["mended"] == ["none", "", True] for seen in faults)


def test_model_that_does_not_fit_on_one_rank_is_left_alone_on_all(faults: list[dict[str, Any]]) -> None:
    assert [seen["unfit"][0] for seen in faults] == ["SharedError", "SharedError", "SharedError", "UserError"]
    assert all("model.seen (expected (2,) float32, found () int64)" in seen["unfit"][1] for seen in faults)
    assert all(seen["unfit"][2] for seen in faults)


def test_tensor_on_a_part_of_the_ranks_is_refused(faults: list[dict[str, Any]]) -> None:
    assert all(seen["half a mesh"] == "x is spread over 2 of 4 ranks" for seen in faults)


def test_background_save_holds_the_values_of_its_moment(faults: list[dict[str, Any]]) -> None:
    for rank, seen in enumerate(faults):
        assert seen["not before it is written"] == [[], True]
        assert seen["as it was when save returned"]
        assert [line.split("/")[-1] for line in seen["reports"]] == (["iter_0000001"] if rank == 0 else [])


def test_background_save_that_fails_on_one_rank_is_told_at_the_next(faults: list[dict[str, Any]]) -> None:
    kinds = [seen["failed in the thread"][0] for seen in faults]
    assert kinds == ["SharedError", "UserError", "SharedError", "SharedError"]
    for seen in faults:
        assert "iter_0000002.tmp-" in seen["failed in the thread"][1]
        assert seen["left"] == ["iter_0000001", "latest"]


def test_training_that_fails_lets_the_background_save_finish(faults: list[dict[str, Any]]) -> None:
    assert "iter_0000004" in faults[0]["saved although training failed"][0]
    assert all(seen["whole although training failed"] for seen in faults)


def test_ranks_read_back_let_old_ones_go_and_fall_back_together(tmp_path: Path) -> None:
    """One test, since its processes take long to start."""
    told = run("retention", tmp_path, 2, program=RETENTION)
    background, foreground = ([seen[name] for seen in told] for name in ("background", "foreground"))
    for directory, ranks in (("background", background), ("foreground", foreground)):
        path = tmp_path / directory
        saved = [f"saved {path}/iter_000000{n}" for n in range(1, 6)]
        deleted = [f"deleted iter_000000{n} (--keep-last 2)" for n in (1, 2)]
        assert ranks[0]["reports"] == [*saved[:3], deleted[0], saved[3], deleted[1], saved[4]]
        assert ranks[1]["reports"] == [], "rank 0 speaks and deletes"
        assert all(seen["left"] == ["iter_0000003", "iter_0000004", "iter_0000005"] for seen in ranks)
        shares = [set(seen["read back"]) for seen in ranks]
        files = read_manifest(path / "iter_0000004").files.keys()
        assert shares[0] | shares[1] == files and not shares[0] & shares[1], "each file once"
        assert all(share & {name for name in files if name.startswith("shard-")} for share in shares)

    for rank, seen in enumerate(told):
        kind, message = seen["spoilt"]
        assert kind == ("UserError" if rank == 1 else "SharedError")
        assert "expected crc32" in message and "none was deleted" in message
        assert seen["left with a spoilt one"] == [f"iter_000000{n}" for n in (3, 4, 5, 6)]
        kind, message = seen["refused"]
        assert kind == ("UserError" if rank == 1 else "SharedError")
        assert "iter_0000006/shard-00002" in message and "iter_0000005: name it with --load; training" in message
        assert seen["fallen back"] == 5
    (line,) = told[0]["left behind"]
    assert "iter_0000006 is damaged and left behind: rank 1: " in line and "shard-00002" in line
    assert told[1]["left behind"] == []


@pytest.mark.parametrize("ranks", [1, 2])
def test_kill_during_a_background_save_leaves_the_one_before(tmp_path: Path, ranks: int) -> None:
    seen = run("killed", tmp_path, ranks, (0,) * (ranks - 1) + (-9,))
    if ranks > 1:
        kind, message = seen[0]["close"]
        gone = r"another rank is gone \([\w .:\[\]]{5,80}\)"  # not all of gloo's text
        after = "what was saved before is whole"
        assert kind == "UserError"
        assert re.fullmatch(rf"cannot save step 2 to {tmp_path}: {gone}; {after}", message), message
    assert newest_whole(tmp_path) == tmp_path / "iter_0000001"
    reap_temporary(tmp_path)
    assert sorted(path.name for path in tmp_path.glob("iter*")) == ["iter_0000001"]
    assert load_all_of(tmp_path / "iter_0000001")


def load_all_of(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint that has no fault."""
    checkpoints.load_checkpoint(path)
    return read_tensors(path)


def save(saver: Saver, iteration: int, tensors: dict[str, torch.Tensor]) -> None:
    saver.save(iteration=iteration, tensors=tensors, state={}, config_text="")


def test_background_in_a_single_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changed, real, threads, lines = threading.Event(), checkpoints.write_pieces, set(), []

    def write_later(*args: Any) -> list[str]:
        assert changed.wait(30)
        threads.add(threading.current_thread())
        return real(*args)

    monkeypatch.setattr(checkpoints, "write_pieces", write_later)
    x = torch.arange(6.0).reshape(2, 3)
    tensors = {"x": x, "transposed": x.t(), "row": x[1]}
    with Saver(tmp_path, World(), background=True, report=lines.append) as saver:
        save(saver, 1, tensors)
        x.zero_()
        assert newest_whole(tmp_path) is None and lines == []
        changed.set()
        save(saver, 2, tensors)
        assert newest_whole(tmp_path) is not None, "the save before is waited for"
    assert lines == [f"saved {tmp_path / 'iter_0000001'}", f"saved {tmp_path / 'iter_0000002'}"]
    first = load_all_of(tmp_path / "iter_0000001")
    assert torch.equal(first["x"], torch.arange(6.0).reshape(2, 3))
    assert torch.equal(first["transposed"], first["x"].t()) and torch.equal(first["row"], first["x"][1])
    assert not load_all_of(tmp_path / "iter_0000002")["x"].any()
    assert len(threads) == 1 and threading.current_thread() not in threads


def test_foreground_saver_has_saved_when_it_returns(tmp_path: Path) -> None:
    lines: list[str] = []
    with Saver(tmp_path, World(), background=False, report=lines.append) as saver:
        save(saver, 1, {"x": torch.ones(2)})
        assert newest_whole(tmp_path) == tmp_path / "iter_0000001"
        assert lines == [f"saved {tmp_path / 'iter_0000001'}"]


@pytest.mark.parametrize("method", ["save", "wait", "close"])
def test_fault_in_the_thread_is_raised_once_by_what_comes_next(tmp_path: Path, method: str) -> None:
    (tmp_path / "file").write_text("")
    saver = Saver(tmp_path / "file", World(), background=True, report=lambda line: None)
    save(saver, 1, {"x": torch.ones(2)})
    with pytest.raises(UserError, match=r"cannot write .*iter_0000001"):
        save(saver, 2, {"x": torch.ones(2)}) if method == "save" else getattr(saver, method)()
    saver.close()


def test_training_fault_comes_before_that_of_a_save(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    lines: list[str] = []
    with (
        pytest.raises(KeyError, match="training"),
        Saver(tmp_path / "file", World(), background=True, report=lines.append) as saver,
    ):
        save(saver, 1, {"x": torch.ones(2)})
        raise KeyError("training")
    assert len(lines) == 1 and "cannot write" in lines[0]


def test_state_that_json_cannot_hold_is_refused_by_save_itself(tmp_path: Path) -> None:
    with (
        Saver(tmp_path / "run", World(), background=True, report=lambda line: None) as saver,
        pytest.raises(TypeError),
    ):
        saver.save(iteration=1, tensors={"x": torch.ones(1)}, state={"a": object()}, config_text="")
    assert not (tmp_path / "run").exists()
