import pytest

from rwkv_train.config.instruct import InstructDataConfig
from rwkv_train.data.instruct.reading import read_conversations
from rwkv_train.data.instruct.split import read_split
from rwkv_train.tokenizers import load_tokenizer

TOKENIZER = load_tokenizer("bytes")
BOTH = [{"path": "builtin", "split": "train"}, {"path": "builtin", "split": "valid"}]


@pytest.fixture
def split_of():
    """Read the built-in conversations as settings say."""

    def read(**data):
        config = InstructDataConfig(**data)
        return read_split(lambda part: [*read_conversations(part, TOKENIZER)], config, seed=1)

    return read


@pytest.mark.parametrize(
    "data", [{"datasets": BOTH[:1], "valid": BOTH}, {"datasets": BOTH, "valid_fraction": 0.1}]
)
def test_two_splits_of_one_dataset_are_held_out_side_by_side(split_of, data):
    valid = split_of(**data).valid
    assert list(valid) == ["builtin", "builtin:valid"]
    assert valid["builtin"][0].tokens.tolist() != valid["builtin:valid"][0].tokens.tolist()


def test_a_fraction_is_held_out_and_the_rest_is_learned(split_of):
    whole = split_of(datasets=BOTH[:1]).train[0].samples
    split = split_of(datasets=BOTH[:1], valid_fraction=0.25)
    ids = [sample.tokens.tobytes() for sample in whole]
    parts = [sample.tokens.tobytes() for sample in [*split.train[0].samples, *split.valid["builtin"]]]
    assert sorted(parts) == sorted(ids)
    assert len(split.valid["builtin"]) == round(0.25 * len(ids))
