"""The arguments of attention that are no tensors, and the shapes of those that are: what they mean, and sentences for
those that are wrong. It knows no framework."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, Literal, NoReturn

Causal = bool | Literal["top_left", "bottom_right"]
BlockSize = int | tuple[int, int]

DEFAULT_BLOCK = (128, 128)  # of flex_attention
_BLOCK_UNIT = 16  # block sizes are multiples of it
_MAX_DISTANCE = 2**62  # more than any j - i, and an int64 even after a length is added


def number(name: str, number: Any) -> float:
    """An argument that must be a number, as a float."""
    if getattr(number, "requires_grad", False):
        raise TypeError(f"{name} is a tensor that requires a gradient; it must be a number, and gets no gradient")
    try:
        if not isinstance(number, str):
            return float(number)
    except (OverflowError, RuntimeError, TypeError, ValueError):
        pass
    raise TypeError(f"{name} is {number!r}; it must be a number")


def probability(dropout_p: Any) -> float:
    """dropout_p as a float."""
    found = number("dropout_p", dropout_p)
    if not 0 <= found <= 1:
        raise ValueError(f"dropout_p is {dropout_p!r}; it must be from 0 to 1")
    return found


def seed_number(seed: Any) -> int:
    """dropout_seed, where it is a number and no tensor."""
    try:
        number = operator.index(seed)
    except TypeError:
        number = 2**63
    if not -(2**63) <= number < 2**63:
        kind = "a tensor of int64 with one element, or a whole number from -2**63 to 2**63 - 1"
        raise TypeError(f"dropout_seed is {seed!r}; it must be {kind}")
    return number


def band(is_causal: Causal, window_size: Any, q_len: int, kv_len: int) -> tuple[int | None, int | None]:
    """The bounds (lower, upper) of j - i, None where there is none."""
    try:
        is_known = is_causal in (False, True, "top_left", "bottom_right")
    except (RuntimeError, ValueError):  # an array has no single truth value
        is_known = False
    if not is_known:
        raise ValueError(f'is_causal is {is_causal!r}; it must be False, True, "top_left" or "bottom_right"')
    pair = isinstance(window_size, (tuple, list))
    if not pair and window_size == 0:
        if not is_causal:
            return None, None
        return None, kv_len - q_len if is_causal == "bottom_right" else 0
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
    lower = None if left < 0 else diagonal - min(left, _MAX_DISTANCE)
    upper = None if right < 0 else diagonal + min(right, _MAX_DISTANCE)
    return lower, upper


def block_size_pair(size: Any) -> tuple[int, int]:
    """block_size as (queries, keys)."""
    try:
        pair = size if isinstance(size, (tuple, list)) else (size, size)
        q, kv = map(operator.index, pair)
    except (TypeError, ValueError):
        q = kv = 0
    if q <= 0 or kv <= 0 or q % _BLOCK_UNIT or kv % _BLOCK_UNIT:
        raise ValueError(
            f"block_size is {size!r}; it must be a number of queries and keys, or a pair (queries, keys), each a "
            f"multiple of {_BLOCK_UNIT}"
        )
    return q, kv


def block_map_shape(query: Sequence[int], key: Sequence[int], size: tuple[int, int]) -> tuple[int, ...]:
    """(batch, heads, blocks of queries, blocks of keys), of the shapes of query and key."""
    batch, heads, q_len, _ = query
    return batch, heads, (q_len + size[0] - 1) // size[0], (key[2] + size[1] - 1) // size[1]


def check_block_map(found: Sequence[int], shape: tuple[int, ...], size: tuple[int, int]) -> None:
    """Raises for the shape of a block_mask that cannot be broadcast to `shape`, as block_map_shape() gives it."""
    given = (*(1 for _ in range(4 - len(found))), *found)
    if len(given) != 4 or given[2:] != shape[2:] or given[0] not in (1, shape[0]) or given[1] not in (1, shape[1]):
        raise ValueError(
            f"block_mask has the shape {tuple(found)}; with blocks of {size} it must be {shape}, where the first two "
            "may be 1"
        )


def check_mask_shape(found: Sequence[int], shape: tuple[int, ...]) -> None:
    """Raises for the shape of an attn_mask that cannot be broadcast to `shape`, (batch, heads, L, S)."""
    if len(found) > 4 or any(size != 1 and size != full for size, full in zip(reversed(found), reversed(shape))):
        raise ValueError(
            f"attn_mask has the shape {tuple(found)}; it must be broadcastable to (batch, heads, L, S) = {shape}"
        )


def check_shapes(query: Sequence[int], key: Sequence[int], value: Sequence[int]) -> None:
    """Raises for three shapes, of 4 dimensions each, that do not belong together."""
    batch, head_dim = query[0], query[3]
    if tuple(key) != (batch, *key[1:3], head_dim) or tuple(value[:3]) != tuple(key[:3]):
        _refuse_shapes(query, key, value)


def check_gqa(q_heads: int, kv_heads: int, enable_gqa: bool) -> None:
    """Raises if the number of heads differs without enable_gqa."""
    if q_heads != kv_heads and not enable_gqa:
        raise ValueError(f"query has {q_heads} heads and key has {kv_heads}; enable_gqa=True allows that")


def refuse_heads(name: str, found: Sequence[int], query: Sequence[int]) -> NoReturn:
    """Raises for the shape of a tensor that should have a number for each query head. `query`: its shape."""
    raise ValueError(
        f"{name} has the shape {tuple(found)}; it must be (heads,) or (batch, heads), those of query: "
        f"{tuple(query[1:2])} or {tuple(query[:2])}"
    )


def _refuse_shapes(query: Sequence[int], key: Sequence[int], value: Sequence[int]) -> NoReturn:
    (batch, _, _, head_dim), (key_batch, key_heads, key_len, key_dim) = query, key
    if not batch == key_batch == value[0]:
        sizes = f"query {batch}, key {key_batch} and value {value[0]}"
        raise ValueError(f"the batch sizes of {sizes} differ; they must be equal")
    if head_dim != key_dim:
        raise ValueError(f"query has the head_dim {head_dim} and key {key_dim}; they must be equal")
    if key_heads != value[1]:
        raise ValueError(f"key has {key_heads} heads and value {value[1]}; they must be equal")
    raise ValueError(f"key has the length {key_len} and value {value[2]}; they must be equal")
