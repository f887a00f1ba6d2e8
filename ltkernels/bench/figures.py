"""The figures of README and documentation, in Markdown, from the records of result files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ltkernels.bench import peers, peers_accuracy_counts, peers_crt, peers_linear, sampling
from ltkernels.bench.report import LOSSES, RATE, TITLES, Record, duration, machine

DEFAULT_OP = {"op": "cross_entropy"}
_OF_LOSSES = (
    (peers.EAGER, "plain PyTorch"),
    (peers.PUBLISHED, "published form"),
    (peers.COMPILE, "torch.compile"),
    (peers.LIBRARY, "imbalanced-losses"),
    (peers.CLONE, "clone() of the logits"),
)
ROWS = dict.fromkeys(LOSSES, _OF_LOSSES) | {
    "linear_cross_entropy": (
        *_OF_LOSSES,
        (peers_linear.CHUNKED, "F.linear_cross_entropy, chunks as ours"),
        (peers_linear.AUTO, "F.linear_cross_entropy, its own chunks"),
    ),
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
    "accuracy_counts": (
        (peers_accuracy_counts.USUAL, "argmax or topk, and bincount"),
        (peers.EAGER, "plain PyTorch, the cheapest form"),
        (peers.COMPILE, "torch.compile of that"),
        (peers.PUBLISHED, "published form"),
        (peers_accuracy_counts.TORCHMETRICS, "torchmetrics"),
        (peers.MODULE, "ShotAccuracy.update"),
        (peers_accuracy_counts.AMAX, "the largest logits alone"),
    ),
}
WHAT = dict.fromkeys(LOSSES, "float32, forward and backward with argument checks") | {
    "sampling": "a million indices, or all samples of the data set (index, shuffle)",
    "crt": "float32, batch x features x classes, random features in memory for as many samples as the data set has; a "
    "step is draw, gather, classifier, loss, gradients and update",
    "accuracy_counts": "a batch of an evaluation, rows x classes, float32",
}


def table(
    records: Sequence[Record],
    command: str,
    op: str = "cross_entropy",
    writer: str = "python benchmarks/readme_table.py",
) -> str:
    """All figures of an op: our time, and the ratio to every other form, by batch shape or data set.

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
        raise ValueError(f"table: expected {kind} records of ltkernels, found none")
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
        rows += [row(f"{title} / {label}", variant, base) for base, label in ROWS[op]]
        lines += [line for line in rows if line is not None]
    counts = " / ".join(str(count) for count in threads)
    return (
        f"Measured on {machine(ours)}; {WHAT[op]}, {counts} thread(s).\n"
        'A row "OURS / FORM" is the time of ltkernels over that of the form, the median of the ratios of all rounds: '
        "below 1 ltkernels is faster.\n\n" + "\n".join(lines) + "\n\n"
        f"Measured by `{command}`, written here by `{writer}`.\n"
    )


SUMMARY_FORMS = _OF_LOSSES[:3]
SUMMARY_SCENARIOS = dict.fromkeys(LOSSES, ("256x1000", "512x8142")) | {
    "experts": ("256x1000", "128x8142"),
    "linear_cross_entropy": ("4096x64x21841", "2048x512x50257"),
}
"""The batches that stand for an op in :func:`summary`."""


def summary(records_of: Mapping[str, Sequence[Record]]) -> str:
    """One Markdown table of all losses: our time, and the ratio to the usual forms, at the batches that stand for each.

    Args:
        records_of: by op; on the fewest threads, float32, forward and backward.

    Raises:
        ValueError: an op has no such record.
    """
    lines = ["| | time | " + " | ".join(f"/ {label}" for _, label in SUMMARY_FORMS) + " |"]
    lines.append("|---|" + "---:|" * (1 + len(SUMMARY_FORMS)))
    for op, records in records_of.items():
        scenarios = SUMMARY_SCENARIOS[op]
        settings = {"peer": peers.OURS, "memory": "default", "op": op, "dtype": "float32", "mode": "fwd_bwd"}
        ours = [r for r in records if settings.items() <= {**DEFAULT_OP, **r}.items() and r["scenario"] in scenarios]
        if not ours:
            raise ValueError(f"summary: expected float32 fwd_bwd records of {op} at {scenarios}, found none")
        threads = min(r["threads"] for r in ours)
        lines.append(f"| *{op}*: {', '.join(scenarios)}" + (f"; {threads} threads" if threads > 1 else "") + " |" * 5)
        for variant in dict.fromkeys(r["variant"] for r in ours):
            at = [r for name in scenarios for r in ours if (r["scenario"], r["threads"]) == (name, threads)]
            at = [r for r in at if r["variant"] == variant]
            cells = [", ".join(duration(r["p50_us"]) for r in at)]
            for base, _ in SUMMARY_FORMS:
                cells.append(", ".join(f"{r['ratio'][base]:#.2g}" for r in at if base in r["ratio"]))
            lines.append(f"| {TITLES.get(variant, variant)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
