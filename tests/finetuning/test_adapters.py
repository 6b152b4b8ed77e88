"""An adapter in a model: where it begins, what learns, and that a saved one is the same again."""

import sys

import pytest
import torch

from rwkv_train.errors import CheckpointError, ConfigError
from rwkv_train.finetuning.adapters import base_name, inject_adapter, is_of_adapter, own_parameters
from tests.finetuning.adapter_models import MODELS, TOKENS, VARIANTS, base_model, logits, method_of, trained


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("arch", MODELS)
def test_a_new_adapter_changes_nothing(arch, variant):
    model = base_model(arch)
    before = logits(model)
    inject_adapter(model, method_of(**VARIANTS[variant]), seed=0)
    # PiSSA moves a part of each matrix to the adapter, which rounds.
    tolerance = 1e-5 if "pissa" in variant else 0
    torch.testing.assert_close(logits(model), before, rtol=0, atol=tolerance)


@pytest.mark.parametrize("variant", VARIANTS)
def test_all_other_parameters_keep_their_names_and_stay_as_they_are(variant):
    names = base_model().state_dict().keys()
    model = base_model()
    inject_adapter(model, method_of(**VARIANTS[variant]), seed=0)
    others = {name: p for name, p in model.named_parameters() if not is_of_adapter(name)}
    assert {base_name(name) for name in others} == names
    assert not any(parameter.requires_grad for parameter in others.values())

    model(TOKENS, targets=TOKENS).losses.sum().backward()
    learned = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
    assert learned == [name for name, p in own_parameters(model) if p.requires_grad]
    assert len(learned) >= 12  # of each of the 12 linear layers


@pytest.mark.parametrize("variant", ["lora", "dora", "pissa", "miss"])
def test_a_model_from_its_base_and_the_saved_parameters_is_the_same_bit_for_bit(variant):
    found = trained(**VARIANTS[variant])
    again = base_model()
    inject_adapter(again, found.method, seed=99, initial=found.own)

    parameters, expected = dict(again.named_parameters()), dict(found.model.named_parameters())
    assert parameters.keys() == expected.keys()
    for name, parameter in parameters.items():
        assert torch.equal(parameter, expected[name]), name
        assert parameter.requires_grad == expected[name].requires_grad, name
    assert torch.equal(logits(again), logits(found.model))


@pytest.mark.parametrize("layer", ["blocks.1.ffn.key", "blocks.1.ffn.value"], ids=["tall", "wide"])
def test_pissa_starts_where_peft_would(layer):
    from peft import LoraConfig, inject_adapter_in_model

    ours, theirs = base_model(), base_model()
    inject_adapter(ours, method_of(variant="pissa", alpha=6.0, targets=[layer]), seed=0)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=[layer], init_lora_weights="pissa")
    inject_adapter_in_model(config, theirs)
    one, other = ours.get_submodule(layer), theirs.get_submodule(layer)
    product, expected = (
        part.lora_B["default"].weight @ part.lora_A["default"].weight for part in (one, other)
    )
    tolerance = {"rtol": 0, "atol": 1e-5}  # peft decomposes in float32
    torch.testing.assert_close(product, expected, **tolerance)
    torch.testing.assert_close(one.base_layer.weight, other.base_layer.weight, **tolerance)


def test_pissa_of_a_matrix_of_a_smaller_rank_changes_nothing():
    model = base_model()
    with torch.no_grad():
        weight = model.blocks[0].ffn.key.weight
        weight.copy_(torch.outer(weight[:, 0], weight[0]))
    before = logits(model)
    inject_adapter(model, method_of(variant="pissa"), seed=0)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-5)


def test_the_seed_alone_gives_the_initial_values():
    def drawn(seed):
        model = base_model()
        inject_adapter(model, method_of(), seed)
        return torch.cat([parameter.flatten() for _, parameter in own_parameters(model)])

    torch.manual_seed(1)
    first = drawn(0)
    after = torch.rand(3)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(3), after)
    assert torch.equal(drawn(0), first)
    assert not torch.equal(drawn(1), first)


def test_the_adapter_of_a_narrow_base_is_float32():
    model = base_model().to(torch.bfloat16)
    inject_adapter(model, method_of(variant="dora"), seed=0)
    assert {parameter.dtype for _, parameter in own_parameters(model)} == {torch.float32}
    layer = model.blocks[0].ffn.key
    lengths = layer.base_layer.weight.double().square().sum(dim=1).sqrt()
    torch.testing.assert_close(layer.lora_magnitude_vector["default"].weight.double(), lengths)


def test_recomputed_blocks_drop_the_same_inputs():
    def gradients(recompute):
        found = trained(dropout=0.5)
        found.model.train()
        found.model.recompute_blocks = recompute
        torch.manual_seed(4)
        found.model(TOKENS, targets=TOKENS).losses.sum().backward()
        return [parameter.grad for _, parameter in own_parameters(found.model)]

    for one, other in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        ("dora", r"divides by the lengths .* 32 rows of blocks\.1\.att\.output\.weight are zero"),
        ("pissa", r"those of blocks\.1\.att\.output\.weight are all zero"),
    ],
)
def test_a_matrix_that_a_variant_cannot_start_from_is_refused(variant, message):
    model = base_model()
    with torch.no_grad():
        model.blocks[1].att.output.weight.zero_()
    with pytest.raises(ConfigError, match=message):
        inject_adapter(model, method_of(variant=variant), seed=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"rank": 3},
            r"'blocks\.0\.att\.receptance\.lora_A\.default\.weight' has shape \[4, 32\], wanted \[3, 32\]",
        ),
        ({"targets": ["*.att.*"]}, r"it has 'blocks\.0\.ffn\.key\.lora_A\.default\.weight'"),
        ({"variant": "dora"}, r"it lacks 'blocks\.0\.att\.key\.lora_magnitude_vector\.default\.weight'"),
    ],
    ids=["rank", "targets", "variant"],
)
def test_the_saved_parameters_of_another_adapter_are_refused(settings, message):
    saved = trained().own
    with pytest.raises(CheckpointError, match=message):
        inject_adapter(base_model(), method_of(**settings), seed=0, initial=saved)


def test_without_peft_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"needs the package peft .*pip install 'rwkv-train\[finetune\]'"):
        inject_adapter(base_model(), method_of(), seed=0)
