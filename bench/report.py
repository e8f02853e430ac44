"""Makes tables and pictures of the rows of versus_torch.py, versus_peers.py and relative.py.

    python bench/report.py bench.json peers.json relative.json              tables in markdown, on the terminal
    python bench/report.py bench.json --png rows.png                        a picture of all rows with PyTorch
    python bench/report.py peers.json --svg peers.svg                       a picture of libmfa among its peers
    python bench/report.py scaling.json --scaling scaling.svg               tables and a picture by numbers of threads
    python bench/report.py *.json --svg peers.svg --readme README.md --record docs/measure.md

The last puts the picture and README_ROWS between the markers of the README, and all rows between those of
docs/measure.md. Rows of different machines may be given: each machine has a table of its own.
"""

import argparse
import json
import os
import pathlib
import statistics
import sys

from rich import box
from rich.markup import escape
from rich.table import Table

CONTENDERS = {"ours": "libmfa", "torch": "PyTorch SDPA", "math": "PyTorch SDPA, math path"}
PEERS = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO", "jax": "JAX", "ggml": "ggml"}
DTYPES = ("f32", "f16", "bf16")
COLOURS = {
    "ours": "#1f6f8b",
    "torch": "#e08a3c",
    "math": "#a8a8a8",
    "onnxruntime": "#7a5195",
    "openvino": "#4c9f70",
    "jax": "#c0504d",
    "ggml": "#8c8c5a",
}
PICTURE = {"svg.fonttype": "none", "svg.hashsalt": "libmfa"}  # text stays text, and the same rows make the same file
README_ROWS = [f"{p} {dtype} b4 h8 q2048 kv2048 d64" for p in ("forward", "forward+backward") for dtype in DTYPES]
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"


# --- Cells ---------------------------------------------------------------------------------------


def milliseconds(value):
    return "-" if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def times(value):
    return "-" if value is None else f"{value:.2f}" if value < 10 else f"{value:.0f}"


def mebibytes(value):
    return "-" if value is None else f"{value / 2**20:.1f}" if value < 10 * 2**20 else f"{value / 2**20:.0f}"


def share_of_bound(row):
    """(the bound with the larger share: the peak, or for decode steps memory bandwidth; the share of it)"""
    known = {bound: row.get(f"share_of_{bound}") for bound in ("peak", "read")}
    return max(((bound, share) for bound, share in known.items() if share is not None), key=lambda one: one[1])


def share(row):
    if row.get("share_of_peak") is None:
        return "-"
    bound, value = share_of_bound(row)
    return f"{value:.0%} of read" if bound == "read" else f"{value:.0%}"


def others(row):
    """{contender: times that it takes as long as ours}"""
    known = {name: row.get(f"ratio_{name}") for name in ("torch", *PEERS)}
    return {name: ratio for name, ratio in known.items() if ratio is not None}


def of(cell, field):
    return lambda row: cell(row.get(field))


COLUMNS = {
    "ours ms": of(milliseconds, "ours_ms"),
    "torch ms": of(milliseconds, "torch_ms"),
    "math ms": of(milliseconds, "math_ms"),
    "torch / ours": of(times, "ratio_torch"),
    "math / ours": of(times, "ratio_math"),
    "of peak": share,
    "ours +MiB": of(mebibytes, "ours_extra_bytes"),
    "torch +MiB": of(mebibytes, "torch_extra_bytes"),
    "math +MiB": of(mebibytes, "math_extra_bytes"),
}
THREADS = {"threads": lambda row: str(row["threads"])}
MARKDOWN_COLUMNS = {name: cell for name, cell in COLUMNS.items() if name not in ("math ms", "math / ours")}
PEER_COLUMNS = {
    **THREADS,
    "ours ms": of(milliseconds, "ours_ms"),
    "torch ms": of(milliseconds, "torch_ms"),
    **{f"{name} ms": of(milliseconds, f"{name}_ms") for name in PEERS},
    "best / ours": lambda row: times(min(others(row).values(), default=None)),
    "of peak": share,
}


def goal(row):
    return "-" if row["goal"] is None else f"{row['goal']:.2f}"


def met(row):
    return "-" if row["goal"] is None else "yes" if row["value"] <= row["goal"] else "no"


def side(one):
    words = [one["text"]]
    words += ["a mask without order"] if one["scattered"] else []
    words += [f"{one['threads']} thread"] if one["threads"] else []
    return ", ".join(words)


RELATION_COLUMNS = {"cost": of(times, "value"), "goal": goal, "met": met}


# --- Tables --------------------------------------------------------------------------------------


def line(row, columns=COLUMNS):
    """One row in words, for the terminal."""
    if "failed" in row:
        return f"[red]{row['problem']}: not timed: {escape(row['failed'])}[/red]"
    words = [f"{title} {cell(row)}" for title, cell in columns.items() if "ms" in title.split()]
    words += [f"{name}: {reason}" for name, reason in row["absent"].items()]
    return f"{row['problem']}: {escape(', '.join(words))}"


def filled(title, caption, first, columns, rows):
    """For the terminal; `first` gives the text of the first column."""
    made = Table(title=title, caption=caption, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), caption_justify="left")
    made.add_column("", min_width=14)
    for column in columns:
        heading, is_ratio = column.replace(" ", "\n", 1), column in ("torch / ours", "best / ours")
        made.add_column(heading, justify="right", no_wrap=True, style="bold" if is_ratio else None)
    for row in rows:
        made.add_row(first(row), *(cell(row) for cell in columns.values()))
    return made


def table(rows, title, columns=COLUMNS, name=lambda row: row["problem"]):
    caption = (
        "of peak: useful operations, as a share of what this machine did just before and after, in f32 or,\n"
        "where the kernel does so, in dot products of bf16; of read: bytes of K and V, where that share is larger\n"
    )
    memory = "+MiB: peak memory beside operands and results, measured"
    return filled(title, caption + (memory if columns is COLUMNS else "-: see the reasons above"), name, columns, rows)


def table_of_relations(rows):
    caption = "cost: time for a unit of useful work, as a multiple of that of the plain problem"
    return filled("ours beside ours", caption, lambda row: row["relation"], RELATION_COLUMNS, rows)


def kind(row):
    """The kind of problem over which a mean is taken."""
    causal = " causal" if " causal" in row["problem"] else ""
    return f"{row['pass']} {row['dtype']}{causal}"


def means(rows):
    """[(contender, kind of problem, geometric mean of its time over ours, the least, how many)]"""
    found = {}
    for row in rows:
        for contender, ratio in others(row).items():
            found.setdefault((contender, kind(row)), []).append(ratio)
    return [(*key, statistics.geometric_mean(given), min(given), len(given)) for key, given in found.items()]


def summary(rows):
    made = Table(title="geometric means of their time over ours", box=box.SIMPLE_HEAD)
    for column in ("", "problems", "rows", "mean", "least"):
        made.add_column(column, justify="right" if column in ("rows", "mean", "least") else "left")
    for contender, which, mean, least, count in means(rows):
        made.add_row(contender, which, str(count), times(mean), times(least))
    return made


def by_machine(rows):
    """{"machine, threads; versions; date": rows}"""
    groups, titled = {}, {}
    for row in rows:
        groups.setdefault((row["machine"], row["versions"], row["date"]), []).append(row)
    for (machine, *rest), group in groups.items():
        threads = sorted({row["threads"] for row in group}, reverse=True)
        titled["; ".join((f"{machine}, {' and '.join(map(str, threads))} threads", *rest))] = group
    return titled


def markdown_table(heading, names, columns, rows):
    lines = [f"| {heading} | " + " | ".join(columns) + " |", "| --- |" + " ---: |" * len(columns)]
    for name, row in zip(names, rows, strict=True):
        lines.append(f"| {name} | " + " | ".join(cell(row) for cell in columns.values()) + " |")
    return "\n".join(lines)


def reasons(rows):
    """The reasons of empty cells, each once."""
    found = {(PEERS[name], reason): None for row in rows for name, reason in row["absent"].items()}
    return "".join(f"\n- {name}: {reason}" for name, reason in found)


def by_threads(rows):
    """{problem: {threads: (share of the bound, the bound, PyTorch's time over ours or None)}}: medians of all runs. The
    bound is that of the row with the fewest threads."""
    found = {}
    for row in rows:
        found.setdefault(row["problem"], {}).setdefault(row["threads"], []).append(row)
    medians = {}
    for problem, runs in found.items():
        bound, _ = share_of_bound(runs[min(runs)][0])
        for threads, measured in sorted(runs.items()):
            share = statistics.median(row[f"share_of_{bound}"] for row in measured)
            ratios = [row["ratio_torch"] for row in measured if row.get("ratio_torch") is not None]
            ratio = statistics.median(ratios) if ratios else None
            medians.setdefault(problem, {})[threads] = share, bound, ratio
    return medians


def markdown_scaling(rows):
    """Share of the bound, and in brackets PyTorch's time over ours, for each number of threads."""
    parts = []
    for about, group in by_machine(rows).items():
        medians, counts = by_threads(group), sorted({row["threads"] for row in group})
        lines = [
            "| problem | " + " | ".join(f"{n} threads" if n > 1 else "1 thread" for n in counts) + " |",
            "| --- |" + " ---: |" * len(counts),
        ]
        for problem, of_threads in medians.items():
            cells = []
            for n in counts:
                share, bound, ratio = of_threads.get(n, (None, None, None))
                words = "-" if share is None else f"{share:.0%}{' of read' if bound == 'read' else ''}"
                cells.append(words if ratio is None else f"{words} ({times(ratio)})")
            lines.append(f"| `{problem}` | " + " | ".join(cells) + " |")
        runs = len(group) // max(1, sum(map(len, medians.values())))
        said = "one run" if runs == 1 else f"medians of {runs} runs"
        parts += [f"Measured on {about}; {said}.", "\n".join(lines)]
    return "\n\n".join(parts)


def markdown_means(rows):
    lines = ["| problems | rows | mean | least |", "| --- | ---: | ---: | ---: |"]
    for contender, which, mean, least, count in means(rows):
        if contender == "torch":
            lines.append(f"| {which} | {count} | {times(mean)} | {times(least)} |")
    return "\n".join(lines)


def markdown(rows):
    """A table for each machine and kind of row."""
    parts = []
    for about, group in by_machine(rows).items():
        parts.append(f"Measured on {about}.")
        beside_torch = [row for row in group if row["group"] not in ("peers", "relations")]
        peers = [row for row in group if row["group"] == "peers"]
        relations = [row for row in group if row["group"] == "relations"]
        for chosen, columns in ((beside_torch, MARKDOWN_COLUMNS), (peers, PEER_COLUMNS)):
            if chosen:
                parts.append(markdown_table("problem", [f"`{row['problem']}`" for row in chosen], columns, chosen))
        if reasons(peers):
            parts.append(f"No figure, because:\n{reasons(peers)}")
        if beside_torch:
            parts.append("PyTorch's time over ours, geometric means and the least:")
            parts.append(markdown_means(beside_torch))
        if relations:
            names = [f"{row['relation']}: `{side(row['one'])}`" for row in relations]
            parts.append(markdown_table("relative cost", names, RELATION_COLUMNS, relations))
    return "\n\n".join(parts)


def markdown_readme(rows):
    """The README's table: README_ROWS alone."""
    parts = []
    for about, group in by_machine([row for row in rows if row.get("problem") in README_ROWS]).items():
        names = [f"`{row['problem']}`" for row in group]
        parts += [f"Measured on {about}.", markdown_table("problem", names, MARKDOWN_COLUMNS, group)]
    return "\n\n".join(parts)


def rewrite(path, text):
    """Puts the text between the markers of a file."""
    before, begin, rest = path.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f'{path} has no lines "{BEGIN}" and "{END}", in this order')
    path.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


# --- Pictures ------------------------------------------------------------------------------------


def panel(axes, labels, title):
    """An empty picture with a line for each row, the first on top."""
    axes.set_yticks(range(len(labels)), labels, fontsize=7)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_title(title, fontsize=10)
    axes.tick_params(axis="x", labelsize=8)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)


def dots(axes, rows, contenders, value):
    """A dot for each contender of each row for which there is a value(row, contender)."""
    for contender, name in contenders.items():
        known = [(value(row, contender), y) for y, row in enumerate(rows)]
        known = [(x, y) for x, y in known if x is not None]
        axes.plot([x for x, _ in known], [y for _, y in known], "o", color=COLOURS[contender], ms=5, mew=0, label=name)


def figure_of(title, rows, panels, width):
    """Panels side by side, each beside the same rows, with one legend."""
    from matplotlib import pyplot  # here, because measuring processes import this file and draw nothing

    size = (width, 1.6 + 0.22 * len(rows))
    figure, axes = pyplot.subplots(1, panels, figsize=size, sharey=True, layout="constrained")
    figure.suptitle(title, fontsize=8)
    return figure, axes


def save(figure, axes, path):
    from matplotlib import pyplot

    handles = axes.get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=len(handles[0]), fontsize=8)
    with pyplot.rc_context(PICTURE):
        figure.savefig(path, dpi=120, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)


def numbered(path, n):
    """The file itself for the first machine, one of its own for each further."""
    return path if n == 0 else path.with_stem(f"{path.stem}-{n + 1}")


def draw_rows(rows, path):
    """Time, share of the peak and memory of every row beside PyTorch."""
    for n, (about, group) in enumerate(by_machine(rows).items()):
        labels = [row["problem"] for row in group]
        figure, (time, peak, memory) = figure_of(about, group, 3, 15)
        panel(time, labels, "milliseconds")
        time.set_xscale("log")
        dots(time, group, CONTENDERS, lambda row, who: row.get(f"{who}_ms"))
        panel(peak, labels, "libmfa, % of peak (decode: or of read bandwidth)")
        peak.barh(range(len(group)), [100 * share_of_bound(row)[1] for row in group], height=0.5, color=COLOURS["ours"])
        peak.set_xlim(0, 100)
        panel(memory, labels, "peak extra memory, MiB")
        memory.set_xscale("log")
        dots(memory, group, CONTENDERS, lambda row, who: (row.get(f"{who}_extra_bytes") or 0) * 2**-20 or None)
        save(figure, time, numbered(path, n))


def draw_peers(rows, path):
    """Share of the peak and time of libmfa and its peers, for each row in which all threads were used."""

    def share_of(row, who):
        taken = row.get(f"{who}_ms")
        return None if taken is None else 100 * share_of_bound(row)[1] * row["ours_ms"] / taken

    def label(row):
        return f"{row['problem']}, % of read" if share_of_bound(row)[0] == "read" else row["problem"]

    contenders = {name: CONTENDERS[name] for name in ("ours", "torch")} | PEERS
    threads = max(row["threads"] for row in rows)
    for n, (about, group) in enumerate(by_machine([row for row in rows if row["threads"] == threads]).items()):
        figure, (peak, time) = figure_of(about, group, 2, 11)
        labels = [label(row) for row in group]
        panel(peak, labels, "% of this machine's peak")
        dots(peak, group, contenders, share_of)
        peak.set_xlim(0, 100)
        panel(time, labels, "milliseconds")
        time.set_xscale("log")
        time.minorticks_off()
        dots(time, group, contenders, lambda row, who: row.get(f"{who}_ms"))
        save(figure, time, numbered(path, n))


def draw_scaling(rows, path):
    """Share of the bound by number of threads, a line for each problem."""
    from matplotlib import pyplot

    for n, (about, group) in enumerate(by_machine(rows).items()):
        figure, axes = pyplot.subplots(figsize=(9, 5), layout="constrained")
        figure.suptitle(about, fontsize=8)
        for problem, of_threads in by_threads(group).items():
            bound = next(iter(of_threads.values()))[1]
            label = f"{problem}, % of read" if bound == "read" else problem
            axes.plot(list(of_threads), [100 * share for share, _, _ in of_threads.values()], "o-", ms=4, label=label)
        counts = sorted({row["threads"] for row in group})
        axes.set_xscale("log", base=2)
        axes.set_xticks(counts, map(str, counts))
        axes.set_xlabel("threads")
        axes.set_ylabel("% of the peak of as many threads")
        axes.set_ylim(0, 100)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside lower center", ncols=2, fontsize=7)
        with pyplot.rc_context(PICTURE):
            figure.savefig(numbered(path, n), dpi=120, metadata={"Date": None} if path.suffix == ".svg" else None)
        pyplot.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="+", type=pathlib.Path, help="files that the benchmarks wrote by --json")
    parser.add_argument("--png", type=pathlib.Path, metavar="FILE", help="draw the rows beside PyTorch")
    parser.add_argument("--svg", type=pathlib.Path, metavar="FILE", help="draw the rows beside all peers")
    parser.add_argument("--readme", type=pathlib.Path, metavar="FILE", help="rewrite its table, and its picture's link")
    parser.add_argument("--record", type=pathlib.Path, metavar="FILE", help="rewrite its tables of all rows")
    parser.add_argument("--scaling", type=pathlib.Path, metavar="FILE", help="draw shares by numbers of threads")
    options = parser.parse_args()
    rows = [row for file in options.rows for row in json.loads(file.read_text())]
    failed = [row.get("problem", row.get("relation")) for row in rows if "failed" in row]
    if failed:
        raise SystemExit(f"these rows were wrong, and no table is made of them: {', '.join(failed)}")
    peers = [row for row in rows if row["group"] == "peers"]
    if options.png:
        draw_rows([row for row in rows if row["group"] not in ("peers", "relations")], options.png)
    if options.svg:
        draw_peers(peers, options.svg)
    if options.readme:
        place = options.svg and os.path.relpath(options.svg, options.readme.parent)
        link = f"![libmfa beside its peers]({place})\n\n" if place else ""
        rewrite(options.readme, link + markdown_readme(rows))
    if options.record:
        rewrite(options.record, markdown(rows))
    if options.scaling:
        draw_scaling(rows, options.scaling)
        print(markdown_scaling(rows))
    if not (options.readme or options.record or options.scaling):
        print(markdown(rows))


if __name__ == "__main__":
    sys.exit(main())
