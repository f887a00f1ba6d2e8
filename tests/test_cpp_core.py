"""The torch-free C++ core by itself: tests/cpp under AddressSanitizer and UBSan, for every instruction set of this
processor.

Objects stay in build/sanitized, so only what changed is compiled again. A later run takes seconds, the first about a
minute.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
SUITES = ("exponentials", "conversions", "kernels", "sampling")
SETS = ("avx512", "avx2", "portable")
NEEDED = {
    "avx512": ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512cd"),
    "avx2": ("avx2", "fma"),
    "portable": (),
}
NOT_ON_THIS_PROCESSOR = 77

# What costs seconds of compilation and finds nothing more is off: a null pointer faults by itself, object-size repeats
# what AddressSanitizer sees, and its checks are calls (the --param) instead of inline code.
SANITIZERS = (
    "-fsanitize=address,undefined -fno-sanitize=null,object-size -fno-sanitize-recover=all"
    " --param asan-instrumentation-with-call-threshold=0"
).split()
OPTIONS = {"ASAN_OPTIONS": "detect_leaks=0"}  # LeakSanitizer does not run where processes may not be traced


def _offered(isa: str) -> bool:
    """Whether this processor has an instruction set."""
    path = Path("/proc/cpuinfo")
    flags = path.read_text() if path.exists() else ""
    return all(re.search(rf"\b{flag}\b", flags) for flag in NEEDED[isa])


@pytest.fixture(scope="module")
def driver() -> ModuleType:
    """setup.py as a module: the compiler, the flags and the units of the real build."""
    spec = importlib.util.spec_from_file_location("ltkernels_setup_for_core", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    if module.compiler() is None:
        pytest.skip("no C++ compiler here")
    return module


@pytest.fixture(scope="module")
def core_test(driver: ModuleType) -> Path:
    """The test program, of the kernels as they are built but for optimisation, and of tests/cpp."""
    flags = [flag for flag in driver.CXX_FLAGS if not flag.startswith(("-O", "-W"))]
    flags += ["-O1", "-g1", "-fno-omit-frame-pointer", "-w", "-Icsrc", "-Itests/cpp"]
    out = "build/sanitized"

    def unit(source: str, name: str, *extra: str) -> object:
        return driver.Unit(source, f"{out}/{name}.o", (*flags, *extra))

    units = [unit("csrc/cpu/dispatch.cpp", "dispatch", *SANITIZERS)]
    suites = ("main", "kernels_suite", "sampling_suite")
    units += [unit(f"tests/cpp/{name}.cpp", name, "-fsanitize=address") for name in suites]
    for isa, extra in driver.ISA_FLAGS.items():
        kernels = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/cpu/kernels_*.cpp"))
        for source in (*kernels, "tests/cpp/simd_suite.cpp"):
            checked = SANITIZERS if _offered(isa) else ()  # what cannot be run is there to be linked
            units.append(unit(source, f"{isa}_{Path(source).stem}", f"-DLTK_ISA={isa}", *extra, *checked))
    cxx = driver.compiler()
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        list(pool.map(lambda one: one.compile(cxx, ROOT), units))
    program = ROOT / out / "core_test"
    command = [*cxx, "-fsanitize=address,undefined", *(one.object for one in units), "-o", str(program)]
    subprocess.run(command, cwd=ROOT, check=True)
    return program


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("suite", SUITES)
def test_core(core_test: Path, driver: ModuleType, suite: str, isa: str) -> None:
    if isa not in driver.ISA_FLAGS:
        pytest.skip(f"{isa} is not built on this machine")
    done = subprocess.run([core_test, suite, isa], env=os.environ | OPTIONS, capture_output=True, text=True)
    if done.returncode == NOT_ON_THIS_PROCESSOR:
        pytest.skip(f"this processor has no {isa}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{suite} {isa}: right" in done.stdout
    if suite == "exponentials":  # the worst error of a sweep that reached the function at all
        errors = [float(error) for error in re.findall(r"exp \w+: ([\d.]+) ulp", done.stdout)]
        assert len(errors) == 2 and all(0.5 < error < 2 for error in errors)


def test_at_least_the_portable_kernels_were_tested(core_test: Path) -> None:
    """`skip` above is for processors; it must not hide everything."""
    assert subprocess.run([core_test, "conversions", "portable"], env=os.environ | OPTIONS).returncode == 0
    assert subprocess.run([core_test, "nothing", "portable"], stdout=subprocess.DEVNULL).returncode == 1
    for isa in ("avx2", "avx512"):
        done = subprocess.run([core_test, "conversions", isa], env=os.environ | OPTIONS, stdout=subprocess.DEVNULL)
        assert done.returncode == (0 if _offered(isa) else NOT_ON_THIS_PROCESSOR), isa


def test_memory_errors_are_seen(driver: ModuleType, tmp_path: Path) -> None:
    """The guards of tests/cpp/check.h stop a read of one element beyond either end, and of none inside."""
    source = tmp_path / "edge.cpp"
    source.write_text(
        '#include "check.h"\n'
        "int main(int count, char** arguments) {\n"
        "  const long at = std::atol(arguments[1]);\n"
        "  test::Guarded end(12, true), start(12, false);\n"
        "  volatile float* edge = at < 0 ? start.as<float>() : end.as<float>();\n"
        "  return edge[at] == edge[at];  // NaN\n"
        "}\n"
    )
    program = tmp_path / "edge"
    subprocess.run([*driver.compiler(), "-std=c++17", "-I", ROOT / "tests/cpp", source, "-o", program], check=True)
    codes = {at: subprocess.run([program, str(at)]).returncode for at in (-1, 0, 2, 3)}
    assert codes[0] == codes[2] == 0
    assert codes[-1] < 0 and codes[3] < 0  # by a signal


def test_kernels_define_no_symbol_that_the_linker_may_merge(driver: ModuleType) -> None:
    """Of equal weak symbols the linker keeps one: a function compiled for AVX-512 might end up in the portable path.

    The objects are those of the library, with its flags. ``DW.ref.*`` is a pointer to the language's exception routine.
    """
    torch = driver.torch_directory()
    if torch is None:
        pytest.skip("torch's headers are not installed")
    units = [u for u in driver.op_library_units(ROOT, torch) if Path(u.source).name.startswith("kernels_")]
    assert {Path(unit.object).parent.name for unit in units} == set(driver.ISA_FLAGS)
    for unit in units:
        unit.compile(driver.compiler(), ROOT)  # nothing to do after a build
        lines = subprocess.run(
            ["nm", ROOT / unit.object], check=True, capture_output=True, text=True
        ).stdout.splitlines()
        symbols = [line.split()[-2:] for line in lines]
        assert any(kind in "RrDdBb" and "table" in name for kind, name in symbols), "not the object of kernels"
        assert [name for kind, name in symbols if kind in "WVuwv" and not name.startswith("DW.ref.")] == []
