"""What functions return that put something of ours into another library."""

from __future__ import annotations

from collections.abc import Callable


def check_name(name: object) -> None:
    """Raises for what is no name to register."""
    if not isinstance(name, str):
        raise TypeError(f"name is {name!r}; it must be a string")
    if not name:
        raise ValueError('name is ""; it must not be empty')


class Registration:
    """It lasts until remove(), or until the end of its `with` block. Where a name is registered anew, remove() of the
    last registration takes it out, and that of the others does nothing."""

    def __init__(self, undo: Callable[[], object]) -> None:
        self._undo: Callable[[], object] | None = undo

    def remove(self) -> None:
        """Takes out what was registered. A second remove() does nothing."""
        undo, self._undo = self._undo, None
        if undo is not None:
            undo()

    def __enter__(self) -> Registration:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()
