"""What happens to a gradient between the backward and the optimizer."""

import pytest

from rwkv_train.errors import TrainingError
from rwkv_train.training.callbacks import RunCallback
from rwkv_train.training.loggers import METRICS_FILE, read_metrics
from rwkv_train.training.run import run_pretraining


@pytest.mark.parametrize("grad_clip", [1.0, 0.0], ids=["clipped", "not clipped"])
def test_the_message_names_the_gradient_that_is_not_finite(settings, monkeypatch, grad_clip):
    original = RunCallback.on_train_start

    def poison(self, trainer, module):
        original(self, trainer, module)
        module.model.blocks[1].ffn.value.weight.register_hook(lambda gradient: gradient * float("nan"))

    monkeypatch.setattr(RunCallback, "on_train_start", poison)
    with pytest.raises(TrainingError, match=r"step 1: .*is the gradient of blocks\.1\.ffn\.value\.weight;"):
        run_pretraining(settings({"optim.grad_clip": grad_clip}))


def test_clipping_changes_nothing_about_the_norm_that_is_reported(settings, tmp_path):
    norms = []
    for name, grad_clip in (("clipped", 1e-3), ("not", 0.0)):
        changes = {"trainer.max_steps": 1, "optim.grad_clip": grad_clip}
        summary = run_pretraining(settings(changes | {"trainer.out_dir": str(tmp_path / name)}))
        norms.append(float(read_metrics(summary.out_dir / METRICS_FILE)[-1]["grad_norm"]))
    assert norms[0] == norms[1] > 1e-3


# Adam does not see the scale of a gradient, so equal weights alone would not show a sum in place of a mean.
def test_accumulated_micro_batches_report_the_mean_loss_and_gradient_of_one_large_batch(settings, tmp_path):
    accumulated, at_once = (
        run_pretraining(settings({"trainer.out_dir": str(tmp_path / str(n)), "trainer.micro_batch_size": n}))
        for n in (2, 8)
    )
    rows = zip(*(read_metrics(run.out_dir / METRICS_FILE) for run in (accumulated, at_once)), strict=True)
    for left, right in rows:
        for column in ("loss", "grad_norm"):
            assert float(left[column] or 0) == pytest.approx(float(right[column] or 0), rel=1e-3), left[
                "step"
            ]
