"""The built-in corpus: real text, two domains, and nothing of validation in training."""

import inspect
import io
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import zstandard

from rwkv_train.data.builtin import ensure_builtin, prepare_builtin, write_builtin_corpus
from rwkv_train.data.stored import load_corpus
from rwkv_train.errors import DataError


def read(path: Path) -> list[dict]:
    stream = zstandard.ZstdDecompressor().stream_reader(path.open("rb"), read_across_frames=True)
    return [json.loads(line) for line in io.BufferedReader(stream)]


def shingles(text: str) -> set[str]:
    """All runs of 16 words."""
    words = text.split()
    return {" ".join(words[start : start + 16]) for start in range(len(words) - 15)}


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def prefixes(cache_dir, byte_tokenizer):
    return ensure_builtin(cache_dir, byte_tokenizer)


@pytest.fixture(scope="module")
def paths(prefixes) -> dict[str, Path]:
    return {split: prefix.parent.parent / f"{split}.jsonl.zst" for split, prefix in prefixes.items()}


@pytest.fixture(scope="module")
def records(paths) -> dict[str, list[dict]]:
    return {split: read(path) for split, path in paths.items()}


def size(records: list[dict], domain: str) -> int:
    return sum(
        len(record["text"].encode()) for record in records if record["meta"]["pile_set_name"] == domain
    )


def test_it_is_some_megabytes_of_code_and_a_good_share_of_prose(records):
    assert 4e6 < size(records["train"], "code") < 20e6
    assert size(records["train"], "prose") > 0.15 * size(records["train"], "code")
    assert {record["meta"]["pile_set_name"] for record in records["train"]} == {"prose", "code"}


def test_validation_has_several_documents_of_both_domains(records):
    for domain in ("prose", "code"):
        documents = [r for r in records["valid"] if r["meta"]["pile_set_name"] == domain]
        assert len(documents) >= 8
        assert 0.02 < size(records["valid"], domain) / size(records["train"], domain) < 0.06


def test_it_holds_the_sources_and_the_documentation_of_this_python(records):
    texts = {record["text"] for split in records.values() for record in split}
    wrap = next(text for text in texts if text.startswith("Text wrapping and filling."))

    assert Path(textwrap.__file__).read_text(encoding="utf-8") in texts
    assert inspect.getdoc(textwrap.dedent) in wrap
    assert any('The "with" statement' in text and "with_stmt" in text for text in texts)


def test_no_text_occurs_twice(records):
    texts = [record["text"] for split in records.values() for record in split]

    assert len(texts) == len(set(texts))


def test_a_module_and_its_docstrings_are_on_the_same_side(records):
    sources = {split: {record["meta"]["source"] for record in part} for split, part in records.items()}

    assert not sources["train"] & sources["valid"]
    assert any(source.endswith(".py") for source in sources["valid"])
    assert any(":topic/" in source for source in sources["valid"])


def test_validation_shares_next_to_nothing_with_training(records):
    training = set().union(*(shingles(record["text"]) for record in records["train"]))
    found = [shingles(record["text"]) for record in records["valid"]]

    # Licence headers and a sentence here and there are all that recurs.
    assert sum(len(runs & training) for runs in found) < 0.01 * sum(len(runs) for runs in found)
    assert all(len(runs & training) <= 0.3 * len(runs) for runs in found)


def test_nothing_of_this_machine_is_in_it(records):
    for split in records.values():
        assert not any(str(Path(os.__file__).parent) in json.dumps(record) for record in split)


def test_files_that_exist_are_kept(paths):
    before = {split: path.stat().st_ino for split, path in paths.items()}

    again = write_builtin_corpus(paths["train"].parent)

    assert again == paths
    assert {split: path.stat().st_ino for split, path in paths.items()} == before


def test_it_is_prepared_once_for_a_tokenizer(cache_dir, prefixes, byte_tokenizer, records):
    before = {split: prefix.with_name(f"{split}.bin").stat().st_ino for split, prefix in prefixes.items()}

    assert ensure_builtin(cache_dir, byte_tokenizer) == prefixes

    after = {split: prefix.with_name(f"{split}.bin").stat().st_ino for split, prefix in prefixes.items()}
    assert after == before
    for split, prefix in prefixes.items():
        corpus = load_corpus(prefix)
        corpus.require_tokenizer(byte_tokenizer.identity)
        assert corpus.sidecar.n_documents == len(records[split])
        assert corpus.sidecar.n_bytes == size(records[split], "code") + size(records[split], "prose")


def test_two_tokenizers_have_their_own_copies_of_one_text(cache_dir, prefixes, world_tokenizer):
    other = ensure_builtin(cache_dir, world_tokenizer)

    assert other["valid"] != prefixes["valid"]
    assert load_corpus(other["valid"]).sidecar.n_bytes == load_corpus(prefixes["valid"]).sidecar.n_bytes


@pytest.fixture(scope="module")
def made_at_once(tmp_path_factory) -> Path:
    """A cache folder for which two other processes raced; each printed which file it found."""
    folder = tmp_path_factory.mktemp("race")
    program = (
        "import sys, pathlib; from rwkv_train.data.builtin import ensure_builtin;"
        "from rwkv_train.tokenizers import load_tokenizer;"
        "made = ensure_builtin(pathlib.Path(sys.argv[1]), load_tokenizer('bytes'))['valid'];"
        "print([made.with_name('valid' + end).stat().st_ino for end in ('.bin', '.idx')])"
    )
    # Other hashes of strings, so that sets and dicts are in another order.
    environment = os.environ | {"PYTHONHASHSEED": "12345"}
    command = [sys.executable, "-c", program, str(folder)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) for _ in range(2)]
    for name, process in zip("ab", processes, strict=True):
        (folder / name).write_bytes(process.communicate(timeout=120)[0])
        assert process.returncode == 0
    return folder


def test_two_processes_at_once_make_it_once(made_at_once):
    assert (made_at_once / "a").read_text() == (made_at_once / "b").read_text()
    assert not list(made_at_once.rglob("*.tmp"))


def test_it_is_the_same_every_time(made_at_once, records, prefixes):
    (valid,) = made_at_once.glob("*/*/valid.bin")

    assert valid.read_bytes() == prefixes["valid"].with_name("valid.bin").read_bytes()
    assert read(valid.parent.parent / "train.jsonl.zst") == records["train"]


def test_it_is_written_and_prepared_beside_a_prefix(tmp_path, byte_tokenizer, monkeypatch):
    monkeypatch.setattr("rwkv_train.data.builtin._modules", lambda root: ())  # the topics will do

    summaries = prepare_builtin(tmp_path / "corpus", byte_tokenizer)

    assert list(summaries) == ["train", "valid"]
    for split, summary in summaries.items():
        assert summary.prefix == tmp_path / f"corpus-{split}"
        records = read(tmp_path / f"corpus-{split}.jsonl.zst")
        assert load_corpus(summary.prefix).tokens_by_domain() == {
            "prose": size(records, "prose") + len(records)
        }
    with pytest.raises(DataError, match=r"corpus-train\.jsonl\.zst exists already"):
        prepare_builtin(tmp_path / "corpus", byte_tokenizer)
    prepare_builtin(tmp_path / "corpus", byte_tokenizer, overwrite=True)


def test_a_python_without_sources_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("rwkv_train.data.builtin.os.__file__", str(tmp_path / "nothing" / "os.py"))

    with pytest.raises(DataError, match="without the sources of its standard library"):
        write_builtin_corpus(tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".lock"]


def test_a_python_without_documentation_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)

    with pytest.raises(DataError, match="without its documentation"):
        write_builtin_corpus(tmp_path)


def test_a_cache_folder_that_cannot_be_written_is_refused(tmp_path, byte_tokenizer):
    (tmp_path / "file").touch()

    with pytest.raises(DataError, match=r"cannot write in the folder .*: Not a directory"):
        ensure_builtin(tmp_path / "file", byte_tokenizer)
