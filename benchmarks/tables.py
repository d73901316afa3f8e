"""Tables and figures of results/, from results/quality.jsonl and outcomes.npz alone.

    python benchmarks/tables.py [SECTION ...]            Markdown of what TITLES lists
    python benchmarks/tables.py --pages --figures        into results/: tables.md, the other pages
                                                         between their markers, and figures/

How sure: accuracy and NLL are known by user, so users are resampled with all their windows, a run
and SFT on the same draw, and the seeds' paired differences widen that interval by Student's t
(`interval`). What is not a mean over windows (MGU, DGU, coverage, NLL by group, attribution) has a
t interval over the seeds' paired differences (`seed_interval`), which covers the chance in training
but not in who the users are.
"""

import argparse
import itertools
import re
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from outcomes import FIELDS, read_array, read_lines

from data import run_command, write_atomic
from evaluate import ends_of, resample, seed_half_width

DETECTED = 1.96 + 0.84  # in standard errors: what a two-sided 5% test finds 80% of the time
# The rows of a table begin with these; the rest follow in the order of running.
FIRST = ("popularity", "before", "sft", "gdrt")

# Lines without `start` are older: their tiny model had read titles before it saw users, so they
# have tables of their own.
GRID = {"dataset": "ml-100k", "split": "time", "windows": 10_000, "start": None}
ALL_WINDOWS = {"dataset": "ml-100k", "split": "leave-one-out", "windows": None}
SETTINGS = {
    "grid": GRID,
    "leave-one-out": ALL_WINDOWS | {"start": None},
    "toy": {"dataset": "toy", "start": None},
    "smollm2": {"model": "smollm2-135m", "windows": 2_000, "lora": None},
    "smollm2-10k": {"model": "smollm2-135m", "windows": 10_000, "lora": 8, "epochs": 1},
    "smollm2-10k-epochs": {"model": "smollm2-135m", "windows": 10_000, "lora": 8, "epochs": 2},
    "smollm2-10k-all": {"model": "smollm2-135m", "windows": 10_000, "lora": None},
    "lora": {"model": "smollm2-135m", "windows": 2_000, "lora": 8},
}
UNTRAINED = {
    "main": ALL_WINDOWS | {"start": "untrained"},
    "toy-shop": {"dataset": "toy", "start": "untrained"},
}
BY_EPOCHS = {  # tables by number of epochs, on validation windows
    "epochs": UNTRAINED["main"],
    "few-windows": UNTRAINED["main"] | {"windows": 10_000},
    "toy-epochs": UNTRAINED["toy-shop"],
    "toy-short": UNTRAINED["toy-shop"] | {"dataset": "toy-short"},
}
MAIN_EPOCHS = 3
OWN_DATA = {"ml-100k", "toy", "toy-short"}  # all others are folders


# ------------------------------------------------------------------------------------------------
# reading


def has(line, wanted):
    """Whether a line's arguments are as wanted; an argument that it lacks counts as None."""
    return all(line["arguments"].get(name) == value for name, value in wanted.items())


def pick(lines, tuning=False, **wanted):
    """{row: {seed: line}} of the lines with these arguments.

    Where a row's arguments have changed, only its newest count. tuning: pick the trials instead.
    """
    rows = {}
    for line in lines:
        if bool(line["arguments"].get("no_test")) == tuning and has(line, wanted):
            rows.setdefault(line["row"], []).append(line)
    first = [row for row in FIRST if row in rows]
    found = {}
    for row in first + [row for row in rows if row not in FIRST]:
        newest = rows[row][-1]["arguments"] | {"seed": 0}
        same = [line for line in rows[row] if line["arguments"] | {"seed": 0} == newest]
        found[row] = {line["arguments"]["seed"]: line for line in same}
    return found


def rows_of(lines, wanted):
    """pick of a setting's rows, without those of a sweep (tau=10 and the like)."""
    return {row: seeds for row, seeds in pick(lines, **wanted).items() if "=" not in row}


def on_validation(lines, rows=("sft", "gdrt uniform")):
    """What the lines of these rows say of validation windows, as lines of trials say it.

    The numbers of epochs and of the learning rate are dropped from a row's name.
    """
    trials = []
    for line in lines:
        row = re.split(" (?:epochs|lr)=", line["row"])[0]
        if "valid" in line and row in rows:
            kept = {name: value for name, value in line.items() if name != "test"}
            kept |= {"row": row, "arguments": line["arguments"] | {"no_test": True}}
            trials.append(kept)
    return trials


def part_of(line):
    """The part of the data that a run was evaluated on."""
    return "test" if "test" in line else "valid"


def user_sums(results, row, seeds, name, seen_target=False):
    """(sums (S, U) of one outcome by seed and user, windows (U,) of each user).

    seen_target: only of the windows whose target occurs in training, and of the users with any.
    """
    prefix = "seen " if seen_target else ""
    stored = []
    for seed in seeds:
        stored.append(read_array(results, f"{row[seed]['key']}/{part_of(row[seed])}"))
    stored = np.array(stored, dtype=float)  # (S, 11, U)
    windows = stored[0, FIELDS.index(f"{prefix}windows")]
    sums = stored[:, FIELDS.index(f"{prefix}{name}")]
    return sums[:, windows > 0], windows[windows > 0]


# ------------------------------------------------------------------------------------------------
# statistics


def interval(ours, base, windows):
    """Paired difference ours - base of outcomes by user -> (relative, absolute).

    ours, base: sums (S, U) by seed and user; windows: (U,) of each user. Each of the two results is
    (mean, low, high), the ends NaN where there is no interval, by the same draws of users. How the
    seeds widen it: see `ends_of` in evaluate.py.
    """
    a = resample(ours, windows)  # (draws,)
    b = resample(base, windows)
    mean_a = ours.sum(1) / windows.sum()  # (S,)
    mean_b = base.sum(1) / windows.sum()
    difference = mean_a - mean_b
    absolute = (difference.mean(), *ends_of(a - b, seed_half_width(difference)))
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = mean_a.mean() / mean_b.mean()
        half = seed_half_width((mean_a - ratio * mean_b) / mean_b.mean())  # the delta method
        relative = np.array([ratio - 1, *ends_of(a / b - 1, half)])
    if not b.min() > 0:  # a draw without any hit: nothing is known relative to it
        relative[1:] = np.nan
    return relative, absolute


def seed_interval(differences):
    """(mean, low, high): Student's t over the seeds' paired differences (S,).

    The ends are NaN at one seed, all three at none.
    """
    d = np.asarray(differences, dtype=float)
    if len(d) == 0:
        return np.nan, np.nan, np.nan
    half = seed_half_width(d) if len(d) > 1 else np.nan
    return d.mean(), d.mean() - half, d.mean() + half


def detectable(sums, windows):
    """Smallest difference between the means of two losses that one can expect to detect.

    sums (S, U) and windows (U,) are of ONE loss over S seeds. The standard error of such a
    difference, without any effect, is the larger of two: between seeds, the standard deviation of
    the seeds' means times sqrt(2 / S); and over users, that of two seeds' paired difference, users
    being independent, by sqrt(1 / S).
    """
    S = len(sums)
    N = windows.sum()
    between = (sums.sum(1) / N).std(ddof=1) * np.sqrt(2 / S)
    pairs = []
    for i, j in itertools.combinations(range(S), 2):
        d = sums[i] - sums[j]  # (U,)
        pairs.append(np.sqrt(((d - d.sum() / N * windows) ** 2).sum()) / N)
    return DETECTED * max(between, np.mean(pairs) / np.sqrt(S))


# ------------------------------------------------------------------------------------------------
# tables

LEGEND = (
    "Means over seeds; [95% interval] of the paired difference to SFT, bold where it excludes "
    "zero and there is more than one seed: of accuracy and NLL over users and seeds (of a single "
    "seed over users alone), of all else over the seeds alone. No interval is corrected for the "
    "number of comparisons. Title NLL and NLL by group: held out, nats over legal continuations; "
    "vocabulary NLL: a title's over the whole vocabulary, which the full softmax trains; group 0: "
    "the least relevant to the auxiliary tokens (on toy: tokens of taste), compared where both "
    "were read by the same groups. aux:user: attribution by ablation over the vocabulary; aux "
    "share: over legal continuations, so of tokens with a choice alone. seconds: training, warm-up "
    "and grouping included."
)
RULE = (
    "Our figure [95%]: verdict. *Confirmed* where the 95% interval excludes zero on the stated "
    "side, reaches the stated size, and our figure is at least half of it; *weaker* where it only "
    "excludes zero; *not found* otherwise. Where no size is stated, excluding zero confirms. Extra "
    "cost: *Confirmed* where the interval ends below 10%, *weaker* where below 30%. One seed gets "
    "no verdict."
)


def verdict(estimate, low, high, claimed):
    """The verdict by RULE; claimed < 0 where a fall is stated."""
    if claimed < 0:
        return verdict(-estimate, -high, -low, -claimed)
    if not low > 0:
        return "not found"
    return "Confirmed" if high >= claimed and estimate >= claimed / 2 else "weaker"


def markdown(header, rows):
    """A Markdown table; '' without rows."""
    if not rows:
        return ""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def span(triple, form="{:+.3f}", scale=1, bold=True):
    """'mean [low, high]', bold where that excludes zero; '' without a finite mean.

    bold: whether it may be, which the interval of one seed, over users alone, may not.
    """
    mean, low, high = (scale * x for x in triple)
    if not np.isfinite(mean):
        return ""
    text = form.format(mean)
    if not np.isnan(low):
        text += f" [{form.format(low)}, {form.format(high)}]"
    return f"**{text}**" if bold and (low > 0 or high < 0) else text


def metric(name):
    """A function that reads one metric off a line."""
    return lambda line: line[part_of(line)][name]


unfairness = metric("MGU@5")


def genre_unfairness(line):
    """Genre MGU@5, NaN where the data have no genres."""
    return line[part_of(line)].get("genre MGU@5", np.nan)


def aux_ratio(line):
    """Auxiliary to user attribution over all target tokens of the test windows, by ablation."""
    aux_share = line["audit"]["ablation"]["auxiliary share"]
    return aux_share / (1 - aux_share)


def legal_aux_share(line):
    """Auxiliary share of attribution over legal continuations, as `gdrt.py` prints it."""
    return line["audit"]["legal ablation"]["auxiliary share"]


def cost(line):
    """Seconds of training, with the warm-up and whatever grouping took."""
    return sum(line["seconds"][name] for name in ("warm-up", "train", "relevance"))


def group_nll(line):
    """Held-out NLL by group (K,), NaN where no held-out target has the group."""
    return np.array(line[part_of(line)]["group legal NLL"], dtype=float)


def group_zero(line):
    return group_nll(line)[0]


def by_seed(row, sft, get):
    """Paired differences row - sft of what `get` reads off a line: (mean, low, high)."""
    return seed_interval([get(row[seed]) - get(sft[seed]) for seed in sorted(set(row) & set(sft))])


def group_zero_to_sft(row, sft):
    """by_seed of group 0's NLL, of the seeds whose two runs were read by the same groups."""
    alike = {}
    for seed, line in row.items():
        if seed in sft and line.get("held groups") == sft[seed].get("held groups"):
            alike[seed] = line
    return by_seed(alike, sft, group_zero)


def by_window(results, row, sft, name, seen_target=False):
    """Paired differences row - sft of an outcome by window: (relative, absolute) by interval."""
    seeds = sorted(set(row) & set(sft))
    if not seeds:
        nothing = (np.nan, np.nan, np.nan)
        return nothing, nothing
    ours, windows = user_sums(results, row, seeds, name, seen_target)
    base, _ = user_sums(results, sft, seeds, name, seen_target)
    return interval(ours, base, windows)


# Columns that can also be had of a part of the windows.
LIKELIHOOD = ("title NLL", "to SFT, nats", "vocabulary NLL to SFT")
BY_WINDOW = ("seeds", "NDCG@10", "to SFT, %", "HR@10", *LIKELIHOOD)
FAIRNESS = ("NLL by group", "group 0 to SFT", "MGU@5", "MGU@5 to SFT", "genre MGU@5 to SFT")
FAIRNESS += ("DGU@5", "coverage@10")
AUX_COLUMNS = ("aux:user", "aux share", "aux share to SFT")
COLUMNS = (*BY_WINDOW, *FAIRNESS, *AUX_COLUMNS, "seconds")
VALIDATION = (*BY_WINDOW, *FAIRNESS, "seconds")
HEADLINE = (
    *("seeds", "NDCG@10", "to SFT, %", "title NLL", "to SFT, nats"),
    *("group 0 to SFT", "MGU@5 to SFT", "seconds"),
)
LEVELS = {  # column: outcome, format
    "NDCG@10": ("NDCG@10", "{:.4f}"),
    "HR@10": ("HR@10", "{:.4f}"),
    "title NLL": ("legal NLL", "{:.3f}"),
}
MEANS = {  # column: what reads it off a line, format
    "MGU@5": (unfairness, "{:.4f}"),
    "DGU@5": (metric("DGU@5"), "{:.4f}"),
    "coverage@10": (metric("coverage@10"), "{:.3f}"),
    "aux:user": (aux_ratio, "{:.2f}"),
    "aux share": (legal_aux_share, "{:.3f}"),
    "seconds": (cost, "{:.0f}"),
}
NATS_TO_SFT = {"to SFT, nats": "legal NLL", "vocabulary NLL to SFT": "NLL"}  # column: outcome
ABSENT = {
    "popularity": (*LIKELIHOOD, "NLL by group", *AUX_COLUMNS, "seconds"),
    "before": ("seconds",),
}


def cell(results, column, row, sft, seen_target=False):
    """The text of one cell; `to SFT` columns hold the paired difference to the row `sft`."""
    if column == "seeds":
        return len(row)
    if column in LEVELS:
        name, form = LEVELS[column]
        sums, windows = user_sums(results, row, sorted(row), name, seen_target)
        return form.format(sums.sum() / (len(sums) * windows.sum()))
    if column in MEANS:
        get, form = MEANS[column]
        return form.format(np.mean([get(line) for line in row.values()]))
    if column == "NLL by group":
        mean = np.mean([group_nll(line) for line in row.values()], axis=0)  # (K,)
        return " ".join(f"{x:.2f}" for x in mean)
    bold = len(set(row) & set(sft)) > 1
    if column == "to SFT, %":
        relative, _ = by_window(results, row, sft, "NDCG@10", seen_target)
        return span(relative, "{:+.1f}", 100, bold)
    if column in NATS_TO_SFT:
        _, absolute = by_window(results, row, sft, NATS_TO_SFT[column], seen_target)
        return span(absolute, bold=bold)
    if column == "group 0 to SFT":
        return span(group_zero_to_sft(row, sft))
    if column == "aux share to SFT":
        return span(by_seed(row, sft, legal_aux_share))
    if column == "genre MGU@5 to SFT":
        return span(by_seed(row, sft, genre_unfairness), "{:+.4f}")
    assert column == "MGU@5 to SFT", column
    return span(by_seed(row, sft, unfairness), "{:+.4f}")


def table(results, rows, columns=COLUMNS, seen_target=False):
    """One line per row. seen_target: only windows whose target occurs in training."""
    body = []
    for name, row in rows.items():
        sft = {} if name in FIRST[:3] else rows.get("sft", {})
        cells = [name]
        for column in columns:
            absent = column in ABSENT.get(name, ())
            cells.append("" if absent else cell(results, column, row, sft, seen_target))
        body.append(cells)
    return markdown(["", *columns], body)


def epochs_table(results, lines, wanted):
    """SFT and GDRT after each number of epochs, on validation windows, compared at equal epochs.

    Last, each loss at its own best number of epochs, by mean NDCG@10 over the seeds that all of
    these rows have.
    """
    trials = on_validation(lines)
    rows = {}  # (epochs, row): {seed: line}
    for epochs in sorted({line["arguments"]["epochs"] for line in trials if has(line, wanted)}):
        for name, row in pick(trials, tuning=True, **wanted | {"epochs": epochs}).items():
            rows[epochs, name] = row
    if not rows:
        return ""

    def cells(name, row, sft):
        against = {} if name == "sft" else sft
        return [name, *(cell(results, column, row, against) for column in VALIDATION)]

    body = []
    for (epochs, name), row in rows.items():
        body.append([epochs, *cells(name, row, rows.get((epochs, "sft"), {}))])
    everywhere = set.intersection(*(set(row) for row in rows.values()))
    best = {}
    for name in ("sft", "gdrt uniform"):
        tried = [epochs for epochs, loss in rows if loss == name]
        if tried and everywhere:
            best[name] = max(tried, key=lambda epochs: mean_ndcg(rows[epochs, name], everywhere))
    for name, epochs in best.items():
        sft = rows.get((best.get("sft"), "sft"), {})
        body.append([f"best: {epochs}", *cells(name, rows[epochs, name], sft)])
    return markdown(["epochs", "", *VALIDATION], body)


def mean_ndcg(row, seeds):
    """Mean NDCG@10 on validation windows of a row's runs with these seeds."""
    return np.mean([row[seed]["valid"]["NDCG@10"] for seed in sorted(seeds)])


BY_RELEVANCE = ("gdrt uniform", "gdrt uniform by ablation", "gdrt uniform by probability")


def stands_for_setup(arguments):
    """Whether this is the run of GDRT by which a set-up's gain is read.

    Relevance is by gradient, except where that takes too long.
    """
    if arguments["model"] != "tiny":
        return arguments["relevance"] == "probability"
    by_gradient = arguments["dataset"] in OWN_DATA
    return arguments["relevance"] == ("gradient" if by_gradient else "ablation")


def setup_name(arguments):
    """The data, and the model if it is not the tiny one."""
    if arguments["model"] == "tiny":
        return arguments["dataset"]
    trained = "LoRA" if arguments.get("lora") else "all weights"
    return f"{arguments['dataset']}, {arguments['model']}, {trained}"


def diagnosis_table(results, lines):
    """What was measured after the warm-up beside what GDRT then gained, on validation windows."""
    setups = {}
    for line in on_validation(lines, ("sft", *BY_RELEVANCE)):
        a = line["arguments"]
        if a["loss"] == "gdrt" and not stands_for_setup(a):
            continue
        if "diagnosis" in line and a["loss"] in ("sft", "gdrt"):
            setup = (setup_name(a), a["windows"] or np.inf, a["epochs"], a["lr"], a["batch"])
            rows = setups.setdefault(setup, {"sft": {}, "gdrt": {}})
            rows[a["loss"]][a["seed"]] = line
    body = []
    for (dataset, windows, epochs, lr, _), rows in sorted(setups.items()):
        row, sft = rows["gdrt"], rows["sft"]
        seeds = set(row) & set(sft)
        if not seeds:
            continue
        cells = [dataset, value_text(windows), str(epochs), f"{lr:g}", str(len(seeds))]
        for name, form in {"user information": "{:.3f}", "language share": "{:.0%}"}.items():
            cells.append(form.format(np.mean([row[seed]["diagnosis"][name] for seed in seeds])))
        relative, _ = by_window(results, row, sft, "NDCG@10")
        bold = len(seeds) > 1
        cells.append(span(relative, "{:+.0f}", 100, bold))
        for seen_target in (False, True):
            _, nats = by_window(results, row, sft, "legal NLL", seen_target)
            cells.append(span(nats, bold=bold))
        body.append(cells)
    header = ["data", "windows", "epochs", "lr", "seeds", "user information", "language share"]
    header += ["NDCG@10 to SFT, %", "title NLL to SFT, nats", "of targets seen in training"]
    return markdown(header, body)


TRIED = ("lr", "epochs", "batch", "warmup", "tau", "prior", "groups")
TUNED_IN = {
    "grid": "grid",
    "leave-one-out": "leave-one-out",
    "lora": "SmolLM2 with LoRA, 2,000 windows",
    "smollm2": "all weights of SmolLM2, 2,000 windows",
}
TUNED = {
    "sft": {"loss": "sft", "train_softmax": "full"},
    "gdrt": {"loss": "gdrt", "relevance": "gradient"},
    "gdrt by probability": {"loss": "gdrt", "relevance": "probability"},
    "gdrt, groups after SFT": {"loss": "gdrt", "relevance": "late"},
    "msl": {"loss": "sft", "train_softmax": "trie"},
}


def tuning_table(lines, best=10):
    """The best trials on validation, by setting and loss; of a pretrained model the best by NLL."""
    text = []
    metrics = ("NDCG@10", "legal NLL", "MGU@5")
    for setting, loss in itertools.product(TUNED_IN, TUNED):
        wanted = SETTINGS[setting] | TUNED[loss] | {"no_test": True}
        trials = [line for line in lines if has(line, wanted)]
        if "model" in wanted:
            trials.sort(key=lambda line: line["valid"]["legal NLL"])
        else:
            trials.sort(key=lambda line: -line["valid"]["NDCG@10"])
        body = []
        for line in trials[:best]:
            tried = [line["arguments"].get(name, "") for name in TRIED]
            body.append(tried + [f"{line['valid'][name]:.4f}" for name in metrics])
        if body:
            text.append(f"{TUNED_IN[setting]}, {loss}: {len(body)} of {len(trials)} trials\n")
            text.append(markdown([*TRIED, "NDCG@10", "title NLL", "MGU@5"], body) + "\n")
    return "\n".join(text)


def power_rows(results, setting, row):
    """A setting's lines of power_table, from the seeds of its SFT row."""
    body = []
    for name in ("NDCG@10", "HR@10", "legal NLL"):
        sums, windows = user_sums(results, row, sorted(row), name)
        size = (len(windows), int(windows.sum()))
        mean = sums.sum() / (len(sums) * windows.sum())
        body.append([setting, *size, len(row), name, mean, detectable(sums, windows)])
    for name, get in (("MGU@5", unfairness), ("NLL of group 0", group_zero)):
        values = np.array([get(line) for line in row.values()])
        least = DETECTED * values.std(ddof=1) * np.sqrt(2 / len(row))
        body.append([setting, "", "", len(row), name, values.mean(), least])
    return body


def power_table(results, lines):
    """The smallest difference to SFT that each setting can be expected to show, from SFT alone."""
    header = ["setting", "users", "windows", "seeds", "outcome", "SFT"]
    header += ["smallest detectable difference", "of its value"]
    body = []
    for setting in ("grid", "leave-one-out"):
        row = pick(lines, **SETTINGS[setting]).get("sft", {})
        rows = power_rows(results, setting, row) if len(row) > 1 else []
        for *cells, value, least in rows:
            body.append([*cells, f"{value:.4f}", f"{least:.4f}", f"{100 * least / value:.1f}%"])
    return markdown(header, body)


TRANSFERS = {
    "transfer": {"start": None, "lora": None},
    "transfer-uniform": {"start": "untrained"},
    "transfer-lora": {"lora": 8},
}


def folders_of(lines, experiment):
    """{name: what picks its lines} of the folders that one of TRANSFERS reads."""
    names = {line["arguments"]["dataset"] for line in lines} - OWN_DATA
    settings = {}
    for name in sorted(names):
        wanted = {"dataset": name} | TRANSFERS[experiment]
        if any(has(line, wanted) for line in lines):
            settings[name] = wanted
    return settings


# ------------------------------------------------------------------------------------------------
# the paper's statements

STATEMENTS = (
    "abstract: more accurate, NDCG@10 +24.29% on average over its baselines (here over SFT)",
    "second-hand: fairer, MGU@5 -37.43%",
    "premise: the group least tied to auxiliary tokens fares worst "
    "(SFT's NLL there less the next worst group's, nats)",
    "premise: GDRT lowers the NLL of that group (nats)",
    "second-hand: SFT moves aux:user from 1:1 to 6:1 (log of the factor, there +1.79)",
    "implied: GDRT moves it back (log of the factor)",
    "second-hand: small extra cost (seconds of training, grouping included)",
)


def judged(triple, claimed, form="{:+.1f}%", scale=100, bold=True):
    """'mean [interval]: verdict' of a claim; one seed, whose interval is not bold, gets none."""
    text = span(triple, form, scale, bold)
    has_verdict = bold and not np.isnan(triple[1])
    return f"{text}: *{verdict(*triple, claimed)}*" if has_verdict else text


def judged_cost(triple):
    """As judged, of the share by which training takes longer; the interval's end decides."""
    text = span(triple, "{:+.0f}%", 100)
    most = triple[2]
    word = "Confirmed" if most <= 0.1 else "weaker" if most <= 0.3 else "not found"
    return text if np.isnan(most) else f"{text}: *{word}*"


def judge_setting(results, rows):
    """One cell for each of STATEMENTS, from the rows of a setting. 1e-9: no size is stated."""
    sft, gdrt = rows["sft"], rows["gdrt"]
    both = sorted(set(sft) & set(gdrt))
    untouched = aux_ratio(next(iter(rows["before"].values()))) if "before" in rows else np.nan

    def ratio(get):
        return seed_interval([get(gdrt[seed]) / get(sft[seed]) - 1 for seed in both])

    worst = [group_zero(line) - np.nanmax(group_nll(line)[1:]) for line in sft.values()]
    moved = [np.log(aux_ratio(line) / untouched) for line in sft.values()]
    back = by_seed(gdrt, sft, lambda line: np.log(aux_ratio(line)))
    return (
        judged(by_window(results, gdrt, sft, "NDCG@10")[0], 0.2429, bold=len(both) > 1),
        judged(ratio(unfairness), -0.3743),
        judged(seed_interval(worst), 1e-9, "{:+.3f}", 1),
        judged(group_zero_to_sft(gdrt, sft), -1e-9, "{:+.3f}", 1),
        judged(seed_interval(moved), np.log(6), "{:+.2f}", 1),
        judged(back, -1e-9, "{:+.2f}", 1),
        judged_cost(ratio(cost)),
    )


def statements(results, lines):
    """The paper's statements in the older set-ups."""
    settings = SETTINGS | folders_of(lines, "transfer")
    rows = {name: pick(lines, **wanted) for name, wanted in settings.items()}
    return statements_table(results, rows)


def statements_today(results, lines):
    """The paper's statements in the set-ups of today, each by the GDRT that stands for it."""
    settings = {
        "toy-shop": UNTRAINED["toy-shop"],
        "main": UNTRAINED["main"] | {"epochs": MAIN_EPOCHS},
        **folders_of(lines, "transfer-uniform"),
        "smollm2-10k": SETTINGS["smollm2-10k"],
        "smollm2-10k-all": SETTINGS["smollm2-10k-all"],
    }
    rows_by_setting = {}
    for name, wanted in settings.items():
        rows = pick(lines, **wanted)
        for row, seeds in rows.items():
            arguments = next(iter(seeds.values()))["arguments"]
            if row in BY_RELEVANCE and stands_for_setup(arguments):
                rows_by_setting[name] = rows | {"gdrt": seeds}
    return statements_table(results, rows_by_setting)


def statements_table(results, rows_by_setting):
    """The paper's statements one by one: our figure in each setting, and the verdict of RULE."""
    columns = {}
    for setting, rows in rows_by_setting.items():
        if {"sft", "gdrt"} <= set(rows):
            columns[setting] = judge_setting(results, rows)
    if not columns:
        return ""
    body = [[STATEMENTS[i], *cells] for i, cells in enumerate(zip(*columns.values()))]
    return markdown(["statement", *columns], body) + "\n\n" + RULE


# ------------------------------------------------------------------------------------------------
# the groups of two seeds


def same_group(a, b, weight=None):
    """(share of tokens with one group in a and b (n,), that share by chance).

    weight: (n,), how often each token counts.
    """
    chance = 0
    for g in np.unique(a):
        chance += np.average(a == g, weights=weight) * np.average(b == g, weights=weight)
    return float(np.average(a == b, weights=weight)), float(chance)


def group_tables(results, lines, relevance):
    """[(items, L), ...]: the groups that GDRT by this relevance was trained with, one a seed.

    -1 where there is no target token. Those by gradient may also be stored under a seed's SFT. MSL
    has a warm-up of its own, hence other groups, and is left out.
    """
    kept = {}
    for line in lines:
        a = line["arguments"]
        usual = a.get("groups", 4) == 4 and a.get("train_softmax", "full") == "full"
        if not usual or a.get("relevance", "gradient") != relevance:
            continue
        for name in (line["key"], f"groups-{line['key']}"):
            groups = read_array(results, f"{name}/groups")
            if groups is not None:
                kept[a["seed"]] = groups
    return list(kept.values())


def agreement(a, b):
    """How far two seeds' groups (items, L) agree: (tokens, same group, by chance, correlation).

    Only target tokens of both trainings count, and none of the last group, where the tokens without
    a choice are tied.
    """
    last = a.max()
    both = (np.minimum(a, b) >= 0) & (np.maximum(a, b) < last)
    a = a[both]
    b = b[both]
    return both.sum(), *same_group(a, b), np.corrcoef(a, b)[0, 1]


def grouping_table(results, lines):
    """Do two seeds put a token into the same group?"""
    header = ["setting", "relevance", "seeds", "tokens with a choice"]
    header += ["in the same group", "by chance", "correlation of the groups"]
    names = {"gradient": "gradient", "late": "gradient, after SFT"}
    names |= {name: name for name in ("ablation", "probability")}
    body = []
    for setting, relevance in itertools.product(("grid", "leave-one-out"), names):
        here = []
        for row in rows_of(lines, SETTINGS[setting]).values():
            here += row.values()
        groups = group_tables(results, here, relevance)
        pairs = [agreement(a, b) for a, b in itertools.combinations(groups, 2)]
        if pairs:
            tokens, *shares = np.mean(pairs, axis=0)
            shares = [f"{share:.2f}" for share in shares]
            body.append([setting, names[relevance], len(groups), f"{tokens:.0f}", *shares])
    return markdown(header, body)


# ------------------------------------------------------------------------------------------------
# sweeps

SWEPT = {
    "tau": "temperature tau",
    "groups": "groups K",
    "windows": "training windows",
    "epochs": "epochs",
}
CURVES = {
    "NDCG@10 to SFT, %": "{:+.1f}",
    "title NLL to SFT, nats": "{:+.3f}",
    "group 0 NLL to SFT, nats": "{:+.3f}",
    "MGU@5 to SFT": "{:+.4f}",
}


def window_pairs(lines):
    """{training windows: (GDRT's row, SFT's row)}, all else as in the grid; inf: all windows."""
    pairs = {}
    for limit in {line["arguments"]["windows"] for line in lines}:
        rows = pick(lines, **GRID | {"windows": limit})
        pairs[limit or np.inf] = (rows.get("gdrt", {}), rows.get("sft", {}))
    return pairs


def swept_pairs(lines, name):
    """{value: (GDRT's row, SFT's row)} over one of SWEPT, all else as in the grid."""
    grid = pick(lines, **GRID)
    if not {"sft", "gdrt"} <= set(grid):
        return {}
    if name == "windows":
        return window_pairs(lines)

    def at_values(loss):
        """{value: row}: the rows that differ from the loss's usual one in nothing but `name`."""
        usual = next(iter(grid[loss].values()))["arguments"] | {"seed": 0, name: 0}
        found = {}
        for row in grid.values():
            a = next(iter(row.values()))["arguments"]
            if name in a and a | {"seed": 0, name: 0} == usual:
                found[a[name]] = row
        return found

    sft = at_values("sft")
    pairs = {}
    for value, row in at_values("gdrt").items():
        pairs[value] = (row, sft.get(value, {}) if sft else grid["sft"])
    return pairs


def sweep_curve(results, lines, name):
    """[(value, SFT's row, the four CURVES' (mean, low, high))] by value.

    Values whose two rows have no seed in common are left out.
    """
    curve = []
    for value, (row, sft) in sorted(swept_pairs(lines, name).items()):
        if set(row) & set(sft):
            relative, _ = by_window(results, row, sft, "NDCG@10")
            _, nats = by_window(results, row, sft, "legal NLL")
            fairness = (group_zero_to_sft(row, sft), by_seed(row, sft, unfairness))
            curve.append((value, sft, (100 * np.array(relative), nats, *fairness)))
    return curve


def value_text(value):
    return "all" if value == np.inf else f"{value:g}"


def sweep_table(results, lines):
    body = []
    for name in SWEPT:
        for value, sft, triples in sweep_curve(results, lines, name):
            cells = [name, value_text(value)]
            for get in (metric("NDCG@10"), unfairness):
                cells.append(f"{np.mean([get(line) for line in sft.values()]):.4f}")
            body.append(cells + list(map(span, triples, CURVES.values())))
    return markdown(["sweep", "value", "SFT's NDCG@10", "SFT's MGU@5", *CURVES], body)


# ------------------------------------------------------------------------------------------------
# sections

TITLES = {  # in results/tables.md
    "headline": "ml-100k by time, 10,000 training windows, in short",
    "grid": "ml-100k by time, 10,000 training windows (`quality.py grid`)",
    "leave-one-out": "ml-100k leave-one-out, all windows, four epochs, batch 128 (`quality.py "
    "leave-one-out`)",
    "toy": "toy, where the biased tokens are known (`quality.py toy`): group 0 are the first words "
    "that taste decides, group 1 all that prefix or fame decides; true groups gives GDRT these two",
    "smollm2": "SmolLM2-135M-Instruct, 2,000 windows of ml-100k, one epoch in 48 updates, nothing "
    "tuned (`quality.py smollm2`)",
    "smollm2-10k": "SmolLM2-135M-Instruct with LoRA of rank 8, 10,000 windows of ml-100k, one "
    "epoch, every third held-out window (`quality.py smollm2-10k`)",
    "smollm2-10k-epochs": "The same after two epochs (`quality.py smollm2-10k-epochs`)",
    "smollm2-10k-all": "All weights of SmolLM2-135M-Instruct, one epoch, otherwise the same "
    "(`quality.py smollm2-10k-all`)",
    "transfer": "office and book, 10,000 windows, the configuration of ml-100k (`quality.py "
    "transfer`): leave-one-out as their files have it, the test later than all of training",
    "sweep": "GDRT to SFT over tau, number of groups, training windows and epochs, ml-100k by time "
    "(`quality.py sweep`)",
    "groups": "Do two seeds put a token into the same group? Of the tokens with a choice",
    "power": "The smallest differences that can be expected to be seen, from the seeds of SFT "
    "alone (`quality.py power`)",
    "tune": "The trials, on validation windows alone (`quality.py tune-lr` and the other tune-)",
    "statements": "The paper's statements, in the older set-ups",
    "statements-today": "The paper's statements, in the set-ups of today",
    "main": "ml-100k leave-one-out, all windows, three epochs, the tiny model untrained at the "
    "start (`quality.py main`)",
    "toy-shop": "toy, the tiny model untrained at the start (`quality.py toy-shop`)",
    "transfer-uniform": "office and book, 10,000 windows, the tiny model untrained at the start "
    "(`quality.py transfer-uniform --data PATH/office PATH/book`)",
    "transfer-lora": "office and book, 1,250 windows, SmolLM2-135M-Instruct with LoRA of rank 8, "
    "one epoch, every twelfth held-out window (`quality.py transfer-lora --data PATH/book`)",
    "epochs": "Epochs on validation windows, the setting of main (`quality.py untrained` and "
    "`epochs`); to SFT after as many epochs",
    "few-windows": "The same with 10,000 training windows (`quality.py few-windows`)",
    "toy-epochs": "Epochs on validation windows of toy (`quality.py toy-epochs`)",
    "toy-short": "The same shop with titles without words of detail (`quality.py toy-short`)",
    "diagnosis": "User information and language share after the warm-up, and what GDRT gained on "
    "validation windows (`quality.py toy-epochs`, `toy-short`, `epochs`, `few-windows`, `main`, "
    "`transfer-uniform`, and the SmolLM2 runs of `tune-lr-lora`, `smollm2-10k` and the like)",
}


def transfer_tables(results, lines, experiment):
    """The tables of every folder: all test windows, and those whose target occurs in training."""
    text = []
    for name, wanted in folders_of(lines, experiment).items():
        rows = pick(lines, **wanted)
        seen = table(results, rows, BY_WINDOW, seen_target=True)
        text.append(f"{name}, all test windows\n\n{table(results, rows)}")
        text.append(f"{name}, test windows whose target occurs in training\n\n{seen}")
    return "\n\n".join(text)


def section(results, lines, name):
    """One section's Markdown, '' without results."""
    tested = [line for line in lines if not line["arguments"].get("no_test")]
    if name in SETTINGS:
        return table(results, rows_of(lines, SETTINGS[name]))
    if name == "headline":
        return table(results, rows_of(lines, GRID), HEADLINE)
    if name == "main":
        return table(results, rows_of(lines, UNTRAINED["main"] | {"epochs": MAIN_EPOCHS}))
    if name == "toy-shop":
        return table(results, rows_of(lines, UNTRAINED["toy-shop"]))
    if name in TRANSFERS:
        return transfer_tables(results, lines, name)
    if name in BY_EPOCHS:
        return epochs_table(results, lines, BY_EPOCHS[name])
    if name == "tune":
        return tuning_table(lines)
    if name == "power":
        return power_table(results, lines)
    if name == "diagnosis":
        return diagnosis_table(results, lines)
    makers = {"sweep": sweep_table, "groups": grouping_table}
    makers |= {"statements": statements, "statements-today": statements_today}
    return makers[name](results, tested)


def sections(results, names=TITLES):
    """{section: Markdown} of those that have results."""
    lines = read_lines(results)
    text = {name: section(results, lines, name) for name in names}
    return {name: body for name, body in text.items() if body}


# ------------------------------------------------------------------------------------------------
# files and the command


def draw_curve(axes, curve, label):
    """One column of the figure: the four curves of a sweep, its values at equal steps."""
    places = np.arange(len(curve))
    for i, panel in enumerate(axes):
        panel.axhline(0, color="0.6", linewidth=0.8)
        if curve:
            mean, low, high = np.array([triples[i] for _, _, triples in curve]).T
            error = np.nan_to_num([mean - low, high - mean])
            panel.errorbar(places, mean, error, marker="o", markersize=4, capsize=3)
    axes[-1].set_xticks(places, [value_text(value) for value, _, _ in curve])
    axes[-1].set_xlabel(label)


def pyplot():
    """matplotlib's pyplot, drawing to files only."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "gdrt"  # equal results, equal file
    import matplotlib.pyplot as plt

    return plt


def save_figure(figure, path):
    figure.tight_layout()
    write_atomic(path, lambda file: figure.savefig(file, format="svg", metadata={"Date": None}))
    pyplot().close(figure)


def draw_sweeps(results, lines, path):
    """The four curves over the four sweeps, with their 95% intervals, as SVG."""
    plt = pyplot()
    size = {"figsize": (12, 9), "sharex": "col", "sharey": "row"}
    figure, axes = plt.subplots(len(CURVES), len(SWEPT), **size)
    for column, name in zip(axes.T, SWEPT):
        draw_curve(column, sweep_curve(results, lines, name), SWEPT[name])
    for panel, label in zip(axes[:, 0], CURVES):
        panel.set_ylabel(label, fontsize=8)
    save_figure(figure, path)


def draw_epochs(lines, path):
    """NDCG@10 of SFT and GDRT on toy's validation windows by number of epochs, as SVG.

    One dot per seed; the line joins their means.
    """
    plt = pyplot()
    wanted = UNTRAINED["toy-shop"] | {"no_test": True}
    figure, panel = plt.subplots(figsize=(7, 2.6))
    for loss, name, colour in (("sft", "SFT", "tab:gray"), ("gdrt", "GDRT", "tab:blue")):
        found = {}
        for line in lines:
            if has(line, wanted | {"loss": loss}):
                epochs = line["arguments"]["epochs"]
                found.setdefault(epochs, []).append(line["valid"]["NDCG@10"])
        for epochs, values in found.items():
            panel.plot([epochs] * len(values), values, ".", color=colour, alpha=0.5)
        epochs = sorted(found)
        means = [np.mean(found[x]) for x in epochs]
        panel.plot(epochs, means, "-", color=colour, label=name)
    panel.set_xlabel("epochs")
    panel.set_ylabel("NDCG@10, toy shop")
    panel.set_ylim(bottom=0)
    panel.legend(frameon=False)
    save_figure(figure, path)


def document(done):
    """Sections as one Markdown file."""
    made_by = "Made by `python benchmarks/tables.py` from `quality.jsonl` and `outcomes.npz`."
    parts = ["# Tables", made_by, LEGEND]
    for name, body in done.items():
        parts.append(f"## {name}\n\n{TITLES[name]}.\n\n{body.strip()}")
    return "\n\n".join(parts) + "\n"


IN_FULL_ONLY = ("HR@10", "genre MGU@5 to SFT", "DGU@5", "coverage@10", "aux:user")


def narrow(body):
    """Markdown whose tables lack the columns of IN_FULL_ONLY, for the pages that are read."""
    lines = []
    kept = None  # the columns of the present table that stay; None between tables
    for line in body.strip().splitlines():
        cells = line.split("|")[1:-1]
        if not cells:
            kept = None
        elif kept is None:
            kept = [i for i, name in enumerate(cells) if name.strip() not in IN_FULL_ONLY]
        lines.append("|" + "|".join(cells[i] for i in kept) + "|" if cells else line)
    return "\n".join(lines)


def into_page(text, name, body):
    """A page's text with `body` between <!-- quality: NAME --> and <!-- /quality: NAME -->.

    Without these markers it comes back unchanged.
    """
    pattern = rf"(<!-- quality: {name} -->\n).*?(<!-- /quality: {name} -->)"

    def replacement(found):
        return found[1] + "\n" + narrow(body) + "\n\n" + found[2]

    return re.sub(pattern, replacement, text, flags=re.DOTALL)


def write_pages(results, done):
    """All tables into DIR/tables.md, and narrowed into the other pages that have their markers."""
    for page in results.glob("*.md"):
        text = page.read_text(encoding="utf-8")
        for name, body in done.items():
            text = into_page(text, name, body)
        write_atomic(page, text)
    write_atomic(results / "tables.md", document(done))


def parser():
    p = argparse.ArgumentParser(description="Tables and figures from results/.")
    p.add_argument("section", nargs="*", help=f"print only these of {', '.join(TITLES)}")
    p.add_argument("--results", type=Path, default=ROOT / "results", metavar="DIR")
    pages = "write DIR/tables.md, and the other pages of DIR between their markers; print nothing"
    p.add_argument("--pages", action="store_true", help=pages)
    figures = "draw DIR/figures/dose.svg and epochs.svg; needs matplotlib"
    p.add_argument("--figures", action="store_true", help=figures)
    return p


def main(argv=None):
    p = parser()
    args = p.parse_args(argv)
    if unknown := set(args.section) - set(TITLES):
        p.error(f"no section {', '.join(sorted(unknown))}; choose from {', '.join(TITLES)}")
    lines = read_lines(args.results)
    if not lines:
        path = args.results / "quality.jsonl"
        p.error(f"{path} holds no results; run benchmarks/quality.py first")
    done = sections(args.results, TITLES if args.pages else args.section or TITLES)
    if args.pages:
        write_pages(args.results, done)
    else:
        print(document(done))
    if args.figures:
        tested = [line for line in lines if not line["arguments"].get("no_test")]
        figures = args.results / "figures"
        if any(swept_pairs(tested, name) for name in SWEPT):
            draw_sweeps(args.results, tested, figures / "dose.svg")
        if any(has(line, UNTRAINED["toy-shop"]) for line in lines):
            draw_epochs(lines, figures / "epochs.svg")


if __name__ == "__main__":
    run_command(main)
