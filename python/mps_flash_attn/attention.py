"""flash_attention: exact attention in O(N) memory on (batch, head, row, column) tensors, with all gradients."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.overrides import handle_torch_function

from . import calls, context_parallel_state, dispatch_cache, problem, subclasses, tensors
from .arguments import BlockSize, Causal
from .autograd import EAGER, CachedCall, Call
from .block_mask import BlockMask
from .transforms import needs_operator

_is_compiling = torch.compiler.is_compiling  # a global name: each attribute lookup costs time in every call


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
    inputs: Any = query, key, value, mask, sinks, alibi_slopes, seed, blocks, *problem.NO_LENGTHS
    given = [query, key, value, *(tensor for tensor in inputs[3:] if tensor is not None)]
    if not by_operator and needs_operator(*given):
        by_operator = True
        if subclasses.have_torch_function(*given):
            keywords: dict[str, Any] = {"softcap": softcap, "enable_gqa": enable_gqa, "return_lse": return_lse}
            keywords |= {"alibi_slopes": alibi_slopes, "sinks": sinks}
            keywords |= {"dropout_p": dropout_p, "dropout_seed": dropout_seed}
            keywords |= {"block_mask": block_mask, "block_size": block_size}
            positional: tuple[Any, ...] = (query, key, value, is_causal, scale, attn_mask, window_size)
            return handle_torch_function(flash_attention, given, *positional, **keywords)
        inputs = calls.check_readable(*inputs)
    if not subclasses.are_distributed(*given):
        context_parallel_state.refuse_local("flash_attention")
    calls.check_heads(inputs, enable_gqa)
    is_cast = not by_operator and tensors.is_autocast(inputs[0])  # the operators have a rule for autocast of their own
    inputs, options = calls.resolve(
        inputs,
        calls.band(is_causal, window_size),
        scale,
        softcap,
        dropout_p,
        dropout_seed,
        block_mask,
        block_size,
        bias,
        is_cast=is_cast,
    )
    if not (by_operator or is_cast) and bias is None and all(one is None for one in inputs[problem.OF_SDPA :]):
        call = Call(EAGER, options, bool(return_lse))
        dispatch_cache.insert(*inputs[: problem.OF_SDPA], options_key, CachedCall, call)
    return calls.run(inputs, options, return_lse, by_operator)
