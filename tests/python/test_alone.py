"""The package beside PyTorch or NumPy alone: it imports no other library, and says which one is missing. JAX, which
needs NumPy, is in test_jax.py."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.cpu("processes of their own, which have no stand-in for Metal")

LIBRARIES = (
    "comfy",
    "diffusers",
    "flash_attn",
    "jax",
    "matplotlib",
    "ml_dtypes",
    "numpy",
    "rich",
    "torch",
    "transformers",
)

TORCH = """
import torch
import mps_flash_attn as m

q = torch.ones(1, 2, 5, 8)
assert m.flash_attention(q, q, q).equal(q) and m.explain(q, q, q)
starts, rows = torch.tensor([0, 2, 5], dtype=torch.int32), q[0].transpose(0, 1)
assert m.flash_attention_varlen(rows, rows, rows, starts, starts, 3, 3).allclose(rows)
with m.replaced_sdpa():
    assert torch.nn.functional.scaled_dot_product_attention(q, q, q).allclose(q)
m.install_flash_attn()
from flash_attn import flash_attn_func
assert flash_attn_func(q, q, q).allclose(q)
if hasattr(torch.nn.attention, "restore_flash_attention_impl"):
    m.register_flash_attention_impl().remove()
for function, library in (
    (m.register_comfyui, "comfy"),
    (m.register_diffusers, "diffusers"),
    (m.register_transformers, "transformers"),
    (lambda: m.numpy, "numpy"),
    (lambda: m.jax, "jax"),
):
    try:
        function()
    except ImportError as error:
        assert library in str(error), error
    else:
        raise AssertionError(library)
"""
NUMPY = """
import numpy as np
from mps_flash_attn.numpy import attention, attention_backward

q = np.ones((1, 2, 5, 8), np.float32)
out, lse = attention(q, q, q, return_lse=True)
assert np.allclose(out, 1) and attention_backward(q, q, q, q, out, lse).query.shape == q.shape
"""
ALONE = {"torch": TORCH, "numpy": NUMPY}


@pytest.mark.parametrize("library", ALONE)
def test_alone(library):
    missing = sorted({*LIBRARIES} - {library})
    first = f"import sys\nsys.modules.update(dict.fromkeys({missing}))  # None: its import is an ImportError\n"
    if library == "torch":  # the name is ours to give
        first += "del sys.modules['flash_attn']\n"
    last = f"\nassert not any(sys.modules.get(name) for name in {[name for name in missing if name != 'flash_attn']})"
    done = subprocess.run(
        [sys.executable, "-c", first + ALONE[library] + last], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
