"""Reading documents: every format gives the same documents, and every bad file one sentence with its line."""

import gzip
import json
import random

import pytest
import zstandard

from rwkv_train.data.corpus import Document, read_documents
from rwkv_train.errors import DataError

LINES = [
    '{"text": "first\\nline", "meta": {"pile_set_name": "Github"}}',
    '{"text": "café 日本", "meta": "{\\"pile_set_name\\": \\"PubMed Central\\"}"}',
    '{"text": "no meta"}',
]
DOCUMENTS = [
    Document("first\nline", "Github"),
    Document("café 日本", "PubMed Central"),
    Document("no meta", "unknown"),
]
CONTENT = "\n".join(LINES).encode() + b"\n"


def zstd(data: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(data)


FILES = {
    "plain.jsonl": CONTENT,
    "no-newline-at-the-end.jsonl": CONTENT.rstrip(b"\n"),
    "windows.jsonl": CONTENT.replace(b"\n", b"\r\n"),
    "blank-lines.jsonl": CONTENT.replace(b"\n", b"\n\n  \n"),
    "byte-order-mark.jsonl": b"\xef\xbb\xbf" + CONTENT,
    "one-frame.jsonl.zst": zstd(CONTENT),
    "frames-that-cut-lines.jsonl.zst": b"".join(zstd(CONTENT[i : i + 7]) for i in range(0, len(CONTENT), 7)),
    "with-an-empty-frame.jsonl.zst": zstd(b"") + zstd(CONTENT) + zstd(b""),
    "one-member.jsonl.gz": gzip.compress(CONTENT),
    "two-members.jsonl.gz": gzip.compress(CONTENT[:20]) + gzip.compress(CONTENT[20:]),
}


@pytest.mark.parametrize("name", FILES)
def test_every_form_of_json_lines_gives_the_same_documents(name, tmp_path):
    path = tmp_path / name
    path.write_bytes(FILES[name])

    assert list(read_documents([path])) == DOCUMENTS


def test_large_compressed_files_come_through_whole(tmp_path):
    # More than any buffer on the way, and hard to compress, so that frames span many reads.
    generator = random.Random(7)
    texts = ["".join(chr(generator.randrange(32, 0x3000)) for _ in range(60_000)) for _ in range(20)]
    data = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)
    path = tmp_path / "large.jsonl.zst"
    path.write_bytes(zstd(data[:1_000_000]) + zstd(data[1_000_000:]))

    assert [document.text for document in read_documents([path])] == texts


def test_a_text_file_is_one_document_named_by_its_stem(tmp_path):
    path = tmp_path / "moby-dick.txt"
    path.write_bytes(b"Call me\r\nIshmael.\n")

    assert list(read_documents([path])) == [Document("Call me\r\nIshmael.\n", "moby-dick")]


def test_line_separators_of_unicode_do_not_end_a_line(tmp_path):
    text = "one\u2028two\u2029three\x85four\x0cfive"
    path = tmp_path / "separators.jsonl"
    path.write_text(json.dumps({"text": text}, ensure_ascii=False) + "\n")

    assert [document.text for document in read_documents([path])] == [text]


@pytest.mark.parametrize(
    "meta",
    ['"a remark"', "5", "null", "[]", '{"pile_set_name": 3}', '{"pile_set_name": ""}', '"{\\"source\\": 1}"'],
)
def test_a_meta_without_a_name_is_the_unknown_domain(meta, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(f'{{"text": "x", "meta": {meta}}}\n')

    assert [document.domain for document in read_documents([path])] == ["unknown"]


def test_documents_without_text_are_skipped_unless_asked_for(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": ""}\n{"text": "x"}\n')

    assert [document.text for document in read_documents([path])] == ["x"]
    assert [document.text for document in read_documents([path], keep_empty=True)] == ["", "x"]


@pytest.mark.parametrize("name", FILES)
def test_progress_adds_up_to_the_size_of_the_file(name, tmp_path):
    path = tmp_path / name
    path.write_bytes(FILES[name])
    read: list[int] = []

    list(read_documents([path], on_bytes=read.append))

    assert sum(read) == path.stat().st_size


GOOD = b'{"text": "x"}\n'


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.jsonl", GOOD + b"{oops\n", "a.jsonl, line 2: not JSON: .* at column 2"),
        ("a.jsonl", GOOD + b'{"txt": "x"}\n', 'a.jsonl, line 2: the object has no "text"'),
        ("a.jsonl", GOOD + b'{"text": 5}\n', 'line 2: "text" must be a string, found int'),
        ("a.jsonl", GOOD + b'{"text": null}\n', 'line 2: "text" must be a string, found null'),
        ("a.jsonl", GOOD + b'["text"]\n', 'line 2: wanted an object with "text", found a list'),
        ("a.jsonl", GOOD + b'\n{"text": "\xff"}\n', r"line 3: not UTF-8 \(byte 0xff\)"),
        (
            "a.jsonl",
            GOOD + b'{"text": "\\ud800"}\n',
            r"line 2: character 0 of the text is U\+D800, half of a",
        ),
        (
            "a.jsonl",
            GOOD + b"[" * 100_000 + b"\n",
            "line 2: not JSON that can be read: it is nested too deeply",
        ),
        ("a.jsonl", GOOD.decode().encode("utf-16"), "line 1: not UTF-8"),
        ("a.jsonl", b"", "a.jsonl is empty"),
        ("a.jsonl", b"\n  \n", "a.jsonl holds no documents"),
        ("a.txt", b"", "a.txt is empty"),
        ("a.txt", b"one\ntwo\xe9\n", r"a.txt, line 2: not UTF-8 \(byte 0xe9\)"),
        ("a.jsonl.zst", b"", "a.jsonl.zst is empty"),
        ("a.jsonl.zst", zstd(b""), "a.jsonl.zst holds no documents"),
        ("a.jsonl.zst", zstd(CONTENT)[:-5], "a.jsonl.zst is cut off: its last zstd frame is not complete"),
        ("a.jsonl.zst", zstd(CONTENT) + zstd(CONTENT)[:9], "a.jsonl.zst is cut off"),
        ("a.jsonl.zst", CONTENT, "a.jsonl.zst is damaged or not compressed as its name says"),
        ("a.jsonl.gz", gzip.compress(CONTENT)[:-9], "a.jsonl.gz is cut off"),
        ("a.jsonl.gz", CONTENT, "a.jsonl.gz is damaged or not compressed as its name says"),
        ("a.docx", b"PK", r"a.docx: cannot tell the format; wanted a name that ends in .jsonl, "),
    ],
)
def test_bad_files_are_refused_with_file_and_line(name, content, sentence, tmp_path):
    path = tmp_path / name
    path.write_bytes(content)

    with pytest.raises(DataError, match=sentence):
        list(read_documents([path]))


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"cannot read .*absent\.jsonl: No such file or directory"):
        list(read_documents([tmp_path / "absent.jsonl"]))
