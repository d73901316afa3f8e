"""Relevance without a catalogue: plain batches against one backward per target token."""

import numpy as np
import pytest
import torch
from conftest import (
    continuations,
    prompt_of,
    random_prompts,
    random_windows,
    small_model,
    target_tokens,
)
from torch.nn.utils.rnn import pad_sequence

from attribution import cut, mean_embedding, plain_batch, token_relevance
from data import USER, InputError, build_tree, build_trees, collate

METHODS = pytest.mark.parametrize("method", ["gradient", "ablation", "probability"])
SOFTMAX = pytest.mark.parametrize("legal", [False, True], ids=["vocabulary", "trie"])
BOS = 0


@pytest.fixture(scope="module")
def world():
    """(model, prompts, windows, rows): prompts and targets of a catalogue, written out one by one.

    A row is (ids, labels, is_user, item), each (T,); rows differ in length.
    """
    prompts = random_prompts(0)
    windows = random_windows(len(prompts.titles), seed=1, users=1)
    rows = []
    for window in windows:
        title = target_tokens(prompts, window)
        ids = torch.tensor(prompt_of(prompts, window) + title)
        labels = torch.full_like(ids, -100)
        labels[-len(title) :] = ids[-len(title) :]
        segment = build_tree(prompts, [window], [0]).segment  # the row's, but for EOS
        is_user = torch.tensor([*(segment == USER), False])
        rows.append((ids, labels, is_user, torch.full_like(ids, window.items[window.stop])))
    assert len({len(row[0]) for row in rows}) > 2
    return small_model(), prompts, windows, rows


def laid_out(rows, layout):
    """The rows as one plain_batch, or as many batches of one."""
    columns = list(zip(*rows))
    if layout == "alone":
        found = []
        for row in rows:
            ids, labels, is_user, item = (x[None] for x in row)
            found.append(plain_batch(ids, labels, is_user, bos=BOS, item=item))
        return found
    if layout == "packed":
        ids, labels, is_user, item = (torch.cat(column)[None] for column in columns)
        position = torch.cat([torch.arange(len(row)) for row in columns[0]])[None]
        return [plain_batch(ids, labels, is_user, None, position, BOS, item)]
    columns.append([torch.ones_like(row) for row in columns[0]])
    padding = 0, -100, False, 0, 0
    ids, labels, is_user, item, mask = (
        pad_sequence(column, True, value, padding_side=layout.split()[0])
        for column, value in zip(columns, padding)
    )
    return [plain_batch(ids, labels, is_user, mask, None, BOS, item)]


def log_prob(model, embeds, token, among):
    """log p of `token` after embeds (T, D), over the tokens `among`."""
    logits = model(inputs_embeds=embeds[None]).logits[0, -1]
    log_p = logits[token] - logits[among].logsumexp(0)
    return log_p if embeds.requires_grad else log_p.detach()


def by_backward(model, E, delta, token, among, points=4):
    """The integral of log p of one token along the path to E from E - delta, in reverse mode."""
    total = 0.0
    for j in range(points):
        embeds = (E - (1 - (j + 0.5) / points) * delta).detach().requires_grad_()
        (gradient,) = torch.autograd.grad(log_prob(model, embeds, token, among), embeds)
        total += float((gradient * delta).sum()) / points
    return total


def by_hand(model, row, method, legal=None):
    """r of one row's target tokens, each by itself; legal: `continuations`, or the vocabulary."""
    ids, labels, is_user, _ = row
    embedding = model.get_input_embeddings()
    found = []
    title = []
    for target in (labels != -100).nonzero()[:, 0].tolist():
        token = int(ids[target])
        among = legal[tuple(title)] if legal else list(range(model.config.vocab_size))
        title.append(token)
        user = is_user[:target]
        E = embedding(ids[:target]).detach()
        if method == "probability":
            found.append(float(log_prob(model, E[~user], token, among).exp()))
            continue
        A = []
        for inside in (~user & (ids[:target] != BOS), user):
            delta = (E - mean_embedding(embedding).detach()) * inside[:, None]
            if method == "gradient":
                A.append(abs(by_backward(model, E, delta, token, among)))
            else:
                own, ablated = (log_prob(model, x, token, among) for x in (E, E - delta))
                A.append(abs(float(own - ablated)))
        found.append((A[0] + 0.5) / (A[0] + A[1] + 0.5))
    return found


@pytest.fixture(scope="module")
def expected(world):
    """{(method, legal): r of all target tokens, row by row}, by hand."""
    model, prompts, _, rows = world
    found = {}
    for method in ("gradient", "ablation", "probability"):
        for legal in (False, True):
            of_rows = [
                by_hand(model, row, method, legal and continuations(prompts)) for row in rows
            ]
            found[method, legal] = np.concatenate(of_rows)
    return found


@METHODS
@SOFTMAX
@pytest.mark.parametrize("layout", ["left padded", "right padded", "packed", "alone"])
def test_equals_one_backward_per_target_token(world, expected, method, legal, layout):
    """Whatever the layout of the batch, over the vocabulary and over legal continuations."""
    model, prompts, _, rows = world
    trie = prompts.trie if legal else None
    batches = laid_out(rows, layout)
    found = [token_relevance(model, batch, method, trie=trie) for batch in batches]
    assert np.concatenate(found) == pytest.approx(expected[method, legal], abs=2e-5)


@METHODS
@SOFTMAX
def test_a_tree_is_such_a_batch(world, expected, method, legal):
    model, prompts, windows, _ = world
    trees = build_trees(prompts, windows)
    assert len(trees) < len(windows)
    batch = collate(trees)
    r = token_relevance(model, batch, method, trie=prompts.trie if legal else None)
    row_by_row = np.lexsort((batch.place, batch.window))
    assert r[row_by_row] == pytest.approx(expected[method, legal], abs=2e-5)


def test_hiding_the_user_leaves_nothing_of_them(world):
    """Another user's tokens in the same places give the same p."""
    model, _, _, rows = world
    others = [
        (torch.where(is_user, 5, ids), labels, is_user, item) for ids, labels, is_user, item in rows
    ]
    a, b = (
        token_relevance(model, laid_out(each, "right padded")[0], "probability")
        for each in (rows, others)
    )
    assert np.array_equal(a, b)


def test_every_target_has_a_group(world):
    model, _, _, rows = world
    (batch,) = laid_out(rows, "left padded")
    r = token_relevance(model, batch, "ablation")
    group, _, shares = cut(r, np.ones_like(r), 3)
    assert len(group) == sum((row[1] != -100).sum() for row in rows)
    assert shares == pytest.approx([1 / 3] * 3, abs=0.1)
    assert r[group == 0].max() < r[group == 2].min()


@pytest.mark.filterwarnings("ignore:invalid value")
def test_relevance_that_is_nowhere_known_is_refused():
    with pytest.raises(InputError, match="leave a group empty"):
        cut(np.full(5, np.nan), np.ones(5), 2)


def test_a_prompt_that_begins_with_a_target_is_refused(world):
    ids, _, is_user, _ = world[3][0]
    with pytest.raises(InputError, match="first token"):
        plain_batch(ids[None], ids[None], is_user[None])


def test_a_target_that_is_no_legal_continuation_is_refused(world):
    model, prompts, _, rows = world
    ids, labels, is_user, item = (x[None] for x in rows[0])
    batch = plain_batch(ids, labels, is_user, item=(item + 1) % len(prompts.titles))
    with pytest.raises(InputError, match="no legal continuation"):
        token_relevance(model, batch, trie=prompts.trie)
