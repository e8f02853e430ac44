"""Attention for JAX on the CPU, in the place of jax.nn.dot_product_attention:

from mps_flash_attn.jax import dot_product_attention

XLA calls libmfa itself, by its FFI: no Python runs within a compiled function.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, NoReturn, overload

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from . import arguments
from .library import library
from .options import DTYPES, Options, problem_line

_TARGET = "mfa_attention"
_DTYPES = "float32, float16, bfloat16 or float64"


@overload
def dot_product_attention(
    query: Any,
    key: Any,
    value: Any,
    bias: Any = None,
    mask: Any = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: Any = None,
    key_value_seq_lengths: Any = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: None = None,
    return_residual: Literal[False] = False,
) -> jax.Array: ...


@overload
def dot_product_attention(
    query: Any,
    key: Any,
    value: Any,
    bias: Any = None,
    mask: Any = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: Any = None,
    key_value_seq_lengths: Any = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: None = None,
    return_residual: Literal[True],
) -> tuple[jax.Array, jax.Array]: ...


def dot_product_attention(
    query: Any,
    key: Any,
    value: Any,
    bias: Any = None,
    mask: Any = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: Any = None,
    key_value_seq_lengths: Any = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: None = None,
    return_residual: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """jax.nn.dot_product_attention by libmfa, on the CPU, in O(T + S) memory: neither pass holds the T x S scores.

    The arguments are those of jax.nn.dot_product_attention: query (B, T, N, H), key (B, S, K, H), value (B, S, K, Hv),
    or all without B, N being a multiple of K, in float32, float16, bfloat16 or float64. It is for use under jit, grad,
    vmap and remat. What differs:

    bias               float; its gradient is computed if it is wanted. With both, bias and mask become one array.
    scale              a number that is known when the function is traced.
    a query that sees  gets 0, and the residual -inf. jax.nn returns the mean of all values.
    no key
    query_seq_lengths  queries beyond them get 0 as in jax.nn, and the residual -inf.
    float64            is computed in float64; jax.nn has a softmax in float32.
    implementation     None. Others are those of jax.nn.
    return_residual    (out, residual), the log-sum-exp (B, T, N) in the query's dtype, which as in jax.nn has no
                       gradient.

    Wrong arguments raise ValueError or TypeError, which say what is accepted. Second derivatives raise
    NotImplementedError, and forward-mode differentiation TypeError. On another platform XLA finds no function
    mfa_attention.
    """
    if implementation is not None:
        raise ValueError(
            f"implementation is {implementation!r}; leave it out: this one is libmfa, and jax.nn.dot_product_attention "
            "has others"
        )
    query, key, value = map(jnp.asarray, (query, key, value))
    shape = query.shape
    arrays = {"query": query, "key": key, "value": value, "bias": bias, "mask": mask}
    arrays = {name: _four_dimensions(name, array) for name, array in arrays.items() if array is not None}
    query, key, value = (arrays.pop(name) for name in ("query", "key", "value"))
    _check(query, key, value, **arrays)
    lower, upper = _band(is_causal, local_window_size)
    options = Options(lower, upper, None if scale is None else arguments.number("scale", scale))
    q_lengths = _lengths("query_seq_lengths", query_seq_lengths, query)
    kv_lengths = _lengths("key_value_seq_lengths", key_value_seq_lengths, query)
    results = _attend(
        options, bool(return_residual), query, key, value, arrays.get("bias"), arrays.get("mask"), q_lengths, kv_lengths
    )
    if not return_residual:
        return results[0].reshape(*shape[:-1], value.shape[3])
    out, lse = results
    return out.reshape(*shape[:-1], value.shape[3]), lse.reshape(shape[:-1])


def _four_dimensions(name: str, array: Any) -> jax.Array:
    array = jnp.asarray(array)
    if array.ndim not in (3, 4):
        raise ValueError(f"{name} has {array.ndim} dimensions; it must have 4, or 3 without the batch")
    return array if array.ndim == 4 else array[None]


def _check(
    query: jax.Array, key: jax.Array, value: jax.Array, bias: jax.Array | None = None, mask: jax.Array | None = None
) -> None:
    """Raises for arrays that do not belong together."""
    for name, array in (("query", query), ("key", key), ("value", value)):
        if array.dtype.name not in DTYPES:
            raise TypeError(f"{name} is {array.dtype.name}; it must be {_DTYPES}")
    if not query.dtype == key.dtype == value.dtype:
        raise TypeError(
            f"query is {query.dtype.name}, key {key.dtype.name} and value {value.dtype.name}; they must have one dtype"
        )
    shapes = _as_bhnd(query, key, value)
    arguments.check_shapes(*shapes)
    if key.shape[2] == 0 or query.shape[2] % key.shape[2]:
        raise ValueError(
            f"query has {query.shape[2]} heads and key {key.shape[2]}; the former must be a multiple of the latter"
        )
    full = (*shapes[0][:3], key.shape[1])
    for name, array in (("bias", bias), ("mask", mask)):
        if array is not None and any(size not in (1, whole) for size, whole in zip(array.shape, full)):
            raise ValueError(f"{name} has the shape {array.shape}; it must be broadcastable to (B, N, T, S) = {full}")
    if mask is not None and mask.dtype != jnp.bool_:
        raise TypeError(f"mask is {mask.dtype.name}; it must be bool (True takes part); what is added is a bias")
    if bias is not None and bias.dtype.name not in DTYPES:
        raise TypeError(f"bias is {bias.dtype.name}; it must be {_DTYPES}; what is bool is a mask")


def _as_bhnd(*arrays: jax.Array) -> list[tuple[int, ...]]:
    """The shapes as (batch, heads, rows, columns)."""
    return [(array.shape[0], array.shape[2], array.shape[1], array.shape[3]) for array in arrays]


def _band(is_causal: Any, window: Any) -> tuple[int | None, int | None]:
    """The bounds of j - i."""
    if window is None:
        return None, 0 if is_causal else None
    try:
        left, right = map(operator.index, window if isinstance(window, (tuple, list)) else (window, window))
    except (TypeError, ValueError):
        raise ValueError(
            f"local_window_size is {window!r}; it must be None, a whole number or a pair (left, right) of these"
        ) from None
    return -left, min(right, 0) if is_causal else right


def _lengths(name: str, lengths: Any, query: jax.Array) -> jax.Array | None:
    if lengths is None:
        return None
    lengths = jnp.asarray(lengths)
    if lengths.dtype != jnp.int32 or lengths.shape != query.shape[:1]:
        raise ValueError(
            f"{name} is {lengths.dtype.name} of the shape {lengths.shape}; it must be int32 of the shape "
            f"{query.shape[:1]}"
        )
    return lengths


@functools.partial(jax.jit, static_argnums=(0, 1))
def _attend(
    options: Options,
    with_lse: bool,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None,
    mask: jax.Array | None,
    q_lengths: jax.Array | None,
    kv_lengths: jax.Array | None,
) -> tuple[jax.Array, ...]:
    """(out,) or (out, lse)."""
    if bias is not None and mask is not None:
        bias = jnp.where(mask, bias, -jnp.inf)
    if kv_lengths is not None:
        kv_lengths = jnp.clip(kv_lengths, 0, key.shape[1])
    results = _attention(options, with_lse, query, key, value, mask if bias is None else bias, kv_lengths)
    if with_lse:
        results = results[0], jax.lax.stop_gradient(results[1].astype(query.dtype))
    if q_lengths is not None:
        rows = jnp.arange(query.shape[1]) < q_lengths[:, None]
        nothing = 0, -jnp.inf
        results = tuple(
            jnp.where(rows.reshape(*rows.shape, *(1 for _ in result.shape[2:])), result, fill)
            for result, fill in zip(results, nothing)
        )
    return results


# --- The two passes, differentiable once ---------------------------------------------------------


class _Spec(NamedTuple):
    """What of a call is known when it is traced."""

    which: str
    options: Options
    inputs: tuple[str, ...]  # names of mfa_buffers
    outputs: tuple[str, ...]


@functools.cache
def _register() -> None:
    jax.ffi.register_ffi_target(_TARGET, jax.ffi.pycapsule(library().mfa_xla_attention), platform="cpu")


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _call(spec: _Spec, results: tuple[jax.ShapeDtypeStruct, ...], *arrays: jax.Array) -> Sequence[jax.Array]:
    """Calls libmfa. Where a pass is differentiated, that is for a second derivative."""
    _register()
    named = dict(zip(spec.inputs, arrays))
    words = []
    if "mask" in named:
        dtype = named["mask"].dtype
        words.append("mask_bool" if dtype == jnp.bool_ else f"mask_{DTYPES[dtype.name]}")
    if "seqused_k" in named:
        words.append("seqused_k")
    q, k, v = _as_bhnd(named["q"], named["k"], named["v"])
    line = problem_line(spec.which, DTYPES[named["q"].dtype.name], q, k, v, spec.options, words)
    call = jax.ffi.ffi_call(_TARGET, results, vmap_method="expand_dims")
    return call(*arrays, problem=line, operands=f"{' '.join(spec.inputs)} -> {' '.join(spec.outputs)}")


@_call.defjvp
def _refuse(*_: Any) -> NoReturn:
    raise NotImplementedError(
        "mps_flash_attn.jax.dot_product_attention has no second derivative; for that use jax.nn.dot_product_attention"
    )


def _run(which: str, options: Options, inputs: dict[str, Any], results: dict[str, Any]) -> dict[str, jax.Array]:
    """Runs a pass. `inputs`: arrays by name, None where there is none; `results`: their shapes and dtypes."""
    given = {name: array for name, array in inputs.items() if array is not None}
    spec = _Spec(which, options, tuple(given), tuple(results))
    return dict(zip(results, _call(spec, tuple(results.values()), *given.values())))


def _forward(
    options: Options, names: tuple[str, ...], query: Any, key: Any, value: Any, mask: Any, lengths: Any
) -> dict[str, jax.Array]:
    """Those of o, lse and o_low that are named."""
    out = jax.ShapeDtypeStruct((*query.shape[:3], value.shape[3]), query.dtype)
    lse = jax.ShapeDtypeStruct(query.shape[:3], jnp.float64 if query.dtype == jnp.float64 else jnp.float32)
    results = {"o": out, "lse": lse, "o_low": out}
    inputs = {"q": query, "k": key, "v": value, "mask": mask, "seqused_k": lengths}
    return _run("forward", options, inputs, {name: results[name] for name in names})


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(
    options: Options, with_lse: bool, query: Any, key: Any, value: Any, mask: Any, lengths: Any
) -> tuple[jax.Array, ...]:
    """(out,) or (out, lse). `mask`: bool, float or None."""
    names = ("o", "lse") if with_lse else ("o",)
    return tuple(_forward(options, names, query, key, value, mask, lengths).values())


def _attention_forward(options: Options, with_lse: bool, *given: Any) -> tuple[Any, Any]:
    inputs: list[Any] = [None if one is None else one.value for one in given]
    # What is differentiated must be known when backward is traced: () is a tree without arrays, too.
    wanted = [() if one is not None and one.perturbed else None for one in given]
    query = inputs[0]
    names = ("o", "lse", "o_low") if query.dtype in (jnp.float16, jnp.bfloat16) else ("o", "lse")
    saved = _forward(options, names, *inputs)
    return (saved["o"], saved["lse"])[: 1 + with_lse], (inputs, saved, wanted)


def _attention_backward(options: Options, with_lse: bool, residuals: Any, incoming: Any) -> tuple[Any, ...]:
    (query, key, value, mask, lengths), saved, wanted = residuals
    d_out, d_lse = (*incoming, None)[:2]
    if isinstance(d_out, SymbolicZero):
        d_out = jnp.zeros_like(saved["o"])
    if isinstance(d_lse, SymbolicZero):
        d_lse = None
    inputs = {"q": query, "k": key, "v": value, "mask": mask, "seqused_k": lengths}
    names = "dq", "dk", "dv", "dbias", ""
    results = {
        name: jax.ShapeDtypeStruct(array.shape, array.dtype)
        for name, array, is_wanted in zip(names, inputs.values(), wanted)
        if is_wanted is not None and array is not None and jnp.issubdtype(array.dtype, jnp.floating)
    }
    gradients = _run("backward", options, inputs | saved | {"d_o": d_out, "dlse": d_lse}, results) if results else {}
    return tuple(gradients.get(name) for name in names)


_attention.defvjp(_attention_forward, _attention_backward, symbolic_zeros=True)
