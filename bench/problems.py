"""The problems of the benchmarks, and operands for them."""

import dataclasses
import math

import torch

from mps_flash_attn.library import (
    BAND_OPEN_LOWER,
    BAND_OPEN_UPPER,
    MASK_ADDITIVE,
    MASK_BOOL,
    MASK_NONE,
    library,
    scalars,
)

# In the order of mfa_dtype (include/mfa.h).
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16, "f64": torch.float64}
DECODE_QUERIES = 16  # with at most as many, reading K and V from memory may be the bound,
CACHE_BYTES = 1 << 24  # if they have at least as many bytes


@dataclasses.dataclass(frozen=True)
class Problem:
    """One line of the project's problem grammar (docs/abi.md), as far as these benchmarks need it; the pass may
    also be forward+backward. mask_bool hides the last quarter of the keys, as padding does; mask_f32 and so on
    is a bias of its own for each head."""

    text: str
    passes: str
    dtype: str
    batch: int
    q_heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    head_dim: int
    value_dim: int
    lower: int | None  # None: open
    upper: int | None
    softcap: float
    mask: str | None

    @classmethod
    def parse(cls, text):
        passes, _, rest = text.partition(" ")
        given = scalars(library().parse(f"{passes.removesuffix('+backward')} {rest}"))._asdict()
        dtypes = list(DTYPES)
        masks = {MASK_NONE: None, MASK_BOOL: "bool", MASK_ADDITIVE: dtypes[given["mask_dtype"]]}
        chosen = {
            "dtype": dtypes[given["dtype"]],
            "mask": masks[given["mask"]],
            "lower": None if given["lower"] == BAND_OPEN_LOWER else given["lower"],
            "upper": None if given["upper"] == BAND_OPEN_UPPER else given["upper"],
        }
        names = [field.name for field in dataclasses.fields(cls)[2:]]
        problem = cls(text=text, passes=passes, **{name: {**given, **chosen}[name] for name in names})
        if problem.window and problem.q_len != problem.kv_len:
            raise ValueError(f'"{text}" has a window and q_len differs from kv_len; windows need equal ones here')
        other = [name for name in ("device", "alibi", "sinks", "dropout", "block_map_q") if given[name]]
        if other or " scale" in text:
            raise ValueError(f'"{text}" has {" ".join(other) or "a scale"}, which no benchmark here has')
        return problem

    @property
    def window(self):
        """(left, right) as flash_attention takes it, -1 for an open side; None if the band is open or causal."""
        if self.lower is None and self.upper in (None, 0):
            return None
        return (-1 if self.lower is None else -self.lower, -1 if self.upper is None else self.upper)

    @property
    def causal(self):
        return self.lower is None and self.upper == 0

    def band(self, rows):
        """True where key j is in the band of query i, for the queries in `rows`."""
        distance = torch.arange(self.kv_len) - torch.arange(rows.start, rows.stop)[:, None]
        inside = torch.ones_like(distance, dtype=torch.bool)
        if self.lower is not None:
            inside &= distance >= self.lower
        if self.upper is not None:
            inside &= distance <= self.upper
        return inside

    @property
    def keys(self):
        """The number of keys that a bool mask leaves: all but the padding."""
        return self.kv_len - self.kv_len // 4 if self.mask == "bool" else self.kv_len

    def pairs(self):
        """Visible (query, key) pairs of one head."""
        query = torch.arange(self.q_len)
        first = (query + self.lower).clamp(0, self.keys) if self.lower is not None else torch.zeros_like(query)
        last = torch.full_like(query, self.keys)
        if self.upper is not None:
            last = (query + self.upper + 1).clamp(0, self.keys)
        return int((last - first).clamp(min=0).sum())

    def flop(self):
        """Useful operations: neither masked pairs nor recomputation count."""
        forward, backward = 2 * (self.head_dim + self.value_dim), 6 * self.head_dim + 4 * self.value_dim
        per_pair = {"forward": forward, "backward": backward, "forward+backward": forward + backward}[self.passes]
        return self.batch * self.q_heads * self.pairs() * per_pair

    def bytes_read(self):
        """Of K and V, each once."""
        columns = self.head_dim + self.value_dim
        return self.batch * self.kv_heads * self.keys * columns * DTYPES[self.dtype].itemsize

    @property
    def reads_memory(self):
        """Whether memory bandwidth may be the bound."""
        return self.q_len <= DECODE_QUERIES and self.bytes_read() >= CACHE_BYTES


@dataclasses.dataclass
class Operands:
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    d_o: torch.Tensor | None
    mask: torch.Tensor | None
    torch_mask: torch.Tensor | None  # the mask that PyTorch needs: it has no windows, and no causal masks

    def to(self, device):
        tensors = (self.q, self.k, self.v, self.d_o, self.mask, self.torch_mask)
        return Operands(*(None if tensor is None else tensor.detach().to(device) for tensor in tensors))

    @classmethod
    def make(cls, problem, seed):
        generator = torch.Generator().manual_seed(seed)

        def tensor(dtype, *shape):
            return torch.randn(shape, generator=generator).to(DTYPES[dtype])

        queries = (problem.batch, problem.q_heads, problem.q_len)
        keys = (problem.batch, problem.kv_heads, problem.kv_len)
        q = tensor(problem.dtype, *queries, problem.head_dim)
        k = tensor(problem.dtype, *keys, problem.head_dim)
        v = tensor(problem.dtype, *keys, problem.value_dim)
        d_o = tensor(problem.dtype, *queries, problem.value_dim) if problem.passes != "forward" else None
        band = problem.band(range(problem.q_len)) if problem.window or (problem.causal and problem.mask) else None
        mask, torch_mask = None, band
        if problem.mask == "bool":
            mask = (torch.arange(problem.kv_len) < problem.keys).expand(problem.batch, 1, 1, -1)
            torch_mask = mask if band is None else mask & band
        elif problem.mask:
            mask = tensor(problem.mask, 1, problem.q_heads, problem.q_len, problem.kv_len)
            torch_mask = mask if band is None else mask.masked_fill(~band, -math.inf)
        return cls(q, k, v, d_o, mask, torch_mask)

    def part(self, problem, batch, kv_head):
        """The operands of one KV head and of the query heads that use it: a problem of its own."""
        group = problem.q_heads // problem.kv_heads
        one, keys = slice(batch, batch + 1), slice(kv_head, kv_head + 1)
        heads = slice(kv_head * group, (kv_head + 1) * group)

        def of_mask(mask):
            if mask is None or mask.dim() < 4:
                return mask
            return mask.expand(problem.batch, problem.q_heads, -1, -1)[one, heads]

        d_o = None if self.d_o is None else self.d_o[one, heads]
        q, k, v = (t.detach() for t in (self.q[one, heads], self.k[one, keys], self.v[one, keys]))
        return Operands(q, k, v, d_o, of_mask(self.mask), of_mask(self.torch_mask))
