"""The options of attention: all that defines the result beside the tensors, as one immutable object."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Options(NamedTuple):
    """Passed as a whole through every layer. Its fields are read where a problem is packed (problem.py), in the
    reference (reference.py), in the schemas of the operators (operators.py), which list them in this order, and where
    PyTorch's operator gets them (sdpa/gradients.py)."""

    lower: int | None = None  # the smallest j - i that takes part; None: no bound
    upper: int | None = None  # the largest
    scale: float | None = None  # None: 1 / sqrt(head_dim)
    softcap: float = 0.0  # 0: none
    dropout: float = 0.0  # the probability; its seed is one of the Inputs
    block_q: int = 0  # queries of a block of the block_mask; 0: none
    block_kv: int = 0  # keys
    bottom_right: bool = False  # j - i is counted from the last query and key of a sequence, else from the first
    max_q: int | None = None  # the most queries of a packed sequence; None: they are not packed
    max_kv: int | None = None  # the most keys of one that is packed or in pages; None: it is neither
    k_type: str | None = None  # the type of codes that key is, a name of library.KV_TYPES; None: numbers
    v_type: str | None = None  # the same of value
    # The type of out and of the gradients of query, key and value, a name of library.OUT_TYPES; None: query's dtype.
    out_type: str | None = None
    fast: str | None = None  # which products may be less precise, a name of library.FAST; None: none


def scale_of(options: Options, head_dim: int) -> float:
    """The scale as a number."""
    return max(head_dim, 1) ** -0.5 if options.scale is None else options.scale


DTYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16", "float64": "f64"}  # names of frameworks: of libmfa


def problem_line(
    which: str,
    dtype: str,
    query: Sequence[int],
    key: Sequence[int],
    value: Sequence[int],
    options: Options,
    words: Iterable[str] = (),
) -> str:
    """The problem as a line of text, as in docs/abi.md, for entry points that do not pack it field by field. `which`:
    forward or backward; `dtype`: a value of DTYPES; `query` and so on: shapes (B, H, N, D); `words`: of the mask and
    other tensors."""
    batch, q_heads, q_len, head_dim = query
    line = [which, dtype, f"b{batch} h{q_heads}/{key[1]} q{q_len} kv{key[2]} d{head_dim}v{value[3]}"]
    for name, number, none in (
        ("lower", options.lower, None),
        ("upper", options.upper, None),
        ("block_map_q", options.block_q, 0),
        ("block_map_kv", options.block_kv, 0),
        ("scale", scale_of(options, head_dim), None),
        ("softcap", options.softcap, 0),
        ("dropout", options.dropout, 0),
    ):
        if number != none:
            line.append(f"{name}{number!r}")
    return " ".join((*line, *words))
