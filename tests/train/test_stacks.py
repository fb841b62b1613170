"""Where a thread is, and whether it waits there for others."""

from __future__ import annotations

import threading
import time
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from megagpt.checkpoint.store import CheckpointStore
from megagpt.parallel.mesh import Mesh
from megagpt.train.stacks import Place, place_of

ALONE = Mesh(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))


def place_within(work) -> Place:
    """Of a thread in `work`, which comes to an end when it is seen."""
    seen, thread = threading.Event(), threading.Thread(target=lambda: work(seen), daemon=True)
    thread.start()
    time.sleep(0.3)
    place = place_of(thread.ident)
    seen.set()
    thread.join(10)
    return place


def test_what_the_main_rank_does_while_the_others_wait_is_no_waiting(tmp_path, monkeypatch):
    """Publishing stands inside of `Mesh.on_main`."""
    store = CheckpointStore(tmp_path)
    seen_in: list[threading.Event] = []
    monkeypatch.setattr("megagpt.checkpoint.fsio.free_bytes", lambda folder: seen_in[0].wait(20) and 10**12)

    def work(seen):
        seen_in.append(seen)
        ALONE.on_main(lambda: store.begin(1, needed=5))

    place = place_within(work)
    assert not place.waits
    assert "checkpoint/store.py" in place.where


@pytest.mark.parametrize(
    "module", ["torch.distributed.distributed_c10d", "torch.cuda.streams", "megagpt.parallel.mesh"]
)
def test_a_thread_in_a_collective_or_in_a_call_of_the_device_waits(module):
    def work(seen):
        held = {"__name__": module, "seen": seen}
        exec("def wait(): seen.wait(20)", held)
        held["wait"]()

    assert place_within(work).waits


@pytest.mark.parametrize("call", ["item", "tolist", "cpu", "synchronize"])
def test_a_call_that_gets_values_from_the_device_waits_though_it_has_no_frame_of_its_own(call):
    def work(seen):
        value = SimpleNamespace(**{name: partial(time.sleep, 0.8) for name in ("item", "tolist", "cpu", "synchronize")})
        if call == "item":
            value.item()
        elif call == "tolist":
            _ = value.tolist()
        elif call == "cpu":
            _ = float(value.cpu() or 0)
        else:
            value.synchronize()

    assert place_within(work).waits


def test_a_thread_that_works_does_not_wait():
    def work(seen):
        item = partial(time.sleep, 0.8)
        item()

    assert not place_within(work).waits


def test_a_thread_that_has_ended_is_nowhere():
    thread = threading.Thread(target=lambda: None)
    thread.start()
    thread.join()
    assert place_of(thread.ident) == Place("no Python frame", waits=False)
