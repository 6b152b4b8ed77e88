import os
import subprocess
import sys
from argparse import Namespace
from datetime import datetime, timedelta
from pathlib import Path, PurePosixPath
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from rwkv_train.checkpoints import describe_checkpoint, read_weights
from rwkv_train.checkpoints.formats import Format, recognize_format
from rwkv_train.checkpoints.lightning_ckpt import read_lightning_ckpt
from rwkv_train.checkpoints.stand_ins import STAND_INS
from rwkv_train.errors import CheckpointError


def some_tensors():
    generator = torch.Generator().manual_seed(0)
    return {"a": torch.randn(7, 3, generator=generator), "b": torch.randn(5, generator=generator)}


def save(path, **entries):
    """A file with the keys that Lightning writes."""
    content = {
        "epoch": 1,
        "global_step": 12,
        "pytorch-lightning_version": "2.6.6",
        "state_dict": some_tensors(),
        "loops": {"fit_loop": {"state_dict": {}}},
        "optimizer_states": [{"state": {0: {"step": torch.tensor(12.0)}}, "param_groups": [{"lr": 0.1}]}],
    }
    torch.save(content | entries, path)
    return path


def assert_same(read, written):
    assert read.keys() == written.keys()
    for name, tensor in written.items():
        torch.testing.assert_close(read[name], tensor, rtol=0, atol=0)


@pytest.mark.parametrize(
    "prefix", ["", "model.", "module.model.", "_forward_module.", "_forward_module.model."]
)
def test_weights_are_read_whatever_wraps_the_model(tmp_path, tensors_of, prefix):
    tensors = tensors_of("rwkv7")
    path = save(tmp_path / "x", state_dict={f"{prefix}{name}": t for name, t in tensors.items()})
    weights = read_weights(path)
    assert_same(weights.tensors, tensors)
    assert weights.step == 12
    description = describe_checkpoint(path)
    assert (description.format, description.arch, description.step) == ("Lightning .ckpt", "rwkv7", 12)


@pytest.mark.parametrize("step", [-1, True, 1.5, None])
def test_a_number_of_steps_that_is_none_is_not_told(tmp_path, step):
    assert read_lightning_ckpt(save(tmp_path / "x", global_step=step))[1] is None


@pytest.mark.parametrize(
    "value",
    [
        Namespace(lr=0.1, data=[1, 2]),
        SimpleNamespace(lr=0.1),
        Path("some/path"),
        PurePosixPath("some/path"),
        datetime(2026, 1, 2, 3, 4),
        timedelta(days=1),
        np.float64(0.5),
        np.int32(3),
        np.arange(6).reshape(2, 3),
        np.dtype("float32"),
        torch.float32,
        torch.Size([1, 2]),
        torch.device("cpu"),
        {"nested": [(Path("x"), None, True, 1.5, b"bytes")]},
    ],
    ids=lambda value: type(value).__name__,
)
def test_settings_of_usual_classes_are_passed_over(tmp_path, value):
    path = save(tmp_path / "x", hyper_parameters={"value": value})
    assert_same(read_lightning_ckpt(path)[0], some_tensors())


@pytest.fixture
def foreign_class(monkeypatch):
    """A class by its full name, which can be pickled while the test runs."""

    def make(full_name, base=object):
        *parents, name = full_name.split(".")
        for depth in range(len(parents)):
            module = ".".join(parents[: depth + 1])
            monkeypatch.setitem(sys.modules, module, ModuleType(module))
        kind = type(name, (base,), {"__module__": module})
        setattr(sys.modules[module], name, kind)
        return kind

    return make


@pytest.mark.parametrize("name", [name for name in STAND_INS if "AttributeDict" in name])
def test_dictionaries_of_lightning_are_passed_over(tmp_path, foreign_class, name):
    settings = foreign_class(name, dict)(lr=0.1, inner=Path("x"))
    path = save(tmp_path / "x", hyper_parameters=settings)
    assert_same(read_lightning_ckpt(path)[0], some_tensors())


@pytest.mark.parametrize(
    "name", [name for name in STAND_INS if name.startswith("pytorch_lightning.callbacks")]
)
def test_callbacks_named_by_their_class_are_passed_over(tmp_path, foreign_class, name):
    path = save(tmp_path / "x", callbacks={foreign_class(name): {"best": 1.0}})
    assert_same(read_lightning_ckpt(path)[0], some_tensors())


def test_an_object_of_an_unknown_class_is_refused_by_its_name(tmp_path, foreign_class):
    path = save(tmp_path / "x", hyper_parameters={"mine": foreign_class("my_project.settings.Mine")()})
    with pytest.raises(CheckpointError, match=r"\(my_project.settings.Mine\), which is refused"):
        read_lightning_ckpt(path)


class Call:
    """Unpickled without care, it calls a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    "function", [os.system, subprocess.check_call, eval, exec, getattr, __import__], ids=lambda f: f.__name__
)
def test_a_program_is_refused_by_name_and_does_not_run(tmp_path, monkeypatch, function):
    program = "open('created', 'w')" if function in {eval, exec} else "touch created"
    path = save(tmp_path / "x", callbacks={"attack": Call(function, program)})
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=rf"\(\S*{function.__name__}\), which is refused"):
        read_weights(path)
    assert not (tmp_path / "created").exists()


@pytest.mark.parametrize(
    ("entries", "sentence"),
    [
        ({"state_dict": None}, "without a 'state_dict'"),
        ({"state_dict": {"a": torch.zeros(1), "b": 3}}, "entry 'b' is a int"),
        ({"state_dict": {1: torch.zeros(1)}}, "entry 1 is a Tensor"),
        ({"state_dict": {"a": Path("x")}}, "entry 'a' is a StandIn"),
    ],
    ids=["none", "number", "unnamed", "object"],
)
def test_a_file_without_weights_is_refused(tmp_path, entries, sentence):
    with pytest.raises(CheckpointError, match=sentence):
        read_lightning_ckpt(save(tmp_path / "x", **entries))


def test_a_file_cut_at_any_length_is_refused(tmp_path):
    whole = save(tmp_path / "whole").read_bytes()
    for length in [*range(0, len(whole), 173), len(whole) - 1]:
        (tmp_path / "x").write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=str(tmp_path / "x")):
            read_weights(tmp_path / "x")


def test_weights_alone_are_no_file_of_lightning(tmp_path):
    torch.save({"pytorch-lightning_version.weight": torch.zeros(1)}, tmp_path / "x")
    assert recognize_format(tmp_path / "x") is Format.PTH
