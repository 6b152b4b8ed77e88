from pathlib import Path

import numpy as np
import pytest
import torch

from rwkv_train.config.load import check_tree
from rwkv_train.data.binidx import TokenFileWriter
from rwkv_train.data.module import CorpusSamples, MicroBatches, Position, n_slots
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


class NumberedSamples:
    """Sample n is the token n, and has n % 3 targets."""

    def read(self, sample):
        return torch.tensor([sample]), torch.tensor([sample])

    def n_targets(self, first, count):
        return sum(sample % 3 for sample in range(first, first + count))


@pytest.mark.parametrize(("devices", "micro_batch_size"), [(1, 12), (1, 3), (2, 3), (3, 4), (6, 1)], ids=str)
@pytest.mark.parametrize("start", [Position(0), Position(2), Position(2, skipped=7)], ids=str)
def test_a_step_reads_the_same_samples_on_any_number_of_processes(devices, micro_batch_size, start):
    config = settings(devices=devices, micro_batch_size=micro_batch_size)
    ranks = [MicroBatches(NumberedSamples(), config, rank, start, n_steps=4) for rank in range(devices)]
    n_micro_batches = 12 // (devices * micro_batch_size)  # of one step on one process
    for step in range(2):
        indices = range(step * n_micro_batches, (step + 1) * n_micro_batches)
        batches = [batches[index] for batches in ranks for index in indices]
        first = start.skipped + (start.step + step) * 12
        wanted = list(range(first, first + 12))
        assert sorted(torch.cat([batch.tokens for batch in batches]).flatten().tolist()) == wanted
        # Whatever part of the step a process has, it knows the targets of the whole of it.
        assert {batch.step_targets for batch in batches} == {sum(sample % 3 for sample in wanted)}
        assert all(batch.first_sample == batch.tokens[0, 0] for batch in batches)


def test_a_sample_is_a_slot_and_the_token_after_it(corpus):
    samples = CorpusSamples(corpus, settings(micro_batch_size=12))
    tokens, targets = samples.read(5)

    assert tokens.tolist() == list(range(40, 48))
    assert targets.tolist() == list(range(41, 49))
    assert tokens.dtype == torch.int64
    assert samples.n_targets(first=5, count=3) == 3 * CTX_LEN


def test_the_last_slot_has_a_token_to_predict(corpus):
    # 900 tokens: 112 slots of 8 and one more token for each need 897 at most.
    assert n_slots(corpus, settings(micro_batch_size=12)) == 112


def test_a_corpus_too_small_for_the_order_is_refused(corpus):
    tree = settings(micro_batch_size=12).model_dump(exclude_none=True)
    tree["data"]["order"] = "official"
    tree["model"]["ctx_len"] = 500
    with pytest.raises(DataError, match="official"):
        n_slots(corpus, check_tree(tree))


def test_an_epoch_later_the_slots_come_again(corpus):
    samples = CorpusSamples(corpus, settings(micro_batch_size=12))
    assert torch.equal(samples.read(3)[0], samples.read(3 + 112)[0])


def test_there_are_as_many_batches_as_the_rest_of_the_run_needs(corpus):
    config = settings(micro_batch_size=3, devices=2)
    batches = MicroBatches(CorpusSamples(corpus, config), config, rank=0, start=Position(1), n_steps=4)
    assert len(batches) == 3 * 12 // 2 // 3


def test_an_id_beyond_the_vocabulary_is_refused_where_it_is_read(corpus):
    tree = settings(micro_batch_size=12).model_dump(exclude_none=True)
    tree["model"]["vocab_size"] = 100
    samples = CorpusSamples(corpus, check_tree(tree))
    samples.read(0)
    with pytest.raises(DataError, match="near token 96 there is an id outside of the model's 0 to 99"):
        samples.read(12)


def test_a_packed_micro_batch_is_one_row_that_knows_where_its_documents_begin(tmp_path):
    with TokenFileWriter(tmp_path / "documents", np.uint16) as writer:
        for first in range(1, 900, 5):  # 1 to 4 and an end, 6 to 9 and an end, ...
            writer.add_document(np.array([*range(first, first + 4), 0], np.uint16))
    config = settings(micro_batch_size=3)
    samples = CorpusSamples(load_corpus(tmp_path / "documents"), config)
    plain, packed = (MicroBatches(samples, config, 0, Position(0), 4, end)[0] for end in (None, 0))

    assert plain.cu_seqlens is None
    assert torch.equal(packed.tokens, plain.tokens.view(1, 24))
    assert torch.equal(packed.targets, plain.targets.view(1, 24))
    assert packed.step_targets == plain.step_targets
    # Samples begin at 0, 8 and 16, end tokens are at 4, 9, 14 and 19.
    assert packed.cu_seqlens.tolist() == [0, 4, 8, 9, 14, 16, 19, 24, 24]
