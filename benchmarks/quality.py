"""The evidence: a grid of trainings, one at a time, into results/quality.jsonl; tables.py makes the README's tables of it.

    python benchmarks/quality.py --quick                 the headline on three seeds, into runs/quick, under an hour
    python benchmarks/quality.py power                   SFT alone: the smallest difference that can be seen; run it first
    python benchmarks/quality.py tune                    and tune2: validation alone; the winners go into CONFIG, by hand
    python benchmarks/quality.py tune3                   the same with all windows: the defaults of gdrt.py
    python benchmarks/quality.py tune4                   beyond the edge of tune, and MSL's learning rate; tune5: GDRT's other groups;
                                                         tune6: epochs
    python benchmarks/quality.py grid                    and loo, toy, dose; transfer --data PATH/office PATH/book
    python benchmarks/quality.py smollm2                 a pretrained LM, one seed
    python benchmarks/quality.py grid --rows sft gdrt --seeds 3      a part of it; the rest can follow

A run is named by a key, a hash of its arguments; one that results/quality.jsonl holds is skipped, so any command can be
interrupted and repeated. A line holds arguments, versions, commit, machine, seconds, every metric, on
validation for the trials of tune to tune6, on test for the rest;
results/windows/KEY.npz holds the outcome of every window, from which paired statistics can be recomputed, and the groups
that were trained by; results/windows/groups-KEY.npz those by which all rows of a seed report their held-out NLL.

Read `CONFIG` first, then `experiments`, then the controls, then `perform`. Losses of a seed share the SFT warm-up, the
relevance and the batches, as in gdrt.py; the controls are nothing but other objectives and other tables of groups.
"""

import argparse
import functools
import hashlib
import itertools
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import tables

import gdrt
from attribution import cut_groups, mean_by_place, relevance, sample_windows
from data import (
    InputError,
    announce,
    build_trees,
    fall_back_to_unpacked,
    limit_onednn_cache,
    load_dataset,
    make_prompts,
    positions,
    write_atomic,
)
from evaluate import audit, evaluate_model, list_metrics, popularity_lists, token_nlls

CONFIG = {  # chosen by tune and tune2, by NDCG@10 on validation windows of ml-100k alone, before a test window was read
    "every": {
        "model": "tiny",
        "start": "untrained",  # tells these runs from those whose tiny model had read titles
        "history": 10,
        "batch": 128,
        "epochs": 4,
        "lr": 4e-3,
        "warmup": 0.2,
        "train_softmax": "full",
    },
    "gdrt": {"relevance": "gradient", "groups": 4, "tau": 4.0, "prior": "share"},
    "group-dro": {"relevance": "gradient", "groups": 4, "eta": 0.01},
    "focal": {"gamma": 2.0},
}  # the value of Lin et al. 2017

SETTINGS = {
    "grid": {
        "dataset": "ml-100k",
        "split": "time",
        "windows": 10_000,
    },  # 10,000: the budget of this literature
    "loo": {
        "dataset": "ml-100k",
        "split": "leave-one-out",
        "windows": None,
        "lr": 2e-3,
    },  # by tune3
    "toy": {"dataset": "toy", "split": "leave-one-out", "windows": None},
    "untrained": {
        "dataset": "ml-100k",
        "split": "leave-one-out",
        "windows": None,
        "lr": 2e-3,
        "epochs": 2,
        "batch": 64,
    },
    "toy-shop": {"dataset": "toy", "split": "leave-one-out", "windows": None}
    | {name: gdrt.parser().get_default(name) for name in ("epochs", "batch", "lr")},
    "transfer-uniform": {"split": "leave-one-out", "windows": 10_000, "epochs": 4, "lr": 4e-3},
    "smollm2": {
        "dataset": "ml-100k",
        "split": "leave-one-out",
        "windows": 2_000,
        "model": "smollm2-135m",
        "batch": 40,
        "epochs": 1,
        "lr": 2e-4,
    },
}  # what two cores train in minutes; not tuned, the same for every loss

ROWS = {  # row of a table -> what makes it
    "popularity": {"loss": "popularity"},
    "before": {"loss": "before"},
    "sft": {"loss": "sft"},
    "gdrt": {"loss": "gdrt"},
    "gdrt uniform": {
        "loss": "gdrt",
        "prior": "uniform",
    },  # the default of gdrt.py: first in tune3, second in tune2
    "gdrt uniform by ablation": {"loss": "gdrt", "relevance": "ablation", "prior": "uniform"},
    "gdrt uniform by probability": {"loss": "gdrt", "relevance": "probability", "prior": "uniform"},
    "gdrt late": {"loss": "gdrt", "relevance": "late"},
    "gdrt late uniform": {"loss": "gdrt", "relevance": "late", "prior": "uniform"},
    "gdrt ablation": {"loss": "gdrt", "relevance": "ablation"},
    "gdrt probability": {"loss": "gdrt", "relevance": "probability", "tau": 16.0},  # by tune5
    "gdrt probability tau 4": {
        "loss": "gdrt",
        "relevance": "probability",
    },  # as the other rows, run before tune5
    "group-dro": {"loss": "group-dro"},
    "random groups": {"loss": "gdrt", "relevance": "random"},
    "position groups": {"loss": "gdrt", "relevance": "position"},
    "untuned NLL groups": {"loss": "gdrt", "relevance": "nll"},
    "fixed weights": {"loss": "fixed"},
    "focal": {"loss": "focal"},
    "msl": {"loss": "sft", "train_softmax": "trie", "lr": 1e-3},
    "gdrt + msl": {"loss": "gdrt", "train_softmax": "trie", "lr": 1e-3},  # by tune4
    "planted groups": {"loss": "gdrt", "relevance": "planted", "groups": 2},
    "permuted groups uniform": {"loss": "gdrt", "relevance": "permuted", "prior": "uniform"},
    "planted groups uniform": {
        "loss": "gdrt",
        "relevance": "planted",
        "groups": 2,
        "prior": "uniform",
    },
}  # toy: the groups that relevance should find

NOT_IN_GRID = {
    "planted groups",
    "gdrt uniform by ablation",
    "gdrt uniform by probability",
    "permuted groups uniform",
    "planted groups uniform",
}
GRID_ROWS = [row for row in ROWS if row not in NOT_IN_GRID]

START = (
    "dataset",
    "split",
    "windows",
    "history",
    "model",
    "start",
    "batch",
    "epochs",
    "lr",
    "warmup",
    "train_softmax",
    "seed",
)
KEPT = {
    "NDCG@10": np.float16,
    "HR@10": np.float16,
    "NLL": np.float32,
    "legal NLL": np.float32,
}  # of every window
UNTRAINED = "popularity", "before"
UNIFORM = ("gdrt uniform", "gdrt uniform by ablation", "gdrt uniform by probability")


# ------------------------------------------------------------------------------------------------ the lists of runs


def make_run(row, setting, seed, **changes):
    """One run: its row, its arguments, and those of the start whose groups its held-out NLL is reported by."""
    loss = ROWS[row]["loss"]
    base = (
        CONFIG["every"] | CONFIG.get("gdrt" if loss == "fixed" else loss, {}) | setting | ROWS[row]
    )
    shared = CONFIG["every"] | setting | {"seed": seed}
    if base["model"] != "tiny":  # only the tiny model's start has changed; other keys stay
        del base["start"], shared["start"]
    told = {
        name: value
        for name, value in changes.items()
        if name != "no_test" and base.get(name) != value
    }
    label = row + "".join(
        f" {name}={value:g}" if isinstance(value, float) else f" {name}={value}"
        for name, value in told.items()
    )
    return {
        "name": row,
        "row": label,
        "arguments": base | changes | {"seed": seed},
        "reference": {name: shared[name] for name in START if name in shared},
    }


def key(arguments):
    """Name of a run's files: readable, then a hash of all its arguments."""
    text = json.dumps(arguments, sort_keys=True)
    return (
        "{dataset}-{split}-{loss}-seed{seed}-".format(**arguments)
        + hashlib.sha256(text.encode()).hexdigest()[:10]
    )


def table_of(rows, setting, seeds):
    """Runs of a table, seed by seed, so that a seed's runs share their start; what needs no training runs once."""
    return [
        make_run(row, setting, seed)
        for seed in range(seeds)
        for row in rows
        if row not in UNTRAINED or seed == 0
    ]


def trials(row, setting, seed=0, **values):
    """Every combination of `values`, on validation alone."""
    return [
        make_run(row, setting, seed, no_test=True, **dict(zip(values, combination)))
        for combination in itertools.product(*values.values())
    ]


def experiments(name, folders=()):
    """The runs of a named experiment, in order."""
    base, four = ("popularity", "before", "sft", "gdrt"), ("sft", "gdrt", "msl", "gdrt + msl")
    grid = SETTINGS["grid"]
    if name == "quick":
        return table_of(base, grid, 3)
    if name == "power":
        return table_of(["sft"], grid, 5) + table_of(["sft"], SETTINGS["loo"], 5)
    if name == "grid":
        return table_of(GRID_ROWS, grid, 5)
    if name == "loo":
        return table_of((*base, "gdrt uniform"), SETTINGS["loo"], 5)
    if name == "untrained":
        return [
            run
            for seed in range(5)
            for row in ("sft", "gdrt uniform")
            for run in trials(row, SETTINGS["untrained"], seed)
        ]
    if name == "epochs":
        return [
            run
            for epochs in (1, 2, 3, 4)
            for row in ("sft", "gdrt uniform")
            for run in trials(row, SETTINGS["untrained"], epochs=[epochs])
        ]
    if name == "main":
        return table_of(("popularity", "before", "sft", *UNIFORM), SETTINGS["untrained"], 5)
    if name == "toy-shop":
        controls = ("permuted groups uniform", "planted groups uniform")
        rows = ("popularity", "before", "sft", *UNIFORM, *controls)
        return table_of(rows, SETTINGS["toy-shop"], 5)
    if name == "toy-epochs":
        return [
            run
            for seed in range(3)
            for epochs in (1, 2, 3, 4, 6, 8)
            for row in ("sft", "gdrt uniform")
            for run in trials(row, SETTINGS["toy-shop"], seed, epochs=[epochs])
        ]
    if name == "transfer-uniform":
        if not folders:
            raise InputError("transfer-uniform: name the folders of office and book with --data")
        return [
            run
            for folder in folders
            for run in table_of(
                ("sft", "gdrt uniform by ablation"),
                SETTINGS["transfer-uniform"] | {"dataset": folder},
                3,
            )
        ]
    if name == "smollm2":
        return table_of((*base, "gdrt probability tau 4"), SETTINGS["smollm2"], 1)
    if name == "toy":
        return table_of(
            (*base, "gdrt late", "random groups", "planted groups", "msl", "gdrt + msl"),
            SETTINGS["toy"],
            3,
        )
    if name == "transfer":
        if not folders:
            raise InputError("transfer: name the folders of office and book with --data")
        return [
            run
            for folder in folders
            for run in table_of(
                (*base[:2], *four),
                {"dataset": folder, "split": "leave-one-out", "windows": 10_000},
                3,
            )
        ]
    if name == "tune":  # what GDRT shares with SFT is chosen by SFT
        return trials("sft", grid, lr=(1e-3, 2e-3, 4e-3), batch=(64, 128))
    if name == "tune2":  # as many trials for GDRT, of its own numbers, at what tune put into CONFIG
        return trials("gdrt", grid, tau=(1.0, 4.0, 16.0), prior=("uniform", "share"))
    if (
        name == "tune3"
    ):  # all windows, for the defaults of gdrt.py: the winners of tune and tune2 against the runners-up
        loo, lrs = SETTINGS["loo"], (2e-3, 4e-3)
        return trials("sft", loo, lr=lrs, batch=(64, 128)) + trials(
            "gdrt", loo, lr=lrs, prior=("uniform", "share")
        )
    if (
        name == "tune4"
    ):  # a rate above those of tune, whose best was its highest; and MSL, which has trained at SFT's
        return (
            trials("sft", grid, lr=[8e-3])
            + trials("gdrt", grid, lr=[8e-3])
            + trials("msl", grid, lr=(5e-4, 1e-3, 2e-3, 4e-3, 8e-3))
        )
    if (
        name == "tune5"
    ):  # tune2 again, on other groups: by probability, which the summaries of the paper name, and late
        return [
            run
            for row in ("gdrt probability", "gdrt late")
            for run in trials(row, grid, tau=(1.0, 4.0, 16.0), prior=("uniform", "share"))
        ]
    if name == "tune6":  # is another number of epochs better for one of the two?
        return [
            run
            for epochs in (2, 3, 6)
            for row in ("sft", "gdrt")
            for run in trials(row, grid, epochs=[epochs])
        ]
    if name == "dose":
        doses = [{"tau": tau} for tau in (0.1, 0.3, 1.0, 3.0, 10.0)] + [
            {"groups": groups} for groups in (2, 4, 8, 16)
        ]
        budgets = [grid | {"windows": windows} for windows in (2_000, 5_000, 20_000, None)]
        return [
            run
            for seed in range(3)
            for run in [
                make_run(row, budget, seed)
                for budget in (grid, *budgets)
                for row in ("sft", "gdrt")
            ]
            + [make_run("gdrt", grid, seed, **dose) for dose in doses]
            + [
                make_run(row, grid, seed, epochs=epochs)
                for epochs in (2, 4, 8)
                for row in ("sft", "gdrt")
            ]
        ]


# ------------------------------------------------------------------------------------------------ controls


def fixed(q):
    """Control objective: GDRT with its q held at (K,) throughout: is it the adaptivity, or the weights?"""

    def objective(nll, group, mean, count, log_q):
        weight = torch.tensor(q, device=count.device) * (count > 0)
        weight = weight / weight.sum()
        return (weight / count.clamp(min=1))[group] * nll, weight, log_q

    return objective


def focal(gamma):
    """Control objective: mean of (1 - p)^gamma NLL (Lin et al. 2017): hard tokens weigh more, each by itself."""

    def objective(nll, group, mean, count, log_q):
        return (
            (-torch.expm1(-nll)).clamp(min=0) ** gamma * nll / count.sum(),
            count / count.sum(),
            log_q,
        )

    return objective


def planted(dataset, prompts):
    """toy's own truth as r (items, L): 0 for the first token of a film chosen by taste, 1 where the prefix or fame decides."""
    r = np.ones((len(prompts.titles), prompts.trie.path.shape[1] - 1))
    r[[words[0] == "taste" for words in dataset.planted["words"]], 0] = 0
    return r


def permuted(group, windows, seed):
    """Gradient's groups dealt out anew among the target tokens: (group (items, L), shares (K,)).

    Every group keeps its number of different target tokens; its share of the training tokens
    varies with how often the titles are targets.
    """
    known = group >= 0
    group = group.copy()
    group[known] = np.random.default_rng(seed).permutation(group[known])
    times = np.bincount([w.items[w.stop] for w in windows], minlength=len(group))
    weight = np.broadcast_to(times[:, None], group.shape)[known]
    mass = np.bincount(group[known], weights=weight)
    return group, (mass / mass.sum()).tolist()


def measured(begun, name, seed):
    """r (items, L), whose lowest values become group 0, NaN where nothing is trained -> (r, seconds); once a start.

    Beside the three relevances after the warm-up: 'late', by gradient on the model that SFT has finished; 'random';
    'position' in the title; 'nll', minus the mean NLL of the model before any user; 'planted'. begun.model's weights are
    overwritten.
    """
    if name not in begun.measured:
        began, prompts, device = time.perf_counter(), begun.prompts, begun.job.device
        shape = len(prompts.titles), prompts.trie.path.shape[1] - 1
        if name in ("gradient", "ablation", "probability", "late"):
            if name == "late":
                train_rest(begun, np.zeros(shape, dtype=int), gdrt.sft_rule, 1)
            else:
                begun.model.load_state_dict(begun.warm)
            method = "gradient" if name == "late" else name
            r = relevance(begun.model, prompts, begun.windows, method, seed=seed, device=device)
        elif name == "nll":
            begun.model.load_state_dict(begun.before)
            trees = build_trees(prompts, sample_windows(begun.windows, seed))
            full, _, item, step, _ = token_nlls(begun.model, prompts, trees, device)
            r = -mean_by_place(full, item, step, prompts)
        else:
            r = {
                "random": lambda: np.random.default_rng(seed).random(shape),
                "planted": lambda: planted(begun.dataset, prompts),
                "position": lambda: np.tile(np.arange(shape[1], dtype=float), (shape[0], 1)),
            }[name]()
        targets = np.isin(np.arange(shape[0]), [w.items[w.stop] for w in begun.windows])
        r = np.where(targets[:, None] & (prompts.trie.path[:, 1:] >= 0), r, np.nan)
        begun.measured[name] = r, time.perf_counter() - began
    return begun.measured[name]


def held_groups(reference, run, results):
    """(group table, K) by which held-out NLL is reported: those of the reference's relevance, kept once measured.

    Relevance differs by rounding, hence with machine and threads; rows of a seed stay comparable because all read one file.
    """
    path = results / "windows" / f"groups-{key(run['reference'] | {'loss': 'sft'})}.npz"
    name, n_held = (
        ("planted", 2) if reference.dataset.planted else ("gradient", CONFIG["gdrt"]["groups"])
    )
    if not path.exists():
        group = cut_groups(
            measured(reference, name, run["reference"]["seed"])[0], reference.windows, n_held
        )[0]
        write_atomic(path, lambda file: np.savez_compressed(file, group=group.astype(np.int8)))
    with np.load(path, allow_pickle=False) as kept:
        return kept["group"].astype(np.int64), n_held


# ------------------------------------------------------------------------------------------------ one run


class Start(NamedTuple):
    """What the runs of one seed share: data, batches, the model's weights before and after the SFT warm-up."""

    dataset: object
    prompts: object
    model: object  # its weights are those of whatever was done last
    windows: list
    trees: list
    updates: list
    shared: int  # updates of the warm-up
    job: object
    folder: object  # TemporaryDirectory with the warm-up's checkpoint; goes with the Start
    before: dict
    warm: dict
    seconds: float
    measured: dict


def copied(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


@functools.lru_cache(
    maxsize=3
)  # softmax full and trie, and SFT's own where its learning rate differs
def start(text, data_dir, cache, device, precision):
    """Start for JSON of {START argument: value, "path": of the data}: everything up to the end of the warm-up."""
    args = gdrt.parser().parse_args([])
    vars(args).update(
        json.loads(text),
        data_dir=data_dir,
        cache=cache,
        device=device,
        precision=precision,
        save_every=10**9,
    )
    job = gdrt.make_train_config(args)
    dataset = load_dataset(args.path, data_dir, cache, args.split, args.history)
    model, tokenizer = gdrt.start_model(args.model, dataset, cache)
    model.to(job.device)
    prompts = make_prompts(dataset, tokenizer, positions(model))
    windows = gdrt.draw_windows(dataset.train, args.windows, args.seed)
    prompts = fall_back_to_unpacked(model, prompts, windows, job.device)
    trees = build_trees(prompts, windows)
    updates = gdrt.make_batches(trees, args.batch, args.epochs, args.seed)
    shared = max(1, round(args.warmup * len(updates)))
    folder, before = tempfile.TemporaryDirectory(), copied(model)
    torch.manual_seed(args.seed)
    table = torch.zeros(prompts.trie.path.shape, dtype=torch.long, device=job.device)
    seconds = gdrt.train(
        model,
        prompts,
        trees,
        updates,
        (0, shared),
        table,
        gdrt.sft_rule,
        1,
        job,
        Path(folder.name) / "warmup",
    )
    return Start(
        dataset,
        prompts,
        model,
        windows,
        trees,
        updates,
        shared,
        job,
        folder,
        before,
        copied(model),
        seconds,
        {},
    )


def begin(arguments, options):
    named = {name: arguments[name] for name in START if name in arguments} | {
        "path": options.paths.get(arguments["dataset"], arguments["dataset"])
    }
    return start(
        json.dumps(named, sort_keys=True),
        options.data_dir,
        options.cache,
        options.device,
        options.precision,
    )


def train_rest(begun, group, objective, n_groups):
    """Bring begun.model from the end of the warm-up to the end of training -> (seconds, [what each update tells])."""
    with tempfile.TemporaryDirectory() as folder:
        seconds = gdrt.train(
            begun.model,
            begun.prompts,
            begun.trees,
            begun.updates,
            (begun.shared, len(begun.updates)),
            torch.tensor(group, device=begun.job.device),
            objective,
            n_groups,
            begun.job,
            Path(folder),
            Path(begun.folder.name) / "warmup" / "checkpoint.pt",
        )
        return seconds, [
            json.loads(text) for text in gdrt.complete_lines(Path(folder) / "metrics.jsonl")
        ]


def objective_of(arguments, options):
    """The loop's objective for a run. Fixed weights are the mean q of the GDRT run with the same arguments."""
    loss = arguments["loss"]
    if loss == "fixed":
        twin = finished(options.results).get(key(arguments | {"loss": "gdrt"}))
        if twin is None:
            raise InputError(
                f"fixed weights: the GDRT run of seed {arguments['seed']} gives their q; run it first"
            )
        return fixed(twin["mean q"])
    return {
        "sft": lambda: gdrt.sft_rule,
        "gdrt": lambda: gdrt.gdrt_rule(arguments["tau"], arguments["prior"]),
        "group-dro": lambda: gdrt.group_dro_rule(arguments["eta"]),
        "focal": lambda: focal(arguments["gamma"]),
    }[loss]()


def perform(run, options):
    """Train and evaluate one run -> (its line, {name: per-window array}). Held-out NLL by group: by the reference's groups."""
    began, arguments = time.perf_counter(), run["arguments"]
    begun, reference = begin(arguments, options), begin(run["reference"], options)
    loss, seed, device, dataset = (
        arguments["loss"],
        arguments["seed"],
        begun.job.device,
        begun.dataset,
    )
    held, n_held = held_groups(reference, run, options.results)
    group, n_groups, seconds = held, n_held, {"warm-up": begun.seconds, "relevance": 0, "train": 0}
    line = {
        "key": key(arguments),
        "row": run["row"],
        "arguments": arguments,
        "data": dataset.digest,
        "held groups": hashlib.sha256(held.tobytes()).hexdigest()[:10],
    }
    arrays = {}
    if "relevance" in arguments:
        n_groups, name = arguments["groups"], arguments["relevance"]
        r, seconds["relevance"] = measured(
            begun, "gradient" if name == "permuted" else name, seed
        )
        group, line["cuts"], line["shares"] = cut_groups(r, begun.windows, n_groups)
        if name == "permuted":
            group, line["shares"] = permuted(group, begun.windows, seed)
        arrays["group"] = group.astype(np.int8)
    model = begun.model
    model.load_state_dict(begun.before)  # measuring has left other weights in it
    if loss not in UNTRAINED:
        seconds["train"], steps = train_rest(
            begun, group, objective_of(arguments, options), n_groups
        )
        line["mean q"] = np.mean([step["q"] for step in steps], axis=0).tolist()
        last = steps[-max(1, len(steps) // 10) :]
        line["training group NLL"] = np.mean([step["group_nll"] for step in last], axis=0).tolist()

    known, moment = (
        {i for w in dataset.train for i in w.items[w.start : w.stop + 1]},
        time.perf_counter(),
    )
    part = "valid" if arguments.get("no_test") else "test"
    windows = getattr(dataset, part)
    if loss == "popularity":
        line[part], per_window = list_metrics(
            dataset, windows, *popularity_lists(dataset, windows, 10)
        )
    else:
        line[part], per_window, _ = evaluate_model(
            model, begun.prompts, dataset, windows, held, n_held, device=device
        )
    arrays |= {
        f"{part} {name}": per_window[name].astype(kind)
        for name, kind in KEPT.items()
        if name in per_window
    }
    arrays[f"{part} user"] = np.array([w.user for w in windows], dtype=np.int32)
    arrays[f"{part} warm"] = np.array(
        [w.items[w.stop] in known for w in windows]
    )  # the target occurs in training
    if part == "test" and loss != "popularity":
        line["audit"] = audit(
            model,
            begun.prompts,
            windows,
            held,
            n_held,
            per_window["NDCG@10"],
            seed=seed,
            device=device,
        )
    done = time.perf_counter()
    line["seconds"] = seconds | {"evaluate": done - moment, "total": done - began}
    line |= gdrt.environment()
    named = torch.cuda.get_device_name() if device == "cuda" else device
    line["machine"] |= {"device": named, "precision": begun.job.precision}
    return line, arrays


# ------------------------------------------------------------------------------------------------ the command


def finished(results):
    """{key: line} of the runs that are done."""
    return {line["key"]: line for line in tables.read_lines(results)}


def save(results, line, arrays):
    """Per-window outcomes first, then the line, which makes the run count as finished; both whole or absent."""
    write_atomic(
        results / "windows" / f"{line['key']}.npz", lambda file: np.savez_compressed(file, **arrays)
    )
    path = results / "quality.jsonl"
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    write_atomic(path, before + json.dumps(line) + "\n")


def run_all(runs, options):
    done, began = finished(options.results), time.perf_counter()
    runs = list({key(run["arguments"]): run for run in runs}.values())
    left = [run for run in runs if key(run["arguments"]) not in done]
    announce(f"{len(runs)} runs, {len(runs) - len(left)} of them finished before")
    for number, run in enumerate(left, start=1):
        name = key(run["arguments"])
        if options.dry_run:
            print(name, run["row"], json.dumps(run["arguments"]))
            continue
        line, arrays = perform(run, options)
        save(options.results, line | {"experiment": options.experiment}, arrays)
        remaining = (time.perf_counter() - began) / number * (len(left) - number) / 60
        part = "valid" if "valid" in line else "test"
        announce(
            f"{number}/{len(left)} {run['row']} {name}: {part} NDCG@10 {line[part]['NDCG@10']:.4f}, "
            f"{line['seconds']['total']:.0f} s; about {remaining:.0f} min left"
        )


def parser():
    p = argparse.ArgumentParser(
        description="Runs the experiments behind the README's tables; finished runs are skipped."
    )
    p.add_argument(
        "experiment",
        nargs="?",
        choices=(
            "power",
            "tune",
            "tune2",
            "tune3",
            "tune4",
            "tune5",
            "tune6",
            "grid",
            "loo",
            "transfer",
            "toy",
            "dose",
            "smollm2",
            "untrained",
            "epochs",
            "main",
            "toy-shop",
            "toy-epochs",
            "transfer-uniform",
        ),
    )
    p.add_argument(
        "--quick", action="store_true", help="the headline on three seeds, into runs/quick"
    )
    p.add_argument(
        "--rows",
        nargs="+",
        choices=ROWS,
        default=list(ROWS),
        metavar="ROW",
        help=f"only these rows: {', '.join(ROWS)}",
    )
    p.add_argument(
        "--seeds", type=int, default=10**6, metavar="N", help="only the first N seeds of each row"
    )
    p.add_argument(
        "--data",
        nargs="+",
        default=[],
        metavar="PATH",
        help="transfer: folders in the CSV format of gdrt.py",
    )
    p.add_argument(
        "--results",
        type=Path,
        help="where results go (default: results in the repository; quick: runs/quick)",
    )
    p.add_argument(
        "--data-dir", metavar="PATH", help="folder or zip with MovieLens, as for gdrt.py"
    )
    p.add_argument("--cache", metavar="DIR", help="as for gdrt.py")
    p.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    p.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto")
    p.add_argument(
        "--dry-run", action="store_true", help="print the runs that are left and do none"
    )
    return p


def main(argv=None):
    p = parser()
    options = p.parse_args(argv)
    if bool(options.experiment) == options.quick:
        p.error("name one experiment, or --quick")
    options.experiment = options.experiment or "quick"
    options.results = options.results or ROOT / (
        "runs/quick" if options.experiment == "quick" else "results"
    )
    options.paths = {Path(path).resolve().name: str(Path(path).resolve()) for path in options.data}
    limit_onednn_cache(options.cache)
    try:
        runs = [
            run
            for run in experiments(options.experiment, options.paths)
            if run["arguments"]["seed"] < options.seeds and run["name"] in options.rows
        ]
        run_all(runs, options)
        shown = {"quick": ("headline", "statements"), "power": ("power",)}.get(options.experiment)
        if shown and not options.dry_run:
            print(tables.document(tables.sections(options.results, shown)))
    except (InputError, OSError) as error:
        print(f"quality.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(
            "\ninterrupted; the same command goes on after the last finished run", file=sys.stderr
        )
        sys.exit(130)


if __name__ == "__main__":
    main()
