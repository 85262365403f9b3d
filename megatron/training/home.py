"""The run's directory: what may be there at a start, which checkpoint is taken, what stays at the end."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from megatron.arguments import to_yaml
from megatron.checkpointing.checkpoint import STATE, Checkpoint, check_space, find_whole
from megatron.checkpointing.commit import (
    CHECKPOINTS,
    checkpoints_in,
    named_checkpoints,
    newest_iteration,
    reap_temporary,
    set_aside_newer,
)
from megatron.checkpointing.rng import restore_rng
from megatron.checkpointing.state import collect, restore
from megatron.config import CheckpointConfig, Config
from megatron.console import ProgressLine
from megatron.distributed.world import World
from megatron.errors import UserError
from megatron.files import file_errors, write_atomic
from megatron.metrics import EXIT_FILE, METRICS_FILE
from megatron.training.state import NEEDED_BY_WEIGHTS, TrainState, check_settings


def check_homes(config: CheckpointConfig) -> None:
    """Refuse, before anything is built, a --save that is missing or holds another run."""
    if config.save is None:
        if config.save_interval is not None or config.save_interval_tokens is not None:
            raise UserError("--save-interval needs --save DIR, the directory to save to")
        return
    home = Path(config.save)
    log = home / METRICS_FILE
    if any((home / CHECKPOINTS).glob("iter_*")) or (log.exists() and log.stat().st_size):
        if not continues(config):
            found = named_checkpoints(checkpoints_in(Path(config.load))) if config.load is not None else []
            if config.load is not None and not any(path.exists() for path in found):
                raise UserError(
                    f"--load {config.load}: no checkpoint found there, and --save {home} already holds a run: give "
                    f"--load {home} to continue it, or the run to start from and another --save"
                )
            raise UserError(
                f"--save {home} already holds a run: add --load {home} to continue it, or choose another directory"
            )
        if config.finetune:
            raise UserError(
                f"--finetune starts a new run, but --save {home} already holds one: choose another directory"
            )


def continues(config: CheckpointConfig) -> bool:
    """Whether --load lies in --save: the run, its checkpoints or one of them."""
    if config.load is None or config.save is None:
        return False
    load, home = Path(config.load).resolve(), Path(config.save).resolve()
    return load == home or home / CHECKPOINTS in (load, load.parent)


def find_checkpoint(config: CheckpointConfig, world: World, console: ProgressLine) -> Checkpoint | None:
    """The newest checkpoint below --load, or the one that it names; None where the run starts from scratch."""
    if config.load is None:
        return None
    directory = checkpoints_in(Path(config.load))
    found = find_whole(directory, fallback=config.load_fallback, world=world, report=console.message)
    if found is None:
        if not continues(config):
            advice = "give the run's directory or drop --load"
            if Path(config.load, "config.json").is_file():
                advice = (
                    "it looks like a Hugging Face model: make a checkpoint of it first (tools/convert_checkpoint.py "
                    f"--from hf --load {config.load} --save DIR), then --load DIR --finetune"
                )
            raise world.fault(f"--load {config.load}: no checkpoint found there; {advice}")
        console.message(f"{config.load}: a new run, no checkpoint there yet")
    return found


def how_to_go_on(config: CheckpointConfig) -> str:
    """After an end that was not planned: how to go on, and from which checkpoint."""
    if config.save is None:
        return "nothing is saved: no --save"
    step = newest_iteration(Path(config.save) / CHECKPOINTS)
    if step is None:
        again = f"start it again with --load {config.save}"
        if config.finetune or (config.load is not None and not continues(config)):  # it began with another's weights
            again = "start it again with another --save"
        return f"no checkpoint was saved yet: {again}, from the beginning"
    without = ", without --finetune" * config.finetune
    return f"start it again with --load {config.save}{without}: it goes on from step {step:,}"


@contextmanager
def noting_how_to_go_on(config: CheckpointConfig) -> Iterator[None]:
    """Note on what ends the training, where the run goes on; nothing as long as there is no checkpoint."""
    try:
        yield
    except Exception as error:
        with suppress(UserError):
            if config.save is not None and newest_iteration(Path(config.save) / CHECKPOINTS) is not None:
                error.add_note(how_to_go_on(config))
        raise


def resume(
    state: TrainState,
    checkpoint: Checkpoint,
    config: Config,
    settings: dict[str, Any],
    world: World,
    console: ProgressLine,
) -> None:
    """Take over a checkpoint, by whatever layout it was saved."""
    options, path = config.checkpoint, checkpoint.path
    guarded = {n: v for n, v in settings.items() if n in NEEDED_BY_WEIGHTS} if options.finetune else settings
    whole = state.to_dict({}, layout="", rng=None).keys()
    require_state(checkpoint, {"settings"} if options.finetune else whole, world)
    for line in world.everywhere(
        lambda: check_settings(checkpoint.state["settings"], guarded, options.override, str(path))
    ):
        console.message(f"--override {line}")
    if options.finetune:
        restore(state.model, None, path, world=world)
        console.message(f"weights of {path}")
        return
    saved, now = checkpoint.state["layout"], layout_name(config, world)
    take_over(state, checkpoint, config, world)
    console.message(f"resumed from {path}: step {checkpoint.iteration:,}")
    if saved != now:
        console.message(
            f"saved as {saved}, now {now}: the state is resharded; the order of the data is the same, rounding and "
            "dropout are not: not bit for bit"
        )


def require_state(checkpoint: Checkpoint, needed: Collection[str], world: World) -> None:
    """Refuse a checkpoint whose state lacks a `needed` part: one of an older version, as no file of it is damaged.

    Raises:
        UserError: on every rank.
    """
    missing = sorted(set(needed) - checkpoint.state.keys())
    if "progress" in missing:
        raise world.fault(f"--load {checkpoint.path}: holds weights only; give --finetune to start a run from them")
    if missing:
        version = checkpoint.state.get("versions", {}).get("megatron", "unknown")
        raise world.fault(
            f"{checkpoint.path / STATE}: expected {', '.join(missing)}, found none: it was saved by an older trainer "
            f"(version {version}); finish that run with it, or take the weights alone with --finetune"
        )


def take_over(state: TrainState, checkpoint: Checkpoint, config: Config, world: World) -> None:
    """Everything of a checkpoint, the generators last: nothing may draw after them."""
    optimizer = state.optimizer if config.checkpoint.load_optim else None
    restore(state.model, optimizer, checkpoint.path, world=world)
    state.load_dict(checkpoint.state)
    generators = checkpoint.state["rng"] if config.checkpoint.load_rng else None
    if generators is not None and checkpoint.state["layout"] == layout_name(config, world):
        restore_rng(generators[world.rank])


def layout_name(config: Config, world: World) -> str:
    """What of the layout decides the last bits of a step."""
    layout, parallel = world.layout, config.parallel
    parts = [str(layout)]
    if parallel.sequence_parallel:
        parts.append("sequence parallel")
    if layout.dp > 1:
        parts.append(
            f"ZeRO {parallel.zero_stage}{f' within {layout.shard}' if parallel.data_parallel_shard_size else ''}"
        )
    if parallel.grad_reduce_in_bf16:
        parts.append("gradients reduced in bf16")
    if world.device.type == "cuda":
        parts.append("on GPUs")
    return ", ".join(parts)


def open_home(config: Config, state: TrainState, console: ProgressLine) -> None:
    """Make the run's directory ready, if --save names one: write its config.yaml, and forget how it ended before.

    Raises:
        UserError: where it cannot take a checkpoint.
    """
    if config.checkpoint.save is None:
        return
    home = Path(config.checkpoint.save)
    directory = home / CHECKPOINTS
    reap_temporary(directory, console.message)
    set_aside_newer(directory, state.progress.iteration, console.message)
    check_space(directory, collect(state.model, state.optimizer if config.checkpoint.save_optim else None))
    write_atomic(home / "config.yaml", to_yaml(config))
    with file_errors("delete", home / EXIT_FILE):
        (home / EXIT_FILE).unlink(missing_ok=True)


def stop_file(config: Config, world: World) -> Path | None:
    """SAVE/STOP, which people may create to stop the run; None on ranks that do not look for it."""
    save = config.checkpoint.save
    return Path(save) / "STOP" if save is not None and world.is_main else None


def write_exit(home: Path, status: str, iteration: int, reason: str | None) -> None:
    """Note in SAVE/exit.json how the run has ended: finished, stopped (saved, to go on) or diverged."""
    entry = {"status": status, "iteration": iteration, "reason": reason}
    write_atomic(home / EXIT_FILE, json.dumps(entry) + "\n")
