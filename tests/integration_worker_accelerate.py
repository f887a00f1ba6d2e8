"""One of the processes of test_integration_accelerate.py: draws in every way; writes what it saw."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import skip_first_batches
from test_integration_accelerate import SHARED, epoch_batches, positions, prepared


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    report: dict[str, Any] = {}
    loader = prepared()
    report["in turn"] = [positions(epoch_batches(loader, epoch)) for epoch in range(2)]
    loader = prepared()
    report["by itself"] = [positions(loader) for _ in range(2)]
    report["resumed"] = positions(epoch_batches(prepared(), 1, 2))
    resumed = skip_first_batches(prepared(), 2)
    resumed.set_epoch(1)
    report["resumed without"] = positions(resumed)
    for how, (batch, options) in SHARED.items():
        loader = prepared(batch=batch, **options)
        report[how] = [positions(epoch_batches(loader, epoch)) for epoch in range(2)]
        report[f"{how}, resumed"] = positions(epoch_batches(prepared(batch=batch, **options), 1, 2))
    (folder / f"rank{torch.distributed.get_rank()}.json").write_text(json.dumps(report))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
