"""The program of a million classes, as a user runs it, with few: both forms learn the same, and what it says is so."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from longtail_cases import PROGRAM
from recipes import million_classes
from recipes.million_classes import Clusters, expected_traffic

FILE = PROGRAM / "recipes" / "million_classes.py"
# 2000 classes of 8 features: a step is 20 ms, and 96 rows divide by 2 and 4 processes.
SMALL = ["--classes", "2000", "--features", "8", "--batch", "96", "--steps", "4"]


def run(*arguments: str, processes: int = 0, code: int = 0) -> list[dict[str, Any]]:
    """What the program finds, in a process of its own, or several."""
    command = [sys.executable]
    if processes:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    done = subprocess.run(
        [*command, str(FILE), *arguments, "--json"], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == code, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, Any]]:
    """Both forms in a process each."""
    return {found["form"]: found for found in run(*SMALL)}


def test_both_forms_learn_the_same(alone: dict[str, dict[str, Any]]) -> None:
    ours, plain = alone["ltkernels"]["loss"], alone["plain"]["loss"]
    assert ours == pytest.approx(plain, rel=1e-5)
    assert ours[-1] < ours[0] - 0.1 and len(ours) == 4
    assert alone["ltkernels"]["traffic"] == {}


def test_the_plain_form_that_finds_no_memory_says_so() -> None:
    """5e6 x 1e5 logits are 2 TB; classifier and rows are small."""
    huge = ["--classes", "5000000", "--features", "2", "--batch", "100000", "--steps", "1"]
    (found,) = run(*huge, "--form", "plain", code=million_classes.NO_MEMORY)
    assert "memory" in found["no_memory"] and 0 < found["limit_bytes"] < 2e12


def test_a_sample_of_the_classes_learns_too() -> None:
    (found,) = run(*SMALL, "--form", "ltkernels", "--sample-rate", "0.3")
    assert found["loss"][-1] < found["loss"][0] - 0.1


@pytest.mark.parametrize("processes", [2, 4])
def test_divided_classes_learn_the_same_and_exchange_what_the_formula_says(
    processes: int, alone: dict[str, dict[str, Any]]
) -> None:
    (found,) = run(*SMALL, "--form", "ltkernels", "--class-parallel", processes=processes)
    assert found["loss"][0] == pytest.approx(alone["plain"]["loss"][0], rel=0.02), "another start, the same classes"
    assert found["loss"][-1] < found["loss"][0] - 0.1
    traffic = {name: of["bytes"] for name, of in found["traffic"].items()}
    assert traffic == expected_traffic(96, 8, processes)
    assert {name: of["by_formula"] for name, of in found["traffic"].items()} == traffic


def test_rows_are_long_tailed_clusters_and_do_not_depend_on_the_number_of_processes() -> None:
    clusters = Clusters(1000, 16, seed=3)
    x, y = clusters.batch(5, 4000)
    parts = [clusters.batch(5, 4000, rank, 4) for rank in range(4)]
    for rank, (features, labels) in enumerate(parts):
        assert torch.equal(features, x[rank::4]) and torch.equal(labels, y[rank::4])
    counts = y.bincount(minlength=1000)
    share = 1 / sum(1 / k for k in range(1, 1001))  # of the most frequent class, by Zipf's law: 0.13
    assert counts[0] / 4000 == pytest.approx(share, abs=5 * (share * (1 - share) / 4000) ** 0.5)
    first = x[y == 0]
    assert first.std(0).mean() == pytest.approx(million_classes.NOISE, rel=0.1)
    assert F.mse_loss(first.mean(0), x[y == 1].mean(0)) > 0.2, "another centre"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--classes", "0"], "--classes: expected a whole number >= 1, found '0'"),
        (["--sample-rate", "1.5"], "--sample-rate: expected a number in (0, 1], found 1.5"),
        (["--class-parallel"], "--class-parallel: expected to be started by torchrun"),
    ],
)
def test_wrong_options(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        million_classes.main(arguments)
    assert ended.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "expected --form ltkernels"),
        (["--form", "ltkernels", "--sample-rate", "0.5"], "expected no --sample-rate"),
        (["--form", "ltkernels", "--batch", "97"], "--batch: expected a multiple of the 2 processes, found 97"),
    ],
)
def test_wrong_options_under_torchrun(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as ended:
        million_classes.main(["--class-parallel", *arguments])
    assert ended.value.code == 2 and said in capsys.readouterr().err
