"""Whole runs of pretrain_gpt2.py on several ranks: layouts, resumes by other layouts, stops, deaths, bad layouts."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from whole_runs import ENVIRONMENT, free_port, toy_corpus
from whole_runs import log_of as log_in

ROOT = Path(__file__).parents[1]
MODEL = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 32 --global-batch-size 16 "
    "--micro-batch-size 2 --lr 1e-2 --lr-warmup-iters 4 --split 80,10,10 --eval-iters 1 --eval-interval 7 "
    "--no-tensorboard --log-interval 5 --hidden-dropout 0.0 --attention-dropout 0.0 --seqlen-warmup linear "
    "--seqlen-start 8 --seqlen-warmup-iters 9 --lr-decay-iters 14 --train-iters 14 --vocab-size 200 "
    "--seqlen-realisation window "
    "--batch-size-warmup linear --batch-size-start 8 --batch-size-increment 4 --batch-size-warmup-iters 6"
).split()

THREE = "--global-batch-size 12 --batch-size-start 6 --batch-size-increment 3".split()
"""For three data parallel ranks."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> str:
    return toy_corpus(tmp_path_factory.mktemp("corpus"), documents=100, tokens=100, vocabulary=200)


def trainer(corpus: str, home: Path, *flags: str) -> list[str]:
    return [str(ROOT / "pretrain_gpt2.py"), "--data-path", corpus, *MODEL, "--save", str(home), *flags]


def torchrun(corpus: str, home: Path, ranks: int, *flags: str) -> subprocess.CompletedProcess[str]:
    """One process without torchrun, several with it, to their end."""
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
        launcher += ["--nproc-per-node", str(ranks)]
    return subprocess.run(
        [*launcher, *trainer(corpus, home, *flags)],
        capture_output=True, text=True, check=False, env=ENVIRONMENT, timeout=240,
    )  # fmt: skip


def ranks_by_hand(corpus: str, home: Path, ranks: int, *flags: str) -> list[subprocess.Popen[str]]:
    """Ranks without torchrun, which would notice a death itself."""
    port = free_port()
    environment = ENVIRONMENT | {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
    return [
        subprocess.Popen(
            [sys.executable, *trainer(corpus, home, *flags)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_PORT": str(port)},
        )
        for rank in range(ranks)
    ]  # fmt: skip


def log_of(home: Path) -> list[dict]:
    return log_in(home, float)


def wait_for_step(home: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        log = home / "metrics.jsonl"
        if log.exists() and f'"iteration": {step},' in log.read_text():
            return
        time.sleep(0.02)
    pytest.fail(f"step {step} was not reached")


def exit_of(home: Path) -> tuple[str, int]:
    marker = json.loads((home / "exit.json").read_text())
    return marker["status"], marker["iteration"]


def same_numbers(found: list[dict], expected: list[dict]) -> None:
    assert [e["iteration"] for e in found] == [e["iteration"] for e in expected]
    for a, b in zip(found, expected, strict=True):
        for name, value in b.items():
            if isinstance(value, float | dict):
                assert a[name] == pytest.approx(value, rel=1e-4 if name.startswith("adam") else 1e-5), name
            else:
                assert a[name] == value, name


@pytest.fixture(scope="module")
def alone(corpus, tmp_path_factory) -> Path:
    """One process, from the first step to the last."""
    home = tmp_path_factory.mktemp("alone") / "run"
    result = torchrun(corpus, home, 1)
    assert result.returncode == 0, result.stderr
    assert exit_of(home) == ("finished", 14)
    return home


@pytest.fixture(scope="module")
def stopped(corpus, tmp_path_factory) -> Path:
    """dp 2 x tp 2, stopped in the warmup, after step 6."""
    home = tmp_path_factory.mktemp("stopped") / "run"
    result = torchrun(corpus, home, 4, "--tensor-model-parallel-size", "2", "--exit-interval", "6")
    assert result.returncode == 0, result.stderr
    assert "stopped by --exit-interval 6; saved at step 6" in result.stdout
    assert exit_of(home) == ("stopped", 6)
    return home


LAYOUTS = [
    pytest.param(1, [], id="one process"),
    pytest.param(4, ["--zero-stage", "3"], id="dp4"),
    pytest.param(2, ["--tensor-model-parallel-size", "2", "--sequence-parallel"], id="tp2"),
]


@pytest.mark.parametrize(("ranks", "flags"), LAYOUTS)
def test_what_one_layout_saved_any_other_continues(corpus, alone, stopped, tmp_path, ranks, flags):
    home = tmp_path / "run"
    home.mkdir()
    (home / "metrics.jsonl").write_text((stopped / "metrics.jsonl").read_text())
    (home / "checkpoints").symlink_to(stopped / "checkpoints")
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-rL", str(home), str(copy)], check=True)
    result = torchrun(corpus, copy, ranks, "--load", str(copy), *flags)
    assert result.returncode == 0, result.stderr
    assert "saved as dp 2 x tp 2, ZeRO 2, now dp" in result.stdout
    assert "not bit for bit" in result.stdout
    same_numbers(log_of(copy), log_of(alone))


def test_the_same_layout_continues_bit_for_bit(corpus, tmp_path):
    """With dropout and a reduction in bf16, over --async-save, against a run that was not stopped."""
    flags = ["--tensor-model-parallel-size", "2", "--hidden-dropout", "0.1", "--attention-dropout", "0.1"]
    flags += ["--grad-reduce-in-bf16", "--async-save", "--save-interval", "4"]
    straight, cut = tmp_path / "straight", tmp_path / "cut"
    assert torchrun(corpus, straight, 4, *flags).returncode == 0
    assert torchrun(corpus, cut, 4, *flags, "--exit-interval", "6").returncode == 0
    result = torchrun(corpus, cut, 4, *flags, "--load", str(cut))
    assert result.returncode == 0, result.stderr
    assert "dp 2 x tp 2, ZeRO 2, gradients reduced in bf16" in result.stdout
    assert log_of(cut) == log_of(straight)
    assert sorted(p.name for p in (cut / "checkpoints").glob("iter_*")) == [
        f"iter_{i:07d}" for i in (4, 6, 8, 12, 14)
    ]  # fmt: skip
    shards = [
        {p.name: p.read_bytes() for p in (home / "checkpoints/iter_0000014").glob("*.safetensors")}
        for home in (straight, cut)
    ]
    assert len(shards[0]) == 4
    assert shards[0] == shards[1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_one_rank_stops_all_at_the_same_step(corpus, tmp_path, number):
    home = tmp_path / "run"
    processes = ranks_by_hand(corpus, home, 2, "--train-iters", "100000", "--lr-decay-iters", "100000")
    try:
        wait_for_step(home, 3)
        processes[1].send_signal(number)
        told = [process.communicate(timeout=60) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [75, 75], told
    step = log_of(home)[-1]["iteration"]
    assert exit_of(home) == ("stopped", step)
    assert "stopped by a signal to another rank" in told[0][0]
    assert (home / "checkpoints" / f"iter_{step:07d}").is_dir()


@pytest.mark.parametrize(("victim", "number"), [(1, signal.SIGKILL), (0, signal.SIGKILL)])
def test_a_rank_that_dies_is_named_and_the_others_leave(corpus, tmp_path, victim, number):
    home = tmp_path / "run"
    processes = ranks_by_hand(corpus, home, 3, *THREE, "--train-iters", "100000")
    try:
        wait_for_step(home, 3)
        processes[victim].send_signal(number)
        told = [process.communicate(timeout=60)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    others = [process.returncode for rank, process in enumerate(processes) if rank != victim]
    assert others == [1, 1]
    said = "\n".join(told)
    assert f"rank {victim} (host" in said
    assert f"pid {processes[victim].pid}" in said
    assert f"; the run ends here; no checkpoint was saved yet: start it again with --load {home}, from" in said


def test_a_rank_that_hangs_is_named(corpus, tmp_path):
    home = tmp_path / "run"
    flags = ["--train-iters", "100000", "--distributed-timeout-minutes", "0.25"]
    processes = ranks_by_hand(corpus, home, 2, *flags)
    try:
        wait_for_step(home, 3)
        processes[1].send_signal(signal.SIGSTOP)
        told = processes[0].communicate(timeout=60)[1]
    finally:
        for process in processes:
            process.kill()
    assert processes[0].returncode == 1
    assert "rank 1 (host" in told
    assert "does not answer" in told


@pytest.mark.parametrize(
    ("ranks", "flags", "message"),
    [
        (2, ["--global-batch-size", "9", "--micro-batch-size", "9", "--batch-size-start", "9"],
         "--global-batch-size 9 must be a multiple of the 2 data parallel ranks"),
        (2, ["--micro-batch-size", "16"], "--micro-batch-size 16 times the 2 data parallel ranks"),
        (3, ["--tensor-model-parallel-size", "2"], "--tensor-model-parallel-size 2 must divide the number of ranks"),
        (3, ["--global-batch-size", "2", "--batch-size-start", "2"], "more data parallel ranks (3) than sequences"),
        (2, ["--tensor-model-parallel-size", "3"], "must divide --num-attention-heads 4: use 1, 2, 4"),
        (2, ["--tensor-model-parallel-size", "2", "--make-vocab-size-divisible-by", "1", "--vocab-size", "201"],
         "--tensor-model-parallel-size 2 must divide the padded vocabulary, found 201"),
        (2, ["--tensor-model-parallel-size", "2", "--grad-reduce-in-bf16"],
         "--grad-reduce-in-bf16 has no effect on a single data parallel rank (ranks 2, tp 2)"),
        (2, ["--device", "cuda"], "--device cuda: no CUDA device is available; use --device cpu"),
        (2, ["--optimizer-cpu-offload", "--device", "cpu"], "--optimizer-cpu-offload moves state out of a GPU"),
        (2, ["--load", "/nowhere"], "--load /nowhere: no checkpoint found there"),
        (2, ["--data-path", "/nowhere"], "/nowhere"),
    ],
)  # fmt: skip
def test_bad_layouts_and_input_are_one_clear_line(corpus, tmp_path, ranks, flags, message):
    if "--device" in flags and "cuda" in flags:
        import torch

        if torch.cuda.is_available():
            pytest.skip("there is a GPU")
    processes = ranks_by_hand(corpus, tmp_path / "run", ranks, *flags)
    told = [process.communicate(timeout=60)[1] for process in processes]
    assert all(process.returncode == 1 for process in processes)
    assert message in "\n".join(told)
    speakers = ranks if "--device" in flags else 1  # whether a rank has its device only that rank can tell
    assert "\n".join(told).count("error: ") == speakers, "one rank speaks for all"
    assert not any("Traceback" in said for said in told)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "2"}, "RANK must be a number where WORLD_SIZE is set"),
        ({"WORLD_SIZE": "2", "RANK": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}, "contradicts itself: RANK 2"),
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}, "MASTER_ADDR"),
        ({"SLURM_STEP_NUM_TASKS": "8"}, "SLURM_STEP_NUM_TASKS is 8, but WORLD_SIZE is not set"),
    ],
)
def test_an_environment_that_is_not_torchruns(corpus, tmp_path, environment, message):
    result = subprocess.run(
        [sys.executable, *trainer(corpus, tmp_path / "run")],
        capture_output=True, text=True, check=False, env=ENVIRONMENT | environment, timeout=60,
    )  # fmt: skip
    assert result.returncode == 1
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_two_nodes(corpus, alone, tmp_path):
    """Two torchruns that meet, as two nodes would, with tensor parallelism between them."""
    port = free_port()
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    launcher += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--local-addr", "127.0.0.1"]
    program = trainer(corpus, tmp_path / "run", "--tensor-model-parallel-size", "2")
    nodes = [
        subprocess.Popen(
            [*launcher, *program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
        )
        for _ in range(2)
    ]
    try:
        told = [node.communicate(timeout=200) for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0, 0], told
    same_numbers(log_of(tmp_path / "run"), log_of(alone))


def test_restarts_go_on_from_the_last_checkpoint(corpus, tmp_path):
    """torchrun --max-restarts: a rank killed twice; the same losses as undisturbed."""
    flags = ["--train-iters", "60", "--lr-decay-iters", "60", "--save-interval", "5", "--eval-interval", "20"]
    straight, home = tmp_path / "straight", tmp_path / "run"
    assert torchrun(corpus, straight, 2, *flags).returncode == 0
    # A rank that kills itself at steps 12 and 33, each time once.
    killer = tmp_path / "killer.py"
    killer.write_text(
        f"import os, signal, sys\nsys.path.insert(0, {str(ROOT)!r})\n"
        "import pretrain_gpt2\nfrom megatron import errors\nfrom megatron.training.loop import Run\n"
        "step = Run.step\n"
        "def fatal(self, plan):\n"
        "    n = self.state.progress.iteration + 1\n"
        f"    mark = {str(tmp_path)!r} + f'/killed{{n}}'\n"
        "    if n in (12, 33) and os.environ['RANK'] == str(n % 2) and not os.path.exists(mark):\n"
        "        open(mark, 'w').close(); os.kill(os.getpid(), signal.SIGKILL)\n"
        "    step(self, plan)\n"
        "Run.step = fatal\n"
        "errors.run(pretrain_gpt2.main)\n"
    )
    launcher = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", "2"]
    program = [str(killer), *trainer(corpus, home, *flags)[1:], "--load", str(home)]
    result = subprocess.run(
        [sys.executable, *launcher, "--max-restarts", "3", *program],
        capture_output=True, text=True, check=False, env=ENVIRONMENT, timeout=240,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "killed12").exists()
    assert (tmp_path / "killed33").exists()
    assert log_of(home) == log_of(straight)
