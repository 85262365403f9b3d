"""The wheel, what an installation of it does outside of the repository, and the files around the code."""

from __future__ import annotations

import configparser
import email
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

import megatron
from megatron import cli
from megatron.errors import CommandLineError

ROOT = Path(__file__).resolve().parents[1]
NO_COMPILER = {"CC": "false", "CXX": "false"}
"""Building needs none: the helper that would be compiled is left out."""


def run(*command: str | Path, cwd: Path, status: int = 0, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run outside of the repository, without a trace of it in the environment."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"} | variables
    done = subprocess.run([*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stdout + done.stderr
    return done


def files_in(directory: Path) -> set[str]:
    return {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}


# The archives


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository, without what git ignores: building writes into it."""
    ignored = [line.rstrip("/") for line in (ROOT / ".gitignore").read_text().split()]
    copy = tmp_path_factory.mktemp("tree") / "repository"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", *ignored))
    return copy


@pytest.fixture(scope="module")
def sdist(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("sdist")
    build = f"from setuptools.build_meta import build_sdist; build_sdist({str(place)!r})"
    run(sys.executable, "-c", build, cwd=tree)
    (archive,) = place.iterdir()
    return archive


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the sdist, so that nothing is missing there."""
    place = tmp_path_factory.mktemp("wheel")
    offline = ("--no-deps", "--no-index", "--no-build-isolation", "--no-cache-dir")
    run(sys.executable, "-m", "pip", "wheel", *offline, "-w", place, sdist, cwd=place, **NO_COMPILER)
    (archive,) = place.iterdir()
    return archive


def test_the_sdist_is_the_whole_repository(tree: Path, sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    built = {name for name in files_in(tree) if ".egg-info/" in name}
    assert files_in(tree) - packed - built == {".ci/run"}
    assert not {name for name in packed if "__pycache__" in name or name.endswith(".so")}


def test_the_wheel_holds_the_package_and_nothing_else(tree: Path, wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    information = {name for name in names if name.startswith(f"megatron_slw-{megatron.__version__}.dist-info/")}
    sources = {name for name in files_in(tree / "megatron") if name.endswith((".py", "py.typed"))}
    beside = {f"{folder}/{name}" for folder in ("tools", "recipes") for name in files_in(tree / folder)}
    assert names - information == {"pretrain_gpt2.py"} | {f"megatron/{name}" for name in sources | beside}
    assert "megatron/py.typed" in names and "megatron/recipes/quickstart/slw.yaml" in names


def test_the_wheel_says_what_it_is(wheel: Path) -> None:
    folder = f"megatron_slw-{megatron.__version__}.dist-info"
    with zipfile.ZipFile(wheel) as archive:
        metadata = email.message_from_bytes(archive.read(f"{folder}/METADATA"))
        licence = archive.read(f"{folder}/licenses/LICENSE")
        scripts = configparser.ConfigParser()
        scripts.read_string(archive.read(f"{folder}/entry_points.txt").decode())
    assert (metadata["Name"], metadata["License-Expression"]) == ("megatron-slw", "Apache-2.0")
    assert {"hf", "eval", "wandb", "docs", "dev"} <= set(metadata.get_all("Provides-Extra", []))
    assert licence == (ROOT / "LICENSE").read_bytes() and b"Version 2.0, January 2004" in licence
    assert dict(scripts["console_scripts"]) == {"megatron-slw": "megatron.cli:entry"}


# The command


@pytest.fixture(scope="module")
def command(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """megatron-slw in a new environment that has the wheel, and sees the dependencies of this one but not its packages
    installed in place."""
    home = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", home, cwd=home)
    pip = (sys.executable, "-m", "pip", "--python", home / "bin/python")
    run(*pip, "install", "--no-deps", "--no-index", wheel, cwd=home)
    (packages,) = home.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return home / "bin/megatron-slw"


def test_every_program_has_a_command() -> None:
    tools = {f"tools/{path.name}" for path in ROOT.glob("tools/[!_]*.py")}
    assert sorted(cli.COMMANDS.values()) == sorted({"pretrain_gpt2.py"} | tools)


def test_an_unknown_command_is_refused_with_the_nearest() -> None:
    with pytest.raises(CommandLineError, match="unknown command 'pln': did you mean plan"):
        cli.load("pln")
    with pytest.raises(CommandLineError, match="unknown command '--config': expected one of pretrain, plan, "):
        cli.load("--config")


def test_the_command_tells_its_version_and_its_programs(command: Path, tmp_path: Path) -> None:
    assert run(command, "--version", cwd=tmp_path).stdout == f"megatron-slw {megatron.__version__}\n"
    told = run(command, "--help", cwd=tmp_path).stdout
    assert run(command, cwd=tmp_path, status=1).stdout == told
    assert re.findall(r"^  ([a-z]\S+) +\S.*\n +\((\S+)\)$", told, re.MULTILINE) == list(cli.COMMANDS.items())
    recipes = Path(told.rpartition(" ")[2].strip())
    assert recipes.is_relative_to(command.parents[1]) and files_in(recipes) == files_in(ROOT / "recipes")


def test_a_command_speaks_as_its_program_does(command: Path, tmp_path: Path) -> None:
    for words, status in (["--help"], 0), (["--confg", "x"], 1), (["--config", "none.yaml"], 1):
        ours = run(command, "plan", *words, cwd=tmp_path, status=status)
        program = run(sys.executable, ROOT / "tools/plan_run.py", *words, cwd=tmp_path, status=status)
        said = program.stdout.replace("usage: plan_run.py", "usage: megatron-slw plan")
        assert (ours.stdout, ours.stderr) == (said, program.stderr)
    assert "usage: megatron-slw recipes [-h]" in run(command, "recipes", "--help", cwd=tmp_path).stdout


def test_a_program_leaves_no_trace_in_the_path(command: Path, tmp_path: Path) -> None:
    code = "import sys; from megatron import cli; cli.load('plan'); print(cli.PACKAGE, *sys.path, sep='\\n')"
    package, *path = run(command.with_name("python"), "-c", code, cwd=tmp_path).stdout.splitlines()
    assert Path(package).is_relative_to(command.parents[1].resolve()) and package not in path


SMALL = """
num-layers: 1
hidden-size: 16
num-attention-heads: 2
seq-length: 32
global-batch-size: 4
micro-batch-size: 4
lr: 1e-3
train-iters: 2
seqlen-warmup: linear
seqlen-start: 8
seqlen-warmup-iters: 2
split: 1,0,0
log-interval: 1
tensorboard: false
"""
"""Two steps, t = 1 and 2, of 4 sequences of 16 (20, rounded down) and of 32 tokens."""
TOKENS = 4 * 16 + 4 * 32


def test_an_installation_trains_outside_of_the_repository(command: Path, tmp_path: Path) -> None:
    texts = ["Short sequences first. " * 40, "Long ones later. " * 60, "A third document, of other words. " * 30]
    (tmp_path / "raw.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (tmp_path / "small.yaml").write_text(SMALL)

    def slw(line: str) -> str:
        return run(command, *line.split(), cwd=tmp_path).stdout

    slw("train-tokenizer --input raw.jsonl --vocab-size 270 --output tokenizer")
    files = "--vocab-file tokenizer/vocab.json --merge-file tokenizer/merges.txt"
    assert slw(f"preprocess --input raw.jsonl --output-prefix corpus --append-eod {files}").startswith("3 documents, ")
    data = "--config small.yaml --data-path corpus_text_document"
    planned = json.loads(slw(f"plan {data} --json"))
    slw(f"pretrain {data} --save run")
    steps = [
        line for line in map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines()) if "loss" in line
    ]
    assert [step["seqlen"] for step in steps] == [16, 32]
    assert steps[-1]["consumed_tokens"] == planned["consumed_tokens"] == TOKENS
    assert json.loads((tmp_path / "run/exit.json").read_text())["status"] == "finished"
    trials = slw(f"tune {data} --train-iters 60 --lr-warmup-iters 1 --split 80,20,0 --output tuning --dry-run").split()
    programs = [Path(word) for word in trials if word.endswith("pretrain_gpt2.py")]
    assert programs and all(path.is_relative_to(command.parents[1]) and path.is_file() for path in programs)


# The files around the code


def test_versions_agree() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    newest = re.search(r"^## \[([^]]+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest and megatron.__version__ == citation["version"] == newest[1]
    assert 'version = { attr = "megatron.__version__" }' in (ROOT / "pyproject.toml").read_text()


def test_the_citation_has_what_its_format_requires_and_names_the_paper() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert all(citation[key] for key in ("cff-version", "message", "title", "authors"))
    paper = citation["preferred-citation"]
    assert all(paper[key] for key in ("type", "title", "authors")) and paper["year"] == 2022
    assert [author["family-names"] for author in paper["authors"]] == ["Li", "Zhang", "He"]
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert f'"{paper["title"]}"]({paper["url"]})' in readme and paper["url"].endswith("2108.06084")


def test_commits_are_checked_by_what_the_test_command_runs() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    script = (ROOT / "scripts/test.sh").read_text()
    for hook, check in zip(hooks, ("ruff check", "ruff format"), strict=True):
        assert re.search(rf"^{check} ", script, re.MULTILINE)
        assert f"source scripts/environment.sh dev && exec {check} " in hook["entry"]


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("target", ["quickstart", "test", "lint", "docs", "wheel"])
def test_the_targets_of_make_call_scripts_that_are_there(target: str, tmp_path: Path) -> None:
    told = run("make", "--dry-run", "--no-print-directory", "-C", ROOT, target, cwd=tmp_path).stdout
    scripts = re.findall(r"(?:bash|source) (\S+)", told)
    assert scripts and all((ROOT / script).is_file() for script in scripts)
    assert f"  {target} " in run("make", "--no-print-directory", "-C", ROOT, cwd=tmp_path).stdout


# The Dockerfile, which is built nowhere here


def instructions(text: str) -> list[tuple[str, str]]:
    """Each instruction of a Dockerfile, and the rest of its line."""
    lines = [line for line in text.splitlines() if line and not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(line.partition(" ")[0], line.partition(" ")[2]) for line in joined.splitlines()]


def complaints(text: str) -> list[str]:
    """What is wrong with a Dockerfile of this repository."""
    steps = instructions(text)
    names = [name for name, _ in steps]
    values = {name: [rest for given, rest in steps if given == name] for name in names}
    torch = re.search(r"^torch==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    copied = [source for rest in values.get("COPY", []) for source in rest.split()[:-1]]
    sent = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    needed = {"pyproject.toml", "setup.py", "README.md", "LICENSE", "pretrain_gpt2.py", "megatron", "tools", "recipes"}
    known = {"ARG", "FROM", "RUN", "ENV", "WORKDIR", "COPY", "USER", "CMD"}
    checks = {
        "an instruction that is unknown or not wanted": set(names) <= known,
        "not one FROM, before all but ARG": names.count("FROM") == 1 and set(names[: names.index("FROM")]) <= {"ARG"},
        "not PyTorch's runtime image of the version in constraints.txt": torch is not None
        and values["FROM"][0].startswith(f"pytorch/pytorch:{torch[1]}-cuda")
        and values["FROM"][0].endswith("-cudnn9-runtime"),
        "apt-get without update, --yes, or cleaning up": all(
            re.search(
                r"apt-get update && apt-get install --yes --no-install-recommends .*&& rm -rf /var/lib/apt/lists/\*",
                rest,
            )
            for rest in values["RUN"]
            if "apt-get" in rest
        ),
        "pip without constraints": all(
            "--constraint constraints.txt" in r for r in values["RUN"] if "pip install" in r
        ),
        "pip keeps its cache": any("PIP_NO_CACHE_DIR=1" in rest for rest in values.get("ENV", [])),
        "a relative WORKDIR": all(rest.startswith("/") for rest in values.get("WORKDIR", [])),
        "COPY of what is not there": all((ROOT / source).exists() for source in copied),
        "COPY and .dockerignore differ": sorted(copied) == sorted(sent),
        "what the installation needs is not copied": needed <= set(copied),
        "root at the end": values.get("USER", ["root"])[-1] not in ("root", "0")
        and "RUN" not in names[len(names) - names[::-1].index("USER") :],
        "no CMD in JSON": names[-1] == "CMD" and isinstance(yaml.safe_load(values["CMD"][0]), list),
    }
    return [complaint for complaint, fine in checks.items() if not fine]


def test_the_dockerfile_keeps_the_rules() -> None:
    assert complaints((ROOT / "Dockerfile").read_text()) == []


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("ENV PIP", "MAINTAINER me\nENV PIP", "an instruction that is unknown or not wanted"),
        ("ARG CUDA", "USER root\nARG CUDA", "not one FROM, before all but ARG"),
        ("pytorch:2.13.0", "pytorch:latest", "not PyTorch's runtime image of the version in constraints.txt"),
        ("apt-get update", "true", "apt-get without update, --yes, or cleaning up"),
        ("--constraint constraints.txt ", "", "pip without constraints"),
        ("PIP_NO_CACHE_DIR=1", "PIP_QUIET=1", "pip keeps its cache"),
        ("WORKDIR /opt", "WORKDIR opt", "a relative WORKDIR"),
        ("constraints.txt README", "constraint.txt README", "COPY of what is not there"),
        ("COPY scripts scripts\n", "", "COPY and .dockerignore differ"),
        ("COPY recipes recipes\n", "", "what the installation needs is not copied"),
        ("USER trainer\n", "", "root at the end"),
        ("USER trainer", "USER trainer\nRUN true", "root at the end"),
        ('CMD ["megatron-slw", "--help"]', "CMD megatron-slw --help", "no CMD in JSON"),
    ],
)
def test_the_rules_of_the_dockerfile_are_rules(old: str, new: str, complaint: str) -> None:
    text = (ROOT / "Dockerfile").read_text()
    assert old in text and complaint in complaints(text.replace(old, new))
