"""Pieces of text that a terminal can show at once: whole characters, nothing lost, nothing twice."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_train.tokenizers import StreamingDecoder

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize("fixture", ["byte_tokenizer", "world_tokenizer", "byte_level_tokenizer"])
def test_the_pieces_of_a_text_are_that_text(fixture, request):
    tokenizer = request.getfixturevalue(fixture)
    text = "Ünïcödé 日本語 🎉👩‍🚀 end"
    decoder = StreamingDecoder(tokenizer)

    pieces = [decoder.feed(token) for token in tokenizer.encode(text)]

    assert "".join(pieces) == text
    assert decoder.flush() == ""


@given(data=st.binary(max_size=60))
@settings(deadline=None)
def test_any_bytes_read_as_python_reads_them_with_replacement(byte_tokenizer, data):
    decoder = StreamingDecoder(byte_tokenizer)

    pieces = [decoder.feed(byte + 1) for byte in data]

    assert "".join(pieces) + decoder.flush() == data.decode(errors="replace")


def test_a_part_of_a_character_is_held_back(byte_tokenizer):
    decoder = StreamingDecoder(byte_tokenizer)

    assert [decoder.feed(byte + 1) for byte in "é".encode()] == ["", "é"]
    assert [decoder.feed(byte + 1) for byte in "🎉".encode()] == ["", "", "", "🎉"]


def test_a_character_that_stays_incomplete_is_replaced_at_the_end(byte_tokenizer):
    decoder = StreamingDecoder(byte_tokenizer)
    decoder.feed(0xC3 + 1)

    assert decoder.flush() == REPLACEMENT
    assert decoder.feed(ord("a") + 1) == "a"


def test_a_byte_that_fits_nowhere_is_replaced_at_once(byte_tokenizer):
    assert StreamingDecoder(byte_tokenizer).feed(0xFF + 1) == REPLACEMENT


def test_the_end_of_a_document_completes_what_was_held_back(byte_tokenizer):
    decoder = StreamingDecoder(byte_tokenizer)
    decoder.feed(0xC3 + 1)

    assert decoder.feed(0) == REPLACEMENT
    assert decoder.feed(0) == ""


def test_an_id_of_a_padded_vocabulary_is_replaced(world_tokenizer):
    # The published models have 65536 rows; a sample of an untrained one can hit an unused row.
    assert StreamingDecoder(world_tokenizer).feed(65_535) == REPLACEMENT
