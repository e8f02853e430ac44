"""What is made anew in a child after fork(). There the forking thread is alone: another that was inside a lock will
never leave it."""

import os
import threading


def call_in_child(function):
    """Has each child call `function` before anything else runs in it."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=function)


def new_lock(module, name):
    """A lock to be kept as `name` in the globals of a module, where each child has one that is free. A thread may take
    it again while it holds it, since the end of an object, which may call anything, comes at any time."""

    def renew():
        module[name] = threading.RLock()

    call_in_child(renew)
    return threading.RLock()
