"""What is held out: nothing that is learned, the same whenever it is asked for, and of each dataset its own."""

import pytest

from rwkv_train.config.instruct import InstructDataConfig
from rwkv_train.data.instruct.reading import read_conversations
from rwkv_train.data.instruct.split import head_of, read_split
from rwkv_train.errors import DataError
from rwkv_train.tokenizers import load_tokenizer


def split(config, seed=0):
    return read_split(lambda data: read_conversations(data, load_tokenizer("bytes")), config, seed)


def places(samples):
    return [sample.where.rpartition(" ")[2] for sample in samples]


@pytest.fixture
def write_texts(write_data):
    def write(count, **settings):
        return write_data([{"text": "x" * 9}] * count, dataset={"format": "text"}, **settings)

    return write


def test_a_part_is_held_out_that_the_seed_chooses(write_texts):
    config = write_texts(40, valid_fraction=0.1)
    chosen = {}
    for seed in (0, 1):
        found = split(config, seed)
        (train,), (held_out,) = found.train, found.valid.values()
        assert len(held_out) == 4
        assert sorted(places([*train.samples, *held_out]), key=int) == [str(line) for line in range(1, 41)]
        assert places(split(config, seed).valid[train.dataset.path]) == places(held_out)
        chosen[seed] = places(held_out)
    assert chosen[0] != chosen[1]


def test_a_small_part_is_one_conversation_and_a_large_one_is_refused(write_texts):
    config = write_texts(3, valid_fraction=0.01)
    assert [len(held) for held in split(config).valid.values()] == [1]
    with pytest.raises(
        DataError, match=r"valid_fraction \(0\.9\) leaves nothing to learn from in .*3 conversations"
    ):
        split(write_texts(3, valid_fraction=0.9))


def test_parts_of_one_dataset_hold_out_their_own(write_data):
    parts = [{"path": "builtin", "split": name} for name in ("train", "valid")]
    config = InstructDataConfig.model_validate(
        {"datasets": parts, "valid_fraction": 0.25, "tokenizer": "bytes"}
    )
    found = split(config)
    assert {name: len(held) for name, held in found.valid.items()} == {
        "builtin": 256,
        "builtin:valid": 32,
    }
    for one, held in zip(found.train, found.valid.values(), strict=True):
        assert {sample.where.partition(",")[0] for sample in held} == {f"builtin/{one.dataset.split}"}


def test_datasets_are_called_by_their_paths_and_by_what_tells_them_apart():
    datasets = [{"path": "hf:a", "config": "c"}, {"path": "hf:a", "split": "test"}, {"path": "b.jsonl"}]
    config = InstructDataConfig.model_validate({"datasets": datasets})
    assert [dataset.name for dataset in config.datasets] == ["hf:a:c:train", "hf:a:test", "b.jsonl"]


def test_what_is_looked_at_first_is_each_datasets_share(write_texts):
    samples = split(write_texts(30)).train[0].samples
    assert samples[0].n_inputs == 10
    held_out = {"long": samples[:20], "short": samples[20:]}
    # Of 60 positions 40 for the first, 20 for the second: 4 and 2 conversations of 10.
    assert {name: len(held) for name, held in head_of(held_out, 60).items()} == {"long": 4, "short": 2}
    assert {name: len(held) for name, held in head_of(held_out, 1).items()} == {"long": 1, "short": 1}
    assert head_of(held_out, 10**6) == held_out
    assert head_of({}, 10) == {}
