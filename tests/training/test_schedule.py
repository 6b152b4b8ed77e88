"""Learning rate and weight decay by step, against the formulas worked out by hand."""

import math

import pytest

from rwkv_train.config.optim import OptimConfig
from rwkv_train.config.trainer import TrainerConfig
from rwkv_train.training.schedule import RunLength, learning_rate, run_length, weight_decay

LENGTH = RunLength(n_steps=1010, tokens_per_step=512, n_tokens=1010 * 512)
LR, LR_FINAL = 6e-4, 6e-5


def optim(**settings):
    return OptimConfig(**({"lr": LR, "lr_final": LR_FINAL, "warmup_steps": 10} | settings))


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
    assert learning_rate(step, LENGTH, optim()) == pytest.approx(lr, rel=1e-12)


def test_the_published_trainer_prints_this_value_after_its_first_mini_epoch():
    # RWKV-LM, minipile demo: lr 5.9975e-4 after 40320 samples of 512 tokens, of 1,498,226,207 tokens in all,
    # at 16 samples a step.
    trainer = TrainerConfig(out_dir="x", max_tokens=1_498_226_207, global_batch_size=16)
    length = run_length(trainer, ctx_len=512, n_slots=0)
    assert learning_rate(40_320 // 16, length, optim()) == pytest.approx(5.9975e-4, abs=5e-9)


@pytest.mark.parametrize(
    ("schedule", "half_way"),
    [("linear", (6e-4 + 6e-5) / 2), ("exponential", math.sqrt(6e-4 * 6e-5))],
)
def test_linear_goes_through_the_mean_and_exponential_through_the_geometric_mean(schedule, half_way):
    rates = [learning_rate(step, LENGTH, optim(schedule=schedule)) for step in (10, 510, 1010, 2000)]
    assert rates == pytest.approx([LR, half_way, LR_FINAL, LR_FINAL], rel=1e-12)


@pytest.mark.parametrize(
    ("shape", "quarter"),
    [
        ("linear", LR - (LR - LR_FINAL) / 4),
        ("cosine", LR_FINAL + (LR - LR_FINAL) * (1 + math.sqrt(0.5)) / 2),
        ("exponential", LR * 10**-0.25),
        ("sqrt", (LR + LR_FINAL) / 2),  # 1 - sqrt(1/4)
    ],
)
def test_wsd_stays_and_then_falls_in_its_shape(shape, quarter):
    settings = optim(schedule="wsd", wsd_decay=shape, wsd_decay_fraction=0.4)
    # The last 0.4 of 1010 steps begin at 606; a quarter of the way is 707.
    rates = [learning_rate(step, LENGTH, settings) for step in (10, 300, 606, 707, 1010)]
    assert rates == pytest.approx([LR, LR, LR, quarter, LR_FINAL], rel=1e-12)


def test_wsd_over_the_whole_run_is_the_plain_schedule():
    settings = optim(schedule="wsd", wsd_decay="cosine", wsd_decay_fraction=1.0)
    for step in (3, 10, 400, 1009):
        assert learning_rate(step, LENGTH, settings) == learning_rate(step, LENGTH, optim())


def test_constant_stays_after_the_warmup():
    settings = optim(lr_final=LR, schedule="constant", warmup_steps=4)
    rates = [learning_rate(step, LENGTH, settings) for step in (0, 2, 4, 99)]
    assert rates == pytest.approx([0.01 * LR, 0.505 * LR, LR, LR])


def test_the_warmup_of_rwkv4_starts_at_a_fifth():
    settings = optim(lr_final=LR, schedule="constant", warmup_start=0.2)
    assert [learning_rate(step, LENGTH, settings) / LR for step in (0, 5)] == pytest.approx([0.2, 0.6])


def test_without_warmup_the_first_step_is_at_the_top():
    assert learning_rate(0, LENGTH, optim(warmup_steps=0)) == LR


def test_a_warmup_longer_than_the_run_only_rises():
    length = RunLength(n_steps=4, tokens_per_step=100, n_tokens=400)
    rates = [learning_rate(step, length, optim(warmup_steps=8)) / LR for step in range(4)]
    assert rates == pytest.approx([0.01 + 0.99 * step / 8 for step in range(4)])


def test_progress_counts_tokens_not_steps():
    # 250 tokens at 100 a step: the third step begins at 200 of 250.
    length = RunLength(n_steps=3, tokens_per_step=100, n_tokens=250)
    lr = learning_rate(2, length, optim(schedule="linear", warmup_steps=0))
    assert lr == pytest.approx(LR + (LR_FINAL - LR) * 0.8)


@pytest.mark.parametrize(
    ("step", "decay"),
    [(0, 0.1), (10, 0.1), (510, math.sqrt(0.1 * 0.001)), (1010, 0.001), (5000, 0.001)],
)
@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_the_weight_decay_goes_exponentially_to_its_final_value(schedule, step, decay):
    settings = optim(schedule=schedule, weight_decay=0.1, weight_decay_final=0.001)
    assert weight_decay(step, LENGTH, settings) == pytest.approx(decay, rel=1e-12)


def test_the_weight_decay_stays_where_no_final_value_is_set():
    assert weight_decay(700, LENGTH, optim(weight_decay=0.1)) == 0.1


@pytest.mark.parametrize(
    ("setting", "length"),
    [
        ({"max_steps": 7}, (7, 800, 5600)),
        ({"max_tokens": 8 * 100 * 3 + 1}, (4, 800, 2401)),
        ({"max_epochs": 2.0}, (250, 800, 200_000)),
        ({"max_tokens": 10**15 - 1}, (1_250_000_000_000, 800, 10**15 - 1)),
    ],
    ids=["steps", "tokens are rounded up to a step", "epochs", "as long as any"],
)
def test_the_length_of_a_run(setting, length):
    trainer = TrainerConfig(out_dir="x", global_batch_size=8, micro_batch_size=8, **setting)
    assert run_length(trainer, ctx_len=100, n_slots=1000) == length
