"""Files of a state that texts start from."""

import pytest
import torch
from safetensors.torch import save_file

from rwkv_train.checkpoints.states import read_state_file, save_official_state, why_not_official
from rwkv_train.config.model import Rwkv4Config, Rwkv5Config, Rwkv6Config, Rwkv7Config
from rwkv_train.errors import CheckpointError
from rwkv_train.models.registry import build_model
from rwkv_train.models.state import base_of_state, save_state

SIZES = {"n_layer": 2, "n_embd": 16, "vocab_size": 20}
CONFIGS = {
    "rwkv4": Rwkv4Config(**SIZES),
    "rwkv5": Rwkv5Config(**SIZES, head_size=8),
    "rwkv6": Rwkv6Config(**SIZES, head_size=8),
    "rwkv7": Rwkv7Config(**SIZES, head_size=8),
}
MATRIX_STATES = ["rwkv5", "rwkv6", "rwkv7"]


def random_state(config, shifts=True):
    generator = torch.Generator().manual_seed(1)
    return tuple(
        layer._replace(
            wkv=torch.randn(layer.wkv.shape, generator=generator),
            time_mix_x=torch.randn(layer.time_mix_x.shape, generator=generator) * shifts,
            channel_mix_x=torch.randn(layer.channel_mix_x.shape, generator=generator) * shifts,
        )
        for layer in build_model(config, device="cpu").zero_state(1)
    )


def official(config, n_layer=2, dtype=torch.float32):
    """What the official trainer would save, by hand."""
    heads = config.n_embd // config.head_size
    shape = (heads, config.head_size, config.head_size)
    generator = torch.Generator().manual_seed(2)
    return {
        f"blocks.{layer}.att.time_state": torch.randn(shape, generator=generator).to(dtype)
        for layer in range(n_layer)
    }


def assert_equal_states(state, other):
    for layer, layer_other in zip(state, other, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(layer, layer_other, strict=True))


@pytest.mark.parametrize("arch", CONFIGS)
def test_our_file_is_read_as_it_was_written(tmp_path, arch):
    state = random_state(CONFIGS[arch])
    save_state(tmp_path / "state", state, base="abc")
    assert_equal_states(read_state_file(tmp_path / "state", CONFIGS[arch]), state)
    assert_equal_states(read_state_file(tmp_path / "state", CONFIGS[arch], base="abc"), state)
    assert base_of_state(tmp_path / "state") == "abc"


@pytest.mark.parametrize("arch", CONFIGS)
def test_the_empty_state_is_a_state(tmp_path, arch):
    empty = build_model(CONFIGS[arch]).zero_state(1)
    save_state(tmp_path / "state", empty)
    assert_equal_states(read_state_file(tmp_path / "state", CONFIGS[arch]), empty)


def test_a_file_of_other_weights_is_refused_and_one_that_names_none_is_not(tmp_path):
    config = CONFIGS["rwkv7"]
    save_state(tmp_path / "named", random_state(config), base="abc")
    save_state(tmp_path / "unnamed", random_state(config))
    assert base_of_state(tmp_path / "unnamed") is None
    read_state_file(tmp_path / "unnamed", config, base="xyz")
    with pytest.raises(
        CheckpointError, match="other weights than these: their fingerprint is abc, and this model's xyz"
    ):
        read_state_file(tmp_path / "named", config, base="xyz")


@pytest.mark.parametrize("kind", ["pth", "safetensors"])
@pytest.mark.parametrize("arch", MATRIX_STATES)
def test_an_official_file_is_read(tmp_path, arch, kind):
    tensors = official(CONFIGS[arch], dtype=torch.bfloat16)
    path = tmp_path / "rwkv-4.pth"  # the content tells, not the name
    torch.save(tensors, path) if kind == "pth" else save_file(tensors, path)

    state = read_state_file(path, CONFIGS[arch])

    for layer, name in zip(state, tensors, strict=True):
        assert torch.equal(layer.wkv[0], tensors[name])
        assert not layer.time_mix_x.any()
        assert not layer.channel_mix_x.any()


@pytest.mark.parametrize("arch", MATRIX_STATES)
def test_an_official_file_is_written_as_torch_saves_it(tmp_path, arch):
    state = random_state(CONFIGS[arch], shifts=False)
    assert why_not_official(state) is None

    save_official_state(tmp_path / "state.pth", state)

    tensors = torch.load(tmp_path / "state.pth", weights_only=True)
    assert list(tensors) == ["blocks.0.att.time_state", "blocks.1.att.time_state"]
    for layer, tensor in zip(state, tensors.values(), strict=True):
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, layer.wkv[0])
    assert_equal_states(read_state_file(tmp_path / "state.pth", CONFIGS[arch]), state)
    assert [path.name for path in tmp_path.iterdir()] == ["state.pth"]


def test_what_the_official_file_has_no_place_for_is_refused(tmp_path):
    state = random_state(CONFIGS["rwkv7"], shifts=False)
    two = tuple(type(layer)(*(torch.cat([x, x]) for x in layer)) for layer in state)
    cases = {
        "RWKV-4 has no official file": random_state(CONFIGS["rwkv4"], shifts=False),
        "last inputs of the token shifts": random_state(CONFIGS["rwkv7"]),
        "is of 2 texts": two,
    }
    for message, refused in cases.items():
        with pytest.raises(CheckpointError, match=f"state.pth cannot be written: .*{message}"):
            save_official_state(tmp_path / "state.pth", refused)
    assert not list(tmp_path.iterdir())


def test_an_official_file_for_rwkv4_is_refused(tmp_path):
    torch.save(official(CONFIGS["rwkv7"]), tmp_path / "state.pth")
    with pytest.raises(CheckpointError, match="is an official state, which rwkv4 has not"):
        read_state_file(tmp_path / "state.pth", CONFIGS["rwkv4"])


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (official(CONFIGS["rwkv7"], n_layer=1), r"it lacks blocks\.1\.att\.time_state"),
        (official(CONFIGS["rwkv7"], n_layer=3), r"it has blocks\.2\.att\.time_state"),
        (official(CONFIGS["rwkv7"]) | {"emb.weight": torch.ones(2)}, r"it has emb\.weight"),
        (official(Rwkv7Config(**SIZES, head_size=4)), r"it has 2 layers of .*\[1, 4, 4, 4\].*\[1, 2, 8, 8\]"),
        ({"emb.weight": torch.ones(2)}, "not the state of a model: found emb.weight"),
        ({}, "not the state of a model: found no tensors"),
    ],
    ids=["fewer-layers", "more-layers", "weights-too", "other-heads", "weights", "empty"],
)
@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_an_official_file_of_another_model_is_refused(tmp_path, tensors, message, kind):
    path = tmp_path / "state"
    torch.save(tensors, path) if kind == "pth" else save_file(tensors, path)
    with pytest.raises(CheckpointError, match=message):
        read_state_file(path, CONFIGS["rwkv7"])


@pytest.mark.parametrize(
    "other",
    [CONFIGS["rwkv4"], Rwkv7Config(**{**SIZES, "n_layer": 3}, head_size=8)],
    ids=["version", "layers"],
)
def test_our_file_of_another_model_is_refused(tmp_path, other):
    save_state(tmp_path / "state", random_state(other))
    with pytest.raises(CheckpointError, match=r"state is the state of another model: it has .* layers of"):
        read_state_file(tmp_path / "state", CONFIGS["rwkv7"])


def test_numbers_that_are_none_are_refused(tmp_path):
    state = random_state(CONFIGS["rwkv7"])
    state[1].wkv[0, 0, 0, 0] = torch.nan
    save_state(tmp_path / "state", state)
    with pytest.raises(CheckpointError, match="wkv of layer 1 is not made of finite numbers"):
        read_state_file(tmp_path / "state", CONFIGS["rwkv7"])


def test_missing_and_damaged_files_are_refused(tmp_path):
    config = CONFIGS["rwkv7"]
    with pytest.raises(CheckpointError, match="nowhere cannot be read: No such file"):
        read_state_file(tmp_path / "nowhere", config)
    with pytest.raises(CheckpointError, match=r"holds no state\.safetensors; wanted the file of a state"):
        read_state_file(tmp_path, config)
    for name in ("ours", "official"):
        path = tmp_path / name
        state = random_state(config, shifts=False)
        save_state(path, state) if name == "ours" else save_official_state(path, state)
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(CheckpointError, match=f"{name} (is truncated or damaged|cannot be read)"):
            read_state_file(path, config)


def test_the_folder_of_a_checkpoint_is_read_by_its_file(tmp_path):
    state = random_state(CONFIGS["rwkv7"])
    save_state(tmp_path / "state.safetensors", state)
    found = read_state_file(tmp_path, CONFIGS["rwkv7"])
    assert all(torch.equal(a, b) for a, b in zip(sum(found, ()), sum(state, ()), strict=True))


def test_a_program_in_a_pickle_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("run",))

    torch.save({"blocks.0.att.time_state": Evil()}, tmp_path / "state.pth")
    with pytest.raises(CheckpointError, match=r"cannot be read as a file of torch\.save"):
        read_state_file(tmp_path / "state.pth", CONFIGS["rwkv7"])
