"""The command line: `ltkernels info` in both formats, what it says when something is wrong, and the exit codes."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys

import pytest
import torch

import ltkernels
from ltkernels import backends, cli


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python -m ltkernels` in a process of its own: variables are read when backends load."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("LTK_")}
    command = [sys.executable, "-m", "ltkernels", *arguments]
    return subprocess.run(command, env=clean | environment, capture_output=True, text=True)


def test_info_json_agrees_with_the_library(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ltkernels"] == ltkernels.__version__
    assert found["python"] == platform.python_version()
    assert found["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()
    assert found["backends"] == backends.status()
    assert found["serves"]["cpu"] == list(ltkernels.available_backends("cpu"))
    if backends.status()["cpu"] is None:
        assert found["instruction_set"] in found["instruction_sets"]
        assert found["instruction_sets"][-1] == "portable"  # no machine lacks it


def test_info_leaves_the_instruction_set_as_it_was() -> None:
    if reason := backends.status()["cpu"]:
        pytest.skip(reason)
    before = backends.cpu_instruction_set()
    try:
        backends.cpu_instruction_set("portable")
        assert cli.collect_info()["instruction_set"] == "portable"
        assert backends.cpu_instruction_set() == "portable"
    finally:
        backends.cpu_instruction_set(before)


def test_host_module_reports_its_build() -> None:
    host = pytest.importorskip("ltkernels._host", reason="the C++ host module is not built")
    info = host.build_info()
    assert info["compiler"] in ("gcc", "clang")
    assert info["compiler_version"][0].isdigit()
    assert info["cxx_standard"] >= 201703
    assert "-ffp-contract=off" in info["cxx_flags"]
    assert info["instruction_sets"][-1] == "portable"
    assert set(info["instruction_sets"]) <= set(backends.CPU_INSTRUCTION_SETS)
    if backends.status()["cpu"] is None:  # two ways to ask the CPU, one answer
        assert cli.collect_info()["instruction_sets"] == info["instruction_sets"]


def test_info_for_a_person_gives_a_reason_for_every_missing_backend() -> None:
    found = {
        "ltkernels": "0.1.0", "python": "3.11.7", "torch": "2.13.0", "numpy": None, "triton": None,
        "platform": "Linux", "threads": 2, "environment": {"LTK_BACKEND": "cpu"},
        "build": {"compiler": "gcc", "compiler_version": "12.2.0"},
        "backends": {"cuda": "torch was built without CUDA", "cpu": None, "reference": None},
        "serves": {"cpu": ["cpu", "reference"]},
        "instruction_set": "avx2", "instruction_sets": ["avx2", "portable"],
    }  # fmt: skip
    assert cli.format_info(found).splitlines() == [
        "ltkernels     0.1.0",
        "python        3.11.7",
        "torch         2.13.0",
        "numpy         not installed",
        "triton        not installed",
        "platform      Linux",
        "threads       2",
        "compiler      gcc 12.2.0",
        "instructions  avx2 (LTK_CPU_ISA forces one of avx2, portable)",
        "on cpu        cpu, reference (fastest first)",
        "environment   LTK_BACKEND=cpu",
        "backends",
        "  cuda        no: torch was built without CUDA",
        "  cpu         yes",
        "  reference   yes",
    ]


def test_info_shows_what_the_environment_asks_for() -> None:
    answer = run("info", LTK_BACKEND="reference")
    assert answer.returncode == 0, answer.stderr
    assert "environment   LTK_BACKEND=reference" in answer.stdout


def test_forced_instruction_set_is_in_use() -> None:
    if reason := backends.status()["cpu"]:
        pytest.skip(reason)
    answer = run("info", "--json", LTK_CPU_ISA="portable")
    assert json.loads(answer.stdout)["instruction_set"] == "portable"


def test_unknown_backend_in_the_environment_is_one_line_and_status_1() -> None:
    answer = run("info", LTK_BACKEND="fast")
    assert answer.returncode == 1
    assert answer.stdout == ""
    assert answer.stderr.startswith("ltkernels: backend: expected 'cuda', 'triton', 'cpu', 'reference'")
    assert "found 'fast'" in answer.stderr and "Traceback" not in answer.stderr


def test_unknown_instruction_set_in_the_environment_is_one_line_and_status_1() -> None:
    if reason := backends.status()["cpu"]:
        pytest.skip(reason)
    answer = run("info", LTK_CPU_ISA="avx1024")
    assert answer.returncode == 1
    assert answer.stderr.startswith("ltkernels: ")
    assert "found 'avx1024'" in answer.stderr and "Traceback" not in answer.stderr


@pytest.mark.parametrize("arguments", [[], ["train"], ["info", "--xml"], ["info", "now"]])
def test_wrong_arguments_print_the_usage_and_exit_with_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("usage: ltkernels")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"ltkernels {ltkernels.__version__}\n"


def test_bench_gets_its_arguments_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    from ltkernels import bench

    seen: list[list[str]] = []
    monkeypatch.setattr(bench, "main", lambda argv: seen.append(argv) or 3)
    assert cli.main(["bench", "--threads", "1", "--", "x"]) == 3
    assert seen == [["--threads", "1", "--", "x"]]
