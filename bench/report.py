"""The rows of versus_torch.py as tables and pictures.

    python bench/report.py rows.json                        a table in markdown, on the terminal
    python bench/report.py rows.json --png rows.png         a picture as well
    python bench/report.py rows.json --readme README.md     put the table between README.md's markers

Several files of rows may be given, of different machines too: each machine has a table of its own.
"""

import argparse
import json
import pathlib
import sys

from rich import box
from rich.markup import escape
from rich.table import Table

CONTENDERS = {"ours": "libmfa", "torch": "PyTorch SDPA", "math": "PyTorch SDPA, math path"}
COLOURS = {"ours": "#1f6f8b", "torch": "#e08a3c", "math": "#a8a8a8"}
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"


# --- Cells ---------------------------------------------------------------------------------------


def milliseconds(value):
    return "-" if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def times(value):
    return "-" if value is None else f"{value:.2f}" if value < 10 else f"{value:.0f}"


def mebibytes(value):
    return "-" if value is None else f"{value / 2**20:.1f}" if value < 10 * 2**20 else f"{value / 2**20:.0f}"


def share(row):
    """Of the peak; for a single query, which is bound by memory, of the read bandwidth."""
    if row.get("share_of_read") is not None:
        return f"{row['share_of_read']:.0%} of read"
    return "-" if row.get("share_of_peak") is None else f"{row['share_of_peak']:.0%}"


COLUMNS = {
    "ours ms": lambda row: milliseconds(row.get("ours_ms")),
    "torch ms": lambda row: milliseconds(row.get("torch_ms")),
    "math ms": lambda row: milliseconds(row.get("math_ms")),
    "torch / ours": lambda row: times(row.get("ratio_torch")),
    "math / ours": lambda row: times(row.get("ratio_math")),
    "of peak": share,
    "ours +MiB": lambda row: mebibytes(row.get("ours_extra_bytes")),
    "torch +MiB": lambda row: mebibytes(row.get("torch_extra_bytes")),
    "math +MiB": lambda row: mebibytes(row.get("math_extra_bytes")),
}


# --- Tables --------------------------------------------------------------------------------------


def line(row):
    """One row in words, for the terminal."""
    if "failed" in row:
        return f"[red]{row['problem']}: not timed: {escape(row['failed'])}[/red]"
    words = ", ".join(f"{title} {COLUMNS[title](row)}" for title in ("ours ms", "torch ms", "math ms"))
    return f"{row['problem']}: {words}"


def table(rows, title, name=lambda row: row["problem"]):
    """For the terminal; `name` is the text of the first column."""
    caption = (
        "of peak: useful operations, as a share of what this machine did just before and after, in f32 or,\n"
        "where the kernel does so, in dot products of bf16\n"
        "+MiB: peak memory beside operands and results, measured"
    )
    made = Table(title=title, caption=caption, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), caption_justify="left")
    made.add_column("", min_width=14)
    for column in COLUMNS:
        heading = column.replace(" ", "\n", 1)
        made.add_column(heading, justify="right", no_wrap=True, style="bold" if column == "torch / ours" else None)
    for row in rows:
        made.add_row(name(row), *(cell(row) for cell in COLUMNS.values()))
    return made


def by_machine(rows):
    """{"machine; versions; date": rows}"""
    groups = {}
    for row in rows:
        groups.setdefault(f"{row['machine']}; {row['versions']}; {row['date']}", []).append(row)
    return groups


def markdown(rows):
    parts = []
    for about, group in by_machine(rows).items():
        lines = [
            f"Measured on {about}.",
            "",
            "| problem | " + " | ".join(COLUMNS) + " |",
            "| --- |" + " ---: |" * len(COLUMNS),
        ]
        for row in group:
            lines.append(f"| `{row['problem']}` | " + " | ".join(cell(row) for cell in COLUMNS.values()) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def rewrite(path, text):
    """Puts the text between the markers of a file."""
    before, begin, rest = path.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f'{path} has no lines "{BEGIN}" and "{END}", in this order')
    path.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


# --- Pictures ------------------------------------------------------------------------------------


def panel(axes, rows, title):
    """An empty picture with a line for each row, the first on top."""
    axes.set_yticks(range(len(rows)), [row["problem"] for row in rows], fontsize=7)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)


def dots(axes, rows, field, scale=1.0):
    """On a logarithmic axis, a dot for each contender that was measured."""
    for contender, name in CONTENDERS.items():
        known = [(row[f"{contender}_{field}"], y) for y, row in enumerate(rows) if row[f"{contender}_{field}"]]
        axes.plot([x * scale for x, _ in known], [y for _, y in known], "o", color=COLOURS[contender], label=name)
    axes.set_xscale("log")


def plot(rows, path):
    """Time, share of the peak and memory of every row; a file for each machine beyond the first."""
    from matplotlib import pyplot

    for n, (about, group) in enumerate(by_machine(rows).items()):
        size = (15, 1.5 + 0.25 * len(group))
        figure, (time, peak, memory) = pyplot.subplots(1, 3, figsize=size, sharey=True, layout="constrained")
        panel(time, group, "milliseconds")
        dots(time, group, "ms")
        panel(peak, group, "libmfa, % of peak (one query: of read bandwidth)")
        shares = [100 * (row["share_of_peak"] or row["share_of_read"] or 0) for row in group]
        peak.barh(range(len(group)), shares, height=0.5, color=COLOURS["ours"])
        peak.set_xlim(0, 100)
        panel(memory, group, "peak extra memory, MiB")
        dots(memory, group, "extra_bytes", 2**-20)
        figure.legend(*time.get_legend_handles_labels(), loc="outside lower center", ncols=len(CONTENDERS), fontsize=8)
        figure.suptitle(about, fontsize=9)
        figure.savefig(path if n == 0 else path.with_stem(f"{path.stem}-{n + 1}"), dpi=120)
        pyplot.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="+", type=pathlib.Path, help="files written by versus_torch.py --json")
    parser.add_argument("--png", type=pathlib.Path, metavar="FILE", help="draw them")
    parser.add_argument("--readme", type=pathlib.Path, metavar="FILE", help="rewrite what is between its markers")
    options = parser.parse_args()
    rows = [row for file in options.rows for row in json.loads(file.read_text())]
    failed = [row["problem"] for row in rows if "failed" in row]
    if failed:
        raise SystemExit(f"these rows were wrong, and no table is made of them: {', '.join(failed)}")
    if options.png:
        plot(rows, options.png)
    if options.readme:
        rewrite(options.readme, markdown(rows))
    else:
        print(markdown(rows))


if __name__ == "__main__":
    sys.exit(main())
