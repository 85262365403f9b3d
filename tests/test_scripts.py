"""The shell scripts, where the environment that they make is there."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [(["--help"], 0, "From raw text"), (["--input", "/no/such.jsonl"], 1, "no such file"), (["--oops"], 2, "unknown")],
)
def test_the_quickstart_reads_its_arguments(arguments, status, said):
    if not list(ROOT.glob(".venv/.installed-base-*")):
        pytest.skip("needs the .venv that scripts/test.sh makes")
    result = subprocess.run(
        ["bash", str(ROOT / "scripts/quickstart.sh"), *arguments], capture_output=True, text=True, check=False
    )
    assert result.returncode == status, result.stderr
    assert said in result.stdout + result.stderr
