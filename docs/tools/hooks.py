"""What mkdocs runs while it builds the site: figures come from result files, formulas become MathML.

In a page, alone on a line:

* ``<!-- figures: OP -->`` becomes the table of an op's measurements, the one that README has;
* ``<!-- plot: OP -->`` becomes the picture of them;
* ``<!-- methods: DATA -->`` becomes the accuracy of all methods of the demo on that data set;
* ``<!-- api: MODULE -->`` becomes the module's docstring and the entries of what is in its ``__all__``.

So nobody types a figure, and a page cannot lag behind a file. Formulas are ``$...$`` and ``$$...$$``; MathML needs
neither a script nor another host.
"""

from __future__ import annotations

import html
import re
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import methods_table, readme_table  # noqa: E402
from ltkernels.bench import plot, report  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
PICTURES = ROOT / "build" / "docs-pictures"
MARK = re.compile(r"^<!-- (figures|plot|methods|api): ([\w.-]+) -->$", re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig, **kwargs: Any) -> Files:
    """Draws the pictures that pages ask for and adds them to the site."""
    asked = {
        found[2]
        for file in files.documentation_pages()
        for found in MARK.finditer(file.content_string)
        if found[1] == "plot"
    }
    for op in sorted(asked):
        source = RESULTS / _part(op).file
        picture = PICTURES / f"{op}.svg"
        newest = max(source.stat().st_mtime, Path(plot.__file__).stat().st_mtime)
        if not picture.exists() or picture.stat().st_mtime < newest:
            plot.draw(report.read_records(source), picture)
        files.append(File.generated(config, f"pictures/{op}.svg", abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, page: Page, **kwargs: Any) -> str:
    """Puts figures and pictures where the page asks for them."""

    def replaced(found: re.Match[str]) -> str:
        kind, name = found.groups()
        if kind == "api":
            return "\n".join([_module_entry(name), *(_entry(name, entry) for entry in public_names(name))])
        if kind == "methods":
            return methods_table.markdown(RESULTS / f"methods-{name}.json")
        _part(name)
        if kind == "figures":
            return readme_table.figures(name, RESULTS, "make docs")
        depth = page.file.src_uri.count("/")
        of_what = "logit" if name in report.LOSSES else "call"
        return f"![Time of a {of_what}, and times as long as ltkernels]({'../' * depth}pictures/{name}.svg)"

    return MARK.sub(replaced, markdown)


def _module_entry(module: str) -> str:
    """The module's own docstring, as the head of its page."""
    return f"::: {module}\n    options: {{members: false, heading_level: 1, show_root_full_path: true}}\n"


def _entry(module: str, name: str) -> str:
    """The entry of ``module.name``.

    A function that is called as the file it stands in hides behind that file, for griffe; it is found by its place,
    and an anchor of its public name leads to it.
    """
    if find_spec(module).submodule_search_locations is None or find_spec(f"{module}.{name}") is None:
        return f"\n::: {module}.{name}"
    return f"\n[](){{#{module}.{name}}}\n\n::: {module}.{name}.{name}"


def public_names(module: str) -> list[str]:
    """The functions and classes of ``module.__all__``; modules in it have pages of their own."""
    found = import_module(module)
    return [name for name in found.__all__ if not isinstance(getattr(found, name), ModuleType)]


def _part(op: str) -> readme_table.Part:
    if op not in readme_table.PARTS:
        raise PluginError(f"figures: expected one of {', '.join(readme_table.PARTS)}, found {op!r}")
    return readme_table.PARTS[op]


ARITHMATEX = re.compile(r'<(span|div) class="arithmatex">(.*?)</\1>', re.DOTALL)


def on_page_content(html: str, **kwargs: Any) -> str:
    """Formulas, which pymdownx.arithmatex has found, as MathML."""
    return ARITHMATEX.sub(_mathml, html)


def _mathml(found: re.Match[str]) -> str:
    tag, tex = found[1], html.unescape(found[2]).strip()
    for opening, closing in ((r"\(", r"\)"), (r"\[", r"\]")):
        tex = tex.removeprefix(opening).removesuffix(closing)
    display = "block" if tag == "div" else "inline"
    return f'<{tag} class="arithmatex">{convert(tex.strip(), display=display)}</{tag}>'
