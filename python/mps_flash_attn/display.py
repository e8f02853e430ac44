"""Prints tables and progress: with rich, or as plain lines where rich is not installed."""

import contextlib

try:
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Table
except ImportError:
    Console = None


def table(title, rows, header=None):
    """Prints a table. `rows`: sequences of cells."""
    rows = [[str(word) for word in row] for row in rows]
    if Console is None:
        lines = [header, *rows] if header else rows
        widths = [max(map(len, column)) for column in zip(*lines)]
        print(title)
        for line in lines:
            print("  ".join(word.ljust(width) for word, width in zip(line, widths)).rstrip())
        return
    drawn = Table(*(header or ()), title=escape(title), title_justify="left", show_header=header is not None)
    for row in rows:
        drawn.add_row(*map(escape, row))
    console = Console()
    if not console.is_terminal:
        console.width = 150  # a file has no width
    console.print(drawn)


@contextlib.contextmanager
def progress(total):
    """Yields a function that is called with a description before each of `total` steps."""
    if Console is None:
        count = iter(range(1, total + 1))
        yield lambda words: print(f"{next(count)}/{total} {words}", flush=True)
        return
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=total)
        begun = []

        def begin(words):
            bar.update(task, completed=len(begun), description=escape(words))
            begun.append(words)

        yield begin
        bar.update(task, completed=total, description="")
