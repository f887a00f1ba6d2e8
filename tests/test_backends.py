"""Which backend serves a call: the automatic choice, asking for one, the environment, `explain`, and life without the
library.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import pickle
import pkgutil
import re
import shutil
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ltkernels as ltk
from ltkernels import backends
from ltkernels.ops import cross_entropy as op
from ltkernels.ops import table as op_table

cross_entropy = ltk.functional.cross_entropy
PACKAGE = Path(ltk.__file__).parent

needs_cpu = pytest.mark.skipif(
    backends.status()["cpu"] is not None, reason="the C++ library is not built: " + str(backends.status()["cpu"])
)


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(4, 7, requires_grad=True), torch.tensor([0, 3, 6, 1])


def serves() -> str:
    """The backend that a plain call takes now."""
    backend = ltk.explain(cross_entropy, *batch()).backend
    assert backend is not None
    return backend


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the backends whose forward ran, in order."""
    names: list[str] = []
    original = op.TABLE.choose

    def choose(*args: Any) -> backends.Implementation:
        row = original(*args)
        names.append(row.backend)
        return row

    monkeypatch.setattr(op.TABLE, "choose", choose)
    return names


# --- What is there ---


@needs_cpu
def test_available_backends() -> None:
    assert ltk.available_backends() == ltk.available_backends("cpu") == ("cpu", "reference")
    assert ltk.available_backends(torch.device("cpu")) == ("cpu", "reference")
    if not torch.cuda.is_available():
        assert ltk.available_backends("cuda:1") == ("reference",)
    with pytest.raises(ValueError, match="abacus"):
        ltk.available_backends("abacus")
    assert set(backends.status()) == set(backends.BACKENDS)
    assert backends.status()["reference"] is None


# --- Asking for one ---


@needs_cpu
def test_use_backend_as_a_block_and_nested(used: list[str]) -> None:
    x, y = batch()
    with ltk.use_backend("reference") as entered:
        assert isinstance(entered, ltk.use_backend)
        one = cross_entropy(x, y)
        with ltk.use_backend("cpu"):
            two = cross_entropy(x, y)
            with ltk.use_backend(None):
                cross_entropy(x, y)
        cross_entropy(x, y)
    cross_entropy(x, y)
    assert used == ["reference", "cpu", "cpu", "reference", "cpu"]
    torch.testing.assert_close(one, two)


@needs_cpu
def test_use_backend_from_now_on() -> None:
    before = ltk.use_backend(None)
    try:
        ltk.use_backend("reference")
        assert serves() == "reference"
        ltk.use_backend("cpu")
        assert serves() == "cpu"
        ltk.use_backend(None)
        assert serves() == "cpu"
    finally:
        before.__exit__()


@needs_cpu
def test_use_backend_is_undone_by_an_exception_and_can_be_entered_again() -> None:
    block = ltk.use_backend("reference")
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), block:
            assert serves() == "reference"
            raise ZeroDivisionError
        assert serves() == "cpu"


@pytest.mark.parametrize("name", ("Reference", "", "gpu"))
def test_an_unknown_backend_is_refused_and_changes_nothing(name: str) -> None:
    before = serves()
    message = f"backend: expected 'cuda', 'triton', 'cpu', 'reference' or None, found {name!r}"
    with pytest.raises(ValueError, match=message):
        ltk.use_backend(name)
    assert serves() == before


needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@needs_no_gpu
@pytest.mark.parametrize("name", ("triton", "cuda"))
def test_a_backend_that_is_not_there_is_refused_with_the_reason(name: str) -> None:
    before = serves()
    reason = backends.status()[name]
    assert reason is not None and reason.startswith("torch ")  # and not that something was not built or installed
    with pytest.raises(RuntimeError, match=f"backend '{name}' is not available: {re.escape(reason)}"):
        ltk.use_backend(name)
    assert serves() == before


@needs_cpu
def test_a_backend_that_cannot_serve_a_call_raises_at_the_call() -> None:
    x, y = batch()
    weight = torch.ones(7, requires_grad=True)
    with ltk.use_backend("cpu"):
        with pytest.raises(
            RuntimeError, match=r"cross_entropy: backend 'cpu' was asked for but cannot serve this call: .*gradient"
        ):
            cross_entropy(x, y, weight)
        with pytest.raises(RuntimeError, match="runs on cpu, the tensors are on meta"):
            cross_entropy(x.detach().to("meta"), y.to("meta"))
        cross_entropy(x, y, weight.detach())  # and the next one is served


@needs_cpu
def test_use_backend_reaches_all_threads() -> None:
    """As its docstring says; a data loader's or a server's thread computes with what was asked for."""
    seen: list[str] = []
    with ltk.use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(serves()))
        thread.start()
        thread.join()
    assert seen == ["reference"]


@needs_cpu
def test_the_backward_belongs_to_the_backend_of_the_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = batch()
    with ltk.use_backend("reference"):
        loss = cross_entropy(x, y, reduction="none")
    with ltk.use_backend("cpu"), monkeypatch.context() as patch:
        patch.setattr(op_table, "compiled_ops", lambda *names: pytest.fail("cpu computed the backward"))
        (expected,) = torch.autograd.grad(loss.sum(), x)
    loss = cross_entropy(x, y, reduction="none")
    with ltk.use_backend("reference"):
        (actual,) = torch.autograd.grad(loss.sum(), x)
    torch.testing.assert_close(actual, expected)


# --- Saying why ---


@needs_cpu
def test_explain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    x, y = batch()
    text = ltk.explain(cross_entropy, x, y, label_smoothing=0.1)
    assert text.splitlines() == [
        "cross_entropy on cpu, float32 (4, 7); backends, fastest first:",
        "  cuda       no: runs on cuda, the tensors are on cpu",
        "  triton     no: runs on cuda, the tensors are on cpu",
        "  cpu        serves this call",
        "  reference  could serve this call",
        f"what runs: C++ for {backends.cpu_instruction_set()} on up to 3 threads; csrc/cpu/kernels_cross_entropy.cpp",
    ]
    assert (text.op, text.backend) == ("cross_entropy", "cpu")
    assert repr(text) == text and repr([text]) == f"[{text}]"  # a prompt shows lines, not one line with \\n in it
    restored = pickle.loads(pickle.dumps(text))
    assert (restored, restored.backend) == (text, "cpu")
    with ltk.use_backend("reference"):
        text = ltk.explain(cross_entropy, x, y)
    assert "reference  serves this call (asked for)" in text and text.backend == "reference"
    assert text.endswith("what runs: PyTorch's own ops and autograd; ltkernels/reference")
    weight = torch.ones(7, requires_grad=True)
    text = ltk.explain(cross_entropy, x, y, weight)
    assert "cpu        no: target, weight, class_margin or sample_weight requires a gradient" in text
    assert "reference  serves this call" in text
    with ltk.use_backend("cpu"):
        text = ltk.explain(cross_entropy, x, y, weight)
    assert text.endswith("backend 'cpu' was asked for: the call would raise") and text.backend is None


@needs_cpu
def test_explain_follows_threads_and_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    before = backends.cpu_instruction_set()
    try:
        backends.cpu_instruction_set("portable")
        text = ltk.explain(cross_entropy, *batch())
    finally:
        backends.cpu_instruction_set(before)
    assert "what runs: C++ for portable on 1 thread; csrc/cpu/kernels_cross_entropy.cpp" in text


def test_explain_names_files_that_are_there() -> None:
    """Of every op in every backend that has it: all tables, whatever op is added."""
    for module in pkgutil.iter_modules([str(PACKAGE / "ops")]):
        importlib.import_module(f"ltkernels.ops.{module.name}")
    tables = [table for table in gc.get_objects() if type(table) is backends.Table and table.rows]
    assert {table.op for table in tables} >= {"cross_entropy", "lade", "expert_linear", "sample_indices"}
    for table in tables:
        for row in table.rows:
            _, _, pattern = table._kernels_of(row).rpartition("; ")
            assert list(PACKAGE.parent.glob(pattern)), (table.op, row.backend, pattern)


def test_a_preference_decides_between_gpu_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first that holds for the device, type and number of classes; tables and meta tensors stand for a GPU."""
    measured = backends.Preference("triton", "measured", device="H100", dtype=torch.bfloat16, classes=(1, 999))
    model = backends.Preference("cuda", "by the model")
    table = backends.Table("cross_entropy", op.TABLE.rows, (measured, model))
    names = {"NVIDIA H100 80GB HBM3": torch.zeros(2, 10), "NVIDIA A100-SXM4-40GB": torch.zeros(2, 10)}
    for name, x in names.items():
        monkeypatch.setattr(backends, "_device_name", lambda device, name=name: name)
        first = measured if "H100" in name else model
        assert table.preferred(x.bfloat16()) is first
        assert table.preferred(x) is model and table.preferred(torch.zeros(2, 1000).bfloat16()) is model
    assert backends.Table("cross_entropy", []).preferred(x) is None


@needs_cpu
def test_explain_modules() -> None:
    x, y = batch()
    for criterion in (ltk.losses.CrossEntropyLoss(), ltk.losses.LDAMLoss([9, 7, 5, 3, 2, 1, 1])):
        assert ltk.explain(criterion, x, y).backend == "cpu"
    assert ltk.explain(ltk.losses.SeesawLoss(7), x, y).op == "row_cross_entropy"
    assert ltk.explain(ltk.losses.RIDELoss([9, 7, 5, 3, 2, 1, 1]), torch.randn(3, 4, 7), y).op == "expert_cross_entropy"
    compiled = torch.compile(lambda logits: cross_entropy(logits, y), backend="eager")
    assert ltk.explain(compiled, x).backend == "cpu"
    head = torch.nn.Sequential(torch.nn.Linear(3, 7))
    assert "cpu        serves" in ltk.explain(lambda f: ltk.losses.FocalLoss()(head(f), y), torch.randn(4, 3))


def test_explain_computes_nothing_and_leaves_no_trace(used: list[str]) -> None:
    x, y = batch()
    with pytest.raises(IndexError):  # as in a call: the arguments are checked before a backend looks at the values ...
        cross_entropy(x, torch.full((4,), 99))
    ltk.explain(cross_entropy, x, torch.full((4,), 99))  # ... which explain does not
    with pytest.raises(ValueError, match="target: expected labels of shape"):
        ltk.explain(cross_entropy, x, y[:2])
    with pytest.raises(ValueError, match="fn: expected a function that calls an op of ltkernels, found"):
        ltk.explain(torch.relu, x)
    used.clear()
    cross_entropy(x, y).backward()
    assert used and x.grad is not None


def test_explain_in_one_thread_does_not_stop_another() -> None:
    x, y = batch()
    inside, done = threading.Event(), threading.Event()
    losses: list[Tensor] = []

    def train() -> None:
        inside.wait(10)
        try:
            losses.append(cross_entropy(x, y))
        finally:
            done.set()

    def slow_call() -> Tensor:
        inside.set()
        done.wait(10)
        return cross_entropy(x, y)

    thread = threading.Thread(target=train)
    thread.start()
    text = ltk.explain(slow_call)
    thread.join()
    assert "serves this call" in text and len(losses) == 1


@needs_cpu
def test_the_reference_in_place_of_the_cpu_is_said_once() -> None:
    x, y = batch()
    weight = torch.ones(7, requires_grad=True)
    op.TABLE._told.clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            cross_entropy(x, y, weight)
    (warning,) = caught
    assert str(warning.message).startswith("ltkernels: cross_entropy does not use the cpu backend: target, weight,")
    assert warning.filename == __file__  # the caller's line, not ours
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cross_entropy(x, y, weight)
        with ltk.use_backend("reference"):
            cross_entropy(x, y)  # asked for: nothing to say


# --- Instruction sets ---


@needs_cpu
def test_forced_instruction_sets_agree_and_stay_until_changed() -> None:
    before = backends.cpu_instruction_set()
    x = torch.randn(16, 100, requires_grad=True)
    y = torch.randint(100, (16,))
    results: dict[str, Tensor] = {}
    try:
        for name in backends.CPU_INSTRUCTION_SETS:
            try:
                assert backends.cpu_instruction_set(name) == name
            except ValueError as error:
                assert str(error) == f"instruction set: {name!r} is not offered by this processor or was not built"
                continue
            assert backends.cpu_instruction_set() == name
            (results[name],) = torch.autograd.grad(cross_entropy(x, y), x)
    finally:
        backends.cpu_instruction_set(before)
    assert "portable" in results and before in results
    for gradient in results.values():
        torch.testing.assert_close(gradient, results["portable"], rtol=1e-5, atol=1e-9)
    # They are different code: with fused multiply-add the last bits differ.
    assert len(results) == 1 or any(not torch.equal(g, results["portable"]) for g in results.values())


@needs_cpu
def test_an_unknown_instruction_set_is_refused() -> None:
    before = backends.cpu_instruction_set()
    message = "instruction set: expected 'avx512' or 'avx2' or 'portable', found 'sse9'"
    with pytest.raises(ValueError, match=message):
        backends.cpu_instruction_set("sse9")
    assert backends.cpu_instruction_set() == before


# --- The environment, in processes of their own: it is read once ---

PROGRAM = """
import json, sys, warnings
import torch, ltkernels as ltk
from ltkernels import backends
report = {"file": ltk.__file__}
x = torch.linspace(-2, 2, 12).reshape(3, 4).requires_grad_()
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    try:
        for _ in range(2):
            loss = ltk.functional.cross_entropy(x, torch.tensor([0, 1, 3]), label_smoothing=0.1)
        loss.backward()
        report["loss"], report["gradient"] = loss.item(), x.grad.tolist()
        report["explained"] = ltk.explain(ltk.functional.cross_entropy, x, torch.tensor([0, 1, 3]))
        report["set"] = None if backends.status()["cpu"] else backends.cpu_instruction_set()
    except Exception as error:
        report["error"] = [type(error).__name__, str(error)]
report["warned"] = [str(w.message) for w in caught]
report["serves"] = ltk.available_backends() if "error" not in report else None
print(json.dumps(report))
"""


def run(where: Path = PACKAGE.parent, **environment: str) -> dict[str, Any]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("LTK_")}
    clean |= {"PYTHONPATH": str(where), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=clean | environment, cwd=where, capture_output=True, text=True, check=True
    )
    report: dict[str, Any] = json.loads(done.stdout)
    assert Path(report["file"]).is_relative_to(where)
    return report


def assert_right(report: dict[str, Any]) -> None:
    x = torch.linspace(-2, 2, 12).reshape(3, 4).requires_grad_()
    loss = torch.nn.functional.cross_entropy(x, torch.tensor([0, 1, 3]), label_smoothing=0.1)
    loss.backward()
    assert report["loss"] == pytest.approx(loss.item(), rel=1e-6)
    torch.testing.assert_close(torch.tensor(report["gradient"]), x.grad)


@needs_cpu
def test_environment_chooses_backend_and_instruction_set() -> None:
    report = run(LTK_BACKEND="reference", LTK_CPU_ISA="portable")
    assert_right(report)
    assert "reference  serves this call (asked for)" in report["explained"]
    assert report["set"] == "portable" and report["warned"] == []
    assert report["serves"] == ["cpu", "reference"]


@needs_cpu
@pytest.mark.parametrize(
    ("variable", "value", "kind", "message"),
    [
        (
            "LTK_BACKEND",
            "cup",
            "ValueError",
            "backend: expected 'cuda', 'triton', 'cpu', 'reference' or None, found 'cup'",
        ),
        pytest.param(
            "LTK_BACKEND",
            "cuda",
            "RuntimeError",
            f"backend 'cuda' is not available: {backends.status()['cuda']}",
            marks=needs_no_gpu,
        ),
        ("LTK_CPU_ISA", "AVX", "ValueError", "instruction set: expected 'avx512' or 'avx2' or 'portable', found 'AVX'"),
    ],
)
def test_wrong_environment_is_named_by_the_first_call(variable: str, value: str, kind: str, message: str) -> None:
    assert run(**{variable: value})["error"] == [kind, message]


# --- Without the library ---


@pytest.mark.parametrize("library", ("missing", "broken"))
def test_without_the_library_the_reference_serves_and_says_so_once(library: str, tmp_path: Path) -> None:
    shutil.copytree(PACKAGE, tmp_path / "ltkernels", ignore=shutil.ignore_patterns("lib", "__pycache__", "*.so"))
    reason = "libltkernels_cpu.so was not built"
    if library == "broken":
        (tmp_path / "ltkernels/lib").mkdir()
        (tmp_path / "ltkernels/lib/libltkernels_cpu.so").write_bytes(b"not a shared object")
        reason = "libltkernels_cpu.so could not be loaded"
    report = run(tmp_path)
    assert_right(report)
    assert report["serves"] == ["reference"]
    assert len(report["warned"]) == 1 and reason in report["warned"][0]
    assert f"cpu        no: {reason}" in report["explained"]
    assert "reference  serves this call" in report["explained"]
    if library == "missing":
        error = run(tmp_path, LTK_BACKEND="cpu")["error"]
        assert error[0] == "RuntimeError" and error[1].startswith(f"backend 'cpu' is not available: {reason}")
