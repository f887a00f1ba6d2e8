"""What every method of the demo reaches on a data set: keeps a run of ``python/train.py``, and says it in Markdown.

``python benchmarks/methods_table.py RUN/results.json benchmarks/results/methods-DATA.json`` keeps the part of a run's
results that the documentation shows (docs/methods.md says which run); the documentation's build makes the table of it.
Accuracy repeats to the last digit on one machine, times do not, so no time is kept.
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


def keep(results: dict[str, Any]) -> dict[str, Any]:
    """The part of a run's results that the table needs; who ran it where and with what stays with it."""
    arguments = results["arguments"]
    counts = results["data"]["class_counts"]
    return {
        "data": {key: results["data"][key] for key in ("name", "task", "num_train", "num_classes", "evaluated_on")}
        | {"most": max(counts), "least": min(counts)},
        "cpu": results["machine"]["cpu"],
        "versions": results["versions"],
        "seeds": arguments["seeds"],
        "command": command(arguments),
        "methods": {
            name: {"title": method["title"], "accuracy": method["accuracy"]}
            for name, method in results["methods"].items()
        },
    }


def command(arguments: dict[str, Any]) -> str:
    """The call of ``train.py`` that had these arguments."""
    return (
        f"python python/train.py --data {arguments['data']} --seeds {arguments['seeds']} "
        f"--method {' '.join(arguments['method'])}"
    )


def markdown(path: Path) -> str:
    """The table of a kept run: the best of each column is bold; mean and standard deviation over the seeds, in %."""
    kept = json.loads(path.read_text(encoding="utf-8"))
    data, versions = kept["data"], kept["versions"]
    best = {
        metric: max(method["accuracy"][metric]["mean"] for method in kept["methods"].values()) for metric in METRICS
    }
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
        f"Printed by `{kept['command']}` on {kept['cpu']} ({made_with}).\n"
    )


def _cell(accuracy: dict[str, float | None], best: float) -> str:
    mean, deviation = accuracy["mean"], accuracy["sd"]
    if mean is None:  # a group without classes
        return "-"
    text = f"{100 * mean:.1f}" if deviation is None else f"{100 * mean:.1f} ± {100 * deviation:.1f}"
    return f"**{text}**" if mean == best else text


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="results.json of a run of python/train.py")
    parser.add_argument("kept", type=Path, help="file to write")
    args = parser.parse_args(argv)
    try:
        kept = keep(json.loads(args.results.read_text(encoding="utf-8")))
        args.kept.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    except (OSError, ValueError, KeyError) as error:
        print(f"methods_table: {args.results}: {error!r}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
