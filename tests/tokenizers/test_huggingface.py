"""Tokenizers from a file: exact where they are byte-level, refused where they cannot serve."""

import hashlib
import json
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from rwkv_train.errors import DataError
from rwkv_train.tokenizers import load_tokenizer


@given(text=st.text(st.characters(exclude_categories=("Cs",)), max_size=100))
@settings(deadline=None)
def test_a_byte_level_file_gives_back_the_text_that_its_normaliser_makes(byte_level_tokenizer, text):
    decoded = byte_level_tokenizer.decode_bytes(byte_level_tokenizer.encode(text))

    assert decoded == unicodedata.normalize("NFC", text).encode()


def test_the_name_of_the_end_token_inside_a_text_is_text(byte_level_tokenizer):
    text = "the <|endoftext|> cat"
    ids = byte_level_tokenizer.encode(text)

    assert byte_level_tokenizer.end_of_document not in ids
    assert byte_level_tokenizer.decode_bytes(ids) == text.encode()


def test_arrays_batches_and_single_texts_agree(byte_level_tokenizer):
    texts = ["the cat", "", "é\n"]
    expected = [byte_level_tokenizer.encode(text) for text in texts]

    assert byte_level_tokenizer.encode_batch(texts) == expected
    assert [array.tolist() for array in byte_level_tokenizer.encode_arrays(texts)] == expected


def test_a_file_is_identified_by_its_bytes_wherever_it_lies(byte_level_file, byte_level_tokenizer, tmp_path):
    copy = tmp_path / "other.json"
    copy.write_bytes(byte_level_file.read_bytes())
    moved = load_tokenizer(str(copy)).identity

    assert moved.sha256 == hashlib.sha256(byte_level_file.read_bytes()).hexdigest()
    assert moved.name == str(copy)
    assert moved.matches(byte_level_tokenizer.identity)
    assert not moved.matches(load_tokenizer("bytes").identity)


def test_ids_beyond_16_bits_are_stored_in_32(tmp_path):
    tokenizer = _word_tokenizer({"<eos>": 0, "far": 70_000})
    tokenizer.save(str(tmp_path / "large.json"))
    loaded = load_tokenizer(str(tmp_path / "large.json"))

    (ids,) = loaded.encode_arrays(["far"])

    assert loaded.vocab_size == 70_001
    assert ids.dtype == np.int32
    assert ids.tolist() == [70_000]


def test_what_a_file_would_add_or_cut_is_left_out(tmp_path):
    tokenizer = _word_tokenizer({"<eos>": 0, "a": 1})
    tokenizer.enable_truncation(max_length=2)
    tokenizer.enable_padding(length=8, pad_id=1)
    tokenizer.save(str(tmp_path / "cutting.json"))

    assert load_tokenizer(str(tmp_path / "cutting.json")).encode("a a a") == [1, 1, 1]


def test_the_end_of_a_document_is_found_by_its_name(tmp_path):
    tokenizer = _word_tokenizer({"a": 0, "</s>": 1})
    tokenizer.save(str(tmp_path / "named.json"))

    assert load_tokenizer(str(tmp_path / "named.json")).end_of_document == 1


def test_a_sentencepiece_file_decodes_spaces_and_single_bytes(tmp_path):
    vocabulary = {"<eos>": 0, "▁the": 1, "▁cat": 2, "s": 3, "<0xC3>": 4, "<0xA9>": 5}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    tokenizer.add_special_tokens([AddedToken("<eos>", special=True)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.save(str(tmp_path / "pieces.json"))

    decoded = load_tokenizer(str(tmp_path / "pieces.json")).decode_bytes([1, 2, 3, 4, 5])

    assert decoded == " the cats\u00e9".encode()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "is not a Hugging Face tokenizer.json"),
        (b"{", "is not a Hugging Face tokenizer.json"),
        (b"{}", "is not a Hugging Face tokenizer.json"),
        (b"\xff\xfe", "is not a Hugging Face tokenizer.json"),
    ],
    ids=["empty", "cut", "no model", "not text"],
)
def test_a_file_that_is_no_tokenizer_is_refused(content, sentence, tmp_path):
    path = tmp_path / "broken.json"
    path.write_bytes(content)

    with pytest.raises(DataError, match=sentence):
        load_tokenizer(str(path))


def test_a_file_without_an_end_of_document_is_refused(tmp_path):
    definition = json.loads(_word_tokenizer({"a": 0}).to_str())
    (tmp_path / "endless.json").write_text(json.dumps(definition))

    with pytest.raises(DataError, match=r"no token for the end of a document: .*<\|endoftext\|>"):
        load_tokenizer(str(tmp_path / "endless.json"))


@pytest.mark.parametrize("name", ["wrld", "~nobody-of-this-name/x", "a" * 300], ids=["name", "home", "long"])
def test_an_unknown_name_lists_the_known_ones(name):
    with pytest.raises(DataError, match=f"'{name}': wanted 'bytes', 'world', 'neox' or the path"):
        load_tokenizer(name)


def test_neox_without_a_network_says_to_pass_the_file(monkeypatch):
    def offline(repository, filename):
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", offline)

    with pytest.raises(DataError, match=r"'neox' could not be had .*no network.*pass the path of its file"):
        load_tokenizer("neox")


def test_neox_is_the_file_of_its_repository(monkeypatch, byte_level_file):
    asked = []

    def download(repository, filename):
        asked.append((repository, filename))
        return str(byte_level_file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)

    assert load_tokenizer("neox").identity.name == "neox"
    assert asked == [("EleutherAI/gpt-neox-20b", "tokenizer.json")]


def _word_tokenizer(vocabulary: dict[str, int]) -> Tokenizer:
    """One token a word; names in angle brackets are special tokens."""
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=min(vocabulary, key=vocabulary.__getitem__)))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = [AddedToken(word, special=True) for word in vocabulary if word.startswith("<")]
    tokenizer.add_special_tokens(special)
    return tokenizer
