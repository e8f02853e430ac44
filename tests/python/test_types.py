"""The annotations of the public functions. mypy checks what follows TYPE_CHECKING; no code of this file runs there."""

from __future__ import annotations

import inspect
import typing
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from torch import Tensor

import mps_flash_attn
from mps_flash_attn import (
    Explanation,
    explain,
    flash_attention,
    flash_attention_kvcache,
    flash_attention_varlen,
    register_diffusers,
    register_flash_attention_impl,
    replace_sdpa,
    replaced_sdpa,
    sdpa_stats,
)

pytestmark = pytest.mark.cpu("annotations are the same for every backend")

PUBLIC = [getattr(mps_flash_attn, name) for name in mps_flash_attn.__all__]
FUNCTIONS = [one for one in PUBLIC if inspect.isfunction(one)]


def test_package_says_that_it_is_typed() -> None:
    assert (Path(mps_flash_attn.__file__).parent / "py.typed").is_file()


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: str(function.__name__))
def test_function_is_annotated(function: typing.Any) -> None:
    """In full, by types that exist when the program runs."""
    hints = typing.get_type_hints(function)
    assert hints.keys() == {*inspect.signature(function).parameters, "return"}
    assert inspect.getdoc(function)


if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask
    from typing_extensions import assert_type

    def of_one_result(q: Tensor, slopes: Tensor) -> None:
        assert_type(flash_attention(q, q, q), Tensor)
        assert_type(flash_attention(q, q, q, "bottom_right", 0.1, q, (3, -1), softcap=5, sinks=slopes), Tensor)
        assert_type(flash_attention(q, q, q, alibi_slopes=slopes, return_lse=True), tuple[Tensor, Tensor])
        assert_type(flash_attention(q, q, q, return_lse=False), Tensor)

    def of_blocks(q: Tensor, blocks: BlockMask) -> None:
        assert_type(flash_attention(q, q, q, block_mask=blocks), Tensor)
        assert_type(flash_attention(q, q, q, block_mask=q > 0, block_size=(64, 32)), Tensor)

    def of_two_results(q: Tensor, return_lse: bool) -> None:
        assert_type(flash_attention(q, q, q, return_lse=True), tuple[Tensor, Tensor])
        assert_type(flash_attention(q, q, q, return_lse=return_lse), Tensor | tuple[Tensor, Tensor])

    def of_lengths(q: Tensor, starts: Tensor, return_lse: bool) -> None:
        lengths = starts, starts, 7, 9
        assert_type(flash_attention_varlen(q, q, q, *lengths), Tensor)
        assert_type(flash_attention_varlen(q, q, q, *lengths, True, return_lse=True), tuple[Tensor, Tensor])
        assert_type(flash_attention_varlen(q, q, q, starts, None, 7, 9, block_table=starts, seqused_k=starts), Tensor)
        assert_type(flash_attention_kvcache(q, q, q, "bottom_right", seqused_k=starts), Tensor)
        assert_type(
            flash_attention_kvcache(q, q, q, block_table=starts, return_lse=return_lse),
            Tensor | tuple[Tensor, Tensor],
        )
        flash_attention_kvcache(q, q, q, True)  # type: ignore[call-overload] # it does not say which alignment

    def of_others(q: Tensor) -> None:
        assert_type(explain(q, q, q, backward=True), Explanation)
        assert_type(sdpa_stats(reset=True), dict[str, int])
        assert_type(replace_sdpa().remove(), None)
        with replaced_sdpa() as handle:
            handle.remove()
        with register_diffusers("ours") as registration, register_flash_attention_impl():
            assert_type(registration.remove(), None)

    def wrong(q: Tensor) -> None:
        flash_attention(q, q, q, is_causal="left")  # type: ignore[call-overload] # no such alignment
        flash_attention(q, q, q, window_size=2.0)  # type: ignore[call-overload] # no whole number
        replace_sdpa(q)  # type: ignore[call-arg] # no arguments
