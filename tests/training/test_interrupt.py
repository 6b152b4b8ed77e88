"""Ctrl-C before the first step, where Lightning has a way of its own to leave."""

import signal

import pytest

from rwkv_train.training.callbacks import RunCallback
from rwkv_train.training.run import run_pretraining


def test_it_is_passed_on_rather_than_becoming_exit_code_1(settings, monkeypatch):
    def interrupt(self, trainer, module):
        raise KeyboardInterrupt

    monkeypatch.setattr(RunCallback, "on_train_start", interrupt)
    before = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(KeyboardInterrupt):
            run_pretraining(settings())
    finally:
        signal.signal(signal.SIGINT, before)  # Lightning leaves it ignored
