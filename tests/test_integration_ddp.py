"""torch's DistributedDataParallel, started by torchrun: the number of processes changes nothing but the time."""

from __future__ import annotations

from pathlib import Path

import ddp
import pytest
import torch
from integration_cases import PROGRAMS, ROOT, reports, torchrun

import ltkernels as ltk

PROGRAM = PROGRAMS / "ddp.py"


def model(folder: Path) -> torch.Tensor:
    return torch.cat([value.flatten() for value in torch.load(folder / "model.pt", weights_only=True).values()])


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    folder = tmp_path_factory.mktemp("single")
    ddp.main(["--epochs", "4", "--out", str(folder)])
    return model(folder)


def test_two_processes_train_as_one(single: torch.Tensor, tmp_path: Path) -> None:
    """52 steps with Adam: the same samples in the same steps, and sums in another order."""
    assert "la, instance sampling" in torchrun(2, PROGRAM, "--epochs", "4", "--out", tmp_path)
    torch.testing.assert_close(model(tmp_path), single, rtol=1e-3, atol=1e-4)


def test_a_run_goes_on_in_another_number_of_processes(single: torch.Tensor, tmp_path: Path) -> None:
    """Two processes until within the second epoch of 13 steps, then one."""
    arguments = ["--epochs", "4", "--out", str(tmp_path)]
    torchrun(2, PROGRAM, *arguments, "--stop-after", "20")
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["sampler"]
    assert (state["epoch"], state["position"]) == (1, 7 * ddp.BATCH)
    assert ddp.main([*arguments, "--resume"])["balanced"] > 0.5
    torch.testing.assert_close(model(tmp_path), single, rtol=1e-3, atol=1e-4)


def test_program(capsys: pytest.CaptureFixture[str]) -> None:
    la, ce = ddp.main([]), ddp.main(["--loss", "ce"])
    assert la["few"] > ce["few"] + 0.05
    assert la["balanced"] > ce["balanced"] > 0.8
    assert capsys.readouterr().out.count("instance sampling") == 2


def test_losses_with_a_state_of_the_whole_run(tmp_path: Path) -> None:
    """SeesawLoss counts the labels of all ranks; tables that are learnt have one gradient; buffers are broadcast."""
    torchrun(2, ROOT / "tests/integration_worker_ddp.py", tmp_path)
    first, second = reports(tmp_path)
    labels = torch.tensor(first["labels"] + second["labels"])
    assert first["counts"] == second["counts"] == torch.bincount(labels, minlength=3).tolist()

    bias = torch.nn.Parameter(torch.zeros(3))
    loss = ltk.losses.CrossEntropyLoss(class_bias=bias)
    logits = torch.tensor(first["logits"] + second["logits"])
    loss(logits, labels).backward()
    for rank in (first, second):
        torch.testing.assert_close(torch.tensor(rank["gradient"]), bias.grad, rtol=1e-5, atol=1e-6)
        assert rank["weight"] == ltk.rebalance.effective_number_weight([90, 9, 1]).tolist()
