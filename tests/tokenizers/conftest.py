"""Tokenizers that are slow to load, once for the folder, and a small Hugging Face file made on the spot."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from rwkv_train.tokenizers import load_tokenizer


@pytest.fixture(scope="session")
def byte_tokenizer():
    return load_tokenizer("bytes")


@pytest.fixture(scope="session")
def world_tokenizer():
    return load_tokenizer("world")


@pytest.fixture(scope="session")
def byte_level_file(tmp_path_factory) -> Path:
    """A byte-level BPE file like the 20B one: NFC, an end-of-document token, merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the cat sat on the mat and the rat ran"] * 4, trainer)
    path = tmp_path_factory.mktemp("hf") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@pytest.fixture(scope="session")
def byte_level_tokenizer(byte_level_file):
    return load_tokenizer(str(byte_level_file))
