"""Records with all their fields, from every kind of source."""

import json

import datasets
import pyarrow as pa
import pytest
from pyarrow import parquet as pq

from rwkv_train.data.binidx import add_suffix
from rwkv_train.data.prepare import prepare_data
from rwkv_train.data.sources.base import BadRecord, Document, Record, SourceOptions
from rwkv_train.data.sources.opening import open_source
from rwkv_train.errors import DataError
from rwkv_train.tokenizers import load_tokenizer

ROWS = [{"q": "één", "turns": [{"role": "user", "n": 1}]}, {"q": "b", "turns": []}]


def read(name):
    file_format = "json" if str(name).endswith(".json") else None
    source = open_source(str(name), SourceOptions(format=file_format, whole_records=True))
    return [record for block in source.blocks() for record in block.whole_records()]


def write_jsonl(path):
    path.write_text("\n".join(json.dumps(row) for row in ROWS), encoding="utf-8")


def write_json(path):
    path.write_text(json.dumps(ROWS, indent=1), encoding="utf-8")


def write_parquet(path):
    pq.write_table(pa.Table.from_pylist(ROWS), path)


def write_dataset(path):
    datasets.Dataset.from_list(ROWS).save_to_disk(str(path))


@pytest.mark.parametrize(
    ("write", "name", "places"),
    [
        (write_jsonl, "a.jsonl", ["a.jsonl, line 1", "a.jsonl, line 2"]),
        (write_json, "a.json", ["a.json, record 1", "a.json, record 2"]),
        (write_parquet, "a.parquet", ["a.parquet, row 1", "a.parquet, row 2"]),
        (write_dataset, "hf:a", ["a/train, row 0", "a/train, row 1"]),
    ],
    ids=["jsonl", "json", "parquet", "dataset"],
)
def test_records_keep_lists_and_objects_and_know_their_place(tmp_path, monkeypatch, write, name, places):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / name.removeprefix("hf:"))

    records = read(name)

    assert [record.fields for record in records] == ROWS
    assert [record.where.removeprefix("hf:") for record in records] == places


def test_a_row_of_a_csv_file_has_a_string_in_each_column(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b'q,a\n"one\ntwo",2\nx,\xff\n')

    good, bad = read(path)

    assert good == Record(f"{path}, line 2", {"q": "one\ntwo", "a": "2"})
    assert bad == BadRecord(f"{path}, line 4", "not UTF-8 (byte 0xff)")


def test_two_columns_of_one_name_are_refused(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("q,q\n1,2\n")
    with pytest.raises(DataError, match="has 2 columns 'q'"):
        read(path)


def test_a_text_file_and_a_pair_hold_one_field(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("hello")
    prepare_data([path], load_tokenizer("bytes"), tmp_path / "pair")

    assert read(path) == [Record(str(path), {"text": "hello"})]
    (record,) = read(tmp_path / "pair")
    assert record.fields == {"text": "hello"}
    assert str(add_suffix(tmp_path / "pair", "")) in record.where


def test_a_line_that_is_no_object_is_bad(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('[1]\n{"a": 1}\n')
    bad, good = read(path)
    assert bad == BadRecord(f"{path}, line 1", "wanted an object with the fields of a record, found a list")
    assert good.fields == {"a": 1}


def test_a_list_gives_documents_too(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[{"text": "x"}, 3, {"t": 1}]')
    (block,) = open_source(str(path), SourceOptions(format="json")).blocks()

    assert list(block.records()) == [
        Document("x", "unknown"),
        BadRecord(f"{path}, record 2", "wanted an object with the fields of a record, found a int"),
        BadRecord(f"{path}, record 3", 'the object has no "text"'),
    ]
    assert block.n_bytes == path.stat().st_size


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1}', "wanted a list of objects, found a dict"),
        (
            '{"a": 1}\n{"a": 2}\n',
            "line 2: not JSON: Extra data; .* JSON lines, whose format is 'jsonl' .--format; in data.datasets: file",
        ),
        ("[]", "holds no documents"),
        ('[{"a":\n', "line 2: not JSON"),
        ("[" * 100_000, "not JSON"),
    ],
    ids=["an object", "lines", "nothing", "cut off", "deep"],
)
def test_what_is_no_list_of_records_is_refused(tmp_path, text, message):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        read(path)
