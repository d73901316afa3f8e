"""What the three relevances say of one run, before and after its warm-up: rank correlations and the NLL of their groups.

    python benchmarks/relevance.py runs/ml-100k-tiny-seed0/gdrt          into results/relevance.json
    python benchmarks/relevance.py runs/toy-tiny-seed0/gdrt --out FILE   and how well they find the bias that was planted

Why the warm-up: to a model that has never seen users, the two groups least relevant to auxiliary tokens are about equally
unknown: neither is worse served for lack of the user.
"""
import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
import torch

from attribution import STEPS, WINDOWS_PER_TITLE, attributions, cut_groups, format_table, mean_by_place, ratio, relevance, sample_windows
from data import build_trees, load_run, run_command, write_atomic
from evaluate import by_group, token_nlls
from gdrt import Job, environment, start_model
from quality import planted

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
    trees = build_trees(prompts, sample_windows(dataset.train, WINDOWS_PER_TITLE, seed))
    aux, user, item, step, _ = attributions(model, trees, steps=steps)
    found = found | {"gradient, full vocabulary": mean_by_place(ratio(aux, user), item, step, prompts)}
    biased = planted(dataset, prompts) > 0
    return {name: [area_under_curve(r[of], biased[of]) for of in (~np.isnan(r), ~np.isnan(r) & choice)] for name, r in found.items()}


def measure(model, prompts, dataset, steps, seed):
    """{"correlation": {pair: rho}, "group NLL": {method: [nats a token of the test windows]}, "seconds": {method: s}, toy: "AUC"}."""
    times = np.bincount([w.items[w.stop] for w in dataset.train], minlength=len(dataset.titles))
    nll, legal, item, step, _ = token_nlls(model, prompts, build_trees(prompts, dataset.test))
    found, groups, seconds = {}, {}, {}
    for method in METHODS:
        start = time.perf_counter()
        r = found[method] = relevance(model, prompts, dataset.train, method, steps, seed)
        seconds[method] = round(time.perf_counter() - start, 1)
        group = cut_groups(r, dataset.train, 4)[0]
        groups[method] = by_group(nll, group[item, step], 4)
    known = ~np.isnan(found["gradient"])
    weight = np.broadcast_to(times[:, None], known.shape)[known].astype(float)
    choice = known & (np.diff(prompts.trie.first)[prompts.trie.path[:, :-1]] > 1)  # more than one continuation
    chosen = np.broadcast_to(times[:, None], known.shape)[choice].astype(float)
    pairs = [(a, b) for i, a in enumerate(METHODS) for b in METHODS[i + 1:]]
    bias = {"AUC": found_bias(model, prompts, dataset, found, choice, steps, seed)} if dataset.planted else {}
    return bias | {"correlation": {f"{a}, {b}": rank_correlation(found[a][known], found[b][known], weight) for a, b in pairs},
                   "correlation where tokens have a choice": {f"{a}, {b}": rank_correlation(found[a][choice], found[b][choice], chosen) for a, b in pairs},
                   "group NLL": groups, "seconds": seconds}


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    p.add_argument("run", help="a loss's folder in a run of gdrt.py, with the run's warmup/ beside it")
    p.add_argument("--steps", type=int, default=STEPS, metavar="M", help="points of the gradient's path (default: %(default)s)")
    p.add_argument("--out", default=str(ROOT / "results" / "relevance.json"), metavar="FILE")
    p.add_argument("--cache", metavar="DIR", help="as for gdrt.py")
    p.add_argument("--data-dir", metavar="PATH", help="as for gdrt.py")
    args = p.parse_args(argv)
    config, dataset, _, _, prompts = load_run(args.run, args.cache, args.data_dir)
    flags = argparse.Namespace(**config["arguments"], cache=args.cache)
    model, _ = start_model(flags, dataset, Job(precision=config["arguments"]["precision"].replace("auto", "bf16")))
    result = {"run": config, "steps": args.steps, **environment(), "before": measure(model, prompts, dataset, args.steps, flags.seed)}
    state = torch.load(Path(args.run).parent / "warmup" / "checkpoint.pt", weights_only=True)
    model.load_state_dict(state["model"])
    result["after warm-up"] = measure(model, prompts, dataset, args.steps, flags.seed)
    write_atomic(args.out, json.dumps(result, indent=1))
    for when in ("before", "after warm-up"):
        print(f"{when}\n" + format_table(("rank correlation", "all tokens", "tokens with a choice"), [
            (pair, f"{x:.2f}", f"{result[when]['correlation where tokens have a choice'][pair]:.2f}")
            for pair, x in result[when]["correlation"].items()]))
        print(format_table(("test NLL a token of groups by", "0", "1", "2", "3", "seconds"), [
            (method, *(f"{x:.3f}" for x in values), result[when]["seconds"][method]) for method, values in result[when]["group NLL"].items()]) + "\n")
        if "AUC" in result[when]:
            print(format_table(("AUC of the planted bias", "all tokens", "tokens with a choice"), [
                (name, *(f"{x:.2f}" for x in auc)) for name, auc in result[when]["AUC"].items()]) + "\n")


if __name__ == "__main__":
    run_command(main)
