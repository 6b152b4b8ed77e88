"""The tables against llama.cpp: its package's names, and the shapes that its loader asks for."""

import gguf
import pytest

from rwkv_train.checkpoints.gguf_layout import gguf_metadata, gguf_tensors
from rwkv_train.checkpoints.infer import expected_shapes
from rwkv_train.config.model import LoraRanks, Rwkv6Config, Rwkv6Ranks, Rwkv7Config
from rwkv_train.errors import CheckpointError
from rwkv_train.models.registry import build_model

C, N, F, V = 128, 64, 320, 300
CONFIGS = {
    "rwkv6": Rwkv6Config(
        n_layer=2,
        n_embd=C,
        head_size=N,
        ffn_width=F,
        vocab_size=V,
        lora_ranks=Rwkv6Ranks(shift=3, decay=5),
    ),
    "rwkv7": Rwkv7Config(
        n_layer=2, n_embd=C, head_size=N, vocab_size=V, lora_ranks=LoraRanks(w=5, a=6, v=7, g=9)
    ),
}
EACH = pytest.mark.parametrize("arch", ["rwkv6", "rwkv7"])

# src/models/rwkv6.cpp and rwkv7.cpp of llama.cpp, in its order of dimensions (the last one first).
NORMS = {f"{norm}.{part}": (C,) for norm in ("attn_norm", "attn_norm_2") for part in ("weight", "bias")}
SQUARE = ("time_mix_receptance", "time_mix_key", "time_mix_value", "time_mix_output")
BLOCK = (
    NORMS | {"time_mix_ln.weight": (C,), "time_mix_ln.bias": (C,)} | {f"{n}.weight": (C, C) for n in SQUARE}
)
LOADED = {
    "rwkv6": BLOCK
    | {
        "time_mix_gate.weight": (C, C),
        "time_mix_w1.weight": (C, 3 * 5),
        "time_mix_w2.weight": (3, C, 5),
        "time_mix_lerp_x.weight": (C,),
        "time_mix_lerp_fused.weight": (C, 1, 1, 5),
        "time_mix_first.weight": (N, C // N),
        "time_mix_decay.weight": (C,),
        "time_mix_decay_w1.weight": (C, 5),
        "time_mix_decay_w2.weight": (5, C),
        "channel_mix_lerp_k.weight": (C,),
        "channel_mix_lerp_r.weight": (C,),
        "channel_mix_key.weight": (C, F),
        "channel_mix_value.weight": (F, C),
        "channel_mix_receptance.weight": (C, C),
    },
    "rwkv7": BLOCK
    | {f"time_mix_{name}.weight": (C,) for name in ("w0", "a0", "v0", "k_k", "k_a", "r_k")}
    | {f"time_mix_{name}1.weight": (C, rank) for name, rank in {"w": 5, "a": 6, "v": 7, "g": 9}.items()}
    | {f"time_mix_{name}2.weight": (rank, C) for name, rank in {"w": 5, "a": 6, "v": 7, "g": 9}.items()}
    | {
        "time_mix_lerp_fused.weight": (C, 1, 1, 6),
        "channel_mix_lerp_k.weight": (C,),
        "channel_mix_key.weight": (C, 4 * C),
        "channel_mix_value.weight": (4 * C, C),
    },
}
# The first block's value residual, which is not used, has the rank of a there.
FIRST_BLOCK = {"rwkv6": {}, "rwkv7": {"time_mix_v1.weight": (C, 6), "time_mix_v2.weight": (6, C)}}


def shapes_of(config):
    headers = build_model(config, wkv_backend="reference", device="meta").state_dict()
    return {
        tensor.name: tuple(reversed(tensor.transform([headers[name] for name in tensor.sources]).shape))
        for tensor in gguf_tensors(config)
    }


@EACH
def test_names_and_shapes_are_those_that_llama_cpp_loads(arch):
    expected = {"token_embd.weight": (C, V), "output.weight": (C, V)}
    expected |= {
        f"{n}.{part}": (C,) for n in ("token_embd_norm", "output_norm") for part in ("weight", "bias")
    }
    expected |= {f"blk.0.{name}": shape for name, shape in (LOADED[arch] | FIRST_BLOCK[arch]).items()}
    expected |= {f"blk.1.{name}": shape for name, shape in LOADED[arch].items()}
    assert shapes_of(CONFIGS[arch]) == expected


@EACH
def test_each_weight_goes_where_the_map_of_the_gguf_package_puts_it(arch):
    config = CONFIGS[arch]
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], config.n_layer)
    skeleton = {
        "rwkv6": {
            "emb.": "rwkv.embeddings.",
            "blocks.0.ln0.": "rwkv.blocks.0.pre_ln.",
            "blocks.": "rwkv.blocks.",
        },
        "rwkv7": {
            "emb.": "model.embeddings.",
            "blocks.0.ln0.": "model.pre_ln.",
            "blocks.": "model.layers.",
        },
    }[arch] | {"head.": "head.", "ln_out.": {"rwkv6": "rwkv.ln_out.", "rwkv7": "model.ln_out."}[arch]}
    for tensor in gguf_tensors(config):
        if len(tensor.sources) > 1 or tensor.name.startswith("blk.0.time_mix_v"):
            continue  # the converter does these by hand
        start = next(start for start in skeleton if tensor.sources[0].startswith(start))
        foreign = skeleton[start] + tensor.sources[0].removeprefix(start)
        foreign = foreign.replace(".att.", ".attention.").replace(".ffn.", ".feed_forward.")
        found = names.get_name(foreign, try_suffixes=(".weight", ".bias"))
        assert found is not None, foreign
        assert tensor.name == (found if found.endswith((".weight", ".bias")) else f"{found}.weight")


@EACH
def test_every_weight_that_the_model_uses_is_in_the_file_once(arch):
    config = CONFIGS[arch]
    sources = [source for tensor in gguf_tensors(config) for source in tensor.sources]
    stand_ins = ["blocks.0.att.a0", "blocks.0.att.a1", "blocks.0.att.a2"] if arch == "rwkv7" else []
    unused = {"blocks.0.att.v0", "blocks.0.att.v1", "blocks.0.att.v2"}
    assert sorted(sources) == sorted([*(expected_shapes(config).keys() - unused), *stand_ins])


def test_metadata_are_the_keys_of_the_gguf_package():
    metadata = gguf_metadata(CONFIGS["rwkv6"], rescale_every=6) | gguf_metadata(CONFIGS["rwkv7"])
    keys = gguf.Keys
    expected = {}
    for arch, ffn_width in {"rwkv6": F, "rwkv7": 4 * C}.items():
        for key, value in {
            keys.LLM.CONTEXT_LENGTH: 1_048_576,
            keys.LLM.EMBEDDING_LENGTH: C,
            keys.LLM.BLOCK_COUNT: 2,
            keys.LLM.FEED_FORWARD_LENGTH: ffn_width,
            keys.Attention.HEAD_COUNT: 0,
            keys.Attention.LAYERNORM_EPS: 1e-5,
            keys.WKV.HEAD_SIZE: N,
        }.items():
            expected[key.format(arch=arch)] = value
    for key, value in {
        keys.LLM.RESCALE_EVERY_N_LAYERS: 6,
        keys.LLM.TIME_MIX_EXTRA_DIM: 3,
        keys.LLM.TIME_DECAY_EXTRA_DIM: 5,
    }.items():
        expected[key.format(arch="rwkv6")] = value
    for key, value in {
        keys.Attention.DECAY_LORA_RANK: 5,
        keys.Attention.ICLR_LORA_RANK: 6,
        keys.Attention.VALUE_RESIDUAL_MIX_LORA_RANK: 7,
        keys.Attention.GATE_LORA_RANK: 9,
    }.items():
        expected[key.format(arch="rwkv7")] = value
    assert metadata == expected


def test_only_what_is_added_to_the_residual_stream_is_rescaled():
    config = CONFIGS["rwkv6"].model_copy(update={"n_layer": 13})
    divisors = {tensor.name: tensor.divisor for tensor in gguf_tensors(config, 6) if tensor.divisor != 1}
    halved = {f"blk.{i}": 2 for i in range(6, 12)} | {"blk.12": 4}
    assert divisors == {
        f"{block}.{name}.weight": divisor
        for block, divisor in halved.items()
        for name in ("time_mix_output", "channel_mix_value")
    }


def test_rwkv7_is_never_rescaled():
    config = CONFIGS["rwkv7"].model_copy(update={"n_layer": 13})
    assert {tensor.divisor for tensor in gguf_tensors(config, 6)} == {1}


@pytest.mark.parametrize("arch", ["rwkv4", "rwkv5.0", "rwkv5.1", "rwkv5.2"])
def test_versions_that_llama_cpp_lacks_are_refused(config_of, arch):
    with pytest.raises(CheckpointError, match=rf"llama.cpp has no RWKV-{arch[4]}"):
        gguf_tensors(config_of(arch))


@EACH
@pytest.mark.parametrize("head_size", [8, 32])
def test_heads_that_llama_cpp_has_no_kernel_for_are_refused(arch, head_size):
    config = CONFIGS[arch].model_copy(update={"head_size": head_size})
    with pytest.raises(CheckpointError, match=rf"head_size \({head_size}\) must be 64 or 128"):
        gguf_tensors(config)


def test_another_epsilon_of_the_heads_is_refused():
    config = CONFIGS["rwkv6"].model_copy(update={"head_size_divisor": 4.0})
    with pytest.raises(CheckpointError, match=r"head_size_divisor \(4\) must be 8 for a GGUF file"):
        gguf_tensors(config)
