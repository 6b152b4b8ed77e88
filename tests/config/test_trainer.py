from rwkv_train.config.trainer import TrainerConfig


def test_a_tilde_in_out_dir_is_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert TrainerConfig(out_dir="~/runs/one", max_steps=1).run_folder == tmp_path / "runs" / "one"
