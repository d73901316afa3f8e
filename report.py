"""The pages: a run's report and the heat map of one prompt, self-contained HTML without script.

`write_report` gathers what a run folder holds; TEMPLATE lays it out and escapes it.
"""

import io
import re
from pathlib import Path

import jinja2
import numpy as np
from markupsafe import Markup

import evaluate
from attribution import span_sums
from data import InputError, read_config, read_json, write_atomic
from evaluate import BEFORE, fmt, loss_name

STYLE = """
body { font: 16px/1.55 system-ui, sans-serif; color: #23282e; background: #fcfcfb;
  max-width: 68rem; margin: 3rem auto; padding: 0 1.5rem; } svg { max-width: 100%; height: auto; }
section { margin-top: 2.6rem; padding-top: 1.4rem; } h2 { font-size: 1.2rem; margin: 0; }
section, .lists, .row { border-top: 1px solid #e3e4e2; } .scroll { overflow-x: auto; }
p { max-width: 46rem; } p, th, h3 { color: #5b636d; font-weight: normal; }
p, summary, table, .lists, .row { font-size: .9rem; } p.lead { font-size: 1.05rem; color: inherit; }
a, summary { color: #2f659f; margin-right: 1.1rem; } h3 { font-size: 1em; margin: .5rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .6rem 0 1rem; }
th, td { padding: .32rem .8rem; text-align: right; border-bottom: 1px solid #e8e9e7; }
th:first-child, td:first-child { text-align: left; padding-left: 0; white-space: nowrap; }
.lists { display: grid; grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr)); }
mark { background: #cfe6d4; } .scale { display: inline-block; width: 11rem; height: 1ch; }
.row { display: grid; grid-template-columns: 8.5rem 1fr; line-height: 1.95; padding: .7rem 0; }
.row b, .part { white-space: pre-wrap; } .part small { margin-left: .3rem; padding: 0 .2rem; }
.part { padding: .1rem .25rem; border: 1px solid #d5d8db; } .template { border-style: dashed; }
"""
TEMPLATE = """
{%- macro table(header, rows) -%}<div class="scroll"><table>
<thead><tr>{% for cell in header %}<th>{{ cell }}</th>{% endfor %}</tr></thead><tbody>
{% for row in rows %}<tr>{% for cell in row %}<td>
{{- cell if cell is string or cell is not iterable else cell|join(", ") }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div>{% endmacro -%}
{%- macro fold(summary, tables, opened=false) -%}
<details{{ " open" if opened }}><summary>{{ summary }}</summary>
{%- for header, rows in tables %}{{ table(header, rows) }}{% endfor %}</details>{% endmacro -%}
{%- macro figure(plot) %}{{ plot.svg }}
{{ fold("Figures: " ~ plot.shows, plot.tables, not plot.svg) }}{% endmacro -%}
{%- macro titles(heading, texts, marked) -%}<div><h3>{{ heading }}</h3><ol>{% for text in texts %}
<li>{% if text == marked %}<mark>{{ text }}</mark>{% else %}{{ text }}{% endif %}</li>
{%- endfor %}</ol></div>{% endmacro -%}
{%- macro section(heading) %}{% if parts[heading] %}
<section id="{{ heading|lower|replace(" ", "-") }}"><h2>{{ heading }}</h2>
{{ caller(parts[heading]) }}</section>{% endif %}{% endmacro -%}
{%- macro heatmap(record) -%}
{#- One marker token may outweigh all others: the colours saturate where 2% of the values lie. -#}
{%- set sums, most = span_sums(record), np.quantile(np.abs(record["values"]), 0.98) -%}
<p>Attribution by {{ record.method }}{% if record.gap is not none %}, gap to completeness
{#- #} {{ "%.2f"|format(100 * record.gap) }}% at {{ record.steps }} points{% endif %}: a row for
each target token. A box is a part of the prompt with its sum in nats; hover for figures.</p>
<p>lowers its probability, {{ "%.2f"|format(-most) }}<span class="scale" style="background:
linear-gradient(90deg, {{ shade(-1, 1) }}, #fff, {{ shade(1, 1) }})"></span>
{{ "%+.2f"|format(most) }} nats a token, raises it</p>
{% for target in record.targets %}{% set n = loop.index0 %}<div class="row"><div><b>{{ target }}</b>
<br><small>log p {{ "%.2f"|format(record.log_prob[n]) }}</small></div><div>
{% for span in record.spans %}{% set total = sums[loop.index0][n] -%}
<span class="part {{ span.kind }}" title="{{ span.name }}: {{ "%+.4f"|format(total) }} nats">
{%- for t in range(span.start, span.end) %}{% set value = record["values"][n][t] -%}
<span style="background:{{ shade(value, most) }}" title="{{ "%+.4f"|format(value) }} nats">
{{- record.tokens[t]|replace("\\n", "↵") }}</span>{% endfor -%}
<small style="background:{{ shade(total, 2 * most) }}">{{ "%+.2f"|format(total) }}</small></span>
{% endfor %}</div></div>{% endfor %}{% endmacro -%}
<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title>
<meta name="viewport" content="width=device-width"><style>{{ style }}</style></head>
<body><h1>{{ title }}</h1>{% if record %}{{ heatmap(record) }}{% elif parts %}
{% set run = config.arguments %}<p class="lead">{{ run.dataset }}, {{ run.split }}, model
{{ run.model }}, seed {{ run.seed }}: {{ runs|join(" and ") }} from one start, same batches.</p>
{% if not parts.Training.svg %}<p>The plots need matplotlib: pip install matplotlib, then
python evaluate.py {{ folder }} --report</p>{% endif %}
<nav>{% for heading, part in parts.items() if part %}
<a href="#{{ heading|lower|replace(' ', '-') }}">{{ heading }}</a>{% endfor %}</nav>
{%- call(part) section("Results") %}<p>{{ "{:,}".format(config.facts[split ~ " windows"]) }}
{{ split }} windows; all {{ "{:,}".format(config.facts["items"]) }} titles ranked. MGU, DGU:
how far the lists' popularity is from that of choices in training, lower is fairer. Aux share: how
much of the attribution rests on the task and the title's own prefix. Seconds: training, warm-up,
relevance but for SFT.</p>{{ table(*part.table) }}{% for name, found in part.differences.items() %}
<p class="lead">{{ name }} less SFT: {% for measure, ends in found.items() %}{{ measure }}
{{ evaluate.in_brackets(*ends, sign="+") }}{{ "" if loop.last else "; " }}{% endfor %}. In brackets:
95% of a paired bootstrap over users, on one seed.</p>{% endfor %}{% endcall %}
{%- call(plot) section("Training") %}<p>By update, after the warm-up that all losses share; running
means over a fortieth of the updates; NLL in nats a token. Group 0 holds the target tokens least
relevant to auxiliary tokens: those that need the user most.</p>{{ figure(plot) }}{% endcall %}
{%- call(part) section("Groups") %}<p>Target tokens by relevance ({{ groups.relevance }}) to
auxiliary tokens, and the {{ split }} windows' NLL in each group, in nats a token.</p>
{{ table(*part) }}{% endcall %}
{%- call(part) section("Attribution") %}<p>The sum of |A aux| over that of |A aux| + |A user|, for
the target tokens of {{ part.of.windows }} windows (gradient: one in {{ evaluate.GRADIENT_EVERY }}).
First tokens choose a title. By ablation below: by group (0 is the least relevant) and by place.</p>
{{ table(*part.table) }}{{ figure(part.plot) }}{% endcall %}
{%- call(part) section("Exposure") %}<p>What each fifth of the catalogue, by popularity in training,
has of the training positives and of the top 10 lists.</p>{{ figure(part.plot) }}
<p>{{ evaluate.NOTE }}</p><p>NDCG@10 by thirds of the windows, cut by the training positives of the
user, and of the title:</p>{% for by in part.tables %}{{ table(*by) }}{% endfor %}{% endcall %}
{%- call(logs) section("Users") %}{% set first = (logs.values()|list)[0] %}
{%- set every = (first|length / 6)|round(0, "ceil")|int %}<p>One in {{ every }} of
{{ first|length }} windows, not chosen by hand. The title that the user chose is marked.</p>
{% for line in first[::every] %}<p class="lead">User {{ line.user }} chose {{ line.target }}</p>
<div class="lists">{{ titles("history, oldest first", line.history, line.target) }}
{%- set i = loop.index0 * every %}{% for name, lines in logs.items() -%}
{{ titles(name, lines[i].titles, line.target) }}{% endfor %}</div>{% endfor %}{% endcall %}
{%- call(record) section("Heat map") %}{{ heatmap(record) }}{% endcall %}
{%- call(tables) section("Settings") -%}
{{ fold("Arguments, data, versions, machine", tables) }}{% endcall %}{% endif %}</body></html>
"""
RAISES = (107, 174, 214)  # blue and orange, which colour-blind readers can tell apart
LOWERS = (253, 174, 107)
COLOURS = {"training positives": "#c6cad0", BEFORE: "#8d96a0", "SFT": "#3f74b5", "GDRT": "#d9822b"}
LOOK = {"svg.fonttype": "none", "svg.hashsalt": "gdrt", "font.size": 9, "legend.frameon": False}
LOOK |= {"axes.grid": True, "axes.grid.axis": "y", "grid.alpha": 0.3, "axes.titleweight": "bold"}


def shade(value, largest):
    """White at 0, blue for what raises a token's probability, orange for what lowers it."""
    strength = min(1.0, abs(value) / largest) if largest else 0.0
    end = RAISES if value > 0 else LOWERS
    return "rgb({},{},{})".format(*(round(255 + (c - 255) * strength) for c in end))


# With a title and a record it renders a heat map; with what write_report gathers, a report.
KNOWN = dict(np=np, evaluate=evaluate, span_sums=span_sums, shade=shade, style=Markup(STYLE))
PAGE = jinja2.Environment(autoescape=True).from_string(TEMPLATE, KNOWN)


def means(y, n):
    """Means over n neighbours each, without those that are NaN; None where all of them are."""
    sums = np.convolve(np.nan_to_num(y), np.ones(n), "valid")
    return (sums / np.ma.masked_equal(np.convolve(np.isfinite(y), [1] * n, "valid"), 0)).tolist()


def draw(axis, title, x, series, shades):
    """Bars over the words x, or running means of lines over the numbers x."""
    colours = [COLOURS.get(name, rgb) for name, rgb in zip(series, shades)]
    if isinstance(x[0], str):
        bars = {name: np.nan_to_num(np.array(y, float)) for name, y in series.items()}
        axis.grouped_bar(bars, tick_labels=x, colors=colours, group_spacing=0.4)
    else:
        n = max(1, len(x) // 40)
        for (name, y), colour in zip(series.items(), colours):
            axis.plot(x[n - 1 :], means(y, n), label=name, color=colour)
    axis.set_title(title, loc="left")
    axis.set_ylim(bottom=0)
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=3, fontsize=8)


def tabulate(title, x, series):
    """(header, rows) of what `draw` shows: its bars, or the ends of its lines."""
    if isinstance(x[0], str):
        return (title, *x), [(name, *map(fmt, y)) for name, y in series.items()]
    n = max(1, len(x) // 10)
    rows = [(k, fmt(means(y[:n], n)[0]), fmt(means(y[-n:], n)[0])) for k, y in series.items()]
    return (title, "first tenth", "last tenth"), rows


def figure(shows, columns, panels):
    """Panels (title, x, {name: y}) as tables and, if matplotlib is installed, as inline SVG."""
    content = {"shows": shows, "tables": [tabulate(*panel) for panel in panels]}
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        return content | {"svg": ""}
    rows = -(-len(panels) // columns)
    file = io.StringIO()
    with matplotlib.rc_context(LOOK):
        page = Figure(figsize=(10.6, 2.6 * rows), layout="constrained", facecolor="none")
        for axis, panel in zip(page.subplots(rows, columns, squeeze=False).flat, panels):
            draw(axis, *panel, matplotlib.colormaps["viridis"](np.linspace(0, 0.88, len(panel[2]))))
        page.savefig(file, format="svg")
    svg = re.sub(r"^.*?(?=<svg)|<metadata>.*?</metadata>", "", file.getvalue(), flags=re.DOTALL)
    label = Markup('<svg role="img" aria-label="{}"').format(shows)
    return content | {"svg": Markup(svg.replace("<svg", label, 1))}


def training_panels(runs):
    """NLL, NLL by group and q over the updates; runs: {name: folder of the loss}."""
    for name, run in runs.items():
        lines = [line for _, line in evaluate.read_lines(run / "metrics.jsonl")]
        log = {key: np.array(y).T for key, y in zip(lines[0], zip(*map(dict.values, lines)))}
        log["group_nll"][log["n"] == 0] = np.nan  # the group was absent, which is no NLL of 0
        yield name, log["step"], {"loss": log["loss"], "mean NLL": log["nll"]}
        for title, key in (("NLL by group", "group_nll"), ("weight q by group", "q")):
            yield f"{name}: {title}", log["step"], {f"group {g}": y for g, y in enumerate(log[key])}


def attribution_part(audits):
    """Auxiliary shares of {name: audit}: overall, by group and by position in the title."""
    panels = []
    for kind in ("group", "position"):
        series = {name: audit["ablation"][f"by {kind}"] for name, audit in audits.items()}
        labels = [str(i) for i in range(max(map(len, series.values())))]
        panels.append((f"auxiliary share by {kind}", labels, series))
    plot = figure("auxiliary share by group and position", 2, panels)
    return {"table": evaluate.audit_table(audits), "plot": plot, "of": audits[BEFORE]}


def exposure_part(models):
    """Shares of the popularity groups and accuracy by terciles; models: {name: metrics}."""
    shares = {"training positives": models[BEFORE]["exposure"]["GH"]}
    shares |= {name: metrics["exposure"]["GP@10"] for name, metrics in models.items()}
    panel = ("share by popularity group", models[BEFORE]["exposure"]["groups"], shares)
    seeds = {name: [metrics] for name, metrics in models.items()}
    tables = [evaluate.tercile_table(seeds, by) for by in evaluate.TERCILES]
    return {"plot": figure("exposure of popularity groups", 1, [panel]), "tables": tables}


def write_report(folder, path=None):
    """Write a page on all finished losses of the run folder runs/NAME to `path` (default: its
    report.html) -> path. A part without its file is left out; no finished loss: InputError."""
    folder = Path(folder)
    config = read_config(folder)
    groups = read_json(folder / "groups.json", "group", "cuts")
    named = {loss_name(loss): folder / loss for loss in config["arguments"]["loss"]}
    runs = {name: run for name, run in named.items() if (run / "metrics.json").exists()}
    if not runs:
        raise InputError(f"{folder}: none of its losses is finished; go on with gdrt.py --resume")
    finished = [run.name for run in runs.values()]
    table = evaluate.result_table(folder, finished)
    split = table[0][0]
    results = {name: read_json(run / "metrics.json") for name, run in runs.items()}
    first = next(iter(results.values()))  # all hold the same figures from before the training
    models = {BEFORE: first["baselines"]["before"][split]}
    models |= {name: result[split] for name, result in results.items()}
    audits = {BEFORE: first["audit"]["before"]}
    audits |= {name: result["audit"]["after"] for name, result in results.items()}
    logs = evaluate.read_logs(folder, finished)
    maps = [run / "heatmap.json" for run in runs.values() if (run / "heatmap.json").exists()]
    kinds = "arguments", "facts", "versions", "machine"
    settings = [((kind, ""), list(config[kind].items())) for kind in kinds]
    parts = {
        "Results": {"table": table, "differences": evaluate.differences(logs)},
        "Training": figure("training by update", 3, list(training_panels(runs))),
        "Groups": evaluate.group_table(groups, models),
        "Attribution": attribution_part(audits) if all(audits.values()) else None,
        "Exposure": exposure_part(models),
        "Users": logs,
        "Heat map": read_json(maps[-1]) if maps else None,
        "Settings": [*settings, (("commit", config["commit"]), [("data", config["data"])])],
    }
    content = {"config": config, "groups": groups, "folder": folder, "runs": runs, "split": split}
    path = Path(path or folder / "report.html")
    write_atomic(path, PAGE.render(title=f"Run {folder.resolve().name}", parts=parts, **content))
    return path
