import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from rwkv_train.errors import ConfigError, DataError
from rwkv_train.evaluation.lambada import evaluate_lambada, mean_interval, share_interval
from rwkv_train.evaluation.prefix import Prefix
from rwkv_train.models.lm import LmOutput
from rwkv_train.models.registry import build_model

TEXTS = [
    "It was a bright cold day in April and the clocks were striking thirteen",
    "a b",
    'He said: "Grüße, Welt!" and left the Haus',
    "one\ntwo  three",
]


def naive(model, tokenizer, text, before):
    """The protocol, as a loop: ln p of the last word and whether each of its tokens is the likeliest."""
    context, word = text.rsplit(" ", 1)
    tokens = before + tokenizer.encode(context)
    log_p, is_right = 0.0, True
    for token in tokenizer.encode(" " + word):
        with torch.no_grad():
            logits = model(torch.tensor([tokens])).logits[0, -1].double()
        log_p += float(torch.log_softmax(logits, dim=0)[token])
        is_right &= int(logits.argmax()) == token
        tokens = [*tokens, token]
    return log_p, is_right


@pytest.mark.parametrize(
    ("prefix", "before"),
    [(Prefix.END_OF_DOCUMENT, [0]), (Prefix.NEWLINE, [1 + ord("\n")]), (Prefix.NONE, [])],
    ids=str,
)
def test_numbers_are_those_of_a_loop_over_single_tokens(model, tokenizer, prefix, before):
    report = evaluate_lambada(model, tokenizer, TEXTS, prefix=prefix, batch_size=3, chunk_len=16)

    expected = [naive(model, tokenizer, text, before)[0] for text in TEXTS]
    assert report.documents == 4
    assert report.tokens == sum(len((" " + text.rsplit(" ", 1)[1]).encode()) for text in TEXTS)
    assert report.nats == pytest.approx(-sum(expected), rel=1e-5)
    assert report.ppl == pytest.approx(math.exp(-sum(expected) / 4), rel=1e-4)


class NextByte:
    """Predicts that each byte is followed by the one after it in ASCII."""

    def __init__(self, counting_model):
        self.config, self.parameters = counting_model.config, counting_model.parameters
        self.zero_state = counting_model.zero_state
        self.initial_state = counting_model.initial_state

    def __call__(self, tokens, state):
        return LmOutput(F.one_hot(tokens + 1, 257).float(), None, state)


def test_a_word_counts_as_right_where_each_of_its_tokens_is_the_likeliest(counting_model, tokenizer):
    # After \x1f comes the space, then !"# in this order.
    texts = ["a\x1f !", 'a\x1f !"#', 'a\x1f !"x', "a\x1f x", "a !"]
    report = evaluate_lambada(NextByte(counting_model()), tokenizer, texts)
    assert report.accuracy == 2 / 5


class WithoutBlanks:
    """A tokenizer that strips white space; the others are one more than their byte."""

    end_of_document = 0

    def encode(self, text):
        return [byte + 1 for byte in text.strip().encode()]


@pytest.mark.parametrize("prefix", Prefix)
def test_every_token_of_a_word_is_scored_after_a_context_without_tokens(counting_model, prefix):
    report = evaluate_lambada(NextByte(counting_model()), WithoutBlanks(), ["\t ab"], prefix=prefix)
    # By hand: of 257 logits one is 1, the others 0. After token 0 it is not that of a, after a it is that of b.
    log_sum = math.log(256 + math.e)
    assert report.nats == pytest.approx(log_sum + (log_sum - 1))
    assert report.tokens == 2


def test_a_model_that_knows_nothing_guesses_each_token_of_the_word_alike(model, tokenizer):
    empty_head = build_model(model.config, wkv_backend="reference")
    report = evaluate_lambada(empty_head, tokenizer, ["a bc", "some de"])
    # " bc" and " de" are three tokens each: a word is one of 257 ** 3.
    assert report.ppl == pytest.approx(257.0**3, rel=1e-5)
    assert report.ppl_interval == pytest.approx((257.0**3, 257.0**3), rel=1e-5)


def test_the_interval_of_a_mean_is_the_one_of_a_textbook():
    # 1.959964 * sd / sqrt(n), with mean 5, sd 2.138 (n - 1) and n = 8.
    interval = mean_interval(np.array([2.0, 4, 4, 4, 5, 5, 7, 9]))
    assert interval == pytest.approx((5 - 1.481594, 5 + 1.481594), abs=1e-5)
    assert mean_interval(np.array([3.0])) is None


@pytest.mark.parametrize(
    ("n_right", "n", "low", "high"),
    # Wilson's intervals as in Newcombe 1998, Statistics in Medicine 17, table I, method 3.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_the_interval_of_a_share_is_the_published_one(n_right, n, low, high):
    assert share_interval(n_right, n) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("word", "no space before its last word"),
        ("ends with a space ", "no text before or after"),
        (" word", "no text before or after"),
        ("", "no space before its last word"),
    ],
)
def test_a_passage_without_context_or_last_word_is_refused(counting_model, tokenizer, text, sentence):
    with pytest.raises(DataError, match=f"passage 2 of the data has {sentence}"):
        evaluate_lambada(counting_model(), tokenizer, ["a b", text])


def test_no_passages_and_sizes_below_one_are_refused(counting_model, tokenizer):
    with pytest.raises(DataError, match="holds no passage"):
        evaluate_lambada(counting_model(), tokenizer, [])
    with pytest.raises(ConfigError, match="--batch-size is 0"):
        evaluate_lambada(counting_model(), tokenizer, ["a b"], batch_size=0)
