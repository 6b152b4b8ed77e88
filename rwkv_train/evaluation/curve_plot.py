"""Loss by position in the document as a picture: what models make of a long context."""

from collections.abc import Mapping
from io import BytesIO

# Not pyplot: it would keep every figure, and choose a window system.
from matplotlib.figure import Figure

from rwkv_train.evaluation.positions import Curve

FORMATS = ("png", "svg")


def draw_curves(curves: Mapping[str, Curve], picture_format: str) -> bytes:
    """Draw curves that end at one length, a line for each name.

    Args:
        curves: at least one; a bucket is drawn at its last position.
        picture_format: one of ``FORMATS``.
    """
    figure = Figure(figsize=(7, 4.2 + 0.2 * len(curves)), layout="constrained")
    axes = figure.subplots()
    for name, curve in curves.items():
        points = [(bucket.last, bucket.loss) for bucket in curve.buckets if bucket.loss is not None]
        axes.plot(*zip(*points, strict=True), marker="o", markersize=4, linewidth=1.6, label=name)
    curve = next(iter(curves.values()))
    documents = "1 document" if curve.documents == 1 else f"{curve.documents:,} documents"
    axes.set_xscale("log", base=2)
    axes.set_xticks(
        [bucket.last for bucket in curve.buckets], [_tick(bucket.last) for bucket in curve.buckets]
    )
    axes.minorticks_off()
    axes.set(
        title=f"Loss by position, {documents} of {curve.min_length:,} tokens or more",
        xlabel="position in the document, in tokens (each point: from the one before it up to here)",
        ylabel="nats per token",
    )
    axes.grid(alpha=0.3)
    # Below, where names of any length leave the curves their room; and a path's $ begins no formula.
    legend = figure.legend(loc="outside lower center", fontsize="small")
    for text in legend.get_texts():
        text.set_parse_math(False)
    buffer = BytesIO()
    figure.savefig(buffer, format=picture_format, dpi=150)
    return buffer.getvalue()


def _tick(position: int) -> str:
    return f"{position // 1024}k" if position >= 1024 else str(position)
