"""The figures that the GPU kernels are to reach, and whether records reach them. For reading: no exit status asks.

Each figure is looked at for each backend, since either may serve a call. A fraction is that of the bandwidth of a copy
of the logits in the same rounds, with the bytes that cannot be avoided: forward one read, backward a read and a write.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.gpu.table import OURS
from ltkernels.bench import peers

Record = Mapping[str, Any]

LARGE = 64_000_000  # logits
LEAST_FRACTION = {1000: 0.70, 4096: 0.85, 16384: 0.95, 50257: 0.95, 128256: 0.95}
NEIGHBOURS = {365: 368, 1203: 1204, 8142: 8144}
MOST_BELOW_NEIGHBOUR = 0.05
MOST_OVER_CE = {"la_weight": 1.05, "ldam": 1.05}
SMALL_BATCH, MOST_OF_EAGER = "256x1000", 0.5
LAUNCHES = 2
MOST_OF_PEERS = {"liger": 1.0, peers.COMPILE: 1.0}


@dataclass(frozen=True)
class Line:
    """One figure: what was found, and the bound with its direction."""

    what: str
    case: str
    backend: str
    found: float
    least: float | None = None
    most: float | None = None

    @property
    def reached(self) -> bool:
        return (self.least is None or self.found >= self.least) and (self.most is None or self.found <= self.most)

    @property
    def verdict(self) -> str:
        return "reached" if self.reached else "NOT REACHED"

    @property
    def bound(self) -> str:
        return f">= {self.least:.2f}" if self.least is not None else f"<= {self.most:.2f}"


def judge(records: Sequence[Record]) -> list[Line]:
    """Every figure that the records speak about, in the order of the issue."""
    ours = [record for record in records if record["peer"].startswith(OURS) and record["op"] == "cross_entropy"]
    return [
        *_fractions(ours),
        *_neighbours(ours),
        *_over_ce(ours),
        *_small_batch(ours),
        *_against_peers(ours),
        *_launches(ours),
    ]


def _backend(record: Record) -> str:
    return str(record["peer"].removeprefix(OURS))


def _is_large(record: Record) -> bool:
    kernel = record["mode"] == "kernel" and record["dtype"] == "bfloat16"
    return bool(kernel and record["N"] * record["C"] >= LARGE and record["frac_copy"] is not None)


def _large_ce(records: Sequence[Record]) -> dict[tuple[int, str], Record]:
    return {(r["C"], _backend(r)): r for r in records if _is_large(r) and r["variant"] == "ce"}


def _fractions(records: Sequence[Record]) -> Iterator[Line]:
    for (c, backend), record in _large_ce(records).items():
        if c in LEAST_FRACTION:
            yield Line("fraction of copy", record["scenario"], backend, record["frac_copy"], least=LEAST_FRACTION[c])


def _neighbours(records: Sequence[Record]) -> Iterator[Line]:
    found = _large_ce(records)
    for (c, backend), record in found.items():
        if c in NEIGHBOURS and (NEIGHBOURS[c], backend) in found:
            below = found[NEIGHBOURS[c], backend]["frac_copy"] - record["frac_copy"]
            what = f"fraction of copy below that of C={NEIGHBOURS[c]}"
            yield Line(what, record["scenario"], backend, below, most=MOST_BELOW_NEIGHBOUR)


def _over_ce(records: Sequence[Record]) -> Iterator[Line]:
    """Times relative to the copies that the two were timed beside: the clock may have changed between them."""
    base = _large_ce(records)
    lines = []
    for record in records:
        other = base.get((record["C"], _backend(record)))
        if _is_large(record) and record["variant"] in MOST_OVER_CE and other is not None:
            found = record["ratio"]["copy"] / other["ratio"]["copy"]
            limit = MOST_OVER_CE[record["variant"]]
            lines.append(
                Line(f"{record['variant']}: worst time of ce", record["scenario"], _backend(record), found, most=limit)
            )
    return _worst(lines)


def _small_batch(records: Sequence[Record]) -> Iterator[Line]:
    lines = []
    for record in records:
        if record["scenario"] == SMALL_BATCH and record["mode"] == "host" and peers.EAGER in record["ratio"]:
            what, case = f"{record['dtype']}: worst host time of eager", f"{SMALL_BATCH} {record['variant']}"
            lines.append(Line(what, case, _backend(record), record["ratio"][peers.EAGER], most=MOST_OF_EAGER))
    return _worst(lines)


def _worst(lines: Sequence[Line]) -> Iterator[Line]:
    """Of lines that say the same of the same backend, the one with the largest find."""
    worst: dict[tuple[str, str], Line] = {}
    for line in lines:
        key = line.what, line.backend
        if key not in worst or line.found > worst[key].found:
            worst[key] = line
    yield from worst.values()


def _against_peers(records: Sequence[Record]) -> Iterator[Line]:
    """In each mode, over all batches and losses."""
    lines = []
    for record in records:
        for peer, limit in MOST_OF_PEERS.items():
            if peer in record["ratio"]:
                what, case = f"{record['mode']}: worst time of {peer}", _case(record)
                lines.append(Line(what, case, _backend(record), record["ratio"][peer], most=limit))
    return _worst(lines)


def _launches(records: Sequence[Record]) -> Iterator[Line]:
    lines = []
    for record in records:
        if record["launches"] is not None:
            what = "most launches, forward and backward"
            lines.append(Line(what, _case(record), _backend(record), record["launches"], most=LAUNCHES))
    return _worst(lines)


def _case(record: Record) -> str:
    return f"{record['scenario']} {record['variant']} {record['dtype']}"
