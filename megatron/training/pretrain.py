"""A whole run: what is built for it, and in what order."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from megatron.arguments import flat
from megatron.checkpointing.commit import CHECKPOINTS
from megatron.checkpointing.saver import Saver
from megatron.config import Config
from megatron.console import ProgressLine
from megatron.data.datasets import open_data
from megatron.data.sampler import SampleLoader
from megatron.distributed.launch import connect, under_torchrun
from megatron.distributed.parallelize import place
from megatron.distributed.watch import Watch
from megatron.distributed.world import World
from megatron.errors import EXIT_FINISHED
from megatron.metrics import MetricsLogger
from megatron.model.initialisation import initialise
from megatron.pacing.plan import look_ahead
from megatron.training.description import describe, last_step
from megatron.training.home import (
    check_homes,
    continues,
    find_checkpoint,
    how_to_go_on,
    noting_how_to_go_on,
    open_home,
    resume,
    stop_file,
)
from megatron.training.loop import Run
from megatron.training.owner import Owner
from megatron.training.setup import (
    ModelProvider,
    build_state,
    seed_generators,
)
from megatron.training.state import guarded_settings
from megatron.training.step import ForwardStep
from megatron.training.stop import StopRequest
from megatron.wandb_sink import open_wandb


def pretrain(config: Config, model_provider: ModelProvider, forward_step: ForwardStep) -> int:
    """Train as `config` says, from scratch or from the newest checkpoint below --load, with the ranks of torchrun.

    Returns:
        EXIT_FINISHED, or EXIT_STOPPED where a signal or --exit-interval ended it with its state saved; under torchrun,
        which would take that for a crash, EXIT_FINISHED for both. SAVE/exit.json says which.
    """
    with connect(config) as (world, watch):
        watch.ends_with(lambda: how_to_go_on(config.checkpoint))
        try:
            status = _pretrain(config, world, watch, model_provider, forward_step)
        except KeyboardInterrupt as interrupt:
            if world.is_main:
                interrupt.add_note(how_to_go_on(config.checkpoint))
            raise
    return EXIT_FINISHED if under_torchrun() else status


def _pretrain(
    config: Config, world: World, watch: Watch, model_provider: ModelProvider, forward_step: ForwardStep
) -> int:
    world.on_main(lambda: check_homes(config.checkpoint))
    seed_generators(config.training.seed, world, config.parallel)
    watch.at("opening the data")
    with watch.patient():
        vocabulary, datasets = world.everywhere(lambda: open_data(config))
    settings = guarded_settings(config, data=datasets.fingerprint, tokenizer=vocabulary.fingerprint)
    name = Path(config.checkpoint.save).name if config.checkpoint.save else "pretrain"
    log = config.logging
    with (
        ProgressLine(
            name,
            target_tokens=None,  # until it is known where the run stands
            full_batch=config.training.global_batch_size,
            log_interval=log.log_interval,
            silent=not world.is_main,
        ) as console,
        StopRequest(
            minutes=config.training.exit_duration_in_mins,
            file=stop_file(config, world),
            saves=config.checkpoint.save is not None,
            say=console.message_at_once,
        ) as stop,
        ExitStack() as owned,
    ):
        if config.checkpoint.save is not None:
            owner = Owner(Path(config.checkpoint.save), console.message)
            with watch.patient():
                world.on_main(lambda: owned.enter_context(owner) and None)
        source = find_checkpoint(config.checkpoint, world, console)
        watch.at("building the model")
        state = world.everywhere(lambda: build_state(config, vocabulary.size, world, model_provider, console.message))
        if source is None:
            initialise(state.model, config.training.seed, place)
        else:
            watch.at("loading the checkpoint")
            resume(state, source, config, settings, world, console)
        world.on_main(lambda: open_home(config, state, console))
        outlook = look_ahead(config, state.progress)
        console.target_tokens, console.last_step = outlook.end.consumed_tokens, last_step(config, outlook)
        console.message(describe(config, datasets, vocabulary.size, world, state.progress, outlook))
        home = Path(config.checkpoint.save) if config.checkpoint.save is not None and world.is_main else None
        with (
            noting_how_to_go_on(config.checkpoint),
            MetricsLogger(
                home,
                tensorboard=log.tensorboard and world.is_main,
                tensorboard_dir=log.tensorboard_dir,
                wandb=open_wandb(log, home, flat(config), console.message) if world.is_main else None,
            ) as metrics,
            SampleLoader(datasets.train, config.data.num_workers) as loader,
            Saver(
                Path(config.checkpoint.save or "") / CHECKPOINTS,
                world,
                background=config.checkpoint.async_save,
                report=console.message,
                keep_last=config.checkpoint.keep_last,
                keep_every=config.checkpoint.keep_every,
            ) as saver,
        ):
            world.on_main(
                lambda: metrics.truncate_to(state.progress.iteration, consumed_tokens=state.progress.consumed_tokens)
            )
            run = Run(
                config, state, datasets, vocabulary.eod, loader, metrics, console, saver, forward_step, settings,
                world, watch, stop, saved=source is not None and continues(config.checkpoint),
            )  # fmt: skip
            try:
                return run.train()
            except Exception as error:
                watch.failed(str(error).partition("\n")[0])  # before what closes here, and may wait for other ranks
                raise
