"""Where metrics go."""

import json

import pytest
import wandb

from rwkv_train.errors import CheckpointError, ConfigError
from rwkv_train.training.loggers import MetricsFile, read_metrics
from rwkv_train.training.run import run_pretraining


def test_weights_and_biases_out_of_reach_is_refused_before_training(settings, monkeypatch):
    def refuse(**settings):
        raise wandb.errors.CommError("no such host")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(
        ConfigError, match=r"trainer\.wandb_project is 'mine' .*no such host.*WANDB_MODE=offline"
    ):
        run_pretraining(settings({"trainer.wandb_project": "mine"}))


def test_a_row_that_a_kill_cut_off_is_not_read(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("step,loss,lr\n10,3.5,0.1\n12")  # of "120,2.5,0.1"
    assert [row["step"] for row in read_metrics(path)] == ["10"]


@pytest.mark.parametrize(
    ("start_step", "kept"), [(0, []), (10, ["0", "10"])], ids=["killed before its first save", "gone on"]
)
def test_rows_of_steps_that_are_done_again_are_dropped(tmp_path, start_step, kept):
    path = tmp_path / "metrics.csv"
    path.write_text("step,loss\n0,\n10,3.5\n20,3.0\n")
    MetricsFile(path, ["loss"], start_step)
    assert [row["step"] for row in read_metrics(path)] == kept


@pytest.fixture
def wandb_calls(monkeypatch):
    """What is asked of Weights & Biases, which stays offline: ids of runs, and rows as they come."""
    calls = {"ids": [], "rows": [], "x_axes": set()}
    run_kind = wandb.sdk.wandb_run.Run
    init, log, define = wandb.init, run_kind.log, run_kind.define_metric

    def noting_init(**settings):
        assert settings["resume"] == "allow"
        calls["ids"].append(settings["id"])
        return init(**settings)

    def noting_log(self, data, *args, **kwargs):
        assert not args, "a step of W&B's own must not go backwards"
        assert not kwargs
        calls["rows"].append(data)
        return log(self, data)

    def noting_define(self, name, *args, **kwargs):
        calls["x_axes"].add((name, kwargs.get("step_metric")))
        return define(self, name, *args, **kwargs)

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(wandb, "init", noting_init)
    monkeypatch.setattr(run_kind, "log", noting_log)
    monkeypatch.setattr(run_kind, "define_metric", noting_define)
    return calls


def test_a_run_that_goes_on_is_the_same_run_at_weights_and_biases(settings, tree, tmp_path, wandb_calls):
    tree["data"]["valid"] = None
    # No validation, hence no best checkpoint: the newest is that of step 4, and steps 5 and 6 are done again.
    changes = {
        "trainer.wandb_project": "mine",
        "optim.schedule": "constant",
        "optim.lr_final": 3e-3,
    }
    first = run_pretraining(settings({**changes, "trainer.max_steps": 6}))
    run_pretraining(
        settings({**changes, "trainer.max_steps": 8}), resume=str(first.out_dir / "checkpoints/step-00000004")
    )
    path = str(first.out_dir / "checkpoints/step-00000008")
    other = {**changes, "trainer.max_steps": 10, "trainer.out_dir": str(tmp_path / "other")}
    run_pretraining(settings(other), resume=path)

    one, same, another = wandb_calls["ids"]
    assert one == same != another
    assert ("*", "trainer/global_step") in wandb_calls["x_axes"]
    assert [row["trainer/global_step"] for row in wandb_calls["rows"]] == [2, 4, 6, 6, 8, 10]
    assert wandb.run is None  # none is left open
    assert json.loads((first.out_dir / "wandb.json").read_text()) == {"project": "mine", "id": one}


def test_another_project_gets_a_run_of_its_own(settings, wandb_calls):
    for project in ("mine", "yours"):
        run_pretraining(
            settings({"trainer.wandb_project": project, "trainer.max_steps": 1 + len(wandb_calls["ids"])})
        )
    assert len(set(wandb_calls["ids"])) == 2


def test_a_damaged_note_of_the_run_is_refused(settings):
    config = settings({"trainer.wandb_project": "mine"})
    config.trainer.run_folder.mkdir()
    (config.trainer.run_folder / "wandb.json").write_text('{"project": "mine"}')
    with pytest.raises(CheckpointError, match=r"wandb\.json does not hold the id of a run; remove it"):
        run_pretraining(config)
