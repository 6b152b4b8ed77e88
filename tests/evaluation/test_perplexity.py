import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_train.data.corpus import Document
from rwkv_train.data.stored import TokenDocument
from rwkv_train.errors import DataError
from rwkv_train.evaluation.perplexity import evaluate_documents, evaluate_tokens
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
    report = evaluate_tokens(model, documents, batch_size=3, chunk_len=50)

    for domain in ("code", "prose"):
        own = [document for document in documents if document.domain == domain]
        totals = report.domains[domain]
        assert totals.documents == len(own)
        assert totals.tokens == sum(len(document.tokens) for document in own)
        assert totals.bytes == sum(document.n_bytes for document in own)
        nats = sum(whole_sequence_nats(model, document) for document in own)
        assert totals.nats == pytest.approx(nats, rel=CHUNK_TOLERANCE)


@pytest.mark.parametrize("chunk_len", [1, 16, 512, 10_000])
def test_the_length_of_chunks_changes_nothing(model, documents, chunk_len):
    expected = evaluate_tokens(model, documents, chunk_len=100).total
    total = evaluate_tokens(model, documents, chunk_len=chunk_len).total
    assert total[:3] == expected[:3]
    assert total.nats == pytest.approx(expected.nats, rel=CHUNK_TOLERANCE)


@pytest.mark.parametrize("batch_size", [2, 5, 64])
def test_the_number_of_lanes_changes_nothing(model, documents, batch_size):
    expected = evaluate_tokens(model, documents, batch_size=1)
    report = evaluate_tokens(model, documents, batch_size=batch_size)
    assert report.domains.keys() == expected.domains.keys()
    for domain, totals in report.domains.items():
        assert totals[:3] == expected.domains[domain][:3]
        assert totals.nats == pytest.approx(expected.domains[domain].nats, rel=BATCH_TOLERANCE)


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
        end_of_document=200,
        batch_size=batch_size,
        chunk_len=chunk_len,
        on_document=done.append,
    ).total

    # CountingModel's loss, by its definition: the target times 1 plus the sum of all tokens before it.
    expected = [
        sum(int(token) * (1 + 200 + int(tokens[:i].sum())) for i, token in enumerate(tokens))
        for tokens, _, _ in documents
        if len(tokens)
    ]
    assert sorted(totals.nats for totals in done) == sorted(expected)
    assert total == (len(expected), sum(lengths), sum(lengths), sum(expected))


def test_a_model_that_knows_nothing_needs_log2_of_the_vocabulary_for_each_token(model, tokenizer):
    empty_head = build_model(model.config, wkv_backend="reference")  # all its weights are zero
    texts = [Document("Grüße, Welt! 🦢", "a"), Document("short", "b")]
    report = evaluate_documents(empty_head, tokenizer, texts)

    # A token of the byte tokenizer is a byte.
    assert report.total.bytes == report.total.tokens == 5 + len("Grüße, Welt! 🦢".encode())
    for totals in report.domains.values():
        assert totals.bits_per_byte == pytest.approx(math.log2(257), rel=1e-6)
        assert totals.token_ppl == totals.byte_ppl == pytest.approx(257, rel=1e-5)


def test_bytes_are_those_of_the_text_and_not_tokens(model, counting_model):
    class Words:
        """Every word is token 3."""

        end_of_document = 0

        def encode_arrays(self, texts):
            return [np.full(len(text.split()), 3) for text in texts]

    report = evaluate_documents(counting_model(), Words(), [Document("zwei Wörter", "d")])
    assert report.total[:3] == (1, 2, 12)


def test_data_without_text_is_refused(model, tokenizer):
    with pytest.raises(DataError, match="holds no document with text"):
        evaluate_documents(model, tokenizer, [Document("", "d")])


def test_a_process_without_documents_has_an_empty_report(model):
    report = evaluate_tokens(model, [])
    assert report.domains == {}
    assert report.total == (0, 0, 0, 0.0)
