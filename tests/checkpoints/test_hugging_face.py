import json
import re
from functools import partial

import pytest
import torch
from safetensors.torch import save_file

from rwkv_train.checkpoints.hugging_face import hugging_face_layout, read_hugging_face
from rwkv_train.checkpoints.tensor_source import TensorSource
from rwkv_train.checkpoints.tensors import same_bits
from rwkv_train.config.model import Rwkv7Config
from rwkv_train.errors import CheckpointError

ARCHS = ["rwkv4", "rwkv5.0", "rwkv5.1", "rwkv5.2", "rwkv6", "rwkv7"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
UNUSED = {"blocks.0.att.v0", "blocks.0.att.v1", "blocks.0.att.v2"}
LAYOUTS = [(arch, "hf") for arch in ARCHS] + [(arch, "hf-remote") for arch in ARCHS[1:-1]]


@pytest.fixture
def config_of(config_of):
    def get(arch):
        # Of RWKV-7, heads of 8 have no place in flash-linear-attention's settings; of 16 have.
        return config_of(arch).model_copy(update={"head_size": 16} if arch == "rwkv7" else {})

    return get


@pytest.fixture
def tensors_of(tensors_of):
    def make(arch, dtype=torch.float32):
        tensors = tensors_of(arch, dtype=dtype)
        if arch == "rwkv7":
            tensors = {
                name: tensor.reshape(2, 16) if name.endswith("r_k") else tensor
                for name, tensor in tensors.items()
            }
        return tensors

    return make


@pytest.fixture
def write(tmp_path, config_of, tensors_of):
    """Writes a model as a folder; changes of tensors and of config.json may be asked for."""

    def make(arch, to="hf", dtype=torch.float32, change=lambda tensors, config: None):
        layout = hugging_face_layout(config_of(arch), tensors_of(arch, dtype), to)
        tensors, config = dict(layout.tensors), dict(layout.config_json)
        change(tensors, config)
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
        return tmp_path

    return make


def require_same(found, tensors):
    assert set(found) == set(tensors)
    for name in found:
        assert same_bits(found[name], tensors[name]), name
        assert found[name].is_contiguous()
        assert (found.headers[name].shape, found.headers[name].dtype) == (
            tensors[name].shape,
            tensors[name].dtype,
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("arch", "to"), LAYOUTS, ids=map("-".join, LAYOUTS))
def test_a_model_comes_back_bit_for_bit(write, config_of, tensors_of, arch, to, dtype):
    model = read_hugging_face(write(arch, to, dtype))

    assert model.config == config_of(arch)
    assert tensors_of(arch).keys() - model.tensors.keys() == (UNUSED if arch == "rwkv7" else set())
    require_same(model.tensors, {name: tensors_of(arch, dtype)[name] for name in model.tensors})


@pytest.mark.parametrize("special", [float("nan"), float("inf"), -0.0, 1e-40, 6e-8], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_numbers_come_back_too(config_of, tensors_of, tmp_path, special, dtype):
    tensors = tensors_of("rwkv6", dtype)
    tensors["emb.weight"][0, 0] = special

    layout = hugging_face_layout(config_of("rwkv6"), tensors)
    save_file(dict(layout.tensors), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(layout.config_json), encoding="utf-8")

    assert same_bits(read_hugging_face(tmp_path).tensors["emb.weight"], tensors["emb.weight"])


PUBLISHED_RENAMES = [
    (r"^blocks\.0\.ln0", "blocks.0.pre_ln"),
    (r"^emb\.", "embeddings."),
    (r"\.att\.", ".attention."),
    (r"\.ffn\.", ".feed_forward."),
    (r"time_mix_k$", "time_mix_key"),
    (r"time_mix_v$", "time_mix_value"),
    (r"time_mix_r$", "time_mix_receptance"),
    (r"time_mix_g$", "time_mix_gate"),
    (r"^(?!head)", "rwkv."),
]
"""What the converters beside the published models of these layouts do."""


@pytest.mark.parametrize("arch", ARCHS[:-1])
def test_names_are_those_of_the_published_converters(config_of, tensors_of, arch):
    to = "hf" if arch == "rwkv4" else "hf-remote"
    expected = set()
    for name in tensors_of(arch):
        for pattern, new in PUBLISHED_RENAMES:
            name = re.sub(pattern, new, name)  # noqa: PLW2901
        expected.add(name)

    assert set(hugging_face_layout(config_of(arch), tensors_of(arch), to).tensors) == expected


def test_only_float16_is_rescaled(config_of, tensors_of):
    rescale = {
        dtype: hugging_face_layout(config_of("rwkv4"), tensors_of("rwkv4", dtype)).config_json[
            "rescale_every"
        ]
        for dtype in DTYPES
    }

    assert rescale == {torch.float32: 0, torch.bfloat16: 0, torch.float16: 6}


def test_the_end_of_a_document_begins_and_ends_texts(config_of, tensors_of):
    layout = hugging_face_layout(config_of("rwkv4"), tensors_of("rwkv4"), end_of_document=2)

    assert (layout.config_json["bos_token_id"], layout.config_json["eos_token_id"]) == (2, 2)


def test_tensors_are_made_when_they_are_asked_for(config_of, tensors_of):
    asked, tensors = [], tensors_of("rwkv6")

    def read(name):
        asked.append(name)
        return tensors[name]

    layout = hugging_face_layout(config_of("rwkv6"), TensorSource(TensorSource.of(tensors).headers, read))
    assert asked == []
    _ = layout.tensors["model.layers.1.attn.x_bias"]

    assert asked == [f"blocks.1.att.time_maa_{mix}" for mix in "rwkvg"]


def test_the_six_mixes_in_one_tensor_of_early_2025_are_read(write, tensors_of):
    def stack(tensors, config):
        for layer in range(2):
            mixes = [tensors.pop(f"model.layers.{layer}.attn.x_{mix}") for mix in "rwkvag"]
            tensors[f"model.layers.{layer}.attn.x_x"] = torch.cat(mixes).reshape(6, -1)

    model = read_hugging_face(write("rwkv7", change=stack))

    require_same(model.tensors, {name: tensors_of("rwkv7")[name] for name in model.tensors})


def test_sizes_that_published_files_leave_out_are_read_from_the_weights(write, config_of):
    def forget(tensors, config):
        config["intermediate_size"] = None
        del config["head_size_divisor"], config["context_length"]

    model = read_hugging_face(write("rwkv5.2", change=forget))

    assert model.config == config_of("rwkv5.2").model_copy(update={"ctx_len": 4096})


def test_rwkv6_with_one_epsilon_for_all_norms_has_no_divisor(write, config_of, tensors_of):
    # So are the folders that flash-linear-attention's own converter writes.
    def one_epsilon(tensors, config):
        config["norm_eps"] = 1e-5

    model = read_hugging_face(write("rwkv6", change=one_epsilon))

    assert model.config == config_of("rwkv6").model_copy(update={"head_size_divisor": 1.0})
    assert same_bits(model.tensors["emb.weight"], 8 * tensors_of("rwkv6")["emb.weight"])


def _two_files(tensors):
    names = sorted(tensors)
    return {"a": names[: len(names) // 2], "b": names[len(names) // 2 :]}


@pytest.mark.parametrize(
    ("whole", "save"),
    [("model.safetensors", save_file), ("pytorch_model.bin", torch.save)],
    ids=["safetensors", "bin"],
)
@pytest.mark.parametrize("n_files", [1, 2])
def test_every_kind_of_weight_files_is_read(write, tensors_of, whole, save, n_files):
    folder = write("rwkv4")
    tensors = dict(hugging_face_layout(read_hugging_face(folder).config, tensors_of("rwkv4")).tensors)
    (folder / "model.safetensors").unlink()
    if n_files == 1:
        save(tensors, folder / whole)
    else:
        stem, end = whole.split(".")
        weight_map = {}
        for part, names in _two_files(tensors).items():
            save({name: tensors[name].clone() for name in names}, folder / f"{stem}-{part}.{end}")
            weight_map |= dict.fromkeys(names, f"{stem}-{part}.{end}")
        (folder / f"{whole}.index.json").write_text(json.dumps({"weight_map": weight_map}))

    require_same(read_hugging_face(folder).tensors, tensors_of("rwkv4"))


def _set(**keys):
    return lambda tensors, config: config.update(keys)


def _drop(name):
    return lambda tensors, config: tensors.pop(name)


def _replace(name, tensor):
    return lambda tensors, config: tensors.update({name: tensor})


def _widen_heads(tensors, config):
    config.update(head_dim=32, norm_eps=2e-5)
    for name in tensors:
        if name.endswith("r_k"):
            tensors[name] = tensors[name].reshape(1, 32)


REFUSED = {
    "another-model": (
        "rwkv4",
        _set(model_type="llama"),
        "type 'llama', which is not supported; the types of RWKV are rwkv, rwkv5, rwkv6, rwkv7",
    ),
    "no-type": ("rwkv4", lambda tensors, config: config.pop("model_type"), "of type None"),
    "other-names": (
        "rwkv7",
        _drop("model.layers.0.attn.x_r"),
        "tensor 'model.layers.0.attn.x_r' or 'model.layers.0.attn.x_x' is missing",
    ),
    "missing": (
        "rwkv6",
        _drop("model.layers.1.attn.x_bias"),
        r"tensor 'model.layers.1.attn.x_bias' is missing; RWKV-6 in .* has it, with shape \[5, 32\]",
    ),
    "missing-for-a-size": (
        "rwkv6",
        _drop("model.layers.0.ffn.key.linear.weight"),
        "tensor 'model.layers.0.ffn.key.linear.weight' is missing",
    ),
    "extra": (
        "rwkv4",
        _replace("rwkv.blocks.2.ln1.bias", torch.zeros(32)),
        r"tensor 'rwkv.blocks.2.ln1.bias' \[32\] is extra; RWKV-4 in .* with n_layer 2 and n_embd 32",
    ),
    "misshaped": (
        "rwkv7",
        _replace("model.layers.1.attn.w_lora.lora.0.weight", torch.zeros(4, 32)),
        r"'model.layers.1.attn.w_lora.lora.0.weight' has shape \[4, 32\]; RWKV-7 in .* has \[5, 32\]",
    ),
    "misshaped-where-a-size-is-read": (
        "rwkv5.2",
        _replace("rwkv.blocks.0.feed_forward.key.weight", torch.tensor(0.0)),
        "tensor 'rwkv.blocks.0.feed_forward.key.weight' has shape",
    ),
    "integers": (
        "rwkv4",
        _replace("rwkv.ln_out.bias", torch.zeros(32, dtype=torch.float64)),
        "tensor 'rwkv.ln_out.bias' is torch.float64",
    ),
    "tied": ("rwkv4", _set(tie_word_embeddings=True), "'tie_word_embeddings' is True; only False"),
    "epsilon": ("rwkv4", _set(layer_norm_epsilon=1e-6), "'layer_norm_epsilon' is 1e-06; only 1e-05"),
    "epsilon-between": ("rwkv6", _set(norm_eps=2e-5), "norm_eps is 2e-05"),
    "epsilon-of-no-number": ("rwkv6", _set(norm_eps="small"), "norm_eps is 'small'"),
    "epsilon-of-heads": ("rwkv7", _set(norm_eps=1e-5), "times norm_eps .* is 0.00016, .* must be 0.00064"),
    "activation": ("rwkv7", _set(hidden_act="silu"), "'hidden_act' is 'silu'; only 'sqrelu'"),
    "attention-layers": ("rwkv7", _set(attn={"layers": [1]}), "'attn' is .*; only None"),
    "narrow-keys": ("rwkv6", lambda tensors, config: config.pop("expand_k"), "'expand_k' is 0.5; only 1.0"),
    "no-size": ("rwkv7", _set(hidden_size=None, head_dim=None), "describes no model"),
    "a-size-of-words": (
        "rwkv4",
        _set(hidden_size="wide"),
        "config.json: model.n_embd is 'wide' but should be",
    ),
    "a-size-beyond-all": ("rwkv6", _set(gate_low_rank_dim=10**18), "model of impossible size"),
    "a-long-value": ("rwkv7", _set(hidden_act="x" * 10**6), "'hidden_act' is 'x{70,80}...; only 'sqrelu'"),
    "epsilon-of-heads-of-32": ("rwkv7", _widen_heads, "norm_eps is 2e-05; 1e-5 times"),
    "no-heads": ("rwkv6", _set(num_heads=0), "describes no model"),
    "other-size": ("rwkv4", _set(hidden_size=48), r"has shape \[60, 32\]; RWKV-4 .* has \[60, 48\]"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_model_of_ours_is_refused_in_one_sentence(write, case):
    arch, change, message = REFUSED[case]

    with pytest.raises(CheckpointError, match=message) as refusal:
        read_hugging_face(write(arch, change=change))
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 1_000


@pytest.mark.parametrize("epsilon", [64e-5, "no number"])
@pytest.mark.parametrize(("arch", "to"), [("rwkv4", "hf"), ("rwkv5.2", "hf"), ("rwkv6", "hf-remote")])
def test_a_key_that_only_another_layout_has_is_passed_over(write, tensors_of, arch, to, epsilon):
    read = read_hugging_face(write(arch, to, change=_set(norm_eps=epsilon)))
    require_same(read.tensors, tensors_of(arch))


def _write_index(folder, weight_map):
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def _truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _pickle(folder):
    class Malicious:
        def __reduce__(self):
            return (open, (str(folder / "executed"), "w"))

    (folder / "model.safetensors").unlink()
    torch.save({"rwkv.embeddings.weight": Malicious()}, folder / "pytorch_model.bin")


DAMAGES = {
    "no-weights": (lambda folder: (folder / "model.safetensors").unlink(), "has no weights"),
    "truncated": (_truncate, "truncated or damaged"),
    "pickle": (_pickle, "asks for more than tensors"),
    "no-config": (lambda folder: (folder / "config.json").unlink(), "cannot be read"),
    "config-of-text": (lambda folder: (folder / "config.json").write_text("{"), "truncated or damaged"),
    "index-of-nothing": (partial(_write_index, weight_map={}), "has no 'weight_map'"),
    "index-beyond-the-folder": (
        partial(_write_index, weight_map={"head.weight": "../part.safetensors"}),
        "no name of a file beside it",
    ),
    "index-of-the-folder-above": (
        partial(_write_index, weight_map={"head.weight": ".."}),
        "there is no such file",
    ),
    "index-of-no-name": (
        partial(_write_index, weight_map={"head.weight": "a\0b"}),
        "there is no such file",
    ),
    "index-of-a-long-name": (
        partial(_write_index, weight_map={"head.weight": "a" * 10**6}),
        "there is no such file",
    ),
    "index-of-a-missing-file": (
        partial(_write_index, weight_map={"head.weight": "other.safetensors"}),
        "cannot be read",
    ),
    "index-of-a-missing-tensor": (
        partial(_write_index, weight_map={"tail.weight": "part.safetensors"}),
        "tensor 'tail.weight' is not in part.safetensors",
    ),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_damage_is_refused_in_one_sentence(write, case):
    damage, message = DAMAGES[case]
    folder = write("rwkv4")
    damage(folder)

    with pytest.raises(CheckpointError, match=message) as refusal:
        read_hugging_face(folder)
    assert "\n" not in str(refusal.value)
    assert not (folder / "executed").exists()


def test_weights_too_small_to_be_divided_are_refused(write):
    def tiny(tensors, config):
        tensors["model.embeddings.weight"][0, 0] = 6e-8  # the smallest number of float16

    model = read_hugging_face(write("rwkv6", dtype=torch.float16, change=tiny))

    with pytest.raises(CheckpointError, match=r"'model.embeddings.weight' holds a number that cannot be"):
        _ = model.tensors["emb.weight"]


def test_weights_too_large_to_be_multiplied_are_refused(config_of, tensors_of):
    tensors = tensors_of("rwkv6", torch.float16)
    tensors["emb.weight"][0, 0] = 60_000

    layout = hugging_face_layout(config_of("rwkv6"), tensors)

    with pytest.raises(CheckpointError, match=r"'emb.weight' holds a number that cannot be multiplied by 8"):
        _ = layout.tensors["model.embeddings.weight"]


@pytest.mark.parametrize("head_size", [8, 32, 128])
def test_head_sizes_that_flash_linear_attention_cannot_hold_are_refused(head_size):
    config = Rwkv7Config(n_layer=1, n_embd=128, head_size=head_size)

    with pytest.raises(
        CheckpointError, match=f"head_size of {head_size} has no place: it must be 64, 16 or 4"
    ):
        hugging_face_layout(config, {})


def test_a_divisor_that_flash_linear_attention_cannot_hold_is_refused(config_of):
    config = config_of("rwkv6").model_copy(update={"head_size_divisor": 3.0})

    with pytest.raises(CheckpointError, match="head_size_divisor of 3 has no place"):
        hugging_face_layout(config, {})


@pytest.mark.parametrize("arch", ["rwkv4", "rwkv7"])
def test_there_is_one_layout_of_the_oldest_and_the_newest(config_of, arch):
    with pytest.raises(CheckpointError, match="'hf-remote' is for RWKV-5, RWKV-6"):
        hugging_face_layout(config_of(arch), {}, "hf-remote")


def test_tensors_that_become_one_must_have_one_dtype(config_of, tensors_of):
    tensors = tensors_of("rwkv6")
    tensors["blocks.0.att.time_maa_k"] = tensors["blocks.0.att.time_maa_k"].bfloat16()

    with pytest.raises(CheckpointError, match=r"'blocks.0.att.time_maa_r' to .* have different dtypes"):
        hugging_face_layout(config_of("rwkv6"), tensors)
