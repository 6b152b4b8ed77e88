"""The token files, byte by byte as Megatron's format says; the expected bytes are packed here by hand."""

import pickle
import struct

import numpy as np
import pytest

from rwkv_train.data.binidx import TokenFile, TokenFileWriter
from rwkv_train.errors import DataError

DOCUMENTS = [[5, 6, 7, 0], [300, 0], [65_529, 1, 0]]


def make_index(
    sizes, itemsize=2, code=8, starts=None, version=1, magic=b"MMIDIDX\x00\x00", offsets=None
) -> bytes:
    """Pack an .idx file from the specification."""
    if offsets is None:
        offsets = [sum(sizes[:index]) * itemsize for index in range(len(sizes))]
    if starts is None:
        starts = range(len(sizes) + 1)
    starts = list(starts)
    return b"".join(
        [
            magic,
            struct.pack("<Q", version),
            struct.pack("<B", code),
            struct.pack("<Q", len(sizes)),
            struct.pack("<Q", len(starts)),
            struct.pack(f"<{len(sizes)}i", *sizes),
            struct.pack(f"<{len(sizes)}q", *offsets),
            struct.pack(f"<{len(starts)}q", *starts),
        ]
    )


@pytest.fixture
def prefix(tmp_path):
    return tmp_path / "corpus.v1"  # a dot in the name is no ending


def put(prefix, idx: bytes, tokens: bytes) -> None:
    prefix.with_name(prefix.name + ".idx").write_bytes(idx)
    prefix.with_name(prefix.name + ".bin").write_bytes(tokens)


def get(prefix, suffix: str) -> bytes:
    return prefix.with_name(prefix.name + suffix).read_bytes()


def write(prefix, documents=DOCUMENTS, dtype=np.uint16, **options) -> None:
    with TokenFileWriter(prefix, dtype, **options) as writer:
        for tokens in documents:
            writer.add_document(np.array(tokens, dtype=dtype))


def test_the_written_bytes_are_those_of_the_specification(prefix):
    write(prefix)

    assert get(prefix, ".bin") == struct.pack("<9H", 5, 6, 7, 0, 300, 0, 65_529, 1, 0)
    assert get(prefix, ".idx") == make_index([4, 2, 3])


def test_the_index_starts_as_a_published_one_does(prefix):
    # The first 46 bytes of json2binidx_tool's sample (7 documents of 9, 6, 20, 22, 27, 26 and 50 tokens).
    write(prefix, [[1] * size for size in (9, 6, 20, 22, 27, 26, 50)])

    head = (
        "4d4d4944494458 0000 0100000000000000 08 0700000000000000 0800000000000000 09000000 06000000 14000000"
    )
    index = get(prefix, ".idx")
    assert index.startswith(bytes.fromhex(head))
    assert len(index) == 182
    assert struct.unpack("<7q", index[62:118]) == (0, 18, 30, 70, 114, 168, 220)


def test_32_bit_ids_have_their_code_and_offsets(prefix):
    write(prefix, [[70_000, 0], [1, 0]], dtype=np.int32)

    assert get(prefix, ".bin") == struct.pack("<4i", 70_000, 0, 1, 0)
    assert get(prefix, ".idx") == make_index([2, 2], itemsize=4, code=4)


def test_what_is_written_is_read_back(prefix):
    write(prefix)
    tokens = TokenFile.open(prefix)

    assert [tokens.document(index).tolist() for index in range(tokens.n_documents)] == DOCUMENTS
    assert tokens.tokens.tolist() == [token for document in DOCUMENTS for token in document]
    assert (tokens.n_tokens, tokens.n_documents, tokens.dtype) == (9, 3, np.uint16)


def test_more_documents_than_one_piece_of_the_tables_are_indexed(prefix, monkeypatch):
    monkeypatch.setattr("rwkv_train.data.binidx._CHUNK", 4)
    sizes = [1, 5, 2, 9, 3, 3, 1, 1, 7, 4]
    write(prefix, [[8] * size for size in sizes])

    assert get(prefix, ".idx") == make_index(sizes)
    assert TokenFile.open(prefix).document_span(7) == (24, 25)


@pytest.mark.parametrize(
    ("code", "form"),
    [(1, "B"), (2, "b"), (3, "h"), (4, "i"), (5, "q"), (8, "H")],
    ids=str,
)
def test_foreign_files_of_every_integer_type_are_read(code, form, prefix):
    put(prefix, make_index([2, 1], struct.calcsize(form), code), struct.pack(f"<3{form}", 3, 4, 5))

    assert [TokenFile.open(prefix).document(index).tolist() for index in range(2)] == [[3, 4], [5]]


def test_a_foreign_document_of_several_sequences_is_one_document(prefix):
    put(prefix, make_index([1, 2, 3], starts=[0, 2, 2, 3]), struct.pack("<6H", *range(6)))
    tokens = TokenFile.open(prefix)

    assert [tokens.document(index).tolist() for index in range(3)] == [[0, 1, 2], [], [3, 4, 5]]


def test_the_extra_table_of_multimodal_files_is_ignored(prefix):
    put(prefix, make_index([2]) + b"\x00", struct.pack("<2H", 1, 2))

    assert TokenFile.open(prefix).tokens.tolist() == [1, 2]


def test_a_copy_for_another_process_opens_the_files_again(prefix):
    write(prefix, [[1] * 100_000])
    data = pickle.dumps(TokenFile.open(prefix))

    assert len(data) < 1_000
    assert pickle.loads(data).n_tokens == 100_000


def test_there_is_no_document_beyond_the_last(prefix):
    write(prefix)

    with pytest.raises(IndexError, match="document 3 of 3"):
        TokenFile.open(prefix).document(3)


TOKENS = struct.pack("<9H", *range(9))


@pytest.mark.parametrize(
    ("idx", "tokens", "sentence"),
    [
        (b"", TOKENS, "is cut off: it has 0 bytes, its header alone 34"),
        (make_index([4, 5])[:-8], TOKENS, "has 74 bytes, and 2 sequences and 2 documents need 82"),
        (make_index([4, 5])[:40], TOKENS, "has 40 bytes, and 2 sequences"),
        (make_index([4, 5], magic=b"MMIDIDX\x00\x01"), TOKENS, "is no Megatron index"),
        (make_index([4, 5], version=2), TOKENS, "has version 2 of the format, wanted 1"),
        (
            make_index([4, 5], code=6),
            TOKENS,
            r"code 6, which is floating point, and token ids are integers: wanted one of 1 \(uint8\), .*again with",
        ),
        (make_index([4, 5], code=7), TOKENS, "type code 7, which is floating point"),
        (make_index([4, 5], code=0), TOKENS, "type code 0, which is not known: wanted one of"),
        (make_index([4, 5], starts=[]), TOKENS, "its table of documents is empty"),
        (make_index([]), b"", "holds no tokens"),
        (make_index([4, 5]), b"", "holds no tokens"),
        (make_index([4, 5]), TOKENS[:-4], r"has 14 bytes, but its index tells of 18 \(9 tokens of uint16\)"),
        (make_index([4, 5]), TOKENS[:-1], "has 17 bytes, but its index tells of 18"),
        (make_index([4, 5]), TOKENS + b"\x00\x00", "has 20 bytes, but its index tells of 18"),
        (make_index([4, 5], offsets=[0, 6]), TOKENS, "sequences 0 to 1 do not follow one another"),
        (make_index([10, -1], offsets=[0, 20]), TOKENS, "sequences 0 to 1 do not follow one another"),
        (make_index([4, 5], starts=[0, 1]), TOKENS, "its documents cover sequences 0 to 1, wanted 0 to 2"),
        (make_index([4, 5], starts=[1, 2]), TOKENS, "its documents cover sequences 1 to 2, wanted 0 to 2"),
        (make_index([4, 5], starts=[0, 2, 1, 2]), TOKENS, "its documents are not in order"),
        (make_index([4, 5], starts=[0, -9, 2]), TOKENS, "its documents are not in order"),
    ],
)
def test_damaged_files_are_refused_with_the_numbers(idx, tokens, sentence, prefix):
    put(prefix, idx, tokens)

    with pytest.raises(DataError, match=sentence):
        TokenFile.open(prefix)


def test_a_header_that_promises_more_than_there_is_is_refused(prefix):
    index = bytearray(make_index([4, 5]))
    index[18:26] = struct.pack("<Q", 1 << 60)
    put(prefix, bytes(index), TOKENS)

    with pytest.raises(DataError, match=f"{1 << 60} sequences"):
        TokenFile.open(prefix)


def test_a_missing_file_is_named(prefix):
    with pytest.raises(DataError, match=r"cannot read .*corpus\.v1\.idx: No such file"):
        TokenFile.open(prefix)


def test_a_prefix_with_an_ending_says_to_leave_it_off(prefix):
    write(prefix)

    with pytest.raises(
        DataError, match=r"corpus\.v1\.bin\.idx: No such file .* pass the prefix .*corpus\.v1$"
    ):
        TokenFile.open(prefix.with_name("corpus.v1.bin"))


def test_an_existing_corpus_is_replaced_only_when_asked(prefix):
    write(prefix)
    before = get(prefix, ".idx")

    with pytest.raises(DataError, match=r"corpus\.v1\.bin exists already"):
        write(prefix, [[1]])
    assert get(prefix, ".idx") == before

    write(prefix, [[1]], overwrite=True)
    assert TokenFile.open(prefix).tokens.tolist() == [1]


def test_an_interrupted_writer_leaves_nothing_and_keeps_the_old(prefix):
    write(prefix)

    def interrupted():
        with TokenFileWriter(prefix, np.uint16, overwrite=True) as writer:
            writer.add_document(np.ones(50_000, np.uint16))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()

    assert sorted(path.name for path in prefix.parent.iterdir()) == ["corpus.v1.bin", "corpus.v1.idx"]
    assert TokenFile.open(prefix).n_tokens == 9


@pytest.mark.parametrize(
    ("tokens", "sentence"),
    [
        ([], "without tokens"),
        ([65_536], "ids 65536 to 65536 do not fit"),
        ([-1, 3], "ids -1 to 3 do not fit"),
    ],
)
def test_ids_that_the_type_cannot_hold_are_a_mistake_of_the_caller(tokens, sentence, prefix):
    with TokenFileWriter(prefix, np.uint16) as writer:
        writer.add_document(np.array([1]))
        with pytest.raises(ValueError, match=sentence):
            writer.add_document(np.array(tokens, dtype=np.int64))

    assert TokenFile.open(prefix).tokens.tolist() == [1]
