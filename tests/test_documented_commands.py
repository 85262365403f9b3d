"""Every command of the README and of docs/ is run: page by page, in order, in a folder with tiny data and models.

The markdown is the source. A command is run as it stands, with `STAND_INS` for what is left to fill in and `TINY` flags
after its own, unless a row of `ELSEWHERE` names the test that runs it, or one of `NOT_RUN` says why nothing does.
"""

from __future__ import annotations

import itertools
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from pages import PAGES, ROOT, commands_of, name_of, split_page
from program_server import ProgramServer
from test_benchmarks import PROGRAMS as BENCHMARKS
from torch.distributed.run import get_args_parser

NOT_RUN = {
    "bash scripts/test.sh": "is what runs this test",
    "source .venv/bin/activate": "changes the shell that it is typed in",
    "pip ": "packages from the network",
    "hf download": "a model from the network",
    "wandb ": "an account",
    "tensorboard --logdir": "a server that does not end; the files are read in tests/test_metrics.py",
    "docker ": "Docker and a GPU",
    "scancel": "SLURM",
    "deepspeed ": "what was typed in DeepSpeed's days",
    "python -m torch.distributed.launch": "what was typed before torchrun",
    "pytest -m gpu": "a GPU",
    "pytest tests/test_kill_points.py": "is run by pytest itself",
}
"""Beginning of a command -> what it needs, or is."""

ELSEWHERE = {
    "bash scripts/quickstart.sh": "test_scripts.py::test_the_quickstart_on_ones_own_text",
    "bash scripts/reproduce_mini.sh cpu": "test_scripts.py::test_the_miniature_is_at_most_24_runs_over_rates_and_seeds",
    "bash scripts/reproduce_mini.sh h200": "test_scripts.py::test_a_run_that_is_stopped_stops_the_miniature",
    "make wheel": "test_packaging.py::test_the_wheel_holds_the_package_and_nothing_else",
    "megatron-slw ": "test_packaging.py::test_an_installation_trains_outside_of_the_repository",
    "python benchmarks/": "test_benchmarks.py::test_prints_a_row_for_each_contestant_and_writes_where_it_was_measured",
    "python examples/plain_pytorch.py": "test_elsewhere.py::test_the_plain_example_runs_as_the_page_says",
    "python examples/huggingface_trainer.py": (
        "test_elsewhere.py::test_the_example_of_hugging_face_runs_as_the_page_says"
    ),
    "python tools/evaluate_zeroshot.py --task hellaswag,piqa": (
        "test_harness.py::test_every_answer_and_metric_equals_the_harness_own_class"
    ),
    "python tools/evaluate_zeroshot.py --load runs/slw --task hellaswag,piqa": (
        "test_harness.py::test_every_answer_and_metric_equals_the_harness_own_class"
    ),
    "python -m megatron.evaluation.harness": "test_harness.py::test_the_harness_command_line_knows_the_model",
    "python pretrain_gpt2.py --config my.yaml ... --save runs/slw --wandb-project": (
        "test_wandb.py::test_the_real_package_offline"
    ),
    "python tools/list_recipes.py": "test_recipes.py::test_the_tool_prints_and_writes",
    "python tools/tune_pacing.py --config my.yaml --data-path ...": (
        "test_trials.py::test_real_trials_lead_to_a_recommendation"
    ),
    "python tests/kill_points.py": "test_kill_points.py::test_some_points_of_every_job_and_the_order_of_all_calls",
}
"""Beginning of a command -> the test that runs it."""

STAND_INS = {
    "--config ... --world-size 128": "--config recipes/gpt2-1.5b-b4k-slw45k.yaml --world-size 128",
    "--config ...": "--config my.yaml",
    "CONFIG=...": "CONFIG=my.yaml",
    "DATA=...": "DATA=data/corpus_text_document",
    "SAVE=...": "SAVE=runs/x",
    "--data-path ...": "--data-path data/corpus_text_document",
    "pretrain_gpt2.py --deepspeed-config ds.json ...": "pretrain_gpt2.py --config my.yaml --deepspeed-config ds.json",
    "--save runs/old --vocab-size 50257": "--save runs/converted --vocab-size 300",
    "--data-path runs/quickstart/corpus_text_document --output runs/tuning": (
        "--data-path runs/quickstart/corpus_text_document --output runs/quickstart/tuning"
    ),
    "--workers N": "--workers 1",
    "[--dtype bf16]": "--dtype bf16",
    " [FLAGS]": "",
    "$lr": "3e-4",
    "$seed": "1234",
}
MODEL = "--num-layers 1 --hidden-size 16 --num-attention-heads 2"
TRAINING = (
    "--seq-length 64 --global-batch-size 4 --micro-batch-size 4 --lr-warmup-iters 2 --lr-decay-tokens 2K "
    "--seqlen-warmup linear --seqlen-warmup-iters 16 --seqlen-start 8 --eval-iters 1 --split 80,20,0 --no-bf16 "
    "--no-fp16 --no-tensorboard --train-tokens 6K"
)
TINY = {
    "--finetune": "--train-iters 2 --lr-warmup-iters 1 --global-batch-size 4 --split 80,20,0",
    "--deepspeed-config": (
        f"{MODEL} {TRAINING} --seq-length 1024 --seqlen-warmup-iters 2 --data-path data/corpus_text_document "
        "--save runs/x --load runs/x"
    ),
    "--warmup .01": (
        f"{MODEL} --seq-length 64 --global-batch-size 2 --micro-batch-size 2 --train-iters 4 --lr-decay-iters 4 "
        "--eval-iters 1 --split 80,20,0 --no-fp16 --no-tensorboard"
    ),
    "--fit": MODEL,
    "pretrain_gpt2": f"{MODEL} {TRAINING}",
    "tools/train_tokenizer.py": "--vocab-size 400",
    "tools/preprocess_data.py": "--workers 2",
    "tools/generate_samples_gpt2.py": "--out-seq-length 8",
    "tools/tune_pacing.py": f"{MODEL} {TRAINING} --train-tokens 50K --max-multiple 4",
}
"""What a command contains (the first that fits) -> flags that come last."""

DOES_NOT_FIT = "--world-size 8 --gpu-memory 16"
"""The planner says so with status 1, and with advice."""

SLOW = ("docs/how-it-works.md", "docs/tuning.md")
"""Pages whose commands take long."""


def row(table: dict[str, str], command: str) -> str | None:
    return next((start for start in table if command.startswith(start)), None)


COMMANDS = [(page, command) for page in PAGES for command in commands_of(page)]


def test_every_row_is_needed_and_every_test_is_there() -> None:
    for table in (NOT_RUN, ELSEWHERE):
        assert not [start for start in table if not any(command.startswith(start) for _, command in COMMANDS)]
    assert not [text for text in STAND_INS if not any(text in command for _, command in COMMANDS)]
    for test in ELSEWHERE.values():
        path, _, name = test.partition("::")
        assert f"def {name}(" in (ROOT / "tests" / path).read_text(encoding="utf-8"), test
    for _, command in COMMANDS:
        assert not command.startswith("python benchmarks/") or shlex.split(command)[1].split("/")[1] in BENCHMARKS


def stories() -> dict[Path, list[str]]:
    """The commands that are run here, by page; a plan, which leaves nothing behind, is made once."""
    found: dict[Path, list[str]] = {}
    planned = set()
    for page, command in COMMANDS:
        if not (row(NOT_RUN, command) or row(ELSEWHERE, command) or command in planned):
            found.setdefault(page, []).append(command)
            planned |= {command} if "plan_run" in command or "--help" in command else set()
    return found


STORIES = stories()


def test_commands_are_found() -> None:
    """So that a change of the pages' form does not leave nothing to run."""
    told = [command for commands in STORIES.values() for command in commands]
    assert len(COMMANDS) > 100 and len(told) > 50 and len(set(told)) > 45
    programs = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("tools/*.py")}
    assert {program for program in programs if any(program in command for command in told)} >= programs - {
        "tools/verify_checkpoint.py",
        "tools/collect_stdlib.py",
        "tools/list_recipes.py",
    }


# The folder


WORDS = "the river runs cold under a stone bridge and nobody has told them of it again".split()


def documents(count: int) -> list[str]:
    """Texts of different lengths and openings."""
    return [" ".join(WORDS[(n * k) % len(WORDS)] for k in range(1, 60 + n % 7 * 9)) + "." for n in range(count)]


def readme_recipe() -> str:
    """my.yaml as the README has it."""
    (block,) = [block for block in split_page(ROOT / "README.md")[1] if block.startswith("# my.yaml")]
    return block


@pytest.fixture(scope="module")
def server() -> Iterator[ProgramServer]:
    started = ProgramServer()
    yield started
    started.close()


@pytest.fixture(scope="module")
def furnished(server: ProgramServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like the repository's root, with the files that pages take for granted."""
    from test_megatron_v1 import write as write_megatron
    from zeroshot_models import made_up_texts, save_hugging_face, small_gpt2, write_lambada

    here = tmp_path_factory.mktemp("furnished")
    for name in ("recipes", "tools", "scripts", "megatron", "examples", "pretrain_gpt2.py"):
        (here / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "docs", here / "docs", ignore=shutil.ignore_patterns("*.png"))
    (here / "docs/images").mkdir(exist_ok=True)
    texts = documents(300)
    for place in ("data/texts.jsonl", "my.jsonl"):
        (here / place).parent.mkdir(exist_ok=True)
        (here / place).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    for packed in ("data/texts.jsonl.gz", "books.jsonl.gz"):
        subprocess.run(f"gzip --stdout data/texts.jsonl > {packed}", shell=True, cwd=here, check=True)
    (here / "data/texts.jsonl").unlink()
    for place in ("data/notes.txt", "my.txt"):
        (here / place).write_text("\n\n".join(texts))
    (here / "wiki.test.tokens").write_text(" = A river = \n\n " + " \n ".join(texts[:3]) + " \n")
    (here / "prompts.txt").write_text("The river\nA stone\n")
    write_lambada(here / "lambada_test.jsonl", made_up_texts(4))
    (here / "my.yaml").write_text(readme_recipe())
    shutil.copy(ROOT / "recipes/deepspeed-tutorial.json", here / "ds.json")
    write_megatron(here / "old", ranks=2)
    run = partial(run_words, server, here)
    run(
        "tools/train_tokenizer.py --input data/notes.txt --text-unit paragraph --vocab-size 400 --output data/tokenizer"
    )
    tokenizer = "--vocab-file data/tokenizer/vocab.json --merge-file data/tokenizer/merges.txt"
    for prefix in ("data/corpus", "runs/quickstart/corpus"):
        (here / prefix).parent.mkdir(parents=True, exist_ok=True)
        run(f"tools/preprocess_data.py --input my.jsonl --output-prefix {prefix} --append-eod {tokenizer}")
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(here / "data/tokenizer" / name, here / f"gpt2-{name}")
    vocabulary = here / "data/tokenizer/vocab.json", here / "data/tokenizer/merges.txt"
    save_hugging_face(small_gpt2(len(json.loads(vocabulary[0].read_text())), 64), here / "gpt2", *vocabulary)
    run(
        "pretrain_gpt2.py --config my.yaml --data-path data/corpus_text_document --save runs/made",
        TINY["pretrain_gpt2"],
    )
    return here


def run_words(
    server: ProgramServer, here: Path, command: str, more: str = "", stdin: str = "", status: int = 0
) -> None:
    """Run `python COMMAND MORE`, which must end with `status`."""
    done = server.run(shlex.split(f"{command} {more}"), cwd=here, stdin=stdin)
    assert done.returncode == status, f"{command} {more}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


@pytest.fixture
def here(furnished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(furnished, tmp_path / "here", symlinks=True)


def furnish(here: Path, words: list[str]) -> None:
    """What a command makes is not there yet; a run that it reads, and that none before it made, is a copy of ours."""
    for result in ("data/tokenizer", "data/corpus"):
        if {f"--output {result}", f"--output-prefix {result}"} & set(map(" ".join, itertools.pairwise(words))):
            for path in here.glob(f"{result}*"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    for before, word in zip(["", *words], words, strict=False):
        for found in re.findall(r"(?:^|=)(runs/[\w.-]+)", word):
            saved = before in ("--save", "--output") or words[max(words.index(word), 1) - 1] == "--save"
            if not saved and f"--save {found}" not in " ".join(words) and not (here / found).exists():
                shutil.copytree(here / "runs/made", here / found)


def run_command(server: ProgramServer, here: Path, command: str) -> None:
    """Run a command as it stands on a page."""
    for text, instead in STAND_INS.items():
        command = command.replace(text, instead)
    piped = re.fullmatch(r'echo "(.*?)" \| (.*)', command)
    stdin, command = (piped[1] + "\n", piped[2]) if piped else ("", command)
    words = shlex.split(command)
    if "ds_train.sh" in command or ".slurm" in command:
        return launch(here, words)
    if "torchrun" in words:
        given = get_args_parser().parse_args(words[words.index("torchrun") + 1 :])
        words = ["python", *(["-m"] if given.module else []), given.training_script, *given.training_script_args]
    words = words[words.index("python") + 1 :]
    furnish(here, words)
    bare = "--help" in words or ("--dry-run" in words and "tune" not in command)
    more = "" if bare else next((flags for text, flags in TINY.items() if text in command), "")
    run_words(server, here, shlex.join(words), more, stdin, status=int(DOES_NOT_FIT in command))


def launch(here: Path, words: list[str]) -> None:
    """A launch script prints what it would run."""
    place = next(n for n, word in enumerate(words) if word.startswith("scripts/"))
    variables = dict(word.split("=", 1) for word in words[:place] if re.match("[A-Z_]+=", word))
    environment = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "GPUS_PER_NODE": "1"} | variables
    command = ["bash", words[place], *words[place + 1 :], "--dry-run"]
    done = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "pretrain_gpt2.py" in done.stdout, done.stderr
    assert all(value in done.stdout for name, value in variables.items() if name in ("CONFIG", "DATA", "SAVE"))


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=name_of(page), marks=[pytest.mark.slow] if name_of(page) in SLOW else [])
        for page in STORIES
    ],
)
def test_the_commands_of_a_page_run(page: Path, server: ProgramServer, here: Path) -> None:
    for command in STORIES[page]:
        run_command(server, here, command)
