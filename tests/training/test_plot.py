import pytest
from matplotlib.figure import Figure

from rwkv_train.training.plot import plot_run

HEADER = "step,loss,val_loss,val_bits_per_byte,val_bits_per_byte/code"


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """Plot rows of metrics; return, for each pair of axes, the lines by label."""
    figures = []
    original = Figure.savefig

    def savefig(self, *arguments, **options):
        figures.append(self)
        original(self, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", savefig)

    def draw(*rows):
        (tmp_path / "metrics.csv").write_text("\n".join([HEADER, *rows]) + "\n")
        assert plot_run(tmp_path).read_bytes().startswith(b"\x89PNG")
        return [
            {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axis.lines}
            for axis in figures[-1].axes
        ]

    return draw


def test_losses_and_bits_per_byte_are_drawn_at_their_steps(drawn):
    left, right = drawn("0,,5.5,8.0,8.1", "10,3.5,,,", "20,2.5,2.4,3.0,3.2")

    assert left == {"training": ([10, 20], [3.5, 2.5])}
    assert right == {"all domains: 3.000": ([0, 20], [8.0, 3.0]), "code: 3.200": ([0, 20], [8.1, 3.2])}


def test_without_known_bytes_the_held_out_loss_is_drawn(drawn):
    (left,) = drawn("0,,5.5,,", "10,3.5,3.4,,")
    assert left == {"training": ([10], [3.5]), "held-out text": ([0, 10], [5.5, 3.4])}


def test_a_domain_that_was_never_scored_is_left_out(drawn):
    _, right = drawn("10,3.5,3.4,5.0,")
    assert list(right) == ["all domains: 5.000"]


def test_a_run_without_a_row_has_an_empty_picture(drawn):
    (left,) = drawn()
    assert left == {"training": ([], []), "held-out text": ([], [])}
