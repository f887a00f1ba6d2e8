"""Writes the measured figures into README.md, each op's between two markers, from the result files.

``python benchmarks/readme_table.py`` rewrites the block; with ``--check`` it changes nothing and exits with 1 when the
block is not what the result file says.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ltkernels.bench import report

ROOT = Path(__file__).resolve().parents[1]
PARTS = {
    "cross_entropy": ("figures", "cpu.jsonl", ""),
    "row_cross_entropy": ("rows", "cpu-rows.jsonl", " --op row_cross_entropy"),
    "lade": ("lade", "cpu-lade.jsonl", " --op lade"),
    "distillation": ("distillation", "cpu-distillation.jsonl", " --op distillation"),
    "experts": ("experts", "cpu-experts.jsonl", " --op experts"),
    "expert_linear": ("expert-linear", "cpu-expert-linear.jsonl", " --op expert_linear"),
    "binary_cross_entropy": ("binary", "cpu-binary.jsonl", " --op binary_cross_entropy"),
    "sampling": ("sampling", "cpu-sampling.jsonl", " --op sampling"),
}
"""For each op: its markers in README.md, its result file and what chooses it on the command line."""


def with_figures(text: str, figures: str, name: str = "figures") -> str:
    """``text`` with ``figures`` between the markers of that name.

    Raises:
        ValueError: the two markers are not there exactly once, in order.
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"expected {begin} and then {end}, each once")
    head, rest = text.split(begin)
    _, tail = rest.split(end)
    return f"{head}{begin}\n{figures}{end}{tail}"


def figures(op: str, results: Path, writer: str = "python benchmarks/readme_table.py") -> str:
    """The figures of an op in Markdown, from its file in the folder ``results``; ``writer`` is who puts them there.

    Raises:
        OSError, ValueError: the file is not there, or holds no such records.
    """
    _, file, choice = PARTS[op]
    records = report.read_records(results / file)
    threads = ",".join(str(count) for count in sorted({record["threads"] for record in records}))
    command = f"ltkernels bench{choice} --threads {threads} --out benchmarks/results/{file}"
    return report.readme_figures(records, command, op, writer)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results", help="folder of the result files")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--check", action="store_true", help="compare only")
    args = parser.parse_args(argv)
    try:
        before = after = args.readme.read_text(encoding="utf-8")
        for op, (name, _, _) in PARTS.items():
            after = with_figures(after, figures(op, args.results), name)
    except (OSError, ValueError) as error:
        print(f"readme_table: {args.readme}: {error}", file=sys.stderr)
        return 1
    if before == after:
        return 0
    if args.check:
        print(f"readme_table: {args.readme} does not show {args.results}; run {parser.prog}", file=sys.stderr)
        return 1
    args.readme.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
