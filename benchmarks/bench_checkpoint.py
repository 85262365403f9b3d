"""How long a save holds up training, at once and in the background: python benchmarks/bench_checkpoint.py

Trains a GPT-2 for a few steps and saves between them, in turn without, at once and in the background; prints medians
and writes JSON. The time held up is that of the call that saves; in the background the steps meanwhile are timed too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron.checkpointing.saver import Saver
from megatron.checkpointing.state import collect
from megatron.config import MODEL_SIZES, Config, ModelConfig, TrainingConfig
from megatron.data.batch import Batch
from megatron.distributed.launch import choose_device
from megatron.distributed.parallelize import place
from megatron.distributed.world import World
from megatron.model.initialisation import initialise
from megatron.pacing.plan import StepPlan
from megatron.training.setup import build_state
from megatron.training.step import TrainStep
from pretrain_gpt2 import forward_step, model_provider


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-size", default="117M", choices=MODEL_SIZES)
    parser.add_argument("--seq-length", type=int, default=256)
    parser.add_argument("--sequences", type=int, default=2, help="of a step")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--directory", help="where to save (default: a temporary directory)")
    parser.add_argument("--output", help="JSON file")
    arguments = parser.parse_args()

    layers, hidden, heads = MODEL_SIZES[arguments.model_size]
    training = TrainingConfig(train_iters=1, global_batch_size=arguments.sequences, bf16=torch.cuda.is_available())
    model = ModelConfig(
        num_layers=layers, hidden_size=hidden, num_attention_heads=heads, seq_length=arguments.seq_length
    )
    config = Config(model=model, training=training)
    world = World(device=choose_device(training))
    state = build_state(config, 50257, world, model_provider, print)
    initialise(state.model, 1, place)
    step = TrainStep(
        state.model, state.optimizer, state.scaler, forward_step, training, config.optimizer, config.parallel, world
    )
    rows = np.random.default_rng(0).integers(0, 50257, (arguments.sequences, arguments.seq_length + 1))

    def train() -> float:
        started = time.perf_counter()
        step(Batch.from_samples(rows), StepPlan(arguments.seq_length, arguments.sequences, 1e-4))
        return time.perf_counter() - started

    train()
    seconds: dict[str, list[float]] = {"step": [], "save": [], "snapshot": [], "step while saving": [], "whole": []}
    with tempfile.TemporaryDirectory(dir=arguments.directory) as name:
        silent = {"report": lambda line: None, "keep_last": 2}
        with (
            Saver(Path(name) / "at-once", world, background=False, **silent) as at_once,
            Saver(Path(name) / "background", world, background=True, **silent) as background,
        ):
            for repeat in range(1, arguments.repeats + 1):
                tensors = collect(state.model, state.optimizer)
                seconds["step"].append(train())
                started = time.perf_counter()
                at_once.save(iteration=repeat, tensors=tensors, state={}, config_text="")
                seconds["save"].append(time.perf_counter() - started)
                started = time.perf_counter()
                background.save(iteration=repeat, tensors=tensors, state={}, config_text="")
                seconds["snapshot"].append(time.perf_counter() - started)
                seconds["step while saving"].append(train())
                background.wait()
                seconds["whole"].append(time.perf_counter() - started)
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print(
        f"{arguments.model_size} on {world.device}, torch {torch.__version__}, {size / 1e9:.2f} GB a checkpoint, "
        f"medians of {arguments.repeats}"
    )
    for name, what in (
        ("step", f"a step of {arguments.sequences} x {arguments.seq_length} tokens"),
        ("save", "held up by a save at once (read back included)"),
        ("snapshot", "held up by a save in the background"),
        ("step while saving", "a step during that save"),
        ("whole", "until it was on the disk"),
    ):
        print(f"  {medians[name]:8.3f} s  {what}")
    if arguments.output:
        Path(arguments.output).write_text(json.dumps({"bytes": size, "seconds": seconds}, indent=1) + "\n")


if __name__ == "__main__":
    main()
