"""bench/context_parallel.py: its comparisons, and its times."""

import pathlib
import sys
import types

import torch

import pool

BENCH = pathlib.Path(__file__).resolve().parents[3] / "bench"


def checked_and_timed():
    sys.path.append(str(BENCH))
    import context_parallel as bench

    bench.CHECKED = 360
    bench.BANDS = {name: bench.BANDS[name] for name in ("documents", "sinks")}
    options = types.SimpleNamespace(seed=1, torch_dtype=torch.float32, heads=2, kv_heads=1, head_dim=8)
    options.rounds, options.check = 1, True
    device = torch.device("cpu")
    count, wrong = bench.check(options, device)
    del bench.BANDS["documents"]
    bench.TOLERANCE = {torch.float32: -1.0}
    _, all_wrong = bench.check(options, device)
    return count, wrong, len(all_wrong), bench.measure(32, options, device)


def test_comparisons_and_times():
    for count, wrong, all_wrong, times in pool.shared().run(range(4), checked_and_timed):
        assert count == 2 * all_wrong == 2 * 2 * 3 * 2 and not wrong
        assert set(times) == {"forward", "forward+backward"}
        assert all(set(of_pass) == {"one", "ring", "all_to_all"} for of_pass in times.values())
