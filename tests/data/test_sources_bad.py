"""Bad input: damage of a file is refused, a bad record is named, and what is good around it is read."""

import gzip
import io
import json
import random

import pyarrow as pa
import pytest
from pyarrow import parquet as pq

from rwkv_train.data.corpus import read_documents
from rwkv_train.data.sources import lines as lines_module
from rwkv_train.data.sources.base import BadRecord, Document
from rwkv_train.errors import DataError
from tests.data.reading import records, table, zstd


def parquet_bytes(content):
    sink = io.BytesIO()
    pq.write_table(content, sink)
    return sink.getvalue()


PARQUET = parquet_bytes(table())


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        (
            "a.csv",
            b"body,n\nx,1\n",
            "a.csv has no column 'text'; there are 'body', 'n': choose another one with --text-col",
        ),
        ("a.csv", b"text,text\nx,1\n", "a.csv has 2 columns 'text'"),
        ("a.csv", b"text,n\n", "a.csv holds no documents"),
        ("a.csv", b"\n\n", "a.csv holds no documents"),
        (
            "a.csv",
            b'text,n\nx,1\n"y,2\nz,3\n',
            "line 3: a quote is opened here and not closed: .*; 1 whole rows come before",
        ),
        ("a.csv", "text\nx\n".encode("utf-16"), "a.csv: the header holds NUL bytes"),
        ("a.csv", b'"text"x,n\n', "a.csv, line 1: not to be cut into fields: ',' expected"),
        ("a.parquet", PARQUET[:-100], "a.parquet is damaged, cut off or no parquet file: "),
        ("a.parquet", b"text", "a.parquet is damaged, cut off or no parquet file: "),
        (
            "a.parquet",
            parquet_bytes(table(body=["x"])),
            "a.parquet has no column 'text'; there are 'body': choose",
        ),
        (
            "a.parquet",
            parquet_bytes(table(text=[1])),
            "the column 'text' is of type int64, wanted string; choose another",
        ),
        ("a.parquet", parquet_bytes(table(text=pa.array([], pa.string()))), "a.parquet holds no documents"),
    ],
)
def test_a_bad_file_is_refused_with_the_fix(name, content, sentence, tmp_path):
    (tmp_path / name).write_bytes(content)

    with pytest.raises(DataError, match=sentence):
        records(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "content", "where", "why"),
    [
        ("a.csv", b"text,n\nx,1\nonly\n", "line 3", "1 fields, wanted 2 as in the header"),
        ("a.csv", b"text,n\nx,1\n\xe9,2\n", "line 3", "not UTF-8 (byte 0xe9)"),
        ("a.csv", b'text,n\n"x\n",1\na\0b,2\n', "line 4", "holds NUL bytes: it is damaged, or not UTF-8"),
        ("a.csv", b'text,n\nx,1\n"y"z,2\n', "line 3", "not to be cut into fields: ',' expected after '\"'"),
        ("a.parquet", parquet_bytes(table(text=["x", None])), "row 2", '"text" must be a string, found null'),
        ("a.parquet", parquet_bytes(table(text=[b"x", b"\xff"])), "row 2", "not UTF-8 (byte 0xff)"),
        (
            "a.jsonl",
            b'{"text": "x"}\n{"text": "y", "meta": {"pile_set_name": "\\udc00"}}\n',
            "line 2",
            "U+DC00",
        ),
        (
            "a.jsonl",
            b'{"text": "x"}\n{"text": "y", "n": ' + b"9" * 5000 + b"}\n",
            "line 2",
            "not JSON that can be read",
        ),
    ],
)
def test_a_bad_record_is_named_and_the_others_are_read(name, content, where, why, tmp_path):
    path = tmp_path / name
    path.write_bytes(content)
    good, bad = records(path)

    assert good.text.strip() == "x"
    assert bad.where == f"{path}, {where}"
    assert why in bad.why


def test_records_after_a_bad_one_are_read(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b'text,n\n"y"z,2\nx,1\n')

    assert [type(record) for record in records(path)] == [BadRecord, Document]


@pytest.mark.parametrize("pack", [zstd, gzip.compress], ids=["zst", "gz"])
def test_what_comes_before_the_damage_is_read_and_counted(pack, tmp_path):
    draw = random.Random(5)
    lines = [json.dumps({"text": draw.randbytes(300).hex()}).encode() + b"\n" for _ in range(200)]
    path = tmp_path / ("a.jsonl.zst" if pack is zstd else "a.jsonl.gz")
    path.write_bytes(pack(b"".join(lines))[:-3_000])
    found = []

    with pytest.raises(
        DataError, match=r"is cut off: .* not complete; (\d+) whole lines come before"
    ) as caught:
        found.extend(document.text for document in read_documents([path]))

    n_whole = int(str(caught.value).split("; ")[1].split(" ")[0])
    assert n_whole == len(found) > 100
    assert found == [json.loads(line)["text"] for line in lines[:n_whole]]


def test_a_line_without_end_is_refused_before_it_fills_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(lines_module, "MAX_RECORD_BYTES", 5_000_000)
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(zstd(b'{"text": "x"}\n' + b" " * 6_000_000, 1 << 30))

    with pytest.raises(
        DataError, match=r"has a line of more than 5000000 bytes.*; 1 whole lines come before"
    ):
        records(path)
