"""A small corpus in two files, and tokenizers, for the folder."""

import json
from pathlib import Path

import pytest

from rwkv_train.tokenizers import load_tokenizer

RECORDS = [
    {"text": "def f(x):\n    return x\n", "meta": {"pile_set_name": "code"}},
    {"text": "", "meta": {"pile_set_name": "prose"}},
    {"text": "Ein schöner Tag.", "meta": {"pile_set_name": "prose"}},
    {"text": "日本", "meta": {"pile_set_name": "code"}},
]


@pytest.fixture(scope="session")
def byte_tokenizer():
    return load_tokenizer("bytes")


@pytest.fixture(scope="session")
def world_tokenizer():
    return load_tokenizer("world")


@pytest.fixture
def inputs(tmp_path) -> list[Path]:
    lines, text = tmp_path / "small.jsonl", tmp_path / "letter.txt"
    lines.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    text.write_bytes(b"Dear all,\r\n")
    return [lines, text]
