"""Resets state in a child after fork(), where only the forking thread exists: a lock that another thread held would
never be released."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any


def call_in_child(function: Callable[[], object]) -> None:
    """Calls `function` in each child before anything else runs there."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=function)


def new_lock(module: dict[str, Any], name: str) -> AbstractContextManager[Any]:
    """A lock for the global `name` of `module`, the globals of a module. Each child gets a new one. It is reentrant,
    since a finalizer may run at any time in a thread that holds the lock, and take it again."""

    def renew() -> None:
        module[name] = threading.RLock()

    call_in_child(renew)
    return threading.RLock()
