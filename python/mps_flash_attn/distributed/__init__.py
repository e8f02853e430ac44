"""Context parallelism: attention over a sequence whose rows are divided over the ranks of a torch.distributed group.

from mps_flash_attn.distributed import Layout, context_parallel_attention
"""

from .attention import context_parallel_attention
from .layout import Layout
from .transfer import PeerError

__all__ = ["Layout", "PeerError", "context_parallel_attention"]
