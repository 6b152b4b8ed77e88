"""Sources that are no files of text: datasets of Hugging Face's library, and tokenized corpora decoded again."""

import json
import struct

import datasets
import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from rwkv_train.data.binidx import TokenFileWriter
from rwkv_train.data.corpus import read_documents
from rwkv_train.data.prepare import prepare_data
from rwkv_train.data.sources.base import BadRecord, Document, SourceOptions
from rwkv_train.data.sources.opening import open_source
from rwkv_train.errors import DataError
from tests.data.reading import records

TEXTS = ["first\nline", "café 日本", "", "x" * 300]


# ---- datasets


def dataset(**columns):
    return datasets.Dataset.from_dict(columns or {"text": TEXTS, "source": ["a", "b", "a", "b"]})


@pytest.fixture
def saved(tmp_path):
    folder = tmp_path / "saved"
    datasets.DatasetDict({"train": dataset(), "other": dataset(text=["o"], source=["c"])}).save_to_disk(
        folder
    )
    return folder


@pytest.fixture
def files(tmp_path):
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(json.dumps({"text": t, "source": "a"}) + "\n" for t in TEXTS))
    return folder


def test_a_saved_dataset_gives_its_documents(saved):
    documents = [Document(text, domain) for text, domain in zip(TEXTS, ["a", "b", "a", "b"], strict=True)]

    assert records(f"hf:{saved}", domain_column="source") == documents
    assert records(f"hf:{saved}", dataset_split="other") == [Document("o", "unknown")]


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])
def test_a_dataset_of_files_gives_its_documents(streaming, files, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    found = records(f"hf:{files}", dataset_streaming=streaming, domain_column="source")
    assert found == [Document(text, "a") for text in TEXTS]


@pytest.mark.parametrize(
    "meta", [{"pile_set_name": "ArXiv"}, '{"pile_set_name": "ArXiv"}'], ids=["object", "string"]
)
def test_meta_of_a_dataset_is_read_as_in_json_lines(meta, tmp_path):
    dataset(text=["x"], meta=[meta]).save_to_disk(tmp_path / "d")

    assert records(f"hf:{tmp_path / 'd'}") == [Document("x", "ArXiv")]


@pytest.mark.usefixtures("small_blocks")
def test_a_dataset_goes_on_from_any_block_and_its_hash_is_that_of_its_texts(tmp_path):
    dataset(text=[f"text {number} " * 20 for number in range(300)]).save_to_disk(tmp_path / "one")
    dataset(text=[f"text {number} " * 20 for number in range(300)]).save_to_disk(tmp_path / "same")
    dataset(text=[f"text {number} " * 20 for number in range(299)]).save_to_disk(tmp_path / "other")
    one, same, other = (open_source(f"hf:{tmp_path}/{name}") for name in ("one", "same", "other"))
    whole = list(one.blocks())

    assert len(whole) > 5
    assert list(one.blocks(3)) == whole[3:]
    assert one.describe().n_bytes == sum(block.n_bytes for block in whole)
    assert one.describe().sha256 == same.describe().sha256 != other.describe().sha256


@pytest.fixture
def small_blocks(monkeypatch):
    for module in ("hub", "pair"):
        monkeypatch.setattr(f"rwkv_train.data.sources.{module}.BLOCK_BYTES", 4_000)


def test_a_row_without_text_is_a_bad_record(tmp_path):
    dataset(text=["x", None]).save_to_disk(tmp_path / "d")
    good, bad = records(f"hf:{tmp_path / 'd'}")

    assert good.text == "x"
    assert str(bad) == f'hf:{tmp_path / "d"}/train, row 1: "text" must be a string, found null'


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"dataset_split": "test"}, "has no split 'test'; it has 'train', 'other'"),
        ({"text_column": "body"}, "has no column 'body'; it has 'text', 'source'"),
        ({"dataset_config": "en"}, "was written by save_to_disk, where name has no meaning"),
    ],
    ids=["split", "column", "configuration"],
)
def test_what_a_dataset_does_not_have_is_refused(options, sentence, saved):
    with pytest.raises(DataError, match=sentence):
        open_source(f"hf:{saved}", SourceOptions(**options))


# ---- tokenized corpora


@pytest.fixture
def prefix(tmp_path):
    return tmp_path / "corpus.v1"


def write_pair(prefix, documents, dtype=np.uint16):
    with TokenFileWriter(prefix, dtype) as writer:
        for tokens in documents:
            writer.add_document(np.array(tokens, dtype))


@pytest.mark.parametrize("suffix", ["", ".bin", ".idx"], ids=["prefix", "bin", "idx"])
def test_a_prepared_corpus_gives_back_what_it_was_made_of(suffix, prefix, inputs, world_tokenizer):
    prepare_data(inputs, world_tokenizer, prefix)

    assert records(f"{prefix}{suffix}") == list(read_documents(inputs))


def test_a_pair_of_another_program_is_decoded_by_the_tokenizer_that_is_named(prefix):
    # Bytes of UTF-8, each plus one, are ids of the World vocabulary: the rest of the file is packed by hand.
    texts = ["Ja", "日本"]
    ids = [[byte + 1 for byte in text.encode()] + [0] for text in texts]
    sizes = [len(tokens) for tokens in ids]
    flat = [token for tokens in ids for token in tokens]
    prefix.with_name("corpus.v1.bin").write_bytes(struct.pack(f"<{len(flat)}i", *flat))
    prefix.with_name("corpus.v1.idx").write_bytes(
        b"MMIDIDX\0\0" + struct.pack("<QBQQ2i2q3q", 1, 4, 2, 3, *sizes, 0, 4 * sizes[0], 0, 1, 2)
    )

    assert records(prefix, pair_tokenizer="world") == [Document(text, "unknown") for text in texts]
    with pytest.raises(
        DataError, match=r"has no sidecar \(.*corpus\.v1\.json\).*: name it with --pair-tokenizer"
    ):
        open_source(str(prefix))


@pytest.fixture
def gpt2_like_file(tmp_path):
    """Have 0 for "!" and the end of a document last, as the tokenizer of GPT-2 has."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    alphabet.remove("!")
    vocab = {token: number for number, token in enumerate(["!", *alphabet])}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def test_the_end_token_of_a_pair_is_that_of_the_named_tokenizer(gpt2_like_file, prefix):
    texts = ["Stop!", "Go on", "!"]
    tokenizer = tokenizers.Tokenizer.from_file(str(gpt2_like_file))
    ids = [tokenizer.encode(text).ids for text in texts]
    write_pair(prefix, [[*ids[0], 256], [*ids[1], 256], ids[2]])  # the last one without an end token

    assert ids[2] == [0]
    assert records(prefix, pair_tokenizer=str(gpt2_like_file)) == [
        Document(text, "unknown") for text in texts
    ]


def test_another_tokenizer_than_that_of_the_sidecar_is_refused(prefix, inputs, byte_tokenizer):
    prepare_data(inputs, byte_tokenizer, prefix)

    with pytest.raises(DataError, match="was made with the tokenizer 'bytes'"):
        open_source(str(prefix), SourceOptions(pair_tokenizer="world"))


@pytest.mark.parametrize(
    ("tokens", "why"),
    [
        ([65_535, 0], "token id 65535 does not exist in the tokenizer 'world'"),
        ([75, 0xE9 + 1, 0], r"not UTF-8 (byte 0xe9)"),
        ([75, 0, 76, 0], "the token 0, which ends a document, before its end"),
    ],
    ids=["unknown id", "half a character", "two in one"],
)
def test_tokens_that_are_no_text_are_a_bad_record(tokens, why, prefix):
    write_pair(prefix, [[75, 0], tokens, [76, 0]])
    first, bad, last = records(prefix, pair_tokenizer="world")

    assert (first.text, last.text) == ("J", "K")
    assert isinstance(bad, BadRecord)
    assert bad.where == f"{prefix}, document 1"
    assert why in bad.why


@pytest.mark.usefixtures("small_blocks")
def test_the_blocks_of_a_pair_add_up_and_go_on_from_any(prefix):
    write_pair(prefix, [[75 + number % 20] * (number + 1) + [0] for number in range(100)])
    source = open_source(str(prefix), SourceOptions(pair_tokenizer="world"))
    whole = list(source.blocks())
    rest = [record for block in source.blocks(2) for record in block.records()]

    assert len(whole) > 3
    assert sum(block.n_bytes for block in whole) == source.n_bytes == source.describe().n_bytes
    assert rest == [record for block in whole[2:] for record in block.records()]


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_half_a_pair_is_refused(suffix, prefix):
    write_pair(prefix, [[75, 0]])
    prefix.with_name(prefix.name + suffix).unlink()

    with pytest.raises(DataError, match=rf"cannot read .*corpus\.v1\{suffix}: No such file"):
        open_source(f"{prefix}.{'idx' if suffix == '.bin' else 'bin'}", SourceOptions(pair_tokenizer="world"))
