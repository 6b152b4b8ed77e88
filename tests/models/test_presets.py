"""The shipped presets have the published sizes."""

import pytest
import yaml

from rwkv_train.assets import find_asset_folder
from rwkv_train.config.load import load_train_config
from rwkv_train.config.save import to_tree
from rwkv_train.config.train import TrainConfig
from rwkv_train.models.registry import count_parameters

# name -> layers, width, learning rate at the start and at the end, "mini-epochs" (of 8,043) before it falls
# (arXiv 2305.13048, appendix G)
RWKV4 = {
    "rwkv4-169m": (12, 768, 6e-4, 1e-5, 361),
    "rwkv4-430m": (24, 1024, 4e-4, 1e-5, 411),
    "rwkv4-1b5": (24, 2048, 3e-4, 1e-5, 443),
    "rwkv4-3b": (32, 2560, 1.5e-4, 1e-5, 451),
    "rwkv4-7b": (32, 4096, 1.5e-4, 1e-5, 465),
    "rwkv4-14b": (40, 5120, 1e-4, 7e-6, 544),
}
# name -> layers, width, ranks of w, a, v, g
RWKV7 = {
    "rwkv7-0.1b": (12, 768, (64, 64, 32, 128)),
    "rwkv7-0.4b": (24, 1024, (64, 64, 32, 128)),
    "rwkv7-1.5b": (24, 2048, (96, 96, 64, 256)),
    "rwkv7-2.9b": (32, 2560, (96, 96, 64, 320)),
    "rwkv7-7.2b": (32, 4096, (128, 128, 96, 480)),
}
# name -> layers, width, learning rate at the start and at the end, tokens in a batch (arXiv 2404.05892, table 17;
# RWKV-6 of 7B and 14B came later: no recipe is known)
RWKV5 = {
    "rwkv5-0.4b": (24, 1024, 4e-4, 2e-5, 786_432),
    "rwkv5-1.5b": (24, 2048, 3e-4, 2e-5, 1_572_864),
    "rwkv5-3b": (32, 2560, 2e-4, 1.5e-5, 786_432),
    "rwkv5-7b": (32, 4096, 1.5e-4, 1e-5, 2_359_296),
}
RWKV6 = {
    "rwkv6-1.6b": (24, 2048, 3e-4, 2e-5, 1_572_864),
    "rwkv6-3b": (32, 2560, 2e-4, 1.5e-5, 786_432),
    "rwkv6-7b": (32, 4096, 1.5e-4, 1e-5, 2_359_296),
    "rwkv6-14b": (61, 4096, 1e-4, 1e-5, 2_359_296),
}
RWKV5_AND_6 = RWKV5 | RWKV6
PRESETS = [*RWKV4, *RWKV5_AND_6, *RWKV7]


def rwkv7_parameters(n_layer, n_embd, ranks, vocab_size=65_536):
    """Count by hand: embedding and head, ln0 and ln_out, and in each layer what the names say."""
    mixes_and_biases = 6 + 3 + 2 + 1  # x_*; w0, a0, v0; k_k, k_a; r_k
    linears, pairs, ln_x = 4 * n_embd * n_embd, 2 * n_embd * sum(ranks), 2 * n_embd
    att = mixes_and_biases * n_embd + pairs + linears + ln_x
    ffn = n_embd + 2 * 4 * n_embd * n_embd
    return 2 * vocab_size * n_embd + 2 * 2 * n_embd + n_layer * (att + ffn + 2 * 2 * n_embd)


def rwkv4_parameters(n_layer, n_embd, vocab_size=50_277):
    """Count by the formula of the paper."""
    return 2 * vocab_size * n_embd + 13 * n_embd * n_embd * n_layer + n_embd * (11 * n_layer + 4)


def rwkv5_parameters(n_layer, n_embd, vocab_size=65_536):
    """Count by hand: as RWKV-7, with what the names of RWKV-5.2 say."""
    ffn_width = n_embd * 7 // 2
    att = (4 + 2 + 2) * n_embd + 5 * n_embd * n_embd  # time_mix_*; decay and bonus; ln_x; linears
    ffn = 2 * n_embd + 2 * n_embd * ffn_width + n_embd * n_embd
    return 2 * vocab_size * n_embd + 2 * 2 * n_embd + n_layer * (att + ffn + 2 * 2 * n_embd)


def rwkv6_parameters(n_layer, n_embd):
    """What RWKV-6 adds to RWKV-5.2: two vectors and the low-rank pairs."""
    shift, decay = (64, 128) if n_embd == 4096 else (32, 64)
    pairs = 2 * n_embd * (5 * shift + decay)
    return rwkv5_parameters(n_layer, n_embd) + n_layer * (2 * n_embd + pairs)


def test_every_published_size_has_a_preset():
    shipped = {path.stem for path in (find_asset_folder("configs") / "pretrain").glob("rwkv*-*.yaml")}
    assert shipped == set(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_plain_yaml_with_valid_settings(name):
    path = find_asset_folder("configs") / "pretrain" / f"{name}.yaml"
    assert TrainConfig.model_validate(yaml.safe_load(path.read_text())) == load_train_config(name)


@pytest.mark.parametrize("devices", [2, 4, 8])
@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_spreads_over_more_devices(name, devices):
    settings = load_train_config(name, [f"trainer.devices={devices}"])
    assert settings.trainer.accumulation * settings.trainer.micro_batch_size * devices == (
        load_train_config(name).trainer.global_batch_size
    )


@pytest.mark.parametrize("name", RWKV4)
def test_rwkv4_presets_have_the_published_sizes_and_recipe(name):
    L, C, lr, lr_final, mini_epochs = RWKV4[name]
    settings = load_train_config(name)
    model, optim = settings.model, settings.optim
    assert (model.arch, model.n_layer, model.n_embd) == ("rwkv4", L, C)
    assert (model.vocab_size, model.ctx_len, settings.data.tokenizer) == (50_277, 1024, "neox")
    assert (optim.lr, optim.lr_final, optim.weight_decay) == (lr, lr_final, 0)
    assert (optim.schedule, optim.wsd_decay, optim.warmup_start) == ("wsd", "exponential", 0.2)
    assert optim.wsd_decay_fraction == pytest.approx(1 - mini_epochs / 8043, abs=1e-6)
    assert model.embedding_scale == optim.lr
    assert count_parameters(model) == rwkv4_parameters(L, C)


@pytest.mark.parametrize("name", RWKV5_AND_6)
def test_rwkv5_and_6_presets_have_the_published_sizes_and_recipe(name):
    L, C, lr, lr_final, batch_tokens = RWKV5_AND_6[name]
    settings = load_train_config(name)
    model, optim = settings.model, settings.optim
    assert (model.version, model.n_layer, model.n_embd, model.head_size) == (
        "5.2" if name in RWKV5 else "6",
        L,
        C,
        64,
    )
    assert (model.vocab_size, model.ctx_len, settings.data.tokenizer) == (65_536, 4096, "world")
    assert (optim.lr, optim.lr_final, optim.weight_decay, optim.schedule) == (lr, lr_final, 0.001, "cosine")
    assert (optim.warmup_steps, optim.warmup_start) == (10, 0.2)
    assert settings.trainer.global_batch_size * model.ctx_len == batch_tokens
    count = rwkv5_parameters if name in RWKV5 else rwkv6_parameters
    assert count_parameters(model) == count(L, C)


@pytest.mark.parametrize("name", ["quickstart", "quickstart-rwkv5", "quickstart-rwkv6"])
def test_the_small_presets_differ_in_their_version_alone(name):
    ours, first = (to_tree(load_train_config(other)) for other in (name, "quickstart"))
    ours["trainer"]["out_dir"] = first["trainer"]["out_dir"]
    assert {key: ours[key] for key in ours if key != "model"} == {
        key: first[key] for key in first if key != "model"
    }
    sizes = ("n_layer", "n_embd", "head_size", "vocab_size", "ctx_len")
    assert [ours["model"][key] for key in sizes] == [first["model"][key] for key in sizes]


@pytest.mark.parametrize("name", RWKV7)
def test_rwkv7_presets_have_the_published_sizes(name):
    L, C, ranks = RWKV7[name]
    settings = load_train_config(name)
    model = settings.model
    assert (model.arch, model.n_layer, model.n_embd, model.head_size) == ("rwkv7", L, C, 64)
    assert (model.vocab_size, model.ctx_len, settings.data.tokenizer) == (65_536, 4096, "world")
    assert tuple(model.ranks.model_dump().values()) == ranks
    assert settings.optim.weight_decay == 0.1
    assert count_parameters(model) == rwkv7_parameters(L, C, ranks)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("rwkv7-0.1b", 191_084_544),  # printed in the reference trainer's README
        ("rwkv7-0.4b", 450_834_432),
        ("rwkv4-169m", 169_342_464),  # 1.693e8 in the paper
        ("rwkv4-14b", 14_148_597_760),  # 1.415e10 in the paper
    ],
)
def test_known_counts(name, count):
    assert count_parameters(load_train_config(name).model) == count


@pytest.mark.parametrize(
    ("name", "billions"),
    [("rwkv5-0.4b", "0.46"), ("rwkv5-7b", "7.5"), ("rwkv6-1.6b", "1.6"), ("rwkv6-3b", "3.1")],
)
def test_counts_in_the_abstract_of_the_paper(name, billions):
    count = count_parameters(load_train_config(name).model)
    assert f"{count / 1e9:.{len(billions) - 2}f}" == billions


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_states_its_number_of_parameters(name):
    text = (find_asset_folder("configs") / "pretrain" / f"{name}.yaml").read_text()
    assert f"{count_parameters(load_train_config(name).model):,} parameters" in text
