import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from rwkv_train.evaluation.windows import rolling_windows, streamed, whole

DOCUMENTS = st.integers(1, 60).map(lambda n: np.arange(100, 100 + n).astype(np.uint16))


def scored_positions(pieces):
    """Positions in the document, in order; each target is checked to be the document's token there."""
    return [piece.start + i for piece in pieces for i in range(int((piece.sequence.targets != -100).sum()))]


@settings(max_examples=200, deadline=None)
@given(tokens=DOCUMENTS, window=st.integers(1, 70))
def test_windows_are_those_of_lm_evaluation_harness(tokens, window):
    harness = list(get_rolling_token_windows(tokens.tolist(), 7, max_seq_len=window, context_len=1))
    ours = list(rolling_windows(tokens, 7, window))
    assert len(ours) == len(harness)
    for ((inputs, targets), _), (their_inputs, predicted) in zip(ours, harness, strict=True):
        # The harness pads nothing: its inputs are the tokens before the last one predicted.
        assert inputs.tolist() == their_inputs
        assert targets[targets != -100].tolist() == predicted
        assert (targets[: len(targets) - len(predicted)] == -100).all()
    # Its disjoint form: what is context does not overlap with what is predicted.
    for (context, predicted), piece in zip(map(make_disjoint_window, harness), ours, strict=True):
        n_context = len(piece.sequence.inputs) - len(predicted) + 1
        assert piece.sequence.inputs[:n_context].tolist() == context


@settings(max_examples=200, deadline=None)
@given(tokens=DOCUMENTS, window=st.integers(1, 70), prefix=st.sampled_from([7, None]))
def test_every_token_is_scored_once_at_its_place(tokens, window, prefix):
    first = 0 if prefix is not None else 1
    for pieces in (list(rolling_windows(tokens, prefix, window)), list(whole(tokens, prefix))):
        positions = scored_positions(pieces)
        assert positions == list(range(first, len(tokens)))
        targets = np.concatenate([piece.sequence.targets for piece in pieces])
        assert targets[targets != -100].tolist() == tokens[first:].tolist()


@settings(max_examples=50, deadline=None)
@given(tokens=DOCUMENTS, prefix=st.sampled_from([7, None]), more=st.integers(0, 3))
def test_a_window_as_long_as_the_document_is_the_whole(tokens, prefix, more):
    (window,) = rolling_windows(tokens, prefix, len(tokens) + more)
    (piece,) = whole(tokens, prefix)
    for a, b in zip(window.sequence, piece.sequence, strict=True):
        np.testing.assert_array_equal(a, b)
    assert window.start == piece.start


def test_a_part_of_a_stream_reads_its_last_token_too():
    (piece,) = streamed(np.array([5, 6], np.uint16), 9)
    assert piece.sequence.inputs.tolist() == [9, 5, 6]
    assert piece.sequence.targets.tolist() == [5, 6, -100]


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_ids_beyond_a_signed_short_are_kept(dtype):
    (piece,) = whole(np.array([65_535, 40_000], dtype), 65_530)
    assert piece.sequence.inputs.tolist() == [65_530, 65_535]
    assert piece.sequence.targets.tolist() == [65_535, 40_000]
