"""Masks of transformers without their scores: a mask function for its AttentionMaskInterface.

transformers describes a mask by functions of a query and a key, and by a mask of padding, (B, S). Where these say no
more than a band, sequences packed one after another, and padding, attention needs numbers, a few lengths, or the mask
of padding itself. So the mask function returns a tensor that looks like the bool mask of "sdpa", (B, 1, L, S), and has
no memory: the attention function takes its Plan, and whatever else reads or changes it gets the mask of "sdpa", which
is made then. Other masks, chunked attention for example, are that of "sdpa" from the start.
"""

from __future__ import annotations

import copy
import functools
import itertools
import weakref
from collections.abc import Callable, Sequence
from types import CodeType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ..transforms import are_active, count_of_modes

# --- What the functions of a mask say ------------------------------------------------------------


class Pattern(NamedTuple):
    """The keys that a query sees, but for padding: lower <= key - query <= upper, counted from the same token; and, if
    there are `sequences`, those of its own. No bound is None."""

    lower: int | None = None
    upper: int | None = None
    sequences: Tensor | None = None  # (B, L): the number of each token's sequence
    positions: Tensor | None = None  # (B, L): its position there, which must be consecutive


def intersection(patterns: Sequence[Pattern | None]) -> Pattern | None:
    """The pattern of what all of them see; None if one is not known, or more than one has sequences."""
    known = [pattern for pattern in patterns if pattern is not None]
    lower = [pattern.lower for pattern in known if pattern.lower is not None]
    upper = [pattern.upper for pattern in known if pattern.upper is not None]
    sequences = [pattern.sequences for pattern in known if pattern.sequences is not None]
    positions = [pattern.positions for pattern in known if pattern.positions is not None]
    if len(known) < len(patterns) or len(sequences) > 1 or len(positions) > 1:
        return None
    found = max(lower, default=None), min(upper, default=None)
    return Pattern(*found, sequences[0] if sequences else None, positions[0] if positions else None)


def read(function: Callable[..., Any]) -> Pattern | None:
    """The pattern of a mask function; None if it is none that is known."""
    code: Any = getattr(function, "__code__", None)
    reader = _readers().get(code)
    if reader is None:
        return None
    cells: Any = getattr(function, "__closure__", None) or ()
    return reader(dict(zip(code.co_freevars, (cell.cell_contents for cell in cells))))


Reader = Callable[[Any], "Pattern | None"]  # of the variables of a closure


def _write_readers() -> dict[CodeType | None, Reader]:
    """How transformers' own mask functions are read, by their code: closures of one function share it."""
    from transformers import masking_utils as masks

    causal, some = masks.causal_mask_function, torch.zeros(1, 1)
    return {
        causal.__code__: lambda _: Pattern(upper=0),
        masks.bidirectional_mask_function.__code__: lambda _: Pattern(),
        masks.and_masks(causal).__code__: lambda of: intersection([read(one) for one in of["mask_functions"]]),
        masks.sliding_window_overlay(1).__code__: lambda of: Pattern(lower=1 - of["sliding_window"]),
        masks.sliding_window_bidirectional_overlay(1).__code__: lambda of: Pattern(
            -of["sliding_window"], of["sliding_window"]
        ),
        masks.packed_sequence_mask_function(some).__code__: lambda of: Pattern(sequences=of["packed_sequence_mask"]),
        masks.remap_positions_for_packed_sequence(causal, some).__code__: lambda of: intersection(
            [read(of["mask_function"]), Pattern(positions=of["position_ids"])]
        ),
    }


_known: dict[CodeType | None, Reader] | None = None


def _readers() -> dict[CodeType | None, Reader]:
    """Those of the installed transformers; none if it has others, or its functions mean something else."""
    global _known
    if _known is None:
        try:
            _known = _write_readers()
            is_right = all(map(_is_right, _samples()))
        except (AttributeError, KeyError, TypeError):
            is_right = False
        _known = _known if is_right and _known is not None else {}
    return _known


def _samples() -> list[Callable[..., Any]]:
    from transformers import masking_utils as masks

    positions, sequences = torch.tensor([[0, 1, 2, 0, 1, 2, 3]]), torch.tensor([[0, 0, 0, 1, 1, 1, 1]])
    window = masks.sliding_window_causal_mask_function(3)
    return [
        masks.causal_mask_function,
        masks.bidirectional_mask_function,
        window,
        masks.sliding_window_bidirectional_mask_function(2),
        masks.packed_sequence_compatibility_function(window, positions, sequences),
    ]


def _is_right(function: Callable[..., Any]) -> bool:
    pattern = read(function)
    if pattern is None:
        return False
    batch, query, key = torch.zeros(1, dtype=torch.long), torch.arange(7)[:, None], torch.arange(7)
    apart = key - query
    expected = torch.ones(7, 7, dtype=torch.bool)
    if pattern.lower is not None:
        expected &= apart >= pattern.lower
    if pattern.upper is not None:
        expected &= apart <= pattern.upper
    if pattern.sequences is not None:
        expected &= pattern.sequences[0][query] == pattern.sequences[0][key]
    return bool((function(batch[:, None], batch[:, None], query, key).expand(7, 7) == expected).all())


# --- How attention says the same -----------------------------------------------------------------


class Plan(NamedTuple):
    """The arguments by which attention sees what the mask shows."""

    keys: int  # the first keys; a query sees none beyond them
    options: dict[str, Any]  # of flash_attention, or with has_lengths of flash_attention_kvcache
    has_lengths: bool = False
    starts: Tensor | None = None  # cu_seqlens of packed sequences, for flash_attention_varlen
    longest: int = 0  # of these
    is_of_mask: bool = True  # the mask hides other sequences, too

    @property
    def is_band(self) -> bool:
        """Whether it says no more than which keys - query are visible."""
        return not self.has_lengths and self.starts is None and "attn_mask" not in self.options


def plan_of(pattern: Pattern, q_len: int, kv_len: int, offset: int, padding: Tensor | None) -> Plan | None:
    """The plan of a mask without sequences; None if there is none. `offset`: the index among the keys of the token of
    query 0. padding (B, kv_len): False for keys that are padding."""
    used, options = _band(pattern, q_len, kv_len, offset)
    if used < 1:
        return None
    plan = Plan(used, options)
    return plan if padding is None else _with_padding(plan, offset, padding[:, :used])


def _band(pattern: Pattern, q_len: int, kv_len: int, offset: int) -> tuple[int, dict[str, Any]]:
    """(keys, options), aligned to the last query and the last of these keys; keys are 0 where that cannot be."""
    lower, upper, *_ = pattern
    if lower is None and upper is None:
        return kv_len, {}
    used = q_len + offset
    if upper == 0:
        if used > kv_len:
            return 0, {}
        is_windowed = lower is not None and -lower < used - 1
        window = {"window_size": (-lower, 0)} if is_windowed and lower is not None else {}
        return used, {"is_causal": "bottom_right", **window}
    if lower is None or upper is None or lower > 0 or upper < 0 or used != kv_len:
        return 0, {}
    hides = -lower < used - 1 or upper < kv_len - 1 - offset  # of the last query the first key, or the reverse
    return used, {"window_size": (-lower, upper)} if hides else {}


def _with_padding(plan: Plan, offset: int, visible: Tensor) -> Plan:
    """The plan of which besides only `visible`, (B, keys), are seen. The numbers are read once for all layers."""
    keys, options, *_ = plan
    index = torch.arange(keys, dtype=torch.int32, device=visible.device)
    first, end = torch.where(visible, index, keys).amin(1), torch.where(visible, index + 1, 0).amax(1)
    rows = torch.stack([first, end, visible.sum(1, dtype=torch.int32)], 1).tolist()
    if all(count == keys for _, _, count in rows):
        return plan
    if all(count and count == end - first for first, end, count in rows):  # no row has a hole
        if not options:
            return Plan(keys, {"leftpad_k": first, "seqused_k": end}, True)
        if "is_causal" in options and all(end == keys for _, end, _ in rows):
            return Plan(keys, options | {"leftpad_k": first}, True)
        if "is_causal" in options and offset == 0 and not any(first for first, _, _ in rows):
            return Plan(keys, options | {"is_causal": "top_left", "seqused_k": end}, True)
    return Plan(keys, options | {"attn_mask": visible[:, None, None, :]})


def packed_plan(pattern: Pattern, q_len: int, kv_len: int, offset: int) -> Plan | None:
    """The plan of a mask with sequences; None if there is none. Where they begin is read once for all layers."""
    used, options = _band(pattern, q_len, kv_len, offset)
    sequences, positions = pattern.sequences, pattern.positions
    if sequences is None or offset or not used == q_len == kv_len or sequences.shape[-1] != q_len:
        return None
    begins = sequences.diff(dim=1) != 0
    if positions is not None and not ((positions.diff(dim=1) == 1) | begins).all():
        return None
    return _of_sequences(Plan(used, options), begins)


def _of_sequences(plan: Plan, begins: Tensor) -> Plan:
    """The plan of which besides only the own sequence is seen. begins (B, L - 1): whether the next token begins one."""
    first = begins.new_ones(begins.shape[0], 1)
    starts = torch.cat([first, begins], 1).flatten().nonzero().flatten().tolist()
    starts.append(begins.numel() + len(begins))
    longest = max(end - start for start, end in itertools.pairwise(starts))
    of_rows = torch.tensor(starts, dtype=torch.int32, device=begins.device)
    return plan._replace(starts=of_rows, longest=longest)


_last: tuple[Any, int | Tensor, Plan] | None = None  # of restarts(): (reference to positions, their state, the plan)


def restarts(positions: Tensor) -> Plan | None:
    """The plan of causal attention, where positions (1, L) begin anew: they rise by one, or return to the first. None
    where they do not, or three are equal, as those of an image may be. All layers get the same tensor, which is read
    in the first."""
    global _last
    last = _last
    if last is None or last[0]() is not positions or not _is_in(last[1], positions):
        step = positions.diff(dim=1)
        begins, is_equal = step != 1, step == 0
        is_other = begins & (positions[:, 1:] != positions[:, :1])
        is_other[:, 1:] |= is_equal[:, 1:] & is_equal[:, :-1]
        is_packed, is_unclear = torch.stack([begins.any(), is_other.any()]).tolist()
        plan = Plan(positions.shape[1], {"is_causal": "bottom_right"})
        plan = _of_sequences(plan, begins) if is_packed and not is_unclear else plan
        last = weakref.ref(positions), _state(positions), plan._replace(is_of_mask=False)
        _last = last
    return last[2] if last[2].starts is not None else None


def _state(positions: Tensor) -> int | Tensor:
    """What tells whether they have changed: on the CPU a copy, since NumPy and .data change them without a version; on
    a GPU, where that would be read in each layer, the version, or -1 if there is none."""
    if positions.device.type == "cpu":
        return positions.detach().clone()
    return -1 if positions.is_inference() else positions._version


def _is_in(state: int | Tensor, positions: Tensor) -> bool:
    if isinstance(state, Tensor):
        return torch.equal(state, positions)
    return state >= 0 and not positions.is_inference() and state == positions._version


# --- The mask ------------------------------------------------------------------------------------


class Mask(torch.Tensor):
    """A bool mask (B, 1, L, S) that is made where an operation reads it, and has a plan until then."""

    @staticmethod
    def __new__(
        cls, shape: tuple[int, ...], device: torch.device, make: Callable[[], Tensor], plan: Callable[[], Plan | None]
    ) -> Mask:
        mask = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bool, device=device)
        mask._make, mask._plan = make, functools.cache(plan)
        return mask

    _make: Callable[[], Tensor]
    _plan: Callable[[], Plan | None]
    _dense: Tensor | None = None
    _is_touched = False

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override] # has no TypeVars
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        args, kwargs = tree_map_only(Mask, Mask._touch, (args, kwargs or {}))
        return func(*args, **kwargs)

    def dense(self) -> Tensor:
        """The mask of "sdpa"."""
        if self._dense is None:
            self._dense = self._make()
        return self._dense

    def _touch(self) -> Tensor:
        self._is_touched = True  # it may have been changed, or a view of it may be
        return self.dense()

    def plan(self, query: Tensor, key: Tensor) -> Plan | None:
        """The plan for these; None if there is none, or the mask was read and may have been changed."""
        is_for_them = self.shape == (query.shape[0], 1, query.shape[2], key.shape[2])
        return self._plan() if is_for_them and not self._is_touched else None

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Mask(shape={tuple(self.shape)}, device='{self.device}')"

    # What reads memory without an operation.

    def numpy(self, *, force: bool = False) -> Any:
        return self._touch().numpy(force=force)

    def __array__(self, *arguments: Any, **options: Any) -> Any:
        return self._touch().__array__(*arguments, **options)

    def tolist(self) -> Any:
        return self._touch().tolist()

    def __dlpack__(self, *arguments: Any, **options: Any) -> Any:
        return self._touch().__dlpack__(*arguments, **options)

    def __dlpack_device__(self) -> Any:
        return self._touch().__dlpack_device__()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return copy.deepcopy(self._touch(), memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._touch().__reduce_ex__(protocol)

    def share_memory_(self) -> Mask:
        self._touch().share_memory_()
        return self

    # For compiled code, in which it is the mask of "sdpa".

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        self._touch()
        return ["_dense"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], _: None, size: Any, stride: Any) -> Tensor:
        dense = inner["_dense"]
        mask = Mask(tuple(size), dense.device, lambda: dense, lambda: None)
        mask._dense, mask._is_touched = dense, True
        return mask


def mask_of_transformers(*arguments: Any, **options: Any) -> Tensor | None:
    """The mask function: the arguments of transformers' sdpa_mask, and what that returns, or a Mask in its place."""
    from transformers.masking_utils import sdpa_mask

    found = None if arguments or is_traced(*options.values()) else _mask_or_none(options, sdpa_mask)
    return sdpa_mask(*arguments, **options) if found is None else found[0]


def is_traced(*given: Any) -> bool:
    """Whether numbers in tensors, of which these may be some, cannot be read."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None or are_active() or count_of_modes():
        return True
    return any(isinstance(one, torch.Tensor) and type(one) is not torch.Tensor for one in given)


def _mask_or_none(options: dict[str, Any], sdpa_mask: Callable[..., Any]) -> tuple[Tensor | None] | None:
    """(a Mask,), or (None,) where the attention function sees the same by is_causal; None if "sdpa" has to make the
    mask."""
    try:
        batch, q_len, kv_len = (options[name] for name in ("batch_size", "q_length", "kv_length"))
    except KeyError:
        return None  # of another transformers
    padding = options.get("attention_mask")
    pattern = read(options.get("mask_function"))  # type: ignore[arg-type] # of None, it is None
    if pattern is None or (padding is not None and (padding.dim() != 2 or padding.shape[0] != batch)):
        return None
    q_offset, kv_offset = (int(options.get(name, 0)) for name in ("q_offset", "kv_offset"))  # a static cache changes it
    options = options | {"q_offset": q_offset, "kv_offset": kv_offset}
    offset = q_offset - kv_offset
    if pattern.sequences is None:
        found = plan_of(pattern, q_len, kv_len, offset, _of_keys(padding, kv_offset, kv_len))
        if found is None:
            return None
        if _says_is_causal(found, pattern, offset, q_len, kv_len, options):
            return (None,)
    elif padding is not None:
        return None

    def plan() -> Plan | None:
        return packed_plan(pattern, q_len, kv_len, offset) if pattern.sequences is not None else found

    made = options | {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    device = torch.device(options.get("device", "cpu"))
    return (Mask((batch, 1, q_len, kv_len), device, functools.partial(sdpa_mask, **made), plan),)


def _of_keys(padding: Tensor | None, offset: int, kv_len: int) -> Tensor | None:
    """The mask of padding for these keys: those after its end are none."""
    if padding is None:
        return None
    missing = offset + kv_len - padding.shape[1]
    padding = torch.nn.functional.pad(padding, (0, missing)) if missing > 0 else padding
    return padding[:, offset : offset + kv_len]


def _says_is_causal(
    plan: Plan, pattern: Pattern, offset: int, q_len: int, kv_len: int, options: dict[str, Any]
) -> bool:
    """Whether None means the same: no mask, and is_causal from the first query and key, if there are several
    queries."""
    if not plan.is_band or "window_size" in plan.options:
        return False
    if pattern.upper is None or pattern.upper > 0:
        return bool(options.get("allow_is_bidirectional_skip", False))
    may_be = options.get("allow_is_causal_skip", True)
    return bool(may_be and ((q_len == 1 and plan.keys == kv_len) or (q_len > 1 and offset == 0)))
