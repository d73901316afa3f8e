"""README's tables and figures from results/quality.jsonl and results/windows/*.npz, and from nothing else.

    python benchmarks/tables.py [SECTION ...]            Markdown of what TITLES lists: grid, loo, transfer and so on
    python benchmarks/tables.py --readme --figures       into README.md between its markers, results/tables.md, and
                                                         results/figures/dose.svg

How sure: accuracy and title NLL are known by window; users, with all their windows, and seeds are resampled together, and
the run and SFT of one seed are compared on the same draw: the 2.5 and 97.5 percentiles (`interval`). What is not a mean
over windows (MGU, DGU, coverage, NLL by group, attribution) has a t interval over the seeds' paired differences
(`seed_interval`): it knows the chance of training, not that of the users.
"""

import argparse
import itertools
import json
import re
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
DRAWS = 2000  # of the bootstrap: an interval's end is then certain to about 3% of its width
T975 = (
    np.nan,
    12.706,
    4.303,
    3.182,
    2.776,
    2.571,
    2.447,
    2.365,
    2.306,
    2.262,
)  # Student's t by degrees of freedom
DETECTED = 1.96 + 0.84  # standard errors that a two-sided 5% test sees in 80% of repetitions
FIRST = (
    "popularity",
    "before",
    "sft",
    "gdrt",
)  # rows of a table; the rest follow in the order of running
# `start` is untrained where the tiny model starts with random weights. Lines without it are older:
# their tiny model had read titles before, so they stand in tables of their own.
GRID = {"dataset": "ml-100k", "split": "time", "windows": 10_000, "start": None}
PLACES = {
    "grid": GRID,
    "loo": {"dataset": "ml-100k", "split": "leave-one-out", "windows": None, "start": None},
    "toy": {"dataset": "toy", "start": None},
    "smollm2": {"dataset": "ml-100k", "model": "smollm2-135m"},
}
NEW_PLACES = {
    "main": {
        "dataset": "ml-100k",
        "split": "leave-one-out",
        "windows": None,
        "start": "untrained",
        "epochs": 2,
    },
    "toy-shop": {"dataset": "toy", "start": "untrained"},
}


# ------------------------------------------------------------------------------------------------ reading


def read_lines(results):
    """The lines of quality.jsonl, the last of each key."""
    path = Path(results) / "quality.jsonl"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return list({line["key"]: line for line in map(json.loads, text.splitlines())}.values())


def pick(lines, tuning=False, **wanted):
    """{row: {seed: line}} of the lines with these arguments. A row whose arguments changed keeps its newest only."""
    rows = {}
    for line in lines:
        a = line["arguments"]
        if bool(a.get("no_test")) == tuning and all(
            a.get(name) == value for name, value in wanted.items()
        ):
            rows.setdefault(line["row"], []).append(line)
    rows = {
        row: rows[row]
        for row in [row for row in FIRST if row in rows] + [row for row in rows if row not in FIRST]
    }
    same = {
        row: [
            line
            for line in found
            if line["arguments"] | {"seed": 0} == found[-1]["arguments"] | {"seed": 0}
        ]
        for row, found in rows.items()
    }
    return {row: {line["arguments"]["seed"]: line for line in found} for row, found in same.items()}


def rows_of(lines, place):
    """pick of an arena's rows, doses (tau=10 and the like) apart."""
    return {row: seeds for row, seeds in pick(lines, **(PLACES | NEW_PLACES)[place]).items() if "=" not in row}


def outcomes(results, row, seeds, name, warm=False, part="test"):
    """(values (S, N) of one outcome by seed and window, user (N,)). warm: windows whose target occurs in training."""
    values = []
    for seed in seeds:
        with np.load(
            Path(results) / "windows" / f"{row[seed]['key']}.npz", allow_pickle=False
        ) as kept:
            chosen = kept[f"{part} warm"] if warm else slice(None)
            values.append(kept[f"{part} {name}"][chosen].astype(float))
            user = kept[f"{part} user"][chosen]
    return np.array(values), user


# ------------------------------------------------------------------------------------------------ statistics


def user_sums(values, user):
    """Outcomes (..., N) by window -> (..., U), summed by user."""
    order = np.argsort(user, kind="stable")
    first = np.unique(np.asarray(user)[order], return_index=True)[1]
    return np.add.reduceat(values[..., order], first, axis=-1)


def interval(ours, base, user, draws=DRAWS, seed=0):
    """Paired difference ours - base of outcomes (S, N) -> (relative, absolute), each (mean, low, high).

    Each draw takes U users and S seeds with replacement, the same for both, and with a user all her windows. With few
    seeds the interval is a little narrow (by 11% at 5, 18% at 3, in what is owed to seeds).
    """
    random, S = np.random.default_rng(seed), len(ours)
    size = user_sums(np.ones(len(user)), user)  # (U,)
    both = user_sums(np.stack([ours, base]), user)  # (2, S, U)
    users = random.multinomial(len(size), np.full(len(size), 1 / len(size)), draws).astype(
        float
    )  # (draws, U)
    seeds = random.multinomial(S, np.full(S, 1 / S), draws) / S  # (draws, S)
    a, b = np.einsum("psu,du,ds->pd", both, users, seeds, optimize=True) / (
        users @ size
    )  # (draws,) each

    def summary(point, drawn):
        return (point, *np.percentile(drawn, (2.5, 97.5)))

    with np.errstate(divide="ignore", invalid="ignore"):
        return summary(ours.mean() / base.mean() - 1, a / b - 1), summary(
            ours.mean() - base.mean(), a - b
        )


def seed_interval(differences):
    """(mean, low, high): Student's t over the seeds' paired differences (S,); NaN ends at one seed, all NaN at none."""
    d = np.asarray(differences, dtype=float)
    if not len(d):
        return np.nan, np.nan, np.nan
    half = (
        T975[min(len(d), len(T975)) - 1] * d.std(ddof=1) / np.sqrt(len(d)) if len(d) > 1 else np.nan
    )
    return d.mean(), d.mean() - half, d.mean() + half


def detectable(values, user):
    """Smallest difference of two losses' means that (S, N) outcomes of ONE loss over S seeds let one expect to see.

    The standard error of such a difference, without any effect, is the larger of two: between seeds, sd of the seeds' means
    times sqrt(2 / S); and over users, that of two seeds' paired difference, users being independent, by sqrt(1 / S).
    """
    S, size = len(values), user_sums(np.ones(len(user)), user)
    between = values.mean(1).std(ddof=1) * np.sqrt(2 / S)
    pairs = []
    for i in range(S):
        for j in range(i):
            d = user_sums(values[i] - values[j], user)
            pairs.append(np.sqrt(((d - d.sum() / size.sum() * size) ** 2).sum()) / size.sum())
    return DETECTED * max(between, np.mean(pairs) / np.sqrt(S))


# ------------------------------------------------------------------------------------------------ tables

LEGEND = (
    "Means over seeds; [95% interval] of the paired difference to SFT, of a single seed over users alone; bold where it "
    "excludes zero. Title NLL and NLL by group: held out, nats over legal continuations; group 0 is least relevant to the "
    "auxiliary tokens (on toy: tokens of taste), compared where both were read by the same groups. aux:user: attribution by "
    "ablation. seconds: training, warm-up and grouping included."
)
RULE = (
    "Our figure [95%]: verdict. *Confirmed* where the 95% interval excludes zero on the stated side, reaches the stated size, "
    "and our figure is at least half of it; *weaker* where it only excludes zero; *not found* otherwise. Where no size is "
    "stated, excluding zero confirms. Extra cost: *Confirmed* up to 10%, *weaker* up to 30%."
)


def verdict(estimate, low, high, claimed):
    """RULE; claimed < 0 where a fall is stated."""
    if claimed < 0:
        estimate, low, high, claimed = -estimate, -high, -low, -claimed
    if not low > 0:
        return "not found"
    return "Confirmed" if high >= claimed and estimate >= claimed / 2 else "weaker"


def markdown(header, rows):
    lines = [header, ["---"] * len(header), *rows] if rows else []
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def span(triple, form="{:+.3f}", scale=1):
    """'mean [low, high]', bold where that excludes zero; '' where there is nothing to compare."""
    mean, low, high = (scale * x for x in triple)
    text = (
        ""
        if np.isnan(mean)
        else form.format(mean)
        + ("" if np.isnan(low) else f" [{form.format(low)}, {form.format(high)}]")
    )
    return f"**{text}**" if low > 0 or high < 0 else text


def aux_ratio(line):
    """Auxiliary to user attribution over all target tokens of the test windows, by ablation."""
    share = line["audit"]["ablation"]["auxiliary share"]
    return share / (1 - share)


def cost(line):
    """Seconds of training, with the warm-up and whatever grouping took."""
    return line["seconds"]["warm-up"] + line["seconds"]["train"] + line["seconds"]["relevance"]


def group_nll(line):
    """Held-out NLL by group (K,), NaN where no test target has the group."""
    return np.array(line["test"]["group legal NLL"], dtype=float)


def group_zero(line):
    return group_nll(line)[0]


def unfairness(line):
    return line["test"]["MGU@5"]


def by_seed(row, sft, get):
    """Paired differences row - sft of what `get` reads off a line: (mean, low, high) by seed_interval."""
    return seed_interval([get(row[seed]) - get(sft[seed]) for seed in sorted(set(row) & set(sft))])


def group_zero_to_sft(row, sft):
    """by_seed of group 0's NLL, of the seeds whose two runs were read by the same groups."""
    alike = {
        seed: line
        for seed, line in row.items()
        if seed in sft and line.get("held groups") == sft[seed].get("held groups")
    }
    return by_seed(alike, sft, group_zero)


def by_window(results, row, sft, name, warm=False):
    """Paired differences row - sft of an outcome by window: (relative, absolute) by interval."""
    seeds = sorted(set(row) & set(sft))
    if not seeds:
        return ((np.nan,) * 3,) * 2
    (ours, user), (base, _) = (outcomes(results, one, seeds, name, warm) for one in (row, sft))
    return interval(ours, base, user)


BY_WINDOW = (
    "seeds",
    "NDCG@10",
    "to SFT, %",
    "HR@10",
    "title NLL",
    "to SFT, nats",
)  # what a part of the windows has, too
COLUMNS = (
    *BY_WINDOW,
    "NLL by group",
    "group 0 to SFT",
    "MGU@5",
    "MGU@5 to SFT",
    "DGU@5",
    "coverage@10",
    "aux:user",
    "seconds",
)
HEADLINE = (
    "seeds",
    "NDCG@10",
    "to SFT, %",
    "title NLL",
    "to SFT, nats",
    "group 0 to SFT",
    "MGU@5 to SFT",
    "seconds",
)


def table(results, rows, columns=COLUMNS, warm=False):
    """A line a row; to SFT: the paired difference. warm: only windows whose target occurs in training."""
    body = []
    for name, row in rows.items():
        sft, lines = rows.get("sft", {}) if name not in FIRST[:3] else {}, list(row.values())

        def mean(get, form="{:.4f}"):
            return form.format(np.mean([get(line) for line in lines]))

        def level(kind, form="{:.4f}"):
            return form.format(outcomes(results, row, sorted(row), kind, warm)[0].mean())

        cells = {
            "seeds": lambda: len(row),
            "NDCG@10": lambda: level("NDCG@10"),
            "HR@10": lambda: level("HR@10"),
            "to SFT, %": lambda: span(
                by_window(results, row, sft, "NDCG@10", warm)[0], "{:+.1f}", 100
            ),
            "title NLL": lambda: level("legal NLL", "{:.3f}"),
            "to SFT, nats": lambda: span(by_window(results, row, sft, "legal NLL", warm)[1]),
            "NLL by group": lambda: " ".join(
                f"{x:.2f}" for x in np.mean([group_nll(line) for line in lines], axis=0)
            ),
            "group 0 to SFT": lambda: span(group_zero_to_sft(row, sft)),
            "MGU@5": lambda: mean(unfairness),
            "MGU@5 to SFT": lambda: span(by_seed(row, sft, unfairness), "{:+.4f}"),
            "DGU@5": lambda: mean(lambda line: line["test"]["DGU@5"]),
            "coverage@10": lambda: mean(lambda line: line["test"]["coverage@10"], "{:.3f}"),
            "aux:user": lambda: mean(aux_ratio, "{:.2f}"),
            "seconds": lambda: mean(cost, "{:.0f}"),
        }
        absent = {
            "popularity": ("title NLL", "to SFT, nats", "NLL by group", "aux:user", "seconds"),
            "before": ("seconds",),
        }.get(name, ())
        body.append([name, *("" if column in absent else cells[column]() for column in columns)])
    return markdown(["", *columns], body)


def tuning_table(lines, best=10):
    """The best trials on validation, by arena and loss."""
    text, names = [], ("lr", "epochs", "batch", "warmup", "tau", "prior", "groups")
    losses = {
        "sft": {"loss": "sft", "train_softmax": "full"},
        "gdrt": {"loss": "gdrt", "relevance": "gradient"},
        **{f"gdrt {name}": {"loss": "gdrt", "relevance": name} for name in ("probability", "late")},
        "msl": {"loss": "sft", "train_softmax": "trie"},
    }
    for place, loss in itertools.product(("grid", "loo"), losses):
        wanted = PLACES[place] | losses[loss] | {"no_test": True}
        trials = [
            line
            for line in lines
            if all(line["arguments"].get(name) == value for name, value in wanted.items())
        ]
        trials.sort(key=lambda line: -line["valid"]["NDCG@10"])
        body = [
            [line["arguments"].get(name, "") for name in names]
            + [f"{line['valid'][name]:.4f}" for name in ("NDCG@10", "legal NLL", "MGU@5")]
            for line in trials[:best]
        ]
        text += body and [
            f"{place}, {loss}: {len(body)} of {len(trials)} trials\n",
            markdown([*names, "NDCG@10", "title NLL", "MGU@5"], body) + "\n",
        ]
    return "\n".join(text)


def power_table(results, lines):
    """The smallest difference to SFT that each arena can be expected to show, from SFT's seeds alone."""
    body = []
    for place in ("grid", "loo"):
        row = pick(lines, **PLACES[place]).get("sft", {})
        for name in ("NDCG@10", "HR@10", "legal NLL") if len(row) > 1 else ():
            values, user = outcomes(results, row, sorted(row), name)
            body.append(
                [
                    place,
                    len(set(user)),
                    len(user),
                    len(row),
                    name,
                    values.mean(),
                    detectable(values, user),
                ]
            )
        for name, get in (
            (("MGU@5", unfairness), ("NLL of group 0", group_zero)) if len(row) > 1 else ()
        ):
            values = np.array([get(line) for line in row.values()])
            body.append(
                [
                    place,
                    "",
                    "",
                    len(row),
                    name,
                    values.mean(),
                    DETECTED * values.std(ddof=1) * np.sqrt(2 / len(row)),
                ]
            )
    return markdown(
        [
            "arena",
            "users",
            "windows",
            "seeds",
            "outcome",
            "SFT",
            "smallest detectable difference",
            "of its value",
        ],
        [
            [*cells, f"{value:.4f}", f"{least:.4f}", f"{100 * least / value:.1f}%"]
            for *cells, value, least in body
        ],
    )


def places_of(lines):
    """PLACES, and the folders that transfer read."""
    folders = sorted({line["arguments"]["dataset"] for line in lines} - {"ml-100k", "toy"})
    return PLACES | {name: {"dataset": name, "start": None} for name in folders}


def judged(triple, claimed, form="{:+.1f}%", scale=100):
    """'mean [interval]: verdict' of a statement that claims a size; one seed has no interval, hence no verdict."""
    return span(triple, form, scale) + (
        "" if np.isnan(triple[1]) else f": *{verdict(*triple, claimed)}*"
    )


def judged_cost(triple):
    word = "Confirmed" if triple[0] <= 0.1 else "weaker" if triple[0] <= 0.3 else "not found"
    return span(triple, "{:+.0f}%", 100) + f": *{word}*"


def statements(results, lines):
    """The paper's statements one by one: our figure in each arena, and the verdict of RULE."""
    columns = {}
    for place, wanted in places_of(lines).items():
        rows = pick(lines, **wanted)
        if not {"sft", "gdrt"} <= set(rows):
            continue
        sft, gdrt = rows["sft"], rows["gdrt"]
        both = sorted(set(sft) & set(gdrt))
        worst = [group_zero(line) - np.nanmax(group_nll(line)[1:]) for line in sft.values()]
        untouched = aux_ratio(next(iter(rows["before"].values()))) if "before" in rows else np.nan
        columns[place] = {
            "abstract: more accurate, NDCG@10 +24.29% on average over its baselines (here over SFT)": judged(
                by_window(results, gdrt, sft, "NDCG@10")[0], 0.2429
            ),
            "second-hand: fairer, MGU@5 -37.43%": judged(
                seed_interval(
                    [unfairness(gdrt[seed]) / unfairness(sft[seed]) - 1 for seed in both]
                ),
                -0.3743,
            ),
            "premise: the group least tied to auxiliary tokens fares worst (SFT's NLL there less the next worst group's, nats)": judged(
                seed_interval(worst), 1e-9, "{:+.3f}", 1
            ),
            "premise: GDRT lowers the NLL of that group (nats)": judged(
                group_zero_to_sft(gdrt, sft), -1e-9, "{:+.3f}", 1
            ),
            "second-hand: SFT moves aux:user from 1:1 to 6:1 (log of the factor, there +1.79)": judged(
                seed_interval([np.log(aux_ratio(line) / untouched) for line in sft.values()]),
                np.log(6),
                "{:+.2f}",
                1,
            ),
            "implied: GDRT moves it back (log of the factor)": judged(
                by_seed(gdrt, sft, lambda line: np.log(aux_ratio(line))), -1e-9, "{:+.2f}", 1
            ),
            "second-hand: small extra cost (seconds of training, grouping included)": judged_cost(
                seed_interval([cost(gdrt[seed]) / cost(sft[seed]) - 1 for seed in both])
            ),
        }
    names = next(iter(columns.values()), ())
    return (
        names
        and markdown(
            ["statement", *columns],
            [[name, *(column[name] for column in columns.values())] for name in names],
        )
        + "\n\n"
        + RULE
    )


def same_group(a, b, weight=None):
    """(share of tokens with one group in a and b (n,), that share by chance); weight (n,): how often each token counts."""
    chance = sum(
        np.average(a == g, weights=weight) * np.average(b == g, weights=weight)
        for g in np.unique(a)
    )
    return float(np.average(a == b, weights=weight)), float(chance)


def group_tables(results, lines, relevance):
    """[group (items, L) of each seed that GDRT by this relevance was trained with, -1 where there is no target token]."""
    kept = {}
    for line in lines:
        a = line["arguments"]
        asked = (
            a.get("relevance", "gradient"),
            a.get("groups", 4),
            a.get("train_softmax", "full"),
        )  # MSL has a warm-up of its own
        if asked != (relevance, 4, "full"):
            continue
        for name in (
            line["key"],
            f"groups-{line['key']}",
        ):  # the latter: by gradient, beside a seed's SFT
            path = Path(results) / "windows" / f"{name}.npz"
            if path.exists():
                with np.load(path, allow_pickle=False) as arrays:
                    if "group" in arrays:
                        kept[a["seed"]] = arrays["group"]
    return list(kept.values())


def grouping_table(results, lines):
    """Do two seeds put a token into the same group? Of the tokens outside the last group, which is a tie of those without a choice."""
    body = []
    for place, relevance in itertools.product(
        ("grid", "loo"), ("gradient", "late", "ablation", "probability")
    ):
        here = [line for row in rows_of(lines, place).values() for line in row.values()]
        assigned, pairs = group_tables(results, here, relevance), []
        for a, b in itertools.combinations(assigned, 2):
            last = a.max()
            both = (np.minimum(a, b) >= 0) & (
                np.maximum(a, b) < last
            )  # -1: not a target of this seed's training
            a, b = a[both], b[both]
            pairs.append((both.sum(), *same_group(a, b), np.corrcoef(a, b)[0, 1]))
        if pairs:
            tokens, *shares = np.mean(pairs, axis=0)
            body.append(
                [
                    place,
                    relevance,
                    len(assigned),
                    f"{tokens:.0f}",
                    *(f"{share:.2f}" for share in shares),
                ]
            )
    return markdown(
        [
            "arena",
            "relevance",
            "seeds",
            "tokens with a choice",
            "in the same group",
            "by chance",
            "correlation of the groups",
        ],
        body,
    )


DOSES = {
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


def dose_pairs(lines, name):
    """{value: (GDRT's row, SFT's row)} over tau, groups, windows or epochs, all else as in the grid."""
    grid = pick(lines, **GRID)
    if not {"sft", "gdrt"} <= set(grid):
        return {}
    if name == "windows":
        limits = {line["arguments"]["windows"] for line in lines}
        budgets = {limit: pick(lines, **GRID | {"windows": limit}) for limit in limits}
        return {
            limit or np.inf: (rows.get("gdrt", {}), rows.get("sft", {}))
            for limit, rows in budgets.items()
        }

    def at_values(loss):  # rows that differ from the usual one of this loss in nothing but `name`
        usual = next(iter(grid[loss].values()))["arguments"] | {"seed": 0, name: 0}
        every = {row: next(iter(seeds.values()))["arguments"] for row, seeds in grid.items()}
        return {
            a[name]: grid[row]
            for row, a in every.items()
            if name in a and a | {"seed": 0, name: 0} == usual
        }

    sft = at_values("sft")
    return {
        value: (row, sft.get(value, {}) if sft else grid["sft"])
        for value, row in at_values("gdrt").items()
    }


def dose_curve(results, lines, name):
    """[(value, SFT's row, the four CURVES' (mean, low, high))] of the pairs that have a seed in common, by value."""
    return [
        (
            value,
            pair[1],
            (
                100 * np.array(by_window(results, *pair, "NDCG@10")[0]),
                by_window(results, *pair, "legal NLL")[1],
                group_zero_to_sft(*pair),
                by_seed(*pair, unfairness),
            ),
        )
        for value, pair in sorted(dose_pairs(lines, name).items())
        if set(pair[0]) & set(pair[1])
    ]


def dose_table(results, lines):
    body = []
    for name in DOSES:
        for value, sft, triples in dose_curve(results, lines, name):
            levels = [
                np.mean([line["test"][metric] for line in sft.values()])
                for metric in ("NDCG@10", "MGU@5")
            ]
            body.append(
                [
                    name,
                    "all" if value == np.inf else f"{value:g}",
                    *(f"{x:.4f}" for x in levels),
                    *map(span, triples, CURVES.values()),
                ]
            )
    return markdown(["dose", "value", "SFT's NDCG@10", "SFT's MGU@5", *CURVES], body)


TITLES = {  # of the sections, in results/tables.md
    "headline": "ml-100k by time, 10,000 training windows, in short",
    "grid": "ml-100k by time, 10,000 training windows (`quality.py grid`)",
    "loo": "ml-100k leave-one-out, all windows, the setting of `python gdrt.py --dataset ml-100k` (`quality.py loo`)",
    "toy": "toy, where the biased tokens are known (`quality.py toy`): group 0 are the first words that taste decides, group 1 all that "
    "prefix or fame decides; planted groups gives GDRT these two",
    "smollm2": "SmolLM2-135M-Instruct, 2,000 windows of ml-100k, one epoch in 48 updates, nothing tuned (`quality.py smollm2`)",
    "transfer": "office and book, 10,000 windows, the configuration of ml-100k (`quality.py transfer`): leave-one-out as their files have "
    "it, the test later than all of training",
    "dose": "GDRT to SFT over tau, number of groups, training windows and epochs, ml-100k by time (`quality.py dose`)",
    "groups": "Do two seeds put a token into the same group? Of the tokens with a choice",
    "power": "The smallest differences that can be expected to be seen, from the seeds of SFT alone (`quality.py power`)",
    "tune": "The trials, on validation windows alone (`quality.py tune` to `tune6`)",
    "main": "ml-100k leave-one-out, all windows, two epochs, the tiny model untrained at the start (`quality.py main`)",
    "toy-shop": "toy, the tiny model untrained at the start (`quality.py toy-shop`)",
    "statements": "The paper's statements",
}


def sections(results, names=TITLES):
    """{section: Markdown} of those that have results."""
    lines = read_lines(results)
    tested = [line for line in lines if not line["arguments"].get("no_test")]

    def transfer():
        return "\n\n".join(
            f"{name}, {what}\n\n{table(results, pick(lines, **places_of(lines)[name]), columns, warm)}"
            for name in list(places_of(lines))[len(PLACES) :]
            for what, columns, warm in (
                ("all test windows", COLUMNS, False),
                ("test windows whose target occurs in training", BY_WINDOW, True),
            )
        )

    def place(name, columns=COLUMNS):
        return table(results, rows_of(lines, name), columns)

    makers = {
        "headline": lambda: place("grid", HEADLINE),
        "transfer": transfer,
        "dose": lambda: dose_table(results, tested),
        "groups": lambda: grouping_table(results, tested),
        "power": lambda: power_table(results, lines),
        "tune": lambda: tuning_table(lines),
        "statements": lambda: statements(results, tested),
    }
    text = {name: makers[name]() if name in makers else place(name) for name in names}
    return {name: body for name, body in text.items() if body}


# ------------------------------------------------------------------------------------------------ files and the command


def draw_doses(results, lines, path):
    """The four curves over the four doses, with their 95% intervals, as SVG."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "gdrt"  # equal results, equal file
    import matplotlib.pyplot as plt

    fmt, axes = plt.subplots(len(CURVES), len(DOSES), figsize=(12, 9), sharex="col", sharey="row")
    for column, name in zip(axes.T, DOSES):
        curve = dose_curve(results, lines, name)
        place = np.arange(len(curve))  # doses stand at equal steps, 'all' to the right
        for i, panel in enumerate(column):
            panel.axhline(0, color="0.6", linewidth=0.8)
            if curve:
                mean, low, high = np.array([triples[i] for _, _, triples in curve]).T
                panel.errorbar(
                    place,
                    mean,
                    np.nan_to_num([mean - low, high - mean]),
                    marker="o",
                    markersize=4,
                    capsize=3,
                )
        column[-1].set_xticks(
            place, ["all" if value == np.inf else f"{value:g}" for value, _, _ in curve]
        )
        column[-1].set_xlabel(DOSES[name])
    for panel, label in zip(axes[:, 0], CURVES):
        panel.set_ylabel(label, fontsize=8)
    fmt.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    fmt.savefig(path, metadata={"Date": None})
    plt.close(fmt)


def document(done):
    """Sections as one Markdown file."""
    parts = [
        f"# Tables\n\nMade by `python benchmarks/tables.py` from `quality.jsonl` and `windows/`.\n\n{LEGEND}"
    ]
    return (
        "\n\n".join(
            [
                *parts,
                *(f"## {name}\n\n{TITLES[name]}.\n\n{body.strip()}" for name, body in done.items()),
            ]
        )
        + "\n"
    )


def into_readme(text, name, body):
    """README's text with `body` between <!-- quality: NAME --> and <!-- /quality: NAME -->; unchanged without these."""
    pattern = rf"(<!-- quality: {name} -->\n).*?(<!-- /quality: {name} -->)"
    return re.sub(
        pattern,
        lambda found: found[1] + "\n" + body.strip() + "\n\n" + found[2],
        text,
        flags=re.DOTALL,
    )


def main(argv=None):
    p = argparse.ArgumentParser(
        description="README's tables and figures from results/quality.jsonl."
    )
    p.add_argument("section", nargs="*", help=f"print only these of {', '.join(TITLES)}")
    p.add_argument("--results", type=Path, default=ROOT / "results", metavar="DIR")
    p.add_argument(
        "--readme",
        action="store_true",
        help="print nothing: write the tables between README.md's markers, and all of them "
        "into DIR/tables.md",
    )
    p.add_argument(
        "--figures", action="store_true", help="draw DIR/figures/dose.svg; needs matplotlib"
    )
    args = p.parse_args(argv)
    if unknown := set(args.section) - set(TITLES):
        p.error(f"no section {', '.join(sorted(unknown))}; choose from {', '.join(TITLES)}")
    if not read_lines(args.results):
        p.error(
            f"{args.results / 'quality.jsonl'} holds no results; run benchmarks/quality.py first"
        )
    done = sections(args.results, TITLES if args.readme else args.section or TITLES)
    if args.readme:
        readme = ROOT / "README.md"
        text = readme.read_text(encoding="utf-8")
        for name, body in done.items():
            text = into_readme(text, name, body)
        readme.write_text(text, encoding="utf-8")
        (args.results / "tables.md").write_text(document(done), encoding="utf-8")
    else:
        print(document(done))
    if args.figures:
        tested = [line for line in read_lines(args.results) if not line["arguments"].get("no_test")]
        draw_doses(args.results, tested, args.results / "figures" / "dose.svg")


if __name__ == "__main__":
    main()
