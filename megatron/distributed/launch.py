"""From torchrun's environment to a World: device, rendezvous, process groups, mesh."""

from __future__ import annotations

import json
import os
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from megatron.config import Config, TrainingConfig
from megatron.distributed.watch import Watch
from megatron.distributed.world import World
from megatron.errors import CommandLineError, SharedError, UserError
from megatron.layout import layout_of

POLL_SECONDS = 0.02


@dataclass(frozen=True)
class Environment:
    """What torchrun says of this process; the defaults are those of a process by itself."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    address: str = ""
    port: int = 0
    agent_store: bool = False
    """The launcher serves the store; else rank 0 does."""


def read_environment() -> Environment:
    """Torchrun's environment variables.

    Raises:
        UserError: where they are incomplete or contradict one another, or another launcher started several processes
            that know nothing of one another.
    """
    if "WORLD_SIZE" not in os.environ:
        for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
            if os.environ.get(name, "1") not in ("", "1"):
                raise UserError(
                    f"{name} is {os.environ[name]}, but WORLD_SIZE is not set: each process would train by itself; "
                    "start one torchrun a node (see scripts/ds_train.sh)"
                )
        return Environment()
    values: dict[str, int] = {}
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        text = os.environ.get(name)
        if text is None or not text.isdecimal():
            raise UserError(
                f"{name} must be a number where WORLD_SIZE is set, found {text!r}: start the program by torchrun"
            )
        values[name] = int(text)
    size, rank, local_rank = values["WORLD_SIZE"], values["RANK"], values["LOCAL_RANK"]
    if size < 1 or rank >= size or local_rank >= values["LOCAL_WORLD_SIZE"] or values["LOCAL_WORLD_SIZE"] > size:
        raise UserError(
            f"the environment contradicts itself: RANK {rank}, WORLD_SIZE {size}, LOCAL_RANK {local_rank}, "
            f"LOCAL_WORLD_SIZE {values['LOCAL_WORLD_SIZE']}; start the program by torchrun, which sets them"
        )
    if size == 1:
        return Environment()
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT", "")
    if not address or not port.isdecimal():
        raise UserError(f"WORLD_SIZE is {size}, but MASTER_ADDR or MASTER_PORT is not set: start by torchrun")
    agent_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return Environment(rank, size, local_rank, address, int(port), agent_store)


def under_torchrun() -> bool:
    """Whether torchrun started this process, and takes any status but 0 for a crash."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def choose_device(training: TrainingConfig, local_rank: int = 0) -> torch.device:
    """The device that --device names, for this process, made ready for shapes that change.

    Raises:
        UserError: where it is not there, or cannot do the precision asked for.
    """
    available = torch.cuda.is_available()
    if training.device == "cuda" and not available:
        raise UserError("--device cuda: no CUDA device is available; use --device cpu, or install torch for CUDA")
    if not available or training.device == "cpu":
        if training.fp16:
            raise UserError("--fp16 needs a GPU: use --bf16 or neither on the CPU (--no-fp16 undoes it)")
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"local rank {local_rank} has no GPU: the node has {torch.cuda.device_count()}; give torchrun an "
            "--nproc-per-node of at most that, or --device cpu"
        )
    # cuDNN's attention plans anew, for a good part of a second, at each number of sequences and length: in a warmup,
    # and at each token that is generated. FlashAttention does not.
    torch.backends.cuda.enable_cudnn_sdp(False)
    return torch.device("cuda", local_rank)


@contextmanager
def connect(config: Config) -> Iterator[tuple[World, Watch]]:
    """This process's world, and the watch over the other ranks, for the time of a run.

    Raises:
        UserError: for a layout that does not fit, a device that is missing, ranks that do not come.
    """
    environment = read_environment()
    try:
        layout = layout_of(config, environment.size)
    except UserError as error:
        raise CommandLineError(str(error)) from None  # found alike on every rank
    device = choose_device(config.training, environment.local_rank)
    if config.training.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it, before its first use
        torch.use_deterministic_algorithms(True)
    if config.parallel.optimizer_cpu_offload and device.type == "cpu":
        raise UserError("--optimizer-cpu-offload moves state out of a GPU: drop it on the CPU")
    timeout = timedelta(minutes=config.parallel.distributed_timeout_minutes)
    store: dist.Store = dist.HashStore()
    if environment.size > 1:
        store = rendezvous(open_store(environment, timeout), environment.rank, environment.size, timeout)
    elif not config.parallel.optimizer_cpu_offload:  # which is FSDP2's doing, on one rank too
        with Watch(0, 1, store, timeout=0.0) as watch:
            yield World(device=device), watch
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with Watch(environment.rank, environment.size, store, timeout=timeout.total_seconds()) as watch:
        require_one_kind(store, environment, device)
        # Longer than the watch's, which says more; control and background also wait where the watch is patient.
        patience, endless = timeout + timedelta(seconds=30), timedelta(days=7)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            store=store,
            rank=environment.rank,
            world_size=environment.size,
            timeout=patience,
        )
        sizes = (layout.replicate, layout.shard, layout.tp)
        world = World(
            rank=environment.rank,
            layout=layout,
            device=device,
            mesh=init_device_mesh(device.type, sizes, mesh_dim_names=("replicate", "shard", "tp")),
            control=dist.new_group(backend="gloo", timeout=endless),
            background=dist.new_group(backend="gloo", timeout=endless) if config.checkpoint.async_save else None,
        )
        yield world, watch
        dist.destroy_process_group()


def require_one_kind(store: dist.Store, environment: Environment, device: torch.device) -> None:
    """Raise UserError, before there are process groups, where some ranks have a GPU and others do not."""
    store.set(f"device/{environment.rank}", device.type)
    kinds = [store.get(f"device/{rank}").decode() for rank in range(environment.size)]
    if len(set(kinds)) > 1:
        missing = ", ".join(str(rank) for rank, kind in enumerate(kinds) if kind == "cpu")
        fault = f"no GPU on rank {missing}, but on others: mend the node, or give --device cpu"
        raise UserError(fault) if environment.rank == 0 else SharedError(fault)


def open_store(environment: Environment, timeout: timedelta) -> dist.Store:
    """The key-value store at MASTER_ADDR:MASTER_PORT."""
    try:
        return dist.TCPStore(
            environment.address,
            environment.port,
            world_size=environment.size,
            is_master=environment.rank == 0 and not environment.agent_store,
            timeout=timeout,
            multi_tenant=True,
            wait_for_workers=False,
        )
    except (dist.DistError, RuntimeError, ValueError) as error:
        raise UserError(
            f"cannot reach the store at MASTER_ADDR {environment.address}, MASTER_PORT {environment.port} "
            f"({' '.join(str(error).split())[:200]}): is the address right, and the port open between the nodes?"
        ) from None


def rendezvous(store: dist.Store, rank: int, size: int, timeout: timedelta) -> dist.Store:
    """A fresh part of `store` on which exactly the processes that are now alive agree.

    torchrun keeps its store over restarts, with what the attempt before has written, and its restart count differs
    between nodes. So each process shows a name of its own; rank 0 proposes a list of names until every process has
    found its own in the list and has confirmed it, which the dead cannot.

    Raises:
        UserError: naming the ranks that did not come within `timeout`.
    """
    deadline = time.monotonic() + timeout.total_seconds()
    name = f"{socket.gethostname()}/{os.getpid()}/{secrets.token_hex(8)}"
    meeting = dist.PrefixStore("meeting", store)
    meeting.set(f"name/{rank}", name)
    names: list[str] = []
    confirmed = ""
    while time.monotonic() < deadline:
        if rank == 0:
            present = [_peek(meeting, f"name/{other}") for other in range(size)]
            if None not in present and present != names:
                names = [str(other) for other in present]
                meeting.set("proposal", json.dumps(names))
            if names and all(_peek(meeting, f"{names[0]}/{other}") == names[other] for other in range(1, size)):
                meeting.set(f"{names[0]}/go", json.dumps(names))
        proposal = json.loads(_peek(meeting, "proposal") or "[]")
        if len(proposal) == size and proposal[rank] == name and proposal[0] != confirmed:
            confirmed = proposal[0]
            meeting.set(f"{confirmed}/{rank}", name)
        if confirmed and name in json.loads(_peek(meeting, f"{confirmed}/go") or "[]"):
            return dist.PrefixStore(confirmed, store)
        time.sleep(POLL_SECONDS)
    waited = f"within {timeout.total_seconds():.0f} s (--distributed-timeout-minutes)"
    if rank == 0:
        absent = [str(other) for other in range(size) if _peek(meeting, f"name/{other}") is None]
        missing = absent or [str(o) for o in range(1, size) if names and _peek(meeting, f"{names[0]}/{o}") != names[o]]
        raise UserError(f"rank {', '.join(missing)} of {size} did not come {waited}")
    raise UserError(f"rank 0 did not come {waited}")


def _peek(store: dist.Store, key: str) -> str | None:
    """The value of `key` where it is there, without waiting."""
    return store.get(key).decode() if store.check([key]) else None
