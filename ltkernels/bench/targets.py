"""The figures this project sets itself, and whether a set of records reaches them. For reading, never a test."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ltkernels.bench import peers, peers_accuracy_counts, peers_linear, sampling
from ltkernels.bench.peers_experts import EXPERTS

Record = Mapping[str, Any]

MEDIUM = 250_000  # logits
LARGE = 3_000_000

# (loss, form it is compared with) -> the most its time may be of the other's, for batches of at least MEDIUM and
# of at least LARGE logits.
RATIO_LIMITS: dict[tuple[str, str], tuple[float, float]] = {
    ("la_weight", peers.EAGER): (0.50, 0.35),
    ("la_weight", peers.COMPILE): (0.50, 0.40),
    ("ce", peers.EAGER): (0.75, 0.60),
    ("ldam", peers.PUBLISHED): (0.15, 0.10),
    ("ldam", peers.EAGER): (0.40, 0.30),
}
# The same by batch, on one thread.
ROW_LIMITS: dict[tuple[str, str], dict[str, float]] = {
    ("seesaw", peers.PUBLISHED): {"256x1000": 0.05, "512x8142": 0.02},
    ("lade", peers.PUBLISHED): {"256x1000": 0.3, "512x8142": 0.3},
    ("kd", peers.EAGER): {"256x1000": 0.3, "512x8142": 0.3},
    ("sigmoid_focal", peers.PUBLISHED): {"256x1000": 0.2, "512x8142": 0.2},
    ("eql_v2", peers.EAGER): {"256x1000": 0.2, "512x8142": 0.2},
    ("ride", peers.PUBLISHED): {"256x1000": 0.1, "128x8142": 0.1},
    ("ride", peers.COMPILE): {"256x1000": 0.35, "128x8142": 0.35},
    ("sade", peers.PUBLISHED): {"256x1000": 0.25, "128x8142": 0.25},
    ("sade", peers.COMPILE): {"256x1000": 0.5, "128x8142": 0.5},
    ("aggregate_probs", peers.EAGER): {"256x1000": 0.35, "128x8142": 0.35},
    ("two_labels", peers.PUBLISHED): {"256x1000": 0.35, "512x8142": 0.35},
}
SMALL_BATCH = "128x100"
SMALL_LIMITS = {("ce", peers.EAGER): 1.4, ("la_weight", peers.EAGER): 1.2, ("ldam", peers.PUBLISHED): 0.5}
COPY_BATCH = "512x8142"
COPY_LIMITS = {1: 1.6, 2: 2.0}  # by threads
MAX_GRAD_ERROR = 1e-6  # float32, relative L2
MAX_ROUNDING_FACTOR = 1.1  # half types: error over that of rounding the exact gradient
# (what is measured, form it is compared with) -> the most its time may be of the other's on one and on two threads.
SAMPLING_LIMITS: dict[tuple[str, str], tuple[float | None, float | None]] = {
    ("balanced", sampling.MULTINOMIAL): (1 / 15, 1 / 25),
    ("balanced", sampling.VECTORISED): (1 / 3, 1 / 5),
    ("balanced", sampling.TAKE): (None, None),  # the floor: reported
    ("square_root", sampling.MULTINOMIAL): (1 / 15, 1 / 25),
    ("square_root", sampling.VECTORISED): (1 / 3, 1 / 5),
    ("square_root", sampling.TAKE): (None, None),
    ("class_index", sampling.ARGSORT): (1 / 8, None),
    ("epoch", sampling.RANDOM): (1.0, None),
    ("epoch", sampling.TORCHSAMPLER): (1 / 10, None),
    ("epoch", sampling.M_PER_CLASS): (1 / 10, None),
}
# Time and the forward's memory, at most of eager's; None: reported.
EXPERT_LINEAR_LIMITS: dict[str, tuple[float, float | None]] = {
    "linear_logits": (1.0, 1 / EXPERTS),
    "linear_logits_shared": (0.5, 1 / EXPERTS),
    "linear_probs": (1.1, None),
    "linear_probs_shared": (1.1, None),
}
# Time on two threads, at most of the other's, by scenario.
LINEAR_LIMITS: dict[str, dict[str, float]] = {
    peers.EAGER: {"2048x512x50257": 1.0, "4096x64x21841": 0.85},
    peers_linear.CHUNKED: {"2048x512x50257": 0.95, "4096x64x21841": 0.95},
}
# Time on one thread, at most of the other's, by scenario.
ACCURACY_LIMITS: dict[str, dict[str, float]] = {
    peers_accuracy_counts.USUAL: {"128x100": 0.5, "4096x10": 0.5, "512x1000": 0.15, "512x8142": 0.1},
    peers.EAGER: {"128x100": 1.0, "4096x10": 0.6, "512x1000": 0.8, "512x8142": 0.8},
}
LINEAR_BYTES = 32 << 20
LINEAR_SHARE = 0.05  # of the logits: what may be held beyond inputs and gradients if it is more than LINEAR_BYTES
BYTES_PER_ROW_OR_CLASS = 64  # what O(N + C) beyond logits and gradient is allowed to mean
FIXED_BYTES = 4096


@dataclass(frozen=True)
class Line:
    """One judged figure. ``limit`` is ``None`` where the figure is reported only."""

    what: str
    scenario: str
    threads: int
    found: float
    limit: float | None

    @property
    def verdict(self) -> str:
        if self.limit is None:
            return "reported"
        return "reached" if self.found <= self.limit else "NOT REACHED"


def judge(records: Sequence[Record]) -> list[Line]:
    """Every target that the records speak about.

    Args:
        records: of one or more runs of the benchmark; of cross_entropy only ltkernels' own float32 and
            half records with mode ``fwd_bwd`` are judged.

    Returns:
        Lines in the order of the records.
    """
    lines: list[Line] = []
    for record in records:
        if record["peer"] == peers.OURS and record["op"] == "sampling":
            lines += _sampling(record)
        elif record["peer"] == peers.OURS and record["op"] == "expert_linear":
            lines += _expert_linear(record)
        elif record["peer"] == peers.OURS and record["op"] == "linear_cross_entropy":
            lines += _linear(record)
        elif record["peer"] == peers.OURS and record["op"] == "accuracy_counts":
            lines += _accuracy_counts(record)
        elif record["peer"] == peers.OURS and record["mode"] == "fwd_bwd":
            lines += _speed(record) if record["dtype"] == "float32" else ()
            lines += _memory_and_error(record)
    return lines


def _sampling(record: Record) -> Iterator[Line]:
    variant, scenario, threads, ratio = record["variant"], record["scenario"], record["threads"], record["ratio"]
    for (of, base), limits in SAMPLING_LIMITS.items():
        if of == variant and base in ratio:
            known = any(shape.name == scenario for shape in sampling.SCENARIOS) and threads <= len(limits)
            limit = limits[threads - 1] if known else None
            yield Line(f"{variant}: time of {base}", scenario, threads, ratio[base], limit)


def _speed(record: Record) -> Iterator[Line]:
    variant, scenario, threads, ratio = record["variant"], record["scenario"], record["threads"], record["ratio"]
    logits = record["N"] * record["C"]
    for (loss, base), (medium, large) in RATIO_LIMITS.items():
        if loss == variant and base in ratio:
            limit = large if logits >= LARGE else medium if logits >= MEDIUM else None
            if scenario == SMALL_BATCH:
                limit = SMALL_LIMITS.get((loss, base))
            yield Line(f"{variant}: time of {base}", scenario, threads, ratio[base], limit)
    for (loss, base), limits in ROW_LIMITS.items():
        if loss == variant and base in ratio and scenario in limits and threads == 1:
            yield Line(f"{variant}: time of {base}", scenario, threads, ratio[base], limits[scenario])
    if scenario == SMALL_BATCH:
        yield Line(f"{variant}: time of {peers.EMPTY} (floor)", scenario, threads, ratio[peers.EMPTY], None)
    if scenario == COPY_BATCH and record["op"] == "cross_entropy":
        what = f"{variant}: time of {peers.CLONE}, {record['memory']} memory"
        yield Line(what, scenario, threads, ratio[peers.CLONE], COPY_LIMITS.get(threads))


def _expert_linear(record: Record) -> Iterator[Line]:
    variant, scenario, threads = record["variant"], record["scenario"], record["threads"]
    time, memory = EXPERT_LINEAR_LIMITS[variant]
    judged = record["dtype"] == "float32" and record["mode"] == "fwd_bwd" and threads == 1
    judged = judged and scenario != SMALL_BATCH  # of 0.3 ms, a fifth Python's and autograd's
    for base in (peers.EAGER, peers.COMPILE):
        if base in record["ratio"]:
            limit = time if judged and base == peers.EAGER else None
            yield Line(f"{variant}: time of {base}", scenario, threads, record["ratio"][base], limit)
    held = record["forward_peak_ratio"][peers.EAGER]
    memory = None if scenario == SMALL_BATCH else memory  # of which the scratch is more than the result
    yield Line(f"{variant}: forward's peak bytes of {peers.EAGER}", scenario, threads, held, memory)
    yield from _error(record)


def _linear(record: Record) -> Iterator[Line]:
    variant, scenario, threads, ratio = record["variant"], record["scenario"], record["threads"], record["ratio"]
    judged = record["dtype"] == "float32" and record["mode"] == "fwd_bwd" and threads == 2 and variant == "linear_ce"
    for base in (peers.EAGER, peers_linear.CHUNKED, peers_linear.AUTO, peers.COMPILE):
        if base in ratio:
            limit = LINEAR_LIMITS.get(base, {}).get(scenario) if judged else None
            yield Line(f"{variant}: time of {base}", scenario, threads, ratio[base], limit)
    allowed = max(LINEAR_BYTES, LINEAR_SHARE * record["logits_bytes"])
    if record["dtype"] == "float32":  # half types have a sum in float32 besides
        what = f"{variant}: peak bytes beyond inputs and gradients"
        yield Line(what, scenario, threads, record["beyond_bytes"], allowed)
    yield from _error(record)


def _accuracy_counts(record: Record) -> Iterator[Line]:
    variant, scenario, threads, ratio = record["variant"], record["scenario"], record["threads"], record["ratio"]
    judged = record["dtype"] == "float32" and threads == 1
    for base in (*ACCURACY_LIMITS, peers_accuracy_counts.AMAX):
        if base in ratio:
            limit = ACCURACY_LIMITS.get(base, {}).get(scenario) if judged else None
            yield Line(f"{variant}: time of {base}", scenario, threads, ratio[base], limit)


def _memory_and_error(record: Record) -> Iterator[Line]:
    variant, scenario, threads, dtype = record["variant"], record["scenario"], record["threads"], record["dtype"]
    itemsize = {"float64": 8, "float32": 4}.get(dtype, 2)
    result = record["N"] // EXPERTS if variant.startswith("aggregate") else 0  # rows, of the mean
    beyond = max(0, record["peak_bytes"] - (record["N"] + result) * record["C"] * itemsize)
    allowed = BYTES_PER_ROW_OR_CLASS * (record["N"] + record["C"]) + FIXED_BYTES
    yield Line(f"{variant}: peak bytes beyond logits and gradient, {dtype}", scenario, threads, beyond, allowed)
    yield from _error(record)


def _error(record: Record) -> Iterator[Line]:
    variant, scenario, threads, dtype = record["variant"], record["scenario"], record["threads"], record["dtype"]
    if dtype == "float32":
        found, limit = record["rel_err_grad"], MAX_GRAD_ERROR
        yield Line(f"{variant}: gradient error, {dtype}", scenario, threads, found, limit)
    elif dtype != "float64":
        found = record["rel_err_grad"] / record["rounding_grad"]
        yield Line(f"{variant}: gradient error over rounding, {dtype}", scenario, threads, found, MAX_ROUNDING_FACTOR)
