"""Exact full-catalogue ranking, metrics, the bias audit, comparison of runs, and the report.

Read `rank` first: it returns the exact top K titles by sum of token log-probabilities, with no beam width. Then
`accuracy` and `fairness` (what the tables show), `audit` (where the model looks), `interval` (how sure we are).
As a command it recomputes runs from their models and compares them, scores other systems' lists, writes the report.
"""

import argparse
import functools
import io
import json
import math
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import DynamicCache

from attribution import (
    attributions,
    format_table,
    html_details,
    html_heatmap,
    html_links,
    html_lists,
    html_page,
    html_section,
    html_table,
    html_text,
)
from data import (
    InputError,
    Window,
    build_trees,
    by_length,
    collate,
    flat_ranges,
    legal_tokens,
    limit_onednn_cache,
    load_dataset,
    load_run,
    log_softmax_over,
    logits_at,
    normalize_text,
    read_json,
    run_command,
    target_logits,
    write_atomic,
)

# ------------------------------------------------------------------------------------------------ exact search


class RadixTrie(NamedTuple):
    """The title trie with every run of single continuations folded into one edge. Fork 0 is the root; F forks."""

    up: torch.Tensor  # (F,) the fork above
    run: torch.Tensor  # (F, R) tokens of the edge from `up`, zero-padded
    length: torch.Tensor  # (F,) their number
    depth: torch.Tensor  # (F,) tokens from the root
    item: torch.Tensor  # (F,) item that is complete here (its last token is EOS), -1 at inner forks
    first: torch.Tensor  # (F + 1,) the forks below f are first[f]..first[f + 1] - 1


def compress(trie, device="cpu"):
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
        row[: len(tokens)] = tokens
    arrays = up, run, [len(r) for r in runs], depth, item, first + [len(nodes)]
    return RadixTrie(*(torch.as_tensor(np.array(a), device=device) for a in arrays))


def score_children(logits, fork, forks, softmax):
    """Log-probability of the first token of every edge below `fork` (N,), from logits (N, V) -> (owner, child, score), flat.

    softmax 'trie': over the legal continuations, that is these edges alone; 'full': over the vocabulary.
    """
    owner, offset = flat_ranges(forks.first[fork + 1] - forks.first[fork])
    child = forks.first[fork][owner] + offset
    token = forks.run[child, 0]
    if softmax == "full":
        return owner, child, logits.float().log_softmax(-1)[owner, token]
    return owner, child, log_softmax_over(logits, owner, token)


class Ranking(NamedTuple):
    items: np.ndarray  # (n, k) best first, -1 where the catalogue has no more
    scores: np.ndarray  # (n, k) sum of token log-probabilities, -inf beyond
    forwarded: np.ndarray  # (n,) prefixes the search forwarded


@torch.no_grad()
def rank(
    model,
    prompts,
    windows,
    k=10,
    softmax="trie",
    keep_seen=False,
    width=8,
    rows=64,
    device="cpu",
    seen=None,
):
    """The exact top k titles for each window by sum of token log-probabilities -> Ranking. Ours.

    Best-first search over the title trie. Log-probabilities only fall along a path, so a window is done when no open
    prefix beats its k-th best complete title: exact for every `width` (prefixes opened a round). Seen titles compete as
    prefixes and are dropped when complete, unless keep_seen. seen: item tuples, else the user's positives before the
    target. NaN scores are an InputError.
    """
    forks, trees = (
        compress(prompts.trie, device),
        build_trees(prompts, windows, pack=False, targets=False),
    )
    k_kept = min(k, len(prompts.titles))
    items, scores = np.full((len(windows), k), -1), np.full((len(windows), k), -np.inf)
    forwarded = np.zeros(len(windows), dtype=np.int64)
    order = sorted(range(len(trees)), key=lambda i: len(trees[i].ids))
    model.eval()
    for start in tqdm(range(0, len(order), rows), desc="rank", disable=None, leave=False):
        chosen = order[start : start + rows]
        allowed = (forks.item >= 0).repeat(
            len(chosen), 1
        )  # (B, F) complete titles that may enter the list
        for row, i in enumerate(chosen):
            if not keep_seen:
                known = windows[i].items[: windows[i].stop] if seen is None else seen[i]
                allowed[row] &= ~torch.isin(forks.item, torch.tensor(known, device=device))
        score, count = search(
            model,
            collate([trees[i] for i in chosen], device),
            forks,
            allowed,
            k_kept,
            softmax,
            width,
            prompts.packed,
        )
        best, place = score.topk(k_kept, dim=1)  # (B, k)
        scores[chosen, :k_kept] = best.cpu().double().numpy()
        items[chosen, :k_kept] = torch.where(best > -torch.inf, forks.item[place], -1).cpu().numpy()
        forwarded[chosen] = count.cpu().numpy()
    return Ranking(items, scores, forwarded)


class CachedPrompts:
    """A batch of B prompts in a KV cache that is only appended to; edges of the trie are forwarded as their branches.

    logits (B, V): after the prompts. A token of an edge sees its prompt, the path to the fork above, and its own edge.
    """

    def __init__(self, model, batch, forks, feed):
        (B, P), device = batch.ids.shape, batch.ids.device
        self.model, self.forks, self.feed, self.cache = (
            model,
            forks,
            feed,
            DynamicCache(config=model.config),
        )
        self.logits = logits_at(
            model,
            batch.row,
            batch.predict_at,
            input_ids=batch.ids,
            cache=self.cache,
            use_cache=True,
        )
        self.base = batch.predict_at + 1  # (B,) position of the first title token
        self.prompt = torch.arange(P, device=device) < self.base[:, None]  # (B, P) not padding
        self.slot = torch.full(
            (B, len(forks.up)), -1, device=device
        )  # place of a fork's last token among the C search tokens
        self.sees = torch.zeros(
            (B, 0, 0), dtype=torch.bool, device=device
        )  # (B, C, C) ancestors among the search tokens

    def keep(self, active):
        """Drop the prompts that are not active (B,)."""
        self.base, self.prompt, self.slot, self.sees = (
            x[active] for x in (self.base, self.prompt, self.slot, self.sees)
        )
        self.cache.batch_select_indices(active.nonzero()[:, 0])

    def forward(self, row, fork, every):
        """Logits after each token (every) or the last token of the edges to `fork` (n,) of prompts `row` (n,), which rises."""
        forks, (B, C), device = self.forks, self.sees.shape[:2], row.device
        length = self.feed[fork]
        total = torch.zeros_like(self.base).index_add(
            0, row, length
        )  # (B,) new tokens of each prompt, one edge after another
        owner, offset = flat_ranges(length)  # (tokens,)
        column = (length.cumsum(0) - length - (total.cumsum(0) - total)[row])[owner] + offset
        last, row, fork = offset == length[owner] - 1, row[owner], fork[owner]
        S, above = int(total.max()), forks.up[fork]
        ids = torch.zeros((B, S), dtype=torch.long, device=device)
        position, edge = torch.zeros_like(ids), torch.full_like(ids, -1)
        ids[row, column] = forks.run[fork, offset]
        position[row, column] = self.base[row] + forks.depth[above] + offset
        edge[row, column] = fork

        path = torch.zeros((B, S, C), dtype=torch.bool, device=device)
        parent = self.slot[row, above]
        below = parent >= 0
        path[row[below], column[below]] = self.sees[row[below], parent[below]]
        new = torch.cat(
            [path, (edge[:, :, None] == edge[:, None, :]).tril()], dim=2
        )  # (B, S, C + S)
        self.sees = torch.cat([torch.nn.functional.pad(self.sees, (0, S)), new], dim=1)
        self.slot[row[last], fork[last]] = C + column[last]
        mask = torch.cat([self.prompt[:, None].expand(-1, S, -1), new], dim=2)[
            :, None
        ]  # (B, 1, S, P + C + S)
        mask = torch.zeros(mask.shape, device=device).masked_fill(
            ~mask, torch.finfo(torch.float32).min
        )
        read = torch.ones_like(last) if every else last
        return logits_at(
            self.model,
            row[read],
            column[read],
            input_ids=ids,
            attention_mask=mask,
            position_ids=position,
            cache=self.cache,
            use_cache=True,
        )


class SeparatePrompts:
    """The same without cache and mask: each edge is forwarded after its whole prompt. For models that follow no mask."""

    def __init__(self, model, batch, forks, feed):
        self.model, self.forks, self.feed = model, forks, feed
        self.prompts = [ids[: stop + 1] for ids, stop in zip(batch.ids, batch.predict_at)]
        self.logits = logits_at(
            model, batch.row, batch.predict_at, input_ids=batch.ids, use_cache=False
        )

    def keep(self, active):
        self.prompts = [prompt for prompt, kept in zip(self.prompts, active) if kept]

    def forward(self, row, fork, every):
        forks, rows, length = self.forks, [], self.feed[fork]
        for b, f in zip(row.tolist(), fork.tolist()):
            parts = [forks.run[f, : self.feed[f]]]
            while f := int(forks.up[f]):
                parts.append(forks.run[f, : forks.length[f]])
            rows.append(torch.cat([self.prompts[b], *parts[::-1]]))
        owner, offset = flat_ranges(length)
        read = offset >= (0 if every else length[owner] - 1)
        column = (torch.tensor([len(ids) for ids in rows], device=row.device) - length)[
            owner
        ] + offset
        ids = torch.nn.utils.rnn.pad_sequence(
            rows, batch_first=True
        )  # padded behind, where nothing looks
        return logits_at(self.model, owner[read], column[read], input_ids=ids, use_cache=False)


def search(model, batch, forks, allowed, k, softmax, width, packed=True):
    """Best-first search for a batch of B prompts -> (scores (B, F) of allowed complete titles, -inf elsewhere; count (B,)).

    score[b, f] is the log-probability of the path to fork f: exact once its edge is read (under 'trie' at once, the rest
    of a run being certain), an upper bound before. packed: the model follows a mask.
    """
    B, F, device = len(batch.ids), len(forks.up), batch.ids.device
    leaf = forks.item >= 0
    feed = forks.length - leaf.long()  # (F,) tokens to forward to read an edge: EOS never
    if softmax == "trie":
        feed = torch.where(
            leaf, 0, feed
        )  # nothing is left to learn on an edge that completes a title
    openable = ~leaf | (feed > 0)  # (F,)
    complete = leaf & (feed == 0)
    result = torch.full((B, F), -torch.inf, device=device)
    count = torch.zeros(B, dtype=torch.long, device=device)

    reader = (CachedPrompts if packed else SeparatePrompts)(model, batch, forks, feed)
    alive = torch.arange(B, device=device)
    score = torch.full((B, F), -torch.inf, device=device)
    owner, child, value = score_children(reader.logits, torch.zeros_like(alive), forks, softmax)
    score[owner, child] = value
    expanded = torch.zeros((B, F), dtype=torch.bool, device=device)
    expanded[:, 0] = True
    while True:
        if torch.isnan(score).any():
            raise InputError("the model's scores hold NaN; was the training stable?")
        final = torch.where(allowed & (complete | (leaf & expanded)), score, -torch.inf)  # (B, F)
        kth = final.topk(k, dim=1).values[:, -1:]  # (B, 1)
        bound, pick = torch.where(openable & ~expanded, score, -torch.inf).topk(
            min(width, F), dim=1
        )  # (B, W)
        useful = bound > kth
        active = useful.any(1)
        if active.sum() <= len(alive) // 2:  # drop the rows that are done, all of them at the end
            result[alive[~active]] = final[~active]
            if not active.any():
                return result, count
            alive, score, expanded, allowed, pick, useful = (
                x[active] for x in (alive, score, expanded, allowed, pick, useful)
            )
            reader.keep(active)

        row, place = useful.nonzero(as_tuple=True)
        fork = pick[row, place]  # (n,)
        count.index_add_(0, alive[row], torch.ones_like(row))
        logits = reader.forward(row, fork, every=softmax == "full")  # (tokens read, V)
        if (
            softmax == "full"
        ):  # the rest of each edge: token `offset` predicts the next of the same edge
            owner, offset = flat_ranges(feed[fork])
            inner = offset + 1 < forks.length[fork[owner]]
            edge = fork[owner[inner]]
            value = (
                logits[inner]
                .float()
                .log_softmax(-1)
                .gather(-1, forks.run[edge, offset[inner] + 1][:, None])[:, 0]
            )
            score.index_put_((row[owner[inner]], edge), value, accumulate=True)
            logits = logits[offset == feed[fork][owner] - 1]  # (n, V)
        expanded[row, fork] = True
        row, fork, logits = row[~leaf[fork]], fork[~leaf[fork]], logits[~leaf[fork]]
        owner, child, value = score_children(logits, fork, forks, softmax)
        score[row[owner], child] = score[row, fork][owner] + value


# ------------------------------------------------------------------------------------------------ metrics of ranked lists

GROUPS = 5  # popularity groups of MGU and DGU
NOTE = (
    "MGU depends on the number of groups: the group differences sum to at most 2, so with G groups MGU is at most 2/G, and "
    "splitting groups lowers it. Compare it only between runs with the same groups; MGU times G/2, the share of the lists "
    "that stands in the wrong group, never falls when groups are split. DGU is at most 2 for any number."
)


def accuracy(items, scores, targets, ks=(5, 10)):
    """HR, NDCG and MRR of every window -> {"NDCG@10": (n,), ...}; their means over windows are the metrics.

    items (n, K): ranked lists, -1 where one ends early; scores (n, K); targets (n,). Titles with the same score share their
    mean rank, as far as the list goes. At rank <= k: HR 1, NDCG 1/log2(rank + 1), MRR 1/rank; else 0. NaN scores are an
    InputError.
    """
    if np.isnan(scores).any():
        raise InputError("the ranking's scores hold NaN; was the training stable?")
    hit, listed = items == np.asarray(targets)[:, None], items >= 0  # (n, K)
    own = np.where(hit, scores, -np.inf).max(1, keepdims=True)
    rank = (listed & (scores > own)).sum(1) + ((listed & (scores == own)).sum(1) + 1) / 2
    rank = np.where(hit.any(1), rank, np.inf)  # (n,)
    gains = {"HR": np.ones(len(rank)), "NDCG": 1 / np.log2(rank + 1), "MRR": 1 / rank}
    return {
        f"{name}@{k}": np.where(rank <= k, gain, 0.0) for k in ks for name, gain in gains.items()
    }


def training_positives(dataset):
    """(P, 2) pairs user, item: targets of the training windows and all positives before them, each pair once.

    A pair counts once although ten windows hold it as history: a window is a view, Window.items[:stop + 1].
    """
    last = {
        (w.user, id(w.items)): w for w in dataset.train
    }  # of the windows on one tuple the last sees furthest
    return np.array(
        sorted({(w.user, item) for w in last.values() for item in w.items[: w.stop + 1]})
    )


def popularity_groups(count, titles, n_groups=GROUPS):
    """(names, membership (items, G)): groups of equally many items in the order of count (items,), then title."""
    order = sorted(range(len(titles)), key=lambda i: (count[i], titles[i]))
    group = np.empty(len(titles), dtype=int)
    group[order] = np.arange(len(titles)) * n_groups // len(titles)
    names = [str(g + 1) for g in range(n_groups)]
    names[0], names[-1] = f"{names[0]} least popular", f"{names[-1]} most popular"
    return names, np.eye(n_groups)[group]


def genre_groups(genres):
    """(names, membership (items, G)): an item with n genres counts 1/n in each, one without genre nowhere."""
    names = sorted({name for kinds in genres for name in kinds})
    member = np.zeros((len(genres), len(names)))
    for row, kinds in zip(member, genres):
        for name in kinds:
            row[names.index(name)] += 1 / len(kinds)
    return names, member


def item_groups(dataset):
    """{"": popularity groups, "genre ": genres} -> (names, membership (items, G), GH (G,)); GH: shares of the training positives."""
    count = np.bincount(training_positives(dataset)[:, 1], minlength=len(dataset.titles))
    kinds = {"": popularity_groups(count, dataset.titles)} | (
        {"genre ": genre_groups(dataset.genres)} if any(dataset.genres) else {}
    )
    return {
        kind: (names, member, proportions(count @ member))
        for kind, (names, member) in kinds.items()
    }


def proportions(amounts):
    """(..., G) amounts -> shares of their sum; 0 where there is nothing."""
    total = amounts.sum(-1, keepdims=True)
    return amounts / np.where(total > 0, total, 1)


def listed_groups(items, member):
    """What each list shows of each group: items (..., K), -1 for none, membership (items, G) -> (..., G)."""
    return np.concatenate([member, np.zeros((1, member.shape[1]))])[items].sum(
        -2
    )  # -1 is the row of zeros


def fairness(GP, GH):
    """(MGU, DGU) over the last axis (..., G): GU = GP - GH, MGU = mean |GU|, DGU = max GU - min GU (Jiang et al., WWW 2024).

    GP: shares of the top-K lists that groups have; GH: their shares of the training positives. See NOTE on G.
    """
    GU = GP - GH
    return np.abs(GU).mean(-1), GU.max(-1) - GU.min(-1)


def by_tercile(count, per_window):
    """Accuracy on windows of low, middle and high count (n,), a third each as far as ties allow (our choice).

    -> {"tail" | "middle" | "head": {"n", "from", "to" (counts), and the means of `each`}}
    """
    third = np.searchsorted(
        np.quantile(count, (1 / 3, 2 / 3)), count
    )  # (n,): equal count, equal third
    return {
        name: {
            "n": int((third == i).sum()),
            "from": int(count[third == i].min()),
            "to": int(count[third == i].max()),
            **{metric: float(values[third == i].mean()) for metric, values in per_window.items()},
        }
        for i, name in enumerate(("tail", "middle", "head"))
        if (third == i).any()
    }


def list_metrics(dataset, windows, items, scores, ks=(5, 10)):
    """All that ranked lists tell: items, scores (n, K) -> (metrics, {"NDCG@10": (n,), ...})."""
    targets = np.array([w.items[w.stop] for w in windows])
    per_window = accuracy(items, scores, targets, ks)
    metrics = {name: float(values.mean()) for name, values in per_window.items()}
    for kind, (names, member, GH) in item_groups(dataset).items():
        shares = metrics[f"{kind}exposure"] = {"groups": names, "GH": GH.tolist()}
        for k in ks:
            GP = proportions(listed_groups(items[:, :k], member).sum(0))
            shares[f"GP@{k}"] = GP.tolist()
            metrics[f"{kind}MGU@{k}"], metrics[f"{kind}DGU@{k}"] = map(float, fairness(GP, GH))
    for k in ks:
        metrics[f"coverage@{k}"] = len(np.setdiff1d(items[:, :k], [-1])) / len(dataset.titles)
    users, positives = training_positives(dataset).T
    activity, popularity = (
        np.bincount(users, minlength=len(dataset.users)),
        np.bincount(positives, minlength=len(dataset.titles)),
    )
    metrics["by user activity"] = by_tercile(activity[[w.user for w in windows]], per_window)
    metrics["by item popularity"] = by_tercile(popularity[targets], per_window)
    return metrics, per_window


def popularity_lists(dataset, windows, k, keep_seen=False):
    """The popularity baseline -> (items (n, k), scores (n, k) = counts of training positives), like `rank`."""
    count = np.bincount(training_positives(dataset)[:, 1], minlength=len(dataset.titles))
    order = np.array(sorted(range(len(count)), key=lambda i: (-count[i], dataset.titles[i])))
    items = np.full((len(windows), k), -1)
    for row, window in zip(items, windows):
        seen = () if keep_seen else window.items[: window.stop]
        best = order[: k + len(seen)]
        best = best[~np.isin(best, seen)][:k]
        row[: len(best)] = best
    return items, np.where(items >= 0, count[items].astype(float), -np.inf)


# ------------------------------------------------------------------------------------------------ predictions


def write_predictions(path, dataset, windows, ranking, per_window):
    """A line a window: user, position, history as the model read it, target, the titles listed, their scores, NLLs."""
    lines = []
    for i, w in enumerate(windows):
        kept = ranking.items[i] >= 0
        lines.append(
            json.dumps(
                {
                    "user": dataset.users[w.user],
                    "position": w.stop,
                    "history": [dataset.titles[j] for j in w.items[w.start : w.stop]],
                    "target": dataset.titles[w.items[w.stop]],
                    "titles": [dataset.titles[j] for j in ranking.items[i][kept]],
                    "scores": ranking.scores[i][kept].tolist(),
                    "NLL": per_window["NLL"][i],
                    "legal NLL": per_window["legal NLL"][i],
                },
                ensure_ascii=False,
            )
        )
    write_atomic(path, "\n".join(lines) + "\n")


def read_lines(path):
    """JSONL file -> [(line number, value)]. A file that is absent, empty or broken is an InputError."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; give a JSONL file") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8 text; give a JSONL file") from None
    found = []
    for number, line in enumerate(text.split("\n"), start=1):
        try:
            found += [(number, json.loads(line))] if line.strip() else []
        except (ValueError, RecursionError):
            raise InputError(
                f"{path}:{number}: not JSON; every line should be one object"
            ) from None
    if not found:
        raise InputError(f"{path}: holds no line; every test window needs one")
    return found


def read_predictions(path, dataset, windows, k=10, allow_missing=False):
    """Ranked lists from any system -> (items (n, K), scores (n, K), {what is missing: how often}). Anything wrong: InputError.

    K is k, or more where titles beyond share the k-th score: equal scores for all titles then find nothing.

    A line: {"user": "196", "position": 54, "titles": [best first]} and, where wanted, "scores" (falling) and "target" (is
    checked). position: the user's positives before the target; may be left out where the user has one window. Where
    several windows share user and position (CSV folders), "target" tells them apart, or else their order.
    """
    index, left = {title: i for i, title in enumerate(dataset.titles)}, {}
    for i, w in enumerate(windows):
        left.setdefault((dataset.users[w.user], w.stop), []).append(i)
        left.setdefault((dataset.users[w.user], None), []).append(i)
    several = {key for key, found in left.items() if key[1] is None and len(found) > 1}
    lists = [((), ())] * len(windows)  # (items, scores) of each window
    taken = set()
    for number, line in read_lines(path):
        place = f"{path}:{number}"
        if (
            not isinstance(line, dict)
            or "user" not in line
            or not isinstance(line.get("titles"), list)
        ):
            raise InputError(
                f'{place}: should be an object with "user", "position" and a list "titles"'
            )
        key = str(line["user"]), line.get("position")
        name = normalize_text(f"user {key[0]}, position {key[1]}")
        if not isinstance(key[1], (int, type(None))) or key not in left:
            raise InputError(
                f"{place}: {name} is no test window of {dataset.name}; predict the same split"
            )
        if key in several:
            raise InputError(
                f'{place}: {name.split(",")[0]} has several test windows; say which by "position"'
            )
        fits = [
            i
            for i in left[key]
            if line.get("target") in (None, dataset.titles[windows[i].items[windows[i].stop]])
        ]
        if not fits:
            raise InputError(
                f"{place}: {name} has another target than {line['target']!r}; predict the same split"
            )
        i = next((i for i in fits if i not in taken), None)
        if i is None:
            raise InputError(f"{place}: {name} is there twice; leave one line")
        taken.add(i)
        titles, given = (
            line["titles"],
            line.get("scores", [-float(j) for j in range(len(line["titles"]))]),
        )
        for title in titles:
            if not isinstance(title, str) or title not in index:
                raise InputError(
                    f"{place}: {title!r} is no title of {dataset.name}; spell titles as its predictions.jsonl does"
                )
        if len(set(titles)) < len(titles):
            raise InputError(
                f"{place}: {max(titles, key=titles.count)!r} is listed twice; list each title once"
            )
        if (
            not isinstance(given, list)
            or len(given) != len(titles)
            or not all(type(x) in (int, float) and abs(x) < 1e300 for x in given)
        ):
            raise InputError(
                f"{place}: scores should be {len(titles)} finite numbers, one a title; NaN is no score"
            )
        if any(a < b for a, b in zip(given, given[1:])):
            raise InputError(f"{place}: scores rise along the list; put the best title first")
        kept = (
            sum(x >= given[k - 1] for x in given) if len(given) > k else len(given)
        )  # the k best and their equals
        lists[i] = [index[title] for title in titles[:kept]], given[:kept]
    items = np.full((len(windows), max(k, *(len(row) for row, _ in lists))), -1)
    scores = np.full(items.shape, -np.inf)
    for i, (row, given) in enumerate(lists):
        items[i, : len(row)], scores[i, : len(row)] = row, given
    possible = np.array([min(k, len(index) - len(set(w.items[: w.stop]))) for w in windows])
    short = np.array([len(row) for row, _ in lists]) < possible
    missing = {
        "windows without a list": len(windows) - len(taken),
        f"lists under {k} titles": int(short[sorted(taken)].sum()),
    }
    if any(missing.values()) and not allow_missing:
        raise InputError(
            f"{path}: of {len(windows)} windows {missing['windows without a list']} have no list, and "
            f"{missing[f'lists under {k} titles']} lists have under {k} titles; complete them or add --allow-missing"
        )
    return items, scores, missing


# ------------------------------------------------------------------------------------------------ held-out likelihood and audit


@torch.no_grad()
def token_nlls(model, prompts, trees, device="cpu"):
    """NLL in nats of every target token -> (full, legal, item, step, window), each (N,) numpy.

    full: softmax over the vocabulary; legal: over the continuations that some title has, as the ranking uses it.
    """
    parts = []
    model.eval()
    for indices in by_length(trees):
        batch = collate([trees[i] for i in indices], device)
        logits = target_logits(model, batch).float()  # (N, V)
        full = torch.nn.functional.cross_entropy(logits, batch.label, reduction="none")
        owner, token, chosen = legal_tokens(batch, prompts.trie)
        legal = -log_softmax_over(logits, owner, token)[chosen]
        parts.append(
            [
                x.cpu().numpy()
                for x in (
                    full.cpu().double(),
                    legal.cpu().double(),
                    batch.item,
                    batch.place,
                    batch.window,
                )
            ]
        )
    return [np.concatenate(part) for part in zip(*parts)]


def by_group(values, group, n_groups):
    """Mean of values (N,) in each group (N,) -> list of n_groups, None for an empty one; group -1 counts nowhere."""
    return [
        float(values[group == g].mean()) if (group == g).any() else None for g in range(n_groups)
    ]


def shuffle_histories(windows, seed):
    """Each window with the history of another user's window and its own target: what personal information is worth.

    Every history is used once. Users stand in a seeded order, their windows side by side, and histories move on by the
    largest number of windows a user has: past all of the user's own, unless one user has more than half of the windows.
    """
    users, count = np.unique([w.user for w in windows], return_counts=True)
    place, shuffled = (
        dict(zip(np.random.default_rng(seed).permutation(users).tolist(), range(len(users)))),
        [],
    )
    order = sorted(range(len(windows)), key=lambda i: place[windows[i].user])
    partner = dict(zip(order, np.roll(order, count.max())))
    for i, window in enumerate(windows):
        other = windows[partner[i]]
        history = other.items[other.start : other.stop]
        shuffled.append(
            Window(window.user, history + (window.items[window.stop],), 0, len(history))
        )
    return shuffled


def share(aux, user):
    """sum |A_aux| / sum(|A_aux| + |A_user|): how much of the attribution rests on auxiliary tokens."""
    aux, user = np.abs(aux).sum(), np.abs(user).sum()
    return float(aux / (aux + user)) if aux + user > 0 else None


AUDITED = 150  # windows the audit reads at most: its shares are then certain to about 0.014


def audit(
    model,
    prompts,
    windows,
    group,
    n_groups,
    ndcg,
    softmax="trie",
    keep_seen=False,
    seed=0,
    device="cpu",
):
    """The bias audit on `windows` -> dict. ndcg: (n,) NDCG@10 of each with its own history. group: (items, L) or None.

    Auxiliary share over all tokens and first tokens, by group and by place in the title: by ablation, with the softmax over the vocabulary
    ('ablation') and over legal continuations ('legal ablation'), and on every fifth window by gradient. NDCG@10 lost when
    histories are shuffled between users (seen titles stay the user's own).
    """
    chosen = sorted(np.random.default_rng(seed).permutation(len(windows))[:AUDITED].tolist())
    windows, ndcg = [windows[i] for i in chosen], ndcg[chosen]
    trees, result = build_trees(prompts, windows), {"windows": len(windows)}
    aux, user, legal_aux, legal_user, *place = attributions(
        model, trees, "ablation", (None, prompts.trie), device=device, note="audit (ablation)"
    )
    measured = {
        "ablation": (aux, user, *place),
        "legal ablation": (legal_aux, legal_user, *place),
        "gradient": attributions(
            model, build_trees(prompts, windows[::5]), device=device, note="audit (gradient)"
        ),
    }  # it is the dear one
    for name, (aux, user, item, step, _) in measured.items():
        first = step == 0
        result[name] = {
            "auxiliary share": share(aux, user),
            "auxiliary share first": share(aux[first], user[first]),
            "by position": [
                share(aux[step == j], user[step == j]) for j in range(min(8, step.max() + 1))
            ],
        }
        if group is not None:
            g = group[item, step]
            result[name]["by group"] = [share(aux[g == j], user[g == j]) for j in range(n_groups)]
    shuffled = shuffle_histories(windows, seed)
    ranking = rank(
        model,
        prompts,
        shuffled,
        10,
        softmax,
        keep_seen,
        device=device,
        seen=[w.items[: w.stop] for w in windows],
    )
    lists = accuracy(ranking.items, ranking.scores, [w.items[w.stop] for w in windows])
    result["NDCG@10 lost by shuffled histories"] = float((ndcg - lists["NDCG@10"]).mean())
    return result


def evaluate_model(
    model, prompts, dataset, windows, group, n_groups, softmax="trie", keep_seen=False, device="cpu"
):
    """Everything a table shows of a model on `windows` -> (metrics dict, per-window dict of (n,) arrays, Ranking)."""
    ranking = rank(model, prompts, windows, 10, softmax, keep_seen, device=device)
    metrics, per_window = list_metrics(dataset, windows, ranking.items, ranking.scores)
    full, legal, item, step, window = token_nlls(
        model, prompts, build_trees(prompts, windows), device
    )
    per_window["NLL"] = np.bincount(window, weights=full, minlength=len(windows))
    per_window["legal NLL"] = np.bincount(window, weights=legal, minlength=len(windows))
    metrics |= {
        "NLL": float(per_window["NLL"].mean()),
        "legal NLL": float(per_window["legal NLL"].mean()),
    }
    if group is not None:
        g = group[item, step]
        metrics |= {
            "group NLL": by_group(full, g, n_groups),
            "group legal NLL": by_group(legal, g, n_groups),
        }
        metrics["worst group NLL"] = max(
            (x for x in metrics["group NLL"] if x is not None), default=None
        )
    return metrics, per_window, ranking


# ------------------------------------------------------------------------------------------------ comparison

DRAWS = 2000  # of the bootstrap: an interval's end is then certain to about 3% of its width


@functools.lru_cache(maxsize=8)
def draws(n, seed):
    """(DRAWS, n): how often each of n is taken in n draws with replacement."""
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), DRAWS).astype(float)


def resample(values, users, statistic=None, seed=0):
    """Bootstrap of a mean over windows: values (S, n) or (S, n, G) by seed, users (n,) -> (DRAWS,).

    A draw takes as many users as there are, with replacement and with all their windows, and as many seeds. statistic:
    function of the means (DRAWS, S, G) -> (DRAWS, S). The same users and seed give the same draws: what makes it paired.
    """
    _, first, index = np.unique(users, return_index=True, return_inverse=True)
    index = first.argsort().argsort()[
        index
    ]  # users in the order of their first windows: the same draws for indices and for ids
    sums = np.zeros((len(first), len(values), *values.shape[2:]))
    np.add.at(sums, index, values.swapaxes(0, 1))  # (U, S, ...)
    draw, weight = draws(len(first), seed), draws(len(values), seed + 1) / len(values)
    mean = np.tensordot(draw, sums, 1) / (draw @ np.bincount(index)).reshape(
        -1, *[1] * (values.ndim - 1)
    )  # (DRAWS, S, ...)
    return ((statistic(mean) if statistic else mean) * weight).sum(1)


def interval(values, users, statistic=None, against=None):
    """(value, low, high): the mean over seeds and windows with its 95% bootstrap interval; against: that of values - against.

    values, against: (S, n), or (S, n, G) with a statistic, on the same windows; users: (n,). Runs of equally many seeds are
    paired seed by seed. With few seeds the interval is a little narrow (by 18% at 3, in what is owed to seeds).
    A statistic is a size, such as MGU, and chance makes sizes too large: once in `value`, twice in the draws. Its interval is
    the basic one, which takes both off and so may lie below `value`; in differences the two runs' shares cancel. It held the
    true MGU of simulated lists in 82% (exactly fair) to 95% of samples (unfair); percentiles of the draws in 0% to 96%.
    """

    def point(values):
        mean = values.mean(1)[None]  # (1, S, ...)
        return float((statistic(mean) if statistic else mean).mean())

    value, drawn = point(values), resample(values, users, statistic)
    if against is not None:
        value, drawn = value - point(against), drawn - resample(against, users, statistic)
    low, high = np.percentile(drawn, (2.5, 97.5)).tolist()
    if statistic and against is None:
        low, high = max(0.0, 2 * value - high), max(0.0, 2 * value - low)
    return value, low, high


def in_brackets(value, low, high, sign=""):
    """'0.0810 [0.0720, 0.0899]'; a difference (sign='+') whose interval leaves zero out gets a star."""
    return f"{value:{sign}.4f} [{low:{sign}.4f}, {high:{sign}.4f}]" + (
        "*" if sign and (low > 0 or high < 0) else ""
    )


def evaluate_run(folder, cache=None, data_dir=None):
    """Metrics of a finished run, recomputed from its model/ -> dict(loss, folder, config, dataset, part, metrics, each, items, moved).

    moved: {metric: (as training wrote it, now)} of the single numbers that differ by 1e-4 or more; lists by group are not compared.
    """
    folder = Path(folder)
    config, dataset, model, _, prompts = load_run(folder, cache, data_dir)
    arguments, group = (
        config["arguments"],
        np.array(read_json(folder.parent / "groups.json")["group"]),
    )
    part = "valid" if arguments["no_test"] else "test"
    metrics, per_window, ranking = evaluate_model(
        model,
        prompts,
        dataset,
        getattr(dataset, part),
        group,
        arguments["groups"],
        arguments["rank_softmax"],
        arguments["keep_seen"],
    )
    written = read_json(folder / "metrics.json").get(part, {})
    moved = {
        name: (written.get(name, math.nan), now)
        for name, now in metrics.items()
        if isinstance(now, float) and not abs(written.get(name, math.nan) - now) < 1e-4
    }
    return {
        "loss": folder.resolve().name,
        "folder": folder,
        "config": config,
        "dataset": dataset,
        "part": part,
        "metrics": metrics,
        "per_window": per_window,
        "items": ranking.items,
        "moved": moved,
    }


def pool(runs):
    """Results of evaluate_run -> {name: [those that differ in nothing but the seed]}, named by loss, by what differs, by seeds."""
    found = {}
    for run in sorted(runs, key=lambda run: run["config"]["arguments"]["seed"]):
        arguments = {
            key: value
            for key, value in run["config"]["arguments"].items()
            if key not in ("seed", "loss")
        }
        found.setdefault((run["loss"], json.dumps(arguments)), []).append(run)
    order = {run["loss"]: i for i, run in enumerate(runs[::-1])}
    settings, named = [json.loads(text) for _, text in found], {}
    differ = [
        key
        for key in (settings or [{}])[0]
        if any(s.get(key) != settings[0][key] for s in settings)
    ]
    for (loss, _), setting, members in sorted(
        zip(found, settings, found.values()), key=lambda entry: -order[entry[0][0]]
    ):
        seeds = [run["config"]["arguments"]["seed"] for run in members]
        if len(set(seeds)) < len(seeds):
            raise InputError(
                f"{members[0]['folder']}: two runs of one configuration and seed; name each run once"
            )
        words = [
            loss,
            *(f"{key}={setting.get(key)}" for key in differ),
            "seed" + "s" * (len(seeds) > 1),
            ",".join(map(str, seeds)),
        ]
        named[" ".join(words)] = members
    return named


MEANS = "HR@5", "NDCG@5", "MRR@5", "HR@10", "NDCG@10", "MRR@10", "NLL", "legal NLL"


def sampled(dataset, members):
    """What has an interval -> {metric: (values (S, n) or (S, n, G), statistic or None)}. Coverage has none: draws repeat lists."""
    found = {
        name: (np.stack([run["per_window"][name] for run in members]), None)
        for name in MEANS
        if name in members[0]["per_window"]
    }
    items = np.stack([run["items"] for run in members])  # (S, n, K)
    for kind, (_, member, GH) in item_groups(dataset).items():
        for k in (5, 10):
            for j, name in enumerate(("MGU", "DGU")):
                found[f"{kind}{name}@{k}"] = (
                    listed_groups(items[..., :k], member),
                    lambda mean, GH=GH, j=j: fairness(proportions(mean), GH)[j],
                )
    return found


def comparison(pools, dataset, windows):
    """(header, rows): a row a metric; a column a pool, with 95% intervals; then what each pool has over the first."""
    users, (first, *others) = np.array([w.user for w in windows]), pools
    values = {name: sampled(dataset, members) for name, members in pools.items()}

    def cell(metric, name, base=None):
        if metric in values[name] and (base is None or metric in values[base]):
            x, statistic = values[name][metric]
            return in_brackets(
                *interval(x, users, statistic, base and values[base][metric][0]),
                "+" if base else "",
            )
        known = [run["metrics"][metric] for run in pools[name] if metric in run["metrics"]]
        return f"{np.mean(known):.4f}" if known and not base else ""

    metrics = *values[first], "coverage@5", "coverage@10", "worst group NLL"
    return (
        ("", *pools, *(f"{name} less {first}" for name in others)),
        [
            (
                metric,
                *(cell(metric, name) for name in pools),
                *(cell(metric, name, first) for name in others),
            )
            for metric in metrics
        ],
    )


# ------------------------------------------------------------------------------------------------ report

COLUMNS = "HR@5", "NDCG@5", "HR@10", "NDCG@10", "MGU@5", "DGU@5", "coverage@10"
BEFORE, HISTORIES = "before fine-tuning", "histories"
COLOURS = {
    HISTORIES: "#c6cad0",
    BEFORE: "#8d96a0",
    "SFT": "#3f74b5",
    "GDRT": "#d9822b",
    "group-dro": "#4a9a7c",
}
LOOK = {
    "svg.fonttype": "none",
    "svg.hashsalt": "gdrt",
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9aa1a9",
    "axes.facecolor": "none",
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#e9ebea",
    "text.color": "#23282e",
    "xtick.color": "#5b636d",
    "ytick.color": "#5b636d",
    "legend.frameon": False,
    "legend.fontsize": 8,
}


def loss_name(loss):
    return {"sft": "SFT", "gdrt": "GDRT"}.get(loss, loss)


def fmt(x, digits=3):
    return "" if x is None else f"{x:.{digits}f}"


def result_table(folder, losses):
    """(header, rows): popularity, before fine-tuning and each loss; on test, or on validation with --no-test."""
    runs = {loss: read_json(Path(folder) / loss / "metrics.json") for loss in losses}
    some = runs[losses[0]]
    part = "test" if "test" in some else "valid"

    def row(name, metrics, audit, seconds):
        return (
            name,
            *(fmt(metrics[column], 4) for column in COLUMNS),
            fmt(audit and audit["ablation"]["auxiliary share"]),
            fmt(seconds, 0),
        )

    rows = [
        row("popularity", some["baselines"]["popularity"][part], None, None),
        row(BEFORE, some["baselines"]["before"][part], some["audit"]["before"], None),
    ]
    for loss, result in runs.items():
        time = result["time"]
        seconds = time["warm-up"] + time["train"] + (0 if loss == "sft" else time["relevance"])
        rows.append(row(loss_name(loss), result[part], result["audit"]["after"], seconds))
    return (part, *COLUMNS, "aux share", "seconds"), rows


def audit_table(audits):
    """(header, rows) of {name: audit}. The ratio auxiliary : user says the same as the share."""

    def row(name, audit):
        share = audit["ablation"]["auxiliary share"]
        return (
            name,
            fmt(share),
            f"{share / (1 - share):.2f} : 1" if share < 1 else "all",
            fmt(audit["ablation"]["auxiliary share first"]),
            *(
                fmt(audit[method][key])
                for method in ("legal ablation", "gradient")
                for key in ("auxiliary share", "auxiliary share first")
            ),
            fmt(audit["NDCG@10 lost by shuffled histories"], 4),
        )

    return (
        (
            "",
            "aux share, ablation",
            "aux : user",
            "first tokens",
            "over legal tokens",
            "first tokens",
            "aux share, gradient",
            "first tokens",
            "NDCG@10 lost, histories shuffled",
        ),
        [row(*entry) for entry in audits.items()],
    )


def tercile_table(models, by, metric="NDCG@10"):
    """(header, rows) of what in_thirds found for {name: [metrics of each seed]}: a row a third of the windows."""
    parts = next(iter(models.values()))[0][by]
    return (
        (by, "training positives", "n", *models),
        [
            (
                name,
                f"{x['from']} to {x['to']}",
                x["n"],
                *(
                    fmt(np.mean([m[by][name][metric] for m in seeds]), 4)
                    for seeds in models.values()
                ),
            )
            for name, x in parts.items()
        ],
    )


def plot(panels, columns, described):
    """Panels (title, labels, {name: values}) as inline SVG: bars over labels; or lines, where labels is None and values (x, y).

    '' without matplotlib. Names in COLOURS keep their colour everywhere; others go from dark to light in their order.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        return ""
    with matplotlib.rc_context(LOOK):
        rows, text, explained = -(-len(panels) // columns), io.StringIO(), set()
        page = Figure(figsize=(10.6, 2.6 * rows), layout="constrained", facecolor="none")
        for axis, (title, labels, series) in zip(
            page.subplots(rows, columns, squeeze=False).flat, panels
        ):
            for i, (name, values) in enumerate(series.items()):
                style = {
                    "label": name,
                    "color": COLOURS.get(
                        name, matplotlib.colormaps["viridis"](0.88 * i / max(1, len(series) - 1))
                    ),
                }
                if labels is None:
                    axis.plot(*values, linewidth=1.4, **style)
                else:
                    width = 0.8 / len(series)
                    axis.bar(
                        np.arange(len(labels)) + (i + 0.5) * width - 0.4,
                        [np.nan if x is None else x for x in values],
                        0.92 * width,
                        **style,
                    )
            axis.set_title(title)
            axis.set_ylim(bottom=0)
            if labels is not None:
                axis.set_xticks(range(len(labels)), labels)
                axis.grid(False, axis="x")
            if tuple(series) not in explained:  # a legend once: colours mean the same in all panels
                explained.add(tuple(series))
                axis.legend(
                    **(
                        {}
                        if labels is None
                        else {"loc": "lower right", "bbox_to_anchor": (1, 1), "ncols": len(series)}
                    )
                )
        page.savefig(
            text, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
        )
    svg = re.sub(r"<metadata>.*?</metadata>", "", text.getvalue(), flags=re.DOTALL)
    return svg[svg.index("<svg") :].replace("<svg", f'<svg role="img" aria-label="{described}"', 1)


def plotted(panels, columns, described, *tables):
    """A plot with its figures behind a fold; where there is no plot, the figures, unfolded."""
    svg = plot(panels, columns, described)
    return svg + html_details(
        f"Figures: {described}", "".join(html_table(*table) for table in tables), opened=not svg
    )


def differences(logs, base="SFT"):
    """Sentences on what each loss has over SFT, with paired 95% intervals. logs: {name: lines of predictions.jsonl}."""

    def ndcg(lines):
        return np.array(
            [
                [
                    1 / np.log2(x["titles"].index(x["target"]) + 2)
                    if x["target"] in x["titles"]
                    else 0.0
                    for x in lines
                ]
            ]
        )

    if base not in logs:
        return []
    of = {
        "NDCG@10": ndcg,
        "NLL of the title": lambda lines: np.array([[x["NLL"] for x in lines]]),
        "NLL over legal continuations": lambda lines: np.array([[x["legal NLL"] for x in lines]]),
    }
    users = [line["user"] for line in logs[base]]
    return [
        html_text(
            f"{name} less {base}: "
            + "; ".join(
                f"{metric} {in_brackets(*interval(get(lines), users, against=get(logs[base])), '+')}"
                for metric, get in of.items()
            )
            + ". In brackets: 95% of a paired bootstrap over users, on one seed.",
            "lead",
        )
        for name, lines in logs.items()
        if name != base
    ]


def training_section(folder, runs):
    """NLL, NLL by group and q over the updates, a row of panels a loss; runs: {name: loss}."""

    def smooth(lines, get):
        width = max(1, len(lines) // 40)
        return [line["step"] for line in lines[width - 1 :]], np.convolve(
            [get(line) for line in lines], np.ones(width) / width, "valid"
        )

    panels, rows = [], []
    for name, loss in runs.items():
        lines = [line for _, line in read_lines(folder / loss / "metrics.jsonl")]
        groups, tenth = range(len(lines[0]["q"])), max(1, len(lines) // 10)
        panels.append(
            (
                name,
                None,
                {
                    "loss": smooth(lines, lambda x: x["loss"]),
                    "mean NLL": smooth(lines, lambda x: x["nll"]),
                },
            )
        )
        panels += [
            (
                f"{name}: {title}",
                None,
                {f"group {g}": smooth(lines, lambda x: x[key][g]) for g in groups},
            )
            for title, key in (("NLL by group", "group_nll"), ("weight q by group", "q"))
        ]
        for label, some in (("first tenth", lines[:tenth]), ("last tenth", lines[-tenth:])):
            mean = {
                key: np.mean([line[key] for line in some], 0)
                for key in ("loss", "nll", "group_nll", "q")
            }
            rows.append(
                (f"{name}, {label}", *(fmt(x) for key in mean for x in np.atleast_1d(mean[key])))
            )
    header = "updates", "loss", "NLL", *(f"NLL {g}" for g in groups), *(f"q {g}" for g in groups)
    return [
        html_text(
            "By update, after the warm-up that all losses share; running means over a fortieth of the updates; NLL in nats a token. "
            "Group 0 holds the target tokens least relevant to auxiliary tokens: those that need the user most."
        ),
        plotted(panels, 3, "training by update", (header, rows)),
    ]


def attribution_section(audits):
    """Auxiliary share of every model; audits: {name: audit}."""
    by = {
        kind: {name: audit["ablation"][f"by {kind}"] for name, audit in audits.items()}
        for kind in ("group", "position")
    }
    labels = {
        kind: [str(i) for i in range(max(map(len, series.values())))] for kind, series in by.items()
    }
    panels = [(f"auxiliary share by {kind}", labels[kind], series) for kind, series in by.items()]
    tables = [
        ((f"by {kind}", *labels[kind]), [(name, *map(fmt, x)) for name, x in series.items()])
        for kind, series in by.items()
    ]
    return [
        html_text(
            "The sum of |A aux| over that of |A aux| + |A user|, for the target tokens of "
            f"{next(iter(audits.values()))['windows']} windows. First tokens are where a title is chosen. By ablation below: by group (0 is "
            "the least relevant to auxiliary tokens) and by the token's position in the title."
        ),
        html_table(*audit_table(audits)),
        plotted(panels, 2, "auxiliary share by group and position", *tables),
    ]


def exposure_section(models):
    """Popularity groups in the lists against the histories, and whom the lists serve; models: {name: metrics}."""
    some = next(iter(models.values()))["exposure"]
    shares = {HISTORIES: some["GH"]} | {
        name: metrics["exposure"]["GP@10"] for name, metrics in models.items()
    }
    return [
        html_text(
            "What each fifth of the catalogue, by popularity in training, has of the training histories and of the top 10 lists."
        ),
        plotted(
            [("share by popularity group", some["groups"], shares)],
            1,
            "exposure of popularity groups",
            (("", *some["groups"]), [(name, *map(fmt, x)) for name, x in shares.items()]),
        ),
        html_text(NOTE),
        html_text(
            "NDCG@10 by thirds of the windows, cut by the training positives of the user, and of the title to be found:"
        ),
        *(
            html_table(*tercile_table({name: [metrics] for name, metrics in models.items()}, by))
            for by in ("by user activity", "by item popularity")
        ),
    ]


def users_section(logs, some=6):
    """History, truth and every model's list for a few windows, evenly spaced in the file; logs as in `differences`."""
    first, parts = next(iter(logs.values())), []
    every = -(-len(first) // some)
    for i in range(0, len(first), every):
        columns = [
            ("history, oldest first", first[i]["history"]),
            *((name, lines[i]["titles"]) for name, lines in logs.items()),
        ]
        parts += [
            html_text(f"User {first[i]['user']} chose {first[i]['target']}", "lead"),
            html_lists(columns, {first[i]["target"]}),
        ]
    return [
        html_text(
            f"One in {every} of {len(first)} windows, not chosen by hand. The title that the user chose is marked."
        ),
        *parts,
    ]


def write_report(folder, path=None):
    """Write a page on all finished losses of the run folder runs/NAME to `path`, by default its report.html -> path.

    Reads files of that folder alone; a part whose file is not there is left out. No finished loss: InputError.
    """
    folder = Path(folder)
    config, groups = read_json(folder / "config.json"), read_json(folder / "groups.json")
    runs = {
        loss_name(loss): loss
        for loss in config["arguments"]["loss"]
        if (folder / loss / "metrics.json").exists()
    }
    if not runs:
        raise InputError(f"{folder}: none of its losses is finished; go on with gdrt.py --resume")
    results = {name: read_json(folder / loss / "metrics.json") for name, loss in runs.items()}
    header, rows = result_table(folder, list(runs.values()))
    part, arguments, some = header[0], config["arguments"], next(iter(results.values()))
    models = {BEFORE: some["baselines"]["before"][part]} | {
        name: result[part] for name, result in results.items()
    }
    audits = {BEFORE: some["audit"]["before"]} | {
        name: result["audit"]["after"] for name, result in results.items()
    }
    lists = {name: folder / loss / "predictions.jsonl" for name, loss in runs.items()}
    logs = {
        name: [line for _, line in read_lines(file)]
        for name, file in lists.items()
        if file.exists()
    }
    heat = next(
        (
            file
            for loss in reversed(runs.values())
            if (file := folder / loss / "heatmap.json").exists()
        ),
        None,
    )
    sections = {
        "Results": [
            html_text(
                f"{config['facts'][f'{part} windows']:,} {part} windows; all {config['facts']['items']:,} titles ranked. MGU, DGU: distance between the "
                "popularity of what is listed and of what was chosen in training, the lower the fairer. Aux share: how much of the attribution rests "
                "on the task and the title's own prefix. Seconds: training, with warm-up and relevance."
            ),
            html_table(header, rows),
            *differences(logs),
        ],
        "Training": training_section(folder, runs),
        "Groups": [
            html_text(
                f"Target tokens by relevance ({groups['relevance']}) to auxiliary tokens, and the {part} windows' NLL in each group, in nats a token."
            ),
            html_table(
                ("group", "share of tokens", "relevance from", *models),
                [
                    (
                        g,
                        fmt(share),
                        fmt(cut),
                        *(fmt(metrics["group NLL"][g]) for metrics in models.values()),
                    )
                    for g, (share, cut) in enumerate(zip(groups["shares"], groups["cuts"]))
                ],
            ),
        ],
        "Attribution": attribution_section(audits) if all(audits.values()) else None,
        "Exposure": exposure_section(models),
        "Users": users_section(logs) if logs else None,
        "Heat map": [html_heatmap(read_json(heat))] if heat else None,
        "Settings": [
            html_details(
                "Arguments, data, versions, machine",
                html_table(
                    ("", ""),
                    [
                        *(
                            (key, ", ".join(value) if isinstance(value, list) else value)
                            for kind in ("arguments", "facts", "versions", "machine")
                            for key, value in config[kind].items()
                        ),
                        ("commit", config["commit"]),
                        ("data", config["data"]),
                    ],
                ),
            )
        ],
    }
    sections = {heading: parts for heading, parts in sections.items() if parts}
    intro = [
        html_text(
            f"{arguments['dataset']}, {arguments['split']}, model {arguments['model']}, seed {arguments['seed']}: "
            f"{' and '.join(runs)} from one start, on the same batches.",
            "lead",
        ),
        html_links(sections),
    ]
    page = html_page(
        f"Run {folder.resolve().name}",
        *intro,
        *(html_section(heading, *parts) for heading, parts in sections.items()),
    )
    if "<svg" not in page:
        page = page.replace(
            "<nav>",
            html_text(
                "The plots need matplotlib: pip install matplotlib, then python evaluate.py "
                f"{folder} --report"
            )
            + "<nav>",
            1,
        )
    path = Path(path or folder / "report.html")
    write_atomic(path, page)
    return path


# ------------------------------------------------------------------------------------------------ the command


def parser():
    p = argparse.ArgumentParser(
        description="Metrics of finished runs, recomputed from their models, side by side with 95% intervals."
    )
    p.add_argument(
        "runs",
        nargs="*",
        metavar="RUN",
        help="folder of a loss (runs/NAME/gdrt), or of a run (runs/NAME): all its losses. Runs "
        "that differ in nothing but the seed are pooled; differences are to the first",
    )
    p.add_argument(
        "--predictions",
        metavar="FILE",
        nargs="+",
        default=[],
        help="ranked lists of other systems, JSON lines such as "
        '{"user": "196", "position": 54, "titles": [best first]}; position: the user\'s positives before the target',
    )
    p.add_argument(
        "--allow-missing",
        action="store_true",
        help="count windows without predictions as misses instead of refusing the file",
    )
    p.add_argument(
        "--dataset",
        help="what --predictions are for, where no RUN is given; --split and --min-rating as for gdrt.py",
    )
    p.add_argument(
        "--split",
        choices=("leave-one-out", "time"),
        default="leave-one-out",
        help=argparse.SUPPRESS,
    )
    p.add_argument("--min-rating", type=float, default=4.0, help=argparse.SUPPRESS)
    p.add_argument(
        "--report",
        nargs="?",
        const=True,
        metavar="FILE",
        help="write the run's page, to FILE or its report.html",
    )
    p.add_argument("--cache", metavar="DIR", help="where fetched data is kept, as for gdrt.py")
    p.add_argument(
        "--data-dir", metavar="PATH", help="folder or zip with MovieLens, as for gdrt.py"
    )
    return p


def losses_of(folder):
    """runs/NAME/LOSS -> itself; runs/NAME -> the folders of its finished losses, in the order they were trained."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(
            f"{folder}: no such run; give a folder that gdrt.py wrote, such as runs/NAME"
        )
    if (folder / "model").is_dir() or not (folder / "config.json").exists():
        return [folder]
    return [
        folder / loss
        for loss in read_json(folder / "config.json")["arguments"]["loss"]
        if (folder / loss / "metrics.json").exists()
    ] or [folder]


def main(argv=None):
    args = parser().parse_args(argv)
    limit_onednn_cache(args.cache)
    if not args.runs and not (args.predictions and args.dataset):
        raise InputError("name one RUN or more, or give --predictions FILE with --dataset")
    folders = [loss for folder in args.runs for loss in losses_of(folder)]
    if args.report and len({folder.resolve().parent for folder in folders}) != 1:
        raise InputError("--report: it is about one run; name one")
    runs = [evaluate_run(folder, args.cache, args.data_dir) for folder in folders]
    for run in runs:
        if (run["dataset"].digest, run["part"]) != (runs[0]["dataset"].digest, runs[0]["part"]):
            raise InputError(
                f"{run['folder']}: other data or windows than {runs[0]['folder']}; compare runs on the same split"
            )
    dataset = (
        runs[0]["dataset"]
        if runs
        else load_dataset(
            args.dataset, args.data_dir, args.cache, args.split, min_rating=args.min_rating
        )
    )
    part, pools = runs[0]["part"] if runs else "test", pool(runs)
    windows = getattr(dataset, part)
    for file in args.predictions:
        if Path(file).stem in pools:
            raise InputError(
                f"--predictions {file}: another column is named {Path(file).stem}; rename the file"
            )
        items, scores, missing = read_predictions(
            file, dataset, windows, allow_missing=args.allow_missing
        )
        metrics, per_window = list_metrics(dataset, windows, items, scores)
        pools[Path(file).stem] = [{"metrics": metrics, "per_window": per_window, "items": items}]
        for what, n in missing.items():
            if n:
                print(f"{file}: {n} {what}, counted as misses")
    for run in runs:
        moved = ", ".join(
            f"{name} {before:.4f} and now {now:.4f}" for name, (before, now) in run["moved"].items()
        )
        print(
            f"{run['folder']}: "
            + (
                f"training wrote other figures: {moved}"
                if moved
                else "metrics equal those that training wrote, to 1e-4"
            )
        )
    print(
        f"{len(windows)} {part} windows of {dataset.name}; [95% interval: users and seeds resampled]"
        + "; * difference without zero" * (len(pools) > 1)
    )
    print(format_table(*comparison(pools, dataset, windows)))
    print(NOTE)
    metrics = {name: [run["metrics"] for run in members] for name, members in pools.items()}
    for by in ("by user activity", "by item popularity"):
        print("\n" + format_table(*tercile_table(metrics, by)))
    if args.report:
        print(
            f"report: {write_report(folders[0].resolve().parent, None if args.report is True else args.report)}"
        )


if __name__ == "__main__":
    run_command(main)
