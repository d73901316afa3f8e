"""Exact full-catalogue ranking, metrics, the bias audit, comparison of runs, and the report.

Read `rank` first: it returns the exact top K titles by sum of token log-probabilities, with no beam width. Then
`accuracy` and `fairness` (what the tables show), `audit` (where the model looks), `interval` (how sure we are).
"""
import json
from typing import NamedTuple

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import DynamicCache

from attribution import attributions
from data import (InputError, Window, build_trees, by_length, collate, flat_ranges, legal_scores, logits_at, target_logits,
                  write_atomic)


# ------------------------------------------------------------------------------------------------ exact search

class Forks(NamedTuple):
    """The title trie with every run of single continuations folded into one edge. Fork 0 is the root; F forks."""
    up: torch.Tensor  # (F,) the fork above
    run: torch.Tensor  # (F, R) tokens of the edge from `up`, zero-padded
    length: torch.Tensor  # (F,) their number
    depth: torch.Tensor  # (F,) tokens from the root
    item: torch.Tensor  # (F,) item that is complete here (its last token is EOS), -1 at inner forks
    first: torch.Tensor  # (F + 1,) the forks below f are first[f]..first[f + 1] - 1


def fold(trie, device="cpu"):
    """Trie -> Forks, numbered breadth first, so that the forks below one fork are neighbours."""
    children = np.split(trie.child, trie.first[1:-1])
    up, runs, depth, item, first, nodes = [0], [[]], [0], [-1], [], [0]
    for fork, node in enumerate(nodes):  # `nodes` grows while it is read
        first.append(len(nodes))
        for below in children[node]:
            run = [trie.token[below]]
            while len(children[below]) == 1:
                below = children[below][0]
                run.append(trie.token[below])
            up.append(fork), runs.append(run), depth.append(depth[fork] + len(run))
            item.append(trie.item[below]), nodes.append(below)
    run = np.zeros((len(runs), max(map(len, runs))), dtype=np.int64)
    for row, tokens in zip(run, runs):
        row[:len(tokens)] = tokens
    arrays = up, run, [len(r) for r in runs], depth, item, first + [len(nodes)]
    return Forks(*(torch.as_tensor(np.array(a), device=device) for a in arrays))


def score_children(logits, fork, forks, softmax):
    """Log-probability of the first token of every edge below `fork` (N,), from logits (N, V) -> (owner, child, score), flat.

    softmax 'trie': over the legal continuations, that is these edges alone; 'full': over the vocabulary.
    """
    token = forks.run[:, 0]
    owner, child, score = legal_scores(logits, fork, forks.first, token)
    if softmax == "full":
        score = logits.float().log_softmax(-1)[owner, token[child]]
    return owner, child, score


class Ranking(NamedTuple):
    items: np.ndarray  # (n, k) best first, -1 where the catalogue has no more
    scores: np.ndarray  # (n, k) sum of token log-probabilities, -inf beyond
    forwarded: np.ndarray  # (n,) prefixes the search forwarded


@torch.no_grad()
def rank(model, prompts, windows, k=10, softmax="trie", keep_seen=False, width=8, rows=64, device="cpu", seen=None):
    """The exact top k titles for each window by sum of token log-probabilities -> Ranking. Ours.

    Best-first search over the title trie. Log-probabilities only fall along a path, so a window is done when no open
    prefix beats its k-th best complete title: exact for every `width` (prefixes opened a round). Seen titles compete as
    prefixes and are dropped when complete, unless keep_seen. seen: item tuples, else the user's positives before the
    target. NaN scores are an InputError.
    """
    forks, trees = fold(prompts.trie, device), build_trees(prompts, windows, pack=False, targets=False)
    k_kept = min(k, len(prompts.titles))
    items, scores = np.full((len(windows), k), -1), np.full((len(windows), k), -np.inf)
    forwarded = np.zeros(len(windows), dtype=np.int64)
    order = sorted(range(len(trees)), key=lambda i: len(trees[i].ids))
    model.eval()
    for start in tqdm(range(0, len(order), rows), desc="rank", disable=None, leave=False):
        chosen = order[start:start + rows]
        allowed = (forks.item >= 0).repeat(len(chosen), 1)  # (B, F) complete titles that may enter the list
        for row, i in enumerate(chosen):
            if not keep_seen:
                known = windows[i].items[:windows[i].stop] if seen is None else seen[i]
                allowed[row] &= ~torch.isin(forks.item, torch.tensor(known, device=device))
        score, count = search(model, collate([trees[i] for i in chosen], device), forks, allowed, k_kept, softmax, width)
        best, place = score.topk(k_kept, dim=1)  # (B, k)
        scores[chosen, :k_kept] = best.double().cpu().numpy()
        items[chosen, :k_kept] = torch.where(best > -torch.inf, forks.item[place], -1).cpu().numpy()
        forwarded[chosen] = count.cpu().numpy()
    return Ranking(items, scores, forwarded)


def search(model, batch, forks, allowed, k, softmax, width):
    """Best-first search for a batch of B prompts -> (scores (B, F) of allowed complete titles, -inf elsewhere; count (B,)).

    score[b, f] is the log-probability of the path to fork f: exact once its edge is read (under 'trie' at once, the rest
    of a run being certain), an upper bound before. The prompts stand once in the KV cache, which is only appended to.
    """
    B, P = batch.ids.shape
    F, device = len(forks.up), batch.ids.device
    leaf = forks.item >= 0
    feed = forks.length - leaf.long()  # (F,) tokens to forward to read an edge: EOS never
    if softmax == "trie":
        feed = torch.where(leaf, 0, feed)  # nothing is left to learn on an edge that completes a title
    openable = ~leaf | (feed > 0)  # (F,)
    complete = leaf & (feed == 0)
    cache, alive = DynamicCache(config=model.config), torch.arange(B, device=device)
    result = torch.full((B, F), -torch.inf, device=device)
    count = torch.zeros(B, dtype=torch.long, device=device)

    logits = logits_at(model, batch.row, batch.source, input_ids=batch.ids, attention_mask=batch.mask,
                       position_ids=batch.position, cache=cache, use_cache=True)  # (B, V)
    score = torch.full((B, F), -torch.inf, device=device)
    owner, child, value = score_children(logits, torch.zeros(B, dtype=torch.long, device=device), forks, softmax)
    score[owner, child] = value
    expanded = torch.zeros((B, F), dtype=torch.bool, device=device)
    expanded[:, 0] = True
    base = batch.position[batch.row, batch.source] + 1  # (B,) position of the first title token
    prompt = batch.mask[batch.row, 0, batch.source] == 0  # (B, P) what the marker's last token sees
    slot = torch.full((B, F), -1, device=device)  # place of a fork's last token among the search tokens in the cache
    sees = torch.zeros((B, 0, 0), dtype=torch.bool, device=device)  # (B, C, C) ancestors among the search tokens

    while True:
        if torch.isnan(score).any():
            raise InputError("the model's scores hold NaN; was the training stable?")
        final = torch.where(allowed & (complete | (leaf & expanded)), score, -torch.inf)  # (B, F)
        kth = final.topk(k, dim=1).values[:, -1:]  # (B, 1)
        bound, pick = torch.where(openable & ~expanded, score, -torch.inf).topk(min(width, F), dim=1)  # (B, W)
        useful = bound > kth
        active = useful.any(1)
        if active.sum() <= len(alive) // 2:  # drop the rows that are done, all of them at the end
            result[alive[~active]] = final[~active]
            if not active.any():
                return result, count
            alive, score, expanded, slot, sees, allowed, prompt, base, pick, useful = (
                x[active] for x in (alive, score, expanded, slot, sees, allowed, prompt, base, pick, useful))
            cache.batch_select_indices(active.nonzero()[:, 0])

        # one row of new tokens per prompt: the runs of its picked edges, one after another
        rows, places = useful.nonzero(as_tuple=True)
        fork = pick[rows, places]  # (n,)
        count.index_add_(0, alive[rows], torch.ones_like(rows))
        owner, offset = flat_ranges(feed[fork])  # (tokens,)
        lengths = torch.zeros_like(pick).index_put((rows, places), feed[fork])  # (B, W)
        column = (lengths.cumsum(1) - lengths)[rows, places][owner] + offset  # (tokens,)
        S, C = int(lengths.sum(1).max()), sees.shape[1]
        row, above = rows[owner], forks.up[fork[owner]]
        ids = torch.zeros((len(alive), S), dtype=torch.long, device=device)
        position, edge = torch.zeros_like(ids), torch.full_like(ids, -1)
        ids[row, column] = forks.run[fork[owner], offset]
        position[row, column] = base[row] + forks.depth[above] + offset
        edge[row, column] = fork[owner]

        # a token sees its prompt, the path to the fork above its edge, and its own edge up to itself
        path = torch.zeros((len(alive), S, C), dtype=torch.bool, device=device)
        parent = slot[row, above]
        below = parent >= 0
        path[row[below], column[below]] = sees[row[below], parent[below]]
        same = (edge[:, :, None] == edge[:, None, :]).tril()  # (B, S, S)
        new = torch.cat([path, same], dim=2)  # (B, S, C + S)
        sees = torch.cat([torch.nn.functional.pad(sees, (0, S)), new], dim=1)
        mask = torch.cat([prompt[:, None].expand(-1, S, -1), new], dim=2)[:, None]  # (B, 1, S, P + C + S)
        mask = torch.zeros(mask.shape, device=device).masked_fill(~mask, torch.finfo(torch.float32).min)
        last = offset == feed[fork][owner] - 1  # (tokens,)
        slot[row[last], fork[owner[last]]] = C + column[last]

        read = torch.ones_like(last) if softmax == "full" else last
        logits = logits_at(model, row[read], column[read], input_ids=ids, attention_mask=mask, position_ids=position,
                           cache=cache, use_cache=True)  # (tokens read, V)
        if softmax == "full":  # the rest of each edge: token `offset` predicts the next of the same edge
            inner = offset + 1 < forks.length[fork[owner]]
            following = forks.run[fork[owner][inner], offset[inner] + 1]
            value = logits[inner].float().log_softmax(-1).gather(-1, following[:, None])[:, 0]
            score.index_put_((row[inner], fork[owner][inner]), value, accumulate=True)
        expanded[rows, fork] = True
        inner = ~leaf[fork]
        end = logits[last[read]][inner]  # (inner forks, V)
        owner, child, value = score_children(end, fork[inner], forks, softmax)
        score[rows[inner][owner], child] = score[rows[inner], fork[inner]][owner] + value


# ------------------------------------------------------------------------------------------------ metrics of ranked lists

GROUPS = 5  # popularity groups of MGU and DGU


def accuracy(items, scores, targets, ks=(5, 10)):
    """Per-window HR, NDCG, MRR at each k -> {"NDCG@10": (n,), ...}. items, scores: (n, K); ties by mean rank; NaN is an InputError."""
    if np.isnan(scores).any():
        raise InputError("the ranking's scores hold NaN; was the training stable?")
    targets = np.asarray(targets)[:, None]
    hit = items == targets  # (n, K)
    own = np.where(hit, scores, -np.inf).max(1, keepdims=True)
    listed = items >= 0
    position = (listed & (scores > own)).sum(1) + ((listed & (scores == own)).sum(1) + 1) / 2
    position = np.where(hit.any(1), position, np.inf)  # (n,) rank of the target, from 1
    each = {}
    for k in ks:
        inside = position <= k
        each[f"HR@{k}"] = inside.astype(float)
        each[f"NDCG@{k}"] = np.where(inside, 1 / np.log2(position + 1), 0)
        each[f"MRR@{k}"] = np.where(inside, 1 / position, 0)
    return each


def training_counts(dataset):
    """How often each item is a positive of the training part, (items,): each (user, item) once."""
    last = {}
    for window in dataset.train:
        key = window.user, window.items[:1] if window.start == 0 else window.items
        last[window.user, id(window.items)] = window
    seen = {(w.user, item) for w in last.values() for item in w.items[:w.stop + 1]}
    return np.bincount([item for _, item in seen], minlength=len(dataset.titles))


def popularity_groups(count, titles, n_groups=GROUPS):
    """(items, n_groups) one-hot membership: equally many items a group, ordered by count, then title."""
    order = sorted(range(len(titles)), key=lambda i: (count[i], titles[i]))
    group = np.empty(len(titles), dtype=int)
    group[order] = np.arange(len(titles)) * n_groups // len(titles)
    return np.eye(n_groups)[group]


def genre_groups(genres):
    """(items, G) membership: an item with n genres counts 1/n in each."""
    names = sorted({name for kinds in genres for name in kinds})
    member = np.zeros((len(genres), len(names)))
    for row, kinds in zip(member, genres):
        for name in kinds:
            row[names.index(name)] += 1 / len(kinds)
    return member


def fairness(items, count, member, k):
    """(MGU, DGU) of the lists' first k: GU = GP - GH by group, MGU = mean |GU|, DGU = max GU - min GU."""
    shown = items[:, :k]
    GP = member[shown[shown >= 0]].sum(0)
    GH = count @ member
    GU = GP / GP.sum() - GH / GH.sum()
    return float(np.abs(GU).mean()), float(GU.max() - GU.min())


def list_metrics(dataset, windows, items, scores, ks=(5, 10)):
    each = accuracy(items, scores, [w.items[w.stop] for w in windows], ks)
    metrics = {name: float(values.mean()) for name, values in each.items()}
    count = training_counts(dataset)
    kinds = {"": popularity_groups(count, dataset.titles)} | ({"genre ": genre_groups(dataset.genres)} if any(dataset.genres) else {})
    for k in ks:
        for kind, member in kinds.items():
            metrics[f"{kind}MGU@{k}"], metrics[f"{kind}DGU@{k}"] = fairness(items, count, member, k)
        metrics[f"coverage@{k}"] = len(np.unique(items[:, :k][items[:, :k] >= 0])) / len(dataset.titles)
    return metrics, each


def popularity_lists(dataset, windows, k, keep_seen=False):
    count = training_counts(dataset)
    order = np.array(sorted(range(len(count)), key=lambda i: (-count[i], dataset.titles[i])))
    items = np.full((len(windows), k), -1)
    for row, window in zip(items, windows):
        seen = () if keep_seen else window.items[:window.stop]
        best = order[~np.isin(order[:k + len(seen)], seen)[:len(order)]] if False else order[:k + len(seen)]
        best = best[~np.isin(best, seen)][:k]
        row[:len(best)] = best
    return items, np.where(items >= 0, count[items].astype(float), -np.inf)


def write_predictions(path, dataset, windows, ranking, each):
    lines = []
    for i, w in enumerate(windows):
        kept = ranking.items[i] >= 0
        lines.append(json.dumps({"user": dataset.users[w.user], "position": w.stop, "target": dataset.titles[w.items[w.stop]],
                                 "titles": [dataset.titles[j] for j in ranking.items[i][kept]], "scores": ranking.scores[i][kept].tolist(),
                                 "NLL": each["NLL"][i], "legal NLL": each["legal NLL"][i]}))
    write_atomic(path, "\n".join(lines) + "\n")


def format_table(header, rows):
    rows = [tuple(map(str, r)) for r in rows]
    widths = [max(len(r[j]) for r in [header, *rows]) for j in range(len(header))]
    return "\n".join("  ".join(c.ljust(w) if j == 0 else c.rjust(w) for j, (c, w) in enumerate(zip(r, widths))) for r in [header, *rows])


def write_report(folder):
    return folder / "report.html"


# ------------------------------------------------------------------------------------------------ held-out likelihood and audit

@torch.no_grad()
def token_nlls(model, prompts, trees, device="cpu"):
    """NLL in nats of every target token -> (full, legal, item, step, window), each (N,) numpy.

    full: softmax over the vocabulary; legal: over the continuations that some title has, as the ranking uses it.
    """
    trie, parts = prompts.trie, []
    first, token, node = (torch.as_tensor(x, device=device) for x in (trie.first, trie.token[trie.child], trie.path))
    model.eval()
    for indices in by_length(trees):
        batch = collate([trees[i] for i in indices], device)
        logits = target_logits(model, batch).float()  # (N, V)
        full = torch.nn.functional.cross_entropy(logits, batch.label, reduction="none")
        owner, place, score = legal_scores(logits, node[batch.item, batch.step], first, token)
        legal = -score[token[place] == batch.label[owner]]
        parts.append([x.cpu().numpy() for x in (full.double(), legal.double(), batch.item, batch.step, batch.window)])
    return [np.concatenate(part) for part in zip(*parts)]


def by_group(values, group, n_groups):
    """Mean of values (N,) in each group (N,) -> list of n_groups, None for an empty one; group -1 counts nowhere."""
    return [float(values[group == g].mean()) if (group == g).any() else None for g in range(n_groups)]


def shuffle_histories(windows, seed):
    """Each window with the history of another user's window and its own target: what personal information is worth."""
    order, shuffled = np.random.default_rng(seed).permutation(len(windows)), []
    partner = dict(zip(order, np.roll(order, 1)))
    for i, window in enumerate(windows):
        other = windows[partner[i]]
        history = other.items[other.start:other.stop]
        shuffled.append(Window(window.user, history + (window.items[window.stop],), 0, len(history)))
    return shuffled


def share(aux, user):
    """sum |A_aux| / sum(|A_aux| + |A_user|): how much of the attribution rests on auxiliary tokens."""
    aux, user = np.abs(aux).sum(), np.abs(user).sum()
    return float(aux / (aux + user)) if aux + user > 0 else None


AUDITED = 300  # windows the audit reads at most: its shares are then certain to about 0.01


def audit(model, prompts, windows, group, n_groups, ndcg, softmax="trie", keep_seen=False, seed=0, device="cpu"):
    """The bias audit on `windows` -> dict. ndcg: (n,) NDCG@10 of each with its own history. group: (items, L) or None.

    Auxiliary share by ablation and by gradient over all tokens and first tokens, by group and by place in the title;
    NDCG@10 lost when histories are shuffled between users (seen titles stay the user's own).
    """
    chosen = sorted(np.random.default_rng(seed).permutation(len(windows))[:AUDITED].tolist())
    windows, ndcg = [windows[i] for i in chosen], ndcg[chosen]
    trees, result = build_trees(prompts, windows), {"windows": len(windows)}
    for method in ("ablation", "gradient"):
        aux, user, item, step, _ = attributions(model, trees, method, device=device, note=f"audit ({method})")
        first = step == 0
        result[method] = {
            "auxiliary share": share(aux, user), "auxiliary share first": share(aux[first], user[first]),
            "by position": [share(aux[step == j], user[step == j]) for j in range(min(8, step.max() + 1))]}
        if group is not None:
            g = group[item, step]
            result[method]["by group"] = [share(aux[g == j], user[g == j]) for j in range(n_groups)]
    shuffled = shuffle_histories(windows, seed)
    ranking = rank(model, prompts, shuffled, 10, softmax, keep_seen, device=device, seen=[w.items[:w.stop] for w in windows])
    lists = accuracy(ranking.items, ranking.scores, [w.items[w.stop] for w in windows])
    result["NDCG@10 lost by shuffled histories"] = float((ndcg - lists["NDCG@10"]).mean())
    return result


def evaluate_model(model, prompts, dataset, windows, group, n_groups, softmax="trie", keep_seen=False, device="cpu"):
    """Everything a table shows of a model on `windows` -> (metrics dict, per-window dict of (n,) arrays, Ranking)."""
    ranking = rank(model, prompts, windows, 10, softmax, keep_seen, device=device)
    metrics, each = list_metrics(dataset, windows, ranking.items, ranking.scores)
    full, legal, item, step, window = token_nlls(model, prompts, build_trees(prompts, windows), device)
    each["NLL"] = np.bincount(window, weights=full, minlength=len(windows))
    each["legal NLL"] = np.bincount(window, weights=legal, minlength=len(windows))
    metrics |= {"NLL": float(each["NLL"].mean()), "legal NLL": float(each["legal NLL"].mean())}
    if group is not None:
        g = group[item, step]
        metrics |= {"group NLL": by_group(full, g, n_groups), "group legal NLL": by_group(legal, g, n_groups)}
        metrics["worst group NLL"] = max(x for x in metrics["group NLL"] if x is not None)
    return metrics, each, ranking
