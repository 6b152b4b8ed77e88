"""Stopped at any point, a preparation goes on where it was and ends with the same files; nothing else gets mixed in."""

import json
import random
from pathlib import Path

import pytest
from filelock import FileLock

from rwkv_train.data.preparation.options import PrepareOptions
from rwkv_train.data.preparation.stored_documents import map_new
from rwkv_train.data.preparation.work_folder import WorkFolder
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


def interrupted(*_):
    raise KeyboardInterrupt


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
        if out.parent / "out.unfinished" in source.parents and Path(target).parent == out.parent:
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


@pytest.mark.parametrize("change", ["mended", "more", "fewer"])
def test_begun_anew_what_is_done_of_the_inputs_before_a_changed_one_is_kept(texts, tmp_path, change):
    out, told = tmp_path / "new" / "out", Stop(-1)
    whole = texts[1].read_bytes()
    texts[1].write_bytes(whole + b"oops\n")
    with pytest.raises(DataError, match=r"line 61: not JSON.*--overwrite"):
        prepare(texts, out)
    if change == "mended":
        texts[1].write_bytes(whole + b'{"text": "right"}\n')
    elif change == "more":
        texts = [texts[0], tmp_path / "three.jsonl"]
        texts[1].write_bytes(whole)
    else:
        texts = texts[:1]
    with pytest.raises(DataError, match="begin anew, which keeps what is done of the first 1"):
        prepare(texts, out)

    prepare(texts, out, overwrite=True, progress=told)
    prepare(texts, tmp_path / "fresh" / "out")

    assert files(out.parent) == files(tmp_path / "fresh")
    assert told.steps[0] == texts[0].stat().st_size


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


def test_files_of_an_attempt_that_chose_otherwise_are_not_taken(texts, tmp_path, monkeypatch):
    options, out = PrepareOptions(), tmp_path / "new" / "out"
    with monkeypatch.context() as patch:
        patch.setattr(WorkFolder, "begin_placing", interrupted)
        with pytest.raises(KeyboardInterrupt):  # all is written, and does not count yet
            prepare(texts, out, options._replace(shuffle=1))

    prepare(texts, out, options)
    prepare(texts, tmp_path / "fresh" / "out", options)

    assert files(out.parent) == files(tmp_path / "fresh")


def test_begun_anew_and_killed_at_once_nothing_of_the_old_work_counts(texts, tmp_path, monkeypatch):
    out, options = tmp_path / "new" / "out", PrepareOptions()
    interrupt(texts, out, 1, options=options)
    save, n_saved = WorkFolder.save, []

    def save_once(folder):  # when it is opened; the kill comes before the next one
        n_saved.append(1)
        if len(n_saved) == 1:
            save(folder)

    with monkeypatch.context() as patch:
        patch.setattr(WorkFolder, "save", save_once)
        interrupt(texts[::-1], out, 4, options=options, overwrite=True)
    with pytest.raises(DataError, match="unfinished preparation of other things"):
        prepare(texts, out, options)

    prepare(texts[::-1], out, options)
    prepare(texts[::-1], tmp_path / "fresh" / "out", options)

    assert files(out.parent) == files(tmp_path / "fresh")


def test_a_folder_that_holds_the_output_is_still_the_same_input(texts, tmp_path):
    out = tmp_path / "out"
    interrupt([tmp_path], out, 4, options=PrepareOptions())
    prepare([tmp_path], out, PrepareOptions())
    prepare([tmp_path], tmp_path / "elsewhere" / "out", PrepareOptions())

    assert out.with_suffix(".bin").read_bytes() == (tmp_path / "elsewhere" / "out.bin").read_bytes()


def test_what_is_left_to_move_is_found_from_another_folder(texts, tmp_path, undisturbed, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("rwkv_train.data.prepare.place", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare(texts, Path("new/out"))
    monkeypatch.chdir(tmp_path / "new")

    prepare(texts, Path("out"))

    assert files(tmp_path / "new") == undisturbed


def test_a_file_that_appeared_meanwhile_is_not_replaced(texts, tmp_path):
    class Neighbour(Stop):
        def begin(self, stage, n_bytes):
            if stage == "writing":
                (tmp_path / "new" / "out-valid.json").write_text("theirs")

    with pytest.raises(DataError, match=r"out-valid\.json exists already"):
        prepare(texts, tmp_path / "new" / "out", progress=Neighbour(-1))

    assert (tmp_path / "new" / "out-valid.json").read_text() == "theirs"


def test_files_to_be_mapped_have_their_space_before_they_are(tmp_path):
    array = map_new(tmp_path / "x", "<i8", 1_000_001)

    assert array.shape == (1_000_001,)
    assert not array.any()
    assert (tmp_path / "x").stat().st_blocks * 512 >= 8 * 1_000_001


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
        (
            lambda folder: (folder / "journal.json").write_text(
                (folder / "journal.json").read_text().replace('"n_documents": ', '"n_documents": 1')
            ),
            "it is damaged",
        ),
        (lambda folder: (folder / "records").write_bytes(b""), "records is cut off"),
    ],
    ids=["cut off", "version", "number", "records"],
)
def test_damaged_unfinished_work_is_refused(texts, tmp_path, damage, sentence):
    interrupt(texts, tmp_path / "out", 4)
    damage(tmp_path / "out.unfinished")

    with pytest.raises(DataError, match=sentence):
        prepare(texts, tmp_path / "out")
