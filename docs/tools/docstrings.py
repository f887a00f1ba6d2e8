"""Makes Markdown of docstrings, which are written for people who read the source, with Sphinx' roles for references.

A griffe extension, which mkdocstrings runs before it parses a docstring:

* ``:class:`X` `` and the like become links to X's entry in the API pages; names of torch and private names stay code.
* ``:math:`x` `` and ``.. math::`` become TeX in dollars, of which ``hooks.py`` makes MathML.
* ``Example:`` is the section that griffe calls ``Examples:``, and ``Source:`` becomes a paragraph.
* Tables drawn with ``====`` stay as they are, in a code block.
"""

from __future__ import annotations

import re
import textwrap
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|func|mod|data|meth|attr|obj):`~?([\w.]+)`")
MATH = re.compile(r":math:`([^`]+)`", re.DOTALL)
MATH_BLOCK = re.compile(r"^(?P<indent>[ ]*)\.\. math::\n+(?P<body>(?:(?P=indent)[ ]+\S.*\n|[ ]*\n)+)", re.MULTILINE)
MATH_LINES = re.compile(r"^(?P<indent>[ ]*)\.\. math:: (?P<body>\S.*(?:\n(?P=indent)[ ]+\S.*)*)$", re.MULTILINE)
TABLE = re.compile(r"^(=+ +=+(?: +=+)*)\n(?:.+\n)+?\1\n(?:.+\n)+?\1$", re.MULTILINE)


class MarkdownDocstrings(griffe.Extension):
    """Rewrites the docstring of every object of the package."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value, obj)


def as_markdown(text: str, obj: griffe.Object) -> str:
    """The docstring ``text`` of ``obj`` in Markdown.

    >>> as_markdown(":math:`a_1` of :func:`torch.relu`", None)
    '$a_1$ of `torch.relu`'
    """
    text = TABLE.sub(lambda table: f"```text\n{table[0]}\n```", text)
    text = MATH_BLOCK.sub(_block, text + "\n").rstrip("\n")
    text = MATH_LINES.sub(_block, text)
    text = MATH.sub(lambda found: f"${' '.join(found[1].split())}$", text)
    text = ROLE.sub(lambda found: _reference(found[1], obj), text)
    text = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)
    return re.sub(r"^Source:\n((?:[ ]+\S.*(?:\n|$))+)", _source, text, flags=re.MULTILINE)


def _block(found: re.Match[str]) -> str:
    indent = found["indent"]
    body = textwrap.dedent(found["body"]).strip()
    return f"\n{indent}$$\n" + textwrap.indent(body, indent) + f"\n{indent}$$\n\n"


def _source(found: re.Match[str]) -> str:
    return "**Source.** " + textwrap.dedent(found[1]).strip() + "\n"


def _reference(target: str, obj: griffe.Object) -> str:
    """A link to ``target``, which without the package's name is a name near ``obj``."""
    if target.startswith("torch.") or target.rpartition(".")[2].startswith("_"):
        return f"`{target}`"
    try:
        whole = target if target.startswith("ltkernels") else obj.resolve(target)
    except griffe.NameResolutionError:  # a method that a base class has
        return f"`{target}`"
    return f"[`{target.removeprefix('ltkernels.')}`][{whole}]"
