"""Files read back with the package of llama.cpp."""

import ast
import codecs
import logging
import struct
import sys
import weakref
from pathlib import Path

import gguf
import jinja2
import numpy as np
import pytest
import torch
from pyrwkv_tokenizer import RWKVTokenizer

from rwkv_train.checkpoints import Weights, gguf_file, write_weights
from rwkv_train.checkpoints.infer import expected_shapes
from rwkv_train.checkpoints.tensor_source import TensorSource
from rwkv_train.config.model import LoraRanks, Rwkv6Config, Rwkv6Ranks, Rwkv7Config
from rwkv_train.errors import CheckpointError
from rwkv_train.models.registry import unused_parameters
from rwkv_train.tokenizers import TokenizerIdentity, load_tokenizer

EACH = pytest.mark.parametrize("arch", ["rwkv6", "rwkv7"])
TYPES = pytest.mark.parametrize("float_type", ["F32", "F16", "BF16", "Q8_0"])
MATRICES = {"token_embd", "output", "receptance", "key", "value", "gate"}
Q8_0_ERROR = 0.5 + 127 * 2**-11
"""Of a block's step: half from rounding to integers, the rest from the scale, which is a float16."""

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "Q8_0": "q8_0"}


def write_gguf(path, config, weights, float_type="F16", tokenizer=None, *, overwrite=False):
    return write_weights(
        path, Weights(config, weights, tokenizer, None), "gguf", DTYPES[float_type], overwrite=overwrite
    )


def config_of(arch, n_layer=2, vocab_size=260, **settings):
    sizes = {"n_layer": n_layer, "n_embd": 64, "head_size": 64, "vocab_size": vocab_size, "ctx_len": 16}
    if arch == "rwkv6":
        return Rwkv6Config(**sizes, lora_ranks=Rwkv6Ranks(shift=3, decay=5), **settings)
    return Rwkv7Config(**sizes, lora_ranks=LoraRanks(w=5, a=6, v=7, g=9), **settings)


def random_weights(config, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator).to(dtype)
        for name, shape in expected_shapes(config).items()
    }


@pytest.fixture
def small_world(monkeypatch):
    """A vocabulary of 257 tokens in the place of World's, because the package reads slowly; its identity."""
    tokenizer = load_tokenizer("bytes")
    monkeypatch.setattr(gguf_file, "load_tokenizer", lambda name: tokenizer)
    return tokenizer.identity


@pytest.fixture
def write(tmp_path, small_world):
    """Write weights and read them back."""

    def write_and_read(config, weights, float_type="F32", **settings):
        path = write_gguf(
            tmp_path / "x.gguf",
            config,
            TensorSource.of(weights),
            float_type=float_type,
            tokenizer=small_world,
            **settings,
        )
        return gguf.GGUFReader(path)

    return write_and_read


def values_of(reader):
    """Name -> float32 numbers, in the row-major shape."""
    return {
        tensor.name: torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type)).view(
            *tensor.shape[::-1].tolist()
        )
        for tensor in reader.tensors
    }


def is_matrix(name):
    part = name.removesuffix(".weight").split(".")[-1]
    return part.removeprefix("time_mix_").removeprefix("channel_mix_") in MATRICES


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_float32_holds_every_weight_exactly(write, arch, dtype):
    config = config_of(arch)
    weights = random_weights(config, dtype)
    read = values_of(write(config, weights))
    assert read["token_embd.weight"].equal(weights["emb.weight"].float())
    assert read["token_embd_norm.bias"].equal(weights["blocks.0.ln0.bias"].float())
    assert read["output_norm.weight"].equal(weights["ln_out.weight"].float())
    assert read["output.weight"].equal(weights["head.weight"].float())
    for i in (0, 1):
        for name, official in {
            "attn_norm.weight": "ln1.weight",
            "attn_norm_2.bias": "ln2.bias",
            "time_mix_receptance.weight": "att.receptance.weight",
            "time_mix_key.weight": "att.key.weight",
            "time_mix_value.weight": "att.value.weight",
            "time_mix_output.weight": "att.output.weight",
            "time_mix_ln.weight": "att.ln_x.weight",
            "channel_mix_key.weight": "ffn.key.weight",
            "channel_mix_value.weight": "ffn.value.weight",
        }.items():
            assert read[f"blk.{i}.{name}"].equal(weights[f"blocks.{i}.{official}"].float()), name


def test_rwkv6_mixes_are_in_the_order_w_k_v_r_g(write):
    config = config_of("rwkv6")
    weights = random_weights(config)
    read = values_of(write(config, weights))
    fused = read["blk.1.time_mix_lerp_fused.weight"]
    for row, letter in enumerate("wkvrg"):
        assert fused[row].flatten().equal(weights[f"blocks.1.att.time_maa_{letter}"].flatten())
        assert read["blk.1.time_mix_w2.weight"][row].equal(weights["blocks.1.att.time_maa_w2"][row].T)
    assert read["blk.1.time_mix_lerp_x.weight"].equal(weights["blocks.1.att.time_maa_x"].flatten())
    assert read["blk.1.time_mix_w1.weight"].equal(weights["blocks.1.att.time_maa_w1"].T)
    assert read["blk.1.time_mix_decay.weight"].equal(weights["blocks.1.att.time_decay"].flatten())
    assert read["blk.1.time_mix_decay_w1.weight"].equal(weights["blocks.1.att.time_decay_w1"].T)
    assert read["blk.1.time_mix_decay_w2.weight"].equal(weights["blocks.1.att.time_decay_w2"].T)
    assert read["blk.1.time_mix_first.weight"].equal(weights["blocks.1.att.time_faaaa"])
    assert read["blk.1.channel_mix_lerp_k.weight"].equal(weights["blocks.1.ffn.time_maa_k"].flatten())
    assert read["blk.1.channel_mix_lerp_r.weight"].equal(weights["blocks.1.ffn.time_maa_r"].flatten())


def test_rwkv7_mixes_are_in_the_order_r_w_k_v_a_g(write):
    config = config_of("rwkv7")
    weights = random_weights(config)
    read = values_of(write(config, weights))
    for row, letter in enumerate("rwkvag"):
        fused = read["blk.1.time_mix_lerp_fused.weight"][row]
        assert fused.flatten().equal(weights[f"blocks.1.att.x_{letter}"].flatten())
    for letter in "wavg":
        for factor in "12":
            factors = weights[f"blocks.1.att.{letter}{factor}"]
            assert read[f"blk.1.time_mix_{letter}{factor}.weight"].equal(factors.T)
    for name in ("w0", "a0", "v0", "k_k", "k_a", "r_k"):
        assert read[f"blk.1.time_mix_{name}.weight"].equal(weights[f"blocks.1.att.{name}"].flatten())
    assert read["blk.1.channel_mix_lerp_k.weight"].equal(weights["blocks.1.ffn.x_k"].flatten())


@pytest.mark.parametrize("has_them", [True, False], ids=["source-has-them", "source-lacks-them"])
def test_the_unused_value_residual_of_rwkv7_is_a_copy_of_a(write, has_them):
    config = config_of("rwkv7")
    weights = random_weights(config)
    if not has_them:
        weights = {name: x for name, x in weights.items() if name not in unused_parameters("rwkv7")}
    read = values_of(write(config, weights))
    for i in "012":
        assert read[f"blk.0.time_mix_v{i}.weight"].equal(read[f"blk.0.time_mix_a{i}.weight"])


@EACH
@TYPES
def test_matrices_have_the_type_that_was_asked_for_and_the_rest_is_float32(write, arch, float_type):
    config = config_of(arch)
    reader = write(config, random_weights(config), float_type)
    found = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert found == {name: float_type if is_matrix(name) else "F32" for name in found}
    assert sum(map(is_matrix, found)) == {"rwkv6": 2 + 2 * 8, "rwkv7": 2 + 2 * 6}[arch]
    kinds = {"F32": "ALL_F32", "F16": "MOSTLY_F16", "BF16": "MOSTLY_BF16", "Q8_0": "MOSTLY_Q8_0"}
    assert reader.get_field("general.file_type").contents() == gguf.LlamaFileType[kinds[float_type]]


@EACH
@pytest.mark.parametrize(("float_type", "dtype"), [("F16", torch.float16), ("BF16", torch.bfloat16)])
def test_halves_are_rounded_as_pytorch_rounds(write, arch, float_type, dtype):
    config = config_of(arch)
    weights = random_weights(config)
    read = values_of(write(config, weights, float_type))
    for name, official in {
        "token_embd.weight": "emb",
        "blk.1.channel_mix_value.weight": "blocks.1.ffn.value",
    }.items():
        assert read[name].equal(weights[f"{official}.weight"].to(dtype).float())


@EACH
def test_q8_0_is_within_half_a_step(write, arch):
    config = config_of(arch)
    weights = random_weights(config)
    read = values_of(write(config, weights, "Q8_0"))
    for name, official in {
        "output.weight": "head",
        "blk.0.channel_mix_value.weight": "blocks.0.ffn.value",
    }.items():
        blocks = weights[f"{official}.weight"].view(-1, 32)
        step = blocks.abs().amax(dim=1, keepdim=True) / 127
        assert ((read[name].view(-1, 32) - blocks).abs() <= Q8_0_ERROR * step).all()


def test_numbers_are_converted_in_pieces_that_fit_together(write, monkeypatch):
    config = config_of("rwkv7")
    weights = random_weights(config)
    monkeypatch.setattr(gguf_file, "_PIECE", 64 * 7)
    read = values_of(write(config, weights, "BF16"))
    assert read["token_embd.weight"].equal(weights["emb.weight"].bfloat16().float())


@pytest.mark.parametrize(("float_type", "every"), [("F32", 0), ("F16", 6), ("BF16", 0), ("Q8_0", 6)])
def test_rwkv6_is_rescaled_where_products_may_be_float16(write, float_type, every):
    config = config_of("rwkv6", n_layer=7)
    weights = random_weights(config)
    reader = write(config, weights, float_type)
    assert reader.get_field("rwkv6.rescale_every_n_layers").contents() == every
    read = values_of(reader)
    for layer in (5, 6):
        divisor = 2 if every and layer == 6 else 1
        expected = weights[f"blocks.{layer}.att.output.weight"] / divisor
        close = {"F32": 0.0, "F16": 2**-11, "BF16": 2**-8, "Q8_0": 0.02}[float_type]
        torch.testing.assert_close(
            read[f"blk.{layer}.time_mix_output.weight"], expected, rtol=close, atol=close
        )


def test_a_matrix_with_unfit_rows_is_f16_and_said_to_be(write, caplog):
    config = config_of("rwkv6", ffn_width=80)
    weights = random_weights(config)
    with caplog.at_level(logging.WARNING):
        reader = write(config, weights, "Q8_0")
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert {name for name, kind in types.items() if kind == "F16"} == {
        "blk.0.channel_mix_value.weight",
        "blk.1.channel_mix_value.weight",
    }
    assert "2 of 18 matrices are stored as F16, not Q8_0" in caplog.text
    assert values_of(reader)["blk.0.channel_mix_value.weight"].equal(
        weights["blocks.0.ffn.value.weight"].half().float()
    )


@EACH
def test_the_file_says_what_it_is(write, arch):
    config = config_of(arch)
    reader = write(config, random_weights(config), "F16")

    def value(key):
        return reader.get_field(key).contents()

    assert value("general.architecture") == arch
    assert value("general.type") == "model"
    assert value("general.name") == "x"
    assert value("tokenizer.ggml.model") == "rwkv"
    assert value("general.quantization_version") == gguf.GGML_QUANT_VERSION
    assert value(f"{arch}.block_count") == 2
    assert value(f"{arch}.wkv.head_size") == 64
    assert value(f"{arch}.attention.layer_norm_epsilon") == np.float32(1e-5)
    kind = reader.get_field(f"{arch}.attention.layer_norm_epsilon").types
    assert kind == [gguf.GGUFValueType.FLOAT32]
    assert reader.get_field(f"{arch}.attention.head_count").types == [gguf.GGUFValueType.UINT32]


def test_the_vocabulary_is_world(tmp_path):
    world = RWKVTokenizer()
    config = config_of("rwkv7", n_layer=1, vocab_size=65_536)
    path = write_gguf(tmp_path / "x.gguf", config, TensorSource.of(random_weights(config)))
    content = path.read_bytes()[: 1 << 22]

    # The package takes seconds to read an array. A key is followed by the types and the number of its values.
    def values_at(key):
        return content.index(key.encode()) + len(key) + 4 + 4 + 8

    def number(key):
        return struct.unpack_from("<I", content, content.index(key.encode()) + len(key) + 4)[0]

    texts = []
    place = values_at("tokenizer.ggml.tokens")
    for _ in range(65_536):
        (length,) = struct.unpack_from("<Q", content, place)
        texts.append(content[place + 8 : place + 8 + length])
        place += 8 + length
    kinds = np.frombuffer(content, "<i4", 65_536, values_at("tokenizer.ggml.token_type"))

    # The published file: ID LITERAL LENGTH. llama.cpp undoes the escapes of Python.
    lines = Path(world.vocab_filepath).read_text(encoding="utf-8").splitlines()
    literals = ast.literal_eval(f"[{','.join(line[line.index(' ') : line.rindex(' ')] for line in lines)}]")
    pieces = [piece.encode() if isinstance(piece, str) else piece for piece in literals]
    assert texts[0] == b"<s>"
    assert [codecs.escape_decode(text)[0] for text in texts[1:65_530]] == pieces
    assert texts[65_530:] == [b"[PAD%d]" % token for token in range(65_530, 65_536)]
    assert kinds[0] == gguf.TokenType.CONTROL
    assert (kinds[1:65_530] == gguf.TokenType.NORMAL).all()
    assert (kinds[65_530:] == gguf.TokenType.UNUSED).all()
    roles = {role: number(f"tokenizer.ggml.{role}_token_id") for role in ("bos", "eos", "eot")}
    assert roles == {"bos": 0, "eos": 0, "eot": world.encode("\n\n")[0]}


def test_the_chat_template_is_that_of_the_published_models(write):
    config = config_of("rwkv7")
    template = write(config, random_weights(config)).get_field("tokenizer.chat_template").contents()
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": " Hello\n"},
        {"role": "assistant", "content": "Hi!"},
        {"role": "user", "content": "Bye"},
    ]
    rendered = jinja2.Template(template).render(messages=turns, add_generation_prompt=True, bos_token="<s>")
    assert rendered == "<s>System: Be brief.\n\nUser: Hello\n\nAssistant: Hi!\n\nUser: Bye\n\nAssistant:"
    assert "rwkv-world" in template  # by which a llama.cpp without Jinja knows it


def test_no_more_than_one_tensor_of_the_file_is_held_at_a_time(tmp_path, small_world):
    config = config_of("rwkv7")
    weights = random_weights(config)
    alive = weakref.WeakSet()
    most = 0

    def read(name):
        nonlocal most
        tensor = weights[name].clone()
        alive.add(tensor)
        most = max(most, len(alive))
        return tensor

    source = TensorSource(TensorSource.of(weights).headers, read)
    write_gguf(tmp_path / "x.gguf", config, source, tokenizer=small_world)
    assert most <= 6 + 1  # the six mixes are one tensor; the one before may still be there


def test_what_is_there_is_replaced_only_when_asked(write, tmp_path):
    config = config_of("rwkv7")
    (tmp_path / "x.gguf").write_bytes(b"mine")
    with pytest.raises(CheckpointError, match=r"x\.gguf is already there"):
        write(config, random_weights(config))
    assert (tmp_path / "x.gguf").read_bytes() == b"mine"
    assert write(config, random_weights(config), overwrite=True).tensors


def test_a_folder_is_no_target(write, tmp_path):
    config = config_of("rwkv7")
    (tmp_path / "x.gguf").mkdir()
    with pytest.raises(CheckpointError, match=r"x\.gguf is a folder; gguf needs the name of a file"):
        write(config, random_weights(config), overwrite=True)


def test_a_file_that_reads_back_otherwise_takes_no_name(write, tmp_path, monkeypatch):
    def with_a_flipped_bit(path):
        content = bytearray(path.read_bytes())
        content[-100] ^= 1
        path.write_bytes(content)
        return sha256_of(path)

    sha256_of = gguf_file.sha256_of
    monkeypatch.setattr(gguf_file, "sha256_of", with_a_flipped_bit)
    config = config_of("rwkv7")
    with pytest.raises(CheckpointError, match=r"does not read back as it was written; check the disk"):
        write(config, random_weights(config))
    assert list(tmp_path.iterdir()) == []


def test_a_missing_tensor_is_named(write):
    config = config_of("rwkv6")
    weights = random_weights(config)
    del weights["blocks.1.att.gate.weight"]
    with pytest.raises(CheckpointError, match=r"tensor 'blocks\.1\.att\.gate\.weight' is missing"):
        write(config, weights)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e9], ids=str)
def test_what_q8_0_cannot_hold_is_refused(write, tmp_path, value):
    config = config_of("rwkv7")
    weights = random_weights(config)
    weights["blocks.1.ffn.key.weight"][3, 4] = value
    with pytest.raises(
        CheckpointError, match=r"'blocks\.1\.ffn\.key\.weight' holds .*which Q8_0 cannot hold"
    ):
        write(config, weights, "Q8_0")
    assert list(tmp_path.iterdir()) == []


def test_what_f16_cannot_hold_is_refused(write):
    config = config_of("rwkv7")
    weights = random_weights(config)
    weights["head.weight"][0, 0] = 1e6
    with pytest.raises(CheckpointError, match=r"'head\.weight' holds 1e\+06, which fp16 cannot hold"):
        write(config, weights, "F16")


@pytest.mark.parametrize(
    ("vocab_size", "identity", "sentence"),
    [
        (
            65_536,
            TokenizerIdentity("neox", "ab" * 32),
            r"trained with the tokenizer 'neox'; of RWKV's tokenizers",
        ),
        (50_304, None, r"do not say which tokenizer .* vocab_size is 50304, not 65536"),
        (
            50_304,
            load_tokenizer("world").identity,
            r"vocab_size is 50304, but the tokenizer 'world' has 65530",
        ),
    ],
    ids=["other", "untold", "too-small"],
)
def test_a_tokenizer_that_llama_cpp_lacks_is_refused(tmp_path, vocab_size, identity, sentence):
    config = config_of("rwkv7", n_layer=1, vocab_size=vocab_size)
    weights = TensorSource.of(random_weights(config))
    with pytest.raises(CheckpointError, match=sentence):
        write_gguf(tmp_path / "x.gguf", config, weights, tokenizer=identity)


def test_without_the_package_it_says_how_to_install_it(write, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    config = config_of("rwkv7")
    with pytest.raises(CheckpointError, match=r"pip install 'rwkv-train\[gguf\]'"):
        write(config, random_weights(config))
