"""docs/elsewhere.md: every block runs and prints what stands below it, and every import needs what its table says."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/elsewhere.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)
"""(language, content) in the order of the page."""
HUGGING_FACE = "huggingface_trainer"
PACKAGES = {"PyYAML": ("yaml",), "NumPy": ("numpy",), "Matplotlib": ("matplotlib",), "Python alone": (),
            "torch": ("torch",), "transformers": ("transformers",), "accelerate": ("accelerate",)}  # fmt: skip


def run_program(*arguments: str, cwd: Path = ROOT, isolated: bool = False) -> subprocess.CompletedProcess[str]:
    options = ["-I", "-S"] if isolated else []
    return subprocess.run(
        [sys.executable, *options, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=cwd, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that looks like the repository's root, and may be written to."""
    for name in ("recipes", "tools", "examples", "docs"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_block_is_of_a_kind_that_is_run():
    assert {language for language, _ in BLOCKS} == {"python", "text", "bash"}
    assert [language for language, _ in BLOCKS].count("python") == PAGE.count("```python")
    assert not re.findall(r"(?:^|\n\n)    \S", PAGE)  # no indented blocks beside the fenced ones


def test_python_blocks_print_what_stands_below_them(clone: Path):
    """One after the other in one namespace, as a reader would type them; output is compared to the letter."""
    namespace: dict[str, Any] = {}
    ran = 0
    for (language, content), (following, expected) in zip(BLOCKS, [*BLOCKS[1:], ("", "")], strict=True):
        if language == "python" and HUGGING_FACE not in content:
            output = io.StringIO()
            with contextlib.redirect_stdout(output):
                exec(compile(content, "docs/elsewhere.md", "exec"), namespace)
            assert output.getvalue() == (expected if following == "text" else "")
            ran += 1
    assert ran == len([language for language, _ in BLOCKS if language == "python"]) - 1
    command = next(content for language, content in BLOCKS if "compare_runs" in content and language == "bash")
    compared = run_program(*shlex.split(command)[1:], cwd=clone)
    assert compared.returncode == 0, compared.stderr
    assert re.search(r"^largest loss ratio +1\.4", compared.stdout, flags=re.MULTILINE), compared.stdout


def test_the_block_of_hugging_face_runs(tmp_path: Path):
    pytest.importorskip("accelerate", reason="needs the extra 'hf'")
    import torch
    import transformers

    from megatron.config import Config, LearningRateConfig, ModelConfig, SeqlenWarmupConfig, TrainingConfig

    data = [{"input_ids": row, "labels": row} for row in torch.randint(16, (8, 16))]
    given = {
        "config": Config(
            model=ModelConfig(seq_length=16),
            seqlen_warmup=SeqlenWarmupConfig(seqlen_warmup="linear", seqlen_start=8, seqlen_warmup_iters=2),
            training=TrainingConfig(train_tokens=100, global_batch_size=4),
            learning_rate=LearningRateConfig(lr=1e-3),
        ),
        "model": transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=16, n_positions=16, n_embd=8, n_layer=1, n_head=1)
        ),
        "arguments": transformers.TrainingArguments(
            str(tmp_path),
            per_device_train_batch_size=4,
            max_steps=9,
            learning_rate=1e-3,
            use_cpu=True,
            report_to="none",
        ),
        "train_dataset": data,
        "eval_dataset": data,
    }
    (block,) = [content for language, content in BLOCKS if language == "python" and HUGGING_FACE in content]
    exec(compile(block, "docs/elsewhere.md", "exec"), given)
    assert given["trainer"].progress.consumed_tokens == 4 * (8 + 16 + 16)


def test_the_plain_example_runs_as_the_page_says(clone: Path):
    (command,) = [content for language, content in BLOCKS if language == "bash" and "plain_pytorch" in content]
    done = run_program(*shlex.split(command)[1:], cwd=clone)
    assert done.returncode == 0, done.stderr
    lengths = {int(t): int(s) for t, s in re.findall(r"^step +(\d+) .*seqlen +(\d+)", done.stdout, flags=re.MULTILINE)}
    assert lengths == {t: (8 + 120 * min(t, 40) // 40) // 8 * 8 for t in lengths} and len(lengths) == 8
    assert re.search(r"^step   78 tokens 120,064 .* lr 2\.14e-06", done.stdout, flags=re.MULTILINE)
    losses = [float(loss) for loss in re.findall(r" loss (\S+)$", done.stdout, flags=re.MULTILINE)]
    assert losses[-1] < losses[0] - 1 and "at the full length of 128" in done.stdout


def test_the_example_of_hugging_face_runs_as_the_page_says(clone: Path):
    pytest.importorskip("accelerate", reason="needs the extra 'hf'")
    commands = [content for language, content in BLOCKS if language == "bash" and HUGGING_FACE in content]
    done = run_program(*shlex.split(commands[0])[1:], cwd=clone)
    assert done.returncode == 0, done.stderr
    lengths = [int(s) for s in re.findall(r"'seqlen': (\d+)", done.stdout)]
    assert lengths == [(8 + 120 * min(t, 40) // 40) // 8 * 8 for t in range(10, 71, 10)]
    assert "trained on 120,064 tokens in 78 steps" in done.stdout


@pytest.mark.parametrize("name", ["plain_pytorch", "huggingface_trainer"])
def test_a_text_that_is_too_short_is_refused(name: str, tmp_path: Path):
    if name == HUGGING_FACE:
        pytest.importorskip("transformers", reason="needs the extra 'hf'")
    (tmp_path / "short.txt").write_text("too short")
    done = run_program(str(ROOT / f"examples/{name}.py"), str(tmp_path / "short.txt"))
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert re.search(r"error: .*short\.txt: expected 4,09\d bytes or more, found 9", done.stderr)


TABLE = [
    (re.findall(r"`(megatron[\w.]*)`", modules), [package for name in needs.split(", ") for package in PACKAGES[name]])
    for modules, needs in re.findall(r"^\| (`megatron.*?) \| (.*?) \|$", PAGE, flags=re.MULTILINE)
]


@pytest.mark.parametrize("modules, needs", [row for row in TABLE if not row[1]])
def test_imports_that_need_python_alone(modules: list[str], needs: list[str]):
    """Without any installed package (-S), and they plan a run and measure one."""
    program = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import {", ".join(modules)}
from megatron.config import Config, SeqlenWarmupConfig, TrainingConfig
from megatron.instability.loss_ratio import LossRatio
from megatron.model.plan import plan_table, plan_totals
config = Config(seqlen_warmup=SeqlenWarmupConfig(seqlen_warmup="linear", seqlen_warmup_iters=4),
                training=TrainingConfig(train_iters=8, global_batch_size=2))
totals = plan_totals(config)
assert "full length from     step 4" in plan_table(config, totals)
assert totals["consumed_tokens"] == 2 * (256 + 512 + 768 + 5 * 1024), totals
ratio = LossRatio()
assert [ratio.update(loss) for loss in (2.0, 3.0)] == [None, 1.5]
"""
    done = run_program("-c", program, isolated=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("modules, needs", [row for row in TABLE if row[1] and "torch" not in row[1]])
def test_imports_need_no_more_than_the_table_says(modules: list[str], needs: list[str]):
    """torch, and every other package of the table that the row does not name, cannot be imported."""
    blocked = sorted({package for packages in PACKAGES.values() for package in packages} - set(needs))
    assert "torch" in blocked
    program = f"import sys; sys.modules.update(dict.fromkeys({blocked})); import {', '.join(modules)}"
    done = run_program("-c", program)
    assert done.returncode == 0, done.stderr


def test_pacing_names_what_a_trainer_needs():
    import megatron.pacing

    assert {"Progress", "Schedules", "plan_run", "walk", "grown_seqlen"} <= set(megatron.pacing.__all__)
    assert all(hasattr(megatron.pacing, name) for name in megatron.pacing.__all__)
