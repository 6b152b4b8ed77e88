"""Against real folders: each is written by a run of DeepSpeed on CPU, which tells what its weights were."""

import logging
import os
import re
import shutil
import subprocess
import sys
from collections import OrderedDict
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from rwkv_train.checkpoints import convert, locate_checkpoint, read_weights
from rwkv_train.checkpoints.deepspeed_folder import read_deepspeed_folder
from rwkv_train.checkpoints.formats import Format, recognize_format
from rwkv_train.checkpoints.infer import expected_shapes
from rwkv_train.config.model import LoraRanks, Rwkv7Config
from rwkv_train.errors import CheckpointError
from tests import forks

HERE = Path(__file__).parent
WORLD_SIZES = pytest.mark.parametrize("world_size", [1, 2, 3])
STAGES = pytest.mark.parametrize("stage", [1, 2, 3])
DTYPES = pytest.mark.parametrize("dtype", ["fp32", "bf16"])


def run_together(lines, log):
    """Run scripts that need each other, each in a process; none of them stays."""
    logs = [log.with_name(f"{log.name}-{rank}.log") for rank in range(len(lines))]
    processes = [
        forks.start(line, path, {"OMP_NUM_THREADS": "1"}) for line, path in zip(lines, logs, strict=True)
    ]
    codes = forks.end(processes, 300)
    assert not any(codes), "\n".join([str(codes), *(path.read_text()[-3000:] for path in logs)])


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A model before training: a file of weights of odd sizes, so that every cut needs padding."""
    if find_spec("deepspeed") is None:
        pytest.skip("needs DeepSpeed, which is installed on Linux alone")
    generator = torch.Generator().manual_seed(0)
    path = tmp_path_factory.mktemp("start") / "weights.pth"
    shapes = expected_shapes(
        Rwkv7Config(
            n_layer=2,
            n_embd=15,
            head_size=5,
            vocab_size=7,
            ctx_len=16,
            lora_ranks=LoraRanks(w=1, a=3, v=5, g=7),
        )
    )
    torch.save({name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}, path)
    return path


@pytest.fixture(scope="module")
def saved(tmp_path_factory, start):
    """World size -> folder of what runs of that many processes saved."""
    folders = {}

    def get(world_size):
        if world_size not in folders:
            out = tmp_path_factory.mktemp(f"world{world_size}")
            writer = [HERE / "deepspeed_writer.py", start, out]
            run_together([[*writer, rank, world_size] for rank in range(world_size)], out)
            folders[world_size] = out
        return folders[world_size]

    return get


@pytest.fixture(scope="module")
def saved_by_lightning(tmp_path_factory, start):
    out = tmp_path_factory.mktemp("lightning")
    run_together([[HERE / "lightning_writer.py", start, out]], out)
    return out


@pytest.fixture
def copy_of(tmp_path, saved):
    """A copy of a checkpoint that a test may damage."""

    def make(world_size, kind):
        return Path(shutil.copytree(saved(world_size) / kind, tmp_path / kind))

    return make


def load(path):
    return torch.load(path, weights_only=True)


def in_float32(tensors):
    """DeepSpeed's converter leaves frozen parameters in bfloat16."""
    return {name: tensor.detach().float() for name, tensor in tensors.items()}


def assert_same(read, expected):
    for name, tensor in expected.items():
        torch.testing.assert_close(read[name], tensor, rtol=0, atol=0, msg=name)


@WORLD_SIZES
@STAGES
@DTYPES
def test_the_masters_are_those_of_the_running_engine(saved, start, world_size, stage, dtype):
    kind = saved(world_size) / f"zero{stage}-{dtype}"
    weights = read_weights(kind)
    truth = load(kind.with_name(f"{kind.name}.truth.pth"))
    assert_same(weights.tensors, truth)
    initial = load(start)
    assert weights.tensors.keys() == initial.keys() == truth.keys() | {"ln_out.bias"}
    frozen = initial["ln_out.bias"]
    assert_same(weights.tensors, {"ln_out.bias": frozen.bfloat16().float() if dtype == "bf16" else frozen})
    assert {tensor.dtype for tensor in weights.tensors.values()} == {torch.float32}
    assert not any(tensor.requires_grad for tensor in weights.tensors.values())
    assert weights.step == 3
    # The run has changed them, and a bfloat16 copy would not do.
    assert not truth["emb.weight"].equal(initial["emb.weight"])
    assert not truth["emb.weight"].equal(truth["emb.weight"].bfloat16().float())


@WORLD_SIZES
@STAGES
@DTYPES
def test_deepspeeds_own_converter_says_the_same(saved, world_size, stage, dtype):
    kind = saved(world_size) / f"zero{stage}-{dtype}"
    converted = load(kind.with_name(f"{kind.name}.converted.pth"))
    assert len(converted) > 50
    assert_same(read_weights(kind).tensors, in_float32(converted))


@WORLD_SIZES
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_second_names_buffers_and_frozen_parameters_are_there(saved, world_size, stage):
    kind = saved(world_size) / f"odd{stage}"
    tensors, _ = read_deepspeed_folder(kind)
    assert_same(tensors, load(kind.with_name(f"{kind.name}.truth.pth")))
    assert_same(tensors, in_float32(load(kind.with_name(f"{kind.name}.converted.pth"))))
    assert tensors.keys() == {"emb.weight", "head.weight", "frozen", "one", "last", "buffer"}
    assert tensors["head.weight"].equal(tensors["emb.weight"])
    assert tensors["buffer"].equal(torch.arange(4.0))
    generator = torch.Generator().manual_seed(1)
    frozen = [torch.randn(shape, generator=generator) for shape in [(5, 3), (5, 3), (3, 5)]][-1]
    assert tensors["frozen"].equal(frozen.bfloat16().float())


def test_a_folder_without_the_places_of_pieces_is_read_too(saved):
    truth = load(saved(3) / "zero2-fp32.truth.pth")
    assert_same(read_weights(saved(3) / "old2-fp32").tensors, truth)


def test_without_zero_the_weights_of_the_module_are_taken(saved, caplog):
    # ZeRO changes how Adam's row is cut, not what it computes.
    truth = load(saved(1) / "zero1-fp32.truth.pth")
    with caplog.at_level(logging.WARNING):
        tensors = read_weights(saved(1) / "zero0-fp32").tensors
    assert not caplog.records
    for name, tensor in truth.items():
        torch.testing.assert_close(tensors[name], tensor, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["zero0-bf16", "zero2-bf16"])
def test_a_folder_without_masters_gives_rounded_weights_and_says_so(copy_of, caplog, kind):
    folder = copy_of(2, kind)
    for path in folder.glob("*/*_optim_states.pt"):
        path.unlink()
    with caplog.at_level(logging.WARNING):
        tensors = read_weights(folder).tensors
    assert "some-tag has no float32 master weights under names" in caplog.text
    module = load(folder / "some-tag" / "mp_rank_00_model_states.pt")["module"]
    assert {tensor.dtype for tensor in module.values()} == {torch.bfloat16}
    assert_same(tensors, module)


def test_zero3_without_optimizer_states_is_refused(copy_of):
    folder = copy_of(2, "zero3-bf16")
    for path in folder.glob("*/*_optim_states.pt"):
        path.unlink()
    with pytest.raises(CheckpointError, match=r"some-tag lacks the files \*_optim_states.pt, .* ZeRO 3"):
        read_weights(folder)


def test_the_folder_of_a_tag_is_a_checkpoint_too(saved):
    folder = saved(2) / "zero3-fp32"
    assert recognize_format(folder) is recognize_format(folder / "some-tag") is Format.DEEPSPEED_FOLDER
    assert locate_checkpoint(folder).format is Format.DEEPSPEED_FOLDER
    assert_same(read_weights(folder / "some-tag").tensors, read_weights(folder).tensors)


def test_it_is_converted_to_an_official_file(saved, tmp_path):
    convert(saved(3) / "zero3-bf16", tmp_path / "x.pth", "pth")
    assert_same(load(tmp_path / "x.pth"), load(saved(3) / "zero3-bf16.truth.pth"))


@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_a_folder_of_lightnings_strategy_is_read(saved_by_lightning, name):
    folder = saved_by_lightning / f"{name}.ckpt"
    assert (folder / "latest").read_text() == "checkpoint"
    weights = read_weights(folder)
    assert_same(weights.tensors, load(saved_by_lightning / f"{name}.truth.pth"))
    assert weights.step == 3


def test_a_ckpt_of_lightning_is_read(saved_by_lightning):
    path = saved_by_lightning / "plain.ckpt"
    assert recognize_format(path) is Format.LIGHTNING_CKPT
    weights = read_weights(path)
    assert_same(weights.tensors, load(saved_by_lightning / "plain.truth.pth"))
    assert weights.step == 3


def test_reading_imports_neither_deepspeed_nor_lightning(saved):
    program = (
        "import sys; from rwkv_train.checkpoints import read_weights; read_weights(sys.argv[1]); "
        "assert not {'deepspeed', 'lightning'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", program, str(saved(2) / "zero2-bf16")], check=True)


@pytest.mark.parametrize("kind", ["zero2-fp32", "zero3-bf16"])
def test_a_missing_file_of_any_process_is_named(copy_of, kind):
    tag = copy_of(3, kind) / "some-tag"
    names = sorted(path.name for path in tag.iterdir())
    assert len(names) == (4 if kind == "zero2-fp32" else 6)
    for name in names:
        (tag / name).rename(tag / "gone")
        expected = rf"{tag / name} is missing; .* 3 processes|such as {name}"
        with pytest.raises(CheckpointError, match=expected):
            read_weights(tag)
        (tag / "gone").rename(tag / name)
    read_weights(tag)


@pytest.mark.parametrize("kind", ["zero2-fp32", "zero3-bf16"])
def test_a_truncated_or_flipped_file_of_any_process_is_named(copy_of, kind):
    tag = copy_of(2, kind) / "some-tag"
    for path in sorted(tag.iterdir()):
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(CheckpointError, match=rf"{path} is truncated or damaged"):
            read_weights(tag)
        flipped = bytearray(whole)
        flipped[whole.index(b"module" if "model" in path.name else b"loss_scaler")] ^= 1
        path.write_bytes(flipped)
        with pytest.raises(CheckpointError, match=rf"{path} is truncated or damaged"):
            read_weights(tag)
        path.write_bytes(whole)


@pytest.mark.parametrize("kind", ["zero1-fp32", "zero3-fp32"])
def test_files_of_two_world_sizes_are_refused(copy_of, saved, kind):
    tag = copy_of(3, kind) / "some-tag"
    name = "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    shutil.copy(saved(2) / kind / "some-tag" / name, tag / name)
    with pytest.raises(
        CheckpointError, match=rf"{name} is of a world size of 2, .* of 3; .* two checkpoints"
    ):
        read_weights(tag)
    for path in (saved(2) / kind / "some-tag").iterdir():
        shutil.copy(path, tag / path.name)
    with pytest.raises(CheckpointError, match=r"rank_2_mp_rank_00_optim_states.pt is of a world size of 3"):
        read_weights(tag)
    (tag / "zero_pp_rank_2_mp_rank_00_optim_states.pt").unlink()
    if kind == "zero3-fp32":
        with pytest.raises(CheckpointError, match=r"rank_2_.*model_states.pt is of another checkpoint"):
            read_weights(tag)


def test_files_of_two_steps_are_refused(copy_of):
    tag = copy_of(2, "zero3-fp32") / "some-tag"
    path = tag / "zero_pp_rank_1_mp_rank_00_model_states.pt"
    torch.save(load(path) | {"global_steps": 2}, path)
    with pytest.raises(CheckpointError, match=rf"{path} was written at step 2, .* of 3; .* two checkpoints"):
        read_weights(tag)


def test_files_of_two_runs_are_refused(copy_of):
    tag = copy_of(2, "zero2-fp32") / "some-tag"
    path = tag / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    shutil.copy(path, path.with_name(f"bf16_{path.name}"))
    with pytest.raises(CheckpointError, match=r"are both of rank 1; they are of two runs"):
        read_weights(tag)


@pytest.mark.parametrize("name", ["mp_rank_01_model_states.pt", "layer_03-model_00-model_states.pt"])
def test_a_model_split_otherwise_is_refused(copy_of, name):
    tag = copy_of(1, "zero1-fp32") / "some-tag"
    (tag / name).touch()
    with pytest.raises(CheckpointError, match=rf"{name} is of a model split by layers, experts or tensors"):
        read_weights(tag)


def test_one_of_its_files_is_refused_with_the_folder_to_give(saved):
    tag = saved(1) / "zero1-fp32" / "some-tag"
    with pytest.raises(
        CheckpointError, match=rf"is one of the files of a DeepSpeed .* give its folder {tag}"
    ):
        read_weights(tag / "mp_rank_00_model_states.pt")


@pytest.mark.parametrize("content", ["", "..", "../elsewhere", "a/b", "a\\b", "\x00"])
def test_latest_must_name_a_folder_beside_it(tmp_path, content):
    (tmp_path / "latest").write_text(content)
    with pytest.raises(CheckpointError, match=r"latest holds .* not the name of a folder beside it"):
        read_weights(tmp_path)


def test_latest_without_its_folder_is_refused(tmp_path):
    (tmp_path / "latest").write_text("global_step5\n")
    with pytest.raises(CheckpointError, match=rf"no folder {tmp_path / 'global_step5'}"):
        read_weights(tmp_path)
    (tmp_path / "global_step5").mkdir()
    with pytest.raises(CheckpointError, match=r"global_step5 has no file of model states"):
        read_weights(tmp_path)


class Attack:
    def __reduce__(self):
        return os.system, ("echo attacked > attacked",)


@pytest.mark.parametrize("name", ["mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"])
def test_a_program_in_a_file_is_refused_by_name_and_does_not_run(copy_of, monkeypatch, name):
    tag = copy_of(1, "zero1-fp32") / "some-tag"
    torch.save({"module": {}, "optimizer_state_dict": {}, "attack": Attack()}, tag / name)
    monkeypatch.chdir(tag)
    with pytest.raises(CheckpointError, match=rf"{name} cannot be read .*\((posix|nt)\.system\), .* refused"):
        read_weights(tag)
    assert not (tag / "attacked").exists()


MODEL = {
    "module": {"a": torch.empty(0), "b": torch.empty(0)},
    "param_shapes": [OrderedDict(a=torch.Size([3]))],
    "frozen_param_shapes": OrderedDict(b=torch.Size([3])),
    "frozen_param_fragments": OrderedDict(b=torch.tensor([4.0, 5.0])),
}
OPTIMIZER = {"partition_count": 2, "fp32_flat_groups": [torch.tensor([1.0, 2.0])]}


def save_by_hand(tag, model, optimizer):
    """A ZeRO 3 checkpoint of two processes; the second holds what the first does."""
    for rank in range(2):
        torch.save(model, tag / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
        torch.save(
            {"optimizer_state_dict": optimizer}, tag / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        )


def test_a_checkpoint_made_by_hand_is_read(tmp_path):
    save_by_hand(tmp_path, MODEL, OPTIMIZER)
    tensors, step = read_deepspeed_folder(tmp_path)
    assert_same(tensors, {"a": torch.tensor([1.0, 2.0, 1.0]), "b": torch.tensor([4.0, 5.0, 4.0])})
    assert step is None


@pytest.mark.parametrize(
    ("in_model", "in_optimizer", "sentence"),
    [
        ({"module": 3}, {}, "has no dictionary 'module'"),
        ({"module": {"a": 3}}, {}, "entry 'a' is a int"),
        ({"param_shapes": "abc"}, {}, "param_shapes is a str, not a list"),
        ({"param_shapes": [3]}, {}, "something else than names and shapes"),
        ({"param_shapes": [{"a": (-1, -3)}]}, {}, "something else than names and shapes"),
        ({"param_shapes": [{"a": (1 << 60,)}]}, {}, "cannot be put together: rank 0 has 2 numbers"),
        ({"param_shapes": None}, {}, "fp32_flat_groups has 1 groups, the model states 0"),
        ({"shared_params": [1]}, {}, "shared_params is a list, not a dict"),
        ({"frozen_param_fragments": None}, {}, "lacks its part of parameter 'b'"),
        ({"frozen_param_fragments": {"b": torch.zeros(1)}}, {}, "cannot be put together"),
        ({}, {"partition_count": "two"}, "must be a number of processes"),
        ({}, {"partition_count": [2, 3]}, "must be a number of processes"),
        ({}, {"fp32_flat_groups": 3}, "fp32_flat_groups is a int, not a list"),
        ({}, {"fp32_flat_groups": [torch.zeros(1, 2)]}, "something else than rows of numbers"),
        (
            {},
            {"fp32_flat_groups": [torch.zeros(2, dtype=torch.int32)]},
            "something else than rows of numbers",
        ),
        ({}, {"fp32_flat_groups": [torch.zeros(3)]}, "cannot be put together: rank 0 has 3 numbers"),
    ],
    ids=range(16),
)
def test_content_of_another_kind_is_one_sentence(tmp_path, in_model, in_optimizer, sentence):
    save_by_hand(tmp_path, MODEL | in_model, OPTIMIZER | in_optimizer)
    with pytest.raises(CheckpointError, match=sentence):
        read_deepspeed_folder(tmp_path)


@pytest.mark.parametrize(
    ("places", "sentence"),
    [
        ([3], "something else than dictionaries"),
        ([{"a": (0, 3)}], "place of parameter 'a' in it cannot be read"),
        ([], "param_slice_mappings has 0 groups, the model states 1"),
        ([{}], "parameter 'a' .* has 3 numbers, the processes 0"),
    ],
    ids=["number", "tuple", "none", "empty"],
)
def test_places_of_another_kind_are_one_sentence(tmp_path, places, sentence):
    optimizer = {
        "partition_count": [2],
        "single_partition_of_fp32_groups": [torch.zeros(2)],
        "param_slice_mappings": places,
    }
    save_by_hand(tmp_path, MODEL, optimizer)
    with pytest.raises(CheckpointError, match=re.compile(sentence)):
        read_deepspeed_folder(tmp_path)
