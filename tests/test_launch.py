"""How processes find one another again after a restart, with what the dead have left in the store."""

from __future__ import annotations

import threading
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from megatron.config import TrainingConfig
from megatron.distributed.launch import Environment, choose_device, rendezvous, require_one_kind
from megatron.errors import SharedError, UserError


def meet(store: dist.Store, ranks: list[int], size: int, seconds: float = 20) -> dict[int, dist.Store | str]:
    """What each of `ranks` gets out of a rendezvous of `size`, all at the same time."""
    found: dict[int, dist.Store | str] = {}

    def one(rank: int) -> None:
        try:
            found[rank] = rendezvous(store, rank, size, timedelta(seconds=seconds))
        except UserError as error:
            found[rank] = str(error)

    threads = [threading.Thread(target=one, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_each_attempt_has_a_store_of_its_own():
    store = dist.HashStore()
    values = []
    for attempt in range(3):
        met = meet(store, [0, 1, 2], 3)
        met[0].set("key", f"attempt {attempt}") if attempt != 1 else None
        values.append([met[rank].check(["key"]) for rank in range(3)])
    assert values == [[True] * 3, [False] * 3, [True] * 3]


def test_an_attempt_that_died_halfway_does_not_mislead_the_next():
    """Ranks 0 and 2 of the first attempt came and confirmed, 1 never did; then three new ones come."""
    store = dist.HashStore()
    first = meet(store, [0, 2], 3, seconds=0.5)
    assert "rank 1 of 3 did not come" in first[0]
    assert "rank 0 did not come" in first[2]
    second = meet(store, [0, 1, 2], 3)
    second[2].set("key", "new")
    assert all(met.get("key") == b"new" for met in second.values())


def test_a_first_attempt_in_full_and_a_slow_rank_in_the_second():
    store = dist.HashStore()
    old = meet(store, [0, 1], 2)
    old[0].set("key", "old")
    found: dict[int, dist.Store | str] = {}
    early = threading.Thread(target=lambda: found.update(meet(store, [1], 2)))
    early.start()
    early.join(0.3)
    assert early.is_alive(), "rank 1 must not take the old rank 0 for the new one"
    found.update(meet(store, [0], 2))
    early.join()
    assert not found[0].check(["key"])
    assert not found[1].check(["key"])
    found[0].set("key", "new")
    assert found[1].get("key") == b"new"


@pytest.mark.parametrize("present", [[0], [1]])
def test_who_is_missing_is_said(present):
    said = meet(dist.HashStore(), present, 2, seconds=0.3)[present[0]]
    assert f"rank {1 - present[0]}" in said
    assert "did not come within 0 s" in said


def test_every_local_rank_has_a_gpu_of_its_own(monkeypatch):
    """With an index for the first too: torch.cuda.set_device takes none without."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    training = TrainingConfig(train_iters=1)
    assert [choose_device(training, rank).index for rank in (0, 1)] == [0, 1]
    with pytest.raises(UserError, match="local rank 2 has no GPU: the node has 2"):
        choose_device(training, 2)


def test_attention_on_a_gpu_plans_nothing_for_each_length(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    was = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        torch.backends.cuda.enable_cudnn_sdp(True)
        choose_device(TrainingConfig(train_iters=1, device="cpu"))
        assert torch.backends.cuda.cudnn_sdp_enabled()
        choose_device(TrainingConfig(train_iters=1))
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(was)


def test_ranks_with_and_without_a_gpu_do_not_start():
    store = dist.HashStore()
    store.set("device/1", "cpu")
    with pytest.raises(UserError, match="no GPU on rank 1, but on others"):
        require_one_kind(store, Environment(rank=0, size=2), torch.device("cuda", 0))
    with pytest.raises(SharedError):
        require_one_kind(store, Environment(rank=1, size=2), torch.device("cpu"))
