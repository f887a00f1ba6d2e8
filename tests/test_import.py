"""What an import costs: modules, not seconds, since no test may fail for time.

The libraries below take tenths of a second each, and none of them is needed to compute a loss on a CPU. They are for
other backends, for the demo and the benchmark, for metrics, or for torch.compile.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import ltkernels

ROOT = Path(__file__).resolve().parents[1]
HEAVY = {
    *("triton", "matplotlib", "rich", "sklearn", "scipy", "pandas", "torchmetrics", "torchdata", "sympy"),
    *("transformers", "lightning", "accelerate", "timm", "imbalanced_losses", "pytorch_metric_learning"),
}
PROGRAM = """
import json, sys
import torch
before = set(sys.modules)
def came():
    global before
    new, before = set(sys.modules) - before, set(sys.modules)
    return sorted(new)
import ltkernels as ltk
report = {"import": came()}
for name in ltk.__all__:
    if name != "bench":  # a command, whose peers it imports
        getattr(ltk, name)
report["names"] = came()
logits = torch.zeros(2, 3, requires_grad=True)
ltk.losses.LogitAdjustedLoss([3, 2, 1])(logits, torch.tensor([0, 1])).backward()
list(ltk.samplers.LongTailSampler([0, 0, 1], "class_balanced"))
ltk.experts.ExpertHeads(3, 4, 5).eval()(torch.zeros(2, 4))
report["use"] = came()
json.dump(report, sys.stdout)
"""


def what_came() -> dict[str, Any]:
    run = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, check=True)
    report: dict[str, Any] = json.loads(run.stdout)
    return report


def test_nothing_heavy_is_imported() -> None:
    report = what_came()
    assert report["import"] == ["ltkernels"], "every other module is loaded when its name is used"
    for step in ("names", "use"):
        roots = {name.partition(".")[0] for name in report[step]}
        assert not roots & HEAVY, step
    assert "torch._dynamo" not in report["use"] and "torch._dynamo" not in report["names"]
    for name in ("functional", "losses", "samplers", "experts"):
        assert f"ltkernels.{name}" in report["names"], "the names were used"
    assert "bench" in ltkernels.__all__
