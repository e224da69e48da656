"""The documentation: its code runs, its output is true, its links lead somewhere."""

import ast
import inspect
import io
import re
import sys
from contextlib import redirect_stdout
from itertools import zip_longest
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest

import lossloop
import lossloop.benchmark
import lossloop.loggers
import lossloop.probes
import lossloop.testing

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
ENTRY = re.compile(r"^- `([^`]+)`", re.MULTILINE)


class Block(NamedTuple):
    """A fenced block of a page."""

    language: str
    text: str
    line: int  # of its first line, from 1


def blocks(source):
    return [
        Block(match[1], match[2], source[: match.start(2)].count("\n") + 1)
        for match in FENCE.finditer(source)
    ]


def run(found, name, namespace):
    """Runs the python blocks and compares what they print with the text blocks."""
    before = ""
    for block, after in zip_longest(found, found[1:], fillvalue=Block("", "", 0)):
        if block.language == "text":
            assert before == "python", f"{name}:{block.line}: output of no python block"
        if block.language == "python":
            # Blank lines in front, so that a traceback shows the line of the page.
            code = compile("\n" * (block.line - 1) + block.text, name, "exec")
            printed = io.StringIO()
            with redirect_stdout(printed):
                exec(code, namespace)
            shown = after.text if after.language == "text" else ""
            assert printed.getvalue() == shown, f"{name}:{block.line}: prints this"
        before = block.language


def prose(source):
    return FENCE.sub("", source)


def anchors(source):
    """The fragments that a page's headings have on GitHub."""
    headings = re.findall(r"^#+ (.+)$", prose(source), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


def named(page):
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_the_code_of_a_page_runs_and_prints_what_it_shows(page, monkeypatch, tmp_path):
    module = ModuleType("page")  # importable, as the compiler wants it
    monkeypatch.setitem(sys.modules, "page", module)
    monkeypatch.chdir(tmp_path)
    run(blocks(page.read_text("utf-8")), named(page), vars(module))


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_relative_links_lead_somewhere(page):
    for target in LINK.findall(prose(page.read_text("utf-8"))):
        if "://" in target:
            continue
        path, _, fragment = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{named(page)}: no file {target}"
        if fragment:
            assert fragment in anchors(file.read_text("utf-8")), (
                f"{named(page)}: {target}"
            )


def test_every_page_of_docs_is_on_the_map():
    index = ROOT / "docs" / "index.md"
    linked = {
        (index.parent / link).resolve()
        for link in LINK.findall(index.read_text("utf-8"))
    }
    assert linked >= set(PAGES[1:]) - {index}


@pytest.mark.parametrize(
    ("heading", "module"),
    [
        ("lossloop", lossloop),
        ("lossloop.metrics", lossloop.metrics),
        ("lossloop.optim", lossloop.optim),
        ("lossloop.schedules", lossloop.schedules),
        ("lossloop.loggers", lossloop.loggers),
        ("lossloop.probes", lossloop.probes),
        ("lossloop.testing", lossloop.testing),
        ("lossloop.benchmark", lossloop.benchmark),
    ],
)
def test_the_reference_has_all_public_names_with_their_signatures(heading, module):
    source = (ROOT / "docs" / "reference.md").read_text("utf-8")
    section = source.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    entries = [" ".join(entry.split()) for entry in ENTRY.findall(section)]
    names = [entry.partition("(")[0] for entry in entries]
    assert sorted(names) == sorted(module.__all__)
    for name, entry in zip(names, entries, strict=True):
        if "(" in entry:
            assert normal(entry) == normal(name + signature(getattr(module, name)))


def signature(function):
    found = inspect.signature(function)
    bare = [p.replace(annotation=p.empty) for p in found.parameters.values()]
    return str(found.replace(parameters=bare, return_annotation=found.empty))


def normal(call):
    """A signature as Python itself would write it: quotes, spaces, numbers."""
    return ast.unparse(ast.parse(f"def {call}: ..."))


def test_the_tests_that_hold_a_guarantee_exist():
    page = ROOT / "docs" / "explanation" / "what-is-guaranteed.md"
    mentioned = re.findall(r"`(tests/[^`]*\.py)::(\w+)`", page.read_text("utf-8"))
    assert len(mentioned) > 20
    for file, name in mentioned:
        assert f"\ndef {name}(" in (ROOT / file).read_text("utf-8"), f"{file}::{name}"


def test_what_others_report_is_what_was_measured():
    page = (ROOT / "docs" / "explanation" / "exact-loss.md").read_text("utf-8")
    link = re.search(r"\(../../(benchmarks/results/\S*what-others-report.md)\)", page)
    record = (ROOT / link[1]).read_text("utf-8")
    (table,) = re.findall(r"(?:^\| .*\n)+^\| float32 sum.*\n", page, re.MULTILINE)
    assert table in record


def test_the_readme_has_the_commands_that_ci_runs():
    found = blocks((ROOT / "README.md").read_text("utf-8"))
    install = "python -m pip install -c tests/constraints.txt -e"
    assert [b.text for b in found if b.language == "sh"] == [
        f"{install} '.[demo]' && python -m lossloop demo\n",
        f"{install} '.[test]' && python -m pytest\n",
    ]


# --- the checks have teeth ------------------------------------------------------------


@pytest.mark.parametrize(
    "page",
    [
        "```python\nprint(1)\n```\n```text\n2\n```\n",
        "```python\nprint(1)\n```\n",
        "```python\nx = 1\n```\n```text\n1\n```\n",
        "```text\n1\n```\n",
        "```python\nassert False\n```\n",
    ],
    ids=["other output", "output not shown", "nothing printed", "no code", "raises"],
)
def test_a_page_that_is_not_true_fails(page):
    with pytest.raises(AssertionError):
        run(blocks(page), "page", {})


def test_a_true_page_passes_and_its_blocks_share_a_namespace():
    page = "```python\nx = 1\n```\n\n```python\nprint(x)\n```\n\n```text\n1\n```\n"
    run(blocks(page), "page", {})


def test_a_traceback_shows_the_line_of_the_page():
    with pytest.raises(ZeroDivisionError) as caught:
        run(blocks("# Title\n\n```python\nx = 0\n1 / x\n```\n"), "page", {})
    assert caught.traceback[-1].lineno == 4  # from 0: line 5
