"""PyTorch's own function for packed sequences, torch.nn.attention.varlen.varlen_attn, which has no kernel on a CPU or a
Mac, on libmfa: results and gradients beside attention of each document, and a step of generation over a cache.

It needs PyTorch 2.12 or later.
"""

import torch
import torch.nn.functional as F
from torch.nn.attention import activate_flash_attention_impl, restore_flash_attention_impl
from torch.nn.attention.varlen import AuxRequest, varlen_attn

from mps_flash_attn import register_flash_attention_impl

HEADS, KV_HEADS, WIDTH = 4, 2, 32
LENGTHS = (90, 7, 33, 1)

torch.manual_seed(1)
q = torch.randn(sum(LENGTHS), HEADS, WIDTH, requires_grad=True)
k, v = (torch.randn(sum(LENGTHS), KV_HEADS, WIDTH, requires_grad=True) for _ in range(2))
d_out = torch.randn_like(q)
starts = F.pad(torch.tensor(LENGTHS).cumsum(0), (1, 0)).int()

register_flash_attention_impl()
try:
    varlen_attn(q, k, v, starts, starts, 90, 90, enable_gqa=True)
except NotImplementedError as error:
    print("before:", str(error).partition(".")[0])

activate_flash_attention_impl("mfa")
causal = {"window_size": (-1, 0), "enable_gqa": True}
out, lse = varlen_attn(q, k, v, starts, starts, 90, 90, return_aux=AuxRequest(lse=True), **causal)
found = torch.autograd.grad(out, (q, k, v), d_out)

documents = zip(*(x.transpose(0, 1).split(LENGTHS, 1) for x in (q, k, v)), strict=True)
outs = [F.scaled_dot_product_attention(*one, is_causal=True, enable_gqa=True) for one in documents]
expected = torch.cat(outs, 1).transpose(0, 1)
torch.testing.assert_close(out, expected)
torch.testing.assert_close(found, torch.autograd.grad(expected, (q, k, v), d_out))
print(f"{len(LENGTHS)} documents: differs by at most {(out - expected).abs().max().item():.1e}")

# The last token of each document again, over a cache that has room for more keys than are used.
with torch.no_grad():
    used, room = torch.tensor(LENGTHS).int(), 128
    cache_k, cache_v = (torch.zeros(len(LENGTHS), room, KV_HEADS, WIDTH) for _ in range(2))
    for b, length in enumerate(LENGTHS):
        cache_k[b, :length], cache_v[b, :length] = k[starts[b] : starts[b + 1]], v[starts[b] : starts[b + 1]]
    each, all_of_cache = torch.arange(5).int(), torch.arange(0, 5 * room, room).int()
    last = starts[1:].long() - 1
    rows = cache_k.flatten(0, 1), cache_v.flatten(0, 1)
    step = varlen_attn(q[last], *rows, each, all_of_cache, 1, room, seqused_k=used, **causal)
torch.testing.assert_close(step, out[last])
print(f"a step of generation: differs by at most {(step - out[last]).abs().max().item():.1e}")

restore_flash_attention_impl()
