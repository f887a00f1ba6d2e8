"""What only a GPU can show: nothing waits for it, graphs, streams, devices, sizes, memory, mixed precision.

Values, layouts and orders are in the other files, which run on every backend there is; paths of the GPU kernels in
test_gpu_kernels.py. `python -m benchmarks.gpu` runs the tests named test_sync* and test_graph* as stages of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cross_entropy_cases import FORMS, GPU_BACKENDS, Form, cross_entropy, labels, positive, seed
from loss_cases import COUNTS, EVERY, WEIGHT, C
from torch import Tensor

import ltkernels as ltk
from ltkernels.samplers import AliasTable, ClassIndex, ClassRounds

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]
each_backend = pytest.mark.parametrize(
    "form", [f for f in FORMS if f.device == "cuda" and f.backend in GPU_BACKENDS], ids=lambda f: f.backend
)
# Every loss, and what they do not reach: both learnable tables, rows one by one, a denominator from outside.
CALLS: dict[str, Callable[[], Callable[[Tensor, Tensor], Tensor]]] = {
    **{name: lambda make=make: make(COUNTS).cuda() for name, make in EVERY.items()},
    "weight and smoothing": lambda: ltk.losses.CrossEntropyLoss(WEIGHT.float(), label_smoothing=0.1).cuda(),
    "learnable": lambda: ltk.losses.CrossEntropyLoss(
        class_scale=torch.nn.Parameter(torch.ones(C)), class_bias=torch.nn.Parameter(torch.zeros(C)), reduction="none"
    ).cuda(),
    "given denominator": lambda: ltk.losses.CrossEntropyLoss(denominator=torch.tensor(7.0)).cuda(),
}
each_call = pytest.mark.parametrize("call", CALLS)


@pytest.fixture(autouse=True)
def _nothing_left_to_report() -> Iterator[None]:
    yield
    torch.cuda.synchronize()
    ltk.check()


def batch(n: int, c: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    seed(n * c)
    return (torch.randn(n, c) * 2).to(dtype).cuda(), labels((n,), c).cuda()


def step(loss: Callable[[Tensor, Tensor], Tensor], leaf: Tensor, target: Tensor, upstream: Tensor) -> list[Tensor]:
    """Loss and gradients to the logits, a view of the leaf, and to the parameters of the loss."""
    logits = leaf.view_as(leaf)
    parameters = list(loss.parameters()) if isinstance(loss, torch.nn.Module) else []
    value = loss(logits, target)
    return [value.detach(), *torch.autograd.grad(value, [logits, *parameters], upstream.expand(value.shape))]


def assert_equal(actual: list[Tensor], expected: list[Tensor]) -> None:
    for value, other in zip(actual, expected, strict=True):
        assert torch.equal(value, other)


# --- Waiting ---


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each_call
def test_sync_no_call_waits(call: str, dtype: torch.dtype, form: Form) -> None:
    """Forward and backward, the first call as well as the next: warm-up does what compiling needs."""
    leaf, target = batch(48, C, dtype)
    loss, upstream = CALLS[call](), torch.tensor(0.5, device="cuda")
    leaf.requires_grad_()
    with form.use():
        step(loss, leaf, target, upstream)
        torch.cuda.synchronize()
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step(loss, leaf, target, upstream)
            with torch.no_grad():
                loss(leaf, target)
        finally:
            torch.cuda.set_sync_debug_mode(before)


@each_backend
def test_sync_the_mode_sees_a_wait(form: Form) -> None:
    """That the test above can fail."""
    value = torch.ones((), device="cuda")
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            value.item()
    finally:
        torch.cuda.set_sync_debug_mode(before)


# --- Graphs ---


def captured(run: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        kept = run()
    return graph, kept


@each_backend
@each_call
def test_graph_replays_with_new_contents(call: str, form: Form) -> None:
    """Bit by bit what the eager call gives for what lies in the graph's memory at the replay."""
    leaf, target = batch(48, C)
    leaf.requires_grad_()
    loss, upstream = CALLS[call](), torch.tensor(0.5, device="cuda")
    with form.use():
        graph, kept = captured(lambda: step(loss, leaf, target, upstream))
        for number in range(3):
            with torch.no_grad():
                leaf.copy_(torch.randn(leaf.shape) * (number + 1))
            target.copy_(torch.randint(C, target.shape))
            upstream.fill_(0.25 * (number + 1))
            for value in kept:
                value.fill_(torch.nan)
            graph.replay()
            assert_equal(kept, step(loss, leaf, target, upstream))


@each_backend
def test_graph_holds_several_calls_and_runs_beside_eager_ones(form: Form) -> None:
    """Counters of a graph are its own: a replay and eager calls on another stream at the same time."""
    leaf, target = batch(4096, 203)
    leaf.requires_grad_()
    one, loss = torch.ones((), device="cuda"), ltk.functional.cross_entropy
    with form.use():
        expected = step(loss, leaf, target, one)
        graph, kept = captured(lambda: [step(loss, leaf, target, one) for _ in range(5)])
        other, eager = torch.cuda.Stream(), []
        torch.cuda.synchronize()
        for _ in range(20):
            graph.replay()
            with torch.cuda.stream(other):
                eager.append(step(loss, leaf, target, one))
        torch.cuda.synchronize()
        for results in (*kept, *eager):
            assert_equal(results, expected)


@each_backend
def test_graph_with_a_label_out_of_range_reports_it(form: Form) -> None:
    leaf, target = batch(6, 10)
    with form.use(), torch.no_grad():
        graph, loss = captured(lambda: cross_entropy(leaf, target, reduction="none"))
        target[2] = 10
        graph.replay()
        torch.cuda.synchronize()
        assert loss.isnan().tolist() == [False, False, True, False, False, False]
        with pytest.raises(IndexError, match="found another in an earlier call on cuda:0"):
            ltk.check()


# --- Streams of samples ---

STREAMS: dict[str, Callable[[], dict[str, Any]]] = {
    "uniform": dict,
    "weighted": lambda: {"class_probs": AliasTable(torch.arange(C) + 1).to("cuda")},
    "rounds": lambda: {"replacement": False},
    "slots": lambda: {"class_probs": ClassRounds(C, torch.arange(C) + 1).to("cuda"), "replacement": False},
}
each_stream = pytest.mark.parametrize("stream", STREAMS)


def samples_of_long_tailed_classes() -> ClassIndex:
    return ClassIndex(torch.repeat_interleave(torch.arange(C), torch.arange(C) ** 2 + 1)).to("cuda")


@each_backend
@each_stream
def test_sync_sampling_does_not_wait(stream: str, form: Form) -> None:
    """Numbers on the device are read where they are, by the whole function."""
    index, options = samples_of_long_tailed_classes(), STREAMS[stream]()
    start, epoch = torch.tensor(2**40, device="cuda"), torch.tensor(3, device="cuda")
    draw = ltk.functional.sample_indices
    with form.use():
        draw(index, start, num_samples=1000, seed=1, epoch=epoch, **options)  # compiles, and counts the classes
        draw(index, 5, 1005, seed=1, epoch=3, **options)
        torch.cuda.synchronize()
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            found = draw(index, start, num_samples=1000, seed=1, epoch=epoch, **options)
            draw(index, 5, 1005, seed=1, epoch=3, **options)
        finally:
            torch.cuda.set_sync_debug_mode(before)
        assert torch.equal(found, draw(index, 2**40, 2**40 + 1000, seed=1, epoch=3, **options))


@each_backend
@each_stream
def test_graph_goes_on_in_the_stream(stream: str, form: Form) -> None:
    """A graph that adds to its start gives one stretch after the other; the epoch is its caller's to set."""
    index, options = samples_of_long_tailed_classes(), STREAMS[stream]()
    start, epoch = torch.tensor(0, device="cuda"), torch.tensor(0, device="cuda")
    draw = ltk.functional.sample_indices

    def run() -> Tensor:
        found = draw(index, start, num_samples=333, seed=2, epoch=epoch, **options)
        start.add_(333)
        return found

    with form.use():
        graph, kept = captured(run)
        for number in (0, 1, 7):
            start.zero_()
            epoch.fill_(number)
            expected = draw(index, 0, 999, seed=2, epoch=number, **options)
            for part in expected.split(333):
                graph.replay()
                assert torch.equal(kept, part)


@each_backend
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_graph_of_sampled_classes_goes_on(weighted: bool, sparse: bool, form: Form) -> None:
    """A step that waits for nothing; captured, each replay has the classes and gradients of the next step."""
    seed(1)
    x, y = torch.randn(64, 32).cuda(), torch.randint(5000, (64,)).cuda()
    w = torch.randn(5000, 32).cuda().requires_grad_()
    probs = AliasTable(1.0 / torch.arange(1, 5001)).to(torch.device("cuda", 0)) if weighted else None
    at = torch.tensor(0, device="cuda")

    def run(step: int | Tensor) -> list[Tensor]:
        sample = ltk.functional.sample_classes(y, 5000, 500, seed=2, step=step, class_probs=probs)
        loss = ltk.functional.linear_cross_entropy(x, w, y, sample=sample, sparse_grad=sparse)
        (grad,) = torch.autograd.grad(loss, w)
        return [sample.classes, sample.log_expected, loss.detach(), grad._values() if sparse else grad]

    def counting() -> list[Tensor]:
        found = run(at)
        at.add_(1)
        return found

    with form.use():
        run(0)
        torch.cuda.synchronize()
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            run(at)
        finally:
            torch.cuda.set_sync_debug_mode(before)
        graph, kept = captured(counting)
        at.zero_()
        for number in range(3):
            graph.replay()
            for value, other in zip(kept, run(number), strict=True):
                torch.testing.assert_close(value, other)


@each_backend
def test_the_stream_of_a_gpu_is_that_of_a_cpu(form: Form) -> None:
    """All blocks at once, and positions beyond 2^32."""
    index = samples_of_long_tailed_classes()
    draw = ltk.functional.sample_indices
    for replacement in (True, False):
        with ltk.use_backend("reference"):
            expected = draw(index.to("cpu"), 2**33 - 500_000, 2**33 + 500_001, seed=3, replacement=replacement)
        with form.use():
            found = draw(index, 2**33 - 500_000, 2**33 + 500_001, seed=3, replacement=replacement)
        assert torch.equal(found.cpu(), expected)


# --- Labels that are wrong ---


@each_backend
def test_the_next_eager_call_reports_a_label_out_of_range(form: Form) -> None:
    x, y = batch(5, 10)
    with form.use():
        bad = y.clone()
        bad[3] = -7
        assert cross_entropy(x, bad, reduction="none").isnan().tolist() == [False, False, False, True, False]
        torch.cuda.synchronize()
        with pytest.raises(IndexError, match="target: expected labels in"):
            cross_entropy(x, y)
        assert cross_entropy(x, y).isfinite()


# --- Streams and devices ---


@each_backend
def test_two_streams_at_once(form: Form) -> None:
    """Large enough to overlap; the sums over rows of one stream must not count the other's blocks."""
    problems = [batch(8192, 1000, torch.bfloat16), batch(8191, 1003)]
    one, loss = torch.ones((), device="cuda"), ltk.functional.cross_entropy
    for leaf, _ in problems:
        leaf.requires_grad_()
    with form.use():
        expected = [step(loss, leaf, target, one) for leaf, target in problems]
        streams = [torch.cuda.Stream() for _ in problems]
        torch.cuda.synchronize()
        found: list[list[list[Tensor]]] = [[], []]
        for _ in range(10):
            for place, (leaf, target) in enumerate(problems):
                with torch.cuda.stream(streams[place]):
                    found[place].append(step(loss, leaf, target, one))
        torch.cuda.synchronize()
        for place, results in enumerate(found):
            for result in results:
                assert_equal(result, expected[place])


@each_backend
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_a_device_that_is_not_the_current_one(form: Form) -> None:
    x, y = batch(33, 57)
    one = torch.ones((), device="cuda:1")
    with form.use():
        expected = step(ltk.functional.cross_entropy, x.requires_grad_(), y, one.to("cuda:0"))
        moved = x.detach().to("cuda:1").requires_grad_()
        found = step(ltk.functional.cross_entropy, moved, y.to("cuda:1"), one)
    assert torch.cuda.current_device() == 0
    assert all(value.device.index == 1 for value in found)
    assert_equal([value.to("cuda:0") for value in found], expected)


# --- Order ---


@each_backend
@pytest.mark.parametrize("n, c", [(8192, 1203), (60000, 10), (3, 300_001)], ids=str)
def test_the_same_bits_twenty_times_with_all_blocks_at_once(n: int, c: int, form: Form) -> None:
    leaf, target = batch(n, c, torch.bfloat16)
    leaf.requires_grad_()
    seed(1)
    loss = ltk.losses.CrossEntropyLoss(positive(c), class_bias=torch.nn.Parameter(torch.randn(c))).cuda()
    one = torch.ones((), device="cuda")
    with form.use():
        expected = step(loss, leaf, target, one)
        for _ in range(20):
            assert_equal(step(loss, leaf, target, one), expected)


@each_backend
@pytest.mark.parametrize("c", [100, 1000, 8144, 131_072])
def test_a_row_is_the_same_alone_and_among_many(c: int, form: Form) -> None:
    """Of a class count whose rows all lie alike: the cuda backend may sum in another order where they do not."""
    x, y = batch(257, c, torch.bfloat16)
    with form.use():
        many = cross_entropy(x, y, reduction="none")
        for row in (0, 1, 200, 256):
            alone = cross_entropy(x[row : row + 1].clone(), y[row : row + 1], reduction="none")
            assert torch.equal(alone[0], many[row])


# --- Size and memory ---


def _free_memory() -> int:
    return int(torch.cuda.mem_get_info()[0]) if torch.cuda.is_available() else 0


@each_backend
@pytest.mark.slow
@pytest.mark.parametrize("shape", [(65_600, 32_768), (3, 1_000, 750_000)], ids=str)
def test_more_than_2_31_elements(shape: tuple[int, ...], form: Form) -> None:
    """Rows at the end, beyond 2^31 elements, are what they are alone; in the second shape their classes lie apart."""
    if _free_memory() < 12 * 2**30:
        pytest.skip("needs 12 GiB of free memory")
    x = torch.empty(shape, dtype=torch.float16, device="cuda").normal_()
    y = torch.randint(shape[1], (shape[0], *shape[2:]), device="cuda")
    assert x.numel() > 2**31
    x.requires_grad_()
    with form.use():
        loss = cross_entropy(x, y, reduction="none")
        (grad,) = torch.autograd.grad(loss, x, torch.full_like(loss, 0.5))
        for place in ((0, 0), (-1, -1), (-1, 0), (-2, -1)):
            row = (place[0],) if len(shape) == 2 else place
            where = (row[0], slice(None), *row[1:])
            alone = x[where].detach()[None].requires_grad_()
            expected = cross_entropy(alone, y[row][None], reduction="none")
            (expected_grad,) = torch.autograd.grad(expected, alone, torch.full_like(expected, 0.5))
            torch.testing.assert_close(loss[row], expected[0], rtol=1e-6, atol=0)
            torch.testing.assert_close(grad[where], expected_grad[0], rtol=1e-3, atol=1e-7)
        assert loss.isfinite().all()


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each_call
def test_memory_beside_logits_and_gradient_is_of_rows_and_classes(call: str, dtype: torch.dtype, form: Form) -> None:
    n = 20_000
    seed(2)
    leaf, target = torch.randn(n, C).to(dtype).cuda().requires_grad_(), labels((n,), C).cuda()
    loss, one = CALLS[call](), torch.ones((), device="cuda")
    with form.use():
        step(loss, leaf, target, one)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(loss, leaf, target, one)
        beyond = torch.cuda.max_memory_allocated() - before - leaf.nbytes
    least = 64 * 1024  # each of some twenty tensors is rounded up to 512 bytes
    if call == "learnable":  # sums of a fixed number of blocks, whatever the batch is
        least += 2 * 4 * 128 * 16 * torch.cuda.get_device_properties(0).multi_processor_count + 8 * C
    assert beyond <= 64 * (n + C) + least


# --- Around it ---


@each_backend
@pytest.mark.parametrize("call", ["CrossEntropyLoss", "LogitAdjustedLoss", "LDAMLoss", "CosFaceLoss", "learnable"])
def test_compiled_forward_and_backward(call: str, form: Form) -> None:
    loss, one = CALLS[call](), torch.ones((), device="cuda")
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True)
    with form.use():
        for n in (32, 48, 7):
            leaf, target = batch(n, C)
            leaf.requires_grad_()
            parameters = list(loss.parameters())
            results = []
            for which in (compiled, loss):
                value = which(leaf, target)
                grads = torch.autograd.grad(value, [leaf, *parameters], one.expand(value.shape))
                results.append([value.detach(), *grads])
            assert_equal(*results)


@each_backend
def test_compiled_into_a_graph(form: Form) -> None:
    """mode="reduce-overhead" warms up in a graph's own memory, in which no counter of ours may stay."""
    loss, one = CALLS["LogitAdjustedLoss"](), torch.ones((), device="cuda")
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, y: loss(x * 2, y), fullgraph=True, mode="reduce-overhead")
    with form.use():
        for seed_of_batch in range(5):
            leaf, target = batch(32 + seed_of_batch // 4, C)
            leaf.requires_grad_()
            results = []
            for value in (compiled(leaf, target), loss(leaf * 2, target)):
                results.append([value.detach().clone(), *torch.autograd.grad(value, [leaf], one)])
            torch.testing.assert_close(results[0], results[1])


@each_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_mixed_precision_with_a_gradient_scaler(dtype: torch.dtype, form: Form) -> None:
    """As far from float32 as plain PyTorch in the same precision: twice that, since both round."""
    seed(3)
    features, target = torch.randn(64, 32).cuda(), labels((64,), C).cuda()
    weight = (torch.randn(C, 32) * 0.1).cuda()

    def gradient(loss: Callable[[Tensor, Tensor], Tensor], autocast: bool) -> Tensor:
        head = torch.nn.Linear(32, C, bias=False, device="cuda")
        head.weight.data.copy_(weight)
        scaler = torch.amp.GradScaler("cuda", init_scale=1024.0, enabled=autocast)
        optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
        with torch.autocast("cuda", dtype=dtype, enabled=autocast):
            logits = head(features)
            assert logits.dtype == (dtype if autocast else torch.float32)
            value = loss(logits, target)
        assert value.dtype == torch.float32
        scaler.scale(value).backward()
        scaler.unscale_(optimizer)
        found = head.weight.grad.clone()
        scaler.step(optimizer)
        scaler.update()
        assert not torch.equal(head.weight, weight), "the step was skipped"
        return found

    plain = torch.nn.functional.cross_entropy
    truth = gradient(plain, autocast=False)
    with form.use():
        ours = gradient(ltk.functional.cross_entropy, autocast=True)
    error, usual = ((g - truth).norm() / truth.norm() for g in (ours, gradient(plain, autocast=True)))
    assert error <= 2 * usual
