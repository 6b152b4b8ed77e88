"""Stopped at any point, a preparation goes on where it was and ends with the same files; nothing else gets mixed in."""

import json
import random
from pathlib import Path

import pytest
from filelock import FileLock

from rwkv_train.data.preparation.options import PrepareOptions
from rwkv_train.data.prepare import prepare_data
from rwkv_train.errors import DataError
from rwkv_train.tokenizers import load_tokenizer

WORDS = ["some", "few", "words", "that", "do", "repeat"]
OPTIONS = PrepareOptions(valid_fraction=0.3, dedup="minhash", shuffle=5, max_leak=0.5)


class Stop:
    """Interrupts the work after so many blocks."""

    def __init__(self, after: int) -> None:
        self.n_left, self.steps = after, []

    def begin(self, stage, n_bytes):
        pass

    def advance(self, n_bytes):
        self.steps.append(n_bytes)
        if self.n_left == 0:
            raise KeyboardInterrupt
        self.n_left -= 1


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr("rwkv_train.data.sources.lines.BLOCK_BYTES", 2_000)
    monkeypatch.setattr("rwkv_train.data.sources.lines._PIECE_BYTES", 500)


@pytest.fixture
def texts(tmp_path):
    chance = random.Random(0)
    paths = [tmp_path / "one.jsonl", tmp_path / "two.jsonl"]
    for path in paths:
        lines = [
            " ".join(chance.choices(["some", "few", "words", "that", "do", "repeat"], k=30))
            for _ in range(60)
        ]
        path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return paths


def prepare(texts, out, options=OPTIONS, **how):
    return prepare_data(texts, load_tokenizer("bytes"), out, options, **how)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def undisturbed(texts, tmp_path):
    prepare(texts, tmp_path / "undisturbed" / "out")
    return files(tmp_path / "undisturbed")


def interrupt(texts, out, after, **how):
    with pytest.raises(KeyboardInterrupt):
        prepare(texts, out, progress=Stop(after), **how)


@pytest.mark.parametrize("n_workers", [1, 2])
def test_interrupted_in_the_first_and_the_second_input_it_ends_the_same(
    texts, tmp_path, undisturbed, n_workers
):
    out = tmp_path / "new" / "out"
    interrupt(texts, out, 3)
    interrupt(texts, out, 5)

    last = Stop(-1)
    prepare(texts, out, workers=n_workers, progress=last)

    assert files(out.parent) == undisturbed
    assert last.steps[0] > texts[0].stat().st_size // 2  # what was done before is not done again
    assert sum(last.steps) == sum(path.stat().st_size for path in texts)


def test_what_is_beyond_the_journal_does_not_count(texts, tmp_path, undisturbed):
    out = tmp_path / "new" / "out"
    interrupt(texts, out, 4)
    for name in ("tokens", "records", "signatures"):
        with (out.parent / "out.unfinished" / name).open("ab") as file:
            file.write(b"half a block that was written when the power went")

    prepare(texts, out)

    assert files(out.parent) == undisturbed


@pytest.mark.parametrize("n_moved", range(9))
def test_killed_while_the_files_move_it_ends_the_same(texts, tmp_path, undisturbed, n_moved, monkeypatch):
    out = tmp_path / "new" / "out"
    replace, moved = Path.replace, []

    def stop(source, target):
        if source.parent.name == "out.unfinished" and Path(target).parent == out.parent:
            if len(moved) == n_moved:
                raise KeyboardInterrupt
            moved.append(target)
        return replace(source, target)

    monkeypatch.setattr(Path, "replace", stop)
    if n_moved < 8:
        with pytest.raises(KeyboardInterrupt):
            prepare(texts, out)
        assert not (out.parent / "out-train.idx").exists() or n_moved > 6
    monkeypatch.undo()
    monkeypatch.setattr("rwkv_train.data.sources.lines.BLOCK_BYTES", 2_000)
    prepare(texts, out)

    assert files(out.parent) == undisturbed


def test_a_change_of_what_is_chosen_goes_on_with_the_tokens_that_are_done(texts, tmp_path):
    interrupt(texts, tmp_path / "a" / "out", 6)
    told = Stop(-1)
    prepare(texts, tmp_path / "a" / "out", OPTIONS._replace(valid_fraction=0.4), progress=told)
    prepare(texts, tmp_path / "b" / "out", OPTIONS._replace(valid_fraction=0.4))

    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert told.steps[0] > 0


def test_a_bad_line_can_be_skipped_without_doing_it_all_again(texts, tmp_path):
    with texts[1].open("a") as file:
        file.write("oops\n")
    with pytest.raises(DataError, match="line 61: not JSON"):
        prepare(texts, tmp_path / "a" / "out")
    told = Stop(-1)
    prepare(texts, tmp_path / "a" / "out", OPTIONS._replace(skip_bad=True), progress=told)
    prepare(texts, tmp_path / "b" / "out", OPTIONS._replace(skip_bad=True))

    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert told.steps[0] > texts[0].stat().st_size


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("input", "inputs was"),
        ("fewer", "inputs was"),
        ("tokenizer", "tokenizer was"),
        ("dedup", "options.signatures was True, is False"),
    ],
)
def test_unfinished_work_of_something_else_is_refused_and_replaced_only_when_asked(
    texts, tmp_path, change, sentence
):
    out = tmp_path / "new" / "out"
    interrupt(texts, out, 4)
    tokenizer, options = load_tokenizer("bytes"), OPTIONS
    if change == "input":
        texts[0].write_bytes(texts[0].read_bytes() + b'{"text": "more"}\n')
    elif change == "fewer":
        texts = texts[:1]
    elif change == "tokenizer":
        tokenizer = load_tokenizer("world")
    else:
        options = OPTIONS._replace(dedup="exact")

    with pytest.raises(
        DataError, match=rf"holds an unfinished preparation of other things: {sentence}.*--overwrite"
    ):
        prepare_data(texts, tokenizer, out, options)

    prepare_data(texts, tokenizer, out, options, overwrite=True)
    prepare_data(texts, tokenizer, tmp_path / "fresh" / "out", options)
    assert files(out.parent) == files(tmp_path / "fresh")


def test_two_at_once_are_refused(texts, tmp_path):
    out = tmp_path / "out"
    interrupt(texts, out, 4)

    with (
        FileLock(tmp_path / "out.unfinished" / ".lock"),
        pytest.raises(DataError, match="is being prepared by another process"),
    ):
        prepare(texts, out)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda folder: (folder / "journal.json").write_bytes(b"{"), "is not the journal of an unfinished"),
        (
            lambda folder: (folder / "journal.json").write_bytes(b'{"format": "x"}'),
            "it is of another version",
        ),
        (lambda folder: (folder / "records").write_bytes(b""), "records is cut off"),
    ],
    ids=["cut off", "version", "records"],
)
def test_damaged_unfinished_work_is_refused(texts, tmp_path, damage, sentence):
    interrupt(texts, tmp_path / "out", 4)
    damage(tmp_path / "out.unfinished")

    with pytest.raises(DataError, match=sentence):
        prepare(texts, tmp_path / "out")
