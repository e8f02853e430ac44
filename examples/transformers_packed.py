"""Texts of different lengths in models of Hugging Face transformers on libmfa, without padding: a step of fine-tuning
on texts packed into one row, and prompts that generate_batch() serves together from pages of keys and values.

The model is a small Mistral with random weights, so nothing is downloaded; from_pretrained(...) takes the same
argument.
"""

import copy

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import ContinuousBatchingConfig, GenerationConfig, MistralConfig, MistralForCausalLM

from mps_flash_attn import register_transformers, sdpa_stats

register_transformers()

config = MistralConfig(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    sliding_window=None,
)
torch.manual_seed(1)
ours = MistralForCausalLM._from_config(config, attn_implementation="mfa").eval()
eager = copy.deepcopy(ours)
eager.set_attn_implementation("eager")


def step(model, **inputs):
    """(loss, the gradients of all weights)"""
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), torch.cat([weight.grad.flatten() for weight in model.parameters()])


# A step on three texts, on padded rows with eager attention, and on one row on libmfa. Positions begin anew with each
# text, which is how DataCollatorWithFlattening packs them; the first token of each follows none, so it has no label.
texts = [torch.randint(1, 128, (length,)) for length in (200, 30, 90)]
labels = [text.clone() for text in texts]
for label in labels:
    label[0] = -100
padded = step(
    eager,
    input_ids=pad_sequence(texts, batch_first=True),
    attention_mask=pad_sequence([torch.ones_like(text) for text in texts], batch_first=True),
    labels=pad_sequence(labels, batch_first=True, padding_value=-100),
)
packed = step(
    ours,
    input_ids=torch.cat(texts)[None],
    position_ids=torch.cat([torch.arange(len(text)) for text in texts])[None],
    labels=torch.cat(labels)[None],
)
print(f"loss {padded[0]:.6f} of 600 padded tokens, {packed[0]:.6f} of 320 packed ones")
torch.testing.assert_close(packed, padded, rtol=1e-3, atol=1e-5)

# Greedy generation of the same three texts, which join and leave a running batch.
greedy = GenerationConfig(max_new_tokens=8, do_sample=False, eos_token_id=-1, pad_token_id=0)
pages = ContinuousBatchingConfig(page_size=32, num_blocks=64, max_batch_tokens=64)
done = ours.generate_batch(
    [text.tolist() for text in texts], generation_config=greedy, continuous_batching_config=pages
)
for text, key in zip(texts, sorted(done), strict=True):
    alone = eager.generate(text[None], max_new_tokens=8, do_sample=False, pad_token_id=0)[0, len(text) :]
    print("generated:", done[key].generated_tokens)
    assert done[key].generated_tokens == alone.tolist()

print("attention calls:", sdpa_stats())
assert set(sdpa_stats()) == {"replaced"}
