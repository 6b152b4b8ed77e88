"""Sources: every kind of file gives its documents in blocks, always the same ones, and says what is wrong."""

import csv
import gzip
import io
import json
import logging
import pickle
import random

import pyarrow as pa
import pytest
import zstandard
from pyarrow import parquet as pq

from rwkv_train.data.corpus import read_documents
from rwkv_train.data.sources import lines as lines_module
from rwkv_train.data.sources.base import BadRecord, Document, SourceOptions
from rwkv_train.data.sources.opening import open_source
from rwkv_train.errors import ConfigError, DataError

TEXTS = ["first\nline", "café 日本", 'a "quoted", word', "", "tab\there", "x" * 1000]
DOMAINS = ["code", "prose", "code", "prose", "code", "prose"]
DOCUMENTS = [Document(text, domain) for text, domain in zip(TEXTS, DOMAINS, strict=True)]


def records(name, **options):
    return [r for block in open_source(str(name), SourceOptions(**options)).blocks() for r in block.records()]


def write_csv(path, rows, **form):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, **form).writerows(rows)


def table(**columns):
    return pa.table(columns or {"text": TEXTS, "source": DOMAINS, "number": list(range(len(TEXTS)))})


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
    with pytest.raises(DataError, match="there is no format 'xml'; wanted jsonl, text, parquet, csv, pair"):
        open_source(str(path), SourceOptions(format="xml"))


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
    assert "2 files of other kinds are left out: 1 without ending, 1 .png" in caplog.text


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


# ---- blocks


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


def zstd(data, size=9_999):
    compress = zstandard.ZstdCompressor().compress
    return b"".join(compress(data[at : at + size]) for at in range(0, len(data), size))


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
    assert open_source(str(path)).describe() == (str(path), 3, digest)


def test_the_hash_of_a_folder_tells_of_names_and_contents(tmp_path):
    hashes = set()
    for content, name in [("x", "a.txt"), ("y", "a.txt"), ("x", "b.txt")]:
        root = tmp_path / f"{name}{content}"
        root.mkdir()
        (root / name).write_text(content)
        hashes.add(open_source(str(root)).describe().sha256)

    assert len(hashes) == 3


# ---- bad input


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
