"""Memory that changes behind the op's back: an exception, never a crash.

PyTorch's version counters do not see a write through NumPy or ``.data``, so the backward cannot believe what was
checked at the forward. Each scenario runs in a process of its own: one that crashes fails its own test only.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from autograd_cases import CALLS, op_arguments, problem, through_dispatcher, through_func
from cross_entropy_cases import cross_entropy
from torch import Tensor

# Said once a process where the reference serves a call on the CPU: test_backends.py.
pytestmark = pytest.mark.filterwarnings("ignore:ltkernels. cross_entropy does not use the cpu backend")
nan, inf = torch.nan, torch.inf

# --- Scenarios: what is done, and the names of the exceptions that may come of it ---

Scenario = Callable[[], object]
SCENARIOS: dict[str, tuple[Scenario, set[str]]] = {}
REFUSED = {"RuntimeError", "ValueError", "TypeError"}  # the C++ core knows no other than RuntimeError
FAR = 10**9  # times a row of floats, this is memory that no process has


def scenario(name: str, expected: set[str], run: Scenario) -> None:
    assert name not in SCENARIOS
    SCENARIOS[name] = (run, expected)


def _row_losses(logits: Tensor, target: Tensor, **arguments: Any) -> Tensor:
    return cross_entropy(logits, target, reduction="none", **arguments).sum()


def _keeps_its_graph(logits: Tensor, target: Tensor) -> Tensor:
    loss = cross_entropy(logits, target)
    loss.backward(retain_graph=True)  # the gradient that the forward computed; the next backward recomputes
    return loss


# Each reads labels in its backward. A reduced loss does only from the second backward on.
READERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "lean": _row_losses,
    "second backward": _keeps_its_graph,
    "learnt scale": lambda x, y: cross_entropy(x, y, class_scale=torch.ones(7, requires_grad=True)),
    "inplace": lambda x, y: _row_losses(x * 1.0, y, inplace=True),
    "func": lambda x, y: through_func(lambda z: _row_losses(z, y))(x),
    "dispatcher": lambda x, y: through_dispatcher(lambda z: _row_losses(z, y))(x),
}


def _change_labels(reader: str, found: int, dtype: type, shared: str, create_graph: bool = False) -> Scenario:
    def run() -> None:
        if shared == "from_numpy":
            buffer = np.array([0, 1, 6], dtype=dtype)
            labels = torch.from_numpy(buffer)
        else:
            labels = torch.from_numpy(np.array([0, 1, 6], dtype=dtype)).clone()
            buffer = labels.numpy()
        x = torch.randn(3, 7, requires_grad=True)
        loss = READERS[reader](x, labels)
        buffer[1] = found
        torch.autograd.grad(loss, x, create_graph=create_graph)

    return run


for _reader in READERS:
    for _found in (FAR, -FAR, 7):  # far away in both directions, and just beyond the last class
        scenario(f"labels: {_reader}, {_found}", {"IndexError"}, _change_labels(_reader, _found, np.int64, "numpy"))
scenario("labels: from_numpy", {"IndexError"}, _change_labels("lean", FAR, np.int64, "from_numpy"))
scenario("labels: int32", {"IndexError"}, _change_labels("lean", -FAR, np.int32, "from_numpy"))
scenario("labels: double backward", {"IndexError"}, _change_labels("lean", FAR, np.int64, "numpy", create_graph=True))


def _change_inner(name: str, *shape: int) -> Scenario:
    """As many numbers as before, but of other dimensions: an index for the one shape leaves the other's memory."""

    def run() -> None:
        values = {"input": torch.randn(3, 7, 4).requires_grad_(), "target": torch.rand(3, 7, 4)}
        loss = cross_entropy(**values, reduction="none").sum()
        values[name].data = torch.rand(shape)
        loss.backward()

    return run


for _name in ("input", "target"):
    scenario(f"{_name}: dimensions split", REFUSED, _change_inner(_name, 3, 7, 2, 2))
    scenario(f"{_name}: dimensions joined", REFUSED, _change_inner(_name, 3, 28))
    scenario(f"{_name}: one dimension", REFUSED, _change_inner(_name, 84))
    scenario(f"{_name}: dimensions swapped", REFUSED, _change_inner(_name, 4, 7, 3))


def _change(name: str, replace: Callable[[Tensor], Tensor], frozen: bool = False) -> Scenario:
    """`.data` becomes another tensor between the two passes, as ``module.half()`` and ``module.to()`` do it."""

    def run() -> None:
        values = {
            "input": torch.randn(3, 7),
            "target": torch.tensor([0, 1, 6]),
            "weight": torch.ones(7),
            "class_scale": torch.ones(7),
            "class_bias": torch.zeros(7),
            "class_margin": torch.zeros(7),
            "sample_weight": torch.ones(3),
        }
        learnt = {"input", "class_scale", "class_bias"} - ({name} if frozen else set())
        for key in learnt:
            values[key] = torch.nn.Parameter(values[key])
        loss = cross_entropy(**values, reduction="none").sum()
        values[name].data = replace(values[name].data)
        torch.autograd.grad(loss, [values[key] for key in sorted(learnt - {name})])

    return run


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "half": lambda v: v.half(),
    "double": lambda v: v.double(),
    "short": lambda v: v[:1].clone(),
    "every second": lambda v: v.repeat(2)[::2],  # may be served: of the right size, read as it lies or copied
}
for _name in ("class_bias", "class_scale", "weight", "class_margin", "sample_weight"):
    for _kind, _replace in CHANGES.items():
        _served = (_name, _kind) == ("class_margin", "short") or _kind == "every second"  # one margin for all classes
        _may = REFUSED | ({"none"} if _served else set())
        scenario(f"{_name}: {_kind}", _may, _change(_name, _replace))
scenario("target: short", REFUSED, _change("target", lambda v: v[:1].clone()))
scenario("target: long", REFUSED, _change("target", lambda v: v.repeat(1000)))
scenario("target: bool", REFUSED, _change("target", lambda v: v.bool()))
scenario("target: probabilities", REFUSED, _change("target", lambda v: torch.rand(3)))
for _kind, _replace in {
    "more rows": lambda v: torch.randn(100_000, 7),
    "fewer rows": lambda v: torch.randn(2, 7),
    "more classes": lambda v: torch.randn(3, 100_000),
    "fewer classes": lambda v: torch.randn(3, 2),
    "no classes": lambda v: torch.randn(3, 0),
    "no rows": lambda v: torch.randn(0, 7),
    "1-d": lambda v: torch.randn(21),
    "transposed": lambda v: torch.randn(7, 3),
    "double": lambda v: v.double(),
    "half": lambda v: v.half(),
    "integers": lambda v: v.long(),
}.items():
    # Half logits have float32 losses and parameters too, so only autograd could tell, and need not.
    _may = REFUSED | ({"none"} if _kind == "half" else set())
    scenario(f"logits: {_kind}", _may, _change("input", _replace))
    scenario(f"frozen logits: {_kind}", _may, _change("input", _replace, frozen=True))


def _logits_alone(reader: str, replace: Callable[[Tensor], Tensor]) -> Scenario:
    def run() -> None:
        x = torch.randn(3, 7, requires_grad=True)
        loss = READERS[reader](x, torch.tensor([0, 1, 6]))
        x.data = replace(x.data)
        torch.autograd.grad(loss, x)

    return run


for _reader in ("lean", "second backward"):
    scenario(f"logits alone: {_reader}, more rows", REFUSED, _logits_alone(_reader, lambda v: torch.randn(100_000, 7)))
    scenario(f"logits alone: {_reader}, wider", REFUSED, _logits_alone(_reader, lambda v: torch.randn(3, 100_000)))
    scenario(f"logits alone: {_reader}, double", REFUSED, _logits_alone(_reader, lambda v: v.double()))


PLACES = dict(
    zip(
        ("input", "target", "weight", "class_scale", "class_bias", "class_margin", "sample_weight"),
        range(7),
        strict=True,
    )
)


def _direct(change: dict[str, Any], backward: bool, call: str = "all") -> Scenario:
    """The dispatcher's op itself, whose caller `functional` did not check. In the backward, `grad` and `state` too."""

    def run() -> None:
        arguments = list(op_arguments(problem(CALLS[call], dtype=torch.float32)))
        loss, state = torch.ops.ltkernels.cross_entropy(*arguments)
        before: dict[str, Any] = {"grad": torch.ones_like(loss), "state": state}
        for key, value in change.items():
            if key in before:
                before[key] = value
            else:
                arguments[PLACES[key]] = value
        if backward:
            torch.ops.ltkernels.cross_entropy_backward(*before.values(), *arguments, True, True, True)
        else:
            torch.ops.ltkernels.cross_entropy(*arguments)

    return run


# The correct call has 3 rows and 5 classes; what is long is long enough to reach other memory.
_NO_ROWS = {"sample_weight": None, "weight": None}
_WRONG: dict[str, dict[str, Tensor | None]] = {
    "target: short": {"target": torch.zeros(1, dtype=torch.int64)},
    "target: empty": {"target": torch.zeros(0, dtype=torch.int64)},
    "target: long": {"target": torch.zeros(100_000, dtype=torch.int64)},
    "target: bool": {"target": torch.zeros(3, dtype=torch.bool)},
    "target: complex": {"target": torch.zeros(3, 5, dtype=torch.complex64)},
    "target: probabilities of rows": {"target": torch.rand(3)},
    "target: probabilities, short": {"target": torch.rand(1, 5)},
    # As many numbers as the logits have, but at other strides.
    "target: probabilities in a row": {"target": torch.rand(1, 15), "class_margin": None},
    "target: probabilities in a column": {"target": torch.rand(15, 1), "class_margin": None},
    "target: flat probabilities": {"target": torch.rand(15), "class_margin": None},
    "input: 0-d": {"input": torch.tensor(1.0)},
    "input: 1-d": {"input": torch.randn(5)},
    "input: 4-d": {"input": torch.randn(3, 5, 2, 2), "target": torch.zeros(12, dtype=torch.int64)} | _NO_ROWS,
    "input: rows": {"input": torch.randn(100_000, 5)},
    "input: classes": {"input": torch.randn(3, 100_000)},
    "input: no classes": {"input": torch.randn(3, 0)},
    "input: double": {"input": torch.randn(3, 5, dtype=torch.float64)},
    "input: integers": {"input": torch.zeros(3, 5, dtype=torch.int64)},
    "input: complex": {"input": torch.zeros(3, 5, dtype=torch.complex64)},
}
for _name in list(PLACES)[2:]:
    _WRONG[f"{_name}: long"] = {_name: torch.ones(100_000)}
    _WRONG[f"{_name}: empty"] = {_name: torch.ones(0)}
    _WRONG[f"{_name}: half"] = {_name: torch.ones(3 if _name == "sample_weight" else 5).half()}
    _WRONG[f"{_name}: integers"] = {_name: torch.ones(3 if _name == "sample_weight" else 5).long()}
    if _name != "class_margin":  # where one number is every class's
        _WRONG[f"{_name}: short"] = {_name: torch.ones(1)}
for _name, _change_of in _WRONG.items():
    scenario(f"op, {_name}", REFUSED, _direct(_change_of, backward=False))
    scenario(f"op backward, {_name}", REFUSED, _direct(_change_of, backward=True))
for _name, _change_of in {
    "state: short": {"state": torch.zeros(2)},
    "state: empty": {"state": torch.zeros(0)},
    "state: long": {"state": torch.zeros(14)},
    "state: double": {"state": torch.zeros(13, dtype=torch.float64)},
    "state: half": {"state": torch.zeros(13, dtype=torch.float16)},
    "grad: rows of another size": {"grad": torch.ones(2)},
    "grad: empty": {"grad": torch.ones(0)},
    "grad: double": {"grad": torch.ones((), dtype=torch.float64)},
    "grad: half": {"grad": torch.ones((), dtype=torch.float16)},
}.items():
    scenario(f"op backward, {_name}", REFUSED, _direct(_change_of, backward=True))
for _name, _change_of in {
    "grad: transposed": {"grad": torch.ones(4, 3)},
    "grad: 3-d": {"grad": torch.ones(3, 2, 2)},
    "grad: flat": {"grad": torch.ones(12)},
}.items():
    scenario(f"op backward of rows, {_name}", REFUSED, _direct(_change_of, backward=True, call="inner none"))
for _far in (FAR, -FAR):
    scenario(
        f"op backward, label {_far}",
        {"IndexError"},
        _direct({"target": torch.tensor([0, _far, 2])}, backward=True),
    )


# --- Running them ---


def _report(name: str) -> str:
    try:
        SCENARIOS[name][0]()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return "none"


def run_all() -> None:
    """Prints a line for each scenario, each run in a fork of this process: starting Python for each takes seconds."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name in SCENARIOS:
        read, write = os.pipe()
        if (child := os.fork()) == 0:
            os.write(write, _report(name).encode())
            os._exit(0)
        os.close(write)
        _, status = os.waitpid(child, 0)
        with os.fdopen(read) as pipe:
            said = pipe.read()
        if os.WIFSIGNALED(status):
            said = f"killed by {signal.Signals(os.WTERMSIG(status)).name}"
        print(f"{name}\t{said}", flush=True)


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str]:
    here = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(here), str(here.parent)))}
    done = subprocess.run(
        [sys.executable, "-c", f"import {Path(__file__).stem} as scenarios; scenarios.run_all()"],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return dict(line.split("\t", 1) for line in done.stdout.splitlines())


@pytest.mark.parametrize("name", SCENARIOS)
def test_an_exception_and_no_crash(name: str, outcomes: dict[str, str]) -> None:
    exception = outcomes[name].split(":")[0]
    if outcomes[name].startswith("IndexError: target: expected labels"):
        return  # right wherever labels and classes no longer fit
    assert exception in SCENARIOS[name][1], f"{name}: {outcomes[name]}"
    assert "INTERNAL ASSERT" not in outcomes[name]


def test_a_change_within_range_is_no_error() -> None:
    """The guard is against bad memory: an in-place change that nobody sees gives the changed labels' gradient."""
    buffer = np.array([0, 1, 6])
    x = torch.randn(3, 7, requires_grad=True)
    loss = _row_losses(x, torch.from_numpy(buffer))
    buffer[1] = 2
    assert torch.autograd.grad(loss, x)[0].isfinite().all()
