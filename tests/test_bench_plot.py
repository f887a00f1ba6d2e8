"""The picture of a run: what is drawn where, which records belong together, and that drawing touches nothing else.

A picture is read by the figures' own objects, which hold the numbers; that it can be read by people was looked at.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ltkernels.bench import main, peers, plot, report, sampling

ROOT = Path(__file__).resolve().parents[1]
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("cpu*.jsonl"))


def record(peer: str = peers.OURS, scenario: str = "256x1000", **changes: Any) -> dict[str, Any]:
    rows, classes = map(int, scenario.split("x"))
    made = {
        **{"op": "cross_entropy", "variant": "ce", "scenario": scenario, "source": "", "N": rows, "C": classes},
        **{"dtype": "float32", "mode": "fwd_bwd", "memory": "default", "threads": 1, "peer": peer},
        **{"p25_us": 100.0, "p50_us": 128.0, "p75_us": 150.0, "ratio": {peers.OURS: 4.0}, "device": "cpu"},
        **{"less_work": peer in peers.NOT_LOSSES, "cpu": "A CPU", "isa": "AVX2", "kernel_isa": "avx2"},
        **{"torch": "2.13", "ltkernels": "1", "git": "abc", "utc": "2026-01-02T03:04:05Z"},
    }
    return made | changes


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that were made, in order."""
    import matplotlib.figure

    made: list[Any] = []

    class Figure(matplotlib.figure.Figure):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setattr(matplotlib.figure, "Figure", Figure)
    return made


def lines(axes: Any) -> dict[str, list[float]]:
    """What is drawn, by the colour of the line; a tick's place stands for the batch shape."""
    return {line.get_color(): list(line.get_ydata()) for line in axes.get_lines() if len(line.get_xdata()) > 0}


def test_panels_hold_the_times_and_the_ratios(figures: list[Any], tmp_path: Path) -> None:
    """128 us for 256 x 1000 logits are 0.5 ns each. Shapes stand in the order of their classes, whatever the file's."""
    records = [
        record(scenario="256x1000"),
        record(scenario="128x100", p50_us=64.0),
        record(peers.EAGER, "256x1000", p50_us=512.0, ratio={peers.OURS: 3.5}),
        record(peers.EAGER, "128x100", p50_us=128.0, ratio={peers.OURS: 2.5}),
    ]
    plot.draw(records, tmp_path / "deep" / "run.png")
    (figure,) = figures
    left, right = figure.axes
    assert [label.get_text() for label in left.get_xticklabels()] == ["128x100", "256x1000"]
    eager = plot.COLOURS[0]
    assert lines(left) == {plot.OUR_COLOUR: [5.0, 0.5], eager: [10.0, 2.0]}
    assert lines(right)[eager] == [2.5, 3.5] and lines(right)[plot.OUR_COLOUR] == [1, 1]
    assert left.get_title(loc="left") == "CE: ns a logit"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["ltkernels", "plain PyTorch"]
    assert "A CPU" in figure.texts[0].get_text() and "1 thread\n" in figure.texts[0].get_text()
    assert (tmp_path / "deep" / "run.png").read_bytes().startswith(b"\x89PNG")


def test_a_form_that_was_not_measured_everywhere_has_a_gap(figures: list[Any], tmp_path: Path) -> None:
    records = [record(scenario=name) for name in ("8x10", "8x20", "8x30")]
    records += [record(peers.COMPILE, name) for name in ("8x10", "8x30")]
    plot.draw(records, tmp_path / "run.svg")
    (compiled,) = [line for line in figures[0].axes[0].get_lines() if line.get_color() == plot.COLOURS[0]]
    assert list(compiled.get_xdata()) == [0, 2]
    assert "<svg" in (tmp_path / "run.svg").read_text()


def test_sampling_is_drawn_in_milliseconds_a_call(figures: list[Any], tmp_path: Path) -> None:
    changes = {"op": "sampling", "variant": "balanced", "mode": "1000000 draws", "p50_us": 2500.0}
    plot.draw([record(**changes), record(sampling.MULTINOMIAL, **changes)], tmp_path / "run.png")
    assert lines(figures[0].axes[0])[plot.OUR_COLOUR] == [2.5]
    assert figures[0].axes[0].get_title(loc="left") == "class-balanced: ms a call"


def test_the_smallest_thread_count_is_drawn_and_what_is_no_form_is_not(figures: list[Any], tmp_path: Path) -> None:
    records = [record(threads=2, p50_us=1.0), record(threads=1), record(peers.EMPTY), record(peers.MODULE)]
    plot.draw(records, tmp_path / "run.png")
    assert lines(figures[0].axes[0]) == {plot.OUR_COLOUR: [0.5]}


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_all_shipped_results_can_be_drawn(path: Path, figures: list[Any], tmp_path: Path) -> None:
    """Every form of every loss has a line of its own: no two look the same."""
    records = report.read_records(path)
    plot.draw(records, tmp_path / "run.svg")
    forms = {r["peer"] for r in records} - set(plot.LEFT_OUT)
    handles = figures[0].legends[0].legend_handles
    assert len(handles) == len(forms)
    assert len({(handle.get_color(), handle.get_marker()) for handle in handles}) == len(forms)
    assert len(figures[0].axes) == 2 * len({r["variant"] for r in records})


@pytest.mark.parametrize(
    ("records", "name", "message"),
    [
        ([], "x.png", "expected benchmark records, found none"),
        ([record(), record(dtype="bfloat16")], "x.png", "expected records of one dtype, found float32, bfloat16"),
        ([record(), record(op="lade")], "x.png", "expected records of one op, found cross_entropy, lade"),
        ([record()], "x.gif", "expected a name that ends in .png, .svg, .pdf, found 'x.gif'"),
    ],
)
def test_what_is_no_picture_is_refused(records: list[Any], name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        plot.draw(records, tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_the_command_draws_a_kept_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept, image = tmp_path / "run.jsonl", tmp_path / "run.svg"
    kept.write_text("".join(json.dumps(r) + "\n" for r in report.read_records(RESULTS[0])))
    assert main(["--load", str(kept), "--plot", str(image)]) == 0
    assert "<svg" in image.read_text()
    with pytest.raises(SystemExit) as stop:
        main(["--load", str(kept), "--plot", "run.gif"])
    assert stop.value.code == 2 and "found 'run.gif'" in capsys.readouterr().err


def test_drawing_leaves_a_notebooks_figures_alone(tmp_path: Path) -> None:
    """pyplot, with its current figure and its backend, is not even imported."""
    program = f"""
import sys
from pathlib import Path
from ltkernels.bench import plot, report
plot.draw(report.read_records(Path({str(RESULTS[0])!r})), Path({str(tmp_path / "run.png")!r}))
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
    assert (tmp_path / "run.png").stat().st_size > 10_000
