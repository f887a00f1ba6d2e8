"""The build: setup.py's driver on small sources in the layout of csrc, then the operator library that it made."""

from __future__ import annotations

import ctypes
import importlib.util
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def driver() -> ModuleType:
    """setup.py as a module."""
    spec = importlib.util.spec_from_file_location("ltkernels_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_torch_is_found_where_pip_would_install_to(
    driver: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pip builds in isolation, with the environment's own packages off the path; nothing of torch is imported."""
    installed, asked_for = tmp_path / "site-packages", tmp_path / "overlay"
    for folder, version in ((installed, "2.12.1"), (asked_for, "2.13.0+cpu")):
        (folder / "torch").mkdir(parents=True)
        (folder / "torch/__init__.py").write_text("raise RuntimeError('the build imported torch')")
        (folder / "torch/version.py").write_text(
            f"from typing import Optional\n__version__ = '{version}'\ndebug = False\n"
        )
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(driver.site, "ENABLE_USER_SITE", False)
    monkeypatch.setattr(driver.site, "getsitepackages", lambda: [str(tmp_path)])
    assert driver.torch_directory() is None
    monkeypatch.setattr(driver, "compiler", lambda: ["c++"])
    assert "install it first" in driver.obstacles()[driver.OP_LIBRARY]

    monkeypatch.setattr(driver.site, "getsitepackages", lambda: [str(installed)])
    assert driver.torch_directory() == installed / "torch"
    assert driver.torch_version(installed / "torch") == "2.12.1"
    assert driver.OP_LIBRARY not in driver.obstacles()
    sys.path.append(str(asked_for))  # an environment that was made for the build goes first
    assert driver.torch_directory() == asked_for / "torch"
    assert driver.torch_version(asked_for / "torch") == "2.13.0+cpu"


@pytest.mark.parametrize("platform", ["darwin", "win32"])
def test_compiled_parts_are_for_linux(driver: ModuleType, monkeypatch: pytest.MonkeyPatch, platform: str) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    assert set(driver.obstacles()) == set(driver.FOLDERS)
    assert set(driver.obstacles().values()) == {"compiled parts are built on Linux only"}


TOY = {
    # Not inlined, so that every object has a copy and the linker chooses one.
    "csrc/common/twice.h": "#pragma once\n"
    "__attribute__((noinline)) inline void twice(float* x) { for (int i = 0; i < 64; ++i) x[i] *= 2; }\n",
    "csrc/cpu/kernels_toy.cpp": '#include "common/twice.h"\n'
    "namespace ltk::LTK_ISA { void run(float* x) { for (int i = 0; i < 64; ++i) x[i] += 1; twice(x); } }\n",
    "csrc/cpu/toy.cpp": "namespace ltk::portable { void run(float*); }\n"
    'extern "C" __attribute__((visibility("default"))) void toy(float* x) { ltk::portable::run(x); }\n',
    "csrc/bindings/cpu_toy.cpp": "#ifndef TORCH_TARGET_VERSION\n#error which torch?\n#endif\n",
}


@pytest.fixture
def toy(tmp_path: Path, driver: ModuleType) -> Path:
    if driver.compiler() is None:
        pytest.skip("no C++ compiler here")
    for name, text in TOY.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def make(driver: ModuleType, root: Path, capfd: pytest.CaptureFixture[str], *flags: str) -> list[str]:
    """Builds the toy library; the objects that were compiled for it."""
    units = driver.op_library_units(root, Path("torch"))
    driver.build(units, root / "toy.so", flags, driver.compiler(), root)
    return re.findall(r"-> build/cpu/(\S+)\.o", capfd.readouterr().out)


def test_kernels_are_compiled_once_per_instruction_set_portable_first(driver: ModuleType, toy: Path) -> None:
    objects = [unit.object for unit in driver.op_library_units(toy, toy / "torch")]
    kernels = [f"build/cpu/{isa}/cpu_kernels_toy.o" for isa in driver.ISA_FLAGS]
    assert objects == ["build/cpu/baseline/bindings_cpu_toy.o", "build/cpu/baseline/cpu_toy.o", *kernels]
    assert next(iter(driver.ISA_FLAGS)) == "portable"


def test_rebuild_compiles_what_changed_and_no_more(
    driver: ModuleType, toy: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = [f"{isa}/cpu_kernels_toy" for isa in driver.ISA_FLAGS]
    monkeypatch.setenv("MAX_JOBS", "1")  # in order
    assert make(driver, toy, capfd) == ["baseline/bindings_cpu_toy", "baseline/cpu_toy", *kernels]
    assert make(driver, toy, capfd) == []

    values = (ctypes.c_float * 64)(1.5)
    ctypes.CDLL(str(toy / "toy.so")).toy(values)
    assert values[:2] == [5.0, 2.0]  # (x + 1) * 2

    time.sleep(0.01)
    header = toy / "csrc/common/twice.h"
    header.write_text(header.read_text().replace("*= 2", "*= 3"))
    assert make(driver, toy, capfd) == kernels

    monkeypatch.setattr(driver, "CXX_FLAGS", [*driver.CXX_FLAGS, "-DOTHER"])  # a flag
    assert len(make(driver, toy, capfd)) == 2 + len(kernels)

    (toy / "build/cpu/baseline/cpu_toy.cmd").unlink()  # as after a build that was killed
    assert make(driver, toy, capfd) == ["baseline/cpu_toy"]


def test_a_copy_of_the_tree_compiles_nothing_again(
    driver: ModuleType, toy: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """tests/test_wheel.py counts on that, and so does whoever moves a checkout."""
    time.sleep(0.01)  # the sources are older than the objects
    assert make(driver, toy, capfd) != []
    shutil.copytree(toy, toy / "copy")
    assert make(driver, toy / "copy", capfd) == []


def test_failed_build_raises_and_leaves_the_library_alone(
    driver: ModuleType, toy: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    make(driver, toy, capfd)
    before = (toy / "toy.so").read_bytes()
    time.sleep(0.01)
    source = toy / "csrc/cpu/toy.cpp"
    source.write_text("int broken(")
    for _ in range(2):  # the old object must not pass for the new one the second time
        with pytest.raises(driver.CompileError, match=r"csrc/cpu/toy\.cpp"):
            make(driver, toy, capfd)
    source.write_text(
        'namespace portable { float run(int*); }\nextern "C" float toy() { return portable::run(nullptr); }\n'
    )
    with pytest.raises(driver.LinkError):
        make(driver, toy, capfd, "-Wl,--no-undefined")
    assert (toy / "toy.so").read_bytes() == before


def test_missing_compiler_is_named(driver: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -O1")
    assert set(driver.obstacles().values()) == {"no C++ compiler found (looked for no-such-compiler -O1)"}


@pytest.mark.parametrize(("found", "accepted"), [("2.9.1", False), ("2.10.0+cu130", True), ("3.0.0a0", True)])
def test_old_torch_is_named(driver: ModuleType, monkeypatch: pytest.MonkeyPatch, found: str, accepted: bool) -> None:
    monkeypatch.setattr(driver, "torch_version", lambda torch: found)
    monkeypatch.setattr(driver, "torch_directory", lambda: Path("torch"))
    monkeypatch.setattr(driver, "compiler", lambda: ["c++"])
    reason = driver.obstacles().get(driver.OP_LIBRARY)
    assert reason == (None if accepted else f"torch >= 2.10 needed, found {found}")


@pytest.fixture(scope="module")
def library(driver: ModuleType) -> Path:
    if reason := driver.obstacles().get(driver.OP_LIBRARY):
        pytest.skip(reason)
    path = ROOT / "ltkernels/lib/libltkernels_cpu.so"
    assert path.exists(), "not built: run python setup.py build_ext --inplace"
    return path


@pytest.fixture
def toolkit(driver: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose nvcc tells of a toolkit elsewhere, like a script on $PATH in front of the real one, and knows no
    sm_100; and a nvidia-smi that sees no GPU."""
    folder, real = tmp_path / "wrapper/bin", tmp_path / "cuda"
    folder.mkdir(parents=True)
    (real / "lib").mkdir(parents=True)
    write_program(
        folder / "nvcc",
        f"""case $1 in
  --list-gpu-code) printf 'sm_80\\nsm_86\\nsm_90\\n' ;;
  --dryrun) echo '#$ INCLUDES="-I{real}/bin/../include"  ' >&2
            echo '#$ LIBRARIES=  "-L{real}/lib/stubs" "-L{real}/lib"' >&2 ;;
esac""",
    )
    write_program(folder / "nvidia-smi", "exit 9")
    monkeypatch.setenv("CUDA_HOME", str(folder.parent))
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.delenv("LTK_CUDA_ARCHS", raising=False)
    monkeypatch.delenv("LTK_CUDA", raising=False)
    return folder


def write_program(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def test_toolkit_lies_where_nvcc_says(driver: ModuleType, toolkit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = toolkit.parents[1] / "cuda"
    expected = driver.Cuda(str(toolkit / "nvcc"), (str(real / "include"),), (str(real / "lib"),))
    assert driver.find_cuda() == expected
    monkeypatch.delenv("CUDA_HOME")
    assert driver.find_cuda().include == (str(real / "include"),)  # on $PATH


def test_missing_nvcc_leaves_out_the_cuda_library_alone(
    driver: ModuleType, toolkit: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "torch_version", lambda torch: "2.10.0")
    monkeypatch.setattr(driver, "compiler", lambda: ["c++"])
    monkeypatch.setattr(driver, "torch_directory", lambda: Path("torch"))
    assert driver.CUDA_LIBRARY not in driver.obstacles()
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    reasons = driver.obstacles()
    assert reasons[driver.CUDA_LIBRARY] == "no nvcc found (looked in /nowhere/bin)"
    assert driver.OP_LIBRARY not in reasons
    monkeypatch.setenv("LTK_CUDA", "0")
    assert driver.obstacles()[driver.CUDA_LIBRARY] == "LTK_CUDA=0 asks for a build without it"


@pytest.mark.parametrize(
    ("gpus", "asked", "expected"),
    [
        ("", None, ("80+PTX", "90a")),  # the toolkit knows no sm_100
        ("9.0\n8.6\n9.0", None, ("86", "90a")),
        ("10.0", None, ("80+PTX", "90a")),  # a GPU newer than the toolkit translates the PTX
        ("7.5", None, ("80+PTX", "90a")),  # one that the kernels do not run on
        ("[N/A]", None, ("80+PTX", "90a")),
        ("9.0", "90a;100", ("90a", "100")),
    ],
)
def test_architectures(
    driver: ModuleType, toolkit: Path, monkeypatch: pytest.MonkeyPatch, gpus: str, asked: str | None, expected: object
) -> None:
    if gpus:
        write_program(toolkit / "nvidia-smi", f"printf '{gpus}\n'")
    if asked is not None:
        monkeypatch.setenv("LTK_CUDA_ARCHS", asked)
    assert driver.cuda_archs(driver.find_cuda()) == expected


def test_units_of_the_cuda_library(driver: ModuleType, toolkit: Path, tmp_path: Path) -> None:
    for name in ("csrc/cuda/toy.cu", "csrc/bindings/cuda_toy.cpp", "csrc/bindings/cpu_toy.cpp"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    cuda = driver.find_cuda()
    binding, kernels = driver.cuda_units(tmp_path, Path("torch"), cuda, ("80+PTX", "90a"))
    assert (binding.source, kernels.source) == ("csrc/bindings/cuda_toy.cpp", "csrc/cuda/toy.cu")
    assert (binding.nvcc, kernels.nvcc) == (None, cuda.nvcc)
    assert "-DUSE_CUDA" in binding.flags and "-DTORCH_TARGET_VERSION=0x020a000000000000" in binding.flags
    assert [flag for flag in kernels.flags if flag.startswith("-gencode")] == [
        "-gencode=arch=compute_80,code=[sm_80,compute_80]",
        "-gencode=arch=compute_90a,code=[sm_90a]",
    ]
    assert not any("torch" in flag for flag in kernels.flags)


def test_tree_without_kernels_has_no_cuda_part(
    driver: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert "csrc/bindings/cuda.cpp" in driver.parts()[driver.CUDA_LIBRARY]
    monkeypatch.chdir(tmp_path)
    assert set(driver.parts()) == {driver.OP_LIBRARY, driver.HOST_MODULE}


def test_emulated_library_is_made_by_the_cpp_compiler(
    driver: ModuleType, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    if driver.compiler() is None or driver.torch_directory() is None:
        pytest.skip("no C++ compiler or no torch here")
    (tmp_path / "csrc/cuda").mkdir(parents=True)
    (tmp_path / "csrc/cuda/toy.cu").write_text(
        "#if defined(LTK_EMULATE) && !defined(__CUDACC__)\n"
        'extern "C" __attribute__((visibility("default"))) int toy() { return 7; }\n'
        "#endif\n"
    )
    for compiled in (1, 0):
        driver.build_emulated(tmp_path, tmp_path / "emulated.so")
        assert capfd.readouterr().out.count("compiling csrc/cuda/toy.cu") == compiled
    assert ctypes.CDLL(str(tmp_path / "emulated.so")).toy() == 7


@pytest.fixture(scope="module")
def cuda_library(driver: ModuleType) -> Path:
    if reason := driver.obstacles().get(driver.CUDA_LIBRARY):
        pytest.skip(reason)
    path = ROOT / "ltkernels/lib/libltkernels_cuda.so"
    assert path.exists(), "not built: run python setup.py build_ext --inplace"
    return path


def symbols(library: Path, which: str) -> dict[str, str]:
    """Dynamic symbols of a library and their kinds."""
    return {line.split()[-1]: line.split()[-2] for line in tool("nm", "-D", which, library).splitlines()}


def test_cuda_library_asks_torch_only_for_its_stable_c_interface(cuda_library: Path, driver: ModuleType) -> None:
    """Of what only a torch with CUDA has, it asks for the stream alone: nothing here would notice a misspelled name."""
    undefined = {name for name, kind in symbols(cuda_library, "--undefined-only").items() if kind == "U"}
    from_torch = {name for name in undefined if "@" not in name}
    assert [name for name in from_torch if not name.startswith(("aoti_torch_", "torch_"))] == []
    assert [name for name in undefined if re.match(r"_ZN?K?(2at|3c10|5torch)", name)] == []
    offered = symbols(driver.torch_directory() / "lib/libtorch_cpu.so", "--defined-only")
    assert from_torch - set(offered) <= {"aoti_torch_get_current_cuda_stream"}
    assert "aoti_torch_get_current_cuda_stream" in from_torch


def test_cuda_library_finds_torch_and_shares_no_runtime(cuda_library: Path) -> None:
    """The loader looks a symbol up in the libraries that are named here, not in all that Python has loaded. The CUDA
    runtime is inside, and hidden: torch brings its own."""
    dynamic = tool("readelf", "-d", cuda_library)
    assert "RPATH" not in dynamic and "RUNPATH" not in dynamic
    needed = re.findall(r"NEEDED.*\[(.+?)\]", dynamic)
    assert {name for name in needed if re.search("torch|c10|cuda", name)} == {"libtorch_cuda.so", "libtorch_cpu.so"}
    assert [name for name in symbols(cuda_library, "--defined-only") if re.match(r"_*cuda[A-Z]", name)] == []


def tool(*command: str | Path) -> str:
    return subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True).stdout


def test_library_asks_torch_only_for_its_stable_c_interface(library: Path) -> None:
    undefined = [line.split() for line in tool("nm", "-D", "--undefined-only", library).splitlines()]
    strong = [name for kind, name in undefined if kind == "U"]
    from_torch = [name for name in strong if "@" not in name]  # libc's and libstdc++'s names carry a version
    assert from_torch, "a library that asks torch for nothing registers nothing"
    assert [name for name in from_torch if not name.startswith(("aoti_torch_", "torch_"))] == []
    assert [name for name in strong if re.match(r"_ZN?K?(2at|3c10|5torch)", name)] == []


@pytest.mark.parametrize("which", ["library", "cuda_library"])
def test_the_oldest_supported_torch_has_all_that_is_asked_for(which: str, request: pytest.FixtureRequest) -> None:
    """A function that is newer than that stops an older torch from loading the library. The list is of a torch without
    CUDA, which has no stream."""
    listed = (ROOT / "tests/data/torch_2.10_symbols.txt").read_text().splitlines()
    offered = {line for line in listed if not line.startswith("#")} | {"aoti_torch_get_current_cuda_stream"}
    undefined = symbols(request.getfixturevalue(which), "--undefined-only")
    asked_for = {name for name, kind in undefined.items() if kind == "U" and "@" not in name}
    assert asked_for - offered == set()
    assert len(asked_for) > 20  # that of a library which registers operators and takes tensors apart


def test_library_finds_torch_where_it_is_loaded(library: Path) -> None:
    dynamic = tool("readelf", "-d", library)
    assert "RPATH" not in dynamic and "RUNPATH" not in dynamic
    needed = re.findall(r"NEEDED.*\[(.+?)\]", dynamic)
    assert [name for name in needed if "torch" in name or "c10" in name] == ["libtorch_cpu.so"]


def strays(library: Path) -> set[str]:
    """Functions with AVX instructions outside the namespace of an instruction set that has them."""
    found, function = set(), ""
    for line in tool("objdump", "-d", "--no-show-raw-insn", library).splitlines():
        if line.endswith(">:"):
            function = line.split("<")[1][:-2]
        elif "%zmm" in line and "6avx512" not in function:
            found.add(function)
        elif re.search(r":\s+v(?!er[rw])", line) and "6avx512" not in function and "4avx2" not in function:
            found.add(function)
    return found


def test_wide_instructions_stay_in_their_namespaces(library: Path, driver: ModuleType) -> None:
    """An inline function that the linker took from an AVX-512 object would stop an older CPU whatever is dispatched."""
    assert strays(library) == set()
    assert ("%zmm" in tool("objdump", "-d", library)) == ("avx512" in driver.ISA_FLAGS)


def test_link_order_decides_which_inline_function_survives(driver: ModuleType, toy: Path) -> None:
    """Shows that the order matters, and that the test above sees it."""
    if "avx512" not in driver.ISA_FLAGS:
        pytest.skip("one instruction set on this machine")
    units = driver.op_library_units(toy, toy / "torch")
    for order, expected in ((units, set()), (units[::-1], {"_Z5twicePf"})):
        driver.build(order, toy / "toy.so", [], driver.compiler(), toy)
        assert strays(toy / "toy.so") == expected
