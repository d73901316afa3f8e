"""Ours against what a user would pick instead, in turns within one process, into results/speed.json.

    pip install -r benchmarks/requirements.txt
    python benchmarks/speed.py --data PATH/book                the rows of the README, on an idle machine
    python benchmarks/speed.py --only search --share 0.1       one row, on a seeded tenth of it, into the same file
    python benchmarks/speed.py --table                         the table of what the file holds

Both sides have the same weights, examples, precision and threads, and take turns: A B A B. A ratio is the median of the
peer's rounds over the median of ours. A row keeps every round, and the machine, versions, commit and share it was made with.

Read `in_turns` first, then `trainer` (the training peer), `beam_search` (the decoding peer), then the rows, `ROWS` last.
"""

import argparse
import copy
import functools
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from tokenizers.trainers import BpeTrainer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

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
    MARKER,
    USER,
    InputError,
    Table,
    announce,
    build_trees,
    by_length,
    collate,
    from_table,
    load_dataset,
    load_model,
    make_prompts,
    positions,
    run_command,
    target_logits,
    task_text,
    tiny_model,
    tiny_tokenizer,
    write_atomic,
)
from evaluate import rank

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
LIKE_SMOLLM2 = 3250  # BPE vocabulary that gives the quoted titles of ml-100k 11.6 tokens, as many as SmolLM2's own tokeniser
TINY_PLAN, LARGE_PLAN = (
    128,
    40,
)  # windows an update: gdrt.py's default, and what a 135M model has time for on two cores
LARGE_UPDATES = 24
MINUTE = 60  # seconds of training where a row needs a trained model and --run names none
ROUNDS = 8  # turns that a row's work is cut into


# ------------------------------------------------------------------------------------------------ measuring


def seconds_of(function, *args):
    start = time.perf_counter()
    result = function(*args)
    return time.perf_counter() - start, result


def in_turns(sides, pieces):
    """For each piece of work, each side in turn -> {side: [seconds a piece]}, {side: [result a piece]}. The first piece runs twice."""
    seconds, results = {name: [] for name in sides}, {name: [] for name in sides}
    for i, piece in enumerate([pieces[0], *pieces]):
        for name, side in sides.items():
            spent, result = seconds_of(side, piece)
            if i:  # the first time warms caches and allocator
                seconds[name].append(spent)
                results[name].append(result)
    return seconds, results


def median_rate(work, seconds):
    """Median over ROUNDS stretches of a run of work per second. work, seconds: one number an update."""
    rounds = min(ROUNDS, len(seconds))
    return float(
        np.median(
            [
                sum(w) / sum(s)
                for w, s in zip(np.array_split(work, rounds), np.array_split(seconds, rounds))
            ]
        )
    )


def peak_memory(*command):
    """Run a command -> (its last line of output, peak resident MB), of the process alone.

    A process inherits the peak of the one that started it, so a small Python stands between us and the command.
    """
    between = (
        "import resource, subprocess, sys; code = subprocess.call(sys.argv[1:]); "
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", between, sys.executable, *map(str, command)],
        stdout=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        raise InputError(
            f"{' '.join(map(str, command[:3]))} failed with exit code {done.returncode}, see above"
        )
    *_, last, peak = ["", *done.stdout.strip().split("\n")]
    return last, int(peak) / (1024 if sys.platform == "linux" else 1024**2)


# ------------------------------------------------------------------------------------------------ the training peer


def trainer_examples(trees):
    """Separate prompts (trees of one window) as a Trainer's dataset: labels on the target tokens, -100 elsewhere."""
    examples = []
    for tree in trees:
        labels = np.full(len(tree.ids) + 1, -100)
        labels[tree.predict_at + 1] = tree.label
        examples.append(
            {"input_ids": [*tree.ids.tolist(), int(tree.label[-1])], "labels": labels.tolist()}
        )
    return examples


def trainer(model, tokenizer, examples, batch, per_update, job, between=lambda: None):
    """transformers.Trainer on `examples` once -> seconds of each update. `between` runs after each and is not counted."""
    from transformers import (
        DataCollatorForSeq2Seq,
        PrinterCallback,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    transformers.logging.set_verbosity_error()
    seconds = []

    class Clock(TrainerCallback):
        def on_train_begin(self, *_, **__):
            self.start = time.perf_counter()

        def on_step_end(self, *_, **__):
            seconds.append(time.perf_counter() - self.start)
            between()
            self.start = time.perf_counter()

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
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
        collator = DataCollatorForSeq2Seq(
            tokenizer, pad_to_multiple_of=8, return_tensors="pt"
        )  # as BIGRec and MSL train
        peer = Trainer(
            model, arguments, collator, examples, processing_class=tokenizer, callbacks=[Clock()]
        )
        peer.remove_callback(PrinterCallback)
        peer.train()
    return seconds


def training_row(model, tokenizer, prompts, windows, per_update, candidates, job):
    """One epoch of `windows` on packed trees against Trainer's, update by update in turns."""
    trees, examples = (
        build_trees(prompts, windows),
        trainer_examples(build_trees(prompts, windows, pack=False)),
    )
    trial = [
        examples[i] for i in np.random.default_rng(0).permutation(len(examples))[: 2 * per_update]
    ]
    speeds = {batch: [] for batch in candidates}
    for _ in range(2):
        for batch in candidates:
            speeds[batch] += trainer(copy.deepcopy(model), tokenizer, trial, batch, per_update, job)
    best = min(candidates, key=lambda batch: np.median(speeds[batch]))

    mine, group = (
        in_training(copy.deepcopy(model), job),
        torch.zeros(prompts.trie.path.shape, dtype=torch.long, device=job.device),
    )
    optimizer = torch.optim.AdamW(
        mine.parameters(), lr=job.lr, betas=gdrt.BETAS, weight_decay=gdrt.WEIGHT_DECAY, fused=True
    )
    updates = iter(gdrt.make_batches(trees, per_update, 1, seed=0))
    log_q, seconds, work = torch.zeros(1, device=job.device), [], []

    def ours():
        if batch := [trees[i] for i in next(updates, [])]:
            seconds.append(
                seconds_of(
                    gdrt.training_step,
                    mine,
                    optimizer,
                    batch,
                    prompts,
                    group,
                    gdrt.sft_rule,
                    log_q,
                    job,
                )[0]
            )
            work.append(sum(len(set(tree.window)) for tree in batch))

    theirs = trainer(copy.deepcopy(model), tokenizer, examples, best, per_update, job, ours)
    sizes = [per_update] * (len(theirs) - 1) + [len(examples) - per_update * (len(theirs) - 1)]
    rates = median_rate(work, seconds), median_rate(sizes, theirs)
    tokens = sum(len(e["input_ids"]) for e in examples)
    return {
        "ratio": rates[0] / rates[1],
        "ours": rates[0],
        "peer": rates[1],
        "unit": "windows/s",
        "peer batch size": best,
        "peer candidates, s an update": {str(b): float(np.median(s)) for b, s in speeds.items()},
        "windows": len(windows),
        "tokens a window": {
            "ours": sum(len(t.ids) for t in trees) / len(windows),
            "peer": tokens / len(windows),
        },
        "seconds": {"ours": seconds, "peer": theirs},
    }


# ------------------------------------------------------------------------------------------------ data and models


@functools.cache
def dataset_of(name):
    return made_dataset() if name == "made" else load_dataset(name)


def made_dataset(size=20_000, users=3000):
    """A catalogue of `size` titles from word lists, seeded, in ml-100k's style; users choose within two of its kinds."""
    random = np.random.default_rng(0)
    kinds = "Voyage Trail Letters Cellar Wedding Heist Bridge Song Garden Winter Mirror Island River Castle Stranger Train".split()
    tones = (
        "Silent Golden Broken Distant Burning Hidden Crimson Forgotten Last Wild Electric Secret Lonely Endless Paper Frozen Second "
        "Velvet Hollow Savage"
    ).split()
    places = (
        "Vienna Havana Tangier Oslo Kyoto Lisbon Marseille Odessa Bombay Cairo Dublin Naples Quito Riga Seville Tallinn Utrecht "
        "Warsaw Yalta Zagreb"
    ).split()
    titles = {}
    while len(titles) < size:
        kind, tone, place = random.choice(kinds), random.choice(tones), random.choice(places)
        shape = random.choice(
            ["The {1} {0}", "{0} to {2}", "{2} {0}", "The {1} {0} of {2}", "{1} {0}, {1} {2}"]
        )
        titles[f"{shape.format(kind, tone, place)} ({random.integers(1930, 2000)})"] = kind
    names, kind_of = list(titles), np.array(list(titles.values()))
    shelves, ratings = {kind: np.flatnonzero(kind_of == kind) for kind in kinds}, []
    for user in range(users):
        liked = np.concatenate([shelves[kind] for kind in random.choice(kinds, 2, replace=False)])
        for moment, item in enumerate(random.choice(liked, 20, replace=False)):
            ratings.append((str(user), str(item), 5.0, float(user * 100 + moment)))
    table = Table(
        {str(i): name for i, name in enumerate(names)},
        {str(i): (titles[name],) for i, name in enumerate(names)},
        ratings,
    )
    return from_table("made movies", table, "leave-one-out", 10, 4.0, 0)


def like_smollm2(dataset):
    """A byte-level BPE with SmolLM2's splitting (digits one by one) that cuts titles as fine as SmolLM2's own does."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = ByteLevelDecoder()
    texts = [f'"{title}"' for title in dataset.titles] + [task_text(dataset), MARKER] * 200
    tokenizer.train_from_iterator(
        texts,
        BpeTrainer(
            vocab_size=LIKE_SMOLLM2,
            special_tokens=["<bos>", "<eos>"],
            show_progress=False,
            initial_alphabet=ByteLevel.alphabet(),
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<eos>"
    )


def start(dataset, large=False):
    """Untrained (model, tokenizer, prompts): the tiny model, or random weights of SmolLM2-135M's shape."""
    tokenizer = like_smollm2(dataset) if large else tiny_tokenizer(dataset)
    torch.manual_seed(0)
    model = (
        LlamaForCausalLM(LlamaConfig(**SMOLLM2, dtype=torch.float32))
        if large
        else tiny_model(len(tokenizer))
    )
    return model, tokenizer, make_prompts(dataset, tokenizer, positions(model))


@functools.cache
def trained(name, run=None):
    """(model, tokenizer, prompts) of a finished run, or of a tiny model trained on `name` for MINUTE seconds here."""
    dataset = dataset_of(name)
    if run is not None:
        model, tokenizer = load_model(Path(run) / "model")
        return model.eval(), tokenizer, make_prompts(dataset, tokenizer, positions(model))
    model, tokenizer, prompts = start(dataset)
    trees, job = build_trees(prompts, dataset.train), default_job()
    group = torch.zeros(prompts.trie.path.shape, dtype=torch.long)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=job.lr, betas=gdrt.BETAS, weight_decay=gdrt.WEIGHT_DECAY, fused=True
    )
    began, model = time.perf_counter(), in_training(model, job)
    for step, update in enumerate(
        gdrt.make_batches(trees, TINY_PLAN, 10**4 // len(trees) + 10, seed=0)
    ):
        left = 1 - (time.perf_counter() - began) / MINUTE
        if left <= 0:
            break
        optimizer.param_groups[0]["lr"] = job.lr * min(left, (step + 1) / 20)
        gdrt.training_step(
            model,
            optimizer,
            [trees[i] for i in update],
            prompts,
            group,
            gdrt.sft_rule,
            torch.zeros(1),
            job,
        )
    announce(f"{name}: {step} updates in {MINUTE} s")
    model.set_attn_implementation("sdpa")
    return model.eval(), tokenizer, prompts


def in_training(model, job):
    """The model as gdrt.train has it around gdrt.update."""
    model.set_attn_implementation(gdrt.training_attention(model, job))
    return model.train()


def default_job(precision="auto"):
    """The Job of gdrt.py's defaults on this machine's CPU."""
    return gdrt.make_train_config(
        gdrt.parser().parse_args(["--device", "cpu", "--precision", precision])
    )


def part_of(values, share, seed=0):
    """A seeded share of a list, in its order; at least one."""
    keep = max(1, round(share * len(values)))
    return [values[i] for i in sorted(np.random.default_rng(seed).permutation(len(values))[:keep])]


# ------------------------------------------------------------------------------------------------ rows: training


def train_tiny(args):
    dataset = dataset_of("ml-100k")
    model, tokenizer, prompts = start(dataset)
    windows = gdrt.draw_windows(dataset.train, round(args.share * len(dataset.train)), 0)
    return training_row(
        model, tokenizer, prompts, windows, TINY_PLAN, (8, 16, 32, 64), default_job()
    )


def train_135m(args):
    dataset = dataset_of("ml-100k")
    model, tokenizer, prompts = start(dataset, large=True)
    windows = gdrt.draw_windows(
        dataset.train, LARGE_PLAN * max(1, round(args.share * LARGE_UPDATES)), 0
    )
    candidates = (
        4,
        8,
        10,
        20,
    )  # all 40 at once, padded and with the logits of every position, do not fit into 24 GiB
    row = training_row(
        model, tokenizer, prompts, windows, LARGE_PLAN, candidates, default_job()._replace(lr=1e-4)
    )
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
    dataset, job = dataset_of("ml-100k"), default_job()
    model, tokenizer, prompts = start(dataset)
    trees = build_trees(prompts, dataset.train)
    updates = gdrt.make_batches(trees, TINY_PLAN, 1, seed=0)[: max(1, round(100 * args.share))]
    group = (
        torch.arange(4)
        .repeat(prompts.trie.path.size)[: prompts.trie.path.size]
        .view(prompts.trie.path.shape)
    )

    def side(step):
        mine = in_training(copy.deepcopy(model), job)
        optimizer = torch.optim.AdamW(
            mine.parameters(),
            lr=job.lr,
            betas=gdrt.BETAS,
            weight_decay=gdrt.WEIGHT_DECAY,
            fused=True,
        )
        return lambda batch: step(mine, optimizer, batch)

    sides = {"plain": side(lambda *mine: bare_step(*mine, job))}
    for name, objective in (("sft", gdrt.sft_rule), ("gdrt", gdrt.gdrt_rule(1.0, "uniform"))):
        sides[name] = side(
            lambda *mine, objective=objective: gdrt.training_step(
                *mine, prompts, group, objective, torch.zeros(4), job
            )
        )
    seconds, _ = in_turns(sides, [[trees[i] for i in update] for update in updates])
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


# ------------------------------------------------------------------------------------------------ row: relevance


def token_backwards(model, prompts, windows, at_once=1):
    """d log p / ds of every target token at the path's middle by one backward per target token -> (N,), window by window.

    at_once > 1 is the best one can do with backwards: the k-th tokens of several prompts, which share nothing, in one.
    """
    parts = []
    for start in range(0, len(windows), at_once):
        batch = collate(build_trees(prompts, windows[start : start + at_once], pack=False))
        E, delta = path_ends(model, batch, (USER,))
        embeds = (E - 0.5 * delta).detach().requires_grad_()
        with torch.enable_grad():
            log_prob = (
                target_logits(model, batch, embeds)
                .log_softmax(-1)
                .gather(-1, batch.label[:, None])[:, 0]
            )  # (N,)
        derivative = torch.empty_like(log_prob)
        for k in range(int(batch.place.max()) + 1):
            own = (batch.place == k).nonzero()[:, 0]
            (gradient,) = torch.autograd.grad(log_prob[own].sum(), embeds, retain_graph=True)
            derivative[own] = (gradient * delta).sum((1, 2))[batch.row[own]]
        parts.append(derivative.detach())
    return torch.cat(parts)


def relevance_row(args):
    """One path point of the user segment for all target tokens of a sample, as the relevance step draws it."""
    dataset = dataset_of("ml-100k")
    model, _, prompts = trained("ml-100k", args.run)
    sample = sample_windows(dataset.train, 0)
    trees = build_trees(prompts, sample)
    pieces = part_of(
        [[trees[i] for i in indices] for indices in by_length(trees)], 0.25 * args.share
    )

    def ours(piece):
        with forward_mode(model):
            batch = collate(piece)
            return segment_gradient(model, batch, (USER,), points=1)[
                np.argsort(batch.window, kind="stable")
            ]

    def backwards(at_once):
        return lambda piece: token_backwards(
            model, prompts, [sample[i] for tree in piece for i in sorted(set(tree.window))], at_once
        )

    model.requires_grad_(
        False
    )  # backwards to the embeddings alone: no weight's gradient is asked of the peer
    seconds, results = in_turns(
        {"ours": ours, "peer": backwards(1), "peer, 16 prompts at once": backwards(16)},
        [sorted(piece, key=lambda tree: tree.window[0]) for piece in pieces],
    )
    model.requires_grad_(True)
    ours, theirs, batched = (torch.cat(results[name]) for name in seconds)
    n = len(ours)
    per_token = {
        name: float(np.median(s) / np.median([len(r) for r in results[name]]))
        for name, s in seconds.items()
    }
    row = {
        "ratio": per_token["peer"] / per_token["ours"],
        "ours": n / sum(seconds["ours"]),
        "peer": n / sum(seconds["peer"]),
        "unit": "target tokens/s",
        "against 16 prompts at once": per_token["peer, 16 prompts at once"] / per_token["ours"],
        "largest difference, nats": float(
            max((ours - theirs).abs().max(), (ours - batched).abs().max())
        ),
        "target tokens": n,
        "seconds": seconds,
    }
    if args.share == 1:
        row["whole step, s"] = seconds_of(relevance, model, prompts, dataset.train)[0]
    if args.run:
        spent = json.loads((Path(args.run) / "metrics.json").read_text())["time"]
        row |= {"share of the run's time": spent["relevance"] / sum(spent.values()), "run": spent}
    return row


# ------------------------------------------------------------------------------------------------ rows: search


def beam_search(model, prompts, windows, batch_size, k=10):
    """generate() constrained to the titles, as MSL, BEAR and D3 decode -> scores (n, k), best first.

    renormalize_logits takes the log-softmax again after the mask, which is the log-softmax over legal continuations.
    """
    legal = {}  # title tokens so far -> tokens that may follow
    for title in prompts.titles:
        sequence = (*title, prompts.eos)
        for j, token in enumerate(sequence):
            legal.setdefault(sequence[:j], {})[token] = None
    legal = {prefix: list(tokens) for prefix, tokens in legal.items()}
    trees = build_trees(prompts, windows, pack=False, targets=False)
    scores, order = (
        np.empty((len(windows), k)),
        sorted(range(len(trees)), key=lambda i: len(trees[i].ids)),
    )
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        P = max(len(trees[i].ids) for i in chosen)
        ids, mask = (
            torch.full((len(chosen), P), prompts.eos),
            torch.zeros((len(chosen), P), dtype=torch.long),
        )
        for row, i in enumerate(chosen):
            ids[row, P - len(trees[i].ids) :] = torch.from_numpy(trees[i].ids)
            mask[row, P - len(trees[i].ids) :] = 1
        done = model.generate(
            ids,
            attention_mask=mask,
            num_beams=k,
            num_return_sequences=k,
            max_new_tokens=max(map(len, prompts.titles)) + 1,
            do_sample=False,
            prefix_allowed_tokens_fn=lambda _, sequence: legal.get(
                tuple(sequence[P:].tolist()), [prompts.eos]
            ),
            renormalize_logits=True,
            length_penalty=0.0,
            eos_token_id=prompts.eos,
            pad_token_id=prompts.eos,
            return_dict_in_generate=True,
            output_scores=True,
        )
        scores[chosen] = np.sort(done.sequences_scores.view(len(chosen), k).double().numpy())[
            :, ::-1
        ]
    return scores


def search_row(args):
    """The top 10 of test users, seen titles kept: exact search against a beam of 10."""
    dataset = dataset_of("ml-100k")
    model, _, prompts = trained("ml-100k", args.run)
    windows = part_of(dataset.test, args.share)
    trial, speeds = part_of(windows, 64 / len(windows)), {batch: [] for batch in (8, 16, 32, 64)}
    for _ in range(2):
        for batch in speeds:
            speeds[batch].append(seconds_of(beam_search, model, prompts, trial, batch)[0])
    best = min(speeds, key=lambda batch: min(speeds[batch]))
    pieces = [windows[i : i + 128] for i in range(0, len(windows), 128)]
    seconds, results = in_turns(
        {
            "ours": lambda piece: rank(model, prompts, piece, 10, keep_seen=True),
            "peer": lambda piece: beam_search(model, prompts, piece, best),
        },
        pieces,
    )
    ours, theirs = (
        np.concatenate([r.scores for r in results["ours"]]),
        np.concatenate(results["peer"]),
    )
    rates = {
        name: float(np.median([len(p) / t for p, t in zip(pieces, s)]))
        for name, s in seconds.items()
    }
    return {
        "ratio": rates["ours"] / rates["peer"],
        **rates,
        "unit": "users/s",
        "users": len(windows),
        "peer batch size": best,
        "peer candidates, s for 64 users": {str(b): min(s) for b, s in speeds.items()},
        "lists with a worse score at some rank": int(
            (ours < theirs - 1e-4).any(1).sum()
        ),  # ours worse; 1e-4 nats: fp32 rounding
        "lists with a better score at some rank": int((ours > theirs + 1e-4).any(1).sum()),
        "forwarded a user": float(np.concatenate([r.forwarded for r in results["ours"]]).mean()),
        "seconds": seconds,
    }


def catalogues(args):
    """Exact search as the catalogue grows: a model trained on each for a minute, its own process for time and memory."""
    curve = []
    for name in ["ml-100k", *([args.data] if args.data else []), "made"]:
        model, tokenizer, _ = trained(name)
        with tempfile.TemporaryDirectory() as folder:
            gdrt.save_model(Path(folder) / "model", model, tokenizer)
            last, _ = peak_memory(
                __file__,
                "--child",
                "search",
                name,
                folder,
                max(64, round(512 * args.share)),
                *threads_flag(args),
            )
        curve.append(
            {
                "catalogue": Path(name).name,
                "titles": len(dataset_of(name).titles),
                **json.loads(last),
            }
        )
        announce(f"{curve[-1]}")
    return {"curve": curve}


def child_search(name, run, users, rows=64):
    """In its own process: rank test users -> time, prefixes forwarded, and memory a user of a batch of `rows`."""
    dataset, (model, _, prompts) = dataset_of(name), trained(name, run)
    windows = (
        part_of(dataset.test, int(users) / len(dataset.test))
        if int(users) < len(dataset.test)
        else dataset.test
    )
    with torch.no_grad():
        target_logits(
            model, collate(build_trees(prompts, windows[:1]))
        )  # libraries load what they need
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds, ranking = seconds_of(rank, model, prompts, windows)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {
        "users": len(windows),
        "ms a user": 1000 * seconds / len(windows),
        "forwarded a user": float(ranking.forwarded.mean()),
        "forwarded, 95% of users under": float(np.quantile(ranking.forwarded, 0.95)),
        "MB a user": grown
        / (1024 if sys.platform == "linux" else 1024**2)
        / min(rows, len(windows)),
    }


# ------------------------------------------------------------------------------------------------ rows: memory and limit


def memory(args):
    """Peak resident memory: gdrt.py --dataset ml-100k from start to end, and Trainer at its fastest batch, on a quarter of an epoch."""
    known = read_results(args.out)["rows"].get("train-tiny", {}).get("peer batch size", 16)
    with tempfile.TemporaryDirectory() as folder:
        command = [ROOT / "gdrt.py", "--device", "cpu", "--out", folder]
        if args.share < 1:
            command += [
                "--windows",
                round(args.share * len(dataset_of("ml-100k").train)),
                "--epochs",
                1,
            ]
        _, ours = peak_memory(*command)
    _, theirs = peak_memory(
        __file__, "--child", "trainer", known, args.share / 4, *threads_flag(args)
    )
    return {
        "ratio": ours / theirs,
        "ours": ours,
        "peer": theirs,
        "unit": "MB",
        "peer batch size": known,
    }


def child_trainer(batch, share):
    """In its own process: the Trainer over one epoch."""
    dataset = dataset_of("ml-100k")
    model, tokenizer, prompts = start(dataset)
    windows = gdrt.draw_windows(dataset.train, round(float(share) * len(dataset.train)), 0)
    examples = trainer_examples(build_trees(prompts, windows, pack=False))
    return {
        "updates": len(trainer(model, tokenizer, examples, int(batch), TINY_PLAN, default_job()))
    }


def useful_flops(model, trees):
    """FLOPs that one update of `trees` needs: products forward and twice that backward, no padding, no masked pair."""
    config = model.config
    weights = sum(
        p.numel()
        for name, p in model.named_parameters()
        if p.dim() == 2 and "embed" not in name and "lm_head" not in name
    )
    nodes, targets = sum(len(tree.ids) for tree in trees), sum(len(tree.label) for tree in trees)
    pairs = sum(
        int((tree.position + 1).sum()) for tree in trees
    )  # a node sees its ancestors and itself
    width = config.num_attention_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    forward = (
        2 * weights * nodes
        + 2 * config.vocab_size * config.hidden_size * targets
        + config.num_hidden_layers * 4 * width * pairs
    )  # q k and p v: a product and a sum for each of `width`
    return 3 * forward


def product_rate(precision, shape=(4096, 4096, 4096)):
    """FLOP/s of one matrix product (m, k) x (k, n)."""
    m, k, n = shape
    kind = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = torch.randn(m, k, dtype=kind), torch.randn(k, n, dtype=kind)
    return 2 * m * k * n / seconds_of(torch.mm, a, b)[0]


def operators(step, most=10):
    """Shares of an update's time by operator -> {name: share}, the largest first."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step()
    events = sorted(profiler.key_averages(), key=lambda e: -e.self_cpu_time_total)
    total = sum(e.self_cpu_time_total for e in events)
    return {e.key: round(e.self_cpu_time_total / total, 3) for e in events[:most]}


def limit(args):
    """Useful FLOP/s of the training update over the machine's matrix product rate, measured in turns with it."""
    row = {}
    cases = (
        ("tiny", False, TINY_PLAN, 40, "auto", False),
        ("135m", True, LARGE_PLAN, 8, "auto", False),
        ("135m, fp32", True, LARGE_PLAN, 8, "fp32", False),
        ("135m, compiled", True, LARGE_PLAN, 8, "auto", True),
    )
    for name, large, per_update, updates, precision, compiled in cases:
        dataset, job = dataset_of("ml-100k"), default_job(precision)
        model, _, prompts = start(dataset, large)
        if compiled:
            torch._inductor.config.force_disable_caches = (
                True  # the first update is to tell what compiling costs
            )
            for layer in model.model.layers:
                layer.compile(dynamic=True)
        trees = build_trees(prompts, gdrt.draw_windows(dataset.train, 20 * per_update, 0))
        plan = [
            [trees[i] for i in update]
            for update in gdrt.make_batches(trees, per_update, 10, seed=0)[
                : max(2, round(updates * args.share))
            ]
        ]
        optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=1e-4,
            betas=gdrt.BETAS,
            weight_decay=gdrt.WEIGHT_DECAY,
            fused=True,
        )
        group = torch.zeros(prompts.trie.path.shape, dtype=torch.long)

        def step(batch):
            return gdrt.training_step(
                in_training(model, job),
                optimizer,
                batch,
                prompts,
                group,
                gdrt.sft_rule,
                torch.zeros(1),
                job,
            )

        nodes = int(np.median([sum(len(tree.ids) for tree in batch) for batch in plan]))
        own = nodes, model.config.hidden_size, model.config.intermediate_size
        first, _ = seconds_of(step, plan[0])
        seconds, rates = in_turns(
            {
                "update": step,
                "product": lambda _: product_rate(job.precision),
                "own product": lambda _: product_rate(job.precision, own),
            },
            plan,
        )
        useful = float(
            np.median([useful_flops(model, batch) / s for batch, s in zip(plan, seconds["update"])])
        )
        most = float(np.median(rates["product"]))
        row[name] = {
            "ratio": useful / most,
            "ours": useful / 1e9,
            "peer": most / 1e9,
            "unit": "GFLOP/s",
            "precision": job.precision + ", compiled" * compiled,
            "s of the first update": first,
            "product of the model's own shape, GFLOP/s": float(np.median(rates["own product"]))
            / 1e9,
            "own shape": own,
            "s an update": float(np.median(seconds["update"])),
            "nodes an update": nodes,
            "operators": operators(lambda: step(plan[0])),
        }
        announce(f"{name}: {row[name]}")
    return row | {"ratio": row["135m"]["ratio"]}


# ------------------------------------------------------------------------------------------------ results

ROWS = {  # name: (function, what, peer, what it must reach)
    "train-tiny": (
        train_tiny,
        "training, tiny model, one epoch of ml-100k",
        "transformers' Trainer",
        "at least 5",
    ),
    "train-135m": (
        train_135m,
        "training, SmolLM2-135M's shape, 24 updates of 40 windows",
        "transformers' Trainer",
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
    "memory": (memory, "peak memory of the main job", "transformers' Trainer", "at most 1"),
    "limit": (
        limit,
        "useful FLOP/s of an update, SmolLM2-135M's shape",
        "the machine's matrix product",
        "at least 0.5",
    ),
}


def read_results(path):
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {"rows": {}}
    except ValueError:
        raise InputError(f"{path}: not whole JSON; delete it and measure again") from None


def met(ratio, goal):
    word, number = goal.split()[1:]
    return ratio >= float(number) if word == "least" else ratio <= float(number)


def table(results):
    """The table of all rows there are, then the curve of the catalogues and the limits, as text."""
    lines = []
    for name, (_, what, peer, goal) in ROWS.items():
        if name in results["rows"] and goal:
            row = results["rows"][name]
            for case in [row[key] for key in row if key.startswith("135m")] or [
                row
            ]:  # the limit: in each precision
                figures = (f"{case[side]:.4g}" if side in case else "" for side in ("ours", "peer"))
                precision = f", {case['precision']}" if "precision" in case else ""
                lines.append(
                    (
                        f"{what}{precision}, against {peer}",
                        *figures,
                        case.get("unit", ""),
                        f"{case['ratio']:.3g}",
                        goal + ("" if met(case["ratio"], goal) else ", missed"),
                        f"{row['share']:g}",
                    )
                )
    text = format_table(
        ("what, against what", "ours", "peer", "unit", "ratio", "goal", "share"), lines
    )
    if "catalogues" in results["rows"]:
        curve = results["rows"]["catalogues"]["curve"]
        columns = [key for key in curve[0] if key != "catalogue"]
        text += "\n\n" + format_table(
            ("catalogue", *columns),
            [
                (
                    c["catalogue"],
                    *(f"{c[key]:.4g}" if isinstance(c[key], float) else c[key] for key in columns),
                )
                for c in curve
            ],
        )
    return text


def threads_flag(args):
    return ["--threads", args.threads] if args.threads else []


def fraction(text):
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} should be above 0 and at most 1")
    return value


def parser():
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    p.add_argument(
        "--only",
        nargs="+",
        choices=ROWS,
        default=list(ROWS),
        metavar="ROW",
        help=f"rows to measure (default: all): {', '.join(ROWS)}",
    )
    p.add_argument(
        "--share",
        type=fraction,
        default=1.0,
        help="measure on a seeded share of a row's work; the file says so (default: 1)",
    )
    p.add_argument(
        "--data", metavar="PATH", help="folder of the book data set, for the catalogues' curve"
    )
    p.add_argument(
        "--run",
        metavar="RUN",
        help=f"a finished loss folder, such as runs/ml-100k-tiny-seed0/gdrt, whose model the rows relevance "
        f"and search use (default: one trained here for {MINUTE} s)",
    )
    p.add_argument(
        "--threads", type=int, help="of PyTorch, for both sides (default: PyTorch's own)"
    )
    p.add_argument(
        "--out",
        default=ROOT / "results" / "speed.json",
        metavar="FILE",
        help="results, merged row by row (default: results/speed.json)",
    )
    p.add_argument(
        "--table", action="store_true", help="measure nothing, print the table of the file"
    )
    p.add_argument(
        "--child", nargs="+", help=argparse.SUPPRESS
    )  # rows run parts of themselves in processes of their own
    return p


def main(argv=None):
    args = parser().parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.child:
        part, *values = args.child
        return print(json.dumps({"search": child_search, "trainer": child_trainer}[part](*values)))
    if not args.table:
        try:
            import accelerate
        except ImportError:
            raise InputError(
                "accelerate is missing; pip install -r benchmarks/requirements.txt"
            ) from None
        for name in args.only:
            announce(f"{name} ...")
            spent, row = seconds_of(ROWS[name][0], args)
            machine = gdrt.environment()
            machine["versions"]["accelerate"] = accelerate.__version__
            results = read_results(
                args.out
            )  # again for each row: another run may have written meanwhile
            results["rows"][name] = row | {
                "share": args.share,
                "wall time, s": spent,
                "processor": processor(),
                **machine,
            }
            write_atomic(args.out, json.dumps(results, indent=1) + "\n")
            if "ratio" in row:
                announce(f"{name}: ratio {row['ratio']:.3g}")
    print(table(read_results(args.out)))


def processor():
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n")
        return next(
            line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        return ""


if __name__ == "__main__":
    run_command(main)
