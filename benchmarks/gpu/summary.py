"""What a run says: plain tables, the winners to paste, and a plot. Only the plot needs a package, matplotlib."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.figures import judge
from benchmarks.gpu.table import COPY, OURS
from ltkernels.bench import peers, report

Record = Mapping[str, Any]

COLUMNS = (f"{OURS}cuda", f"{OURS}triton", peers.EAGER, peers.COMPILE, "liger", COPY)
SMALL = 4_000_000  # logits: below, the time of a call is that of the host


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as they need to be; the first stands left, the others right."""
    if not rows:
        return f"{title}: nothing measured\n"
    widths = [max(len(row[place]) for row in (header, *rows)) for place in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        aligned = [cell.rjust(width) for cell, width in zip(cells, widths, strict=True)]
        return "  ".join((cells[0].ljust(widths[0]), *aligned[1:])).rstrip()

    return "\n".join((title, line(header), "  ".join("-" * width for width in widths), *map(line, rows))) + "\n"


def machine(records: Sequence[Record]) -> str:
    first = records[0]
    dry = "DRY RUN ON THE CPU, TIMES MEAN NOTHING: " if first.get("dry_run") else ""
    name = first.get("gpu") or first["cpu"]
    versions = ", ".join(
        f"{what} {first[what]}" for what in ("torch", "triton", "cuda", "ltkernels") if first.get(what)
    )
    return f"{dry}{name}, copy {first['copy_gbs']:.0f} GB/s, {versions}, at {first['git']}, {first['utc'][:10]}"


def _cases(records: Sequence[Record], mode: str) -> dict[tuple[str, ...], dict[str, Record]]:
    """Records of a mode by case and form, in order of appearance."""
    cases: dict[tuple[str, ...], dict[str, Record]] = {}
    for record in records:
        if record["mode"] == mode:
            key = (record["op"], record["dtype"], record["scenario"], record["variant"])
            cases.setdefault(key, {})[record["peer"]] = record
    return cases


def _columns(records: Sequence[Record]) -> list[str]:
    found = {record["peer"] for record in records}
    return [name for name in COLUMNS if name in found] + sorted(found - set(COLUMNS))


def times(records: Sequence[Record], mode: str) -> str:
    """Median time of every form in every case; for kernel times also the fraction of the copy bandwidth."""
    columns = _columns(records)
    rows = []
    for (_, dtype, scenario, variant), forms in _cases(records, mode).items():
        cells = []
        for name in columns:
            record = forms.get(name)
            fraction = None if record is None else record["frac_copy"]
            shown = "-" if record is None else report.duration(record["p50_us"])
            cells.append(shown + (f" {fraction:>4.0%}" if fraction is not None else ""))
        rows.append((f"{scenario} {variant} {dtype}", *cells))
    return table(f"{mode}: median time, fraction of copy bandwidth", ("case", *columns), rows)


def launches(records: Sequence[Record]) -> str:
    """Launches, waits for the device and peak memory beside the gradient, per variant, on its first batch."""
    rows, seen = [], set()
    for (_, dtype, scenario, variant), forms in _cases(records, "host").items():
        if (variant, dtype) in seen:
            continue
        seen.add((variant, dtype))
        for name, record in forms.items():
            show = ["-" if record[what] is None else str(record[what]) for what in ("launches", "syncs")]
            peak = "-" if record["peak_mb"] is None else f"{record['peak_mb']:.2f}"
            error = "-" if record["rel_err_grad"] is None else f"{record['rel_err_grad']:.1e}"
            rows.append((f"{variant} {dtype} {scenario} {name}", *show, peak, error))
    return table("one call, forward and backward", ("form", "launches", "waits", "peak MB", "grad error"), rows)


def figures(records: Sequence[Record]) -> str:
    rows = [
        (f"{line.what}, {line.case}", line.backend, f"{line.found:.3f}", line.bound, line.verdict)
        for line in judge(records)
    ]
    return table("figures of the issue", ("figure", "backend", "found", "bound", "verdict"), rows)


def everything(records: Sequence[Record]) -> str:
    modes = dict.fromkeys(record["mode"] for record in records)
    return "\n".join(
        (machine(records), "", *(times(records, mode) for mode in modes), launches(records), figures(records))
    )


# --- The winners ---


def winners(records: Sequence[Record]) -> str:
    """The faster of our backends by op, type and number of classes, as Python to paste.

    For batches of a few megabytes a whole call decides, host included, beyond that the kernels. Where neighbouring
    class counts have the same winner they become one range; between two winners it ends in their geometric middle.
    """
    lines = [f"# {machine(records)}", "# (op, type, size): up to this many classes, this backend"]
    for size, mode in (("small", "host"), ("large", "kernel")):
        chosen = [r for r in records if r["mode"] == mode and (r["N"] * r["C"] < SMALL) == (size == "small")]
        for (op, dtype), by_classes in _ratios(chosen).items():
            ranges = ", ".join(f"({limit}, {name!r})" for limit, name in _ranges(by_classes))
            lines.append(f"({op!r}, {dtype!r}, {size!r}): ({ranges},),")
            lines += [f"#   C={c}: cuda takes {ratio:.3f} of triton's time" for c, ratio in sorted(by_classes.items())]
    return "\n".join(lines) + "\n"


def _ratios(records: Sequence[Record]) -> dict[tuple[str, str], dict[int, float]]:
    """cuda's time over triton's, the median over losses and batches with the same number of classes."""
    found: dict[tuple[str, str], dict[int, list[float]]] = {}
    for record in records:
        if record["peer"] == f"{OURS}cuda" and (ratio := record["ratio"].get(f"{OURS}triton")) is not None:
            found.setdefault((record["op"], record["dtype"]), {}).setdefault(record["C"], []).append(ratio)
    return {key: {c: statistics.median(r) for c, r in by_c.items()} for key, by_c in found.items()}


def _ranges(by_classes: Mapping[int, float]) -> Iterator[tuple[int | None, str]]:
    places = [(c, "cuda" if ratio <= 1 else "triton") for c, ratio in sorted(by_classes.items())]
    for (c, name), (following, other) in zip(places, places[1:], strict=False):
        if name != other:
            yield math.isqrt(c * following), name
    if places:
        yield None, places[-1][1]


# --- The plot ---

COLOURS = dict(zip(COLUMNS, ("tab:red", "tab:orange", "tab:blue", "tab:green", "tab:purple", "tab:gray"), strict=True))


def plot(records: Sequence[Record], path: Path) -> None:
    """Above the fraction of the copy bandwidth by number of classes, below the time of a call on small batches.

    For ops on logits: nothing is drawn of others.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    records = [record for record in records if record["op"] == "cross_entropy"]
    if not records:
        return
    variants = list(dict.fromkeys(record["variant"] for record in records))
    wide = [(v, d) for d in dict.fromkeys(r["dtype"] for r in records) for v in variants]
    figure, axes = plt.subplots(2, len(wide), figsize=(4 * len(wide), 8), squeeze=False, sharey="row")
    for place, (variant, dtype) in enumerate(wide):
        here = [r for r in records if (r["variant"], r["dtype"]) == (variant, dtype)]
        large = [r for r in here if r["mode"] == "kernel" and r["frac_copy"] is not None]
        large = [r for r in large if r["N"] * r["C"] >= SMALL or r.get("dry_run")]
        small = [r for r in here if r["mode"] == "host" and (r["N"] * r["C"] < SMALL)]
        upper, lower = axes[0][place], axes[1][place]
        for name in _columns(here):
            style = {"label": name.removeprefix(OURS), "color": COLOURS.get(name)}
            points = sorted((r["C"], r["frac_copy"]) for r in large if r["peer"] == name)
            if points:
                upper.plot(*zip(*points, strict=True), "o-", **style)
            points = sorted((r["N"] * r["C"], r["p50_us"]) for r in small if r["peer"] == name)
            if points:
                lower.plot(*zip(*points, strict=True), "o-", **style)
        upper.set(title=f"{variant}, {dtype}", xscale="log", xlabel="classes", ylim=(0, 1.1))
        lower.set(xscale="log", yscale="log", xlabel="logits")
    axes[0][0].set_ylabel("fraction of copy bandwidth, kernels, large batches")
    axes[1][0].set_ylabel("µs a call, host included, small batches")
    handles, labels = axes[1][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=max(1, len(labels)))
    figure.suptitle(machine(records))
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)
