"""What README and documentation say is true: every Python block runs, every command exists, the site builds.

The Python blocks of a page run in order in one namespace, as a reader would paste them. A ``text`` block right after
one is what it prints (``...`` stands for anything). Blocks that need a GPU or several processes say so in their first
line: without a GPU the former are only compiled, the latter run under torchrun.
"""

from __future__ import annotations

import contextlib
import doctest
import importlib.machinery
import importlib.util
import io
import os
import re
import shlex
import subprocess
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest
import torch

import ltkernels as ltk

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LANGUAGES = ("python", "sh", "text", "")
FENCE = re.compile(r"^```(?P<language>.*)\n(?P<code>(?:.*\n)*?)```$", re.MULTILINE)
NEEDS_GPU = "# needs a GPU"
NEEDS_PROCESSES = re.compile(r"# (?P<file>\w+\.py), run with: torchrun --nproc-per-node (?P<count>\d)$")

# README shows what a user's program has already; these stand for it.
README_SETUP = """
import torch
from torch.utils.data import DataLoader, TensorDataset
train_labels = torch.tensor([0] * 90 + [1] * 9 + [2])
images, features, labels = torch.randn(8, 64), torch.randn(8, 64), torch.randint(3, (8,))
model = torch.nn.Linear(64, 3)
dataset = TensorDataset(torch.randn(100, 64), train_labels)
"""


@dataclass(frozen=True)
class Block:
    language: str
    code: str
    line: int
    printed: str | None
    """What the text block right after it shows."""

    @property
    def first_line(self) -> str:
        return self.code.partition("\n")[0]


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = list(FENCE.finditer(text))
    made = []
    for fence, after in zip_longest(found, found[1:]):
        printed = None
        if after is not None and after["language"] == "text" and not text[fence.end() : after.start()].strip():
            printed = after["code"]
        made.append(Block(fence["language"], fence["code"], text.count("\n", 0, fence.start()) + 2, printed))
    return made


def named(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def test_the_fences_of_all_pages_are_understood() -> None:
    """Else a block that nobody runs could hide behind an odd fence."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert text.count("```") == 2 * len(blocks(page)), (
            f"{named(page)}: fences that are not closed or not at a line's start"
        )
        assert {block.language for block in blocks(page)} <= set(LANGUAGES), named(page)


@pytest.fixture
def timm_without_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    """timm's package imports torchvision; its losses and mixup do not. Where it is missing they are imported alone."""
    spec = importlib.util.find_spec("timm")
    if spec is None or importlib.util.find_spec("torchvision") is not None:
        return
    (folder,) = spec.submodule_search_locations or ()
    for name in ("timm", "timm.data"):
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        module.__path__ = [os.path.join(folder, *name.split(".")[1:])]
        monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A page starts from seed 0 in an empty folder, and leaves neither a backend nor a number of threads behind."""
    monkeypatch.chdir(tmp_path)
    threads, state, forced = torch.get_num_threads(), torch.get_rng_state(), ltk.backends._forced
    torch.manual_seed(0)
    yield
    torch.set_rng_state(state)
    torch.set_num_threads(threads)
    ltk.use_backend(forced)


def runs_here(block: Block) -> bool:
    if block.language != "python" or NEEDS_PROCESSES.match(block.first_line):
        return False
    return torch.cuda.is_available() or not block.first_line.startswith(NEEDS_GPU)


NEEDED = {"docs/moving/timm.md": "timm", "docs/moving/metric_learning.md": "pytorch_metric_learning"}
"""Libraries that pages compare with; they are in the test extra."""

WITH_CODE = [page for page in PAGES if any(block.language == "python" for block in blocks(page))]


@pytest.mark.parametrize("page", WITH_CODE, ids=named)
def test_python_blocks_run_in_order(page: Path, as_before: None, timm_without_torchvision: None) -> None:
    needed = NEEDED.get(named(page))
    if needed is not None and importlib.util.find_spec(needed) is None:
        pytest.skip(f"{needed} is not installed")
    namespace: dict[str, Any] = {"__name__": "__main__"}
    if page.name == "README.md":
        exec(README_SETUP, namespace)
    checker = doctest.OutputChecker()
    for block in blocks(page):
        if block.language != "python":
            continue
        # With as many empty lines before it, a traceback shows the page's own lines.
        program = compile("\n" * (block.line - 1) + block.code, str(page), "exec")
        if not runs_here(block):
            continue
        with contextlib.redirect_stdout(io.StringIO()) as out, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            exec(program, namespace)
        assert not [w for w in caught if str(w.message).startswith("ltkernels")], f"{named(page)}:{block.line}"
        if block.printed is not None:
            same = checker.check_output(block.printed, out.getvalue(), doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
            assert same, f"{named(page)}:{block.line} prints\n{out.getvalue()}\nand not\n{block.printed}"


PROGRAMS = [
    pytest.param(page, block, id=f"{named(page)}:{block.line}")
    for page in PAGES
    for block in blocks(page)
    if block.language == "python" and NEEDS_PROCESSES.match(block.first_line)
]


@pytest.mark.parametrize(("page", "block"), PROGRAMS)
def test_programs_for_several_processes_run(page: Path, block: Block, tmp_path: Path) -> None:
    marked = NEEDS_PROCESSES.match(block.first_line)
    assert marked is not None
    program = tmp_path / marked["file"]
    program.write_text(block.code, encoding="utf-8")
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={marked['count']}", program],
        cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    if block.printed is not None:
        assert run.stdout == block.printed


# --- Commands ---


def _make(words: list[str]) -> None:
    targets = re.findall(r"^([a-z]+):.*## ", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    arguments = [word.removeprefix("ARGS=") for word in words if word.startswith("ARGS=")]
    (target,) = [word for word in words if not word.startswith("ARGS=")] or ["help"]
    assert target in targets, target
    for given in arguments:
        if target == "demo":
            _python(["python/train.py", *shlex.split(given)])
        elif target == "bench":
            _ltkernels(["bench", *shlex.split(given)])


def _ltkernels(words: list[str]) -> None:
    from ltkernels.bench import command

    if words[0] == "bench":
        parsed = command._parser().parse_args(words[1:])
        op = command.OPS[parsed.op]
        assert set(parsed.variant or ()) <= set(op.variants)
        assert parsed.load is None or (ROOT / parsed.load).exists()
    else:
        assert words in (["info"], ["info", "--json"]), words


def _python(words: list[str]) -> None:
    if words[0] == "-m":
        assert importlib.util.find_spec(words[1]) is not None, words
        if words[1] == "ltkernels":
            _ltkernels(words[2:])
        return
    assert (ROOT / words[0]).is_file(), words[0]
    if words[0] == "python/train.py":
        import train

        train.parse(words[1:])  # exits where an option does not exist


def _pip(words: list[str]) -> None:
    assert words[0] == "install", words


def _torchrun(words: list[str]) -> None:
    names = {NEEDS_PROCESSES.match(block.values[1].first_line)["file"] for block in PROGRAMS}  # type: ignore[index]
    (program,) = [word for word in words if word.endswith(".py")]
    assert program in names or (ROOT / program).is_file(), program


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "make": _make,
    "ltkernels": _ltkernels,
    "python": _python,
    "pip": _pip,
    "torchrun": _torchrun,
}


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_commands_exist(page: Path) -> None:
    """Their options are parsed by the programs themselves; they are run elsewhere."""
    for block in blocks(page):
        if block.language not in ("sh", ""):
            continue
        for line in block.code.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):  # LTK_BACKEND=reference python ...
                words = words[1:]
            if words:
                assert words[0] in COMMANDS, f"{named(page)}: {line}"
                COMMANDS[words[0]](words[1:])


# --- The site ---


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mkdocs", reason="mkdocs is not installed: pip install 'ltkernels[docs]'")
    folder = tmp_path_factory.mktemp("site")
    run = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return folder


def test_every_public_name_has_an_entry(site: Path) -> None:
    for module in [ltk, *(getattr(ltk, name) for name in ltk.__all__)]:
        if not isinstance(module, types.ModuleType) or module in (ltk.bench, ltk.backends):
            continue
        page = site / "api" / f"{module.__name__.rpartition('.')[2]}.html"
        text = page.read_text(encoding="utf-8")
        for name in module.__all__:
            if not isinstance(getattr(module, name), types.ModuleType):
                assert f'id="{module.__name__}.{name}"' in text, f"{page.name} has no entry for {name}"


def test_the_site_needs_no_other_host(site: Path) -> None:
    for page in site.rglob("*.html"):
        loaded = re.findall(
            r'<(?:script|img|link)[^>]+(?:src|href)="(https?://[^"]+)"', page.read_text(encoding="utf-8")
        )
        assert not [url for url in loaded if "canonical" not in url], page.name


def test_what_the_source_has_for_readers_of_the_source_is_gone(site: Path) -> None:
    """Roles, marks and TeX that nothing replaced."""
    left_over = re.compile(
        r":(?:class|func|mod|meth|data|math):`|\.\. math::|<!-- (?:figures|plot|methods|api):"
        r"|\\(?:frac|sigma|log|mathrm|sum|bigr)\b"
    )
    for page in site.rglob("*.html"):
        found = left_over.search(page.read_text(encoding="utf-8"))
        assert found is None, f"{page.name}: {found[0]}"
    functional = (site / "api" / "functional.html").read_text(encoding="utf-8")
    assert functional.count("<math") > 50 and "<mfrac>" in functional


def test_figures_are_those_of_the_result_files(site: Path) -> None:
    """A number of the file, in the page that shows it; and the page says which command measured it."""
    from ltkernels.bench import report

    records = report.read_records(ROOT / "benchmarks" / "results" / "cpu-lade.jsonl")
    ours = next(r for r in records if r["peer"] == "ltkernels" and r["scenario"] == "512x8142")
    page = (site / "paths" / "lade.html").read_text(encoding="utf-8")
    assert report.duration(ours["p50_us"]) in page and ours["cpu"] in page
    assert "ltkernels bench --op lade" in page
    assert (site / "pictures" / "lade.svg").stat().st_size > 10_000
