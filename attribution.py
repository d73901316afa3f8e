"""How much a target token owes to the auxiliary tokens and how much to the user: relevance, groups, attribution.

Read `segment_gradient` first: it is the method's measuring device; `relevance` averages it over windows, `cut_groups`
turns it into the groups of the objective, `token_attribution` opens one prompt token by token.

    symbol   paper / docs         here
    a        task, prefix         segments TEMPLATE and TITLE (auxiliary tokens)
    u        user interactions    segment USER
    A_S(t)   attribution          `segment_gradient`, `ablations`  (N,)
    r        relevance            `ratio`: |A_aux| / (|A_aux| + |A_user|), in [0, 1]
"""

import argparse
import contextlib
from collections import Counter

import numpy as np
import torch
import torch.autograd.forward_ad as forward_ad
from torch.overrides import TorchFunctionMode
from tqdm.auto import tqdm

from data import (
    TEMPLATE,
    TITLE,
    USER,
    InputError,
    Window,
    attention,
    build_tree,
    build_trees,
    by_length,
    by_shared_prefix,
    collate,
    legal_tokens,
    limit_onednn_cache,
    load_run,
    log_softmax_over,
    logits_at,
    run_command,
    target_logits,
    write_atomic,
)

AUXILIARY = (TEMPLATE, TITLE)
STEPS = 4  # points on the path; rank correlation of r with its limit, the ablation, where tokens have a choice: 0.74 at 2, 0.91 at 4; 0.97 at 4 on another warm-up
WINDOWS_PER_TITLE = 1  # at least: trees are taken whole, so most titles get more; r differs more between tokens than between windows


# ------------------------------------------------------------------------------------------------ two attributions


@contextlib.contextmanager
def forward_mode(model):
    """Evaluation mode, no gradient graph, and eager attention: the fused kernels have no forward-mode derivative."""
    training = model.training
    model.eval()
    try:
        with attention(model, "eager"), torch.no_grad():
            yield
    finally:
        model.train(training)


class FastForwardAD(TorchFunctionMode):
    """Forward mode through linear layers and softmax without PyTorch's detours: it takes a third matrix product, for the
    weight's zero tangent, and three more exponentials."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in (torch.nn.functional.linear, torch.nn.functional.softmax):
            x, tangent = forward_ad.unpack_dual(args[0])
            if tangent is not None and function is torch.nn.functional.linear:
                return forward_ad.make_dual(function(x, *args[1:]), function(tangent, args[1]))
            if tangent is not None:
                p = function(x, *args[1:], **kwargs)
                return forward_ad.make_dual(
                    p, p * (tangent - (p * tangent).sum(kwargs["dim"], keepdim=True))
                )
        return function(*args, **kwargs)


def path_ends(model, batch, segment):
    """(embeddings E, E - baseline on `segment`'s tokens and 0 elsewhere), both (B, T, D); baseline = mean embedding."""
    embedding = model.get_input_embeddings()
    E = embedding(batch.ids)  # (B, T, D)
    inside = torch.isin(batch.segment, torch.tensor(segment, device=E.device))  # (B, T)
    return E, (E - embedding.weight.mean(0)) * inside[..., None]


def label_log_prob(logits, label, legal=None):
    """log p of labels (N,) from logits (N, V): over the vocabulary, or over the tokens that data.legal_tokens lists."""
    if legal is None:
        return logits.log_softmax(-1).gather(-1, label[:, None])[:, 0]
    owner, token, chosen = legal
    return log_softmax_over(logits, owner, token)[chosen]


def log_prob_derivative(logits, tangent, label, legal=None):
    """d log p of labels (N,) for logits (N, V) moving along tangent (N, V): sum over v != y of p_v (dz_y - dz_v).

    The textbook form dz_y - sum_v p_v dz_v cancels to rounding noise where p_y is near 1; this one does not.
    """
    own = tangent.gather(-1, label[:, None])  # (N, 1)
    if legal is None:
        return (logits.softmax(-1) * (own - tangent)).sum(-1)  # the label's own term is 0
    owner, token, _ = legal
    p = log_softmax_over(logits, owner, token).exp()  # (C,)
    return torch.zeros_like(own[:, 0]).index_add(
        0, owner, p * (own[owner, 0] - tangent[owner, token])
    )


def segment_gradient(model, batch, segment, steps=STEPS, trie=None):
    """A_S of every target token, (N,) nats: the path integral of d log p / ds by the midpoint rule at `steps` points.

    The path moves the embeddings of S from the baseline (s = 0) to their values (s = 1), all else fixed. One forward-mode
    pass gives d log p / ds of EVERY target token; reverse mode would need one backward per token. With a trie, p is over the
    legal continuations.
    """
    E, delta = path_ends(model, batch, segment)
    legal, total = trie and legal_tokens(batch, trie), 0
    for j in range(steps):
        s = (j + 0.5) / steps
        with forward_ad.dual_level(), FastForwardAD():
            dual = target_logits(
                model, batch, embeds=forward_ad.make_dual(E - (1 - s) * delta, delta)
            )
            logits, tangent = forward_ad.unpack_dual(dual)  # (N, V) each
        total = total + log_prob_derivative(logits, tangent, batch.label, legal)
    return total / steps


def ablations(model, batch, segments, tries=(None,)):
    """log p - log p with a segment's embeddings at the baseline (Feature Ablation) -> (len(tries), len(segments), N) nats.

    The forwards are shared: one as it is and one a segment, whatever the number of softmaxes `tries` (None: over the vocabulary).
    """
    legal = [trie and legal_tokens(batch, trie) for trie in tries]

    def log_probs(embeds):
        logits = target_logits(model, batch, embeds)  # (N, V)
        return torch.stack(
            [label_log_prob(logits, batch.label, tokens) for tokens in legal]
        )  # (len(tries), N)

    own = log_probs(path_ends(model, batch, ())[0])
    ends = [path_ends(model, batch, segment) for segment in segments]
    return torch.stack([own - log_probs(E - delta) for E, delta in ends], dim=1)


def attributions(
    model, trees, method="gradient", tries=(None,), steps=STEPS, device="cpu", note="attribution"
):
    """(A_aux, A_user of each softmax in `tries`, item, step, window), each (N,) numpy, over all target tokens; scores in fp32."""
    segments = AUXILIARY, (USER,)

    def measure(batch):
        if method == "ablation":
            return ablations(model, batch, segments, tries).flatten(0, 1)
        return [
            segment_gradient(model, batch, segment, steps, trie)
            for trie in tries
            for segment in segments
        ]

    parts = []
    with forward_mode(model):
        for indices in tqdm(list(by_length(trees)), desc=note, disable=None, leave=False):
            batch = collate([trees[i] for i in indices], device)
            A = [a.cpu().double() for a in measure(batch)]
            parts.append([x.cpu().numpy() for x in (*A, batch.item, batch.place, batch.window)])
    return [np.concatenate(part) for part in zip(*parts)]


# ------------------------------------------------------------------------------------------------ relevance and groups


def ratio(aux, user):
    """r = |aux| / (|aux| + |user|), elementwise; 0/0 is 1: a token certain without the user."""
    aux, user = np.abs(aux), np.abs(user)
    return np.where(aux + user > 0, aux / np.where(aux + user > 0, aux + user, 1), 1.0)


def sample_windows(windows, per_title, seed):
    """A seeded sample with `per_title` windows or more of each target item, where it has them, in the order of `windows`.

    Trees are drawn at random and taken whole if a title in them is still wanted: their trunks are paid for once.
    """
    groups, taken, chosen = by_shared_prefix(windows), Counter(), []
    for g in np.random.default_rng(seed).permutation(len(groups)):
        targets = [windows[i].items[windows[i].stop] for i in groups[g]]
        if any(taken[target] < per_title for target in targets):
            taken.update(targets)
            chosen += groups[g]
    return [windows[i] for i in sorted(chosen)]


def mean_by_place(values, item, step, prompts):
    """Means of values (N,) of target tokens by title and place in it -> (items, L), NaN where there is none."""
    shape = (len(prompts.titles), prompts.trie.path.shape[1] - 1)
    total, count = np.zeros(shape), np.zeros(shape)
    np.add.at(total, (item, step), values)
    np.add.at(count, (item, step), 1)
    return np.where(count > 0, total / np.where(count > 0, count, 1), np.nan)


def relevance(model, prompts, windows, method="gradient", steps=STEPS, seed=0, device="cpu"):
    """Relevance of target tokens to their auxiliary tokens -> (items, L) in [0, 1], NaN where no window has the target.

    A property of (title, place in the title): the mean of r over a seeded sample of the training windows with that
    target (our choice). Attribution is of log p over LEGAL continuations (our choice): it asks what tells this title from
    others, not what tells the model to write a title at all, which the task's words do and which drowns the user. A token
    with one continuation has r = 1. method 'probability': p(y_t | a, y_<t) with the history empty, one prompt a title.
    """
    if method == "probability":
        targets = sorted({w.items[w.stop] for w in windows})
        trees = build_trees(prompts, [Window(i, (i,), 0, 0) for i in targets])
        parts = []
        with forward_mode(model):
            for indices in by_length(trees):
                batch = collate([trees[i] for i in indices], device)
                p = label_log_prob(
                    target_logits(model, batch), batch.label, legal_tokens(batch, prompts.trie)
                ).exp()
                parts.append([x.cpu().numpy() for x in (p.cpu().double(), batch.item, batch.place)])
        r, item, step = (np.concatenate(part) for part in zip(*parts))
    else:
        trees = build_trees(prompts, sample_windows(windows, WINDOWS_PER_TITLE, seed))
        aux, user, item, step, _ = attributions(
            model, trees, method, (prompts.trie,), steps, device, note=f"relevance ({method})"
        )
        r = ratio(aux, user)
    return mean_by_place(r, item, step, prompts)


def cut_groups(r, windows, n_groups):
    """Cut the target tokens of `windows` by relevance -> (group (items, L) int, -1 where r is NaN; cuts; shares).

    Group 0 is the least relevant. Groups hold equal shares of the training tokens as far as ties allow: equal r, equal
    group. cuts: the lowest r of each group. An empty group is an InputError.
    """
    times = np.bincount(
        [w.items[w.stop] for w in windows], minlength=len(r)
    )  # how often each title is a target
    known = ~np.isnan(r)
    values, index = np.unique(r[known], return_inverse=True)
    mass = np.bincount(index, weights=np.broadcast_to(times[:, None], r.shape)[known])
    if len(values) < n_groups:
        raise InputError(
            f"--groups {n_groups}: {len(values)} different relevances leave groups empty; use fewer groups"
        )
    size, large = mass.sum() / n_groups, mass < 0
    while (
        mass[~large] > size
    ).any():  # a tie that is too large for a group counts as a full one: the rest is cut evenly
        large = mass > size
        size = mass[~large].sum() / (n_groups - large.sum())
    weight = np.minimum(mass, size)
    middle = (
        np.cumsum(weight) - weight / 2
    ) / weight.sum()  # where each value's tokens lie in the sorted order
    place = np.minimum((middle * n_groups).astype(int), n_groups - 1)
    shares = np.bincount(place, weights=mass, minlength=n_groups) / mass.sum()
    if (shares == 0).any():
        raise InputError(
            f"--groups {n_groups}: ties in relevance leave group {int(np.argmin(shares))} empty; use fewer groups"
        )
    group = np.full(r.shape, -1)
    group[known] = place[index]
    return group, [float(values[place == g][0]) for g in range(n_groups)], shares.tolist()


# ------------------------------------------------------------------------------------------------ one prompt, token by token

PATH_STEPS = (
    128  # Gauss-Legendre points of the path; gap to completeness on toy: 3.98% at 64, 0.21% at 128
)
CHUNK = 16  # prompts forwarded at once


def token_attribution(
    model, tokenizer, prompts, window, method="gradient", steps=PATH_STEPS, device="cpu"
):
    """Attribution, in nats, of each target token of one prompt to each input token -> dict for the table and the page.

    'gradient': integrated gradients; all tokens but BOS move together from the mean embedding to their own, so a row of
    values sums to log p(prompt) - log p(baseline) up to `gap`, the error of the quadrature relative to that difference.
    'ablation': log p - log p with that one token at the baseline; a row need not sum to anything, and there is no gap.

    Keys: tokens [T], targets [N], log_prob [N], values [N][T], spans [{name, kind, start, end}], method, steps, gap.
    """
    tree = build_tree(prompts, [window], [0])
    one = collate([tree], device)
    N, T = len(one.label), one.ids.shape[1]

    def log_prob(embeds):  # (R, T, D) -> (R, N)
        R = len(embeds)
        row = torch.arange(R, device=device).repeat_interleave(N)
        logits = logits_at(
            model, row, one.predict_at.repeat(R), inputs_embeds=embeds, use_cache=False
        )
        return logits.float().log_softmax(-1).gather(-1, one.label.repeat(R)[:, None]).view(R, N)

    values, gap = torch.zeros(N, T, device=device), None
    with forward_mode(model):
        E, delta = path_ends(model, one, (TEMPLATE, USER, TITLE))  # (1, T, D)
        own = log_prob(E)  # (1, N)
        if method == "ablation":
            for inputs in torch.arange(T, device=device).split(CHUNK):
                without = E.repeat(len(inputs), 1, 1)
                without[torch.arange(len(inputs)), inputs] -= delta[0, inputs]
                values[:, inputs] = (own - log_prob(without)).T
        else:
            points, weights = (
                torch.tensor(x / 2, dtype=E.dtype, device=device)
                for x in np.polynomial.legendre.leggauss(steps)
            )
            for s, weight in zip((points + 0.5).split(CHUNK), weights.split(CHUNK)):
                embeds = (E - (1 - s)[:, None, None] * delta).detach().requires_grad_()  # (R, T, D)
                with torch.enable_grad():
                    terms = (weight @ log_prob(embeds)).unbind()  # N scalars
                for n in range(N):
                    (gradient,) = torch.autograd.grad(terms[n], embeds, retain_graph=n + 1 < N)
                    values[n] += (gradient * delta).sum((0, 2))
            change = (own - log_prob(E - delta))[0]
            gap = float((values.sum(1) - change).abs().sum() / change.abs().sum())
    names = tokenizer.batch_decode([[token] for token in tree.ids.tolist()])
    return {
        "tokens": names,
        "targets": tokenizer.batch_decode([[token] for token in tree.label.tolist()]),
        "log_prob": own[0].tolist(),
        "values": values.tolist(),
        "spans": prompt_spans(prompts, window, tree),
        "method": method,
        "steps": steps if method == "gradient" else None,
        "gap": gap,
    }


def prompt_spans(prompts, window, tree):
    """The prompt's parts in order: [{name, kind, start, end}], kind one of bos, template, user (an item each), title."""
    spans, at = [], 0

    def span(name, kind, length):
        nonlocal at
        if length:
            spans.append({"name": name, "kind": kind, "start": at, "end": at + length})
        at += length

    span("BOS", "bos", len(prompts.bos))
    span("task", "template", len(prompts.task))
    for item in window.items[window.start + tree.dropped : window.stop]:
        span(item, "user", len(prompts.titles[item]) + len(prompts.separator))
    span("response marker", "template", len(prompts.marker))
    span("title prefix", "title", len(tree.ids) - at)
    return spans


def span_sums(record):
    """(spans, N + 1) sums of a record's values over each span; the last column is over all target tokens."""
    values = np.array(record["values"])  # (N, T)
    sums = np.stack([values[:, s["start"] : s["end"]].sum(1) for s in record["spans"]])
    return np.concatenate([sums, sums.sum(1, keepdims=True)], 1)


# ------------------------------------------------------------------------------------------------ tables


def format_table(header, rows):
    """Plain text table: the first column to the left, the rest to the right."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[j]) for row in cells) for j in range(len(header))]
    lines = [
        "  ".join(
            cell.rjust(w) if j else cell.ljust(w) for j, (cell, w) in enumerate(zip(row, widths))
        ).rstrip()
        for row in cells
    ]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


# ------------------------------------------------------------------------------------------------ the command


def name_items(record, titles):
    """Give the history spans their titles."""
    for s in record["spans"]:
        if s["kind"] == "user":
            s["name"] = titles[s["name"]]
    return record


def choose_window(dataset, user=None, title=None):
    """The user's last test window (default: the first test user's), its target replaced by `title` where given."""
    windows = [w for w in dataset.test if user is None or dataset.users[w.user] == user]
    if not windows:
        raise InputError(
            f"--user {user}: no test window of this user; users are such as {', '.join(dataset.users[:5])}"
        )
    window = windows[0] if user is None else windows[-1]
    if title is None:
        return window
    if title not in dataset.titles:
        near = [t for t in dataset.titles if title.lower() in t.lower()][:5]
        raise InputError(
            f"--title {title}: not in the catalogue"
            + (f"; did you mean {' | '.join(near)}?" if near else "")
        )
    return window._replace(items=window.items[: window.stop] + (dataset.titles.index(title),))


def parser():
    p = argparse.ArgumentParser(
        description="Attribution of a title's tokens to each token of one user's prompt."
    )
    p.add_argument("run", help="a loss's folder in a run, such as runs/ml-100k-tiny-seed0/gdrt")
    p.add_argument("--user", help="id of a test user as in the data (default: the first)")
    p.add_argument("--title", help="title to explain (default: what the user chose)")
    p.add_argument(
        "--method",
        choices=("gradient", "ablation"),
        default="gradient",
        help="integrated gradients, or one token at a time replaced by the mean embedding",
    )
    p.add_argument(
        "--steps",
        type=int,
        default=PATH_STEPS,
        help=f"points of the gradient's path (default: {PATH_STEPS})",
    )
    p.add_argument("--html", metavar="FILE", help="write a page with the tokens shaded")
    p.add_argument("--cache", metavar="DIR", help="where fetched data is kept, as for gdrt.py")
    p.add_argument(
        "--data-dir", metavar="PATH", help="folder or zip with MovieLens, as for gdrt.py"
    )
    return p


def main(argv=None):
    args = parser().parse_args(argv)
    limit_onednn_cache(args.cache)
    if args.steps < 1:
        raise InputError(f"--steps {args.steps}: one point or more is needed")
    _, dataset, model, tokenizer, prompts = load_run(args.run, args.cache, args.data_dir)
    window = choose_window(dataset, args.user, args.title)
    record = name_items(
        token_attribution(model, tokenizer, prompts, window, args.method, args.steps),
        dataset.titles,
    )
    sums, whole = span_sums(record), [s["kind"] for s in record["spans"]]
    rows = [(s["name"], *(f"{x:+.2f}" for x in row)) for s, row in zip(record["spans"], sums)]
    for name, kinds in (("auxiliary", ("template", "title")), ("user", ("user",))):
        rows.append(
            (f"= {name}", *(f"{x:+.2f}" for x in sums[[kind in kinds for kind in whole]].sum(0)))
        )
    rows.append(
        ("log p", *(f"{x:.2f}" for x in record["log_prob"]), f"{sum(record['log_prob']):.2f}")
    )
    print(
        f"user {dataset.users[window.user]}, title {dataset.titles[window.items[window.stop]]}: attribution by {args.method} in nats"
    )
    print(
        format_table(
            ("part of the prompt", *(t.strip() or repr(t) for t in record["targets"]), "all"), rows
        )
    )
    if record["gap"] is not None:
        print(f"gap to completeness {record['gap']:.2%} at {args.steps} points")
    if args.html:
        from report import PAGE

        title = (
            f"{dataset.titles[window.items[window.stop]]}, for user {dataset.users[window.user]}"
        )
        write_atomic(args.html, PAGE.render(title=title, record=record))
        print(f"page: {args.html}")


if __name__ == "__main__":
    run_command(main)
