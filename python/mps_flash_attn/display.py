"""Prints tables and progress: with rich, or as plain text where rich is not installed."""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence

try:
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Table
except ImportError:
    Console = None  # type: ignore[assignment,misc] # a class otherwise


def table(title: str, rows: Iterable[Sequence[object]], header: Sequence[str] | None = None) -> None:
    """Prints a table. `rows`: sequences of cells."""
    words = [[str(word) for word in row] for row in rows]
    if Console is None:
        lines = [header, *words] if header else words
        widths = [max(map(len, column)) for column in zip(*lines)]
        print(title)
        for line in lines:
            print("  ".join(word.ljust(width) for word, width in zip(line, widths)).rstrip())
        return
    drawn = Table(*(header or ()), title=escape(title), title_justify="left", show_header=header is not None)
    for row in words:
        drawn.add_row(*map(escape, row))
    console = Console()
    if not console.is_terminal:
        console.width = 150  # a file has no width
    console.print(drawn)


@contextlib.contextmanager
def progress(total: int) -> Iterator[Callable[[str], None]]:
    """Yields a function that is called with a description before each of `total` steps. What it shows is on stderr, if
    that is a terminal."""
    begun: list[str] = []
    if Console is None:
        width = shutil.get_terminal_size().columns - 1

        def show(line: str) -> None:
            if sys.stderr.isatty():
                print(f"\r{line[:width]:{width}}\r", end="", file=sys.stderr, flush=True)

        def count(words: str) -> None:
            begun.append(words)
            show(f"{len(begun)}/{total} {words}")

        yield count
        show("")
        return
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=total)

        def begin(words: str) -> None:
            bar.update(task, completed=len(begun), description=escape(words))
            begun.append(words)

        yield begin
        bar.update(task, completed=total, description="")
