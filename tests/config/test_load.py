import pytest
import yaml

from rwkv_train.config.load import check_tree, fill_sizes, list_presets, load_train_config, read_tree
from rwkv_train.config.model import Rwkv6Ranks
from rwkv_train.config.save import to_tree, to_yaml
from rwkv_train.errors import ConfigError

MINIMAL = """
model: {arch: rwkv7, n_layer: 2, n_embd: 128}
trainer: {out_dir: run, max_steps: 10}
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL, encoding="utf-8")
    return str(path)


def test_a_file_and_overrides_make_settings(file):
    config = load_train_config(file, ["optim.lr=3e-4", "optim.lr_final=1e-5", "model.n_layer=24"])

    assert (config.optim.lr, config.optim.lr_final, config.model.n_layer) == (3e-4, 1e-5, 24)


def test_a_later_override_wins(file):
    assert load_train_config(file, ["trainer.seed=1", "trainer.seed=2"]).trainer.seed == 2


def test_settings_survive_being_written_and_read(file):
    config = load_train_config(file, ["model.lora_ranks={w: 8, a: 8, v: 8, g: 16}"])

    assert check_tree(yaml.safe_load(to_yaml(config))) == config
    assert check_tree(to_tree(config)) == config


def test_a_length_on_the_command_line_takes_the_place_of_that_in_the_file(file):
    trainer = load_train_config(file, ["trainer.max_tokens=5"]).trainer
    assert (trainer.max_steps, trainer.max_tokens) == (None, 5)


def test_two_lengths_on_the_command_line_contradict_each_other(file):
    with pytest.raises(ConfigError, match=r"set exactly one .* found max_steps \(3\) and max_tokens \(5\)"):
        load_train_config(file, ["trainer.max_tokens=5", "trainer.max_steps=3"])


def test_an_arch_on_the_command_line_drops_what_only_that_of_the_file_has():
    preset = ["model.arch=rwkv4"]
    assert (
        to_tree(load_train_config("quickstart", preset).model).keys().isdisjoint({"head_size", "lora_ranks"})
    )
    assert load_train_config("rwkv4-169m", ["model.arch=rwkv7"]).model.head_size == 64


def test_an_arch_on_the_command_line_drops_what_has_another_form_in_it():
    model = load_train_config("quickstart", ["model.arch=rwkv6"]).model
    assert (model.head_size, model.lora_ranks) == (64, Rwkv6Ranks(shift=32, decay=64))
    given = ["model.arch=rwkv6", "model.lora_ranks={shift: 3, decay: 4}"]
    assert load_train_config("quickstart", given).model.lora_ranks == Rwkv6Ranks(shift=3, decay=4)


def test_accumulation_is_derived(file):
    config = load_train_config(
        file, ["trainer.global_batch_size=48", "trainer.micro_batch_size=4", "trainer.devices=3"]
    )
    assert config.trainer.accumulation == 4


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("optim.lrr=1", "optim.lrr: no such setting; did you mean 'lr'?"),
        ("trainer.lr=1", "trainer.lr: no such setting; did you mean 'optim.lr'?"),
        ("optim.lr=fast", "optim.lr is 'fast' but should be a valid number"),
        ("optim.lr=-1", "optim.lr is -1 but should be greater than 0"),
        ("optim.lr_final=1", "optim: lr_final (1) must not be above lr (0.0006)"),
        ("model.n_layer=1.5", "model.n_layer is 1.5 but should be a valid integer"),
        ("model.n_layer=1000000000", "model.n_layer is 1000000000 but should be less than or equal to 1000"),
        ("trainer.devices=true", "trainer.devices is True but should be a valid integer"),
        ("model.n_embd=100", "model: n_embd (100) must be a multiple of head_size (64)"),
        ("model.arch=rwkv9", "model.arch: there is no 'rwkv9'; use 'rwkv4', 'rwkv5', 'rwkv6' or 'rwkv7'"),
        ("model.lora_ranks=best", "model.lora_ranks is 'best' but should be 'original' or 'revised'"),
        ("model.lora_ranks={q: 1}", "model.lora_ranks.q: no such setting; there are w, a, v, g"),
        ("trainer.global_batch_size=33", "global_batch_size (33) must be a multiple of 8"),
        ("trainer.out_dir=null", "trainer.out_dir is nothing but should be a valid string"),
        ("trainer.out_dir=''", "trainer.out_dir is '' but"),
        ("trainer.seed=1e30", "trainer.seed is 1e+30 but should be a valid integer"),
        ("trainer.seed=99999999999999999999", "trainer.seed is 99999999999999999999 but should be less than"),
        (
            "trainer.max_steps=99999999999999999999",
            "trainer.max_steps is 99999999999999999999 but should be less",
        ),
        ("model.arch=null", "model.arch: it must be set, to 'rwkv4', 'rwkv5', 'rwkv6' or 'rwkv7'"),
        ("model.embedding_scale=1", "model.embedding_scale: no such setting; only rwkv4 has it"),
        ("optim.seed=1", "optim.seed: no such setting; did you mean 'trainer.seed'?"),
        ("model=null", "model is nothing but must be a section of settings"),
        ("data=pile", "data is 'pile' but must be a section of settings"),
        ("optim.lr", "--set optim.lr: write it as section.name=value"),
        ("optim.lr.x=1", "optim.lr is {'x': 1} but should be a valid number"),
        ("data.order=[", "--set data.order=[: the value is not valid YAML"),
    ],
    ids=lambda value: value.split(":")[0],
)
def test_a_bad_value_gets_one_sentence(file, override, sentence):
    with pytest.raises(ConfigError) as caught:
        load_train_config(file, [override])
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_all_problems_are_named_at_once(file):
    with pytest.raises(ConfigError, match=r"data\.trainn.*; optim\.lrr"):
        load_train_config(file, ["optim.lrr=1", "data.trainn=x"])


def test_a_missing_setting_is_named(tmp_path):
    path = tmp_path / "empty.yaml"
    path.write_text("model: {arch: rwkv4, n_layer: 1}\ntrainer: {max_steps: 1}\n")
    with pytest.raises(ConfigError, match=r"model\.n_embd: it must be set; trainer\.out_dir: it must be set"):
        load_train_config(str(path))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a: [", "is not valid YAML"),
        ("- 1", "must hold sections"),
        ("", "must hold sections"),
        ("b:\n  a: 1\n  a: 2", r"bad\.yaml: 'a' is set twice in the section that begins at line 2, column 3"),
        (
            "a: !!python/name:os.system x",
            r"bad\.yaml is not valid YAML \(line 1, column 4\): could not determine",
        ),
    ],
    ids=["broken", "list", "empty", "twice", "python"],
)
def test_a_bad_file_gets_one_sentence(tmp_path, text, sentence):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=sentence):
        read_tree(str(path))


def test_a_file_that_is_not_utf8_is_refused(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_bytes(b"model: \xff")
    with pytest.raises(ConfigError, match=r"not UTF-8 text \(byte 7\)"):
        read_tree(str(path))


def test_a_misspelt_preset_gets_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'quickstart'"):
        read_tree("quikstart")


def test_a_missing_file_is_named():
    with pytest.raises(ConfigError, match=r"there is no file runs/no\.yaml"):
        read_tree("runs/no.yaml")


@pytest.mark.parametrize("name", sorted(list_presets()))
def test_every_shipped_preset_is_valid(name):
    load_train_config(name)


def test_sizes_of_weights_fill_what_the_file_leaves_out():
    tree = {"model": {"init_from": "x.pth", "ctx_len": 64}}

    filled = fill_sizes(tree, {"arch": "rwkv4", "n_layer": 3, "ctx_len": 1024})

    assert filled["model"] == {"init_from": "x.pth", "ctx_len": 64, "arch": "rwkv4", "n_layer": 3}


def test_what_no_published_file_tells_may_differ_from_the_weights():
    tree = {"model": {"init_from": "x.pth", "head_size_divisor": 4.0}}
    assert fill_sizes(tree, {"head_size_divisor": 8.0})["model"]["head_size_divisor"] == 4.0
    silent = fill_sizes({"model": {"init_from": "x.pth"}}, {"head_size_divisor": 2.0})
    assert silent["model"]["head_size_divisor"] == 2.0


def test_a_size_that_differs_from_the_weights_is_refused():
    with pytest.raises(ConfigError, match=r"model\.n_layer is 2 but 3 in the weights"):
        fill_sizes({"model": {"init_from": "x.pth", "n_layer": 2}}, {"n_layer": 3})
