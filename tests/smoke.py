"""Whether an installation of ltkernels works: a program for the interpreter that it was installed for.

    python tests/smoke.py          # with the compiled parts, from a wheel or built on this machine
    python tests/smoke.py --pure   # without them

It needs what ltkernels itself needs and no more, and refuses to test a source tree. Each check prints a line; the exit
status is 1 as soon as one fails. tests/test_wheel.py runs it in fresh environments, cibuildwheel on each wheel.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import sysconfig
import warnings
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

import ltkernels as ltk

# 37 classes are no multiple of a vector's width and 9 rows none of a block's: what is left over is computed, too.
ROWS, CLASSES = 9, 37
COUNTS = [max(1, round(500 * 0.8**c)) for c in range(CLASSES)]


def check(holds: bool, *found: object) -> None:
    """Not ``assert``: that would be silent under ``python -O``."""
    if not holds:
        raise AssertionError(" ".join(map(str, found)))


def close(found: Tensor, exact: Tensor, torch32: Tensor) -> None:
    """`found` may err against float64 four times as much as torch's own float32, or a few units in the last place."""
    scale = max(1.0, exact.abs().max().item())
    allowed = 4 * (torch32.double() - exact).abs().max().item() + 4 * torch.finfo(torch.float32).eps * scale
    error = (found.double() - exact).abs().max().item()
    check(error <= allowed, f"off by {error:.2e}, allowed {allowed:.2e}")


def compare(ours: Callable[..., Tensor], theirs: Callable[..., Tensor], input: Tensor, upstream: Tensor) -> None:
    """Values and gradients of `ours` against `theirs` in float64, for one upstream gradient."""
    results = []
    for fn, dtype in ((ours, torch.float32), (theirs, torch.float32), (theirs, torch.float64)):
        x = input.to(dtype, copy=True).requires_grad_()
        value = fn(x)
        value.backward(upstream.to(dtype))
        check(x.grad is not None, "no gradient")
        results.append((value.detach(), x.grad))
    for found, torch32, exact in zip(*results, strict=True):
        close(found, exact, torch32)


def installed(pure: bool) -> str:
    """The package is the installed one and whole, and its command runs."""
    package = Path(ltk.__file__).parent
    roots = {Path(sysconfig.get_path(name)).resolve() for name in ("purelib", "platlib")}
    check(package.resolve().parent in roots, f"{package} is not installed in {sorted(map(str, roots))}")
    found = metadata.distribution("ltkernels")
    check(found.version == ltk.__version__, f"metadata says {found.version}, the package {ltk.__version__}")
    files = [Path(str(found.locate_file(file))) for file in found.files or ()]
    check(
        bool(files) and all(file.exists() for file in files), "files are missing:", [f for f in files if not f.exists()]
    )
    check((package / "py.typed").exists(), "py.typed is missing")
    compiled = sorted(path.relative_to(package).as_posix() for path in package.rglob("*.so"))
    check(pure == (not compiled), f"found {compiled}")

    script = Path(sysconfig.get_path("scripts"), "ltkernels")
    for command in ([str(script)], [sys.executable, "-m", "ltkernels"]):
        run = subprocess.run([*command, "info", "--json"], capture_output=True, text=True)
        check(run.returncode == 0, run.stderr)
        told = json.loads(run.stdout)
        check(told["ltkernels"] == ltk.__version__ and told["torch"] == torch.__version__, run.stdout)
        check((told["build"] is None) == pure and (told["instruction_set"] is None) == pure, run.stdout)
    return f"{ltk.__version__} in {package}: {', '.join(compiled) or 'pure Python'}"


def backends(pure: bool) -> str:
    """The fastest backend that there should be serves the call; without it the first call says so, once."""
    reason = ltk.backends.status()["cpu"]
    check((reason is not None) == pure, f"the cpu backend: {reason}")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            ltk.functional.cross_entropy(torch.zeros(2, 3), torch.tensor([0, 2]))
            ltk.functional.aggregate_experts(torch.zeros(2, 2, 3))
    told = [str(warning.message) for warning in caught]
    check(len(told) == pure and all("pip install" in text for text in told), f"warned {told}")
    text = ltk.explain(ltk.functional.cross_entropy, torch.zeros(2, 3), torch.tensor([0, 2]))
    serving = "reference" if pure else "cpu"
    check(any(line.split()[:2] == [serving, "serves"] for line in text.splitlines()), text)
    return serving


def losses(device: torch.device) -> str:
    """Losses, forward and backward, against torch."""
    generator = torch.Generator().manual_seed(0)
    x = 3 * torch.randn(ROWS, CLASSES, generator=generator)
    y = torch.randint(CLASSES, (ROWS,), generator=generator)
    weight = torch.rand(CLASSES, generator=generator)
    upstream = torch.randn(ROWS, generator=generator)
    x, y, weight, upstream = (tensor.to(device) for tensor in (x, y, weight, upstream))
    counts = torch.tensor(COUNTS, dtype=torch.float64, device=device)
    bias = (counts / counts.sum()).log()
    margin = 0.5 * (counts.min() / counts) ** 0.25
    labels = F.one_hot(y, CLASSES)
    adjusted = ltk.losses.LogitAdjustedLoss(COUNTS, reduction="none").to(device)
    ldam = ltk.losses.LDAMLoss(COUNTS, reduction="none").to(device)

    smoothed = {"reduction": "none", "label_smoothing": 0.1}
    compare(
        lambda x: ltk.functional.cross_entropy(x, y, weight, **smoothed),
        lambda x: F.cross_entropy(x, y, weight.to(x.dtype), **smoothed),
        x,
        upstream,
    )
    compare(lambda x: adjusted(x, y), lambda x: F.cross_entropy(x + bias.to(x.dtype), y, reduction="none"), x, upstream)
    compare(
        lambda x: ldam(x, y),
        lambda x: F.cross_entropy(30 * (x - labels * margin.to(x.dtype)), y, reduction="none"),
        x / 10,  # cosines
        upstream,
    )
    return f"cross_entropy, LogitAdjustedLoss, LDAMLoss agree with torch on {device}"


def experts(device: torch.device) -> str:
    """What several experts take and give, forward and backward, against torch."""
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(3, ROWS, CLASSES, generator=generator).to(device)
    y = torch.randint(CLASSES, (ROWS,), generator=generator).to(device)
    upstream = torch.randn(ROWS, generator=generator).to(device)

    def ride(z: Tensor) -> Tensor:
        mean = F.log_softmax(z.mean(0).detach(), 1)
        apart = sum(F.kl_div(F.log_softmax(e, 1), mean, reduction="none", log_target=True).sum(1) for e in z)
        return sum(F.cross_entropy(e, y, reduction="none") for e in z) - 0.2 * apart

    compare(
        lambda z: ltk.functional.expert_cross_entropy(z, y, reduction="none", diversity_factor=-0.2), ride, z, upstream
    )
    upstream = torch.randn(ROWS, CLASSES, generator=generator).to(device)
    compare(ltk.functional.aggregate_experts, lambda z: z.mean(0), z, upstream)
    return f"expert_cross_entropy, aggregate_experts agree with torch on {device}"


def sampler() -> str:
    """An epoch is balanced, every sample comes before any comes twice, and it is the same everywhere."""
    labels = [0] * 50 + [1] * 8 + [2] * 2
    made = ltk.samplers.LongTailSampler(labels, "class_balanced", replacement=False, num_samples=30, seed=7)
    epoch = list(made)
    check([sum(labels[i] == c for i in epoch) for c in range(3)] == [10, 10, 10], epoch)
    check(
        len({i for i in epoch if labels[i] == 0}) == 10 and {i for i in epoch if labels[i] == 1} == set(range(50, 58))
    )
    check(epoch[:8] == [57, 58, 6, 12, 59, 53, 4, 58], epoch)  # what this seed gives, in NumPy and in C++
    made.load_state_dict({**made.state_dict(), "epoch": 0, "position": 20})
    check(list(made) == epoch[20:], "resuming gives other samples")
    check(list(made) != epoch, "the next epoch is the same")
    return "an epoch of LongTailSampler, and the rest of it after resuming"


def instruction_sets() -> str:
    """Every instruction set of this machine gives the losses."""
    used, ran = ltk.backends.cpu_instruction_set(), []
    for name in ltk.backends.CPU_INSTRUCTION_SETS:
        try:
            ltk.backends.cpu_instruction_set(name)
        except ValueError:
            continue  # not this processor's
        losses(torch.device("cpu"))
        ran.append(name)
    ltk.backends.cpu_instruction_set(used)
    check(bool(ran) and ran[-1] == "portable", f"ran {ran}")
    return ", ".join(ran)


def compiled_graph() -> str:
    """The op goes through torch.compile in one graph; aot_eager needs no compiler here."""
    x, y = torch.randn(ROWS, CLASSES, requires_grad=True), torch.arange(ROWS)
    torch.compile(ltk.functional.cross_entropy, fullgraph=True, backend="aot_eager")(x, y).backward()
    found = x.grad
    x.grad = None
    ltk.functional.cross_entropy(x, y).backward()
    check(found is not None and x.grad is not None and torch.equal(found, x.grad), "other gradients")
    return "cross_entropy in one graph"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pure", action="store_true", help="the installation has no compiled parts")
    pure = parser.parse_args(argv).pure
    devices = [torch.device(name) for name in ["cpu"] + ["cuda"] * torch.cuda.is_available()]
    checks: list[tuple[str, Callable[[], str]]] = [
        ("installed", lambda: installed(pure)),
        ("backend", lambda: backends(pure)),
        *(("losses", lambda device=device: losses(device)) for device in devices),
        *(("experts", lambda device=device: experts(device)) for device in devices),
        ("sampler", sampler),
        *([] if pure else [("instructions", instruction_sets)]),
        ("compile", compiled_graph),
    ]
    for name, run in checks:
        try:
            print(f"ok      {name}: {run()}", flush=True)
        except Exception:
            print(f"FAILED  {name}", flush=True)
            raise
    return 0


if __name__ == "__main__":
    sys.exit(main())
