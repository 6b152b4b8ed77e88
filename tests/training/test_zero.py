"""DeepSpeed: a user's settings over ours, its own Adam, what it says."""

import builtins
import importlib.util
import json
import logging

import pytest
import torch

from rwkv_train.checkpoints import list_training_checkpoints, load_training_checkpoint
from rwkv_train.errors import ConfigError
from rwkv_train.models.registry import build_model, initialize
from rwkv_train.training.engine import make_optimizer
from rwkv_train.training.param_groups import parameter_groups
from rwkv_train.training.run import run_pretraining
from rwkv_train.training.zero import ZeroEngine, make_zero_strategy
from rwkv_train.training.zero_adam import make_deepspeed_adam, require_deepspeed_adam
from rwkv_train.training.zero_settings import deepspeed_config, merge_deepspeed_config

CPU = torch.device("cpu")
NEEDS_DEEPSPEED = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"
)


@pytest.fixture
def zero(settings, tmp_path):
    """Make settings of a run under DeepSpeed, with a JSON file of the user's own if there are ``theirs``."""

    def make(theirs=None, **changes):
        changes = {"trainer.strategy": "deepspeed_2", **changes}
        if theirs is not None:
            path = tmp_path / "deepspeed.json"
            path.write_text(theirs if isinstance(theirs, str) else json.dumps(theirs))
            changes["trainer.deepspeed_config"] = str(path)
        return settings(changes)

    return make


def test_settings_of_the_user_are_added_to_ours_at_every_level():
    ours = {
        "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
        "gradient_clipping": 1.0,
    }
    theirs = {
        "zero_optimization": {"reduce_bucket_size": 7, "offload_optimizer": {"ratio": 0.5}},
        "wall_clock_breakdown": True,
    }
    assert merge_deepspeed_config(ours, theirs, "a.json") == {
        "zero_optimization": {
            "stage": 2,
            "offload_optimizer": {"device": "cpu", "ratio": 0.5},
            "reduce_bucket_size": 7,
        },
        "gradient_clipping": 1.0,
        "wall_clock_breakdown": True,
    }


@pytest.mark.parametrize(
    ("theirs", "setting"),
    [
        ({"optimizer": {"type": "Adam"}}, "the section optim"),
        ({"scheduler": {}}, "the section optim"),
        ({"gradient_clipping": 1.0}, "optim.grad_clip"),
        ({"train_batch_size": 8}, "trainer.global_batch_size"),
        ({"train_micro_batch_size_per_gpu": 8}, "trainer.micro_batch_size"),
        ({"gradient_accumulation_steps": 2}, "trainer.global_batch_size"),
        ({"bf16": {"enabled": True}}, "trainer.precision"),
        ({"fp16": {"enabled": True}}, "trainer.precision"),
        ({"amp": {}}, "trainer.precision"),
        ({"torch_autocast": {}}, "trainer.precision"),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, "trainer.precision"),
        ({"communication_data_type": "bf16"}, "trainer.precision"),
        ({"gradient_predivide_factor": 2.0}, "trainer.global_batch_size"),
        ({"zero_optimization": {"cpu_offload": True}}, "trainer.offload"),
        ({"zero_allow_untested_optimizer": False}, "optim.implementation"),
        ({"zero_force_ds_cpu_optimizer": True}, "optim.implementation"),
        ({"zero_optimization": {"compute_grad_norm": False}}, "the section guard"),
        ({"zero_optimization": {"stage": 3}}, "trainer.strategy"),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, "trainer.offload"),
        ({"zero_optimization": {"offload_param": {"device": "nvme"}}}, "trainer.offload"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_our_settings_decide_is_refused_with_their_name(zero, theirs, setting):
    with pytest.raises(ConfigError, match=rf"deepspeed\.json: .* is decided by {setting}; set that"):
        deepspeed_config(zero(theirs), CPU)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [("{'stage': 2}", "is not JSON"), ("[1, 2]", "holds a list, not an object")],
    ids=["not JSON", "a list"],
)
def test_a_file_that_is_no_json_object_is_refused(zero, content, sentence):
    with pytest.raises(ConfigError, match=rf"trainer\.deepspeed_config .*deepspeed\.json\) {sentence}"):
        deepspeed_config(zero(content), CPU)


def test_a_file_that_is_not_there_is_refused(settings):
    config = settings({"trainer.strategy": "deepspeed_1", "trainer.deepspeed_config": "nowhere.json"})
    with pytest.raises(ConfigError, match=r"nowhere\.json\) cannot be read: No such file"):
        deepspeed_config(config, CPU)


@pytest.mark.parametrize("setting", ["offload", "deepspeed_config"])
def test_settings_of_deepspeed_are_refused_without_it(settings, setting):
    value = {"offload": "optimizer", "deepspeed_config": "a.json"}[setting]
    with pytest.raises(ConfigError, match=rf"{setting}.* needs strategy deepspeed_1, _2 or _3, not 'ddp'"):
        settings({"trainer.strategy": "ddp", f"trainer.{setting}": value})


def test_deepspeed_that_is_not_installed_is_refused(zero, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.partition(".")[0] == "deepspeed":
            raise ImportError("No module named 'deepspeed'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(
        ConfigError, match=r"'deepspeed_2' needs DeepSpeed, .*pip install deepspeed, or choose"
    ):
        make_zero_strategy(zero(), CPU)


@NEEDS_DEEPSPEED
def test_settings_of_the_user_reach_the_engine(zero, monkeypatch):
    seen = {}
    original = ZeroEngine.bind

    def bind(self, trainer):
        original(self, trainer)
        seen["bucket"] = trainer.model.optimizer.reduce_bucket_size
        seen["clip"] = trainer.model.gradient_clipping()

    monkeypatch.setattr(ZeroEngine, "bind", bind)
    run_pretraining(zero({"zero_optimization": {"reduce_bucket_size": 12_345}}, **{"trainer.max_steps": 1}))
    assert seen == {"bucket": 12_345, "clip": 1.0}


@NEEDS_DEEPSPEED
@pytest.mark.parametrize(
    ("strategy", "offload"),
    [("deepspeed_1", "optimizer"), ("deepspeed_3", "optimizer_and_parameters")],
)
def test_states_in_the_memory_of_the_cpu_make_no_difference(settings, tmp_path, strategy, offload):
    short = {"trainer.max_steps": 2, "trainer.sample_tokens": 0}
    weights = []
    for name, changes in (
        ("plain", {}),
        ("offload", {"trainer.strategy": strategy, "trainer.offload": offload}),
    ):
        summary = run_pretraining(settings({**short, **changes, "trainer.out_dir": str(tmp_path / name)}))
        weights.append(load_training_checkpoint(list_training_checkpoints(summary.out_dir)[-1]).weights)
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=1e-4, atol=1e-6)


@NEEDS_DEEPSPEED
def test_nothing_is_said_that_means_nothing_to_the_user(zero, capfd, recwarn):
    run_pretraining(zero(**{"trainer.max_steps": 1, "trainer.strategy": "deepspeed_3"}))
    shown = [warning for warning in recwarn if not issubclass(warning.category, DeprecationWarning)]
    said = "".join(capfd.readouterr()) + "".join(str(warning.message) for warning in shown)
    for noise in ("untested optimizer", "is deprecated", "initializing deepspeed distributed", "[INFO]"):
        assert noise not in said


@NEEDS_DEEPSPEED
def test_real_warnings_of_deepspeed_go_to_stderr_or_where_the_program_logs(zero, capsys, caplog):
    make_zero_strategy(zero(), CPU)
    logging.getLogger("DeepSpeed").warning("the network is slow")
    assert capsys.readouterr().out == ""
    assert "the network is slow" in caplog.text


def test_deepspeeds_adam_is_refused_under_another_strategy(settings):
    with pytest.raises(
        ConfigError, match=r"optim\.implementation 'deepspeed' needs trainer\.strategy deepspeed_1.*'torch'"
    ):
        settings({"optim.implementation": "deepspeed"})


@NEEDS_DEEPSPEED
@pytest.mark.parametrize("on_cpu", [True, False], ids=["cpu", "gpu"])
def test_an_adam_that_does_not_build_is_refused(monkeypatch, on_cpu):
    from deepspeed.ops import op_builder

    def fail(self, verbose=False):
        raise RuntimeError("Error building extension 'x'\nlines of a compiler")

    name = "CPUAdamBuilder" if on_cpu else "FusedAdamBuilder"
    monkeypatch.setattr(getattr(op_builder, name), "load", fail)
    with pytest.raises(
        ConfigError,
        match=r"does not build here \(Error building extension 'x'\); install .* optim\.implementation to 'torch'$",
    ):
        require_deepspeed_adam(on_cpu=on_cpu)


@NEEDS_DEEPSPEED
@pytest.mark.slow  # compiles for a minute on a machine that has not done so before
def test_deepspeeds_adam_makes_the_steps_of_torchs(settings):
    optim = settings({"optim.weight_decay": 0.3, "optim.eps": 1e-6}).optim
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.LayerNorm(16)))
    adams = [
        make_optimizer(models[0], "rwkv7", optim),
        make_deepspeed_adam(parameter_groups(models[1], "rwkv7", optim), optim, on_cpu=True),
    ]
    for step in range(5):
        torch.manual_seed(step)
        x, direction = torch.randn(4, 8), torch.randn(4, 16)
        for model, adam in zip(models, adams, strict=True):
            adam.zero_grad()
            (model(x) * direction).sum().backward()
            adam.step()
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("offload", "theirs", "sentence"),
    [
        ("none", {"zero_optimization": None}, "zero_optimization is null but must be an object"),
        ("none", {"zero_optimization": 3}, "zero_optimization is 3 but must be an object"),
        (
            "optimizer",
            {"zero_optimization": {"offload_optimizer": None}},
            r"zero_optimization\.offload_optimizer is null but must be an object",
        ),
    ],
)
def test_no_value_of_the_user_takes_the_place_of_a_section_of_ours(zero, offload, theirs, sentence):
    with pytest.raises(ConfigError, match=sentence):
        deepspeed_config(zero(theirs, **{"trainer.offload": offload}), CPU)


@NEEDS_DEEPSPEED
@pytest.mark.parametrize(
    ("theirs", "named"),
    [
        ({"zero_optimization": {"nonsense": 1}}, "nonsense"),
        ({"zero_optimization": {"reduce_bucket_size": "big"}}, "reduce_bucket_size"),
        ({"zero_optimization": {"reduce_bucket_size": -1}}, "reduce_bucket_size"),
        ({"zero_optimization": {"offload_param": "cpu"}}, "offload_param"),
        ({"elasticity": {"enabled": True}}, "elasticity"),
    ],
)
def test_what_deepspeed_refuses_is_one_sentence_with_the_file_and_the_name(zero, theirs, named):
    with pytest.raises(
        ConfigError, match=rf"deepspeed\.json: DeepSpeed refuses [^\n]*{named}[^\n]*; correct it"
    ):
        make_zero_strategy(zero(theirs), CPU)


@NEEDS_DEEPSPEED
def test_no_exact_copy_is_kept_of_what_no_checkpoint_stores(settings):
    config = settings({"trainer.strategy": "deepspeed_1", "trainer.precision": "bf16-params"})
    model = build_model(config.model)
    initialize(model, seed=1)
    model.requires_grad_(False)
    emb = model.emb.weight.clone()
    engine = ZeroEngine(model, config, {"emb.weight"})
    model.bfloat16()  # as DeepSpeed does

    (stored,) = engine.read()
    assert stored.name == "emb.weight"
    assert torch.equal(stored.weight, emb)
    assert list(engine._exact) == ["emb.weight"]
