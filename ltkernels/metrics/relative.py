"""Accuracy relative to what the same model reaches without a long tail."""

from __future__ import annotations

import math

from torch import Tensor


def relative_accuracy(
    accuracy: float | Tensor, plain_on_balanced: float | Tensor, method_on_balanced: float | Tensor
) -> float:
    r"""Accuracy as a share of an upper reference, which is what no long tail would allow.

    .. math:: A_r = \frac{A_t}{A_u}, \qquad A_u = \max(A_v, A_b)

    A method that is better on any data is better on long-tailed data too. This shows how much of what is possible
    with its backbone a method keeps in spite of the tail: all three accuracies are on the same test set, those of the
    reference after training on a *balanced* set (not the test set) of about as many samples.

    Args:
        accuracy: A_t, of the method trained on the long-tailed set; in [0, 1] or in percent, as the other two.
        plain_on_balanced: A_v, of the same model trained with plain cross-entropy on the balanced set.
        method_on_balanced: A_b, of the method trained on the balanced set.

    Returns:
        A ratio; above 1 where the long-tailed set did better.

    Raises:
        TypeError: not a number.
        ValueError: not finite, negative, above 100, or no reference above 0.

    Example:
        >>> import ltkernels as ltk
        >>> round(100 * ltk.metrics.relative_accuracy(58.8, 62.5, 63.2), 1)
        93.0

    Source:
        Zhang et al., "Deep Long-Tailed Learning: A Survey", TPAMI 2023, section 4.1.
    """
    found = {
        name: _accuracy(name, value)
        for name, value in (
            ("accuracy", accuracy),
            ("plain_on_balanced", plain_on_balanced),
            ("method_on_balanced", method_on_balanced),
        )
    }
    upper = max(found["plain_on_balanced"], found["method_on_balanced"])
    if upper == 0.0:
        raise ValueError("plain_on_balanced: expected an accuracy above 0 of one model on balanced data, found 0 twice")
    return found["accuracy"] / upper


def _accuracy(name: str, value: float | Tensor) -> float:
    if isinstance(value, (bool, str)):
        raise TypeError(f"{name}: expected a number, found {value!r}")
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name}: expected a number, found {type(value).__name__}") from error
    if not (math.isfinite(number) and 0.0 <= number <= 100.0):
        raise ValueError(f"{name}: expected an accuracy in [0, 1] or in percent, found {number:g}")
    return number
