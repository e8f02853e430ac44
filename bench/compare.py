"""Compares runs of one benchmark before and after a change: the ratios of PyTorch's time to ours.

    python bench/compare.py changed.json base.json [base.json ...] [--least 0.9]

Of each problem that all runs have, the ratio of the changed run is divided by that of the base, the geometric mean if
there are several runs of it; below 1, the change made ours slower relative to PyTorch. The exit status is 1 if the
geometric mean over the problems is below --least.
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


def compare(changed, bases):
    """{problem: (ratio of the base, of the changed run, their quotient)}"""
    found = {}
    for problem, new in changed.items():
        if all(problem in base for base in bases):
            old = statistics.geometric_mean(base[problem] for base in bases)
            found[problem] = (old, new, new / old)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("changed", type=pathlib.Path, help="rows that a benchmark of the changed tree wrote by --json")
    parser.add_argument("bases", nargs="+", type=pathlib.Path, metavar="base", help="those of the tree before")
    parser.add_argument("--least", type=float, default=0.9, help="the least geometric mean; default %(default)s")
    options = parser.parse_args()
    found = compare(ratios(options.changed), [ratios(base) for base in options.bases])
    if not found:
        sys.exit("the runs have no problem in common that was timed beside PyTorch")
    print("| problem | torch / ours, base | changed | changed / base |\n| --- | ---: | ---: | ---: |")
    for problem, (old, new, quotient) in found.items():
        print(f"| `{problem}` | {old:.2f} | {new:.2f} | {quotient:.2f} |")
    mean = statistics.geometric_mean(quotient for *_, quotient in found.values())
    print(f"\nGeometric mean {mean:.3f}; at least {options.least} is needed.")
    sys.exit(0 if mean >= options.least else 1)


if __name__ == "__main__":
    main()
