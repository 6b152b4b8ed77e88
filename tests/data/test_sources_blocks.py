"""Blocks of a source: always the same ones, and together all of it."""

import gzip
import json
import pickle
import random

import pytest
from pyarrow import parquet as pq

from rwkv_train.data.sources import lines as lines_module
from rwkv_train.data.sources.base import BadRecord, SourceIdentity
from rwkv_train.data.sources.opening import open_source
from tests.data.reading import records, table, write_csv, zstd


def big_json_lines():
    draw = random.Random(3)
    sizes = (
        [draw.randrange(1, 400) for _ in range(400)]
        + [6_000, 1]
        + [draw.randrange(1, 50) for _ in range(200)]
    )
    return b"".join(
        json.dumps({"text": "".join(draw.choices("abc \n日", k=size))}).encode() + b"\n" for size in sizes
    )


@pytest.fixture
def small_blocks(monkeypatch):
    for module in ("lines", "text", "parquet", "delimited", "hub", "pair"):
        monkeypatch.setattr(f"rwkv_train.data.sources.{module}.BLOCK_BYTES", 4_000)
    monkeypatch.setattr(lines_module, "_PIECE_BYTES", 1_000)


def write_source(name, tmp_path):
    path = tmp_path / name
    data = big_json_lines()
    if name == "folder":
        path.mkdir()
        for number, line in enumerate(data.split(b"\n")[:50]):
            (path / f"{number}.txt").write_bytes(line)
        (path / "25.jsonl").write_bytes(data)
    elif name.endswith(".parquet"):
        texts = [json.loads(line)["text"] for line in data.splitlines()]
        pq.write_table(table(text=texts), path, row_group_size=250)
    elif name.endswith(".csv"):
        write_csv(path, [["text"], *([json.loads(line)["text"]] for line in data.splitlines())])
    else:
        path.write_bytes({".zst": zstd, ".gz": gzip.compress}.get(path.suffix, bytes)(data))
    return path


NAMES = ["a.jsonl", "a.jsonl.zst", "a.jsonl.gz", "a.parquet", "a.csv", "folder"]


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("name", NAMES)
def test_blocks_are_the_same_ones_from_any_block_on(name, tmp_path):
    source = open_source(str(write_source(name, tmp_path)))
    whole = list(source.blocks())

    assert len(whole) > 5
    assert list(source.blocks(3)) == whole[3:]
    assert list(source.blocks(len(whole))) == []


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("name", NAMES)
def test_blocks_in_another_process_give_all_documents_and_add_up_to_the_source(name, tmp_path):
    path = write_source(name, tmp_path)
    source = open_source(str(path))
    found = [record for block in source.blocks() for record in pickle.loads(pickle.dumps(block)).records()]

    files = path.iterdir() if path.is_dir() else [path]
    assert (
        sum(block.n_bytes for block in source.blocks())
        == source.n_bytes
        == sum(f.stat().st_size for f in files)
    )
    if name != "folder":
        assert [r.text for r in found] == [json.loads(line)["text"] for line in big_json_lines().splitlines()]


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.zst", "a.csv"])
def test_lines_are_numbered_through_all_blocks(name, tmp_path):
    path = tmp_path / name
    if name.endswith(".csv"):
        write_csv(path, [["text", "n"], *([f"two\nlines {i}", i] for i in range(2_000)), ["one field"]])
        wanted = 2 * 2_000 + 2
    else:
        data = big_json_lines() + b"oops\n"
        path.write_bytes(zstd(data) if name.endswith(".zst") else data)
        wanted = len(data.splitlines())

    assert [r.where for r in records(path) if isinstance(r, BadRecord)] == [f"{path}, line {wanted}"]


def test_a_source_is_described_by_its_hash(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"abc")

    # The test vector of FIPS 180-2.
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert open_source(str(path)).describe() == SourceIdentity(str(path), 3, digest)


def test_the_hash_of_a_folder_tells_of_names_and_contents(tmp_path):
    hashes = set()
    for content, name in [("x", "a.txt"), ("y", "a.txt"), ("x", "b.txt")]:
        root = tmp_path / f"{name}{content}"
        root.mkdir()
        (root / name).write_text(content)
        hashes.add(open_source(str(root)).describe().sha256)

    assert len(hashes) == 3
