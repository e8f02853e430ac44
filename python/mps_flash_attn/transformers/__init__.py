"""attn_implementation="mfa" of Hugging Face transformers, which is imported when it is registered, not before.

register.py   the name: what is registered and extended for it, and how that is undone
check.py      whether a model calls the function that its configuration names
masks.py      masks that say what they hide by a band and lengths, and are made only where something reads them
attention.py  the attention function
paged.py      its calls in continuous batching, on the pages of transformers' cache
"""

from .attention import transformers_attention
from .register import register_transformers

__all__ = ["register_transformers", "transformers_attention"]
