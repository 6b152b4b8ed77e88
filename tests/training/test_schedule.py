import math

import pytest

from rwkv_train.config.optim import OptimConfig
from rwkv_train.config.trainer import TrainerConfig
from rwkv_train.training.schedule import learning_rate_factor, total_steps

COSINE = OptimConfig(lr=6e-4, lr_final=6e-5, warmup_steps=10)


@pytest.mark.parametrize(
    ("step", "lr"),
    [
        (0, 6e-6),  # 1 % of lr
        (5, 6e-4 * (0.01 + 0.99 * 0.5)),
        (10, 6e-4),  # the end of the warm-up is the top of the cosine
        (510, (6e-4 + 6e-5) / 2),  # half-way between 10 and 1010
        (260, 6e-5 + (6e-4 - 6e-5) * (1 + math.sqrt(0.5)) / 2),  # a quarter: cos(45 degrees)
        (1010, 6e-5),
        (5000, 6e-5),
    ],
)
def test_cosine_with_warmup_has_the_published_values(step, lr):
    assert learning_rate_factor(step, 1010, COSINE) * 6e-4 == pytest.approx(lr, rel=1e-12)


def test_the_published_trainer_prints_this_value_after_its_first_mini_epoch():
    # RWKV-LM, minipile demo: lr 5.9975e-4 after 40320 samples of 512 tokens, of 1,498,226,207 tokens in all,
    # at 16 samples a step. Its cosine counts tokens; so do ours, since every step has as many.
    n_steps = 1_498_226_207 / (16 * 512)
    lr = 6e-4 * learning_rate_factor(40_320 // 16, int(n_steps), COSINE)
    assert lr == pytest.approx(5.9975e-4, abs=5e-9)


def test_constant_stays_after_the_warmup():
    optim = OptimConfig(lr=1e-3, lr_final=1e-3, schedule="constant", warmup_steps=4)
    assert [learning_rate_factor(step, 100, optim) for step in (0, 2, 4, 99)] == [0.01, 0.505, 1.0, 1.0]


def test_without_warmup_the_first_step_is_at_the_top():
    assert learning_rate_factor(0, 100, OptimConfig(warmup_steps=0)) == 1.0


@pytest.mark.parametrize(
    ("length", "steps"),
    [({"max_steps": 7}, 7), ({"max_tokens": 8 * 100 * 3 + 1}, 4), ({"max_epochs": 2.0}, 250)],
    ids=["steps", "tokens are rounded up to a step", "epochs"],
)
def test_the_length_of_a_run_in_steps(length, steps):
    trainer = TrainerConfig(out_dir="x", global_batch_size=8, micro_batch_size=8, **length)
    assert total_steps(trainer, ctx_len=100, n_slots=1000) == steps
