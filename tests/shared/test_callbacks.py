"""Signals; the rest of the callback is tested by training."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from shared.callbacks import Signals


def test_the_first_signal_is_noted_and_the_second_acts():
    before = {number: signal.getsignal(number) for number in Signals.NUMBERS}
    with Signals() as signals:
        assert {n: signal.getsignal(n) for n in Signals.NUMBERS} == before
        signals.catch()
        assert signals.received is None
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.received == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert {number: signal.getsignal(number) for number in Signals.NUMBERS} == before


def test_another_thread_leaves_signals_alone():
    caught = []

    def work():
        with Signals() as signals:
            signals.catch()
            caught.append(signals.received)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert caught == [None]
