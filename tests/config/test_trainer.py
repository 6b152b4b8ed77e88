import threading

import pytest
from pydantic import ValidationError

from rwkv_train.config.trainer import TrainerConfig


def test_a_tilde_in_out_dir_is_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert TrainerConfig(out_dir="~/runs/one", max_steps=1).run_folder == tmp_path / "runs" / "one"


@pytest.mark.parametrize("name", ["hang_timeout_seconds", "grace_seconds"])
def test_no_wait_is_longer_than_python_can_wait(name):
    assert getattr(TrainerConfig(out_dir="a", max_steps=1, **{name: 1e9}), name) < threading.TIMEOUT_MAX
    with pytest.raises(ValidationError, match="less than or equal"):
        TrainerConfig(out_dir="a", max_steps=1, **{name: 1e300})


def test_layers_that_are_gathered_one_by_one_cannot_be_compiled():
    with pytest.raises(
        ValidationError, match=r"compile cannot take strategy 'deepspeed_3'.*'fsdp2', or compile to"
    ):
        TrainerConfig(out_dir="a", max_steps=1, strategy="deepspeed_3", compile=True)
    for strategy in ("fsdp2", "deepspeed_2"):
        assert TrainerConfig(out_dir="a", max_steps=1, strategy=strategy, compile=True).compile
