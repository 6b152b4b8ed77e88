"""The loss curve of a run as a picture."""

from pathlib import Path

# Not pyplot: it would keep every figure, and choose a window system.
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from rwkv_train.training.loggers import METRICS_FILE, read_metrics

PLOT_FILE = "loss.png"
_BITS_PER_BYTE = "val_bits_per_byte"


def plot_run(out_dir: Path) -> Path:
    """Draw ``loss.png`` from a run's metrics: training loss, and held-out bits per byte by domain.

    Returns:
        The path of the picture.
    """
    rows = read_metrics(out_dir / METRICS_FILE)
    has_validation = any(row.get(_BITS_PER_BYTE) for row in rows)
    figure = Figure(figsize=(10 if has_validation else 6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2 if has_validation else 1, squeeze=False)[0]

    steps, losses = _series(rows, "loss")
    axes[0].plot(steps, losses, linewidth=1.2)
    axes[0].set(title="Training loss", xlabel="step", ylabel="nats per token")
    if has_validation:
        for column in [name for name in rows[0] if name.startswith(_BITS_PER_BYTE)]:
            steps, values = _series(rows, column)
            domain = column.removeprefix(_BITS_PER_BYTE).lstrip("/")
            pooled = not domain
            axes[1].plot(
                steps,
                values,
                marker="o",
                markersize=3,
                linewidth=2.0 if pooled else 1.0,
                linestyle="-" if pooled else "--",
                label=f"{domain or 'all domains'}: {values[-1]:.3f}",
            )
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
