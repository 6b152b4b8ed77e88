import math
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_train.errors import CheckpointError, ConfigError, DataError
from rwkv_train.evaluation import scoring
from rwkv_train.evaluation.scoring import CALL_TOKENS, Sequence, best_length, score_sequences

# Float32 in another order of sums: about 1e-7 for each step, of a loss of about 6 nats.
LOSS_TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


def random_sequences(lengths, seed=5, hidden=0.2):
    """Some targets are not to be scored."""
    random = np.random.default_rng(seed)
    sequences = []
    for n in lengths:
        targets = random.integers(1, 257, n)
        targets[random.random(n) < hidden] = -100
        sequences.append(Sequence(random.integers(1, 257, n).astype(np.int32), targets.astype(np.int32)))
    return sequences


def whole_sequence(model, sequence):
    """The definition: one call, logits in float64, each target's negative logarithm, and the likeliest token."""
    with torch.no_grad():
        logits = model(torch.from_numpy(sequence.inputs.astype(np.int64))[None]).logits[0].double()
    scored = sequence.targets != -100
    nats = -torch.log_softmax(logits, dim=1).numpy()[np.arange(len(scored)), sequence.targets * scored]
    return nats * scored, (logits.argmax(dim=1).numpy() == sequence.targets) & scored


@pytest.mark.parametrize(("batch_size", "chunk_len"), [(3, 5), (2, 50), (64, 512)])
def test_losses_are_those_of_one_whole_sequence_each(model, batch_size, chunk_len):
    sequences = random_sequences([3, 120, 1, 64, 65, 0, 17, 50])
    scores = list(
        score_sequences(model, sequences, batch_size=batch_size, chunk_len=chunk_len, with_greedy=True)
    )
    assert sorted(score.index for score in scores) == list(range(8))
    for score in scores:
        losses, greedy = whole_sequence(model, sequences[score.index]) if score.losses.size else ([], [])
        np.testing.assert_allclose(score.losses, losses, **LOSS_TOLERANCE)
        np.testing.assert_array_equal(score.greedy, greedy)


def test_the_likeliest_tokens_are_told_only_where_asked_for(model):
    (score,) = score_sequences(model, random_sequences([9]))
    assert score.greedy is None
    (same,) = score_sequences(model, random_sequences([9]), with_greedy=True)
    np.testing.assert_allclose(score.losses, same.losses, rtol=1e-6)
    # Its own choice is always the likeliest one.
    with torch.no_grad():
        choice = model(torch.from_numpy(random_sequences([9])[0].inputs.astype(np.int64))[None]).logits
    (own,) = score_sequences(
        model, [Sequence(random_sequences([9])[0].inputs, choice[0].argmax(1).numpy())], with_greedy=True
    )
    assert own.greedy.all()


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), max_size=12),
    batch_size=st.integers(1, 6),
    chunk_len=st.integers(1, 50),
    pool=st.integers(1, 60),
)
def test_every_target_is_scored_once_after_exactly_what_stands_before_it(
    counting_model, lengths, batch_size, chunk_len, pool
):
    sequences = random_sequences(lengths, seed=len(lengths))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "POOL_TOKENS", pool)
        scores = list(
            score_sequences(counting_model(), sequences, batch_size=batch_size, chunk_len=chunk_len)
        )
    assert sorted(score.index for score in scores) == list(range(len(lengths)))
    for score in scores:
        # CountingModel's loss, by its definition: the target times 1 plus the sum of all that was read.
        inputs, targets = sequences[score.index]
        expected = np.where(targets == -100, 0, targets * (1 + np.cumsum(inputs, dtype=np.int64)))
        np.testing.assert_array_equal(score.losses, expected)


class Watched:
    """Passes calls on and keeps their shapes."""

    def __init__(self, model):
        self.model = model
        self.config = model.config
        self.shapes = []

    def __getattr__(self, name):
        return getattr(self.model, name)

    def __call__(self, tokens, *rest):
        self.shapes.append(tuple(tokens.shape))
        return self.model(tokens, *rest)


def test_a_sequence_alone_reads_chunks_as_large_as_the_batch(counting_model):
    model = Watched(counting_model())
    list(score_sequences(model, random_sequences([30, 1000]), batch_size=4, chunk_len=50))
    assert model.shapes[-1][0] == 1
    assert max(rows * tokens for rows, tokens in model.shapes) == 4 * 50
    assert model.shapes.count((1, 200)) == 4  # of the 970 tokens that the shorter one leaves


def test_what_is_read_in_vain_is_told(counting_model):
    calls = []
    lengths = [300, 299, 5, 80]
    list(
        score_sequences(
            counting_model(),
            random_sequences(lengths),
            batch_size=4,
            chunk_len=100,
            on_call=lambda n_read, n_computed: calls.append((n_read, n_computed)),
        )
    )
    assert sum(n_read for n_read, _ in calls) == sum(lengths)
    assert all(n_read <= n_computed <= 400 for n_read, n_computed in calls)


@pytest.mark.parametrize(
    ("remaining", "expected"),
    [
        ([1000] * 8, 256),  # nobody ends: the whole chunk
        ([20, 19, 18], 20),  # ends that lie close: one call, with 3 tokens of padding
        ([2000] + [1] * 500, 1),  # 500 rows of padding would cost more than a call
    ],
)
def test_a_call_is_as_long_as_costs_least_for_a_token_of_use(remaining, expected):
    assert best_length(remaining, 256) == expected


@settings(max_examples=50, deadline=None)
@given(remaining=st.lists(st.integers(1, 400), min_size=1, max_size=20), chunk_len=st.integers(1, 300))
def test_no_other_length_costs_less(remaining, chunk_len):
    def cost(n_tokens):
        return (CALL_TOKENS + len(remaining) * n_tokens) / sum(min(left, n_tokens) for left in remaining)

    least = min(cost(n_tokens) for n_tokens in range(1, min(chunk_len, max(remaining)) + 1))
    assert cost(best_length(remaining, chunk_len)) == pytest.approx(least)


def test_memory_is_that_of_one_chunk_beside_tokens_and_losses(counting_model):
    def peak_bytes(n_tokens):
        tokens = np.ones(n_tokens, dtype=np.int32)
        sequence = Sequence(tokens, tokens)
        tracemalloc.start()
        (score,) = score_sequences(counting_model(), [sequence], batch_size=1, chunk_len=1000)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak, score.losses.nbytes

    (small, small_losses), (large, large_losses) = peak_bytes(4_000), peak_bytes(400_000)
    # The losses are held in pieces, then joined.
    assert large - small < 2 * (large_losses - small_losses) + 200_000


def test_sequences_are_read_one_pool_at_a_time(counting_model, monkeypatch):
    monkeypatch.setattr(scoring, "POOL_SEQUENCES", 4)
    n_read, most_waiting = 0, 0

    def sequences():
        nonlocal n_read
        for sequence in random_sequences([10] * 40):
            n_read += 1
            yield sequence

    for n_scored, _ in enumerate(score_sequences(counting_model(), sequences(), batch_size=2)):
        most_waiting = max(most_waiting, n_read - n_scored)
    assert n_read == 40
    assert most_waiting <= 4 + 2


@pytest.mark.parametrize(
    ("inputs", "targets", "wrong"), [([5], [257], 257), ([257], [5], 257), ([-1], [5], -1)]
)
def test_tokens_outside_the_vocabulary_are_refused(model, inputs, targets, wrong):
    with pytest.raises(DataError, match=f"the token {wrong} is outside of the model's vocabulary of 257"):
        list(score_sequences(model, [Sequence(np.array(inputs), np.array(targets))]))


def test_a_loss_that_is_not_finite_is_refused(model):
    with torch.no_grad():
        model.ln_out.weight[3] = math.nan
    with pytest.raises(CheckpointError, match="is nan, not finite: the model's weights are damaged"):
        list(score_sequences(model, random_sequences([10])))


@pytest.mark.parametrize("name", ["batch_size", "chunk_len"])
def test_a_size_below_one_is_refused(model, name):
    with pytest.raises(ConfigError, match=f"--{name.replace('_', '-')} is 0; it must be at least 1"):
        list(score_sequences(model, [], **{name: 0}))
