"""Writes the measured figures into README.md, between two markers, from a result file.

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
BEGIN, END = "<!-- figures:begin -->", "<!-- figures:end -->"


def with_figures(text: str, figures: str) -> str:
    """``text`` with ``figures`` between the markers.

    Raises:
        ValueError: the two markers are not there exactly once, in order.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"expected {BEGIN} and then {END}, each once")
    head, rest = text.split(BEGIN)
    _, tail = rest.split(END)
    return f"{head}{BEGIN}\n{figures}{END}{tail}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=Path, default=ROOT / "benchmarks/results/cpu.jsonl")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--check", action="store_true", help="compare only")
    args = parser.parse_args(argv)
    try:
        records = report.read_records(args.records)
        threads = ",".join(str(count) for count in sorted({record["threads"] for record in records}))
        out = args.records.resolve()
        out = out.relative_to(ROOT) if out.is_relative_to(ROOT) else Path(out.name)
        figures = report.readme_figures(records, f"ltkernels bench --threads {threads} --out {out}")
        before = args.readme.read_text(encoding="utf-8")
        after = with_figures(before, figures)
    except (OSError, ValueError) as error:
        print(f"readme_table: {args.readme}: {error}", file=sys.stderr)
        return 1
    if before == after:
        return 0
    if args.check:
        print(f"readme_table: {args.readme} does not show {args.records}; run {parser.prog}", file=sys.stderr)
        return 1
    args.readme.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
