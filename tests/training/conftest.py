import json

import pytest

from rwkv_train.config.load import check_tree
from rwkv_train.data.prepare import prepare_data
from rwkv_train.tokenizers import load_tokenizer

WORDS = ("state", "decay", "value", "key", "mixes", "reads", "writes", "every", "token", "head")


def sentences(first, n):
    return " ".join(f"{WORDS[i % 10]} {WORDS[i * i % 7]} {i % 13}." for i in range(first, first + n))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """Prefixes of a training and a validation corpus of two domains, a few thousand bytes."""
    folder = tmp_path_factory.mktemp("corpus")
    for split, n_documents in (("train", 12), ("valid", 4)):
        lines = [
            {"text": sentences(40 * i, 40), "meta": {"pile_set_name": ("prose", "code")[i % 2]}}
            for i in range(n_documents)
        ]
        path = folder / f"{split}.jsonl"
        path.write_text("\n".join(map(json.dumps, lines)))
        prepare_data([path], load_tokenizer("bytes"), folder / split)
    return folder


@pytest.fixture
def tree(corpus, tmp_path):
    """Settings of a run that takes a second."""
    return {
        "model": {
            "arch": "rwkv7",
            "n_layer": 2,
            "n_embd": 32,
            "head_size": 16,
            "lora_ranks": {"w": 8, "a": 8, "v": 8, "g": 8},
            "vocab_size": 257,
            "ctx_len": 16,
        },
        "data": {"train": str(corpus / "train"), "valid": str(corpus / "valid"), "tokenizer": "bytes"},
        "optim": {"lr": 3e-3, "lr_final": 3e-4, "warmup_steps": 2},
        "trainer": {
            "out_dir": str(tmp_path / "run"),
            "max_steps": 12,
            "global_batch_size": 8,
            "micro_batch_size": 4,
            "accelerator": "cpu",
            "log_every_n_steps": 2,
            "val_every_n_steps": 6,
            "val_tokens": 500,
            "sample_tokens": 4,
        },
        "checkpoint": {"every_n_steps": 4, "keep_last": 2},
    }


@pytest.fixture
def settings(tree):
    """Make checked settings from the tree with some values changed: ``settings({"trainer.seed": 1})``."""

    def make(changes=None):
        for name, value in (changes or {}).items():
            section, _, key = name.partition(".")
            if value is None:
                tree[section].pop(key, None)
            else:
                tree.setdefault(section, {})[key] = value
        return check_tree(tree)

    return make
