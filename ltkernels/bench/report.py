"""What a run says: JSON Lines in and out, tables on the terminal, and the figures of README and documentation."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ltkernels.bench import peers, peers_crt, sampling
from ltkernels.bench.peers import VARIANTS
from ltkernels.bench.peers_binary import BINARY_VARIANTS
from ltkernels.bench.peers_distillation import DISTILLATION_VARIANTS
from ltkernels.bench.peers_expert_linear import EXPERT_LINEAR_VARIANTS
from ltkernels.bench.peers_experts import EXPERT_VARIANTS
from ltkernels.bench.peers_lade import LADE_VARIANTS
from ltkernels.bench.peers_linear import LINEAR_VARIANTS
from ltkernels.bench.peers_rows import ROW_VARIANTS
from ltkernels.bench.targets import Line

if TYPE_CHECKING:
    from rich.table import Table

Record = Mapping[str, Any]

TITLES = {
    variant.name: variant.title
    for variant in (
        *VARIANTS,
        *ROW_VARIANTS,
        *LADE_VARIANTS,
        *DISTILLATION_VARIANTS,
        *EXPERT_VARIANTS,
        *BINARY_VARIANTS,
    )
}
TITLES |= {variant.name: variant.title for variant in EXPERT_LINEAR_VARIANTS}
TITLES |= {variant.name: variant.title for variant in LINEAR_VARIANTS}
TITLES |= {variant.name: variant.title for variant in peers_crt.CRT_VARIANTS}
TITLES |= {variant.name: variant.title for variant in sampling.VARIANTS}
LOSSES = (
    "cross_entropy",
    "row_cross_entropy",
    "lade",
    "distillation",
    "experts",
    "binary_cross_entropy",
    "expert_linear",
    "linear_cross_entropy",
)
FIELDS = frozenset(
    "op variant scenario source N C dtype mode memory threads peer less_work backend rounds p25_us p50_us p75_us ratio "
    "model_bytes frac_copy launches peak_mb peak_bytes page_faults rel_err_loss rel_err_grad rounding_grad "
    "device cpu isa kernel_isa load torch ltkernels git utc".split()
)

RATE = "samples_per_second"  # a field of records of whole steps


def write_records(records: Iterable[Record], path: Path) -> None:
    """Writes one JSON object a line; an existing file is replaced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def read_records(path: Path) -> list[dict[str, Any]]:
    """Reads what :func:`write_records` wrote.

    Raises:
        ValueError: a line is no record; the message names file, line and what is missing.
    """
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: expected a JSON object, found {line[:40]!r}") from error
        missing = FIELDS - record.keys() if isinstance(record, dict) else FIELDS
        if missing:
            raise ValueError(f"{path}:{number}: expected the fields of a benchmark record, missing {sorted(missing)}")
        records.append(record)
    return records


def duration(microseconds: float) -> str:
    """``12.3 µs``, ``4.56 ms``: three digits."""
    if microseconds < 1_000:
        return f"{microseconds:.3g} µs"
    return f"{microseconds / 1_000:.3g} ms" if microseconds < 1e6 else f"{microseconds / 1e6:.3g} s"


def _groups(records: Sequence[Record]) -> dict[tuple[Any, ...], list[Record]]:
    """Records that were timed against each other, in order of appearance."""
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        key = (
            record["scenario"],
            record["variant"],
            record["threads"],
            record["dtype"],
            record["mode"],
            record["memory"],
        )
        groups.setdefault(key, []).append(record)
    return groups


def results_table(records: Sequence[Record]) -> Table:
    """All forms of all losses, or of whatever was measured, with the ratio of each to ours."""
    from rich.table import Table

    groups = _groups(records)
    settings = {_setting(record) for record in records}
    shared = f"\n{settings.pop()}" if len(settings) == 1 else ""
    table = Table(title=machine(records) + shared)
    of_losses = records[0]["op"] in LOSSES
    for header in ("batch", "threads", "loss", "form") if of_losses else ("data", "threads", "what", "form"):
        table.add_column(header, no_wrap=True)
    share = "samples/s" if RATE in records[0] else "of copy"
    for header in ("median", "quartiles", "x ltkernels", share, "ops", "peak MB", "faults", "loss err", "grad err"):
        table.add_column(header, justify="right", no_wrap=True)
    for group in groups.values():
        for place, record in enumerate(group):
            head = record["scenario"] if shared else f"{record['scenario']} {_setting(record)}"
            variant = TITLES.get(record["variant"], record["variant"])
            table.add_row(
                *((head, str(record["threads"]), variant) if place == 0 else ("", "", "")),
                record["peer"] + (f" ({'no loss' if of_losses else 'less work'})" if record["less_work"] else ""),
                duration(record["p50_us"]),
                f"{duration(record['p25_us'])} - {duration(record['p75_us'])}",
                f"{record['ratio'].get(peers.OURS, 1.0):.2f}",
                f"{record[RATE]:,}" if RATE in record else _show(record["frac_copy"], ".2f"),
                _show(record["launches"], "d"),
                _show(record["peak_mb"], ".2f"),
                str(record["page_faults"]),
                _show(record["rel_err_loss"], ".1e"),
                _show(record["rel_err_grad"], ".1e"),
                end_section=place == len(group) - 1,
            )
    return table


def _setting(record: Record) -> str:
    members = " members" if record["op"] == "sampling" else ""
    return f"{record['dtype']}{members}, {record['mode']}, {record['memory']} memory"


def _show(value: float | int | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def targets_table(lines: Sequence[Line]) -> Table:
    """The judged figures."""
    from rich.table import Table

    table = Table(title="targets")
    for header in ("figure", "batch", "threads"):
        table.add_column(header)
    for header in ("found", "at most", "verdict"):
        table.add_column(header, justify="right")
    for line in lines:
        limit = "-" if line.limit is None else f"{line.limit:.4g}"
        table.add_row(line.what, line.scenario, str(line.threads), f"{line.found:.4g}", limit, line.verdict)
    return table


def machine(records: Sequence[Record]) -> str:
    """Where and with what the records were measured, in one line."""
    first = records[0]
    version = f"ltkernels {first['ltkernels']}" + (f" at {first['git']}" if first["git"] else "")
    version += f" ({first['kernel_isa']})" if first["kernel_isa"] else ""
    where = first.get("gpu") or f"{first['cpu']}, {first['isa']}"
    return f"{where}, torch {first['torch']}, {version}, {first['utc'][:10]}"


DEFAULT_OP = {"op": "cross_entropy"}
_OF_LOSSES = (
    (peers.EAGER, "plain PyTorch"),
    (peers.PUBLISHED, "published form"),
    (peers.COMPILE, "torch.compile"),
    (peers.LIBRARY, "imbalanced-losses"),
    (peers.CLONE, "clone() of the logits"),
)
README_ROWS = dict.fromkeys(LOSSES, _OF_LOSSES) | {
    "sampling": (
        (sampling.MULTINOMIAL, "torch.multinomial"),
        (sampling.VECTORISED, "vectorised PyTorch"),
        (sampling.TAKE, "the gather alone (np.take)"),
        (sampling.RANDPERM, "torch.randperm"),
        (sampling.ARGSORT, "torch.argsort(stable)"),
        (sampling.RANDOM, "RandomSampler, no balance"),
        (sampling.WEIGHTED, "WeightedRandomSampler"),
        (sampling.TORCHSAMPLER, "the way of torchsampler"),
        (sampling.M_PER_CLASS, "MPerClassSampler"),
    ),
    "crt": (
        (peers_crt.LOADER, "DataLoader, the usual form"),
        (peers_crt.AUTOGRAD, "plain PyTorch, autograd"),
        (peers.EAGER, "plain PyTorch, the cheapest form"),
        (peers.COMPILE, "torch.compile"),
        (peers_crt.TORCH_LINEAR, "F.linear_cross_entropy"),
        (peers_crt.OUR_AUTOGRAD, "ltkernels by autograd"),
        (peers_crt.OUR_LINEAR, "linear_cross_entropy of ltkernels"),
        (peers_crt.PRODUCTS, "the two products alone"),
        (peers_crt.GATHER, "the gather alone"),
    ),
}
README_WHAT = dict.fromkeys(LOSSES, "float32, forward and backward with argument checks") | {
    "sampling": "a million indices, or all samples of the data set (index, shuffle)",
    "crt": "float32, batch x features x classes, random features in memory for as many samples as the data set has; a "
    "step is draw, gather, classifier, loss, gradients and update",
}


def readme_figures(
    records: Sequence[Record],
    command: str,
    op: str = "cross_entropy",
    writer: str = "python benchmarks/readme_table.py",
) -> str:
    """The README's figures in Markdown: our time, and the ratio to every other form, by batch shape or data set.

    Args:
        records: of one machine.
        command: what printed them, quoted below the table.
        op: which op's records; those of others are left out.
        writer: the command that puts them where they stand, quoted too.

    Returns:
        Markdown text. Cells hold one value a thread count, ascending, separated by " / ".

    Raises:
        ValueError: no record of ltkernels with default memory (of losses: float32, ``fwd_bwd``) is among them.
    """
    settings = {"peer": peers.OURS, "memory": "default", "op": op}
    if op in LOSSES:
        settings |= {"dtype": "float32", "mode": "fwd_bwd"}
    ours = [record for record in records if settings.items() <= {**DEFAULT_OP, **record}.items()]
    if not ours:
        kind = "float32 fwd_bwd" if op in LOSSES else op
        raise ValueError(f"readme_figures: expected {kind} records of ltkernels, found none")
    scenarios = list(dict.fromkeys((r["scenario"], r["source"]) for r in ours))
    threads = sorted({r["threads"] for r in ours})
    by_key = {(r["variant"], r["scenario"], r["threads"]): r for r in ours}

    def row(head: str, variant: str, base: str | None) -> str | None:
        cells = []
        for name, _ in scenarios:
            at = [by_key[key] for count in threads if (key := (variant, name, count)) in by_key]
            if base is None:
                values = [duration(r["p50_us"]) for r in at]
            elif base == RATE:
                values = [f"{r[RATE]:,}" for r in at if RATE in r]
            else:
                digits = 2 if op == "cross_entropy" else 3
                values = [f"{r['ratio'][base]:.{digits}f}" for r in at if base in r["ratio"]]
            cells.append(" / ".join(values) or "-")
        return None if set(cells) == {"-"} else f"| {head} | " + " | ".join(cells) + " |"

    lines = ["| | " + " | ".join(f"{name}<br>{source}" for name, source in scenarios) + " |"]
    lines.append("|---|" + "---:|" * len(scenarios))
    for variant in dict.fromkeys(r["variant"] for r in ours):
        title = TITLES.get(variant, variant)
        rows = [row(f"**{title}**, time", variant, None), row(f"{title}, samples a second", variant, RATE)]
        rows += [row(f"{title} / {label}", variant, base) for base, label in README_ROWS[op]]
        lines += [line for line in rows if line is not None]
    counts = " / ".join(str(count) for count in threads)
    return (
        f"Measured on {machine(ours)}; {README_WHAT[op]}, {counts} thread(s).\n"
        'A row "OURS / FORM" is the time of ltkernels over that of the form, the median of the ratios of all rounds: '
        "below 1 ltkernels is faster.\n\n" + "\n".join(lines) + "\n\n"
        f"Measured by `{command}`, written here by `{writer}`.\n"
    )
