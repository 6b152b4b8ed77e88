"""Initial values against the published formulas, written once more in NumPy float64."""

import numpy as np
import pytest
import torch

from rwkv_train.config.model import LoraRanks, Rwkv4Config, Rwkv5Config, Rwkv6Config, Rwkv6Ranks, Rwkv7Config
from rwkv_train.models.registry import build_model, initialize

C, N = 48, 8
RANKS = {"w": 5, "a": 6, "v": 7, "g": 60}  # one above the width: its second matrix is the tall one

DEPTHS = pytest.mark.parametrize("n_layer", [1, 4])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
# Relative to the largest values of about 8: float32 powers; bfloat16 keeps 8 bits of them.
TOLERANCES = {torch.float32: {"rtol": 1e-6, "atol": 2e-6}, torch.bfloat16: {"rtol": 2**-8, "atol": 2e-6}}


def rwkv7(n_layer, initialization="revised", vocab_size=100):
    return Rwkv7Config(
        n_layer=n_layer,
        n_embd=C,
        head_size=N,
        vocab_size=vocab_size,
        lora_ranks=LoraRanks(**RANKS),
        initialization=initialization,
    )


def rwkv4(n_layer, vocab_size=100):
    return Rwkv4Config(n_layer=n_layer, n_embd=C, vocab_size=vocab_size, embedding_scale=3e-4)


def rwkv5(n_layer, vocab_size=100):
    return Rwkv5Config(n_layer=n_layer, n_embd=C, head_size=N, vocab_size=vocab_size)


def rwkv6(n_layer, vocab_size=100):
    return Rwkv6Config(
        n_layer=n_layer,
        n_embd=C,
        head_size=N,
        vocab_size=vocab_size,
        lora_ranks=Rwkv6Ranks(shift=6, decay=7),
    )


ALL = pytest.mark.parametrize("make", [rwkv4, rwkv5, rwkv6, rwkv7])


def initial(config, dtype=torch.float32, seed=0):
    model = build_model(config).to(dtype)
    initialize(model, seed)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def ratios(layer, n_layer):
    return (layer / (n_layer - 1) if n_layer > 1 else 0.0), 1 - layer / n_layer


def rwkv7_vectors(layer, n_layer, initialization):
    r01, r10 = ratios(layer, n_layer)
    n = np.arange(C)
    d = n / C
    linear = n / (C - 1) - 0.5
    z = (n % N - (N - 1) / 2) / ((N - 1) / 2)
    zigzag = z * np.abs(z)
    vectors = {
        "att.x_r": 1 - d ** (0.2 * r10),
        "att.x_w": 1 - d ** (0.9 * r10),
        "att.x_a": 1 - d ** (0.9 * r10),
        "att.x_g": 1 - d ** (0.2 * r10),
        "att.ln_x.weight": np.full(C, ((1 + layer) / n_layer) ** 0.7),
        "att.ln_x.bias": np.zeros(C),
        "ffn.x_k": 1 - d ** (r10**4),
    }
    if initialization == "revised":
        return vectors | {
            "att.x_k": 1 - d ** (0.7 * r10),
            "att.x_v": 1 - d ** (0.7 * r10),
            "att.w0": -6 + 6 * (n / (C - 1)) ** (1 + r01**0.3) + 0.5 + zigzag * 2.5,
            "att.a0": -0.19 + zigzag * 0.3 + linear * 0.4,
            "att.v0": 0.73 - linear * 0.4,
            "att.k_k": 0.71 - linear * 0.1,
            "att.k_a": np.full(C, 1.02),
            "att.r_k": np.full(C, -0.04),
        }
    return vectors | {
        "att.x_k": 1 - (d ** (0.9 * r10) + 0.4 * r01),
        "att.x_v": 1 - (d ** (0.4 * r10) + 0.6 * r01),
        "att.w0": -7 + 5 * (n / (C - 1)) ** (0.85 + r01**0.5) + 0.5,
        "att.a0": np.zeros(C),
        "att.v0": np.ones(C),
        "att.k_k": np.full(C, 0.85),
        "att.k_a": np.ones(C),
        "att.r_k": np.zeros(C),
    }


def rwkv4_vectors(layer, n_layer):
    r01, r10 = ratios(layer, n_layer)
    n = np.arange(C)
    d = n / C
    return {
        "att.time_decay": -5 + 8 * (n / (C - 1)) ** (0.7 + 1.3 * r01),
        "att.time_first": np.log(0.3) + np.array([0.0, 0.5, -0.5] * C)[:C],
        "att.time_mix_k": d**r10,
        "att.time_mix_v": d**r10 + 0.3 * r01,
        "att.time_mix_r": d ** (0.5 * r10),
        "ffn.time_mix_k": d**r10,
        "ffn.time_mix_r": d**r10,
    }


def rwkv5_and_6_vectors(layer, n_layer):
    r01, _ = ratios(layer, n_layer)
    n = np.arange(C)
    return {
        "att.time_decay": -6 + 5 * (n / (C - 1)) ** (0.7 + 1.3 * r01),
        "att.time_faaaa": r01 * (1 - n / (C - 1)) + np.array([0.0, 0.1, -0.1] * C)[:C],
        "att.ln_x.weight": np.full(C, ((1 + layer) / n_layer) ** 0.7),
        "att.ln_x.bias": np.zeros(C),
    }


def rwkv5_vectors(layer, n_layer):
    r01, r10 = ratios(layer, n_layer)
    d = np.arange(C) / C
    return rwkv5_and_6_vectors(layer, n_layer) | {
        "att.time_mix_k": d**r10,
        "att.time_mix_v": d**r10 + 0.3 * r01,
        "att.time_mix_r": d ** (0.5 * r10),
        "att.time_mix_g": d ** (0.5 * r10),
        "ffn.time_mix_k": d**r10,
        "ffn.time_mix_r": d**r10,
    }


def rwkv6_vectors(layer, n_layer):
    r01, r10 = ratios(layer, n_layer)
    d = np.arange(C) / C
    return rwkv5_and_6_vectors(layer, n_layer) | {
        "att.time_maa_x": 1 - d**r10,
        "att.time_maa_w": 1 - d**r10,
        "att.time_maa_k": 1 - d**r10,
        "att.time_maa_v": 1 - (d**r10 + 0.3 * r01),
        "att.time_maa_r": 1 - d ** (0.5 * r10),
        "att.time_maa_g": 1 - d ** (0.5 * r10),
        "ffn.time_maa_k": 1 - d ** (r10**3),
        "ffn.time_maa_r": 1 - d ** (r10**3),
    }


def assert_vectors(values, layer, expected, dtype):
    for name, vector in expected.items():
        value = values[f"blocks.{layer}.{name}"]
        assert value.dtype == dtype
        np.testing.assert_allclose(
            value.double().flatten().numpy(), vector, err_msg=name, **TOLERANCES[dtype]
        )


def assert_orthogonal(matrix, gain):
    """The shorter side's vectors are orthogonal to each other and of length ``gain``."""
    tolerance = 0.02 if matrix.dtype == torch.bfloat16 else 1e-5
    matrix = matrix.double() / gain
    gram = matrix.T @ matrix if matrix.shape[0] > matrix.shape[1] else matrix @ matrix.T
    torch.testing.assert_close(gram, torch.eye(len(gram), dtype=torch.float64), atol=tolerance, rtol=0)


@DTYPES
@DEPTHS
@pytest.mark.parametrize("initialization", ["revised", "original"])
def test_rwkv7_vectors_have_the_published_values(n_layer, dtype, initialization):
    values = initial(rwkv7(n_layer, initialization), dtype)
    for layer in range(n_layer):
        assert_vectors(values, layer, rwkv7_vectors(layer, n_layer, initialization), dtype)


@DTYPES
@DEPTHS
def test_rwkv4_vectors_have_the_published_values(n_layer, dtype):
    values = initial(rwkv4(n_layer), dtype)
    for layer in range(n_layer):
        assert_vectors(values, layer, rwkv4_vectors(layer, n_layer), dtype)


@DTYPES
@DEPTHS
@pytest.mark.parametrize(
    ("make", "vectors"), [(rwkv5, rwkv5_vectors), (rwkv6, rwkv6_vectors)], ids=["rwkv5", "rwkv6"]
)
def test_rwkv5_and_6_vectors_have_the_published_values(make, vectors, n_layer, dtype):
    values = initial(make(n_layer), dtype)
    for layer in range(n_layer):
        assert_vectors(values, layer, vectors(layer, n_layer), dtype)


@DTYPES
@DEPTHS
@pytest.mark.parametrize("initialization", ["revised", "original"])
def test_rwkv7_matrices_are_orthogonal_or_zero(n_layer, dtype, initialization):
    values = initial(rwkv7(n_layer, initialization), dtype)
    for layer in range(n_layer):
        att, ffn = f"blocks.{layer}.att", f"blocks.{layer}.ffn"
        assert_orthogonal(values[f"{att}.receptance.weight"], 1)
        assert_orthogonal(values[f"{att}.value.weight"], 1)
        assert_orthogonal(values[f"{att}.key.weight"], 0.1)
        assert_orthogonal(values[f"{ffn}.key.weight"], 1)
        for name, rank in RANKS.items():
            assert not values[f"{att}.{name}1"].any()
            assert_orthogonal(values[f"{att}.{name}2"], 0.1 * max(rank / C, 1) ** 0.5)
        assert not values[f"{att}.output.weight"].any()
        assert not values[f"{ffn}.value.weight"].any()


@DTYPES
@DEPTHS
def test_rwkv4_matrices_are_orthogonal_or_zero(n_layer, dtype):
    values = initial(rwkv4(n_layer), dtype)
    for layer in range(n_layer):
        att, ffn = f"blocks.{layer}.att", f"blocks.{layer}.ffn"
        assert_orthogonal(values[f"{att}.value.weight"], 1)
        assert_orthogonal(values[f"{ffn}.key.weight"], 2)
        for name in (f"{att}.key", f"{att}.receptance", f"{att}.output", f"{ffn}.value", f"{ffn}.receptance"):
            assert not values[f"{name}.weight"].any(), name


@DTYPES
@DEPTHS
@pytest.mark.parametrize("make", [rwkv5, rwkv6])
def test_rwkv5_and_6_matrices_are_orthogonal_or_zero(make, n_layer, dtype):
    values = initial(make(n_layer), dtype)
    for layer in range(n_layer):
        att, ffn = f"blocks.{layer}.att", f"blocks.{layer}.ffn"
        for name, gain in (("receptance", 1), ("value", 1), ("key", 0.1), ("gate", 0.1)):
            assert_orthogonal(values[f"{att}.{name}.weight"], gain)
        assert_orthogonal(values[f"{ffn}.key.weight"], 1)
        for name in (f"{att}.output", f"{ffn}.value", f"{ffn}.receptance"):
            assert not values[f"{name}.weight"].any(), name


@DTYPES
@DEPTHS
def test_nothing_in_rwkv6_depends_on_the_text_at_first(n_layer, dtype):
    values = initial(rwkv6(n_layer), dtype)
    for layer in range(n_layer):
        for pair in ("time_maa", "time_decay"):
            first, second = (values[f"blocks.{layer}.att.{pair}_w{i}"].double() for i in (1, 2))
            assert not first.any()
            assert 0.0095 < second.abs().max() <= 0.01004  # bfloat16 rounds the bound itself up
            assert abs(second.mean()) < 0.0013  # 336 values: 4 standard errors of 0.01 / sqrt(3 * 336)


@DTYPES
@pytest.mark.parametrize(("vocab_size", "gain"), [(4 * C, 1.0), (C, 0.5), (C // 2, 0.5)])
@ALL
def test_the_head_is_orthogonal_with_a_gain_that_grows_with_the_vocabulary(make, vocab_size, gain, dtype):
    assert_orthogonal(initial(make(2, vocab_size=vocab_size), dtype)["head.weight"], gain)


@DTYPES
@pytest.mark.parametrize(("make", "bound"), [(rwkv4, 3e-4), (rwkv5, 1e-4), (rwkv6, 1e-4), (rwkv7, 1e-4)])
def test_embeddings_are_uniform_within_the_published_bound(make, bound, dtype):
    embedding = initial(make(2), dtype)["emb.weight"].double() / bound
    assert 0.99 < embedding.abs().max() <= 1.004  # bfloat16 rounds the bound itself up
    assert abs(embedding.mean()) < 0.03  # 4,800 values: 3.6 standard errors of 1 / sqrt(3 * 4,800)
    assert abs(embedding.std() - 3**-0.5) < 0.02


@ALL
def test_norms_start_as_the_plain_normalization(make):
    norms = {
        name: value for name, value in initial(make(2)).items() if ".ln" in f".{name}" and "ln_x" not in name
    }
    assert len(norms) == 2 * (1 + 2 * 2 + 1)
    for name, value in norms.items():
        assert (value == (1 if name.endswith("weight") else 0)).all(), name


@ALL
def test_a_seed_means_the_same_model_in_every_precision(make):
    exact, rounded = initial(make(2)), initial(make(2), torch.bfloat16)
    for name, value in exact.items():
        assert torch.equal(value.bfloat16(), rounded[name]), name


@ALL
def test_the_seed_alone_decides(make):
    first = initial(make(2), seed=5)
    torch.rand(3)
    again, other = initial(make(2), seed=5), initial(make(2), seed=6)
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert not torch.equal(first["head.weight"], other["head.weight"])
    assert not torch.equal(first["emb.weight"], other["emb.weight"])


@ALL
def test_building_and_initializing_leave_the_global_random_numbers_alone(make):
    before = torch.get_rng_state()
    initial(make(1))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("n_embd", [1, 3])
@pytest.mark.parametrize("kind", [Rwkv5Config, Rwkv6Config, Rwkv7Config])
def test_heads_of_one_channel_start_finite(kind, n_embd):
    config = kind(n_layer=1, n_embd=n_embd, head_size=1, vocab_size=5)
    assert all(value.isfinite().all() for value in initial(config).values())
