"""flash_attention: exact attention in O(N) memory on (batch, head, row, column) tensors, with all gradients.

Python checks what the C library cannot see, which gets numbers and strides only: that shapes, dtypes and devices agree.
All else (head counts, dimensions, scale, softcap) libmfa refuses with a sentence of its own.
"""

import operator
from dataclasses import dataclass

import torch
from torch.autograd import forward_ad

from . import tensors
from .library import (
    BACKWARD,
    BAND_OPEN_LOWER,
    BAND_OPEN_UPPER,
    BUFFERS,
    FORWARD,
    MASK_ADDITIVE,
    MASK_BOOL,
    MASK_NONE,
    PROBLEM,
    Scalars,
    Unsupported,
    library,
)

_DIMENSIONS = "(batch, heads, length, head_dim)"
_NO_GRADIENTS = (0,) * 24  # layouts
_NO_BUFFERS = (0,) * 15
_OWN_WORKSPACE = (0, 0, 0)  # of libmfa's context
_FAR = 2**62  # farther than any two keys, yet an int64 after a length is added


def flash_attention(
    query,
    key,
    value,
    is_causal=False,
    scale=None,
    attn_mask=None,
    window_size=0,
    *,
    softcap=0.0,
    enable_gqa=False,
    return_lse=False,
):
    """softmax(scale * query @ key.T + attn_mask) @ value, never holding the L x S matrix of scores.

    Tensors are (B, H, N, D): query (B, H, L, E), key (B, Hkv, S, E), value (B, Hkv, S, Ev), of any strides, in float32,
    float16, bfloat16 or float64. The result is (B, H, L, Ev), its memory ordered like the query's. Query i and key j
    score

        s = scale * dot(query[i], key[j])        scale: None is 1/sqrt(E)
        s = softcap * tanh(s / softcap)          if softcap > 0
        s = s + attn_mask[i, j]                  if the mask is of a float dtype

    and a query that may see no key at all gives zeros.

    is_causal     True or "top_left": query i sees keys j <= i, as in scaled_dot_product_attention.
                  "bottom_right": j <= i + S - L, so that the last query sees the last key.
    window_size   W > 0: exactly the W keys up to and including one's own place, that of is_causal's alignment.
                  (left, right), as in flash-attn: from `left` keys before one's own place to `right` after it, -1 being
                  no limit; with is_causal, right is 0. As in flash-attn a pair aligns to the bottom right, causal True
                  too; only is_causal="top_left" changes that. 0: no window.
    attn_mask     bool (True takes part) or float (added), broadcastable to (B, H, L, S), and combined with the above.
                  A float mask that requires a gradient gets it.
    enable_gqa    allows fewer heads in key and value: query head h uses head h // (H // Hkv).
    return_lse    returns (out, lse), where lse is (B, H, L), the logarithm of each row's sum of exp(s): float32
                  (float64 for float64), -inf where no key is seen. It can be differentiated.
    """
    query, key, value, mask, scalars = _prepare(
        query, key, value, is_causal, scale, attn_mask, window_size, softcap, enable_gqa
    )
    if _is_differentiated(query, key, value, mask):
        out, lse = _Attention.apply(query, key, value, mask, scalars)
    else:
        out, lse = _forward(query, key, value, mask, scalars, return_lse)
    return (out, lse) if return_lse else out


@dataclass(frozen=True)
class Explanation:
    """How a call would run. False in a condition, and with `reason` set, if it would not."""

    backend: str = ""
    kernel: str = ""
    threads: int = 0
    workspace_bytes: int = 0
    reason: str = ""

    def __bool__(self):
        return not self.reason

    def __str__(self):
        if self.reason:
            return f"not supported: {self.reason}"
        return f"{self.backend} {self.kernel} threads {self.threads} workspace {self.workspace_bytes}"

    @property
    def machine(self):
        """What the kernel is for: the last word of its key, such as avx512."""
        return self.kernel.rpartition("_")[2]

    @classmethod
    def of(cls, problem):
        """What libmfa says of a packed problem."""
        try:
            line, workspace = library().plan(problem)
        except Unsupported as error:
            return cls(reason=str(error))
        backend, kernel, *rest = line.split()
        named = dict(zip(rest[::2], rest[1::2]))
        return cls(backend, kernel, int(named["threads"]), workspace)


def explain(
    query,
    key,
    value,
    is_causal=False,
    scale=None,
    attn_mask=None,
    window_size=0,
    *,
    softcap=0.0,
    enable_gqa=False,
    backward=False,
):
    """Which backend and kernel flash_attention() would use for these arguments (`backward`: for their gradients), and
    how many bytes of workspace beside the operands; or why it would not. Arguments that are wrong raise."""
    try:
        query, key, value, mask, scalars = _prepare(
            query, key, value, is_causal, scale, attn_mask, window_size, softcap, enable_gqa
        )
    except Unsupported as error:
        return Explanation(reason=str(error))
    mask = _expand(mask, scalars)
    out = tensors.like(query, scalars.value_dim)
    if not backward:
        return Explanation.of(_forward_problem(scalars, query, key, value, mask, out))
    return Explanation.of(_backward_problem(scalars, query, key, value, mask, out, out, None, None, None, None))


# --- What is asked -------------------------------------------------------------------------------


def _prepare(query, key, value, is_causal, scale, mask, window_size, softcap, enable_gqa):
    """Checks the arguments; returns the four tensors as they are to be read, and the problem's numbers."""
    query = tensors.check("query", query)
    key = tensors.check("key", key)
    value = tensors.check("value", value)
    if mask is not None:
        mask = tensors.check("attn_mask", mask)
        if mask.device != query.device:
            raise ValueError(f"attn_mask is on {mask.device} and query on {query.device}; they must be on one device")
    if not query.device == key.device == value.device:
        _refuse_devices(query, key, value)
    device = tensors.device(query)
    if torch.is_autocast_enabled(query.device.type):
        query, key, value, mask = tensors.autocast(query, key, value, mask)
    if not query.dim() == key.dim() == value.dim() == 4:
        name, tensor = next((n, t) for n, t in _named(query, key, value) if t.dim() != 4)
        raise ValueError(f"{name} has {tensor.dim()} dimensions; it must have 4: {_DIMENSIONS}")
    if not query.dtype == key.dtype == value.dtype or query.dtype not in tensors.DTYPES:
        _refuse_dtypes(query, key, value)

    batch, q_heads, q_len, head_dim = query.shape
    kv_heads, kv_len, value_dim = key.shape[1], key.shape[2], value.shape[3]
    if key.shape != (batch, kv_heads, kv_len, head_dim) or value.shape[:3] != key.shape[:3]:
        _refuse_shapes(query, key, value)
    if kv_heads != q_heads and not enable_gqa:
        raise ValueError(f"query has {q_heads} heads and key has {kv_heads}; enable_gqa=True allows that")

    mask_kind, mask_dtype = MASK_NONE, 0
    if mask is not None:
        mask_kind, mask_dtype = _mask_kind(mask, (batch, q_heads, q_len, kv_len))
    lower, upper = _band(is_causal, window_size, q_len, kv_len)
    if scale is None:
        scale = max(head_dim, 1) ** -0.5
    return query, key, value, mask, Scalars(
        device,
        tensors.DTYPES[query.dtype],
        mask_kind,
        mask_dtype,
        0,
        batch,
        q_heads,
        kv_heads,
        q_len,
        kv_len,
        head_dim,
        value_dim,
        lower,
        upper,
        float(scale),
        float(softcap),
    )


def _band(is_causal, window_size, q_len, kv_len):
    """The (lower, upper) bounds on j - i."""
    if is_causal not in (False, True, "top_left", "bottom_right"):
        raise ValueError(f'is_causal is {is_causal!r}; it must be False, True, "top_left" or "bottom_right"')
    pair = isinstance(window_size, (tuple, list))
    if not pair and window_size == 0:
        if not is_causal:
            return BAND_OPEN_LOWER, BAND_OPEN_UPPER
        return BAND_OPEN_LOWER, kv_len - q_len if is_causal == "bottom_right" else 0
    try:
        left, right = map(operator.index, window_size) if pair else (operator.index(window_size) - 1, 0)
    except (TypeError, ValueError):
        left = right = -2
    if left < -1 or right < -1 or (left < 0 and not pair):
        raise ValueError(
            f"window_size is {window_size!r}; it must be 0 (none), a positive number of keys, or a pair (left, right) "
            "of numbers that are -1 (no limit) or more"
        )
    if is_causal:
        right = 0
    bottom_right = is_causal == "bottom_right" or (pair and is_causal != "top_left")
    diagonal = kv_len - q_len if bottom_right else 0
    return (
        BAND_OPEN_LOWER if left < 0 else diagonal - min(left, _FAR),
        BAND_OPEN_UPPER if right < 0 else diagonal + min(right, _FAR),
    )


def _mask_kind(mask, shape):
    """The mask's (kind, dtype) codes, if it fits."""
    if mask.dtype is not torch.bool and mask.dtype not in tensors.DTYPES:
        raise TypeError(
            f"attn_mask is {tensors.dtype_name(mask)}; it must be bool (True takes part), "
            "float32, float16, bfloat16 or float64 (added to the scores)"
        )
    sizes = mask.shape
    if len(sizes) > 4 or any(given not in (1, full) for given, full in zip(reversed(sizes), reversed(shape))):
        raise ValueError(
            f"attn_mask has the shape {tuple(sizes)}; it must be broadcastable to (batch, heads, L, S) = {shape}"
        )
    return (MASK_BOOL, 0) if mask.dtype is torch.bool else (MASK_ADDITIVE, tensors.DTYPES[mask.dtype])


def _named(query, key, value):
    return (("query", query), ("key", key), ("value", value))


def _refuse_dtypes(query, key, value):
    for name, tensor in _named(query, key, value):
        if tensor.dtype not in tensors.DTYPES:
            raise TypeError(
                f"{name} is {tensors.dtype_name(tensor)}; it must be float32, float16, bfloat16 or float64"
            )
    raise TypeError(
        f"query is {tensors.dtype_name(query)}, key {tensors.dtype_name(key)} and value {tensors.dtype_name(value)}; "
        "they must have one dtype"
    )


def _refuse_devices(query, key, value):
    raise ValueError(
        f"query is on {query.device}, key on {key.device} and value on {value.device}; they must be on one device"
    )


def _refuse_shapes(query, key, value):
    (batch, _, _, head_dim), (key_batch, key_heads, key_len, key_dim) = query.shape, key.shape
    if not batch == key_batch == value.shape[0]:
        sizes = f"query {batch}, key {key_batch} and value {value.shape[0]}"
        raise ValueError(f"the batch sizes of {sizes} differ; they must be equal")
    if head_dim != key_dim:
        raise ValueError(f"query has the head_dim {head_dim} and key {key_dim}; they must be equal")
    if key_heads != value.shape[1]:
        raise ValueError(f"key has {key_heads} heads and value {value.shape[1]}; they must be equal")
    raise ValueError(f"key has the length {key_len} and value {value.shape[2]}; they must be equal")


# --- Running -------------------------------------------------------------------------------------


def _expand(mask, scalars):
    """The mask as (batch, head, row, column), with stride 0 where it is broadcast."""
    return mask if mask is None else mask.expand(scalars.batch, scalars.q_heads, scalars.q_len, scalars.kv_len)


def _rows(scalars):
    """The strides of log-sum-exp."""
    return scalars.q_heads * scalars.q_len, scalars.q_len, 1, 0


def _forward_problem(scalars, query, key, value, mask, out):
    layout = tensors.layout
    return PROBLEM.pack(
        PROBLEM.size,
        FORWARD,
        *scalars,
        *layout(query),
        *layout(key),
        *layout(value),
        *layout(out),
        *_rows(scalars),
        *layout(mask),
        *_NO_GRADIENTS,
    )


def _forward(query, key, value, mask, scalars, with_lse):
    """(out, lse), or (out, None)."""
    mask = _expand(mask, scalars)
    out = tensors.like(query, scalars.value_dim)
    lse = tensors.empty_rows(query) if with_lse else None
    pointer = tensors.pointer
    library().attention(
        _forward_problem(scalars, query, key, value, mask, out),
        BUFFERS.pack(
            BUFFERS.size,
            *(pointer(query), 0),
            *(pointer(key), 0),
            *(pointer(value), 0),
            *(pointer(mask), 0),
            *(pointer(out), 0),
            *(pointer(lse), 0),
            *_NO_BUFFERS,
        ),
    )
    return out, lse


def _backward_problem(scalars, query, key, value, mask, out, d_out, dq, dk, dv, dbias):
    layout, rows = tensors.layout, _rows(scalars)
    return PROBLEM.pack(
        PROBLEM.size,
        BACKWARD,
        *scalars,
        *layout(query),
        *layout(key),
        *layout(value),
        *layout(out),
        *rows,
        *layout(mask),
        *layout(d_out),
        *rows,
        *layout(dq),
        *layout(dk),
        *layout(dv),
        *layout(dbias),
    )


def _backward(scalars, wanted, query, key, value, mask, out, lse, d_out, d_lse):
    """(dQ, dK, dV, dbias), each None if not wanted."""
    d_out, d_lse = tensors.incoming(d_out, out), tensors.incoming_rows(d_lse)
    dq, dk, dv, dbias = map(tensors.gradient, (query, key, value, mask), wanted)
    mask, dbias_view = _expand(mask, scalars), _expand(dbias, scalars)
    pointer = tensors.pointer
    library().attention(
        _backward_problem(scalars, query, key, value, mask, out, d_out, dq, dk, dv, dbias_view),
        BUFFERS.pack(
            BUFFERS.size,
            *(pointer(query), 0),
            *(pointer(key), 0),
            *(pointer(value), 0),
            *(pointer(mask), 0),
            *(pointer(out), 0),
            *(pointer(lse), 0),
            *(pointer(d_out), 0),
            *(pointer(d_lse), 0),
            *(pointer(dq), 0),
            *(pointer(dk), 0),
            *(pointer(dv), 0),
            *(pointer(dbias), 0),
            *_OWN_WORKSPACE,
        ),
    )
    return dq, dk, dv, dbias


def _is_differentiated(query, key, value, mask):
    """Whether autograd has to know. In forward mode always: it then refuses a tangent, instead of losing it."""
    if forward_ad._current_level >= 0:
        return True
    if not torch.is_grad_enabled():
        return False
    return query.requires_grad or key.requires_grad or value.requires_grad or (mask is not None and mask.requires_grad)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, mask, scalars):
        out, lse = _forward(query, key, value, mask, scalars, True)
        ctx.save_for_backward(query, key, value, mask, out, lse)
        ctx.scalars = scalars
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx, d_out, d_lse):
        run = _Gradients.apply if torch.is_grad_enabled() else _backward
        return *run(ctx.scalars, ctx.needs_input_grad[:4], *ctx.saved_tensors, d_out, d_lse), None


class _Gradients(torch.autograd.Function):
    """The gradients as a function of their own, so that to differentiate them again is an error: without it autograd
    would take them for constants, and a second derivative would be wrong without a word."""

    @staticmethod
    def forward(ctx, *arguments):
        return _backward(*arguments)

    @staticmethod
    def backward(ctx, *_):
        raise NotImplementedError(
            "flash_attention has no second derivative; for that use scaled_dot_product_attention with "
            "torch.nn.attention.sdpa_kernel(SDPBackend.MATH)"
        )
