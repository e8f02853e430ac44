"""A model of Hugging Face transformers on libmfa: attn_implementation="mfa".

The model is a small Llama with random weights, so nothing is downloaded; from_pretrained(...) takes the same argument.
"""

import copy

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mps_flash_attn import register_transformers, sdpa_stats

register_transformers()

config = LlamaConfig(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
torch.manual_seed(1)
ours = LlamaForCausalLM._from_config(config, attn_implementation="mfa").eval()
eager = copy.deepcopy(ours)
eager.set_attn_implementation("eager")

tokens = torch.randint(128, (2, 50))
padding = torch.ones_like(tokens)
padding[0, :10] = 0  # the first sequence is padded on the left

with torch.no_grad():
    a, b = (model(tokens, attention_mask=padding).logits[padding.bool()] for model in (ours, eager))
print(f"logits differ by at most {(a - b).abs().max().item():.1e}")
torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)

settings = {"attention_mask": padding, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
a, b = (model.generate(tokens, **settings) for model in (ours, eager))
print("generated:", a[0, -8:].tolist())
assert a.equal(b)

print("attention calls:", sdpa_stats())
assert set(sdpa_stats()) == {"replaced"}
