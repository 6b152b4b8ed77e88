import os
import weakref

import pytest
import torch

from rwkv_train.checkpoints import (
    Weights,
    convert,
    read_weights,
    save_training_checkpoint,
    tensor_files,
    writing,
)
from rwkv_train.checkpoints.tensor_source import TensorSource
from rwkv_train.config.model import LoraRanks, Rwkv7Config
from rwkv_train.errors import CheckpointError
from rwkv_train.models.registry import build_model

ARCHES = ["rwkv4", "rwkv5.0", "rwkv5.1", "rwkv5.2", "rwkv6", "rwkv7"]
UNUSED = {"blocks.0.att.v0", "blocks.0.att.v1", "blocks.0.att.v2"}


def names_in(folder):
    return sorted(entry.name for entry in folder.iterdir())


def assert_same_bits(read, written):
    assert list(read) == list(written)
    for name, tensor in written.items():
        assert read[name].dtype == tensor.dtype
        # As bytes: tensors that compare equal may still differ in the sign of zero.
        assert read[name].contiguous().view(torch.uint8).equal(tensor.contiguous().view(torch.uint8)), name


@pytest.fixture
def source(tmp_path, tensors_of):
    torch.save(tensors_of("rwkv7"), tmp_path / "source.pth")
    return tmp_path / "source.pth"


@pytest.mark.parametrize(
    ("via", "arch"),
    [
        *((via, arch) for via in ("safetensors", "hf") for arch in ARCHES),
        ("hf-remote", "rwkv5.2"),
        ("hf-remote", "rwkv6"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_there_and_back_every_bit_is_the_same(tmp_path, tensors_of, via, arch, dtype):
    tensors = tensors_of(arch, dtype=dtype)
    tensors["head.weight"][0, 0] = -0.0
    torch.save(tensors, tmp_path / "a.pth")
    convert(tmp_path / "a.pth", tmp_path / "b", via)
    written = convert(tmp_path / "b", tmp_path / "c.pth", "pth")
    back = torch.load(tmp_path / "c.pth", weights_only=True)
    # Hugging Face's layout has no place for them.
    expected = {
        name: tensor for name, tensor in tensors.items() if via == "safetensors" or name not in UNUSED
    }
    assert back.keys() == expected.keys()
    assert_same_bits({name: back[name] for name in expected}, expected)
    size_bytes = (tmp_path / "c.pth").stat().st_size
    assert written == (tmp_path / "c.pth", "pth", arch.split(".")[0], len(expected), size_bytes, True)


@pytest.mark.parametrize("has_them", [True, False], ids=["source-has-them", "source-lacks-them"])
@pytest.mark.parametrize("to", ["pth", "safetensors"])
def test_unused_tensors_are_written_or_left_out_as_asked(tmp_path, tensors_of, has_them, to):
    tensors = tensors_of("rwkv7")
    used = {name: tensor for name, tensor in tensors.items() if name not in UNUSED}
    torch.save(tensors if has_them else used, tmp_path / "a.pth")
    zeros = {name: tensor if name in used else torch.zeros_like(tensor) for name, tensor in tensors.items()}
    expected = {
        "keep": tensors if has_them else used,
        "drop": used,
        "fill": tensors if has_them else zeros,
    }
    for v7_block0, wanted in expected.items():
        written = convert(tmp_path / "a.pth", tmp_path / v7_block0, to, v7_block0=v7_block0)
        assert written.n_tensors == len(wanted)
        convert(written.path, tmp_path / "back.pth", "pth", overwrite=True)
        read = torch.load(tmp_path / "back.pth", weights_only=True)
        assert read.keys() == wanted.keys()
        assert_same_bits({name: read[name] for name in wanted}, wanted)


def test_a_training_checkpoint_becomes_an_official_file(tmp_path, training_state):
    state = training_state(5)
    save_training_checkpoint(tmp_path / "run", state.manifest, state.parameters())
    convert(tmp_path / "run", tmp_path / "x.pth", "pth", dtype=torch.bfloat16)
    read = torch.load(tmp_path / "x.pth", weights_only=True)
    assert_same_bits({n: read[n] for n in state.weights}, {n: t.bfloat16() for n, t in state.weights.items()})


def test_a_file_whose_embedding_and_head_are_tied_is_converted(tmp_path, tensors_of):
    tensors = tensors_of("rwkv4")
    tensors["head.weight"] = tensors["emb.weight"]
    torch.save(tensors, tmp_path / "tied.pth")
    convert(tmp_path / "tied.pth", tmp_path / "x", "safetensors")
    read = read_weights(tmp_path / "x").tensors
    assert_same_bits({name: read[name] for name in tensors}, tensors)


def test_a_legacy_file_is_converted(tmp_path, tensors_of):
    torch.save(tensors_of("rwkv4"), tmp_path / "old", _use_new_zipfile_serialization=False)
    convert(tmp_path / "old", tmp_path / "new", "pth")
    read = torch.load(tmp_path / "new", weights_only=True, mmap=True)
    assert_same_bits({n: read[n] for n in tensors_of("rwkv4")}, tensors_of("rwkv4"))


@pytest.mark.parametrize("to", ["pth", "safetensors"])
def test_what_is_there_is_replaced_only_when_asked(tmp_path, source, tensors_of, to):
    target = convert(source, tmp_path / "x", to).path
    torch.save(tensors_of("rwkv4"), tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="x is already there"):
        convert(tmp_path / "other.pth", target, to)
    assert read_weights(target).config.arch == "rwkv7"
    convert(tmp_path / "other.pth", target, to, overwrite=True)
    assert read_weights(target).config.arch == "rwkv4"
    assert names_in(tmp_path) == ["other.pth", "source.pth", "x"]


def test_a_file_may_be_rewritten_in_place(source, tensors_of):
    convert(source, source, "pth", dtype=torch.bfloat16, overwrite=True)
    read = torch.load(source, weights_only=True)
    assert_same_bits(
        {n: read[n] for n in tensors_of("rwkv7")}, {n: t.bfloat16() for n, t in tensors_of("rwkv7").items()}
    )


def test_a_folder_of_anything_else_is_never_replaced(tmp_path, source):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letters").write_text("dear")
    with pytest.raises(CheckpointError, match="home is not replaced"):
        convert(source, tmp_path / "home", "safetensors", overwrite=True)
    with pytest.raises(CheckpointError, match="home is a folder"):
        convert(source, tmp_path / "home", "pth", overwrite=True)
    assert (tmp_path / "home" / "letters").read_text() == "dear"


def test_a_folder_with_a_folder_named_like_a_file_of_a_model_is_never_replaced(tmp_path, source):
    (tmp_path / "folder" / "model.safetensors").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="no folder of just a model's files"):
        convert(source, tmp_path / "folder", "safetensors", overwrite=True)


@pytest.mark.parametrize("to", ["pth", "safetensors"])
def test_what_is_neither_file_nor_folder_is_never_replaced(tmp_path, source, to):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="pipe is not replaced"):
        convert(source, tmp_path / "pipe", to, overwrite=True)
    assert (tmp_path / "pipe").is_fifo()


@pytest.mark.parametrize("to", ["pth", "safetensors"])
def test_a_target_in_the_home_of_nobody_is_refused(source, to):
    with pytest.raises(CheckpointError, match="no such home folder"):
        convert(source, "~nobody-of-this-name/x", to)


def test_a_refused_model_is_not_commented_on_before(tmp_path, tensors_of, caplog):
    torch.save(tensors_of("rwkv4"), tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="'hf-remote' is for"):
        convert(tmp_path / "a.pth", tmp_path / "b", "hf-remote")
    assert not caplog.records


def test_a_file_is_never_replaced_by_a_folder(tmp_path, source):
    with pytest.raises(CheckpointError, match=r"source.pth is not replaced"):
        convert(source, source, "safetensors", overwrite=True)
    assert read_weights(source).config.arch == "rwkv7"


def test_a_link_is_a_thing_that_is_there(tmp_path, source):
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(CheckpointError, match="link is already there"):
        convert(source, tmp_path / "link", "pth")
    assert not (tmp_path / "gone").exists()


def test_a_link_is_read_and_written_through(tmp_path, source):
    (tmp_path / "disk").mkdir()
    (tmp_path / "from").symlink_to(source)
    (tmp_path / "to").symlink_to(tmp_path / "disk")
    convert(tmp_path / "from", tmp_path / "to" / "x.pth", "pth")
    assert names_in(tmp_path / "disk") == ["x.pth"]


@pytest.mark.parametrize("dry_run", [True, False], ids=["dry-run", "write"])
@pytest.mark.parametrize("to", ["pth", "safetensors"])
def test_a_file_in_the_place_of_a_folder_is_refused(tmp_path, source, to, dry_run):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"cannot be written: Not a directory \(.*file\)"):
        convert(source, tmp_path / "file" / "folder" / "x", to, dry_run=dry_run)


@pytest.mark.skipif(
    os.name == "nt" or os.geteuid() == 0, reason="needs a user whom permissions bind, not root"
)
@pytest.mark.parametrize("to", ["pth", "safetensors"])
def test_a_folder_without_write_permission_is_refused(tmp_path, source, to):
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(CheckpointError, match="cannot be written: Permission denied"):
        convert(source, tmp_path / "locked" / "x", to)


@pytest.mark.parametrize("to", ["pth", "safetensors"])
def test_a_write_that_does_not_read_back_is_refused_and_the_old_one_stays(tmp_path, source, monkeypatch, to):
    target = convert(source, tmp_path / "x", to).path

    def flip_a_bit(read):
        def read_and_flip(*where):
            tensors = {name: tensor.clone() for name, tensor in read(*where).items()}
            tensors["head.weight"].view(torch.int32)[5, 5] ^= 1
            return TensorSource.of(tensors)

        return read_and_flip

    other = read_weights(target)._replace(step=3)
    name = "read_pth" if to == "pth" else "TensorFiles"
    monkeypatch.setattr(writing, name, flip_a_bit(getattr(writing, name)))
    with pytest.raises(CheckpointError, match=r"x: tensor 'head.weight' does not read back"):
        writing.write_weights(target, other, to, overwrite=True)
    assert names_in(tmp_path) == ["source.pth", "x"]
    assert read_weights(target).config.arch == "rwkv7"


@pytest.mark.parametrize("to", ["pth", "safetensors"])
def test_a_conversion_killed_at_any_moment_leaves_nothing_that_can_be_read_but_the_whole(
    tmp_path, source, tensors_of, die_after, killed, to
):
    target = tmp_path / "x"
    for n in range(40):
        try:
            with die_after(n):
                convert(source, target, to)
        except killed:
            if target.exists():
                assert_same_bits(
                    {name: read_weights(target).tensors[name] for name in tensors_of("rwkv7")},
                    tensors_of("rwkv7"),
                )
                target.rename(tmp_path / f"complete-{n}")
        else:
            break
    assert 3 < n < 39
    assert not [name for name in names_in(tmp_path) if name.startswith(".")]


def test_an_unknown_format_is_refused(tmp_path, source):
    with pytest.raises(ValueError, match="must be one of pth, safetensors, hf, hf-remote, gguf"):
        convert(source, tmp_path / "x", "onnx")
    with pytest.raises(ValueError, match=r"source_format \('onnx'\) must be one of None, pth, safetensors"):
        convert(source, tmp_path / "x", "pth", source_format="onnx")
    with pytest.raises(ValueError, match=r"v7_block0 \('all'\) must be one of keep, drop, fill"):
        convert(source, tmp_path / "x", "pth", v7_block0="all")


def test_a_dtype_that_is_not_read_is_not_written(tmp_path, source):
    with pytest.raises(ValueError, match=r"torch.float64"):
        convert(source, tmp_path / "x", "pth", dtype=torch.float64)
    with pytest.raises(
        ValueError, match=r"dtype \(q8_0\) of format 'pth' must be one of torch.bfloat16, torch.float16"
    ):
        convert(source, tmp_path / "x", "pth", dtype="q8_0")


@pytest.mark.parametrize(("to", "v7_block0"), [("hf", "fill"), ("gguf", "drop"), ("gguf", "fill")])
def test_a_format_with_no_choice_about_unused_tensors_offers_none(tmp_path, source, to, v7_block0):
    with pytest.raises(CheckpointError, match=f"v7_block0 is '{v7_block0}', but the format '{to}'"):
        convert(source, tmp_path / "x", to, v7_block0=v7_block0)


def test_a_source_is_what_it_is_said_to_be_or_refused(tmp_path, source):
    convert(source, tmp_path / "a", "safetensors", source_format="pth")
    with pytest.raises(CheckpointError, match=r"found safetensors folder, wanted official \.pth"):
        convert(tmp_path / "a", tmp_path / "b", "pth", source_format="pth")
    assert names_in(tmp_path) == ["a", "source.pth"]


@pytest.mark.parametrize("to", ["pth", "safetensors"])
def test_a_dry_run_says_what_would_be_written_and_writes_nothing(tmp_path, source, tensors_of, to):
    would = convert(source, tmp_path / "x", to, dtype=torch.bfloat16, dry_run=True)
    weights_bytes = 2 * sum(tensor.numel() for tensor in tensors_of("rwkv7").values())
    assert would == (tmp_path / "x", to, "rwkv7", len(tensors_of("rwkv7")), weights_bytes, False)
    assert names_in(tmp_path) == ["source.pth"]


def test_a_dry_run_refuses_what_a_conversion_would(tmp_path, source):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letters").write_text("dear")
    with pytest.raises(CheckpointError, match="home is not replaced"):
        convert(source, tmp_path / "home", "safetensors", overwrite=True, dry_run=True)
    with pytest.raises(CheckpointError, match=r"source.pth is already there"):
        convert(source, source, "pth", dry_run=True)


def test_a_large_model_becomes_several_files_that_are_read_as_one(tmp_path, source, tensors_of, monkeypatch):
    monkeypatch.setattr(tensor_files, "MAX_FILE_BYTES", 20_000)
    folder = convert(source, tmp_path / "x", "safetensors").path
    names = names_in(folder)
    assert names[0] == "config.json"
    assert names[-1] == "model.safetensors.index.json"
    assert len(names) > 4
    back = convert(folder, tmp_path / "back.pth", "pth").path
    read = torch.load(back, weights_only=True)
    assert_same_bits({name: read[name] for name in tensors_of("rwkv7")}, tensors_of("rwkv7"))
    (folder / names[2]).unlink()
    with pytest.raises(CheckpointError, match=f"{names[2]} cannot be read: No such file"):
        read_weights(folder)
    convert(source, folder, "safetensors", overwrite=True)  # a folder in several files may be replaced too


def test_a_conversion_holds_one_tensor_at_a_time(tmp_path, source, monkeypatch):
    alive, most = set(), 0

    def counting(self, name):
        nonlocal most
        tensor = read(self, name).clone()
        key = object()
        alive.add(key)
        weakref.finalize(tensor, alive.discard, key)
        most = max(most, len(alive))
        return tensor

    read = TensorSource.__getitem__
    monkeypatch.setattr(TensorSource, "__getitem__", counting)
    for to in ("safetensors", "pth"):
        convert(source, tmp_path / to, to, dtype=torch.bfloat16)
    # A tensor in two dtypes, the one before it until its name is taken, and while comparing what was read back.
    assert 1 <= most <= 6


@pytest.mark.parametrize("arch", ["rwkv5.2", "rwkv6"])
def test_a_setting_that_bare_weights_cannot_tell_is_refused(tmp_path, tensors_of, config_of, arch):
    config = config_of(arch).model_copy(update={"head_size_divisor": 1.0})
    weights = Weights(config, tensors_of(arch), None, None)
    with pytest.raises(CheckpointError, match=r"takes head_size_divisor to be 8\.0; this model has 1\.0"):
        writing.write_weights(tmp_path / "x.pth", weights, "pth")
    folder = writing.write_weights(tmp_path / "x", weights, "safetensors")
    assert read_weights(folder).config.head_size_divisor == 1.0


def test_a_one_layer_model_without_unused_tensors_is_written(tmp_path):
    model = build_model(
        Rwkv7Config(n_layer=1, n_embd=64, vocab_size=20, lora_ranks=LoraRanks(w=3, a=4, v=5, g=6))
    )
    weights = Weights(model.config, model.state_dict(), None, None)
    path = writing.write_weights(tmp_path / "x.pth", weights, "pth", v7_block0="drop")
    assert read_weights(path).absent == UNUSED


@pytest.mark.parametrize("v7_block0", ["drop", "fill"])
def test_a_model_without_unused_tensors_offers_no_choice_about_them(tmp_path, tensors_of, v7_block0):
    torch.save(tensors_of("rwkv4"), tmp_path / "a.pth")
    with pytest.raises(
        CheckpointError, match=f"v7_block0 is '{v7_block0}', but every tensor of an rwkv4 is used"
    ):
        convert(tmp_path / "a.pth", tmp_path / "b", "safetensors", v7_block0=v7_block0)


def test_the_place_of_a_runs_checkpoint_is_no_target(tmp_path, source):
    with pytest.raises(CheckpointError, match=r"step-00000009 is the place of a run's own checkpoint"):
        convert(source, tmp_path / "checkpoints" / "step-00000009", "safetensors")


def test_a_folder_with_files_of_another_format_is_not_replaced(tmp_path, source):
    folder = convert(source, tmp_path / "x", "hf").path
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="x is not replaced"):
        convert(source, folder, "safetensors", overwrite=True)
    convert(source, folder, "hf", overwrite=True)


@pytest.mark.parametrize("to", ["pth", "safetensors"])
def test_what_came_there_meanwhile_is_not_replaced(tmp_path, source, monkeypatch, to):
    read_back = writing.require_same_bits

    def slow(target, *tensors):
        target.mkdir() if to == "safetensors" else target.write_text("of another")
        read_back(target, *tensors)

    monkeypatch.setattr(writing, "require_same_bits", slow)
    with pytest.raises(CheckpointError, match="x is already there"):
        convert(source, tmp_path / "x", to)
    assert names_in(tmp_path) == ["source.pth", "x"]
    assert (tmp_path / "x").is_dir() == (to == "safetensors")
