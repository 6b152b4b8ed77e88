"""Where sequences begin in a packed micro-batch."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_train.data.packing import cut_at_documents

END = 0


def starts_by_hand(rows):
    """Positions of the flattened rows where something begins, written as a loop."""
    starts, position = [], 0
    for row in rows:
        for place, token in enumerate(row):
            if place == 0 or token == END:
                starts.append(position)
            position += 1
    return starts


def test_a_sequence_begins_with_each_sample_and_each_end_token():
    rows = [[5, 6, END, 7], [END, 8, END, END]]
    cu_seqlens = cut_at_documents(torch.tensor(rows), END)

    assert cu_seqlens.tolist() == [0, 2, 4, 6, 7, 8, 8, 8, 8]  # five sequences and three empty ones
    assert cu_seqlens.dtype == torch.int64


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 4), st.integers(1, 12), st.data())
def test_any_rows_are_cut_where_a_loop_would_cut(n_rows, length, data):
    rows = data.draw(
        st.lists(
            st.lists(st.integers(0, 2), min_size=length, max_size=length), min_size=n_rows, max_size=n_rows
        )
    )
    starts = starts_by_hand(rows)
    cu_seqlens = cut_at_documents(torch.tensor(rows), END).tolist()
    n_sequences = len(cu_seqlens) - 1

    assert cu_seqlens[: len(starts)] == starts
    assert set(cu_seqlens[len(starts) :]) == {n_rows * length}
    assert n_sequences & (n_sequences - 1) == 0
    assert len(starts) <= n_sequences < 2 * len(starts)


def test_the_tokens_stay_as_they_are():
    tokens = torch.tensor([[5, END, 7]])
    cut_at_documents(tokens, END)
    assert tokens.tolist() == [[5, END, 7]]
