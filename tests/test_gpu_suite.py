"""`python -m benchmarks.gpu` without a GPU: its stages, its benchmark as a dry run, and what it makes of records.

The dry run goes through all the Python that a GPU run goes through, but for graphs and events, on tiny batches.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import __main__ as suite
from benchmarks.gpu import bench, figures, measure, sampling, sanitize, stages, summary
from benchmarks.gpu.ops import OPS
from benchmarks.gpu.table import CALL, COPY, FORWARD, OURS, STEP, Form, Work
from benchmarks.gpu.timing import DryTimer, GpuTimer, Rotation
from ltkernels.bench import main as cpu_bench
from ltkernels.bench import peers, report, runner
from ltkernels.bench.scenarios import Scenario

ROOT = Path(__file__).resolve().parents[1]
CROSS_ENTROPY, SAMPLING = OPS["cross_entropy"], OPS["sample_indices"]
SETTINGS = stages.Settings(ROOT / "build", ROOT / "build/x.jsonl", dry=True)


@pytest.fixture
def work() -> Work:
    return CROSS_ENTROPY.prepare(CROSS_ENTROPY.cases(quick=False, dry=True)[3], "cpu")


def measured(work: Work) -> tuple[measure.Measurement, list[dict[str, Any]]]:
    where = runner.environment(DryTimer().device) | {"dry_run": True, "copy_gbs": 100.0}
    measurement = measure.Measurement(work, DryTimer(), where)
    return measurement, list(measurement.run())


# --- Stages ---


def stage(*commands: list[str], name: str = "probe", share: float = 1.0) -> stages.Stage:
    return stages.Stage(name, share, "a test's", lambda settings, seconds: list(commands))


def python(code: str) -> list[str]:
    return ["-c", code]


def test_a_stage_tells_why_it_failed_and_runs_its_other_commands(capfd: pytest.CaptureFixture[str]):
    failing = python("print('FAILED a test'); print('NOTE: no tool'); print('all else'); raise SystemExit(3)")
    outcome = stages.run_stage(stage(failing, python("print('second ran')")), SETTINGS, 60)
    assert outcome.failed and outcome.reason == "exit status 3"
    assert outcome.lines == ["FAILED a test", "NOTE: no tool"]
    assert "second ran" in capfd.readouterr().out, "output is passed on"


def test_a_crash_shows_the_last_lines():
    code = "import os, signal; print('about to', flush=True); os.kill(os.getpid(), signal.SIGSEGV)"
    outcome = stages.run_stage(stage(python(code)), SETTINGS, 60)
    assert outcome.reason == "killed by SIGSEGV" and outcome.lines == ["about to"]


def test_time_runs_out_with_a_chance_to_say_what_was_found():
    code = (
        "import time\ntry:\n    print('begun', flush=True); time.sleep(60)\n"
        "except KeyboardInterrupt:\n    print('FAILED so far: one')"
    )
    begun = time.monotonic()
    outcome = stages.run_stage(stage(python(code)), SETTINGS, 6)
    assert outcome.reason == "not done in 6 s" and outcome.lines == ["FAILED so far: one"]
    assert time.monotonic() - begun < 30


def test_a_stage_does_not_wait_for_what_it_left_running():
    code = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])"
    begun = time.monotonic()
    assert not stages.run_stage(stage(python(code)), SETTINGS, 50).failed
    assert time.monotonic() - begun < 30


def test_unused_time_goes_to_later_stages(monkeypatch: pytest.MonkeyPatch):
    given: list[tuple[str, float]] = []

    def run_stage(stage: stages.Stage, settings: stages.Settings, seconds: float) -> stages.Outcome:
        given.append((stage.name, round(seconds)))
        return stages.Outcome(stage.name, 0.0)

    monkeypatch.setattr(stages, "run_stage", run_stage)
    stages.run_all([stage(name="a", share=1), stage(name="b", share=3)], SETTINGS, 400)
    assert given == [("a", 100), ("b", 400)]


def test_every_stage_has_commands_within_its_budget():
    real = dataclasses.replace(SETTINGS, dry=False)
    for each in stages.STAGES:
        assert each.commands(real, 100.0) and each.commands(SETTINGS, 100.0)
    assert sum(each.share for each in stages.STAGES if each.name == "bench") > 1
    (command,) = stages.STAGES[5].commands(real, 100.0)
    assert float(command[command.index("--seconds") + 1]) < 100, "it ends by itself before it is ended"


def test_the_gpu_tests_are_found_and_all_carry_the_mark():
    files = stages.gpu_test_files()
    assert {"tests/test_gpu.py", "tests/test_gpu_kernels.py", "tests/test_cross_entropy_values.py"} <= set(files)
    assert "tests/test_train.py" not in files
    command = [sys.executable, *stages.PYTEST, "--collect-only", "-m", "not gpu", stages.GPU_TESTS]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert "no tests collected" in run.stdout, run.stdout[-500:]


def test_wheels_are_unpacked_in_front(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import zipfile

    monkeypatch.setattr(stages, "ROOT", tmp_path)
    with zipfile.ZipFile(tmp_path / "some_peer-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("some_peer/__init__.py", "x = 1")
    paths = stages.environment(dataclasses.replace(SETTINGS, wheels=tmp_path))["PYTHONPATH"].split(":")
    assert (Path(paths[1]) / "some_peer" / "__init__.py").read_text() == "x = 1"


# --- Command line ---


def test_dry_run_end_to_end(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    """The stages that are programs of this package; the pytest ones are looked at above."""
    before = sorted((ROOT / "benchmarks/results").iterdir())
    arguments = [
        "--dry-run",
        "--stages",
        "build,sanitize,bench,plot",
        "--only",
        "37 (ce|ldam)$",
        "--out",
        str(tmp_path),
    ]
    assert suite.main(arguments) == 0
    shown = capfd.readouterr().out
    assert "DRY RUN ON THE CPU, TIMES MEAN NOTHING" in shown
    assert "all calls right" in shown and "=== summary" in shown and "FAILED" not in shown
    records = report.read_records(tmp_path / "dry-run.jsonl")
    assert records and all(record["dry_run"] for record in records)
    assert {record["scenario"] for record in records} == {"9x37"}
    assert "<svg" in (tmp_path / "dry-run.svg").read_text()
    assert sorted((ROOT / "benchmarks/results").iterdir()) == before
    assert suite.main(["--load", str(tmp_path / "dry-run.jsonl")]) == 0
    assert "figures of the issue" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--stages build,fly", "--stages: expected some of build,test,sync,graph,sanitize,bench,plot, found fly"),
        ("--wheels /no/such/folder", "--wheels: expected a folder"),
        ("--dry-run --out benchmarks/results", "--dry-run: its records are no results"),
    ],
)
def test_wrong_arguments_are_named(arguments: str, message: str, monkeypatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as stop:
        suite.main(arguments.split())
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_only_a_whole_run_writes_results():
    assert suite.parse([]).out == suite.RESULTS
    for part in ("--quick", "--dry-run", "--only=ce"):
        assert suite.RESULTS not in (suite.parse([part]).out, *suite.parse([part]).out.parents)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]):
    assert suite.main([]) == 1
    assert "no GPU here" in capsys.readouterr().err
    assert cpu_bench(["--device", "cuda", "--variant", "ce", "--scenario", "6x5"]) == 1
    assert "--device: expected a GPU" in capsys.readouterr().err


def test_results_are_named_after_the_gpu():
    assert suite.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


# --- Measuring ---


def test_records_have_the_fields_of_all_benchmarks(work: Work):
    measurement, records = measured(work)
    assert not measurement.failed and set(measurement.refused) == {"liger", "cut-cross-entropy"}
    assert report.FIELDS <= records[0].keys()
    names = {form.name for form in work.forms}
    assert {peers.EAGER, COPY, f"{OURS}reference"} <= names
    for mode in ("kernel", "host"):
        assert {record["peer"] for record in records if record["mode"] == mode} == names
    assert json.loads(json.dumps(records)) == records
    for record in records:
        assert 0 < record["p25_us"] <= record["p50_us"] <= record["p75_us"]
        assert record["peer"] not in record["ratio"]
        assert (record["frac_copy"] is None) == (record["peer"] == COPY or record["mode"] == "host")
        assert record["launches"] >= 1 and record["peak_bytes"] > 0


def test_a_fraction_is_of_the_bytes_that_cannot_be_avoided(work: Work):
    assert work.model_bytes == {STEP: 3 * 9 * 37 * 4 + 2 * (8 * 9 + 4 * 37), FORWARD: 9 * 37 * 4 + 8 * 9 + 4 * 37}
    assert work.copied_bytes == work.footprint == 2 * 9 * 37 * 4
    measurement, _ = measured(work)
    times = {COPY: [2.0, 2.0], peers.EAGER: [4.0, 4.0]}
    (record, _) = measurement._records("kernel", STEP, times, {})
    assert record["frac_copy"] == pytest.approx(0.5 * work.model_bytes[STEP] / work.copied_bytes, abs=1e-4)
    assert record["ratio"][COPY] == 2.0


def broken(form: Form, step: Any) -> Form:
    return dataclasses.replace(form, steps=dict.fromkeys(form.steps, step(form.steps[STEP])))


def test_wrong_results_are_not_timed(work: Work):
    """A peer is left out, one of ours is a failure; so is memory that was never written."""
    wrong = {
        peers.EAGER: lambda right: lambda inputs: (right(inputs)[0], right(inputs)[1] * 1.01),
        f"{OURS}reference": lambda right: (
            lambda inputs: (right(inputs)[0], torch.full_like(right(inputs)[1], torch.nan))
        ),
    }
    work.forms = [broken(f, wrong[f.name]) if f.name in wrong else f for f in work.forms]
    measurement, records = measured(work)
    assert measurement.refused[peers.EAGER].startswith("differs from float64 by")
    assert list(measurement.failed) == [f"{OURS}reference"]
    assert not {record["peer"] for record in records} & wrong.keys()


def test_a_form_that_raises_is_out_with_its_reason(work: Work):
    def raising(right: Any) -> Any:
        def step(inputs: Any) -> Any:
            raise RuntimeError("no kernel\nfor this")

        return step

    work.forms = [broken(f, raising) if f.name == peers.EAGER else f for f in work.forms]
    measurement, _ = measured(work)
    assert measurement.refused[peers.EAGER] == "does not run: RuntimeError: no kernel"


def test_what_is_right_once_and_wrong_in_a_graph_is_found(work: Work):
    """As a kernel that leaves its counters dirty would be."""
    calls = []

    def third_time_wrong(right: Any) -> Any:
        def step(inputs: Any) -> Any:
            calls.append(inputs)
            loss, gradient = right(inputs)
            return loss, gradient * (1.0 if len(calls) <= 4 else 2.0)

        return step

    ours = f"{OURS}reference"
    work.forms = [broken(f, third_time_wrong) if f.name == ours else f for f in work.forms]
    measurement, _ = measured(work)
    assert measurement.failed[ours].startswith("in a graph: differs from float64")


def test_a_form_that_overwrites_its_inputs_has_its_own(work: Work):
    """As Liger, which leaves the gradient where the logits were."""
    kept = work.inputs.logits.detach().clone()

    def overwriting(right: Any) -> Any:
        def step(inputs: Any) -> Any:
            loss, gradient = right(inputs)
            inputs.logits.detach().copy_(gradient)
            return loss, inputs.logits.detach()

        return step

    over = {"overwrites": True, "captured": False}
    work.forms = [
        dataclasses.replace(broken(f, overwriting), **over) if f.name == peers.EAGER else f for f in work.forms
    ]
    measurement, records = measured(work)
    assert not measurement.failed and peers.EAGER not in measurement.refused
    assert torch.equal(work.inputs.logits.detach(), kept)
    assert {r["timed_by"] for r in records if r["peer"] == peers.EAGER} == {"profiler", "clock"}


def test_samples_are_held_against_the_reference_bit_by_bit():
    """One wrong index of 301 is a failure of ours; what is random is nobody's."""
    work = SAMPLING.prepare(SAMPLING.cases(quick=False, dry=True)[1], "cpu")
    assert work.case.variant == "weighted" and work.model_bytes == {STEP: 40 * 301}
    last = torch.arange(301) == 300
    ours = f"{OURS}reference"
    work.forms = [
        broken(f, lambda right: lambda inputs: (right(inputs)[0] + last,)) if f.name == ours else f for f in work.forms
    ]
    measurement, records = measured(work)
    assert list(measurement.failed) == [ours]
    assert {r["peer"] for r in records} >= {sampling.MULTINOMIAL, sampling.VECTORISED, COPY}
    assert {r["mode"] for r in records} == {"kernel", "host"}


@pytest.mark.parametrize("variant", ["uniform", "weighted"])
def test_peers_of_sampling_draw_the_same_classes_as_often(variant: str):
    """Chi-square of 36 degrees of freedom: 86 is beyond five standard deviations."""
    count = 20_000
    case = dataclasses.replace(SAMPLING.cases(False, True)[0], variant=variant, shape=Scenario(count, 37, "tiny"))
    work = SAMPLING.prepare(case, "cpu")
    index = work.inputs.index
    labels = torch.empty(index.num_samples, dtype=torch.int64)
    labels[index.members.long()] = torch.repeat_interleave(torch.arange(37), index.class_counts)
    expected = work.inputs.probs / work.inputs.probs.sum() * count
    for form in work.forms:
        if form.name != COPY:
            (samples,) = form.steps[STEP](work.inputs)
            found = torch.bincount(labels[samples], minlength=37)
            assert float(((found - expected) ** 2 / expected).sum()) < 86, form.name


def test_no_op_waits_for_the_last_cases_of_another():
    first = [case.op for case in measure.selected(False, False, "")[: 2 * len(OPS)]]
    assert first == list(OPS) * 2


def test_cases_come_in_the_order_of_their_weight():
    cases = CROSS_ENTROPY.cases(quick=False, dry=False)
    assert len(cases) == len({case.name for case in cases})
    large = [c for c in cases if c.shape.n * c.shape.c >= figures.LARGE]
    assert {c.shape.c for c in large} >= {100, 365, 1000, 1203, 1204, 4096, 8142, 16384, 50257, 128256}
    assert {c.variant for c in large} == {"ce", "la_weight", "ldam", "ce_weight_smoothing", "focal"}
    assert [c.variant for c in cases[:10]] == ["ce"] * 10 and cases[0].dtype == "bfloat16"
    assert cases[-1].dtype == "float32"


def test_copies_reach_beyond_the_cache():
    timer = GpuTimer.__new__(GpuTimer)
    timer.__dict__["_l2"] = 50 << 20
    assert timer.rotation(256 << 20) == Rotation(2, 2, True)
    medium = timer.rotation(2 * 256 * 1000 * 2)  # 256x1000 bfloat16
    assert medium.cold and medium.copies * 2 * 256 * 1000 * 2 >= 100 << 20 and medium.calls >= medium.copies
    small = timer.rotation(2 * 128 * 100 * 2)
    assert not small.cold and small.copies < 128


def test_a_crashed_measurement_goes_on_after_the_case(tmp_path: Path, monkeypatch, capfd):
    records, asked = tmp_path / "r.jsonl", []

    def command(args: Any, seconds: float, *more: str) -> list[str]:
        asked.append(more)
        crash = f"open({str(records.with_suffix('.progress'))!r}, 'w').write('4'); raise SystemExit(3)"
        return [sys.executable, "-c", crash if len(asked) == 1 else ""]

    monkeypatch.setattr(bench, "command", command)
    assert bench.main(["--records", str(records), "--dry-run"]) == 1
    assert asked == [("--skip", "0"), ("--skip", "5")]
    assert "FAILED: the process ended with status 3 in case 5" in capfd.readouterr().out


# --- Figures, winners, sanitizer ---


def record(peer: str = f"{OURS}cuda", variant: str = "ce", c: int = 1000, **changes: Any) -> dict[str, Any]:
    n = changes.pop("n", -(-(2**26) // c))
    return {
        **{"op": "cross_entropy", "peer": peer, "variant": variant, "dtype": "bfloat16", "mode": "kernel"},
        **{"scenario": f"{n}x{c}", "N": n, "C": c, "frac_copy": 0.9, "launches": 2, "less_work": False},
        **{"ratio": {"copy": 1.6, "eager": 0.4, "liger": 0.7}, "p50_us": 100.0, "gpu": "A GPU", "copy_gbs": 3000.0},
        **{"torch": "2.13", "git": "abc", "utc": "2026-01-02T03:04:05Z", "cpu": "a CPU"},
    } | changes


def verdicts(*records: dict[str, Any]) -> dict[str, str]:
    return {line.what: line.verdict for line in figures.judge(records)}


def test_figures_follow_the_issue():
    assert verdicts(record(frac_copy=0.71))["fraction of copy"] == "reached"
    assert verdicts(record(frac_copy=0.69))["fraction of copy"] == "NOT REACHED"
    assert verdicts(record(c=16384, frac_copy=0.94))["fraction of copy"] == "NOT REACHED"
    assert "fraction of copy" not in verdicts(record(n=8)), "a small batch has no such figure"
    neighbour = "fraction of copy below that of C=1204"
    assert verdicts(record(c=1203, frac_copy=0.81), record(c=1204, frac_copy=0.85))[neighbour] == "reached"
    assert verdicts(record(c=1203, frac_copy=0.79), record(c=1204, frac_copy=0.85))[neighbour] == "NOT REACHED"
    ldam = record(variant="ldam", ratio={"copy": 1.7})
    assert verdicts(record(), ldam)["ldam: worst time of ce"] == "NOT REACHED"
    assert verdicts(record(), record(variant="ldam", ratio={"copy": 1.67}))["ldam: worst time of ce"] == "reached"
    small = record(n=256, mode="host", ratio={"eager": 0.51})
    assert verdicts(small)["bfloat16: worst host time of eager"] == "NOT REACHED"
    assert (
        verdicts(record(), record(c=100, ratio={"copy": 2, "liger": 1.1}))["kernel: worst time of liger"]
        == "NOT REACHED"
    )
    assert verdicts(record(launches=3))["most launches, forward and backward"] == "NOT REACHED"


def test_winners_become_ranges_of_python():
    def pair(c: int, ratio: float, **more: Any) -> dict[str, Any]:
        return record(c=c, ratio={f"{OURS}triton": ratio}, **more)

    records = [pair(100, 0.8), pair(1000, 1.2), pair(1000, 1.1), pair(4096, 1.3), pair(8142, 0.9)]
    records += [pair(1000, 0.7, n=256, mode="host")]
    text = summary.winners(records)
    found = eval("{" + "".join(line + "\n" for line in text.splitlines()) + "}")
    assert found == {
        ("cross_entropy", "bfloat16", "small"): ((None, "cuda"),),
        ("cross_entropy", "bfloat16", "large"): ((316, "cuda"), (5774, "triton"), (None, "cuda")),
    }
    assert "C=1000: cuda takes 1.150 of triton's time" in text


@pytest.mark.parametrize(
    ("output", "errors"),
    [
        ("========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n", 0),
        ("========= Invalid __global__ read\n========= ERROR SUMMARY: 3 errors\n", 3),
        ("========= RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)\n", 2),
        ("all calls right\n", None),
    ],
)
def test_the_sanitizers_summary_is_read(output: str, errors: int | None):
    assert sanitize.summary(output)[0] == errors


def test_the_sanitized_program_finds_what_is_wrong(monkeypatch, capsys: pytest.CaptureFixture[str]):
    assert CALL not in {call.name for call in sanitize.calls((5,))}
    right = sanitize.results

    def wrong(call: sanitize.Call, device: str) -> list[torch.Tensor]:
        found = right(call, device)
        is_second = torch.tensor(len(seen) % 2, dtype=found[0].dtype)
        seen.append(call.name)
        return [found[0] + is_second, *found[1:]]

    seen: list[str] = []
    monkeypatch.setattr(sanitize, "results", wrong)
    monkeypatch.setattr(sanitize.ltk, "available_backends", lambda device: ("reference",))
    assert sanitize.program(dry=True) == 1
    assert "FAILED reference, bfloat16 5: AssertionError" in capsys.readouterr().out
