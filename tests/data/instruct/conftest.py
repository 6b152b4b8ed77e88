import json

import pytest

from rwkv_train.config.instruct import InstructDataConfig


@pytest.fixture
def write_data(tmp_path):
    """Write records and return settings that read them with the byte tokenizer."""

    def write(records, *, name="chats.jsonl", dataset=None, **settings):
        path = tmp_path / name
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        datasets = [{"path": str(path), **(dataset or {})}]
        return InstructDataConfig.model_validate({"datasets": datasets, "tokenizer": "bytes", **settings})

    return write
