"""python/recipes/relative_accuracy.py: its sets, and the program as a user runs it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import longtail_data
import numpy as np
import pytest
from recipes import relative_accuracy as recipe

PROGRAM = Path(__file__).resolve().parents[1] / "python/recipes/relative_accuracy.py"


def test_the_sets_are_as_the_survey_says() -> None:
    """As many samples, equally many of each class, and no test image among them."""
    data = longtail_data.load("digits")
    parts = recipe.divide(data, 1)
    assert len(parts.balanced) == len(parts.long_tailed) == len(set(parts.balanced))
    counts = np.bincount(data.labels[parts.balanced], minlength=10)
    assert counts.max() - counts.min() <= 1
    tail = np.bincount(data.labels[parts.long_tailed], minlength=10)
    assert tail.max() > 10 * tail.min()
    for rows in (parts.balanced, parts.long_tailed):
        assert not np.isin(rows, parts.test).any()


def test_the_program_prints_what_the_trainings_gave() -> None:
    command = [sys.executable, str(PROGRAM), "--seeds", "2", "--method", "logit-adjusted", "ce"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=PROGRAM.parents[2])
    assert done.returncode == 0, done.stderr
    outcomes = recipe.run(["ce", "logit-adjusted"], 2)
    ce, adjusted = (outcomes[name] for name in ("ce", "logit-adjusted"))
    for of_seed in (*ce, *adjusted):
        upper = max(of_seed.plain_on_balanced, of_seed.method_on_balanced)
        assert of_seed.relative == pytest.approx(of_seed.long_tailed / upper)
        # The tail costs accuracy, and a balanced set of as many samples learns the digits well.
        assert 0.5 < of_seed.long_tailed < upper and upper > 0.9
    assert np.mean([one.relative for one in adjusted]) > np.mean([one.relative for one in ce])
    rows = {line.split("│")[1].strip(): line for line in done.stdout.splitlines() if line.count("│") > 4}
    for title, found in (("cross-entropy", ce), ("logit-adjusted", adjusted)):
        printed = [float(number) for number in re.findall(r"(\d+\.\d) ±", rows[title])]
        assert printed[0] == pytest.approx(100 * np.mean([one.long_tailed for one in found]), abs=0.051)
        assert printed[-1] == pytest.approx(100 * np.mean([one.relative for one in found]), abs=0.051)


def test_wrong_options(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--seeds", "0"], ["--method", "sorcery"]):
        with pytest.raises(SystemExit) as stopped:
            recipe.main(arguments)
        assert stopped.value.code == 2 and "relative_accuracy.py: error:" in capsys.readouterr().err
