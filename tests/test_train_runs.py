"""Runs of the demo: checkpoints, resuming, and the workers that share them out."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import checkpoint
import longtail_data
import longtail_methods
import longtail_plan
import longtail_run
import pytest
import torch
import train_worker_tasks
import workers
from longtail_cases import PROGRAM, assert_same_state, load, settings, wait_for
from longtail_model import Batches

import ltkernels as ltk


@pytest.mark.parametrize(
    ("method", "stop"),
    [*((method, stop) for method in longtail_methods.METHODS for stop in (0, 9, 14)), ("lfme", 28), ("lfme", 37)],
)
def test_a_resumed_run_is_the_same_run(method: str, stop: int, tmp_path: Path) -> None:
    """Stopped before the first step, within an epoch, and between two (of 14 steps each) or two stages."""
    data = load("digits")
    whole, first, second = (longtail_run.Run(settings(method), data, Batches(data)) for _ in range(3))
    assert whole.total_steps == (56 if method == "lfme" else 28)
    for _ in range(whole.total_steps):
        whole.train_step()
    for _ in range(stop):
        first.train_step()
    checkpoint.save(tmp_path / "run.pt", first.config, first.state_dict())
    torch.rand(100)  # the random state is the run's, not the process's
    second.load_state_dict(checkpoint.load(tmp_path / "run.pt", second.config))
    while second.step < second.total_steps:
        second.train_step()
    assert_same_state(second.state_dict(), whole.state_dict())
    assert second.result()["outcomes"] == whole.result()["outcomes"]


@pytest.mark.parametrize("sampler", longtail_plan.SAMPLERS[1:])
def test_with_every_sampler(sampler: str) -> None:
    """Resumed within the second epoch; the samples are the strategy's, of this epoch."""
    data = load("digits")
    whole, first, second = (longtail_run.Run(settings("ce", sampler=sampler), data, Batches(data)) for _ in range(3))
    for _ in range(20):
        whole.train_step()
    for _ in range(17):
        first.train_step()
    second.load_state_dict(first.state_dict())
    for _ in range(3):
        second.train_step()
    assert_same_state(second.state_dict(), whole.state_dict())
    part = longtail_data.split(data, 0)
    epochs = {"epochs": 2} if sampler == "progressive" else {}
    drawn = ltk.samplers.LongTailSampler(
        data.labels, sampler, indices=part.train, num_samples=len(part.train), **epochs
    )
    drawn.set_epoch(1)
    assert torch.equal(second.samplers[0].indices(0, len(drawn)), torch.tensor(list(drawn)))


def test_a_checkpoint_of_another_configuration_is_refused(tmp_path: Path) -> None:
    data = load("digits")
    run = longtail_run.Run(settings("la"), data, Batches(data))
    path = tmp_path / "run.pt"
    checkpoint.save(path, run.config, run.state_dict())
    for changes, message in (
        ({"epochs": 3}, "written with epochs 2; this call has epochs 3"),
        ({"validate": True}, "written with validate False, loss .*; this call has validate True"),
        (
            {"seed": 2, "backend": "reference"},
            "written with seed 0, backend None; this call has seed 2, backend reference",
        ),
        ({"method": "vs"}, "method la, loss LogitAdjustedLoss"),
        ({"sampler": "reversed"}, "written with sampler instance; this call has sampler reversed"),
    ):
        other = longtail_run.Run(settings(**{"method": "la", **changes}), data, Batches(data))
        with pytest.raises(workers.UserError, match=message):
            checkpoint.load(path, other.config)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 half a file"])
def test_a_broken_checkpoint_is_named(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    path.write_bytes(content)
    with pytest.raises(workers.UserError, match=r"run\.pt is not a readable checkpoint .*delete it"):
        checkpoint.load(path, {})


def test_a_checkpoint_runs_no_code(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    torch.save({"config": {}, "state": {"model": subprocess.Popen}}, path)
    with pytest.raises(workers.UserError, match="not a readable checkpoint"):
        checkpoint.load(path, {})


def test_a_file_is_whole_whenever_its_writer_is_killed(tmp_path: Path) -> None:
    """The writer fills 8 MB with one byte, in pieces, again and again; what is found must be one of these, whole."""
    path = tmp_path / "file"
    code = f"""
import itertools, pathlib, checkpoint
def fill(value):
    return lambda file: [file.write(bytes([value]) * 2**16) for _ in range(128)]
for turn in itertools.count():
    checkpoint.write_atomically(pathlib.Path({str(path)!r}), fill(turn % 256))
"""
    environment = {**os.environ, "PYTHONPATH": str(PROGRAM)}
    for pause in (0.0, 0.013, 0.037, 0.071):
        writer = subprocess.Popen([sys.executable, "-c", code], env=environment)
        changed = path.stat().st_mtime_ns if path.exists() else None
        wait_for(lambda changed=changed: path.exists() and path.stat().st_mtime_ns != changed)
        time.sleep(pause)
        writer.kill()
        writer.wait()
        content = path.read_bytes()
        assert len(content) == 2**23 and content.count(content[:1]) == 2**23


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    checkpoint.write_atomically(path, lambda file: file.write(b"old"))

    def fail(file: Any) -> None:
        file.write(b"new")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        checkpoint.write_atomically(path, fail)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]


# ------------------------------------------------------------------------------------------------------------- workers


def test_results_come_in_the_order_of_the_tasks() -> None:
    events: list[tuple[str, int, Any]] = []
    tasks = [{"kind": "square", "value": value} for value in range(7)]
    results = workers.run_all(tasks, train_worker_tasks.work, 2, lambda *event: events.append(event))
    assert results == [0, 1, 4, 9, 16, 25, 36]
    for index in range(7):
        mine = [event for event in events if event[1] == index]
        assert mine == [("started", index, None), ("progress", index, index), ("done", index, index**2)]


@pytest.mark.parametrize(
    ("kind", "message", "details"),
    [
        ("wrong setting", "^no such thing$", False),
        ("bug", "^ZeroDivisionError: in the task$", True),
        ("killed", "killed by SIGKILL; is the machine out of memory", False),
    ],
)
def test_a_failure_stops_the_others_which_save(kind: str, message: str, details: bool, tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    tasks = [{"kind": "until stopped", "saved": str(saved)}, {"kind": kind}, {"kind": "square", "value": 1}]
    with pytest.raises(workers.WorkerFailed, match=message) as failure:
        workers.run_all(tasks, train_worker_tasks.work, 2)
    assert failure.value.task == 1
    assert ("Traceback" in failure.value.details) == details
    assert saved.read_text() == "saved"
