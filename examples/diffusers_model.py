"""A model of Hugging Face diffusers on libmfa: set_attention_backend("mfa").

The model is a small Wan with random weights, so nothing is downloaded; of a pipeline it is pipe.transformer.
"""

import copy

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.attention_dispatch import attention_backend

from mps_flash_attn import register_diffusers, sdpa_stats

torch.manual_seed(1)
native = WanTransformer3DModel(
    num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=4, text_dim=16, num_layers=2, ffn_dim=32
).eval()
ours = copy.deepcopy(native)
video = {
    "hidden_states": torch.randn(1, 4, 3, 16, 16),  # channels, frames, height and width of the latent
    "encoder_hidden_states": torch.randn(1, 9, 16),
    "timestep": torch.tensor([500]),
}

with torch.no_grad():
    expected = native(**video).sample
    handle = register_diffusers()

    with attention_backend("mfa"):  # for all models in the block
        found = ours(**video).sample
    print(f"differs by at most {(found - expected).abs().max().item():.1e}, attention calls: {sdpa_stats()}")
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert sdpa_stats(reset=True) == {"replaced": 4}  # of each block to itself and to the text

    ours.set_attention_backend("mfa")  # for this one
    torch.testing.assert_close(ours(**video).sample, expected, rtol=1e-3, atol=1e-4)
    assert sdpa_stats() == {"replaced": 4}

ours.reset_attention_backend()
handle.remove()
