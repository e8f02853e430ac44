"""Demonstrates libmfa in a few minutes: `make demo`.

First comes the usual table: time and peak memory of ours and of PyTorch, at B=4 H=8 N=2048 D=64. Then a small
GPT learns English from the documentation that every Python carries, once on PyTorch's attention and once on ours, from
the same start. Last an encoder of torch.nn reads longer and longer sequences, before and after replace_sdpa(). All end
up in demo.png. The exit status is 1 if anything that we computed was wrong. On a Mac all of it runs on the GPU.
"""

import contextlib
import copy
import math
import pathlib
import re
import statistics
import sys
import time
from collections import Counter
from pydoc_data import topics

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import nn

import report
from measure import machine, measure, settle, versions
from mps_flash_attn import is_available, replace_sdpa, replaced_sdpa, sdpa_stats
from versus_torch import users_table

DEVICE = "mps" if is_available("mps") else "cpu"
SECONDS_PER_ROW = 1.5
SEED, STEPS, BATCH, LENGTH = 1, 160, 2, 1024
LAYERS, HEADS, HEAD_DIM, VOCABULARY = 4, 3, 64, 1024
TRAINING_SECONDS = 100  # a slow machine stops before the last step
TURN = 5  # steps that one model trains before it is the other's turn: so both meet the same conditions
RATE, WARM_UP = 1e-3, 40
SAMPLE_TOKENS = 120
ENCODER_WIDTH, ENCODER_HEADS, ENCODER_LAYERS = 256, 4, 4
ENCODER_LENGTHS, ENCODER_ROUNDS = (512, 1024, 2048, 4096), 3
ENCODER_APART = 1e-4
# Two roundings of the same computation drift apart while training; this far is drift, farther is a mistake.
DRIFT_AT_FIRST, DRIFT = 1e-4, 0.1
PICTURE = pathlib.Path("demo.png")
NAMES = {"torch": "PyTorch's attention", "ours": "after replace_sdpa()"}


# --- The text ------------------------------------------------------------------------------------


class Text:
    """Python's language reference as numbers: the commonest words, and every character for what is left."""

    def __init__(self):
        text = "\n".join(topics.topics.values())
        text = re.sub(r"([^\w\s])\1{3,}|[ \t]{2,}", lambda run: run.group()[0], text)  # rules and tables are no English
        words = re.findall(r" ?\w+|\s|[^\w\s]", text)
        characters = sorted(set(text))
        common = [word for word, _ in Counter(words).most_common(VOCABULARY) if len(word) > 1]
        self.words = (characters + common)[:VOCABULARY]
        number = {word: n for n, word in enumerate(self.words)}
        pieces = (piece for word in words for piece in ([word] if word in number else word))
        self.tokens = torch.tensor([number[piece] for piece in pieces])
        self.start = number["The"]

    def batch(self, step):
        """The same for both models."""
        generator = torch.Generator().manual_seed(SEED + step)
        begins = torch.randint(len(self.tokens) - LENGTH, (BATCH,), generator=generator)
        rows = torch.stack([self.tokens[begin : begin + LENGTH + 1] for begin in begins]).to(DEVICE)
        return rows[:, :-1], rows[:, 1:]


# --- The model -----------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.before_attention, self.before_network = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.network = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x):
        batch, length, width = x.shape
        qkv = self.qkv(self.before_attention(x)).view(batch, length, 3, HEADS, HEAD_DIM)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(o.transpose(1, 2).reshape(batch, length, width))
        return x + self.network(self.before_network(x))


class GPT(nn.Module):
    """An ordinary GPT, without any code of libmfa."""

    def __init__(self):
        super().__init__()
        width = HEADS * HEAD_DIM
        self.words, self.places = nn.Embedding(VOCABULARY, width), nn.Embedding(LENGTH, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(LAYERS)))
        self.last = nn.LayerNorm(width)
        for embedding in (self.words, self.places):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, tokens):
        x = self.words(tokens) + self.places.weight[: tokens.shape[1]]
        return self.last(self.blocks(x)) @ self.words.weight.T


class Training:
    """The training of one model: its losses and the seconds of its steps."""

    def __init__(self, model, text):
        self.model, self.text = model, text
        self.optimiser = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95))
        self.losses, self.seconds = [], []

    def step(self):
        begin, step = time.perf_counter(), len(self.losses)
        inputs, targets = self.text.batch(step)
        past = min(1.0, (step + 1) / WARM_UP)
        self.optimiser.param_groups[0]["lr"] = RATE * past * (0.55 + 0.45 * math.cos(math.pi * step / STEPS))
        loss = F.cross_entropy(self.model(inputs).flatten(0, 1), targets.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimiser.step()
        self.optimiser.zero_grad()
        self.losses.append(loss.item())
        self.seconds.append(time.perf_counter() - begin)


@torch.inference_mode()
def sample(model, text):
    generator = torch.Generator().manual_seed(SEED)
    tokens = torch.tensor([[text.start]])
    for _ in range(SAMPLE_TOKENS):
        likely = torch.softmax(model(tokens.to(DEVICE))[0, -1].cpu() / 0.7, dim=0)
        tokens = torch.cat([tokens, torch.multinomial(likely, 1, generator=generator)[None]], dim=1)
    return "".join(text.words[token] for token in tokens[0]).strip()


# --- The three parts -----------------------------------------------------------------------------


def bar(console):
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, TextColumn("{task.fields[note]}"), console=console)


def short(row):
    return row["dtype"] + (" causal" if row["problem"].endswith("causal") else "")


def compare(console):
    """The table; returns its rows."""
    problems, rows = users_table(), []
    with bar(console) as progress:
        task = progress.add_task("measuring", total=len(problems), note="")
        for problem in problems:
            progress.update(task, note=problem)
            rows.append(measure(problem, SECONDS_PER_ROW, SEED, DEVICE))
            if "failed" in rows[-1]:
                console.print(report.line(rows[-1]))
            progress.advance(task)
    for passes in ("forward", "forward+backward"):
        part = [row for row in rows if row["pass"] == passes]
        console.print(report.table(part, f"{passes}, B=4 H=8 N=2048 D=64", name=short))
    return rows


def train(console, text):
    """Trains both models, turn by turn; returns {"torch": Training, "ours": Training}, and how many of the second
    model's calls ran on libmfa, and why others did not."""
    torch.manual_seed(SEED)
    model = GPT().to(DEVICE)
    trainings = {"torch": Training(model, text), "ours": Training(copy.deepcopy(model), text)}
    sdpa_stats(reset=True)
    begin = time.perf_counter()
    with bar(console) as progress:
        tasks = {who: progress.add_task(f"{name:22}", total=STEPS, note="") for who, name in NAMES.items()}
        while len(trainings["ours"].losses) < STEPS and time.perf_counter() - begin < TRAINING_SECONDS:
            for who, training in trainings.items():
                handle = replace_sdpa() if who == "ours" else None
                for _ in range(TURN):
                    training.step()
                    note = f"loss {training.losses[-1]:.3f}, {1e3 * training.seconds[-1]:.0f} ms a step"
                    progress.update(tasks[who], advance=1, note=note)
                if handle:
                    handle.remove()
    return trainings, sdpa_stats()


def losses(trainings):
    table = Table(title="losses side by side", box=report.box.SIMPLE_HEAD)
    for title in ("step", *NAMES.values(), "difference"):
        table.add_column(title, justify="right")
    for step in [0, *range(19, len(trainings["ours"].losses), 20)]:
        theirs, ours = (training.losses[step] for training in trainings.values())
        table.add_row(str(step + 1), f"{theirs:.5f}", f"{ours:.5f}", f"{abs(ours - theirs):.1e}")
    theirs, ours = (1e3 * statistics.median(training.seconds) for training in trainings.values())
    table.add_section()
    table.add_row("ms a step", f"{theirs:.0f}", f"{ours:.0f}", f"{theirs / ours:.2f} times as fast")
    return table


def read(console):
    """Lets an encoder of torch.nn read; returns ({length: {"torch": seconds, "ours": seconds}}, how far the
    results are apart, how the second's calls went)."""
    torch.manual_seed(SEED)
    layer = nn.TransformerEncoderLayer(ENCODER_WIDTH, ENCODER_HEADS, 2 * ENCODER_WIDTH, batch_first=True)
    model = nn.TransformerEncoder(layer, ENCODER_LAYERS, enable_nested_tensor=False).eval().to(DEVICE)
    medians, apart = {}, 0.0
    sdpa_stats(reset=True)
    for length in ENCODER_LENGTHS:
        x, seconds, results = torch.randn(1, length, ENCODER_WIDTH).to(DEVICE), {who: [] for who in NAMES}, {}
        for _ in range(ENCODER_ROUNDS):
            for who in NAMES:
                with torch.inference_mode(), replaced_sdpa() if who == "ours" else contextlib.nullcontext():
                    begin = time.perf_counter()
                    results[who] = model(x)
                    settle(DEVICE)
                    seconds[who].append(time.perf_counter() - begin)
        medians[length] = {who: statistics.median(times) for who, times in seconds.items()}
        apart = max(apart, (results["ours"] - results["torch"]).abs().max().item())
    table = Table(title="milliseconds to read a sequence", box=report.box.SIMPLE_HEAD)
    for title in ("length", *NAMES.values(), "times as fast"):
        table.add_column(title, justify="right")
    for length, times in medians.items():
        theirs, ours = (1e3 * times[who] for who in NAMES)
        table.add_row(str(length), f"{theirs:.0f}", f"{ours:.0f}", f"{theirs / ours:.2f}")
    console.print(table)
    return medians, apart, sdpa_stats()


def draw(rows, trainings, readings):
    """All parts in one picture."""
    from matplotlib import pyplot  # here, because the measuring processes import this file and draw nothing

    figure, panels = pyplot.subplots(2, 3, figsize=(19, 9), layout="constrained")
    forward = [row for row in rows if row["pass"] == "forward"]
    both = [row for row in rows if row["pass"] != "forward"]
    for axes, part, field, title, scale in (
        (panels[0, 0], forward, "ms", "forward, milliseconds", 1),
        (panels[0, 1], both, "ms", "forward + backward, milliseconds", 1),
        (panels[1, 0], forward, "extra_bytes", "forward, peak extra memory in MiB", 2**-20),
        (panels[1, 1], both, "extra_bytes", "forward + backward, peak extra memory in MiB", 2**-20),
    ):
        axes.set_title(title)
        axes.set_xticks(range(len(part)), [short(row) for row in part])
        for n, (contender, name) in enumerate(report.CONTENDERS.items()):
            heights = [scale * (row.get(f"{contender}_{field}") or 0) for row in part]
            places = [x + 0.27 * (n - 1) for x in range(len(part))]
            drawn = axes.bar(places, heights, width=0.25, color=report.COLOURS[contender], label=name)
            axes.bar_label(drawn, [f"{height:.0f}" for height in heights], fontsize=7)
    panels[0, 0].legend()
    for who, name in NAMES.items():
        milliseconds = [1e3 * times[who] for times in readings.values()]
        panels[0, 2].plot(list(readings), milliseconds, "o-", color=report.COLOURS[who], label=name)
    panels[0, 2].set_title("nn.TransformerEncoder, milliseconds by sequence length")
    panels[0, 2].set_xticks(list(readings))
    panels[0, 2].set_ylim(bottom=0)
    panels[0, 2].legend()
    curves = panels[1, 2]
    for (who, name), style in zip(NAMES.items(), ({"linewidth": 4, "alpha": 0.6}, {"linewidth": 1.2}), strict=True):
        curves.plot(trainings[who].losses, color=report.COLOURS[who], label=name, **style)
    curves.set_title(f"a small GPT, sequence length {LENGTH}")
    curves.set_xlabel("step")
    curves.set_ylabel("loss")
    curves.legend()
    for axes in panels.flat:
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"B=4 H=8 N=2048 D=64; {machine(DEVICE)}; {versions()}", fontsize=9)
    figure.savefig(PICTURE, dpi=110)


def main():
    console, begin, mistakes = Console(), time.perf_counter(), []
    if not console.is_terminal:
        console.width = 120
    console.print(f"{machine(DEVICE)}; {versions()}")

    console.rule("1. Attention beside PyTorch's", align="left")
    console.print(
        "12 problems, each in a process of its own. Each result is compared with a reference in double before it is "
        "timed. ours: libmfa; torch: F.scaled_dot_product_attention as it comes; math: PyTorch's unfused math path.\n"
    )
    rows = compare(console)
    mistakes += [f"{row['problem']}: {row['failed']}" for row in rows if "failed" in row]

    console.rule("2. A GPT learns English", align="left")
    text = Text()
    console.print(
        f"{len(text.tokens)} tokens of Python's own documentation; {LAYERS} layers, {HEADS} heads of {HEAD_DIM}, "
        f"sequences of {LENGTH}. Two models from one seed on the same batches, {TURN} steps in turn: one on PyTorch's "
        f"attention, one after replace_sdpa().\n"
    )
    trainings, calls = train(console, text)
    console.print(losses(trainings))
    apart = [abs(a - b) for a, b in zip(*(training.losses for training in trainings.values()), strict=True)]
    console.print(f"Largest difference: {max(apart):.1e}; in the first {WARM_UP} steps {max(apart[:WARM_UP]):.1e}.\n")
    if not (max(apart[:WARM_UP]) <= DRIFT_AT_FIRST and max(apart) <= DRIFT):
        mistakes.append(f"the losses differ by more than {DRIFT_AT_FIRST} at first, or {DRIFT} later")
    expected = len(apart) * LAYERS
    if calls != {"replaced": expected}:
        mistakes.append(f"of the second model's {expected} calls not all ran on libmfa: {calls}")
    with replace_sdpa():
        written = sample(trainings["ours"].model, text)
    console.print(Panel(escape(written), title="what the second model writes", title_align="left"))

    console.rule("3. One line under a model of torch.nn", align="left")
    console.print(
        f"nn.TransformerEncoder, {ENCODER_LAYERS} layers, {ENCODER_HEADS} heads of {ENCODER_WIDTH // ENCODER_HEADS}, "
        f"in evaluation: as it comes, and after replace_sdpa(), in turn.\n"
    )
    readings, apart, calls = read(console)
    console.print(f"Largest difference of the results: {apart:.1e}.\n")
    if not apart <= ENCODER_APART:
        mistakes.append(f"the encoder's results differ by more than {ENCODER_APART}")
    expected = len(ENCODER_LENGTHS) * ENCODER_ROUNDS * ENCODER_LAYERS
    if calls != {"replaced": expected}:
        mistakes.append(f"of the encoder's {expected} calls not all ran on libmfa: {calls}")

    draw(rows, trainings, readings)
    console.print(f"The picture is in {PICTURE.resolve()}. All of it took {time.perf_counter() - begin:.0f} seconds.")
    for mistake in mistakes:
        console.print(f"[red]WRONG: {escape(mistake)}[/red]")
    return 1 if mistakes else 0


if __name__ == "__main__":
    sys.exit(main())
