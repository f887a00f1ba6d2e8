"""Writes the measured figures into documents: all of them into RESULTS.md, a summary into README.md between markers.

``python benchmarks/readme_table.py`` rewrites both; with ``--check`` it changes nothing and exits with 1 when one is
not what the result files say.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ltkernels.bench import figures as markdown
from ltkernels.bench import report

ROOT = Path(__file__).resolve().parents[1]


class Part(NamedTuple):
    """The figures of an op."""

    title: str
    file: str
    """In benchmarks/results."""
    choice: str = ""
    """What chooses the op on the command line."""


PARTS = {
    "cross_entropy": Part("Cross entropy and what is made of it", "cpu.jsonl"),
    "row_cross_entropy": Part(
        "Losses whose adjustments depend on the row", "cpu-rows.jsonl", " --op row_cross_entropy"
    ),
    "lade": Part("LADE, whose log-sum-exp runs down the columns too", "cpu-lade.jsonl", " --op lade"),
    "distillation": Part("Distillation towards a teacher", "cpu-distillation.jsonl", " --op distillation"),
    "experts": Part("Three experts at once", "cpu-experts.jsonl", " --op experts"),
    "expert_linear": Part(
        "Experts' linear classifiers and the mean of what they say", "cpu-expert-linear.jsonl", " --op expert_linear"
    ),
    "linear_cross_entropy": Part(
        "Classifier and loss in one", "cpu-linear.jsonl", " --op linear_cross_entropy --no-compile"
    ),
    "binary_cross_entropy": Part("The sigmoid family", "cpu-binary.jsonl", " --op binary_cross_entropy"),
    "accuracy_counts": Part("Right predictions of each class", "cpu-metrics.jsonl", " --op accuracy_counts"),
    "sampling": Part("Sampling", "cpu-sampling.jsonl", " --op sampling"),
    "crt": Part("A step of classifier re-training", "cpu-crt.jsonl", " --op crt --no-compile"),
}
SUMMARISED = tuple(op for op in PARTS if op in report.LOSSES)


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
    part = PARTS[op]
    records = report.read_records(results / part.file)
    threads = ",".join(str(count) for count in sorted({record["threads"] for record in records}))
    command = f"ltkernels bench{part.choice} --threads {threads} --out benchmarks/results/{part.file}"
    return markdown.table(records, command, op, writer)


def all_figures(results: Path) -> str:
    """RESULTS.md."""
    head = "# Results\n\nHow they are measured, and what the hardware allows, is in [NOTES.md](NOTES.md).\n"
    return "\n".join([head, *(f"## {part.title}\n\n{figures(op, results)}" for op, part in PARTS.items())])


def readme(text: str, results: Path) -> str:
    """README.md with the summary of all losses."""
    summary = markdown.summary({op: report.read_records(results / PARTS[op].file) for op in SUMMARISED})
    return with_figures(text, summary)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results", help="folder of the result files")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--all", type=Path, default=ROOT / "benchmarks/RESULTS.md", help="the file of all figures")
    parser.add_argument("--check", action="store_true", help="compare only")
    args = parser.parse_args(argv)
    try:
        before = args.readme.read_text(encoding="utf-8")
        documents = {args.readme: readme(before, args.results), args.all: all_figures(args.results)}
    except (OSError, ValueError) as error:
        print(f"readme_table: {args.readme}: {error}", file=sys.stderr)
        return 1
    for path, text in documents.items():
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue
        if args.check:
            print(f"readme_table: {path} does not show {args.results}; run {parser.prog}", file=sys.stderr)
            return 1
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
