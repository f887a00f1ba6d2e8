"""The stages of ``make gpu``: what each runs, in processes of their own within a budget, and how they ended.

A stage that fails, hangs or crashes is reported with the lines that say why, and the next one runs. What a stage does
not use of its time goes to those after it. Output is passed on as it comes: the machine may be cut off.
"""

from __future__ import annotations

import os
import re
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GRACE = 15.0  # seconds between the interrupt that lets pytest write its summary and the end
KEPT = 400_000  # characters of output that are looked through for failures
TELLING = re.compile(r"^(FAILED|ERROR|NOTE: )", re.MULTILINE)

# What pyproject.toml says is for a newer pytest than may be here, and leaves the GPU's tests out.
PYTEST = (
    *("-m", "pytest", "-c", os.devnull, "--rootdir", str(ROOT), "-p", "no:cacheprovider", "-q", "-rfE"),
    *("-o", "markers=gpu: needs a CUDA GPU\nslow: takes minutes or many gigabytes"),
    "--continue-on-collection-errors",
)
GPU_TESTS = "tests/test_gpu.py"
# Backends that a machine with a GPU has to have after the build; a missing one would be a test that is never run.
READY = """
import ltkernels as ltk
from ltkernels import backends
missing = {n: r for n, r in backends.status().items() if n in ("cuda", "triton") and r is not None}
for name, reason in missing.items():
    print(f"FAILED: no {name} backend: {reason}")
raise SystemExit(bool(missing))
"""


@dataclass(frozen=True)
class Settings:
    """What the command line says to all stages."""

    out: Path
    records: Path
    wheels: Path | None = None
    only: str = ""
    quick: bool = False
    dry: bool = False


@dataclass(frozen=True)
class Stage:
    """One stage: its share of the time that is left, and its commands (arguments of Python) given seconds."""

    name: str
    share: float
    about: str
    commands: Callable[[Settings, float], list[list[str]]]


@dataclass
class Outcome:
    """How a stage ended: empty ``reason`` if well."""

    stage: str
    seconds: float
    reason: str = ""
    lines: list[str] = field(default_factory=list)

    @property
    def failed(self) -> bool:
        return bool(self.reason)


# --- What is run ---


def gpu_test_files() -> list[str]:
    """Files whose tests run on a GPU backend: the others need not even be imported, with what they import."""
    marks = re.compile(r"each_(gpu_)?form|mark\.gpu|pytest\.mark\.gpu")
    files = sorted((ROOT / "tests").glob("test_*.py"))
    return [str(f.relative_to(ROOT)) for f in files if marks.search(f.read_text(encoding="utf-8"))]


def _build(settings: Settings, seconds: float) -> list[list[str]]:
    if settings.dry:
        return [["-m", "ltkernels", "info"]]
    return [["setup.py", "build_ext", "--inplace"], ["-m", "ltkernels", "info"], ["-c", READY]]


def _test(settings: Settings, seconds: float) -> list[list[str]]:
    if settings.dry:
        return [[*PYTEST, "-m", "gpu", GPU_TESTS]]
    rest = ["--deselect", f"{GPU_TESTS}::test_sync", "--deselect", f"{GPU_TESTS}::test_graph"]  # stages of their own
    # Triton compiles for each shape, on one core: several processes share that.
    parallel = ["-n", str(min(8, os.cpu_count() or 1)), "--dist", "worksteal"] if find_spec("xdist") else []
    files = [GPU_TESTS, "tests/test_gpu_kernels.py"] if settings.quick else gpu_test_files()
    return [
        [*PYTEST, "-m", "gpu and not slow", "--maxfail", "60", *rest, *parallel, *files],
        *([] if settings.quick else [[*PYTEST, "-m", "gpu and slow", GPU_TESTS]]),
    ]


def _selected(prefix: str) -> Callable[[Settings, float], list[list[str]]]:
    return lambda settings, seconds: [[*PYTEST, "-m", "gpu", GPU_TESTS, "-k", prefix]]


def _sanitize(settings: Settings, seconds: float) -> list[list[str]]:
    more = ["--dry-run"] if settings.dry else ["--tools", "memcheck"] if settings.quick else []
    return [["-m", "benchmarks.gpu.sanitize", "--seconds", f"{seconds:.0f}", *more]]


def _bench(settings: Settings, seconds: float) -> list[list[str]]:
    more = [*(["--quick"] if settings.quick else []), *(["--dry-run"] if settings.dry else []), "--only", settings.only]
    ends_by_itself = f"{max(5.0, 0.95 * seconds - 10):.0f}"
    return [["-m", "benchmarks.gpu.bench", "--records", str(settings.records), "--seconds", ends_by_itself, *more]]


def _plot(settings: Settings, seconds: float) -> list[list[str]]:
    image = settings.records.with_suffix(".svg")
    return [["-m", "benchmarks.gpu", "--load", str(settings.records), "--plot", str(image), "--no-tables"]]


STAGES = (
    Stage("build", 3, "compiles the libraries for this GPU", _build),
    Stage("test", 5, "every test on every GPU backend", _test),
    Stage("sync", 1, "no call waits for the device", _selected("test_sync")),
    Stage("graph", 1, "calls in CUDA graphs", _selected("test_graph")),
    Stage("sanitize", 3, "memory errors and races, by compute-sanitizer", _sanitize),
    Stage("bench", 8, "times against peers and the copy bandwidth", _bench),
    Stage("plot", 0.3, "draws the records", _plot),
)


# --- Running it ---


def environment(settings: Settings) -> dict[str, str]:
    """With the source tree and the unpacked wheels in front, and Python's output not held back."""
    paths = [str(ROOT), *unpacked(settings), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}


def unpacked(settings: Settings) -> list[str]:
    """A folder with the wheels' contents: Triton reads the source of kernels from files."""
    if settings.wheels is None:
        return []
    import zipfile

    folder = ROOT / "build" / "gpu-wheels"
    for wheel in sorted(settings.wheels.glob("*-none-any.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
    return [str(folder)]


def _passed_on(process: subprocess.Popen[bytes], deadline: float) -> tuple[str, bool]:
    """Copies the process's output to ours until it ends or time is up; its end, and whether it was in time."""
    assert process.stdout is not None
    output, decoder = "", selectors.DefaultSelector()
    decoder.register(process.stdout, selectors.EVENT_READ)
    while time.monotonic() < deadline:
        if not decoder.select(timeout=min(1.0, max(0.0, deadline - time.monotonic()))):
            if process.poll() is not None:  # a compiler's worker may hold the pipe open for longer
                return output, True
            continue
        chunk = os.read(process.stdout.fileno(), 65536)
        if not chunk:
            return output, True
        text = chunk.decode("utf-8", "replace")
        sys.stdout.write(text)
        sys.stdout.flush()
        output = (output + text)[-KEPT:]
    return output, False


def _signal_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        pass


def run_command(command: Sequence[str], seconds: float, env: Mapping[str, str]) -> tuple[str, str]:
    """Runs Python with arguments; its output and, if it did not end well, the reason.

    When time is up the program is interrupted, as by a user, which lets pytest say what it found; then its whole
    process group is killed.
    """
    process = subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    output, in_time = _passed_on(process, time.monotonic() + seconds)
    if not in_time:
        process.send_signal(signal.SIGINT)
        rest, _ = _passed_on(process, time.monotonic() + GRACE)
        output += rest
    _signal_group(process, signal.SIGKILL)  # whatever it left running
    status = process.wait()
    if not in_time:
        return output, f"not done in {seconds:.0f} s"
    if status < 0:
        return output, f"killed by {signal.Signals(-status).name}"
    return output, f"exit status {status}" if status else ""


def run_stage(stage: Stage, settings: Settings, seconds: float) -> Outcome:
    """Runs a stage's commands one after the other; all of them, even if one fails."""
    begun, reasons, lines = time.monotonic(), [], []
    print(f"\n=== {stage.name}: {stage.about} (at most {seconds:.0f} s)", flush=True)
    try:
        for command in stage.commands(settings, seconds):
            left = max(1.0, seconds - (time.monotonic() - begun))
            output, reason = run_command(command, left, environment(settings))
            told = [line for line in output.splitlines() if TELLING.match(line)]
            lines += told
            if reason:
                reasons.append(reason)
                if not any(line.startswith(("FAILED", "ERROR")) for line in told):
                    lines += [line for line in output.splitlines() if line.strip()][-3:]
    except OSError as error:
        reasons.append(str(error))
    return Outcome(stage.name, time.monotonic() - begun, ", ".join(reasons), list(dict.fromkeys(lines)))


def run_all(stages: Sequence[Stage], settings: Settings, budget: float) -> list[Outcome]:
    """Every stage, each with its share of the time that is left."""
    deadline, outcomes = time.monotonic() + budget, []
    for place, stage in enumerate(stages):
        share = stage.share / sum(later.share for later in stages[place:])
        outcomes.append(run_stage(stage, settings, max(5.0, (deadline - time.monotonic()) * share)))
        outcome = outcomes[-1]
        print(f"=== {stage.name}: {outcome.reason or 'well'}, {outcome.seconds:.0f} s", flush=True)
    return outcomes
