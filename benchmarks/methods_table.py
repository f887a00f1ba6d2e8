"""What every method of the demo reaches on a data set: keeps a run of ``python/train.py``, and says it in Markdown.

``python benchmarks/methods_table.py RUN/results.json ... --out benchmarks/results/methods-DATA.json`` keeps the part of
some runs' results that the documentation shows; the documentation's build makes a table of it, and says which runs they
were. Accuracy repeats to the last digit on one machine, times do not, so no time is kept.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

METRICS = {
    "overall": "overall",
    "balanced": "balanced",
    "many": "many-shot",
    "medium": "medium",
    "few": "few-shot",
    "prior_weighted": "prior weighted",
}


def keep(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The part of the runs' results that the table needs; who ran them where and with what stays with it.

    Raises:
        ValueError: runs of different data, seeds, machines or versions.
    """
    first, *others = [_kept(run) for run in runs]
    for other in others:
        for key in first.keys() - {"methods", "commands"}:
            if other[key] != first[key]:
                raise ValueError(f"expected runs with the same {key}, found {first[key]} and {other[key]}")
        first["methods"] |= other["methods"]
        first["commands"] += other["commands"]
    return first


def _kept(run: dict[str, Any]) -> dict[str, Any]:
    arguments, counts = run["arguments"], run["data"]["class_counts"]
    drawn = "" if arguments["sampler"] == "instance" else f", {arguments['sampler']} sampling"
    return {
        "data": {key: run["data"][key] for key in ("name", "task", "num_train", "num_classes", "evaluated_on")}
        | {"most": max(counts), "least": min(counts)},
        "cpu": run["machine"]["cpu"],
        "versions": run["versions"],
        "seeds": arguments["seeds"],
        "commands": [command(arguments)],
        "methods": {
            f"{name}{drawn}": {"title": f"{method['title']}{drawn}", "accuracy": method["accuracy"]}
            for name, method in run["methods"].items()
        },
    }


def command(arguments: dict[str, Any]) -> str:
    """The call of ``train.py`` that had these arguments."""
    drawn = "" if arguments["sampler"] == "instance" else f" --sampler {arguments['sampler']}"
    return (
        f"python python/train.py --data {arguments['data']} --seeds {arguments['seeds']}{drawn} "
        f"--method {' '.join(arguments['method'])}"
    )


def markdown(path: Path) -> str:
    """The table of a kept run: the best of each column is bold; mean and standard deviation over the seeds, in %."""
    kept = json.loads(path.read_text(encoding="utf-8"))
    data, versions = kept["data"], kept["versions"]
    accuracies = [method["accuracy"] for method in kept["methods"].values()]
    # None for a group without classes, of all methods.
    best = {metric: max((a[metric]["mean"] for a in accuracies), key=lambda mean: mean or 0.0) for metric in METRICS}
    lines = [
        f"| method | {' | '.join(METRICS.values())} |",
        "|---|" + "---:|" * len(METRICS),
        *(
            f"| {method['title']} | "
            + " | ".join(_cell(method["accuracy"][metric], best[metric]) for metric in METRICS)
            + " |"
            for method in kept["methods"].values()
        ),
    ]
    made_with = ", ".join(f"{name} {version}" for name, version in versions.items())
    return (
        f"{data['name']}: {data['task']}. {data['num_train']:,} training samples, {data['num_classes']:,} classes of "
        f"{data['least']} to {data['most']:,}. Accuracy on the {data['evaluated_on']} in %, mean ± standard deviation "
        f"over {kept['seeds']} seeds; the best of a column is bold.\n\n" + "\n".join(lines) + "\n\n"
        f"Measured on {kept['cpu']} ({made_with}) by\n\n" + "".join(f"* `{command}`\n" for command in kept["commands"])
    )


def _cell(accuracy: dict[str, float | None], best: float) -> str:
    mean, deviation = accuracy["mean"], accuracy["sd"]
    if mean is None:  # a group without classes
        return "-"
    text = f"{100 * mean:.1f}" if deviation is None else f"{100 * mean:.1f} ± {100 * deviation:.1f}"
    return f"**{text}**" if mean == best else text


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="results.json of a run of python/train.py")
    parser.add_argument("--out", type=Path, required=True, help="file to write")
    args = parser.parse_args(argv)
    try:
        kept = keep([json.loads(path.read_text(encoding="utf-8")) for path in args.results])
        args.out.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    except (OSError, ValueError, KeyError) as error:
        print(f"methods_table: {error!r}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
