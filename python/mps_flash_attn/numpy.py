"""Attention on NumPy arrays, on the CPU, without PyTorch.

from mps_flash_attn.numpy import attention, attention_backward
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

from . import arguments
from .arguments import DEFAULT_BLOCK, BlockSize, Causal
from .library import buffers_at, library, with_layouts
from .options import DTYPES, Options, problem_line

Array = NDArray[Any]

_DTYPES = "float32, float16, bfloat16 (of ml_dtypes) or float64"


class Gradients(NamedTuple):
    """What attention_backward() returns, None where there is none: gradients of the shapes and dtypes of the inputs."""

    query: Array
    key: Array
    value: Array
    attn_mask: Array | None = None
    sinks: Array | None = None


@overload
def attention(
    query: Array,
    key: Array,
    value: Array,
    is_causal: Causal = False,
    scale: float | None = None,
    attn_mask: Array | None = None,
    window_size: int | tuple[int, int] = 0,
    *,
    softcap: float = 0,
    enable_gqa: bool = False,
    return_lse: Literal[False] = False,
    alibi_slopes: Array | None = None,
    sinks: Array | None = None,
    dropout_p: float = 0,
    dropout_seed: int | None = None,
    block_mask: Array | None = None,
    block_size: BlockSize | None = None,
) -> Array: ...


@overload
def attention(
    query: Array,
    key: Array,
    value: Array,
    is_causal: Causal = False,
    scale: float | None = None,
    attn_mask: Array | None = None,
    window_size: int | tuple[int, int] = 0,
    *,
    softcap: float = 0,
    enable_gqa: bool = False,
    return_lse: Literal[True],
    alibi_slopes: Array | None = None,
    sinks: Array | None = None,
    dropout_p: float = 0,
    dropout_seed: int | None = None,
    block_mask: Array | None = None,
    block_size: BlockSize | None = None,
) -> tuple[Array, Array]: ...


def attention(
    query: Array,
    key: Array,
    value: Array,
    is_causal: Causal = False,
    scale: float | None = None,
    attn_mask: Array | None = None,
    window_size: int | tuple[int, int] = 0,
    *,
    softcap: float = 0,
    enable_gqa: bool = False,
    return_lse: bool = False,
    alibi_slopes: Array | None = None,
    sinks: Array | None = None,
    dropout_p: float = 0,
    dropout_seed: int | None = None,
    block_mask: Array | None = None,
    block_size: BlockSize | None = None,
) -> Array | tuple[Array, Array]:
    """softmax(scale * query @ key.T + attn_mask) @ value, never holding the L x S matrix of scores.

    Arrays are (B, H, N, D): query (B, H, L, E), key (B, Hkv, S, E), value (B, Hkv, S, Ev), of any strides, which are
    read where they are, in float32, float16, float64, or bfloat16 of ml_dtypes. The result is (B, H, L, Ev), its memory
    ordered like the query's. The arguments mean what they mean in mps_flash_attn.flash_attention, but are arrays:

    attn_mask     bool (True takes part) or float (added), broadcastable to (B, H, L, S).
    return_lse    returns (out, lse), where lse is (B, H, L), in float32 (float64 for float64). attention_backward()
                  needs both.
    alibi_slopes  float32, (H,) or (B, H).
    sinks         float32 or the query's dtype, (H,) or (B, H).
    dropout_seed  a whole number, which dropout_p needs.
    block_mask    bool (B or 1, H or 1, ceil(L / bq), ceil(S / bk)), with block_size.

    Arguments that do not fit together raise ValueError or TypeError, which say what is accepted; a valid call that
    libmfa does not run raises Unsupported.
    """
    call = _Call(
        query,
        key,
        value,
        attn_mask,
        _Given(is_causal, scale, window_size, softcap, enable_gqa, dropout_p, dropout_seed, block_mask, block_size),
        alibi_slopes,
        sinks,
    )
    out, lse = _empty_like(call.arrays["q"], call.arrays["v"].shape[3]), call.empty_rows()
    call.run("forward", o=out, lse=lse)
    return (out, lse) if return_lse else out


def attention_backward(
    d_out: Array,
    query: Array,
    key: Array,
    value: Array,
    out: Array,
    lse: Array,
    is_causal: Causal = False,
    scale: float | None = None,
    attn_mask: Array | None = None,
    window_size: int | tuple[int, int] = 0,
    *,
    d_lse: Array | None = None,
    mask_gradient: bool = False,
    softcap: float = 0,
    enable_gqa: bool = False,
    alibi_slopes: Array | None = None,
    sinks: Array | None = None,
    dropout_p: float = 0,
    dropout_seed: int | None = None,
    block_mask: Array | None = None,
    block_size: BlockSize | None = None,
) -> Gradients:
    """The gradients of attention(), given that of its result.

    d_out, d_lse   the gradients of out and lse; None: lse has none.
    out, lse       the results of attention(..., return_lse=True) for the same arguments.
    mask_gradient  whether the gradient of a float attn_mask is wanted, which takes additional time. One of dimensions
                   that are broadcast is summed over them.

    The other arguments are those of attention(). The gradients of query, key and value are always computed, that of
    sinks where there are sinks. In float16 and bfloat16 they are computed from `out` as it was rounded.
    """
    call = _Call(
        query,
        key,
        value,
        attn_mask,
        _Given(is_causal, scale, window_size, softcap, enable_gqa, dropout_p, dropout_seed, block_mask, block_size),
        alibi_slopes,
        sinks,
    )
    q, k, v = (call.arrays[name] for name in "qkv")
    shape, rows_dtype = (*q.shape[:3], v.shape[3]), call.rows_dtype
    results = {
        "o": _checked("out", out, shape, q.dtype),
        "lse": _checked("lse", lse, q.shape[:3], rows_dtype),
        "d_o": _checked("d_out", d_out, shape, q.dtype),
    }
    if d_lse is not None:
        results["dlse"] = _checked("d_lse", d_lse, q.shape[:3], rows_dtype)
    gradients = {"dq": _empty_like(q, q.shape[3]), "dk": _empty_like(k, k.shape[3]), "dv": _empty_like(v, v.shape[3])}
    d_mask = d_sinks = None
    if mask_gradient:
        if attn_mask is None or attn_mask.dtype == np.bool_:
            kind = "None" if attn_mask is None else "bool"
            raise ValueError(
                f"mask_gradient is {mask_gradient!r} and attn_mask {kind}; only a float mask has a gradient"
            )
        d_mask = np.empty(attn_mask.shape, attn_mask.dtype)
        results["dbias"] = _expanded(d_mask, (*q.shape[:3], k.shape[2]))
    if sinks is not None:
        d_sinks = np.empty(sinks.shape, np.float32)
        results["dsinks"] = _expanded(d_sinks, q.shape[:2])
    call.run("backward", **results, **gradients)
    if d_sinks is not None and sinks is not None:
        d_sinks = d_sinks.astype(sinks.dtype, copy=False)
    return Gradients(gradients["dq"], gradients["dk"], gradients["dv"], d_mask, d_sinks)


class _Given(NamedTuple):
    """The arguments that both functions take."""

    is_causal: Any
    scale: Any
    window_size: Any
    softcap: Any
    enable_gqa: Any
    dropout_p: Any
    dropout_seed: Any
    block_mask: Any
    block_size: Any


class _Call:
    """The inputs of a call, checked: arrays by their names in mfa_buffers, expanded to the shapes that libmfa reads."""

    def __init__(self, query: Any, key: Any, value: Any, mask: Any, given: _Given, slopes: Any, sinks: Any) -> None:
        named = {"query": query, "key": key, "value": value}
        for name, array in named.items():
            _check_array(name, array)
            if array.ndim != 4:
                raise ValueError(
                    f"{name} has {array.ndim} dimensions; it must have 4: (batch, heads, length, head_dim)"
                )
            if array.dtype.name not in DTYPES:
                raise TypeError(f"{name} is {array.dtype.name}; it must be {_DTYPES}")
        if not query.dtype == key.dtype == value.dtype:
            raise TypeError(
                f"query is {query.dtype.name}, key {key.dtype.name} and value {value.dtype.name}; they must have one "
                "dtype"
            )
        arguments.check_gqa(query.shape[1], key.shape[1], given.enable_gqa)
        arguments.check_shapes(query.shape, key.shape, value.shape)
        self.dtype = DTYPES[query.dtype.name]
        self.rows_dtype = np.dtype(np.float64 if self.dtype == "f64" else np.float32)
        self.shapes = query.shape, key.shape, value.shape
        self.arrays = {"q": _readable(query), "k": _readable(key), "v": _readable(value)}
        self.words: list[str] = []
        if mask is not None:
            self._add_mask(mask)
        if slopes is not None:
            self._add_of_heads("alibi_slopes", "slopes", "alibi", slopes, np.dtype(np.float32))
        if sinks is not None:
            self._add_of_heads("sinks", "sinks", "sinks", sinks, query.dtype)
        size = self._add_blocks(given.block_mask, given.block_size)
        lower, upper = arguments.band(given.is_causal, given.window_size, query.shape[2], key.shape[2])
        scale = None if given.scale is None else arguments.number("scale", given.scale)
        dropout = arguments.probability(given.dropout_p)
        if dropout:
            if given.dropout_seed is None:
                raise ValueError(f"dropout_p is {given.dropout_p!r} and dropout_seed None; it must be a whole number")
            seed = np.array([arguments.seed_number(given.dropout_seed)], np.int64)
            self.arrays["seed"] = np.broadcast_to(seed, query.shape[:1])
        self.options = Options(lower, upper, scale, arguments.number("softcap", given.softcap), dropout, *size)

    def _add_mask(self, mask: Any) -> None:
        _check_array("attn_mask", mask)
        is_bool = mask.dtype == np.bool_
        if not is_bool and mask.dtype.name not in DTYPES:
            raise TypeError(
                f"attn_mask is {mask.dtype.name}; it must be bool (True takes part), or {_DTYPES} (added to the scores)"
            )
        shape = (*self.shapes[0][:3], self.shapes[1][2])
        arguments.check_mask_shape(mask.shape, shape)
        self.arrays["mask"] = np.broadcast_to(_readable(mask), shape)
        self.words.append("mask_bool" if is_bool else f"mask_{DTYPES[mask.dtype.name]}")

    def _add_of_heads(self, name: str, buffer: str, word: str, array: Any, dtype: np.dtype[Any]) -> None:
        _check_array(name, array)
        if array.dtype not in (np.dtype(np.float32), dtype):
            more = "" if dtype == np.float32 else f", or {dtype.name} as query"
            raise TypeError(f"{name} is {array.dtype.name}; it must be float32{more}")
        shape = self.shapes[0][:2]
        if array.shape not in (shape[1:], shape):
            arguments.refuse_heads(name, array.shape, self.shapes[0])
        self.arrays[buffer] = np.broadcast_to(_readable(array.astype(np.float32, copy=False)), shape)
        self.words.append(word)

    def _add_blocks(self, blocks: Any, block_size: Any) -> tuple[int, int]:
        if blocks is None:
            if block_size is not None:
                raise ValueError(
                    f"block_size is {block_size!r} and block_mask None; block_size belongs to a block_mask"
                )
            return 0, 0
        _check_array("block_mask", blocks)
        if blocks.dtype != np.bool_:
            raise TypeError(f"block_mask is {blocks.dtype.name}; it must be bool (True is visible)")
        size = DEFAULT_BLOCK if block_size is None else arguments.block_size_pair(block_size)
        shape = arguments.block_map_shape(*self.shapes[:2], size)
        arguments.check_block_map(blocks.shape, shape, size)
        if blocks.strides[-2:] == (0, 0):  # libmfa takes that for a layout that was forgotten
            blocks = np.ascontiguousarray(blocks)
        self.arrays["block_map"] = np.broadcast_to(_readable(blocks), shape)
        return size

    def empty_rows(self) -> Array:
        """Memory for log-sum-exp."""
        return np.empty(self.shapes[0][:3], self.rows_dtype)

    def run(self, which: str, **more: Array) -> None:
        """Runs a pass on the inputs and these arrays, by their names in mfa_buffers."""
        arrays = {**self.arrays, **more}
        found = library()
        problem = found.parse(problem_line(which, self.dtype, *self.shapes, self.options, self.words))
        layouts = {name: _strides(array) for name, array in arrays.items()}
        addresses = {name: array.__array_interface__["data"][0] for name, array in arrays.items()}
        found.attention(with_layouts(problem, **layouts), buffers_at(**addresses))


def _check_array(name: str, array: Any) -> None:
    if not isinstance(array, np.ndarray) or isinstance(array, np.ma.MaskedArray):
        raise TypeError(f"{name} is a {type(array).__name__}; it must be a numpy.ndarray")
    if not array.dtype.isnative:
        raise TypeError(f"{name} is {array.dtype.name} of the other byte order; it must be of this machine's")


def _checked(name: str, array: Any, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """A result or a gradient that the caller gives."""
    _check_array(name, array)
    if array.shape != shape:
        raise ValueError(f"{name} has the shape {array.shape}; it must be {shape}")
    if array.dtype != dtype:
        raise TypeError(f"{name} is {array.dtype.name}; it must be {dtype.name}")
    return _readable(array)


def _readable(array: Array) -> Array:
    """The array, or a copy where its elements are not aligned or lie at no multiples of their size."""
    aligned = array.flags.aligned and not any(stride % array.itemsize for stride in array.strides)
    return array if aligned else array.copy()


def _expanded(array: Array, shape: tuple[int, ...]) -> Array:
    """A view of an output with stride 0 along the dimensions over which libmfa sums."""
    missing = (1,) * (len(shape) - array.ndim)
    view = array.reshape(missing + array.shape)
    strides = np.where(np.equal(view.shape, 1), 0, view.strides)
    return np.lib.stride_tricks.as_strided(view, shape, strides.tolist())


def _strides(array: Array) -> tuple[int, ...]:
    """The strides as in mfa_layout, in elements."""
    found = [stride // array.itemsize for stride in array.strides]
    return (*found, 0, 0, 0, 0)[:4]


def _empty_like(array: Array, columns: int) -> Array:
    """Memory for an output: `columns` are contiguous, and the other dimensions have the order of the array's memory."""
    order = sorted(range(3), key=lambda n: abs(array.strides[n]), reverse=True)
    memory = np.empty([array.shape[n] for n in order] + [columns], array.dtype)
    return memory.transpose(*(order.index(n) for n in range(3)), 3)
