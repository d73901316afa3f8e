"""The code's form: rules for every Python file that git does not ignore, each shown to fail."""

import ast
import contextlib
import io
import re
import subprocess
import sys
import tokenize

import pytest
from conftest import ROOT

import attribution
import evaluate
import gdrt

METHOD = ("data", "attribution", "evaluate", "gdrt")
# Which of the five modules each may import at its top: imports go one way.
MAY_IMPORT = {
    "data": set(),
    "attribution": {"data"},
    "evaluate": {"data", "attribution"},
    "report": {"data", "attribution", "evaluate"},
    "gdrt": {"data", "attribution", "evaluate", "report"},
}
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
WIDTH = 100


def tracked():
    """The Python files that git does not ignore; without git, those of the folders listed here."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"]
    done = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True)
    if done.returncode == 0 and done.stdout:
        return sorted({ROOT / name for name in done.stdout.splitlines() if (ROOT / name).exists()})
    folders = (ROOT, *(ROOT / name for name in ("benchmarks", "tests/method", "tests/plumbing")))
    return sorted(path for folder in folders for path in folder.glob("*.py"))


FILES = {str(path.relative_to(ROOT)): path for path in tracked()}
EVERY_FILE = pytest.mark.parametrize("name", FILES)


def source(name):
    return FILES[name].read_text(encoding="utf-8")


# ---------------------------------------------------------------- rules: what breaks them


def too_wide(text):
    return [n for n, line in enumerate(text.splitlines(), 1) if len(line) > WIDTH]


def several_statements(text):
    """Lines with a semicolon between statements, or with a statement behind a colon."""
    found = []
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.OP and token.string == ";":
            found.append(token.start[0])
    for node in ast.walk(ast.parse(text)):
        body = getattr(node, "body", None)
        if isinstance(node, ast.stmt) and isinstance(body, list):
            for block in (body, getattr(node, "orelse", []), getattr(node, "finalbody", [])):
                found += [inner.lineno for inner in block[:1] if is_behind_colon(inner, text)]
    return sorted(set(found))


def is_behind_colon(statement, text):
    before = text.splitlines()[statement.lineno - 1][: statement.col_offset].strip()
    return before.endswith(":")


def of_one_thing(values):
    """Whether all values are attributes or items of one and the same thing: setup.a, setup.b."""
    if not all(isinstance(value, (ast.Attribute, ast.Subscript)) for value in values):
        return False
    return len({ast.dump(value.value) for value in values}) == 1


def is_swap(target, value):
    return sorted(map(ast.unparse, target.elts)) == sorted(map(ast.unparse, value.elts))


def unrelated_tuples(text):
    """Assignments of the form a, b = x, y.

    Unpacking what one call or one thing holds is fine, and so is a swap.
    """
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple):
            for target in node.targets:
                if isinstance(target, ast.Tuple) and not of_one_thing(node.value.elts):
                    found += [] if is_swap(target, node.value) else [node.lineno]
    return found


def nested_comprehensions(text):
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, COMPREHENSIONS):
            inside = [isinstance(inner, COMPREHENSIONS) for inner in ast.walk(node)]
            if sum(inside) > 1:
                found.append(node.lineno)
    return found


def rulers(text):
    """Comment lines drawn across the page that hold the word plumbing."""
    return [n for n, line in enumerate(text.splitlines(), 1) if re.match("# ---.*plumbing", line)]


def modules_imported(text, anywhere=True):
    """The names of the modules that a text imports; anywhere: also inside functions."""
    tree = ast.parse(text)
    found = set()
    for node in ast.walk(tree) if anywhere else tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            found.add((node.module or "").split(".")[0])
    return found


def drawing(text):
    """Strings that hold HTML, and imports that draw or fill in templates."""
    found = sorted(modules_imported(text) & {"jinja2", "markupsafe", "matplotlib"})
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if re.search(r"</\w+>|<(html|div|span|table|svg|style|section)\b", node.value):
                found.append(node.value)
    return found


# ---------------------------------------------------------------- the files


@EVERY_FILE
def test_lines_and_statements(name):
    text = source(name)
    assert too_wide(text) == []
    assert several_statements(text) == []
    assert nested_comprehensions(text) == []
    if not name.startswith("tests/"):
        assert unrelated_tuples(text) == []


@pytest.mark.parametrize("module", METHOD)
def test_one_ruler_stands_between_method_and_plumbing(module):
    assert len(rulers(source(f"{module}.py"))) == 1


def test_imports_go_one_way():
    """attribution.py and evaluate.py import the report only when they are asked for a page."""
    for module, allowed in MAY_IMPORT.items():
        text = source(f"{module}.py")
        assert modules_imported(text, anywhere=False) & set(MAY_IMPORT) <= allowed, module
        later = {"report"} if module in ("attribution", "evaluate") else set()
        assert modules_imported(text) & set(MAY_IMPORT) <= allowed | later, module


def test_the_page_is_drawn_by_the_report_alone():
    for module in METHOD:
        assert drawing(source(f"{module}.py")) == []
    assert len(source("report.py").splitlines()) <= 250


def test_there_is_no_sixth_module():
    at_top = {name for name in FILES if "/" not in name}
    assert at_top == {f"{module}.py" for module in MAY_IMPORT}
    assert not list(ROOT.glob("**/__init__.py"))


# ---------------------------------------------------------------- that the rules can fail


@pytest.mark.parametrize(
    "rule, text",
    [
        (too_wide, "x = 1  # " + "y" * 100),
        (several_statements, "x = 1; y = 2"),
        (several_statements, "if x: y = 1"),
        (several_statements, "for x in z: y = 1"),
        (several_statements, "if x:\n    y = 1\nelse: y = 2"),
        (several_statements, "class A: pass"),
        (unrelated_tuples, "a, b = 1, x"),
        (unrelated_tuples, "a, (b, c) = f(x), g(x)"),
        (unrelated_tuples, "self.a, self.b = a, b"),
        (nested_comprehensions, "x = [[a for a in b] for b in c]"),
        (nested_comprehensions, "x = {k: sum(v for v in w) for k, w in d.items()}"),
        (rulers, "# -------- below: plumbing"),
        (modules_imported, "def f():\n    from report import PAGE"),
        (drawing, "import matplotlib.pyplot as plt"),
        (drawing, "page = '<div>' + x + '</div>'"),
    ],
)
def test_each_rule_sees(rule, text):
    assert rule(text)


@pytest.mark.parametrize(
    "rule, text",
    [
        (too_wide, "x" * 100),
        (several_statements, "x = {1: 2}\nif x:\n    y = 'a; b: c'  # d; e"),
        (unrelated_tuples, "a, b = f(x)\nmodel, prompts = setup.model, setup.prompts"),
        (unrelated_tuples, "sft, gdrt = rows['sft'], rows['gdrt']\nsize = 3, 4\na, b = b, a"),
        (nested_comprehensions, "x = [a for b in c for a in b]\ny = [f(a) for a in x]"),
        (drawing, "text = 'a <bos> b'\nx = a < b > c"),
    ],
)
def test_each_rule_lets_pass(rule, text):
    assert not rule(text)


# ---------------------------------------------------------------- the formatter


@pytest.mark.parametrize("command", [["format", "--check"], ["check"]])
def test_the_formatter_has_nothing_to_say(command):
    """With the settings in .ci/ruff.toml; `ruff format --config .ci/ruff.toml .` mends most."""
    settings = ["--no-cache", "--quiet", "--config", str(ROOT / ".ci" / "ruff.toml")]
    argv = [sys.executable, "-m", "ruff", *command, *settings, *map(str, FILES.values())]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


# ---------------------------------------------------------------- what is printed


def widest(text):
    return max(text.splitlines(), key=len)


@pytest.mark.parametrize("module", [gdrt, evaluate, attribution])
@pytest.mark.parametrize("columns", ["100", "200"])
def test_help_fits_the_page(module, columns, monkeypatch):
    """In a terminal of 100 columns and in a wider one."""
    monkeypatch.setenv("COLUMNS", columns)
    text = module.parser().format_help()
    assert len(widest(text)) <= int(columns), widest(text)


def test_what_a_run_prints_fits_the_page(small, tmp_path):
    """Three losses, and all that the commands print of them, apart from the progress on stderr."""
    out = io.StringIO()
    flags = f"--loss sft gdrt group-dro --out {tmp_path} --name run --epochs 1".split()
    with contextlib.redirect_stdout(out):
        gdrt.main([*small, *flags])
        evaluate.main([str(tmp_path / "run")])
        attribution.main([str(tmp_path / "run" / "gdrt")])
    text = out.getvalue().replace(str(tmp_path), "FOLDER")
    assert "NDCG@10" in text and "attribution by" in text
    assert len(widest(text)) <= WIDTH, widest(text)
