"""Datasets that Hugging Face's library reads, here from folders and files: no test needs the network."""

import json

import pytest
from datasets import Dataset, DatasetDict

from rwkv_train.config.data import DatasetConfig
from rwkv_train.data.hub_dataset import open_text_dataset
from rwkv_train.errors import DataError

TEXTS = [f"text {number}" for number in range(10)]


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    """Read before the library is imported or not: both of its ways to look it up."""
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def folder(tmp_path):
    """Ten texts in two files."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for part in range(2):
        rows = [{"text": text, "place": f"place {part}"} for text in TEXTS[5 * part : 5 * part + 5]]
        (folder / f"part{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def saved(tmp_path, dataset):
    dataset.save_to_disk(tmp_path / "saved")
    return str(tmp_path / "saved")


@pytest.mark.parametrize("streaming", [True, False])
def test_a_folder_gives_the_texts_and_domains_of_its_files(folder, streaming):
    spec = DatasetConfig(path=str(folder), domain_column="place")
    dataset = open_text_dataset(spec, streaming=streaming)
    rows = list(dataset.rows())

    assert [dataset.text_of(row) for row in rows] == TEXTS
    assert [row.domain for row in rows] == ["place 0"] * 5 + ["place 1"] * 5
    assert [row.number for row in rows] == list(range(10))
    assert dataset.n_rows == (None if streaming else 10)


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("start", [0, 3, 5, 10])
def test_reading_goes_on_from_any_row_with_and_without_a_state(folder, start, streaming):
    spec = DatasetConfig(path=str(folder))
    first = open_text_dataset(spec, streaming=streaming)
    rows = first.rows()
    for _ in range(start):
        next(rows)
    state = first.state()
    other = open_text_dataset(spec, streaming=streaming)

    for way in (None, state, None):  # the last: nothing is left of the states before
        assert [(row.number, row.text) for row in other.rows(start, way)] == list(enumerate(TEXTS))[start:]


def test_a_state_is_plain_json(folder):
    dataset = open_text_dataset(DatasetConfig(path=str(folder)), streaming=True)
    rows = dataset.rows()
    next(rows)
    assert json.loads(json.dumps(dataset.state())) == dataset.state()


def test_a_kind_of_files_reads_the_files_that_are_named(folder):
    spec = DatasetConfig(path="json", data_files=[str(folder / "part1.jsonl")])
    assert [row.text for row in open_text_dataset(spec, streaming=True).rows()] == TEXTS[5:]


def test_files_may_lie_below_the_home_folder(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    spec = DatasetConfig(path="json", data_files=["~/texts/part0.jsonl"])
    assert [row.text for row in open_text_dataset(spec, streaming=True).rows()] == TEXTS[:5]


@pytest.mark.parametrize("data_files", [None, []], ids=["none", "an empty list"])
def test_a_kind_of_files_without_files_does_not_read_the_working_folder(folder, monkeypatch, data_files):
    monkeypatch.chdir(folder)
    with pytest.raises(DataError, match="json/train names a kind of files but none of them; set data_files"):
        open_text_dataset(DatasetConfig(path="json", data_files=data_files), streaming=True)


@pytest.mark.parametrize("streaming", [True, False])
def test_what_save_to_disk_wrote_is_read(tmp_path, streaming):
    one = Dataset.from_dict({"text": TEXTS})
    path = saved(tmp_path, DatasetDict(train=one, test=one.select([7])))

    dataset = open_text_dataset(DatasetConfig(path=path, split="test"), streaming=streaming)
    assert [row.text for row in dataset.rows()] == TEXTS[7:8]


def test_one_saved_dataset_is_its_train_split(tmp_path):
    path = saved(tmp_path, Dataset.from_dict({"text": TEXTS}))

    assert open_text_dataset(DatasetConfig(path=path), streaming=True).n_rows == 10
    with pytest.raises(DataError, match="has no split 'test'; it has 'train'"):
        open_text_dataset(DatasetConfig(path=path, split="test"), streaming=True)
    with pytest.raises(DataError, match="name has no meaning; leave it out"):
        open_text_dataset(DatasetConfig(path=path, name="en"), streaming=True)


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"split": "evening"}, "cannot be opened: .*evening.*'train'"),
        ({"name": "english"}, "cannot be opened: .*'english' not found.*'default'"),
        ({"text_column": "body"}, "has no column 'body'; it has 'text', 'place': name one in text_column"),
        ({"domain_column": "meta"}, "has no column 'meta'; it has 'text', 'place'"),
        ({"data_files": ["part9.jsonl"]}, r"cannot be opened: .*part9\.jsonl"),
    ],
    ids=["split", "configuration", "text column", "domain column", "file"],
)
def test_what_a_dataset_does_not_have_is_named_beside_what_it_has(folder, changes, sentence, streaming):
    with pytest.raises(DataError, match=sentence):
        open_text_dataset(DatasetConfig(path=str(folder), **changes), streaming=streaming)


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("./nowhere", r"the dataset \./nowhere/train cannot be opened: there is no folder nowhere"),
        (
            "someone/texts",
            "the dataset someone/texts/train cannot be reached: .*; check its name and the network",
        ),
    ],
    ids=["folder", "hub"],
)
def test_a_dataset_that_is_not_there_is_one_sentence(path, sentence):
    with pytest.raises(DataError, match=sentence):
        open_text_dataset(DatasetConfig(path=path), streaming=True)


def test_a_row_that_cannot_be_read_tells_how_far_reading_came(folder):
    (folder / "part1.jsonl").write_text('{"text": "fine"}\n{"te')
    dataset = open_text_dataset(DatasetConfig(path=str(folder)), streaming=True)
    with pytest.raises(DataError, match=r"cannot be read on from the 5 rows read so far: JSON parse error"):
        list(dataset.rows())


@pytest.mark.parametrize(
    ("value", "found"), [(None, "it is null"), (7, "it is of type int")], ids=["null", "number"]
)
def test_a_value_that_is_no_text_is_refused_with_its_row(tmp_path, value, found):
    path = saved(tmp_path, Dataset.from_dict({"text": [value, value]}))
    dataset = open_text_dataset(DatasetConfig(path=path), streaming=True)
    row = list(dataset.rows())[1]
    with pytest.raises(DataError, match=f"row 1: 'text' must be a text, but {found}"):
        dataset.text_of(row)


def test_a_file_that_the_library_cannot_convert_is_refused_with_its_reason(folder):
    (folder / "part1.jsonl").write_text('{"text": "whole"}\n{"text": "cut\n')
    with pytest.raises(DataError, match=r"cannot be opened: .*generating the dataset \(.*JSON.*\)"):
        open_text_dataset(DatasetConfig(path=str(folder)), streaming=False)
