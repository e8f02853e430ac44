"""The only file that sends messages itself (PyTorch redistributes DTensors): the ranks of a process group, messages
between them, and the agreement on what a call computes, before the first tensor travels.

gloo takes a message of another length than expected without an error, or ends the process. So every call begins with
messages of one fixed length, by which each rank learns what the others are about to do.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.utils._python_dispatch import _disable_current_modes

_AGREEMENT = 32  # numbers in a message of agree()
_CONTENTS = (  # of messages, each with a tag of its own
    "agreement",
    "rows",
    "keys and values",
    "gradients of keys and values",
    "heads of query, key and value",
    "heads of out",
    "heads of lse",
    "heads of the gradient of out",
    "heads of gradients",
)
_TAGS = {content: 7001 + number for number, content in enumerate(_CONTENTS)}
_OWN_LINKS = ("nccl", "xccl", "hccl")  # backends that read and write a device's own memory


# Around messages: a policy of selective checkpointing, a mode, would keep what some have brought and repeat others, for
# which no rank waits.
without_modes = _disable_current_modes


class PeerError(RuntimeError):
    """Other ranks of the group did not answer: they ended, hang, or left the call with an error of their own.

    ranks    the ranks in the group of which that is known, or one of which it is
    timeout  that of the group, in seconds; None if PyTorch does not say

    The group cannot be used afterwards."""

    def __init__(self, sentence: str, ranks: tuple[int, ...], timeout: float | None) -> None:
        super().__init__(sentence)
        self.ranks, self.timeout = ranks, timeout


class Peers:
    """The ranks of a process group, from the side of one of them."""

    def __init__(self, group: Any = None) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError(
                "torch.distributed has no process group yet; call torch.distributed.init_process_group() first"
            )
        if isinstance(group, DeviceMesh):
            if group.ndim != 1:
                raise ValueError(f"group is a DeviceMesh with {group.ndim} dimensions; it must have 1: mesh[name]")
            group = group.get_group()
        self.group: Any = dist.group.WORLD if group is None else group
        self.rank: int = dist.get_rank(self.group)
        self.size: int = dist.get_world_size(self.group)
        if self.rank < 0:
            raise ValueError("this process is not in the group")

    # --- Messages --------------------------------------------------------------------------------

    def exchange(
        self, sends: Mapping[int, Tensor], receives: Mapping[int, int], like: Tensor, content: str
    ) -> Exchange:
        """Starts to send flat tensors to ranks, and to receive as many elements of like.dtype from ranks as `receives`
        says. Messages without elements are not sent. `content`: what the messages are, a name in _TAGS."""
        staged = not self.is_direct(like.device)
        memory = torch.device("cpu") if staged else like.device
        outgoing = {rank: flat.to(memory).contiguous() for rank, flat in sends.items() if flat.numel()}
        incoming = {rank: like.new_empty(size, device=memory) for rank, size in receives.items() if size}
        operations: list[tuple[int, Any, Tensor]] = [(rank, dist.irecv, flat) for rank, flat in incoming.items()]
        operations += [(rank, dist.isend, flat) for rank, flat in outgoing.items()]
        works = self._start(operations, memory, content)
        results = {rank: incoming.get(rank, like.new_empty(0, device=memory)) for rank in receives}
        return Exchange(self, works, results, (outgoing, incoming), like.device, content)

    def is_direct(self, device: torch.device) -> bool:
        """Whether the group's backend sends from the memory of this device; else messages go through host memory."""
        if device.type == "cpu":
            return True
        try:
            return self.group._get_backend(device).name() in _OWN_LINKS
        except RuntimeError:  # the group has none for this device
            return False

    def _start(
        self, operations: list[tuple[int, Any, Tensor]], memory: torch.device, content: str
    ) -> list[tuple[tuple[int, ...], Any]]:
        """(ranks, work) of what was started: one for all where a backend takes them together, else one for each."""
        if not operations:
            return []
        tag = _TAGS[content]
        if memory.type != "cpu":
            ranks = tuple(dict.fromkeys(rank for rank, _, _ in operations))
            batch = [dist.P2POp(call, flat, self._global(rank), self.group, tag) for rank, call, flat in operations]
            return [(ranks, work) for work in self.named(ranks, content, dist.batch_isend_irecv, batch)]
        works: list[tuple[tuple[int, ...], Any]] = []
        for rank, call, flat in operations:
            work = self.named((rank,), content, call, flat, self._global(rank), group=self.group, tag=tag)
            works.append(((rank,), work))
        return works

    def _global(self, rank: int) -> int:
        return dist.get_global_rank(self.group, rank)

    def named(self, ranks: tuple[int, ...], content: str, function: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        """function(...), whose errors of communication become a PeerError that names the ranks."""
        try:
            return function(*args, **kw)
        except RuntimeError as error:
            raise self.error(ranks, content, error) from error

    def error(self, ranks: tuple[int, ...], content: str, error: Exception | None = None) -> PeerError:
        timeout = self._timeout()
        names = [
            f"{rank}" + (f" (rank {self._global(rank)} of all)" if self._global(rank) != rank else "") for rank in ranks
        ]
        one_of = "rank" if len(ranks) == 1 else "one of the ranks"
        within = "" if timeout is None else f" within the group's timeout of {timeout:g} s"
        reason = "" if error is None else f": {error}"
        return PeerError(
            f"{one_of} {', '.join(names)} of the group did not exchange {content} with rank {self.rank}{within}; it "
            f"has ended, hangs, or raised an error of its own{reason}",
            ranks,
            timeout,
        )

    def _timeout(self) -> float | None:
        """The timeout of the group, of which PyTorch has no public name."""
        try:
            return float(self.group._get_backend(self._device()).options._timeout.total_seconds())
        except (AttributeError, RuntimeError):
            return None

    def _device(self) -> torch.device:
        """A device of which the group has a backend, the CPU where it can be."""
        try:
            self.group._get_backend(torch.device("cpu"))
            return torch.device("cpu")
        except RuntimeError:
            return torch.device(torch._C._get_accelerator().type)

    # --- Agreement -------------------------------------------------------------------------------

    def agree(self, function: str, values: Mapping[str, Any], failure: Exception | None) -> None:
        """Raises on all ranks unless all call `function` with the same values, and none has failed. `failure`: why this
        rank cannot take part, or None; the rank raises it itself, and every other a ValueError."""
        if self.size > 1:
            numbers = [int(failure is not None), _number(function), *map(_number, values.values())]
            padding = [0] * (_AGREEMENT - len(numbers))
            own = torch.tensor(numbers + padding, dtype=torch.int64, device=self._device())
            ranks = [rank for rank in range(self.size) if rank != self.rank]
            found = self.exchange(dict.fromkeys(ranks, own), dict.fromkeys(ranks, _AGREEMENT), own, "agreement").wait()
            theirs = {rank: flat.tolist() for rank, flat in found.items()}
            if failure is None:
                self._compare(function, values, numbers, theirs)
        if failure is not None:
            raise failure

    def _compare(
        self, function: str, values: Mapping[str, Any], numbers: list[int], theirs: Mapping[int, list[int]]
    ) -> None:
        failed = [rank for rank, found in theirs.items() if found[0]]
        if failed:
            raise ValueError(
                f"{function} raised an error on {_ranks(failed)} of the group, where its sentence is; so it is not run "
                f"on rank {self.rank} either"
            )
        for place, name in enumerate(("function", *values), 1):
            differ = [rank for rank, found in theirs.items() if found[place] != numbers[place]]
            if differ:
                given = function if place == 1 else values[name]
                other = theirs[differ[0]][place]
                is_plain = type(given) in (int, bool)
                there = f"is {type(given)(other)} on" if is_plain else "differs on"
                raise ValueError(
                    f"{function}: {name} is {given} on rank {self.rank} and {there} {_ranks(differ)} of the group; it "
                    "must be the same on all ranks"
                )


def _ranks(ranks: Iterable[int]) -> str:
    names = [str(rank) for rank in ranks]
    return f"rank{'s' if len(names) > 1 else ''} {', '.join(names)}"


def _number(value: Any) -> int:
    """An int64 that stands for a value: itself for a whole number, else a hash."""
    if type(value) in (int, bool) and -(2**62) < value < 2**62:
        return int(value)
    (number,) = struct.unpack("<q", hashlib.blake2b(repr(value).encode(), digest_size=8).digest())
    return number


def _fails(work: Any) -> bool:
    """Whether a message has failed, or does in a moment."""
    try:
        work.wait(timedelta(seconds=0.1))
    except RuntimeError:
        return True
    return False


class Exchange:
    """Messages that are under way."""

    def __init__(
        self,
        peers: Peers,
        works: list[tuple[tuple[int, ...], Any]],
        results: dict[int, Tensor],
        buffers: Any,
        device: torch.device,
        content: str,
    ) -> None:
        self._peers, self._works, self._results = peers, works, results
        self._buffers = buffers  # which must live until the messages have arrived
        self._device, self._content = device, content

    def wait(self) -> dict[int, Tensor]:
        """What came from each rank, as flat tensors on the device. PeerError for ranks that do not answer."""
        works = iter(self._works)
        for ranks, work in works:
            try:
                work.wait()
            except RuntimeError as error:
                # A rank that has ended makes others raise this error, and end, too: so all that have are named.
                others = [rank for more, other in works if _fails(other) for rank in more]
                raise self._peers.error(tuple(dict.fromkeys((*ranks, *others))), self._content, error) from error
        self._buffers = None
        return {rank: flat.to(self._device) for rank, flat in self._results.items()}
