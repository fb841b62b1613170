"""What asks a run to stop."""

from __future__ import annotations

import signal

import pytest

from megagpt.train.stop import StopRequest

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


@pytest.fixture
def request_to_stop():
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield StopRequest()
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_asks_to_save_and_stop(number, request_to_stop):
    assert not request_to_stop.requested
    signal.raise_signal(number)
    assert request_to_stop.requested


def test_a_second_ctrl_c_interrupts_at_once(request_to_stop):
    signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
