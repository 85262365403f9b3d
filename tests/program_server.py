"""Runs programs one after the other, each in a fork of a process that has imported torch already.

As a program it reads a JSON line a request (what to run, where, with which files as standard streams) and answers with
the exit status; `ProgramServer` is the other end.
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[1]


class ProgramServer:
    """Starts the process; `run` is about as fast as the program itself without its imports."""

    def __init__(self) -> None:
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def run(self, words: list[str], *, cwd: Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
        """Run `python WORDS` in `cwd`."""
        files = {name: str(cwd / f".{name}") for name in ("stdin", "stdout", "stderr")}
        Path(files["stdin"]).write_text(stdin)
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps({"words": words, "cwd": str(cwd), **files}) + "\n")
        self.process.stdin.flush()
        status = int(self.process.stdout.readline())
        said = [Path(files[name]).read_text() for name in ("stdout", "stderr")]
        return subprocess.CompletedProcess(words, status, *said)

    def close(self) -> None:
        """End the process, which has nothing to do at that time."""
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def become(request: dict[str, Any]) -> NoReturn:
    """Be the program, and leave with its status without taking torch apart, which takes a second."""
    os.chdir(request["cwd"])
    for stream, name in ((sys.stdin, "stdin"), (sys.stdout, "stdout"), (sys.stderr, "stderr")):
        flags = os.O_RDONLY if name == "stdin" else os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        os.dup2(os.open(request[name], flags), stream.fileno())
    status = 0
    try:
        if request["words"][0] == "-m":
            sys.argv = request["words"][1:]
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            sys.argv = request["words"]
            sys.path[0] = str(Path(sys.argv[0]).parent)
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def serve() -> None:
    """Answer until standard input ends."""
    gc.freeze()
    while request := sys.stdin.readline():
        child = os.fork()
        if child == 0:
            become(json.loads(request))
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    import pretrain_gpt2  # noqa: F401
    import tools.compare_runs
    import tools.evaluate_zeroshot  # noqa: F401

    serve()
