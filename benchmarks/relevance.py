"""How good each relevance is: against planted truth, between seeds, in training; and in one run.

    python benchmarks/relevance.py --shop                     toy: every definition, five seeds, and
                                                              trainings; into relevance-shop.json
    python benchmarks/relevance.py RUN                        into results/relevance.json
    python benchmarks/relevance.py RUN --others OTHER ...     do other seeds' warm-ups agree with it

RUN is a loss's folder, such as runs/ml-100k-tiny-seed0/gdrt. Its three relevances are measured
before and after its warm-up: how they correlate, what NLL their groups have and, on toy, how well
they find the planted bias. Agreement is over the tokens with a choice, because a token with one
continuation is always in the last group.

--shop measures the attribution along every path once (`measure`) and derives all definitions from
that (`definitions`). It keeps what is done in --work, so that the same command goes on after an
interruption. Its trainings are evaluated on validation windows alone.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
import quality
import tables
import torch
import torch.autograd.forward_ad as forward_ad
from quality import planted

import gdrt
from attribution import (
    AUXILIARY,
    POINTS,
    FastForwardAD,
    attributions,
    cut_groups,
    format_table,
    forward_mode,
    label_log_prob,
    log_prob_derivative,
    log_probs_of,
    mean_by_place,
    path_ends,
    ratio,
    relevance,
    sample_windows,
)
from data import (
    USER,
    InputError,
    announce,
    build_trees,
    by_length,
    collate,
    legal_tokens,
    load_dataset,
    load_run,
    make_prompts,
    positions,
    read_config,
    read_json,
    run_command,
    set_environment,
    start_model,
    target_logits,
    write_atomic,
)
from evaluate import by_group, evaluate_parts

METHODS = "gradient", "ablation", "probability"


# ------------------------------------------------------------------------------------------------
# statistics


def rank_correlation(a, b, weight):
    """Spearman's correlation of a and b (n,), weighted by weight (n,); ties have a mean rank."""

    def ranks(x):
        _, index = np.unique(x, return_inverse=True)
        mass = np.bincount(index, weights=weight)
        ranked = (np.cumsum(mass) - mass / 2)[index]
        return ranked - np.average(ranked, weights=weight)

    a = ranks(a)
    b = ranks(b)
    return float((weight * a * b).sum() / np.sqrt((weight * a * a).sum() * (weight * b * b).sum()))


def area_under_curve(values, positive):
    """Chance that a value where `positive` (n,) lies above one of the rest; a tie counts half."""
    above = values[positive][:, None] - values[~positive]
    return float(((above > 0) + (above == 0) / 2).mean())


def with_choice(r, prompts):
    """(items, L) bool: tokens with a relevance r (items, L) and more than one continuation."""
    return ~np.isnan(r) & (np.diff(prompts.trie.first)[prompts.trie.path[:, :-1]] > 1)


def frequency(windows, of):
    """How many windows have each token of the mask `of` (items, L) as a target -> (n,)."""
    times = np.bincount([w.items[w.stop] for w in windows], minlength=len(of))
    return np.broadcast_to(times[:, None], of.shape)[of].astype(float)


def bias_found(r, prompts, dataset):
    """AUC with which r tells toy's biased tokens from those of taste: [all, with a choice]."""
    biased = planted(dataset, prompts) > 0
    masks = ~np.isnan(r), with_choice(r, prompts)
    return [area_under_curve(r[of], biased[of]) for of in masks]


def agreement_of(a, b, prompts, windows):
    """[rank correlation, share in the same of 4 groups, that share by chance] of two relevances.

    Over the tokens with a choice for which both, a and b (items, L), have a value.
    """
    of = with_choice(a, prompts) & ~np.isnan(b)
    weight = frequency(windows, of)
    groups = [cut_groups(r, windows, 4)[0][of] for r in (a, b)]
    return [rank_correlation(a[of], b[of], weight), *tables.same_group(*groups, weight)]


# ------------------------------------------------------------------------------------------------
# the shop: attributions by every path, measured once

SEEDS = 5
FLOORS = 0.0, 0.1, 0.25, 0.5, 1.0
# The square of log p with and without the auxiliary tokens and the user has four edges.
EDGES = "auxiliary", "user", "auxiliary without user", "user without auxiliary"
SOFTMAXES = "full vocabulary", "legal"


def along_edge(model, batch, moving, held, legal, points=POINTS):
    """`segment_gradient` with the segment `held` at the baseline -> (softmaxes, N) nats."""
    E, delta = path_ends(model, batch, moving)
    E = E - path_ends(model, batch, held)[1]
    total = 0
    for j in range(points):
        s = (j + 0.5) / points
        with forward_ad.dual_level(), FastForwardAD():
            dual = forward_ad.make_dual(E - (1 - s) * delta, delta)
            logits, tangent = forward_ad.unpack_dual(target_logits(model, batch, embeds=dual))
        some = [log_prob_derivative(logits, tangent, batch.label, tokens) for tokens in legal]
        total = total + torch.stack(some)
    return total / points


def edges_by_gradient(model, batch, legal):
    """((4, softmaxes, N) nats along EDGES, CPU seconds of each edge)."""
    user = (USER,)
    ends = (AUXILIARY, ()), (user, ()), (AUXILIARY, user), (user, AUXILIARY)
    edges = []
    seconds = []
    for moving, held in ends:
        began = time.process_time()
        edges.append(along_edge(model, batch, moving, held, legal))
        seconds.append(time.process_time() - began)
    return torch.stack(edges), seconds


def edges_by_ablation(model, batch, legal):
    """((4, softmaxes, N) nats along EDGES, CPU seconds of each corner).

    Without Shapley, a relevance needs only the first three corners.
    """
    E, _ = path_ends(model, batch, ())
    corners = []
    seconds = []
    for ablated in ((), AUXILIARY, (USER,), (*AUXILIARY, USER)):
        began = time.process_time()
        logits = target_logits(model, batch, E - path_ends(model, batch, ablated)[1])  # (N, V)
        corners.append(torch.stack([label_log_prob(logits, batch.label, some) for some in legal]))
        seconds.append(time.process_time() - began)
    both, user, auxiliary, neither = corners  # named by what is present
    edges = both - user, both - auxiliary, auxiliary - neither, user - neither
    return torch.stack(edges), seconds


def measure(model, prompts, windows, method):
    """{"edges" (4, softmaxes, N), "item", "place", "window" (N,), "seconds" (4,)} on windows."""
    along = edges_by_gradient if method == "gradient" else edges_by_ablation
    trees = build_trees(prompts, windows)
    parts = []
    seconds = np.zeros(len(EDGES))
    with forward_mode(model):
        for indices in by_length(trees):
            batch = collate([trees[i] for i in indices])
            edges, spent = along(model, batch, (None, legal_tokens(batch, prompts.trie)))
            seconds += spent
            parts.append((edges.double(), batch.item, batch.place, batch.window))
    joined = [torch.cat(part, dim=-1).numpy() for part in zip(*parts)]
    return dict(zip(("edges", "item", "place", "window"), joined)) | {"seconds": seconds}


# ------------------------------------------------------------------------------------------------
# the shop: definitions of relevance


def quotient(aux, user, floor):
    """`ratio`, with 0 / 0 = 1 where there is no floor."""
    none = (aux == 0) & (user == 0)
    return np.where(none, 1.0, ratio(np.where(none, 1.0, aux), user, floor))


def definitions(found, method, prompts, keep=None):
    """{definition: (r (items, L), seconds)} from what `measure` found for the tokens keep (N,)."""
    keep = np.ones(len(found["item"]), dtype=bool) if keep is None else keep
    place = found["item"][keep], found["place"][keep]
    plain = 2 if method == "gradient" else 3
    result = {}
    for n, softmax in enumerate(SOFTMAXES):
        aux, user, aux_alone, user_alone = found["edges"][:, n, keep]
        pairs = {
            method: (aux, user, found["seconds"][:plain].sum()),
            f"{method}, Shapley": ((aux + aux_alone) / 2, (user + user_alone) / 2, None),
        }
        for name, (a, u, seconds) in pairs.items():
            seconds = found["seconds"].sum() if seconds is None else seconds
            name += "" if softmax == "legal" else f", {softmax}"
            for floor in FLOORS:
                r = mean_by_place(quotient(a, u, floor), *place, prompts)
                result[f"{name}, floor {floor:g}"] = r, seconds
            if softmax == "legal":
                means = [mean_by_place(np.abs(x), *place, prompts) for x in (a, u)]
                result[f"{name}, ratio of means, floor 0.5"] = ratio(*means), seconds
                result[f"{name}, minus the user's alone"] = -means[1], seconds
    return result


GDRT = {name: gdrt.parser().get_default(name) for name in ("tau", "prior", "groups", "relevance")}
CONTROLS = "random order", "planted order"
TRAINED = {  # row: definition that its groups are of
    "SFT": None,
    "default": "gradient, floor 0.5",
    "no floor": "gradient, floor 0",
    "Shapley": "gradient, Shapley, floor 0.5",
    "regrouped": "gradient, floor 0.5",
    # Random for the tokens with a choice; planted order puts the biased above those of taste.
    "random order": "random order",
    "planted order": "planted order",
}


class Shop:
    """One seed of the study on toy: its start, what it measures and what it trains."""

    def __init__(self, seed, folder, cache):
        self.seed = seed
        self.folder = folder
        self.cache = cache
        self.arguments = quality.make_run("sft", quality.SETTINGS["toy-shop"], seed)["arguments"]
        self.dataset = load_dataset("toy", history=self.arguments["history"])
        self.windows = self.dataset.train
        model, tokenizer = start_model("tiny", self.dataset)
        self.prompts = make_prompts(self.dataset, tokenizer, positions(model))
        self.sample = sample_windows(self.windows, seed)

    @functools.cached_property
    def begun(self):
        """quality.Start: the model after its warm-up, and all that training takes."""
        paths = {"paths": {}, "data_dir": None, "cache": self.cache}
        options = argparse.Namespace(**paths, device="cpu", precision="auto")
        return quality.begin(self.arguments, options)

    @property
    def model(self):
        return self.begun.setup.model

    def after_warmup(self):
        self.model.load_state_dict(self.begun.warm)
        return self.model, self.prompts

    def after_epoch(self):
        """GDRT as it is by default, stopped at the end of the first epoch."""
        setup = self.begun.setup
        span = setup.warmup, len(setup.batches) // self.arguments["epochs"]
        self.train(self.groups("gradient, floor 0.5"), span, self.folder / f"epoch-{self.seed}")
        return self.model, self.prompts

    def train(self, group, span, folder, checkpoint=None, rule=None, n_groups=4):
        begin = checkpoint or Path(self.begun.folder.name) / "warmup" / "checkpoint.pt"
        rule = rule or gdrt.gdrt_rule(GDRT["tau"], GDRT["prior"])
        rest = span, group, rule, n_groups, self.begun.cfg, folder, begin
        return gdrt.train_span(self.begun.setup, *rest)

    def file(self, name, ending):
        return self.folder / f"seed{self.seed}-{name.replace(' ', '-')}.{ending}"

    def is_done(self, kind, name):
        return self.file(name, "json" if kind == "train" else "npz").exists()

    def measured(self, moment, method):
        """`measure` on the greedy sample, or on all windows; from its file or anew."""
        path = self.file(f"{moment} {method}", "npz")
        if not path.exists():
            model, prompts = self.after_epoch() if moment == "epoch 1" else self.after_warmup()
            windows = self.windows if moment == "all windows" else self.sample
            if method == "probability":
                began = time.process_time()
                r = relevance(model, prompts, windows, method)
                found = {"r": r, "seconds": time.process_time() - began}
            else:
                found = measure(model, prompts, windows, method)
            write_atomic(path, lambda file: np.savez(file, **found))
            announce(f"{path.name}: {np.sum(found['seconds']):.0f} s")
        with np.load(path) as arrays:
            return dict(arrays)

    def relevances(self, moment, method):
        """{definition: (r (items, L), seconds)}; of all windows, also by a random half of them."""
        found = self.measured(moment, method)
        if method == "probability":
            return {method: (found["r"], float(found["seconds"]))}
        if moment != "all windows":
            return definitions(found, method, self.prompts)
        result = definitions(found, method, self.prompts)
        draw = np.random.default_rng(self.seed).permutation(len(self.windows))
        keep = np.isin(found["window"], draw[: len(draw) // 2])
        for name, (r, seconds) in definitions(found, method, self.prompts, keep).items():
            result[f"{name}, half of the windows"] = r, seconds / 2
        return result

    def groups(self, name, moment="warm-up"):
        """Groups (items, L) by a definition, or by one of CONTROLS among tokens with a choice."""
        known = "gradient, floor 0.5" if name in CONTROLS else name
        r = definitions(self.measured(moment, "gradient"), "gradient", self.prompts)[known][0]
        if name in CONTROLS:
            choice = with_choice(r, self.prompts)
            r[choice] = np.random.default_rng(self.seed).random(choice.sum()) / 4
            if name == "planted order":
                r[choice] += planted(self.dataset, self.prompts)[choice] / 4
        return cut_groups(r, self.windows, 4)[0]

    def trained(self, row):
        """A training's metrics on validation windows, from its file or anew."""
        path = self.file(row, "json")
        if not path.exists():
            seconds = self.train_row(row)
            truth = planted(self.dataset, self.prompts).astype(int)
            parts = {"valid": self.dataset.valid}
            found = evaluate_parts(self.model, self.prompts, self.dataset, parts, truth, 2)
            metrics = found["valid"][0]
            write_atomic(path, json.dumps(metrics | {"seconds": seconds}))
            announce(f"{path.name}: NDCG@10 {metrics['NDCG@10']:.4f}, {seconds:.0f} s")
        return read_json(path)

    def train_row(self, row):
        batches = self.begun.setup.batches
        span = self.begun.setup.warmup, len(batches)
        if row == "SFT":
            group = np.zeros(quality.title_shape(self.prompts), dtype=int)
            return self.train(group, span, None, rule=gdrt.sft_rule, n_groups=1)
        if row != "regrouped":
            return self.train(self.groups(TRAINED[row]), span, None)
        self.after_epoch()
        epoch = self.folder / f"epoch-{self.seed}"
        span = len(batches) // self.arguments["epochs"], len(batches)
        group = self.groups(TRAINED[row], "epoch 1")
        return self.train(group, span, None, epoch / "checkpoint.pt")


# ------------------------------------------------------------------------------------------------
# the shop: the study


def describe_definition(by_seed, shop):
    """AUC of each seed, agreement of pairs of seeds, least seconds. by_seed: {seed: (r, seconds)}.

    The toy and its tokens are the same for all seeds, so any seed's `shop` will do.
    """
    prompts, windows = shop.prompts, shop.windows
    rs = [r for r, _ in by_seed.values()]
    found = [bias_found(r, prompts, shop.dataset) for r in rs]
    pairs = [agreement_of(a, b, prompts, windows) for a, b in itertools.combinations(rs, 2)]
    return {
        "seeds": list(by_seed),
        "AUC": [round(of_all, 4) for of_all, _ in found],
        "AUC with a choice": [round(of_choice, 4) for _, of_choice in found],
        "rank correlation of seeds": [round(pair[0], 4) for pair in pairs],
        "same group": [round(pair[1], 4) for pair in pairs],
        "same group by chance": [round(pair[2], 4) for pair in pairs],
        # The least, because other jobs share the machine.
        "seconds": round(float(min(seconds for _, seconds in by_seed.values())), 2),
    }


def agreement_with_all(measured, shop):
    """{definition by ablation: [each seed's `agreement_of`]} of r on some windows and r on all.

    Some are the greedy sample, or a random half of the windows.
    """
    result = {}
    everything = measured.get("all windows", {})
    for name, by_seed in everything.items():
        whole = name.removesuffix(", half of the windows")
        label = f"{name} against all" if name != whole else f"{name}, sample against all"
        some = by_seed if name != whole else measured.get("warm-up", {}).get(name, {})
        result[label] = []
        for seed, (r, _) in everything.get(whole, {}).items():
            if seed not in some:
                continue
            pair = agreement_of(some[seed][0], r, shop.prompts, shop.windows)
            result[label].append([round(x, 4) for x in pair])
    return result


def shop_plan():
    """[(kind, name)] of all that is measured and trained for a seed, what matters most first."""
    plan = [("measure", f"warm-up {method}") for method in METHODS]
    plan += [("train", row) for row in TRAINED]
    plan += [("measure", f"epoch 1 {method}") for method in ("gradient", "ablation")]
    return plan + [("measure", "all windows ablation")]


def shop_study(args):
    """The result of the whole study, for results/relevance-shop.json."""
    shops = [Shop(seed, args.work, args.cache) for seed in range(args.seeds)]
    training = {row: {} for row in TRAINED}
    measured = {}  # moment -> definition -> seed -> (r, seconds)
    for (kind, name), shop in itertools.product(shop_plan(), shops):
        if args.done and not shop.is_done(kind, name):
            continue
        if kind == "train":
            training[name][shop.seed] = shop.trained(name)
            continue
        moment, method = name.rsplit(" ", 1)
        by_definition = measured.setdefault(moment, {})
        for definition, found in shop.relevances(moment, method).items():
            by_definition.setdefault(definition, {})[shop.seed] = found
    described = {}
    for moment, by_definition in measured.items():
        described[moment] = {
            definition: describe_definition(by_seed, shops[0])
            for definition, by_seed in by_definition.items()
        }
    default = measured.get("warm-up", {}).get("gradient, floor 0.5", {})
    if 0 not in default:
        raise InputError(
            "--done: seed 0 has no relevance by gradient yet; first run without --done"
        )
    r, _ = default[0]
    choice = with_choice(r, shops[0].prompts)
    return {
        "command": "python benchmarks/relevance.py --shop",
        "arguments": shops[0].arguments | {"seed": list(range(args.seeds))} | GDRT,
        "windows": {"all": len(shops[0].windows), "sample": [len(s.sample) for s in shops]},
        "tokens": {
            "all": int((~np.isnan(r)).sum()),
            "with a choice": int(choice.sum()),
            "of taste": int((planted(shops[0].dataset, shops[0].prompts)[choice] == 0).sum()),
        },
        **gdrt.environment(),
        "definitions": described,
        "agreement with all windows": agreement_with_all(measured, shops[0]),
        "training": {row: described_training(found) for row, found in training.items()},
    }


def described_training(found):
    """{metric: {seed: value}} from each seed's metrics, as `Shop.trained` returns them."""
    names = "NDCG@10", "MGU@5", "NLL", "legal NLL", "seconds"
    told = {}
    for name in names:
        told[name] = {seed: round(metrics[name], 5) for seed, metrics in found.items()}
    for group, name in enumerate(("legal NLL of taste tokens", "legal NLL of biased tokens")):
        nlls = {seed: metrics["group legal NLL"][group] for seed, metrics in found.items()}
        told[name] = {seed: round(nll, 5) for seed, nll in nlls.items()}
    return told


TOLD = (
    ("AUC, all", "AUC"),
    ("AUC, choice", "AUC with a choice"),
    ("seeds' rank corr.", "rank correlation of seeds"),
    ("same group", "same group"),
    ("by chance", "same group by chance"),
    ("s", "seconds"),
)
SHOWN = {  # moment: definitions that results/relevance.md shows; the file holds all
    "warm-up": (
        *(f"gradient, floor {floor:g}" for floor in FLOORS),
        "gradient, minus the user's alone",
        "gradient, Shapley, floor 0",
        "gradient, Shapley, floor 0.5",
        "gradient, full vocabulary, floor 0.5",
        "gradient, Shapley, full vocabulary, floor 0.5",
        "ablation, floor 0",
        "ablation, floor 0.5",
        "ablation, Shapley, floor 0.5",
        "probability",
    ),
    "all windows": ("ablation, floor 0.5", "ablation, floor 0.5, half of the windows"),
    "epoch 1": ("gradient, floor 0.5", "gradient, Shapley, floor 0.5", "ablation, floor 0.5"),
}


def cells_of(told):
    """Number of seeds, then the means that TOLD names, or '' where there is no pair of seeds."""
    cells = [len(told["seeds"])]
    for _, name in TOLD:
        form = {"AUC": "{:.3f}", "seconds": "{:.1f}"}.get(name, "{:.2f}")
        cells.append(form.format(np.mean(told[name])) if np.size(told[name]) else "")
    return cells


def readme_tables(result):
    """Markdown for results/relevance.md: some definitions, and the trainings."""
    rows = []
    for moment, names in SHOWN.items():
        described = result["definitions"].get(moment, {})
        for name in names:
            if name in described:
                when = "" if "windows" in name or moment == "warm-up" else f", {moment}"
                rows.append((name + when, *cells_of(described[name])))
    definitions = tables.markdown(("r", "seeds", *dict(TOLD)), rows)
    return f"{definitions}\n\n{tables.markdown(*training_rows(result['training']))}"


def training_rows(training):
    """(header, rows): means over seeds, and paired differences over the seeds in common."""
    metrics = "NDCG@10", "MGU@5", "legal NLL", "legal NLL of taste tokens"
    rows = []
    for row, told in training.items():
        ndcg = told["NDCG@10"]
        if not ndcg:
            continue
        cells = [f"{np.mean(list(told[name].values())):.4f}" for name in metrics]
        for base in ("SFT", "default"):
            there = training[base]["NDCG@10"]
            less = [ndcg[seed] - there[seed] for seed in ndcg if seed in there]
            mean, low, high = tables.seed_interval(less)
            ends = f" [{low:+.4f}, {high:+.4f}]" if len(less) > 1 else ""
            cells.append(f"{mean:+.4f}{ends}" if less and row != base else "")
        rows.append((row, len(ndcg), *cells))
    header = "groups by", "seeds", *metrics, "NDCG@10 less SFT", "NDCG@10 less default"
    return header, rows


def show_shop(result):
    """Every definition at each moment, then what results/relevance.md shows."""
    for moment, described in result["definitions"].items():
        rows = [(name, *cells_of(told)) for name, told in described.items()]
        print(format_table((f"measured: {moment}", "seeds", *dict(TOLD)), rows) + "\n")
    print(readme_tables(result))


# ------------------------------------------------------------------------------------------------
# one run: its three relevances before and after the warm-up


def measure_relevance(model, prompts, dataset, steps, seed):
    """({method: r (items, L)}, {method: seconds})."""
    found = {}
    seconds = {}
    for method in METHODS:
        start = time.perf_counter()
        found[method] = relevance(model, prompts, dataset.train, method, steps, seed)
        seconds[method] = round(time.perf_counter() - start, 1)
    return found, seconds


def full_vocabulary(model, prompts, dataset, steps, seed):
    """r (items, L) by gradient, with log p over the whole vocabulary."""
    trees = build_trees(prompts, sample_windows(dataset.train, seed))
    aux, user, item, place, _ = attributions(model, trees, points=steps)
    return mean_by_place(ratio(aux, user), item, place, prompts)


def describe(model, prompts, dataset, found, seconds, steps, seed):
    """Pairwise correlations of the relevances, the NLL of their groups on test windows, seconds.

    On toy, also the AUC with which each finds the planted bias.
    """
    trees = build_trees(prompts, dataset.test)
    _, log_p, item, place, _ = log_probs_of(model, prompts, trees)
    groups = {}
    for method, r in found.items():
        group = cut_groups(r, dataset.train, 4)[0]
        groups[method] = by_group(-log_p, group[item, place], 4)

    def correlations(of):
        weight = frequency(dataset.train, of)
        pairs = itertools.combinations(METHODS, 2)
        return {f"{a}, {b}": rank_correlation(found[a][of], found[b][of], weight) for a, b in pairs}

    told = {}
    if dataset.planted:
        full = full_vocabulary(model, prompts, dataset, steps, seed)
        some = found | {"gradient, full vocabulary": full}
        told["AUC"] = {name: bias_found(r, prompts, dataset) for name, r in some.items()}
    r = found["gradient"]
    return told | {
        "correlation": correlations(~np.isnan(r)),
        "correlation where tokens have a choice": correlations(with_choice(r, prompts)),
        "group NLL": groups,
        "seconds": seconds,
    }


def agreement(a, b, prompts, dataset):
    """{method: `agreement_of`} of two measurements {method: r}."""
    return {
        method: agreement_of(a[method], b[method], prompts, dataset.train) for method in METHODS
    }


def agreement_table(result):
    header = "agreement after the warm-up with", "relevance", "rank correlation", "same group"
    rows = []
    for name, methods in result["agreement"].items():
        for method, row in methods.items():
            rows.append((name, method, *(f"{x:.2f}" for x in row)))
    return format_table((*header, "by chance"), rows)


def load_warmup(model, run):
    """Bring the model to where the warm-up of `run`, a loss's folder, ended."""
    path = Path(run).parent / "warmup" / "checkpoint.pt"
    if not path.exists():
        raise InputError(
            f"{run}: no {path.name} of a warm-up beside it; "
            "give a loss's folder of a finished run of gdrt.py"
        )
    kept = torch.load(path, map_location="cpu", weights_only=True)
    gdrt.load_trained(model, kept["model"])


def show(result):
    for when in ("before", "after warm-up"):
        told = result[when]
        rows = []
        for pair, x in told["correlation"].items():
            some = told["correlation where tokens have a choice"][pair]
            rows.append((pair, f"{x:.2f}", f"{some:.2f}"))
        header = "rank correlation", "all tokens", "tokens with a choice"
        print(f"{when}\n{format_table(header, rows)}")
        rows = []
        for method, values in told["group NLL"].items():
            rows.append((method, *(f"{x:.3f}" for x in values), told["seconds"][method]))
        header = "test NLL a token of groups by", "0", "1", "2", "3", "seconds"
        print(format_table(header, rows) + "\n")
        if "AUC" in told:
            header = "AUC of the planted bias", "all tokens", "tokens with a choice"
            rows = []
            for name, auc in told["AUC"].items():
                rows.append((name, *(f"{x:.2f}" for x in auc)))
            print(format_table(header, rows) + "\n")
    print(agreement_table(result))


def one_run(args):
    """The result for args.run, with how well args.others agree with it."""
    config, dataset, _, _, prompts = load_run(args.run, args.cache, args.data_dir)
    flags = argparse.Namespace(**config["arguments"], cache=args.cache)
    for other in args.others:
        there = read_config(Path(other).parent)
        if (there["data"], there["arguments"]["model"]) != (config["data"], flags.model):
            raise InputError(
                f"{other}: other data or another model than {args.run}; "
                "give runs that differ in their seed"
            )
    setup = gdrt.prepare(flags, dataset, gdrt.TrainConfig())
    model = setup.model
    dataset = dataclasses.replace(dataset, train=setup.windows)
    drawn = args.steps, flags.seed
    found, seconds = measure_relevance(model, prompts, dataset, *drawn)
    before = describe(model, prompts, dataset, found, seconds, *drawn)
    result = {"run": config, "steps": args.steps, **gdrt.environment(), "before": before}
    load_warmup(model, args.run)
    found, seconds = measure_relevance(model, prompts, dataset, *drawn)
    result["after warm-up"] = describe(model, prompts, dataset, found, seconds, *drawn)
    again, _ = measure_relevance(model, prompts, dataset, args.steps, flags.seed + 1)
    result["agreement"] = {"another sample of windows": agreement(found, again, prompts, dataset)}
    for other in args.others:
        load_warmup(model, other)
        again, _ = measure_relevance(model, prompts, dataset, *drawn)
        name = f"the warm-up of {Path(other).parent.name}"
        result["agreement"][name] = agreement(found, again, prompts, dataset)
    return result


# ------------------------------------------------------------------------------------------------
# the command


def parser():
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = p.add_argument
    run = "a loss's folder in a run of gdrt.py, with the run's warmup/ beside it"
    add("run", nargs="?", help=run)
    others = "the same of runs with other seeds, for how well their warm-ups agree"
    add("--others", nargs="+", default=[], metavar="RUN", help=others)
    points = "points of the gradient's path (default: %(default)s)"
    add("--steps", type=int, default=POINTS, metavar="M", help=points)
    add("--shop", action="store_true", help="all definitions on toy, and trainings")
    add("--seeds", type=int, default=SEEDS, metavar="N", help="of --shop (default: %(default)s)")
    add("--done", action="store_true", help="with --shop: tell what is done, and do no more")
    work = "where --shop keeps what it has measured and trained (default: %(default)s)"
    add("--work", type=Path, default=Path("runs/relevance-shop"), metavar="DIR", help=work)
    out = "default: results/relevance.json, or results/relevance-shop.json with --shop"
    add("--out", type=Path, metavar="FILE", help=out)
    add("--cache", metavar="DIR", help="as for gdrt.py")
    add("--data-dir", metavar="PATH", help="as for gdrt.py")
    return p


def main(argv=None):
    args = parser().parse_args(argv)
    if args.shop == bool(args.run):
        raise InputError("name one RUN, or --shop")
    name = "relevance-shop.json" if args.shop else "relevance.json"
    out = args.out or ROOT / "results" / name
    set_environment(args.cache)
    if args.shop:
        result = shop_study(args)
        result = json.loads(json.dumps(result))  # as it is read from the file
        show_shop(result)
    else:
        result = one_run(args)
        show(result)
    write_atomic(out, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    run_command(main)
