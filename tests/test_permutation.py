"""The permutations without a table (reference/sampling.py: permuted): permutations, and as random as they claim.

Chi-square statistics are given as z, their distance from the mean in standard deviations, for fixed seeds: what passes
once passes always, and a network with too few rounds is far beyond the bound (the last test shows it).
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ltkernels.reference import sampling
from ltkernels.reference.sampling import MEMBER_ORDERS, permuted, philox

BOUND = 4.0  # of some forty statistics, the largest of a perfect generator is about 2.5


def _keys(count: int, seed: int = 7) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return philox(torch.arange(count), torch.tensor(0), MEMBER_ORDERS, seed)


def _images(x: int, n: int, keys: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
    count = len(keys[0])
    return permuted(torch.full((count,), x), torch.full((count,), n), keys)


def _z(found: Tensor, cells: int) -> float:
    """Chi-square of frequencies against equal ones in ``cells`` cells; cells that never occurred are not in found."""
    expected = float(found.sum()) / cells
    statistic = float(((found - expected) ** 2 / expected).sum()) + (cells - len(found)) * expected
    return (statistic - (cells - 1)) / math.sqrt(2 * (cells - 1))


def _z_of_tuples(n: int, elements: tuple[int, ...], keys: tuple[Tensor, Tensor, Tensor, Tensor]) -> float:
    code = torch.zeros_like(keys[0])
    for x in elements:
        code = code * n + _images(x, n, keys)
    return _z(torch.unique(code, return_counts=True)[1].double(), math.perm(n, len(elements)))


@pytest.mark.parametrize("n", [*range(1, 40), 63, 64, 65, 1000, 4096, 4097, 100_003])
def test_every_element_has_one_image(n: int) -> None:
    for key in range(3):
        words = tuple(word[key].expand(n) for word in _keys(3))
        image = permuted(torch.arange(n), torch.full((n,), n), words)  # type: ignore[arg-type]
        assert torch.equal(image.sort().values, torch.arange(n))


@pytest.mark.parametrize("n", [2**31 + 1, 2**32, 2**40 - 1, 2**61, 2**62])
def test_large_domains(n: int) -> None:
    x = torch.arange(20_000) * (n // 20_000)
    words = tuple(word[0].expand(len(x)) for word in _keys(1))
    image = permuted(x, torch.full_like(x, n), words)  # type: ignore[arg-type]
    assert int(image.min()) >= 0 and int(image.max()) < n
    assert len(image.unique()) == len(x)
    deciles = torch.bincount((image.double() / n * 10).long(), minlength=10).double()
    assert abs(_z(deciles, 10)) < BOUND


@pytest.mark.parametrize("n", [2, 3, 4, 5, 6, 7])
def test_all_permutations_of_few_elements_are_equally_frequent(n: int) -> None:
    assert abs(_z_of_tuples(n, tuple(range(n)), _keys(400_000))) < BOUND


@pytest.mark.parametrize(("n", "triple"), [(16, (0, 1, 15)), (17, (0, 1, 2)), (24, (5, 9, 13)), (33, (0, 4, 8))])
def test_triples_are_independent(n: int, triple: tuple[int, int, int]) -> None:
    assert abs(_z_of_tuples(n, triple, _keys(500_000))) < BOUND


@pytest.mark.parametrize("n", [100, 1000])
def test_pairs_are_independent(n: int) -> None:
    keys = _keys(300_000)
    for pair in ((0, 1), (n // 2, n - 1)):
        tenths = _images(pair[0], n, keys) * 10 // n * 10 + _images(pair[1], n, keys) * 10 // n
        low = n // 10
        same, other = low * (low - 1), low * low  # of n (n - 1) pairs: two elements in one tenth, or in two
        expected = torch.full((10, 10), float(other)).fill_diagonal_(float(same)) / (n * (n - 1)) * len(tenths)
        found = torch.bincount(tenths, minlength=100).view(10, 10)
        statistic = float(((found - expected) ** 2 / expected).sum())
        assert abs(statistic - 99) / math.sqrt(2 * 99) < BOUND


def test_cycles_of_one_class_are_independent() -> None:
    """An element's place in one cycle says nothing of its place in the next: their keys differ in one bit."""
    images = _images(3, 20, _keys(400_000))
    code = images[:-1] * 20 + images[1:]
    assert abs(_z(torch.bincount(code, minlength=400).double(), 400)) < BOUND


def test_orders_look_random() -> None:
    """Of 500 permutations of 1000: fixed points, ascents and distances of neighbours have the right means."""
    n, count = 1000, 500
    words = tuple(word.repeat_interleave(n) for word in _keys(count))
    image = permuted(torch.arange(n).repeat(count), torch.full((n * count,), n), words).view(count, n)  # type: ignore[arg-type]
    fixed = (image == torch.arange(n)).sum(1).double()
    assert abs(float(fixed.mean()) - 1) < BOUND / math.sqrt(count)
    ascents = (image[:, 1:] > image[:, :-1]).sum(1).double()
    assert abs(float(ascents.mean()) - (n - 1) / 2) < BOUND * math.sqrt((n + 1) / 12 / count)
    distance = (image[:, 1:] - image[:, :-1]).abs().double().mean(1)
    assert abs(float(distance.mean()) - (n + 1) / 3) < BOUND * float(distance.std()) / math.sqrt(count)


def test_fewer_rounds_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "PERMUTATION_ROUNDS", 8)
    assert _z_of_tuples(17, (5, 9, 13), _keys(1_000_000)) > BOUND
