import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_train.data.corpus import Document
from rwkv_train.data.stored import TokenDocument
from rwkv_train.errors import ConfigError, DataError
from rwkv_train.evaluation.comparison import differences
from rwkv_train.evaluation.modes import Mode
from rwkv_train.evaluation.perplexity import Reading, evaluate_documents, evaluate_tokens
from rwkv_train.models.registry import build_model

# Float32 sums in another order: about 1e-7 for each loss, of either sign.
CHUNK_TOLERANCE = 1e-5
BATCH_TOLERANCE = 1e-6


def whole_sequence_nats(model, document):
    """The definition: one call for a whole document, logits in float64, each token's negative logarithm."""
    sequence = torch.tensor([0, *document.tokens.tolist()])
    with torch.no_grad():
        logits = model(sequence[None, :-1]).logits[0].double()
    probabilities = torch.softmax(logits, dim=1)
    return -sum(
        math.log(probabilities[position, token]) for position, token in enumerate(sequence[1:].tolist())
    )


def test_totals_are_those_of_one_whole_sequence_for_each_document(model, documents):
    report = evaluate_tokens(model, documents, Reading(batch_size=3, chunk_len=50))

    for domain in ("code", "prose"):
        own = [document for document in documents if document.domain == domain]
        totals = report.domains[domain].totals
        assert totals.documents == len(own)
        assert totals.tokens == sum(len(document.tokens) for document in own)
        assert totals.bytes == sum(document.n_bytes for document in own)
        nats = sum(whole_sequence_nats(model, document) for document in own)
        assert totals.nats == pytest.approx(nats, rel=CHUNK_TOLERANCE)


def test_the_length_of_chunks_changes_nothing(model, documents):
    some = [document for document in documents if len(document.tokens) in {3, 41, 65}]
    # The whole documents at once, and the lengths that the state is carried over.
    expected, *totals = [
        evaluate_tokens(model, some, Reading(batch_size=1, chunk_len=chunk_len)).total
        for chunk_len in (512, 1, 16)
    ]
    for total in totals:
        assert total[:4] == expected[:4]
        assert total.nats == pytest.approx(expected.nats, rel=CHUNK_TOLERANCE)


def test_the_number_of_lanes_changes_nothing(model, documents):
    expected, *reports = [
        evaluate_tokens(model, documents, Reading(batch_size=batch_size)) for batch_size in (64, 2, 5)
    ]
    for report in reports:
        assert report.domains.keys() == expected.domains.keys()
        for domain, sums in report.domains.items():
            assert sums.totals[:4] == expected.domains[domain].totals[:4]
            nats = expected.domains[domain].totals.nats
            assert sums.totals.nats == pytest.approx(nats, rel=BATCH_TOLERANCE)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), max_size=12),
    batch_size=st.integers(1, 6),
    chunk_len=st.integers(1, 50),
)
def test_every_token_is_scored_once_after_exactly_what_stands_before_it(
    counting_model, lengths, batch_size, chunk_len
):
    random = np.random.default_rng(len(lengths))
    documents = [TokenDocument(random.integers(1, 257, n), "d", n) for n in lengths]
    done = []

    total = evaluate_tokens(
        counting_model(),
        documents,
        Reading(prefix_token=200, batch_size=batch_size, chunk_len=chunk_len),
        on_document=done.append,
    ).total

    # CountingModel's loss, by its definition: the target times 1 plus the sum of all tokens before it.
    expected = [
        sum(int(token) * (1 + 200 + int(tokens[:i].sum())) for i, token in enumerate(tokens))
        for tokens, _, _ in documents
        if len(tokens)
    ]
    assert sorted(totals.nats for totals in done) == sorted(expected)
    assert total == (len(expected), sum(lengths), sum(lengths), 0, sum(expected))


def test_a_model_that_knows_nothing_needs_log2_of_the_vocabulary_for_each_token(model, tokenizer):
    empty_head = build_model(model.config, wkv_backend="reference")  # all its weights are zero
    texts = [Document("Grüße, Welt! 🦢", "a"), Document("short", "b")]
    report = evaluate_documents(empty_head, tokenizer, texts)

    # A token of the byte tokenizer is a byte.
    assert report.total.bytes == report.total.tokens == 5 + len("Grüße, Welt! 🦢".encode())
    for sums in report.domains.values():
        totals = sums.totals
        assert totals.bits_per_byte == pytest.approx(math.log2(257), rel=1e-6)
        assert totals.token_ppl == totals.byte_ppl == pytest.approx(257, rel=1e-5)


class Words:
    """A tokenizer that strips white space: every word is token 3."""

    end_of_document = 0

    def encode_arrays(self, texts):
        return [np.full(len(text.split()), 3) for text in texts]


def test_bytes_and_words_are_those_of_the_text_and_not_tokens(counting_model):
    report = evaluate_documents(counting_model(), Words(), [Document("zwei Wörter", "d")])
    assert report.total[:4] == (1, 2, 12, 2)


@pytest.mark.parametrize("prefix_token", [0, None])
def test_a_text_without_tokens_counts_so_that_models_are_compared_on_the_same_documents(
    counting_model, tokenizer, prefix_token
):
    documents = [Document(text, domain) for text, domain in [("ab cd", "d"), (" \n\t", "blank"), ("", "d")]]
    reading, done = Reading(prefix_token=prefix_token), []
    stripped = evaluate_documents(counting_model(), Words(), documents, reading, on_document=done.append)
    # Both words are token 3 and cost 3 * (1 + what stands before); the first one is not scored without a prefix.
    nats, n_scored = (3 * 1 + 3 * 4, 2) if prefix_token == 0 else (3 * 4, 1)
    assert stripped.domains["blank"].totals == (1, 0, 3, 2, 0)
    assert stripped.total == (2, n_scored, 8, 4, nats)
    assert sorted(totals.bytes for totals in done) == [3, 5]
    assert stripped.positions.curve(1).documents == 1

    by_bytes = evaluate_documents(counting_model(), tokenizer, documents, reading)
    compared = differences(stripped, by_bytes, same_tokenizer=False)
    more_bits = (by_bytes.total.nats - nats) / (8 * math.log(2))
    assert compared[None].bits_per_byte.value == pytest.approx(more_bits)
    assert compared["blank"].bits_per_byte is None


def test_data_without_text_is_refused(model, tokenizer):
    with pytest.raises(DataError, match="holds no document with text"):
        evaluate_documents(model, tokenizer, [Document("", "d")])


def test_text_of_which_no_token_is_scored_is_refused_with_the_reason(counting_model, tokenizer):
    with pytest.raises(DataError, match="of all 3 bytes of text the tokenizer makes no token"):
        evaluate_documents(counting_model(), Words(), [Document("  ", "d"), Document("\n", "d")])
    with pytest.raises(DataError, match="no document has more than one token, and with --prefix-token none"):
        evaluate_documents(counting_model(), tokenizer, [Document("a", "d")], Reading(prefix_token=None))


def test_a_process_without_documents_has_an_empty_report(model):
    report = evaluate_tokens(model, [])
    assert report.domains == {}
    assert report.total == (0, 0, 0, 0, 0.0)


@pytest.mark.parametrize("window", [200, 10_000])
def test_a_window_as_long_as_the_documents_is_the_whole_of_them(model, documents, window):
    expected = evaluate_tokens(model, documents)
    report = evaluate_tokens(model, documents, Reading(Mode.WINDOWED, window))
    assert report.total[:4] == expected.total[:4]
    assert report.total.nats == pytest.approx(expected.total.nats, rel=BATCH_TOLERANCE)


def test_each_window_knows_what_stands_in_it_and_nothing_else(counting_model):
    tokens = np.array([7, 11, 13, 17, 19])
    nats = {}
    for window in (2, 3):
        document = TokenDocument(tokens, "d", 5)
        report = evaluate_tokens(
            counting_model(), [document], Reading(Mode.WINDOWED, window, prefix_token=200)
        )
        nats[window] = report.total.nats
        assert report.total.tokens == 5
    # By hand: target times (1 + sum of what its window has read).
    first = 7 * 201 + 11 * 208
    assert nats[2] == first + 13 * 12 + 17 * 25 + 19 * (1 + 13 + 17)  # the last window: 13 and 17, then 19
    assert nats[3] == first + 13 * 219 + 17 * (1 + 11 + 13) + 19 * (1 + 11 + 13 + 17)


@pytest.mark.parametrize(("batch_size", "chunk_len"), [(1, 1), (2, 3), (1, 1000)])
def test_a_stream_knows_all_that_came_before(counting_model, batch_size, chunk_len):
    documents = [TokenDocument(np.array(tokens), "d", 2) for tokens in ([3, 5], [], [7], [2, 4, 6])]
    reading = Reading(Mode.STREAM, prefix_token=100, batch_size=batch_size, chunk_len=chunk_len)
    report = evaluate_tokens(counting_model(), documents, reading)
    stream = [100, 3, 5, 100, 7, 100, 2, 4, 6]
    expected = sum(
        token * (1 + sum(stream[:position])) for position, token in enumerate(stream) if token != 100
    )
    # The document without tokens is not in the stream; its two bytes count.
    assert report.total == (4, 6, 8, 0, expected)


def test_a_stream_of_one_document_is_the_document(model, documents):
    expected = evaluate_tokens(model, documents[1:2]).total
    total = evaluate_tokens(model, documents[1:2], Reading(Mode.STREAM)).total
    assert total[:4] == expected[:4]
    assert total.nats == pytest.approx(expected.nats, rel=CHUNK_TOLERANCE)


@pytest.mark.parametrize("reading", [Reading(), Reading(Mode.WINDOWED, 2)], ids=["stateful", "windowed"])
def test_without_a_prefix_the_first_token_is_read_and_not_scored(counting_model, reading):
    documents = [TokenDocument(np.array(tokens), "d", 10) for tokens in ([3, 5, 7], [11])]
    report = evaluate_tokens(counting_model(), documents, reading._replace(prefix_token=None))
    # Of a document of one token nothing is scored, its bytes count. Both windows of 2 hold all of 3, 5, 7.
    assert report.total == (2, 2, 20, 0, 5 * (1 + 3) + 7 * (1 + 3 + 5))
    assert report.positions.curve(1).buckets[0].loss is None


@pytest.mark.parametrize(
    ("reading", "message"),
    [
        (Reading(Mode.WINDOWED), "--mode windowed needs --window N"),
        (
            Reading(Mode.STATEFUL, 5),
            "--window 5 has a meaning with --mode windowed only; the mode is stateful",
        ),
        (Reading(Mode.WINDOWED, 0), "--window is 0; it must be at least 1"),
        (Reading(Mode.STREAM, prefix_token=None), "--mode stream needs a token between documents"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(counting_model, reading, message):
    with pytest.raises(ConfigError, match=message):
        evaluate_tokens(counting_model(), [], reading)
