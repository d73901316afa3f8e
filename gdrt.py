"""GDRT: group distributionally robust fine-tuning of an LLM recommender, from losses to command line, in one file.

Fine-tuned on 'history -> next title', a language model leans on auxiliary tokens (the task's words, the title's own
prefix) and neglects the user's history. GDRT groups target tokens by their relevance to auxiliary tokens and minimises a
group-DRO objective over the groups, so that badly served groups weigh more (arXiv 2510.10978).

Read first `gdrt_loss`, which stands alone and can be copied, then `update` (one step of training), then `run`.

    symbol        docs                       here
    y_t           target token               label
    r             relevance                  attribution.relevance
    g, K          group of a token, number   group, n_groups
    L_g           mean NLL of group g        group_loss
    q_g           weight of group g          q
    tau, prior    temperature, anchor of q   tau, prior
    N             target tokens of a batch   the first size of nll

Not here: LoRA, mixed data, other trainers' features. What is here runs on one process or under torchrun.
"""

import math

import torch

# ------------------------------------------------------------------------------------------------ losses


def group_means(nll, group, n_groups):
    """Mean NLL of each group.

    Args:
        nll: NLL of each target token in nats, ignored tokens left out. Half precision is summed in fp32. Shape: (N,)
        group: group of each target token, in 0 .. n_groups - 1, int64. Shape: (N,)
        n_groups: K.
    Returns:
        (group_loss, count): mean NLL by group with gradient, 0 where absent; tokens by group. Shapes: (K,), (K,)
    """
    if nll.dim() != 1 or nll.shape != group.shape or len(nll) == 0:
        raise ValueError(
            f"nll and group need one shape (N,), N > 0, not {tuple(nll.shape)} and {tuple(group.shape)}"
        )
    if group.dtype != torch.int64:
        raise ValueError(f"group must be int64, not {group.dtype}")
    if group.min() < 0 or group.max() >= n_groups:
        raise ValueError(
            f"group ids lie in 0 .. {n_groups - 1}, not in {int(group.min())} .. {int(group.max())}"
        )
    nll = nll.to(torch.promote_types(nll.dtype, torch.float32))  # a bf16 counter would stop at 256
    count = nll.new_zeros(n_groups).index_add(0, group, torch.ones_like(nll))
    total = nll.new_zeros(n_groups).index_add(0, group, nll)
    return total / count.clamp(min=1), count


def group_prior(count, prior):
    """The weights q is held to, 0 for absent groups and renormalised over the rest.

    Args:
        count: tokens by group, floating, not all 0. Shape: (K,)
        prior: 'uniform' (one each) or 'share' (n_g / n).
    Returns:
        p; sums to 1. Shape: (K,)
    """
    if prior not in ("uniform", "share"):
        raise ValueError(f"prior must be 'uniform' or 'share', not {prior!r}")
    weight = count if prior == "share" else (count > 0).to(count.dtype)
    return weight / weight.sum()


def group_weights(group_loss, count, tau, prior="uniform"):
    """The q that maximises sum_g q_g L_g - tau KL(q || prior): q_g ~ prior_g exp(L_g / tau).

    Args:
        group_loss: mean NLL by group. Shape: (K,)
        count: tokens by group; a group with 0 takes no part. Shape: (K,)
        tau: temperature in nats, > 0. Small: all weight on the worst group; inf: q = prior.
        prior: 'uniform' or 'share', see group_prior.
    Returns:
        q, detached; sums to 1. Shape: (K,)
    """
    if not tau > 0:
        raise ValueError(f"tau must be positive, not {tau}")
    L, p = group_loss.detach(), group_prior(count.to(group_loss.dtype), prior)
    gap = torch.where(
        p > 0, L - L[p > 0].max(), 0
    )  # from the worst group: L / tau would round at small tau
    return torch.softmax(p.log() + gap / tau, dim=0)  # q_g ~ prior_g exp(L_g / tau)


def gdrt_loss(nll, group, n_groups, tau, prior="uniform"):
    """The GDRT objective: max_q sum_g q_g L_g - tau KL(q || prior) = tau log sum_g prior_g exp(L_g / tau).

    L_g is the mean over the tokens of group g in the GLOBAL batch. With micro-batches or ranks, sum NLL and count by
    group over all of them, get q from group_weights, and weigh each token's NLL by q_g / n_g: the same gradient.
    Batch size is part of the method: log-mean-exp of noisy means is biased upward, more so at small tau.
    Reconstructed from the abstract and summaries of arXiv 2510.10978; the closed form's details are our choice.

    Args:
        nll: NLL of each target token in nats. Shape: (N,)
        group: group of each target token, int64. Shape: (N,)
        n_groups, tau, prior: see group_means and group_weights; tau = inf with 'share' is the plain mean: SFT.
    Returns:
        (loss, q, group_loss): scalar with gradient sum_i q_g(i) / n_g(i) d nll_i; weights, detached; mean NLL by
        group, detached, 0 where absent. Shapes: (), (K,), (K,)
    """
    group_loss, count = group_means(nll, group, n_groups)
    q = group_weights(group_loss, count, tau, prior)
    L, p = group_loss[count > 0], group_prior(count, prior)[count > 0]
    L_max = L.detach().max()
    gap = (L - L_max) / tau
    if tau == float("inf"):
        loss = (p * L).sum()
    elif gap.min() > -1:  # tau log sum_g p_g exp(L_g / tau); expm1 keeps its digits at large tau
        loss = L_max + tau * torch.log1p((p * torch.expm1(gap)).sum())
    else:  # the same; log-sum-exp keeps them where a rare group is far above the rest
        loss = L_max + tau * torch.logsumexp(p.log() + gap, dim=0)
    return loss, q, group_loss.detach()


def group_dro_step(log_q, group_loss, count, eta):
    """One step of online group DRO (Sagawa et al. 2020, arXiv 1911.08731): q_g ~ q_g exp(eta L_g), in log space.

    Args:
        log_q: log of the weights so far. Shape: (K,)
        group_loss: mean NLL by group. Shape: (K,)
        count: tokens by group; a group with 0 keeps its log_q before normalising. Shape: (K,)
        eta: step size per nat, > 0.
    Returns:
        log_q after the step, detached; exp sums to 1. Shape: (K,)
    """
    if not 0 < eta < float("inf"):
        raise ValueError(f"eta must be positive and finite, not {eta}")
    step = torch.where(count > 0, eta * group_loss.detach(), 0)
    return torch.log_softmax(log_q.detach() + step, dim=0)  # q_g ~ q_g exp(eta L_g)


def group_dro_loss(nll, group, log_q, eta):
    """Online group DRO: q moves by the batch's group losses, then weighs them; an absent group's share is not given away.

    Args:
        nll: NLL of each target token in nats, of the GLOBAL batch. Shape: (N,)
        group: group of each target token, int64. Shape: (N,)
        log_q: log of the weights so far, zeros at the start; pass on what comes back, and save it. Shape: (K,)
        eta: step size per nat, > 0.
    Returns:
        (loss, log_q, group_loss): scalar sum_g q_g L_g; moved weights, detached; mean NLL by group, detached, 0 where
        absent. Shapes: (), (K,), (K,)
    """
    group_loss, count = group_means(nll, group, len(log_q))
    log_q = group_dro_step(log_q, group_loss, count, eta)
    return (log_q.exp() * group_loss).sum(), log_q, group_loss.detach()


# ------------------------------------------------------------------------------------------------ imports of the rest

import argparse
import contextlib
import copy
import datetime
import json
import os
import pickle
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tokenizers
import transformers
from tqdm.auto import tqdm

from attribution import cut_groups, format_table, name_items, relevance, token_attribution
from data import (
    InputError,
    announce,
    attention,
    build_trees,
    by_shared_prefix,
    collate,
    fall_back_to_unpacked,
    is_complete,
    legal_tokens,
    limit_onednn_cache,
    load_dataset,
    log_softmax_over,
    make_prompts,
    normalize_text,
    positions,
    read_json,
    save_model,
    start_model,
    target_logits,
    write_atomic,
)
from evaluate import (
    audit,
    evaluate_model,
    list_metrics,
    popularity_lists,
    result_table,
    write_predictions,
)
from report import write_report

# ------------------------------------------------------------------------------------------------ the loop


class TrainConfig(NamedTuple):
    """What training needs to know, all of it the same for every loss of a run."""

    lr: float = 2e-3
    accumulate: int = 1  # micro-batches of an update
    precision: str = "fp32"  # or bf16: autocast of the training passes
    softmax: str = "full"  # or trie: NLL over legal continuations (MSL)
    temperature: float = 1.0  # of the trie softmax
    rank: int = 0  # this process among `world`
    world: int = 1
    device: str = "cpu"
    save_every: int = 100  # updates between checkpoints


def make_batches(trees, batch, epochs, seed):
    """The batches of a whole run: [[tree index, ...], ...], one list an update, each of about `batch` windows.

    Every epoch visits every tree once. Neighbours of 20 batches are sorted by length, so that a batch wastes little
    padding; the batches themselves come in random order. Known in advance, it makes every loss see the same batches
    and lets a resumed run go on at any update.
    """
    random, updates = np.random.default_rng(seed), []
    windows = [len(set(tree.window)) for tree in trees]
    for _ in range(epochs):
        order, epoch = random.permutation(len(trees)).tolist(), []
        chunk = max(1, 20 * batch * len(trees) // sum(windows))
        for start in range(0, len(order), chunk):
            size = batch  # so that each chunk starts a new batch
            for i in sorted(order[start : start + chunk], key=lambda i: len(trees[i].ids)):
                if size >= batch:
                    epoch.append([])
                    size = 0
                epoch[-1].append(i)
                size += windows[i]
        updates += [epoch[i] for i in random.permutation(len(epoch))]
    return updates


def learning_rate(step, steps, peak):
    """Linear warm-up over the first twentieth of `steps`, then linear decay to 0."""
    return peak * min((step + 1) / max(1, steps // 20), (steps - step) / steps)


def token_nll(model, batch, prompts, job):
    """NLL (N,) in nats of the batch's target tokens, with gradient; over the vocabulary or the legal continuations."""
    N, spare = (
        len(batch.label),
        -len(batch.label) % 64,
    )  # a round number of logits: oneDNN compiles kernels for each new one
    batch = batch._replace(
        **{
            name: torch.nn.functional.pad(getattr(batch, name), (0, spare))
            for name in ("row", "predict_at", "label", "item", "place")
        }
    )
    with torch.autocast(
        torch.device(job.device).type, dtype=torch.bfloat16, enabled=job.precision == "bf16"
    ):
        logits = target_logits(model, batch)
    logits = logits.float()  # (N + spare, V)
    if job.softmax == "full":
        return torch.nn.functional.cross_entropy(logits, batch.label, reduction="none")[:N]
    owner, token, chosen = legal_tokens(
        batch, prompts.trie
    )  # Masked Softmax Loss (MSL, arXiv 2504.04178): log-softmax of
    return -log_softmax_over(logits / job.temperature, owner, token)[
        chosen[:N]
    ]  # z / temperature over legal tokens alone


def sft(nll, group, mean, count, log_q):
    """Plain fine-tuning as an objective: the mean over the tokens of the global batch, q = their shares."""
    return nll / count.sum(), count / count.sum(), log_q


def gdrt(tau, prior):
    """GDRT as an objective: q from the group means of the global batch, in closed form; w_i = q_g / n_g."""

    def objective(nll, group, mean, count, log_q):
        q = group_weights(mean, count, tau, prior)
        return (q / count.clamp(min=1))[group] * nll, q, log_q

    return objective


def group_dro(eta):
    """Online group DRO (Sagawa et al. 2020) as an objective: q moves by one step of size eta, then weighs."""

    def objective(nll, group, mean, count, log_q):
        log_q = group_dro_step(log_q, mean, count, eta)
        return (log_q.exp() / count.clamp(min=1))[group] * nll, log_q.exp(), log_q

    return objective


def training_attention(model, job):
    """Name of the fastest attention with a backward: a CPU's fused kernel has a slow one."""
    return "eager" if job.device == "cpu" else model.config._attn_implementation


def training_step(model, optimizer, trees, prompts, group, objective, log_q, job):
    """One optimizer step on the global batch `trees` -> (log_q, diagnostics).

    objective(nll (N,), group (N,), mean (K,), count (K,), log_q (K,)) -> (terms (N,), q (K,), log_q): mean and count are of
    the GLOBAL batch, and the loss is the sum of the terms over it. With micro-batches a first pass without gradient
    finds the means, replaying the dropout of the second.
    """
    mine = trees[job.rank :: job.world]
    size = -(-len(mine) // job.accumulate) or 1
    batches = [collate(mine[i : i + size], job.device) for i in range(0, len(mine), size)]
    groups = [group[batch.item, batch.place] for batch in batches]  # (N,) each
    K, wide = (
        len(log_q),
        torch.float32 if job.device == "mps" else torch.float64,
    )  # Apple's GPUs have no float64

    def sums(nll, group):  # (2, K): summed NLL and number of tokens by group
        pair = torch.stack([nll.detach(), torch.ones_like(nll)]).to(wide)
        return torch.zeros(2, K, dtype=wide, device=nll.device).index_add_(1, group, pair)

    kept, total = None, torch.zeros(2, K, dtype=wide, device=job.device)
    if len(batches) == 1:
        kept = token_nll(model, batches[0], prompts, job)
        total += sums(kept, groups[0])
    else:
        with (
            torch.random.fork_rng(range(torch.cuda.device_count()) if job.device == "cuda" else ()),
            torch.no_grad(),
        ):
            for batch, g in zip(batches, groups):
                total += sums(token_nll(model, batch, prompts, job), g)
    all_reduce(total, job)
    count = total[1].float()
    mean = (total[0] / total[1].clamp(min=1)).float()

    none = mean.new_zeros(0)
    _, q, moved = objective(
        none, none.long(), mean, count, log_q
    )  # also where this rank got no tree
    loss = torch.zeros(1, dtype=wide, device=job.device)
    for batch, g in zip(batches, groups):
        nll = token_nll(model, batch, prompts, job) if kept is None else kept
        terms = objective(nll, g, mean, count, log_q)[0]
        terms.sum().backward()
        loss += terms.detach().to(wide).sum()
    all_reduce(loss, job)
    if (
        job.world > 1
    ):  # the loss is a sum over ranks, so is its gradient: one message for all parameters
        parameters = [p for p in model.parameters() if p.requires_grad]
        flat = torch.cat(
            [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters]
        )
        all_reduce(flat, job)
        for p, part in zip(parameters, flat.split([p.numel() for p in parameters])):
            p.grad = part.view_as(p)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    line = {
        "loss": loss.item(),
        "nll": (total[0].sum() / total[1].sum()).item(),
        "group_nll": mean.tolist(),
        "q": q.tolist(),
        "n": [int(n) for n in count],
        "grad_norm": norm.item(),
    }
    return moved, line


def all_reduce(tensor, job):
    if job.world > 1:
        torch.distributed.all_reduce(tensor)


def save_checkpoint(path, model, optimizer, log_q, step):
    """All that the next update depends on, as tensors and ints: loads with weights_only=True."""
    state = {
        "format": FORMAT,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "log_q": log_q,
        "step": step,
        "rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }

    def write(file):
        try:
            torch.save(state, file)
        except RuntimeError as error:  # what torch makes of a full disk
            raise error.__context__ if isinstance(error.__context__, OSError) else error

    write_atomic(path, write)


def load_checkpoint(path, model, optimizer):
    """Restore what save_checkpoint wrote -> (log_q, step). A file of another version or damaged is an InputError."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["format"] != FORMAT:
            raise InputError(
                f"{path}: checkpoint format {state['format']} where {FORMAT} belongs; start a new run with --name"
            )
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        if state["cuda_rng"] and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(state["cuda_rng"])
        return state["log_q"].to(next(model.parameters()).device), state["step"]
    except (
        RuntimeError,
        KeyError,
        ValueError,
        TypeError,
        EOFError,
        pickle.UnpicklingError,
    ) as error:
        raise InputError(
            f"{path}: not a checkpoint of this run ({normalize_text(str(error))[:200]}); delete it, and --resume repeats that part"
        ) from None


@contextlib.contextmanager
def ctrl_c():
    """Yields a list that Ctrl-C adds to, so that an update is never left half done. torchrun passes it on as SIGTERM."""
    pressed, signals = [], (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda *_: pressed.append(True)) for number in signals]
    try:
        yield pressed
    finally:
        for number, handler in zip(signals, before):
            signal.signal(number, handler)


def train(
    model, prompts, trees, updates, span, group, objective, n_groups, job, folder=None, begin=None
):
    """Do updates[span[0]:span[1]] of a plan -> seconds they took, those of an interrupted run included.

    Writes a line an update to folder/metrics.jsonl and keeps folder/checkpoint.pt, from which it goes on if it is there;
    else from the checkpoint `begin`, where an earlier stage ended. group: (items, L) long, the groups of target tokens.
    A loss that is not finite is an InputError; the last good checkpoint stays.
    """
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=job.lr, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True
    )
    log_q, step = torch.full((n_groups,), -math.log(n_groups), device=job.device), span[0]
    checkpoint, log, lines = (
        (folder and folder / "checkpoint.pt"),
        (folder and folder / "metrics.jsonl"),
        [],
    )
    if folder and checkpoint.exists():
        log_q, step = load_checkpoint(checkpoint, model, optimizer)
        lines = [line for line in map(json.loads, complete_lines(log)) if line["step"] < step]
    elif begin:
        _, step = load_checkpoint(begin, model, optimizer)
    writes = folder and job.rank == 0
    if writes:
        write_atomic(log, "".join(json.dumps(line) + "\n" for line in lines))
    model.train()
    progress = tqdm(
        range(step, span[1]),
        desc=folder.name if folder else "language",
        disable=None if job.rank == 0 else True,
    )
    with (
        attention(model, training_attention(model, job)),
        ctrl_c() as pressed,
        open(log if writes else os.devnull, "a", encoding="utf-8") as file,
    ):
        for step in progress:
            start = time.perf_counter()
            optimizer.param_groups[0]["lr"] = rate = learning_rate(step, len(updates), job.lr)
            batch = [trees[i] for i in updates[step]]
            log_q, line = training_step(
                model, optimizer, batch, prompts, group, objective, log_q, job
            )
            if not math.isfinite(line["loss"] + line["grad_norm"]):
                raise InputError(
                    f"update {step}: loss {line['loss']:g} with gradient norm {line['grad_norm']:g} on the batch of trees "
                    f"{', '.join(map(str, updates[step][:4]))}...; the last checkpoint is kept; lower --lr and choose another --name"
                )
            seconds, windows = (
                time.perf_counter() - start,
                sum(len(set(tree.window)) for tree in batch),
            )
            lines.append(
                {
                    "step": step,
                    **line,
                    "lr": rate,
                    "seconds": seconds,
                    "windows_per_s": windows / seconds,
                }
            )
            progress.set_postfix(nll=f"{line['nll']:.3f}", windows_s=f"{windows / seconds:.0f}")
            file.write(json.dumps(lines[-1]) + "\n")
            file.flush()
            stop = torch.tensor(float(len(pressed)), device=job.device)
            all_reduce(
                stop, job
            )  # a signal reaches the ranks at different updates, or one of them only
            if writes and (stop > 0 or (step + 1) % job.save_every == 0 or step + 1 == span[1]):
                os.fsync(
                    file.fileno()
                )  # the log before the checkpoint: no line that it counts on can be missing
                save_checkpoint(checkpoint, model, optimizer, log_q, step + 1)
            if stop > 0:
                raise KeyboardInterrupt
    return sum(line["seconds"] for line in lines)


def complete_lines(path):
    """The lines of a file that end in a newline: what a killed run had written whole."""
    return path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []


# ------------------------------------------------------------------------------------------------ the stages of a run


def form_groups(model, prompts, windows, args, job, path):
    """Group table (items, L) long of the target tokens; measured once a run and kept in groups.json."""
    if not path.exists() and job.rank == 0:
        start = time.perf_counter()
        r = relevance(model, prompts, windows, args.relevance, seed=args.seed, device=job.device)
        group, cuts, shares = cut_groups(r, windows, args.groups)
        write_atomic(
            path,
            json.dumps(
                {
                    "relevance": args.relevance,
                    "cuts": cuts,
                    "shares": shares,
                    "seconds": time.perf_counter() - start,
                    "r": [
                        [None if math.isnan(x) else round(x, 6) for x in row] for row in r.tolist()
                    ],
                    "group": group.tolist(),
                }
            ),
        )
    barrier(job)
    return read_json(path)


def group_examples(groups, prompts, tokenizer, seed, per_window=8):
    """Rows (group, share, relevance from, some of its tokens with their relevance) for the terminal: what groups mean."""
    table, random, rows = np.array(groups["group"]), np.random.default_rng(seed), []
    for g, (cut, share) in enumerate(zip(groups["cuts"], groups["shares"])):
        places = random.permutation(np.argwhere(table == g))[:per_window].tolist()
        tokens = [(prompts.titles[item] + [prompts.eos])[step] for item, step in places]
        text = "  ".join(
            f"{tokenizer.decode([t]).strip() or '␣'} {groups['r'][i][j]:.2f}"
            for t, (i, j) in zip(tokens, places)
        )
        rows.append((str(g), f"{share:.2f}", f"{cut:.3f}", text))
    return rows


def draw_windows(windows, limit, seed):
    """--windows: a seeded draw of whole trees (a user's ten neighbouring targets) until `limit` windows are there."""
    if limit is None or limit >= len(windows):
        return windows
    groups, chosen = by_shared_prefix(windows), []
    for g in np.random.default_rng(seed).permutation(len(groups)):
        chosen += groups[g][: limit - len(chosen)]
    return [windows[i] for i in sorted(chosen)]


def open_run(folder, args, dataset):
    """What config.json is to hold -> dict, once it is clear that the run is new or, on --resume, the same as before."""
    arguments = {name: value for name, value in vars(args).items() if name not in NOT_THE_RUN}
    config, path = (
        {"arguments": arguments, "data": dataset.digest, "facts": dataset.stats, **environment()},
        folder / "config.json",
    )
    if not path.exists():
        if args.resume:
            raise InputError(
                f"--resume: there is no run in {folder}; leave the flag out, or name the run by --out and --name"
            )
        return config
    if not args.resume:
        raise InputError(
            f"{folder} holds a run: add --resume to go on with it, or choose another --name"
        )
    before = read_json(path)
    for name, value in arguments.items():
        if value != (old := before["arguments"].get(name)):
            raise InputError(
                f"--resume: --{name.replace('_', '-')} is {value} now and was {old} in {path}; give what it was, or another --name"
            )
    if dataset.digest != before["data"]:
        raise InputError(
            f"--resume: the data of --dataset {args.dataset} has changed since {path}; bring it back, or choose another --name"
        )
    for left in folder.rglob(".*.[0-9]*"):  # half-written by the process that was killed
        shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)
    return before


def evaluate_and_audit(model, tokenizer, prompts, dataset, args, job, groups, folder):
    """Rank, measure and audit a model -> dict for metrics.json.

    Writes folder/predictions.jsonl, one line a test window, and for the last loss folder/heatmap.json, one prompt token by token.
    """
    start = time.perf_counter()
    group, n_groups = (np.array(groups["group"]), args.groups) if groups else (None, 0)
    options = {"softmax": args.rank_softmax, "keep_seen": args.keep_seen, "device": job.device}
    result = {
        "valid": evaluate_model(model, prompts, dataset, dataset.valid, group, n_groups, **options)[
            0
        ]
    }
    if not args.no_test:
        result["test"], per_window, ranking = evaluate_model(
            model, prompts, dataset, dataset.test, group, n_groups, **options
        )
        result["audit"] = audit(
            model,
            prompts,
            dataset.test,
            group,
            n_groups,
            per_window["NDCG@10"],
            seed=args.seed,
            **options,
        )
        write_predictions(folder / "predictions.jsonl", dataset, dataset.test, ranking, per_window)
        if folder.name == args.loss[-1]:  # the report shows one heat map
            record = token_attribution(
                model, tokenizer, prompts, dataset.test[0], device=job.device
            )
            write_atomic(folder / "heatmap.json", json.dumps(name_items(record, dataset.titles)))
    return result | {"seconds": time.perf_counter() - start}


# ------------------------------------------------------------------------------------------------ around the stages

FORMAT = 1  # of checkpoint.pt and of the cached tiny model; another number is not read
BETAS, WEIGHT_DECAY, CLIP = (0.9, 0.99), 0.01, 1.0
NOT_THE_RUN = (
    "out",
    "name",
    "cache",
    "data_dir",
    "resume",
    "no_report",
    "save_every",
)  # may differ on --resume


def make_train_config(args):
    """Job from the flags and, under torchrun, the process group (gloo on CPU, nccl on GPU)."""
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    device = args.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        if not torch.cuda.is_available():
            raise InputError(
                "--device cuda: this machine shows no GPU to PyTorch; use --device auto or cpu"
            )
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if device == "mps" and not torch.backends.mps.is_available():
        raise InputError(
            "--device mps: this machine has no Apple GPU for PyTorch; use --device auto or cpu"
        )
    if world > 1 and not torch.distributed.is_initialized():
        patience = datetime.timedelta(days=7)  # the other ranks wait while rank 0 evaluates
        torch.distributed.init_process_group(
            "nccl" if device == "cuda" else "gloo", timeout=patience
        )
    has_bf16 = (
        torch.cuda.is_bf16_supported()
        if device == "cuda"
        else device == "cpu" and torch.cpu._is_avx512_bf16_supported()
    )
    precision = args.precision if args.precision != "auto" else "bf16" if has_bf16 else "fp32"
    return TrainConfig(
        args.lr,
        args.accumulate,
        precision,
        args.train_softmax,
        args.temperature,
        rank,
        world,
        device,
        args.save_every,
    )


def barrier(job):
    if job.world > 1:
        torch.distributed.barrier()


def environment():
    """Versions, machine and commit: what a number depends on besides its arguments."""
    try:
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
        ).stdout.strip()
    except OSError:
        commit = ""
    return {
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
            "numpy": np.__version__,
        },
        "machine": {
            "system": platform.platform(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
        },
        "commit": commit,
    }


def print_stats(dataset):
    print(
        f"{dataset.name}: "
        + "; ".join(
            f"{name} {value:,}" if isinstance(value, int) else f"{name} {value}"
            for name, value in dataset.stats.items()
        )
    )


def evaluate_popularity(dataset, args):
    """The popularity baseline's metrics on the parts that are evaluated."""
    parts = {"valid": dataset.valid} | ({} if args.no_test else {"test": dataset.test})
    return {
        part: list_metrics(
            dataset, windows, *popularity_lists(dataset, windows, 10, args.keep_seen)
        )[0]
        for part, windows in parts.items()
    }


def model_card(args, loss):
    return (
        f"# A recommender fine-tuned with {loss}\n\nMade by `gdrt.py` from `{args.model}` on `{args.dataset}` (seed {args.seed}). It ranks "
        f"titles as continuations of a prompt with the user's history; see config.json beside this folder for every argument.\n"
    )


def run(args):
    """All stages of a run, each skipped where its files are there; prints the table."""
    began, job = time.perf_counter(), make_train_config(args)
    folder = Path(args.out) / args.name
    if job.rank > 0:
        barrier(job)  # rank 0 first: the others find in the cache what it fetched and pre-trained
    dataset = load_dataset(
        args.dataset, args.data_dir, args.cache, args.split, args.history, args.min_rating
    )
    if job.rank == 0:
        config = open_run(folder, args, dataset)
        print_stats(dataset)
    model, tokenizer = start_model(args.model, dataset, args.cache)
    model.to(job.device)
    if job.rank == 0:
        barrier(job)
    prompts = make_prompts(dataset, tokenizer, positions(model))
    windows = draw_windows(dataset.train, args.windows, args.seed)
    trees = build_trees(
        prompts, windows
    )  # the plan is of whole trees, whether they run packed or not
    updates = make_batches(trees, args.batch, args.epochs, args.seed)
    prompts = fall_back_to_unpacked(model, prompts, windows, job.device)
    if args.no_pack or not prompts.packed:  # the same windows an update, one prompt a row
        updates = [
            [i for t in update for i in np.unique(trees[t].window).tolist()] for update in updates
        ]
        trees = build_trees(prompts, windows, pack=False)
    steps, shared = len(updates), max(1, round(args.warmup * len(updates)))
    if shared >= steps:
        raise InputError(
            f"{steps} updates, all of them warm-up, leave the losses none; raise --epochs or --windows, or lower --batch"
        )
    tokens = sum(len(prompts.titles[i]) + 1 for i in {w.items[w.stop] for w in windows})
    if args.groups > tokens:
        raise InputError(
            f"--groups {args.groups}: the titles to predict have {tokens} tokens; use fewer groups"
        )
    left = [
        tree.dropped
        for tree in trees
        + build_trees(prompts, dataset.valid + dataset.test, pack=False, targets=False)
    ]
    if any(left) and job.rank == 0:
        announce(
            f"{sum(left)} titles of {sum(n > 0 for n in left)} histories are left out, the oldest: the model has {prompts.max_positions} positions"
        )
    if job.rank == 0:  # nothing was written before: a start that failed leaves no run behind
        write_atomic(folder / "config.json", json.dumps(config, indent=1))
    torch.manual_seed(args.seed)

    # SFT warm-up, shared by all losses: relevance is measured on a model that has seen users
    begin = copy.deepcopy(model.state_dict())
    table = torch.zeros(prompts.trie.path.shape, dtype=torch.long, device=job.device)
    warm = train(model, prompts, trees, updates, (0, shared), table, sft, 1, job, folder / "warmup")
    groups = form_groups(model, prompts, windows, args, job, folder / "groups.json")
    if job.rank == 0:
        print(
            format_table(
                (
                    "group",
                    "share",
                    "r from",
                    "some of its tokens, with their relevance r to the auxiliary tokens",
                ),
                group_examples(groups, prompts, tokenizer, args.seed),
            )
        )
    table = torch.tensor(groups["group"], device=job.device)

    def evaluated(name):
        """Evaluate the model as it stands, once, into folder/name/."""
        path = folder / name / "evaluation.json"
        if not path.exists():
            write_atomic(
                path,
                json.dumps(
                    evaluate_and_audit(
                        model, tokenizer, prompts, dataset, args, job, groups, folder / name
                    )
                ),
            )
        return read_json(path)

    if job.rank == 0:
        model.load_state_dict(begin)
        before = evaluated("before")
        baselines = {"before": before, "popularity": evaluate_popularity(dataset, args)}
    objectives = {"sft": sft, "gdrt": gdrt(args.tau, args.prior), "group-dro": group_dro(args.eta)}
    for loss in args.loss:
        seconds = train(
            model,
            prompts,
            trees,
            updates,
            (shared, steps),
            table,
            objectives[loss],
            args.groups,
            job,
            folder / loss,
            folder / "warmup" / "checkpoint.pt",
        )
        if job.rank == 0:
            if not is_complete(folder / loss / "model"):
                save_model(folder / loss / "model", model, tokenizer, model_card(args, loss))
            result = evaluated(loss)
            write_atomic(
                folder / loss / "metrics.json",
                json.dumps(
                    {
                        **{part: result[part] for part in ("valid", "test") if part in result},
                        "baselines": baselines,
                        "audit": {"before": before.get("audit"), "after": result.get("audit")},
                        "time": {
                            "warm-up": warm,
                            "train": seconds,
                            "relevance": groups["seconds"],
                            "evaluate": result["seconds"],
                        },
                        "config": read_json(folder / "config.json"),
                    },
                    indent=1,
                ),
            )
        barrier(job)
    if job.rank == 0:
        print(format_table(*result_table(folder, args.loss)))
        if not args.no_report:
            print(f"report: {write_report(folder)}")
        print(f"{time.perf_counter() - began:.0f} s in all; files in {folder}")
    if job.world > 1:
        torch.distributed.destroy_process_group()


# ------------------------------------------------------------------------------------------------ the command


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Defaults after each help, but for those that say them or have none."""

    def _get_help_string(self, action):
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def positive(kind):
    def number(text):
        value = kind(text)
        if not value > 0:
            raise argparse.ArgumentTypeError(f"{text} should be positive")
        return value

    number.__name__ = kind.__name__  # argparse names the type in its message
    return number


def fraction(text):
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text} should lie between 0 and 1")
    return value


def whole(text):
    value = int(text)
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"{text} should lie between 0 and 2^63 - 1")
    return value


def parser():
    p = argparse.ArgumentParser(
        formatter_class=Help,
        allow_abbrev=False,
        description=__doc__.split("\n\n")[0],
        epilog="More: README.md. To read a model token by token: attribution.py; to compare runs: evaluate.py.",
    )
    add = p.add_argument_group("data").add_argument
    add(
        "--dataset",
        default="ml-100k",
        help="toy (made from a seed, offline), ml-100k, ml-1m, or a FOLDER with RecBole atomic "
        "files (NAME.inter, NAME.item) or train.csv, test.csv, id2name4Rec.json",
    )
    add(
        "--data-dir",
        metavar="PATH",
        help="folder or zip that holds MovieLens already; nothing is fetched then",
    )
    add(
        "--cache",
        metavar="DIR",
        help="keeps fetched data and the pre-trained tiny model (default: gdrt in the user's cache folder)",
    )
    add(
        "--split",
        choices=("leave-one-out", "time"),
        default="leave-one-out",
        help="a user's last positive tests, the one before "
        "validates; or 8:1:1 by time over all users",
    )
    add(
        "--history",
        type=positive(int),
        default=10,
        metavar="H",
        help="a target has its H to 2H - 1 latest positives as history",
    )
    add(
        "--min-rating", type=float, default=4.0, metavar="R", help="ratings from R up are positives"
    )
    add(
        "--windows",
        type=positive(int),
        metavar="N",
        help="train on N windows, drawn as whole trees (default: all)",
    )
    add = p.add_argument_group("model").add_argument
    add(
        "--model",
        default="tiny",
        help="tiny (a Llama of 2 million parameters, untrained), smollm2-135m, or any Hub "
        "id or folder of a decoder-only LM",
    )
    add(
        "--device",
        choices=("auto", "cpu", "cuda", "mps"),
        default="auto",
        help="auto: cuda if it is there, else cpu; mps was never tried by us",
    )
    add(
        "--precision",
        choices=("auto", "fp32", "bf16"),
        default="auto",
        help="of training passes; auto: bf16 where the hardware "
        "has it. Weights, scores and relevance are fp32",
    )
    add = p.add_argument_group("method").add_argument
    add(
        "--loss",
        nargs="+",
        choices=("sft", "gdrt", "group-dro"),
        default=["sft", "gdrt"],
        help="one after the other, from one start, on the same batches",
    )
    add(
        "--relevance",
        choices=("gradient", "ablation", "probability"),
        default="gradient",
        help="what measures a target token's relevance to its auxiliary tokens",
    )
    add(
        "--groups",
        type=positive(int),
        default=4,
        metavar="K",
        help="groups of target tokens, 0 the least relevant to auxiliary tokens",
    )
    add(
        "--tau",
        type=positive(float),
        default=4.0,
        help="temperature of GDRT: small follows the worst group; inf with --prior share is SFT",
    )
    add(
        "--prior",
        choices=("uniform", "share"),
        default="uniform",
        help="what GDRT's q is pulled to: 1/K each, or the groups' token shares",
    )
    add("--eta", type=positive(float), default=0.01, help="step size of group-dro")
    add(
        "--warmup",
        type=fraction,
        default=0.2,
        metavar="SHARE",
        help="share of the updates that are SFT before tokens are grouped, the same for every loss",
    )
    add(
        "--train-softmax",
        choices=("full", "trie"),
        default="full",
        help="trie: the loss normalises over legal continuations only (MSL)",
    )
    add("--temperature", type=positive(float), default=1.0, help="of the trie softmax in training")
    add = p.add_argument_group("training").add_argument
    add(
        "--epochs",
        type=positive(int),
        default=4,
        help="passes over the training windows, warm-up included",
    )
    add(
        "--batch",
        type=positive(int),
        default=128,
        metavar="N",
        help="windows an update; group means are over them, so it is part of the method",
    )
    add(
        "--accumulate",
        type=positive(int),
        default=1,
        metavar="M",
        help="micro-batches an update, to save memory; costs one more forward",
    )
    add("--lr", type=positive(float), default=2e-3, help="peak learning rate of AdamW")
    add(
        "--no-pack",
        action="store_true",
        help="one prompt a row instead of trees: the same loss, slower",
    )
    add(
        "--seed",
        type=whole,
        default=0,
        help="of batches, draws and dropout; the split does not depend on it",
    )
    add = p.add_argument_group("evaluation").add_argument
    add(
        "--rank-softmax",
        choices=("trie", "full"),
        default="trie",
        help="score titles by log-probabilities over legal continuations, "
        "or over the whole vocabulary",
    )
    add("--keep-seen", action="store_true", help="rank titles the user has seen, too")
    add(
        "--no-test",
        action="store_true",
        help="leave the test windows alone: for choosing hyper-parameters",
    )
    add("--no-report", action="store_true", help="write no report.html")
    add = p.add_argument_group("run").add_argument
    add("--out", default="runs", metavar="DIR", help="where run folders go")
    add("--name", help="of the run folder (default: dataset, model and seed)")
    add("--resume", action="store_true", help="go on with an interrupted run, given the same flags")
    add(
        "--save-every",
        type=positive(int),
        default=100,
        metavar="N",
        help="updates between checkpoints",
    )
    return p


def main(argv=None):
    args = parser().parse_args(argv)
    limit_onednn_cache(args.cache)
    args.name = (
        args.name
        or f"{Path(args.dataset).resolve().name}-{Path(args.model).resolve().name}-seed{args.seed}"
    )
    try:
        if args.name in (".", "..") or set(args.name) & set("/\\"):
            raise InputError(
                f"--name {args.name}: give a folder name without slashes; --out says where it goes"
            )
        run(args)
    except InputError as error:
        complain(error)
    except OSError as error:
        complain(
            f"{error.filename or args.out}: {error.strerror or error}; what was written before is whole: mend it and add --resume"
        )
    except torch.OutOfMemoryError:
        complain(
            "the device ran out of memory; raise --accumulate, which leaves the result the same, and add --resume"
        )
    except KeyboardInterrupt:
        words = [word for word in (sys.argv[1:] if argv is None else argv) if word != "--resume"]
        start = (
            f"torchrun --nproc-per-node {os.environ['LOCAL_WORLD_SIZE']}"
            if "LOCAL_WORLD_SIZE" in os.environ
            else "python"
        )
        if os.environ.get("RANK", "0") == "0":
            print(
                f"\ninterrupted; go on with: {start} gdrt.py {shlex.join([*words, '--resume'])}",
                file=sys.stderr,
            )
        sys.exit(130)


def complain(error):
    """One sentence on stderr and exit code 2."""
    print(f"gdrt.py: {error}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
