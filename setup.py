"""Builds the compiled parts of ltkernels; the metadata is in pyproject.toml.

Two shared objects, both made by the C++ compiler in $CXX (default: g++, then c++):

* ``ltkernels/lib/libltkernels_cpu.so``: the operators of csrc/cpu, registered with torch by csrc/bindings through the
  LibTorch stable ABI. Independent of the Python version, and good for every torch from 2.10 on.
* ``ltkernels/_host``: the pybind11 module of csrc/host.

torch is located, never imported: its headers are enough to compile, and an import at the top of a setup.py breaks every
installer that runs it in an environment without torch. What cannot be built is left out with a notice: the reference
backend needs none of it. After a change in csrc, ``python setup.py build_ext --inplace`` compiles what it reaches.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from glob import glob
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError

OP_LIBRARY = "ltkernels.lib.libltkernels_cpu"
HOST_MODULE = "ltkernels._host"

CXX_FLAGS = (
    "-std=c++17 -O3 -fPIC -fvisibility=hidden -fno-math-errno -fno-trapping-math -ffp-contract=off -Wall -Wextra"
).split()
X86_FLAGS = {
    "avx2": "-mavx2 -mfma -mf16c".split(),
    "avx512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512cd -mfma -mf16c -mprefer-vector-width=512".split(),
}
# The order of linking. Inline functions of the standard library are emitted by every unit that calls them and the
# linker keeps the first: portable code comes first, or an older CPU could get the AVX-512 copy of vector::push_back.
ISA_FLAGS = {"portable": []} | (X86_FLAGS if platform.machine() in ("x86_64", "AMD64") else {})


@dataclass(frozen=True)
class Unit:
    """One run of the compiler: a source, its flags and the object that results, relative to the root of the tree."""

    source: str
    object: str
    flags: tuple[str, ...]

    def compile(self, cxx: Sequence[str], root: Path) -> None:
        """Compiles unless the object is newer than all that it was made of, and was made by this very command.

        Raises:
            CompileError: The compiler failed; the message holds the command.
        """
        out = root / self.object
        made_by, depends = out.with_suffix(".cmd"), out.with_suffix(".d")
        partial = out.with_suffix(".partial.o")  # killed half-way, a build leaves no object that looks finished
        command = [*cxx, *self.flags, "-MD", "-MF", str(depends), "-c", self.source, "-o", str(partial)]
        if made_by.exists() and made_by.read_text() == shlex.join(command) and _is_current(out, depends, root):
            return
        out.parent.mkdir(parents=True, exist_ok=True)
        made_by.unlink(missing_ok=True)
        print(f"compiling {self.source} -> {self.object}", flush=True)
        started = time.time_ns()
        if subprocess.run(command, cwd=root).returncode != 0:
            raise CompileError(f"failed in {root}: {shlex.join(command)}")
        os.utime(partial, ns=(started, started))  # a file that was edited meanwhile is newer
        os.replace(partial, out)
        made_by.write_text(shlex.join(command))


def _is_current(out: Path, depends: Path, root: Path) -> bool:
    """Whether `out` is newer than every file that the compiler read for it, system headers included."""
    if not (out.exists() and depends.exists()):
        return False
    made = out.stat().st_mtime_ns
    read = shlex.split(depends.read_text().replace("\\\n", " ").partition(":")[2])
    return all((root / name).exists() and (root / name).stat().st_mtime_ns < made for name in read)


def build(units: Iterable[Unit], out: Path, link_flags: Sequence[str], cxx: Sequence[str], root: Path) -> None:
    """Compiles the units on $MAX_JOBS threads (default: all cores) and links them, in their order, into `out`.

    Raises:
        CompileError: A unit does not compile.
        LinkError: The objects do not link, or a symbol is found in none of the libraries.
    """
    units = list(units)
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        list(pool.map(lambda unit: unit.compile(cxx, root), units))
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(out.name + ".partial")
    command = [*cxx, "-shared", *(unit.object for unit in units), "-o", str(partial), *link_flags]
    if subprocess.run(command, cwd=root).returncode != 0:
        raise LinkError(f"failed in {root}: {shlex.join(command)}")
    os.replace(partial, out)  # a process that has the old library mapped keeps it


def op_library_units(root: Path, torch: Path) -> list[Unit]:
    """The units of the operator library: csrc/cpu/kernels_*.cpp once per instruction set, everything else once."""
    flags = (*CXX_FLAGS, "-Icsrc")
    # -isystem: warnings in torch's headers are not ours to read.
    torch_flags = (
        "-DTORCH_TARGET_VERSION=0x020a000000000000",  # refuse what torch 2.10 does not have
        *("-isystem", str(torch / "include"), "-isystem", str(torch / "include/torch/csrc/api/include")),
    )

    def units(pattern: str, isa: str, *extra: str) -> list[Unit]:
        sources = sorted(path.relative_to(root) for path in root.glob(pattern))
        return [Unit(str(s), f"build/cpu/{isa}/{s.parent.name}_{s.stem}.o", (*flags, *extra)) for s in sources]

    bindings = units("csrc/bindings/cpu*.cpp", "baseline", *torch_flags)
    kernels = {isa: units("csrc/cpu/kernels_*.cpp", isa, f"-DLTK_ISA={isa}", *f) for isa, f in ISA_FLAGS.items()}
    repeated = {unit.source for unit in kernels["portable"]}
    once = [unit for unit in units("csrc/cpu/*.cpp", "baseline") if unit.source not in repeated]
    return [*bindings, *once, *(unit for of_isa in kernels.values() for unit in of_isa)]


def host_units(root: Path) -> list[Unit]:
    """The units of the pybind11 module, which is told the flags so that it can report them."""
    import pybind11

    flags = (*CXX_FLAGS, "-Icsrc", "-isystem", sysconfig.get_paths()["include"], "-isystem", pybind11.get_include())
    flags += (f'-DLTK_CXX_FLAGS="{" ".join(CXX_FLAGS)}"',)
    tag = sys.implementation.cache_tag
    sources = sorted(path.relative_to(root) for path in root.glob("csrc/host/*.cpp"))
    return [Unit(str(source), f"build/host-{tag}/{source.stem}.o", flags) for source in sources]


def compiler() -> list[str] | None:
    """The C++ compiler as the start of a command: $CXX (which may hold options or a wrapper), else g++, else c++."""
    asked = shlex.split(os.environ.get("CXX", ""))
    candidates = [asked] if asked else [["g++"], ["c++"]]  # never another one than the one asked for
    return next((words for words in candidates if shutil.which(words[0])), None)


def torch_directory() -> Path | None:
    """Where the torch package lies, without importing it."""
    spec = find_spec("torch")
    return Path(spec.origin).parent if spec and spec.origin else None


def obstacles() -> dict[str, str]:
    """For each compiled part that cannot be built here, the reason."""
    if sys.platform != "linux":
        return dict.fromkeys((OP_LIBRARY, HOST_MODULE), "compiled parts are built on Linux only")
    if compiler() is None:
        wanted = os.environ.get("CXX") or "g++ or c++"
        return dict.fromkeys((OP_LIBRARY, HOST_MODULE), f"no C++ compiler found (looked for {wanted})")
    found = {}
    if torch_directory() is None:
        found[OP_LIBRARY] = "torch is not installed where the build runs; pip --no-build-isolation lets it see yours"
    elif tuple(int(part) for part in version("torch").split(".")[:2]) < (2, 10):
        found[OP_LIBRARY] = f"torch >= 2.10 needed, found {version('torch')}"
    if find_spec("pybind11") is None:
        found[HOST_MODULE] = "pybind11 is not installed where the build runs"
    elif not Path(sysconfig.get_paths()["include"], "Python.h").exists():
        found[HOST_MODULE] = "the headers of Python (Python.h) are not installed"
    return found


class BuildExtension(build_ext):
    """setuptools decides where an extension goes, the functions above make it."""

    def get_ext_filename(self, fullname: str) -> str:
        if fullname.endswith(OP_LIBRARY.rpartition(".")[2]):  # no Python in it, so none in its name
            return os.path.join(*fullname.split(".")) + ".so"
        return str(super().get_ext_filename(fullname))

    def build_extension(self, ext: Extension) -> None:
        root = Path(__file__).resolve().parent
        out = Path(self.get_ext_fullpath(ext.name)).resolve()
        cxx = compiler()
        assert cxx is not None, "an extension without a compiler is never planned"
        if ext.name == HOST_MODULE:
            build(host_units(root), out, [], cxx, root)
        else:
            torch = torch_directory()
            assert torch is not None, "the operator library without torch is never planned"
            # No rpath: whoever loads the library has imported torch, and the loader takes the libtorch_cpu it has.
            link_flags = [f"-L{torch / 'lib'}", "-ltorch_cpu", "-Wl,--no-undefined"]
            build(op_library_units(root, torch), out, link_flags, cxx, root)

    def copy_file(self, infile: str, outfile: str, *args: object, **kwargs: object) -> tuple[str, bool]:
        """Into the source tree too, a library is replaced in one step: a running program may load it at any moment."""
        os.makedirs(os.path.dirname(outfile), exist_ok=True)
        super().copy_file(infile, outfile + ".partial", *args, **kwargs)
        os.replace(outfile + ".partial", outfile)
        return outfile, True


def main() -> None:
    missing = obstacles()
    folders = {OP_LIBRARY: ["csrc/bindings", "csrc/cpu"], HOST_MODULE: ["csrc/host"]}
    planned = [
        Extension(name, sorted(source for folder in folders[name] for source in glob(f"{folder}/*.cpp")))
        for name in folders
        if name not in missing
    ]
    distribution = setup(ext_modules=planned, cmdclass={"build_ext": BuildExtension})
    if distribution.have_run.get("build_py") or distribution.have_run.get("build_ext"):  # not for metadata
        for name, reason in missing.items():
            print(f"ltkernels: {name} is left out: {reason}", file=sys.stderr)


if __name__ == "__main__":
    main()
