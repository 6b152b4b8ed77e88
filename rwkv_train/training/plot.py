"""The loss curve of a run as a picture."""

from pathlib import Path

# Not pyplot: it would keep every figure, and choose a window system.
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from rwkv_train.training.loggers import METRICS_FILE, read_metrics

PLOT_FILE = "loss.png"
_BITS_PER_BYTE = "val_bits_per_byte"


def plot_run(out_dir: Path, unit: str = "nats/token") -> Path:
    """Draw ``loss.png`` from a run's metrics: training loss, and held-out bits per byte by domain.

    Where the bytes of the held-out text are not known, its loss is drawn beside that of training.

    Args:
        out_dir: folder of the run.
        unit: of its loss.

    Returns:
        The path of the picture.
    """
    rows = read_metrics(out_dir / METRICS_FILE)
    domains = {
        name: _series(rows, name) for row in rows[:1] for name in row if name.startswith(_BITS_PER_BYTE)
    }
    domains = {name: series for name, series in domains.items() if series[0]}
    figure = Figure(figsize=(10 if domains else 6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2 if domains else 1, squeeze=False)[0]

    axes[0].plot(*_series(rows, "loss"), linewidth=1.2, label="training")
    axes[0].set(title="Loss", xlabel="step", ylabel=unit.replace("/", " per "))
    if not domains:
        axes[0].plot(*_series(rows, "val_loss"), marker="o", markersize=3, label="held-out text")
        axes[0].legend()
    for name, (steps, values) in domains.items():
        domain = name.removeprefix(_BITS_PER_BYTE).lstrip("/")
        style = {"linewidth": 1.0, "linestyle": "--"} if domain else {"linewidth": 2.0}
        label = f"{domain or 'all domains'}: {values[-1]:.3f}"
        axes[1].plot(steps, values, marker="o", markersize=3, label=label, **style)
    if domains:
        axes[1].set(title="Held-out text", xlabel="step", ylabel="bits per byte")
        axes[1].legend()
    for axis in axes:
        axis.grid(alpha=0.3)
    path = out_dir / PLOT_FILE
    figure.savefig(path, dpi=150)
    return path


def _series(rows: list[dict[str, str]], column: str) -> tuple[list[int], list[float]]:
    points = [(int(row["step"]), float(row[column])) for row in rows if row.get(column)]
    return [step for step, _ in points], [value for _, value in points]
