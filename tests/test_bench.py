"""The benchmark measures the right thing: equal work, ratios within a round, records and figures that agree."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import platform
import resource
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from ltkernels import losses
from ltkernels.bench import figures, main, peers, report, runner, targets
from ltkernels.bench.device import Cpu, Sample
from ltkernels.bench.peers_binary import BINARY_VARIANTS
from ltkernels.bench.peers_distillation import DISTILLATION_VARIANTS
from ltkernels.bench.peers_experts import EXPERT_VARIANTS
from ltkernels.bench.peers_lade import LADE_VARIANTS
from ltkernels.bench.peers_rows import ROW_VARIANTS, SEESAW_FIXED
from ltkernels.bench.scenarios import SCENARIOS, Scenario, make_problem, scenario

ROOT = Path(__file__).resolve().parents[1]
VARIANTS = {
    v.name: v
    for variants in (
        peers.VARIANTS, ROW_VARIANTS, LADE_VARIANTS, DISTILLATION_VARIANTS, EXPERT_VARIANTS, BINARY_VARIANTS,
        (SEESAW_FIXED,),
    )
    for v in variants
}  # fmt: skip
QUICK = runner.Plan(seconds=0, compile=False, min_rounds=3, max_rounds=3)
TINY = Scenario(6, 5, "custom")  # few rows, more than one class per row, odd sizes


class ScriptedClock:
    """A device on which call ``k`` of a name takes the time the script says."""

    name = "cpu"

    def __init__(self, script: dict[str, list[float]]) -> None:
        self.script = {name: iter(times) for name, times in script.items()}
        self.order: list[str] = []

    def time(self, call) -> Sample:
        name = call()
        self.order.append(name)
        return Sample(next(self.script[name]), 0)


def scripted_times(script: dict[str, list[float]], **plan) -> tuple[dict[str, list[float]], ScriptedClock]:
    clock = ScriptedClock(script)
    rounds = len(next(iter(script.values())))
    calls = {name: (lambda name=name: name) for name in script}
    limits = {"seconds": 0, "min_rounds": rounds, "max_rounds": rounds} | plan
    samples = runner.interleave(calls, clock, runner.Plan(**limits))
    return {name: [sample.seconds for sample in taken] for name, taken in samples.items()}, clock


@pytest.fixture(scope="module")
def ldam_records() -> list[dict]:
    return [
        record | runner.environment(Cpu())
        for shape in (TINY, SCENARIOS[0])
        for record in runner.measure(VARIANTS["ldam"], shape, Cpu(), QUICK).records
    ]


def test_ratio_is_the_median_of_the_rounds_not_a_ratio_of_medians():
    # The machine is 10 times slower in the last two rounds. Within each round ours takes half (or, once, a third).
    script = {"ours": [1.0, 1.0, 20.0, 10.0, 1.0], "peer": [2.0, 3.0, 40.0, 20.0, 2.0]}
    times, _ = scripted_times(script)
    assert times == script
    assert runner.round_ratio(times["ours"], times["peer"]) == 0.5
    assert sorted(times["ours"])[2] / sorted(times["peer"])[2] != 0.5


def test_every_round_times_every_form_once_in_changing_order():
    names, rounds = ["a", "b", "c"], 40
    _, clock = scripted_times({name: [1.0] * rounds for name in names})
    per_round = [tuple(clock.order[i : i + 3]) for i in range(0, 3 * rounds, 3)]
    assert all(sorted(order) == names for order in per_round)
    assert len(set(per_round)) == 6, "all orders of three forms should come up in 40 rounds"


def test_rounds_stop_at_the_deadline_but_not_before_the_minimum():
    times, _ = scripted_times({"a": [1.0] * 50}, seconds=0, min_rounds=7, max_rounds=50)
    assert len(times["a"]) == 7
    times, _ = scripted_times({"a": [1.0] * 50}, seconds=60, min_rounds=7, max_rounds=50)
    assert len(times["a"]) == 50


def test_quartiles_of_known_values():
    assert runner.quartiles([5.0, 1.0, 3.0, 2.0, 4.0]) == (2.0, 3.0, 4.0)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("name", VARIANTS)
def test_all_forms_of_a_loss_agree(name: str, dtype: str):
    """On the two smallest kinds of batch, in the types whose tolerances differ."""
    variant, kind = VARIANTS[name], runner.DTYPES[dtype]
    problem = make_problem(Scenario(9, 37, "custom"), kind, cosine=variant.cosine, experts=variant.experts)
    exact = problem.logits.detach().double().requires_grad_()
    truth = runner.loss_and_grad(variant.eager(problem, torch.float64), exact, problem.target)
    forms = peers.loss_forms(variant, problem, torch.float64 if dtype == "float64" else torch.float32)
    answers = runner.check_forms(forms, problem, truth)
    assert {form: answer for form, answer in answers.items() if isinstance(answer, str)} == {}
    assert answers[peers.OURS].within(runner.TOLERANCE[kind])


def test_a_form_that_computes_another_loss_is_refused_and_not_timed():
    wrong = dataclasses.replace(VARIANTS["ce"], published=lambda p, dtype: lambda x, y: F.cross_entropy(1.01 * x, y))
    result = runner.measure(wrong, TINY, Cpu(), QUICK)
    assert result.refused[peers.PUBLISHED].startswith("computes another loss: differs from ltkernels by loss ")
    assert peers.PUBLISHED not in {record["peer"] for record in result.records}


def test_a_form_with_the_right_loss_and_another_gradient_is_refused():
    def detached(problem, dtype):
        def loss(x, y):
            value = F.cross_entropy(x, y)
            return value.detach() + 0.5 * (value - value.detach())

        return loss

    wrong = dataclasses.replace(VARIANTS["ce"], published=detached)
    refused = runner.measure(wrong, TINY, Cpu(), QUICK).refused[peers.PUBLISHED]
    assert "gradient 5.0e-01" in refused


def test_a_form_that_raises_is_refused_with_its_reason():
    def broken(problem, dtype):
        def loss(x, y):
            raise OSError("no compiler")

        return loss

    result = runner.measure(dataclasses.replace(VARIANTS["ce"], published=broken), TINY, Cpu(), QUICK)
    assert result.refused == {peers.PUBLISHED: "does not run: OSError: no compiler"}


def test_our_own_wrong_result_stops_the_run():
    wrong = dataclasses.replace(VARIANTS["ce"], ours=lambda p: losses.CrossEntropyLoss(scale=1.001))
    with pytest.raises(runner.WrongResultError, match="ltkernels differs from float64 by loss"):
        runner.measure(wrong, TINY, Cpu(), QUICK)


def test_a_call_leaves_no_gradient_behind_and_uses_the_mode():
    problem = make_problem(TINY, torch.float32, cosine=False)
    assert not problem.logits.is_leaf
    seen = []

    def form(x, y):
        seen.append(torch.is_grad_enabled())
        return F.cross_entropy(x, y)

    for mode in runner.MODES:
        runner.make_call(form, problem, mode)()
    assert seen == [True, True, False]
    assert problem.logits._base.grad is None


def test_launches_count_forward_and_backward_without_views():
    problem = make_problem(TINY, torch.float32, cosine=False)
    call = runner.make_call(lambda x, y: x.view(-1).sum(), problem, "fwd_bwd")
    # sum and the upstream gradient; expand and view only change strides
    assert runner.count_launches(call) == 2


def test_peak_memory_is_counted_in_ops_and_includes_results():
    x = torch.zeros(1 << 16)  # 256 KiB: large beside anything else in the process
    assert Cpu().peak_bytes(lambda: x.clone()) == x.nbytes
    assert 0 <= Cpu().peak_bytes(lambda: (x + 1) * 2) - 2 * x.nbytes < 64, "both, and the two scalars as tensors"
    assert Cpu().peak_bytes(lambda: [(x + 1).sum() for _ in range(3)]) < 2 * x.nbytes, "freed memory counts once"
    # log_softmax's internal gradient: 3 times the logits at the peak, a known property of F.cross_entropy
    problem = make_problem(Scenario(256, 256, "custom"), torch.float32, cosine=False)
    peak = Cpu().peak_bytes(runner.make_call(lambda a, y: F.cross_entropy(a, y), problem, "fwd_bwd"))
    assert 2.9 < peak / problem.logits.nbytes < 3.1


def test_records_have_the_schema_and_survive_a_file(ldam_records, tmp_path: Path):
    path = tmp_path / "deep" / "run.jsonl"
    report.write_records(ldam_records, path)
    loaded = report.read_records(path)
    assert loaded == ldam_records
    assert all(record.keys() == report.FIELDS for record in loaded)
    forms = [peers.OURS, peers.MODULE, peers.EAGER, peers.PUBLISHED, peers.EMPTY, peers.CLONE]
    assert [record["peer"] for record in loaded] == forms * 2
    for record in loaded:
        assert record["rounds"] == 3
        assert 0 < record["p25_us"] <= record["p50_us"] <= record["p75_us"]
        assert record["ratio"].keys() == set(forms) - {record["peer"]}
        assert record["less_work"] == (record["peer"] in peers.NOT_LOSSES)
        assert (record["rel_err_grad"] is None) == record["less_work"] == (record["model_bytes"] is None)
    ours = loaded[0]
    assert ours["model_bytes"] == 2 * 6 * 5 * 4 + 6 * 8 + 5 * 4
    assert ours["backend"] in ("cpu", "reference")
    assert ours["rel_err_grad"] < 1e-5 and ours["rel_err_loss"] < 1e-5


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json", r"run.jsonl:1: expected a JSON object, found '\{not json'"),
        ('{"op": "cross_entropy"}', "run.jsonl:1: expected the fields of a benchmark record, missing .*'variant'"),
        ("[1]", "run.jsonl:1: expected the fields"),
    ],
)
def test_a_broken_result_file_is_named(line: str, message: str, tmp_path: Path):
    path = tmp_path / "run.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(ValueError, match=message):
        report.read_records(path)


def our_record(variant: str, scenario_name: str, **changes) -> dict:
    shape = scenario(scenario_name)
    record = {
        **{
            "op": "cross_entropy",
            "peer": peers.OURS,
            "mode": "fwd_bwd",
            "memory": "default",
            "dtype": "float32",
            "variant": variant,
            "scenario": scenario_name,
        },
        **{"source": shape.source, "N": shape.n, "C": shape.c, "threads": 1, "peak_bytes": 4 * shape.n * shape.c},
        **{"rel_err_grad": 1e-7, "rounding_grad": 1e-3, "p50_us": 1234.5},
        "ratio": {peers.EAGER: 0.4, peers.COMPILE: 0.5, peers.PUBLISHED: 0.2, peers.CLONE: 1.8, peers.EMPTY: 3.0},
        **{"cpu": "A CPU", "isa": "AVX2", "kernel_isa": "avx2", "torch": "2.13", "ltkernels": "1", "git": "abc"},
        "utc": "2026-01-02T03:04:05Z",
    }
    return record | changes


def verdicts(record: dict) -> dict[str, tuple[float | None, str]]:
    return {line.what: (line.limit, line.verdict) for line in targets.judge([record])}


def test_targets_follow_the_size_of_the_batch():
    eager = "la_weight: time of eager"
    assert verdicts(our_record("la_weight", "256x1000"))[eager] == (0.5, "reached")
    assert verdicts(our_record("la_weight", "64x50257"))[eager] == (0.35, "NOT REACHED")
    assert verdicts(our_record("la_weight", "256x365"))[eager] == (None, "reported")
    assert verdicts(our_record("la_weight", "128x100"))[eager] == (1.2, "reached")
    assert verdicts(our_record("ldam", "128x100"))["ldam: time of eager"] == (None, "reported")
    assert verdicts(our_record("ce", "128x100"))["ce: time of empty Function (floor)"] == (None, "reported")


def test_targets_for_copy_memory_and_error():
    copy = "vs: time of clone, default memory"
    assert verdicts(our_record("vs", "512x8142"))[copy] == (1.6, "NOT REACHED")
    assert verdicts(our_record("vs", "512x8142", threads=2))[copy] == (2.0, "reached")
    memory, error = "ce: peak bytes beyond logits and gradient, float32", "ce: gradient error, float32"
    assert verdicts(our_record("ce", "256x1000"))[memory][1] == "reached"
    assert verdicts(our_record("ce", "256x1000", peak_bytes=2 * 4 * 256_000))[memory][1] == "NOT REACHED"
    assert verdicts(our_record("ce", "256x1000", rel_err_grad=2e-6))[error] == (1e-6, "NOT REACHED")
    half = verdicts(our_record("ce", "256x1000", dtype="bfloat16", rel_err_grad=1.05e-3))
    assert half["ce: gradient error over rounding, bfloat16"] == (1.1, "reached")
    assert "ce: time of eager" not in half, "speed targets are for float32"


def test_command_line_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out, image = tmp_path / "run.jsonl", tmp_path / "run.svg"
    shared = ["--variant", "la_weight", "--scenario", "6x5,128x100", "--no-compile", "--seconds", "0"]
    before = torch.get_num_threads()
    assert main([*shared, "--out", str(out), "--plot", str(image), "--targets"]) == 0
    assert torch.get_num_threads() == before
    shown = capsys.readouterr()
    assert "LA + weight" in shown.out and "published" in shown.out and "la_weight: time of eager" in shown.out
    assert "[1t] 6x5 la_weight:" in shown.err
    assert "<svg" in image.read_text()
    assert {record["threads"] for record in report.read_records(out)} == {1}
    assert main(["--load", str(out)]) == 0
    assert "128x100" in capsys.readouterr().out


def test_each_thread_count_runs_in_a_process_of_its_own(tmp_path: Path):
    out = tmp_path / "run.jsonl"
    assert main(f"--variant ce --scenario 6x5 --no-compile --seconds 0 --threads 1,2 --out {out}".split()) == 0
    assert [record["threads"] for record in report.read_records(out) if record["peer"] == peers.OURS] == [1, 2]


def test_memory_setting_reaches_the_allocator(tmp_path: Path):
    """Copies of 1 MB: 256 pages each time with fresh memory, none with recycled memory."""
    faults = {}
    for memory in ("fresh", "recycled"):
        out = tmp_path / f"{memory}.jsonl"
        options = f"--variant ce --scenario 256x1024 --no-compile --seconds 0 --memory {memory} --out {out}"
        assert main(options.split()) == 0
        faults[memory] = {record["page_faults"] for record in report.read_records(out) if record["peer"] == peers.CLONE}
    assert faults["recycled"] == {0}
    if platform.libc_ver()[0] == "glibc":
        assert min(faults["fresh"]) >= 256 * 4096 // resource.getpagesize()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--scenario 12", "scenario: expected <rows>x<classes>, for example 128x100"),
        ("--scenario 0x10", "found '0x10'"),
        ("--variant cee", "expected one of ce, ce_weight_smoothing, la_weight, ldam, vs, focal, found 'cee'"),
        ("--threads 0", "expected a positive integer, found '0'"),
        ("--threads two", "expected a positive integer, found 'two'"),
        ("--seconds -1", "expected seconds >= 0, found '-1'"),
        ("--seconds nan", "expected seconds >= 0, found 'nan'"),
        ("--dtype int8", "invalid choice: 'int8'"),
        ("--mode train", "invalid choice: 'train'"),
        ("--memory full", "invalid choice: 'full'"),
    ],
)
def test_wrong_arguments_are_named(arguments: str, message: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        main(arguments.split())
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_a_missing_or_empty_file_is_an_error_not_a_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["--load", str(tmp_path / "none.jsonl")]) == 1
    assert "none.jsonl" in capsys.readouterr().err
    (tmp_path / "empty.jsonl").touch()
    assert main(["--load", str(tmp_path / "empty.jsonl")]) == 1
    assert "found an empty file" in capsys.readouterr().err


@pytest.fixture(scope="module")
def readme_table() -> ModuleType:
    spec = importlib.util.spec_from_file_location("readme_table", ROOT / "benchmarks" / "readme_table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_documents_show_the_result_files(readme_table: ModuleType, ldam_records, tmp_path: Path):
    readme, results = tmp_path / "README.md", tmp_path / "RESULTS.md"
    ours = next(record for record in ldam_records if record["peer"] == peers.OURS)
    for op, part in readme_table.PARTS.items():
        scenarios = figures.SUMMARY_SCENARIOS.get(op, ("1000x10",))
        records = [ours | {"op": op, "variant": op, "scenario": scenario} for scenario in scenarios]
        report.write_records(records, tmp_path / part.file)
    for_summary = [r | {"scenario": "512x8142"} for r in ldam_records if r["scenario"] == ours["scenario"]]
    report.write_records([*ldam_records, *for_summary], tmp_path / "cpu.jsonl")
    draws = {"op": "sampling", "variant": "balanced", "scenario": "1000x10", "ratio": {"torch.multinomial": 0.0213}}
    report.write_records([ours | draws], tmp_path / "cpu-sampling.jsonl")
    readme.write_text("# title\n<!-- figures:begin -->\nold\n<!-- figures:end -->\ntail\n")
    paths = ["--results", str(tmp_path), "--readme", str(readme), "--all", str(results)]
    assert readme_table.main([*paths, "--check"]) == 1
    assert "old" in readme.read_text() and not results.exists(), "--check changes nothing"
    assert readme_table.main(paths) == 0
    assert readme_table.main([*paths, "--check"]) == 0
    text = readme.read_text()
    assert text.startswith("# title\n") and text.endswith("\ntail\n") and "old" not in text
    eager = next(record for record in for_summary if record["peer"] == peers.EAGER)
    assert f"| LDAM | {report.duration(ours['p50_us'])} | {ours['ratio'][peers.EAGER]:#.2g} |" in text
    assert eager["scenario"] in text and "128x100" not in text
    text = results.read_text()
    assert "| class-balanced / torch.multinomial | 0.021 |" in text
    assert ldam_records[0]["cpu"] in text and ldam_records[0]["utc"][:10] in text and "CIFAR-100-LT" in text
    assert "imbalanced-losses" not in text, "a form that was not measured has no row"
    results.write_text(text.replace("LDAM", "LDAN"))
    assert readme_table.main([*paths, "--check"]) == 1


def test_readme_cells_hold_the_values_of_the_records():
    records = [our_record("la_weight", "256x1000"), our_record("la_weight", "256x1000", threads=2, p50_us=600.0)]
    text = figures.table(records, "the command")
    assert "| **LA + weight**, time | 1.23 ms / 600 µs |" in text
    assert "| LA + weight / plain PyTorch | 0.40 / 0.40 |" in text
    assert "`the command`" in text


def test_readme_without_markers_or_records_is_refused(readme_table: ModuleType, tmp_path: Path):
    with pytest.raises(ValueError, match="each once"):
        readme_table.with_figures("no markers", "figures")
    with pytest.raises(ValueError, match="found none"):
        figures.table([our_record("ce", "256x1000", dtype="bfloat16")], "x")


def test_shipped_results_can_be_read():
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.jsonl")):
        records = report.read_records(path)
        assert {json.dumps(record["ratio"]) for record in records}
