"""Our attention beside PyTorch's, ONNX Runtime's, OpenVINO's, JAX's and ggml's, in turn in one process.

    python bench/versus_peers.py --json peers.json
    python bench/versus_peers.py --threads 1 "forward f32 b1 h8 q1024 kv1024 d64"

Needs the packages of requirements/peers.txt. A library that is not installed, or does not support a problem, has no
figure there, and the reason is printed. docs/measure.md describes the method.
"""

import sys

import report
from peers import PEERS
from versus_torch import BANDS, measure_all, options_of, parser_of


def rows():
    """[(problem, threads)]; None stands for as many threads as PyTorch uses."""
    long = [f"f32 b1 h8 q2048 kv2048 d{d}{band}" for d in (64, 128) for band in BANDS]
    problems = [f"forward {problem}" for problem in long]
    problems += [f"forward bf16{problem.removeprefix('f32')}" for problem in long]
    problems += [f"forward f16 b1 h8 q2048 kv2048 d64{band}" for band in BANDS]
    problems += [f"forward+backward f32 b1 h8 q2048 kv2048 d64{band}" for band in BANDS]
    problems += [f"forward f32 b1 h8 q{n} kv{n} d64{band}" for n in (128, 512) for band in BANDS]
    problems += ["forward f32 b1 h32/8 q1024 kv1024 d128 causal"]
    problems += [f"forward {dtype} b1 h32/8 q1 kv16384 d128" for dtype in ("f32", "f16", "bf16")]
    alone = [*problems[:2], *problems[4:6], problems[-3]]
    return [(problem, None) for problem in problems] + [(problem, 1) for problem in alone]


def main():
    parser = parser_of(__doc__, seconds=2.0)
    parser.add_argument("--threads", type=int, help="for the given problems; default: as PyTorch")
    options = options_of(parser)
    to_measure = [("peers", problem, options.threads) for problem in options.problems]
    to_measure = to_measure or [("peers", *row) for row in rows()]
    contenders = ("ours", "torch", *PEERS)
    return measure_all(to_measure, options, "milliseconds", report.PEER_COLUMNS, contenders=contenders)


if __name__ == "__main__":
    sys.exit(main())
