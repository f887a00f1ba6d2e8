"""Argument checks: what a message shows of a value that is long."""

from __future__ import annotations

import pytest
import torch

from ltkernels import arguments


@pytest.mark.parametrize("value", [list(range(1000)), torch.arange(1000)], ids=["list", "Tensor"])
def test_class_counts_given_for_a_number_are_not_printed(value: object) -> None:
    """As ``SeesawLoss(class_counts)`` does, which takes the number of classes."""
    with pytest.raises(TypeError) as raised:
        arguments.integer("num_classes", value)  # type: ignore[arg-type]
    assert str(raised.value) == f"num_classes: expected an integer, found {type(value).__name__}"
