import json

import pytest
import torch

from rwkv_train.checkpoints import Weights, write_weights
from rwkv_train.config.load import check_finetune_tree, check_model, check_tree
from rwkv_train.data.prepare import prepare_data
from rwkv_train.models.registry import build_model, initialize
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


BASE = {
    "arch": "rwkv7",
    "n_layer": 2,
    "n_embd": 64,
    "head_size": 32,
    "lora_ranks": {"w": 8, "a": 8, "v": 8, "g": 8},
    "vocab_size": 257,
    "ctx_len": 64,
}
"""NF4 needs rows of 64 numbers."""


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """Weights to finetune, of random numbers: published initial values have matrices that are zero."""
    model = build_model(check_model(BASE))
    initialize(model, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    path = tmp_path_factory.mktemp("base") / "base.pth"
    return write_weights(path, Weights(model.config, dict(model.state_dict()), None, None), "pth")


@pytest.fixture(scope="session")
def chats(tmp_path_factory):
    """Conversations of 20 to 300 bytes, some in several turns: the longest take five rows of 64."""
    folder = tmp_path_factory.mktemp("chats")
    for name, first, count in (("train", 0, 24), ("valid", 100, 6)):
        records = []
        for number in range(first, first + count):
            turns = [
                {"role": role, "content": sentences(number + 3 * turn, size)}
                for turn in range(1 + number % 3)
                for role, size in (("user", 1), ("assistant", 1 + number % 4))
            ]
            records.append({"messages": turns})
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)))
    pairs = [
        {"prompt": str(n), "chosen": WORDS[n % 10][: 2 + n % 4], "rejected": WORDS[(n + 3) % 10][:3]}
        for n in range(30)
    ]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    return folder


@pytest.fixture
def chat_tree(base, chats, tmp_path):
    """Settings of a finetuning run that takes a second."""
    return {
        "model": {**BASE, "init_from": str(base)},
        "data": {"datasets": [{"path": str(chats / "train.jsonl")}], "tokenizer": "bytes"},
        "optim": {"lr": 3e-3, "lr_final": 3e-4, "warmup_steps": 2},
        "trainer": {
            "out_dir": str(tmp_path / "run"),
            "max_steps": 8,
            "global_batch_size": 4,
            "micro_batch_size": 2,
            "accelerator": "cpu",
            "log_every_n_steps": 1,
            "sample_tokens": 4,
        },
        "checkpoint": {"every_n_steps": 4, "keep_last": 2},
        "finetune": {"method": "full"},
    }


@pytest.fixture
def chat_settings(chat_tree):
    """Make checked settings of a finetuning run: ``chat_settings({"finetune.method": "state"})``."""

    def make(changes=None):
        for name, value in (changes or {}).items():
            section, _, key = name.partition(".")
            if not key:
                chat_tree[section] = value
            elif value is None:
                chat_tree[section].pop(key, None)
            else:
                chat_tree.setdefault(section, {})[key] = value
        return check_finetune_tree(chat_tree)

    return make
