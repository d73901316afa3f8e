"""Ours against what a user would pick instead, in turns within one process.

    pip install -r benchmarks/requirements.txt
    python benchmarks/speed.py --data PATH/book           all rows into results/speed.json, on an
                                                          idle machine
    python benchmarks/speed.py --only search --share 0.1  one row, on a seeded tenth of its work,
                                                          into the same file
    python benchmarks/speed.py --table                    the table of what the file holds

Both sides have the same weights, examples, precision and threads. Where one process times both,
they take turns, A B A B, and their medians are compared. A ratio is ours over the peer's, in the
row's unit. A row keeps what it measured, and the machine, versions, commit and share it was made
with.

Read `in_turns` first, then `trainer` (the training peer), `beam_search` (the decoding peer), then
the rows, `ROWS` last.
"""

import argparse
import concurrent.futures
import copy
import functools
import json
import resource
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from tokenizers.pre_tokenizers import ByteLevel, Digits
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import gdrt
from attribution import (
    format_table,
    forward_mode,
    path_ends,
    relevance,
    sample_windows,
    segment_gradient,
)
from data import (
    USER,
    InputError,
    Table,
    announce,
    build_trees,
    by_length,
    byte_level_bpe,
    collate,
    from_table,
    legal_continuations,
    load_dataset,
    load_model,
    make_prompts,
    positions,
    run_command,
    target_logits,
    tiny_model,
    tiny_tokenizer,
    write_atomic,
)
from evaluate import audit, evaluate_parts, rank

SMOLLM2 = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "rope_theta": 100000.0,
}
# The BPE vocabulary with which ml-100k's quoted titles have 11.6 tokens, as they do in SmolLM2's.
LIKE_SMOLLM2 = 3250
TINY_PLAN = 128  # windows an update; gdrt.py's default is 64 today
LARGE_PLAN = 40  # windows an update that a 135M model has time for on two cores
LARGE_UPDATES = 24
MINUTE = 60  # seconds of training where a row needs a trained model and --run names none
ROUNDS = 8  # stretches of a training run whose median rate counts
MEGABYTE = 1024 if sys.platform == "linux" else 1024**2  # in units of ru_maxrss


# ---------------------------------------------------------------- measuring


def seconds_of(function, *args):
    """(seconds that function(*args) took, what it returned)."""
    start = time.perf_counter()
    result = function(*args)
    return time.perf_counter() - start, result


def in_turns(sides, pieces):
    """For each piece of work, each side in turn -> ({side: [seconds a piece]}, {side: [result]}).

    The first piece runs twice: its first run warms caches and allocator, and is not counted.
    """
    seconds = {name: [] for name in sides}
    results = {name: [] for name in sides}
    for i, piece in enumerate([pieces[0], *pieces]):
        for name, side in sides.items():
            spent, result = seconds_of(side, piece)
            if i > 0:
                seconds[name].append(spent)
                results[name].append(result)
    return seconds, results


def median_rate(work, seconds):
    """Median rate over ROUNDS stretches of a run, from the work and the seconds of each update."""
    rounds = min(ROUNDS, len(seconds))
    stretches = zip(np.array_split(work, rounds), np.array_split(seconds, rounds))
    return float(np.median([sum(w) / sum(s) for w, s in stretches]))


def peak_memory(*command):
    """Run a command -> (its last line of output, the peak resident MB of its process alone).

    A process inherits the peak of the one that started it, so a small Python stands between us and
    the command.
    """
    between = (
        "import resource, subprocess, sys; code = subprocess.call(sys.argv[1:]); "
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss); sys.exit(code)"
    )
    argv = [sys.executable, "-c", between, sys.executable, *map(str, command)]
    done = subprocess.run(argv, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        name = " ".join(map(str, command[:3]))
        raise InputError(f"{name} failed with exit code {done.returncode}, see above")
    *_, last, peak = ["", *done.stdout.strip().split("\n")]
    return last, int(peak) / MEGABYTE


# ---------------------------------------------------------------- the training peer


def trainer_examples(trees):
    """Separate prompts (trees of one window) as a Trainer's dataset.

    Labels are the target tokens, and -100 elsewhere.
    """
    examples = []
    for tree in trees:
        labels = np.full(len(tree.ids) + 1, -100)
        labels[tree.predict_at + 1] = tree.label
        ids = [*tree.ids.tolist(), int(tree.label[-1])]
        examples.append({"input_ids": ids, "labels": labels.tolist()})
    return examples


def training_arguments(folder, batch, per_update, job):
    """The TrainingArguments that do what `job` does."""
    return transformers.TrainingArguments(
        folder,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=per_update // batch,
        num_train_epochs=1,
        train_sampling_strategy="group_by_length",
        bf16=job.precision == "bf16",
        use_cpu=job.device == "cpu",
        optim="adamw_torch_fused",
        learning_rate=job.lr,
        weight_decay=gdrt.WEIGHT_DECAY,
        adam_beta1=gdrt.BETAS[0],
        adam_beta2=gdrt.BETAS[1],
        max_grad_norm=gdrt.CLIP,
        warmup_steps=10,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )


def trainer(model, tokenizer, examples, batch, per_update, job, between=lambda: None):
    """One epoch of transformers.Trainer on `examples` -> seconds of each update.

    `between` is called after each update, and its time is not counted.
    """
    transformers.logging.set_verbosity_error()
    seconds = []

    class Clock(transformers.TrainerCallback):
        def on_train_begin(self, *_, **__):
            self.start = time.perf_counter()

        def on_step_end(self, *_, **__):
            seconds.append(time.perf_counter() - self.start)
            between()
            self.start = time.perf_counter()

    # BIGRec and MSL train with this collator.
    collator = transformers.DataCollatorForSeq2Seq(
        tokenizer, pad_to_multiple_of=8, return_tensors="pt"
    )
    with tempfile.TemporaryDirectory() as folder:
        arguments = training_arguments(folder, batch, per_update, job)
        options = {"processing_class": tokenizer, "callbacks": [Clock()]}
        peer = transformers.Trainer(model, arguments, collator, examples, **options)
        peer.remove_callback(transformers.PrinterCallback)
        peer.train()
    return seconds


def fastest_batch(model, tokenizer, examples, per_update, candidates, job):
    """(the batch at which Trainer is fastest, {batch: [seconds an update]}), from short trials."""
    chosen = np.random.default_rng(0).permutation(len(examples))[: 2 * per_update]
    trial = [examples[i] for i in chosen]
    speeds = {batch: [] for batch in candidates}
    for _ in range(2):
        for batch in candidates:
            speeds[batch] += trainer(copy.deepcopy(model), tokenizer, trial, batch, per_update, job)
    return min(candidates, key=lambda batch: np.median(speeds[batch])), speeds


def training_row(model, tokenizer, prompts, windows, per_update, candidates, job):
    """One epoch of `windows` on packed trees against Trainer's, update by update in turns."""
    trees = build_trees(prompts, windows)
    examples = trainer_examples(build_trees(prompts, windows, pack=False))
    best, speeds = fastest_batch(model, tokenizer, examples, per_update, candidates, job)
    step = sft_step(copy.deepcopy(model), prompts, job, job.lr)
    updates = iter(gdrt.make_batches(trees, per_update, 1, seed=0))
    seconds = []
    work = []

    def ours():
        if batch := [trees[i] for i in next(updates, [])]:
            seconds.append(seconds_of(step, batch)[0])
            work.append(sum(len(set(tree.window)) for tree in batch))

    theirs = trainer(copy.deepcopy(model), tokenizer, examples, best, per_update, job, ours)
    sizes = [per_update] * (len(theirs) - 1) + [len(examples) - per_update * (len(theirs) - 1)]
    our_rate = median_rate(work, seconds)
    peer_rate = median_rate(sizes, theirs)
    our_tokens = node_count(trees)
    peer_tokens = sum(len(example["input_ids"]) for example in examples)
    return {
        "ratio": our_rate / peer_rate,
        "ours": our_rate,
        "peer": peer_rate,
        "unit": "windows/s",
        "peer batch size": best,
        "peer candidates, s an update": {str(b): float(np.median(s)) for b, s in speeds.items()},
        "windows": len(windows),
        "tokens a window": {
            "ours": our_tokens / len(windows),
            "peer": peer_tokens / len(windows),
        },
        "seconds": {"ours": seconds, "peer": theirs},
    }


# ---------------------------------------------------------------- our update


def default_job(precision="auto"):
    """The TrainConfig of gdrt.py's defaults on this machine's CPU."""
    flags = ["--device", "cpu", "--precision", precision]
    return gdrt.make_train_config(gdrt.parser().parse_args(flags))


def in_training(model, job):
    """The model as gdrt.train has it around its steps."""
    model.set_attn_implementation(gdrt.training_attention(model, job))
    return model.train()


def adamw(model, lr):
    """The optimizer of gdrt.train."""
    options = {"betas": gdrt.BETAS, "weight_decay": gdrt.WEIGHT_DECAY, "fused": True}
    return torch.optim.AdamW(model.parameters(), lr=lr, **options)


def sft_step(model, prompts, job, lr, scale=lambda: 1.0):
    """A function of a batch of trees that does one SFT update of gdrt.py on the model.

    scale() is called before each update and returns the factor on `lr`.
    """
    model = in_training(model, job)
    optimizer = adamw(model, lr)
    one_group = torch.zeros(prompts.trie.path.shape, dtype=torch.long, device=job.device)
    log_q = torch.zeros(1, device=job.device)

    def step(batch):
        optimizer.param_groups[0]["lr"] = lr * scale()
        rest = (batch, prompts, one_group, gdrt.sft_rule, log_q, job)
        return gdrt.training_step(model, optimizer, *rest)

    return step


# ---------------------------------------------------------------- data and models


@functools.cache
def dataset_of(name):
    return made_dataset() if name == "made" else load_dataset(name)


KINDS = (
    "Voyage Trail Letters Cellar Wedding Heist Bridge Song Garden Winter Mirror Island River "
    "Castle Stranger Train"
).split()
TONES = (
    "Silent Golden Broken Distant Burning Hidden Crimson Forgotten Last Wild Electric Secret "
    "Lonely Endless Paper Frozen Second Velvet Hollow Savage"
).split()
PLACES = (
    "Vienna Havana Tangier Oslo Kyoto Lisbon Marseille Odessa Bombay Cairo Dublin Naples Quito "
    "Riga Seville Tallinn Utrecht Warsaw Yalta Zagreb"
).split()
SHAPES = ["The {1} {0}", "{0} to {2}", "{2} {0}", "The {1} {0} of {2}", "{1} {0}, {1} {2}"]


def made_dataset(size=20_000, users=3000):
    """A catalogue of `size` titles from word lists, seeded, in ml-100k's style.

    Each user chooses titles of two kinds.
    """
    random = np.random.default_rng(0)
    kind_of = {}  # title -> kind
    while len(kind_of) < size:
        words = [random.choice(words) for words in (KINDS, TONES, PLACES)]
        shape = random.choice(SHAPES)
        kind_of[f"{shape.format(*words)} ({random.integers(1930, 2000)})"] = words[0]
    kinds = np.array(list(kind_of.values()))
    shelves = {kind: np.flatnonzero(kinds == kind) for kind in KINDS}
    ratings = []
    for user in range(users):
        liked = np.concatenate([shelves[kind] for kind in random.choice(KINDS, 2, replace=False)])
        for moment, item in enumerate(random.choice(liked, 20, replace=False)):
            ratings.append((str(user), str(item), 5.0, float(user * 100 + moment)))
    titles = {str(i): title for i, title in enumerate(kind_of)}
    genres = {str(i): (kind,) for i, kind in enumerate(kind_of.values())}
    table = Table(titles, genres, ratings)
    return from_table("made movies", table, "leave-one-out", 10, 4.0, 0)


def like_smollm2(dataset):
    """A byte-level BPE that cuts titles as finely as SmolLM2's own does.

    It splits text as SmolLM2's does, each digit on its own.
    """
    splits = [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    return byte_level_bpe(dataset, splits, LIKE_SMOLLM2)


def start(dataset, large=False):
    """Untrained (model, tokenizer, prompts).

    The tiny model, or random weights of SmolLM2-135M's shape.
    """
    tokenizer = like_smollm2(dataset) if large else tiny_tokenizer(dataset)
    torch.manual_seed(0)
    if large:
        model = LlamaForCausalLM(LlamaConfig(**SMOLLM2, dtype=torch.float32))
    else:
        model = tiny_model(len(tokenizer))
    return model, tokenizer, make_prompts(dataset, tokenizer, positions(model))


@functools.cache
def trained(name, run=None):
    """(model, tokenizer, prompts) of a finished run.

    Without a run, a tiny model is trained here for MINUTE seconds on the dataset `name`.
    """
    dataset = dataset_of(name)
    if run is not None:
        model, tokenizer = load_model(Path(run) / "model")
        return model.eval(), tokenizer, make_prompts(dataset, tokenizer, positions(model))
    model, tokenizer, prompts = start(dataset)
    trees = build_trees(prompts, dataset.train)
    job = default_job()
    began = time.perf_counter()
    done = 0

    def left():
        return 1 - (time.perf_counter() - began) / MINUTE

    step = sft_step(model, prompts, job, job.lr, lambda: min(max(left(), 0), (done + 1) / 20))
    for update in gdrt.make_batches(trees, TINY_PLAN, 10**4 // len(trees) + 10, seed=0):
        if left() <= 0:
            break
        step([trees[i] for i in update])
        done += 1
    announce(f"{name}: {done} updates in {MINUTE} s")
    model.set_attn_implementation("sdpa")
    return model.eval(), tokenizer, prompts


def batches_of(trees, plan):
    """The trees of each batch of indices."""
    batches = []
    for indices in plan:
        batches.append([trees[i] for i in indices])
    return batches


def part_of(values, share, seed=0):
    """A seeded share of a list, in the list's order; at least one element."""
    keep = max(1, round(share * len(values)))
    return [values[i] for i in sorted(np.random.default_rng(seed).permutation(len(values))[:keep])]


# ---------------------------------------------------------------- rows: training


def train_tiny(args):
    dataset = dataset_of("ml-100k")
    windows = gdrt.draw_windows(dataset.train, round(args.share * len(dataset.train)), 0)
    candidates = (8, 16, 32, 64)
    return training_row(*start(dataset), windows, TINY_PLAN, candidates, default_job())


def train_135m(args):
    dataset = dataset_of("ml-100k")
    model, tokenizer, prompts = start(dataset, large=True)
    updates = max(1, round(args.share * LARGE_UPDATES))
    windows = gdrt.draw_windows(dataset.train, LARGE_PLAN * updates, 0)
    # All 40 at once, padded and with the logits of every position, do not fit into 24 GiB.
    candidates = (4, 8, 10, 20)
    job = default_job()._replace(lr=1e-4)
    row = training_row(model, tokenizer, prompts, windows, LARGE_PLAN, candidates, job)
    return row | {"tokens a title": float(np.mean([len(title) for title in prompts.titles]))}


def bare_step(model, optimizer, trees, job):
    """A step of plain fine-tuning as one would write it: mean cross-entropy, no groups."""
    batch = collate(trees, job.device)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=job.precision == "bf16"):
        logits = target_logits(model, batch)
    torch.nn.functional.cross_entropy(logits.float(), batch.label).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), gdrt.CLIP)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def gdrt_update(args):
    """The same batches by our SFT update, our GDRT update and a plain step, in turns."""
    dataset = dataset_of("ml-100k")
    job = default_job()
    model, tokenizer, prompts = start(dataset)
    trees = build_trees(prompts, dataset.train)
    updates = gdrt.make_batches(trees, TINY_PLAN, 1, seed=0)[: max(1, round(100 * args.share))]
    path = prompts.trie.path
    group = torch.arange(path.size).view(path.shape) % 4  # (items, L + 1)

    def side(step, *rest):
        mine = in_training(copy.deepcopy(model), job)
        optimizer = adamw(mine, job.lr)
        return lambda batch: step(mine, optimizer, batch, *rest)

    sides = {"plain": side(bare_step, job)}
    for name, rule in (("sft", gdrt.sft_rule), ("gdrt", gdrt.gdrt_rule(1.0, "uniform"))):
        sides[name] = side(gdrt.training_step, prompts, group, rule, torch.zeros(4), job)
    seconds, _ = in_turns(sides, batches_of(trees, updates))
    middle = {name: float(np.median(s)) for name, s in seconds.items()}
    return {
        "ratio": middle["gdrt"] / middle["sft"],
        "ours": middle["gdrt"],
        "peer": middle["sft"],
        "unit": "s an update",
        "against a plain step": middle["gdrt"] / middle["plain"],
        "updates": len(updates),
        "seconds": seconds,
    }


# ---------------------------------------------------------------- row: relevance


def token_backwards(model, prompts, windows, at_once=1):
    """d log p / ds of every target token at the path's middle, one backward each -> (N,).

    In the order of the windows. at_once > 1 is the best that backwards can do: one backward for the
    k-th tokens of several prompts, which share nothing.
    """
    parts = []
    for start in range(0, len(windows), at_once):
        batch = collate(build_trees(prompts, windows[start : start + at_once], pack=False))
        E, delta = path_ends(model, batch, (USER,))  # (B, T, D) each
        embeds = (E - 0.5 * delta).detach().requires_grad_()
        with torch.enable_grad():
            log_p = target_logits(model, batch, embeds).log_softmax(-1)  # (N, V)
            log_prob = log_p.gather(-1, batch.label[:, None])[:, 0]  # (N,)
        derivative = torch.empty_like(log_prob)
        for k in range(int(batch.place.max()) + 1):
            own = (batch.place == k).nonzero()[:, 0]
            (gradient,) = torch.autograd.grad(log_prob[own].sum(), embeds, retain_graph=True)
            derivative[own] = (gradient * delta).sum((1, 2))[batch.row[own]]
        parts.append(derivative.detach())
    return torch.cat(parts)


def relevance_in_turns(model, prompts, sample, share):
    """`in_turns` of one path point: ours, a backward for each token, and 16 prompts at once."""
    trees = build_trees(prompts, sample)
    pieces = []
    for piece in part_of(batches_of(trees, by_length(trees)), 0.25 * share):
        pieces.append(sorted(piece, key=lambda tree: tree.window[0]))

    def ours(piece):
        with forward_mode(model):
            batch = collate(piece)
            derivative = segment_gradient(model, batch, (USER,), points=1)
            return derivative[np.argsort(batch.window, kind="stable")]

    def backwards(piece, at_once=1):
        windows = []
        for tree in piece:
            windows += [sample[i] for i in sorted(set(tree.window))]
        return token_backwards(model, prompts, windows, at_once)

    sides = {"ours": ours, "peer": backwards}
    sides["peer, 16 prompts at once"] = functools.partial(backwards, at_once=16)
    model.requires_grad_(False)  # the peer needs backwards to the embeddings alone
    seconds, results = in_turns(sides, pieces)
    model.requires_grad_(True)
    return seconds, results


def relevance_row(args):
    """One path point of the user segment for all target tokens of a sample.

    The sample is the one that the relevance step draws.
    """
    dataset = dataset_of("ml-100k")
    model, _, prompts = trained("ml-100k", args.run)
    sample = sample_windows(dataset.train, 0)
    seconds, results = relevance_in_turns(model, prompts, sample, args.share)
    ours, theirs, batched = (torch.cat(results[name]) for name in seconds)
    n = len(ours)
    per_token = {}
    for name, s in seconds.items():
        per_token[name] = float(np.median(s) / np.median([len(r) for r in results[name]]))
    worst = max((ours - theirs).abs().max(), (ours - batched).abs().max())
    row = {
        "ratio": per_token["peer"] / per_token["ours"],
        "ours": n / sum(seconds["ours"]),
        "peer": n / sum(seconds["peer"]),
        "unit": "target tokens/s",
        "against 16 prompts at once": per_token["peer, 16 prompts at once"] / per_token["ours"],
        "largest difference, nats": float(worst),
        "target tokens": n,
        "seconds": seconds,
    }
    if args.share == 1:
        row["whole step, s"] = seconds_of(relevance, model, prompts, dataset.train)[0]
    if args.run:
        spent = json.loads((Path(args.run) / "metrics.json").read_text())["time"]
        row |= {"share of the run's time": spent["relevance"] / sum(spent.values()), "run": spent}
    return row


# ---------------------------------------------------------------- rows: search


def beam_search(model, prompts, windows, batch_size, k=10):
    """Scores (n, k), best first, by generate() constrained to the titles, as MSL, BEAR and D3 do.

    renormalize_logits takes the log-softmax again after the mask, and so over legal continuations.
    """
    found = legal_continuations([*title, prompts.eos] for title in prompts.titles)
    legal = {prefix: list(tokens) for prefix, tokens in found.items()}
    trees = build_trees(prompts, windows, pack=False, targets=False)
    scores = np.empty((len(windows), k))
    order = sorted(range(len(trees)), key=lambda i: len(trees[i].ids))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        P = max(len(trees[i].ids) for i in chosen)
        ids = torch.full((len(chosen), P), prompts.eos)
        mask = torch.zeros((len(chosen), P), dtype=torch.long)
        for row, i in enumerate(chosen):
            ids[row, P - len(trees[i].ids) :] = torch.from_numpy(trees[i].ids)
            mask[row, P - len(trees[i].ids) :] = 1

        def allowed(_, sequence):
            return legal.get(tuple(sequence[P:].tolist()), [prompts.eos])

        done = model.generate(
            ids,
            attention_mask=mask,
            num_beams=k,
            num_return_sequences=k,
            max_new_tokens=max(map(len, prompts.titles)) + 1,
            do_sample=False,
            prefix_allowed_tokens_fn=allowed,
            renormalize_logits=True,
            length_penalty=0.0,
            eos_token_id=prompts.eos,
            pad_token_id=prompts.eos,
            return_dict_in_generate=True,
            output_scores=True,
        )
        found = done.sequences_scores.view(len(chosen), k).double().numpy()
        scores[chosen] = np.sort(found)[:, ::-1]
    return scores


def search_row(args):
    """The top 10 of test users, seen titles kept: exact search against a beam of 10."""
    dataset = dataset_of("ml-100k")
    model, _, prompts = trained("ml-100k", args.run)
    windows = part_of(dataset.test, args.share)
    trial = part_of(windows, 64 / len(windows))
    speeds = {batch: [] for batch in (8, 16, 32, 64)}
    for _ in range(2):
        for batch in speeds:
            speeds[batch].append(seconds_of(beam_search, model, prompts, trial, batch)[0])
    best = min(speeds, key=lambda batch: min(speeds[batch]))
    pieces = [windows[i : i + 128] for i in range(0, len(windows), 128)]
    sides = {
        "ours": lambda piece: rank(model, prompts, piece, 10, keep_seen=True),
        "peer": lambda piece: beam_search(model, prompts, piece, best),
    }
    seconds, results = in_turns(sides, pieces)
    ours = np.concatenate([ranking.scores for ranking in results["ours"]])
    theirs = np.concatenate(results["peer"])
    rates = {}
    for name, s in seconds.items():
        rates[name] = float(np.median([len(p) / t for p, t in zip(pieces, s)]))
    rounding = 1e-4  # nats, of fp32
    forwarded = np.concatenate([ranking.forwarded for ranking in results["ours"]])
    return {
        "ratio": rates["ours"] / rates["peer"],
        **rates,
        "unit": "users/s",
        "users": len(windows),
        "peer batch size": best,
        "peer candidates, s for 64 users": {str(b): min(s) for b, s in speeds.items()},
        "lists with a worse score at some rank": int((ours < theirs - rounding).any(1).sum()),
        "lists with a better score at some rank": int((ours > theirs + rounding).any(1).sum()),
        "forwarded a user": float(forwarded.mean()),
        "seconds": seconds,
    }


def catalogues(args):
    """Exact search as the catalogue grows, with a model trained on each for a minute.

    Each search has a process of its own, which tells its time and memory.
    """
    curve = []
    for name in ["ml-100k", *([args.data] if args.data else []), "made"]:
        model, tokenizer, _ = trained(name)
        with tempfile.TemporaryDirectory() as folder:
            gdrt.save_model(Path(folder) / "model", model, tokenizer)
            users = max(64, round(512 * args.share))
            child = ["--child", "search", name, folder, users, *threads_flag(args)]
            last, _ = peak_memory(__file__, *child)
        row = {"catalogue": Path(name).name, "titles": len(dataset_of(name).titles)}
        curve.append(row | json.loads(last))
        announce(f"{curve[-1]}")
    return {"curve": curve}


def child_search(name, run, users, rows=32):
    """In its own process: rank test users.

    Returns time, prefixes forwarded, and memory for each of the `rows` users ranked at once.
    """
    dataset = dataset_of(name)
    model, _, prompts = trained(name, run)
    windows = dataset.test
    if int(users) < len(windows):
        windows = part_of(windows, int(users) / len(windows))
    with torch.no_grad():  # libraries load what they need
        target_logits(model, collate(build_trees(prompts, windows[:1])))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds, ranking = seconds_of(lambda: rank(model, prompts, windows, rows=rows))
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {
        "users": len(windows),
        "ms a user": 1000 * seconds / len(windows),
        "forwarded a user": float(ranking.forwarded.mean()),
        "forwarded, 95% of users under": float(np.quantile(ranking.forwarded, 0.95)),
        "MB a user": grown / MEGABYTE / min(rows, len(windows)),
    }


def ranks(args):
    """Time and peak memory of evaluating one model by one process, and by two that share the work.

    Each process has one thread, so that two of them have twice the cores.
    """
    model, tokenizer, _ = trained("ml-100k", args.run)
    users = max(8, round(len(dataset_of("ml-100k").users) * args.share))
    with tempfile.TemporaryDirectory() as folder:
        gdrt.save_model(Path(folder) / "model", model, tokenizer)
        sides = {world: evaluated_by(world, folder, users) for world in (1, 2)}
    one, two = [slowest(side) for side in sides.values()]
    return {
        "ratio": one / two,
        "ours": users / two,
        "peer": users / one,
        "unit": "users/s",
        "users": users,
        "ranks": {str(world): side for world, side in sides.items()},
    }


def slowest(side):
    """Seconds of the slowest of some processes."""
    return max(process["seconds"] for process in side)


def evaluated_by(world, folder, users):
    """What each of `world` processes tells of one evaluation that they share out."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def child(rank):
        values = "evaluation", folder, users, rank, world, port
        last, peak = peak_memory(__file__, "--threads", 1, "--child", *values)
        return {**json.loads(last), "peak MB": peak}

    with concurrent.futures.ThreadPoolExecutor(world) as pool:
        return list(pool.map(child, range(world)))


def child_evaluation(run, users, rank, world, port):
    """In its own process: validation and test windows of `users` users, and the audit."""
    dataset = dataset_of("ml-100k")
    model, _, prompts = trained("ml-100k", run)
    if int(world) > 1:
        place = {"rank": int(rank), "world_size": int(world)}
        address = f"tcp://127.0.0.1:{port}"
        torch.distributed.init_process_group("gloo", init_method=address, **place)
    parts = {}
    for part in "valid", "test":
        parts[part] = [w for w in getattr(dataset, part) if w.user < int(users)]

    def evaluate():
        found = evaluate_parts(model, prompts, dataset, parts, None, 0)
        audit(model, prompts, parts["test"], None, 0, found["test"][1]["NDCG@10"])

    seconds, _ = seconds_of(evaluate)
    return {"windows": sum(map(len, parts.values())), "seconds": seconds}


# ---------------------------------------------------------------- rows: memory and limit


def memory(args):
    """Peak resident memory of gdrt.py on ml-100k from start to end, and of Trainer.

    Trainer runs a quarter of an epoch at the batch that was fastest in train-tiny, or else at 16.
    """
    known = read_results(args.out)["rows"].get("train-tiny", {}).get("peer batch size", 16)
    with tempfile.TemporaryDirectory() as folder:
        command = [ROOT / "gdrt.py", "--device", "cpu", "--batch", TINY_PLAN, "--out", folder]
        if args.share < 1:
            windows = round(args.share * len(dataset_of("ml-100k").train))
            command += ["--windows", windows, "--epochs", 1]
        _, ours = peak_memory(*command)
    child = ["--child", "trainer", known, args.share / 4, *threads_flag(args)]
    _, theirs = peak_memory(__file__, *child)
    row = {"ratio": ours / theirs, "ours": ours, "peer": theirs}
    return row | {"unit": "MB", "peer batch size": known}


def child_trainer(batch, share):
    """In its own process: the Trainer, once over a share of the training windows."""
    dataset = dataset_of("ml-100k")
    model, tokenizer, prompts = start(dataset)
    windows = gdrt.draw_windows(dataset.train, round(float(share) * len(dataset.train)), 0)
    examples = trainer_examples(build_trees(prompts, windows, pack=False))
    seconds = trainer(model, tokenizer, examples, int(batch), TINY_PLAN, default_job())
    return {"updates": len(seconds)}


def node_count(trees):
    return sum(len(tree.ids) for tree in trees)


def lora_memory(args):
    """What training in bf16 holds at the end of an update, with --lora 8 and with all weights."""
    held = {}
    peak = {}
    for lora, name in ((8, "--lora 8"), (0, "all weights")):
        last, peak[name] = peak_memory(__file__, "--child", "held", lora, *threads_flag(args))
        held[name] = json.loads(last)
    ours = sum(held["--lora 8"].values())
    theirs = sum(held["all weights"].values())
    return {
        "ratio": ours / theirs,
        "ours": ours,
        "peer": theirs,
        "unit": "MB",
        "held, MB": held,
        "peak of the process, MB": peak,
    }


def child_held(rank):
    """In its own process: MB of weights, gradients and AdamW's state at the end of an update."""
    dataset = dataset_of("ml-100k")
    job = default_job("bf16")
    model, _, prompts = start(dataset, large=True)
    if int(rank):
        gdrt.add_lora(model, int(rank), 0, job)
    trees = build_trees(prompts, gdrt.draw_windows(dataset.train, LARGE_PLAN, 0))
    group = torch.zeros(prompts.trie.path.shape, dtype=torch.long)
    optimizer = torch.optim.AdamW(gdrt.trainable(model), lr=1e-4, fused=True)
    held = {}

    def megabytes(tensors):
        return sum(x.numel() * x.element_size() for x in tensors) / 1e6

    def look(optimizer, *_):
        held["weights"] = megabytes(model.parameters())
        held["gradients"] = megabytes(p.grad for p in model.parameters() if p.grad is not None)
        moments = []
        for state in optimizer.state.values():
            moments += [state["exp_avg"], state["exp_avg_sq"]]
        held["moments"] = megabytes(moments)

    optimizer.register_step_post_hook(look)
    model = in_training(model, job)
    with gdrt.frozen_in_bf16(model, job):
        gdrt.training_step(
            model, optimizer, trees, prompts, group, gdrt.sft_rule, torch.zeros(1), job
        )
    return held


def useful_flops(model, trees):
    """FLOPs that one update of `trees` needs: matrix products forward, and twice that backward.

    Padding and masked pairs of tokens do not count.
    """
    config = model.config
    weights = 0
    for name, p in model.named_parameters():
        if p.dim() == 2 and "embed" not in name and "lm_head" not in name:
            weights += p.numel()
    nodes = node_count(trees)
    targets = sum(len(tree.label) for tree in trees)
    # A node sees its ancestors and itself; q k and p v each take a multiplication and an addition.
    pairs = sum(int((tree.position + 1).sum()) for tree in trees)
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    forward = 2 * weights * nodes
    forward += 2 * config.vocab_size * config.hidden_size * targets
    forward += config.num_hidden_layers * 4 * width * pairs
    return 3 * forward


def product_rate(precision, shape=(4096, 4096, 4096)):
    """FLOP/s of one matrix product (m, k) x (k, n)."""
    m, k, n = shape
    kind = torch.bfloat16 if precision == "bf16" else torch.float32
    a = torch.randn(m, k, dtype=kind)
    b = torch.randn(k, n, dtype=kind)
    return 2 * m * k * n / seconds_of(torch.mm, a, b)[0]


def operators(step, most=10):
    """{operator: its share of an update's time}, the largest first."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step()
    events = sorted(profiler.key_averages(), key=lambda e: -e.self_cpu_time_total)
    total = sum(e.self_cpu_time_total for e in events)
    return {e.key: round(e.self_cpu_time_total / total, 3) for e in events[:most]}


def limit_case(large, per_update, updates, precision, compiled):
    """The update of one model in one precision, in turns with matrix products."""
    dataset = dataset_of("ml-100k")
    job = default_job(precision)
    model, _, prompts = start(dataset, large)
    if compiled:
        # Without a cache the first update tells what compiling costs.
        torch._inductor.config.force_disable_caches = True
        for layer in model.model.layers:
            layer.compile(dynamic=True)
    trees = build_trees(prompts, gdrt.draw_windows(dataset.train, 20 * per_update, 0))
    plan = batches_of(trees, gdrt.make_batches(trees, per_update, 10, seed=0)[:updates])
    step = sft_step(model, prompts, job, 1e-4)
    nodes = int(np.median([node_count(batch) for batch in plan]))
    own = (nodes, model.config.hidden_size, model.config.intermediate_size)
    first, _ = seconds_of(step, plan[0])
    sides = {
        "update": step,
        "product": lambda _: product_rate(job.precision),
        "own product": lambda _: product_rate(job.precision, own),
    }
    seconds, rates = in_turns(sides, plan)
    timed = zip(plan, seconds["update"])
    useful = float(np.median([useful_flops(model, batch) / s for batch, s in timed]))
    most = float(np.median(rates["product"]))
    return {
        "ratio": useful / most,
        "ours": useful / 1e9,
        "peer": most / 1e9,
        "unit": "GFLOP/s",
        "precision": job.precision + ", compiled" * compiled,
        "s of the first update": first,
        "product of the model's own shape, GFLOP/s": float(np.median(rates["own product"])) / 1e9,
        "own shape": own,
        "s an update": float(np.median(seconds["update"])),
        "nodes an update": nodes,
        "operators": operators(lambda: step(plan[0])),
    }


def limit(args):
    """Useful FLOP/s of the training update over those of the machine's matrix products.

    The two are measured in turns.
    """
    cases = {  # name: large, windows an update, updates, precision, compiled
        "tiny": (False, TINY_PLAN, 40, "auto", False),
        "135m": (True, LARGE_PLAN, 8, "auto", False),
        "135m, fp32": (True, LARGE_PLAN, 8, "fp32", False),
        "135m, compiled": (True, LARGE_PLAN, 8, "auto", True),
    }
    row = {}
    for name, (large, per_update, updates, *rest) in cases.items():
        updates = max(2, round(updates * args.share))
        row[name] = limit_case(large, per_update, updates, *rest)
        announce(f"{name}: {row[name]}")
    return row | {"ratio": row["135m"]["ratio"]}


# ---------------------------------------------------------------- results

TRAINER = "transformers' Trainer"
ROWS = {  # name: (function, what, peer, what it must reach)
    "train-tiny": (
        train_tiny,
        "training, tiny model, one epoch of ml-100k",
        TRAINER,
        "at least 5",
    ),
    "train-135m": (
        train_135m,
        "training, SmolLM2-135M's shape, 24 updates of 40 windows",
        TRAINER,
        "at least 4",
    ),
    "gdrt-update": (gdrt_update, "time of a GDRT update", "an SFT update", "at most 1.03"),
    "relevance": (
        relevance_row,
        "relevance, a path point",
        "one backward per target token",
        "at least 20",
    ),
    "search": (
        search_row,
        "exact top 10 of all test users",
        "generate(num_beams=10) over the titles",
        "at least 10",
    ),
    "catalogues": (catalogues, "search by size of catalogue", "itself", ""),
    "ranks": (ranks, "evaluation by two ranks", "one process", "at least 1.7"),
    "memory": (memory, "peak memory of the main job", TRAINER, "at most 1"),
    "lora-memory": (
        lora_memory,
        "weights, gradients and AdamW's state, SmolLM2-135M's shape, --lora 8 in bf16",
        "all weights",
        "at most 0.15",
    ),
    "limit": (
        limit,
        "useful FLOP/s of an update, SmolLM2-135M's shape",
        "the machine's matrix product",
        "at least 0.5",
    ),
}


# The parts of rows that run in processes of their own.
CHILDREN = {
    "search": child_search,
    "evaluation": child_evaluation,
    "trainer": child_trainer,
    "held": child_held,
}


def read_results(path):
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {"rows": {}}
    except ValueError:
        raise InputError(f"{path}: not whole JSON; delete it and measure again") from None


def met(ratio, goal):
    """Whether a ratio is as the goal wants it, 'at least 5' or 'at most 1'."""
    word, number = goal.split()[1:]
    return ratio >= float(number) if word == "least" else ratio <= float(number)


def table_line(case, what, peer, goal, share):
    """The cells of a row, or of one of the cases for which the limit is measured."""
    figures = [f"{case[side]:.4g}" if side in case else "" for side in ("ours", "peer")]
    precision = f", {case['precision']}" if "precision" in case else ""
    reached = goal + ("" if met(case["ratio"], goal) else ", missed")
    ratio = f"{case['ratio']:.3g}"
    name = f"{what}{precision}, against {peer}"
    return (name, *figures, case.get("unit", ""), ratio, reached, f"{share:g}")


def curve_table(curve):
    """The table of the catalogues' curve."""
    columns = [key for key in curve[0] if key != "catalogue"]
    lines = []
    for point in curve:
        line = [point["catalogue"]]
        for key in columns:
            line.append(f"{point[key]:.4g}" if isinstance(point[key], float) else point[key])
        lines.append(line)
    return format_table(("catalogue", *columns), lines)


def table(results):
    """The table of all rows in the file, the limit's cases included, and the catalogues' curve."""
    lines = []
    for name, (_, what, peer, goal) in ROWS.items():
        if name in results["rows"] and goal:
            row = results["rows"][name]
            # The limit has several cases of the large model; every other row is one case.
            for case in [row[key] for key in row if key.startswith("135m")] or [row]:
                lines.append(table_line(case, what, peer, goal, row["share"]))
    header = ("what, against what", "ours", "peer", "unit", "ratio", "goal", "share")
    text = format_table(header, lines)
    if "catalogues" in results["rows"]:
        text += "\n\n" + curve_table(results["rows"]["catalogues"]["curve"])
    return text


# ---------------------------------------------------------------- the command


def threads_flag(args):
    return ["--threads", args.threads] if args.threads else []


def fraction(text):
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} should be above 0 and at most 1")
    return value


def parser():
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    rows = f"rows to measure (default: all): {', '.join(ROWS)}"
    p.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help=rows)
    share = "measure on a seeded share of a row's work; the file says so (default: 1)"
    p.add_argument("--share", type=fraction, default=1.0, help=share)
    data = "folder of the book data set, for the catalogues' curve"
    p.add_argument("--data", metavar="PATH", help=data)
    run = (
        "a finished loss folder, such as runs/ml-100k-tiny-seed0/gdrt, whose model the rows "
        f"relevance and search use (default: one trained here for {MINUTE} s)"
    )
    p.add_argument("--run", metavar="RUN", help=run)
    threads = "of PyTorch, for both sides (default: PyTorch's own)"
    p.add_argument("--threads", type=int, help=threads)
    out = "results, merged row by row (default: results/speed.json)"
    p.add_argument("--out", default=ROOT / "results" / "speed.json", metavar="FILE", help=out)
    table = "measure nothing, print the table of the file"
    p.add_argument("--table", action="store_true", help=table)
    # Rows run parts of themselves in processes of their own.
    p.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    return p


def measure(name, args, accelerate_version):
    """Measure one row and put it into the file."""
    announce(f"{name} ...")
    spent, row = seconds_of(ROWS[name][0], args)
    machine = gdrt.environment()
    machine["versions"]["accelerate"] = accelerate_version
    facts = {"share": args.share, "wall time, s": spent, "processor": processor()}
    results = read_results(args.out)  # again for each row: another run may have written meanwhile
    results["rows"][name] = row | facts | machine
    write_atomic(args.out, json.dumps(results, indent=1) + "\n")
    if "ratio" in row:
        announce(f"{name}: ratio {row['ratio']:.3g}")


def main(argv=None):
    args = parser().parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.child:
        part, *values = args.child
        print(json.dumps(CHILDREN[part](*values)))
        return
    if not args.table:
        try:
            import accelerate
        except ImportError:
            missing = "accelerate is missing; pip install -r benchmarks/requirements.txt"
            raise InputError(missing) from None
        for name in args.only:
            measure(name, args, accelerate.__version__)
    print(table(read_results(args.out)))


def processor():
    """The name of the processor, or '' where /proc does not tell it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n")
    except OSError:
        return ""
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else ""


if __name__ == "__main__":
    run_command(main)
