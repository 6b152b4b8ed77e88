"""Adapters on disk: what is read, and the sentence about what is not."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from rwkv_train.checkpoints import read_adapter
from rwkv_train.errors import CheckpointError
from tests.finetuning.adapter_models import trained, write

KEY = "base_model.model.blocks.0.att.key."


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return write(tmp_path_factory.mktemp("adapter"), trained(targets=["blocks.0.att.key", "*.value"]))


@pytest.fixture
def foreign(whole, tmp_path):
    """The same without our note, so that its files may be changed."""
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes((whole / name).read_bytes())
    return tmp_path


def change(path, **settings):
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def test_layers_have_their_own_scale(foreign):
    change(
        foreign / "adapter_config.json",
        lora_alpha=10,
        alpha_pattern={r"blocks\.1\.ffn\.value": 3, "ffn.value": 6},
        use_rslora=True,
    )
    layers = read_adapter(foreign).layers
    assert {name: layer.scale for name, layer in layers.items()} == {
        "blocks.0.att.key": 5,  # 10 / sqrt(4)
        "blocks.0.att.value": 5,
        "blocks.1.att.value": 5,
        "blocks.0.ffn.value": 3,
        "blocks.1.ffn.value": 1.5,  # the first pattern that fits, as peft reads it
    }


def test_a_run_gives_the_adapter_of_its_newest_checkpoint(whole, run, folder):
    with pytest.raises(
        CheckpointError, match=r"step-00000015 holds no adapter_config\.json; the run trains no"
    ):
        read_adapter(run)
    for checkpoint in (folder, folder.with_name("step-00000005")):
        shutil.copytree(whole, checkpoint, dirs_exist_ok=True)
    assert read_adapter(run).path == folder
    assert read_adapter(folder.with_name("step-00000005")).note.step == 3


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_changed_file_is_damaged(whole, tmp_path, name):
    for file in whole.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    content = bytearray((tmp_path / name).read_bytes())
    content[-9] ^= 1
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{name} is damaged: its SHA-256 is"):
        read_adapter(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'; adapters of LORA and MISS are read"),
        ({"bias": "all"}, "bias is 'all'; our layers have none"),
        (
            {"init_lora_weights": "pissa"},
            "init_lora_weights is 'pissa', which changes the base; let peft convert",
        ),
        ({"modules_to_save": ["head"]}, r"modules_to_save is \['head'\], which is not supported"),
        ({"from_the_future": 1}, "from_the_future is 1, which is not supported"),
        ({"r": 0}, "r is 0; wanted a whole number above 0"),
        ({"lora_alpha": "32"}, "lora_alpha is '32'; wanted a positive number"),
        ({"lora_alpha": float("inf")}, "lora_alpha is inf; wanted a positive number"),
        ({"rank_pattern": {"*.key": 4}}, r"'\*\.key' is no regular expression"),
        ({"rank_pattern": [4]}, r"rank_pattern is \[4\], not a JSON object"),
        ({"r": 8}, r"lora_A\.weight' has shape \[4, 32\], but adapter_config\.json implies \[8, 32\]"),
        ({"use_dora": True}, r"tensor 'base_model\.model\..*\.lora_magnitude_vector' is missing"),
        ({"peft_type": "MISS"}, r"'base_model\.model\..*\.lora_A\.weight' does not belong to MiSS"),
        ({"peft_type": "MISS", "init_weights": "bat"}, "init_weights is 'bat'; of MiSS only the usual form"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_that_mean_something_else_are_refused(foreign, settings, message):
    change(foreign / "adapter_config.json", **settings)
    with pytest.raises(CheckpointError, match=message):
        read_adapter(foreign)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({f"{KEY}lora_B.weight": None}, rf"tensor '{KEY}lora_B\.weight' is missing"),
        (
            {f"{KEY}lora_C.weight": torch.ones(1)},
            rf"tensor '{KEY}lora_C\.weight' is unknown; wanted names as",
        ),
        ({"base_model.model.emb.lora_A.weight": torch.ones(4, 1)}, "emb.lora_A.weight' is unknown"),
        (
            {f"{KEY}lora_B.weight": torch.ones(32, 3)},
            r"has shape \[32, 3\], but adapter_config.json implies \[32, 4\]",
        ),
        ({f"{KEY}lora_A.weight": torch.ones(4)}, r"has shape \[4\], but"),
        ({f"{KEY}lora_A.weight": torch.full((4, 32), torch.nan)}, "holds values that are not finite"),
        ({f"{KEY}lora_A.weight": torch.ones(4, 32, dtype=torch.int32)}, "which no weight is"),
    ],
    ids=["missing", "unknown", "embedding", "rank", "vector", "nan", "integers"],
)
def test_tensors_that_do_not_fit_are_refused(foreign, changes, message):
    tensors = load_file(foreign / "adapter_model.safetensors") | changes
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, foreign / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        read_adapter(foreign)


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda folder: folder.rmdir(), "there is no such file or folder"),
        (lambda folder: None, "is no adapter: it holds no adapter_config.json"),
        (lambda folder: (folder / "checkpoints").mkdir(), "holds no training checkpoint yet"),
        (lambda folder: (folder / "adapter_config.json").write_text("{"), "is truncated or damaged"),
        (
            lambda folder: (folder / "adapter_config.json").write_text(
                '{"peft_type": "LORA", "r": 1, "lora_alpha": 1}'
            ),
            "adapter_model.safetensors cannot be read",
        ),
    ],
    ids=["nothing", "empty", "run", "json", "no-tensors"],
)
def test_what_is_no_adapter_is_refused(tmp_path, prepare, message):
    folder = tmp_path / "x"
    folder.mkdir()
    prepare(folder)
    with pytest.raises(CheckpointError, match=message):
        read_adapter(folder)


def test_a_file_is_refused(whole):
    with pytest.raises(CheckpointError, match="is a file; an adapter is a folder"):
        read_adapter(whole / "adapter_model.safetensors")
