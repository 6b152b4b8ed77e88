import pytest
import torch

from rwkv_train.checkpoints.infer import check_tensors, expected_shapes, fill_unused, infer_config
from rwkv_train.config.model import LoraRanks, Rwkv6Ranks
from rwkv_train.errors import CheckpointError

VERSIONS = ["rwkv4", "rwkv5.0", "rwkv5.1", "rwkv5.2", "rwkv6", "rwkv7"]
EACH = pytest.mark.parametrize("arch", VERSIONS)
UNUSED = ["blocks.0.att.v0", "blocks.0.att.v1", "blocks.0.att.v2"]


def without_memory(shapes):
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def test_rwkv4_sizes_come_from_the_shapes(rwkv4_shapes):
    config = infer_config(without_memory(rwkv4_shapes(50277, 768, 12)))
    assert (config.arch, config.n_layer, config.n_embd, config.vocab_size) == ("rwkv4", 12, 768, 50277)
    assert config.ffn_width == 3072
    assert config.ctx_len == 1024


@pytest.mark.parametrize("head_size", [8, 16, 32, 64])
def test_rwkv7_sizes_and_ranks_come_from_the_shapes(rwkv7_shapes, head_size):
    config = infer_config(
        without_memory(rwkv7_shapes(300, 64, 3, head_size, {"w": 5, "a": 6, "v": 7, "g": 9}))
    )
    assert (config.arch, config.n_layer, config.n_embd, config.vocab_size) == ("rwkv7", 3, 64, 300)
    assert (config.head_size, config.n_head) == (head_size, 64 // head_size)
    assert config.lora_ranks == LoraRanks(w=5, a=6, v=7, g=9)
    assert config.ctx_len == 4096


@pytest.mark.parametrize("drop", [False, True], ids=["with-block-0", "without-block-0"])
def test_the_published_rwkv7_of_450_million_is_recognized(rwkv7_shapes, drop):
    shapes = rwkv7_shapes(65536, 1024, 24, 64, {"w": 64, "a": 64, "v": 32, "g": 128})
    tensors = without_memory(shapes)
    # The published counts, with and without the unused tensors of block 0.
    assert sum(tensor.numel() for tensor in tensors.values()) == 450_834_432
    if drop:
        tensors = {name: tensor for name, tensor in tensors.items() if name not in UNUSED}
        assert sum(tensor.numel() for tensor in tensors.values()) == 450_767_872
    config = infer_config(tensors)
    assert config.ranks == LoraRanks(w=64, a=64, v=32, g=128)
    assert sum(torch.Size(shape).numel() for shape in expected_shapes(config).values()) == 450_834_432


def test_one_layer_without_its_unused_tensors_is_recognized(rwkv7_shapes):
    shapes = rwkv7_shapes(60, 32, 1, 8, {"w": 5, "a": 6, "v": 7, "g": 9})
    config = infer_config(without_memory({n: s for n, s in shapes.items() if n not in UNUSED}))
    assert (config.n_layer, config.ranks.w, config.ranks.g) == (1, 5, 9)


def test_one_layer_with_its_unused_tensors_keeps_their_rank(rwkv7_shapes):
    shapes = rwkv7_shapes(60, 32, 1, 8, {"w": 5, "a": 6, "v": 7, "g": 9})
    assert infer_config(without_memory(shapes)).ranks.v == 7


@EACH
def test_a_one_layer_model_is_recognized(arch, shapes_of):
    shapes = {name: shape for name, shape in shapes_of(arch).items() if not name.startswith("blocks.1.")}
    config = infer_config(without_memory(shapes))
    assert f"rwkv{config.version}" == arch
    assert config.arch == arch.partition(".")[0]
    assert config.n_layer == 1


@EACH
def test_the_order_of_tensors_does_not_matter(arch, shapes_of, config_of):
    backwards = dict(reversed(shapes_of(arch).items()))
    assert infer_config(without_memory(backwards), ctx_len=16) == config_of(arch)


@pytest.mark.parametrize("version", ["5.0", "5.1"])
@pytest.mark.parametrize("bonus", ["time_first", "time_faaaa"])
def test_older_rwkv5_has_its_bonus_under_one_of_two_names(rwkv5_shapes, version, bonus):
    config = infer_config(without_memory(rwkv5_shapes(60, 48, 3, 16, 192, version, bonus)))
    assert (config.version, config.bonus, config.head_size, config.ffn_width) == (version, bonus, 16, 192)


@pytest.mark.parametrize(("head_size", "n_head"), [(64, 1), (8, 8)])
def test_rwkv5_sizes_come_from_the_shapes(rwkv5_shapes, head_size, n_head):
    config = infer_config(without_memory(rwkv5_shapes(300, 64, 3, head_size, 77, "5.2", "time_faaaa")))
    assert (config.n_layer, config.n_embd, config.vocab_size, config.ffn_width) == (3, 64, 300, 77)
    assert (config.head_size, config.n_head, config.version) == (head_size, n_head, "5.2")
    assert (config.ctx_len, config.head_size_divisor) == (4096, 8.0)


def test_rwkv6_sizes_and_ranks_come_from_the_shapes(rwkv6_shapes):
    config = infer_config(without_memory(rwkv6_shapes(300, 64, 3, 16, 77, 9, 11)))
    assert (config.arch, config.n_layer, config.n_embd, config.vocab_size) == ("rwkv6", 3, 64, 300)
    assert (config.head_size, config.n_head, config.ffn_width) == (16, 4, 77)
    assert config.lora_ranks == Rwkv6Ranks(shift=9, decay=11)


# Sizes that the abstract of arXiv 2404.05892 gives in billions of parameters, by layers, width and ranks.
@pytest.mark.parametrize(
    ("arch", "n_layer", "n_embd", "billions"),
    [
        ("rwkv5", 24, 1024, "0.46"),
        ("rwkv5", 32, 4096, "7.5"),
        ("rwkv6", 24, 2048, "1.6"),
        ("rwkv6", 32, 2560, "3.1"),
    ],
)
def test_the_published_rwkv5_and_6_are_recognized(
    arch, n_layer, n_embd, billions, rwkv5_shapes, rwkv6_shapes
):
    sizes = (65_536, n_embd, n_layer, 64, n_embd * 7 // 2)
    shapes = rwkv5_shapes(*sizes, "5.2", "time_faaaa") if arch == "rwkv5" else rwkv6_shapes(*sizes, 32, 64)
    config = infer_config(without_memory(shapes))
    assert config == type(config)(n_layer=n_layer, n_embd=n_embd)
    n_decimals = len(billions.partition(".")[2])
    assert f"{sum(torch.Size(shape).numel() for shape in shapes.values()) / 1e9:.{n_decimals}f}" == billions


def test_the_context_length_can_be_given(tensors_of):
    assert infer_config(tensors_of("rwkv7"), ctx_len=512).ctx_len == 512


@EACH
def test_our_models_have_the_published_names_and_shapes(arch, shapes_of, config_of):
    assert dict(expected_shapes(config_of(arch))) == shapes_of(arch)


@EACH
def test_each_missing_tensor_is_named(arch, tensors_of):
    whole = tensors_of(arch)
    for name in whole.keys() - set(UNUSED):
        tensors = {other: tensor for other, tensor in whole.items() if other != name}
        with pytest.raises(CheckpointError, match=rf"x.pth: .*'{name}' is missing"):
            infer_config(tensors, source="x.pth")


@EACH
def test_each_misshaped_tensor_is_named_with_what_was_found_or_makes_others_wrong(arch, tensors_of):
    whole = tensors_of(arch)
    for name, tensor in whole.items():
        wrong = {**whole, name: torch.zeros(*tensor.shape[:-1], tensor.shape[-1] + 1)}
        with pytest.raises(CheckpointError, match=r"has shape"):
            infer_config(wrong)


def test_a_misshaped_tensor_is_named_with_both_shapes(tensors_of):
    tensors = {**tensors_of("rwkv7"), "blocks.1.att.key.weight": torch.zeros(32, 31)}
    with pytest.raises(
        CheckpointError, match=r"'blocks.1.att.key.weight' has shape \[32, 31\].*has \[32, 32\]"
    ):
        infer_config(tensors)


def test_a_missing_tensor_is_named_with_its_shape(tensors_of):
    tensors = tensors_of("rwkv4")
    del tensors["blocks.1.att.key.weight"]
    with pytest.raises(
        CheckpointError, match=r"'blocks.1.att.key.weight' is missing; rwkv4 .*shape \[32, 32\]"
    ):
        infer_config(tensors)


def test_a_missing_block_is_found(tensors_of):
    tensors = {name: t for name, t in tensors_of("rwkv7").items() if not name.startswith("blocks.1.")}
    tensors["blocks.7.ln1.weight"] = torch.zeros(32)
    with pytest.raises(CheckpointError, match=r"'blocks.1.ln1.weight' is missing"):
        infer_config(tensors)


def test_an_extra_tensor_is_named_with_its_shape(tensors_of):
    tensors = {**tensors_of("rwkv4"), "head_q.weight": torch.zeros(3, 4)}
    with pytest.raises(
        CheckpointError, match=r"'head_q.weight' \[3, 4\] is extra; rwkv4 .* has no such tensor"
    ):
        infer_config(tensors)


def test_heads_that_do_not_fill_the_width_are_refused(tensors_of):
    tensors = {**tensors_of("rwkv7"), "blocks.0.att.r_k": torch.zeros(3, 8)}
    with pytest.raises(CheckpointError, match=r"\[3, 8\]; n_head x head_size must be n_embd \(32\)"):
        infer_config(tensors)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("blocks.0.rosa.q.weight", r"this is RWKV-8 \(ROSA\)"),
        ("blocks.0.ffn.enn.weight", r"this is RWKV-8 \(DeepEmbed\)"),
        ("layers.0.self_attn.q_proj.weight", "this is a Transformer"),
        ("transformer.h.0.attn.c_attn.weight", "this is a Transformer"),
        ("backbone.layers.0.mixer.A_log", "this is a Mamba model"),
        ("conv1.weight", "this is no RWKV model .*'conv1.weight'"),
    ],
)
def test_another_architecture_is_refused_by_its_name(name, sentence):
    with pytest.raises(CheckpointError, match=rf"x\.pth: {sentence}.*RWKV-4, 5, 6 and 7 are supported"):
        infer_config({name: torch.zeros(2)}, source="x.pth")


@pytest.mark.parametrize(
    "name", ["rwkv.blocks.0.attention.key.weight", "model.layers.0.attn.r_proj.linear.weight"]
)
def test_a_file_out_of_a_hugging_face_folder_is_refused_with_the_way_around(name):
    with pytest.raises(
        CheckpointError, match=r"^x: this is a file of a Hugging Face folder; give the folder"
    ):
        infer_config({name: torch.zeros(2)}, source="x")


@pytest.mark.parametrize(
    ("extra", "sentence"),
    [("blocks.0.ffn.s_emb.weight", "RWKV-7a"), ("blocks.0.qkv.qq.weight", "RWKV-7b")],
)
def test_a_later_rwkv7_is_refused_by_its_name(tensors_of, extra, sentence):
    with pytest.raises(CheckpointError, match=f"this is {sentence}"):
        infer_config({**tensors_of("rwkv7"), extra: torch.zeros(2)})


@EACH
def test_a_tensor_of_another_version_is_extra_or_makes_others_missing(arch, tensors_of):
    for name in ("att.time_first", "att.ln_x.weight", "att.gate.weight", "att.time_maa_x", "att.r_k"):
        tensors = tensors_of(arch)
        if f"blocks.0.{name}" not in tensors:
            with pytest.raises(CheckpointError, match=r"is extra|is missing"):
                infer_config({**tensors, f"blocks.0.{name}": torch.zeros(4, 8)})


def test_decays_of_heads_that_do_not_divide_the_width_are_refused(tensors_of):
    with pytest.raises(
        CheckpointError, match=r"time_decay' has shape \[5\]; n_embd \(32\) must be a multiple"
    ):
        infer_config({**tensors_of("rwkv5.1"), "blocks.0.att.time_decay": torch.zeros(5)})


def test_more_blocks_than_a_model_may_have_are_refused(tensors_of):
    tensors = tensors_of("rwkv4") | {f"blocks.{block}.ln1.bias": torch.zeros(32) for block in range(1_001)}
    with pytest.raises(CheckpointError, match=r"^x: model.n_layer is 1001 but should be less than"):
        infer_config(tensors, source="x")


@pytest.mark.parametrize("size", [2**62, 10**30])
def test_a_model_of_impossible_size_is_refused(tensors_of, config_of, size):
    config = config_of("rwkv4").model_copy(update={"vocab_size": size})
    with pytest.raises(CheckpointError, match=r"^x: this describes a model of impossible size"):
        check_tensors(config, tensors_of("rwkv4"), source="x")


def test_no_tensors_are_refused():
    with pytest.raises(CheckpointError, match=r"there is no tensor in it"):
        infer_config({})


def test_a_matrix_without_rows_is_refused(tensors_of):
    with pytest.raises(CheckpointError, match=r"'emb.weight' has shape \[0, 32\]"):
        infer_config({**tensors_of("rwkv7"), "emb.weight": torch.zeros(0, 32)})


def test_unused_tensors_that_are_absent_become_zeros(tensors_of, config_of):
    whole = tensors_of("rwkv7", dtype=torch.bfloat16)
    partial = {name: tensor for name, tensor in whole.items() if name not in UNUSED}
    check_tensors(config_of("rwkv7"), partial)
    filled = fill_unused(config_of("rwkv7"), partial)
    assert {name: tuple(filled[name].shape) for name in UNUSED} == {
        "blocks.0.att.v0": (1, 1, 32),
        "blocks.0.att.v1": (32, 7),
        "blocks.0.att.v2": (7, 32),
    }
    assert all(filled[name].dtype == torch.bfloat16 and not filled[name].any() for name in UNUSED)
    assert all(filled[name] is tensor for name, tensor in partial.items())
