"""Losses and heads inside of FSDP (``fully_shard``) in two processes on the CPU, against DistributedDataParallel.

What FSDP changes for a loss: its parameters are DTensors outside of ``forward`` and whole inside, perhaps in half
precision; its buffers stay what they are. So a learnable bias, tables with a schedule, and a head in the loss.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from integration_cases import ROOT, reports, torchrun


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    folder: Path = tmp_path_factory.mktemp("fsdp")
    torchrun(2, ROOT / "tests" / "integration_worker_fsdp.py", folder)
    return reports(folder)


@pytest.mark.parametrize("loss", ["learned bias", "ldam", "linear"])
def test_training_is_that_of_ddp(ranks: list[Any], loss: str) -> None:
    """Sharding divides the work otherwise; the sums over two processes round alike but for their order."""
    assert len(ranks) == 2
    for rank in ranks:
        plain, sharded, half = (rank[loss][how] for how in ("ddp", "fsdp", "fsdp, bfloat16"))
        torch.testing.assert_close(sharded["losses"], plain["losses"], rtol=1e-5, atol=1e-6)
        assert sharded["parameters"].keys() == plain["parameters"].keys()
        for name, values in plain["parameters"].items():
            torch.testing.assert_close(
                torch.tensor(sharded["parameters"][name]), torch.tensor(values), rtol=1e-5, atol=1e-6
            )
        # Three steps with parameters of 8 bits: near, and not the same.
        torch.testing.assert_close(half["losses"], plain["losses"], rtol=0.05, atol=0.05)
        assert half["losses"] != plain["losses"]
    assert ranks[0][loss]["fsdp"]["parameters"] == ranks[1][loss]["fsdp"]["parameters"]
    assert ranks[0][loss]["fsdp"]["losses"] != ranks[1][loss]["fsdp"]["losses"], "each process has rows of its own"
