"""Whole runs of pretrain_gpt2.py: resume to the last bit, stops, refusals."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from whole_runs import log_of, toy_corpus

from megatron.config import CheckpointConfig, Config
from megatron.data.indexed_writer import IndexedDatasetWriter
from megatron.distributed.world import World
from megatron.errors import UserError
from megatron.training.home import check_homes, how_to_go_on, layout_name, noting_how_to_go_on
from megatron.training.stop import StopRequest

ROOT = Path(__file__).parents[1]
MODEL = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 2 --seq-length 32 --global-batch-size 64 "
    "--micro-batch-size 16 --lr 1e-2 --lr-warmup-iters 4 --split 80,10,10 --eval-iters 1 --eval-interval 7 "
    "--no-tensorboard --log-interval 5 --hidden-dropout 0.1 --attention-dropout 0.1 "
    "--seqlen-warmup linear --seqlen-start 8 --seqlen-warmup-iters 16 --lr-decay-iters 20 "
    "--batch-size-warmup linear --batch-size-start 48 --batch-size-increment 8 --batch-size-warmup-iters 8"
).split()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> str:
    """400 documents, 40,000 tokens of a vocabulary of 200; 80% of them are 999 samples: step 17 begins epoch 2."""
    return toy_corpus(tmp_path_factory.mktemp("corpus"), documents=400, tokens=100, vocabulary=200)


def command(corpus: str, *arguments: str) -> list[str]:
    return [
        sys.executable,
        str(ROOT / "pretrain_gpt2.py"),
        "--data-path",
        corpus,
        "--vocab-size",
        "200",
        *MODEL,
        *arguments,
    ]


def run(corpus: str, *arguments: str, **kwargs) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command(corpus, *arguments), capture_output=True, text=True, check=False, env=environment, timeout=240, **kwargs
    )


def checkpoint_files(home: Path, iteration: int) -> dict[str, bytes]:
    directory = home / "checkpoints" / f"iter_{iteration:07d}"
    return {p.name: p.read_bytes() for p in directory.glob("*.safetensors")}


@pytest.fixture(scope="module")
def straight(corpus, tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("straight") / "run"
    result = run(corpus, "--train-iters", "20", "--save", str(home))
    assert result.returncode == 0, result.stderr
    return home


def test_the_log_has_every_step_and_the_fields_promised(straight):
    steps = [e for e in log_of(straight) if "event" not in e]
    assert [e["iteration"] for e in steps] == list(range(1, 21))
    want = {
        "iteration", "consumed_samples", "consumed_tokens", "seqlen", "global_batch_size", "lr", "loss", "loss_ratio",
        "position_matched_loss_ratio", "loss_by_position", "grad_norm", "clipped", "skipped", "loss_scale",
        "adam_variance_norm", "adam_variance_max", "adam_momentum_norm",
    }  # fmt: skip
    assert all(set(e) == want for e in steps)
    timed = json.loads((straight / "metrics.jsonl").read_text().partition("\n")[0])
    assert timed["step_seconds"] * timed["tokens_per_second"] == pytest.approx(timed["consumed_tokens"])
    assert timed["seconds"] == timed["step_seconds"] < timed["elapsed_seconds"]
    assert steps[0]["seqlen"] == 8
    assert steps[15]["seqlen"] == 32
    assert steps[-1]["consumed_samples"] == 48 * 3 + 56 * 4 + 64 * 13
    assert steps[-1]["consumed_tokens"] == sum(e["global_batch_size"] * e["seqlen"] for e in steps)
    assert [e["global_batch_size"] for e in steps] == [48] * 3 + [56] * 4 + [64] * 13
    assert [e["iteration"] for e in log_of(straight) if e.get("event") == "validation"] == [7, 14, 20]
    assert [e["iteration"] for e in log_of(straight) if e.get("event") == "test"] == [20]


def test_the_planner_agrees_with_the_run(straight):
    tool = [sys.executable, str(ROOT / "tools/plan_run.py"), "--config", str(straight / "config.yaml"), "--json"]
    planned = json.loads(subprocess.run(tool, capture_output=True, text=True, check=True).stdout)
    last = [e for e in log_of(straight) if "event" not in e][-1]
    assert planned["iterations"] == last["iteration"]
    assert planned["consumed_tokens"] == last["consumed_tokens"]
    assert planned["consumed_samples"] == last["consumed_samples"]


def test_the_resolved_config_reproduces_the_run(corpus, straight, tmp_path):
    again = [
        sys.executable,
        str(ROOT / "pretrain_gpt2.py"),
        "--config",
        str(straight / "config.yaml"),
        "--save",
        str(tmp_path / "r"),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    assert subprocess.run(again, capture_output=True, check=False, env=environment).returncode == 0
    assert log_of(tmp_path / "r") == log_of(straight)


def test_stopped_in_the_warmup_and_resumed_is_the_same_run(corpus, straight, tmp_path):
    """With dropout, across an epoch (step 17) and with validations between."""
    home = tmp_path / "run"
    first = run(corpus, "--train-iters", "20", "--save", str(home), "--load", str(home), "--exit-interval", "9")
    assert first.returncode == 75, first.stderr
    assert "saved at step 9" in first.stdout
    second = run(corpus, "--train-iters", "20", "--save", str(home), "--load", str(home))
    assert second.returncode == 0, second.stderr
    assert "resumed from" in second.stdout
    assert log_of(home) == log_of(straight)
    assert checkpoint_files(home, 20) == checkpoint_files(straight, 20)


def test_killed_in_the_warmup_and_resumed_is_the_same_run(corpus, straight, tmp_path):
    home = tmp_path / "run"
    arguments = ["--train-iters", "20", "--save", str(home), "--load", str(home), "--save-interval", "4"]
    process = subprocess.Popen(
        command(corpus, *arguments), stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    log = home / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (log.exists() and log.read_text().count("\n") >= 7):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run was over before it could be killed"
    again = run(corpus, *arguments)
    assert again.returncode == 0, again.stderr
    assert log_of(home) == log_of(straight)
    assert checkpoint_files(home, 20) == checkpoint_files(straight, 20)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["--bf16", "--fp16"])
def test_stopped_and_resumed_on_a_gpu_is_the_same_run(corpus, tmp_path, precision):
    """With dropout, compiled, saved in the background."""
    whole, home = tmp_path / "whole", tmp_path / "run"
    arguments = ["--train-iters", "20", "--deterministic", "--async-save", "--initial-loss-scale", "1024", precision]
    assert run(corpus, *arguments, "--save", str(whole)).returncode == 0
    first = run(corpus, *arguments, "--save", str(home), "--exit-interval", "9")
    assert first.returncode == 75, first.stderr
    second = run(corpus, *arguments, "--save", str(home), "--load", str(home))
    assert second.returncode == 0, second.stderr
    assert log_of(home) == log_of(whole)
    assert checkpoint_files(home, 20) == checkpoint_files(whole, 20)


@pytest.mark.parametrize("realisation", ["truncate", "reshape", "window"])
def test_adaptive_pacing_resumed_is_the_same_run(corpus, tmp_path, realisation):
    """Stopped between two validations, of which the first let it lengthen and a spike on the way holds back others."""
    warmup = (
        "--unset seqlen-warmup-iters --seqlen-warmup adaptive --seqlen-adaptive-step 8 --eval-interval 3 "
        f"--seqlen-realisation {realisation} --train-iters 14"
    ).split()
    whole, home = tmp_path / "whole", tmp_path / "run"
    assert run(corpus, *warmup, "--save", str(whole), "--num-workers", "0").returncode == 0
    first = run(corpus, *warmup, "--save", str(home), "--exit-interval", "5")
    assert first.returncode == 75, first.stderr
    second = run(corpus, *warmup, "--save", str(home), "--load", str(home))
    assert second.returncode == 0, second.stderr
    assert log_of(home) == log_of(whole)
    lengths = [e["seqlen"] for e in log_of(whole) if "seqlen" in e]
    tokens = [int(e["consumed_tokens"]) for e in log_of(whole) if "seqlen" in e]
    assert lengths[:4] == [8, 8, 8, 16] and lengths == sorted(lengths) and len(set(lengths)) >= 3
    assert tokens[0] == 48 * (8 if realisation == "truncate" else 32)


def test_a_validation_that_is_due_is_made_before_the_next_step(corpus, tmp_path):
    """Stopped in the validation after step 1, twice; then ended after step 2, and made longer."""
    warmup = "--unset seqlen-warmup-iters --seqlen-warmup adaptive --seqlen-adaptive-step 8 --eval-interval 1".split()
    whole, home = tmp_path / "whole", tmp_path / "run"
    assert run(corpus, *warmup, "--train-iters", "5", "--save", str(whole), "--no-test").returncode == 0
    again = [*warmup, "--save", str(home), "--load", str(home), "--no-test"]
    for _ in range(2):
        stopped = run(corpus, *again, "--train-iters", "5", "--exit-duration-in-mins", "1e-9")
        assert stopped.returncode == 75, stopped.stderr
        assert [e["iteration"] for e in log_of(home)] == [1]
    for iterations in ("2", "5"):
        assert run(corpus, *again, "--train-iters", iterations).returncode == 0
    assert log_of(home) == log_of(whole)
    assert [e["seqlen"] for e in log_of(whole) if "seqlen" in e][:3] == [8, 16, 24]


def test_adaptive_pacing_needs_a_validation_split(corpus, tmp_path):
    flags = "--unset seqlen-warmup-iters --seqlen-warmup adaptive --split 100,0,0 --train-iters 2".split()
    result = run(corpus, *flags)
    assert result.returncode == 1
    assert "--split 100,0,0 leaves no document for them" in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "left_out", ["progress", "rng", "loss_ratio", "position_matched_loss_ratio", "exp_avg", "exp_avg_sq", "step"]
)
def test_a_resume_without_one_part_of_the_state_is_noticed(corpus, straight, tmp_path, left_out):
    """The negative control: every part of the state matters to the comparison above."""
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from megatron.training import home, state
from megatron import errors
import pretrain_gpt2
whole, restore = state.TrainState.load_dict, home.restore
def without_field(self, saved):
    fresh = self.to_dict({{}}, layout="", rng=None)
    whole(self, saved | ({{{left_out!r}: fresh[{left_out!r}]}} if {left_out!r} in fresh else {{}}))
def without_moment(model, optimizer, path, **keywords):
    restore(model, optimizer, path, **keywords)
    for entries in optimizer.state.values():
        if {left_out!r} in entries:
            entries[{left_out!r}].zero_()
state.TrainState.load_dict, home.restore = without_field, without_moment
if {left_out!r} == "rng":
    home.restore_rng = lambda generators: None
errors.run(pretrain_gpt2.main)
"""
    home = tmp_path / "run"
    assert run(corpus, "--train-iters", "20", "--save", str(home), "--exit-interval", "9").returncode == 75
    arguments = command(corpus, "--train-iters", "20", "--save", str(home), "--load", str(home))[2:]
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert log_of(home) != log_of(straight)


def test_a_resume_without_what_adaptive_pacing_remembers_is_noticed(corpus, tmp_path):
    """At a rate at which this noise is only learnt by heart: a loss that no longer falls holds the length back."""
    flags = [
        *"--unset seqlen-warmup-iters --seqlen-warmup adaptive --seqlen-adaptive-step 8 --eval-interval 2".split(),
        *"--seqlen-adaptive-tolerance 0 --lr 1e-1 --train-iters 14 --no-test".split(),
    ]
    whole, home = tmp_path / "whole", tmp_path / "run"
    assert run(corpus, *flags, "--save", str(whole)).returncode == 0
    assert run(corpus, *flags, "--save", str(home), "--exit-interval", "7").returncode == 75
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from megatron.pacing.seqlen_warmup import AdaptivePacing\n"
        "from megatron import errors\n"
        "import pretrain_gpt2\n"
        "AdaptivePacing.load_state_dict = lambda self, state: None\n"
        "errors.run(pretrain_gpt2.main)\n"
    )
    again = command(corpus, *flags, "--save", str(home), "--load", str(home))[2:]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    assert subprocess.run([sys.executable, "-c", code, *again], check=False, env=environment).returncode == 0
    lengths = [[e["seqlen"] for e in log_of(run) if "seqlen" in e] for run in (whole, home)]
    assert lengths[0][:7] == lengths[1][:7] and lengths[0] != lengths[1], lengths


def test_a_model_learns_what_can_be_learned(tmp_path):
    """Documents that count upwards: the next token follows from the last one."""
    prefix = tmp_path / "count_text_document"
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        for start in range(200):
            writer.add_document((start + np.arange(100)) % 200)
    home = tmp_path / "run"
    result = run(
        str(prefix), "--train-iters", "60", "--lr-decay-iters", "60", "--save", str(home), "--hidden-dropout", "0"
    )
    assert result.returncode == 0, result.stderr
    validations = [float(e["loss"]) for e in log_of(home) if e.get("event") == "validation"]
    assert validations[0] > 3
    assert validations[-1] < 1


def test_a_run_cut_off_after_its_last_step_still_gets_its_evaluations(corpus, straight, tmp_path):
    home = tmp_path / "run"
    arguments = ["--train-iters", "20", "--save", str(home), "--load", str(home), "--exit-interval", "10"]
    assert [run(corpus, *arguments).returncode for _ in range(2)] == [75, 0]
    assert log_of(home) == log_of(straight)
    log = home / "metrics.jsonl"
    log.write_text("".join(line for line in log.read_text().splitlines(True) if '"test"' not in line))
    assert run(corpus, *arguments).returncode == 0
    assert log_of(home) == log_of(straight)


def test_a_validation_that_a_stop_cut_short_is_made_up_for(corpus, straight, tmp_path):
    """The first validation stops its own process with SIGTERM; the resume begins with it."""
    home = tmp_path / "run"
    program = (
        f"import os, signal, sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import megatron.training.loop as room\n"
        "evaluate = room.evaluate\n"
        "def stopped(*a, **k): os.kill(os.getpid(), signal.SIGTERM); return evaluate(*a, **k)\n"
        "room.evaluate = stopped\n"
        "import pretrain_gpt2; sys.exit(pretrain_gpt2.main())\n"
    )
    flags = command(corpus, "--train-iters", "20", "--save", str(home), "--load", str(home))
    first = subprocess.run(
        [sys.executable, "-c", program, *flags[2:]],
        capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=240,
    )  # fmt: skip
    assert first.returncode == 75, first.stderr
    assert log_of(home)[-1]["iteration"] == 7
    assert not [e for e in log_of(home) if e.get("event") == "validation"]
    second = run(corpus, "--train-iters", "20", "--save", str(home), "--load", str(home))
    assert second.returncode == 0, second.stderr
    assert log_of(home) == log_of(straight)


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_again(corpus, straight, tmp_path):
    home = tmp_path / "run"
    shutil.copytree(straight, home)
    for shard in home.glob("checkpoints/*/*.safetensors"):
        shard.write_bytes(shard.read_bytes()[:-1])
    log = (home / "metrics.jsonl").read_bytes()
    result = run(corpus, "--train-iters", "20", "--save", str(home), "--load", str(home))
    assert result.returncode == 1
    assert "iter_0000020/shard-00001" in result.stderr
    assert "there is no older whole checkpoint beside it" in result.stderr
    assert (home / "metrics.jsonl").read_bytes() == log


def test_a_damaged_checkpoint_is_refused_or_left_behind_loudly(corpus, straight, tmp_path):
    """With --keep-last 2 there is one more to go back to; the run then ends as if nothing had been."""
    home = tmp_path / "run"
    flags = ["--train-iters", "20", "--save", str(home), "--load", str(home), "--save-interval", "4"]
    assert run(corpus, *flags, "--keep-last", "2", "--keep-every", "8", "--exit-interval", "14").returncode == 75
    names = sorted(p.name for p in (home / "checkpoints").glob("iter_*"))
    assert names == ["iter_0000008", "iter_0000012", "iter_0000014"]
    shard = next((home / "checkpoints/iter_0000014").glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    refused = run(corpus, *flags)
    assert refused.returncode == 1
    assert "iter_0000014" in refused.stderr
    assert "iter_0000012" in refused.stderr
    assert "--load-fallback" in refused.stderr
    taken = run(corpus, *flags, "--load-fallback")
    assert taken.returncode == 0, taken.stderr
    assert "iter_0000014 is damaged and left behind" in taken.stdout
    assert "resumed from" in taken.stdout
    assert log_of(home) == log_of(straight)


def test_a_run_can_go_back_to_an_older_checkpoint(corpus, straight, tmp_path):
    home = tmp_path / "run"
    base = ["--train-iters", "20", "--save", str(home), "--save-interval", "5"]
    assert run(corpus, *base, "--exit-interval", "15").returncode == 75
    older = home / "checkpoints" / "iter_0000005"
    result = run(corpus, *base, "--load", str(older), "--exit-interval", "7")
    assert result.returncode == 75, result.stderr
    assert "set aside" in result.stdout
    assert run(corpus, *base, "--load", f"{home}/").returncode == 0
    assert log_of(home) == log_of(straight)


def test_a_reader_that_leaves_does_not_stop_the_run(corpus, tmp_path):
    home = tmp_path / "run"
    process = subprocess.Popen(
        command(corpus, "--train-iters", "20", "--save", str(home), "--log-interval", "1"), stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(timeout=120) == 0
    assert log_of(home)[-1]["event"] == "test"


def test_a_second_interrupt_ends_at_once_with_one_line(corpus, tmp_path):
    home = tmp_path / "run"
    process = subprocess.Popen(
        command(corpus, "--train-iters", "1", "--lr-warmup-iters", "0", "--save", str(home), "--seqlen-warmup", "none",
                "--unset", "seqlen-warmup-iters", "--global-batch-size", "131072", "--micro-batch-size", "128"),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    for line in process.stdout:
        if line.startswith("batch"):
            break
    time.sleep(1)
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
    said, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said.count("SIGINT: stopping after this step, then saving (again: stop now") == 1
    again = f"start it again with --load {home}, from the beginning"
    assert errors == f"error: interrupted; no checkpoint was saved yet: {again}\n"


def test_after_an_interruption_it_is_said_which_checkpoint_is_the_last(tmp_path):
    home = tmp_path / "run"
    for iteration in (5, 10):
        (home / "checkpoints" / f"iter_{iteration:07d}").mkdir(parents=True)
    (home / "checkpoints" / "iter_0000015.tmp-0123abcd").mkdir()
    config = CheckpointConfig(save=str(home), load=str(home))
    tuned = replace(config, load="weights", finetune=True)
    assert how_to_go_on(config) == f"start it again with --load {home}: it goes on from step 10"
    assert how_to_go_on(tuned) == f"start it again with --load {home}, without --finetune: it goes on from step 10"
    assert how_to_go_on(CheckpointConfig()) == "nothing is saved: no --save"
    fresh = replace(tuned, save=str(tmp_path / "fresh"))
    elsewhere = "no checkpoint was saved yet: start it again with another --save, from the beginning"
    assert how_to_go_on(fresh) == how_to_go_on(replace(fresh, finetune=False)) == elsewhere
    begun = replace(fresh, finetune=False, load=fresh.save)
    assert (
        how_to_go_on(begun)
        == f"no checkpoint was saved yet: start it again with --load {fresh.save}, from the beginning"
    )


def test_a_fault_is_not_lost_over_what_to_say_after_it():
    unreadable = CheckpointConfig(save="a" * 300)
    with pytest.raises(UserError, match="the loss is nan"), noting_how_to_go_on(unreadable):
        raise UserError("the loss is nan")


def test_a_layout_of_gpus_is_another_than_one_of_cpus():
    cpu, gpu = (layout_name(Config(), World(device=torch.device(kind))) for kind in ("cpu", "cuda"))
    assert gpu == f"{cpu}, on GPUs"


def test_a_signal_is_answered_at_once():
    said: list[str] = []
    for saves in (True, False):
        with StopRequest(saves=saves, say=said.append) as stop:
            for number in (signal.SIGTERM, signal.SIGUSR1):
                signal.raise_signal(number)
            assert stop.reason == "SIGUSR1"
            signal.raise_signal(signal.SIGINT)
    assert said[:2] == [
        "SIGTERM: stopping after this step, then saving",
        "SIGINT: stopping after this step, then saving (again: stop now, and lose the steps since the last checkpoint)",
    ]
    assert said[2] == "SIGTERM: stopping after this step, then ending: no --save" and len(said) == 4


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_saves_and_leaves_with_the_requeue_status(corpus, tmp_path, number):
    home = tmp_path / "run"
    process = subprocess.Popen(
        command(corpus, "--train-iters", "100000", "--save", str(home), "--lr-decay-iters", "100000"),
        stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (home / "metrics.jsonl").exists():
        time.sleep(0.05)
    time.sleep(0.3)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75
    assert f"stopped by {number.name}; saved at step" in output
    assert list((home / "checkpoints").glob("iter_*/manifest.json"))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (["--lr", "2e-2"], "lr: checkpoint 0.01, now 0.02"),
        (["--global-batch-size", "80"], "global_batch_size: checkpoint 64, now 80"),
        (["--seqlen-warmup-iters", "12"], "seqlen_warmup_iters: checkpoint 16, now 12"),
        (["--seed", "7"], "seed: checkpoint 1234, now 7"),
        (["--split", "90,5,5"], "split: checkpoint 80,10,10, now 90,5,5"),
        (["--lr-decay-iters", "30"], "lr_decay_iters: checkpoint 20, now 30"),
    ],
)
def test_a_resume_with_other_settings_is_refused(corpus, straight, change, named):
    result = run(corpus, "--train-iters", "30", "--save", str(straight), "--load", str(straight), *change)
    assert result.returncode == 1
    assert named in result.stderr
    ended = json.loads((straight / "exit.json").read_text())
    assert (ended["status"], ended["iteration"]) == ("finished", 20), "a refused start changes nothing"
    assert "--override" in result.stderr
    assert result.stderr.count("\n") == 1


def test_an_override_lets_a_change_through(corpus, straight, tmp_path):
    result = run(
        corpus, "--train-iters", "21", "--load", str(straight), "--save", str(tmp_path / "new"), "--lr", "2e-2",
        "--override", "lr",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "--override lr: 0.01 -> 0.02" in result.stdout


def test_a_longer_run_goes_on_and_a_finished_one_has_nothing_to_do(corpus, straight, tmp_path):
    done = run(corpus, "--train-iters", "20", "--load", str(straight), "--save", str(tmp_path / "a"))
    assert done.returncode == 0
    assert [e["event"] for e in log_of(tmp_path / "a")] == ["validation", "test"], "no step left, only the evaluations"
    longer = run(corpus, "--train-iters", "22", "--load", str(straight), "--save", str(tmp_path / "b"))
    assert longer.returncode == 0
    assert [e["iteration"] for e in log_of(tmp_path / "b") if "event" not in e] == [21, 22]


def test_a_finished_run_started_again_does_what_is_missing_and_writes_no_checkpoint(corpus, straight, tmp_path):
    home = tmp_path / "run"
    shutil.copytree(straight, home)
    log = home / "metrics.jsonl"
    lines = log.read_text().splitlines()
    assert json.loads(lines[-1])["event"] == "test"
    log.write_text("\n".join(lines[:-1]) + "\n")  # as of a stop in the last evaluation

    def written() -> set[tuple[Path, int]]:
        return {(path, path.stat().st_ino) for path in (home / "checkpoints").rglob("*")}

    before = written()
    message = "nothing left to do: the run has ended with step 20"
    for nothing_to_do in (False, True):
        again = run(corpus, "--train-iters", "20", "--save", str(home), "--load", str(home))
        assert again.returncode == 0, again.stderr
        assert (message in again.stdout.splitlines()) == nothing_to_do
        assert log_of(home) == log_of(straight)
        assert json.loads((home / "exit.json").read_text())["status"] == "finished"
        assert written() == before


def test_another_run_in_the_same_directory_is_refused(corpus, straight):
    result = run(corpus, "--train-iters", "20", "--save", str(straight))
    assert result.returncode == 1
    assert "already holds a run" in result.stderr


def test_a_load_without_a_checkpoint_is_named_before_a_save_that_holds_a_run(tmp_path):
    home, other = tmp_path / "run", tmp_path / "other"
    for run_of in (home, other):
        (run_of / "checkpoints" / "iter_0000005").mkdir(parents=True)
    for load in (tmp_path / "nosuch", other / "checkpoints" / "iter_0000001"):
        with pytest.raises(UserError, match=rf"^--load {load}: no checkpoint found there, and --save {home} already"):
            check_homes(CheckpointConfig(save=str(home), load=str(load)))
    with pytest.raises(UserError, match=rf"^--save {home} already holds a run: add --load {home}"):
        check_homes(CheckpointConfig(save=str(home), load=str(other)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train-iters", "1", "--vocab-size", "150"], "the vocabulary has 150 tokens"),
        (["--train-iters", "1", "--seq-length", "65536"], "65,537"),
        (["--train-iters", "1", "--data-path", "/no/such/corpus"], "/no/such/corpus.idx"),
        (["--train-iters", "1", "--load", "/no/such/run"], "no checkpoint found"),
        (["--train-iters", "1", "--save-interval", "5"], "--save-interval needs --save"),
        (
            [
                "--train-iters",
                "9",
                "--save",
                "here",
                "--seqlen-warmup",
                "discrete",
                "--unset",
                "seqlen-warmup-iters",
                "--seqlen-stages",
                "8:x,32",
            ],
            "--seqlen-stages 8:x,32",
        ),
        (["--train-iters", "1", "--global-batch-size", "1e13", "--micro-batch-size", "1"], "out of memory"),
        (["--train-iters", "1", "--device", "cuda"], "no CUDA device"),
        (["--train-iters", "1", "--fp16"], "--fp16 needs a GPU"),
        (["--train-iters", "1", "--vocab-file", "x.json"], "--vocab-size is for"),
        (["--train-iters", "1", "--eod-mask-loss"], "--eod-mask-loss"),
        (["--train-iters", "1", "--config", "missing.yaml"], "--config missing.yaml: no such file"),
    ],
)
def test_bad_input_is_one_clear_line(corpus, arguments, message, tmp_path):
    import torch

    if torch.cuda.is_available() and ("--device" in arguments or "--fp16" in arguments):
        pytest.skip("refused only where there is no GPU")
    result = run(corpus, *arguments, cwd=tmp_path)
    assert result.returncode == 1
    assert message in result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_corpus_without_a_note_of_its_tokenizer_asks_for_one(corpus):
    line = [a for a in command(corpus, "--train-iters", "1") if a not in ("--vocab-size", "200")]
    result = subprocess.run(line, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "give --vocab-file and --merge-file" in result.stderr


def test_weights_without_optimizer_state_can_start_a_new_run_only(corpus, tmp_path):
    home = tmp_path / "w"
    assert run(corpus, "--train-iters", "3", "--save", str(home), "--no-save-optim").returncode == 0
    refused = run(corpus, "--train-iters", "4", "--load", str(home), "--save", str(home))
    assert refused.returncode == 1
    assert "--finetune" in refused.stderr
    same = run(corpus, "--train-iters", "2", "--load", str(home), "--save", str(home), "--finetune")
    assert "choose another directory" in same.stderr
    heads = ["--num-attention-heads", "4", "--load", str(home), "--save", str(tmp_path / "h"), "--finetune"]
    assert "num_attention_heads: checkpoint 2, now 4" in run(corpus, "--train-iters", "2", *heads).stderr
    fine = run(corpus, "--train-iters", "2", "--load", str(home), "--save", str(tmp_path / "f"), "--finetune")
    assert fine.returncode == 0
    assert [e["iteration"] for e in log_of(tmp_path / "f") if "event" not in e] == [1, 2]
