"""How a program ends where a user can mend what is wrong."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from whole_runs import ENVIRONMENT

from megatron.errors import CommandLineError, UserError, run


@pytest.mark.parametrize("debug", [None, "1"])
def test_a_fault_is_one_line_and_a_traceback_only_where_it_is_asked_for(debug, monkeypatch, capsys):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.delenv("MEGATRON_DEBUG", raising=False)
    if debug:
        monkeypatch.setenv("MEGATRON_DEBUG", debug)

    def main() -> int:
        raise UserError("--lr x: expected a number")

    with pytest.raises(SystemExit) as left:
        run(main)
    assert left.value.code == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "error: --lr x: expected a number"
    assert (len(lines) > 1) == bool(debug)
    if debug:
        assert lines[1].startswith("Traceback") and lines[-1].endswith("UserError: --lr x: expected a number")


def out_of_gpu_memory() -> Exception:
    return type("OutOfMemoryError", (RuntimeError,), {})("tried to allocate 2.00 GiB")


def out_of_cpu_memory() -> Exception:
    import torch

    with pytest.raises(RuntimeError) as error:
        torch.empty(1 << 50)
    return error.value


@pytest.mark.parametrize(
    ("fault", "said", "status"),
    [
        (UserError("step 7: loss nan"), "step 7: loss nan", 1),
        (MemoryError("1 PiB"), "out of memory (1 PiB): lower --micro-batch-tokens, ", 1),
        (out_of_gpu_memory(), "out of GPU memory (tried to allocate 2.00 GiB): lower --micro-batch-tokens, ", 1),
        (out_of_cpu_memory(), "out of memory (can't allocate memory: you tried to allocate ", 1),
        (KeyboardInterrupt(), "interrupted; ", 130),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_the_one_line_ends_with_what_is_noted_on_the_fault(fault, said, status, monkeypatch, capsys):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.delenv("MEGATRON_DEBUG", raising=False)
    fault.add_note("it goes on from step 4")

    def main() -> int:
        raise fault

    with pytest.raises(SystemExit) as left:
        run(main)
    assert left.value.code == status
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {said}") and line.endswith("; it goes on from step 4")


@pytest.mark.parametrize(("local_rank", "said"), [(None, True), ("0", True), ("1", False)])
def test_where_no_local_rank_is_set_a_command_line_fault_is_said(local_rank, said, monkeypatch, capsys):
    """As in a container of its own for each rank."""
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": local_rank, "TORCHELASTIC_RUN_ID": None}.items():
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    monkeypatch.setattr("os._exit", sys.exit)

    def main() -> int:
        raise CommandLineError("--lr x: expected a number")

    with pytest.raises(SystemExit) as left:
        run(main)
    assert left.value.code == 1
    assert capsys.readouterr().err == "error: [rank 1] --lr x: expected a number\n" * said


@pytest.mark.parametrize(("fault", "speaker"), [("CommandLineError", 0), ("SharedError", 1)])
def test_under_torchrun_the_rank_with_the_message_has_time_to_say_it(fault, speaker, tmp_path):
    """The other one is there two seconds before it, and torchrun ends all as soon as one has left."""
    program = tmp_path / "late.py"
    program.write_text(
        f"import os, sys, time\nsys.path.insert(0, {str(Path(__file__).parents[1])!r})\n"
        "from megatron.errors import CommandLineError, SharedError, UserError, run\n"
        "def main():\n"
        f"    speaks = os.environ['RANK'] == '{speaker}'\n"
        "    time.sleep(2 * speaks)\n"
        f"    raise (UserError if speaks and {fault} is SharedError else {fault})('--lr x: expected a number')\n"
        "run(main)\n",
        encoding="utf-8",
    )
    command = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *command, str(program)], capture_output=True, text=True, check=False, env=ENVIRONMENT
    )
    assert done.returncode == 1
    assert done.stderr.count(f"error: [rank {speaker}] --lr x: expected a number") == done.stderr.count("error: ") == 1


def test_a_package_that_is_missing_is_one_line() -> None:
    """As where nobody has activated the environment; -S leaves out what is installed."""
    command = [sys.executable, "-S", str(Path(__file__).parents[1] / "tools/plan_run.py")]
    for debug in ("", "1"):
        environment = os.environ | {"MEGATRON_DEBUG": debug}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        assert done.returncode == 1 and ("Traceback" in done.stderr) == bool(debug)
        if not debug:
            assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: the Python package ")
            assert f"for {sys.executable}: `source" in done.stderr
