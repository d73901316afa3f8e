"""The evidence: a grid of trainings, one at a time, into results/; tables.py makes tables of it.

    python benchmarks/quality.py --quick          the headline on three seeds, into runs/quick
    python benchmarks/quality.py power            SFT alone: the smallest detectable difference
    python benchmarks/quality.py tune-lr          and the other tune-: on validation windows alone;
                                                  their winners are entered here, by hand
    python benchmarks/quality.py grid             and leave-one-out, toy, sweep, smollm2
    python benchmarks/quality.py smollm2-10k      LoRA on a language model, at 10,000 windows;
                                                  smollm2-10k-epochs: two epochs of it;
                                                  smollm2-10k-all: all of its weights
    python benchmarks/quality.py main             and untrained, epochs, few-windows, toy-shop,
                                                  toy-epochs, toy-short: tiny, untrained at start
    python benchmarks/quality.py transfer --data PATH/office PATH/book      and transfer-uniform,
                                                  transfer-lora
    python benchmarks/quality.py grid --rows sft gdrt --seeds 3             a part of it

A run is named by a key, a hash of its arguments; one that results/quality.jsonl holds is skipped,
so any command can be interrupted and repeated. A line holds arguments, versions, commit, machine,
seconds and every metric on validation windows and, except for trials, on test windows. outcomes.npz
(see outcomes.py) holds what paired statistics are recomputed from.

Read `CONFIG` first, then `experiments`, then the controls, then `perform`. Losses of a seed share
the SFT warm-up, the relevance and the batches, as in gdrt.py; the controls only change the
objective or the table of groups.
"""

import argparse
import contextlib
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
from outcomes import KINDS, add_arrays, add_lines, by_user, read_array, read_lines

import data
import gdrt
from attribution import (
    cut_groups,
    diagnose,
    log_probs_of,
    mean_by_place,
    relevance,
    sample_windows,
)
from data import (
    InputError,
    announce,
    build_trees,
    load_dataset,
    run_command,
    set_environment,
)
from evaluate import audit, evaluate_parts, list_metrics, popularity_lists

# tune-lr chose lr and batch, tune-tau tau and prior, by NDCG@10 on validation windows of ml-100k
# alone, before a test window was read.
CONFIG = {
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
    "focal": {"gamma": 2.0},  # the value of Lin et al. 2017
}

ALL_WINDOWS = {"dataset": "ml-100k", "split": "leave-one-out", "windows": None, "lr": 2e-3}
PARSER_DEFAULTS = {name: gdrt.parser().get_default(name) for name in ("batch", "lr")}
TOY = {"dataset": "toy", "split": "leave-one-out", "windows": None}
TOY_SHOP = TOY | PARSER_DEFAULTS | {"epochs": gdrt.default_epochs("toy")}
FEW_WINDOWS = {"split": "leave-one-out", "windows": 10_000}
SMOLLM2_10K = FEW_WINDOWS | {
    "dataset": "ml-100k",
    "model": "smollm2-135m",
    "held": "probability",  # cuts the groups of held-out NLL; attribution takes too long
    "epochs": 1,  # half an hour on one core
    "thinned": 3,  # every third held-out window: ranking takes half as long as training
}
SMOLLM2_LORA = SMOLLM2_10K | {"lora": 8, "batch": 64, "lr": 4e-3}  # by tune-lr-lora
SETTINGS = {
    # 10,000 windows: the budget of this literature.
    "grid": {"dataset": "ml-100k", "split": "time", "windows": 10_000},
    "leave-one-out": ALL_WINDOWS,  # its learning rate by tune-leave-one-out
    "main": ALL_WINDOWS | PARSER_DEFAULTS | {"epochs": gdrt.default_epochs("ml-100k")},
    "toy": TOY,
    "toy-shop": TOY_SHOP,
    "toy-short": TOY_SHOP | {"dataset": "toy-short"},
    "transfer": FEW_WINDOWS,
    "transfer-uniform": FEW_WINDOWS | {"epochs": 4, "lr": 4e-3, "held": "ablation"},
    # As much as two cores train in minutes; untuned, and the same for every loss.
    "smollm2": {
        "dataset": "ml-100k",
        "split": "leave-one-out",
        "windows": 2_000,
        "model": "smollm2-135m",
        "batch": 40,
        "epochs": 1,
        "lr": 2e-4,
    },
    "smollm2-10k": SMOLLM2_LORA,
    "smollm2-10k-epochs": SMOLLM2_LORA | {"epochs": 2},
    "smollm2-10k-all": SMOLLM2_10K | {"batch": 16, "lr": 2e-4},  # by tune-lr-all
    # Prompts of book are several times as long: 64 windows at once do not fit into 24 GB. For 16
    # the rate is the better of the two that tune-lr-lora has tried.
    "transfer-lora": SMOLLM2_LORA | {"windows": 1_250, "thinned": 12, "batch": 16, "lr": 2e-3},
}

UNIFORM = {"loss": "gdrt", "prior": "uniform"}  # the default of gdrt.py
BY_PROBABILITY = UNIFORM | {"relevance": "probability"}
# The rows of the tables and the arguments that make them. The relevance `late` is gradient on the
# model that SFT has finished; `permuted` shuffles gradient's groups; see `measured` for the others.
ROWS = {
    "popularity": {"loss": "popularity"},
    "before": {"loss": "before"},
    "sft": {"loss": "sft"},
    "gdrt": {"loss": "gdrt"},
    "gdrt uniform": UNIFORM,  # first in tune-leave-one-out, third in tune-tau
    "gdrt, groups after SFT": {"loss": "gdrt", "relevance": "late"},
    "gdrt uniform, groups after SFT": UNIFORM | {"relevance": "late"},
    "gdrt ablation": {"loss": "gdrt", "relevance": "ablation"},
    "gdrt probability": {"loss": "gdrt", "relevance": "probability", "tau": 16.0},  # by tune-groups
    "gdrt probability tau 4": {"loss": "gdrt", "relevance": "probability"},
    "group-dro": {"loss": "group-dro"},
    "random groups": {"loss": "gdrt", "relevance": "random"},
    "position groups": {"loss": "gdrt", "relevance": "position"},
    "untuned NLL groups": {"loss": "gdrt", "relevance": "nll"},
    "fixed weights": {"loss": "fixed"},
    "focal": {"loss": "focal"},
    "msl": {"loss": "sft", "train_softmax": "trie", "lr": 1e-3},
    "gdrt + msl": {"loss": "gdrt", "train_softmax": "trie", "lr": 1e-3},  # by tune-lr-msl
}
GRID_ROWS = tuple(ROWS)
ROWS |= {
    "gdrt uniform by ablation": UNIFORM | {"relevance": "ablation"},
    "gdrt uniform by probability": BY_PROBABILITY,
    "permuted groups uniform": UNIFORM | {"relevance": "permuted"},
    "choices by lot uniform": UNIFORM | {"relevance": "lot"},
    "fixed weights uniform": UNIFORM | {"loss": "fixed"},
    "msl at SFT's rate": {"loss": "sft", "train_softmax": "trie"},
    "gdrt uniform by probability at its rate": BY_PROBABILITY | {"lr": 1e-4},  # by tune-lr-all
    # On toy, the groups that relevance should find.
    "true groups": {"loss": "gdrt", "relevance": "planted", "groups": 2},
    "true groups uniform": UNIFORM | {"relevance": "planted", "groups": 2},
}

# What the runs of one start have in common.
START = ("dataset", "split", "windows", "history", "model", "start", "batch", "epochs", "lr")
START += ("warmup", "train_softmax", "seed", "lora", "held")
UNTRAINED = ("popularity", "before")

BASE = (*UNTRAINED, "sft", "gdrt")
SMOLLM2_PAIR = ("sft", "gdrt uniform by probability")
TOY_CONTROLS = ("gdrt, groups after SFT", "random groups", "true groups", "msl", "gdrt + msl")
SHOP_CONTROLS = ("permuted groups uniform", "choices by lot uniform", "true groups uniform")
SHOP_CONTROLS += ("fixed weights uniform", "msl at SFT's rate")
TABLES = {  # experiment: rows, seeds; its setting has the same name
    "grid": (GRID_ROWS, 5),
    "leave-one-out": ((*BASE, "gdrt uniform"), 5),
    "toy": ((*BASE, *TOY_CONTROLS), 3),
    "smollm2": ((*BASE, "gdrt probability tau 4"), 1),
    "smollm2-10k": ((*SMOLLM2_PAIR, "gdrt uniform by ablation", "msl at SFT's rate"), 2),
    "smollm2-10k-epochs": (SMOLLM2_PAIR, 2),
    "smollm2-10k-all": ((*SMOLLM2_PAIR, "gdrt uniform by probability at its rate"), 2),
    "main": ((*UNTRAINED, "sft", *tables.BY_RELEVANCE, "msl at SFT's rate"), 5),
    "toy-shop": ((*UNTRAINED, "sft", *tables.BY_RELEVANCE, *SHOP_CONTROLS), 5),
}
TRANSFERS = {
    "transfer": (*BASE, "msl", "gdrt + msl"),
    "transfer-uniform": ("sft", "gdrt uniform by ablation"),
    "transfer-lora": SMOLLM2_PAIR,
}
TRIALS = ("tune-lr", "tune-tau", "tune-leave-one-out", "tune-lr-msl", "tune-groups", "tune-epochs")
TRIALS += ("tune-lr-lora", "tune-lr-all", "untrained", "epochs", "few-windows", "toy-epochs")
TRIALS += ("toy-short",)


# ------------------------------------------------------------------------------------------------
# the lists of runs


def make_run(row, setting, seed, **changes):
    """One run: its row, its arguments, and those of the start whose groups split its NLL."""
    loss = ROWS[row]["loss"]
    config = CONFIG.get("gdrt" if loss == "fixed" else loss, {})
    base = CONFIG["every"] | config | setting | ROWS[row]
    shared = CONFIG["every"] | setting | {"seed": seed}
    if base["model"] != "tiny":  # only the tiny model's start has changed; other keys stay
        del base["start"], shared["start"]
    label = row
    for name, value in changes.items():
        if name != "no_test" and base.get(name) != value:
            label += f" {name}={value:g}" if isinstance(value, float) else f" {name}={value}"
    arguments = base | changes | {"seed": seed}
    if not arguments.get("lora"):  # the keys of runs that train all weights stay as they were
        arguments.pop("lora", None)
    return {
        "name": row,
        "row": label,
        "arguments": arguments,
        "reference": {name: shared[name] for name in START if name in shared},
    }


def key(arguments):
    """Name of a run's line and arrays: readable, then a hash of all its arguments."""
    text = json.dumps(arguments, sort_keys=True)
    readable = "{dataset}-{split}-{loss}-seed{seed}-".format(**arguments)
    return readable + hashlib.sha256(text.encode()).hexdigest()[:10]


def table_of(rows, setting, seeds):
    """Runs of a table, seed by seed, so that a seed's runs share their start.

    Rows that need no training run once.
    """
    runs = []
    for seed, row in itertools.product(range(seeds), rows):
        if row not in UNTRAINED or seed == 0:
            runs.append(make_run(row, setting, seed))
    return runs


def trials(rows, setting, seeds=1, **values):
    """Every combination of seeds and `values` for every row, on validation windows alone."""
    runs = []
    for seed, *combination in itertools.product(range(seeds), *values.values()):
        changes = dict(zip(values, combination))
        for row in rows:
            runs.append(make_run(row, setting, seed, no_test=True, **changes))
    return runs


def tuning_runs(name):
    """The trials of an experiment on validation windows alone."""
    grid = SETTINGS["grid"]
    pulls = {"tau": (1.0, 4.0, 16.0), "prior": ("uniform", "share")}
    if name == "tune-lr":  # what GDRT shares with SFT is chosen by SFT
        return trials(["sft"], grid, lr=(1e-3, 2e-3, 4e-3), batch=(64, 128))
    if name == "tune-tau":  # as many trials of GDRT's own numbers, at what tune-lr has chosen
        return trials(["gdrt"], grid, **pulls)
    if name == "tune-leave-one-out":  # all windows: the winners against the runners-up
        setting = SETTINGS["leave-one-out"]
        lrs = (2e-3, 4e-3)
        sft = trials(["sft"], setting, lr=lrs, batch=(64, 128))
        return sft + trials(["gdrt"], setting, lr=lrs, prior=("uniform", "share"))
    if name == "tune-lr-msl":  # beyond tune-lr's largest; and for MSL, which had SFT's until then
        edge = trials(["sft", "gdrt"], grid, lr=[8e-3])
        return edge + trials(["msl"], grid, lr=(5e-4, 1e-3, 2e-3, 4e-3, 8e-3))
    if name == "tune-groups":  # tune-tau again, by probability and with groups after SFT
        by_probability = trials(["gdrt probability"], grid, **pulls)
        return by_probability + trials(["gdrt, groups after SFT"], grid, **pulls)
    if name == "tune-epochs":  # is another number of epochs better for one of the two?
        return trials(["sft", "gdrt"], grid, epochs=(2, 3, 6))
    if name == "tune-lr-lora":  # the same rates for both, and is a smaller batch better?
        few = SETTINGS["smollm2-10k"] | {"windows": 2_000, "thinned": 6}
        by_lr = trials(SMOLLM2_PAIR, few, lr=(1e-3, 2e-3, 4e-3, 8e-3))
        return by_lr + trials(["sft"], few, lr=(1e-3, 2e-3), batch=[16])
    if name == "tune-lr-all":
        few = SETTINGS["smollm2-10k-all"] | {"windows": 2_000, "thinned": 6}
        return trials(SMOLLM2_PAIR, few, lr=(1e-4, 2e-4, 5e-4))
    both = ["sft", "gdrt uniform"]
    if name == "untrained":
        return trials(both, SETTINGS["main"], seeds=5, epochs=[2])
    if name == "epochs":
        return trials(both, SETTINGS["main"], seeds=3, epochs=(1, 2, 3, 4))
    if name == "few-windows":
        few = SETTINGS["main"] | {"windows": 10_000}
        return trials(both, few, seeds=5, epochs=(2, 4))
    if name == "toy-short":  # the same shop, but no title has words of detail
        return trials(both, SETTINGS["toy-short"], seeds=3)
    assert name == "toy-epochs", name
    return trials(both, SETTINGS["toy-shop"], seeds=3, epochs=(1, 2, 3, 4, 6, 8))


def sweep_runs():
    """GDRT and SFT over tau, number of groups, training windows and epochs, three seeds."""
    grid = SETTINGS["grid"]
    budgets = [grid | {"windows": windows} for windows in (2_000, 5_000, 20_000, None)]
    values = [{"tau": tau} for tau in (0.1, 0.3, 1.0, 3.0, 10.0)]
    values += [{"groups": groups} for groups in (2, 4, 8, 16)]
    both = ("sft", "gdrt")
    runs = []
    for seed in range(3):
        for budget, row in itertools.product((grid, *budgets), both):
            runs.append(make_run(row, budget, seed))
        runs += [make_run("gdrt", grid, seed, **value) for value in values]
        for epochs, row in itertools.product((2, 4, 8), both):
            runs.append(make_run(row, grid, seed, epochs=epochs))
    return runs


def transfer_runs(name, folders):
    if not folders:
        raise InputError(f"{name}: name the folders of office and book with --data")
    runs = []
    for folder in folders:
        runs += table_of(TRANSFERS[name], SETTINGS[name] | {"dataset": folder}, 3)
    return runs


def experiments(name, folders=()):
    """The runs of a named experiment, in order."""
    if name == "quick":
        return table_of(BASE, SETTINGS["grid"], 3)
    if name == "power":
        settings = (SETTINGS["grid"], SETTINGS["leave-one-out"])
        return sum((table_of(["sft"], setting, 5) for setting in settings), [])
    if name == "sweep":
        return sweep_runs()
    if name in TABLES:
        rows, seeds = TABLES[name]
        return table_of(rows, SETTINGS[name], seeds)
    if name in TRANSFERS:
        return transfer_runs(name, folders)
    return tuning_runs(name)


# ------------------------------------------------------------------------------------------------
# controls


def fixed_rule(q):
    """Control: q stays at the given (K,): is it adapting that matters, or the weights?"""

    def rule(group_loss, count, state):
        weight = torch.tensor(q, device=count.device) * (count > 0)  # (K,)
        return weight / weight.sum(), state

    return rule


@contextlib.contextmanager
def focal_loss(gamma):
    """Control: inside, training sees (1 - p)^gamma NLL (Lin et al. 2017) in place of NLL.

    Each hard token weighs more by itself, which no rule for the weights of groups can express.
    """
    token_nll = gdrt.token_nll

    def focal(*args):
        nll = token_nll(*args)  # (N,)
        return (-torch.expm1(-nll)).clamp(min=0) ** gamma * nll  # 1 - p = -expm1(-nll)

    gdrt.token_nll = focal
    try:
        yield
    finally:
        gdrt.token_nll = token_nll


def rule_of(arguments, options):
    """The loop's rule for a run. Fixed weights are the mean q of the matching GDRT run."""
    loss = arguments["loss"]
    if loss in ("sft", "focal"):
        return gdrt.sft_rule
    if loss == "gdrt":
        return gdrt.gdrt_rule(arguments["tau"], arguments["prior"])
    if loss == "group-dro":
        return gdrt.group_dro_rule(arguments["eta"])
    assert loss == "fixed", loss
    twin = finished(options.results).get(key(arguments | {"loss": "gdrt"}))
    if twin is None:
        seed = arguments["seed"]
        raise InputError(f"fixed weights: run GDRT with seed {seed} first, which gives their q")
    return fixed_rule(twin["mean q"])


# ------------------------------------------------------------------------------------------------
# what the runs of a seed share


class Start(NamedTuple):
    """What the runs of one seed share, up to the end of the SFT warm-up."""

    dataset: object
    setup: gdrt.Setup
    cfg: object  # gdrt.TrainConfig
    folder: object  # TemporaryDirectory of the warm-up's checkpoint, deleted with the Start
    before: dict  # the model's weights before the warm-up
    warm: dict  # and after it
    seconds: float  # of the warm-up
    diagnosis: dict  # of the model after the warm-up
    measured: dict  # {relevance: (r, seconds)}


def copied(model):
    """What training changes of a model, as it is now."""
    weights = gdrt.trained_weights(model)
    return {name: tensor.detach().clone() for name, tensor in weights.items()}


def title_shape(prompts):
    """(items, L): the shape of a table with one value for each token of each title."""
    return len(prompts.titles), prompts.trie.path.shape[1] - 1


@contextlib.contextmanager
def short_titles(name):
    """Inside, the shop's titles have no words of detail if the data set's name is toy-short."""
    words = data.DETAILS
    data.DETAILS = 0 if name == "toy-short" else words
    try:
        yield
    finally:
        data.DETAILS = words


# Room for a seed's starts with full and with trie softmax, and one of another learning rate.
@functools.lru_cache(maxsize=3)
def start(text, data_dir, cache, device, precision):
    """A Start trained to the warm-up's end; text: JSON of START's arguments and the data's path."""
    args = gdrt.parser().parse_args([])
    vars(args).update(json.loads(text), data_dir=data_dir, cache=cache, save_every=10**9)
    vars(args).update(device=device, precision=precision)
    cfg = gdrt.make_train_config(args)
    with short_titles(args.dataset):
        dataset = load_dataset(args.path, data_dir, cache, args.split, args.history)
    setup = gdrt.prepare(args, dataset, cfg)
    before = copied(setup.model)
    folder = tempfile.TemporaryDirectory()
    seconds = gdrt.warm_up(setup, Path(folder.name) / "warmup", cfg)
    found = diagnose(setup.model, setup.prompts, setup.windows, args.seed, cfg.device, cfg.softmax)
    return Start(dataset, setup, cfg, folder, before, copied(setup.model), seconds, found, {})


def begin(arguments, options):
    """The Start of a run, made once for all runs that share it."""
    named = {name: arguments[name] for name in START if name in arguments}
    path = "toy" if arguments["dataset"] == "toy-short" else arguments["dataset"]
    named["path"] = options.paths.get(arguments["dataset"], path)
    text = json.dumps(named, sort_keys=True)
    return start(text, options.data_dir, options.cache, options.device, options.precision)


def train_rest(begun, group, rule, n_groups):
    """Train the start's model from the warm-up's end on -> (seconds, [one line per update])."""
    span = (begun.setup.warmup, len(begun.setup.batches))
    checkpoint = Path(begun.folder.name) / "warmup" / "checkpoint.pt"
    with tempfile.TemporaryDirectory() as folder:
        rest = (span, group, rule, n_groups, begun.cfg, Path(folder), checkpoint)
        seconds = gdrt.train_span(begun.setup, *rest)
        lines = gdrt.complete_lines(Path(folder) / "metrics.jsonl")
    return seconds, [json.loads(line) for line in lines]


# ------------------------------------------------------------------------------------------------
# groups


def planted(dataset, prompts):
    """toy's own truth as r (items, L).

    0 for the first token of a product bought by taste, 1 where the prefix or fame decides.
    """
    r = np.ones(title_shape(prompts))
    r[[words[0] == "taste" for words in dataset.planted["words"]], 0] = 0
    return r


def permuted(group, windows, seed):
    """Groups dealt out anew among the target tokens: (group (items, L), shares (K,)).

    Every group keeps its number of different target tokens; its share of the training tokens
    varies with how often the titles are targets.
    """
    known = group >= 0
    group = group.copy()
    group[known] = np.random.default_rng(seed).permutation(group[known])
    times = np.bincount([w.items[w.stop] for w in windows], minlength=len(group))
    weight = np.broadcast_to(times[:, None], group.shape)[known]
    mass = np.bincount(group[known], weights=weight)  # (K,)
    return group, (mass / mass.sum()).tolist()


def unmasked_relevance(begun, name, seed):
    """r (items, L) of a relevance by name; overwrites the weights of the start's model."""
    model, prompts, windows = begun.setup.model, begun.setup.prompts, begun.setup.windows
    device = begun.cfg.device
    shape = title_shape(prompts)
    if name == "planted":
        return planted(begun.dataset, prompts)
    if name == "lot":
        certain = measured(begun, "probability", seed)[0] == 1
        return np.where(certain, 1, np.random.default_rng(seed).random(shape))
    if name == "random":
        return np.random.default_rng(seed).random(shape)
    if name == "position":
        return np.tile(np.arange(shape[1], dtype=float), (shape[0], 1))
    if name == "nll":
        gdrt.load_trained(model, begun.before)
        trees = build_trees(prompts, sample_windows(windows, seed))
        _, log_p, item, place, _ = log_probs_of(model, prompts, trees, device)
        return mean_by_place(log_p, item, place, prompts)
    if name == "late":
        train_rest(begun, np.zeros(shape, dtype=int), gdrt.sft_rule, 1)
        name = "gradient"
    else:
        gdrt.load_trained(model, begun.warm)
    return relevance(model, prompts, windows, name, seed=seed, device=device)


def measured(begun, name, seed):
    """(r (items, L), seconds): the lowest values become group 0; NaN where there is no target.

    Measured once per start. Besides the three relevances after the warm-up there are 'late', by
    gradient on the model that SFT has finished; 'random'; 'lot', the same except that r = 1 for
    tokens that are certain without a user; 'position' in the title; 'nll', minus the mean NLL of
    the model before any user; 'planted', toy's own truth. The weights of the start's model are
    overwritten.
    """
    if name not in begun.measured:
        began = time.perf_counter()
        r = unmasked_relevance(begun, name, seed)
        targets = [w.items[w.stop] for w in begun.setup.windows]
        is_target = np.isin(np.arange(len(r)), targets)[:, None]
        r = np.where(is_target & (begun.setup.prompts.trie.path[:, 1:] >= 0), r, np.nan)
        begun.measured[name] = (r, time.perf_counter() - began)
    return begun.measured[name]


def training_groups(begun, arguments):
    """(group (items, L), {"cuts", "shares"}, seconds of measuring) that a run is trained by."""
    name, seed = arguments["relevance"], arguments["seed"]
    r, seconds = measured(begun, "gradient" if name == "permuted" else name, seed)
    group, cuts, shares = cut_groups(r, begun.setup.windows, arguments["groups"])
    if name == "permuted":
        group, shares = permuted(group, begun.setup.windows, seed)
    return group, {"cuts": cuts, "shares": shares}, seconds


def held_groups(begun, run, options):
    """(group (items, L), K) by which held-out NLL is reported: those of the reference's relevance.

    Once measured they are kept: relevance varies with rounding, so with machine and threads, but
    the rows of a seed stay comparable because all use one table.
    """
    name = f"groups-{key(run['reference'] | {'loss': 'sft'})}/groups"
    is_planted = bool(begun.dataset.planted)
    n_groups = 2 if is_planted else CONFIG["gdrt"]["groups"]
    group = read_array(options.results, name)
    if group is None:
        reference = begin(run["reference"], options)
        relevance_name = "planted" if is_planted else run["reference"].get("held", "gradient")
        r, _ = measured(reference, relevance_name, run["reference"]["seed"])
        group = cut_groups(r, reference.setup.windows, n_groups)[0].astype(np.int8)
        add_arrays(options.results, {name: group})
    return group.astype(np.int64), n_groups


# ------------------------------------------------------------------------------------------------
# one run


def evaluate_outcomes(begun, arguments, held, n_held):
    """(what a line says of the held-out windows, {part: table by user}) of the model as it is."""
    setup = begun.setup
    dataset = begun.dataset
    device = begun.cfg.device
    parts = {}
    for part in ("valid",) if arguments.get("no_test") else ("valid", "test"):
        parts[part] = getattr(dataset, part)[:: arguments.get("thinned", 1)]  # every n-th
    if arguments["loss"] == "popularity":
        found = {}
        for part, windows in parts.items():
            found[part] = list_metrics(dataset, windows, *popularity_lists(dataset, windows, 10))
    else:
        scored = (setup.model, setup.prompts, dataset, parts, held, n_held)
        found = evaluate_parts(*scored, device=device)
    told = {part: metrics for part, (metrics, *_) in found.items()}
    per_window = {part: values for part, (_, values, *_) in found.items()}
    if "test" in parts and arguments["loss"] != "popularity":
        audited = (parts["test"], held, n_held, per_window["test"]["NDCG@10"])
        options = {"seed": arguments["seed"], "device": device}
        told["audit"] = audit(setup.model, setup.prompts, *audited, **options)
    by_part = {part: table_by_user(dataset, parts[part], per_window[part]) for part in parts}
    return told, by_part


def table_by_user(dataset, windows, per_window):
    """`by_user` of what was found for each of the windows."""
    known = set()
    for w in dataset.train:
        known.update(w.items[w.start : w.stop + 1])
    seen_target = [w.items[w.stop] in known for w in windows]
    values = {name: per_window[name] for name in KINDS if name in per_window}
    return by_user([w.user for w in windows], seen_target, values)


def train_by(begun, arguments, group, n_groups, options):
    """Train a run after the warm-up -> (seconds, {"mean q", "training group NLL"} for its line)."""
    rule = rule_of(arguments, options)
    is_focal = arguments["loss"] == "focal"
    with focal_loss(arguments["gamma"]) if is_focal else contextlib.nullcontext():
        seconds, steps = train_rest(begun, group, rule, n_groups)
    last = steps[-max(1, len(steps) // 10) :]
    return seconds, {
        "mean q": np.mean([step["q"] for step in steps], axis=0).tolist(),
        "training group NLL": np.mean([step["group_nll"] for step in last], axis=0).tolist(),
    }


def perform(run, options):
    """Train and evaluate one run -> (its line, {name: array} for outcomes.npz)."""
    began = time.perf_counter()
    arguments = run["arguments"]
    begun = begin(arguments, options)
    held, n_held = held_groups(begun, run, options)
    line = {
        "key": key(arguments),
        "row": run["row"],
        "arguments": arguments,
        "data": begun.dataset.digest,
        "held groups": hashlib.sha256(held.tobytes()).hexdigest()[:10],
    }
    seconds = {"warm-up": begun.seconds, "relevance": 0, "train": 0}
    arrays = {}

    group = held
    n_groups = n_held
    if "relevance" in arguments:
        n_groups = arguments["groups"]
        group, told, seconds["relevance"] = training_groups(begun, arguments)
        line |= told
        arrays["groups"] = group.astype(np.int8)

    gdrt.load_trained(begun.setup.model, begun.before)  # measuring has left other weights in it
    if arguments["loss"] not in UNTRAINED:
        seconds["train"], told = train_by(begun, arguments, group, n_groups, options)
        line |= told | {"diagnosis": begun.diagnosis}

    trained = time.perf_counter()
    told, by_part = evaluate_outcomes(begun, arguments, held, n_held)
    arrays |= by_part
    done = time.perf_counter()
    line |= told
    line["seconds"] = seconds | {"evaluate": done - trained, "total": done - began}
    line |= gdrt.environment()
    cfg = begun.cfg
    device = torch.cuda.get_device_name() if cfg.device == "cuda" else cfg.device
    line["machine"] |= {"device": device, "precision": cfg.precision}
    return line, {f"{line['key']}/{name}": array for name, array in arrays.items()}


# ------------------------------------------------------------------------------------------------
# the command


def finished(results):
    """{key: line} of the runs that are done."""
    return {line["key"]: line for line in read_lines(results)}


def save(results, line, arrays):
    """Arrays first, then the line, which makes the run count as finished; each whole or absent."""
    add_arrays(results, arrays)
    add_lines(results, [line])


def run_all(runs, options):
    """Do the runs that are not finished, and save each as soon as it is."""
    done = finished(options.results)
    began = time.perf_counter()
    runs = {key(run["arguments"]): run for run in runs}
    left = {name: run for name, run in runs.items() if name not in done}
    announce(f"{len(runs)} runs, {len(runs) - len(left)} of them finished before")
    for number, (name, run) in enumerate(left.items(), start=1):
        if options.dry_run:
            print(name, run["row"], json.dumps(run["arguments"]))
            continue
        line, arrays = perform(run, options)
        save(options.results, line | {"experiment": options.experiment}, arrays)
        remaining = (time.perf_counter() - began) / number * (len(left) - number) / 60
        part = tables.part_of(line)
        announce(
            f"{number}/{len(left)} {run['row']} {name}: "
            f"{part} NDCG@10 {line[part]['NDCG@10']:.4f}, {line['seconds']['total']:.0f} s; "
            f"about {remaining:.0f} min left"
        )


def parser():
    p = argparse.ArgumentParser(description="Runs the experiments; finished runs are skipped.")
    add = p.add_argument
    add("experiment", nargs="?", choices=("power", *TRIALS, *TABLES, "sweep", *TRANSFERS))
    add("--quick", action="store_true", help="the headline on three seeds, into runs/quick")
    rows = f"only these rows: {'; '.join(ROWS)}"
    add("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help=rows)
    seeds = "only the first N seeds of each row"
    add("--seeds", type=int, default=10**6, metavar="N", help=seeds)
    folders = "transfer: folders in the CSV format of gdrt.py"
    add("--data", nargs="+", default=[], metavar="PATH", help=folders)
    results = "where results go (default: results in the repository; quick: runs/quick)"
    add("--results", type=Path, metavar="DIR", help=results)
    movielens = "folder or zip with MovieLens, as for gdrt.py"
    add("--data-dir", metavar="PATH", help=movielens)
    add("--cache", metavar="DIR", help="as for gdrt.py")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto")
    add("--dry-run", action="store_true", help="print the runs that are left and do none")
    return p


def run_experiment(options):
    """Do the chosen part of an experiment, and print the tables of quick and of power."""
    runs = []
    for run in experiments(options.experiment, options.paths):
        if run["arguments"]["seed"] < options.seeds and run["name"] in options.rows:
            runs.append(run)
    run_all(runs, options)
    shown = {"quick": ("headline", "statements"), "power": ("power",)}.get(options.experiment)
    if shown and not options.dry_run:
        print(tables.document(tables.sections(options.results, shown)))


def main(argv=None):
    p = parser()
    options = p.parse_args(argv)
    if bool(options.experiment) == options.quick:
        p.error("name one experiment, or --quick")
    options.experiment = options.experiment or "quick"
    folder = "runs/quick" if options.experiment == "quick" else "results"
    options.results = options.results or ROOT / folder
    options.paths = {Path(path).resolve().name: str(Path(path).resolve()) for path in options.data}
    set_environment(options.cache)
    run_experiment(options)


if __name__ == "__main__":
    run_command(main)
