"""The two tokenizers that lose nothing: whatever text goes in comes out, byte for byte."""

import hashlib
from importlib.metadata import distribution

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_train.errors import DataError

TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=200)
"""Any Unicode text; category Cs is the surrogates, which are not characters."""


@given(text=TEXT)
@settings(deadline=None)
def test_bytes_give_back_every_text(byte_tokenizer, text):
    assert byte_tokenizer.decode_bytes(byte_tokenizer.encode(text)) == text.encode()


@given(text=TEXT)
@settings(deadline=None)
def test_world_gives_back_every_text(world_tokenizer, text):
    assert world_tokenizer.decode_bytes(world_tokenizer.encode(text)) == text.encode()


@pytest.mark.parametrize("fixture", ["byte_tokenizer", "world_tokenizer"])
def test_arrays_and_lists_hold_the_same_ids(fixture, request):
    tokenizer = request.getfixturevalue(fixture)
    texts = ["", "\x00", "Привет, мир\r\n", "🎉 def f(x):\n\n    return x"]

    arrays = tokenizer.encode_arrays(texts)

    assert [array.tolist() for array in arrays] == tokenizer.encode_batch(texts)
    assert [array.tolist() for array in arrays] == [tokenizer.encode(text) for text in texts]
    assert {array.dtype for array in arrays} == {np.dtype(np.uint16)}


def test_a_byte_is_its_value_plus_one(byte_tokenizer):
    assert byte_tokenizer.encode("\x00A\u00ff") == [1, 66, 0xC3 + 1, 0xBF + 1]
    assert byte_tokenizer.decode_bytes([256, 1]) == b"\xff\x00"
    assert byte_tokenizer.vocab_size == 257


def test_world_ids_are_the_published_ones(world_tokenizer):
    # From the vocabulary file: all single bytes are byte + 1, "\n\n" is 261, "\r\n" is 263.
    assert world_tokenizer.encode("\x00") == [1]
    assert world_tokenizer.encode("\n\n") == [261]
    assert world_tokenizer.encode("\r\n") == [263]
    assert world_tokenizer.decode_bytes([65529]).decode()
    assert world_tokenizer.decode_bytes(range(1, 257)) == bytes(range(256))


def test_world_takes_the_longest_match_from_the_left(world_tokenizer):
    text = "The quick brown fox; intosh diminishing été 日本語\n\n"
    longest = max(len(world_tokenizer.decode_bytes([token])) for token in range(1, 65530))
    token_of = {world_tokenizer.decode_bytes([token]): token for token in range(1, 65530)}
    data, expected = text.encode(), []
    while data:
        size = next(size for size in range(min(longest, len(data)), 0, -1) if data[:size] in token_of)
        expected.append(token_of[data[:size]])
        data = data[size:]

    assert world_tokenizer.encode(text) == expected


def test_world_is_identified_by_its_vocabulary_file(world_tokenizer):
    path = distribution("pyrwkv-tokenizer").locate_file("pyrwkv_tokenizer/rwkv_vocab_v20230424.txt")

    assert world_tokenizer.identity.name == "world"
    assert world_tokenizer.identity.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_bytes_are_identified_by_their_table(byte_tokenizer):
    table = b"".join(b"%d %02x\n" % (byte + 1, byte) for byte in range(256))

    assert byte_tokenizer.identity == ("bytes", hashlib.sha256(table).hexdigest())


@pytest.mark.parametrize("fixture", ["byte_tokenizer", "world_tokenizer", "byte_level_tokenizer"])
def test_the_end_of_a_document_is_no_text(fixture, request):
    tokenizer = request.getfixturevalue(fixture)

    assert tokenizer.end_of_document == 0
    assert tokenizer.decode_bytes([0, *tokenizer.encode("a"), 0]) == b"a"


@pytest.mark.parametrize("token", [-1, 70_000], ids=["negative", "too large"])
@pytest.mark.parametrize("fixture", ["byte_tokenizer", "world_tokenizer", "byte_level_tokenizer"])
def test_an_unknown_id_is_refused(fixture, token, request):
    tokenizer = request.getfixturevalue(fixture)

    with pytest.raises(DataError, match=f"token id {token} does not exist .* below {tokenizer.vocab_size}"):
        tokenizer.decode_bytes([1, token])


@pytest.mark.parametrize("method", ["encode_batch", "encode_arrays"])
@pytest.mark.parametrize("fixture", ["byte_tokenizer", "world_tokenizer", "byte_level_tokenizer"])
def test_half_a_surrogate_pair_is_refused(fixture, method, request):
    tokenizer = request.getfixturevalue(fixture)

    with pytest.raises(DataError, match=r"character 2 of the text is U\+D83C, half of a surrogate pair"):
        getattr(tokenizer, method)(["fine", "ab\ud83c"])
