"""Builds the compiled parts of ltkernels; the metadata is in pyproject.toml.

Three shared objects, made by the C++ compiler in $CXX (default: g++, then c++) and by nvcc:

* ``ltkernels/lib/libltkernels_cpu.so``: the operators of csrc/cpu, registered with torch by csrc/bindings through the
  LibTorch stable ABI. Independent of the Python version, and good for every torch from 2.10 on.
* ``ltkernels/lib/libltkernels_cuda.so``: the same of csrc/cuda, where nvcc is found: in $CUDA_HOME/bin, on $PATH or in
  /usr/local/cuda/bin. A torch without CUDA is enough to build it, though not to load it. ``LTK_CUDA=0`` leaves it out,
  ``LTK_CUDA_ARCHS="90a;100"`` says for which GPUs; nvcc's own variable for its host compiler is NVCC_CCBIN.
* ``ltkernels/_host``: the pybind11 module of csrc/host.

torch is located, never imported: its headers are enough to compile, and an import at the top of a setup.py breaks every
installer that runs it in an environment without torch. What cannot be built is left out with a notice: the reference
backend needs none of it. After a change in csrc, ``python setup.py build_ext --inplace`` compiles what it reaches.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from glob import glob
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError

OP_LIBRARY = "ltkernels.lib.libltkernels_cpu"
CUDA_LIBRARY = "ltkernels.lib.libltkernels_cuda"
HOST_MODULE = "ltkernels._host"
FOLDERS = {
    OP_LIBRARY: ("csrc/bindings/cpu*.cpp", "csrc/cpu/*.cpp"),
    CUDA_LIBRARY: ("csrc/bindings/cuda*.cpp", "csrc/cuda/*.cu"),
    HOST_MODULE: ("csrc/host/*.cpp",),
}

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

NVCC_FLAGS = "-std=c++17 -O3 --expt-relaxed-constexpr -Xcompiler -fPIC,-fvisibility=hidden".split()
# Without a GPU to ask: A100, H100 and B200, and as PTX what every GPU from A100 on can translate for itself.
CUDA_ARCHS = ("80+PTX", "90a", "100")


@dataclass(frozen=True)
class Unit:
    """One run of a compiler: a source, its flags and the object that results, relative to the root of the tree."""

    source: str
    object: str
    flags: tuple[str, ...]
    nvcc: str | None = None  # compiles instead of the C++ compiler

    def compile(self, cxx: Sequence[str], root: Path) -> None:
        """Compiles unless the object is newer than all that it was made of, and was made by this very command.

        Raises:
            CompileError: The compiler failed; the message holds the command.
        """
        out = root / self.object
        made_by, depends = out.with_suffix(".cmd"), out.with_suffix(".d")
        partial = out.with_suffix(".partial.o")  # killed half-way, a build leaves no object that looks finished
        compiler = [self.nvcc] if self.nvcc else cxx
        # Relative, so that the objects of a tree that was copied or moved are still made by this very command.
        files = ["-MF", str(depends.relative_to(root)), "-c", self.source, "-o", str(partial.relative_to(root))]
        command = [*compiler, *self.flags, "-MD", *files]
        if made_by.exists() and made_by.read_text() == shlex.join(command) and _is_current(out, depends, root):
            return
        out.parent.mkdir(parents=True, exist_ok=True)
        made_by.unlink(missing_ok=True)
        print(f"compiling {self.source} -> {self.object}\n", end="", flush=True)  # whole lines, from every thread
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


def units_of(root: Path, pattern: str, folder: str, flags: Sequence[str], nvcc: str | None = None) -> list[Unit]:
    """A unit for each source that matches, with its object in `folder`."""
    sources = sorted(path.relative_to(root) for path in root.glob(pattern))
    return [Unit(str(s), f"{folder}/{s.parent.name}_{s.stem}.o", tuple(flags), nvcc) for s in sources]


def torch_flags(torch: Path) -> tuple[str, ...]:
    """What sources that include torch's headers need."""
    return (
        "-DTORCH_TARGET_VERSION=0x020a000000000000",  # refuse what torch 2.10 does not have
        # -isystem: warnings in torch's headers are not ours to read.
        *("-isystem", str(torch / "include"), "-isystem", str(torch / "include/torch/csrc/api/include")),
    )


def op_library_units(root: Path, torch: Path) -> list[Unit]:
    """The units of the operator library: csrc/cpu/kernels_*.cpp once per instruction set, everything else once."""

    def units(pattern: str, isa: str, *extra: str) -> list[Unit]:
        return units_of(root, pattern, f"build/cpu/{isa}", (*CXX_FLAGS, "-Icsrc", *extra))

    bindings = units("csrc/bindings/cpu*.cpp", "baseline", *torch_flags(torch))
    kernels = {isa: units("csrc/cpu/kernels_*.cpp", isa, f"-DLTK_ISA={isa}", *f) for isa, f in ISA_FLAGS.items()}
    repeated = {unit.source for unit in kernels["portable"]}
    once = [unit for unit in units("csrc/cpu/*.cpp", "baseline") if unit.source not in repeated]
    return [*bindings, *once, *(unit for of_isa in kernels.values() for unit in of_isa)]


@dataclass(frozen=True)
class Cuda:
    """A CUDA toolkit: its compiler, and where that says its headers and libraries lie."""

    nvcc: str
    include: tuple[str, ...]
    libraries: tuple[str, ...]

    def knows(self, arch: str) -> bool:
        """Whether this nvcc compiles for an architecture; 90a is listed as 90."""
        listed = _output(self.nvcc, "--list-gpu-code")
        return f"sm_{re.sub('[^0-9].*', '', arch)}" in listed.split()


def _output(*command: str) -> str:
    """What a command prints, errors included; nothing if it cannot be run or fails."""
    try:
        run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return run.stdout if run.returncode == 0 else ""


def find_cuda() -> Cuda | None:
    """The toolkit of $CUDA_HOME, else of the nvcc on $PATH, else of /usr/local/cuda."""
    home = os.environ.get("CUDA_HOME")
    candidates = [f"{home}/bin/nvcc"] if home else ["nvcc", "/usr/local/cuda/bin/nvcc"]
    for nvcc in filter(None, map(shutil.which, candidates)):
        # The nvcc on $PATH may be a script or a link in another folder; it knows itself what it belongs to.
        plan = _output(nvcc, "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull)
        include, libraries = (
            tuple(os.path.normpath(found) for found in re.findall(rf'"?{flag}(/[^"\s]+)"?', line))
            for name, flag in (("INCLUDES", "-I"), ("LIBRARIES", "-L"))
            for line in [next((line for line in plan.splitlines() if line.startswith(f"#$ {name}=")), "")]
        )
        if include:
            return Cuda(nvcc, include, tuple(folder for folder in libraries if Path(folder).is_dir()))
    return None


def cuda_archs(cuda: Cuda) -> tuple[str, ...]:
    """What to compile for: what $LTK_CUDA_ARCHS says, else the GPUs of this machine, else CUDA_ARCHS."""
    if asked := os.environ.get("LTK_CUDA_ARCHS"):
        return tuple(filter(None, re.split(r"[;,\s]+", asked)))
    found = _output("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader")
    present = sorted({major + minor for major, minor in re.findall(r"^(\d+)\.(\d)\s*$", found, re.MULTILINE)}, key=int)
    present = ["90a" if arch == "90" else arch for arch in present if int(arch) >= 80]
    if present and all(map(cuda.knows, present)):
        return tuple(present)
    return tuple(filter(cuda.knows, CUDA_ARCHS))


def cuda_units(root: Path, torch: Path, cuda: Cuda, archs: Sequence[str]) -> list[Unit]:
    """The units of the CUDA library. Each set of architectures has its own objects."""
    folder = f"build/cuda/{'_'.join(archs)}"
    flags = [
        *CXX_FLAGS,
        "-Icsrc",
        "-DUSE_CUDA",
        *torch_flags(torch),
        *(w for i in cuda.include for w in ("-isystem", i)),
    ]
    gencode = []
    for arch, ptx in ((arch.removesuffix("+PTX"), arch.endswith("+PTX")) for arch in archs):
        gencode.append(f"-gencode=arch=compute_{arch},code=[sm_{arch}{f',compute_{arch}' if ptx else ''}]")
    return [
        *units_of(root, "csrc/bindings/cuda*.cpp", folder, flags),
        *units_of(root, "csrc/cuda/*.cu", folder, [*NVCC_FLAGS, "-Icsrc", *gencode], cuda.nvcc),
    ]


def build_cuda(root: Path, out: Path, torch: Path, cuda: Cuda, cxx: Sequence[str]) -> None:
    """Makes the CUDA library.

    It has to name libtorch_cuda.so as a library that it needs: the loader does not look into what Python has loaded for
    itself. Where torch has no such file, it still can: an empty library of that name stands in for it. What the library
    asks of it stays undefined until it is loaded, and tests/test_build.py looks at the names.
    """
    stub = root / "build/cuda/stub/libtorch_cuda.so"
    stub.parent.mkdir(parents=True, exist_ok=True)
    command = [*cxx, "-shared", "-x", "c++", os.devnull, f"-Wl,-soname,{stub.name}", "-o", str(stub)]
    if subprocess.run(command, cwd=root).returncode != 0:
        raise LinkError(f"failed in {root}: {shlex.join(command)}")
    runtime = [*(f"-L{folder}" for folder in cuda.libraries), "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
    # --exclude-libs: torch brings a CUDA runtime of its own, the two must not find each other's functions.
    torch_libraries = ["-Wl,--no-as-needed", str(stub), f"-L{torch / 'lib'}", "-ltorch_cpu"]
    units = cuda_units(root, torch, cuda, cuda_archs(cuda))
    build(units, out, [*torch_libraries, *runtime, "-Wl,--exclude-libs,ALL"], cxx, root)


def emulated_units(root: Path, torch: Path) -> list[Unit]:
    """The units of the CUDA kernels and their bindings compiled for the CPU (csrc/cuda/emulated.h)."""
    optimised = [flag for flag in CXX_FLAGS if not flag.startswith("-O")]
    flags = [*optimised, "-O2", "-Wno-unknown-pragmas", "-DLTK_EMULATE", "-Icsrc"]
    return [
        *units_of(root, "csrc/bindings/cuda*.cpp", "build/emulated", [*flags, *torch_flags(torch)]),
        *units_of(root, "csrc/cuda/*.cu", "build/emulated", [*flags, "-x", "c++"]),
    ]


def build_emulated(root: Path, out: Path) -> None:
    """Makes the library for tests without a GPU: the CUDA kernels, run on the CPU for CPU tensors.

    Raises:
        RuntimeError: There is no C++ compiler, or no torch.
    """
    cxx, torch = compiler(), torch_directory()
    if cxx is None or torch is None:
        raise RuntimeError("the emulated kernels need a C++ compiler and torch")
    build(emulated_units(root, torch), out, [f"-L{torch / 'lib'}", "-ltorch_cpu", "-Wl,--no-undefined"], cxx, root)


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


def package_folders() -> list[str]:
    """Where torch may lie: where Python imports from, then where pip installs to.

    pip builds in isolation: it takes the second off the path of the first, since what is there was not asked for. But
    torch is too large to be asked for once more, its headers and the names in its library are all that is needed, and
    the torch that ltkernels is going to run with is the best one to take them from.
    """
    return [*sys.path, *site.getsitepackages(), *([site.getusersitepackages()] if site.ENABLE_USER_SITE else [])]


def torch_directory() -> Path | None:
    """Where the torch package lies, without importing it."""
    spec = PathFinder.find_spec("torch", package_folders())
    return Path(spec.origin).parent if spec and spec.origin else None


def torch_version(torch: Path) -> str:
    """The version of the torch package in that folder, without importing it."""
    (found,) = re.findall(r"^__version__ = '(.+)'", (torch / "version.py").read_text(), re.MULTILINE)
    return str(found)


def obstacles() -> dict[str, str]:
    """For each compiled part that cannot be built here, the reason."""
    if sys.platform != "linux":
        return dict.fromkeys(FOLDERS, "compiled parts are built on Linux only")
    if compiler() is None:
        wanted = os.environ.get("CXX") or "g++ or c++"
        return dict.fromkeys(FOLDERS, f"no C++ compiler found (looked for {wanted})")
    found = {}
    if os.environ.get("LTK_CUDA") == "0":
        found[CUDA_LIBRARY] = "LTK_CUDA=0 asks for a build without it"
    elif find_cuda() is None:
        wanted = os.environ.get("CUDA_HOME")
        found[CUDA_LIBRARY] = (
            f"no nvcc found (looked in {wanted + '/bin' if wanted else '$PATH and /usr/local/cuda/bin'})"
        )
    if (torch := torch_directory()) is None:
        reason = "torch is not installed where the build runs; install it first, or let pip --no-build-isolation see it"
        found |= dict.fromkeys((OP_LIBRARY, CUDA_LIBRARY), reason)
    elif tuple(int(part) for part in torch_version(torch).split(".")[:2]) < (2, 10):
        found |= dict.fromkeys((OP_LIBRARY, CUDA_LIBRARY), f"torch >= 2.10 needed, found {torch_version(torch)}")
    if find_spec("pybind11") is None:
        found[HOST_MODULE] = "pybind11 is not installed where the build runs"
    elif not Path(sysconfig.get_paths()["include"], "Python.h").exists():
        found[HOST_MODULE] = "the headers of Python (Python.h) are not installed"
    return found


class BuildExtension(build_ext):
    """setuptools decides where an extension goes, the functions above make it."""

    def get_ext_filename(self, fullname: str) -> str:
        if not fullname.endswith(HOST_MODULE.rpartition(".")[2]):  # no Python in it, so none in its name
            return os.path.join(*fullname.split(".")) + ".so"
        return str(super().get_ext_filename(fullname))

    def build_extension(self, ext: Extension) -> None:
        root = Path(__file__).resolve().parent
        out = Path(self.get_ext_fullpath(ext.name)).resolve()
        cxx = compiler()
        assert cxx is not None, "an extension without a compiler is never planned"
        if ext.name == HOST_MODULE:
            build(host_units(root), out, [], cxx, root)
            return
        torch = torch_directory()
        assert torch is not None, "an operator library without torch is never planned"
        if ext.name == CUDA_LIBRARY:
            cuda = find_cuda()
            assert cuda is not None, "the CUDA library without nvcc is never planned"
            try:
                build_cuda(root, out, torch, cuda, cxx)
            except (CompileError, LinkError) as error:
                raise type(error)(f"{error}\nLTK_CUDA=0 builds ltkernels without it") from None
        else:
            # No rpath: whoever loads the library has imported torch, and the loader takes the libtorch_cpu it has.
            link_flags = [f"-L{torch / 'lib'}", "-ltorch_cpu", "-Wl,--no-undefined"]
            build(op_library_units(root, torch), out, link_flags, cxx, root)

    def copy_file(self, infile: str, outfile: str, *args: object, **kwargs: object) -> tuple[str, bool]:
        """Into the source tree too, a library is replaced in one step: a running program may load it at any moment."""
        os.makedirs(os.path.dirname(outfile), exist_ok=True)
        super().copy_file(infile, outfile + ".partial", *args, **kwargs)
        os.replace(outfile + ".partial", outfile)
        return outfile, True


def parts() -> dict[str, list[str]]:
    """The compiled parts of the tree in the working directory, with their sources."""
    sources = {name: sorted(s for pattern in patterns for s in glob(pattern)) for name, patterns in FOLDERS.items()}
    if not any(source.endswith(".cu") for source in sources[CUDA_LIBRARY]):
        del sources[CUDA_LIBRARY]  # bindings of nothing
    return sources


def main() -> None:
    missing = obstacles()
    sources = parts()
    planned = [Extension(name, sources[name]) for name in sources if name not in missing]
    distribution = setup(ext_modules=planned, cmdclass={"build_ext": BuildExtension})
    if distribution.have_run.get("build_py") or distribution.have_run.get("build_ext"):  # not for metadata
        for name in sources:
            if name in missing:
                print(f"ltkernels: {name} is left out: {missing[name]}", file=sys.stderr)


if __name__ == "__main__":
    main()
