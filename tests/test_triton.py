"""The Triton backend without a GPU: its kernels interpreted, in processes of their own, and what launches them.

Whether Triton interprets kernels it decides when it decorates them, so ``TRITON_INTERPRET=1`` has to be set before.
What the machine code looks like is `make codecheck`'s to say; with a GPU, `pytest -m gpu` runs all tests on it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from ltkernels.ops.options import Reduction
from ltkernels.triton import accuracy_counts as triton_accuracy_counts
from ltkernels.triton import aggregate_experts as triton_aggregate_experts
from ltkernels.triton import cross_entropy as triton_cross_entropy
from ltkernels.triton import distillation as triton_distillation
from ltkernels.triton import expert_cross_entropy as triton_expert_cross_entropy
from ltkernels.triton import lade as triton_lade
from ltkernels.triton import row_cross_entropy as triton_row_cross_entropy
from ltkernels.triton import sampling as triton_sampling
from ltkernels.triton import tiles

HERE = Path(__file__).parent
# Of the tests that every backend has to pass, those with the most to show in half a minute.
SHARED = (
    "test_cross_entropy_values.py::test_probabilities_of_another_type",
    "test_cross_entropy_values.py::test_parameters_in_any_layout",
    "test_cross_entropy_values.py::test_reductions_and_denominators",
    "test_cross_entropy_limits.py",
)


def _run(plugin: str, *arguments: str, **environment: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", plugin, "-p", "no:cacheprovider", "-q", "-x", *arguments],
        cwd=HERE,
        env={**os.environ, **environment, "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and " skipped" not in done.stdout, done.stdout[-2000:]


def test_every_set_of_options_is_translated(tmp_path: Path) -> None:
    """To Triton's IR: the interpreter knows no types, and `make codecheck` compiles a few of the sets."""
    _run("triton_compiler", "triton_compiler_cases.py", TRITON_CACHE_DIR=str(tmp_path))


NOTHING = "nothing_at_all"  # in the name of no test


class Selection(NamedTuple):
    """Of the tests of all backends, those that the interpreter runs."""

    files: tuple[str, ...]
    chosen: str = "triton"
    never: str = NOTHING
    """Products of options that take many minutes."""
    slow: str = NOTHING
    """What `-m slow` runs, and `make test` does not."""


EXPERTS = tuple(f"test_expert_cross_entropy{part}.py" for part in ("", "_autograd", "_errors"))
SELECTIONS = {
    "where the kernels change their path": Selection(
        ("triton_worker_cases.py",), "test", slow="(many_tiles or either_order) and 1"
    ),
    "cross_entropy": Selection(
        SHARED, never="focal_mode or certainty or margins or empty_batch or (limits and float16)"
    ),  # test_random_combinations draws from the products that this leaves out
    "sampling": Selection(("test_sampling_gpu.py",)),
    "accuracy_counts": Selection(
        ("test_accuracy_counts.py",),
        never="(values and (float64 or float16 or 255 or 257 or 1029)) or (integer_types and uint)",
    ),
    "lade": Selection(
        ("test_lade.py",),
        never="(values and (float64 or float16 or 1032 or 5008)) or label_types or (layouts and every_second)",
        slow="(values and 5001) or same_bits",
    ),
    "binary_cross_entropy": Selection(
        ("test_binary_cross_entropy.py",),
        never="(long_rows and (5003 or 1025 or drop)) or (forms and (fraction or clip or suppression))"
        " or every_second or double_backward or compiled",
        slow="(forms and (multi_hot or drop)) or asymmetric",
    ),
    "distillation": Selection(
        ("test_distillation.py",),
        never="(values and (1029 or 5003)) or strides_and_types or opcheck or compiles",
        slow="replace_the_logits or (values and (2-dtype or 100-dtype))",
    ),
    "aggregate_experts": Selection(
        ("test_aggregate_experts.py", "test_expert_linear.py"),
        never="(values and (1029 or 100 or 17 or float)) or layouts or (best_classes and (1029 or bfloat16))",
        slow="upstream or replace_the_logits or (values and 1-2)",
    ),
    "expert_cross_entropy": Selection(
        EXPERTS,
        never="(values and (1029 or 100 or float16 or 17)) or (layouts and (padded or samples))",
        slow="replace_the_logits or upstream or teacher or first_backward or (layouts and 300)"
        " or (values and (1-2 or 2-1))",
    ),
    "linear_cross_entropy": Selection(
        ("test_linear_cross_entropy.py", "test_class_shards.py"), "triton and (plain or all or gate)", "half or single"
    ),
    "row_cross_entropy": Selection(
        ("test_row_cross_entropy.py",),
        "triton and (masked or ignored or nan_in or large_margins or nothing or inner_dim or (test_types and bfloat16)"
        " or (denominators and gate) or upstreams)",
    ),
}  # fmt: skip


def _interpret(of: Selection, extent: str) -> None:
    _run(
        "triton_worker",
        *of.files,
        "-k",
        f"{of.chosen} and not ({of.never} or number_of_threads) and {extent}",
        TRITON_INTERPRET="1",
    )


@pytest.mark.parametrize("name", SELECTIONS)
def test_interpreted(name: str) -> None:
    _interpret(SELECTIONS[name], f"not ({SELECTIONS[name].slow})")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, of in SELECTIONS.items() if of.slow != NOTHING])
def test_the_rest_interpreted(name: str) -> None:
    _interpret(SELECTIONS[name], f"({SELECTIONS[name].slow})")


# --- What launches them, which needs no kernel ---


class _LaunchError(Exception):
    """Stops where a kernel would run."""

    def __init__(self, kernel: Any, plan: Any, *arguments: Any) -> None:
        self.kernel, self.plan, self.arguments = kernel, plan, arguments[1:]  # but the device


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> None:
    def launch(*arguments: Any) -> None:
        raise _LaunchError(*arguments)

    monkeypatch.setattr(triton_cross_entropy, "_launch", launch)


def _launched(rows: int, classes: int, *options: Any, inner: int = 1) -> tuple[_LaunchError, _LaunchError]:
    """The launches of a forward and a backward."""
    shape = (rows, classes, inner) if inner > 1 else (rows, classes)
    x, y = torch.zeros(shape), torch.zeros((rows, inner) if inner > 1 else (rows,), dtype=torch.int64)
    tensors = (x, y, None, None, torch.zeros(classes), None, None)
    with pytest.raises(_LaunchError) as forward:
        triton_cross_entropy.forward(*tensors, *options)
    state = torch.zeros(4 * rows * inner + 1)
    with pytest.raises(_LaunchError) as backward:
        triton_cross_entropy.backward(torch.ones(()), state, *tensors, *options, True, False, False)
    return forward.value, backward.value


OPTIONS = (-100, int(Reduction.SUM), 0.1, 1.0, 0.0, False, False, 0.0, False)
OTHERS = (
    (1, int(Reduction.MEAN_COUNT), 1.0, 2.0, 1.0, True, True, 1.0, True),
    (16, int(Reduction.MEAN_WEIGHT), 0.5, 30.0, 2.5, False, True, 1e-4, False),
    (2**40, int(Reduction.SUM), 0.25, 0.07, 16.0, True, False, 16.0, False),
)


def _compiled_for(launch: _LaunchError) -> list[Any]:
    """All that a kernel is compiled for: constants, types, and what Triton looks at in a number that it specialises."""
    found = [launch.plan.constants, launch.plan.warps, *_looked_at(launch.kernel, launch.arguments)]
    return [*found, launch.arguments[-1]]  # SMOOTHING


def _looked_at(kernel: Any, arguments: tuple[Any, ...]) -> list[Any]:
    """The types of tensors, and that no number is looked at."""
    found = []
    parameters = [p for p in kernel.params if not p.is_constexpr]
    for parameter, value in zip(parameters, arguments, strict=False):
        if value is None or isinstance(value, torch.Tensor):
            found.append((parameter.name, None if value is None else value.dtype))
        else:
            assert parameter.annotation_type, f"the type of {parameter.name} would follow its value"
            assert parameter.do_not_specialize or parameter.annotation_type.startswith("fp"), parameter.name
    return found


@pytest.mark.usefixtures("launches")
def test_another_number_compiles_nothing() -> None:
    """Options, and a number of rows that is 1, odd, or a multiple of 16."""
    for expected, *others in zip(
        _launched(64, 1000, *OPTIONS),
        *(_launched(64, 1000, *options) for options in OTHERS),
        *(_launched(rows, 1000, *OPTIONS) for rows in (1, 15, 4096)),
        strict=True,
    ):
        for other in others:
            assert _compiled_for(other) == _compiled_for(expected)


def test_another_number_of_a_stream_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seed, epoch, positions, classes and groups: numbers that are 1, even, of 32 bits and of more."""
    launches: list[Any] = []

    def launch(kernel: Any, programs: int, warps: int, device: torch.device, *arguments: Any) -> None:
        constants = arguments[-sum(p.is_constexpr for p in kernel.params) :]
        launches.append((kernel, warps, constants, _looked_at(kernel, arguments)))

    monkeypatch.setattr(triton_sampling, "_launch", launch)
    members = torch.arange(64, dtype=torch.int32)
    for groups in (0, 1):
        for classes, seed, epoch, start, step, count in (
            (1, 1, 1, 1, 1, 1),
            (16, -1, 2**32 - 1, 2**40, 2**33, 1000),
            (33, 2**63 - 1, 0, 0, 16, 64),
        ):
            offsets = torch.linspace(0, 64, classes + 1).long()
            numbers = (classes, groups * classes, 16 * classes + 1, False, seed, epoch, start, step, count)
            triton_sampling.sample_indices(offsets, members, None, None, None, None, None, *numbers)
    assert launches[:3] == [launches[0]] * 3 and launches[3:] == [launches[3]] * 3


@pytest.mark.usefixtures("launches")
def test_class_counts_share_kernels() -> None:
    """What a kernel is compiled for is the power of two that holds the classes, and how many one access takes."""
    for first, second in ((1000, 1016), (365, 511), (20000, 300008), (8143, 8191)):
        for a, b in zip(_launched(8, first, *OPTIONS), _launched(8, second, *OPTIONS), strict=True):
            assert _compiled_for(a) == _compiled_for(b)


# (classes, row stride, bytes an element, address modulo 16): elements of an access, in neighbouring classes.
ACCESSES = {
    (1000, 1000, 2, 0): 8, (1004, 1004, 2, 0): 4, (1002, 1002, 2, 0): 2, (365, 365, 2, 0): 1, (1000, 1000, 4, 0): 4,
    (1000, 1000, 8, 0): 2, (1000, 1004, 2, 0): 4, (1000, 1000, 2, 8): 4, (1000, 1000, 2, 2): 1, (1000, 1001, 4, 0): 1,
    (8142, 8142, 4, 4): 1, (1204, 1204, 4, 0): 4, (8, 0, 2, 0): 8,
}  # fmt: skip


@pytest.mark.parametrize("memory", ACCESSES, ids=str)
def test_an_access_is_as_wide_as_its_alignment(memory: tuple[int, int, int, int]) -> None:
    classes, row, size, address = memory
    grouped = tiles.group_rows((12, classes), (row, 1))
    by = tiles.access(classes, grouped, [(grouped.strides[0], size, address)])
    assert by == (tiles.CLASSES, ACCESSES[memory])


@pytest.mark.parametrize("shape", [(0, 5), (7, 5), (1, 5, 3), (4, 5, 1), (4, 5, 3), (4, 5, 0)], ids=str)
@pytest.mark.parametrize("order", ["contiguous", "channels_last", "class_first"])
def test_rows_are_where_their_groups_say(shape: tuple[int, ...], order: str) -> None:
    x = torch.arange(torch.Size(shape).numel()).view(shape)
    if order == "channels_last":
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    elif order == "class_first":
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    y = torch.zeros(shape[0], *shape[2:])
    grouped = tiles.group_rows(shape, x.stride(), y.stride(), ())
    of_logits, _, of_number = grouped.strides
    assert of_number == (0, 0, 0)
    memory = torch.as_strided(x, (max(1, x.numel()),), (1,)) if x.numel() else x
    rows = [
        [int(memory[g * of_logits.group + i * of_logits.row + c * of_logits.classes]) for c in range(shape[1])]
        for g in range(grouped.groups)
        for i in range(grouped.inner)
    ]
    assert rows == x.movedim(1, -1).reshape(-1, shape[1]).tolist()
    if order == "channels_last" or len(shape) == 2 or shape[2] == 1:
        assert grouped.groups <= 1


def test_programs_share_tiles_evenly() -> None:
    for count in (0, 1, 5, 100, 2112, 2113, 16384):
        programs = tiles.even_share(count, 2112)
        share = -(-count // programs)
        assert 1 <= programs <= 2112 and programs * share >= count
        assert programs == 1 or (programs - 1) * share < count, "a program would have nothing to do"


def test_every_variant_has_a_name_of_its_own() -> None:
    for module in (
        triton_accuracy_counts,
        triton_cross_entropy,
        triton_sampling,
        triton_lade,
        triton_row_cross_entropy,
        triton_distillation,
        triton_expert_cross_entropy,
        triton_aggregate_experts,
    ):
        variants = module.variants()
        assert len({variant.name for variant in variants}) == len(variants)
        for variant in variants:
            assert set(variant.signature) == set(variant.kernel.arg_names)
