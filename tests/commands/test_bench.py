import json
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[2]


def bench(*arguments):
    command = [sys.executable, str(CHECKOUT / "cli.py"), "bench", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


SMALL = ("--size", "B1T9H2N8", "--repeats", "1", "--device", "cpu")


def test_measurements_are_written_with_their_circumstances(tmp_path):
    path, picture = tmp_path / "new folder" / "kernels.json", tmp_path / "another" / "roofs.png"
    result = bench("kernels", "--backend", "cpp", *SMALL, "--json", str(path), "--plot", str(picture))

    assert result.returncode == 0, result.stderr
    content = json.loads(path.read_text())
    assert content["environment"]["command"].startswith("rwkv-train bench kernels --backend cpp")
    assert {row["op"] for row in content["results"]} == {"wkv4", "wkv5", "wkv6", "wkv7"}
    assert {row["backend"] for row in content["results"]} == {"cpp"}
    assert content["limits"]["copy_gb_per_second"] > 0
    assert content["limits"]["matmul_gop_per_second"] > 0
    assert all(0 < row["of_copy"] < 1 for row in content["results"])
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "arguments",
    [
        ["speed"],
        ["kernels", "--backend", "fast"],
        ["saving", "--strategy", "zero"],
        ["converting", "--config", "rwkv9"],
        ["kernels", "--config", "rwkv7-0.4b"],
        ["saving", "--backend", "cpp"],
    ],
    ids=["what", "backend", "strategy", "config", "config of kernels", "backend of saving"],
)
def test_what_is_not_there_is_refused(call_main, arguments):
    code, out, said = call_main("bench", *arguments)
    assert code == 2
    assert out == ""
    assert "rror" in said  # "error: " is ours, "Error" the frame of Typer's
