"""How good a recommender is: exact ranking, accuracy, fairness, and where the model looks.

Above the ruler is what we measure, by definition. Below it, `rank` runs the same search in
batches, `evaluate_parts` and `audit` put a model through all of it, `interval` says how sure we
are, and the command compares finished runs.
"""

import heapq

import numpy as np
import torch

from data import InputError, build_tree

GROUPS = 5  # popularity groups of MGU and DGU, of equally many titles


@torch.no_grad()
def rank_by_definition(model, prompts, window, k=10):
    """The k best titles that are new to the user (our choice) -> [(item, score)], best first.

    A title's score is the log-probability of its tokens, EOS included, after the window's prompt,
    each normalised over the legal continuations: the tokens that some title has after this prefix.
    Scores only fall along a path of the trie. So when the best entry of the heap is a whole title,
    no other can beat it: the list is exact, and there is no beam width. model: in eval mode.
    """
    trie = prompts.trie
    prompt = build_tree(prompts, [window], [0], targets=False).ids.tolist()
    queue = [(0.0, 0, [])]  # a heap of (-score, node of the trie, its prefix); node 0 is the root
    best = []
    while queue and len(best) < k:
        cost, node, prefix = heapq.heappop(queue)
        item = int(trie.item[node])  # -1 within a title
        if item >= 0:
            if item not in window.items[: window.stop]:
                best.append((item, -cost))
            continue
        children = trie.child[trie.first[node] : trie.first[node + 1]]
        legal = trie.token[children].tolist()
        logits = model(torch.tensor([prompt + prefix], device=model.device)).logits[0, -1]  # (V,)
        log_p = logits[legal].log_softmax(-1).tolist()
        for child, token, value in zip(children.tolist(), legal, log_p):
            heapq.heappush(queue, (cost - value, child, prefix + [token]))
    return best


def accuracy(items, scores, targets, ks=(5, 10)):
    """HR, NDCG and MRR of each window -> {"NDCG@10": (n,), ...}; the metrics are their means.

    items (n, K): ranked lists, -1 where one ends early; scores (n, K); targets (n,). Titles with
    equal scores share their mean rank, as far as the list goes. At rank <= k: HR 1, NDCG
    1/log2(rank + 1), MRR 1/rank; else 0. NaN scores are an InputError.
    """
    if np.isnan(scores).any():
        raise InputError("the ranking's scores hold NaN; was the training stable?")
    hit = items == np.asarray(targets)[:, None]  # (n, K)
    own = np.where(hit, scores, -np.inf).max(1, keepdims=True)  # (n, 1) the target's score
    better = ((items >= 0) & (scores > own)).sum(1)
    equal = ((items >= 0) & (scores == own)).sum(1)
    rank = np.where(hit.any(1), better + (equal + 1) / 2, np.inf)  # (n,)
    gains = {"HR": np.ones(len(rank)), "NDCG": 1 / np.log2(rank + 1), "MRR": 1 / rank}
    found = {}
    for k in ks:
        for name, gain in gains.items():
            found[f"{name}@{k}"] = np.where(rank <= k, gain, 0.0)
    return found


def fairness(GP, GH):
    """(MGU, DGU) over the last axis (..., G): MGU = mean |GU|, DGU = max GU - min GU, GU = GP - GH.

    GP: each group's share of the top-K lists; GH: its share of the training positives (Jiang et
    al., WWW 2024). MGU is at most 2 / G: compare it only at equal G.
    """
    GU = GP - GH
    return np.abs(GU).mean(-1), GU.max(-1) - GU.min(-1)


def auxiliary_share(aux, user):
    """sum |A_aux| / sum(|A_aux| + |A_user|) over target tokens, attributions (N,); None for 0/0."""
    aux = np.abs(aux).sum()
    user = np.abs(user).sum()
    return float(aux / (aux + user)) if aux + user > 0 else None


# ---------------------------------------------------------------- below: plumbing

import argparse
import functools
import json
import math
import operator
import textwrap
from pathlib import Path
from typing import NamedTuple

from tqdm.auto import tqdm

from attribution import attributions, both_log_probs, format_table, has_derivative
from data import (
    DOMAINS,
    Window,
    additive_mask,
    build_trees,
    by_shared_prefix,
    collate,
    flat_ranges,
    hide_bar,
    load_dataset,
    load_run,
    log_softmax_over,
    logits_at,
    normalize_text,
    read_config,
    read_json,
    run_command,
    set_environment,
    share_out,
    shown_part,
    take_columns,
    target_logits,
    whole_cache,
    write_atomic,
)

# ---------------------------------------------------------------- the same search, batched


class RadixTrie(NamedTuple):
    """The title trie with only the R nodes where titles branch or end. Node 0 is the root.

    An edge is the chain of tokens from one such node to the next.
    """

    parent: torch.Tensor  # (R,) the root's is itself
    edge: torch.Tensor  # (R, E) tokens of the edge that leads to the node, zero-padded
    length: torch.Tensor  # (R,) number of these tokens
    depth: torch.Tensor  # (R,) number of tokens from the root to here
    item: torch.Tensor  # (R,) item whose title ends here, with EOS; -1 where titles branch
    first: torch.Tensor  # (R + 1,) the children of node m are first[m] .. first[m + 1] - 1


def compress(trie, device="cpu"):
    """Trie -> RadixTrie, numbered breadth first, so that the children of a node are neighbours."""
    children = np.split(trie.child, trie.first[1:-1])
    ends = [0]  # node of the trie at which each edge ends; the loop reads it while it grows
    edges = [[]]
    parent = [0]
    depth = [0]
    first = []
    for node, end in enumerate(ends):
        first.append(len(ends))
        for child in children[end]:
            edge = [trie.token[child]]
            while len(children[child]) == 1:
                child = children[child][0]
                edge.append(trie.token[child])
            ends.append(child)
            edges.append(edge)
            parent.append(node)
            depth.append(depth[node] + len(edge))
    first.append(len(ends))
    length = [len(edge) for edge in edges]
    padded = np.zeros((len(edges), max(length)), dtype=np.int64)
    for row, edge in zip(padded, edges):
        row[: len(edge)] = edge
    columns = parent, padded, length, depth, trie.item[ends], first
    return RadixTrie(*(torch.as_tensor(np.array(column), device=device) for column in columns))


class Ranking(NamedTuple):
    """Ranked lists of n windows, and the NLL of their targets, for which one forward serves.

    NLLs are in nats, of the target's tokens up to EOS; NaN beyond.
    """

    items: np.ndarray  # (n, k) best first, -1 where the catalogue has no more
    scores: np.ndarray  # (n, k) sum of token log-probabilities, -inf beyond
    forwarded: np.ndarray  # (n,) number of prefixes that the search forwarded
    nll: np.ndarray  # (n, L) over the vocabulary
    legal_nll: np.ndarray  # (n, L) over legal continuations


def no_ranking(n, k, length):
    """The Ranking of n windows before anything is found."""
    return Ranking(
        items=np.full((n, k), -1),
        scores=np.full((n, k), -np.inf),
        forwarded=np.zeros(n, dtype=np.int64),
        nll=np.full((n, length), np.nan),
        legal_nll=np.full((n, length), np.nan),
    )


@torch.no_grad()
def rank(
    model,
    prompts,
    windows,
    k=10,
    softmax="trie",
    keep_seen=False,
    width=8,
    rows=32,
    device="cpu",
    seen=None,
):
    """The exact top k titles for each window by sum of token log-probabilities -> Ranking.

    It lists what rank_by_definition lists, for about `rows` windows at once; neighbours that share
    a prefix share a tree. Each round forwards the `width` best open prefixes of each window, which
    is done when none of them beats its k-th best complete title: the list is exact for any width.
    Seen titles compete as prefixes and are dropped when complete, unless keep_seen. seen: a tuple
    of items for each window, by default the user's positives before the target. softmax: over legal
    continuations ('trie') or the vocabulary ('full'). NaN is an InputError.
    """
    radix = compress(prompts.trie, device)
    trees = build_trees(prompts, windows)
    if keep_seen:
        seen = [()] * len(windows)
    elif seen is None:
        seen = [window.items[: window.stop] for window in windows]
    n_listed = min(k, len(prompts.titles))
    found = no_ranking(len(windows), k, prompts.trie.path.shape[1] - 1)
    reader_of = CachedPrompts if prompts.packed else SeparatePrompts
    model.eval()
    batches = list(by_windows(trees, rows))
    for indices in tqdm(batches, desc="rank", disable=hide_bar(), leave=False):
        batch = collate([trees[i] for i in indices], device)
        reader = reader_of(model, batch, radix, softmax)
        legal, full = both_log_probs(reader.logits.float(), batch, prompts.trie)  # (N,) each
        window = batch.window.cpu().numpy()
        place = batch.place.cpu().numpy()
        found.nll[window, place] = -full
        found.legal_nll[window, place] = -legal

        first = batch.place == 0  # each window's first target token: there its search begins
        chosen = batch.window[first].tolist()  # B windows
        allowed = unseen_titles(radix, [seen[i] for i in chosen])
        items, scores, count = best_titles(reader, reader.logits[first], allowed, n_listed, width)
        found.items[chosen, :n_listed] = items
        found.scores[chosen, :n_listed] = scores
        found.forwarded[chosen] = count
    return found


def rank_by_all(model, prompts, windows, k=10, seen=None, **options):
    """`rank`, with a user's windows side by side, so that they share trees, and split over ranks.

    Under torchrun all ranks must call it, and all get the same Ranking, in the order of `windows`.
    options: those of `rank`.
    """
    order = np.array(sorted(range(len(windows)), key=lambda i: windows[i].user))
    by_user = [windows[i] for i in order]
    pieces = [order[group] for group in by_shared_prefix(by_user)]

    def rank_some(pieces):
        indices = np.concatenate(pieces)
        some = [windows[i] for i in indices]
        own = None if seen is None else [seen[i] for i in indices]
        return indices, *rank(model, prompts, some, k, seen=own, **options)

    indices, *found = share_out(rank_some, pieces)
    back = np.argsort(indices)
    return Ranking(*(values[back] for values in found))


def by_windows(trees, rows):
    """Indices of trees in batches of at most `rows` windows, or of one tree; short trees first."""
    batch = []
    size = 0
    for i in sorted(range(len(trees)), key=lambda i: len(trees[i].ids)):
        more = len(set(trees[i].window))
        if batch and size + more > rows:
            yield batch
            batch = []
            size = 0
        batch.append(i)
        size += more
    yield batch


def unseen_titles(radix, seen):
    """(B, R) bool: the nodes whose titles may be listed for users who have seen these items."""
    allowed = (radix.item >= 0).repeat(len(seen), 1)
    for row, items in zip(allowed, seen):
        items = torch.tensor(items, dtype=torch.long, device=radix.item.device)
        row &= ~torch.isin(radix.item, items)
    return allowed


def best_titles(reader, logits, allowed, k, width):
    """The k best allowed titles of B prompts -> (items, scores (B, k), edges read (B,)), numpy."""
    score, count = search(reader, logits, allowed, k, width)
    best, node = score.topk(k, dim=1)  # (B, k)
    items = torch.where(best > -torch.inf, reader.radix.item[node], -1)
    return items.cpu().numpy(), best.cpu().double().numpy(), count.cpu().numpy()


def search(reader, logits, allowed, k, width):
    """Best-first search for B prompts -> (scores of titles (B, R), number of edges read (B,)).

    logits (B, V): after the prompts, which `reader` has read. allowed: (B, R). The k best allowed
    titles have their exact scores; a title that is not allowed or was not reached has -inf.

    score[b, m] is the log-probability of the path to node m: exact once the edge to m is read, an
    upper bound before. Under 'trie' it is exact at once, since the rest of an edge is certain.
    """
    B, R = allowed.shape
    radix = reader.radix
    softmax = reader.softmax
    feed = reader.feed
    leaf = radix.item >= 0
    openable = feed > 0  # (R,) reading the edge to this node tells something
    result = torch.full((B, R), -torch.inf, device=leaf.device)
    count = torch.zeros(B, dtype=torch.long, device=leaf.device)
    alive = torch.arange(B, device=leaf.device)  # prompts that are still searched
    read = torch.zeros_like(allowed)  # whether the edge to each node has been read
    read[:, 0] = True
    score = result.clone()
    score[:, 0] = 0
    add_children(score, alive, torch.zeros_like(alive), logits, radix, softmax)
    while True:
        final = torch.where(allowed & leaf & (read | ~openable), score, -torch.inf)  # (B, R)
        pick, useful = best_open(score, openable & ~read, final, k, width)  # (B, W) each
        active = useful.any(1)
        if active.sum() <= len(alive) // 2:  # half of them are done: drop those
            result[alive[~active]] = final[~active]
            if not active.any():
                return result, count
            alive = alive[active]
            score = score[active]
            read = read[active]
            allowed = allowed[active]
            pick = pick[active]
            useful = useful[active]
            reader.keep(active)

        row, place = useful.nonzero(as_tuple=True)
        node = pick[row, place]  # (n,)
        count.index_add_(0, alive[row], torch.ones_like(row))
        logits = reader.forward(row, node)  # (tokens read, V)
        if softmax == "full":
            logits = add_rest_of_edges(score, row, node, logits, radix, feed)  # (n, V)
        read[row, node] = True
        inner = ~leaf[node]
        add_children(score, row[inner], node[inner], logits[inner], radix, softmax)


def best_open(score, unread, final, k, width):
    """The best unread edges of each prompt (B, W), and which beat its k-th best title (B, W)."""
    if torch.isnan(score).any():
        raise InputError("the model's scores hold NaN; was the training stable?")
    kth = final.topk(k, dim=1).values[:, -1:]  # (B, 1)
    best = torch.where(unread, score, -torch.inf).topk(min(width, score.shape[1]), dim=1)
    return best.indices, best.values > kth


def tokens_to_read(radix, softmax):
    """How many tokens of each edge the search forwards, (R,): never EOS, which nothing follows.

    Under 'trie' an edge that completes a title is not read at all: its first token has been scored,
    and the rest is certain.
    """
    leaf = radix.item >= 0
    feed = radix.length - leaf.long()
    return torch.where(leaf, 0, feed) if softmax == "trie" else feed


def add_children(score, row, node, logits, radix, softmax):
    """Score the children of each node (n,) of a prompt `row` (n,) by the logits (n, V) after it.

    A child's score is its parent's plus the log-probability of the first token of its edge.
    """
    owner, offset = flat_ranges(radix.first[node + 1] - radix.first[node])  # (children,)
    child = radix.first[node][owner] + offset
    token = radix.edge[child, 0]
    if softmax == "full":
        value = logits.float().log_softmax(-1)[owner, token]
    else:
        value = log_softmax_over(logits, owner, token)
    score[row[owner], child] = score[row, node][owner] + value


def add_rest_of_edges(score, row, node, logits, radix, feed):
    """Add each edge's tokens after the first to the scores -> logits (n, V) at the edges' ends.

    logits (M, V): after each of the M tokens that were read, which predicts the edge's next one.
    """
    owner, offset = flat_ranges(feed[node])  # (M,)
    edge = node[owner]  # (M,)
    inner = offset + 1 < radix.length[edge]  # whether the edge goes on after this token
    following = radix.edge[edge[inner], offset[inner] + 1]
    log_p = logits[inner].float().log_softmax(-1)
    value = log_p.gather(-1, following[:, None])[:, 0]
    score.index_put_((row[owner[inner]], edge[inner]), value, accumulate=True)
    return logits[offset == feed[edge] - 1]


class EdgeTokens(NamedTuple):
    """The M tokens of some edges, one edge after another in S new columns of their rows."""

    ids: torch.Tensor  # (B, S) zero-padded
    position: torch.Tensor  # (B, S)
    node: torch.Tensor  # (B, S) node that the token's edge leads to, -1 where padded
    row: torch.Tensor  # (M,)
    column: torch.Tensor  # (M,)
    last: torch.Tensor  # (M,) bool: the last token of its edge


def prompt_columns(batch):
    """Which tree each of a batch's B prompts is in, and where -> (row (B,), columns (B, P)).

    The columns of a prompt are the path from the root to its last marker token, then -1.
    """
    first = batch.place == 0
    row = batch.row[first]
    end = batch.predict_at[first]
    if batch.mask is None:
        on_path = torch.arange(batch.ids.shape[1], device=row.device) <= end[:, None]  # (B, T)
    else:
        on_path = batch.mask[row, 0, end] == 0
    # A stable sort puts the columns on the path first and leaves them in order.
    column = on_path.sort(dim=1, descending=True, stable=True).indices  # (B, T)
    length = on_path.sum(1)  # (B,)
    inside = torch.arange(column.shape[1], device=row.device) < length[:, None]
    return row, torch.where(inside, column, -1)[:, : int(length.max())]


class CachedPrompts:
    """B prompts in a KV cache that is only appended to; edges are forwarded as their branches.

    A token of an edge sees its prompt, the path to the node above and its own edge so far. The
    cache holds P columns of prompts, then C of edges. logits (N, V): of the batch's target tokens.
    """

    def __init__(self, model, batch, radix, softmax):
        self.model = model
        self.radix = radix
        self.softmax = softmax
        self.feed = tokens_to_read(radix, softmax)
        self.cache = whole_cache(model)
        self.logits = target_logits(model, batch, cache=self.cache)
        row, column = prompt_columns(batch)  # (B,), (B, P)
        self.prompt = column >= 0  # (B, P) whether a column is the prompt's, not padding
        self.start = self.prompt.sum(1)  # (B,) position of a title's first token
        take_columns(self.cache, row, column)
        B = len(row)
        # The edge column of the last token on the way to each node; -1 where it is not read.
        self.slot = torch.full((B, len(radix.parent)), -1, device=row.device)  # (B, R)
        # Whether an edge column sees another: those of its ancestors and itself.
        self.sees = torch.zeros((B, 0, 0), dtype=torch.bool, device=row.device)  # (B, C, C)

    def keep(self, active):
        """Drop the prompts that are not active (B,)."""
        self.start = self.start[active]
        self.prompt = self.prompt[active]
        self.slot = self.slot[active]
        self.sees = self.sees[active]
        self.cache.batch_select_indices(active.nonzero()[:, 0])

    def lay_out(self, row, node):
        """The edges to the nodes (n,), as EdgeTokens in the rows of their prompts `row` (n,)."""
        length = self.feed[node]
        total = torch.zeros_like(self.start).index_add(0, row, length)  # (B,) new tokens of a row
        before_edge = length.cumsum(0) - length  # (n,) new tokens in all edges before this one
        before_row = total.cumsum(0) - total  # (B,) new tokens in all rows before this one
        first = before_edge - before_row[row]  # (n,) the edge's first column in its row
        owner, offset = flat_ranges(length)  # (M,)
        column = first[owner] + offset
        last = offset == length[owner] - 1
        row = row[owner]
        node = node[owner]
        ids = torch.zeros((len(total), int(total.max())), dtype=torch.long, device=row.device)
        position = torch.zeros_like(ids)
        edge = torch.full_like(ids, -1)
        ids[row, column] = self.radix.edge[node, offset]
        above = self.radix.depth[self.radix.parent[node]]
        position[row, column] = self.start[row] + above + offset
        edge[row, column] = node
        return EdgeTokens(ids, position, edge, row, column, last)

    def mask(self, tokens):
        """Additive mask (B, 1, S, P + C + S) of new tokens, which join the columns of edges."""
        B, C = self.sees.shape[:2]
        S = tokens.ids.shape[1]
        row = tokens.row
        column = tokens.column
        last = tokens.last
        node = tokens.node[row, column]  # (M,)
        above = self.slot[row, self.radix.parent[node]]
        below = above >= 0  # the other edges start at the root and see their prompt alone
        path = torch.zeros((B, S, C), dtype=torch.bool, device=row.device)
        path[row[below], column[below]] = self.sees[row[below], above[below]]
        same_edge = tokens.node[:, :, None] == tokens.node[:, None, :]
        new = torch.cat([path, same_edge.tril()], dim=2)  # (B, S, C + S)
        self.sees = torch.cat([torch.nn.functional.pad(self.sees, (0, S)), new], dim=1)
        self.slot[row[last], node[last]] = C + column[last]
        prompt = self.prompt[:, None].expand(-1, S, -1)
        return additive_mask(torch.cat([prompt, new], dim=2)[:, None])

    def forward(self, row, node):
        """Logits after the last token of each edge to `node` (n,), under 'full' after every token.

        row: (n,) their prompts, in ascending order.
        """
        tokens = self.lay_out(row, node)
        inputs = {"input_ids": tokens.ids, "position_ids": tokens.position}
        inputs |= {"attention_mask": self.mask(tokens), "cache": self.cache, "use_cache": True}
        read = tokens.last | (self.softmax == "full")
        return logits_at(self.model, tokens.row[read], tokens.column[read], **inputs)


class SeparatePrompts:
    """The same for models that ignore a mask: each edge is forwarded after its whole prompt."""

    def __init__(self, model, batch, radix, softmax):
        self.model = model
        self.radix = radix
        self.softmax = softmax
        self.feed = tokens_to_read(radix, softmax)
        self.logits = target_logits(model, batch)
        first = batch.place == 0
        ends = zip(batch.row[first].tolist(), batch.predict_at[first].tolist())
        self.prompts = [batch.ids[row, : end + 1] for row, end in ends]

    def keep(self, active):
        self.prompts = [prompt for prompt, kept in zip(self.prompts, active) if kept]

    def sequence(self, row, node):
        """One prompt with the path to the node and the edge that leads to it."""
        parts = [self.radix.edge[node, : self.feed[node]]]
        while node := int(self.radix.parent[node]):
            parts.append(self.radix.edge[node, : self.radix.length[node]])
        return torch.cat([self.prompts[row], *reversed(parts)])

    def forward(self, row, node):
        length = self.feed[node]
        sequences = [self.sequence(*pair) for pair in zip(row.tolist(), node.tolist())]
        before = torch.tensor([len(ids) for ids in sequences], device=row.device) - length
        owner, offset = flat_ranges(length)
        read = offset >= (0 if self.softmax == "full" else length[owner] - 1)
        column = before[owner] + offset
        # The padding stands at the end, where no token sees it.
        ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)
        return logits_at(self.model, owner[read], column[read], input_ids=ids, use_cache=False)


# ---------------------------------------------------------------- metrics of ranked lists


def popularity_groups(count, titles, n_groups=GROUPS):
    """(names, membership (items, G)): groups of equally many items by count, ties by title."""
    order = sorted(range(len(titles)), key=lambda i: (count[i], titles[i]))
    group = np.empty(len(titles), dtype=int)
    group[order] = np.arange(len(titles)) * n_groups // len(titles)
    inner = [str(g) for g in range(2, n_groups)]
    return ["1 least popular", *inner, f"{n_groups} most popular"], np.eye(n_groups)[group]


def listed_groups(items, member):
    """How much of each group a list holds: items (..., K), membership (items, G) -> (..., G)."""
    nothing = np.zeros((1, member.shape[1]))  # the last row, to which item -1 points
    return np.concatenate([member, nothing])[items].sum(-2)


def proportions(amounts):
    """(..., G) amounts -> shares of their sum; 0 where there is nothing."""
    total = amounts.sum(-1, keepdims=True)
    return amounts / np.where(total > 0, total, 1)


NOTE = (
    "MGU depends on the number of groups: the group differences sum to at most 2, so with G groups "
    "MGU is at most 2/G, and splitting groups lowers it. Compare it only between runs with the "
    "same groups; MGU times G/2, the share of the lists that stands in the wrong group, never "
    "falls when groups are split. DGU is at most 2 for any number."
)


def training_positives(dataset):
    """(P, 2) pairs of user and item: the targets of training windows and all positives before them.

    A pair counts once, however many windows have it in their history: a user's windows are views of
    one tuple, and the last of them reaches furthest.
    """
    last = {(w.user, id(w.items)): w for w in dataset.train}
    pairs = {(w.user, item) for w in last.values() for item in w.items[: w.stop + 1]}
    return np.array(sorted(pairs))


def genre_groups(genres):
    """(names, membership (items, G)): an item of n genres counts 1/n in each of them."""
    names = sorted({name for kinds in genres for name in kinds})
    member = np.zeros((len(genres), len(names)))
    for row, kinds in zip(member, genres):
        for name in kinds:
            row[names.index(name)] += 1 / len(kinds)
    return names, member


def item_groups(dataset):
    """{"": popularity groups, "genre ": genres}, each (names, membership (items, G), GH (G,)).

    GH: the groups' shares of the training positives, with which `fairness` compares the lists.
    """
    count = np.bincount(training_positives(dataset)[:, 1], minlength=len(dataset.titles))
    kinds = {"": popularity_groups(count, dataset.titles)}
    if any(dataset.genres):
        kinds["genre "] = genre_groups(dataset.genres)
    return {
        kind: (names, member, proportions(count @ member))
        for kind, (names, member) in kinds.items()
    }


def by_tercile(count, per_window):
    """Accuracy on windows of low, middle and high count (n,), a third each up to ties (our choice).

    -> {"tail" | "middle" | "head": {"n", "from", "to" (counts), and the means of per_window}}
    """
    tercile = np.searchsorted(np.quantile(count, (1 / 3, 2 / 3)), count)  # (n,) in 0, 1, 2
    found = {}
    for i, name in enumerate(("tail", "middle", "head")):
        inside = tercile == i
        if inside.any():
            some = count[inside]
            found[name] = {"n": len(some), "from": int(some.min()), "to": int(some.max())}
            found[name] |= {key: float(x[inside].mean()) for key, x in per_window.items()}
    return found


def list_metrics(dataset, windows, items, scores, ks=(5, 10)):
    """All metrics of ranked lists: items, scores (n, K) -> (metrics, {"NDCG@10": (n,), ...})."""
    targets = np.array([w.items[w.stop] for w in windows])
    per_window = accuracy(items, scores, targets, ks)
    metrics = {name: float(values.mean()) for name, values in per_window.items()}
    for kind, (names, member, GH) in item_groups(dataset).items():
        shares = {"groups": names, "GH": GH.tolist()}
        metrics[f"{kind}exposure"] = shares
        for k in ks:
            GP = proportions(listed_groups(items[:, :k], member).sum(0))
            shares[f"GP@{k}"] = GP.tolist()
            MGU, DGU = fairness(GP, GH)
            metrics[f"{kind}MGU@{k}"] = float(MGU)
            metrics[f"{kind}DGU@{k}"] = float(DGU)
    for k in ks:
        metrics[f"coverage@{k}"] = len(np.setdiff1d(items[:, :k], [-1])) / len(dataset.titles)
    users, positives = training_positives(dataset).T
    activity = np.bincount(users, minlength=len(dataset.users))[[w.user for w in windows]]
    popularity = np.bincount(positives, minlength=len(dataset.titles))[targets]
    metrics["by user activity"] = by_tercile(activity, per_window)
    metrics["by item popularity"] = by_tercile(popularity, per_window)
    return metrics, per_window


def popularity_lists(dataset, windows, k, keep_seen=False):
    """The popularity baseline -> (items (n, k), scores (n, k), which count training positives)."""
    count = np.bincount(training_positives(dataset)[:, 1], minlength=len(dataset.titles))
    order = np.array(sorted(range(len(count)), key=lambda i: (-count[i], dataset.titles[i])))
    items = np.full((len(windows), k), -1)
    for row, window in zip(items, windows):
        seen = () if keep_seen else window.items[: window.stop]
        best = order[: k + len(seen)]
        best = best[~np.isin(best, seen)][:k]
        row[: len(best)] = best
    return items, np.where(items >= 0, count[items].astype(float), -np.inf)


# ---------------------------------------------------------------- held-out likelihood and audit


def by_group(values, group, n_groups):
    """Mean of values (N,) in each group (N,), None if it is empty; group -1 is left out."""
    members = [values[group == g] for g in range(n_groups)]
    return [float(some.mean()) if len(some) else None for some in members]


def shuffle_histories(windows, seed):
    """Each window with its own target and the history of another user's window.

    It shows what personal information is worth. Every history is used once. The users are put in a
    seeded order with their windows side by side, and each history moves on by as many places as any
    user has windows: to another user, unless one has more than half of all windows.
    """
    users, count = np.unique([w.user for w in windows], return_counts=True)
    place = {user: i for i, user in enumerate(np.random.default_rng(seed).permutation(users))}
    order = sorted(range(len(windows)), key=lambda i: place[windows[i].user])
    partner = dict(zip(order, np.roll(order, count.max())))
    shuffled = []
    for i, window in enumerate(windows):
        other = windows[partner[i]]
        history = other.items[other.start : other.stop]
        items = history + (window.items[window.stop],)
        shuffled.append(Window(window.user, items, 0, len(history)))
    return shuffled


def auxiliary_shares(aux, user, place, group, n_groups):
    """The auxiliary shares that the audit reports: of all tokens, of the first, by place and group.

    aux, user: attributions (N,); place: in the title (N,); group: (N,), or None without groups.
    """

    def share_of(inside):
        return auxiliary_share(aux[inside], user[inside])

    places = range(min(8, place.max() + 1))
    found = {
        "auxiliary share": auxiliary_share(aux, user),
        "auxiliary share first": share_of(place == 0),
        "by position": [share_of(place == j) for j in places],
    }
    if group is not None:
        found["by group"] = [share_of(group == g) for g in range(n_groups)]
    return found


AUDITED = 60  # windows, at most, that the audit reads: its shares are then certain to about 0.022
GRADIENT_EVERY = 10  # one of so many is read by gradient, which costs as much as 25 forwards


def audit(model, prompts, windows, group, n_groups, ndcg, seed=0, device="cpu", **options):
    """The bias audit on a sample of `windows` -> dict.

    ndcg: (n,) NDCG@10 of each window with its own history. group: (items, L) or None. options: of
    `rank`, softmax and keep_seen.
    It holds the auxiliary shares by each method (see `shares_by_method`), the NDCG@10 that is lost
    when histories are shuffled between users, and the number of windows.
    """
    chosen = sorted(np.random.default_rng(seed).permutation(len(windows))[:AUDITED].tolist())
    windows = [windows[i] for i in chosen]
    shares = shares_by_method(model, prompts, windows, group, n_groups, device)
    shuffled = shuffled_ndcg(model, prompts, windows, seed, device=device, **options)  # (n,)
    lost = ndcg[chosen] - shuffled
    result = {"windows": len(windows)} | shares
    return result | {"NDCG@10 lost by shuffled histories": float(lost.mean())}


def shares_by_method(model, prompts, windows, group, n_groups, device="cpu"):
    """{method: auxiliary_shares} of the windows' target tokens.

    'ablation' has the softmax over the vocabulary, 'legal ablation' over legal continuations.
    'gradient' is on one window in GRADIENT_EVERY, since it costs most, and is left out where the
    model has no forward-mode derivative.
    """

    def measure(windows, method, softmaxes=(None,)):
        trees = build_trees(prompts, windows)
        note = f"audit ({method})"
        return attributions(model, trees, method, softmaxes, device=device, note=note)

    softmaxes = None, prompts.trie
    aux, user, legal_aux, legal_user, *token = measure(windows, "ablation", softmaxes)
    measured = {
        "ablation": (aux, user, *token),
        "legal ablation": (legal_aux, legal_user, *token),
    }
    if has_derivative(model, prompts, windows, device):
        measured["gradient"] = measure(windows[::GRADIENT_EVERY], "gradient")
    shares = {}
    for method, (aux, user, item, place, _) in measured.items():
        of_token = None if group is None else group[item, place]
        shares[method] = auxiliary_shares(aux, user, place, of_token, n_groups)
    return shares


def shuffled_ndcg(model, prompts, windows, seed=0, **options):
    """NDCG@10 (n,) of the windows with other users' histories, but their own seen titles left out.

    options: those of `rank`.
    """
    shuffled = shuffle_histories(windows, seed)
    seen = [w.items[: w.stop] for w in windows]
    ranking = rank_by_all(model, prompts, shuffled, 10, seen, **options)
    targets = [w.items[w.stop] for w in windows]
    return accuracy(ranking.items, ranking.scores, targets)["NDCG@10"]


def evaluate_parts(model, prompts, dataset, parts, group, n_groups, **options):
    """All that a table shows of a model -> {name: (metrics, {name: (n,)}, Ranking)}.

    parts: {name: windows}; group: (items, L) or None; options: softmax, keep_seen and device of
    `rank`. All parts are ranked at once: a user's validation and test windows share most of their
    history, which is then read once. Under torchrun all ranks must call it, and all get the whole
    result.
    """
    windows = [window for part in parts.values() for window in part]
    ranking = rank_by_all(model, prompts, windows, **options)
    found = {}
    start = 0
    for name, part in parts.items():
        stop = start + len(part)
        own = Ranking(*(values[start:stop] for values in ranking))
        metrics, per_window = list_metrics(dataset, part, own.items, own.scores)
        likelihood, per_title = likelihood_metrics(part, own, group, n_groups)
        found[name] = metrics | likelihood, per_window | per_title, own
        start = stop
    return found


def likelihood_metrics(windows, ranking, group, n_groups):
    """Held-out likelihood in nats a title, and by group a token -> (metrics, {name: (n,)})."""
    metrics = {}
    per_window = {}
    for name, nll in (("NLL", ranking.nll), ("legal NLL", ranking.legal_nll)):
        per_window[name] = np.nansum(nll, axis=1)
        metrics[name] = float(per_window[name].mean())
    if group is not None:
        token = ~np.isnan(ranking.nll)  # (n, L)
        of_token = group[[w.items[w.stop] for w in windows], : token.shape[1]][token]
        metrics["group NLL"] = by_group(ranking.nll[token], of_token, n_groups)
        metrics["group legal NLL"] = by_group(ranking.legal_nll[token], of_token, n_groups)
        known = [x for x in metrics["group NLL"] if x is not None]
        metrics["worst group NLL"] = max(known, default=None)
    return metrics, per_window


# ---------------------------------------------------------------- comparison

DRAWS = 2000  # of the bootstrap: an interval's end is then certain to about 3% of its width
# Student's t at 97.5%, by degrees of freedom; the last one serves for more.
T975 = (np.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


@functools.lru_cache(maxsize=8)
def draws(n_users, seed):
    """How often each draw of the bootstrap takes each user: (DRAWS, U)."""
    random = np.random.default_rng(seed)
    return random.multinomial(n_users, np.full(n_users, 1 / n_users), DRAWS).astype(float)


def sums_by_user(values, users):
    """values (S, n, ...) of n windows and their users (n,) -> (sums (S, U, ...), windows (U,)).

    Users are numbered by their first windows, so that the draws do not depend on their names.
    """
    number = {user: i for i, user in enumerate(dict.fromkeys(users))}
    index = np.array([number[user] for user in users])
    sums = np.zeros((len(number), len(values), *values.shape[2:]))
    np.add.at(sums, index, values.swapaxes(0, 1))
    return sums.swapaxes(0, 1), np.bincount(index)


def resample(sums, windows, statistic=None, seed=0):
    """Bootstrap of a mean over windows: sums (S, U) or (S, U, G) by seed and user -> (DRAWS,).

    windows: (U,) how many each user has. A draw takes as many users as there are, with replacement
    and with all their windows, and the mean of the seeds. statistic: function of the means
    (DRAWS, S, G) -> (DRAWS, S). The same number of users gives the same draws, so two calls are
    paired.
    """
    users = draws(sums.shape[1], seed)  # (DRAWS, U)
    total = np.expand_dims(users @ windows, tuple(range(1, sums.ndim)))  # (DRAWS, 1, ...)
    mean = np.tensordot(users, sums, (1, 1)) / total  # (DRAWS, S, ...)
    if statistic:
        mean = statistic(mean)
    return mean.mean(1)


def seed_half_width(by_seed):
    """Half of the 95% interval of a mean of values by seed (S,): Student's t; 0 for one seed."""
    S = len(by_seed)
    if S == 1:
        return 0.0
    return T975[min(S, len(T975)) - 1] * np.std(by_seed, ddof=1) / math.sqrt(S)


def ends_of(drawn, half):
    """(low, high) of a 95% interval: percentiles of draws of users, widened by the seeds' half.

    The two are added in quadrature, on either side (our choice). A bootstrap of seeds would be
    simpler, but of three seeds it holds the truth in 75% of samples where they decide, not in 95%.
    """
    low, high = np.percentile(drawn, (2.5, 97.5))
    middle = drawn.mean()
    below = np.hypot(middle - low, half)
    above = np.hypot(high - middle, half)
    return float(middle - below), float(middle + above)


def interval(values, users, statistic=None, against=None):
    """(value, low, high): the mean over seeds and windows with its 95% interval by `ends_of`.

    values, against: (S, n), or (S, n, G) with a statistic, on the same windows; users: (n,).
    against: the interval is that of values - against. Runs of equally many seeds are paired seed by
    seed.

    A statistic, such as MGU, is a size, which chance inflates: once in `value`, twice in the draws.
    So its interval is the basic bootstrap's, which removes both and may lie below `value`; in a
    difference they cancel. In simulations it held the true MGU in 82% (exactly fair lists) to 95%
    (unfair lists) of samples, percentiles of the draws in 0% to 96%.
    """

    def points(values):
        mean = values.mean(1)[None]  # (1, S, ...)
        return (statistic(mean) if statistic else mean)[0]  # (S,)

    by_seed = points(values)
    value = float(by_seed.mean())
    drawn = resample(*sums_by_user(values, users), statistic)
    half = seed_half_width(by_seed)
    if against is not None:
        other = points(against)
        value -= float(other.mean())
        drawn = drawn - resample(*sums_by_user(against, users), statistic)
        if len(other) == len(by_seed):
            half = seed_half_width(by_seed - other)
        else:
            half = np.hypot(half, seed_half_width(other))
    low, high = ends_of(drawn, half)
    if statistic and against is None:
        return value, max(0.0, 2 * value - high), max(0.0, 2 * value - low)
    return value, low, high


def in_brackets(value, low, high, sign=""):
    """'0.0810 [0.0720, 0.0899]'; a difference (sign='+') has a star where zero lies outside."""
    star = "*" if sign and (low > 0 or high < 0) else ""
    return f"{value:{sign}.4f} [{low:{sign}.4f}, {high:{sign}.4f}]{star}"


def evaluate_run(folder, cache=None, data_dir=None, dataset=None):
    """Metrics of a finished run, recomputed from its model/ -> dict.

    dataset: where the data is now, if it has moved since.

    Keys: loss, folder, config, dataset, part, metrics, per_window, items, moved. The last one is
    {metric: (as training wrote it, now)} for the numbers that differ by 1e-4 or more; lists by
    group are not compared.
    """
    folder = Path(folder)
    config, dataset, model, _, prompts = load_run(folder, cache, data_dir, dataset)
    arguments = config["arguments"]
    group = np.array(read_json(folder.parent / "groups.json", "group")["group"])
    part = shown_part(arguments)
    # Both parts at once, as after training: equal batches round equally, so the figures agree.
    parts = {"valid": dataset.valid} | ({} if arguments["no_test"] else {"test": dataset.test})
    options = {"softmax": arguments["rank_softmax"], "keep_seen": arguments["keep_seen"]}
    found = evaluate_parts(model, prompts, dataset, parts, group, arguments["groups"], **options)
    metrics, per_window, ranking = found[part]
    written = read_json(folder / "metrics.json").get(part, {})
    moved = {}
    for name, now in metrics.items():
        before = written.get(name, math.nan)
        if isinstance(now, float) and not abs(before - now) < 1e-4:
            moved[name] = before, now
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
    """Results of evaluate_run -> {name: [those that differ in nothing but the seed]}.

    A pool's name gives its loss, the arguments that differ between pools, and its seeds. Losses
    keep the order in which they were given.
    """
    found = {}
    for run in sorted(runs, key=lambda run: run["config"]["arguments"]["seed"]):
        setting = dict(run["config"]["arguments"])
        for name in ("device", "precision"):  # what auto stood for
            setting[name] = run["config"].get(name, setting.get(name))
        for name in ("seed", "loss", "dataset"):  # the data is the same, wherever it lay
            del setting[name]
        found.setdefault((run["loss"], json.dumps(setting)), []).append(run)
    settings = [json.loads(text) for _, text in found]
    differ = []
    for key in dict.fromkeys(key for setting in settings for key in setting):
        if any(setting.get(key) != settings[0].get(key) for setting in settings):
            differ.append(key)
    losses = [run["loss"] for run in runs]
    named = {}
    for loss, text in sorted(found, key=lambda entry: losses.index(entry[0])):
        members = found[loss, text]
        setting = json.loads(text)
        seeds = [run["config"]["arguments"]["seed"] for run in members]
        if len(set(seeds)) < len(seeds):
            raise InputError(
                f"{members[0]['folder']}: two runs of one configuration and seed; "
                "name each run once"
            )
        words = [loss, *(f"{key}={setting.get(key)}" for key in differ)]
        words += ["seeds" if len(seeds) > 1 else "seed", ",".join(map(str, seeds))]
        named[" ".join(words)] = members
    return named


MEANS = "HR@5", "NDCG@5", "MRR@5", "HR@10", "NDCG@10", "MRR@10", "NLL", "legal NLL"


def sampled(dataset, members):
    """The metrics that have an interval: {metric: (values (S, n) or (S, n, G), statistic or None)}.

    Coverage has none: a draw that takes some users twice and others never covers less.
    """
    found = {}
    for name in MEANS:
        if name in members[0]["per_window"]:
            found[name] = np.stack([run["per_window"][name] for run in members]), None
    items = np.stack([run["items"] for run in members])  # (S, n, K)

    def unfairness(mean, GH, which):
        return fairness(proportions(mean), GH)[which]

    for kind, (_, member, GH) in item_groups(dataset).items():
        for k in (5, 10):
            listed = listed_groups(items[..., :k], member)  # (S, n, G)
            for which, name in enumerate(("MGU", "DGU")):
                statistic = functools.partial(unfairness, GH=GH, which=which)
                found[f"{kind}{name}@{k}"] = listed, statistic
    return found


def comparison(pools, dataset, windows):
    """(header, rows): a row for each metric; a column for each pool, then for each one's difference
    from the first; with 95% intervals."""
    users = np.array([w.user for w in windows])
    first, *others = pools
    found = {name: sampled(dataset, members) for name, members in pools.items()}

    def own(metric, name):
        if metric in found[name]:
            values, statistic = found[name][metric]
            return in_brackets(*interval(values, users, statistic))
        known = [run["metrics"].get(metric) for run in pools[name]]
        known = [value for value in known if value is not None]
        return f"{np.mean(known):.4f}" if known else ""

    def difference(metric, name):
        if metric not in found[name] or metric not in found[first]:
            return ""
        values, statistic = found[name][metric]
        against, _ = found[first][metric]
        return in_brackets(*interval(values, users, statistic, against), "+")

    rows = []
    for metric in (*found[first], "coverage@5", "coverage@10", "worst group NLL"):
        cells = [own(metric, name) for name in pools]
        rows.append((metric, *cells, *(difference(metric, name) for name in others)))
    return ("", *pools, *(f"{name} less {first}" for name in others)), rows


def listed_ndcg(line):
    """NDCG@10 of a line of predictions.jsonl."""
    if line["target"] not in line["titles"]:
        return 0.0
    wrong = [[title != line["target"] for title in line["titles"]]]
    return accuracy(np.array(wrong, dtype=int), np.array([line["scores"]]), [0])["NDCG@10"][0]


MEASURES = {  # of a line of predictions.jsonl
    "NDCG@10": listed_ndcg,
    "title NLL over legal continuations": operator.itemgetter("legal NLL"),
    "title NLL over the vocabulary": operator.itemgetter("NLL"),
}


def paired_intervals(lines, base):
    """What lines of predictions.jsonl have over those of `base` -> {measure: (value, low, high)}.

    The 95% interval is over users. InputError unless both are of the same windows in one order.
    """
    users = [line["user"] for line in base]
    if [line["user"] for line in lines] != users:
        raise InputError("predictions.jsonl: not of the windows of SFT's; train the run again")
    found = {}
    for name, measure in MEASURES.items():
        ours = np.array([list(map(measure, lines))])  # (1, n)
        theirs = np.array([list(map(measure, base))])  # (1, n)
        found[name] = interval(ours, users, against=theirs)
    return found


def read_logs(folder, losses):
    """{name: lines of predictions.jsonl} of a run's losses; one without test windows has none."""
    logs = {}
    for loss in losses:
        path = Path(folder) / loss / "predictions.jsonl"
        if path.exists():
            logs[loss_name(loss)] = [line for _, line in read_lines(path)]
    return logs


def differences(logs):
    """What each loss of one run has over SFT -> {name: paired_intervals}; {} without SFT."""
    if "SFT" not in logs:
        return {}
    rest = {name: lines for name, lines in logs.items() if name != "SFT"}
    return {name: paired_intervals(lines, logs["SFT"]) for name, lines in rest.items()}


# ---------------------------------------------------------------- predictions


def write_predictions(path, dataset, windows, ranking, per_window):
    """Write a line for each window: user, position, its history (also titles too old for the model
    to read), the target, the titles listed, their scores, and the target's NLLs."""
    lines = []
    for i, w in enumerate(windows):
        kept = ranking.items[i] >= 0
        line = {
            "user": dataset.users[w.user],
            "position": w.stop,
            "history": [dataset.titles[j] for j in w.items[w.start : w.stop]],
            "target": dataset.titles[w.items[w.stop]],
            "titles": [dataset.titles[j] for j in ranking.items[i][kept]],
            "scores": ranking.scores[i][kept].tolist(),
            "NLL": per_window["NLL"][i],
            "legal NLL": per_window["legal NLL"][i],
        }
        lines.append(json.dumps(line, ensure_ascii=False))
    write_atomic(path, "\n".join(lines) + "\n")


def read_lines(path):
    """JSONL file -> [(line number, value)]. An absent, empty or broken file is an InputError."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; give a JSONL file") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8 text; give a JSONL file") from None
    found = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            found.append((number, json.loads(line)))
        except (ValueError, RecursionError):
            raise InputError(
                f"{path}:{number}: not JSON; every line should be one object"
            ) from None
    if not found:
        raise InputError(f"{path}: holds no line; every test window needs one")
    return found


def windows_by_key(dataset, windows):
    """{(user, position): indices of windows}; with the position None, all of the user's."""
    by_key = {}
    for i, w in enumerate(windows):
        by_key.setdefault((dataset.users[w.user], w.stop), []).append(i)
        by_key.setdefault((dataset.users[w.user], None), []).append(i)
    return by_key


def find_window(line, place, dataset, windows, by_key, taken):
    """The index of the window that a line is for: the first that matches and is not `taken`.

    by_key: see windows_by_key. place: the file and line number that a message names.
    """
    user = str(line["user"])
    position = line.get("position")
    name = normalize_text(f"user {user}, position {position}")
    if not isinstance(position, (int, type(None))) or (user, position) not in by_key:
        raise InputError(
            f"{place}: {name} is none of the {len(windows)} windows to rank of {dataset.name}; "
            "predict the same split, and the part that the run was evaluated on"
        )
    some = by_key[user, position]
    if position is None and len(some) > 1:
        raise InputError(
            f"{place}: {normalize_text(f'user {user}')} has several windows to rank; "
            'say which by "position"'
        )
    target = line.get("target")
    if target is not None:
        some = [i for i in some if dataset.titles[windows[i].items[windows[i].stop]] == target]
    if not some:
        raise InputError(
            f"{place}: {name} has another target than {target!r}; predict the same split"
        )
    left = [i for i in some if i not in taken]
    if not left:
        raise InputError(f"{place}: {name} is there twice; leave one line")
    return left[0]


def check_list(titles, scores, place, dataset, known):
    """Raise an InputError where a line's titles or their scores are not a ranked list."""
    for title in titles:
        if not isinstance(title, str) or title not in known:
            raise InputError(
                f"{place}: {title!r} is no title of {dataset.name}; "
                "spell titles as its predictions.jsonl does"
            )
    if len(set(titles)) < len(titles):
        twice = max(titles, key=titles.count)
        raise InputError(f"{place}: {twice!r} is listed twice; list each title once")
    finite = isinstance(scores, list) and len(scores) == len(titles)
    finite = finite and all(type(x) in (int, float) and abs(x) < 1e300 for x in scores)
    if not finite:
        raise InputError(
            f"{place}: scores should be {len(titles)} finite numbers, one a title; NaN is no score"
        )
    if any(a < b for a, b in zip(scores, scores[1:])):
        raise InputError(f"{place}: scores rise along the list; put the best title first")


def read_predictions(path, dataset, windows, k=10, allow_missing=False):
    """Ranked lists of any system -> (items (n, K), scores (n, K), {what is missing: how often}).

    K is k, or more where further titles share the k-th score, so that nobody gains by giving all
    titles one score. Anything wrong is an InputError.

    A line: {"user": "196", "position": 54, "titles": [best first]} and, if wanted, "scores"
    (falling) and "target" (which is checked). position: how many positives the user has before the
    target; not needed where the user has one window. Where several windows share user and position
    (CSV folders), "target" tells them apart, or else their order.
    """
    known = {title: i for i, title in enumerate(dataset.titles)}
    by_key = windows_by_key(dataset, windows)
    lists = {}  # window -> (items, scores)
    for number, line in read_lines(path):
        place = f"{path}:{number}"
        named = isinstance(line, dict) and "user" in line
        if not named or not isinstance(line.get("titles"), list):
            raise InputError(
                f'{place}: should be an object with "user", "position" and a list "titles"'
            )
        i = find_window(line, place, dataset, windows, by_key, lists)
        titles = line["titles"]
        scores = line.get("scores", [-float(j) for j in range(len(titles))])
        check_list(titles, scores, place, dataset, known)
        n = len(titles)
        if n > k:  # the k best and those that equal the k-th
            n = sum(score >= scores[k - 1] for score in scores)
        lists[i] = [known[title] for title in titles[:n]], scores[:n]
    items, scores = lists_as_arrays(lists, len(windows), k)
    without = len(windows) - len(lists)
    short = count_short(lists, windows, len(known), k)
    if (without or short) and not allow_missing:
        raise InputError(
            f"{path}: of {len(windows)} windows {without} have no list, and "
            f"{short} lists have under {k} titles; complete them or add --allow-missing"
        )
    missing = {"windows without a list": without, f"lists under {k} titles": short}
    return items, scores, missing


def count_short(lists, windows, n_titles, k):
    """How many of the lists have neither k titles nor all that the user has not seen."""
    short = 0
    for i, (row, _) in lists.items():
        unseen = n_titles - len(set(windows[i].items[: windows[i].stop]))
        short += len(row) < min(k, unseen)
    return short


def lists_as_arrays(lists, n, k):
    """{window: (items, scores)} -> items (n, K), -1 beyond a list, scores (n, K), -inf; K >= k."""
    longest = max(len(row) for row, _ in lists.values())
    items = np.full((n, max(k, longest)), -1)
    scores = np.full(items.shape, -np.inf)
    for i, (row, given) in lists.items():
        items[i, : len(row)] = row
        scores[i, : len(row)] = given
    return items, scores


# ---------------------------------------------------------------- tables

COLUMNS = "HR@5", "NDCG@5", "HR@10", "NDCG@10", "MGU@5", "DGU@5", "coverage@10"
BEFORE = "before fine-tuning"
TERCILES = "by user activity", "by item popularity"


def loss_name(loss):
    return {"sft": "SFT", "gdrt": "GDRT"}.get(loss, loss)


def fmt(x, digits=3):
    return "" if x is None else f"{x:.{digits}f}"


def result_table(folder, losses):
    """(header, rows): popularity, before fine-tuning and each loss, at most 100 columns wide.

    On test windows, or on validation where the run has --no-test. aux share: over legal
    continuations, so that the tokens that only spell a title have no part in it. Seconds: warm-up,
    training and, except for SFT, relevance.
    """
    runs = {loss: read_json(Path(folder) / loss / "metrics.json") for loss in losses}
    some = runs[losses[0]]
    part = "test" if "test" in some else "valid"

    def row(name, metrics, audit, seconds):
        numbers = [fmt(metrics[column], 4) for column in COLUMNS]
        share = audit["legal ablation"]["auxiliary share"] if audit else None
        return (name, *numbers, fmt(share), fmt(seconds, 0))

    baselines = some["baselines"]
    rows = [
        row("popularity", baselines["popularity"][part], None, None),
        row(BEFORE, baselines["before"][part], some["audit"]["before"], None),
    ]
    for loss, result in runs.items():
        time = result["time"]
        seconds = time["warm-up"] + time["train"] + (0 if loss == "sft" else time["relevance"])
        rows.append(row(loss_name(loss), result[part], result["audit"]["after"], seconds))
    return (part, *COLUMNS, "aux share", "seconds"), rows


def group_table(groups, models):
    """(header, rows): a row for each group of groups.json, with its NLL in each of `models`.

    models: {name: metrics}.
    """
    rows = []
    for g, (share, cut) in enumerate(zip(groups["shares"], groups["cuts"])):
        nlls = [fmt(metrics["group NLL"][g]) for metrics in models.values()]
        rows.append((g, fmt(share), fmt(cut), *nlls))
    return ("group", "share of tokens", "relevance from", *models), rows


def audit_table(audits):
    """(header, rows) of {name: audit}. The ratio auxiliary : user restates the first share."""
    header = (
        "",
        "aux share, ablation",
        "aux : user",
        "first tokens",
        "over legal tokens",
        "first tokens",
        "aux share, gradient",
        "first tokens",
        "NDCG@10 lost, histories shuffled",
    )
    rows = []
    for name, audit in audits.items():
        shares = []
        for method in ("ablation", "legal ablation", "gradient"):
            found = audit.get(method, {})  # some models have no gradient
            shares.append(fmt(found.get("auxiliary share")))
            shares.append(fmt(found.get("auxiliary share first")))
        share = audit["ablation"]["auxiliary share"]
        ratio = f"{share / (1 - share):.2f} : 1" if share < 1 else "all"
        lost = fmt(audit["NDCG@10 lost by shuffled histories"], 4)
        rows.append((name, shares[0], ratio, *shares[1:], lost))
    return header, rows


def tercile_table(models, by):
    """(header, rows) of what by_tercile found: a row for each tercile of the windows.

    models: {name: [metrics of each seed]}; by: one of TERCILES.
    """
    rows = []
    first = next(iter(models.values()))[0]  # cut like all others, which have the same windows
    for name, some in first[by].items():
        means = []
        for seeds in models.values():
            means.append(fmt(np.mean([metrics[by][name]["NDCG@10"] for metrics in seeds]), 4))
        rows.append((name, f"{some['from']} to {some['to']}", some["n"], *means))
    return (by, "training positives", "n", *models), rows


def print_table(header, rows):
    """Print a table; if it is too wide, in several tables, each with the first column."""
    width = 100
    widths = [max(map(len, map(str, column))) for column in zip(header, *rows)]
    blocks = []
    used = width  # so that the second column opens a block
    for j in range(1, len(header)):
        used += 2 + widths[j]
        if used > width:
            blocks.append([0])
            used = widths[0] + 2 + widths[j]
        blocks[-1].append(j)
    for block in blocks:
        pick = operator.itemgetter(*block)
        print(format_table(pick(header), [pick(row) for row in rows]) + "\n")


# ---------------------------------------------------------------- the command


def parser():
    p = argparse.ArgumentParser(
        description="Metrics of finished runs, recomputed from their models, side by side with 95% "
        "intervals."
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
        help='ranked lists of other systems, JSON lines such as {"user": "196", "position": 54, '
        '"titles": [best first]}; position: the user\'s positives before the target',
    )
    p.add_argument(
        "--allow-missing",
        action="store_true",
        help="count windows without predictions as misses instead of refusing the file",
    )
    p.add_argument(
        "--report",
        nargs="?",
        const=True,
        metavar="FILE",
        help="write the run's page to FILE (default: report.html in the run's folder)",
    )
    data_flags(p.add_argument)
    return p


def data_flags(add):
    add(
        "--dataset",
        help="where the RUN's data is now, if it has moved; without a RUN, the data that "
        "--predictions are for",
    )
    add(
        "--split",
        choices=("leave-one-out", "time"),
        help="how --dataset is split, without a RUN (default: leave-one-out)",
    )
    add(
        "--min-rating",
        type=float,
        metavar="R",
        help="ratings of --dataset from R up are positives, without a RUN (default: 4)",
    )
    add(
        "--domain",
        choices=tuple(DOMAINS),
        help="what the items of --dataset are, without a RUN; titles of movies are written "
        "'The Matrix', not 'Matrix, The' (default: what the files or their names say)",
    )
    add("--cache", metavar="DIR", help="where fetched data is kept, as for gdrt.py")
    add("--data-dir", metavar="PATH", help="folder or zip with MovieLens, as for gdrt.py")


def losses_of(folder):
    """runs/NAME/LOSS -> itself; runs/NAME -> its finished losses' folders, in order of training."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(
            f"{folder}: no such run; give a folder that gdrt.py wrote, such as runs/NAME"
        )
    if (folder / "model").is_dir() or not (folder / "config.json").exists():
        return [folder]
    losses = read_config(folder)["arguments"]["loss"]
    finished = [folder / loss for loss in losses if (folder / loss / "metrics.json").exists()]
    return finished or [folder]


def evaluate_runs(folders, args):
    """Results of evaluate_run; runs that are not on the same windows are an InputError."""
    places = args.cache, args.data_dir, args.dataset
    runs = [evaluate_run(folder, *places) for folder in folders]
    for run in runs:
        if (run["dataset"].digest, run["part"]) != (runs[0]["dataset"].digest, runs[0]["part"]):
            raise InputError(
                f"{run['folder']}: other data or windows than {runs[0]['folder']}; "
                "compare runs on the same split"
            )
    return runs


def add_predictions(pools, args, dataset, windows):
    """Add a pool to `pools` for each file of --predictions."""
    for file in args.predictions:
        name = Path(file).stem
        if name in pools:
            raise InputError(
                f"--predictions {file}: another column is named {name}; rename the file"
            )
        items, scores, missing = read_predictions(
            file, dataset, windows, allow_missing=args.allow_missing
        )
        metrics, per_window = list_metrics(dataset, windows, items, scores)
        pools[name] = [{"metrics": metrics, "per_window": per_window, "items": items}]
        for what, n in missing.items():
            if n:
                print(f"{file}: {n} {what}, counted as misses")


def print_moved(run):
    """Say whether the metrics found now are those that training wrote."""
    moved = []
    for name, (before, now) in run["moved"].items():
        moved.append(f"{name} {before:.4f} and now {now:.4f}")
    if moved:
        print(f"{run['folder']}: training wrote other figures: {', '.join(moved)}")
    else:
        print(f"{run['folder']}: metrics equal those that training wrote, to 1e-4")


def main(argv=None):
    args = parser().parse_args(argv)
    set_environment(args.cache)
    if not args.runs and not (args.predictions and args.dataset):
        raise InputError("name one RUN or more, or give --predictions FILE with --dataset")
    if args.runs and (args.split or args.min_rating is not None or args.domain):
        raise InputError("--split, --min-rating, --domain: a RUN has its own; leave them out")
    folders = [loss for folder in args.runs for loss in losses_of(folder)]
    if args.report and len({folder.resolve().parent for folder in folders}) != 1:
        raise InputError("--report: it is about one run; name one")
    runs = evaluate_runs(folders, args)
    if runs:
        dataset = runs[0]["dataset"]
        part = runs[0]["part"]
    else:
        dataset = load_dataset(
            args.dataset,
            args.data_dir,
            args.cache,
            split=args.split or "leave-one-out",
            min_rating=4.0 if args.min_rating is None else args.min_rating,
            domain=args.domain,
        )
        part = "test"
    windows = getattr(dataset, part)
    pools = pool(runs)
    add_predictions(pools, args, dataset, windows)
    for run in runs:
        print_moved(run)
    star = "; * difference without zero" if len(pools) > 1 else ""
    intervals = f"[95% interval over users and seeds]{star}"
    print(f"{len(windows)} {part} windows of {dataset.name}; {intervals}")
    print_table(*comparison(pools, dataset, windows))
    print(textwrap.fill(NOTE, 100) + "\n")
    metrics = {}
    for name, members in pools.items():
        metrics[name] = [run["metrics"] for run in members]
    for by in TERCILES:
        print_table(*tercile_table(metrics, by))
    if args.report:
        from report import write_report

        file = None if args.report is True else args.report
        print(f"report: {write_report(folders[0].resolve().parent, file)}")


if __name__ == "__main__":
    run_command(main)
