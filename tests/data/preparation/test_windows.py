"""Words: counted as the regular expression does, hashed so that equal windows and only they are equal."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rwkv_train.data.preparation.pieces import Pieces
from rwkv_train.data.preparation.windows import count_words, window_hashes, word_hashes
from rwkv_train.tokenizers import load_tokenizer

TEXTS = st.text(st.sampled_from("ab é漢\n\t\x0b\x1c\x85\xa0\u2003\u200b\u3000"), min_size=1)


@given(TEXTS)
def test_words_are_counted_as_lm_evaluation_harness_does(text):
    assert count_words(text, text.encode()) == len(re.split(r"\s+", text))


@given(
    st.lists(st.sampled_from(["a", "b", "the", "cat"])), st.integers(1, 4), st.sampled_from(["", " ", "\n "])
)
def test_windows_have_equal_hashes_just_where_their_words_are_equal(words, n_words, edge):
    hashes = window_hashes(word_hashes((edge + " \n".join(words) + edge).encode()), n_words)

    windows = [tuple(words[start : start + n_words]) for start in range(len(words) - n_words + 1)]
    assert len(hashes) == len(windows)
    assert [[a == b for b in windows] for a in windows] == (hashes[:, None] == hashes).tolist()


def test_how_a_long_text_is_cut_does_not_show(monkeypatch):
    text = b" ".join(b"w%d" % (number * number % 97) for number in range(500)) + b" " + b"x" * 300 + b" end"
    whole = window_hashes(word_hashes(text), 16)

    monkeypatch.setattr("rwkv_train.data.preparation.windows._PIECE_BYTES", 64)

    assert np.array_equal(window_hashes(word_hashes(text), 16), whole)


@pytest.mark.parametrize("name", ["bytes", "world"])
def test_pieces_decode_as_the_tokenizer_does(name):
    tokenizer = load_tokenizer(name)
    pieces = Pieces(tokenizer)
    for text in ("state and decay", "日本語, état\n\n    x", "", "state again"):
        tokens = np.array([*tokenizer.encode(text), tokenizer.end_of_document])
        assert pieces.decode(tokens) == text.encode() == tokenizer.decode_bytes(tokens.tolist())
