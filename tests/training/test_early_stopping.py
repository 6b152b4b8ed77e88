"""When validations end a run, and that a resumed run decides the same."""

import json

import pytest

from rwkv_train.training.early_stopping import EarlyStopping


def ends_after(losses, patience, resumed_after=()):
    """Number of validations after which a run ends; it is saved and resumed after some of them."""
    stopping = EarlyStopping(patience)
    for number, loss in enumerate(losses, start=1):
        stopping.note(loss)
        if number in resumed_after:
            stopping = EarlyStopping(patience, memory=json.loads(json.dumps(stopping.to_json())))
        if stopping.reason is not None:
            return number
    return None


@pytest.mark.parametrize(
    ("losses", "patience", "end"),
    [
        ([3.0, 2.0, 2.5, 2.4, 1.0], 3, None),
        ([3.0, 2.0, 2.5, 2.4, 1.0], 2, 4),
        ([3.0, 3.0], 1, 2),  # as good is not better
        ([1.0, 2.0, 1.9, 1.8, 1.7], 4, 5),  # better than the one before is not better than the best
        ([3.0, 3.5, 2.9, 3.5, 3.4], 2, 5),  # a better one begins the count anew
        ([1.0, 2.0, 3.0], None, None),
    ],
)
@pytest.mark.parametrize("resumed_after", [(), (1, 2, 3, 4)], ids=["at once", "resumed"])
def test_a_run_ends_after_so_many_validations_without_a_better_loss(losses, patience, end, resumed_after):
    assert ends_after(losses, patience, resumed_after) == end


def test_more_patience_lets_a_run_go_on():
    stopping = EarlyStopping(1)
    stopping.note(1.0)
    stopping.note(1.0)
    assert stopping.reason is not None
    assert EarlyStopping(2, memory=stopping.to_json()).reason is None


def test_the_reason_names_the_setting_and_the_numbers():
    stopping = EarlyStopping(1, memory={"best_loss": 2.5, "validations_since": 1})
    assert stopping.reason == (
        "1 validations in a row were not below the loss of 2.5000 nats/token (trainer.early_stopping_patience is 1)"
    )


@pytest.mark.parametrize("held_out", [{"tokens": 7, "val_tokens": 5}, {"tokens": 9, "val_tokens": 4}])
def test_losses_on_other_text_are_not_compared(held_out):
    stopping = EarlyStopping(1, {"tokens": 9, "val_tokens": 5})
    stopping.note(1.0)
    stopping.note(1.0)
    other = EarlyStopping(1, held_out, stopping.to_json())
    assert other.reason is None
    other.note(2.0)  # the first on this text, so the best
    assert other.reason is None
    assert EarlyStopping(1, {"tokens": 9, "val_tokens": 5}, stopping.to_json()).reason is not None


def test_the_reason_has_the_unit_of_the_loss():
    stopping = EarlyStopping(1, unit="nats/pair")
    stopping.note(1.0)
    stopping.note(1.0)
    assert stopping.reason is not None
    assert "the loss of 1.0000 nats/pair" in stopping.reason
