from rwkv_train.training.loggers import MetricsFile, read_metrics


def test_a_run_that_goes_on_keeps_the_rows_and_columns_it_has(tmp_path):
    path = tmp_path / "metrics.csv"
    first = MetricsFile(path, ["loss", "val_loss"], start_step=0)
    for step in (1, 2, 3):
        first.log_metrics({"loss": step / 2, "val_loss": step / 4}, step=step)

    MetricsFile(path, ["loss"], start_step=2).log_metrics({"loss": 9.0}, step=3)

    assert read_metrics(path) == [
        {"step": "1", "loss": "0.5", "val_loss": "0.25"},
        {"step": "2", "loss": "1.0", "val_loss": "0.5"},
        {"step": "3", "loss": "9.0", "val_loss": ""},
    ]
