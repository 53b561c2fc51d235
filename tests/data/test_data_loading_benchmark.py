"""The benchmark of loading runs, and finds what it is there to find."""

import json
import runpy
from pathlib import Path


BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "data_loading.py"


def test_a_small_run(tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARK.parent)
    main = runpy.run_path(str(BENCHMARK))["main"]
    output = tmp_path / "results.json"
    main(["--output", str(output), "--workers", "0", "--small-images", "256", "--photographs", "8", "--passes", "2"])
    results = json.loads(output.read_text())
    small, photographs = results["small"]["0 workers"], results["photographs"]["0 workers"]
    assert list(photographs) == ["pil, floats", "pil, bytes", "torchvision, floats", "torchvision, bytes"]
    # 20 times on an idle machine.
    fast, slow = (small[name]["cpu_us_per_image"] for name in ("CifarDataset", "PIL and torchvision, one by one"))
    assert slow > 4 * fast
    printed = capsys.readouterr().out
    assert all(name in printed for name in (*small, *photographs)) and "images/s" in printed
