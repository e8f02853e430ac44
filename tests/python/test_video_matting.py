"""examples/video_matting.py: a short training of small frames, on every backend."""

import importlib.util
from pathlib import Path

import pytest

from mps_flash_attn import replaced_sdpa, sdpa_stats

PATH = Path(__file__).parents[2] / "examples/video_matting.py"


@pytest.mark.usefixtures("everything", "one_thread")
def test_losses_are_equal():
    spec = importlib.util.spec_from_file_location("video_matting", PATH)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    steps = 3
    expected = example.train(steps, 64, 2)
    with replaced_sdpa():
        found = example.train(steps, 64, 2)
    assert sdpa_stats() == {"replaced": 3 * steps}
    assert found == pytest.approx(expected, rel=1e-4)
    assert len(set(expected)) == steps
