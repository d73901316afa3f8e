"""README.md against the repository: its commands run, its quotations are code, its files exist."""

import json
import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [path for path in (ROOT / "results").glob("*.md") if path.name != "tables.md"]
EVIDENCE = "".join(page.read_text(encoding="utf-8") for page in PAGES)
BLOCKS = "".join(re.findall(r"```\n(.*?)```", README, re.S))
COMMANDS = re.findall("(?m)^(?:python|pip|torchrun) .*", BLOCKS)


def run(line, folder):
    """A README command in an empty folder, with the repository's script."""
    words = shlex.split(line)
    assert words[0] == "python"
    argv = [sys.executable, ROOT / words[1], *words[2:]]
    done = subprocess.run(argv, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_files_that_are_named_exist():
    for name in re.findall(r"`((?:tests|benchmarks|results)/[\w./-]+|\w+\.(?:py|txt))`", README):
        assert (ROOT / name).exists(), name


def test_every_command_is_known_to_a_test():
    """Those for toy run below, and so does ml-100k's, marked network.

    .ci/run runs the install and the tests themselves.
    """
    offline = [line for line in COMMANDS if "toy" in line or "--help" in line]
    elsewhere = [line for line in COMMANDS if line.startswith(("python benchmarks/", "torchrun "))]
    rest = {
        "pip install -r requirements.txt",
        "python gdrt.py --dataset ml-100k",
        "python -m pytest -q -n auto --dist loadgroup",
    }
    assert set(COMMANDS) <= rest | set(offline) | set(elsewhere)


def test_commands_of_the_evidence_list_their_runs(monkeypatch, tmp_path, capsys):
    """Those in the pages of results/ and at the head of quality.py, without running them.

    The runs themselves take minutes to hours.
    """
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import quality

    text = EVIDENCE + quality.__doc__
    commands = re.findall(r"python benchmarks/quality\.py (.*?)(?:`|  |\n)", text)
    assert {"--quick", "smollm2", "grid"} <= set(commands)
    for command in commands:
        quality.main([*shlex.split(command), "--dry-run", "--results", str(tmp_path)])
        assert capsys.readouterr().out.count("\n") >= 4, command


@pytest.mark.slow
def test_first_look(tmp_path, monkeypatch):
    """The toy commands as written, one after the other, in an empty folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shown = ("popularity", "before fine-tuning", "SFT", "GDRT", "NDCG@10", "aux share")
    for line in COMMANDS:
        if "toy" in line and line.startswith("python ") and "benchmarks/" not in line:
            out = run(line, tmp_path)
            if line == "python gdrt.py --dataset toy":
                assert all(name in out for name in shown)


@pytest.mark.slow
@pytest.mark.network
def test_main_job(tmp_path, monkeypatch):
    """Both models reach NDCG@10 of 0.065 on real users."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    out = run("python gdrt.py --dataset ml-100k", tmp_path)
    for name in ("SFT", "GDRT"):
        row = next(line.split() for line in out.splitlines() if line.startswith(name))
        assert float(row[4]) >= 0.065


def test_the_front_page_stays_one():
    """At most 200 lines, 13 KB, 100 columns (110 in tables); the rulers are where it says."""
    lines = README.splitlines()
    assert len(lines) <= 200 and len(README.encode()) <= 13_000
    assert [line for line in lines if len(line) > (110 if line.startswith("|") else 100)] == []
    named = re.findall(r"`(\w+\.py)` to (?:line )?(\d+)", README)
    assert [name for name, _ in named] == ["data.py", "attribution.py", "evaluate.py", "gdrt.py"]
    for name, line in named:
        assert "plumbing" in (ROOT / name).read_text(encoding="utf-8").splitlines()[int(line)]
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", README):
        assert (ROOT / picture).exists()


def test_tables_are_those_of_the_results(monkeypatch):
    """The pages of results/ have what speed.py --table, tables.py and relevance.py make of it."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import relevance
    import speed
    import tables

    assert speed.table(speed.read_results(ROOT / "results" / "speed.json")) in EVIDENCE
    made = tables.sections(ROOT / "results")
    assert tables.document(made) == (ROOT / "results" / "tables.md").read_text(encoding="utf-8")
    shown = re.findall("<!-- quality: (.*) -->", EVIDENCE)
    assert shown and all(tables.narrow(made[name]) in EVIDENCE for name in shown)
    measured = json.loads((ROOT / "results" / "relevance.json").read_text())
    assert relevance.agreement_table(measured) in EVIDENCE


def test_the_method_stands_above_the_rulers():
    """In at most 450 lines of the four files together."""
    above = 0
    for name in ("data", "attribution", "evaluate", "gdrt"):
        method, _ = (ROOT / f"{name}.py").read_text(encoding="utf-8").split("below: plumbing\n")
        above += method.count("\n")
    assert above <= 450
