"""Compares two runs of one benchmark: the ratios of PyTorch's time to ours, which hold on any machine.

    python bench/compare.py base.json changed.json [--least 0.9]

Of each problem that both runs have, the ratio of the changed run is divided by that of the base; below 1, the change
made ours slower relative to PyTorch. The exit status is 1 if the geometric mean is below --least.
"""

import argparse
import json
import pathlib
import statistics
import sys


def ratios(path):
    """{problem: PyTorch's time over ours}"""
    rows = json.loads(path.read_text())
    return {row["problem"]: row["ratio_torch"] for row in rows if row.get("ratio_torch")}


def compare(base, changed):
    """{problem: (ratio of the base, of the changed run, their quotient)}"""
    return {problem: (base[problem], new, new / base[problem]) for problem, new in changed.items() if problem in base}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=pathlib.Path, help="rows that a benchmark wrote by --json")
    parser.add_argument("changed", type=pathlib.Path, help="those of the same benchmark of the changed tree")
    parser.add_argument("--least", type=float, default=0.9, help="the least geometric mean; default %(default)s")
    options = parser.parse_args()
    found = compare(ratios(options.base), ratios(options.changed))
    if not found:
        sys.exit("the two runs have no problem in common that was timed beside PyTorch")
    print("| problem | torch / ours, base | changed | changed / base |\n| --- | ---: | ---: | ---: |")
    for problem, (old, new, quotient) in found.items():
        print(f"| `{problem}` | {old:.2f} | {new:.2f} | {quotient:.2f} |")
    mean = statistics.geometric_mean(quotient for *_, quotient in found.values())
    print(f"\nGeometric mean {mean:.3f}; at least {options.least} is needed.")
    sys.exit(0 if mean >= options.least else 1)


if __name__ == "__main__":
    main()
