"""benchmarks.codecheck: it passes on the tree, and on small trees it finds what it is there for."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # benchmarks is no part of the installed package

from benchmarks.codecheck import __main__ as codecheck  # noqa: E402
from benchmarks.codecheck import budget, kernels, machine_code, roofline  # noqa: E402

KERNEL = machine_code.Kernel(
    "cuda", "toy.cu", "copy<float>", "sm_90a", 32, 0, 0, 0, 256, 100, {128: 4, 32: 2}, {128: 4}
)
COMPILERS = {"cuda": "nvcc 13.0"}


@pytest.mark.parametrize("only", [["--only", "90a"], pytest.param([], marks=pytest.mark.slow)], ids=["90a", "all"])
def test_tree_keeps_its_budget(only: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Minutes where nothing is compiled yet, seconds afterwards: objects and what was read of them stay in build."""
    passed = codecheck.main(["--allow-missing", *only]) == 0
    output = capsys.readouterr()
    assert passed, output.err
    if "WERE NOT CHECKED" in output.err:
        pytest.skip(output.err)


# --- Reading ---

RESOURCES = """
Resource usage:
 Common:
  GLOBAL:0
 Function _Z4copyPf:
  REG:40 STACK:16 SHARED:1024 LOCAL:0 CONSTANT[2]:52 CONSTANT[0]:880 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function other:
  REG:8 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:8 TEXTURE:0 SURFACE:0 SAMPLER:0
"""

ELF = """
.nv.info
\t<0x1>
.nv.info._Z4copyPf
\t<0x2>
\tAttribute:\tEIATTR_PARAM_CBANK
\tFormat:\tEIFMT_SVAL
\tValue:\t0x2 0x8
\t<0x3>
\tAttribute:\tEIATTR_MAX_THREADS
\tFormat:\tEIFMT_SVAL
\tValue:\t0x80 0x2 0x1
.nv.info.other
\t<0x4>
.nv.info.fixed
\tAttribute:\tEIATTR_REQNTID
\tFormat:\tEIFMT_SVAL
\tValue:\t0x40 0x1 0x1
"""

CODE = """
\tcode for sm_90a
\t.target\tsm_90a

\t\tFunction : _Z4copyPf
\t.headerflags\t@"EF_CUDA_SM90"
        /*0000*/                   LDC R1, c[0x0][0x28] ;              /* 0x00000a00ff017b82 */
                                                                       /* 0x000ff00000000800 */
        /*0010*/                   LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;
        /*0020*/              @!P0 LDG.E.U16 R8, desc[UR4][R2.64] ;
        /*0030*/             @!UP1 LDG.E.EF.ENL2.256 R8, R12, desc[UR4][R2.64] ;
        /*0040*/               @P0 STG.E.64 desc[UR4][R2.64], R4 ;
        /*0050*/                   STG.E desc[UR4][R2.64], R4 ;
        /*0060*/                   LDGSTS.E.BYPASS.128 [R9], desc[UR4][R2.64] ;
        /*0070*/                   ST.E.U8 desc[UR4][R2.64], R4 ;
        /*0080*/                   LDS.128 R4, [R2] ;
        /*0090*/                   RED.E.ADD.F32.FTZ.RN.STRONG.GPU desc[UR4][R2.64], R4 ;
        /*00a0*/                   ATOMG.E.ADD.STRONG.GPU PT, R4, desc[UR4][R2.64], R5 ;
        /*00b0*/                   NOP ;
\t\tFunction : other
        /*0000*/                   STL.64 [R1], R4 ;
        /*0010*/                   LDL.LU R4, [R1] ;
        /*0020*/                   LDG.E.S8 R4, desc[UR4][R2.64] ;
"""


def test_resources() -> None:
    found = machine_code.parse_resources(RESOURCES)
    assert set(found) == {"_Z4copyPf", "other"}
    assert [found["_Z4copyPf"][field] for field in ("REG", "STACK", "SHARED")] == [40, 16, 1024]


def test_threads_of_the_largest_block() -> None:
    assert machine_code.parse_threads(ELF) == {"_Z4copyPf": 256, "fixed": 64}


def test_accesses_by_width() -> None:
    copy, other = machine_code.parse_code(CODE).values()
    assert copy["loads"] == {256: 1, 128: 2, 16: 1}
    assert copy["stores"] == {64: 1, 32: 1, 8: 1}
    assert (copy["local_accesses"], copy["float_atomics"], copy["instructions"]) == (0, 1, 11)
    assert other["loads"] == {8: 1}
    assert other["local_accesses"] == 2


@pytest.mark.skipif(shutil.which("c++filt") is None, reason="no c++filt here")
def test_names_are_short() -> None:
    symbol = "_ZN3ltk4cuda12backward_anyINS0_8BFloat16EfLi256EEEvNS0_4CallIT0_EE"
    assert machine_code.demangle([symbol, "_Z4copyPf", "plain_c"]) == [
        "backward_any<BFloat16, float, 256>",
        "copy",
        "plain_c",
    ]


@pytest.mark.parametrize(
    ("registers", "threads", "shared", "expected"),
    [
        (32, 256, 0, 64),  # full
        (33, 256, 0, 48),  # registers come in steps of 8 a thread
        (64, 512, 0, 32),
        (128, 512, 0, 16),
        (255, 1024, 0, 0),  # cannot be launched
        (16, 32, 0, 32),  # 32 blocks at most
        (32, 128, 100 * 1024, 8),  # two blocks of 101 KiB
    ],
)
def test_resident_warps(registers: int, threads: int, shared: int, expected: int) -> None:
    kernel = replace(KERNEL, registers=registers, threads=threads, shared=shared)
    assert machine_code.resident_warps(kernel) == expected
    assert machine_code.occupancy(kernel) == expected / 64


# --- The budget ---


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A budget that KERNEL keeps exactly."""
    budget.save(tmp_path / "budget.json", [KERNEL], COMPILERS, budget.load(tmp_path / "budget.json"))
    return tmp_path / "budget.json"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"registers": 32 + budget.SLACK}, None),
        ({"registers": 33 + budget.SLACK}, "37 registers, budget 32 and 4 of slack"),
        ({"stack": 8}, "spills: 8 bytes of stack, 0 accesses of local memory"),
        ({"local_accesses": 2}, "spills: 0 bytes of stack, 2 accesses of local memory"),
        ({"loads": {128: 3, 32: 2}}, "3 loads of 128 bits or more, budget 4"),
        ({"loads": {256: 2, 32: 9}}, None),
        ({"stores": {64: 8}}, "0 stores of 128 bits or more, budget 4"),
        ({"least_wide_loads": 5}, "4 loads of 128 bits or more, its module declares 5"),
        ({"float_atomics": 1}, "1 atomics on floating-point numbers: sums depend on the order of blocks"),
    ],
)
def test_what_breaks_the_budget(path: Path, change: dict[str, object], reason: str | None) -> None:
    wrong = budget.check([replace(KERNEL, **change)], COMPILERS, budget.load(path))
    assert wrong == ([] if reason is None else [f"cuda toy.cu copy<float> sm_90a: {reason}"])


def test_kernels_come_and_go_through_the_budget_only(path: Path) -> None:
    wrong = budget.check([replace(KERNEL, arch="sm_100")], COMPILERS, budget.load(path))
    assert wrong == [
        "cuda toy.cu copy<float> sm_100: not in the budget: look at it, then --update",
        "cuda toy.cu copy<float> sm_90a: in the budget and not in the tree: --update takes it out",
    ]


def test_other_compiler_is_compared_loosely(path: Path) -> None:
    other = {"cuda": "nvcc 12.8"}
    slack = budget.OTHER_COMPILER_SLACK
    allowed = replace(KERNEL, registers=32 + slack, loads={128: 1}, stores={128: 1})
    assert budget.check([allowed], other, budget.load(path)) == []
    assert len(budget.check([replace(allowed, registers=33 + slack)], other, budget.load(path))) == 1
    assert len(budget.check([replace(allowed, loads={64: 8})], other, budget.load(path))) == 1
    stack = budget.OTHER_COMPILER_STACK
    assert budget.check([replace(allowed, stack=stack)], other, budget.load(path)) == []
    assert len(budget.check([replace(allowed, stack=stack + 1)], other, budget.load(path))) == 1
    assert len(budget.check([replace(allowed, local_accesses=stack + 1)], other, budget.load(path))) == 1


def test_half_that_is_missing_keeps_its_budget(path: Path) -> None:
    variant = replace(KERNEL, backend="triton", source="toy", registers=99)
    budget.save(path, [variant], {"triton": "triton 3.9.0"}, budget.load(path))
    both = COMPILERS | {"triton": "triton 3.9.0"}
    assert budget.load(path)["compilers"] == both
    assert budget.check([KERNEL, variant], both, budget.load(path)) == []
    assert budget.check([variant], {"triton": "triton 3.9.0"}, budget.load(path)) == []


# --- The roofline ---


def test_bytes_in_flight() -> None:
    h100 = roofline.GPUS[1]
    assert h100.name == "H100"
    # 64 warps of 32 threads with 4 loads of 16 bytes each: 128 KiB, where 3 TB/s for 0.8 us over 132 take 18 KiB.
    assert roofline.in_flight(KERNEL, h100) == pytest.approx(64 * 32 * 4 * 16 / (3.35e12 * 0.9 * 0.8e-6 / 132))
    scalar = replace(KERNEL, loads={16: 40})
    assert roofline.in_flight(scalar, h100) < 1 < roofline.in_flight(KERNEL, h100)
    # Its module says that it holds 1024 logits in 256 threads: 16 bytes a thread, however wide the loads are.
    held = replace(scalar, name="copy<float32, 1000>", logits=1024)
    assert roofline.in_flight(held, h100) == pytest.approx(roofline.in_flight(KERNEL, h100) / 4)


def test_bounds_of_cross_entropy() -> None:
    def kernel(name: str, loads: int) -> machine_code.Kernel:
        return replace(KERNEL, source="cross_entropy_bf16.cu", name=name, loads={128: loads}, registers=64)

    warp = kernel("forward_vectors<BFloat16, (Tables)0, 1, (Group)0>", 1)
    block = kernel("forward_vectors<BFloat16, (Tables)0, 8, (Group)1>", 8)
    sweep = kernel("forward_vectors<BFloat16, (Tables)0, 0, (Group)1>", 2)
    tables = kernel("forward_vectors<BFloat16, (Tables)1, 1, (Group)0>", 1)
    tree = [sweep, tables, block, warp]
    assert roofline.serving(tree, "forward", "BFloat16", 200) == (warp, 128, 25 / 32)
    assert roofline.serving(tree, "forward", "BFloat16", 8192) == (block, 128, 1.0)
    assert roofline.serving(tree, "forward", "BFloat16", 128256) == (sweep, 512, 1.0)
    assert roofline.serving(tree, "backward", "BFloat16", 200) is None
    assert [roofline.bytes_per_logit(k) for k in (block, sweep)] == [2, 4]
    assert roofline.bytes_per_logit(KERNEL) is None  # of another hot path, which has not said
    # 4 loads and 4 stores of 16 bytes on each of 256 threads, for 16 logits a thread.
    assert roofline.wide_bytes_per_logit(replace(KERNEL, logits=4096)) == 8

    h100 = roofline.GPUS[1]
    large = roofline.bound(block, h100, 128, 1.0, 64_000_000, "BFloat16")
    assert 0.9 < large < 1
    assert roofline.bound(sweep, h100, 512, 1.0, 64_000_000, "BFloat16") < 0.55  # reads everything twice
    assert roofline.bound(block, h100, 128, 1.0, 256_000, "BFloat16") < 0.1  # all launch


def test_bounds_of_sampling() -> None:
    draw = replace(
        KERNEL, source="sampling.cu", name="draw<true>", loads={64: 7, 32: 3}, stores={128: 1, 64: 1}, instructions=260
    )
    deal = replace(draw, name="deal<true>", stores={64: 1})
    of_triton = replace(deal, backend="triton", source="sampling", name="draw<weighted, singletons>", stores={64: 4})
    probe = replace(draw, name="probe", stores={})
    # An index of 8 bytes, and a sector for the member; where every sample is a class, one more for its alias entry.
    assert [roofline.bytes_a_draw(k) for k in (draw, deal, of_triton, probe, KERNEL)] == [40, 40, 72, None, None]
    assert [roofline.held(k) for k in (draw, deal, of_triton)] == [2, 1, 4]
    h100 = roofline.GPUS[1]
    # 64 warps of 32 threads with two gathers each.
    assert roofline.in_flight(draw, h100) == pytest.approx(64 * 32 * 2 * 32 / h100.bytes_to_have_in_flight)
    found = {row.kernel: row for row in roofline.draws([draw, deal, probe, KERNEL])}
    assert found.keys() == {"draw<true>", "deal<true>"}
    assert found["draw<true>"].rate == pytest.approx(h100.copy / 40)
    assert (found["draw<true>"].instructions, found["deal<true>"].instructions) == (130, None)
    (slow,) = roofline.draws([replace(draw, instructions=26_000)])
    assert slow.rate == pytest.approx(132 * 128 * 1.83e9 / 13_000), "four warps issue an instruction a clock each"
    assert roofline.bytes_per_logit(draw) is None


# --- Whole runs on small trees ---

CUDA = {
    "copy": """
extern "C" __global__ void __launch_bounds__(256) copy(const uint4* from, uint4* to) {
  to[threadIdx.x] = from[threadIdx.x];
}
""",
    "narrow_copy": """
extern "C" __global__ void __launch_bounds__(256) copy(const float* from, float* to) {
  for (int k = 0; k < 4; ++k) to[threadIdx.x + 256 * k] = from[threadIdx.x + 256 * k];
}
""",
    # 96 values that all live at once, in the 32 registers that 2048 threads leave each.
    "spilling": """
extern "C" __global__ void __launch_bounds__(1024, 2) spilling(const float* from, float* to) {
  float x[96];
  for (int k = 0; k < 96; ++k) x[k] = from[threadIdx.x + 1024 * k];
  __syncthreads();
  for (int k = 0; k < 96; ++k) to[threadIdx.x + 1024 * k] = x[k] * x[95 - k];
}
""",
    "unordered": """
extern "C" __global__ void __launch_bounds__(256) unordered(float* sum) { atomicAdd(sum, float(threadIdx.x)); }
""",
}


def run(tree: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """Exit status and messages of the command for one architecture."""
    status = codecheck.main(["--root", str(tree), "--archs", "90a", *arguments])
    return status, capsys.readouterr().err


def write(tree: Path, *names: str) -> None:
    (tree / "csrc/cuda").mkdir(parents=True, exist_ok=True)
    (tree / "benchmarks").mkdir(exist_ok=True)
    (tree / "csrc/cuda/toy.cu").write_text("".join(CUDA[name] for name in names))


def test_cuda_kernels_of_a_tree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, "copy")
    status, messages = run(tmp_path, capsys)
    if "WERE NOT CHECKED" in messages:
        pytest.skip(messages)
    assert status == 1 and "toy.cu copy sm_90a: not in the budget" in messages
    assert run(tmp_path, capsys, "--update")[0] == 0
    status, messages = run(tmp_path, capsys)
    assert status == 0 and "1 kernels, 0 wrong" in messages and "compiling" not in messages

    write(tmp_path, "narrow_copy", "spilling", "unordered")
    status, messages = run(tmp_path, capsys)
    assert status == 1
    assert "copy sm_90a: 0 loads of 128 bits or more, budget 1" in messages
    assert "copy sm_90a: 0 stores of 128 bits or more, budget 1" in messages
    assert "spilling sm_90a: spills: " in messages and "spilling sm_90a: not in the budget" in messages
    assert "unordered sm_90a: 1 atomics on floating-point numbers" in messages

    status, messages = run(tmp_path, capsys, "--update")  # accepts narrow accesses, but neither of the other two
    assert status == 1 and "3 kernels, 2 wrong" in messages
    status, _ = run(tmp_path, capsys, "--update", "--json")
    assert status == 1


def test_json_is_all_that_goes_to_standard_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, "copy")
    codecheck.main(["--root", str(tmp_path), "--archs", "90a", "--json", "--allow-missing"])
    report = json.loads(capsys.readouterr().out)
    if report["missing"]:
        pytest.skip(str(report["missing"]))
    (kernel,) = report["kernels"]
    assert (kernel["name"], kernel["arch"], kernel["threads"]) == ("copy", "sm_90a", 256)
    assert (kernel["loads"], kernel["stores"], kernel["occupancy"]) == ({"128": 1}, {"128": 1}, 1.0)


VARIANTS = """
from dataclasses import dataclass, field
import triton
import triton.language as tl

@dataclass(frozen=True)
class Variant:
    name: str
    kernel: object
    signature: dict
    constexprs: dict
    attrs: dict
    num_warps: int
    logits: int
    wide_loads: int
    wide_stores: int
    bytes_per_logit: float

@triton.jit
def copy(source, to, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    tl.store(to + columns, tl.load(source + columns))

def variants():
    aligned = {(0,): [["tt.divisibility", 16]], (1,): [["tt.divisibility", 16]]}
    signature = {"source": "*fp32", "to": "*fp32", "BLOCK": "constexpr"}
    return [
        Variant(name, copy, signature, {"BLOCK": 1024}, attrs, 4, 1024, 2, 2, 8)
        for name, attrs in (("aligned", aligned), ("misaligned", {}))
    ]
"""


def test_triton_variants_of_a_tree(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("ltkernels", "ltkernels/triton", "benchmarks"):
        (tmp_path / package).mkdir(parents=True)
        (tmp_path / package / "__init__.py").touch()
    (tmp_path / "ltkernels/triton/toy.py").write_text(VARIANTS)
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # as in a process that tests the kernels' values
    status, messages = run(tmp_path, capsys, "--update")
    if "WERE NOT CHECKED" in messages:
        pytest.skip(messages)
    assert status == 1 and "2 kernels, 2 wrong" in messages
    for what in ("loads", "stores"):
        assert f"toy misaligned sm_90a: 0 {what} of 128 bits or more, its module declares 2" in messages


@pytest.mark.parametrize("half", ["cuda", "triton"])
def test_half_that_was_not_checked_is_named_and_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, half: str
) -> None:
    monkeypatch.setattr(kernels, half, lambda root, *archs: kernels.Half(missing="no compiler"))
    status, messages = run(tmp_path, capsys)
    assert status == 1 and f"{half.upper()} KERNELS WERE NOT CHECKED: no compiler" in messages
    status, messages = run(tmp_path, capsys, "--allow-missing")
    assert status == 0 and "WERE NOT CHECKED" in messages
