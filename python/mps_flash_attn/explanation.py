"""explain(): how a call of attention would run, without computing anything."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import calls, codes, problem, subclasses, tensors, varlen
from .arguments import BlockSize, Causal
from .block_mask import BlockMask
from .codes import Fast, KvType
from .lengths import Lengths
from .library import Unsupported, library


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
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    seqused_k: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    block_table: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    k_type: KvType | None = None,
    v_type: KvType | None = None,
    fast: Fast | None = None,
) -> Explanation:
    """Which backend and kernel flash_attention() would use for these arguments, and how many bytes of workspace it
    needs beside the operands; or why the call is not supported. Nothing is computed.

    The arguments are those of flash_attention(); with cu_seqlens_q those of flash_attention_varlen(), and with other
    lengths, or with codes, those of flash_attention_kvcache(). `backward`: explains their gradients in place of the
    result. Wrong arguments raise ValueError or TypeError, as there, and a missing libmfa ImportError; a call that is
    not supported does not raise. The numbers in tensors of lengths are not read. Nested tensors (B, H, j, D) with the
    jagged layout are explained as scaled_dot_product_attention after replace_sdpa() takes them; `reason` is then why
    PyTorch runs the call."""
    if tensors.is_jagged(query):
        from .sdpa import jagged  # which uses this file

        reason = jagged.fallback_reason(query, key, value, attn_mask, dropout_p, scale, enable_gqa)
        if reason is not None:
            return Explanation(reason=reason)
        packed, seqused_k = jagged.packed(query, key, value)
        query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k = packed
    mask, bias = subclasses.split(attn_mask)
    seed = dropout_seed if isinstance(dropout_seed, torch.Tensor) else None
    blocks = block_mask if isinstance(block_mask, torch.Tensor) else None
    given = Lengths(cu_seqlens_q, cu_seqlens_k, seqused_k, leftpad_k, cache_batch_idx, block_table)
    inputs: Any = query, key, value, mask, sinks, alibi_slopes, seed, blocks, *given, k_scale, v_scale
    inputs, kinds = codes.resolve(tuple(calls.check_readable(*inputs)), k_type, v_type)
    most: varlen.Most = {}
    band = calls.band(is_causal, window_size)
    if any(one is not None for one in given):
        varlen.check_band(is_causal, bias, given)
        inputs, most = varlen.four_dimensional(inputs, max_seqlen_q, max_seqlen_k)
    calls.check_heads(inputs, enable_gqa)
    inputs, options = calls.resolve(
        inputs,
        band,
        scale,
        softcap,
        dropout_p,
        dropout_seed,
        block_mask,
        block_size,
        bias,
        is_cast=tensors.is_autocast(inputs[0]),
        draws=False,
        kinds=kinds,
        fast=fast,
        **most,
    )
    problem.check(inputs, options)
    tensors.refuse_short_storage(**problem.Inputs._make(inputs)._asdict())
    query, _, value, mask, sinks, *_ = inputs
    out, rows = tensors.like(query, codes.columns(value, options.v_type)), tensors.empty_rows(query)
    try:
        if backward:
            wanted = (True, True, True, mask is not None and mask.dtype is not torch.bool, sinks is not None)
            gradients = tensors.gradients(inputs, wanted, options.out_type)
            of_backward = problem.Operands(problem.Inputs._make(inputs), out, rows, out, None)
            return Explanation.of(problem.pack_backward(of_backward, options, gradients))
        return Explanation.of(problem.pack_forward(inputs, options, out))
    except Unsupported as error:
        return Explanation(reason=str(error))
