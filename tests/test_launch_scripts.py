"""scripts/ds_train.sh and scripts/pretrain_gpt2.slurm: the commands that they make, the signals, the statuses."""

import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron.arguments import build_parser, parse_config

ROOT = Path(__file__).parents[1]
LAUNCHER = ROOT / "scripts/ds_train.sh"
BATCH = ROOT / "scripts/pretrain_gpt2.slurm"
TORCHRUN = ["python", str(ROOT / "scripts/torchrun.py")]
ONE_PROCESS = [*TORCHRUN, *"--nproc-per-node 1 --max-restarts 0 --standalone --local-addr 127.0.0.1".split()]
TRAINER = str(ROOT / "pretrain_gpt2.py")
DEADLINE = 90
"""Seconds after which a process counts as hanging."""

can_interrupt = pytest.mark.skipif(
    signal.getsignal(signal.SIGINT) == signal.SIG_IGN, reason="SIGINT is ignored, as in a background job"
)

STUB_TRAINER = """
import json, os, pathlib, signal, sys, time

here = pathlib.Path(__file__).parent
home = pathlib.Path(sys.argv[sys.argv.index("--save") + 1])
rank, last = os.environ["RANK"], sys.argv[-1]
if last == "crash":
    sys.exit(3)
(here / f"born-{rank}").touch()
end = time.monotonic() + 60
while last == "slow" and not (here / "awake").exists() and time.monotonic() < end:
    time.sleep(0.02)
asked = []
for number in (signal.SIGTERM,) if last == "deaf" else (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda number, frame: asked.append(signal.Signals(number).name))
(here / f"started-{rank}").touch()
while last != "finish" and not asked and time.monotonic() < end:
    time.sleep(0.02)
(here / f"asked-{rank}").write_text(" ".join(asked[:1]))
(here / f"launcher-{rank}").write_text(os.environ["SIGNALLED_BY"])
if rank == "0":
    home.mkdir(exist_ok=True)
    (home / "exit.json").write_text(json.dumps({"status": "stopped" if asked else "finished", "iteration": 3}))
"""


def environment(**variables):
    """Only what is given, and the interpreter that runs the tests as `python`."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return {
        "PATH": path,
        "HOME": os.environ.get("HOME", "/"),
        "OMP_NUM_THREADS": "1",
        "GPUS_PER_NODE": "1",
        **variables,
    }


def run(script, *arguments, cwd=ROOT, **variables):
    return subprocess.run(
        ["bash", str(script), *arguments],
        env=environment(**variables), cwd=cwd, capture_output=True, text=True, check=False, timeout=DEADLINE,
    )  # fmt: skip


def dry_run(*arguments, **variables):
    """The commands printed, as words; nothing may be said beside them."""
    result = run(LAUNCHER, "--dry-run", *arguments, **variables)
    assert (result.returncode, result.stderr) == (0, "")
    return [shlex.split(line) for line in result.stdout.splitlines()]


@pytest.fixture
def start():
    """Start a script in the background; whatever is left at the end is stopped."""
    processes = []

    def starter(script, *arguments, **variables):
        process = subprocess.Popen(
            ["bash", str(script), *arguments],
            env=environment(**variables), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
        )  # fmt: skip
        processes.append(process)
        return process

    yield starter
    for process in processes:
        if process.poll() is None:
            process.terminate()
            try:
                process.communicate(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
        process.stdout.close()


def read_until(process, word):
    assert any(word in line for line in process.stdout), f"never said {word}"


def wait_for(*paths):
    end = time.monotonic() + DEADLINE
    while not all(path.exists() for path in paths):
        assert time.monotonic() < end, f"never came: {paths}"
        time.sleep(0.02)


def program(directory, name, text):
    """An executable script in `directory`, which stands first in the PATH that is returned."""
    directory.mkdir(exist_ok=True)
    path = directory / name
    path.write_text("#!/usr/bin/env bash\n" + text)
    path.chmod(0o755)
    return os.pathsep.join([str(directory), environment()["PATH"]])


@pytest.fixture
def trainer(tmp_path):
    path = tmp_path / "trainer.py"
    path.write_text(STUB_TRAINER)
    return str(path)


@pytest.mark.parametrize("script", [LAUNCHER, BATCH])
def test_the_scripts_are_sound(script):
    subprocess.run(["bash", "-n", str(script)], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", "-x", "-S", "warning", str(script)], cwd=ROOT, check=True)


def test_without_variables_there_are_no_flags():
    assert dry_run() == [[*ONE_PROCESS, TRAINER]]


@pytest.mark.parametrize(
    ("variable", "value", "flags"),
    [
        ("CONFIG", "recipes/gpt2-117m-b512.yaml", "--config recipes/gpt2-117m-b512.yaml"),
        ("MODEL_SIZE", "117", "--model-size 117M"),
        ("MODEL_SIZE", "345", "--model-size 345M"),
        ("MODEL_SIZE", "774", "--model-size 774M"),
        ("MODEL_SIZE", "1558", "--model-size 1.5B"),
        ("MODEL_SIZE", "gpt3-125M", "--model-size gpt3-125M"),
        ("SEQ_LEN", "512", "--seq-length 512"),
        ("BSZ", "4096", "--global-batch-size 4096"),
        ("MICRO_BATCH", "8", "--micro-batch-size 8"),
        ("LR", "6e-4", "--lr 6e-4"),
        ("LR_WARMUP_ITER", "3000", "--lr-warmup-iters 3000"),
        ("LR_DECAY_TOKEN", "157e9", "--lr-decay-tokens 157e9"),
        ("LR_DECAY_ITER", "300K", "--lr-decay-iters 300K"),
        ("NUM_TOKEN", "157e9", "--train-tokens 157e9"),
        ("NUM_ITER", "300K", "--train-iters 300K"),
        ("CURRICULUM_STEP", "60000", "--seqlen-warmup linear --seqlen-warmup-iters 60000"),
        ("CURRICULUM_MIN", "64", "--seqlen-start 64"),
        ("SEED", "1235", "--seed 1235"),
        ("DATA", "0.3 wiki 7e-1 web", "--data-path 0.3 wiki 7e-1 web"),
        ("DATA", "my corpus/3 wiki", "--data-path 'my corpus/3 wiki'"),
        ("VOCAB_FILE", "vocab.json", "--vocab-file vocab.json"),
        ("MERGE_FILE", "merges.txt", "--merge-file merges.txt"),
        ("TOKENIZER_FILE", "t.json", "--tokenizer-type HFTokenizer --tokenizer-file t.json"),
        ("SAVE", "runs/x", "--save runs/x --load runs/x"),
        ("SAVE_INTERVAL", "500", "--save-interval 500"),
        ("MP_SIZE", "5", "--tensor-model-parallel-size 5"),
        ("ZERO_STAGE", "3", "--zero-stage 3"),
    ],
)
def test_each_variable_is_a_flag_that_the_trainer_knows(variable, value, flags):
    (command,) = dry_run(**{variable: value})
    assert command == [*ONE_PROCESS, TRAINER, *shlex.split(flags)]
    build_parser().parse_args(shlex.split(flags))


def test_variables_together_make_the_run_that_they_describe():
    (command,) = dry_run(
        MODEL_SIZE="1558", SEQ_LEN="1024", BSZ="4096", LR="6e-4", LR_WARMUP_ITER="3000", LR_DECAY_TOKEN="157286400000",
        NUM_TOKEN="157286400000", CURRICULUM_STEP="45000", CURRICULUM_MIN="64", MP_SIZE="5", SAVE="runs/x",
    )  # fmt: skip
    config, _ = parse_config(build_parser(), command[command.index(TRAINER) + 1 :])
    recipe, _ = parse_config(build_parser(), ["--config", str(ROOT / "recipes/gpt2-1.5b-b4k-slw45k.yaml")])
    assert (config.model, config.seqlen_warmup) == (recipe.model, recipe.seqlen_warmup)
    assert config.training.global_batch_size == recipe.training.global_batch_size
    assert config.learning_rate.decay(config.training) == recipe.learning_rate.decay(recipe.training)
    assert config.parallel.tensor_model_parallel_size == 5
    assert config.checkpoint.save == config.checkpoint.load == "runs/x"


@pytest.mark.parametrize("name", ["gpt2-117m-b512-slw60k", "gpt2-1.5b-b4k-two-stage"])
def test_no_curriculum_steps_turn_a_recipe_into_its_baseline(name):
    (command,) = dry_run(CONFIG=str(ROOT / f"recipes/{name}.yaml"), CURRICULUM_STEP="0")
    config, _ = parse_config(build_parser(), command[command.index(TRAINER) + 1 :])
    assert config.seqlen_warmup.seqlen_warmup == "none"


def test_arguments_come_last_and_odd_names_stay_whole(tmp_path):
    odd = """a b/it's "$HOME" `x`; *"""
    result = run(LAUNCHER, "--lr", "1e-3", "--dry-run", odd, LR="6e-4", MERGE_FILE=odd, SAVE=odd, cwd=tmp_path)
    words = [TRAINER, "--lr", "6e-4", "--merge-file", odd, "--save", odd, "--load", odd, "--lr", "1e-3", odd]
    pasted = subprocess.run(
        ["bash", "-c", "printf '%s\\0' " + result.stdout], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert pasted.stdout.split("\0")[:-1] == [*ONE_PROCESS, *words]
    assert not any(tmp_path.iterdir())


def test_processes_are_counted_where_they_are_not_given():
    import torch

    (command,) = dry_run(GPUS_PER_NODE="")
    assert command[len(TORCHRUN) :][:2] == ["--nproc-per-node", str(torch.cuda.device_count() or 1)]


def test_processes_that_cannot_be_counted_are_asked_for(tmp_path):
    (tmp_path / "torch.py").touch()
    result = run(LAUNCHER, "--dry-run", GPUS_PER_NODE="", PYTHONPATH=str(tmp_path))
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == "error: python has no torch to count the GPUs with: set GPUS_PER_NODE\n"


def test_nodes_by_hand():
    (command,) = dry_run(NNODES="2", MASTER_ADDR="10.0.0.1", GPUS_PER_NODE="8", MAX_RESTARTS="3")
    options = "--nproc-per-node 8 --max-restarts 3 --nnodes 2 --rdzv-backend c10d --rdzv-endpoint 10.0.0.1:29500"
    assert command == [*TORCHRUN, *options.split(), "--rdzv-id", "ds_train", TRAINER]


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"NNODES": "2"}, "NNODES=2 needs MASTER_ADDR"),
        ({"NNODES": "0"}, "NNODES=0: expected a number from 1"),
        ({"GPUS_PER_NODE": "x"}, "GPUS_PER_NODE=x: expected a number from 1"),
        ({"MAX_RESTARTS": "-1"}, "MAX_RESTARTS=-1: expected a number from 0"),
        ({"MASTER_PORT": "99999999"}, "MASTER_PORT=99999999: expected a number from 1 to 65535"),
        ({"CONFIG": "/no/such.yaml"}, "CONFIG=/no/such.yaml: no such file"),
        ({"TRAINER": "/no/such.py"}, "/no/such.py: no such file"),
        ({"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_LOCALID": "1"}, "--ntasks-per-node=1"),
        ({"SLURM_JOB_ID": "7"}, "srun: not found"),
    ],
)
def test_what_cannot_run_is_one_line(variables, said):
    result = run(LAUNCHER, **variables)
    assert result.returncode == 1
    assert result.stderr.startswith("error: ")
    assert said in result.stderr
    assert result.stderr.count("\n") == 1


ALLOCATION = {"SLURM_JOB_ID": "1234", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "node[003-005,9],other"}
SRUN = "srun --nodes 2 --ntasks 2 --ntasks-per-node 1 --kill-on-bad-exit=0 --cpu-bind=none".split()


@pytest.mark.parametrize("step", [None, "4294967290", "4294967291"], ids=["none", "interactive", "batch"])
def test_an_allocation_is_left_to_srun(tmp_path, step):
    path = program(tmp_path / "bin", "srun", f'printf "%s\\n" srun "$@" > {tmp_path}/called; exit 42')
    variables = {**ALLOCATION, "PATH": path, "LOG_DIR": str(tmp_path / "a log")} | (
        {"SLURM_STEP_ID": step} if step else {}
    )
    result = run(LAUNCHER, "--bf16", "--x", "a b", **variables)
    log = ["--output", f"{tmp_path}/a log/%N.log", "--open-mode", "append"]
    again = ["bash", str(LAUNCHER), "--bf16", "--x", "a b"]
    assert result.returncode == 42
    assert (tmp_path / "called").read_text().splitlines() == [*SRUN, *log, *again]
    assert shlex.split(result.stdout) == [*SRUN, *log, *again]
    assert (tmp_path / "a log").is_dir()
    (tmp_path / "called").unlink()
    on_node = dry_run("--bf16", **variables)[1]
    assert on_node[-2:] == [TRAINER, "--bf16"]
    assert not (tmp_path / "called").exists()


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n7", "n7"),
        ("a,b", "a"),
        ("node[003-005,9],x", "node003"),
        ("r[1-2]n[04,06]-ib,x", "r1n04-ib"),
        ("a,b[1-2]", "a"),
    ],
)
def test_a_task_of_srun_meets_the_others_on_the_first_node(nodes, first):
    step = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_NODES": "3", "SLURM_STEP_NODELIST": nodes, "SLURMD_NODENAME": "me"}
    for rank, host in (("0", "true"), ("2", "false")):
        (command,) = dry_run(**ALLOCATION, **step, SLURM_NODEID=rank)
        options = f"--nproc-per-node 1 --max-restarts 0 --nnodes 3 --rdzv-backend c10d --rdzv-endpoint {first}:29734"
        options += f" --rdzv-id 1234 --rdzv-conf is_host={host} --local-addr me"
        assert command == [*TORCHRUN, *options.split(), TRAINER]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", pytest.param("SIGINT", marks=can_interrupt)])
def test_a_signal_makes_every_worker_save_and_stop(tmp_path, trainer, start, name):
    save = tmp_path / "home"
    process = start(LAUNCHER, "wait", TRAINER=trainer, SAVE=str(save), GPUS_PER_NODE="2")
    wait_for(tmp_path / "started-0", tmp_path / "started-1")
    os.killpg(process.pid, getattr(signal, name))  # to all of a terminal's foreground, as Ctrl-C
    output, _ = process.communicate(timeout=DEADLINE)
    assert process.returncode == 75, output
    assert [(tmp_path / f"asked-{rank}").read_text() for rank in (0, 1)] == ["SIGUSR1"] * 2
    assert f"{name}: asking the run to save and stop" in output
    assert (tmp_path / "launcher-0").read_text() == "ds_train.sh", "whose SIGUSR1 the workers are to name"


def test_workers_that_are_still_starting_hear_of_it_later(tmp_path, trainer, start):
    process = start(LAUNCHER, "slow", TRAINER=trainer, SAVE=str(tmp_path / "home"))
    wait_for(tmp_path / "born-0")
    process.send_signal(signal.SIGUSR1)
    read_until(process, "SIGUSR1: asking")
    time.sleep(0.5)
    (tmp_path / "awake").touch()
    output, _ = process.communicate(timeout=DEADLINE)
    assert process.returncode == 75, output
    assert (tmp_path / "asked-0").read_text() == "SIGUSR1"


@can_interrupt
def test_a_second_interrupt_ends_workers_that_do_not_answer(tmp_path, trainer, start):
    process = start(LAUNCHER, "deaf", TRAINER=trainer, SAVE=str(tmp_path / "home"))
    wait_for(tmp_path / "started-0")
    process.send_signal(signal.SIGINT)
    read_until(process, "SIGINT: asking")
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=DEADLINE)
    assert process.returncode == 75, output
    assert (tmp_path / "asked-0").read_text() == "SIGTERM"
    assert "torchrun: ended by SIGTERM; SAVE/exit.json says" in output and "Traceback" not in output


@pytest.mark.parametrize(("how", "status"), [("finish", 0), ("crash", 1)])
def test_the_status_is_that_of_the_run(tmp_path, trainer, how, status):
    stale = tmp_path / "exit.json"
    stale.write_text('{"status": "stopped", "iteration": 1}')
    result = run(LAUNCHER, how, TRAINER=trainer, SAVE=str(tmp_path), GPUS_PER_NODE="2")
    assert result.returncode == status, result.stderr
    assert stale.exists() == (how == "finish")
    assert ("was the first to fail, with exit code 3" in result.stderr) == (how == "crash")
    assert "Traceback" not in result.stderr


@pytest.fixture
def idle_torchrun(tmp_path):
    """PYTHONPATH of a torchrun that starts no worker, and leaves with 1 on SIGTERM."""
    package = tmp_path / "path/torch/distributed"
    elastic = package / "elastic/multiprocessing"
    elastic.mkdir(parents=True)
    for directory in (package.parent, package, elastic.parent, elastic):
        (directory / "__init__.py").touch()
    (elastic / "errors.py").write_text("class ChildFailedError(Exception): pass\n")
    (elastic / "api.py").write_text("class SignalException(Exception): pass\n")
    (package / "run.py").write_text(
        "import pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))\n"
        f"pathlib.Path({str(tmp_path / 'running')!r}).touch()\n"
        "def main(): time.sleep(60)\n"
    )
    return str(tmp_path / "path")


def test_a_run_asked_to_stop_before_its_workers_start_is_to_be_started_again(tmp_path, idle_torchrun, start):
    process = start(LAUNCHER, PYTHONPATH=idle_torchrun)
    wait_for(tmp_path / "running")
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=DEADLINE)
    assert process.returncode == 75, output


def test_the_batch_script_says_what_it_would_run():
    result = run(BATCH, "--dry-run", "--bf16", SAVE="runs/x", GPUS_PER_NODE="")
    options = "--nproc-per-node 8 --max-restarts 0 --nnodes 2 --rdzv-backend c10d --rdzv-endpoint FIRST_NODE:29500"
    words = [
        *TORCHRUN,
        *options.split(),
        "--rdzv-id",
        "ds_train",
        TRAINER,
        "--save",
        "runs/x",
        "--load",
        "runs/x",
        "--bf16",
    ]
    assert (result.returncode, shlex.split(result.stdout)) == (0, words)


@pytest.mark.parametrize(
    ("variables", "said"), [({"SAVE": "x"}, "no SLURM job"), ({"SLURM_JOB_ID": "1234"}, "SAVE is empty")]
)
def test_the_batch_script_refuses(variables, said):
    result = run(BATCH, **variables)
    assert (result.returncode, said in result.stderr, result.stdout) == (1, True, "")


def cluster(tmp_path, srun):
    """A batch script where sbatch puts it, and the variables of its job, with stubs that write down what they do."""
    program(tmp_path / "bin", "scontrol", f'echo "$*" >> {tmp_path}/scontrol')
    path = program(tmp_path / "bin", "srun", srun)
    spool = tmp_path / "spool"
    spool.mkdir()
    variables = {**ALLOCATION, "PATH": path, "SLURM_SUBMIT_DIR": str(ROOT), "SAVE": str(tmp_path / "home")}
    return shutil.copy(BATCH, spool / "slurm_script"), variables | {"SLURM_STEP_ID": "0"}


@pytest.mark.parametrize(("status", "requeued"), [(0, False), (1, False), (75, True), (143, False)])
def test_only_a_stopped_run_is_queued_again(tmp_path, status, requeued):
    script, variables = cluster(tmp_path, f"exit {status}")
    result = run(script, "--bf16", cwd=tmp_path, **variables)
    assert result.returncode == status, result.stderr
    called = tmp_path / "scontrol"
    assert (called.read_text() if called.exists() else "") == ("requeue 1234\n" if requeued else "")
    assert f"{tmp_path}/home/logs/1234/%N.log" in result.stdout


@pytest.mark.parametrize(("name", "requeued"), [("SIGUSR1", True), ("SIGTERM", False)])
def test_the_warning_of_a_time_limit_queues_again_and_scancel_does_not(tmp_path, start, name, requeued):
    script, variables = cluster(
        tmp_path,
        f'trap "exit 75" USR1; touch {tmp_path}/running; for _ in {{1..600}}; do sleep 0.1; done',
    )
    process = start(script, **variables)
    wait_for(tmp_path / "running")
    process.send_signal(getattr(signal, name))
    output, _ = process.communicate(timeout=DEADLINE)
    assert process.returncode == 75, output
    assert (tmp_path / "scontrol").exists() == requeued


def test_two_nodes_from_the_batch_script_to_the_workers_and_back(tmp_path, trainer, start):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # As srun does: the last arguments are the task, signals go to all tasks, and its status is the highest of theirs.
    srun = """
    while [ "$1" != bash ]; do shift; done
    export SLURM_STEP_ID=0 SLURM_STEP_NUM_NODES=2 SLURM_STEP_NODELIST=127.0.0.1,other SLURMD_NODENAME=127.0.0.1
    SLURM_NODEID=0 "$@" & a=$!
    SLURM_NODEID=1 "$@" & b=$!
    trap 'kill -USR1 $a $b' USR1
    while kill -0 $a || kill -0 $b; do wait $a $b; done 2> /dev/null
    wait $a; first=$?
    wait $b; second=$?
    exit $((first > second ? first : second))
    """
    script, variables = cluster(tmp_path, srun)
    process = start(script, "wait", **variables, TRAINER=trainer, MASTER_PORT=str(port))
    wait_for(tmp_path / "started-0", tmp_path / "started-1")
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=DEADLINE)
    assert process.returncode == 75, output
    assert (tmp_path / "scontrol").read_text() == "requeue 1234\n"
    assert [(tmp_path / f"asked-{rank}").read_text() for rank in (0, 1)] == ["SIGUSR1"] * 2
