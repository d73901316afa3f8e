"""The pages of a made-up run folder: escaped, self-contained, with and without matplotlib."""

import builtins
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from markupsafe import escape

import report
from attribution import format_table
from data import InputError

EVIL = "<script>alert(1)</script> & \"Sons' (1999)"
LOSSES = ["sft", "gdrt"]
SECTIONS = "results training groups attribution exposure users heat-map settings".split()


def metrics_of(source, K):
    """What list_metrics and evaluate_parts give, with made-up numbers."""
    names = ["MGU", "DGU", "genre MGU", "genre DGU", "HR", "NDCG", "MRR", "coverage"]
    third = {
        name: {"n": 4, "from": i, "to": i + 1, "NDCG@10": source.random()}
        for i, name in enumerate(("tail", "middle", "head"))
    }
    exposure = {
        "groups": ["1 least popular", "2", "3", "4", "5 most popular"],
        "GH": [0.02, 0.05, 0.1, 0.23, 0.6],
    }
    metrics = {}
    for k in (5, 10):
        exposure[f"GP@{k}"] = source.dirichlet([1, 2, 3, 5, 9]).tolist()
        metrics |= {f"{name}@{k}": source.random() for name in names}
    return metrics | {
        "exposure": exposure,
        "genre exposure": exposure,
        "by user activity": third,
        "by item popularity": third,
        "NLL": 9.0,
        "legal NLL": 7.0,
        "group NLL": [*(3 - 0.6 * np.arange(K - 1)).tolist(), None],
        "worst group NLL": 3.0,
    }


def audit_of(source, K):
    """What `audit` gives, with made-up numbers."""

    def method():
        return {
            "auxiliary share": source.random(),
            "auxiliary share first": source.random(),
            "by position": source.random(6).tolist(),
            "by group": [*source.random(K - 1).tolist(), None],
        }

    return {
        "windows": 12,
        "ablation": method(),
        "legal ablation": method(),
        "gradient": method(),
        "NDCG@10 lost by shuffled histories": 0.01,
    }


def update_line(i, steps, q, source):
    """A line of metrics.jsonl: the losses fall, those of all groups alike."""
    fall = 1 + 2 * np.exp(-3 * i / steps)
    K = len(q)
    return {
        "step": i,
        "loss": fall * 1.2,
        "nll": fall,
        "group_nll": (fall * (1.6 - 0.4 * np.arange(K)) + 0.1 * source.random(K)).tolist(),
        "q": q.tolist(),
        "n": [9] * K,
        "grad_norm": 1.0,
        "lr": 0.1,
        "seconds": 1.0,
        "windows_per_s": 100.0,
    }


def prediction_line(i, titles, source):
    """A line of predictions.jsonl: the target of user i is title i."""
    return {
        "user": str(i),
        "position": 8,
        "history": [titles[j] for j in source.permutation(40)[:8]],
        "target": titles[i],
        "titles": [titles[j] for j in source.permutation(40)[:10]],
        "scores": (-np.arange(10.0)).tolist(),
        "NLL": 9.0,
        "legal NLL": 7.0,
    }


def write_settings(folder, n, K):
    """The files of a run that no loss owns."""
    arguments = {"dataset": EVIL, "split": "leave-one-out", "model": "tiny", "seed": 0}
    arguments |= {"loss": LOSSES, "groups": K, "tau": 1.0, "windows": None}
    config = {"arguments": arguments, "data": "abc", "commit": "c0ffee"}
    config |= {"versions": {"torch": "2"}, "machine": {"cores": 2}}
    config["facts"] = {"items": 40} | {f"{part} windows": n for part in ("train", "valid", "test")}
    write(folder / "config.json", config)
    groups = {"relevance": "gradient", "cuts": [0.0, 0.3, 0.6, 0.9][:K], "shares": [1 / K] * K}
    write(folder / "groups.json", groups | {"seconds": 1.0, "r": [], "group": []})


def make_run(folder, n=12, steps=60, K=4, title=EVIL, parts=("valid", "test")):
    """A run folder as gdrt.py leaves it, but for models and checkpoints."""
    source = np.random.default_rng(0)
    titles = [title] + [f"Film {i} (19{i:02})" for i in range(1, 40)]
    write_settings(folder, n, K)
    baselines = {}
    for name in ("before", "popularity"):
        baselines[name] = {part: metrics_of(source, K) for part in parts}
    before = audit_of(source, K)
    for loss in LOSSES:
        metrics = {part: metrics_of(source, K) for part in parts}
        metrics |= {"baselines": baselines, "audit": {"before": None, "after": None}}
        metrics["time"] = {"warm-up": 9.0, "train": 40.0, "relevance": 5.0, "evaluate": 20.0}
        q = source.dirichlet([8, 5, 3, 2][:K], steps)
        if loss == "sft":
            q[:] = 1 / K
        updates = [update_line(i, steps, q[i], source) for i in range(steps)]
        lines(folder / loss / "metrics.jsonl", updates)
        if "test" in parts:
            metrics["audit"] = {"before": before, "after": audit_of(source, K)}
            predictions = [prediction_line(i, titles, source) for i in range(n)]
            lines(folder / loss / "predictions.jsonl", predictions)
        write(folder / loss / "metrics.json", metrics)
    write(folder / "gdrt" / "heatmap.json", heat_record())
    return folder


def heat_record():
    """A token_attribution record whose tokens and names are hostile."""
    return {
        "tokens": ["<bos>", "Rank\n", "<b>", "</b>", '"a', " & b"],
        "targets": ["<i>", '"'],
        "log_prob": [-2.0, -0.1],
        "values": [[0.0, -0.5, 1.25, 0.0, -3.5, 0.25], [0.0] * 6],
        "method": "gradient",
        "steps": 64,
        "gap": 0.001,
        "spans": [
            {"name": "BOS", "kind": "bos", "start": 0, "end": 1},
            {"name": "task", "kind": "template", "start": 1, "end": 2},
            {"name": EVIL, "kind": "user", "start": 2, "end": 4},
            {"name": "title prefix", "kind": "title", "start": 4, "end": 6},
        ],
    }


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def lines(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")


class Page(HTMLParser):
    """Tags with their attributes, the visible text, and whether tags are closed in order."""

    VOID = {"meta", "br", "link", "img", "path", "use"}

    def __init__(self, text):
        super().__init__()
        self.tags = []
        self.text = []
        self.open = []
        self.wrong = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if tag not in self.VOID and (not self.open or self.open.pop() != tag):
            self.wrong.append(tag)

    def handle_data(self, text):
        self.text.append(text)


def check(text):
    """A well-formed page that runs nothing and fetches nothing -> Page."""
    page = Page(text)
    assert not page.wrong and not page.open
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "img", "iframe", "object", "embed"), tag
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "xlink:href", "action", "data"):
                assert value.startswith("#"), (tag, name, value)
    assert not re.search(r"url\((?!#)|@import|javascript:", text)
    return page


@pytest.fixture
def without_matplotlib(monkeypatch):
    real = builtins.__import__

    def blocked(name, *args, **kwargs):
        if name.split(".")[0] == "matplotlib":
            raise ImportError("blocked by the test")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", blocked)


def test_report(tmp_path):
    pytest.importorskip("matplotlib")
    folder = make_run(tmp_path / "run")
    path = report.write_report(folder)
    assert path == folder / "report.html"
    text = path.read_text(encoding="utf-8")
    page = check(text)
    shown = "".join(page.text)
    assert EVIL in shown and escape(EVIL) in text
    assert "alert" not in "".join(tag for tag, _ in page.tags)
    sections = [attributes["id"] for tag, attributes in page.tags if tag == "section"]
    assert sections == SECTIONS
    assert [a["href"][1:] for tag, a in page.tags if tag == "a"] == sections
    assert sum(tag == "svg" for tag, _ in page.tags) == 3 and "pip install matplotlib" not in text
    result = json.loads((folder / "gdrt" / "metrics.json").read_text())
    for number in (
        f"{result['test']['NDCG@10']:.4f}",
        f"{result['baselines']['popularity']['test']['HR@5']:.4f}",
        f"{result['audit']['after']['ablation']['auxiliary share']:.3f}",
    ):
        assert number in shown
    assert "GDRT less SFT: NDCG@10" in shown
    for loss in LOSSES:  # the first window is shown in full
        line = json.loads((folder / loss / "predictions.jsonl").read_text().split("\n")[0])
        assert all(escape(title) in text for title in line["titles"] + line["history"])
    again = report.write_report(folder, tmp_path / "again.html")
    assert again.read_text() == text  # the same files, the same page


def test_report_without_matplotlib(tmp_path, without_matplotlib):
    text = report.write_report(make_run(tmp_path / "run")).read_text(encoding="utf-8")
    page = check(text)
    assert not any(tag == "svg" for tag, _ in page.tags) and "pip install matplotlib" in text
    folds = [attributes for tag, attributes in page.tags if tag == "details"]
    assert sum("open" in attributes for attributes in folds) == 3
    assert sum(tag == "table" for tag, _ in page.tags) >= 9


def test_report_of_validation_alone(tmp_path):
    """A run with --no-test has no test metrics, audit or predictions, nor their sections."""
    path = report.write_report(make_run(tmp_path / "run", parts=("valid",)))
    page = check(path.read_text(encoding="utf-8"))
    found = [attributes["id"] for tag, attributes in page.tags if tag == "section"]
    assert found == [name for name in SECTIONS if name not in ("attribution", "users")]


def test_report_of_what_is_finished(tmp_path):
    folder = make_run(tmp_path / "run")
    (folder / "gdrt" / "metrics.json").unlink()
    assert "GDRT" not in Page(report.write_report(folder).read_text()).text
    (folder / "sft" / "metrics.json").unlink()
    with pytest.raises(InputError, match="none of its losses is finished"):
        report.write_report(folder)
    with pytest.raises(InputError, match="config.json"):
        report.write_report(tmp_path / "nowhere")


def test_long_and_short_logs(tmp_path):
    for steps in (1, 3, 500):
        check(report.write_report(make_run(tmp_path / f"run{steps}", steps=steps, n=1)).read_text())


# ---------------------------------------------------------------- primitives


def test_a_group_that_an_update_lacks_has_no_nll_there(tmp_path):
    make_run(tmp_path)
    path = tmp_path / "gdrt" / "metrics.jsonl"
    lines = [json.loads(text) for text in path.read_text().splitlines()]
    for i, line in enumerate(lines):
        line["group_nll"] = [0.0, 2.0, 3.0, 4.0]
        line["n"] = [0, 9, 9, 9]  # group 0 is in the last update alone
        if i == len(lines) - 1:
            line["group_nll"][0] = 5.0
            line["n"][0] = 1
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    panels = {title: y for title, _, y in report.training_panels({"GDRT": tmp_path / "gdrt"})}
    y = panels["GDRT: NLL by group"]
    (_, *ends), rows = report.tabulate("NLL by group", range(len(lines)), y)
    assert ends == ["first tenth", "last tenth"]
    assert rows[:2] == [("group 0", "", "5.000"), ("group 1", "2.000", "2.000")]
    assert "NLL by group" in report.write_report(tmp_path).read_text()


def test_heatmap():
    page = check(report.PAGE.render(title=EVIL, record=heat_record()))
    hover = [a["title"] for tag, a in page.tags if tag == "span" and "title" in a]
    for words in ("+1.2500 nats", f"{EVIL}: +1.2500 nats", "title prefix: -3.2500 nats"):
        assert words in hover
    assert {EVIL, "<b>", "<i>"} <= set(page.text)
    assert "gap to completeness 0.10% at 64 points" in "".join(page.text)


def test_shade_is_centred_on_zero():
    def colour(*args):
        return [int(c) for c in re.findall(r"\d+", report.shade(*args))]

    assert colour(0, 2) == [255] * 3 and colour(1, 0) == [255] * 3
    for sign, full in (1, report.RAISES), (-1, report.LOWERS):
        assert tuple(colour(2 * sign, 2)) == tuple(colour(9 * sign, 2)) == full
        assert colour(sign, 2) == [round((255 + c) / 2) for c in full]
    # Blue raises, orange lowers.
    assert report.RAISES[2] > report.RAISES[0] and report.LOWERS[0] > report.LOWERS[2]


def test_dark_text_on_every_shade():
    """WCAG contrast of the text on the strongest shades is at least 4.5."""

    def luminance(rgb):
        return sum(
            w * (c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4)
            for w, c in zip((0.2126, 0.7152, 0.0722), np.array(rgb) / 255)
        )

    for colour in report.RAISES, report.LOWERS:
        assert (luminance(colour) + 0.05) / (luminance((0x23, 0x28, 0x2E)) + 0.05) > 4.5


def test_tables_escape():
    macros = report.PAGE.module
    plot = {
        "svg": "",
        "shows": EVIL,
        "tables": [(("<th>", EVIL), [(EVIL, 1), ("<td>", [EVIL, 2])])],
    }
    text = macros.figure(plot) + macros.titles(EVIL, [EVIL, "b"], EVIL) + macros.fold(EVIL, [])
    assert Page(text).text.count(EVIL) == 5
    assert f"Figures: {EVIL}" in Page(text).text and f"{EVIL}, 2" in Page(text).text
    assert not any(tag == "script" for tag, _ in Page(text).tags)


def test_whatever_a_run_holds_is_escaped(tmp_path):
    """The names of the folder, groups, users and settings are data, too."""
    folder = make_run(tmp_path / EVIL.replace("/", "|"))
    for file in folder.rglob("*.json*"):
        text = file.read_text(encoding="utf-8")
        for word in (
            '"1 least popular"',
            '"relevance": "gradient"',
            '"tiny"',
            '"c0ffee"',
            '"user": "3"',
        ):
            text = text.replace(word, word[: word.rindex('"', 0, -1) + 1] + json.dumps(EVIL)[1:])
        file.write_text(text, encoding="utf-8")
    page = check(report.write_report(folder).read_text(encoding="utf-8"))
    assert sum(EVIL in text for text in page.text) >= 8


def test_format_table():
    text = format_table(("name", "n"), [("a", 1), ("long name", 100)])
    assert text == "name         n\n--------------\na            1\nlong name  100"
