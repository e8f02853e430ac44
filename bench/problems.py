"""The problems of the benchmarks, and operands for them."""

import dataclasses
import math
import re

import torch

PASSES = ("forward", "backward", "forward+backward")
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

    GRAMMAR = re.compile(
        r"(?P<passes>\S+) (?P<dtype>\w+) b(?P<batch>\d+) h(?P<q_heads>\d+)(/(?P<kv_heads>\d+))? q(?P<q_len>\d+) "
        r"kv(?P<kv_len>\d+) d(?P<head_dim>\d+)(v(?P<value_dim>\d+))?(?P<causal> causal)?( lower(?P<lower>-?\d+))?"
        r"( upper(?P<upper>-?\d+))?( softcap(?P<softcap>[\d.]+))?( mask_(?P<mask>\w+))?"
    )

    @classmethod
    def parse(cls, text):
        found = cls.GRAMMAR.fullmatch(text)
        if not found:
            raise ValueError(f'"{text}" is no problem; one is "forward f32 b1 h8/2 q2048 kv2048 d64 causal"')
        given = found.groupdict()
        number = {name: int(given[name]) for name in ("batch", "q_heads", "q_len", "kv_len", "head_dim")}
        problem = cls(
            text=text,
            passes=given["passes"],
            dtype=given["dtype"],
            kv_heads=int(given["kv_heads"] or number["q_heads"]),
            value_dim=int(given["value_dim"] or number["head_dim"]),
            lower=int(given["lower"]) if given["lower"] else None,
            upper=0 if given["causal"] else int(given["upper"]) if given["upper"] else None,
            softcap=float(given["softcap"] or 0),
            mask=given["mask"],
            **number,
        )
        if problem.passes not in PASSES:
            raise ValueError(f'the pass is "{problem.passes}"; it is one of {", ".join(PASSES)}')
        if problem.dtype not in DTYPES or problem.mask not in (None, "bool", *DTYPES):
            raise ValueError(f'"{text}" names no dtype; one is {", ".join(DTYPES)}, and a mask may also be bool')
        if problem.window and problem.q_len != problem.kv_len:
            raise ValueError(f'"{text}" has a window and q_len differs from kv_len; windows need equal ones here')
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
