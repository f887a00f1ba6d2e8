"""What the demo tells at its end: two tables, a plot, a JSON file with everything, and one sentence."""

from __future__ import annotations

import itertools
import json
import math
import os
import platform
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from checkpoint import write_atomically
from longtail_data import LongTailData
from longtail_metrics import FEW_SHOT_BELOW, MANY_SHOT_ABOVE, METRICS
from longtail_plan import TITLES, trained_method
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.table import Table


def collect(data: LongTailData, results: Sequence[dict[str, Any]], methods: Sequence[str]) -> dict[str, Any]:
    """Everything about a call, ready for JSON: means and spread over seeds, timings, and every run as it came.

    Spread is the sample standard deviation over seeds, ``None`` for one seed.
    """
    first = results[0]
    runs_of = {
        method: [run for run in results if run["settings"]["method"] == trained_method(method)] for method in methods
    }
    return {
        "data": {
            "name": data.name,
            "task": data.task,
            "checksum": data.fingerprint(),
            "evaluated_on": "validation part" if first["settings"]["validate"] else "test part",
            "num_train": sum(first["class_counts"]),
            "num_classes": data.num_classes,
            "class_names": data.class_names,
            "class_counts": first["class_counts"],
        },
        "machine": {"cpu": _cpu_name(), "cores": os.cpu_count(), "system": platform.platform()},
        "versions": first["versions"],
        "backend": first["backend"],
        "methods": {
            method: {
                "title": TITLES[method],
                "accuracy": over_seeds([run["outcomes"][method] for run in runs]),
                "recall": np.mean([run["outcomes"][method]["recall"] for run in runs], axis=0).tolist(),
                "experts": [
                    over_seeds([run["outcomes"][method]["experts"][place] for run in runs])
                    for place in range(len(runs[0]["outcomes"][method].get("experts", [])))
                ],
                "time": None if method != trained_method(method) else _times(runs),
            }
            for method, runs in runs_of.items()
        },
        "runs": results,
    }


def over_seeds(seeds: Sequence[dict[str, Any]]) -> dict[str, dict[str, float | None]]:
    """Mean and spread of each metric over several seeds' figures, as ``longtail_metrics.summarize`` makes them."""
    values = {metric: [figures[metric] for figures in seeds] for metric in METRICS}
    return {
        metric: {"mean": float(np.mean(found)), "sd": float(np.std(found, ddof=1)) if len(found) > 1 else None}
        for metric, found in values.items()
    }


def _times(runs: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Medians and quartiles over the steps of all seeds, in seconds."""
    samples = {name: [t for run in runs for t in run["timings"][name]] for name in ("step", "loss", "plain_loss")}
    if not all(samples.values()):
        return None
    return {
        "batch_size": runs[0]["settings"]["batch_size"],
        **{
            name: dict(zip(("q1", "median", "q3"), np.percentile(t, [25, 50, 75]).tolist(), strict=True))
            for name, t in samples.items()
        },
        "ratio": statistics.median(samples["loss"]) / statistics.median(samples["plain_loss"]),
        "share_of_step": statistics.median(samples["loss"]) / statistics.median(samples["step"]),
        "measurements": len(samples["loss"]),
    }


def print_tables(console: Console, summary: dict[str, Any]) -> None:
    """Accuracy by method, then what the loss costs; both fit in 80 columns."""
    methods = summary["methods"].values()
    seeds = len({run["settings"]["seed"] for run in summary["runs"]})
    console.print(accuracy_table(methods, summary["data"]["evaluated_on"], seeds))

    experts = _table("Each expert alone", METRICS.values())
    for method in methods:
        for place, figures in enumerate(method["experts"], start=1):
            experts.add_row(f"{method['title']}, expert {place}", *(_cell(figures, metric) for metric in METRICS))
    if experts.row_count:
        console.print(experts)

    time = _table(
        f"Loss, forward and backward, in ms: medians, one thread, {summary['backend']} backend",
        ("N x C", "ltkernels", "plain PyTorch", "ratio", "whole step", "loss is"),
        caption="Plain PyTorch: as published code has it. Loss is: its share of the step.\n",
    )
    for method in methods:
        if timing := method["time"]:
            time.add_row(
                method["title"],
                f"{timing['batch_size']} x {summary['data']['num_classes']}",
                f"{1e3 * timing['loss']['median']:.3f}",
                f"{1e3 * timing['plain_loss']['median']:.3f}",
                f"{timing['ratio']:.2f}",
                f"{1e3 * timing['step']['median']:.2f}",
                f"{100 * timing['share_of_step']:.1f} %",
            )
    if time.row_count:
        console.print(time)


def accuracy_table(methods: Iterable[dict[str, Any]], evaluated_on: str, seeds: int) -> Table:
    """A row for each method, which has a title and its accuracy as of ``over_seeds``; the best of a column is bold."""
    spread = f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "one seed, so no spread"
    table = _table(
        f"Accuracy in % on the {evaluated_on}: {spread}",
        METRICS.values(),
        caption=f"Balanced: the mean over all classes. Many-shot, medium, few-shot: over classes with more than "
        f"{MANY_SHOT_ABOVE}, {FEW_SHOT_BELOW} to {MANY_SHOT_ABOVE}, fewer than {FEW_SHOT_BELOW} training samples. "
        "Prior weighted: over all, weighted by their training samples; what to expect where rare classes stay rare.\n",
    )
    methods = list(methods)
    best = {metric: max(_percent(method, metric) for method in methods) for metric in METRICS}
    for method in methods:
        table.add_row(method["title"], *(_cell(method["accuracy"], metric, best[metric]) for metric in METRICS))
    return table


def _table(title: str, columns: Iterable[str], caption: str | None = None) -> Table:
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        caption=caption,
        caption_justify="left",
        caption_style="",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    table.add_column("method", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _percent(method: dict[str, Any], metric: str) -> float:
    return 100 * float(method["accuracy"][metric]["mean"])


def _cell(accuracy: dict[str, Any], metric: str, best: float | None = None) -> str:
    mean, sd = 100 * float(accuracy[metric]["mean"]), accuracy[metric]["sd"]
    if math.isnan(mean):
        return "-"
    text = f"{mean:.1f}" if sd is None else f"{mean:.1f}±{100 * sd:.1f}"
    return f"[bold]{text}[/bold]" if mean == best else text


def conclusion(summary: dict[str, Any]) -> str:
    """One sentence: what the best trained loss gained and cost against CE, and what the kernels did."""
    methods = summary["methods"]
    trained = {name: method for name, method in methods.items() if name == trained_method(name)} or methods
    best_name = max(trained, key=lambda name: _percent(trained[name], "balanced"))
    best = trained[best_name]
    rank = f", the best in balanced accuracy of {len(trained)} losses," if len(trained) > 1 else ""
    if "ce" in methods and best_name != "ce":
        moved = [
            f"{title} from {_percent(methods['ce'], metric):.1f} to {_percent(best, metric):.1f} %"
            for metric, title in (
                ("balanced", "balanced accuracy"),
                ("few", "few-shot"),
                ("prior_weighted", "prior-weighted"),
            )
            if not math.isnan(_percent(best, metric))
        ]
        gain = f"{best['title']}{rank} moved {', '.join(moved[:-1])} and {moved[-1]} against cross entropy"
    else:
        gain = f"{best['title']}{rank} reached {_percent(best, 'balanced'):.1f} % balanced accuracy"
    timing = best["time"]
    if timing is None:
        return f"In short: {gain}."
    ours, plain, step = (1e3 * timing[name]["median"] for name in ("loss", "plain_loss", "step"))
    change = 100 * (plain - ours) / (step + plain - ours)
    return (
        f"In short: {gain}; its loss on {timing['batch_size']} x {summary['data']['num_classes']} logits took "
        f"{ours:.3f} ms with ltkernels ({summary['backend']} backend) and {plain:.3f} ms in plain PyTorch, a ratio of "
        f"{timing['ratio']:.2f}; the loss is {100 * timing['share_of_step']:.1f} % of a step of this small model, "
        f"which becomes {abs(change):.1f} % {'shorter' if change >= 0 else 'longer'} by that."
    )


def write_json(path: Path, summary: dict[str, Any]) -> None:
    """Writes ``summary``; NaN, which JSON does not have, becomes null."""
    text = json.dumps(_without_nan(summary), indent=1)
    write_atomically(path, lambda file: file.write(text.encode()))


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def draw_plot(path: Path, summary: dict[str, Any]) -> None:
    """Accuracy by class frequency, a line a method; a point is the mean recall of the classes of similar size."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    counts = np.array(summary["data"]["class_counts"])
    bins = _frequency_bins(counts)
    centres = [np.exp(np.log(counts[members]).mean()) for members in bins]
    figure, axes = plt.subplots(figsize=(10, 5.2), layout="constrained")
    for (name, method), marker in zip(summary["methods"].items(), itertools.cycle("osD^v<>"), strict=False):
        recall = np.array(method["recall"])
        line = [100 * np.nanmean(recall[members]) for members in bins]
        dashes = "-" if name == trained_method(name) else "--"
        axes.plot(centres, line, dashes, marker=marker, markersize=4, linewidth=1.4, label=method["title"])
    low, high = counts.min() * 0.85, counts.max() * 1.15
    for start, end, label in (
        (low, FEW_SHOT_BELOW, "few-shot"),
        (FEW_SHOT_BELOW, MANY_SHOT_ABOVE, "medium"),
        (MANY_SHOT_ABOVE, high, "many-shot"),
    ):
        if start < high and end > low:
            start, end = max(start, low), min(end, high)
            axes.axvspan(start, end, color="0.5", alpha=0.15 if label == "medium" else 0.0, linewidth=0)
            middle, transform = math.sqrt(start * end), axes.get_xaxis_transform()
            axes.text(middle, 0.985, label, transform=transform, ha="center", va="top", color="0.35")
    axes.set(xscale="log", xlim=(low, high), ylim=(0, 105))
    axes.set(xlabel="training samples of a class", ylabel="accuracy of the class (recall) in %")
    axes.set_title(f"{summary['data']['name']}: {summary['data']['task']}, {len(counts)} classes")
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    axes.grid(alpha=0.25)
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=130))
    plt.close(figure)


def _frequency_bins(counts: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Classes of similar size together: two bins from 20 to 100, and on both ways with their ratio, the root of 5."""
    steps = np.floor(2 * np.log(counts / FEW_SHOT_BELOW) / math.log(MANY_SHOT_ABOVE / FEW_SHOT_BELOW))
    return [np.flatnonzero(steps == step) for step in np.unique(steps)]


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
