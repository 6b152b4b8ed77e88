"""Opening a corpus: its parts agree, and it fits the run, or one sentence says why not."""

import json
import logging
import pickle
import struct

import numpy as np
import pytest

from rwkv_train.data.binidx import TokenFileWriter
from rwkv_train.data.prepare import prepare_data
from rwkv_train.data.stored import load_corpus
from rwkv_train.errors import DataError
from rwkv_train.tokenizers import TokenizerIdentity


@pytest.fixture
def corpus(inputs, byte_tokenizer, tmp_path):
    prepare_data(inputs, byte_tokenizer, tmp_path / "out")
    return load_corpus(tmp_path / "out")


def make_foreign(prefix, tokens, dtype=np.uint16):
    with TokenFileWriter(prefix, dtype) as writer:
        writer.add_document(np.array(tokens, dtype=dtype))
    return load_corpus(prefix)


def test_documents_have_their_domain_and_bytes_and_no_end_token(corpus):
    documents = list(corpus.token_documents())

    assert [(domain, n_bytes) for _, domain, n_bytes in documents] == [
        ("code", 23),
        ("prose", 17),
        ("code", 6),
        ("letter", 11),
    ]
    assert documents[2].tokens.tolist() == [byte + 1 for byte in "日本".encode()]
    assert corpus.token_document(3).n_bytes == 11


def test_tokens_of_the_domains_add_up_to_all(corpus):
    assert corpus.domains == ("code", "prose", "letter")
    assert corpus.tokens_by_domain() == {"code": 31, "prose": 18, "letter": 12}
    assert corpus.tokens.n_tokens == 61


def test_a_copy_for_another_process_is_small_and_the_same(corpus):
    data = pickle.dumps(corpus)
    copy = pickle.loads(data)

    assert len(data) < 1_000
    assert copy.tokens.tokens.tolist() == corpus.tokens.tokens.tolist()
    assert copy.sidecar == corpus.sidecar


def test_a_pair_of_another_program_is_one_unknown_domain(tmp_path):
    corpus = make_foreign(tmp_path / "foreign", [7, 8, 0])
    (document,) = corpus.token_documents()

    assert (document.tokens.tolist(), document.domain, document.n_bytes) == ([7, 8], "unknown", 0)
    assert corpus.tokens_by_domain() == {"unknown": 3}
    assert corpus.sidecar is None


def test_a_pair_without_end_tokens_keeps_all_its_tokens(tmp_path):
    (document,) = make_foreign(tmp_path / "foreign", [7, 8]).token_documents()

    assert document.tokens.tolist() == [7, 8]


def test_the_end_token_of_a_pair_without_sidecar_is_the_one_that_is_told(tmp_path):
    corpus = make_foreign(tmp_path / "foreign", [7, 0, 256])

    assert [tokens.tolist() for tokens, *_ in corpus.token_documents(256)] == [[7, 0]]
    assert corpus.token_document(0, 300).tokens.tolist() == [7, 0, 256]


def test_a_sidecar_knows_the_end_token_better(corpus):
    assert corpus.token_document(3, 256).tokens.tolist() == [byte + 1 for byte in b"Dear all,\r\n"]


def test_another_tokenizer_is_refused(corpus):
    other = TokenizerIdentity("world", "ab" * 32)

    with pytest.raises(
        DataError, match=r"made with the tokenizer 'bytes' \(\w{12}\), wanted 'world' \(abababababab\)"
    ):
        corpus.require_tokenizer(other)


def test_the_same_tokenizer_under_another_name_is_accepted(corpus, byte_tokenizer):
    corpus.require_tokenizer(byte_tokenizer.identity._replace(name="/elsewhere/tokenizer.json"))


def test_an_unknown_tokenizer_is_a_warning(tmp_path, byte_tokenizer, caplog):
    corpus = make_foreign(tmp_path / "foreign", [7, 0])

    with caplog.at_level(logging.WARNING):
        corpus.require_tokenizer(byte_tokenizer.identity)

    assert "has no sidecar: whether the tokenizer 'bytes' made it cannot be checked" in caplog.text


def test_ids_beyond_the_vocabulary_are_refused(corpus):
    highest = max("日本".encode()) + 1  # token of the highest byte in the corpus

    corpus.require_vocab(highest + 1)
    with pytest.raises(DataError, match=rf"token id {highest}, but the model's ids are 0 to {highest - 1}"):
        corpus.require_vocab(highest)


def test_an_id_that_came_after_the_preparation_is_refused_with_the_file(corpus):
    path = corpus.prefix.parent / "out.bin"
    data = bytearray(path.read_bytes())
    data[:2] = struct.pack("<H", 60_000)
    path.write_bytes(data)
    changed = load_corpus(corpus.prefix)

    with pytest.raises(
        DataError, match=r"out\.bin: document 0 has the token id 60000, .* ids up to 231: .*again"
    ):
        changed.token_document(0)
    assert changed.token_document(1).domain == "prose"


@pytest.mark.parametrize("place", [0, 4_999, 9_999])
def test_a_foreign_pair_is_searched_for_ids_beyond_the_vocabulary(place, tmp_path, monkeypatch):
    monkeypatch.setattr("rwkv_train.data.stored._SCAN_TOKENS", 100)
    tokens = np.full(10_000, 5)
    tokens[place] = 300
    corpus = make_foreign(tmp_path / "foreign", tokens)

    corpus.require_vocab(301)
    with pytest.raises(DataError, match=r"token id 300, but the model's ids are 0 to 299 \(vocab_size 300\)"):
        corpus.require_vocab(300)


def test_a_foreign_pair_with_negative_ids_is_refused(tmp_path):
    corpus = make_foreign(tmp_path / "foreign", [5, -3], dtype=np.int32)

    with pytest.raises(DataError, match="token id -3, but the model's ids are 0 to 256"):
        corpus.require_vocab(257)


def test_the_search_of_a_huge_foreign_pair_is_spread_over_all_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr("rwkv_train.data.stored._SCAN_TOKENS", 10)
    monkeypatch.setattr("rwkv_train.data.stored._MAX_SCANNED_TOKENS", 100)
    tokens = np.full(10_000, 5)
    tokens[9_000:] = 300
    corpus = make_foreign(tmp_path / "foreign", tokens)

    with pytest.raises(DataError, match="token id 300"):
        corpus.require_vocab(300)


def test_a_corpus_shorter_than_a_sample_is_refused(corpus):
    corpus.require_length(60)
    with pytest.raises(DataError, match=r"has 61 tokens, one sample needs 62 \(ctx_len 61"):
        corpus.require_length(61)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"{", "is not the sidecar of a prepared corpus"),
        (b"[]", "is not the sidecar of a prepared corpus"),
        (b"\xff", "is not the sidecar of a prepared corpus"),
        (b'{"a": 1}', "is not the sidecar of a prepared corpus"),
        (b'{"format": "rwkv-train-corpus/1"}', "is not the sidecar of a prepared corpus"),
        (
            b'{"format": "rwkv-train-corpus/9"}',
            "has the format 'rwkv-train-corpus/9', wanted 'rwkv-train-corpus/2'",
        ),
    ],
)
def test_a_damaged_sidecar_is_refused(content, sentence, corpus):
    (corpus.prefix.parent / "out.json").write_bytes(content)

    with pytest.raises(DataError, match=sentence):
        load_corpus(corpus.prefix)


@pytest.mark.parametrize(
    ("places", "value", "sentence"),
    [
        (["max_token"], "x", "max_token must be a whole number from 0 on, found 'x'"),
        (["end_of_document"], None, "end_of_document must be a whole number from 0 on, found None"),
        (["n_tokens"], "a", "n_tokens must be a whole number"),
        (["n_bytes"], -1, "n_bytes must be a whole number from 0 on, found -1"),
        (["vocab_size"], True, "vocab_size must be a whole number from 0 on, found True"),
        (["n_words"], 1.5, "n_words must be a whole number from 0 on, or null, found 1.5"),
        (["dtype"], 2, "dtype must be a string, found 2"),
        (["tokenizer", "name"], 5, "name must be a string, found 5"),
        (["domains", 0, "name"], 5, "name must be a string, found 5"),
        (["domains", 0, "name"], "prose", "two domains have the same name"),
        (["domains", 0, "n_bytes"], -29, "n_bytes must be a whole number"),
        (["domains", 0, "n_tokens"], 30, "n_tokens is 61, and 60 over all domains"),
        (["domains"], [], "n_documents is 4, and 0 over all domains"),
        (["domains"], None, "not iterable"),
        (["sources", 0, "path"], None, "path must be a string, found None"),
        (["preparation", "first_bad"], [1], "first_bad must be a list of strings"),
        (["preparation", "n_duplicates"], {"a": "b"}, "n_duplicates must be an object of whole numbers"),
        (["preparation"], [], "must be a mapping, not list"),
    ],
)
def test_a_sidecar_with_a_value_that_cannot_be_is_refused_by_the_name_of_the_value(
    places, value, sentence, corpus
):
    path = corpus.prefix.parent / "out.json"
    told = inner = json.loads(path.read_text())
    for place in places[:-1]:
        inner = inner[place]
    inner[places[-1]] = value
    path.write_text(json.dumps(told))

    with pytest.raises(
        DataError, match=rf"out\.json is not the sidecar .*{sentence}.*; prepare the corpus again"
    ):
        load_corpus(corpus.prefix)


@pytest.mark.parametrize(
    ("column", "value", "sentence"),
    [
        ("domain", 3, r"has a document of domain number 3, but .*out\.json tells of 3 domains"),
        ("domain", 1, r"has 1 documents of the domain 'code', but .*out\.json tells of 2"),
        ("n_bytes", -23, "has a document of -23 bytes"),
        ("n_bytes", 24, r"has 30 bytes of the domain 'code', but .*out\.json tells of 29"),
        ("n_words", 9, r"has 10 words of the domain 'code', but .*out\.json tells of 6"),
    ],
)
def test_a_document_table_that_does_not_add_up_is_refused(column, value, sentence, corpus, monkeypatch):
    monkeypatch.setattr("rwkv_train.data.stored._SUMMED_DOCUMENTS", 2)
    path = corpus.prefix.parent / "out.docs.npy"
    table = np.load(path)
    table[column][0] = value
    np.save(path, table)

    with pytest.raises(DataError, match=rf"out\.docs\.npy {sentence}.*prepare"):
        load_corpus(corpus.prefix)


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("n_tokens", 60, "tells of 60 tokens of uint16 in 4 documents, .bin and .idx hold 61 tokens"),
        ("n_documents", 3, "in 3 documents"),
        ("dtype", "int32", "61 tokens of int32"),
    ],
)
def test_a_sidecar_of_another_corpus_is_refused(field, value, sentence, corpus):
    path = corpus.prefix.parent / "out.json"
    told = json.loads(path.read_text()) | {field: value}
    if field != "dtype":  # of its own it adds up
        told["domains"][0][field] -= 1
    path.write_text(json.dumps(told))

    with pytest.raises(DataError, match=sentence):
        load_corpus(corpus.prefix)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda path: path.unlink(), r"cannot read .*out\.docs\.npy"),
        (lambda path: path.write_bytes(b""), r"cannot read .*out\.docs\.npy"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), r"cannot read .*out\.docs\.npy"),
        (lambda path: np.save(path, np.zeros(4)), r"is a table of float64, wanted"),
    ],
    ids=["missing", "empty", "cut off", "another table"],
)
def test_a_damaged_document_table_is_refused(damage, sentence, corpus):
    damage(corpus.prefix.parent / "out.docs.npy")

    with pytest.raises(DataError, match=sentence):
        load_corpus(corpus.prefix)


def test_a_document_table_of_another_corpus_is_refused(corpus):
    path = corpus.prefix.parent / "out.docs.npy"
    np.save(path, np.load(path)[:3])

    with pytest.raises(DataError, match=r"\.docs\.npy 3 documents"):
        load_corpus(corpus.prefix)


def test_a_hand_made_pair_beside_no_sidecar_opens(tmp_path):
    (tmp_path / "hand.bin").write_bytes(struct.pack("<3i", 70_000, 1, 0))
    (tmp_path / "hand.idx").write_bytes(
        b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 4, 1, 2) + struct.pack("<iqqq", 3, 0, 0, 1)
    )

    assert load_corpus(tmp_path / "hand").tokens.tokens.tolist() == [70_000, 1, 0]


def make_documents(prefix, documents):
    with TokenFileWriter(prefix, np.uint16) as writer:
        for tokens in documents:
            writer.add_document(np.array(tokens, np.uint16))
    return load_corpus(prefix)


def test_prepared_documents_end_with_the_end_token(corpus):
    corpus.require_end_tokens(0)


@pytest.mark.parametrize("place", [0, 7, 19])
def test_a_document_without_the_end_token_is_found_wherever_it_is(place, tmp_path):
    documents = [[5, 6, 0] for _ in range(20)]
    documents[place] = [5, 0, 6]
    with pytest.raises(
        DataError, match=rf"document {place} ends with the token 6, but .* end token 0: prepare"
    ):
        make_documents(tmp_path / "foreign", documents).require_end_tokens(0)


def test_of_very_many_documents_some_all_over_the_corpus_are_looked_at(tmp_path, monkeypatch):
    monkeypatch.setattr("rwkv_train.data.stored._MAX_CHECKED_DOCUMENTS", 10)
    corpus = make_documents(tmp_path / "foreign", [[5, 0]] * 90 + [[5]] * 10)
    with pytest.raises(DataError, match="document 99 ends with the token 5"):
        corpus.require_end_tokens(0)
