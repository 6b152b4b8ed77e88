"""A ``tokenizer.json`` for a vocabulary of byte strings that is matched greedily from the left, as World's is.

The library ``tokenizers`` has such a rule under the name WordPiece. It takes each byte as a letter (GPT-2's table),
and for a piece of n bytes without a cut up to n^3 steps. So the text is cut first, and only where no token can
lie across: between two characters of which no token has the kinds side by side, and around every character that
no token joins to another. What stays in one piece are words, numbers of one script, and runs of punctuation.
"""

import json
from collections.abc import Sequence
from itertools import pairwise

END_OF_DOCUMENT = "<|rwkv_tokenizer_end_of_text|>"
"""Name of token 0, as in the ``RWKV/`` repositories."""

_SPACES = "\t\n\x0b\x0c\r "
_LETTERS = {
    "small": "abcdefghijklmnopqrstuvwxyz",
    "capital": "ABCDEFGHIJKLMNOPQRSTUVWXYZ",
    "digit": "0123456789",
    "space": _SPACES,
}
"""Kind of ASCII characters -> which they are; all others are of the kind "sign"."""


def longest_match_json(pieces: Sequence[bytes]) -> str:
    """Return the content of a ``tokenizer.json``.

    Args:
        pieces: the bytes of each token, by id; token 0 ends a document and stands for none. All 256 single bytes
            are among them, and none that is part of a character goes on into the next one.
    """
    letter = _letter_of_byte()
    vocabulary = {END_OF_DOCUMENT: 0}
    for token, piece in enumerate(pieces[1:], start=1):
        vocabulary["".join(letter[byte] for byte in piece)] = token
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    cut = {"type": "Split", "pattern": {"Regex": _cuts(pieces)}, "behavior": "Isolated", "invert": False}
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": 0,
                "content": END_OF_DOCUMENT,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [cut, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "WordPiece",
            "unk_token": END_OF_DOCUMENT,
            "continuing_subword_prefix": "",
            "max_input_chars_per_word": 1_000_000_000,
            "vocab": vocabulary,
        },
    }
    return json.dumps(content, ensure_ascii=False) + "\n"


def _cuts(pieces: Sequence[bytes]) -> str:
    """A regular expression for the places, without length, at which a text may be cut."""
    words = [word for word in map(_as_text, pieces) if word is not None]
    joined = {char for word in words if len(word) > 1 for char in word if not char.isascii()}
    kinds = _LETTERS | {
        "sign": "".join(c for c in map(chr, range(128)) if c not in "".join(_LETTERS.values()))
    }
    kinds["joined"] = "".join(sorted(joined))
    kind_of = {char: kind for kind, chars in kinds.items() for char in chars}
    # Every character of a token of several is of one of these kinds.
    inside = {(kind_of[one], kind_of[other]) for word in words for one, other in pairwise(word)}
    places = []
    for left, chars in kinds.items():
        apart = [right for right in kinds if (left, right) not in inside and kinds[right]]
        if chars and apart:
            after = "".join(_escaped(kinds[right]) for right in apart)
            places.append(f"(?<=[{_escaped(chars)}])(?=[{after}])")
    known = _escaped("".join(kinds.values()))
    return "|".join([*places, f"(?<=[^{known}])", f"(?=[^{known}])"])


def _as_text(piece: bytes) -> str | None:
    """The characters of a token, or ``None`` where it is a part of one."""
    try:
        return piece.decode()
    except UnicodeDecodeError:
        # A character starts with a byte that is none of 0x80 to 0xBF.
        assert all(0x80 <= byte < 0xC0 for byte in piece[1:]), (
            f"token {piece!r} goes on into another character"
        )
        return None


def _escaped(chars: str) -> str:
    return "".join(f"\\x{{{ord(char):x}}}" for char in chars)


def _letter_of_byte() -> list[str]:
    """GPT-2's table: 188 printable bytes stand for themselves, the others for U+0100 and following."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
