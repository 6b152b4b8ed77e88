"""What happens to a gradient between the backward and the optimizer."""

import pytest

from rwkv_train.errors import TrainingError
from rwkv_train.training.callbacks import RunCallback
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
        changes = {"trainer.max_steps": 1, "optim.grad_clip": grad_clip, "trainer.log_every_n_steps": 1}
        summary = run_pretraining(settings(changes | {"trainer.out_dir": str(tmp_path / name)}))
        header, *rows = (
            line.split(",") for line in (summary.out_dir / "metrics.csv").read_text().splitlines()
        )
        norms.append(float(rows[-1][header.index("grad_norm")]))
    assert norms[0] == norms[1] > 1e-3
