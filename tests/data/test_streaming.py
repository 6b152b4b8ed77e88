"""Samples of a stream: the same as those of a prepared corpus, on any number of processes, from any step on."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
from datasets import Dataset

from rwkv_train.config.load import check_tree
from rwkv_train.data.binidx import TokenFileWriter
from rwkv_train.data.hub_dataset import open_text_dataset
from rwkv_train.data.module import CorpusSamples, MicroBatches, Position
from rwkv_train.data.stored import load_corpus
from rwkv_train.data.streaming import StreamSamples, StreamState
from rwkv_train.errors import DataError
from rwkv_train.tokenizers import load_tokenizer

CTX_LEN, STEP = 6, 4
TEXTS = [chr(97 + number % 26) * (number * 7 % 23) for number in range(60)]  # some of them are empty
TOKENIZER = load_tokenizer("bytes")


@pytest.fixture(params=["saved", "files"])
def path(request, tmp_path):
    """The texts as a dataset that can be entered anywhere, and as files that are read from their beginning."""
    if request.param == "saved":
        Dataset.from_dict({"text": TEXTS}).save_to_disk(tmp_path / "texts")
    else:
        (tmp_path / "texts").mkdir()
        for part in range(3):
            rows = [json.dumps({"text": text}) + "\n" for text in TEXTS[20 * part : 20 * part + 20]]
            (tmp_path / "texts" / f"{part}.jsonl").write_text("".join(rows))
    return str(tmp_path / "texts")


def settings(path, shuffle_buffer=0, **changes):
    model = {"arch": "rwkv4", "n_layer": 1, "n_embd": 8, "vocab_size": 257, "ctx_len": CTX_LEN}
    trainer = {"out_dir": "run", "max_steps": 50, "global_batch_size": STEP, "micro_batch_size": 2}
    streaming = {"path": path, "shuffle_buffer": shuffle_buffer}
    return check_tree(
        {
            "model": model,
            "data": {"streaming": streaming},
            "trainer": {**trainer, **changes},
        }
    )


def open_stream(config):
    return StreamSamples(open_text_dataset(config.data.streaming, streaming=True), TOKENIZER, config)


def tokens_of(samples, numbers):
    return torch.stack([samples.read(number)[0] for number in numbers])


def test_a_stream_is_the_prepared_corpus_in_its_order_on_disk(path, tmp_path):
    with TokenFileWriter(tmp_path / "corpus", np.uint16) as writer:
        for text in filter(None, TEXTS):
            writer.add_document(np.array([*TOKENIZER.encode(text), 0], np.uint16))
    config = settings(path)
    tree = config.model_dump(exclude_none=True) | {"data": {"order": "sequential"}}
    prepared = CorpusSamples(load_corpus(tmp_path / "corpus"), check_tree(tree))
    stream = open_stream(config)

    for sample in range(prepared.n_slots):
        for one, other in zip(stream.read(sample), prepared.read(sample), strict=True):
            assert one.dtype == torch.int64
            assert torch.equal(one, other)


def test_the_end_of_the_dataset_is_followed_by_its_beginning(path, caplog):
    n_tokens = sum(len(text) + 1 for text in TEXTS if text)
    whole = [token for text in TEXTS if text for token in [*TOKENIZER.encode(text), 0]]
    with caplog.at_level("INFO"):
        read = tokens_of(open_stream(settings(path)), range(2 * n_tokens // CTX_LEN)).flatten().tolist()

    assert read == (whole + whole)[: len(read)]
    assert "ended after 60 rows; it is read again (pass 2)" in caplog.text


def test_a_shuffle_buffer_changes_the_order_and_loses_nothing(path):
    in_order = tokens_of(open_stream(settings(path)), range(60)).tolist()
    shuffled = tokens_of(open_stream(settings(path, shuffle_buffer=10)), range(50)).tolist()

    # Sample n of the shuffled ones is one of the first n + 10 in order; what is missing is still in the buffer.
    still_there = Counter(map(tuple, in_order))
    still_there.subtract(map(tuple, shuffled))
    assert min(still_there.values()) == 0
    assert sum(still_there.values()) == 10
    # Two of fifty in their place is what chance gives; a buffer of ten moves nearly all.
    assert sum(one == other for one, other in zip(in_order[:50], shuffled, strict=True)) < 20


@pytest.mark.parametrize("shuffle_buffer", [0, 5])
@pytest.mark.parametrize(("devices", "micro_batch_size"), [(2, 2), (4, 1), (1, 4)])
def test_any_number_of_processes_read_the_same_samples(path, shuffle_buffer, devices, micro_batch_size):
    one = settings(path, shuffle_buffer)
    wanted = tokens_of(open_stream(one), range(5 * STEP))
    config = settings(path, shuffle_buffer, devices=devices, micro_batch_size=micro_batch_size)
    ranks = [
        MicroBatches(open_stream(config), config, rank, Position(0), n_steps=5) for rank in range(devices)
    ]
    batches = [batches[index] for index in range(len(ranks[0])) for batches in ranks]

    assert torch.equal(torch.cat([batch.tokens for batch in batches]), wanted)


def stored(state):
    """What a checkpoint makes of a state: text and tensors, and back."""
    return StreamState.of(json.loads(json.dumps(state.to_json())), state.to_tensors())


@pytest.mark.parametrize("shuffle_buffer", [0, 5])
@pytest.mark.parametrize("step", [0, 1, 7, 21, 30])  # the dataset ends in step 26
def test_a_stream_goes_on_from_a_saved_state_as_if_nothing_had_been(path, shuffle_buffer, step):
    undisturbed = tokens_of(open_stream(settings(path, shuffle_buffer)), range(40 * STEP))
    first = open_stream(settings(path, shuffle_buffer))
    for sample in range(step * STEP + 2):  # two of the next step were read ahead
        first.read(sample)
    state = stored(first.state_at(step * STEP))

    resumed = open_stream(settings(path, shuffle_buffer))
    resumed.begin(step * STEP, state)
    assert torch.equal(tokens_of(resumed, range(step * STEP, 40 * STEP)), undisturbed[step * STEP :])

    # Saved once more before anything is read, and gone on from with samples passed over, as after a bad step.
    again = open_stream(settings(path, shuffle_buffer))
    again.begin(step * STEP, stored(resumed_at(path, shuffle_buffer, step, state)))
    assert torch.equal(again.read(step * STEP + 9)[0], undisturbed[step * STEP + 9])


def resumed_at(path, shuffle_buffer, step, state):
    resumed = open_stream(settings(path, shuffle_buffer))
    resumed.begin(step * STEP, state)
    return resumed.state_at(step * STEP)


def test_a_process_that_has_not_read_the_end_of_a_step_still_knows_where_the_next_begins(path):
    stream, other = open_stream(settings(path)), open_stream(settings(path))
    stream.read(0)
    other.read(2 * STEP)
    one, same = stream.state_at(STEP), other.state_at(STEP)

    assert one.to_json() == same.to_json()
    assert np.array_equal(one.rest, same.rest)


def write_texts(folder, values):
    Dataset.from_dict({"text": values}).save_to_disk(folder)
    return settings(str(folder))


def test_rows_without_text_are_passed_over_and_nothing_but_such_rows_is_refused(tmp_path):
    with pytest.raises(DataError, match="has no text in its 3 rows"):
        open_stream(write_texts(tmp_path / "empty", ["", "", ""])).read(0)


def test_a_value_that_is_no_text_is_refused_where_it_comes(tmp_path):
    stream = open_stream(write_texts(tmp_path / "null", ["long enough", None]))
    stream.read(0)
    with pytest.raises(DataError, match="row 1: 'text' must be a text, but it is null"):
        stream.read(5)


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(path):
    config = settings(path)
    model = config.model.model_copy(update={"vocab_size": 256})
    with pytest.raises(DataError, match=r"has 257 ids but the model 256 \(model\.vocab_size\)"):
        open_stream(config.model_copy(update={"model": model}))
