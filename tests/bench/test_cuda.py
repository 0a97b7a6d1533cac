"""The card itself, with torch's functions for CUDA replaced: what is found, set up, captured and put back."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("tyro")

from bench.fake import FakeCard
from meprop.bench import cuda, problem
from meprop.errors import MepropError


@pytest.fixture
def device(monkeypatch):
    """What is done with torch.cuda, as a list of names; `fails` are the names of those that raise an error."""
    done = SimpleNamespace(calls=[], fails=set(), mode=0)

    def note(name):
        done.calls.append(name)
        if name in done.fails:
            raise RuntimeError(f"{name} failed\nmore")

    class Graph:
        def capture_begin(self):
            note("begin")

        def capture_end(self):
            note("end")

        def replay(self):
            note("replay")

    generator = SimpleNamespace(
        graphsafe_set_state=lambda state: note("new random state"), graphsafe_get_state=lambda: None
    )
    replaced = {
        "get_sync_debug_mode": lambda: done.mode,
        "set_sync_debug_mode": lambda mode: setattr(done, "mode", mode),
        "synchronize": lambda: note("synchronize"),
        "CUDAGraph": Graph,
        "current_device": lambda: 0,
        "default_generators": (generator,),
        "Stream": lambda: "a stream",
        "stream": lambda stream: note(stream) or nullcontext(),
    }
    for name, value in replaced.items():
        monkeypatch.setattr(torch.cuda, name, value, raising=False)
    monkeypatch.setattr(torch, "Generator", lambda device: generator)
    done.note = note
    done.card = cuda.Card(cuda.Facts("a card", 80.0, 50.0, None, "13.0"), 50 * 2**20)
    return done


def test_a_call_is_captured_after_one_that_may_not_wait(device):
    modes = []
    replay = device.card.capture(lambda: modes.append(device.mode) or device.note("call"))
    assert device.calls == ["call", "synchronize", "begin", "call", "end"]
    assert modes == ["error", 0]
    replay()
    assert device.calls[-1] == "replay"


def test_a_call_that_waits_is_not_captured(device):
    device.fails = {"call"}
    with pytest.raises(cuda.CaptureError, match=r"^call failed$"):
        device.card.capture(lambda: device.note("call"))
    assert device.calls == ["call"]
    assert device.mode == 0


@pytest.mark.parametrize("fails", [{"second call"}, {"second call", "end"}, {"end"}, {"begin"}])
def test_a_failed_capture_leaves_random_numbers_that_work(device, fails):
    names = iter(["call", "second call"])
    device.fails = fails
    with pytest.raises(cuda.CaptureError, match=rf"^{sorted(fails)[-1]} failed$"):
        device.card.capture(lambda: device.note(next(names)))
    assert device.calls[-1] == "new random state"
    assert ("end" in device.calls) == ("begin" not in fails)


@pytest.mark.parametrize("error", [None, KeyError])
def test_a_session_is_on_a_stream_of_its_own_with_tf32(device, error):
    before = torch.get_float32_matmul_precision()
    with pytest.raises(error) if error else nullcontext(), device.card.session():
        assert device.calls == ["a stream"]
        assert torch.get_float32_matmul_precision() == "high"
        if error:
            raise error
    assert torch.get_float32_matmul_precision() == before


def test_a_card_is_described(monkeypatch):
    found = SimpleNamespace(name="a card", total_memory=80 * 2**30, L2_cache_size=50 * 2**20)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv("PATH", "")  # no nvidia-smi
    card = cuda.Card.find()
    assert (card.l2_bytes, card.device) == (50 * 2**20, "cuda")
    assert str(card.facts) == "a card, 80 GiB, 50 MiB of L2, driver unknown, CUDA 13.0"


def test_without_a_card_it_says_what_to_do(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(MepropError, match=r"\(built without CUDA\) finds no CUDA device; use --device cpu"):
        cuda.Card.find()


def test_the_limits_are_rates_of_large_products(monkeypatch):
    monkeypatch.setattr(cuda, "_SQUARE", 64)
    monkeypatch.setattr(cuda, "_SECONDS", 0.0)
    rates = cuda.measure_limits(FakeCard()).multiply_adds
    assert set(rates) == set(problem.DTYPES)
    assert all(rate > 0 for rate in rates.values())


def test_what_is_copied_is_as_many_bytes_beyond_the_cache(monkeypatch):
    copied = []

    def time(self, sides, seconds):
        for call in sides["copy"]:
            copied.append(call().numel())
        return {"copy": SimpleNamespace(p20=2.0)}

    monkeypatch.setattr(FakeCard, "time", time)
    assert cuda.copy_seconds(1000, FakeCard()) == 2.0
    assert copied == [512] * 5  # read and written, of copies that are more than four caches of 1 KiB
