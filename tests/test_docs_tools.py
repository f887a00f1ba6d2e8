"""What makes the site of sources: docstrings in Markdown, formulas in MathML, figures from files."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]


def load(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def docstrings() -> ModuleType:
    pytest.importorskip("griffe")
    return load("docs/tools/docstrings.py")


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    pytest.importorskip("mkdocs")
    pytest.importorskip("latex2mathml")
    return load("docs/tools/hooks.py")


@pytest.fixture(scope="module")
def methods_table() -> ModuleType:
    return load("benchmarks/methods_table.py")


# --- Docstrings ---


def visited(source: str) -> Any:
    import griffe

    with griffe.temporary_visited_module(source, module_name="ltkernels_like") as module:
        return module


TABLE = "====  ====\na     b\n====  ====\n1     2\n====  ===="


@pytest.mark.parametrize(
    ("docstring", "markdown"),
    [
        (":math:`a_1` of :func:`torch.relu`", "$a_1$ of `torch.relu`"),
        (":math:`a\n+ b`", "$a + b$"),
        (".. math:: a + b", "\n$$\na + b\n$$\n"),
        ("x\n\n.. math::\n    a\n    + b\n\ny", "x\n\n\n$$\na\n+ b\n$$\n\ny"),
        ("Example:\n    >>> 1\n    1", "Examples:\n    >>> 1\n    1"),
        ("Source:\n    Who 2021,\n    eq. 1.", "**Source.** Who 2021,\neq. 1.\n"),
        (TABLE, f"```text\n{TABLE}\n```"),
        (":class:`Near`", "[`Near`][ltkernels_like.Near]"),
        (":class:`~ltkernels.far.Thing`", "[`far.Thing`][ltkernels.far.Thing]"),
        (":meth:`nowhere`", "`nowhere`"),
        (":func:`_hidden`", "`_hidden`"),
    ],
)  # fmt: skip
def test_docstrings_become_markdown(docstrings: ModuleType, docstring: str, markdown: str) -> None:
    function = visited("class Near: ...\ndef f(): ...")["f"]
    assert docstrings.as_markdown(docstring, function).strip() == markdown.strip()


def test_a_formula_in_an_indented_section_stays_there(docstrings: ModuleType) -> None:
    text = "Args:\n    x: with\n\n        .. math::\n            a\n\n        and more."
    assert "\n        $$\n        a\n        $$\n" in docstrings.as_markdown(text, None)


# --- Formulas ---


def test_formulas_become_mathml(hooks: ModuleType) -> None:
    page = '<p><span class="arithmatex">\\(a &lt; b\\)</span></p><div class="arithmatex">\\[\n\\frac{1}{N}\n\\]</div>'
    made = hooks.on_page_content(page)
    assert '<math xmlns="http://www.w3.org/1998/Math/MathML" display="inline">' in made and 'display="block"' in made
    assert "<mfrac>" in made and "\\" not in made


def test_an_unknown_figure_stops_the_build(hooks: ModuleType) -> None:
    from mkdocs.exceptions import PluginError

    with pytest.raises(PluginError, match="figures: expected one of cross_entropy, .*, found 'crossentropy'"):
        hooks.on_page_markdown("<!-- figures: crossentropy -->", page=None)


def test_api_pages_list_what_is_public(hooks: ModuleType) -> None:
    text = hooks.on_page_markdown("<!-- api: ltkernels.functional -->", page=None)
    assert "::: ltkernels.functional.sample_indices\n" in text
    # The function hides behind the module of its name.
    assert "[](){#ltkernels.functional.cross_entropy}\n\n::: ltkernels.functional.cross_entropy.cross_entropy" in text
    assert "::: ltkernels.functional\n" in text


# --- Accuracy of methods ---


def run(method: str = "ce", **arguments: Any) -> dict[str, Any]:
    metrics = ("overall", "balanced", "many", "medium", "few", "prior_weighted")
    accuracy = {metric: {"mean": 0.5, "sd": 0.012} for metric in metrics}
    accuracy["few"] = {"mean": None, "sd": None}  # no such class: NaN, which JSON does not have
    return {
        "data": {
            **{"name": "tiny", "task": "a -> b", "num_train": 1200, "num_classes": 3, "class_counts": [900, 290, 10]},
            **{"evaluated_on": "test part", "checksum": "0", "class_names": ["a", "b", "c"]},
        },
        "machine": {"cpu": "A CPU", "cores": 2, "system": "Linux"},
        "versions": {"torch": "2.13"},
        "arguments": {"data": "tiny", "seeds": 2, "sampler": "instance", "method": [method]} | arguments,
        "methods": {method: {"title": method.upper(), "accuracy": accuracy, "time": {"loss": 1.0}}},
    }


def written(folder: Path, name: str, result: dict[str, Any]) -> str:
    path = folder / name
    path.write_text(json.dumps(result))
    return str(path)


def test_runs_are_kept_and_shown(methods_table: ModuleType, tmp_path: Path) -> None:
    better = run("la")
    better["methods"]["la"]["accuracy"]["balanced"] = {"mean": 0.6, "sd": None}
    files = [
        written(tmp_path, "1.json", run()),
        written(tmp_path, "2.json", better),
        written(tmp_path, "3.json", run(sampler="square_root")),
    ]
    assert methods_table.main([*files, "--out", str(tmp_path / "kept.json")]) == 0
    text = methods_table.markdown(tmp_path / "kept.json")
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert rows[0] == "| method | overall | balanced | many-shot | medium | few-shot | prior weighted |"
    assert rows[2].startswith("| CE | **50.0 ± 1.2** | 50.0 ± 1.2 |") and " | - | " in rows[2]
    assert "| LA | **50.0 ± 1.2** | **60.0** |" in text and "| CE, square_root sampling |" in text
    assert "1,200 training samples, 3 classes of 10 to 900" in text and "A CPU (torch 2.13)" in text
    assert "`python python/train.py --data tiny --seeds 2 --sampler square_root --method ce`" in text
    assert "time" not in (tmp_path / "kept.json").read_text(), "times do not repeat"


def test_runs_that_do_not_belong_together_are_refused(
    methods_table: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [written(tmp_path, "1.json", run()), written(tmp_path, "2.json", run("la", seeds=3))]
    assert methods_table.main([*files, "--out", str(tmp_path / "kept.json")]) == 1
    assert "expected runs with the same seeds, found 2 and 3" in capsys.readouterr().err
    assert methods_table.main([str(tmp_path / "none.json"), "--out", str(tmp_path / "kept.json")]) == 1
    assert not (tmp_path / "kept.json").exists()


def measured(data: str) -> tuple[Callable[[str, str], float], dict[str, float]]:
    """The mean of a method's metric, and the balanced accuracy of every method."""
    kept = json.loads((ROOT / "benchmarks" / "results" / f"methods-{data}.json").read_text())

    def mean(method: str, metric: str) -> float:
        return float(kept["methods"][method]["accuracy"][metric]["mean"])

    return mean, {name: mean(name, "balanced") for name in kept["methods"]}


def test_what_is_said_of_airports_holds() -> None:
    """docs/methods.md draws conclusions from the files; measured again, they may have to be drawn anew."""
    mean, balanced = measured("airports")
    assert max(balanced, key=balanced.__getitem__) == "la", "logit adjustment gains most"
    assert balanced["la"] - balanced["la-posthoc"] < 0.02, "post hoc comes close"
    for weights in ("weighted", "cb"):
        assert balanced["ce"] < balanced[weights] < balanced["la"]
        assert mean(weights, "many") > mean("la", "many")
    assert mean("vs", "few") == max(mean(name, "few") for name in balanced)
    assert mean("vs", "prior_weighted") == min(mean(name, "prior_weighted") for name in balanced)
    gain, lost = balanced["la"] - balanced["ce"], mean("ce", "prior_weighted") - mean("la", "prior_weighted")
    for gentle in ("seesaw", "ce, progressive sampling"):
        assert 0.4 < (balanced[gentle] - balanced["ce"]) / gain < 0.6
        assert mean("ce", "prior_weighted") - mean(gentle, "prior_weighted") < 0.3 * lost
    assert mean("ce, class_balanced sampling", "prior_weighted") < mean("ce, progressive sampling", "prior_weighted")
    assert balanced["ce"] < balanced["ce, square_root sampling"] < balanced["ce, class_balanced sampling"]
    assert balanced["cb-sigmoid"] > balanced["cb"]
    assert max(balanced[name] for name in ("ride", "sade", "bbn", "ace", "lfme")) < balanced["weighted"]
    assert mean("label-aware-smoothing", "prior_weighted") > mean("ce", "prior_weighted")


def test_what_is_said_of_tokens_holds() -> None:
    mean, balanced = measured("tokens")
    for adjusted in ("la", "la-posthoc", "ldam-drw", "vs"):
        assert balanced[adjusted] > 1.7 * balanced["ce"]
    for gentle in ("ldam-drw", "vs"):
        assert balanced[gentle] >= balanced["la"] - 0.002
        assert mean(gentle, "prior_weighted") > mean("la", "prior_weighted") + 0.05
    for weights in ("weighted", "cb", "cb-sigmoid"):
        assert mean(weights, "many") < 0.5 * mean("ce", "many") and balanced[weights] < balanced["ce"] + 0.02
    for metric in ("overall", "balanced", "many", "medium", "few", "prior_weighted"):
        assert mean("label-aware-smoothing", metric) > mean("ce", metric)
    assert max(balanced[name] for name in ("ride", "sade", "bbn", "ace")) < 0.75 * balanced["la"]
