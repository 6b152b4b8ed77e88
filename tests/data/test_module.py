from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch

from rwkv_train.config.load import check_tree
from rwkv_train.data.binidx import TokenFileWriter
from rwkv_train.data.module import TokenSamples, n_slots, sample_number
from rwkv_train.data.stored import load_corpus
from rwkv_train.errors import DataError

CTX_LEN = 8


def settings(**trainer):
    return check_tree(
        {
            "model": {"arch": "rwkv4", "n_layer": 1, "n_embd": 8, "vocab_size": 1000, "ctx_len": CTX_LEN},
            "data": {"order": "sequential"},
            "trainer": {"out_dir": "run", "max_steps": 4, "global_batch_size": 12, **trainer},
        }
    )


@pytest.fixture
def corpus(tmp_path) -> Path:
    """900 tokens that count up, so that a token tells where it was read."""
    with TokenFileWriter(tmp_path / "corpus", np.uint16) as writer:
        writer.add_document(np.arange(900, dtype=np.uint16))
    return load_corpus(tmp_path / "corpus")


@pytest.mark.parametrize(("devices", "micro_batch_size"), [(1, 12), (1, 3), (2, 3), (3, 4), (6, 1)], ids=str)
@pytest.mark.parametrize("start_step", [0, 2])
def test_a_step_reads_the_same_samples_on_any_number_of_processes(devices, micro_batch_size, start_step):
    config = settings(devices=devices, micro_batch_size=micro_batch_size)
    per_rank = 12 // devices  # samples of one step on one process
    for step in range(2):
        positions = range(step * per_rank, (step + 1) * per_rank)
        read = chain.from_iterable(
            (sample_number(position, rank, config, start_step) for position in positions)
            for rank in range(devices)
        )
        first = (start_step + step) * 12
        assert sorted(read) == list(range(first, first + 12))


def test_a_sample_is_a_slot_and_the_token_after_it(corpus):
    samples = TokenSamples(corpus, settings(micro_batch_size=12), rank=0, start_step=0, n_steps=4)
    tokens, targets = samples[5]

    assert tokens.tolist() == list(range(40, 48))
    assert targets.tolist() == list(range(41, 49))
    assert tokens.dtype == torch.int64


def test_the_last_slot_has_a_token_to_predict(corpus):
    # 900 tokens: 112 slots of 8 and one more token for each need 897 at most.
    assert n_slots(corpus, CTX_LEN) == 112


def test_an_epoch_later_the_slots_come_again(corpus):
    config = settings(micro_batch_size=12, max_steps=100)
    samples = TokenSamples(corpus, config, rank=0, start_step=0, n_steps=100)
    assert torch.equal(samples[3][0], samples[3 + 112][0])


def test_there_are_as_many_samples_as_the_rest_of_the_run_needs(corpus):
    config = settings(micro_batch_size=3, devices=2)
    assert len(TokenSamples(corpus, config, rank=0, start_step=1, n_steps=4)) == 3 * 12 // 2


def test_an_id_beyond_the_vocabulary_is_refused_where_it_is_read(corpus):
    tree = settings(micro_batch_size=12).model_dump()
    tree["model"]["vocab_size"] = 100
    samples = TokenSamples(corpus, check_tree(tree), rank=0, start_step=0, n_steps=4)
    samples[0]
    with pytest.raises(DataError, match="near token 96 there is an id outside of the model's 0 to 99"):
        samples[12]
