"""The held-out loss during a run."""

import json
import math

import numpy as np
import pytest

from rwkv_train.data.binidx import TokenFileWriter
from rwkv_train.data.prepare import prepare_data
from rwkv_train.data.stored import load_corpus
from rwkv_train.errors import DataError
from rwkv_train.evaluation.totals import Totals
from rwkv_train.tokenizers import load_tokenizer
from rwkv_train.training.run import run_pretraining
from rwkv_train.training.validation import Validation, metric_columns, select_documents


def test_a_corpus_without_text_is_refused_before_training(settings, tmp_path):
    with TokenFileWriter(tmp_path / "bare", np.uint16) as writer:
        for _ in range(50):
            writer.add_document(np.zeros(1, np.uint16))  # nothing but the end of a document
    with pytest.raises(DataError, match=r"data\.valid .* has no document with text"):
        run_pretraining(settings({"data.valid": str(tmp_path / "bare")}))


@pytest.fixture
def two_domains(tmp_path):
    """Domain "a" has 299 tokens in three documents, "b" has 99 in one, end tokens included."""
    lines = [
        f'{{"text": "{"é" * n}", "meta": {{"pile_set_name": "{domain}"}}}}'
        for domain, n in (
            ("a", 49),
            ("a", 50),
            ("b", 49),
            ("a", 49),
        )
    ]
    path = tmp_path / "text.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    prepare_data([path], load_tokenizer("bytes"), tmp_path / "corpus")
    return load_corpus(tmp_path / "corpus")


def test_each_domain_is_scored_in_its_share(two_domains):
    chosen = select_documents(two_domains, load_tokenizer("bytes"), 100)

    # 299 * 100 / 398 = 75.1 and 99 * 100 / 398 = 24.9, rounded up: the head of the first document of each.
    assert [(d.domain, len(d.tokens), d.n_bytes) for d in chosen] == [("a", 76, 76), ("b", 25, 25)]


def test_a_corpus_smaller_than_what_is_wanted_is_scored_whole(two_domains):
    chosen = select_documents(two_domains, load_tokenizer("bytes"), 10_000)
    assert [len(document.tokens) for document in chosen] == [98, 100, 98, 98]


def test_the_end_token_of_a_pair_from_elsewhere_is_not_scored(tmp_path):
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    words = {"!": 0, "a": 1, "<|endoftext|>": 2}
    tokenizer = {
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "!"},
        "added_tokens": [
            {"id": 2, "content": "<|endoftext|>", "special": True, "single_word": False, "lstrip": False}
            | {"rstrip": False, "normalized": False}
        ],
    }
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", **tokenizer}))
    with TokenFileWriter(tmp_path / "foreign", np.uint16) as writer:
        writer.add_document(np.array([1, 0, 2], np.uint16))
    corpus = load_corpus(tmp_path / "foreign")

    (document,) = select_documents(corpus, load_tokenizer(str(folder / "tokenizer.json")), 100)

    assert document.tokens.tolist() == [1, 0]


def test_metrics_are_loss_and_bits_per_byte_of_all_text_and_of_each_domain():
    # Two tokens of 1 nat over 4 bytes; a domain without known bytes.
    domains = {"a": Totals(1, 2, 4, 0, 2.0), "b": Totals(1, 3, 0, 0, 9.0)}
    metrics = Validation(Totals(2, 5, 4, 0, 11.0), domains, step=7).as_metrics()
    assert metrics == {
        "val_loss": pytest.approx(2.2),
        "val_bits_per_byte": pytest.approx(2.75 / math.log(2)),
        "val_loss/a": 1.0,
        "val_bits_per_byte/a": pytest.approx(0.5 / math.log(2)),
        "val_loss/b": 3.0,
    }
    assert metrics.keys() <= set(metric_columns(["a", "b"]))


def test_a_domain_may_be_called_total():
    validation = Validation(Totals(2, 5, 4, 0, 11.0), {"total": Totals(1, 2, 4, 0, 2.0)}, step=7)
    assert validation.loss == pytest.approx(2.2)
    metrics = validation.as_metrics()
    assert (metrics["val_loss"], metrics["val_loss/total"]) == (pytest.approx(2.2), 1.0)
    assert metrics.keys() == set(metric_columns(["total"]))
    assert [validation.to_json()["total"]["nats"], validation.to_json()["domains"]["total"]["nats"]] == [
        11,
        2,
    ]
