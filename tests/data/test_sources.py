"""Sources: every kind of file, and folders, give the documents that other programs wrote."""

import gzip
import json
import logging
import os

import pyarrow as pa
import pytest
from datasets import Dataset
from pyarrow import parquet as pq

from rwkv_train.data.corpus import read_documents
from rwkv_train.data.prepare import prepare_data
from rwkv_train.data.sources.base import Document, SourceOptions
from rwkv_train.data.sources.opening import open_source
from rwkv_train.errors import ConfigError, DataError
from tests.data.reading import DOCUMENTS, TEXTS, records, table, write_csv

# ---- every kind of file


@pytest.mark.parametrize("ending", [".csv", ".tsv"])
def test_delimited_values_give_the_documents_of_an_independent_writer(ending, tmp_path):
    path = tmp_path / f"data{ending}"
    rows = [["number", "text", "source"], *([i, *document] for i, document in enumerate(DOCUMENTS))]
    write_csv(path, rows, delimiter="\t" if ending == ".tsv" else ",")

    assert records(path, domain_column="source") == DOCUMENTS


@pytest.mark.parametrize("compression", ["snappy", "zstd", "none"])
@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.binary(), pa.dictionary(pa.int32(), pa.string())]
)
def test_parquet_gives_the_documents_of_an_independent_writer(kind, compression, tmp_path):
    path = tmp_path / "data.parquet"
    content = table().set_column(0, "text", pa.array(TEXTS).cast(kind))
    pq.write_table(content, path, row_group_size=4, compression=compression)

    assert records(path, domain_column="source") == DOCUMENTS


@pytest.mark.parametrize(
    ("meta", "kind"),
    [
        (
            [{"pile_set_name": "ArXiv"}, {"pile_set_name": None}, None],
            pa.struct({"pile_set_name": pa.string()}),
        ),
        (['{"pile_set_name": "ArXiv"}', "a remark", None], pa.string()),
    ],
    ids=["object", "string"],
)
def test_meta_in_parquet_is_read_as_in_json_lines(meta, kind, tmp_path):
    pq.write_table(table(text=["a", "b", "c"], meta=pa.array(meta, kind)), tmp_path / "data.parquet")

    assert [document.domain for document in records(tmp_path / "data.parquet")] == [
        "ArXiv",
        "unknown",
        "unknown",
    ]


def test_other_keys_of_json_lines_are_read(tmp_path):
    path = tmp_path / "data.jsonl"
    lines = [
        {"body": "a", "lang": "de"},
        {"body": "b", "lang": 3},
        {"body": "c"},
        {"body": "d", "lang": {"pile_set_name": "X"}},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))

    found = records(path, text_column="body", domain_column="lang")
    assert found == [Document("a", "de"), Document("b", "3"), Document("c", "unknown"), Document("d", "X")]


def test_the_format_can_be_named(tmp_path):
    path = tmp_path / "data.json"
    path.write_text('{"text": "x"}\n')

    assert records(path, format="jsonl") == [Document("x", "unknown")]
    with pytest.raises(
        DataError, match="there is no format 'xml'; wanted jsonl, text, parquet, csv, json, pair"
    ):
        open_source(str(path), SourceOptions(format="xml"))


@pytest.mark.parametrize("name", ["A.JSONL", "A.Jsonl.GZ", "A.CSV", "a.TXT", "folder/A.JSONL"])
def test_capitals_in_an_ending_change_nothing(name, tmp_path):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    content = b"text\nx\n" if "CSV" in name else b"x" if "TXT" in name else b'{"text": "x"}\n'
    path.write_bytes(gzip.compress(content) if "GZ" in name else content)

    found = records(path.parent if "folder" in name else path)

    assert [document.text for document in found] == ["x"]


def test_an_input_without_a_name_is_refused():
    with pytest.raises(DataError, match="an input has an empty name"):
        open_source("")
    with pytest.raises(DataError, match="hf: names no dataset"):
        open_source("hf:")


# ---- folders


def make_folder(root):
    for name in (
        "b/x.txt",
        "b/deep/y.md",
        "a/z.txt",
        "top.txt",
        ".hidden/h.txt",
        "b/.h.txt",
        "a/picture.png",
        "a/Makefile",
    ):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"text of {name}")
    (root / "m.jsonl").write_text('{"text": "line", "meta": {"pile_set_name": "Pile"}}\n')
    (root / "empty.txt").write_bytes(b"")


def test_a_folder_gives_its_files_by_path_with_their_first_folder_as_domain(tmp_path, caplog):
    root = tmp_path / "books"
    make_folder(root)

    with caplog.at_level(logging.WARNING):
        found = records(root)

    assert found == [
        Document("text of a/z.txt", "a"),
        Document("text of b/deep/y.md", "b"),
        Document("text of b/x.txt", "b"),
        Document("", "books"),
        Document("line", "Pile"),
        Document("text of top.txt", "books"),
    ]
    assert "left out what is of other kinds: 1 without ending, 1 .png" in caplog.text


def test_pipes_and_links_to_folders_are_left_out_of_a_folder_and_told_of(tmp_path, caplog):
    (tmp_path / "a.txt").write_text("x")
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "loop.txt").symlink_to(tmp_path)

    with caplog.at_level(logging.WARNING):
        assert records(tmp_path) == [Document("x", tmp_path.name)]

    assert "2 not a file" in caplog.text


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        ([], "holds no files; wanted"),
        (["a.png", "b.png"], r"only files of other kinds \(2 .png\); wanted files that end in"),
    ],
    ids=["empty", "pictures"],
)
def test_a_folder_without_text_is_refused(names, sentence, tmp_path):
    for name in names:
        (tmp_path / name).write_bytes(b"x")

    with pytest.raises(DataError, match=sentence):
        open_source(str(tmp_path))


# ---- in one process


def test_bad_records_are_passed_over_when_asked_and_told_of(tmp_path, caplog):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "x"}\n' + b"oops\n" * 5 + b'{"text": "y"}\n')

    with caplog.at_level(logging.WARNING):
        assert [document.text for document in read_documents([path], skip_bad=True)] == ["x", "y"]

    assert "skipped 5 bad records" in caplog.text
    assert "line 2: not JSON" in caplog.text
    assert "line 5" not in caplog.text


def test_documents_of_chosen_domains_are_read(tmp_path):
    path = tmp_path / "data.parquet"
    pq.write_table(table(), path)
    options = SourceOptions(domain_column="source")

    chosen = read_documents([path], options=options, domains=["prose"], keep_empty=True)
    assert [document.text for document in chosen] == TEXTS[1::2]
    with pytest.raises(
        DataError, match="no document is of the domain 'verse'; the domains there are: 'code', 'prose'"
    ):
        list(read_documents([path], options=options, domains={"verse"}))


def test_all_inputs_are_opened_before_the_first_is_read(tmp_path):
    (tmp_path / "a.txt").write_text("x")

    with pytest.raises(DataError, match="absent"):
        next(read_documents([tmp_path / "a.txt", tmp_path / "absent.txt"]))


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"pair_tokenizer": "world"}, "--pair-tokenizer"),
        ({"dataset_streaming": True}, "--streaming"),
        ({"text_column": "body"}, "--text-column"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_option_that_changes_nothing_is_refused(options, name, tmp_path):
    (tmp_path / "a.txt").write_text("x")

    with pytest.raises(ConfigError, match=f"{name} changes nothing for .*; leave it out"):
        list(read_documents([tmp_path], options=SourceOptions(**options)))


def test_a_format_changes_nothing_for_a_dataset_and_something_for_a_file_beside_it(tmp_path):
    Dataset.from_dict({"text": ["x"]}).save_to_disk(tmp_path / "d")
    (tmp_path / "a.data").write_text('{"text": "y"}')
    inputs, options = [f"hf:{tmp_path / 'd'}", tmp_path / "a.data"], SourceOptions(format="jsonl")

    with pytest.raises(ConfigError, match=r"--format changes nothing for hf:.*; leave it out"):
        list(read_documents(inputs[:1], options=options))
    assert [document.text for document in read_documents(inputs, options=options)] == ["x", "y"]


def test_files_of_a_folder_without_records_are_passed_over_and_counted(tmp_path, byte_tokenizer, caplog):
    folder = tmp_path / "in"
    folder.mkdir()
    for name, data in {
        "a.csv": b"text\nfirst\n",
        "b.csv": b"text\n",
        "c.csv": b"",
        "d.jsonl": b"",
        "e.jsonl": b" \n\n",
        "f.tsv": b"\n\n",
        "z.jsonl": b'{"text": "last"}\n',
    }.items():
        (folder / name).write_bytes(data)
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), folder / "g.parquet")
    source = open_source(str(folder))
    blocks = list(source.blocks())
    ((_, sidecar),) = prepare_data([folder], byte_tokenizer, tmp_path / "out")

    assert [record.text for block in blocks for record in block.records()] == ["first", "last"]
    assert sum(block.n_bytes for block in blocks) == sum(file.stat().st_size for file in folder.iterdir())
    assert sidecar.n_documents == 2
    assert sidecar.sources[0].n_without_records == 6
    assert "passed over files without records: 6, the first is b.csv" in caplog.text


def test_a_folder_of_files_without_records_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"")
    (tmp_path / "b.csv").write_bytes(b"text\n")

    with pytest.raises(DataError, match="holds no documents: no file has records"):
        list(read_documents([tmp_path]))


@pytest.mark.parametrize(
    ("name", "data", "sentence"),
    [("z.csv", b"body\nx\n", "z.csv has no column 'text'"), ("z.parquet", b"PAR1", "z.parquet is damaged")],
)
def test_a_file_of_a_folder_that_cannot_be_used_is_refused_at_the_start(name, data, sentence, tmp_path):
    (tmp_path / "a.csv").write_bytes(b"text\nfirst\n")
    (tmp_path / name).write_bytes(data)

    with pytest.raises(DataError, match=sentence):
        open_source(str(tmp_path))
