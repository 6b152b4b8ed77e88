"""Which corpus a sample comes from, and in which proportions."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_train.config.load import check_tree
from rwkv_train.data.binidx import TokenFileWriter
from rwkv_train.data.mixing import MixedSamples, Mixture
from rwkv_train.data.module import CorpusSamples
from rwkv_train.data.stored import load_corpus

WEIGHTS = st.lists(st.integers(1, 50).map(lambda n: n / 10), min_size=1, max_size=6)
CTX_LEN = 8


@settings(max_examples=50, deadline=None)
@given(WEIGHTS)
def test_numbers_are_dealt_out_once_each_and_in_order(weights):
    mixture = Mixture(weights)
    counts = [0] * len(weights)
    for number in range(200):
        assert mixture.drawn(number) == tuple(counts)
        part, before = mixture.locate(number)
        assert before == counts[part]
        counts[part] += 1


@settings(max_examples=50, deadline=None)
@given(WEIGHTS, st.integers(0, 10**15))
def test_after_any_number_each_part_has_its_share(weights, n):
    exact = [Fraction(str(weight)) for weight in weights]
    shares = [n * weight / sum(exact) for weight in exact]
    counts = Mixture(weights).drawn(n)

    assert sum(counts) == n
    assert all(abs(count - share) < len(weights) for count, share in zip(counts, shares, strict=True))


def test_decimal_weights_are_taken_as_written():
    # In binary fractions 0.1 + 0.2 + 0.7 is not 1, and shares of whole tens would be off by one.
    assert Mixture([0.1, 0.2, 0.7]).drawn(10**15) == (10**14, 2 * 10**14, 7 * 10**14)


def test_equal_weights_take_turns():
    assert [Mixture([1.0, 1.0]).locate(number)[0] for number in range(6)] == [1, 0, 1, 0, 1, 0]


@pytest.fixture
def corpora(tmp_path):
    """Two corpora of 20 and 50 samples that count up from 0 and from 500: a token tells where it was read."""
    opened = []
    for name, first, n_samples in (("first", 0, 20), ("second", 500, 50)):
        with TokenFileWriter(tmp_path / name, np.uint16) as writer:
            writer.add_document(np.arange(first, first + n_samples * CTX_LEN + 1, dtype=np.uint16))
        opened.append(load_corpus(tmp_path / name))
    return opened


@pytest.fixture
def config(corpora):
    parts = [
        {"path": str(corpus.prefix), "weight": weight} for corpus, weight in zip(corpora, (3, 1), strict=True)
    ]
    return check_tree(
        {
            "model": {"arch": "rwkv4", "n_layer": 1, "n_embd": 8, "vocab_size": 1000, "ctx_len": CTX_LEN},
            "data": {"train": parts},
            "trainer": {"out_dir": "run", "max_steps": 4},
        }
    )


def test_each_corpus_has_its_own_epochs(corpora, config):
    samples = MixedSamples(corpora, config.data.train, config)
    first_tokens = [int(samples.read(sample)[0][0]) for sample in range(80)]
    from_first = [token // CTX_LEN for token in first_tokens if token < 500]
    from_second = [(token - 500) // CTX_LEN for token in first_tokens if token >= 500]

    assert sorted(from_first) == sorted([*range(20)] * 3)  # three whole epochs of the 20
    assert from_first[:20] != from_first[20:40]  # each in an order of its own
    assert len(set(from_second)) == 20  # of 50: none twice yet


def test_the_first_corpus_is_read_as_it_would_be_alone_and_the_second_is_not(corpora, config):
    samples = MixedSamples([corpora[1], corpora[1]], config.data.train, config)
    alone = CorpusSamples(corpora[1], config)
    mixture = Mixture([3.0, 1.0])
    places = [(sample, *mixture.locate(sample)) for sample in range(80)]

    def same(part):
        return [torch.equal(samples.read(n)[0], alone.read(own)[0]) for n, p, own in places if p == part]

    assert all(same(0))
    assert sum(same(1)) <= 5  # two random orders of 50 agree in one place on average


def test_what_was_drawn_is_counted_in_tokens_and_epochs(corpora, config):
    assert MixedSamples(corpora, config.data.train, config).drawn(80) == (
        ("first", 60 * CTX_LEN, 3.0),
        ("second", 20 * CTX_LEN, 0.4),
    )


def test_corpora_of_one_name_are_told_apart_by_their_paths(corpora, config):
    parts = [
        part.model_copy(update={"path": f"{place}/same"}) for place, part in enumerate(config.data.train)
    ]
    assert [part.name for part in MixedSamples(corpora, parts, config).drawn(0)] == ["0/same", "1/same"]
