"""The documentation against the program: links, commands, flags, messages, numbers, the width of lines."""

from __future__ import annotations

import argparse
import ast
import functools
import importlib
import importlib.util
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
from pages import PAGES, ROOT, commands_of, name_of, split_page

from megatron import deepspeed_config, old_flags
from megatron.arguments import build_parser, parse_config
from megatron.flags import Parser
from megatron.metrics import STEP_TAGS
from megatron.old_flags import SWITCHES
from megatron.pacing.plan import plan_run

TOOLS = {f"tools/{path.name}": f"tools.{path.stem}" for path in sorted(ROOT.glob("tools/*.py"))}
BENCHMARKS = {f"benchmarks/{path.name}": path.stem for path in sorted(ROOT.glob("benchmarks/bench_*.py"))}
PROGRAMS = {"pretrain_gpt2.py": "pretrain_gpt2"} | TOOLS | BENCHMARKS
"""Program, as a command names it -> module."""
MIGRATION = ROOT / "docs/migration.md"


def rows(page: Path, name: str) -> list[list[str]]:
    """The cells of the table between <!-- name --> and <!-- end -->, without its head."""
    table = page.read_text(encoding="utf-8").partition(f"<!-- {name} -->")[2].partition("<!-- end -->")[0]
    found = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.strip().splitlines()[2:]]
    assert found, name
    return found


# Links and lines


@functools.cache
def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings that GitHub and mkdocs agree on: the latter leaves one hyphen of several."""
    found = set()
    for heading in re.findall(r"^#+ (.*)", split_page(page)[0], re.MULTILINE):
        text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()
        anchor = re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", text))
        if anchor == re.sub(r"-+", "-", anchor):
            found.add(anchor)
    return found


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_relative_links_and_anchors_lead_somewhere(page: Path) -> None:
    prose = re.sub(r"`[^`\n]*`", "", split_page(page)[0])
    for path, anchor in re.findall(r"\]\(([^)\s:#]*)#?([^)\s:]*)\)", prose):
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{path} does not exist"
        assert not anchor or anchor in anchors(target), f"{path}#{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_lines_are_no_wider_than_120(page: Path) -> None:
    lines = enumerate(page.read_text(encoding="utf-8").splitlines(), 1)
    assert not [n for n, line in lines if len(line) > 120 and not line.startswith("|") and "://" not in line]


def test_every_page_is_in_the_sites_navigation() -> None:
    named = re.findall(r": ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    beside = {"readme.md", "contributing.md", "changelog.md", "recipes/README.md"}
    assert {page.name for page in ROOT.glob("docs/*.md")} == set(named) - beside


def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="needs the extra dev or docs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    front = (tmp_path / "site/index.html").read_text()
    assert 'href="recipes/"' in front and (tmp_path / "site/LICENSE.txt").read_text().strip().startswith("Apache")
    assert not re.findall(r'<(?:script|link|img)\b[^>]*="(?:https?:)?//', front), "loaded from elsewhere"


# Commands


class Parsed(Exception):
    """A program has come to its command line."""


def parser_of(program: str, words: list[str] | None, monkeypatch: pytest.MonkeyPatch) -> argparse.ArgumentParser:
    """The parser of a program, taken from it where it uses it; it has read `words`, unless they are None."""
    met: list[argparse.ArgumentParser] = []

    def cut(original: Any) -> Any:
        def parse(self: argparse.ArgumentParser, *arguments: Any) -> NoReturn:
            met.append(self)
            if words is not None:
                original(self, *arguments)
            raise Parsed

        return parse

    if program in BENCHMARKS:
        monkeypatch.syspath_prepend(ROOT / "benchmarks")
    main = importlib.import_module(PROGRAMS[program]).main
    monkeypatch.setattr(Parser, "parse_args", cut(Parser.parse_args))
    monkeypatch.setattr(sys, "argv", [program, *(words or [])])
    with pytest.raises(Parsed):
        main()
    return met[0]


OURS = re.compile(r"(tools|scripts|benchmarks)/\S+|pretrain_gpt2(\.py)?")


def commands() -> Iterator[tuple[str, list[str], str, list[str]]]:
    """Page, what stands before a program or script of ours, its path, and its arguments."""
    for page in PAGES:
        for command in commands_of(page):
            words = shlex.split(re.sub(r"\$\w+|\bN\b", "1", re.sub(r"[][]|.* \| | \.\.\.$", "", command)))
            place = next((n for n, word in enumerate(words) if OURS.fullmatch(word)), None)
            if place is not None and words[0] != "deepspeed" and "--help" not in words:
                program = words[place].removesuffix(".py") + ".py" * (not words[place].endswith((".sh", ".slurm")))
                yield name_of(page), words[:place], program, words[place + 1 :]


COMMANDS = list(commands())


@pytest.mark.parametrize(
    ("program", "words"),
    [
        pytest.param(program, words, id=f"{page}: {program}")
        for page, _, program, words in COMMANDS
        if program in PROGRAMS
    ],
)
def test_programs_know_the_flags_of_the_commands(
    program: str, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    files = ("--config", "--deepspeed-config")  # a page's my.yaml is not there
    given = [word for before, word in zip(["", *words], words, strict=False) if not {before, word} & set(files)]
    given = given[given[:1] == ["..."] :]  # flags that are left out, in the place of some
    parser_of(program, given, monkeypatch)


@pytest.mark.parametrize(
    ("before", "script", "words"),
    [
        pytest.param(b, program, words, id=f"{page}: {program}")
        for page, b, program, words in COMMANDS
        if program not in PROGRAMS
    ],
)
def test_scripts_know_the_flags_and_variables_of_the_commands(before: list[str], script: str, words: list[str]) -> None:
    text = (ROOT / script).read_text(encoding="utf-8")
    for word in words:
        passed_on = script == "scripts/test.sh" or "ds_train.sh" in text
        assert not word.startswith("--") or passed_on or re.search(rf"{word}(\)| \|)", text), word
    variables = (ROOT / "scripts/ds_train.sh").read_text(encoding="utf-8") if "ds_train.sh" in text else text
    for name in [word.partition("=")[0] for word in before if re.match(r"[A-Z_]+=", word)]:
        assert f"${{{name}:-" in variables, name


FLAG = re.compile(r"(?<![\w-])--[A-Za-z][\w-]*")
FOREIGN = """--nproc-per-node --nnodes --rdzv-backend --rdzv-endpoint --rdzv-id --max-restarts --master-addr --signal
--requeue --nodes --time --batch --x --include_path --model_args --batch_size --model --tasks
--ddp-reduce-scatter-with-fp32-accumulation --logdir""".split()
"""Flags of torchrun, SLURM, lm-eval, TensorBoard and Megatron-LM that pages name."""


def test_flags_that_pages_name_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    known = set(FOREIGN) | set(old_flags.ADVICE) | set(old_flags.REFUSED_FAMILIES) | {"--dry-run", "--help"}
    for program in PROGRAMS:
        with monkeypatch.context() as patch:
            known |= set(parser_of(program, None, patch)._option_string_actions)
    for script in ROOT.glob("scripts/*.sh"):
        known |= set(re.findall(r"(--[a-z-]+)\)", script.read_text(encoding="utf-8")))
    unknown = {}
    for page in (page for page in PAGES if page.name != "comparison.md"):  # which names those of others
        named = {flag for span in re.findall(r"`([^`\n]*)`", split_page(page)[0]) for flag in FLAG.findall(span)}
        unknown |= {name_of(page): sorted(named - known)} if named - known else {}
    assert not unknown


# Messages


@functools.cache
def messages() -> str:
    """Every text in the program, a line each, with ... for what is filled in."""
    found = []
    for path in [*ROOT.glob("megatron/**/*.py"), *ROOT.glob("tools/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            text = "".join(
                str(part.value) if isinstance(part, ast.Constant) else "..."
                for part in parts
                if isinstance(part, (ast.Constant, ast.FormattedValue))
            )
            found.append(re.sub(r"\.{3,}", "...", " ".join(text.split())))
    return "\n".join(found)


TORCHRUNS = re.compile(r"<!-- torchrun -->.*?<!-- end -->", re.DOTALL)
"""What torchrun says, on the page of what the program says."""


def troubleshooting() -> str:
    return TORCHRUNS.sub("", (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8"))


def quoted_messages() -> list[str]:
    return re.findall(r"^\| `([^`]+)`(?: \(a note\))? \| ", troubleshooting(), re.MULTILINE)


def test_what_torchrun_says_is_what_it_says() -> None:
    spec = importlib.util.find_spec("torch.distributed.elastic")
    assert spec and spec.origin
    said = "".join(path.read_text(encoding="utf-8") for path in Path(spec.origin).parent.rglob("*.py"))
    cells = [row[0] for row in rows(ROOT / "docs/troubleshooting.md", "torchrun")]
    quoted = [span for cell in cells for span in re.findall("`(.*?)`", cell)]
    parts = [part for span in quoted for part in re.split(r"\.\.\.|SIGTERM|-?\d+$", span) if part.strip()]
    assert len(parts) > 7 and not [part for part in parts if part not in said]


@pytest.mark.parametrize("message", quoted_messages())
def test_a_message_of_the_troubleshooting_page_is_one_of_the_program(message: str) -> None:
    assert message in messages()


def test_every_row_of_the_troubleshooting_page_quotes_a_message() -> None:
    text = troubleshooting()
    heads = text.count("| message | cause |")
    assert len(quoted_messages()) == sum(line.startswith("|") for line in text.splitlines()) - 2 * heads > 60


# Migration


def quoted(words: str) -> str:
    return ", ".join(f"`{word}`" for word in words.split())


def test_every_old_flag_is_in_the_migration_guide_with_what_the_program_says() -> None:
    spellings = [
        [f"`{old}`", f"`--{field.replace('_', '-')}`"] for field, names in old_flags.ALIASES.items() for old in names
    ]
    switches = [[f"`{old}`", f"`--{field.replace('_', '-')} {value}`"] for old, (field, value) in SWITCHES.items()]
    assert rows(MIGRATION, "aliases") == [*spellings, *switches]
    for name, table in {"ignored": old_flags.IGNORED, "preprocessing": old_flags.PREPROCESSING}.items():
        expected = [
            [quoted(row.flags), row.why, f"only {quoted(row.values)}; else {row.instead}" if row.values else ""]
            for row in table
        ]
        assert rows(MIGRATION, name) == expected
    assert rows(MIGRATION, "gone") == [[quoted(flags), advice] for flags, advice in old_flags.REFUSED.items()]
    assert rows(MIGRATION, "evaluation") == [[quoted(flags), advice] for flags, advice in old_flags.EVALUATION.items()]
    own = [[quoted(flags), text] for flags, text in old_flags.GENERATION.items() if flags not in old_flags.OF_A_MODEL]
    assert rows(MIGRATION, "generation") == own
    families = [[f"`{start}`...", advice] for start, advice in old_flags.REFUSED_FAMILIES.items()]
    assert rows(MIGRATION, "families") == families


def test_the_numbers_that_replace_megatrons_are_logged_under_these_names() -> None:
    fields = {"iteration", "consumed_tokens", "perplexity", *STEP_TAGS}
    table = rows(MIGRATION, "log")
    tags = {tag for row in table for tag in re.findall(r"`([a-z-]+/\w[\w-]*)`", row[2])}
    assert len(tags) >= 15 and tags <= {*STEP_TAGS.values(), "loss/validation", "loss/validation_perplexity"}
    named = {name for row in table for name in re.findall(r"`([a-z_]+)`", row[1])}
    assert len(named) > 12 and named <= fields | {"validation"}


def test_every_key_of_deepspeeds_json_is_in_the_migration_guide() -> None:
    table = {key.strip("`"): setting for key, setting in rows(MIGRATION, "deepspeed")}
    plain = deepspeed_config.COUNTERPARTS | deepspeed_config.SCALING
    growth = {f"curriculum_learning.{key}": (name, int) for key, name in deepspeed_config.GROWTH.items()}
    for key, (name, _) in (plain | growth).items():
        assert table.pop(key) == f"`--{name.replace('_', '-')}`"
    source = Path(str(deepspeed_config.__file__)).read_text(encoding="utf-8")
    for key in table:  # those that have a function of their own
        assert key.split("`")[0].rpartition(".")[2] in source, key


def test_flags_that_kept_their_names_are_known() -> None:
    section = MIGRATION.read_text(encoding="utf-8").partition("same name and meaning")[2].partition("Two of them")[0]
    kept = re.findall(r"`(--[\w-]+)`", section)
    assert len(kept) > 50 and set(kept) <= set(build_parser()._option_string_actions)


# Numbers and figures


def test_the_table_of_how_it_works_is_what_the_planner_says() -> None:
    text = (ROOT / "docs/how-it-works.md").read_text(encoding="utf-8")
    table = re.findall(r"^\| (gpt\S+) \| ([\d,]+) \| ([\d,]+) \| ([\d.]+%) \|$", text, re.MULTILINE)
    assert len(table) == 3
    for recipe, *cells in table:
        config, _ = parse_config(build_parser(), ["--config", str(ROOT / "recipes" / f"{recipe}.yaml")])
        planned = plan_run(config)
        found = [
            f"{planned.progress.iteration:,}",
            f"{planned.full_length_iteration:,}",
            f"{planned.discarded_share:.1%}",
        ]
        assert cells == found, recipe


def test_the_figures_of_how_it_works_are_those_that_the_script_draws() -> None:
    text = (ROOT / "docs/how-it-works.md").read_text(encoding="utf-8")
    script = (ROOT / "docs/figures.py").read_text(encoding="utf-8")
    drawn = re.findall(r'"([\w-]+)": \w+', script.partition("FIGURES = {")[2].partition("}")[0])
    assert set(re.findall(r"images/how-it-works-([\w-]+)\.png", text)) == set(drawn)
    assert all((ROOT / f"docs/images/how-it-works-{name}.png").exists() for name in drawn)


def test_the_comparison_in_the_readme_is_that_of_its_page() -> None:
    page, readme = ((ROOT / name).read_text(encoding="utf-8") for name in ("docs/comparison.md", "README.md"))
    sourced = set(re.sub(r" \[\d+\]", "", page).splitlines())
    table = readme.partition("## Against other trainers\n\n")[2].partition("\n\n")[0].splitlines()
    assert len(table) > 6 and set(table) <= sourced
    cited = {int(number) for number in re.findall(r" \[(\d+)\]", page)}
    assert cited == {int(number) for number in re.findall(r"^\| (\d+) \|", page, re.MULTILINE)}
