"""Attention sinks: a layer like those of gpt-oss, with learned sinks, grouped queries and a sliding window.

Each query head has one more logit in its softmax, which has no key and no value: a query that finds nothing in its
window can put its weight there. Results and gradients are compared with attention written out; then the layer generates
one token at a time, and returns what it returned for the whole sequence.
"""

import torch

from mps_flash_attn import flash_attention

BATCH, LENGTH, WIDTH, HEADS, KV_HEADS, HEAD_DIM, WINDOW = 2, 100, 64, 8, 2, 16, 32


class Attention(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.project_q = torch.nn.Linear(WIDTH, HEADS * HEAD_DIM)
        self.project_kv = torch.nn.Linear(WIDTH, 2 * KV_HEADS * HEAD_DIM)
        self.project_out = torch.nn.Linear(HEADS * HEAD_DIM, WIDTH)
        self.sinks = torch.nn.Parameter(torch.randn(HEADS))

    def forward(self, x, cache=None):
        """x: (batch, length, width), which `cache`, the keys and values before it, precedes; returns (out, cache)."""
        q = self.project_q(x).unflatten(2, (HEADS, HEAD_DIM)).transpose(1, 2)
        k, v = self.project_kv(x).unflatten(2, (2, KV_HEADS, HEAD_DIM)).permute(2, 0, 3, 1, 4)
        if cache is not None:
            k, v = torch.cat([cache[0], k], 2), torch.cat([cache[1], v], 2)
        out = self.attend(q, k, v)
        k, v = k[:, :, -WINDOW:], v[:, :, -WINDOW:]  # all that later tokens see
        return self.project_out(out.transpose(1, 2).flatten(2)), (k, v)

    def attend(self, q, k, v):
        # The last query is at the last key: "bottom_right".
        options = {"is_causal": "bottom_right", "window_size": WINDOW, "enable_gqa": True}
        return flash_attention(q, k, v, sinks=self.sinks, **options)


class WrittenOut(Attention):
    def attend(self, q, k, v):
        k, v = (x.repeat_interleave(HEADS // KV_HEADS, dim=1) for x in (k, v))
        distance = torch.arange(k.shape[2]) - torch.arange(q.shape[2])[:, None] - (k.shape[2] - q.shape[2])
        visible = (distance <= 0) & (distance > -WINDOW)
        scores = (q @ k.mT / HEAD_DIM**0.5).masked_fill(~visible, -torch.inf)
        sinks = self.sinks[:, None, None].expand(*scores.shape[:3], 1)
        weights = torch.cat([scores, sinks], -1).softmax(-1)
        return weights[..., :-1] @ v


def compare(name, ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    print(f"{name:32} differs by at most {(ours - theirs).abs().max().item():.1e}")


torch.manual_seed(1)
layer, written_out = Attention(), WrittenOut()
written_out.load_state_dict(layer.state_dict())
x, target = torch.randn(2, BATCH, LENGTH, WIDTH)

ours, theirs = layer(x)[0], written_out(x)[0]
compare("the result", ours, theirs)
(ours - target).square().sum().backward()
(theirs - target).square().sum().backward()
compare("the gradient of the sinks", layer.sinks.grad, written_out.sinks.grad)
compare("the gradient of the queries' weight", layer.project_q.weight.grad, written_out.project_q.weight.grad)

# One token at a time, with the keys and values of one window.
with torch.no_grad():
    cache, tokens = None, []
    for place in range(LENGTH):
        token, cache = layer(x[:, place : place + 1], cache)
        tokens.append(token)
    compare("generating", torch.cat(tokens, 1), ours)
