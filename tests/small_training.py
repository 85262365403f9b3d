"""A training of a few steps that uses every kind of state a checkpoint holds.

Run as a program it trains from the newest checkpoint of a directory (or from scratch) to a step, saves, and prints
each loss as float.hex(): `python small_training.py DIRECTORY STEP`.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megatron.checkpointing.checkpoint import find_whole, load_checkpoint, save_checkpoint
from megatron.checkpointing.commit import Report
from megatron.checkpointing.rng import capture_rng, restore_rng
from megatron.checkpointing.state import collect, restore
from megatron.progress import Duration, Progress

WIDTH, VOCABULARY = 16, 32


class SmallModel(nn.Module):
    """Tied embedding, dropout, a buffer, and a parameter that never gets a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.inner = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.LayerNorm(WIDTH), nn.Dropout(0.2))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight
        self.unused = nn.Parameter(torch.ones(3))
        self.seen: Tensor
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        self.seen += tokens.numel()
        return self.head(self.inner(self.embedding(tokens)))


class Training:
    """A model, its AdamW and its progress; lengths, rates and data follow from progress and the generators."""

    def __init__(self, *, fused: bool = False) -> None:
        torch.manual_seed(7)
        np.random.seed(7)
        random.seed(7)
        self.model = SmallModel()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2, fused=fused)
        self.progress = Progress()

    def run(self, until: int) -> list[str]:
        """Train up to step `until`; each loss as float.hex()."""
        losses = []
        while self.progress.iteration < until:
            seqlen = min(4 + 4 * self.progress.iteration, 16)
            self.optimizer.param_groups[0]["lr"] = 1e-2 / (1 + self.progress.iteration)
            tokens = torch.randint(VOCABULARY, (4, seqlen + 1))
            tokens[0] = random.randrange(VOCABULARY)
            scale = 1 + np.random.rand()
            logits = self.model(tokens[:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()) * scale
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.progress.advance(samples=4, tokens=4 * seqlen, lr_warmup=Duration(2, "iters"))
            losses.append(float(loss.item()).hex())
        return losses

    def state(self) -> dict[str, Any]:
        return {"progress": self.progress.to_dict(), "rng": capture_rng()}

    def save(self, directory: Path) -> Path:
        return save_checkpoint(
            directory,
            iteration=self.progress.iteration,
            tensors=collect(self.model, self.optimizer),
            state=self.state(),
            config_text="lr: 1e-2\n",
        )

    def take(self, path: Path) -> None:
        """Go on from the checkpoint `path`."""
        checkpoint = load_checkpoint(path)
        restore(self.model, self.optimizer, path)
        self.take_state(checkpoint.state)

    def take_state(self, state: dict[str, Any]) -> None:
        self.progress = Progress(**state["progress"])
        restore_rng(state["rng"])


def newest_whole(directory: Path, report: Report = lambda line: None) -> Path | None:
    """The checkpoint that a start with --load-fallback takes."""
    found = find_whole(directory, fallback=True, report=report)
    return found.path if found else None


def main(directory: Path, until: int) -> None:
    training = Training()
    latest = newest_whole(directory)
    if latest is not None:
        training.take(latest)
    losses = training.run(until)
    training.save(directory)
    print(json.dumps(losses))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
