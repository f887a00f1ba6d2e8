"""The demo program as a user runs it, also killed and resumed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import checkpoint
import longtail_data
import longtail_metrics
import longtail_plan
import longtail_run
import numpy as np
import pytest
import torch
import train
import workers
from longtail_cases import PROGRAM, assert_same_state, settings, wait_for


def start(out: Path, *arguments: str) -> subprocess.Popen[str]:
    """The program from another folder, in a process group of its own."""
    command = [sys.executable, str(PROGRAM / "train.py"), "--data", "digits", "--seeds", "1", "--out", str(out)]
    pipe = subprocess.PIPE
    # Tests that run in the background of a script ignore Ctrl-C, and what they start would inherit that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(
            [*command, *arguments], stdout=pipe, stderr=pipe, text=True, start_new_session=True, cwd=out.parent
        )
    finally:
        signal.signal(signal.SIGINT, before)


def group_is_gone(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


def state_in(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)["state"]


NAME = "ldam-drw-seed0.pt"
LDAM = ("--method", "ldam-drw")
STEPS_OF_AN_EPOCH = 14


@dataclass
class Ended:
    """A program that a signal ended, and the step of its checkpoint just before that."""

    out: Path
    program: subprocess.Popen[str]
    stderr: str
    step_before: int

    @property
    def checkpoint(self) -> Path:
        return self.out / "checkpoints" / NAME


def signalled_within_an_epoch(program: subprocess.Popen[str], out: Path, after: int, number: int, group: bool) -> Ended:
    """Sends the signal, to the group or to the parent alone, once ``after`` steps are in the checkpoint."""
    path = out / "checkpoints" / NAME
    while True:
        wait_for(path.exists)
        os.killpg(program.pid, signal.SIGSTOP)
        step = state_in(path)["step"]
        # A step or two may follow before the worker ends; that should be within the same epoch.
        if step > after and 0 < step % STEPS_OF_AN_EPOCH < STEPS_OF_AN_EPOCH - 3:
            break
        os.killpg(program.pid, signal.SIGCONT)
        time.sleep(0.05)
    if group:
        os.killpg(program.pid, number)
    else:
        os.kill(program.pid, number)
        program.wait()  # a dying parent holds its pipe open for a while, in which a worker set free would train on
    os.killpg(program.pid, signal.SIGCONT)
    _, stderr = program.communicate(timeout=60)
    return Ended(out, program, stderr, step)


# One run in three lives, each going on from the one before: ended by Ctrl-C, ended by SIGKILL, and then to its end.


@pytest.fixture(scope="module")
def after_ctrl_c(tmp_path_factory: pytest.TempPathFactory) -> Ended:
    out = tmp_path_factory.mktemp("program") / "out"
    program = start(out, *LDAM, "--checkpoint-every", "0")
    return signalled_within_an_epoch(program, out, 30, signal.SIGINT, group=True)


@pytest.fixture(scope="module")
def after_kill(after_ctrl_c: Ended) -> Ended:
    out = after_ctrl_c.out
    wait_for(lambda: group_is_gone(after_ctrl_c.program.pid))
    stopped_at = state_in(after_ctrl_c.checkpoint)["step"]
    program = start(out, *LDAM, "--checkpoint-every", "0", "--resume")
    return signalled_within_an_epoch(program, out, stopped_at + 30, signal.SIGKILL, group=False)


@pytest.fixture(scope="module")
def finished(after_kill: Ended) -> tuple[Path, str]:
    wait_for(lambda: group_is_gone(after_kill.program.pid))
    program = start(after_kill.out, "--method", "la-posthoc", *LDAM, "ce", "--workers", "2", "--resume")
    stdout, stderr = program.communicate(timeout=120)
    assert program.returncode == 0, stderr
    return after_kill.out, stdout


@pytest.fixture(scope="module")
def refused(tmp_path_factory: pytest.TempPathFactory) -> Iterator[subprocess.Popen[str]]:
    """Started early, so that it runs beside the others."""
    out = tmp_path_factory.mktemp("refused") / "out"
    run = longtail_run.Run(settings("la", epochs=50000), *longtail_run.load_data("digits"))
    checkpoint.save(out / "checkpoints" / "la-seed0.pt", run.config, run.state_dict())
    program = start(out, "--method", "la", "--epochs", "30", "--resume")
    yield program
    program.kill()


def test_ctrl_c_saves(refused: subprocess.Popen[str], after_ctrl_c: Ended) -> None:
    assert after_ctrl_c.program.returncode == 130
    assert "--resume" in after_ctrl_c.stderr and "Traceback" not in after_ctrl_c.stderr, after_ctrl_c.stderr
    wait_for(lambda: group_is_gone(after_ctrl_c.program.pid))
    state = state_in(after_ctrl_c.checkpoint)
    assert "result" not in state and state["step"] > after_ctrl_c.step_before


def test_a_killed_parent_takes_its_worker_along(after_kill: Ended) -> None:
    assert after_kill.program.returncode == -signal.SIGKILL
    wait_for(lambda: group_is_gone(after_kill.program.pid))
    state = state_in(after_kill.checkpoint)
    assert "result" not in state and state["step"] % STEPS_OF_AN_EPOCH != 0


def test_a_stopped_and_killed_program_resumes_to_the_same_bits(finished: tuple[Path, str]) -> None:
    run = longtail_run.Run(settings("ldam-drw", epochs=40), *longtail_run.load_data("digits"))
    while run.step < run.total_steps:
        run.train_step()
    result = run.result()
    state = state_in(finished[0] / "checkpoints" / NAME)
    assert_same_state(state, {"model": run.model.state_dict(), "result": result})
    method = json.loads((finished[0] / "results.json").read_text())["methods"]["ldam-drw"]
    assert method["recall"] == result["outcomes"]["ldam-drw"]["recall"]
    for metric in longtail_metrics.METRICS:
        assert method["accuracy"][metric]["mean"] == result["outcomes"]["ldam-drw"][metric]


def test_the_program_ends_with_tables_and_a_sentence(finished: tuple[Path, str]) -> None:
    out, stdout = finished
    summary = json.loads((out / "results.json").read_text())
    assert list(summary["methods"]) == ["ce", "la-posthoc", "ldam-drw"]
    assert "Accuracy in % on the test part" in stdout
    for name in ("ce", "la-posthoc", "ldam-drw"):
        assert longtail_plan.TITLES[name] in stdout
        figures = summary["methods"][name]["accuracy"]
        assert 0.5 < figures["balanced"]["mean"] <= 1 and figures["balanced"]["sd"] is None
        assert figures["balanced"]["mean"] == pytest.approx(np.mean(summary["methods"][name]["recall"]))
    for title in longtail_metrics.METRICS.values():
        assert title in stdout
    sentence = stdout.strip().splitlines()[-1]
    best = max(("ce", "ldam-drw"), key=lambda name: summary["methods"][name]["accuracy"]["balanced"]["mean"])
    time = summary["methods"][best]["time"]
    assert sentence.startswith(f"In short: {longtail_plan.TITLES[best]}") and sentence.endswith(".")
    assert f"{100 * summary['methods'][best]['accuracy']['balanced']['mean']:.1f} %" in sentence
    assert f"{1e3 * time['loss']['median']:.3f} ms with ltkernels" in sentence
    assert time["batch_size"] == 32 and summary["data"]["num_classes"] == 10
    assert summary["data"]["class_counts"] == longtail_data.load("digits").train_limit.tolist()


def test_the_program_draws_a_plot(finished: tuple[Path, str]) -> None:
    content = (finished[0] / "accuracy.png").read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n") and len(content) > 10_000


def test_a_resume_with_other_settings_is_refused(refused: subprocess.Popen[str]) -> None:
    _, stderr = refused.communicate(timeout=60)
    assert refused.returncode == 1
    assert "belongs to another configuration: it was written with epochs 50000; this call has epochs 30" in stderr
    assert "Traceback" not in stderr


def test_ctrl_c_while_a_worker_is_still_importing(tmp_path: Path) -> None:
    program = start(tmp_path / "out", "--method", "ce")
    assert program.stdout is not None
    while "run 1 of 1 starts" not in (line := program.stdout.readline()):
        assert line, "the program ended before it began"
    os.killpg(program.pid, signal.SIGINT)
    _, stderr = program.communicate(timeout=60)
    assert program.returncode == 130 and stderr.startswith("Stopped."), stderr
    wait_for(lambda: group_is_gone(program.pid))


def test_a_failed_worker_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def fail(*arguments: Any) -> None:
        raise workers.WorkerFailed(1, "ZeroDivisionError: in the task", "Traceback [of the worker]\n")

    monkeypatch.setattr(train, "run_all", fail)
    assert train.main(["--data", "digits", "--method", "ce", "vs", "--out", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert "Traceback [of the worker]\ntrain.py: VS, seed 0 failed: ZeroDivisionError: in the task\n" in error
    assert "with --resume goes on" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "imagenet"], "invalid choice: 'imagenet' (choose from"),
        (["--method", "ce", "sgd"], "invalid choice: 'sgd' (choose from"),
        (["--method"], "expected at least one argument"),
        (["--backend", "tpu"], "invalid choice: 'tpu' (choose from"),
        (["--sampler", "balanced"], "invalid choice: 'balanced' (choose from"),
        (["--epochs", "0"], "argument --epochs: expected a whole number >= 1, found '0'"),
        (["--epochs", "two"], "expected a whole number >= 1, found 'two'"),
        (["--seeds", "-1"], "argument --seeds: expected a whole number >= 1, found '-1'"),
        (["--workers", "1.5"], "argument --workers: expected a whole number >= 1, found '1.5'"),
        (["--checkpoint-every", "-1"], "expected a number >= 0, found '-1'"),
        (["--checkpoint-every", "nan"], "expected a number >= 0, found 'nan'"),
        (["--vs-gamma", "-0.1"], "argument --vs-gamma: expected a number >= 0, found '-0.1'"),
        (["--epoch", "3"], "unrecognized arguments: --epoch 3"),
        (["--out", __file__], "argument --out: expected a folder, found the file"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        train.main(arguments)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_a_folder_that_can_not_be_made_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["--out", "/proc/no/folder"]) == 1
    assert "/proc/no" in capsys.readouterr().err


def test_methods_are_in_one_order_without_repeats() -> None:
    args = train.parse(["--method", "vs", "la-posthoc", "--method", "ce", "vs", "--data", "digits"])
    assert args.method == ["ce", "la-posthoc", "vs"] and args.out == Path("runs/demo/digits")
    assert train.parse([]).method == list(longtail_plan.DEFAULT)
    runs = list(longtail_plan.runs("digits", ["ce", "la-posthoc", "vs"], seeds=2, vs_gamma=0.0))
    assert [(run.method, run.seed) for run in runs] == [("ce", 0), ("vs", 0), ("ce", 1), ("vs", 1)]
    assert {(run.epochs, run.vs_gamma) for run in runs} == {(longtail_plan.RECIPES["digits"].epochs, 0.0)}
