import pytest
import torch
from safetensors.torch import save_file

from rwkv_train.errors import CheckpointError
from rwkv_train.models.state import join_rows, load_state, save_state, take_rows


def test_a_saved_state_goes_on_where_it_stopped(config, perturbed_model, tokens, tmp_path):
    model = perturbed_model(config)
    state = model(tokens[:, :7]).state
    save_state(tmp_path / "state.safetensors", state)

    loaded = load_state(tmp_path / "state.safetensors")

    assert torch.equal(model(tokens[:, 7:], loaded).logits, model(tokens[:, 7:], state).logits)


def test_the_order_of_many_layers_survives(tmp_path, perturbed_model, config):
    model = perturbed_model(config.model_copy(update={"n_layer": 12}))
    state = model(torch.zeros(1, 3, dtype=torch.int64)).state
    save_state(tmp_path / "state", state)
    for got, expected in zip(load_state(tmp_path / "state"), state, strict=True):
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(got, expected, strict=True))


def test_the_zero_state_and_bfloat16_can_be_saved(config, perturbed_model, tmp_path):
    state = perturbed_model(config).zero_state(2, dtype=torch.bfloat16)
    save_state(tmp_path / "state", state)
    assert load_state(tmp_path / "state")[1].time_mix_x.dtype == torch.bfloat16


def test_saving_leaves_nothing_else_behind(config, perturbed_model, tmp_path):
    save_state(tmp_path / "state", perturbed_model(config).zero_state(1))
    save_state(tmp_path / "state", perturbed_model(config).zero_state(2))
    assert [path.name for path in tmp_path.iterdir()] == ["state"]
    assert load_state(tmp_path / "state")[0].time_mix_x.shape[0] == 2


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere"):
        load_state(tmp_path / "nowhere")


def test_a_truncated_file_is_refused(config, perturbed_model, tmp_path):
    path = tmp_path / "state"
    save_state(path, perturbed_model(config).zero_state(1))
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_state(path)


@pytest.mark.parametrize(
    "tensors",
    [
        {},
        {"emb.weight": torch.ones(2)},
        {"0.time_mix_x": torch.ones(2), "0.wkv": torch.ones(2)},
        {"1.time_mix_x": torch.ones(2), "1.wkv": torch.ones(2), "1.channel_mix_x": torch.ones(2)},
    ],
    ids=["empty", "weights", "incomplete", "first-layer-missing"],
)
def test_a_file_that_holds_no_state_is_refused(tmp_path, tensors):
    save_file(tensors, tmp_path / "file")
    with pytest.raises(CheckpointError, match="not the state of a model"):
        load_state(tmp_path / "file")


def test_a_folder_that_is_missing_is_named(config, perturbed_model, tmp_path):
    with pytest.raises(CheckpointError, match="cannot be written"):
        save_state(tmp_path / "no" / "state", perturbed_model(config).zero_state(1))


def test_rows_of_joined_states_go_on_as_their_own(config, perturbed_model, tokens):
    model = perturbed_model(config)
    first, second = model(tokens[:1, :5]).state, model(tokens[1:, :7]).state

    joined = join_rows([first, second])
    swapped = take_rows(joined, [1, 0, 1])

    assert joined[0].wkv.shape[0] == 2
    for row, alone in enumerate((second, first, second)):
        for got, expected in zip(swapped, alone, strict=True):
            assert all(torch.equal(x[row], y[0]) for x, y in zip(got, expected, strict=True))
