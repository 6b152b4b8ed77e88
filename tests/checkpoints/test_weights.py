import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from rwkv_train.checkpoints import Weights, load_model, read_weights, write_weights
from rwkv_train.checkpoints.training_state import save_training_checkpoint
from rwkv_train.config.model import LoraRanks, Rwkv7Config
from rwkv_train.errors import CheckpointError
from rwkv_train.models.registry import build_model, initialize
from rwkv_train.tokenizers import TokenizerIdentity

ARCHES = pytest.mark.parametrize("arch", ["rwkv4", "rwkv7"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
BYTES = TokenizerIdentity("bytes", "cd" * 32)


def save(out_dir, state):
    return save_training_checkpoint(out_dir, state.manifest, state.parameters())


def assert_same(read, written):
    assert read.keys() == written.keys()
    for name, tensor in written.items():
        torch.testing.assert_close(read[name], tensor, rtol=0, atol=0, equal_nan=True)


def edit_json(path, **changes):
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value != "absent"}))


@pytest.fixture
def folder(tmp_path, tensors_of, config_of):
    """A safetensors folder of the small RWKV-7."""
    weights = Weights(config_of("rwkv7"), tensors_of("rwkv7"), BYTES, step=70)
    return write_weights(tmp_path / "folder", weights, "safetensors")


@ARCHES
@DTYPES
def test_an_official_file_gives_its_own_bits_and_sizes(tmp_path, tensors_of, config_of, arch, dtype):
    torch.save(tensors_of(arch, dtype=dtype), tmp_path / "x.pth")
    weights = read_weights(tmp_path / "x.pth")
    assert_same(weights.tensors, tensors_of(arch, dtype=dtype))
    assert weights.config.model_copy(update={"ctx_len": 16}) == config_of(arch)
    assert (weights.tokenizer, weights.step) == (None, None)


@pytest.mark.parametrize(
    "prefix", ["module.", "_forward_module.", "model.", "_forward_module.model.", "module._orig_mod."]
)
def test_prefixes_of_wrappers_are_stripped(tmp_path, tensors_of, prefix):
    wrapped = {f"{prefix}{name}": tensor for name, tensor in tensors_of("rwkv7").items()}
    torch.save(wrapped, tmp_path / "x.pth")
    assert_same(read_weights(tmp_path / "x.pth").tensors, tensors_of("rwkv7"))


def test_a_prefix_on_some_names_only_is_refused(tmp_path, tensors_of):
    tensors = tensors_of("rwkv4")
    tensors["module.head.weight"] = tensors.pop("head.weight")
    torch.save(tensors, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"'head.weight' is missing"):
        read_weights(tmp_path / "x.pth")


@ARCHES
def test_a_bare_safetensors_file_is_read(tmp_path, tensors_of, arch):
    save_file(tensors_of(arch), tmp_path / "x")
    assert_same(read_weights(tmp_path / "x").tensors, tensors_of(arch))


def test_a_training_checkpoint_gives_its_weights_tokenizer_step_and_sizes(
    tmp_path, training_state, config_of
):
    state = training_state(5)
    weights = read_weights(save(tmp_path, state))
    assert_same(weights.tensors, state.weights)
    assert weights.config == config_of("rwkv7")
    assert (weights.tokenizer, weights.step) == (TokenizerIdentity("bytes", "ab" * 32), 5)


def test_an_out_dir_gives_its_newest_checkpoint(tmp_path, training_state):
    for step in (5, 10):
        save(tmp_path, training_state(step))
    assert read_weights(tmp_path).step == 10
    assert read_weights(tmp_path / "checkpoints" / "step-00000005").step == 5


def test_damage_to_the_optimizer_does_not_hide_the_weights(tmp_path, training_state):
    save(tmp_path, training_state(5))
    (save(tmp_path, training_state(10)) / "optimizer.safetensors").write_bytes(b"")
    assert read_weights(tmp_path).step == 10


def test_an_out_dir_without_a_checkpoint_is_refused(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(CheckpointError, match="holds no training checkpoint yet"):
        read_weights(tmp_path)


@DTYPES
def test_weights_that_are_not_dense_floats_are_refused(tmp_path, tensors_of, dtype):
    tensors = tensors_of("rwkv4", dtype=dtype)
    save_file({**tensors, "head.weight": tensors["head.weight"].to(torch.int8)}, tmp_path / "x")
    with pytest.raises(CheckpointError, match=r"'head.weight' is I8, which no weight is"):
        read_weights(tmp_path / "x")
    torch.save({**tensors, "head.weight": tensors["head.weight"].to_sparse()}, tmp_path / "y")
    with pytest.raises(CheckpointError, match=r"'head.weight' is .*torch.sparse_coo"):
        read_weights(tmp_path / "y")
    torch.save({**tensors, "head.weight": torch.zeros(1, dtype=dtype).expand(2**50, 32)}, tmp_path / "z")
    with pytest.raises(CheckpointError, match=r"'head.weight' .* has fewer values than its shape"):
        read_weights(tmp_path / "z")


def test_a_safetensors_folder_keeps_everything(folder, tensors_of, config_of):
    read = read_weights(folder)
    assert_same(read.tensors, tensors_of("rwkv7"))
    assert read[0] == config_of("rwkv7")
    assert read[2:] == (BYTES, 70, frozenset())


def test_the_description_of_a_folder_says_sizes_as_numbers(tmp_path, tensors_of):
    config = Rwkv7Config(n_layer=1, n_embd=64, vocab_size=9, lora_ranks="revised", init_from="hf:a/b/c")
    model = build_model(config)
    folder = write_weights(tmp_path / "x", Weights(config, model.state_dict(), None, None), "safetensors")
    description = json.loads((folder / "config.json").read_text())
    # round(2.5 * 8 / 32) = 1, round(1.7 * 8 / 32) = 0, round(5 * 8 / 32) = 1, each at least 1, times 32.
    assert description["model"]["lora_ranks"] == {"w": 32, "a": 32, "v": 32, "g": 32}
    assert description["model"]["init_from"] is None
    assert description["format"] == "rwkv-train/1"
    assert (description["tokenizer"], description["step"]) == (None, None)
    assert load_file(folder / "model.safetensors").keys() == model.state_dict().keys()


def test_every_flipped_bit_in_the_weights_of_a_folder_is_found(folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for position in [*range(0, len(whole), len(whole) // 50), len(whole) - 1]:
        flipped = bytearray(whole)
        flipped[position] ^= 1
        path.write_bytes(flipped)
        with pytest.raises(CheckpointError, match=r"model.safetensors is damaged: its SHA-256 is"):
            read_weights(folder)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"format": "rwkv-train/2"}, "format is 'rwkv-train/2', but this version reads 'rwkv-train/1'"),
        ({"format": "absent"}, "its format is None"),
        ({"model": "absent"}, r"it has no 'model' \(dict\)"),
        ({"model": {"arch": "rwkv9"}}, "there is no 'rwkv9'"),
        ({"model": {"arch": "rwkv4", "n_layer": 2, "n_embd": 32, "vocab_size": 60}}, "is missing|is extra"),
        ({"model": {"arch": "rwkv4", "n_layers": 2, "n_embd": 32}}, "did you mean 'n_layer'"),
        ({"step": "70"}, "'step' is '70', not of type int or null"),
        ({"step": True}, "'step' is True, not of type int or null"),
        ({"step": -1}, "'step' is -1, which must not be negative"),
        ({"tokenizer": {"name": "bytes"}}, "'tokenizer' is .* must hold the texts 'name' and 'sha256'"),
        ({"files": {}}, "'files' does not name model.safetensors"),
        ({"format": "absent", "model_type": "llama"}, "a Hugging Face model of type 'llama'"),
    ],
)
def test_a_description_that_does_not_fit_is_refused(folder, changes, sentence):
    edit_json(folder / "config.json", **changes)
    with pytest.raises(CheckpointError, match=sentence):
        read_weights(folder)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '"text"', '{"format": NaN', "[" * 100_000, '{"a": ' * 100_000, "\xff"]
)
def test_a_description_that_is_no_json_object_is_refused(folder, text):
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"config.json (is truncated or damaged|holds a)"):
        read_weights(folder)


def test_a_folder_without_its_description_is_refused_with_the_way_around(folder, tensors_of):
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no config.json; give the path of its model.safetensors"):
        read_weights(folder)
    assert_same(read_weights(folder / "model.safetensors").tensors, tensors_of("rwkv7"))


@ARCHES
def test_a_loaded_model_computes_what_the_saved_one_did(tmp_path, config_of, arch):
    model = build_model(config_of(arch), wkv_backend="reference")
    initialize(model, seed=1)
    with torch.no_grad():
        model.head.weight.normal_(generator=torch.Generator().manual_seed(2))
    torch.save(model.state_dict(), tmp_path / "x.pth")
    loaded, weights = load_model(tmp_path / "x.pth", wkv_backend="reference")
    tokens = torch.arange(20).view(2, 10)
    torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits, rtol=0, atol=0)
    assert not loaded.training
    assert weights.config.arch == arch
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name, parameter in loaded.named_parameters() if parameter.requires_grad} == trained


def test_a_loaded_model_does_not_share_the_memory_of_the_file(tmp_path, tensors_of):
    save_file(tensors_of("rwkv4"), tmp_path / "x")
    before = (tmp_path / "x").read_bytes()
    model, weights = load_model(tmp_path / "x")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert (tmp_path / "x").read_bytes() == before
    assert_same(weights.tensors, tensors_of("rwkv4"))


def test_a_model_is_loaded_in_the_dtype_asked_for(tmp_path, tensors_of):
    torch.save(tensors_of("rwkv4", dtype=torch.bfloat16), tmp_path / "x")
    assert {p.dtype for p in load_model(tmp_path / "x")[0].parameters()} == {torch.bfloat16}
    model, _ = load_model(tmp_path / "x", dtype=torch.float32)
    assert_same(
        dict(model.state_dict()), {n: t.float() for n, t in tensors_of("rwkv4", dtype=torch.bfloat16).items()}
    )


def test_a_file_of_mixed_dtypes_is_loaded_only_in_a_named_one(tmp_path, tensors_of):
    tensors = tensors_of("rwkv4")
    tensors["head.weight"] = tensors["head.weight"].bfloat16()
    torch.save(tensors, tmp_path / "x")
    with pytest.raises(CheckpointError, match=r"mixes dtypes \(bf16, fp32\)"):
        load_model(tmp_path / "x")
    assert {p.dtype for p in load_model(tmp_path / "x", dtype=torch.float32)[0].parameters()} == {
        torch.float32
    }


def test_a_weight_too_large_for_the_dtype_is_refused(tmp_path, tensors_of, config_of):
    tensors = tensors_of("rwkv4")
    tensors["head.weight"][3, 2] = -70_000
    weights = Weights(config_of("rwkv4"), tensors, None, None)
    with pytest.raises(
        CheckpointError,
        match=r"'head.weight' holds 70000, which fp16 cannot hold \(its largest number is 65504\)",
    ):
        write_weights(tmp_path / "x", weights, "pth", torch.float16)
    assert not (tmp_path / "x").exists()
    write_weights(tmp_path / "x", weights, "pth", torch.bfloat16)


def test_infinity_and_nan_are_kept(tmp_path, tensors_of, config_of):
    tensors = tensors_of("rwkv4")
    tensors["head.weight"][0, :3] = torch.tensor([torch.inf, -torch.inf, torch.nan])
    write_weights(tmp_path / "x", Weights(config_of("rwkv4"), tensors, None, None), "pth", torch.float16)
    assert_same(read_weights(tmp_path / "x").tensors, {name: t.half() for name, t in tensors.items()})


def test_weights_that_do_not_fit_their_settings_are_not_written(tmp_path, tensors_of, config_of):
    tensors = tensors_of("rwkv4")
    del tensors["head.weight"]
    with pytest.raises(CheckpointError, match=r"'head.weight' is missing"):
        write_weights(tmp_path / "x", Weights(config_of("rwkv4"), tensors, None, None), "pth")


def test_ranks_of_the_settings_are_compared_with_the_tensors(folder):
    model = json.loads((folder / "config.json").read_text())["model"]
    edit_json(
        folder / "config.json", model={**model, "lora_ranks": LoraRanks(w=5, a=6, v=7, g=8).model_dump()}
    )
    with pytest.raises(CheckpointError, match=r"'blocks.0.att.g1' has shape \[32, 9\].* has \[32, 8\]"):
        read_weights(folder)
