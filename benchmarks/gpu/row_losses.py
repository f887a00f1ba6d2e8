"""The losses whose adjustments depend on the row, and LADE, in the GPU benchmark: measured as cross_entropy is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from benchmarks.gpu.cross_entropy import COMPILED, LARGE, CrossEntropy
from benchmarks.gpu.table import Case
from ltkernels.bench.peers import Variant
from ltkernels.bench.peers_lade import LADE_VARIANTS
from ltkernels.bench.peers_rows import ROW_VARIANTS, SEESAW_FIXED
from ltkernels.bench.scenarios import SCENARIOS, Scenario

SHAPES = tuple(shape for shape in (*SCENARIOS, *LARGE) if shape.name == "256x1000" or shape in LARGE[:1] + LARGE[6:7])


class RowLosses(CrossEntropy):
    """An op of losses whose other forms stand in ``ltkernels.bench``.

    Args:
        name: of the op.
        variants: its losses; the first is measured in more depth.
    """

    def __init__(self, name: str, variants: Sequence[Variant]) -> None:
        self.name = name
        self.variants = {variant.name: variant for variant in variants}

    def cases(self, quick: bool, dry: bool) -> Sequence[Case]:
        if dry:
            return [self._case(variant, Scenario(9, 37, "tiny"), "float32") for variant in self.variants]
        if quick:
            return [self._case(next(iter(self.variants)), SHAPES[0], "bfloat16")]
        return list(self._of_rows())

    def _of_rows(self) -> Iterator[Case]:
        first = next(iter(self.variants))
        for variant in self.variants:
            for shape in SHAPES:
                for dtype in ("bfloat16", "float32") if variant == first else ("bfloat16",):
                    yield self._case(variant, shape, dtype)

    def _case(self, variant: str, shape: Scenario, dtype: str) -> Case:
        compile = dtype == "bfloat16" and shape.name in COMPILED and variant == next(iter(self.variants))
        return Case(self.name, variant, shape, dtype, compile, brief=True)


# Seesaw with fixed counts: the forms are called several times, and have to say the same each time.
ROW_CROSS_ENTROPY = RowLosses(
    "row_cross_entropy", [SEESAW_FIXED, *(variant for variant in ROW_VARIANTS if variant.name != "seesaw")]
)
LADE = RowLosses("lade", LADE_VARIANTS)
