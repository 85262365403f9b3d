"""The pages of the documentation, and the commands that stand in them."""

from __future__ import annotations

import functools
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "recipes/README.md", *sorted(ROOT.glob("docs/*.md"))]
COMMAND = re.compile(
    r"(?:[A-Z_]+=\S+ )*(?:\S*/)?"
    r"(?:python\d?|torchrun|bash|sh|sbatch|srun|scancel|pip|docker|make|pytest|hf|wandb|git|echo|cat|curl|wget|source|"
    r"mkdocs|tensorboard|megatron-slw|deepspeed|lm_eval|time) .*"
)
"""How a line begins that is typed, not printed."""


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@functools.cache
def split_page(page: Path) -> tuple[str, list[str]]:
    """The prose of a page, and its blocks of code: fenced, or indented by four."""
    prose: list[str] = []
    blocks: list[str] = []
    fenced = False
    for line in page.read_text(encoding="utf-8").splitlines():
        if line.startswith("```"):
            fenced = not fenced
            blocks.append("")
        elif fenced or line.startswith("    "):
            blocks[-1:] = [f"{blocks[-1] if blocks else ''}{line.strip()}\n"]
        else:
            prose.append(line)
            blocks.append("")
    return "\n".join(prose), [block for block in blocks if block]


@functools.cache
def commands_of(page: Path) -> list[str]:
    """The commands of a page, each a line without its comment: those of code blocks in order, then of the prose."""
    prose, blocks = split_page(page)
    lines = "".join(blocks).replace("\\\n", " ").splitlines() + re.findall(r"`([^`]+)`", prose)
    plain = (re.sub(r"^\$ | +#.*| &&.*|; done$", "", " ".join(line.split())) for line in lines)
    return list(dict.fromkeys(line for line in plain if COMMAND.fullmatch(line)))
