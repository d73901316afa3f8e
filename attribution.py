"""How much target tokens owe to the auxiliary tokens and to the user; groups of similar relevance.

The auxiliary tokens of a target token are the task, the marker and the title's own prefix.

    symbol   meaning                 here
    S        aux or user tokens      segments (TEMPLATE, TITLE) or (USER,)
    A_S      attribution, nats       `segment_gradient`  (N,), N target tokens in a batch
    r        relevance, in [0, 1]    `ratio`: (|A_aux| + c) / (|A_aux| + |A_user| + c)
"""

import numpy as np
import torch
import torch.autograd.forward_ad as forward_ad

from data import TEMPLATE, TITLE, USER, InputError, build_trees, legal_tokens, target_logits

AUXILIARY = (TEMPLATE, TITLE)
POINTS = 4  # of the path; the rank correlation of r with its limit is 0.74 at 2 points, 0.91 at 4
FLOOR = 0.5  # c, nats: without it a token that is all but certain divides two tiny numbers


def path_ends(model, batch, segment):
    """Embeddings E, and E - baseline on the segment's tokens but 0 elsewhere; (B, T, D) each.

    The baseline is the mean of what the embedding layer returns over its vocabulary.
    """
    embedding = model.get_input_embeddings()
    E = embedding(batch.ids)  # (B, T, D)
    inside = torch.isin(batch.segment, torch.tensor(segment, device=E.device))  # (B, T)
    return E, (E - mean_embedding(embedding)) * inside[..., None]  # (B, T, D)


def segment_gradient(model, batch, segment, points=POINTS, trie=None):
    """A_S of every target token in nats, (N,): the integral of d log p / ds by the midpoint rule.

    The path moves the embeddings of S from the baseline (s = 0) to their own values (s = 1), all
    else fixed. One forward-mode pass gives d log p / ds of EVERY target token; reverse mode would
    need one backward per token. With a trie, p is over legal continuations.
    """
    E, delta = path_ends(model, batch, segment)
    legal = None if trie is None else legal_tokens(batch, trie)
    total = 0
    for j in range(points):
        s = (j + 0.5) / points
        with forward_ad.dual_level(), FastForwardAD():
            dual = forward_ad.make_dual(E - (1 - s) * delta, delta)  # (E at s, dE / ds)
            logits, tangent = forward_ad.unpack_dual(target_logits(model, batch, embeds=dual))
        total = total + log_prob_derivative(logits, tangent, batch.label, legal)  # (N,)
    return total / points


def ratio(aux, user, floor=FLOOR):
    """r = (|A_aux| + c) / (|A_aux| + |A_user| + c), elementwise (the floor c is our choice).

    Over toy's tokens with a choice, c raises the rank correlation of two seeds from 0.04 to 0.17.
    """
    aux = np.abs(aux) + floor
    return aux / (aux + np.abs(user))


def token_relevance(model, batch, method="gradient", points=POINTS, trie=None):
    """Relevance r (N,) of every target token of a batch, which holds trees or is a `plain_batch`.

    method: "ablation" compares the ends of the path; "probability" is r = p(token) with an empty
    history. With a trie, p is over legal continuations, else over the vocabulary.
    """
    check_targets(model, batch, trie)
    with scoring(model):
        if method == "probability":
            return prior_probability(model, batch, trie)
        aux, user = segment_attributions(model, batch, method, (trie,), points)  # (N,), (N,)
    return ratio(aux.cpu().double().numpy(), user.cpu().double().numpy())


def relevance(model, prompts, windows, method="gradient", points=POINTS, seed=0, device="cpu"):
    """Relevance of target tokens to auxiliary tokens -> (items, L tokens), NaN if not measured.

    One value per (title, place), our choice: the mean of r over a seeded sample of the windows with
    that title as target. p is over LEGAL continuations: over the vocabulary r of ALL toy tokens is
    no sign of taste (AUC 0.51). r = 1 if no other token is legal, or if p > 0.99 without a user.
    """
    sample = without_history(windows) if method == "probability" else sample_windows(windows, seed)

    def measure(batch):
        return [token_relevance(model, batch, method, points, prompts.trie)]

    trees = build_trees(prompts, sample)
    r, item, place, _ = of_all_targets(measure, model, trees, device, f"relevance ({method})")
    r = prior = mean_by_place(r, item, place, prompts)
    if method != "probability":
        prior = relevance(model, prompts, windows, "probability", device=device)
    return np.where(prior > 0.99, 1, r)


def cut(r, times, n_groups):
    """Cut tokens by relevance r into groups of equal share -> (group, cuts, shares).

    r, times (how often a token is trained on) and group are of one shape. Group 0 is the least
    relevant, -1 is r = NaN. Equal r share a group; none may be empty. cuts: each group's lowest r.
    """
    known = ~np.isnan(r)
    values, index = np.unique(r[known], return_inverse=True)
    mass = np.bincount(index, weights=times[known])  # how often each distinct r is trained on
    # No r is split: mass beyond an equal share does not count, so that no group stays empty.
    size = mass.sum() / n_groups
    large = np.zeros(len(mass), bool)
    while len(values) >= n_groups and (mass[~large] > size * (1 + 1e-9)).any():
        large |= mass > size * (1 + 1e-9)  # the factor: sums of fractions are rounded
        size = mass[~large].sum() / (n_groups - large.sum())
    capped = np.minimum(mass, size)
    # Each r belongs to the group into which the middle of its mass falls.
    middle = (np.cumsum(capped) - capped / 2) / capped.sum()
    group_of_value = np.minimum((middle * n_groups).astype(int), n_groups - 1)
    shares = np.bincount(group_of_value, weights=mass, minlength=n_groups) / mass.sum()
    if not (shares > 0).all():
        raise InputError(f"--groups {n_groups}: ties leave a group empty; use fewer groups")
    group = np.full(r.shape, -1)
    group[known] = group_of_value[index]
    cuts = [float(values[group_of_value == g][0]) for g in range(n_groups)]
    return group, cuts, shares.tolist()


# ---------------------------------------------------------------- below: plumbing

import argparse
import contextlib
import heapq
import itertools

from torch.overrides import TorchFunctionMode
from tqdm.auto import tqdm

from data import (
    BOS,
    PAD,
    Batch,
    Window,
    additive_mask,
    attention,
    build_tree,
    by_length,
    by_shared_prefix,
    collate,
    embeds_inputs,
    experts,
    hide_bar,
    load_run,
    log_softmax_over,
    logits_at,
    normalize_text,
    run_command,
    set_environment,
    share_out,
    shortest_window,
    shown_part,
    write_atomic,
)


def ablations(model, batch, segments, tries=(None,)):
    """log p - log p with a segment at the baseline -> (len(tries), len(segments), N) nats.

    This is Feature Ablation, to which `segment_gradient` tends with more points. tries: a trie for
    each softmax that is wanted, None for the one over the vocabulary; they share the forwards.
    """
    legal = [None if trie is None else legal_tokens(batch, trie) for trie in tries]

    def log_probs(embeds):  # (B, T, D) -> (len(tries), N)
        logits = target_logits(model, batch, embeds)  # (N, V)
        return torch.stack([label_log_prob(logits, batch.label, tokens) for tokens in legal])

    own = log_probs(model.get_input_embeddings()(batch.ids))
    changes = []
    for segment in segments:
        E, delta = path_ends(model, batch, segment)
        changes.append(own - log_probs(E - delta))
    return torch.stack(changes, dim=1)


def mean_embedding(embedding):
    """Mean of the embedding layer's output, (D,): not of its weight, which some layers scale."""
    weight = embedding.weight
    wide = torch.promote_types(weight.dtype, torch.float32)
    total = 0
    for tokens in torch.arange(len(weight), device=weight.device).split(8192):
        total = total + embedding(tokens).to(wide).sum(0)
    return (total / len(weight)).to(weight.dtype)


@contextlib.contextmanager
def scoring(model):
    """Inside, the model is in evaluation mode and no gradient graph is built."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


@contextlib.contextmanager
def forward_mode(model):
    """`scoring` without fused kernels, which have no forward-mode derivative."""
    with scoring(model), attention(model, "eager"), experts(model, "eager"):
        yield


def has_derivative(model, prompts, windows, device="cpu"):
    """Whether `segment_gradient` works with this model, tried on one prompt."""
    batch = collate(build_trees(prompts, windows[:1]), device)
    try:
        with forward_mode(model):
            found = segment_gradient(model, batch, (USER,), points=1)  # (N,)
    except NotImplementedError:  # an operation without a rule for forward mode
        return False
    return bool(found.isfinite().all())


class FastForwardAD(TorchFunctionMode):
    """Forward mode through linear layers and softmax at less cost than PyTorch's own rules.

    Those take a third matrix product, for the weight's zero tangent, and more exponentials.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in (torch.nn.functional.linear, torch.nn.functional.softmax):
            x, tangent = forward_ad.unpack_dual(args[0])
            if tangent is not None:
                y = function(x, *args[1:], **kwargs)
                if function is torch.nn.functional.linear:
                    change = function(tangent, args[1])  # by the weight alone, without the bias
                else:
                    change = y * (tangent - (y * tangent).sum(kwargs["dim"], keepdim=True))
                return forward_ad.make_dual(y, change)
        return function(*args, **kwargs)


def label_log_prob(logits, label, legal=None):
    """log p of labels (N,) from logits (N, V): over the vocabulary, or over data.legal_tokens."""
    if legal is None:
        return logits.log_softmax(-1).gather(-1, label[:, None])[:, 0]
    owner, token, chosen = legal
    return log_softmax_over(logits, owner, token)[chosen]


def both_log_probs(logits, batch, trie):
    """log p of a batch's targets from logits (N, V), in nats -> (legal, full), numpy (N,), float64.

    legal: over the continuations that some title has; full: over the vocabulary.
    """
    legal = label_log_prob(logits, batch.label, legal_tokens(batch, trie))
    full = label_log_prob(logits, batch.label)
    return legal.cpu().double().numpy(), full.cpu().double().numpy()


def log_prob_derivative(logits, tangent, label, legal=None):
    """d log p (N,) of labels for logits (N, V) moving along tangent (N, V).

    This is the sum over v != y of p_v (dz_y - dz_v). The textbook form dz_y - sum_v p_v dz_v
    cancels to rounding noise where p_y is near 1; this one does not.
    """
    own = tangent.gather(-1, label[:, None])  # (N, 1)
    if legal is None:
        return (logits.softmax(-1) * (own - tangent)).sum(-1)  # the label's own term is 0
    owner, token, _ = legal
    p = log_softmax_over(logits, owner, token).exp()  # (C,)
    terms = p * (own[owner, 0] - tangent[owner, token])  # (C,)
    return torch.zeros_like(own[:, 0]).index_add(0, owner, terms)


def check_targets(model, batch, trie):
    """Refuse target tokens that the trie does not allow, and prompts beyond the model's window."""
    if trie is not None and len(legal_tokens(batch, trie)[2]) < len(batch.label):
        raise InputError("labels: a target token is no legal continuation of its title `item`")
    longest = int(batch.position.max()) + 1
    if batch.mask is not None and longest > shortest_window(model):
        raise InputError(
            f"a prompt of {longest} tokens is longer than the model's window of "
            f"{shortest_window(model)}, which the batch's mask would lift; shorten it"
        )


def prior_probability(model, batch, trie=None):
    """p of every target token, (N,): the user's tokens are hidden."""
    legal = None if trie is None else legal_tokens(batch, trie)
    logits = target_logits(model, without_user(batch))  # (N, V)
    return label_log_prob(logits, batch.label, legal).cpu().double().exp().numpy()


def segment_attributions(model, batch, method="gradient", tries=(None,), points=POINTS):
    """A_aux and A_user in nats for each of `tries` (see `ablations`) -> (2 * len(tries), N)."""
    segments = AUXILIARY, (USER,)
    if method == "ablation":
        return ablations(model, batch, segments, tries).flatten(0, 1)
    pairs = itertools.product(tries, segments)
    with forward_mode(model):
        return torch.stack([segment_gradient(model, batch, S, points, trie) for trie, S in pairs])


def of_all_targets(measure, model, trees, device="cpu", note=None):
    """[*measure(batch), item, place, window] of all trees' target tokens, each (N,) numpy.

    measure returns a list of tensors or arrays (N,). note: the name of the progress bar, if there
    is to be one. Under torchrun all ranks must call it; they share the trees out, and each gets all
    target tokens, in no particular order.
    """

    def measure_some(trees):
        parts = []
        batches = list(by_length(trees))
        hidden = hide_bar() if note else True
        for indices in tqdm(batches, desc=note, disable=hidden, leave=False):
            batch = collate([trees[i] for i in indices], device)
            found = (*measure(batch), batch.item, batch.place, batch.window)
            parts.append([torch.as_tensor(x).cpu().numpy() for x in found])
        return [np.concatenate(part) for part in zip(*parts)]

    with scoring(model):
        return share_out(measure_some, trees)


def attributions(
    model, trees, method="gradient", tries=(None,), points=POINTS, device="cpu", note="attribution"
):
    """[A_aux, A_user of each of `tries`, then item, place, window] of all targets, each (N,)."""

    def measure(batch):
        return segment_attributions(model, batch, method, tries, points).cpu().double()

    return of_all_targets(measure, model, trees, device, note)


def log_probs_of(model, prompts, trees, device="cpu"):
    """[log p over legal continuations, over the vocabulary, item, place, window], each (N,)."""

    def measure(batch):
        return both_log_probs(target_logits(model, batch), batch, prompts.trie)

    return of_all_targets(measure, model, trees, device)


def without_history(windows):
    """One window with an empty history for every title that is a target of `windows`."""
    targets = {w.items[w.stop] for w in windows}
    return [Window(i, (i,), 0, 0) for i in sorted(targets)]


def cut_groups(r, windows, n_groups):
    """`cut` of r (items, L), every token weighted by how often `windows` have it as a target."""
    times = np.bincount([w.items[w.stop] for w in windows], minlength=len(r))  # (items,)
    return cut(r, np.broadcast_to(times[:, None], r.shape), n_groups)


def sample_windows(windows, seed):
    """Some of `windows`, in their order, among whose targets are all those of `windows`.

    Takes whole trees, always the one with the most targets that are still missing, ties in a seeded
    order: few trees cover the catalogue, and a shared prefix is paid for once.
    """
    groups = by_shared_prefix(windows)
    targets = []
    for group in groups:
        targets.append({windows[i].items[windows[i].stop] for i in group})
    order = np.random.default_rng(seed).permutation(len(groups)).tolist()
    queue = [(-len(targets[g]), place, g) for place, g in enumerate(order)]
    heapq.heapify(queue)
    covered = set()
    chosen = []
    while queue:
        cost, place, g = heapq.heappop(queue)
        gain = len(targets[g] - covered)
        if gain == -cost:
            covered |= targets[g]
            chosen += groups[g]
        elif gain:  # fewer than when it was queued, since others have covered some: back it goes
            heapq.heappush(queue, (-gain, place, g))
    return [windows[i] for i in sorted(chosen)]


def mean_by_place(values, item, place, prompts):
    """Means of values (N,) by title and place in it -> (items, L), NaN where there are none."""
    shape = (len(prompts.titles), prompts.trie.path.shape[1] - 1)
    total = np.zeros(shape)
    count = np.zeros(shape)
    np.add.at(total, (item, place), values)
    np.add.at(count, (item, place), 1)
    return np.where(count > 0, total / np.where(count > 0, count, 1), np.nan)


# ---------------------------------------------------------------- plain batches: no catalogue


def plain_batch(
    input_ids, labels, is_user, attention_mask=None, position_ids=None, bos=None, item=None
):
    """A Batch of ordinary rows, for `token_relevance`; every tensor (B, T).

    labels: the token itself where it is a target, else -100, not shifted, as transformers has them.
    is_user: true at the tokens of the user's history. Rows may be padded at either end
    (attention_mask 0), or hold several prompts, each of which starts at position 0 (position_ids)
    and sees itself alone. bos: the token that is never moved to the baseline. item: for relevance
    over a trie, each target token's title by number; the targets are then whole titles with EOS.
    """
    real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    position = (real.cumsum(1) - 1).clamp(min=0) if position_ids is None else position_ids
    target = labels != -100  # (B, T)
    if (target & (position == 0)).any():
        raise InputError("labels: the first token of a prompt cannot be a target; set it to -100")
    segment = torch.where(is_user.bool(), USER, TEMPLATE)  # (B, T)
    segment = torch.where(real.bool(), segment, PAD)
    if bos is not None:
        segment = torch.where(input_ids == bos, BOS, segment)
    row, column = target.nonzero(as_tuple=True)  # (N,), (N,)
    # How many targets the row has up to each token, and how many of them in earlier prompts.
    so_far = target.cumsum(1)  # (B, T)
    earlier = torch.where(position == 0, so_far, 0).cummax(1).values  # (B, T)
    some = input_ids[real.bool()][-1]  # padding is a real token, for the reason in data.collate
    return Batch(
        ids=torch.where(real.bool(), input_ids, some),
        mask=own_prompt_mask(position, real.bool()),
        position=position,
        segment=segment,
        row=row,
        predict_at=column - 1,
        label=labels[target],
        item=row if item is None else item[target],
        place=(so_far - earlier - 1)[target],
        window=row,
    )


def own_prompt_mask(position, seen):
    """Additive (B, 1, T, T): a token sees itself and, where `seen` (B, T), its prompt before it."""
    B, T = position.shape
    prompt = (position == 0).cumsum(1)  # (B, T) number of the prompt in its row
    visible = (prompt[:, :, None] == prompt[:, None, :]) & seen[:, None, :]  # (B, T, T)
    itself = torch.eye(T, dtype=torch.bool, device=position.device)
    return additive_mask((visible.tril() | itself)[:, None])


def without_user(batch):
    """The same Batch with the user's tokens hidden and the gap in the positions closed up."""
    hidden = batch.segment == USER  # (B, T)
    if not hidden.any():
        return batch
    T = hidden.shape[1]
    itself = torch.eye(T, dtype=torch.bool, device=hidden.device)
    lowest = torch.finfo(torch.float32).min
    mask = batch.mask
    if mask is None:
        mask = additive_mask(torch.ones_like(itself).tril()[None, None])
    gone = (mask[:, 0] == 0) & hidden[:, None] & ~itself  # (B, T, T) user tokens that a token saw
    return batch._replace(
        mask=torch.where(gone[:, None], lowest, mask),
        position=batch.position - gone.sum(-1),
    )


def with_group(collator, rows):
    """collator(rows), any data collator's batch, with `group` (B, T): -1 where there is no target.

    A row's "group" holds one id for each of its targets, in order, or one for each token, -1 where
    there is no target. The ids go where the batch's `labels` are, so the collator may pad or pack
    as it likes. Rows for evaluation have no "group", and their batch is left as it is.
    """
    rest = [dict(row) for row in rows]
    groups = [row.pop("group", None) for row in rest]
    batch = collator(rest)
    if any(group is None for group in groups):
        return batch
    target = batch["labels"] != -100  # (B, T)
    ids = torch.cat([torch.as_tensor(group) for group in groups]).long()
    ids = ids[ids >= 0]
    if len(ids) != target.sum():
        raise InputError(
            f"group: {len(ids)} ids for {target.sum()} target tokens of a batch; make the groups "
            "from the labels that the trainer sees, truncated and packed as they are"
        )
    batch["group"] = torch.full_like(batch["labels"], -1).masked_scatter(target, ids)
    return batch


def grouped_nll(model, inputs):
    """(NLL (N,) in nats, group (N,)) of the target tokens of a batch made by `with_group`."""
    if "group" not in inputs:
        raise InputError("group: not in the batch; set remove_unused_columns=False, use with_group")
    # With a cache, transformers would not tell packed prompts apart by their positions.
    inputs = dict(inputs, use_cache=False)
    labels = inputs.pop("labels")[:, 1:]  # (B, T - 1)
    group = inputs.pop("group")[:, 1:]  # (B, T - 1)
    target = labels != -100
    logits = model(**inputs).logits[:, :-1][target]  # (N, V); token t is predicted at t - 1
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    nll = torch.nn.functional.cross_entropy(logits, labels[target], reduction="none")
    return nll, group[target]


# ---------------------------------------------------------------- will the method help here?

DIAGNOSED = 200  # windows, at most, that the diagnosis reads


def diagnose(model, prompts, windows, seed=0, device="cpu", softmax="full"):
    """{"user information", "language share"} of the model as it stands (our choice).

    user information: mean over windows of log p(title | history) - log p(title | no history), in
    nats over legal continuations; near 0 the model does not use the user, and an attribution to
    the user is noise. language share: the part of SFT's loss, over the vocabulary ('full') or legal
    continuations ('trie'), that forced tokens hold; near 0 there is no language bias for group
    weights to remove.
    """
    chosen = np.random.default_rng(seed).permutation(len(windows))[:DIAGNOSED]
    windows = [windows[i] for i in sorted(chosen.tolist())]
    trees = build_trees(prompts, windows)
    legal, full, item, place, _ = log_probs_of(model, prompts, trees, device)  # (N,) each
    alone = build_trees(prompts, without_history(windows))
    prior, _, title, _, _ = log_probs_of(model, prompts, alone, device)  # (M,) each
    by_title = np.bincount(title, weights=prior)  # log p(title | no history)
    without = np.mean([by_title[w.items[w.stop]] for w in windows])
    continuations = np.diff(prompts.trie.first)  # how many each node of the trie has
    certain = continuations[prompts.trie.path[item, place]] == 1  # (N,)
    log_p = full if softmax == "full" else legal
    return {
        "user information": float(legal.sum() / len(windows) - without),
        "language share": abs(float(log_p[certain].sum() / log_p.sum())) if log_p.sum() else 0.0,
    }


# ---------------------------------------------------------------- one prompt, token by token

MOST_STEPS = 4096  # the rule of so many points is made of a matrix of their square
PATH_STEPS = 128  # Gauss-Legendre points of the path; the gap on toy is 0.02% at 64, 5e-7 at 128
CHUNK = 16  # variants of the prompt that are forwarded at once


def token_attribution(
    model, tokenizer, prompts, window, method="gradient", steps=PATH_STEPS, device="cpu"
):
    """Attribution in nats of each target token of one prompt to each of its input tokens -> dict.

    'gradient': integrated gradients. All tokens but BOS move together from the mean embedding to
    their own, so a row of values sums to log p(target | prompt) - log p(target | baseline), up to
    `gap`, the relative error of the quadrature. 'ablation': log p - log p with that one token at
    the baseline; a row need not sum to anything, and there is no gap.

    Keys: tokens [T], targets [N], log_prob [N], values [N][T], spans [{name, kind, start, end}],
    method, steps (points of the path), gap.
    """
    tree = build_tree(prompts, [window], [0])
    one = collate([tree], device)
    N = len(one.label)

    def log_prob(embeds):  # (R, T, D) -> (R, N)
        R = len(embeds)
        row = torch.arange(R, device=device).repeat_interleave(N)
        inputs = embeds_inputs(model, one.ids.expand(R, -1), embeds)
        logits = logits_at(model, row, one.predict_at.repeat(R), use_cache=False, **inputs)
        return label_log_prob(logits.float(), one.label.repeat(R)).view(R, N)

    gap = None
    with forward_mode(model):
        E, delta = path_ends(model, one, (TEMPLATE, USER, TITLE))  # (1, T, D)
        own = log_prob(E)  # (1, N)
        if method == "ablation":
            values = ablated(log_prob, own, E, delta)
        else:
            values = integrated(log_prob, N, E, delta, steps)
            change = (own - log_prob(E - delta))[0]  # (N,)
            gap = float((values.sum(1) - change).abs().sum() / change.abs().sum())
    return {
        "tokens": tokenizer.batch_decode([[token] for token in tree.ids.tolist()]),
        "targets": tokenizer.batch_decode([[token] for token in tree.label.tolist()]),
        "log_prob": own[0].tolist(),
        "values": values.tolist(),
        "spans": prompt_spans(prompts, window, tree),
        "method": method,
        "steps": steps if method == "gradient" else None,
        "gap": gap,
    }


def ablated(log_prob, own, E, delta):
    """(N, T): log p of each target less log p with one input token at the baseline E - delta."""
    columns = []
    for tokens in torch.arange(E.shape[1], device=E.device).split(CHUNK):
        without = E.repeat(len(tokens), 1, 1)  # (R, T, D), row i without token tokens[i]
        without[torch.arange(len(tokens)), tokens] -= delta[0, tokens]
        columns.append((own - log_prob(without)).T)  # (N, R)
    return torch.cat(columns, dim=1)


def integrated(log_prob, N, E, delta, steps):
    """(N, T): each target's gradient integrated from E - delta to E, by Gauss-Legendre quadrature.

    log_prob: embeddings (R, T, D) -> log p of the targets (R, N). steps: points of the path.
    """
    values = torch.zeros(N, E.shape[1], device=E.device)
    # leggauss is for the interval [-1, 1]; the path from s = 0 to s = 1 is half as long.
    rule = np.stack(np.polynomial.legendre.leggauss(steps)) / 2
    points, weights = torch.tensor(rule, dtype=E.dtype, device=E.device)  # (steps,) each
    for s, weight in zip((points + 0.5).split(CHUNK), weights.split(CHUNK)):
        embeds = (E - (1 - s)[:, None, None] * delta).detach().requires_grad_()  # (R, T, D)
        with torch.enable_grad():
            terms = (weight @ log_prob(embeds)).unbind()  # N scalars
        for n in range(N):
            (gradient,) = torch.autograd.grad(terms[n], embeds, retain_graph=n + 1 < N)
            values[n] += (gradient * delta).sum((0, 2))
    return values


def prompt_spans(prompts, window, tree):
    """The parts of a prompt that hold tokens: [{name, kind, start, end}].

    kind: bos, template, user (one item of the history, named by its number) or title.
    """
    parts = [("BOS", "bos", len(prompts.bos)), ("task", "template", len(prompts.task))]
    for item in window.items[window.start + tree.dropped : window.stop]:
        parts.append((item, "user", len(prompts.titles[item]) + len(prompts.separator)))
    parts.append(("response marker", "template", len(prompts.marker)))
    before = sum(length for _, _, length in parts)
    parts.append(("title prefix", "title", len(tree.ids) - before))
    spans = []
    start = 0
    for name, kind, length in parts:
        if length:
            spans.append({"name": name, "kind": kind, "start": start, "end": start + length})
        start += length
    return spans


def span_sums(record):
    """Sums of a record's values over each span, (spans, N + 1); last column: over all targets."""
    values = np.array(record["values"])  # (N, T)
    sums = np.stack([values[:, s["start"] : s["end"]].sum(1) for s in record["spans"]])
    return np.concatenate([sums, sums.sum(1, keepdims=True)], 1)


# ---------------------------------------------------------------- tables


def format_table(header, rows):
    """Plain text table: the first column aligned left, the rest right."""
    cells = [list(map(str, row)) for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = []
    for first, *rest in cells:
        numbers = [cell.rjust(width) for cell, width in zip(rest, widths[1:])]
        lines.append("  ".join([first.ljust(widths[0]), *numbers]).rstrip())
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


# ---------------------------------------------------------------- the command


def name_items(record, titles):
    """The same record with the titles of the history's items as names of their spans."""
    for s in record["spans"]:
        if s["kind"] == "user":
            s["name"] = titles[s["name"]]
    return record


def span_table(record):
    """(header, rows): a column for each target token; a row for each part of the prompt and sum."""
    header = ("part of the prompt", *(t.strip() or repr(t) for t in record["targets"]), "all")
    sums = span_sums(record)
    rows = [(span["name"], *map("{:+.2f}".format, row)) for span, row in zip(record["spans"], sums)]
    kind = np.array([span["kind"] for span in record["spans"]])
    for name, kinds in (("auxiliary", ("template", "title")), ("user", ("user",))):
        total = sums[np.isin(kind, kinds)].sum(0)
        rows.append((f"= {name}", *map("{:+.2f}".format, total)))
    log_p = record["log_prob"]
    rows.append(("log p", *map("{:.2f}".format, [*log_p, sum(log_p)])))
    return header, rows


def choose_window(dataset, user=None, title=None, part="test"):
    """The user's last window of a part (default: the first of all), its target set to `title`."""
    windows = getattr(dataset, part)
    windows = [w for w in windows if user is None or dataset.users[w.user] == user]
    if not windows:
        some = normalize_text(", ".join(dataset.users[:5]))
        raise InputError(
            f"--user {user}: no {part} window of this user; there are {some} and others"
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
    p.add_argument("--dataset", help="where the run's data is now, if it has moved")
    p.add_argument("--html", metavar="FILE", help="write a page with the tokens shaded")
    p.add_argument("--cache", metavar="DIR", help="where fetched data is kept, as for gdrt.py")
    p.add_argument(
        "--data-dir", metavar="PATH", help="folder or zip with MovieLens, as for gdrt.py"
    )
    return p


def main(argv=None):
    args = parser().parse_args(argv)
    set_environment(args.cache)
    if not 1 <= args.steps <= MOST_STEPS:
        raise InputError(f"--steps {args.steps}: give a number from 1 to {MOST_STEPS:,}")
    places = args.cache, args.data_dir, args.dataset
    config, dataset, model, tokenizer, prompts = load_run(args.run, *places)
    window = choose_window(dataset, args.user, args.title, shown_part(config["arguments"]))
    record = token_attribution(model, tokenizer, prompts, window, args.method, args.steps)
    record = name_items(record, dataset.titles)
    user = dataset.users[window.user]
    title = dataset.titles[window.items[window.stop]]
    print(f"user {normalize_text(user)}, title {title}: attribution by {args.method} in nats")
    print(format_table(*span_table(record)))
    if record["gap"] is not None:
        print(f"gap to completeness {record['gap']:.2%} at {args.steps} points")
    if args.html:
        from report import PAGE

        write_atomic(args.html, PAGE.render(title=f"{title}, for user {user}", record=record))
        print(f"page: {args.html}")


if __name__ == "__main__":
    run_command(main)
