"""What the three relevances say of one run, before and after its warm-up: rank correlations and the NLL of their groups.

    python benchmarks/relevance.py runs/ml-100k-tiny-seed0/gdrt          into results/relevance.json
    python benchmarks/relevance.py runs/toy-tiny-seed0/gdrt --out FILE   and how well they find the bias that was planted
    python benchmarks/relevance.py RUN --others OTHER ...                and whether other seeds' warm-ups agree with it

Why the warm-up: to a model that has never seen users, the two groups least relevant to auxiliary tokens are about equally
unknown: neither is worse served for lack of the user.

How steady: relevance is measured again on another sample of training windows, and on the warm-ups of other runs. What
the two have in common is told of the tokens with a choice; a token with one continuation is group 3 to all.
"""

import argparse
import itertools
import json
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
import tables
import torch
from quality import planted

from attribution import (
    POINTS,
    attributions,
    cut_groups,
    format_table,
    mean_by_place,
    ratio,
    relevance,
    sample_windows,
)
from data import (
    InputError,
    build_trees,
    limit_onednn_cache,
    load_run,
    read_json,
    run_command,
    start_model,
    write_atomic,
)
from evaluate import by_group, token_nlls
from gdrt import environment

METHODS = "gradient", "ablation", "probability"


def rank_correlation(a, b, weight):
    """Spearman's correlation of a and b (n,), each entry counted weight (n,) times, ties by mean rank."""

    def ranks(x):
        _, index = np.unique(x, return_inverse=True)
        mass = np.bincount(index, weights=weight)
        return (np.cumsum(mass) - mass / 2)[index]

    a, b = ranks(a), ranks(b)
    a, b = a - np.average(a, weights=weight), b - np.average(b, weights=weight)
    return float((weight * a * b).sum() / np.sqrt((weight * a * a).sum() * (weight * b * b).sum()))


def area_under_curve(values, positive):
    """Chance that a value of `positive` (n,) bool lies above one of the rest, ties half."""
    above = values[positive][:, None] - values[~positive]
    return float(((above > 0) + (above == 0) / 2).mean())


def found_bias(model, prompts, dataset, found, choice, steps, seed):
    """{what r is: [AUC with which it tells toy's biased tokens from those a user's taste decides, of all and of those with a choice]}."""
    trees = build_trees(prompts, sample_windows(dataset.train, seed))
    aux, user, item, step, _ = attributions(model, trees, points=steps)
    found = found | {
        "gradient, full vocabulary": mean_by_place(ratio(aux, user), item, step, prompts)
    }
    biased = planted(dataset, prompts) > 0
    return {
        name: [area_under_curve(r[of], biased[of]) for of in (~np.isnan(r), ~np.isnan(r) & choice)]
        for name, r in found.items()
    }


def with_choice(r, prompts):
    """(items, L) bool: the target tokens, those with a relevance r (items, L), that have more than one continuation."""
    return ~np.isnan(r) & (np.diff(prompts.trie.first)[prompts.trie.path[:, :-1]] > 1)


def frequency(dataset, of):
    """Training windows that have each token of the mask `of` (items, L) -> (n,)."""
    times = np.bincount([w.items[w.stop] for w in dataset.train], minlength=len(dataset.titles))
    return np.broadcast_to(times[:, None], of.shape)[of].astype(float)


def measure_relevance(model, prompts, dataset, steps, seed):
    """({method: r (items, L)}, {method: seconds})."""
    found, seconds = {}, {}
    for method in METHODS:
        start = time.perf_counter()
        found[method] = relevance(model, prompts, dataset.train, method, steps, seed)
        seconds[method] = round(time.perf_counter() - start, 1)
    return found, seconds


def describe(model, prompts, dataset, found, seconds, steps, seed):
    """{"correlation": {pair: rho}, "group NLL": {method: [nats a token of the test windows]}, "seconds": {method: s}, toy: "AUC"}."""
    nll, _, item, step, _ = token_nlls(model, prompts, build_trees(prompts, dataset.test))
    groups = {
        method: by_group(nll, cut_groups(r, dataset.train, 4)[0][item, step], 4)
        for method, r in found.items()
    }
    known, choice = ~np.isnan(found["gradient"]), with_choice(found["gradient"], prompts)
    pairs = list(itertools.combinations(METHODS, 2))

    def correlations(of):
        return {
            f"{a}, {b}": rank_correlation(found[a][of], found[b][of], frequency(dataset, of))
            for a, b in pairs
        }

    bias = (
        {"AUC": found_bias(model, prompts, dataset, found, choice, steps, seed)}
        if dataset.planted
        else {}
    )
    return bias | {
        "correlation": correlations(known),
        "correlation where tokens have a choice": correlations(choice),
        "group NLL": groups,
        "seconds": seconds,
    }


def agreement(a, b, prompts, dataset):
    """{method: [rank correlation, share of tokens in the same of 4 groups, that share by chance]}, of the tokens with a choice."""
    choice, result = with_choice(a["gradient"], prompts), {}
    weight = frequency(dataset, choice)
    for method in METHODS:
        groups = (cut_groups(r[method], dataset.train, 4)[0][choice] for r in (a, b))
        result[method] = [
            rank_correlation(a[method][choice], b[method][choice], weight),
            *tables.same_group(*groups, weight),
        ]
    return result


def agreement_table(result):
    return format_table(
        (
            "agreement after the warm-up with",
            "relevance",
            "rank correlation",
            "same group",
            "by chance",
        ),
        [
            (name, method, *(f"{x:.2f}" for x in row))
            for name, methods in result["agreement"].items()
            for method, row in methods.items()
        ],
    )


def load_warmup(model, run):
    """Bring the model to where the warm-up of `run`, a loss's folder, ended."""
    path = Path(run).parent / "warmup" / "checkpoint.pt"
    if not path.exists():
        raise InputError(
            f"{run}: no {path.name} of a warm-up beside it; give a loss's folder of a finished run of gdrt.py"
        )
    model.load_state_dict(torch.load(path, weights_only=True)["model"])


def show(result):
    for when in ("before", "after warm-up"):
        print(
            f"{when}\n"
            + format_table(
                ("rank correlation", "all tokens", "tokens with a choice"),
                [
                    (
                        pair,
                        f"{x:.2f}",
                        f"{result[when]['correlation where tokens have a choice'][pair]:.2f}",
                    )
                    for pair, x in result[when]["correlation"].items()
                ],
            )
        )
        print(
            format_table(
                ("test NLL a token of groups by", "0", "1", "2", "3", "seconds"),
                [
                    (method, *(f"{x:.3f}" for x in values), result[when]["seconds"][method])
                    for method, values in result[when]["group NLL"].items()
                ],
            )
            + "\n"
        )
        if "AUC" in result[when]:
            print(
                format_table(
                    ("AUC of the planted bias", "all tokens", "tokens with a choice"),
                    [
                        (name, *(f"{x:.2f}" for x in auc))
                        for name, auc in result[when]["AUC"].items()
                    ],
                )
                + "\n"
            )
    print(agreement_table(result))


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    p.add_argument(
        "run", help="a loss's folder in a run of gdrt.py, with the run's warmup/ beside it"
    )
    p.add_argument(
        "--others",
        nargs="+",
        default=[],
        metavar="RUN",
        help="the same of runs with other seeds, for how well their warm-ups agree",
    )
    p.add_argument(
        "--steps",
        type=int,
        default=POINTS,
        metavar="M",
        help="points of the gradient's path (default: %(default)s)",
    )
    p.add_argument("--out", default=str(ROOT / "results" / "relevance.json"), metavar="FILE")
    p.add_argument("--cache", metavar="DIR", help="as for gdrt.py")
    p.add_argument("--data-dir", metavar="PATH", help="as for gdrt.py")
    args = p.parse_args(argv)
    limit_onednn_cache(args.cache)
    config, dataset, _, _, prompts = load_run(args.run, args.cache, args.data_dir)
    flags = argparse.Namespace(**config["arguments"], cache=args.cache)
    for other in args.others:
        there = read_json(Path(other).parent / "config.json")
        if (there["data"], there["arguments"]["model"]) != (config["data"], flags.model):
            raise InputError(
                f"{other}: other data or another model than {args.run}; give runs that differ in their seed"
            )
    model, _ = start_model(flags.model, dataset, args.cache)
    found, seconds = measure_relevance(model, prompts, dataset, args.steps, flags.seed)
    result = {
        "run": config,
        "steps": args.steps,
        **environment(),
        "before": describe(model, prompts, dataset, found, seconds, args.steps, flags.seed),
    }
    load_warmup(model, args.run)
    found, seconds = measure_relevance(model, prompts, dataset, args.steps, flags.seed)
    result["after warm-up"] = describe(
        model, prompts, dataset, found, seconds, args.steps, flags.seed
    )
    again, _ = measure_relevance(model, prompts, dataset, args.steps, flags.seed + 1)
    result["agreement"] = {"another sample of windows": agreement(found, again, prompts, dataset)}
    for other in args.others:
        load_warmup(model, other)
        again, _ = measure_relevance(model, prompts, dataset, args.steps, flags.seed)
        result["agreement"][f"the warm-up of {Path(other).parent.name}"] = agreement(
            found, again, prompts, dataset
        )
    write_atomic(args.out, json.dumps(result, indent=1))
    show(result)


if __name__ == "__main__":
    run_command(main)
