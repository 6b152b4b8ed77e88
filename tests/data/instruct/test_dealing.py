"""Which row a lane reads when: everything once, long conversations by one lane in steps in a row."""

import random
from collections import Counter

import pytest

from rwkv_train.data.instruct import dealing
from rwkv_train.data.instruct.dealing import Dealer
from rwkv_train.data.instruct.samples import ConversationOrder

CASES = [
    pytest.param({}, id="one window"),
    pytest.param({"window": 7}, id="several windows"),
    pytest.param({"n_datasets": 2, "window": 5}, id="two datasets"),
    pytest.param({"ctx_len": 8, "n_lanes": 1}, id="one lane"),
    pytest.param({"longest": 8, "ctx_len": 16}, id="none is long"),
]


class Dealt:
    """A dealer of random lengths, and what it is to deal."""

    def __init__(self, seed=0, n_datasets=1, ctx_len=16, n_lanes=3, longest=70, count=23):
        generator = random.Random(seed)
        self.lengths = [[generator.randint(1, longest) for _ in range(count)] for _ in range(n_datasets)]
        self.order = ConversationOrder([count] * n_datasets, [3.0, 1.0][:n_datasets], seed)
        self.ctx_len, self.n_lanes = ctx_len, n_lanes
        self.epoch = count * n_datasets
        self._in_order = self.dealer()

    def dealer(self):
        return Dealer(self.lengths, self.order, self.ctx_len, self.n_lanes)

    def rows(self, step):
        return [dealt.row for dealt in self._in_order.step(step).rows]

    def length(self, sample):
        dataset, number = self.order.locate(sample)
        return self.lengths[dataset][number]


@pytest.fixture
def dealt(monkeypatch):
    def make(window=dealing.WINDOW, **sizes):
        monkeypatch.setattr(dealing, "WINDOW", window)
        return Dealt(**sizes)

    return make


@pytest.mark.parametrize("sizes", CASES)
def test_every_position_is_read_once_in_order_by_one_lane_in_steps_in_a_row(dealt, sizes):
    run = dealt(**sizes)
    dealer = run.dealer()
    reads = {}  # sample -> [(step, lane, start, stop)]
    n_steps = dealer.n_steps(1) + 9
    for step in range(n_steps):
        for lane, (row, goes_on_next) in enumerate(dealer.step(step).rows):
            assert row.n_tokens <= run.ctx_len
            for place, (sample, start, stop) in enumerate(row.parts):
                reads.setdefault(sample, []).append((step, lane, start, stop))
                goes_on = stop < run.length(sample)
                # Only the last sequence of a full row can go on, and only the first can have begun before.
                assert goes_on == (goes_on_next and place == len(row.parts) - 1)
                assert start == 0 or place == 0
            assert row.n_tokens == run.ctx_len or not goes_on_next

    finished = set()
    for sample, parts in reads.items():
        steps, lanes, starts, stops = zip(*parts, strict=True)
        assert steps == tuple(range(steps[0], steps[0] + len(steps)))
        assert len(set(lanes)) == 1
        assert starts == (0, *stops[:-1])
        if stops[-1] == run.length(sample):
            finished.add(sample)
        else:
            assert steps[-1] == n_steps - 1  # it goes on beyond what was looked at
    assert finished >= set(range(run.epoch))


@pytest.mark.parametrize("sizes", CASES)
def test_an_epoch_is_read_before_much_of_the_next(dealt, sizes):
    run = dealt(**sizes)
    n_steps = run.dealer().n_steps(1)
    begun = {part.conversation for step in range(n_steps) for row in run.rows(step) for part in row.parts}
    assert set(range(run.epoch)) <= begun
    # Each lane may have taken chains of the window after.
    assert len(begun) < 2.5 * run.epoch


@pytest.mark.parametrize("sizes", CASES)
def test_a_step_is_a_function_of_its_number(dealt, sizes):
    run = dealt(**sizes)
    dealer = run.dealer()
    in_order = [dealer.step(number) for number in range(16)]
    numbers = list(range(16))
    random.Random(1).shuffle(numbers)
    asked = run.dealer()
    assert {number: asked.step(number) for number in numbers} == dict(enumerate(in_order))


@pytest.mark.parametrize("sizes", CASES)
@pytest.mark.parametrize("epochs", [0.01, 0.5, 1.4])
def test_the_length_of_a_run_is_when_that_part_has_been_read(dealt, sizes, epochs):
    run = dealt(**sizes)
    n_read = Counter()  # positions, by sample
    wanted = range(-int(-epochs * run.epoch // 1))
    step = 0
    while any(n_read[sample] < run.length(sample) for sample in wanted):
        for row in run.rows(step):
            for sample, start, stop in row.parts:
                n_read[sample] += stop - start
        step += 1
    assert run.dealer().n_steps(epochs) == step


def test_tokens_are_counted_from_the_beginning_by_dataset(dealt):
    run = dealt(n_datasets=2, window=5)
    dealer = run.dealer()
    counts = [0, 0]
    for step in range(30):
        for row, _ in dealer.step(step).rows:
            for sample, start, stop in row.parts:
                counts[run.order.locate(sample)[0]] += stop - start
        assert dealer.step(step).n_tokens == tuple(counts)
    assert 0 < counts[1] < counts[0]  # weights 3 and 1


def test_rows_are_mostly_full(dealt):
    run = dealt(ctx_len=64, longest=60, count=300)
    filled = [row.n_tokens for step in range(run.dealer().n_steps(1) - 2) for row in run.rows(step)]
    assert sum(filled) > 0.9 * 64 * len(filled)
