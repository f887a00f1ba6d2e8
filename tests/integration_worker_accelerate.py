"""One of the processes of test_integration_accelerate.py: draws in every way; writes what it saw."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import skip_first_batches
from test_integration_accelerate import BATCH, epoch_batches, positions, prepared


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    report: dict[str, Any] = {}
    loader = prepared()
    report["in turn"] = [positions(epoch_batches(loader, epoch)) for epoch in range(2)]
    report["resumed"] = positions(epoch_batches(prepared(), 1, 2))
    resumed = skip_first_batches(prepared(), 2)
    resumed.set_epoch(1)
    report["resumed without"] = positions(resumed)
    for how, dispatch in (("split", False), ("dispatched", True)):
        loader = prepared(batch=2 * BATCH, split_batches=True, dispatch_batches=dispatch)
        report[how] = [positions(epoch_batches(loader, epoch)) for epoch in range(2)]
    (folder / f"rank{torch.distributed.get_rank()}.json").write_text(json.dumps(report))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
