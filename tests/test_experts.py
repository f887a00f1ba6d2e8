"""ltkernels.experts: each method's published formula in a few plain lines, schedules, routing, wrong calls."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from loss_cases import assert_same
from torch import Tensor, nn

import ltkernels as ltk
from ltkernels import experts

COUNTS = [900, 101, 100, 50, 20, 19, 5]  # both cuts of the shot groups
N, C = 12, len(COUNTS)
GROUPS = torch.tensor([[1, 1, 0, 0, 0, 0, 0], [0, 0, 1, 1, 1, 0, 0], [0, 0, 0, 0, 0, 1, 1]]).bool()
NESTED = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1, 1]]).bool()


def batch(num_experts: int = 3, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Logits, and labels in which every class occurs."""
    z = (3 * torch.randn(num_experts, N, C, dtype=torch.float64)).to(dtype)
    return z.requires_grad_(), torch.arange(N) % C


# --- Shot groups ---


def test_shot_groups() -> None:
    assert torch.equal(experts.shot_groups(COUNTS), GROUPS)
    assert torch.equal(experts.shot_groups(COUNTS, nested=True), NESTED)
    assert experts.shot_groups(COUNTS, many_above=40, few_below=6).sum(1).tolist() == [4, 2, 1]


def test_groups_without_classes_are_left_out() -> None:
    assert experts.shot_groups([500, 400, 5]).tolist() == [[True, True, False], [False, False, True]]
    assert experts.shot_groups([500, 400, 5], nested=True).tolist() == [[True] * 3, [False, False, True]]
    assert experts.shot_groups([30, 40], nested=True).tolist() == [[True, True]]
    with pytest.raises(ValueError, match="many_above: expected a finite number >= 50"):
        experts.shot_groups(COUNTS, many_above=20, few_below=50)


# --- ACE ---


def test_ace() -> None:
    z, y = batch()
    expected = torch.zeros((), dtype=torch.float64)
    for logits, mine in zip(z, NESTED, strict=True):
        rows = mine[y]
        place = mine.cumsum(0) - 1  # of a class among the expert's
        expected = expected + F.cross_entropy(logits[rows][:, mine], place[y[rows]])
        expected = expected + 0.3 * logits[:, ~mine].square().sum() / N
    assert_same(experts.ACELoss(COUNTS, complementary_weight=0.3)(z, y), expected, z)
    assert_same(experts.ACELoss(COUNTS, NESTED, 0.3)(list(z), y), expected, z)


def test_ace_averages_over_the_experts_that_cover_a_class() -> None:
    z, _ = batch()
    criterion = experts.ACELoss(COUNTS)
    expected = torch.stack([torch.stack([z[e, :, c] for e in range(3) if NESTED[e, c]]).mean(0) for c in range(C)], 1)
    torch.testing.assert_close(criterion.aggregate(z), expected)
    share = torch.tensor([sum(COUNTS[c] for c in range(C) if NESTED[e, c]) / sum(COUNTS) for e in range(3)])
    torch.testing.assert_close(criterion.sample_share, share)


def test_ace_of_ignored_samples_and_of_an_expert_without_samples() -> None:
    z, y = batch()
    criterion, some = experts.ACELoss(COUNTS), y.clone()
    some[::2] = -100
    with torch.no_grad():
        z[:, ::2] = math.nan
    kept = z[:, 1::2].detach().clone().requires_grad_()
    loss, expected = criterion(z, some), criterion(kept, y[1::2])
    torch.testing.assert_close(loss, expected)
    (gradient,), (kept_gradient,) = torch.autograd.grad(loss, z), torch.autograd.grad(expected, kept)
    torch.testing.assert_close(gradient[:, 1::2], kept_gradient)
    assert gradient[:, ::2].abs().sum() == 0

    head_alone = criterion(torch.ones(3, 2, C), torch.tensor([0, 1]))  # no sample for the second and third expert
    torch.testing.assert_close(head_alone, torch.tensor(math.log(C) + 2.0 + 5.0))


# --- ResLT ---


@pytest.mark.parametrize("beta", [0.0, 0.99, 1.0])
def test_reslt(beta: float) -> None:
    z, y = batch()

    def summed(logits: Tensor, counted: Tensor) -> Tensor:
        return (F.cross_entropy(logits, y, reduction="none") * counted).sum()

    own = [mine[y].double() for mine in NESTED]
    heads = sum(summed(logits, counted) for logits, counted in zip(z, own, strict=True)) / sum(own).sum()
    expected = (1 - beta) * summed(z.sum(0), own[0]) / own[0].sum() + beta * heads
    assert_same(experts.ResLTLoss(COUNTS, beta=beta)(z, y), expected, z)


def test_reslt_of_ignored_samples() -> None:
    z, y = batch()
    some = torch.where(torch.arange(N) % 3 == 0, 255, y)
    kept = some != 255
    criterion = experts.ResLTLoss(COUNTS, ignore_index=255)
    assert_same(criterion(z, some), criterion(z[:, kept], y[kept]), z)


# --- LFME ---


def test_lfme() -> None:
    """As published: the mean over samples and classes of a group, times its number of classes, without T^2."""
    z, y = torch.randn(N, C, dtype=torch.float64, requires_grad=True), torch.arange(N) % C
    teachers = 3 * torch.randn(3, N, C, dtype=torch.float64)
    criterion = experts.LFMELoss(COUNTS)
    criterion.set_accuracy(student=[0.2, 0.3, 0.6], expert=[0.8, 0.5, 0.6])
    loss = F.cross_entropy(z, y)
    # 0.2 is below 0.3 of 0.8; 0.3 is 0.6 of 0.5, and 0.4 of the 0.7 between threshold and 1 are left; 0.6 is all
    for weight, teacher, group in zip([1.0, 0.4 / 0.7, 0.0], teachers, GROUPS, strict=True):
        log_p, q = F.log_softmax(z[:, group] / 2, 1), F.softmax(teacher[:, group] / 2, 1)
        loss = loss + weight * F.kl_div(log_p, q, reduction="none").mean() * int(group.sum())
    assert_same(criterion(z, teachers, y), loss, z)


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.9])
def test_lfme_weights(threshold: float) -> None:
    def published(student: float, expert: float) -> float:
        if student < expert * threshold:
            return 1.0
        return max(0.0, (expert - student) / expert / (1 - threshold))

    criterion = experts.LFMELoss([9, 9], torch.tensor([[True, True]]), threshold=threshold)
    assert criterion.weight.tolist() == [1.0]
    for student in np.linspace(0, 1, 21):
        criterion.set_accuracy([float(student)], [0.7])
        assert criterion.weight.item() == pytest.approx(published(float(student), 0.7), abs=1e-6)
    criterion.set_accuracy([0.1], torch.tensor([0.0]))  # an expert that knows nothing
    assert criterion.weight.tolist() == [0.0]


def test_lfme_resumes() -> None:
    z, y = batch(3)
    criterion, other = experts.LFMELoss(COUNTS), experts.LFMELoss(COUNTS)
    criterion.set_accuracy([0.5, 0.5, 0.5], [0.6, 0.6, 0.6])
    assert criterion(z[0], z, y) != other(z[0], z, y)
    other.load_state_dict(criterion.state_dict())
    assert torch.equal(criterion(z[0], z, y), other(z[0], z, y))


# --- BBN ---


@pytest.mark.parametrize(("epochs", "divisor"), [(200, 200), (90, 100), (180, 200), (24, 24)])
def test_bbn_schedule(epochs: int, divisor: int) -> None:
    """Published epochs count from 1, and two numbers of them have a divisor of their own."""
    assert divisor == (100 * (epochs // 100 + 1) if epochs in (90, 180) else epochs)
    mixing = experts.BBN(divisor)
    assert mixing.lam == 1.0
    for published_epoch in range(1, epochs + 1):
        mixing.set_epoch(published_epoch - 1)
        assert mixing.lam.item() == pytest.approx(1 - ((published_epoch - 1) / divisor) ** 2, abs=1e-6)


def test_bbn() -> None:
    a, b = (torch.randn(N, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    y_a, y_b = torch.randint(C, (2, N))
    classifier = nn.Linear(8, C, dtype=torch.float64)
    mixing = experts.BBN(10)
    mixing.set_epoch(6)
    lam = 1 - 0.36
    mixed = mixing(a, b)
    torch.testing.assert_close(mixed, 2 * torch.cat([lam * a, (1 - lam) * b], 1), rtol=1e-6, atol=1e-6)
    z = classifier(mixed)
    expected = lam * F.cross_entropy(z, y_a) + (1 - lam) * F.cross_entropy(z, y_b)
    assert_same(mixing.loss(z, y_a, y_b), expected, z)
    assert mixing.loss(z, y_a, y_b, reduction="none").shape == (N,)
    assert torch.equal(mixing.eval()(a, b), torch.cat([a, b], 1))
    mixing.lam.fill_(0.5)  # what training sees halfway is what evaluation sees
    assert torch.equal(mixing.train()(a, b), mixing.eval()(a, b))


def test_bbn_resumes_and_changes_in_place() -> None:
    mixing, other = experts.BBN(10), experts.BBN(10)
    place = mixing.lam.data_ptr()
    mixing.set_epoch(7)
    assert mixing.lam.data_ptr() == place
    other.load_state_dict(mixing.state_dict())
    assert other.lam == mixing.lam == torch.tensor(1 - 0.49)


# --- SADE at test time ---


def test_test_time_loss() -> None:
    first, second = batch()[0].detach(), batch()[0].detach()
    aggregation = experts.TestTimeAggregation(3).double()
    with torch.no_grad():
        aggregation.score.copy_(torch.tensor([0.3, -0.5, 1.0]))
    a = aggregation.score.detach().clone().requires_grad_()
    w = a.softmax(0)
    p, q = (sum(w[e] * view[e] for e in range(3)).softmax(1) for view in (first, second))
    expected = -F.cosine_similarity(p, q, dim=1, eps=1e-6).mean()
    loss = aggregation.loss(first, list(second))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(
        torch.autograd.grad(loss, aggregation.score)[0], torch.autograd.grad(expected, a)[0], rtol=1e-9, atol=1e-12
    )
    torch.testing.assert_close(aggregation(first), sum(w[e] * first[e] for e in range(3)))


def views(noise: list[float], batches: int = 8) -> list[tuple[Tensor, Tensor]]:
    """Experts that agree with themselves on two views, more or less."""
    result = []
    for _ in range(batches):
        z = 3 * torch.randn(len(noise), 64, C)
        pair = [z + torch.tensor(noise)[:, None, None] * torch.randn(z.shape) for _ in range(2)]
        result.append((pair[0], pair[1]))
    return result


def test_the_expert_that_agrees_with_itself_gets_the_weight() -> None:
    data = views([3.0, 0.1, 3.0])
    aggregation = experts.TestTimeAggregation(3)
    torch.testing.assert_close(aggregation.weight, torch.full((3,), 1 / 3))
    before = sum(float(aggregation.loss(*pair).detach()) for pair in data)
    weight = aggregation.fit(data, lr=0.2)
    assert not weight.requires_grad and float(weight.sum()) == pytest.approx(1.0)
    assert weight.argmax() == 1 and weight[1] > 0.5
    assert sum(float(aggregation.loss(*pair).detach()) for pair in data) < before


def test_fit_takes_the_published_steps_and_stops_when_an_expert_is_left_out() -> None:
    data = views([3.0, 0.1, 3.0], batches=2)
    for lr, epochs in ((0.025, 5), (2.0, 40)):
        aggregation = experts.TestTimeAggregation(3)
        found = aggregation.fit(data, epochs, lr)
        a = nn.Parameter(torch.full((3,), 1 / 3))
        sgd = torch.optim.SGD([a], lr=lr, momentum=0.9, weight_decay=5e-4, nesterov=True)
        taken = 0
        for _ in range(epochs):
            taken += 1
            for pair in data:
                p, q = ((a.softmax(0)[:, None, None] * view).sum(0).softmax(1) for view in pair)
                sgd.zero_grad()
                (-F.cosine_similarity(p, q, eps=1e-6).mean()).backward()
                sgd.step()
            if np.any(np.round(a.softmax(0).detach().numpy(), 2) < 0.05):
                break
        torch.testing.assert_close(found, a.softmax(0).detach(), rtol=1e-4, atol=1e-5)
        assert (taken == epochs) == (lr == 0.025)  # the second does stop early


@pytest.mark.parametrize(("least", "stops"), [(0.047, False), (0.044, True)])
def test_the_stopping_rule_rounds_to_two_digits(least: float, stops: bool) -> None:
    epochs = 0

    class Views(list[tuple[Tensor, Tensor]]):
        def __iter__(self) -> Any:
            nonlocal epochs
            epochs += 1
            return super().__iter__()

    aggregation = experts.TestTimeAggregation(3)
    with torch.no_grad():
        aggregation.score.copy_(torch.tensor([least, 0.4, 0.6 - least]).log())
    aggregation.fit(Views(views([1.0, 1.0, 1.0], batches=1)), lr=1e-9)
    assert epochs == (1 if stops else 5)


def test_fit_needs_views_in_every_epoch() -> None:
    aggregation = experts.TestTimeAggregation(2)
    with pytest.raises(ValueError, match="views: expected a pair in every epoch, found none in epoch 1"):
        aggregation.fit(iter(views([1.0, 1.0], batches=1)))


# --- RIDE's routing ---

D, K = 5, 4


class Heads:
    """Experts that count the rows they see."""

    def __init__(self, num_experts: int = 3) -> None:
        self.linear = [nn.Linear(D, C) for _ in range(num_experts)]
        self.rows = [0] * num_experts

    def callables(self) -> list[Callable[[Tensor], tuple[Tensor, Tensor]]]:
        def expert(e: int) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
            def run(x: Tensor) -> tuple[Tensor, Tensor]:
                self.rows[e] += len(x)
                return self.linear[e](x), x * (e + 1)

            return run

        return [expert(e) for e in range(len(self.linear))]


def gate_of(router: experts.ExpertRouter, place: int, mean: Tensor, features: Tensor) -> Tensor:
    """One sample's, in plain words."""
    hidden = router.hidden[place](features / features.norm()).relu()
    return router.help(torch.cat([mean.sort(descending=True).values[:K], hidden]))


def test_router_loss() -> None:
    """The published loops: an expert helps where the mean so far is wrong and a later mean is right."""
    heads, router = Heads(), experts.ExpertRouter(3, D, topk=K, pos_weight=7.0)
    x, y = torch.randn(40, D), torch.randint(C, (40,))
    logits = [head(x) for head in heads.linear]
    features = [x * (e + 1) for e in range(3)]
    means = [sum(logits[: e + 1]) / (e + 1) for e in range(3)]
    right = [mean.argmax(1) == y for mean in means]
    expected, needed = torch.zeros(()), 0
    for place in range(2):
        needs = ~right[place] & torch.stack(right[place + 1 :]).any(0)
        needed += int(needs.sum())
        h = torch.stack([gate_of(router, place, means[place][i], features[place][i]) for i in range(40)])[:, 0]
        p = h.sigmoid()
        terms = 7.0 * needs * p.log() + ~needs * (1 - p).log()
        expected = expected - terms.mean() / 2
    assert needed > 0
    loss = router.loss(torch.stack(logits), features, y)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert all(head.weight.grad is None for head in heads.linear)  # the experts do not move
    assert all(parameter.grad.abs().sum() > 0 for parameter in router.parameters())


def test_a_routed_sample_has_the_mean_of_the_experts_it_went_through() -> None:
    heads, router = Heads(), experts.ExpertRouter(3, D, topk=K)
    with torch.no_grad():
        router.help.bias.fill_(-0.2)
        router.help.weight.mul_(3)
    x = torch.randn(200, D)
    output, num_experts = router(x, heads.callables())
    assert not output.requires_grad
    with torch.no_grad():
        for i in range(200):
            total, used = heads.linear[0](x[i]), 1
            while used < 3 and gate_of(router, used - 1, total / used, x[i] * used) > 0:
                total, used = total + heads.linear[used](x[i]), used + 1
            assert num_experts[i] == used
            torch.testing.assert_close(output[i], total / used)
    assert num_experts.bincount(minlength=4)[1:].min() > 0  # every way was taken


def test_the_work_shrinks_with_the_samples_that_need_more() -> None:
    for bias, rows in ((-1e4, [64, 0, 0]), (1e4, [64, 64, 64])):
        heads, router = Heads(), experts.ExpertRouter(3, D, topk=K)
        nn.init.constant_(router.help.bias, bias)
        _, num_experts = router(torch.randn(64, D), heads.callables())
        assert heads.rows == rows
        assert num_experts.sum() == sum(rows)
    heads, router = Heads(), experts.ExpertRouter(3, D, topk=K)
    nn.init.constant_(router.help.bias, -0.8)
    nn.init.constant_(router.help.weight, 0.0)
    router.help.weight.data[0, 0] = 1.0  # those whose largest logit is above 0.8 go on
    _, num_experts = router(torch.randn(64, D), heads.callables())
    assert heads.rows == [64, int((num_experts >= 2).sum()), int((num_experts == 3).sum())]
    assert 64 > heads.rows[1] >= heads.rows[2] > 0


def test_a_trained_router_sends_on_what_the_first_expert_gets_wrong() -> None:
    """The first expert knows half of the samples, by a feature that the gate sees; the second knows all."""
    x = torch.randn(512, D)
    y = (x[:, 1] > 0).long()
    sure = x[:, 0] > 0
    one_hot = 4.0 * F.one_hot(y, 2)
    first = torch.where(sure[:, None], one_hot, 4.0 - one_hot)
    second = 3.0 * one_hot
    router = experts.ExpertRouter(2, D, topk=2, pos_weight=1.0)
    adam = torch.optim.Adam(router.parameters(), lr=0.05)
    for _ in range(150):
        adam.zero_grad()
        router.loss([first, second], [x, x], y).backward()
        adam.step()
    index = torch.arange(512)
    routed = router(index, [lambda rows: (first[rows], x[rows]), lambda rows: (second[rows], x[rows])])
    assert ((routed.num_experts == 2) == ~sure).float().mean() > 0.95
    assert (routed.logits.argmax(1) == y).float().mean() > 0.95 > (first.argmax(1) == y).float().mean()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_experts_of_another_type_than_the_gates(dtype: torch.dtype) -> None:
    """Sums are float32: the result differs from that of all float32 by the rounding of the experts' logits alone."""
    router = experts.ExpertRouter(3, D, topk=K)
    nn.init.constant_(router.help.bias, 5.0)
    x = torch.randn(50, D)
    logits = 10 * torch.randn(3, 50, C)
    typed = logits.to(dtype)
    index = torch.arange(50)
    routed = router(index, [lambda rows, e=e: (typed[e, rows], x[rows].to(dtype)) for e in range(3)])
    expected = (typed.double().cumsum(0)[routed.num_experts - 1, index] / routed.num_experts[:, None]).to(dtype)
    assert routed.logits.dtype == dtype
    torch.testing.assert_close(routed.logits, expected, rtol=torch.finfo(dtype).eps, atol=1e-6)
    same = router.loss(typed.float(), x.to(dtype).float().expand(3, -1, -1), index % C)
    torch.testing.assert_close(router.loss(typed, x.to(dtype).expand(3, -1, -1), index % C), same)


def test_nothing_to_route() -> None:
    heads, router = Heads(), experts.ExpertRouter(3, D, topk=K)
    logits, num_experts = router(torch.empty(0, D), heads.callables())
    assert logits.shape == (0, C) and num_experts.shape == (0,)


# --- All of them ---

LOSSES: dict[str, Callable[[], Any]] = {
    "ace": lambda: experts.ACELoss(COUNTS),
    "reslt": lambda: experts.ResLTLoss(COUNTS),
    "lfme": lambda: experts.LFMELoss(COUNTS),
}


def call(name: str, criterion: Any, z: Tensor, y: Tensor) -> Tensor:
    loss: Tensor = criterion(z[0], z[1:], y) if name == "lfme" else criterion(z[:3], y)
    return loss


@pytest.mark.parametrize("name", LOSSES)
def test_types_copies_and_one_graph(name: str) -> None:
    z, y = batch(4, torch.float32)
    criterion = LOSSES[name]()
    loss = call(name, criterion, z, y)
    half = call(name, criterion, z.half(), y.to(torch.int16))
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, loss, rtol=5e-3, atol=5e-3)
    assert torch.equal(call(name, copy.deepcopy(criterion), z, y), loss)
    assert torch.equal(call(name, nn.ModuleDict({"loss": criterion}).half()["loss"], z, y), loss)
    torch._dynamo.reset()
    compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(call(name, compiled, z, y), loss)
    torch._dynamo.reset()
    assert all(buffer.is_meta for buffer in criterion.to("meta").buffers())
    assert call(name, criterion, z.to("meta"), y.to("meta")).is_meta  # no value is looked at: on a GPU nothing waits


def test_repr() -> None:
    assert str(experts.ACELoss(COUNTS)) == "ACELoss(cover=[7, 5, 2], num_classes=7, class_counts=5..900)"
    assert str(experts.LFMELoss(COUNTS)) == "LFMELoss(groups=[2, 3, 2], T=2.0, threshold=0.3)"
    assert str(experts.BBN(200)) == "BBN(num_epochs=200)"
    assert "num_experts=3, topk=4, pos_weight=100.0" in str(experts.ExpertRouter(3, D, topk=K))


ALL = torch.ones(1, C, dtype=torch.bool)
Z, Y = torch.zeros(3, 4, C), torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("error", "message", "wrong"),
    [
        (TypeError, "cover: expected torch.bool", lambda: experts.ACELoss(COUNTS, ALL.float())),
        (TypeError, "cover: expected a torch.Tensor, found list", lambda: experts.ACELoss(COUNTS, [[True] * C])),
        (ValueError, r"cover: expected shape \(E, 7\)", lambda: experts.ResLTLoss(COUNTS, ALL[:, :3])),
        (ValueError, "found a row without a class, row 1", lambda: experts.ACELoss(COUNTS, torch.cat([ALL, ~ALL]))),
        (ValueError, "found no row with class 0", lambda: experts.ResLTLoss(COUNTS, NESTED[1:])),
        (ValueError, "complementary_weight: .* >= 0", lambda: experts.ACELoss(COUNTS, complementary_weight=-1.0)),
        (ValueError, "beta: expected .* <= 1", lambda: experts.ResLTLoss(COUNTS, beta=1.5)),
        (ValueError, r"input: expected shape \(3, N, 7\), found \(2", lambda: experts.ACELoss(COUNTS)(Z[:2], Y)),
        (ValueError, r"input: expected shape \(3, N, 7\)", lambda: experts.ResLTLoss(COUNTS)(Z[..., :2], Y)),
        (IndexError, r"target: expected labels in \[0, 7\)", lambda: experts.ACELoss(COUNTS)(Z, Y + 7)),
        (IndexError, r"target: expected labels in \[0, 7\)", lambda: experts.ResLTLoss(COUNTS)(Z, Y + 7)),
        (ValueError, "groups: expected classes in every row", lambda: experts.LFMELoss(COUNTS, GROUPS[:2])),
        (ValueError, "T: expected a finite number > 0", lambda: experts.LFMELoss(COUNTS, T=0.0)),
        (ValueError, "threshold: expected a number below 1", lambda: experts.LFMELoss(COUNTS, threshold=1.0)),
        (ValueError, "experts: expected the logits of 3 experts", lambda: experts.LFMELoss(COUNTS)(Z[0], Z[:2], Y)),
        (ValueError, "student: .* shape", lambda: experts.LFMELoss(COUNTS).set_accuracy([0.1], [0.1] * 3)),
        (ValueError, r"expert: .* \[0, 1\]", lambda: experts.LFMELoss(COUNTS).set_accuracy([0.1] * 3, [10.0] * 3)),
        (ValueError, "num_epochs: expected at least 1", lambda: experts.BBN(0)),
        (TypeError, "num_epochs: expected an integer", lambda: experts.BBN(2.5)),
        (ValueError, r"epoch: expected an epoch in \[0, 9\)", lambda: experts.BBN(9).set_epoch(9)),
        (ValueError, "num_experts: expected at least 1", lambda: experts.TestTimeAggregation(0)),
        (ValueError, "second: expected first's shape", lambda: experts.TestTimeAggregation(3).loss(Z, Z[:, :2])),
        (ValueError, "expert_weight: expected shape", lambda: experts.TestTimeAggregation(2)(Z)),
        (ValueError, "num_experts: expected at least 2", lambda: experts.ExpertRouter(1, D)),
        (ValueError, "in_features: expected at least 1", lambda: experts.ExpertRouter(3, 0)),
        (TypeError, "topk: expected an integer", lambda: experts.ExpertRouter(3, D, topk=1.5)),
        (ValueError, "pos_weight: .* > 0", lambda: experts.ExpertRouter(3, D, pos_weight=0.0)),
        (ValueError, "topk: expected at most .* 7", lambda: experts.ExpertRouter(3, D)(Y, [lambda x: (Z[0], x)] * 3)),
        (ValueError, "experts: expected 3, found 2", lambda: experts.ExpertRouter(3, D)(Y, [lambda x: (x, x)] * 2)),
        (ValueError, r"logits: expected shape \(3, 4", lambda: experts.ExpertRouter(3, D).loss(Z[:2], Z, Y)),
        (ValueError, r"features: expected shape \(3, 4", lambda: experts.ExpertRouter(3, D).loss(Z, Z[:, :2], Y)),
        (ValueError, r"target: .* shape \(4,\)", lambda: experts.ExpertRouter(3, D).loss(Z, Z, Y[:1])),
    ],
)
def test_wrong_calls(error: type[Exception], message: str, wrong: Callable[[], Any]) -> None:
    with pytest.raises(error, match=message):
        wrong()


def test_the_package_is_loaded_on_first_use() -> None:
    assert ltk.experts is experts and "experts" in dir(ltk)
