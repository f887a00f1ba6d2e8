"""What a stranger gets: the sdist, the wheel, an install without a compiler, and the public names.

The wheel is built from the sdist and the sdist from a copy of the tree, so a file that is missing from either shows up
here. It is built where no compiler can be found and importing torch is an error: that path has to work, and costs
seconds. What the compiler makes is the subject of test_build.py, the wheel that has it in it of test_wheel.py.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import installs
import pytest
from packaging.requirements import Requirement

import ltkernels

ROOT = installs.ROOT


def python(*arguments: str, cwd: Path, **environment: str) -> str:
    """Runs this interpreter; its standard output."""
    run = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked sdist of a copy of the tree."""
    folder = tmp_path_factory.mktemp("sdist")
    return installs.unpack(installs.make_sdist(folder), folder)


@pytest.fixture(scope="module")
def pure(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """The wheel that the sdist gives where there is no compiler, its folder when unpacked, and the build's log."""
    folder = tmp_path_factory.mktemp("wheel")
    (folder / "trap/torch").mkdir(parents=True)
    (folder / "trap/torch/__init__.py").write_text("raise RuntimeError('the build imported torch')")
    (folder / "bin").mkdir()
    environment = {"PATH": str(folder / "bin"), "PYTHONPATH": str(folder / "trap"), "CXX": ""}
    wheel, said = installs.make_wheel(sdist, folder, **environment)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "installed")  # all that installing a pure wheel does, its console script apart
    return wheel, folder / "installed", said


@pytest.fixture(scope="module")
def metadata(pure: tuple[Path, Path, str]) -> Message:
    (path,) = pure[1].glob("*.dist-info/METADATA")
    return Parser().parsestr(path.read_text())


def test_sdist_holds_the_sources(sdist: Path) -> None:
    for pattern in ("ltkernels/**/*.py", "csrc/**/*.cpp", "csrc/**/*.h", "tests/**/*.py", "python/**/*.py"):
        expected = {path.relative_to(ROOT) for path in ROOT.glob(pattern)}
        assert expected <= {path.relative_to(sdist) for path in sdist.glob(pattern)}, pattern
    for name in ("LICENSE", "CHANGELOG.md", "README.md", "Makefile", "requirements.txt"):
        assert (sdist / name).exists(), name
    assert not list(sdist.rglob("*.so"))
    for page in (sdist / "README.md", *(sdist / "docs").rglob("*.md")):
        for picture in re.findall(r"!\[[^\]]*\]\((?!https?:)([^)#]+)\)", page.read_text()):
            assert (page.parent / picture).exists(), f"{page.name}: {picture}"


def test_wheel_without_compiler_is_pure_and_says_why(pure: tuple[Path, Path, str]) -> None:
    wheel, installed, log = pure
    assert wheel.name == f"ltkernels-{ltkernels.__version__}-py3-none-any.whl"
    for part in ("ltkernels.lib.libltkernels_cpu", "ltkernels._host"):
        assert f"{part} is left out: no C++ compiler found (looked for g++ or c++)" in log
    expected = {path.relative_to(ROOT) for path in ROOT.glob("ltkernels/**/*.py")} | {Path("ltkernels/py.typed")}
    assert {path.relative_to(installed) for path in installed.rglob("*") if path.is_file()} >= expected
    assert {path.name for path in installed.iterdir()} == {"ltkernels", f"ltkernels-{ltkernels.__version__}.dist-info"}


def test_pure_install_computes_on_the_reference_backend_and_says_so_once(
    pure: tuple[Path, Path, str], tmp_path: Path
) -> None:
    program = """
import json, sys, warnings
import torch, ltkernels as ltk
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    losses = [ltk.functional.cross_entropy(torch.zeros(2, 4), torch.tensor([1, 3])).item() for _ in range(3)]
print(json.dumps([ltk.__file__, ltk.available_backends("cpu"), losses, [str(w.message) for w in caught]]))
"""
    file, backends, losses, warned = json.loads(python("-c", program, cwd=tmp_path, PYTHONPATH=str(pure[1])))
    assert Path(file).is_relative_to(pure[1])
    assert backends == ["reference"]
    assert losses == pytest.approx([1.3862943649] * 3)  # log 4
    assert len(warned) == 1 and "libltkernels_cpu.so was not built" in warned[0]

    info = json.loads(python("-m", "ltkernels", "info", "--json", cwd=tmp_path, PYTHONPATH=str(pure[1])))
    assert info["build"] is None and info["instruction_set"] is None
    assert "without a C++ compiler" in info["backends"]["cpu"]


def test_pure_install_works_where_the_source_tree_is_not(pure: tuple[Path, Path, str], tmp_path: Path) -> None:
    python = installs.fresh_environment(tmp_path / "environment")
    installs.install(python, "--no-index", pure[0])
    said = installs.run(python, installs.SMOKE, "--pure", cwd=tmp_path)
    assert said.splitlines()[1].split() == ["ok", "backend:", "reference"]


def test_without_torch_the_command_says_what_to_do(pure: tuple[Path, Path, str], tmp_path: Path) -> None:
    """`pip install --no-deps` leaves such an installation. Without its site folders, Python finds no torch."""
    run = subprocess.run(
        [sys.executable, "-S", "-m", "ltkernels", "info"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(pure[1])},
        capture_output=True,
        text=True,
    )
    message = "ltkernels: torch cannot be imported (No module named 'torch'); `pip install 'torch>=2.10'` brings one\n"
    assert (run.returncode, run.stdout, run.stderr) == (1, "", message)


@pytest.mark.parametrize(
    ("pretend", "reason"),
    [
        (
            "torch.__version__ = torch.torch_version.TorchVersion('2.9.1')",
            "torch 2.10 or later needed, found 2.9.1; `pip",
        ),
        (
            "backends._LIBRARY = backends.Path('nowhere')",
            "nowhere was not built: ltkernels was installed without a C++",
        ),
        (
            "sys.platform, backends._LIBRARY = 'darwin', backends.Path('nowhere')",
            "the compiled backends are for Linux only",
        ),
    ],
    ids=["old torch", "nothing compiled", "macOS"],
)
def test_missing_backend_says_what_to_do(pretend: str, reason: str, tmp_path: Path) -> None:
    """The torch is this one all the same: what an older one lacks shows when the library is loaded, less readably."""
    library = ROOT / "ltkernels/lib/libltkernels_cpu.so"
    if not library.exists():
        pytest.skip("not built: run python setup.py build_ext --inplace")
    program = f"import sys, torch; from ltkernels import backends; {pretend}; print(backends.status()['cpu'])"
    assert reason in python("-c", program, cwd=tmp_path, PYTHONPATH=str(ROOT))


def test_metadata(metadata: Message) -> None:
    assert metadata["Name"] == "ltkernels"
    assert metadata["Version"] == ltkernels.__version__
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert set(metadata.get_all("Provides-Extra", [])) >= {"bench", "demo", "dev", "test", "triton"}
    always = [Requirement(line) for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert {str(requirement) for requirement in always} == {"torch>=2.10", "numpy", "typing_extensions>=4.10"}


def test_console_script(pure: tuple[Path, Path, str]) -> None:
    (path,) = pure[1].glob("*.dist-info/entry_points.txt")
    assert path.read_text().split() == ["[console_scripts]", "ltkernels", "=", "ltkernels.cli:main"]


def test_every_package_that_demo_bench_and_test_need_is_pinned(metadata: Message) -> None:
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert all(str(pin.specifier).startswith("==") for pin in pins if pin.name != "triton")  # torch decides on that one
    needed = [Requirement(line) for line in metadata.get_all("Requires-Dist", [])]
    for need in needed:
        extras = ({"extra": extra} for extra in ("demo", "bench", "test"))
        if need.name != "ltkernels" and any(need.marker is None or need.marker.evaluate(extra) for extra in extras):
            (version,) = [
                pin.specifier for pin in pins if pin.name == need.name and (not pin.marker or pin.marker.evaluate())
            ]
            assert need.specifier.contains(str(version).removeprefix("==")), need


def test_changelog_and_license() -> None:
    assert re.search(rf"^## \[{re.escape(ltkernels.__version__)}\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert "Apache License\n                           Version 2.0" in (ROOT / "LICENSE").read_text()


def test_import_is_lazy_and_every_public_name_is_there(tmp_path: Path) -> None:
    program = """
import sys
import ltkernels
assert "torch" not in sys.modules and "numpy" not in sys.modules
assert set(ltkernels.__all__) <= set(dir(ltkernels))
print(*(getattr(ltkernels, name).__name__ for name in ltkernels.__all__))
"""
    names = python("-c", program, cwd=tmp_path, PYTHONPATH=str(ROOT)).split()
    assert [name.removeprefix("ltkernels.") for name in names] == ltkernels.__all__


def test_unknown_name_raises_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'ltkernels' has no attribute 'cross_entropi'"):
        ltkernels.cross_entropi  # noqa: B018
