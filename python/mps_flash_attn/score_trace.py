"""Traces a score_mod or a mask_mod of flex_attention.

The function is called once with scalar tensors that have no values (of the meta device), while a mode sees each
operation of PyTorch's dispatcher. Of each result it keeps what is known, a Value, by a rule for the operation. Without
a rule it is known on which indices a result depends; an operation on the score has a rule, or is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from . import transforms
from .library import Unsupported

INDICES = ("b", "h", "q", "kv")

Line = tuple[int, int, int]  # x * q + y * kv + z

ACCEPTED = (
    "accepted are a positive factor and cap * tanh(score / cap), then terms that do not depend on the score, added or "
    "subtracted, and torch.where(condition, score, -inf)"
)
_EXACT = (torch.int32, torch.int64, torch.float32, torch.float64)  # dtypes in which places are exact
_WHOLE = 2**23  # numbers below are exact in float32, as are their sums with places
APPROXIMATIONS = ("approx::tanh",)  # operators that approximate tanh, each verified where it is used


class Entry(NamedTuple):
    """An entry of a captured tensor: for each dimension an index's name, a number, or None for all of it."""

    tensor: Tensor
    places: tuple[str | int | None, ...]


class Distance(NamedTuple):
    """A factor that depends on b and h alone, times q - kv + shift, or times its absolute value."""

    is_absolute: bool
    shift: int


@dataclass(frozen=True)
class Score:
    """gain * score, or with a cap (not 0) cap * tanh(gain * score / cap); and the terms that are added to it."""

    gain: float = 1.0
    cap: float = 0.0
    terms: tuple[tuple[int, Value], ...] | None = ()  # each with its sign; None: they are not known one by one
    indices: frozenset[str] = frozenset()  # on which the terms depend

    @property
    def is_bare(self) -> bool:
        return self.terms == ()


@dataclass(frozen=True)
class Value:
    """What is known of a scalar: None where a field does not describe it."""

    indices: frozenset[str] = frozenset()  # on which it may depend
    name: str | None = None  # it is this index
    number: float | None = None  # it is this constant
    line: Line | None = None  # it is x * q + y * kv + z
    absolute: Line | None = None  # it is the absolute value of that
    distance: Distance | None = None
    entry: Entry | None = None
    band: tuple[int | None, int | None, bool] | None = None  # true only within; with the bool: and wherever within
    score: Score | None = None  # it depends on the score


# --- Indexing -----------------------------------------------------------------------------------


class IndexByTensors(TorchFunctionMode):
    """tensor[b, h]: PyTorch would read the value of a scalar tensor, which tracers and vmap have not. And a number that
    torch.tensor() puts on the device of its arguments stays known to the tracer."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__getitem__:
            tensor, index = args
            given = index if isinstance(index, tuple) else (index,)
            if any(isinstance(one, Tensor) for one in given) and all(map(_is_simple, given)):
                return torch.ops.aten.index(tensor, [_as_index(one, tensor.device) for one in given])
        kwargs = kwargs or {}
        if func is torch.tensor and isinstance(args[0], (bool, int, float)) and _is_meta(kwargs.get("device")):
            return torch.full((), args[0], dtype=kwargs.get("dtype"), device="meta")
        return func(*args, **kwargs)


def _is_meta(device: Any) -> bool:
    return device is not None and torch.device(device).type == "meta"


def _is_simple(one: Any) -> bool:
    if isinstance(one, Tensor):
        return one.dtype is not torch.bool
    return type(one) is int or one == slice(None)


def _as_index(one: Any, device: torch.device) -> Tensor | None:
    if isinstance(one, Tensor):
        return one
    return None if isinstance(one, slice) else torch.tensor(one, device=device)


# --- The tracer -----------------------------------------------------------------------------------


class Tracer(TorchDispatchMode):
    """Follows what is computed of scalars without values."""

    def __init__(self, what: str, differentiates: bool) -> None:
        super().__init__()
        self.what = what  # score_mod or mask_mod
        self.differentiates = differentiates
        self.values: dict[int, tuple[Tensor, Value]] = {}  # by id, with the tensor, which keeps that
        self.used: dict[int, Tensor] = {}  # those that depend on the score and that an operation read
        self.approximates = False

    def trace(self, function: Callable[..., Any], dtype: torch.dtype | None) -> Value:
        """The Value of what `function` returns, for a score of this dtype (None: it gets none)."""
        with transforms.outside(), torch.inference_mode(False), torch.set_grad_enabled(self.differentiates):
            arguments = []
            if dtype is not None:
                leaf = torch.empty((), dtype=dtype, device="meta", requires_grad=self.differentiates)
                arguments.append(self.keep(leaf.clone(), Value(score=Score())))
            for name, line in zip(INDICES, (None, None, (1, 0, 0), (0, 1, 0))):
                index = torch.empty((), dtype=torch.int64, device="meta")
                arguments.append(self.keep(index, Value(frozenset((name,)), name, line=line)))
            with IndexByTensors(), self:
                found = function(*arguments)
        if not isinstance(found, Tensor) or found.dim():
            kind = f"a tensor of the shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            raise Unsupported(f"{self.what} returns {kind}; it must be a tensor without dimensions")
        if any(tensor._backward_hooks for tensor, _ in self.values.values()):
            raise Unsupported(f"{self.what} registers a hook on a tensor; it must register none")
        self.used[id(found)] = found
        return self.value_of(found)

    def keep(self, tensor: Tensor, value: Value) -> Tensor:
        self.values[id(tensor)] = tensor, value
        return tensor

    def value_of(self, one: Any) -> Value:
        """Of an argument: a tensor that is followed, a number, or a captured tensor."""
        if isinstance(one, Tensor):
            if id(one) in self.values:
                return self.values[id(one)][1]
            if one.is_meta:
                raise Unsupported(
                    f"{self.what} uses a tensor that PyTorch's dispatcher did not make, such as one that vmap maps; it "
                    "must be made by operations of PyTorch, or captured as a plain tensor"
                )
            is_constant = type(one) is Tensor and not one.requires_grad and not transforms.are_active()
            if one.dim() == 0 and one.device.type == "cpu" and is_constant:
                return _number(one.item())
            return Value(entry=Entry(one, (None,) * one.dim()))
        return _number(one) if isinstance(one, (bool, int, float)) else Value()

    def refuse(self, name: str, why: str = "") -> NoReturn:
        raise Unsupported(f"score_mod applies {name.removeprefix('aten::')} to the score{why}; {ACCEPTED}")

    def check_gradients(self) -> None:
        """Raises if the score's gradient is not that of the operations that were seen."""
        for tensor in self.used.values():
            is_own = isinstance(tensor.grad_fn, BackwardCFunction)
            if not tensor.requires_grad or (is_own and not self.approximates):
                raise Unsupported(
                    "score_mod computes the score with a gradient of its own (no_grad, detach or an autograd.Function),"
                    f" which is not that of its operations; {ACCEPTED}"
                )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        followed = [self.value_of(one) for one in given if id(one) in self.values]
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise Unsupported(f"{self.what} draws random numbers ({name.removeprefix('aten::')}); it must draw none")
        if func._schema.is_mutable:
            raise Unsupported(
                f"{self.what} changes a tensor in place ({name.removeprefix('aten::')}); it must make a new one"
            )
        if not followed:
            found = func(*args, **kwargs)
            rule = _OF_CONSTANTS.get(name)
            if not isinstance(found, Tensor) or not found.is_meta:
                return found
            return self.keep(found, (rule and rule(self, name, args, kwargs, found)) or Value())
        if name in ("aten::_local_scalar_dense", "aten::item", "aten::equal", "aten::is_nonzero"):
            raise Unsupported(
                f"{self.what} reads the value of an argument, as `if`, int() and .item() do; it must be computed by "
                "operations of PyTorch, such as torch.where"
            )
        if name in APPROXIMATIONS:
            found = torch.empty_like(given[0], device="meta")
        else:
            found = func(*tree_map(_meta, args), **tree_map(_meta, kwargs))
        if not isinstance(found, Tensor):
            if any(value.score for value in followed):
                self.refuse(name)
            raise Unsupported(f"{self.what} uses {name.removeprefix('aten::')}, whose result is not one tensor")
        is_of_score = any(value.score for value in followed) and name not in _OF_SHAPE
        if is_of_score and name != "aten::detach":  # autograd detaches what it saves
            self.used |= {id(one): one for one in given if self.value_of(one).score}
        rule = _OF_SCORE.get(name) if is_of_score else _OF_INDICES.get(name)
        indices = frozenset[str]().union(*(value.indices for value in followed))
        if is_of_score and rule is None:
            self.refuse(name)
        value = rule(self, name, args, kwargs, found) if rule else None
        if value and value.entry and self.differentiates and not torch.is_grad_enabled():
            value = replace(value, entry=None)  # no_grad, or an autograd.Function, whose gradient is its own
        return self.keep(found, value or Value(frozenset() if name in _OF_SHAPE else indices))


def _meta(one: Any) -> Any:
    return one.to("meta") if isinstance(one, Tensor) and not one.is_meta else one


def _number(one: float) -> Value:
    is_whole = abs(one) < _WHOLE and one == int(one)
    band = (None, None, True) if one is True else None
    return Value(number=one, line=(0, 0, int(one)) if is_whole else None, band=band)


# --- Operations on the score ----------------------------------------------------------------------

Rule = Callable[[Tracer, str, Any, Any, Tensor], "Value | None"]


def _scaled(value: Value, factor: float) -> Value:
    """A multiple of a value that depends on the score."""
    score = value.score
    assert score is not None  # of the callers
    cap = score.cap * factor
    return replace(value, score=replace(score, gain=score.gain * factor, cap=cap, terms=score.terms and None))


def _score_add(tracer: Tracer, name: str, args: Any, kwargs: Any, found: Tensor) -> Value:
    a, b = (tracer.value_of(one) for one in args[:2])
    if name == "aten::rsub":
        a, b = b, a
    sign = -1 if name in ("aten::sub", "aten::rsub") else 1
    if (args[2] if len(args) > 2 else kwargs.get("alpha", 1)) != 1:
        tracer.refuse(name, " with alpha")
    if a.score and b.score:
        tracer.refuse(name, " twice")
    if b.score:
        a, b, sign = b if sign > 0 else _scaled(b, -1.0), a, 1
    assert a.score is not None  # one of them has it
    added = args[1] if tracer.value_of(args[0]).score else args[0]
    if b.entry and tracer.differentiates and b.entry.tensor.requires_grad != added.requires_grad:
        b = replace(b, entry=None)  # no_grad
    terms = None if a.score.terms is None else (*a.score.terms, (sign, b))
    score = replace(a.score, terms=terms, indices=a.score.indices | b.indices)
    return Value(a.indices | b.indices, score=score)


def _score_mul(tracer: Tracer, name: str, args: Any, kwargs: Any, found: Tensor) -> Value:
    a, b = (tracer.value_of(one) for one in args[:2])
    if a.score and b.score:
        tracer.refuse(name, " twice")
    if b.score:
        a, b = b, a
    if b.number is None:
        tracer.refuse(name, " with a factor that is no constant number")
    return _scaled(a, float(b.number))


def _score_div(tracer: Tracer, name: str, args: Any, kwargs: Any, found: Tensor) -> Value:
    a, b = (tracer.value_of(one) for one in args[:2])
    mode = args[2] if len(args) > 2 else kwargs.get("rounding_mode")
    if not a.score or b.score or not b.number or mode is not None:
        tracer.refuse(name, " with a divisor that is no constant number" if a.score and not b.score else "")
    return _scaled(a, 1 / float(b.number))


def _score_neg(tracer: Tracer, name: str, args: Any, kwargs: Any, found: Tensor) -> Value:
    return _scaled(tracer.value_of(args[0]), -1.0)


def _score_tanh(tracer: Tracer, name: str, args: Any, kwargs: Any, found: Tensor) -> Value:
    value = tracer.value_of(args[0])
    score = value.score
    if score is None or score.cap or not score.is_bare:
        tracer.refuse(name, " after another tanh, or after a term was added")
    tracer.approximates |= name in APPROXIMATIONS
    return replace(value, score=replace(score, cap=1.0))


def _score_where(tracer: Tracer, name: str, args: Any, kwargs: Any, found: Tensor) -> Value:
    if name == "aten::masked_fill":
        kept, condition, other = (tracer.value_of(one) for one in args)
    else:
        condition, kept, other = (tracer.value_of(one) for one in args)
    if condition.score:
        tracer.refuse(name, ", by a condition that depends on it")
    scores = [one.score for one in (kept, other) if one.score]
    if len({(score.gain, score.cap) for score in scores}) > 1:
        tracer.refuse(name, ", of two functions of it")
    if len(scores) == 1 and (kept if kept.score is None else other).number != -math.inf:
        tracer.refuse(name, ", with a value in its place that is not -inf")
    indices = condition.indices.union(*(score.indices for score in scores))
    return Value(indices, score=replace(scores[0], terms=None, indices=indices))


def _score_copy(tracer: Tracer, name: str, args: Any, kwargs: Any, found: Tensor) -> Value:
    if torch.promote_types(found.dtype, args[0].dtype) != found.dtype:
        tracer.refuse(name, f", to {str(found.dtype).removeprefix('torch.')}, which rounds it")
    return tracer.value_of(args[0])


_OF_SHAPE = {  # what they return does not depend on the values of a tensor
    f"aten::{name}" for name in ("full_like", "zeros_like", "ones_like", "empty_like")
} | {f"aten::{name}" for name in ("new_full", "new_zeros", "new_ones", "new_empty")}

_OF_SCORE: dict[str, Rule] = {
    "aten::add": _score_add,
    "aten::sub": _score_add,
    "aten::rsub": _score_add,
    "aten::mul": _score_mul,
    "aten::div": _score_div,
    "aten::neg": _score_neg,
    "aten::tanh": _score_tanh,
    **dict.fromkeys(APPROXIMATIONS, _score_tanh),
    "aten::where": _score_where,
    "aten::masked_fill": _score_where,
    "aten::_to_copy": _score_copy,
    "aten::clone": _score_copy,
    "aten::alias": _score_copy,
    "aten::detach": _score_copy,
}


# --- Operations on indices and captured tensors ---------------------------------------------------


def distance_of(value: Value) -> Distance | None:
    """The value as a factor times q - kv + shift."""
    if value.distance or value.line is None:
        return value.distance
    x, y, z = value.line
    return Distance(False, z // x) if x and y == -x and z % x == 0 else None


def _linear(tracer: Tracer, name: str, args: Any, kwargs: Any, found: Tensor) -> Value | None:
    """add, sub and rsub."""
    a, b = (tracer.value_of(one) for one in args[:2])
    alpha = args[2] if len(args) > 2 else kwargs.get("alpha", 1)
    if a.line is None or b.line is None or alpha != 1 or found.dtype not in _EXACT:
        return None
    signs = {"aten::add": (1, 1), "aten::sub": (1, -1), "aten::rsub": (-1, 1)}[name]
    x, y, z = (signs[0] * one + signs[1] * other for one, other in zip(a.line, b.line))
    return Value(a.indices | b.indices, line=(x, y, z))


def _mul(tracer: Tracer, name: str, args: Any, kwargs: Any, found: Tensor) -> Value | None:
    a, b = (tracer.value_of(one) for one in args[:2])
    indices = a.indices | b.indices
    for one, other in ((a, b), (b, a)):
        if found.dtype in _EXACT and one.line and other.line and not any(other.line[:2]):
            x, y, z = (number * other.line[2] for number in one.line)
            return Value(indices, line=(x, y, z))
        distance = distance_of(one)
        if distance and other.indices <= {"b", "h"} and found.dtype is torch.float32:
            return Value(indices, distance=distance)
    return None


def _div(tracer: Tracer, name: str, args: Any, kwargs: Any, found: Tensor) -> Value | None:
    a, b = (tracer.value_of(one) for one in args[:2])
    mode = args[2] if len(args) > 2 else kwargs.get("rounding_mode")
    distance = distance_of(a)
    if distance and b.indices <= {"b", "h"} and found.dtype is torch.float32 and mode is None:
        return Value(a.indices | b.indices, distance=distance)
    return None


def _neg(tracer: Tracer, name: str, args: Any, kwargs: Any, found: Tensor) -> Value | None:
    value = tracer.value_of(args[0])
    if value.line:
        x, y, z = value.line
        return Value(value.indices, line=(-x, -y, -z))
    return Value(value.indices, distance=value.distance)


def _abs(tracer: Tracer, name: str, args: Any, kwargs: Any, found: Tensor) -> Value | None:
    value = tracer.value_of(args[0])
    distance = distance_of(value)
    return Value(value.indices, absolute=value.line, distance=distance and distance._replace(is_absolute=True))


def _copy(tracer: Tracer, name: str, args: Any, kwargs: Any, found: Tensor) -> Value | None:
    value = tracer.value_of(args[0])
    if found.dtype == args[0].dtype:
        return value if name != "aten::detach" else replace(value, entry=None)
    is_exact = found.dtype in _EXACT and args[0].dtype in _EXACT
    name_of = value.name if is_exact and not found.dtype.is_floating_point else None
    line = value.line if is_exact else None
    distance = value.distance if found.dtype == args[0].dtype else None
    return Value(value.indices, name_of, line=line, distance=distance)


def _index(tracer: Tracer, name: str, args: Any, kwargs: Any, found: Tensor) -> Value | None:
    """tensor[b, h], and select: tensor[0]."""
    value = tracer.value_of(args[0])
    if name == "aten::select":
        given: list[Any] = [slice(None)] * (args[1] % args[0].dim()) + [args[2]]
    else:
        given = [slice(None) if one is None else one for one in args[1]]
    places: list[str | int | None] = []
    indices = value.indices
    for one in given:
        of_one = Value() if isinstance(one, slice) else tracer.value_of(one)
        indices = indices | of_one.indices
        number = of_one.number if isinstance(of_one.number, int) and of_one.number >= 0 else of_one.name
        places.append("all" if isinstance(one, slice) else number)
    entry = value.entry
    if entry is None or None in places:
        return Value(indices)
    free = iter([*places, *["all"] * entry.places.count(None)])
    filled = [next(free) if one is None else one for one in entry.places]
    return Value(indices, entry=entry._replace(places=tuple(None if one == "all" else one for one in filled)))


def _compare(tracer: Tracer, name: str, args: Any, kwargs: Any, found: Tensor) -> Value | None:
    """Bounds of kv - q, where a line of it, or the absolute value of one, is compared with a constant."""
    a, b = (tracer.value_of(one) for one in args[:2])
    indices, word = a.indices | b.indices, name.removeprefix("aten::")
    if word in ("gt", "ge"):
        a, b, word = b, a, {"gt": "lt", "ge": "le"}[word]
    if b.line is None:
        return None
    slack = 1 if word == "lt" else 0
    if a.absolute and not any(b.line[:2]):  # -most <= x * q + y * kv + z <= most
        most, (x, y, z) = b.line[2] - slack, a.absolute
        if (x, y) in ((1, -1), (-1, 1)):
            return Value(indices, band=(-most - y * z, most - y * z, True))
    if a.line:
        x, y, z = (one - other for one, other in zip(a.line, b.line))  # x * q + y * kv + z <= -slack
        if (x, y) == (-1, 1):
            return Value(indices, band=(None, -z - slack, True))
        if (x, y) == (1, -1):
            return Value(indices, band=(z + slack, None, True))
    return None


def _and(tracer: Tracer, name: str, args: Any, kwargs: Any, found: Tensor) -> Value | None:
    if found.dtype is not torch.bool:
        return None
    a, b = (tracer.value_of(one) for one in args[:2])
    (lower, upper, is_exact), (lower_b, upper_b, is_exact_b) = (one.band or (None, None, False) for one in (a, b))
    lowest = max((one for one in (lower, lower_b) if one is not None), default=None)
    highest = min((one for one in (upper, upper_b) if one is not None), default=None)
    return Value(a.indices | b.indices, band=(lowest, highest, is_exact and is_exact_b))


def _ones(tracer: Tracer, name: str, args: Any, kwargs: Any, found: Tensor) -> Value | None:
    if found.dim():
        return None
    return _number(True) if found.dtype is torch.bool else _number(1)


def _full(tracer: Tracer, name: str, args: Any, kwargs: Any, found: Tensor) -> Value | None:
    number = args[{"aten::new_full": 2, "aten::full_like": 1, "aten::full": 1}.get(name, 0)]
    return _number(number) if isinstance(number, (bool, int, float)) and found.dim() == 0 else None


_OF_INDICES: dict[str, Rule] = {
    **dict.fromkeys(("aten::add", "aten::sub", "aten::rsub"), _linear),
    "aten::mul": _mul,
    "aten::div": _div,
    "aten::neg": _neg,
    "aten::abs": _abs,
    **dict.fromkeys(("aten::_to_copy", "aten::clone", "aten::alias", "aten::detach"), _copy),
    **dict.fromkeys(("aten::index", "aten::select"), _index),
    **dict.fromkeys(("aten::lt", "aten::le", "aten::gt", "aten::ge"), _compare),
    **dict.fromkeys(("aten::logical_and", "aten::bitwise_and"), _and),
    **dict.fromkeys(("aten::new_ones", "aten::ones_like"), _ones),
    **dict.fromkeys(("aten::new_full", "aten::full_like"), _full),
}

_OF_CONSTANTS: dict[str, Rule] = {  # that are made on the device of the arguments
    **dict.fromkeys(("aten::scalar_tensor", "aten::full"), _full),
    "aten::_to_copy": _copy,
}
