"""What an adapter makes of a weight, by the formulas of the papers; which base it may be merged into."""

import pytest
import torch

from rwkv_train.checkpoints import Weights, merge, merge_into
from rwkv_train.checkpoints.adapter_layers import BlockSums, LowRank
from rwkv_train.checkpoints.adapters import Adapter
from rwkv_train.checkpoints.tensor_source import TensorSource
from rwkv_train.errors import CheckpointError
from tests.finetuning.adapter_models import base_model, trained, write

LAYER = "blocks.0.att.key"


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def merged(weight, layer_adapter, dtype=None):
    adapter = Adapter("adapter", {LAYER: layer_adapter}, note=None)
    return merge({f"{LAYER}.weight": weight}, adapter, dtype)[f"{LAYER}.weight"]


def test_lora_adds_its_scaled_product():
    weight, a, b = random(5, 7), random(3, 7, seed=1), random(5, 3, seed=2)
    expected = [
        [weight[o, i] + 2.5 * sum(b[o, r] * a[r, i] for r in range(3)) for i in range(7)] for o in range(5)
    ]
    torch.testing.assert_close(merged(weight, LowRank(a, b, 2.5)), torch.tensor(expected))


def test_dora_gives_the_rows_of_the_sum_the_learned_lengths():
    weight, a, b, m = random(5, 7), random(3, 7, seed=1), random(5, 3, seed=2), random(5, seed=3)
    found = merged(weight, LowRank(a, b, 0.5, m))
    for row, plain, length in zip(found, weight + 0.5 * b @ a, m, strict=True):
        torch.testing.assert_close(row, length * plain / plain.dot(plain).sqrt())


@pytest.mark.parametrize("n_inputs", [6, 7, 3], ids=["even", "uneven", "one-block"])
def test_miss_multiplies_the_sum_of_the_blocks_of_inputs(n_inputs):
    weight, block, x = random(5, n_inputs), random(3, 5, seed=1), random(n_inputs, seed=2)
    sums = sum(torch.nn.functional.pad(part, (0, 3 - len(part))) for part in x.split(3))
    torch.testing.assert_close(merged(weight, BlockSums(block)) @ x, weight @ x + block.T @ sums)


def test_a_merged_weight_is_rounded_once():
    weight, a, b = random(5, 7).bfloat16(), random(3, 7, seed=1), random(5, 3, seed=2)
    exact = weight.double() + 1.0 * b.double() @ a.double()
    assert torch.equal(merged(weight, LowRank(a, b, 1.0)), exact.bfloat16())
    assert torch.equal(merged(weight, LowRank(a, b, 1.0), torch.float32), exact.float())


def test_only_the_layers_of_the_adapter_are_computed():
    read = []

    def note(name):
        read.append(name)
        return torch.zeros(5, 7)

    names = (f"{LAYER}.weight", "blocks.0.att.value.weight")
    source = TensorSource({name: torch.empty(5, 7, device="meta") for name in names}, note)
    weights = merge(source, Adapter("x", {LAYER: LowRank(random(3, 7), random(5, 3), 1.0)}, None))
    assert list(weights) == list(names)
    assert read == []
    assert not weights[names[1]].any()
    assert weights[names[0]].any()


@pytest.mark.parametrize(
    ("layer", "adapter", "message"),
    [
        ("blocks.9.att.key", LowRank(random(3, 7), random(5, 3), 1.0), r"no layer 'blocks\.9\.att\.key'"),
        (LAYER, LowRank(random(3, 8), random(5, 3), 1.0), r"another size than the base's, \[5, 7\]"),
        (LAYER, BlockSums(random(3, 4)), r"another size than the base's, \[5, 7\]"),
    ],
    ids=["layer", "lora", "miss"],
)
def test_an_adapter_of_other_sizes_is_refused(layer, adapter, message):
    with pytest.raises(CheckpointError, match=message):
        merge({f"{LAYER}.weight": random(5, 7)}, Adapter("x", {layer: adapter}, None))


def test_a_row_without_direction_is_refused():
    weight = torch.zeros(5, 7)
    with pytest.raises(
        CheckpointError, match=r"'blocks\.0\.att\.key\.weight' holds values that are not finite"
    ):
        merged(weight, LowRank(random(3, 7), torch.zeros(5, 3), 1.0, random(5)))


def weights_of(model):
    return Weights(model.config, model.state_dict(), tokenizer=None, step=9)


def test_the_base_gets_the_tokenizer_of_the_adapter(tmp_path):
    folder = write(tmp_path, trained())
    weights = merge_into(weights_of(base_model()), folder)
    assert weights.tokenizer.name == "bytes"
    assert weights.step is None


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ({"seed": 1}, r"another base: .* the fingerprint [0-9a-f]{12}, these have [0-9a-f]{12}"),
        ({"arch": "rwkv6"}, "base whose arch is rwkv7; this one's is rwkv6"),
        ({"n_layer": 3}, "base whose n_layer is 2; this one's is 3"),
        ({"vocab_size": 300}, "base whose vocab_size is 257; this one's is 300"),
    ],
    ids=["numbers", "arch", "layers", "vocabulary"],
)
def test_a_wrong_base_is_refused(tmp_path, base, message):
    folder = write(tmp_path, trained())
    with pytest.raises(CheckpointError, match=message):
        merge_into(weights_of(base_model(**base)), folder, unchecked_base=True)


def test_an_adapter_without_a_note_needs_permission(tmp_path):
    folder = write(tmp_path, trained())
    (folder / "rwkv_train.json").unlink()
    weights = weights_of(base_model())
    with pytest.raises(CheckpointError, match=r"has no rwkv_train\.json, .*--unchecked-base"):
        merge_into(weights, folder)
    name = "blocks.0.att.key.weight"
    changed = merge_into(weights, folder, unchecked_base=True).tensors[name]
    assert not torch.equal(changed, weights.tensors[name])
