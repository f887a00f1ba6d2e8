"""ltkernels.rebalance against formulas in exact or float64 arithmetic, scikit-learn, and its own promises."""

from __future__ import annotations

import copy
import json
import pickle
import warnings
from collections import Counter
from decimal import Decimal, localcontext

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.utils.class_weight import compute_class_weight

from ltkernels import rebalance as rb
from ltkernels.rebalance import DeferredReweighting

# The three regimes that users have: CIFAR-100-LT's exponential tail (500 to 5), one image a class beside many, equal
# counts.
EXPONENTIAL = [int(500 * 0.01 ** (c / 99)) for c in range(100)]
STEEP = [100_000, 1000, 10, 1]
EQUAL = [7, 7, 7]
TABLES = [EXPONENTIAL, STEEP, EQUAL, [3]]

VECTORS = {  # name: (function, value for a class with count 0)
    "inverse_frequency_weight": (rb.inverse_frequency_weight, 0.0),
    "inverse_frequency_weight(balanced)": (lambda n, **k: rb.inverse_frequency_weight(n, 0.5, "balanced", **k), 0.0),
    "inverse_frequency_weight(None)": (lambda n, **k: rb.inverse_frequency_weight(n, normalize=None, **k), 0.0),
    "effective_number_weight": (rb.effective_number_weight, 0.0),
    "logit_adjustment": (rb.logit_adjustment, -np.inf),
    "ldam_margin": (rb.ldam_margin, 0.0),
    "arcface_margin": (rb.arcface_margin, 0.0),
    "label_aware_smoothing": (rb.label_aware_smoothing, 0.0),
    "vs_scale": (rb.vs_scale, 1.0),
}
every_vector = pytest.mark.parametrize(("function", "absent"), VECTORS.values(), ids=VECTORS.keys())
count_lists = st.lists(st.integers(1, 10**7), min_size=1, max_size=30)


def close(actual: torch.Tensor, expected: object, rtol: float = 1e-13) -> None:
    np.testing.assert_allclose(actual.numpy(), np.asarray(expected, dtype=np.float64), rtol=rtol, atol=0)


# ---------------------------------------------------------------------------------------------- closed forms


@pytest.mark.parametrize("counts", TABLES)
def test_balanced_weight_is_scikit_learns(counts: list[int]) -> None:
    labels = np.repeat(np.arange(len(counts)), counts)
    expected = compute_class_weight("balanced", classes=np.arange(len(counts)), y=labels)
    close(rb.inverse_frequency_weight(counts, normalize="balanced", dtype=torch.float64), expected)


def test_balanced_weight_of_the_classes_that_scikit_learn_can_see() -> None:
    """scikit-learn raises if it is asked for a class without samples; here it is not part of the C in N / (C n_c)."""
    labels = np.array([0] * 6 + [2] * 3)
    seen = compute_class_weight("balanced", classes=np.array([0, 2]), y=labels)
    weight = rb.inverse_frequency_weight([6, 0, 3], normalize="balanced", dtype=torch.float64)
    close(weight, [seen[0], 0, seen[1]])


@pytest.mark.parametrize("counts", TABLES)
@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 2.0])
def test_inverse_frequency_weight(counts: list[int], power: float) -> None:
    n = np.array(counts, dtype=np.float64)
    raw = n**-power
    close(rb.inverse_frequency_weight(counts, power, None, dtype=torch.float64), raw)
    close(rb.inverse_frequency_weight(counts, power, dtype=torch.float64), raw * len(n) / raw.sum())
    balanced = rb.inverse_frequency_weight(counts, power, "balanced", dtype=torch.float64)
    close(balanced, raw * n.sum() / (n * raw).sum())
    assert (balanced.numpy() * n).sum() / n.sum() == pytest.approx(1.0)  # a sample's mean weight


@pytest.mark.parametrize("counts", [[10, 100, 1000], [1e-3, 0.5]], ids=["counts", "frequencies"])
@pytest.mark.parametrize("power", [400.0, 1e38])
def test_a_large_power_of_inverse_frequency_leaves_the_rarest_class(counts, power: float) -> None:
    """``n ** -400`` is 0 for a count and infinite for a frequency; the normalised weights have a limit."""
    others = [0] * (len(counts) - 1)
    assert rb.inverse_frequency_weight(counts, power).tolist() == [len(counts), *others]
    balanced = rb.inverse_frequency_weight(counts, power, "balanced", dtype=torch.float64)
    close(balanced, [sum(counts) / counts[0], *others])


# 0.999999 (BBN's) is where float32 is 1.3 % off; the last is as near to 1 as float64 comes.
@pytest.mark.parametrize("beta", [0.0, 0.1, 0.9, 0.9999, 0.999999, 1 - 2**-53])
@pytest.mark.parametrize("counts", TABLES)
def test_effective_number_weight_against_60_digits(counts: list[int], beta: float) -> None:
    with localcontext() as context:
        context.prec = 60
        b = Decimal(beta)
        raw = [(1 - b) / (1 - b**n) for n in counts]
        expected = [float(r * len(counts) / sum(raw)) for r in raw]
    close(rb.effective_number_weight(counts, beta, dtype=torch.float64), expected)


def test_effective_number_weight_approaches_inverse_frequency() -> None:
    limit = rb.inverse_frequency_weight(STEEP, dtype=torch.float64)
    close(rb.effective_number_weight(STEEP, 1 - 1e-13, dtype=torch.float64), limit, rtol=1e-7)


@pytest.mark.parametrize("counts", TABLES)
def test_bias_margin_and_scale(counts: list[int]) -> None:
    n = np.array(counts, dtype=np.float64)
    np.testing.assert_allclose(
        rb.logit_adjustment(counts, 1.5, dtype=torch.float64), 1.5 * np.log(n / n.sum()), rtol=1e-14, atol=1e-15
    )
    quarter = n**-0.25
    close(rb.ldam_margin(counts, 0.3, dtype=torch.float64), 0.3 * quarter / quarter.max())
    close(rb.vs_scale(counts, 0.3, dtype=torch.float64), (n / n.max()) ** 0.3)


@every_vector
def test_one_rounding_to_float32(function, absent) -> None:
    exact = function(EXPONENTIAL, dtype=torch.float64)
    assert function(EXPONENTIAL).dtype == torch.float32
    assert torch.equal(function(EXPONENTIAL), exact.float())


# ---------------------------------------------------------------------------------------------- properties


@given(count_lists)
def test_normalisations(counts: list[int]) -> None:
    n = torch.tensor(counts, dtype=torch.float64)
    for weight in (
        rb.inverse_frequency_weight(counts, 0.7, dtype=torch.float64),
        rb.effective_number_weight(counts, 0.999, dtype=torch.float64),
    ):
        assert weight.sum().item() == pytest.approx(len(counts), rel=1e-12)
    assert rb.logit_adjustment(counts, dtype=torch.float64).exp().sum().item() == pytest.approx(1, rel=1e-12)
    assert rb.ldam_margin(counts, 0.5, dtype=torch.float64).max().item() == 0.5
    assert rb.ldam_margin(counts, 0.5, dtype=torch.float64).argmax() == n.argmin()
    assert rb.vs_scale(counts, dtype=torch.float64).max().item() == 1


@given(count_lists, st.integers(2, 1000))
def test_only_ratios_matter(counts: list[int], factor: int) -> None:
    """Frequencies are as good as counts, but not for weights by effective number."""
    for function in (rb.logit_adjustment, rb.ldam_margin, rb.vs_scale, rb.inverse_frequency_weight):
        torch.testing.assert_close(
            function([n * factor for n in counts], dtype=torch.float64),
            function(counts, dtype=torch.float64),
            rtol=1e-12,
            atol=1e-13,
        )


@given(count_lists)
def test_rarer_is_never_treated_as_more_frequent(counts: list[int]) -> None:
    order = torch.tensor(counts).argsort(stable=True)
    for function, sign in (
        (rb.inverse_frequency_weight, -1),
        (rb.effective_number_weight, -1),
        (rb.logit_adjustment, 1),
        (rb.ldam_margin, -1),
        (rb.vs_scale, 1),
    ):
        assert (sign * function(counts, dtype=torch.float64)[order].diff() >= -1e-15).all()


@every_vector
def test_a_class_without_samples_changes_nothing_for_the_others(function, absent) -> None:
    alone = function(STEEP, dtype=torch.float64)
    both = function([0, *STEEP[:2], 0, *STEEP[2:]], dtype=torch.float64)
    assert both[[0, 3]].tolist() == [absent, absent]
    assert torch.equal(both[[1, 2, 4, 5]], alone)


def test_a_class_without_samples_is_out_at_tau_0_too() -> None:
    assert rb.logit_adjustment([3, 0], tau=0).tolist() == [0, -np.inf]


# ---------------------------------------------------------------------------------------------- class_counts


@pytest.mark.parametrize(
    "counts",
    [
        (5, 3, 1),
        [5.0, 3.0, 1.0],
        np.array([5, 3, 1], dtype=np.uint8),
        np.array([5, 3, 1], dtype=np.uint64),
        np.array([5, 3, 1], dtype=">i4"),
        np.array([1, 3, 5])[::-1],
        np.array([5, 3, 1], dtype=np.float16),
        torch.tensor([5, 3, 1]),
        torch.tensor([5, 3, 1], dtype=torch.uint16),
        torch.tensor([5, 3, 1], dtype=torch.bfloat16),
        torch.tensor([5.0, 3.0, 1.0], requires_grad=True),
        [torch.tensor(5), torch.tensor(3), torch.tensor(1)],
    ],
    ids=lambda c: f"{type(c).__name__}-{getattr(c, 'dtype', type(c[0]).__name__)}",
)
@every_vector
def test_every_kind_of_counts(function, absent, counts) -> None:
    result = function(counts)
    assert torch.equal(result, function([5, 3, 1]))
    assert not result.requires_grad


BAD_COUNTS = [
    ([4, 1e300], ValueError, "class_counts: expected all counts below 2^63, found 1e+300 at class 1"),
    ([4, -3], ValueError, "class_counts: expected all counts >= 0, found -3 at class 1"),
    ([4, float("nan")], ValueError, "class_counts: expected all counts finite, found nan at class 1"),
    (np.array([np.inf, 1]), ValueError, "class_counts: expected all counts finite, found inf at class 0"),
    (torch.tensor([-1]), ValueError, "class_counts: expected all counts >= 0, found -1 at class 0"),
    ([0, 0, 0], ValueError, "class_counts: expected at least one count > 0, found 3 zeros"),
    ([], ValueError, r"class_counts: expected one count per class, shape (C,), found shape (0,)"),
    (torch.empty(0), ValueError, r"class_counts: expected one count per class, shape (C,), found shape (0,)"),
    ([[1, 2]], ValueError, r"class_counts: expected one count per class, shape (C,), found shape (1, 2)"),
    (7, ValueError, r"class_counts: expected one count per class, shape (C,), found shape ()"),
    ([[1], [2, 3]], ValueError, "class_counts: expected integers or floats, one per entry, found a ragged sequence"),
    (["4", "2"], TypeError, "class_counts: expected integers or floats, found list of <U1"),
    ([True, False], TypeError, "class_counts: expected integers or floats, found list of bool"),
    (torch.tensor([True]), TypeError, "class_counts: expected integers or floats, found torch.bool"),
    (torch.tensor([1j]), TypeError, "class_counts: expected integers or floats, found torch.complex64"),
    (Counter([0, 0, 1]), TypeError, "class_counts: expected integers or floats, found Counter of object"),
    (None, TypeError, "class_counts: expected integers or floats, found NoneType of object"),
]


@pytest.mark.parametrize(("counts", "error", "message"), BAD_COUNTS, ids=[str(i) for i in range(len(BAD_COUNTS))])
@every_vector
def test_bad_counts(function, absent, counts, error, message) -> None:
    with pytest.raises(error) as caught:
        function(counts)
    assert str(caught.value) == message


BAD_SETTINGS = [
    (lambda: rb.inverse_frequency_weight([1], -1), ValueError, "power: expected a finite number >= 0"),
    (lambda: rb.inverse_frequency_weight([1], "x"), TypeError, "power: expected a number, found str"),
    (
        lambda: rb.inverse_frequency_weight([1], normalize="sum"),
        ValueError,
        "normalize: expected 'mean' or 'balanced' or None, found 'sum'",
    ),
    (lambda: rb.effective_number_weight([1], -0.1), ValueError, "beta: expected a finite number >= 0 and <= 1"),
    (lambda: rb.effective_number_weight([1], 1.0), ValueError, "beta: expected a number below 1"),
    (lambda: rb.effective_number_weight([1], float("nan")), ValueError, "beta: expected a finite number"),
    (
        lambda: rb.effective_number_weight([2, 0.25]),
        ValueError,
        "class_counts: expected numbers of samples, found 0.25 at class 1",
    ),
    (lambda: rb.logit_adjustment([1], -1), ValueError, "tau: expected a finite number >= 0"),
    (
        lambda: rb.logit_adjustment([1, 10**6], 1e38),
        ValueError,
        "tau: expected a number that keeps every class with samples finite in torch.float32, found 1e+38, which gives"
        " -inf at class 0",
    ),
    (
        lambda: rb.adjust_logits(torch.zeros(3), [0, 1, 10**6], 1e38),
        ValueError,
        "tau: expected a number that keeps every class with samples finite in torch.float32, found 1e+38, which gives"
        " -inf at class 1",
    ),
    (
        lambda: rb.inverse_frequency_weight([0.999, 0.001], 20, None),
        ValueError,
        "power: expected a number that keeps every class with samples finite in torch.float32, found 20, which gives"
        " inf at class 1",
    ),
    (lambda: rb.logit_adjustment([1], None), TypeError, "tau: expected a number, found NoneType"),
    (lambda: rb.ldam_margin([1], float("inf")), ValueError, "max_m: expected a finite number >= 0"),
    (lambda: rb.vs_scale([1], -0.3), ValueError, "gamma: expected a finite number >= 0"),
    (lambda: rb.vs_scale([1], True), TypeError, "gamma: expected a number, found bool"),
    (
        lambda: DeferredReweighting([1], -1),
        ValueError,
        "reweight_epoch: expected an epoch >= 0, counted from 0, found -1",
    ),
    (lambda: DeferredReweighting([1], 1.5), TypeError, "reweight_epoch: expected an integer, found 1.5"),
    (lambda: DeferredReweighting([1], 1, beta=1), ValueError, "beta: expected a number below 1"),
    (lambda: DeferredReweighting([1], 1).set_epoch(-1), ValueError, "epoch: expected an epoch >= 0"),
    (lambda: DeferredReweighting([1], 1).set_epoch("1"), TypeError, "epoch: expected an integer, found '1'"),
    (
        lambda: rb.adjust_logits(torch.zeros(2, 3), [1, 2]),
        ValueError,
        "logits: expected shape (C,), (N, C) or (N, C, d1, ...) with C = 2 (the length of class_counts), found (2, 3)",
    ),
    (lambda: rb.adjust_logits(torch.tensor(1.0), [1]), ValueError, "logits: expected shape"),
    (
        lambda: rb.adjust_logits(torch.zeros(2, 3, dtype=torch.int64), [1, 2, 3]),
        TypeError,
        "logits: expected a floating tensor, found torch.int64",
    ),
    (lambda: rb.adjust_logits([1.0], [1]), TypeError, "logits: expected a floating tensor, found list"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD_SETTINGS, ids=[m for _, _, m in BAD_SETTINGS])
def test_bad_settings(call, error, message: str) -> None:
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value).startswith(message)


# ---------------------------------------------------------------------------------------------- count_classes

INTEGER_TYPES = ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"]


@pytest.mark.parametrize("dtype", INTEGER_TYPES)
def test_count_classes_of_every_integer_type(dtype: str) -> None:
    labels = np.array([[3, 0, 1], [3, 2, 3]], dtype=dtype)  # a label map: any shape counts
    for given_labels in (labels, labels[:, ::-1], labels.astype(labels.dtype.newbyteorder()), torch.from_numpy(labels)):
        counts = rb.count_classes(given_labels)
        assert counts.dtype == torch.int64
        assert counts.tolist() == [1, 1, 1, 3]
    assert rb.count_classes(labels.ravel().tolist(), num_classes=np.int64(4)).tolist() == [1, 1, 1, 3]


@given(st.lists(st.integers(0, 300), max_size=200), st.integers(301, 310))
def test_count_classes_is_bincount(labels: list[int], num_classes: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        counts = rb.count_classes(labels, num_classes)
    assert counts.tolist() == np.bincount(np.array(labels, dtype=np.int64), minlength=num_classes).tolist()


def test_count_classes_of_many_classes() -> None:
    """The limit is for labels alone: 2^24 - 1 makes 2^24 classes, and ``num_classes`` as many as it says."""
    for labels, num_classes in (([2**24 - 1], None), ([2**24], 2**24 + 1)):
        with pytest.warns(UserWarning, match=f"{labels[0]} of {labels[0] + 1} classes"):
            assert len(rb.count_classes(labels, num_classes)) == labels[0] + 1


def test_count_classes_warns_once_of_absent_classes() -> None:
    with pytest.warns(UserWarning) as caught:
        counts = rb.count_classes([1, 1, 8], num_classes=10)
    assert counts.tolist() == [0, 2, 0, 0, 0, 0, 0, 0, 1, 0]
    assert [str(w.message) for w in caught] == ["count_classes: 8 of 10 classes have no sample: 0, 2, 3, 4, 5, ..."]
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match=r"count_classes: 1 of 3 classes have no sample: 1$"):
        rb.count_classes(torch.tensor([0, 2]))
    with pytest.warns(UserWarning, match="2 of 2 classes"):
        assert rb.count_classes([], num_classes=2).tolist() == [0, 0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rb.count_classes([0, 1, 2])


BAD_LABELS = [
    ([0, -1], None, ValueError, "labels: expected all labels >= 0, found -1 at position 1"),
    (
        torch.tensor([[0, 1], [-100, 2]]),
        3,
        ValueError,
        "labels: expected all labels in [0, 3), found -100 at position 2",
    ),
    (
        [0, 2**40],
        None,
        ValueError,
        "labels: expected all labels below 16777216 (for more classes give num_classes), found 1099511627776 at"
        " position 1",
    ),
    ([0, 1, 3], 3, ValueError, "labels: expected all labels in [0, 3), found 3 at position 2"),
    (
        np.array([0, 2**64 - 1], dtype=np.uint64),
        2,
        ValueError,
        "labels: expected all labels in [0, 2), found 18446744073709551615 at position 1",
    ),
    (
        [],
        None,
        ValueError,
        "labels: expected at least one label, or num_classes, found 0 labels and num_classes=None",
    ),
    ([0.0, 1.0], None, TypeError, "labels: expected integers, found list of float64"),
    (np.array([0, np.nan]), 2, TypeError, "labels: expected integers, found ndarray of float64"),
    (torch.tensor([0.0]), 2, TypeError, "labels: expected integers, found torch.float32"),
    (torch.tensor([True]), 2, TypeError, "labels: expected integers, found torch.bool"),
    (["cat", "dog"], None, TypeError, "labels: expected integers, found list of <U3"),
    ([[0], [1, 2]], None, ValueError, "labels: expected integers, one per entry, found a ragged sequence"),
    ([0], 0, ValueError, "num_classes: expected at least 1, found 0"),
    ([0], 2.0, TypeError, "num_classes: expected an integer, found 2.0"),
    ([0], True, TypeError, "num_classes: expected an integer, found True"),
]


@pytest.mark.parametrize(("labels", "num_classes", "error", "message"), BAD_LABELS, ids=[m for *_, m in BAD_LABELS])
def test_bad_labels(labels, num_classes, error, message: str) -> None:
    with pytest.raises(error) as caught:
        rb.count_classes(labels, num_classes)
    assert str(caught.value) == message


# ---------------------------------------------------------------------------------------------- adjust_logits


@pytest.mark.parametrize("shape", [(4,), (5, 4), (2, 4, 3), (2, 4, 3, 2), (0, 4)])
def test_adjust_logits_divides_by_the_prior(shape: tuple[int, ...]) -> None:
    logits = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    adjusted = rb.adjust_logits(logits, STEEP, tau=1.5)
    class_dim = 0 if len(shape) == 1 else 1
    prior = torch.tensor(STEEP, dtype=torch.float64) / sum(STEEP)
    expected = logits.detach().movedim(class_dim, -1).exp() / prior**1.5
    torch.testing.assert_close(adjusted.detach().movedim(class_dim, -1).exp(), expected, rtol=1e-12, atol=0)
    (gradient,) = torch.autograd.grad(adjusted.sum(), logits)
    assert torch.equal(gradient, torch.ones_like(logits))


def test_adjust_logits_keeps_half_logits_apart() -> None:
    """Two priors that bfloat16 can not tell apart still decide: the result is float32. The input is not written."""
    logits = torch.zeros(1, 2, dtype=torch.bfloat16)
    adjusted = rb.adjust_logits(logits, [10_000, 10_001])
    assert adjusted.dtype == torch.float32
    assert adjusted[0, 0] > adjusted[0, 1]
    assert adjusted[0, 0].bfloat16() == adjusted[0, 1].bfloat16()
    assert not logits.any()


@pytest.mark.parametrize("tau", [0.0, 1.0, 2.5])
def test_adjust_logits_never_predicts_a_class_without_samples(tau: float) -> None:
    logits = torch.tensor([[0.0, 50.0, 1.0]])
    adjusted = rb.adjust_logits(logits, [90, 0, 10], tau)
    assert adjusted[0, 1] == -torch.inf
    assert torch.equal(adjusted[:, [0, 2]], rb.adjust_logits(logits[:, [0, 2]], [90, 10], tau))
    assert not adjusted.softmax(1).isnan().any()


# ---------------------------------------------------------------------------------------------- DeferredReweighting


@pytest.mark.parametrize("epoch", [0, 1, 158, 159, 160, 161, 199, 320, 1000])
def test_deferred_reweighting_is_the_published_schedule(epoch: int) -> None:
    """LDAM-DRW's rule: of the betas (0, 0.9999) the one at index epoch // 160, weights scaled to sum to C."""
    beta = (0, 0.9999)[min(epoch // 160, 1)]
    n = np.array(EXPONENTIAL)
    raw = (1 - beta) / (1 - np.power(beta, n, dtype=np.float64))
    weight = DeferredReweighting(EXPONENTIAL, reweight_epoch=160)
    weight.set_epoch(epoch)
    close(weight().double(), raw / raw.sum() * len(n), rtol=1e-7)
    assert torch.equal(weight.weight_at(epoch), weight())
    assert weight.epoch.item() == epoch


def test_deferred_reweighting_from_the_first_epoch() -> None:
    assert torch.equal(DeferredReweighting(STEEP, 0, 0.99)(), rb.effective_number_weight(STEEP, 0.99))


def test_deferred_reweighting_writes_one_buffer() -> None:
    """A captured or compiled step reads the memory it saw first."""
    weight = DeferredReweighting(STEEP, 2)
    before = weight()
    pointer, values = before.data_ptr(), before.clone()
    weight.set_epoch(2)
    assert weight().data_ptr() == pointer
    assert not torch.equal(before, values)
    weight.set_epoch(0)
    assert torch.equal(before, values)


def test_deferred_reweighting_leaves_absent_classes_out() -> None:
    weight = DeferredReweighting([4, 0, 2], 1)
    assert weight().tolist() == [1, 0, 1]
    weight.set_epoch(1)
    assert weight()[1] == 0
    assert weight().sum().item() == pytest.approx(2)


def test_deferred_reweighting_resumes() -> None:
    trained = DeferredReweighting(STEEP, 3, 0.99)
    trained.set_epoch(4)
    state = {name: value.tolist() for name, value in trained.state_dict().items()}
    assert json.loads(json.dumps(state)).keys() == {"class_counts", "epoch", "weight"}

    resumed = DeferredReweighting([1] * len(STEEP), 3, 0.99)  # the counts come from the checkpoint, like the rest
    resumed.load_state_dict(trained.state_dict())
    for other in (resumed, copy.deepcopy(trained), pickle.loads(pickle.dumps(trained))):
        assert other.epoch.item() == 4
        assert torch.equal(other(), trained())
        other.set_epoch(2)
        assert torch.equal(other(), torch.ones(len(STEEP)))
        other.set_epoch(3)
        assert torch.equal(other(), trained())
    assert trained.epoch.item() == 4


def test_deferred_reweighting_is_never_half() -> None:
    weight = DeferredReweighting(EXPONENTIAL, 1)
    weight.set_epoch(1)
    exact = weight().clone()
    for convert in (lambda m: m.half(), lambda m: m.bfloat16(), lambda m: m.to("cpu", torch.float16)):
        assert torch.equal(convert(weight)(), exact)
        assert weight().dtype == torch.float32
    assert weight.double()().dtype == torch.float64
    assert torch.equal(weight(), exact.double())


def test_deferred_reweighting_repr() -> None:
    expected = "DeferredReweighting(reweight_epoch=160, beta=0.9999, num_classes=4, class_counts=1..100000)"
    assert repr(DeferredReweighting(STEEP, 160)) == expected
