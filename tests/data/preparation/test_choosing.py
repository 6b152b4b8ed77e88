"""Which documents are kept: held against the same rule, spelled out over the texts."""

import hashlib
import json
import random
from collections import Counter

import pytest

from rwkv_train.data.preparation import duplicates, leaks
from rwkv_train.data.preparation.options import PrepareOptions
from rwkv_train.data.prepare import prepare_data
from rwkv_train.data.stored import load_corpus
from rwkv_train.errors import ConfigError, DataError
from rwkv_train.tokenizers import load_tokenizer

WORDS = [f"{a}{b}" for a in "bdfgklmnprst" for b in ("a", "en", "io", "ur")]


def text_of(chance: random.Random, n_words: int) -> str:
    return " ".join(chance.choice(WORDS) for _ in range(n_words))


def write(path, texts):
    with path.open("w") as file:
        for number, text in enumerate(texts):
            meta = {"pile_set_name": f"domain {number % 3}"}
            file.write(json.dumps({"text": text, "meta": meta}) + "\n")
    return path


def prepared(path, out, **options):
    """Prepare a file and return the texts of each part."""
    tokenizer = load_tokenizer("bytes")
    found = prepare_data([path], tokenizer, out, PrepareOptions(**options))
    texts = [
        [
            tokenizer.decode_bytes(document.tokens).decode()
            for document in load_corpus(prefix).token_documents()
        ]
        for prefix, _ in found
    ]
    return texts, found[0].sidecar.preparation


@pytest.fixture
def texts():
    chance = random.Random(1)
    return [text_of(chance, chance.randrange(1, 40)) for _ in range(400)]


def share_of(text: str) -> float:
    """Where in [0, 1) a text falls: the last eight bytes of its hash."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest()[8:], "little") / 2**64


def test_a_text_is_held_out_by_its_hash_alone(texts, tmp_path):
    (train, valid), _ = prepared(
        write(tmp_path / "t.jsonl", texts), tmp_path / "out", valid_fraction=0.2, max_leak=1
    )

    assert valid == [text for text in texts if share_of(text) < 0.2]
    assert train == [text for text in texts if share_of(text) >= 0.2]
    assert 40 < len(valid) < 120


def test_of_equal_texts_the_first_stays(texts, tmp_path, monkeypatch):
    monkeypatch.setattr(duplicates, "_BUCKET_DOCUMENTS", 50)
    chance = random.Random(2)
    copied = [*texts, *chance.choices(texts, k=100)]
    chance.shuffle(copied)

    (found,), preparation = prepared(write(tmp_path / "t.jsonl", copied), tmp_path / "out", dedup="exact")

    assert found == list(dict.fromkeys(copied))
    assert sum(preparation.n_duplicates.values()) == 100


def shingles(text: str) -> set[tuple[str, ...]]:
    words = text.split()
    return {tuple(words[start : start + 5]) for start in range(len(words) - 4)}


def jaccard(a: str, b: str) -> float:
    return len(shingles(a) & shingles(b)) / len(shingles(a) | shingles(b))


def test_of_nearly_equal_texts_the_first_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(duplicates, "_BUCKET_DOCUMENTS", 20)
    chance = random.Random(3)
    originals = [text_of(chance, 300) for _ in range(30)]
    near = [text + " and some more" for text in originals[:10]]
    far = [" ".join(text.split()[:150] + text_of(chance, 150).split()) for text in originals[10:20]]
    assert min(map(jaccard, originals, near)) > 0.95
    assert max(map(jaccard, originals[10:], far)) < 0.5
    # A chain: each one like the one before, so all are one cluster.
    chain = [originals[20]]
    for _ in range(4):
        chain.append(" ".join([*chain[-1].split()[8:], *text_of(chance, 8).split()]))

    (found,), preparation = prepared(
        write(tmp_path / "t.jsonl", [*originals, *near, *far, *chain[1:]]), tmp_path / "out", dedup="minhash"
    )

    assert found == [*originals, *far]
    assert sum(preparation.n_duplicates.values()) == 14


def test_a_held_out_text_that_training_has_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(leaks, "_RANGE_TOKENS", 5_000)
    chance = random.Random(4)
    texts = [text_of(chance, 200) for _ in range(120)]
    train = [text for text in texts if share_of(text) >= 0.3]
    # Copies of a part of a training text within a new one, wherever that falls.
    mixed = [
        " ".join(
            [
                *text_of(chance, 7).split(),
                *chance.choice(train).split()[: 20 * k],
                *text_of(chance, 90).split(),
            ]
        )
        for k in range(8)
        for _ in range(8)
    ]
    everything = [*texts, *mixed]

    parts, preparation = prepared(
        write(tmp_path / "t.jsonl", everything), tmp_path / "out", valid_fraction=0.3, max_leak=0.25
    )

    kept = [text for text in everything if share_of(text) >= 0.3]
    windows = {tuple(w[i : i + 16]) for w in map(str.split, kept) for i in range(len(w) - 15)}
    expected = []
    for text in everything:
        words = text.split()
        probes = [tuple(words[i : i + 16]) for i in range(0, len(words) - 15, 16)]
        if share_of(text) < 0.3 and sum(probe in windows for probe in probes) <= 0.25 * len(probes):
            expected.append(text)
    assert parts == [kept, expected]
    n_leaked = len(everything) - len(kept) - len(expected)
    assert sum(preparation.n_leaked.values()) == n_leaked > 5


def test_shuffling_keeps_each_document_once_in_an_order_of_the_seed(texts, tmp_path):
    path = write(tmp_path / "t.jsonl", texts)
    orders = [
        prepared(path, tmp_path / name, shuffle=seed)[0][0] for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]

    assert orders[0] == orders[1] != orders[2]
    assert all(Counter(order) == Counter(texts) and order != texts for order in orders)


def test_only_the_wanted_domains_are_taken(texts, tmp_path):
    (found,), _ = prepared(write(tmp_path / "t.jsonl", texts), tmp_path / "out", domains=("domain 1",))

    assert found == texts[1::3]


def test_domains_that_are_not_there_are_refused_with_those_that_are(texts, tmp_path):
    with pytest.raises(DataError, match=r"no document is of the domain 'law'.*domain 0"):
        prepared(write(tmp_path / "t.jsonl", texts), tmp_path / "out", domains=("law",))


def test_a_part_without_documents_is_refused(texts, tmp_path):
    path = write(tmp_path / "t.jsonl", texts[:3])

    with pytest.raises(DataError, match=r"0\.0001 of 3 documents leaves the part 'valid' empty"):
        prepared(path, tmp_path / "out", valid_fraction=0.0001)


def test_records_that_cannot_be_used_are_counted_and_named(texts, tmp_path):
    path = write(tmp_path / "t.jsonl", texts)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:7], b"oops\n", *lines[7:], b'{"txt": 1}\n']))

    (found,), preparation = prepared(path, tmp_path / "out", skip_bad=True)

    assert found == texts
    assert preparation.n_skipped_bad == 2
    assert [where.split(": ")[0] for where in preparation.first_bad] == [
        f"{path}, line 8",
        f"{path}, line 402",
    ]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"valid_fraction": 1.0}, "--valid-fraction must be between 0 and 1, found 1.0"),
        ({"valid_fraction": -0.1}, "--valid-fraction must be between 0 and 1"),
        ({"dedup": "fuzzy"}, "--dedup must be one of exact, minhash, found 'fuzzy'"),
        ({"max_leak": 0.2}, "give --valid-fraction too"),
        ({"valid_fraction": 0.5, "max_leak": 2}, "--max-leak must be from 0 to 1, found 2"),
        ({"domains": ()}, "--domains names no domain"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, sentence, tmp_path):
    with pytest.raises(ConfigError, match=sentence):
        prepare_data(
            [tmp_path / "absent"], load_tokenizer("bytes"), tmp_path / "out", PrepareOptions(**options)
        )
