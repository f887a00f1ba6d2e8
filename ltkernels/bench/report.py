"""What a run says: JSON Lines in and out, and tables on the terminal. Documents take theirs from ``figures.py``."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ltkernels.bench import peers, peers_crt, sampling
from ltkernels.bench.peers import VARIANTS
from ltkernels.bench.peers_accuracy_counts import ACCURACY_VARIANTS
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
TITLES |= {variant.name: variant.title for variant in ACCURACY_VARIANTS}
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
