#!/usr/bin/env python3
"""Times mps_flash_attn.jax.dot_product_attention beside jax.nn.dot_product_attention, both compiled, in one process.

    bench/versus_jax.py [--length 2048] [--heads 8] [--head-dim 64] [--dtype float32] [--not-causal] [--seconds 20]

Calls alternate; a result is compared with attention in float64 before it is timed, and gradients with those of jax.nn.
Printed are the medians, their ratio, and that of the best. Both use all threads that the process may use.
"""

import argparse
import functools
import platform
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from mps_flash_attn.jax import dot_product_attention
from mps_flash_attn.library import library

TOLERANCE = {"float32": 2e-5, "bfloat16": 5e-2, "float16": 5e-3}


def exact(q, k, v, causal):
    """In float64, head by head."""
    q, k, v = (np.asarray(one, np.float64)[0].swapaxes(0, 1) for one in (q, k, v))
    heads = []
    for q_head, k_head, v_head in zip(q, k, v, strict=True):
        scores = q_head @ k_head.T * q_head.shape[1] ** -0.5
        if causal:
            scores[~np.tri(*scores.shape, dtype=bool)] = -np.inf
        weights = np.exp(scores - scores.max(1, keepdims=True))
        heads.append(weights / weights.sum(1, keepdims=True) @ v_head)
    return np.stack(heads, 1)[None]


def near(found, expected, tolerance):
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    if not np.allclose(found, expected, rtol=tolerance, atol=tolerance * (1 + np.abs(expected).max())):
        raise SystemExit(f"wrong: differs by {np.abs(found - expected).max()}")


def alternate(calls, seconds):
    """The times of each call, in milliseconds."""
    times = [[] for _ in calls]
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < 5:
        for call, found in zip(calls, times, strict=True):
            began = time.perf_counter()
            jax.block_until_ready(call())
            found.append(1e3 * (time.perf_counter() - began))
    return times


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--dtype", default="float32", choices=TOLERANCE)
    parser.add_argument("--not-causal", action="store_true")
    parser.add_argument("--seconds", type=float, default=20, help="of each of the two rows (20)")
    options = parser.parse_args()
    causal, tolerance = not options.not_causal, TOLERANCE[options.dtype]
    shape = 1, options.length, options.heads, options.head_dim
    random = np.random.default_rng(1)
    q, k, v, d_out = (jnp.asarray(random.standard_normal(shape), options.dtype) for _ in range(4))
    implementations = dot_product_attention, jax.nn.dot_product_attention
    forward = [jax.jit(functools.partial(one, is_causal=causal)) for one in implementations]

    def train(attention, q, k, v):
        return jax.vjp(functools.partial(attention, is_causal=causal), q, k, v)[1](d_out)

    backward = [jax.jit(functools.partial(train, one)) for one in implementations]
    near(forward[0](q, k, v), exact(q, k, v, causal), tolerance)
    for ours, theirs in zip(*(one(q, k, v) for one in backward), strict=True):
        near(ours, theirs, 10 * tolerance)
    print(
        f"B1 N{options.length} H{options.heads} D{options.head_dim} {options.dtype}{' causal' * causal}; "
        f"libmfa {library().version}, jax {jax.__version__}, Python {platform.python_version()}"
    )
    for name, functions in (("forward", forward), ("forward and gradients", backward)):
        ours, theirs = alternate([functools.partial(one, q, k, v) for one in functions], options.seconds)
        medians = statistics.median(ours), statistics.median(theirs)
        print(
            f"{name}: ours {medians[0]:.1f} ms, jax.nn {medians[1]:.1f} ms; "
            f"jax.nn / ours {medians[1] / medians[0]:.2f}, of the best of {len(ours)} {min(theirs) / min(ours):.2f}"
        )


if __name__ == "__main__":
    main()
