"""Attention in a compiled JAX function, on the CPU: results and gradients beside those of jax.nn."""

import jax
import jax.numpy as jnp

from mps_flash_attn.jax import dot_product_attention

keys = jax.random.split(jax.random.key(1), 3)
q = jax.random.normal(keys[0], (2, 512, 8, 64))  # batch, length, heads, head_dim
k, v = (jax.random.normal(key, (2, 512, 2, 64)) for key in keys[1:])  # 2 heads serve 8 of the queries


def loss(attention, q, k, v):
    return (attention(q, k, v, is_causal=True) ** 2).sum()


for name, attention in (("libmfa", dot_product_attention), ("jax.nn", jax.nn.dot_product_attention)):
    step = jax.jit(jax.value_and_grad(lambda *given, attention=attention: loss(attention, *given), (0, 1, 2)))
    memory = step.lower(q, k, v).compile().memory_analysis()
    value, gradients = step(q, k, v)
    print(f"{name}: loss {value:.4f}, {memory.temp_size_in_bytes / 2**20:.1f} MiB beside arguments and results")
    if name == "libmfa":
        ours = gradients
for name, a, b in zip(("dQ", "dK", "dV"), ours, gradients, strict=True):
    print(f"{name} differs by at most {jnp.abs(a - b).max():.1e}")
    assert jnp.allclose(a, b, rtol=1e-4, atol=1e-4)

# vmap over the layers of an ensemble, whose keys and values are shared
many = jnp.stack((q, 2 * q, 3 * q))
out = jax.vmap(dot_product_attention, (0, None, None))(many, k, v)
assert jnp.allclose(out[1], dot_product_attention(2 * q, k, v), rtol=1e-4, atol=1e-4)
print("vmap:", out.shape)
