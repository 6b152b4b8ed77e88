"""Work in several processes: in order, and nothing hangs when one is gone."""

import os
import signal
import time
from functools import partial
from itertools import count

import pytest

from rwkv_train.data.preparation.workers import ordered_map, suitable_workers
from rwkv_train.errors import DataError, LostProcessError

# A worker calls the first one and applies what it returns: two to the power of the item, and so on.
POWER = partial(partial, pow, 2)
SLEEP = partial(partial, time.sleep)
INTEGER = partial(partial, int)
KILL_ITSELF = partial(partial, os._exit)


@pytest.mark.parametrize("n_workers", [1, 3])
def test_results_come_in_the_order_of_the_items(n_workers):
    assert list(ordered_map(POWER, iter(range(40)), n_workers)) == [2**n for n in range(40)]


def test_a_slow_item_does_not_let_the_others_run_away():
    taken = []

    def items():
        for number in count():
            taken.append(number)
            yield 0.5 if number == 0 else 0

    results = ordered_map(SLEEP, items(), 2)
    next(results)
    results.close()

    assert len(taken) <= 10  # four a process, and those that are in hand


@pytest.mark.parametrize("n_workers", [1, 2])
def test_an_error_comes_after_the_results_before_it(n_workers):
    results = ordered_map(INTEGER, iter(["1", "2", "x", "4"]), n_workers)

    assert [next(results), next(results)] == [1, 2]
    with pytest.raises(ValueError, match="'x'"):
        next(results)


@pytest.mark.parametrize("n_workers", [1, 2])
def test_damage_of_the_items_comes_after_the_results_before_it(n_workers):
    def items():
        yield from ("1", "2")
        raise DataError("cut off")

    found = []
    with pytest.raises(DataError, match="cut off"):
        found.extend(ordered_map(INTEGER, items(), n_workers))  # the list grows as the results come

    assert found == [1, 2]


def test_a_worker_that_is_gone_is_one_sentence():
    with pytest.raises(LostProcessError, match="with fewer --workers; it goes on where it was"):
        list(ordered_map(KILL_ITSELF, iter([signal.SIGKILL] * 4), 2))


def test_more_processes_start_only_where_they_are_worth_it(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(8), raising=False)

    assert [suitable_workers(sizes) for sizes in ([1000], [10 << 20, 1], [1 << 40], [None, 5])] == [
        1,
        3,
        8,
        8,
    ]
