"""The picture of a run: the time of a logit as the classes become more, and how much longer the other forms take.

One row of two panels for each loss, or whatever was measured. Figures are made without pyplot: drawing here changes
neither the backend nor the open figures of a notebook.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ltkernels.bench import peers, report

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Record = Mapping[str, Any]

# Okabe and Ito's colours, which people with any colour vision tell apart; markers say the same once more.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#8B6C42", "#7F3C8D", "#B8A600", "#444444", "#66C2A5")
MARKERS = "sDv^P<>Xph"
OUR_COLOUR = "#D55E00"
LEFT_OUT = (peers.MODULE, peers.EMPTY)
"""Forms without a line of their own: the same kernel again, and the price of a call, which is no loss."""
LABELS = {
    peers.EAGER: "plain PyTorch",
    peers.PUBLISHED: "published form",
    peers.COMPILE: "torch.compile",
    peers.CLONE: "clone() of the logits",
}
INCHES_WIDE, INCHES_A_ROW, INCHES_AROUND = 10.0, 2.5, 1.5
SUFFIXES = (".png", ".svg", ".pdf")
SAME = ("op", "dtype", "mode", "memory", "device")
"""Fields in which all records of a picture agree."""


def draw(records: Sequence[Record], path: Path) -> None:
    """Draws the records; the format follows the file's suffix.

    The left panel of a row has the median time of a logit (of sampling: of a call), with the quartiles as a band. The
    right one has the time of each form over that of ltkernels, the median of the ratios of all rounds: above 1
    ltkernels is faster.

    Args:
        records: as ``ltkernels bench --out`` writes them, of one op, dtype, mode, memory setting and device. Where
            there are several thread counts, the smallest is drawn.
        path: image to write: ``.png``, ``.svg`` or ``.pdf``. Folders are made.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: no records, records that do not belong into one picture, or an unknown suffix.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plot: matplotlib is not installed; pip install 'ltkernels[bench]'") from error
    if path.suffix not in SUFFIXES:
        raise ValueError(f"plot: expected a name that ends in {', '.join(SUFFIXES)}, found {path.name!r}")
    drawn = _of_one_picture(records)
    variants = list(dict.fromkeys(record["variant"] for record in drawn))
    styles = _styles(drawn)
    height = INCHES_A_ROW * len(variants) + INCHES_AROUND
    figure = Figure(figsize=(INCHES_WIDE, height))
    axes = figure.subplots(len(variants), 2, squeeze=False)
    handles: dict[str, Any] = {}
    for (left, right), variant in zip(axes, variants, strict=True):
        of_variant = [record for record in drawn if record["variant"] == variant]
        shapes = sorted({(record["C"], record["N"], record["scenario"]) for record in of_variant})
        names = [name for *_, name in shapes]
        for form, style in styles.items():
            found = {record["scenario"]: record for record in of_variant if record["peer"] == form}
            if found:
                handles[form] = _draw_form(left, right, [found.get(name) for name in names], style)
        _finish(left, right, names, report.TITLES.get(variant, variant), drawn[0]["op"] in report.LOSSES)
    threads = drawn[0]["threads"]
    figure.text(  # tight_layout would leave room for a suptitle once more
        0.5,
        1 - 0.1 / height,
        f"{drawn[0]['op']}: {drawn[0]['mode']}, {drawn[0]['dtype']}, {threads} thread{'s' * (threads > 1)}\n"
        f"{report.machine(drawn)}",
        ha="center",
        va="top",
        fontsize=9,
    )
    shown = [form for form in styles if form in handles]
    columns = min(len(shown), 5)
    figure.legend(
        [handles[form] for form in shown],
        [LABELS.get(form, form) for form in shown],
        loc="lower center",
        ncols=columns,
        frameon=False,
        fontsize=9,
    )
    below, above = 0.25 + 0.22 * -(-len(shown) // columns), 0.45  # inches for the legend and for the title
    figure.tight_layout(rect=(0, below / height, 1, 1 - above / height), h_pad=1.5, w_pad=2.5)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _of_one_picture(records: Sequence[Record]) -> list[Record]:
    """The records of the smallest thread count, of forms that have a line."""
    if not records:
        raise ValueError("plot: expected benchmark records, found none")
    for name in SAME:
        values = list(dict.fromkeys(record[name] for record in records))
        if len(values) > 1:
            raise ValueError(f"plot: expected records of one {name}, found {', '.join(map(str, values))}")
    threads = min(record["threads"] for record in records)
    return [record for record in records if record["threads"] == threads and record["peer"] not in LEFT_OUT]


def _styles(records: Sequence[Record]) -> dict[str, dict[str, Any]]:
    """How each form looks, ltkernels first; forms that do less than the whole work are dashed."""
    found = {record["peer"]: record["less_work"] for record in records}
    first = [form for form in (peers.OURS, *LABELS) if form in found]
    styles: dict[str, dict[str, Any]] = {}
    for place, form in enumerate([*first, *(form for form in found if form not in first)]):
        ours = form == peers.OURS
        styles[form] = {
            "color": OUR_COLOUR if ours else "0.55" if form == peers.CLONE else COLOURS[(place - 1) % len(COLOURS)],
            "marker": "o" if ours else MARKERS[(place - 1) % len(MARKERS)],
            "linestyle": "--" if found[form] else "-",
            "linewidth": 2.2 if ours else 1.3,
            "markersize": 5.5 if ours else 4.5,
            "zorder": 3 if ours else 2,
        }
    return styles


def _draw_form(left: Axes, right: Axes, found: Sequence[Record | None], style: Mapping[str, Any]) -> Any:
    """A form's lines over the batch shapes in which it was measured."""
    places = [place for place, record in enumerate(found) if record is not None]
    measured = [record for record in found if record is not None]
    scale = [1e3 / (r["N"] * r["C"]) if r["op"] in report.LOSSES else 1e-3 for r in measured]  # ns a logit, or ms
    low, middle, high = (
        [record[key] * of for record, of in zip(measured, scale, strict=True)] for key in ("p25_us", "p50_us", "p75_us")
    )
    left.fill_between(places, low, high, color=style["color"], alpha=0.15, linewidth=0)
    (line,) = left.plot(places, middle, **style)
    if measured[0]["peer"] != peers.OURS:
        right.plot(places, [record["ratio"][peers.OURS] for record in measured], **style)
    return line


def _finish(left: Axes, right: Axes, names: Sequence[str], title: str, of_losses: bool) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    right.axhline(1, color=OUR_COLOUR, linewidth=2.2, zorder=1)
    right.annotate(
        "ltkernels", (1, 1), (3, 0), xycoords=("axes fraction", "data"), textcoords="offset points",
        color=OUR_COLOUR, fontsize=8, va="center",
    )  # fmt: skip
    left.set_title(f"{title}: ns a logit" if of_losses else f"{title}: ms a call", loc="left", fontsize=10)
    right.set_title("times as long as ltkernels", loc="left", fontsize=10)
    for axes in (left, right):
        axes.set_yscale("log")
        axes.set_xticks(range(len(names)), names, fontsize=8)
        axes.set_xlim(-0.3, len(names) - 0.7)
        axes.margins(y=0.12)
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=12))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.tick_params(labelsize=8)
        axes.grid(axis="y", alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
