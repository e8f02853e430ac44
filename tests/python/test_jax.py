"""mps_flash_attn.jax, compared with attention written out in float64 and with jax.nn, also under the transformations of
JAX."""

import functools
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

jax = pytest.importorskip("jax", reason="jax is not installed")

import jax.numpy as jnp  # noqa: E402

from mps_flash_attn.jax import dot_product_attention  # noqa: E402
from stand_in import TIMEOUT  # noqa: E402

X64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64
pytestmark = pytest.mark.cpu("JAX's arrays are on the CPU")
TOLERANCES = {"float32": 2e-5, "float64": 1e-12, "float16": 1e-2, "bfloat16": 6e-2}
B, T, S, N, K, H = 2, 40, 56, 4, 2, 24
OPTIONS = {
    "plain": {},
    "causal": {"is_causal": True},
    "scale": {"scale": 0.3},
    "window": {"local_window_size": (7, 4)},
    "symmetric window, causal": {"local_window_size": 9, "is_causal": True},
    "bias": {"bias": (B, N, T, S)},
    "broadcast bias, causal": {"bias": (N, 1, S), "is_causal": True},
    "bias of a row and a column": {"bias": (B, 1, 1, S)},
    "mask": {"mask": (1, N, T, S)},
    "bias and mask": {"bias": (1, N, 1, S), "mask": (B, 1, T, S)},
    "lengths of keys": {"key_value_seq_lengths": (50, 9)},
    "both lengths": {"query_seq_lengths": (40, 7), "key_value_seq_lengths": (S + 5, 30), "is_causal": True},
}


def random(*shape, dtype="float32", seed=1):
    return jnp.asarray(np.random.default_rng([seed, *shape]).standard_normal(shape), dtype)


def inputs(dtype="float32", batch=(B,)):
    shapes = ((*batch, T, N, H), (*batch, S, K, H), (*batch, S, K, H), (*batch, T, N, H))
    return [random(*shape, dtype=dtype, seed=seed) for seed, shape in enumerate(shapes)]


def resolved(options):
    found = dict(options)
    if "bias" in found:
        found["bias"] = random(*found["bias"], seed=11)
    if "mask" in found:  # each query sees a key
        found["mask"] = (random(*found["mask"], seed=12) > -0.5).at[..., 0].set(True)
    for name in ("query_seq_lengths", "key_value_seq_lengths"):
        if name in found:
            found[name] = jnp.asarray(found[name], jnp.int32)
    return found


def written_out(q, k, v, bias=None, mask=None, scale=None, is_causal=False, local_window_size=None, **lengths):
    """(out, log-sum-exp) in float64."""
    q, k, v = (one.astype(jnp.float64) for one in (q, k, v))
    k, v = (jnp.repeat(one, q.shape[-2] // one.shape[-2], axis=-2) for one in (k, v))
    scores = jnp.einsum("btnh,bsnh->bnts", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores if bias is None else scores + bias.astype(jnp.float64)
    rows, columns = jnp.arange(q.shape[1])[:, None], jnp.arange(k.shape[1])
    visible = jnp.ones((1, 1, q.shape[1], k.shape[1]), bool) if mask is None else mask
    if is_causal:
        visible = visible & (columns <= rows)
    if local_window_size is not None:
        left, right = (local_window_size,) * 2 if isinstance(local_window_size, int) else local_window_size
        visible = visible & (columns >= rows - left) & (columns <= rows + right)
    if "key_value_seq_lengths" in lengths:
        visible = visible & (columns < lengths["key_value_seq_lengths"][:, None, None, None])
    if "query_seq_lengths" in lengths:
        visible = visible & (rows < lengths["query_seq_lengths"][:, None, None, None])
    seen = visible.any(-1, keepdims=True)
    scores = jnp.where(visible, scores, -jnp.inf)
    maximum = jax.lax.stop_gradient(jnp.where(seen, scores.max(-1, keepdims=True), 0))
    weights = jnp.where(visible, jnp.exp(scores - maximum), 0)
    total = weights.sum(-1, keepdims=True)
    out = jnp.einsum("bnts,bsnh->btnh", weights / jnp.where(seen, total, 1), v)
    lse = jnp.where(seen, maximum + jnp.log(jnp.where(seen, total, 1)), -jnp.inf)[..., 0]
    return out, lse.transpose(0, 2, 1)


ARRAYS = ("bias", "mask", "query_seq_lengths", "key_value_seq_lengths")


@functools.cache
def reference(name):
    """Attention written out, with the options of this name: a function of float64 and of the arrays among the options,
    which is compiled once for all dtypes. It returns the gradients of q, k, v and the bias, and (out, log-sum-exp)."""
    fixed = {option: value for option, value in OPTIONS[name].items() if option not in ARRAYS}

    def loss(q, k, v, bias, d_out, arrays):
        out, lse = written_out(q, k, v, **fixed, **bias, **arrays)
        return (out * d_out).sum(), (out, lse)

    return jax.jit(jax.grad(loss, (0, 1, 2, 3), has_aux=True))


def gradients(function, q, k, v, d_out, options):
    """Of q, k, v, and the bias if there is one."""

    wide = jax.dtypes.canonicalize_dtype(jnp.float64)

    def loss(q, k, v, more):
        out = function(q, k, v, **(options | more))
        return (out.astype(wide) * d_out.astype(wide)).sum()

    more = {"bias": options["bias"]} if "bias" in options else {}
    *found, d_more = jax.jit(jax.grad(loss, (0, 1, 2, 3)))(q, k, v, more)
    return [*found, *d_more.values()]


def assert_near(found, expected, tolerance):
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance * (1 + np.abs(expected).max()))


@pytest.mark.parametrize(
    "name, dtype",
    [(name, dtype) for name in OPTIONS for dtype in TOLERANCES if dtype != "float16" or name in ("plain", "bias")],
)
def test_results_and_gradients(name, dtype):
    with X64(True):
        q, k, v, d_out = inputs(dtype)
        options = resolved(OPTIONS[name])
        if "bias" in options and dtype != "float16":  # whose bias is in float32
            options["bias"] = options["bias"].astype(dtype)
        out, lse = jax.jit(functools.partial(dot_product_attention, return_residual=True, **options))(q, k, v)
        assert out.dtype == lse.dtype == q.dtype
        if "bias" in options and options["bias"].ndim == 3:
            options["bias"] = options["bias"][None]
        arrays = {option: options[option] for option in ARRAYS if option in options}
        bias = {"bias": arrays.pop("bias").astype(jnp.float64)} if "bias" in arrays else {}
        wide = (one.astype(jnp.float64) for one in (q, k, v))
        (*d_q_k_v, d_bias), (expected, expected_lse) = reference(name)(*wide, bias, d_out.astype(jnp.float64), arrays)
        assert_near(out, expected, TOLERANCES[dtype])
        seen = np.isfinite(np.asarray(expected_lse))
        assert (np.isneginf(np.asarray(lse, np.float64)) == ~seen).all()
        assert_near(np.where(seen, lse, 0), np.where(seen, expected_lse, 0), TOLERANCES[dtype])
        found = gradients(dot_product_attention, q, k, v, d_out, options)
        for a, b in zip(found, [*d_q_k_v, *d_bias.values()], strict=True):
            assert_near(a, b, TOLERANCES[dtype])


@pytest.mark.parametrize("name", ["plain", "symmetric window, causal", "bias and mask", "both lengths"])
def test_same_as_jax_nn(name):
    q, k, v, d_out = inputs()
    options = resolved(OPTIONS[name])
    assert_near(dot_product_attention(q, k, v, **options), jax.nn.dot_product_attention(q, k, v, **options), 2e-5)
    for a, b in zip(
        gradients(dot_product_attention, q, k, v, d_out, options),
        gradients(jax.nn.dot_product_attention, q, k, v, d_out, options),
        strict=True,
    ):
        assert_near(a, b, 2e-5)


def test_without_a_batch_and_more_columns_of_values():
    q, k, v, _ = inputs(batch=())
    assert_near(dot_product_attention(q, k, v), jax.nn.dot_product_attention(q, k, v), 2e-5)
    wide = jnp.concatenate((v, 2 * v), -1)
    out, lse = dot_product_attention(q, k, wide, return_residual=True)
    assert out.shape == (T, N, 2 * H) and lse.shape == (T, N)
    assert_near(out[..., H:], 2 * dot_product_attention(q, k, v), 2e-5)


def test_query_that_sees_no_key():
    q, k, v, d_out = inputs()
    mask = jnp.ones((B, 1, T, S), bool).at[:, :, 3].set(False)
    out, lse = dot_product_attention(q, k, v, mask=mask, return_residual=True)
    assert (out[:, 3] == 0).all() and jnp.isneginf(lse[:, 3]).all() and jnp.isfinite(jnp.delete(lse, 3, 1)).all()
    found = gradients(dot_product_attention, q, k, v, d_out, {"mask": mask})
    assert (found[0][:, 3] == 0).all() and all(jnp.isfinite(one).all() for one in found)


def test_residual_has_no_gradient():
    q, k, v, _ = inputs()

    def loss(q):
        return dot_product_attention(q, k, v, return_residual=True)[1].sum()

    assert (jax.grad(loss)(q) == 0).all()


# --- Transformations -----------------------------------------------------------------------------


AXES = ((0, 0, 0), (0, None, None), (None, 0, 0), (1, None, 2), (-1, 0, None))


@pytest.mark.parametrize("axes, batch", [*((axes, 3) for axes in AXES), (AXES[0], 1), (AXES[3], 1)])
def test_vmap(axes, batch):
    """Also of gradients, which are summed where an input is not mapped."""
    plain = inputs(batch=(batch,))[:3]
    given = [
        one if axis is None else jnp.moveaxis(random(5, *one.shape, seed=axis + 20), 0, axis)
        for one, axis in zip(plain, axes, strict=True)
    ]

    def loss(attention, q, k, v):
        return (jax.vmap(functools.partial(attention, is_causal=True), axes)(q, k, v) ** 2).sum()

    ours, theirs = (
        jax.jit(jax.value_and_grad(functools.partial(loss, attention), (0, 1, 2)))(*given)
        for attention in (dot_product_attention, jax.nn.dot_product_attention)
    )
    assert_near(ours[0], theirs[0], 1e-5)
    for a, b in zip(ours[1], theirs[1], strict=True):
        assert_near(a, b, 2e-5)


def test_nested_vmap_with_a_bias_and_lengths():
    q, k, v, _ = inputs(batch=(3, 2, B))
    bias, lengths = random(2, N, 1, S), jnp.asarray([[50, 3], [7, 20], [56, 1]], jnp.int32)

    def one(attention, q, k, v, bias, lengths):
        return attention(q, k, v, bias, key_value_seq_lengths=lengths)

    def both(attention, *given):
        inner = jax.vmap(functools.partial(one, attention), (0, 0, 0, 0, None))
        return jax.vmap(inner, (0, 0, 0, None, 0))(*given)

    def loss(attention, *given):
        return (both(attention, *given, lengths) ** 2).sum()

    ours, theirs = (
        jax.jit(jax.grad(functools.partial(loss, one), (0, 1, 2, 3)))(q, k, v, bias)
        for one in (dot_product_attention, jax.nn.dot_product_attention)
    )
    for a, b in zip(ours, theirs, strict=True):
        assert_near(a, b, 2e-5)


def test_checkpoint_and_scan():
    q, k, v, d_out = inputs()

    def layers(attention, q, k, v):
        def layer(q, _):
            return q + attention(q, k, v), None

        return jax.lax.scan(jax.checkpoint(layer), q, None, length=3)[0]

    found, expected = (
        gradients(functools.partial(layers, one), q, k, v, d_out, {})
        for one in (dot_product_attention, jax.nn.dot_product_attention)
    )
    for a, b in zip(found, expected, strict=True):
        assert_near(a, b, 2e-5)


def test_only_what_is_wanted_is_computed():
    """The gradients that are not asked for are no results of the call, nor is the log-sum-exp in inference; and no
    array has the size of the scores."""
    q, k, v, _ = inputs(batch=(1,))
    bias = random(1, N, 1, S)

    def loss(q, bias):
        return dot_product_attention(q, k, v, bias).sum()

    text = jax.jit(jax.grad(loss)).lower(q, bias).as_text()
    assert 'q k v mask lse o d_o -> dq"' in text
    assert '-> dq dbias"' in jax.jit(jax.grad(loss, (0, 1))).lower(q, bias).as_text()
    assert 'q k v mask -> o"' in jax.jit(loss).lower(q, bias).as_text()
    assert f"{T}x{S}" not in text


def test_threads_of_the_program():
    q, k, v, d_out = inputs()
    expected = gradients(dot_product_attention, q, k, v, d_out, {})
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: gradients(dot_product_attention, q, k, v, d_out, {}), range(16)):
            assert all((a == b).all() for a, b in zip(found, expected, strict=True))


# --- What is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error, said, changes",
    [
        (TypeError, "query is int32; it must be float32", {"query": jnp.zeros((B, T, N, H), jnp.int32)}),
        (TypeError, "query is float16, key float32", {"query": jnp.zeros((B, T, N, H), jnp.float16)}),
        (ValueError, "query has 2 dimensions; it must have 4, or 3", {"query": jnp.zeros((T, H))}),
        (ValueError, "query has the head_dim 8 and key 24", {"query": jnp.zeros((B, T, N, 8))}),
        (ValueError, "query has 3 heads and key 2", {"query": jnp.zeros((B, T, 3, H))}),
        (ValueError, r"bias has the shape \(3, 1, 1, 1\)", {"bias": jnp.zeros((3, 1, 1, 1))}),
        (TypeError, "mask is float32; it must be bool", {"mask": jnp.zeros((1, 1, T, S))}),
        (TypeError, "bias is bool", {"bias": jnp.zeros((1, 1, T, S), bool)}),
        (ValueError, r"query_seq_lengths is int32 of the shape \(3,\)", {"query_seq_lengths": jnp.zeros(3, jnp.int32)}),
        (ValueError, "local_window_size is 1.5", {"local_window_size": 1.5}),
        (ValueError, "implementation is 'cudnn'", {"implementation": "cudnn"}),
        (TypeError, "scale is 'x'", {"scale": "x"}),
    ],
)
def test_wrong_arguments(error, said, changes):
    q, k, v, _ = inputs()
    with pytest.raises(error, match=said):
        dot_product_attention(**({"query": q, "key": k, "value": v} | changes))


def test_scale_must_be_known():
    q, k, v, _ = inputs()
    with pytest.raises(TypeError, match=r"scale is .*; it must be a number"):
        jax.jit(lambda scale: dot_product_attention(q, k, v, scale=scale))(0.5)


def test_second_derivatives_are_refused():
    q, k, v, _ = inputs()

    def loss(q):
        return dot_product_attention(q, k, v).sum()

    for derivative in (jax.grad(lambda q: jax.grad(loss)(q).sum()), jax.hessian(loss)):
        with pytest.raises(NotImplementedError, match=r"no second derivative; for that use jax\.nn"):
            derivative(q)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(loss, (q,), (q,))


@pytest.mark.parametrize(
    "said, problem, operands",
    [
        (
            r"o has the sizes \(1, 4, 1, 8\); the problem has 1 batch entries, 1 heads, 4 rows and 600 col",
            "forward f32 b1 h1 q4 kv4 d600",
            "q k v -> o",
        ),
        (
            r"o has the sizes \(1, 4, 1, 8\); the problem has 2 batch entries",
            "forward f32 b2 h1 q4 kv4 d8",
            "q k v -> o",
        ),
        ("o has XLA's element type 11", "forward f16 b1 h1 q4 kv4 d8", "q k v -> o"),
        ("operands names w;", "forward f32 b1 h1 q4 kv4 d8", "q k w -> o"),
        ("operands names k twice", "forward f32 b1 h1 q4 kv4 d8", "q k k -> o"),
        ("operands names 2 arguments; the call has 3", "forward f32 b1 h1 q4 kv4 d8", "q k -> o"),
        ("operands names mask, which the call does not have", "forward f32 b1 h1 q4 kv4 d8", "q k v mask -> o"),
        ("mask is NULL", "forward f32 b1 h1 q4 kv4 d8 mask_bool", "q k v -> o"),
        ('operands is "q k v"', "forward f32 b1 h1 q4 kv4 d8", "q k v"),
        ('operands is "q k v -> o" and problem ".* metal"', "forward f32 b1 h1 q4 kv4 d8 metal", "q k v -> o"),
        ("k_type is .*; both must be 0", "forward f32 b1 h1 q4 kv4 d8 k_int8", "q k v -> o"),
        ("attribute problem is missing", "f" * 2000, "q k v -> o"),
        ("sideways", "sideways f32 b1 h1 q4 kv4 d8", "q k v -> o"),
    ],
)
def test_wrong_calls_of_the_handler(said, problem, operands):
    dot_product_attention(*inputs()[:3])  # registers it
    q = jnp.zeros((1, 4, 1, 8))
    call = jax.ffi.ffi_call("mfa_attention", jax.ShapeDtypeStruct(q.shape, q.dtype), vmap_method="expand_dims")
    with pytest.raises(jax.errors.JaxRuntimeError, match=f"libmfa: .*{said}"):
        jax.jit(lambda q: call(q, q, q, problem=problem, operands=operands))(q).block_until_ready()


def test_no_other_library_is_imported():
    program = (
        "import sys, jax.numpy as jnp; from mps_flash_attn.jax import dot_product_attention as f\n"
        "q = jnp.ones((1, 5, 2, 8)); assert (f(q, q, q) == 1).all()\n"
        "assert not {'torch', 'transformers', 'diffusers', 'rich'} & {*sys.modules}"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == 0, done.stderr
