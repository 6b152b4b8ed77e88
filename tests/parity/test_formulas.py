"""Logits against the published formulas, written once more: NumPy, float64, one token after the other."""

import numpy as np
import pytest
import torch

from rwkv_train.config.model import LoraRanks, Rwkv4Config, Rwkv5Config, Rwkv6Config, Rwkv6Ranks, Rwkv7Config

# Both sides compute in float64; what is left is the order of the sums.
TOLERANCE = 1e-9


def layer_norm(x, weight, bias, eps=1e-5):
    return (x - x.mean()) / np.sqrt(x.var() + eps) * weight + bias


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def sections(weights, prefix):
    return {
        name[len(prefix) :]: value.squeeze() for name, value in weights.items() if name.startswith(prefix)
    }


def run_rwkv7(weights, tokens, n_layer):
    H, N = weights["blocks.0.att.r_k"].shape
    C = H * N
    att_last, ffn_last = np.zeros((2, n_layer, C))
    S = np.zeros((n_layer, H, N, N))
    rows = []
    for token in tokens:
        x = layer_norm(
            weights["emb.weight"][token], weights["blocks.0.ln0.weight"], weights["blocks.0.ln0.bias"]
        )
        for layer in range(n_layer):
            block = sections(weights, f"blocks.{layer}.")
            p = sections(weights, f"blocks.{layer}.att.")
            z = layer_norm(x, block["ln1.weight"], block["ln1.bias"])
            zr, zw, zk, zv, za, zg = (z + (att_last[layer] - z) * p[f"x_{j}"] for j in "rwkvag")
            att_last[layer] = z
            r, k, v = (
                p["receptance.weight"] @ zr,
                p["key.weight"] @ zk,
                p["value.weight"] @ zv,
            )
            w_pre = p["w0"] + np.tanh(zw @ p["w1"]) @ p["w2"]
            decay = np.exp(-np.exp(-np.log1p(np.exp(-w_pre)) - 0.5))
            if layer == 0:
                v_first = v
            else:
                v = v + (v_first - v) * sigmoid(p["v0"] + (zv @ p["v1"]) @ p["v2"])
            a = sigmoid(p["a0"] + (za @ p["a1"]) @ p["a2"])
            g = sigmoid(zg @ p["g1"]) @ p["g2"]
            kk = (k * p["k_k"]).reshape(H, N)
            kk = kk / np.linalg.norm(kk, axis=1, keepdims=True)
            k = k * (1 + (a - 1) * p["k_a"])
            y = np.zeros((H, N))
            r, k, v, a, decay = (t.reshape(H, N) for t in (r, k, v, a, decay))
            for h in range(H):
                old = S[layer, h]
                S[layer, h] = old * decay[h] + np.outer(old @ -kk[h], kk[h] * a[h]) + np.outer(v[h], k[h])
                y[h] = S[layer, h] @ r[h]
                ln_x = slice(h * N, (h + 1) * N)
                y[h] = layer_norm(y[h], p["ln_x.weight"][ln_x], p["ln_x.bias"][ln_x], eps=64e-5)
                y[h] += (r[h] * k[h] * p["r_k"].reshape(H, N)[h]).sum() * v[h]
            x = x + p["output.weight"] @ (y.reshape(C) * g)

            z = layer_norm(x, block["ln2.weight"], block["ln2.bias"])
            zk = z + (ffn_last[layer] - z) * block["ffn.x_k"]
            ffn_last[layer] = z
            x = x + block["ffn.value.weight"] @ np.maximum(block["ffn.key.weight"] @ zk, 0) ** 2
        rows.append(weights["head.weight"] @ layer_norm(x, weights["ln_out.weight"], weights["ln_out.bias"]))
    return np.stack(rows)


def run_rwkv4(weights, tokens, n_layer):
    C = weights["emb.weight"].shape[1]
    att_last, ffn_last = np.zeros((2, n_layer, C))
    past = [[] for _ in range(n_layer)]  # (k, v) of every earlier token: the definition, not the recurrence
    rows = []
    for token in tokens:
        x = layer_norm(
            weights["emb.weight"][token], weights["blocks.0.ln0.weight"], weights["blocks.0.ln0.bias"]
        )
        for layer in range(n_layer):
            block = sections(weights, f"blocks.{layer}.")
            p = sections(weights, f"blocks.{layer}.att.")
            z = layer_norm(x, block["ln1.weight"], block["ln1.bias"])
            zk, zv, zr = (z * p[f"time_mix_{j}"] + att_last[layer] * (1 - p[f"time_mix_{j}"]) for j in "kvr")
            att_last[layer] = z
            r, k, v = p["receptance.weight"] @ zr, p["key.weight"] @ zk, p["value.weight"] @ zv
            w = -np.exp(p["time_decay"])
            weight = np.exp(p["time_first"] + k)
            numerator, denominator = weight * v, weight
            for age, (k_s, v_s) in enumerate(reversed(past[layer])):
                weight = np.exp(age * w + k_s)
                numerator, denominator = numerator + weight * v_s, denominator + weight
            past[layer].append((k, v))
            x = x + p["output.weight"] @ (sigmoid(r) * numerator / denominator)

            z = layer_norm(x, block["ln2.weight"], block["ln2.bias"])
            mix_k, mix_r = block["ffn.time_mix_k"], block["ffn.time_mix_r"]
            hidden = np.maximum(block["ffn.key.weight"] @ (z * mix_k + ffn_last[layer] * (1 - mix_k)), 0) ** 2
            gate = sigmoid(block["ffn.receptance.weight"] @ (z * mix_r + ffn_last[layer] * (1 - mix_r)))
            ffn_last[layer] = z
            x = x + gate * (block["ffn.value.weight"] @ hidden)
        rows.append(weights["head.weight"] @ layer_norm(x, weights["ln_out.weight"], weights["ln_out.bias"]))
    return np.stack(rows)


def linear_attention(state, r, k, v, decay, bonus):
    """One token of RWKV-5 and 6, the state indexed [key, value] as published; changes ``state``."""
    y = r @ (state + np.diag(bonus) @ np.outer(k, v))
    state[:] = np.diag(decay) @ state + np.outer(k, v)
    return y


def run_rwkv5(weights, tokens, n_layer):
    C = weights["emb.weight"].shape[1]
    H = weights["blocks.0.att.time_decay"].shape[0]
    att_last, ffn_last = np.zeros((2, n_layer, C))
    S = np.zeros((n_layer, H, C // H, C // H))
    rows = []
    for token in tokens:
        x = layer_norm(
            weights["emb.weight"][token], weights["blocks.0.ln0.weight"], weights["blocks.0.ln0.bias"]
        )
        for layer in range(n_layer):
            block = sections(weights, f"blocks.{layer}.")
            p = sections(weights, f"blocks.{layer}.att.")
            z = layer_norm(x, block["ln1.weight"], block["ln1.bias"])

            def mixed(j, z=z, p=p, layer=layer):
                return z * p[f"time_mix_{j}"] + att_last[layer] * (1 - p[f"time_mix_{j}"])

            r, k, v = (
                (p[f"{name}.weight"] @ mixed(name[0])).reshape(H, -1)
                for name in ("receptance", "key", "value")
            )
            gate = p["gate.weight"] @ mixed("g") if "gate.weight" in p else None
            att_last[layer] = z
            bonus = p["time_faaaa"] if "time_faaaa" in p else np.exp(p["time_first"])
            decay, bonus = (
                np.broadcast_to(value.reshape(H, -1), (H, C // H))
                for value in (np.exp(-np.exp(p["time_decay"])), bonus)
            )
            y = np.stack(
                [linear_attention(S[layer, h], r[h], k[h], v[h], decay[h], bonus[h]) for h in range(H)]
            )
            y = np.concatenate([layer_norm(head / 8, 1, 0) for head in y]) * p["ln_x.weight"] + p["ln_x.bias"]
            x = x + p["output.weight"] @ (y if gate is None else y * gate * sigmoid(gate))

            z = layer_norm(x, block["ln2.weight"], block["ln2.bias"])
            mix_k, mix_r = block["ffn.time_mix_k"], block["ffn.time_mix_r"]
            hidden = np.maximum(block["ffn.key.weight"] @ (z * mix_k + ffn_last[layer] * (1 - mix_k)), 0) ** 2
            gate = sigmoid(block["ffn.receptance.weight"] @ (z * mix_r + ffn_last[layer] * (1 - mix_r)))
            ffn_last[layer] = z
            x = x + gate * (block["ffn.value.weight"] @ hidden)
        rows.append(weights["head.weight"] @ layer_norm(x, weights["ln_out.weight"], weights["ln_out.bias"]))
    return np.stack(rows)


def run_rwkv6(weights, tokens, n_layer):
    H, N = weights["blocks.0.att.time_faaaa"].shape
    C = H * N
    att_last, ffn_last = np.zeros((2, n_layer, C))
    S = np.zeros((n_layer, H, N, N))
    rows = []
    for token in tokens:
        x = layer_norm(
            weights["emb.weight"][token], weights["blocks.0.ln0.weight"], weights["blocks.0.ln0.bias"]
        )
        for layer in range(n_layer):
            block = sections(weights, f"blocks.{layer}.")
            p = sections(weights, f"blocks.{layer}.att.")
            z = layer_norm(x, block["ln1.weight"], block["ln1.bias"])
            change = att_last[layer] - z
            att_last[layer] = z
            low = np.tanh((z + change * p["time_maa_x"]) @ p["time_maa_w1"]).reshape(5, -1)
            zw, zk, zv, zr, zg = (
                z + change * (p[f"time_maa_{j}"] + low[i] @ p["time_maa_w2"][i])
                for i, j in enumerate("wkvrg")
            )
            raw = p["time_decay"] + np.tanh(zw @ p["time_decay_w1"]) @ p["time_decay_w2"]
            r, k, v = p["receptance.weight"] @ zr, p["key.weight"] @ zk, p["value.weight"] @ zv
            r, k, v, decay = (value.reshape(H, N) for value in (r, k, v, np.exp(-np.exp(raw))))
            gate = p["gate.weight"] @ zg
            bonus = p["time_faaaa"].reshape(H, N)
            y = np.stack(
                [linear_attention(S[layer, h], r[h], k[h], v[h], decay[h], bonus[h]) for h in range(H)]
            )
            y = np.concatenate([layer_norm(head / 8, 1, 0) for head in y]) * p["ln_x.weight"] + p["ln_x.bias"]
            x = x + p["output.weight"] @ (y * gate * sigmoid(gate))

            z = layer_norm(x, block["ln2.weight"], block["ln2.bias"])
            change = ffn_last[layer] - z
            ffn_last[layer] = z
            hidden = np.maximum(block["ffn.key.weight"] @ (z + change * block["ffn.time_maa_k"]), 0) ** 2
            gate = sigmoid(block["ffn.receptance.weight"] @ (z + change * block["ffn.time_maa_r"]))
            x = x + gate * (block["ffn.value.weight"] @ hidden)
        rows.append(weights["head.weight"] @ layer_norm(x, weights["ln_out.weight"], weights["ln_out.bias"]))
    return np.stack(rows)


@pytest.mark.parametrize(
    ("config", "formulas"),
    [
        pytest.param(
            Rwkv7Config(
                n_layer=3, n_embd=30, head_size=5, vocab_size=31, lora_ranks=LoraRanks(w=3, a=4, v=2, g=7)
            ),
            run_rwkv7,
            id="rwkv7-heads-of-5",
        ),
        pytest.param(
            Rwkv7Config(n_layer=1, n_embd=24, head_size=8, vocab_size=31), run_rwkv7, id="rwkv7-one-layer"
        ),
        pytest.param(
            Rwkv7Config(n_layer=2, n_embd=96, head_size=96, vocab_size=31),
            run_rwkv7,
            id="rwkv7-one-head-of-96",
        ),
        pytest.param(
            Rwkv6Config(
                n_layer=3,
                n_embd=30,
                head_size=5,
                vocab_size=31,
                ffn_width=41,
                lora_ranks=Rwkv6Ranks(shift=3, decay=4),
            ),
            run_rwkv6,
            id="rwkv6-heads-of-5",
        ),
        pytest.param(
            Rwkv6Config(n_layer=1, n_embd=24, head_size=24, vocab_size=31),
            run_rwkv6,
            id="rwkv6-one-layer-one-head",
        ),
        pytest.param(
            Rwkv5Config(n_layer=3, n_embd=30, head_size=5, vocab_size=31, ffn_width=41),
            run_rwkv5,
            id="rwkv5.2-heads-of-5",
        ),
        pytest.param(
            Rwkv5Config(n_layer=1, n_embd=24, head_size=24, vocab_size=31),
            run_rwkv5,
            id="rwkv5.2-one-layer-one-head",
        ),
        pytest.param(
            Rwkv5Config(n_layer=2, n_embd=30, head_size=5, vocab_size=31, version="5.1"),
            run_rwkv5,
            id="rwkv5.1-heads-of-5",
        ),
        pytest.param(
            Rwkv5Config(n_layer=2, n_embd=30, head_size=5, vocab_size=31, version="5.0", bonus="time_first"),
            run_rwkv5,
            id="rwkv5.0-heads-of-5",
        ),
        pytest.param(Rwkv4Config(n_layer=3, n_embd=30, vocab_size=31), run_rwkv4, id="rwkv4-three-layers"),
        pytest.param(Rwkv4Config(n_layer=1, n_embd=17, vocab_size=31), run_rwkv4, id="rwkv4-one-layer"),
    ],
)
def test_float64_logits_follow_the_published_formulas(random_model, config, formulas):
    model = random_model(config, dtype=torch.float64)
    tokens = torch.randint(0, config.vocab_size, (1, 23), generator=torch.Generator().manual_seed(3))
    weights = {name: value.numpy() for name, value in model.state_dict().items()}

    expected = formulas(weights, tokens[0].tolist(), config.n_layer)

    np.testing.assert_allclose(model(tokens).logits[0].numpy(), expected, atol=TOLERANCE, rtol=0)
