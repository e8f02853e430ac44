"""flash_attention: exact attention in O(N) memory on (batch, head, row, column) tensors, with all gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.overrides import handle_torch_function

from . import arguments, dispatch_cache, dropout, problem, subclasses, tensors
from . import block_mask as block_masks
from .arguments import BlockSize, Causal
from .autograd import EAGER, Attention, CachedCall, Call, is_differentiated
from .block_mask import BlockMask
from .library import Unsupported, library
from .operators import attention_forward
from .options import Options
from .run import forward
from .transforms import needs_operator

_is_compiling = torch.compiler.is_compiling  # a global name: each attribute lookup costs time in every call
_OPTIONAL = problem.Inputs._field_defaults


@overload
def flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_causal: Causal = False,
    scale: float | None = None,
    attn_mask: Tensor | None = None,
    window_size: int | tuple[int, int] = 0,
    *,
    softcap: float = 0,
    enable_gqa: bool = False,
    return_lse: Literal[False] = False,
    bf16_backward: bool = False,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0,
    dropout_seed: Tensor | int | None = None,
    block_mask: BlockMask | Tensor | None = None,
    block_size: BlockSize | None = None,
) -> Tensor: ...


@overload
def flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_causal: Causal = False,
    scale: float | None = None,
    attn_mask: Tensor | None = None,
    window_size: int | tuple[int, int] = 0,
    *,
    softcap: float = 0,
    enable_gqa: bool = False,
    return_lse: Literal[True],
    bf16_backward: bool = False,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0,
    dropout_seed: Tensor | int | None = None,
    block_mask: BlockMask | Tensor | None = None,
    block_size: BlockSize | None = None,
) -> tuple[Tensor, Tensor]: ...


@overload
def flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_causal: Causal = False,
    scale: float | None = None,
    attn_mask: Tensor | None = None,
    window_size: int | tuple[int, int] = 0,
    *,
    softcap: float = 0,
    enable_gqa: bool = False,
    return_lse: bool,
    bf16_backward: bool = False,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0,
    dropout_seed: Tensor | int | None = None,
    block_mask: BlockMask | Tensor | None = None,
    block_size: BlockSize | None = None,
) -> Tensor | tuple[Tensor, Tensor]: ...


def flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_causal: Causal = False,
    scale: float | None = None,
    attn_mask: Tensor | None = None,
    window_size: int | tuple[int, int] = 0,
    *,
    softcap: float = 0,
    enable_gqa: bool = False,
    return_lse: bool = False,
    bf16_backward: bool = False,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0,
    dropout_seed: Tensor | int | None = None,
    block_mask: BlockMask | Tensor | None = None,
    block_size: BlockSize | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale * query @ key.T + attn_mask) @ value, never holding the L x S matrix of scores.

    Tensors are (B, H, N, D): query (B, H, L, E), key (B, Hkv, S, E), value (B, Hkv, S, Ev), of any strides, in float32,
    float16, bfloat16 or float64. The result is (B, H, L, Ev), its memory ordered like the query's. Query i and key j
    score

        s = scale * dot(query[i], key[j])        scale: None is 1/sqrt(E)
        s = softcap * tanh(s / softcap)          if softcap > 0
        s = s + attn_mask[i, j]                  if the mask is of a float dtype
        s = s - slope * |i + S - L - j|          if alibi_slopes are given

    and the result is zero for a query that may see no key. With sinks, each query head has one more logit in its
    softmax, which has no key and no value: a query's weights are exp(s) / (exp(sink) + sum of exp(s)).

    is_causal     True or "top_left": query i sees keys j <= i, as in scaled_dot_product_attention.
                  "bottom_right": j <= i + S - L, so that the last query sees the last key.
    window_size   W > 0: exactly the W keys up to and including one's own place, that of is_causal's alignment.
                  (left, right), as in flash-attn: from `left` keys before one's own place to `right` after it, -1 being
                  no limit; with is_causal, right is 0. As in flash-attn a pair aligns to the bottom right, causal True
                  too; only is_causal="top_left" changes that. 0: no window.
    attn_mask     bool (True takes part, as in PyTorch; in mps-flash-attn on PyPI True hides) or float (added),
                  broadcastable to (B, H, L, S), and combined with the above.
                  A float mask that requires a gradient gets it. The results of
                  torch.nn.attention.bias.causal_upper_left(L, S) and causal_lower_right(L, S) are accepted, too; then
                  no mask is read or made.
    enable_gqa    allows fewer heads in key and value: query head h uses head h // (H // Hkv).
    return_lse    returns (out, lse), where lse is (B, H, L), the logarithm of each row's sum of exp(s): float32
                  (float64 for float64), -inf where a query may see no key. It is differentiable.
                  With sinks exp(sink) is in the sum: lse is the sink where a query may see no key.
    alibi_slopes  ALiBi, as in flash-attn: float32, (H,) or (B, H), the slope of each query head. It gets no gradient:
                  TypeError if it requires one.
    sinks         attention sinks, gpt-oss's `s_aux` and flash-attn's `learnable_sink`: (H,) or (B, H), the logit of
                  each query head, neither scaled nor capped, -inf being none. Float32 or of the query's dtype, and
                  read as float32. They get a gradient of their own shape and dtype if they require one.
    dropout_p     the probability, 0 to 1, with which a weight is dropped after the softmax, rounded to a multiple of
                  2**-16. Those that are kept are multiplied by 1 / (1 - dropout_p); lse is that without dropout.
    dropout_seed  makes the dropout of a call reproducible: an int64 tensor with one element, on the query's device, or
                  a number. dropout_mask() returns what it drops. Without it PyTorch's default generator of the device
                  draws one, so torch.manual_seed() makes a program reproducible; dropout_p 0 draws none.
    block_mask    which blocks of scores are visible, combined with all of the above; hidden ones are not computed.
                  A bool tensor (B or 1, H or 1, ceil(L / bq), ceil(S / bk)), True being visible, with
                  block_size=(bq, bk), or one number for both, multiples of 16; None: 128. Or a BlockMask of
                  torch.nn.attention.flex_attention, as create_block_mask() makes it. If that has partial blocks, its
                  mask_mod is evaluated in each call, as a bool mask of L x S bytes for each of its heads.
    bf16_backward exists for mps-flash-attn on PyPI; ValueError if True.

    Arguments that do not fit together raise ValueError or TypeError, which say what is accepted. A valid call that
    libmfa does not run raises Unsupported: E or Ev above 512, float64 on MPS, tensors that are neither on the CPU nor
    on MPS. Second derivatives and forward-mode differentiation raise NotImplementedError; a missing libmfa raises
    ImportError.
    """
    by_operator = _is_compiling()
    if not by_operator:
        # The type is in the key because 2.0 == 2, but a window of 2.0 raises an error.
        window_type = repr(window_size) if type(window_size) is tuple else type(window_size)
        options_key = (is_causal, scale, window_size, window_type, softcap, dropout_p, enable_gqa, return_lse)
        if alibi_slopes is None and sinks is None and block_mask is None and block_size is None and not bf16_backward:
            cached = dispatch_cache.lookup(query, key, value, attn_mask, options_key)
            if cached is not None:
                return cached.attend(query, key, value, attn_mask)
    if bf16_backward:
        raise ValueError(
            f"bf16_backward is {bf16_backward!r}; leave it out: gradients have the precision of the operands, which "
            "may be bfloat16"
        )
    mask, bias = subclasses.split(attn_mask)
    seed = dropout_seed if isinstance(dropout_seed, torch.Tensor) else None
    blocks = block_mask if isinstance(block_mask, torch.Tensor) else None
    others = mask, sinks, alibi_slopes, seed, blocks
    given = [query, key, value, *(tensor for tensor in others if tensor is not None)]
    if not by_operator and needs_operator(*given):
        by_operator = True
        if subclasses.have_torch_function(*given):
            keywords: dict[str, Any] = {"softcap": softcap, "enable_gqa": enable_gqa, "return_lse": return_lse}
            keywords |= {"alibi_slopes": alibi_slopes, "sinks": sinks}
            keywords |= {"dropout_p": dropout_p, "dropout_seed": dropout_seed}
            keywords |= {"block_mask": block_mask, "block_size": block_size}
            arguments: tuple[Any, ...] = (query, key, value, is_causal, scale, attn_mask, window_size)
            return handle_torch_function(flash_attention, given, *arguments, **keywords)
        readable = _check_readable(query, key, value, *others)
        query, key, value, mask, sinks, alibi_slopes, seed, blocks = readable
    sinks = _sinks(sinks, query)
    if block_mask is not None or block_size is not None:
        _check_heads(query, key, value, mask, enable_gqa)
    blocks, size, mask = block_masks.resolve(block_mask if blocks is None else blocks, block_size, query, key, mask)
    is_cast = not by_operator and tensors.is_autocast(query)
    if is_cast:  # the operators have a rule for autocast of their own
        query, key, value, mask = tensors.autocast(query, key, value, mask)
    _check_heads(query, key, value, mask, enable_gqa)
    options = _options(query, key, bias, is_causal, window_size, scale, softcap, dropout_p, size)
    seed = dropout.seed_of(dropout_seed if seed is None else seed, options.dropout, query)
    sinks, slopes = problem.of_heads("sinks", sinks, query), _slopes(alibi_slopes, query)
    inputs = query, key, value, mask, sinks, slopes, seed, blocks
    if by_operator:
        out, lse = attention_forward(*inputs, *options)
        return (out, lse) if return_lse else out
    call = Call(EAGER, options, bool(return_lse))
    if not is_cast and bias is None and all(one is None for one in inputs[problem.OF_SDPA :]):
        dispatch_cache.insert(query, key, value, mask, options_key, CachedCall, call)
    if is_differentiated(*inputs):
        return Attention.apply(*inputs, call)
    out, lse = forward(inputs, options, return_lse)
    return (out, lse) if return_lse else out


@dataclass(frozen=True)
class Explanation:
    """How a call would run, or why it is not supported: then `reason` is set, and the object is false.

    These are its fields:

        backend          cpu or metal
        kernel           its key, such as forward_f32_d64_q48_k192_avx512
        threads          how many threads of the CPU it uses
        workspace_bytes  the memory that it needs beside the operands
        reason           why the call is not supported; empty if it is
        waits            on MPS: why it would have to wait for PyTorch's stream, which is slow; empty if it would not
    """

    backend: str = ""
    kernel: str = ""
    threads: int = 0
    workspace_bytes: int = 0
    reason: str = ""
    waits: str = ""

    def __bool__(self) -> bool:
        return not self.reason

    def __str__(self) -> str:
        if self.reason:
            return f"not supported: {self.reason}"
        line = f"{self.backend} {self.kernel} threads {self.threads} workspace {self.workspace_bytes}"
        return f"{line}; waits for PyTorch's stream: {self.waits}" if self.waits else line

    @property
    def machine(self) -> str:
        """The instruction set or GPU family of the kernel: the last word of its key, such as avx512."""
        return self.kernel.rpartition("_")[2]

    @classmethod
    def of(cls, problem: bytes) -> Explanation:
        """The Explanation of a packed problem, by libmfa."""
        try:
            line, workspace = library().plan(problem)
        except Unsupported as error:
            return cls(reason=str(error))
        backend, kernel, *rest = line.split()
        fields = dict(zip(rest[::2], rest[1::2]))
        waits = library().waits(problem) if backend == "metal" else ""
        return cls(backend, kernel, int(fields["threads"]), workspace, waits=waits)


def explain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_causal: Causal = False,
    scale: float | None = None,
    attn_mask: Tensor | None = None,
    window_size: int | tuple[int, int] = 0,
    *,
    softcap: float = 0,
    enable_gqa: bool = False,
    backward: bool = False,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0,
    dropout_seed: Tensor | int | None = None,
    block_mask: BlockMask | Tensor | None = None,
    block_size: BlockSize | None = None,
) -> Explanation:
    """Which backend and kernel flash_attention() would use for these arguments, and how many bytes of workspace it
    needs beside the operands; or why the call is not supported. Nothing is computed.

    The arguments are those of flash_attention(). `backward`: explains their gradients in place of the result. Wrong
    arguments raise ValueError or TypeError, as there, and a missing libmfa ImportError; a call that is not supported
    does not raise."""
    mask, bias = subclasses.split(attn_mask)
    seed = dropout_seed if isinstance(dropout_seed, torch.Tensor) else None
    blocks = block_mask if isinstance(block_mask, torch.Tensor) else None
    *operands, sinks, slopes, seed, blocks = _check_readable(query, key, value, mask, sinks, alibi_slopes, seed, blocks)
    query, key, value, mask = operands
    _check_heads(query, key, value, mask, enable_gqa)
    blocks, size, mask = block_masks.resolve(block_mask if blocks is None else blocks, block_size, query, key, mask)
    sinks = _sinks(sinks, query)
    if tensors.is_autocast(query):
        query, key, value, mask = tensors.autocast(query, key, value, mask)
    options = _options(query, key, bias, is_causal, window_size, scale, softcap, dropout_p, size)
    if options.dropout and dropout_seed is None:  # none is drawn where nothing is computed
        seed = query.new_empty(1, dtype=torch.int64)
    seed = dropout.seed_of(dropout_seed if seed is None else seed, options.dropout, query)
    sinks = problem.of_heads("sinks", sinks, query)
    inputs = problem.Inputs(query, key, value, mask, sinks, _slopes(slopes, query), seed, blocks)
    problem.check(inputs, options)
    tensors.refuse_short_storage(**inputs._asdict())
    out, rows = tensors.like(query, value.shape[3]), tensors.empty_rows(query)
    try:
        if backward:
            wanted = (True, True, True, mask is not None and mask.dtype is not torch.bool, sinks is not None)
            gradients = map(tensors.gradient, inputs, wanted)
            of_backward = problem.Operands(inputs, out, rows, out, None)
            return Explanation.of(problem.pack_backward(of_backward, options, gradients))
        return Explanation.of(problem.pack_forward(inputs, options, out))
    except Unsupported as error:
        return Explanation(reason=str(error))


def _check_readable(*inputs: Tensor | None) -> list[Any]:
    """The Inputs, as plain tensors where possible. Raises for one that neither has memory to be read nor a class that
    handles our operators."""
    named = zip(problem.Inputs._fields, inputs)
    return [None if one is None and name in _OPTIONAL else tensors.check(name, one) for name, one in named]


def _sinks(sinks: Tensor | None, query: Tensor) -> Tensor | None:
    """The sinks in float32. `query`: before autocast."""
    if not isinstance(sinks, torch.Tensor) or sinks.dtype is torch.float32:
        return sinks
    if sinks.dtype is not query.dtype:
        accepted = "float32" if query.dtype is torch.float32 else f"float32, or {tensors.dtype_name(query)} as query"
        raise TypeError(f"sinks is {tensors.dtype_name(sinks)}; it must be {accepted}")
    return sinks.float()


def _slopes(slopes: Tensor | None, query: Tensor) -> Tensor | None:
    """ALiBi's slopes as (batch, heads)."""
    slopes = problem.of_heads("alibi_slopes", slopes, query)
    if slopes is not None and slopes.requires_grad:
        raise TypeError("alibi_slopes requires a gradient; it gets none, so it must be a tensor that does not")
    return slopes


def _check_heads(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, enable_gqa: bool) -> None:
    """Raises if the number of heads differs without enable_gqa."""
    if not query.dim() == key.dim() == 4:
        problem.check(problem.Inputs(query, key, value, mask), Options())  # raises
    arguments.check_gqa(query.shape[1], key.shape[1], enable_gqa)


def _options(
    query: Tensor,
    key: Tensor,
    bias: Any,
    is_causal: Causal,
    window_size: int | tuple[int, int],
    scale: float | None,
    softcap: float,
    dropout_p: float,
    block_size: tuple[int, int],
) -> Options:
    """The Options of a call. `bias`: a CausalBias, or None."""
    q_len, kv_len = query.shape[2], key.shape[2]
    lower, upper = arguments.band(is_causal, window_size, q_len, kv_len)
    if bias is not None:
        bound = subclasses.upper_bound(bias, q_len, kv_len)
        upper = bound if upper is None else min(upper, bound)
    scale = None if scale is None else arguments.number("scale", scale)
    return Options(
        lower, upper, scale, arguments.number("softcap", softcap), arguments.probability(dropout_p), *block_size
    )
