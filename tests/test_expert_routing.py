"""The routing program: later experts see the shares it says, and its table tells of them."""

from __future__ import annotations

import expert_routing
import pytest
import torch

SMALL = ["--batch", "40", "--width", "8", "--depth", "1", "--classes", "5", "--repeats", "1"]


def test_a_table_of_every_share(capsys: pytest.CaptureFixture[str]) -> None:
    assert expert_routing.main(SMALL) == 0
    head, together, _, titles, *table = capsys.readouterr().out.splitlines()
    assert head.startswith("40 samples, 3 experts of 1 layers of 8, 5 classes, cpu, 1 threads")
    assert together.startswith("all experts for all samples: ") and together.endswith(" ms")
    assert titles.split()[-4:] == ["rows", "of", "each", "expert"]
    # 50 % of 40 are 20 and of these 10: (40 + 20 + 10) / 40 experts a sample.
    expected = {
        "0%": ("1.00", "40, 0, 0"),
        "10%": ("1.10", "40, 4, 0"),
        "25%": ("1.30", "40, 10, 2"),
        "50%": ("1.75", "40, 20, 10"),
        "75%": ("2.30", "40, 30, 22"),
        "100%": ("3.00", "40, 40, 40"),
    }
    assert len(table) == len(expected)
    for line, (share, (each, rows)) in zip(table, expected.items(), strict=True):
        cells = line.split(maxsplit=4)
        assert cells[:2] == [share, each] and cells[4] == rows and float(cells[2]) >= 0


def test_the_neediest_go_on() -> None:
    router = expert_routing.FixedShareRouter(2, 8, topk=3)
    router.share = 0.25
    mean, features = torch.randn(12, 5), torch.randn(12, 8)
    h = super(expert_routing.FixedShareRouter, router).gate(0, mean, features)
    assert set((router.gate(0, mean, features) > 0).nonzero()[:, 0].tolist()) == set(h.topk(3).indices.tolist())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--experts", "1"], "argument --experts: expected at least 2, found 1"),
        (["--batch", "0"], "argument --batch: expected at least 1, found 0"),
        (["--width", "wide"], "argument --width: invalid int value: 'wide'"),
        (["--device", "tpu"], "argument --device: expected cpu or cuda, found 'tpu'"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        expert_routing.main(arguments)
    assert exit_.value.code == 2 and message in capsys.readouterr().err
