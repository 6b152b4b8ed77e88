import pytest
from hypothesis import given
from hypothesis import strategies as st

from rwkv_train.errors import ConfigError
from rwkv_train.generation.stop import StopScanner

SHORT_TEXT = st.text(alphabet="ab\n", max_size=20)


def read(pieces, stop):
    scanner = StopScanner(stop)
    out = "".join(scanner.feed(piece) for piece in pieces)
    return (out if scanner.stopped else out + scanner.flush()), scanner.stopped


def expected_text(text, stop):
    """The definition: the first prefix that ends with a stop string, without it (the longest, if several)."""
    for end in range(1, len(text) + 1):
        ending = [s for s in stop if text[:end].endswith(s)]
        if ending:
            return text[: end - max(map(len, ending))], True
    return text, False


@given(
    pieces=st.lists(SHORT_TEXT, max_size=8),
    stop=st.lists(st.text(alphabet="ab\n", min_size=1, max_size=4), max_size=3),
)
def test_the_text_ends_before_the_first_stop_string_however_it_was_cut(pieces, stop):
    assert read(pieces, stop) == expected_text("".join(pieces), stop)


@given(pieces=st.lists(SHORT_TEXT, max_size=8), stop=st.text(alphabet="ab\n", min_size=1, max_size=4))
def test_what_is_held_back_is_only_what_may_begin_a_stop_string(pieces, stop):
    scanner = StopScanner([stop])
    for piece in pieces:
        scanner.feed(piece)
        assert stop.startswith(scanner.held)
        assert scanner.held != stop


def test_a_stop_string_across_pieces_never_shows_in_part():
    scanner = StopScanner(["\n\nUser:"])
    out = [scanner.feed(piece) for piece in ["Hi\n", "\n", "Us", "er: you", "more"]]
    assert out == ["Hi", "", "", "", ""]
    assert scanner.stopped


def test_a_false_alarm_is_released():
    scanner = StopScanner(["\n\nUser:"])
    assert [scanner.feed("Hi\n\n"), scanner.feed("Using it")] == ["Hi", "\n\nUsing it"]


def test_without_stop_strings_everything_passes_at_once():
    assert read(["a", "", "b"], []) == ("ab", False)
    assert StopScanner([]).feed("text") == "text"


def test_an_empty_stop_string_is_refused():
    with pytest.raises(ConfigError, match="a stop string is empty"):
        StopScanner(["a", ""])


def test_one_string_is_not_taken_for_a_list_of_letters():
    with pytest.raises(ValueError, match="not one string"):
        StopScanner("END")
