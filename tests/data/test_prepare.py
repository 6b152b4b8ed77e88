"""Text to a corpus on disk: every token, byte and document is accounted for."""

import hashlib
import json
import os
import re
import resource
from pathlib import Path

import numpy as np
import pytest
import zstandard

from rwkv_train.data.binidx import TokenFile
from rwkv_train.data.preparation.options import PrepareOptions
from rwkv_train.data.prepare import prepare_data
from rwkv_train.data.sidecar import DomainTotals
from rwkv_train.data.sources.base import SourceOptions
from rwkv_train.data.stored import load_corpus
from rwkv_train.errors import DataError

FILES = ["out.bin", "out.docs.npy", "out.idx", "out.json"]


def written(prefix) -> list[str]:
    return sorted(path.name for path in prefix.parent.glob("*out*"))


def test_each_document_is_its_bytes_and_one_end_token(inputs, byte_tokenizer, tmp_path):
    prepare_data(inputs, byte_tokenizer, tmp_path / "out")

    stream = b"def f(x):\n    return x\n|" + "Ein schöner Tag.|日本|".encode() + b"Dear all,\r\n|"
    expected = [0 if byte == ord("|") else byte + 1 for byte in stream]
    tokens = TokenFile.open(tmp_path / "out")
    assert tokens.tokens.tolist() == expected
    assert tokens.dtype == np.uint16
    assert written(tmp_path / "out") == FILES


def test_totals_count_documents_tokens_and_utf8_bytes(inputs, byte_tokenizer, tmp_path):
    ((prefix, sidecar),) = prepare_data(inputs, byte_tokenizer, tmp_path / "out")

    code, prose = 23 + len("日本".encode()), len("Ein schöner Tag.".encode())
    assert prefix == tmp_path / "out"
    assert sidecar.domains == (
        DomainTotals("code", 2, code + 2, code, 6),
        DomainTotals("prose", 1, prose + 1, prose, 3),
        DomainTotals("letter", 1, 12, 11, 3),
    )
    assert (sidecar.n_documents, sidecar.n_skipped_empty) == (4, 1)
    assert sidecar.n_bytes == code + prose + 11
    assert sidecar.n_tokens == sidecar.n_bytes + 4
    assert sidecar.max_token == max("日本".encode()) + 1


def test_names_that_are_not_utf8_are_told_with_their_bytes(byte_tokenizer, tmp_path):
    lines, text = (
        Path(os.fsdecode(os.fsencode(tmp_path / "in") + name)) for name in (b"n\xff.jsonl", b"d\xfe")
    )
    (text / os.fsdecode(b"e\xfd")).mkdir(parents=True)
    lines.write_bytes(b'{"text": "one"}\n')
    (text / os.fsdecode(b"e\xfd") / "a.txt").write_bytes(b"two")
    (text / os.fsdecode(b"\xfc.txt")).write_bytes(b"three")
    single = tmp_path / os.fsdecode(b"s\xfb.txt")
    single.write_bytes(b"four")

    ((_, sidecar),) = prepare_data([lines, text, single], byte_tokenizer, tmp_path / os.fsdecode(b"out\xfa"))

    assert [domain.name for domain in sidecar.domains] == ["unknown", r"e\xfd", r"ind\xfe", r"s\xfb"]
    assert [source.path for source in sidecar.sources] == [
        rf"{tmp_path}/{name}" for name in (r"inn\xff.jsonl", r"ind\xfe", r"s\xfb.txt")
    ]


def test_a_bad_record_of_a_file_whose_name_is_not_utf8_is_counted(byte_tokenizer, tmp_path):
    lines = tmp_path / os.fsdecode(b"n\xff.jsonl")
    lines.write_bytes(b'{"text": "one"}\n{}\n')

    ((_, sidecar),) = prepare_data([lines], byte_tokenizer, tmp_path / "out", PrepareOptions(skip_bad=True))

    assert sidecar.preparation.first_bad == (rf'{tmp_path}/n\xff.jsonl, line 2: the object has no "text"',)


def test_the_sidecar_names_tokenizer_and_sources(inputs, byte_tokenizer, tmp_path):
    prepare_data(inputs, byte_tokenizer, tmp_path / "out")
    told = json.loads((tmp_path / "out.json").read_text())

    assert told["format"] == "rwkv-train-corpus/2"
    assert told["tokenizer"] == {"name": "bytes", "sha256": byte_tokenizer.identity.sha256}
    assert told["sha256"] == hashlib.sha256((tmp_path / "out.bin").read_bytes()).hexdigest()
    assert told["sources"] == [
        {
            "path": str(path),
            "n_bytes": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in inputs
    ]


def test_the_document_table_can_be_read_by_numpy_alone(inputs, byte_tokenizer, tmp_path):
    prepare_data(inputs, byte_tokenizer, tmp_path / "out")
    table = np.load(tmp_path / "out.docs.npy")

    assert table["domain"].tolist() == [0, 1, 0, 2]
    assert table["n_bytes"].tolist() == [23, 17, 6, 11]


def test_world_tokens_decode_to_the_texts(inputs, world_tokenizer, tmp_path):
    prepare_data(inputs, world_tokenizer, tmp_path / "out")
    corpus = load_corpus(tmp_path / "out")

    texts = [
        world_tokenizer.decode_bytes(tokens.tolist()).decode() for tokens, *_ in corpus.token_documents()
    ]
    assert texts == ["def f(x):\n    return x\n", "Ein schöner Tag.", "日本", "Dear all,\r\n"]


def test_batches_do_not_show(byte_tokenizer, tmp_path, monkeypatch):
    texts = [f"document {number} " * (number % 7) for number in range(100)]
    lines = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)
    (tmp_path / "many.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(lines))
    monkeypatch.setattr("rwkv_train.data.preparation.blocks._BATCH_CHARACTERS", 50)

    prepare_data([tmp_path / "many.jsonl.zst"], byte_tokenizer, tmp_path / "out")

    expected = [text.encode() for text in texts if text]
    found = load_corpus(tmp_path / "out").token_documents()
    assert [byte_tokenizer.decode_bytes(document.tokens) for document in found] == expected


class Recorder:
    """A progress that keeps what it is told."""

    def __init__(self):
        self.stages, self.n_bytes = [], 0

    def begin(self, stage, n_bytes):
        self.stages.append((stage, n_bytes))

    def advance(self, n_bytes):
        self.n_bytes += n_bytes


def test_progress_tells_of_all_bytes(inputs, byte_tokenizer, tmp_path):
    told = Recorder()

    prepare_data(inputs, byte_tokenizer, tmp_path / "out", progress=told)

    total = sum(path.stat().st_size for path in inputs)
    assert told.stages == [("tokenizing", total), ("choosing", None), ("writing", None)]
    assert told.n_bytes == total


def test_an_existing_corpus_is_replaced_only_when_asked(inputs, byte_tokenizer, tmp_path):
    prepare_data(inputs, byte_tokenizer, tmp_path / "out")

    with pytest.raises(DataError, match=r"out\.bin exists already"):
        prepare_data(inputs[1:], byte_tokenizer, tmp_path / "out")
    assert load_corpus(tmp_path / "out").tokens.n_documents == 4

    prepare_data(inputs[1:], byte_tokenizer, tmp_path / "out", overwrite=True)
    assert load_corpus(tmp_path / "out").tokens.n_documents == 1
    assert written(tmp_path / "out") == FILES


def test_a_bad_line_leaves_nothing_that_looks_like_a_corpus(inputs, byte_tokenizer, tmp_path):
    with inputs[0].open("a") as file:
        file.write("oops\n")

    with pytest.raises(DataError, match=r"small\.jsonl, line 5: not JSON.*--skip-bad-lines passes over"):
        prepare_data(inputs, byte_tokenizer, tmp_path / "out")

    assert written(tmp_path / "out") == []


def test_a_source_of_empty_documents_only_is_refused(byte_tokenizer, tmp_path):
    (tmp_path / "void.jsonl").write_text('{"text": ""}\n')

    with pytest.raises(DataError, match=r"none of the documents in .*void\.jsonl has any text"):
        prepare_data([tmp_path / "void.jsonl"], byte_tokenizer, tmp_path / "out")

    assert written(tmp_path / "out") == []


def test_where_all_records_are_bad_the_first_is_named(byte_tokenizer, tmp_path):
    (tmp_path / "bad.jsonl").write_text("oops\n[]\n")

    with pytest.raises(
        DataError, match=r"no record of .*bad\.jsonl can be used: 2 are bad, .*line 1: not JSON"
    ):
        prepare_data(
            [tmp_path / "bad.jsonl"], byte_tokenizer, tmp_path / "out", PrepareOptions(skip_bad=True)
        )


def test_a_column_that_is_no_domain_is_refused(byte_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("rwkv_train.data.preparation.work_folder.MAX_DOMAINS", 2)
    (tmp_path / "x.jsonl").write_text("".join(f'{{"text": "x", "id": {number}}}\n' for number in range(3)))
    options = PrepareOptions(SourceOptions(domain_column="id"))

    with pytest.raises(DataError, match="of more than 2 domains, '2' among them"):
        prepare_data([tmp_path / "x.jsonl"], byte_tokenizer, tmp_path / "out", options)


@pytest.mark.parametrize("prefix", [".", "/", "folder/.."])
def test_an_output_that_is_a_folder_and_no_more_is_refused(prefix, inputs, byte_tokenizer):
    with pytest.raises(DataError, match=f"'{prefix}' is no prefix of files"):
        prepare_data(inputs, byte_tokenizer, Path(prefix))


def test_a_full_disk_is_one_sentence(byte_tokenizer, tmp_path):
    (tmp_path / "long.txt").write_text("word " * 100_000)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        with pytest.raises(
            DataError, match=r"cannot write .*out\.unfinished: File too large; what is done is kept"
        ):
            prepare_data([tmp_path / "long.txt"], byte_tokenizer, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    prepare_data([tmp_path / "long.txt"], byte_tokenizer, tmp_path / "out")
    assert written(tmp_path / "out") == FILES


def test_a_corpus_of_the_first_format_is_read(inputs, byte_tokenizer, tmp_path):
    prepare_data(inputs, byte_tokenizer, tmp_path / "out")
    told = json.loads((tmp_path / "out.json").read_text())
    told["format"] = "rwkv-train-corpus/1"
    del told["n_words"], told["preparation"]
    for domain in told["domains"]:
        del domain["n_words"]
    (tmp_path / "out.json").write_text(json.dumps(told))
    table = np.load(tmp_path / "out.docs.npy")
    old = np.empty(len(table), [("domain", "<u4"), ("n_bytes", "<i8")])
    old["domain"], old["n_bytes"] = table["domain"], table["n_bytes"]
    np.save(tmp_path / "out.docs.npy", old)

    corpus = load_corpus(tmp_path / "out")

    assert corpus.sidecar.n_words is None
    assert corpus.sidecar.domains[0].n_words is None
    assert corpus.token_document(3).n_bytes == 11


def test_the_document_table_counts_words_as_the_regular_expression_does(inputs, byte_tokenizer, tmp_path):
    prepare_data(inputs, byte_tokenizer, tmp_path / "out")

    texts = ["def f(x):\n    return x\n", "Ein schöner Tag.", "日本", "Dear all,\r\n"]
    expected = [len(re.split(r"\s+", text)) for text in texts]
    assert np.load(tmp_path / "out.docs.npy")["n_words"].tolist() == expected


@pytest.mark.parametrize("name", ["out.json", "link.jsonl"])
def test_an_input_is_not_replaced_by_the_output(name, byte_tokenizer, tmp_path):
    (tmp_path / "out.json").write_bytes(b'{"text": "one"}\n')
    (tmp_path / "link.jsonl").symlink_to("out.json")
    options = PrepareOptions(SourceOptions(format="jsonl"))

    with pytest.raises(
        DataError, match=r"the output .*out\.json is a file of the input .*; choose another --output"
    ):
        prepare_data([tmp_path / name], byte_tokenizer, tmp_path / "out", options, overwrite=True)

    assert (tmp_path / "out.json").read_bytes() == b'{"text": "one"}\n'
    assert not (tmp_path / "out.unfinished").exists()


def test_a_pair_is_not_replaced_by_what_is_made_of_it(inputs, byte_tokenizer, tmp_path):
    prepare_data(inputs, byte_tokenizer, tmp_path / "out")
    before = (tmp_path / "out.bin").read_bytes()

    with pytest.raises(DataError, match=r"out\.bin is a file of the input .*out, which would be replaced"):
        prepare_data([tmp_path / "out"], byte_tokenizer, tmp_path / "out", overwrite=True)

    assert (tmp_path / "out.bin").read_bytes() == before


def test_a_folder_in_the_place_of_the_unfinished_work_is_not_emptied(inputs, byte_tokenizer, tmp_path):
    folder = tmp_path / "out.unfinished"
    folder.mkdir()
    (folder / "novel.txt").write_text("mine")

    with pytest.raises(
        DataError, match=r"out\.unfinished .* holds 'novel\.txt' and no journal\.json.*move it away"
    ):
        prepare_data(inputs, byte_tokenizer, tmp_path / "out", overwrite=True)

    assert [path.name for path in folder.iterdir()] == ["novel.txt"]


def test_an_empty_folder_in_the_place_of_the_unfinished_work_will_do(inputs, byte_tokenizer, tmp_path):
    (tmp_path / "out.unfinished").mkdir()

    prepare_data(inputs, byte_tokenizer, tmp_path / "out")

    assert written(tmp_path / "out") == FILES
