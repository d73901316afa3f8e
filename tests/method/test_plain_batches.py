"""Relevance without a catalogue: plain batches against one backward per target token."""

import numpy as np
import pytest
import torch
from conftest import small_model

from attribution import cut, mean_embedding, on_tokens, plain_batch, token_relevance
from data import InputError

B = 3  # rows
T = 12  # tokens of a row
METHODS = pytest.mark.parametrize("method", ["gradient", "ablation", "probability"])


@pytest.fixture(scope="module")
def rows():
    """(model, ids, labels, is_user): the last three of twelve tokens are targets."""
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(2, 40, (B, T), generator=random)
    labels = torch.full((B, T), -100)
    labels[:, 9:] = ids[:, 9:]
    is_user = torch.zeros(B, T, dtype=torch.bool)
    is_user[:, 3:7] = True
    return small_model(), ids, labels, is_user


def log_prob(model, embeds, position, token):
    """log p of `token` after embeds (T, D), read at `position`."""
    return model(inputs_embeds=embeds[None]).logits[0, position].log_softmax(-1)[token]


def by_backward(model, ids, inside, target, points=4):
    """The path integral of one target's log p over the embeddings `inside`, in reverse mode."""
    E = model.get_input_embeddings()(ids).detach()
    delta = (E - mean_embedding(model.get_input_embeddings())) * inside[:, None]
    total = 0.0
    for j in range(points):
        embeds = (E - (1 - (j + 0.5) / points) * delta).detach().requires_grad_()
        value = log_prob(model, embeds, target - 1, ids[target])
        (gradient,) = torch.autograd.grad(value, embeds)
        total += float((gradient * delta).sum()) / points
    return total


def by_hand(model, ids, is_user, method):
    """r of the last three tokens of one row, each by itself."""
    found = []
    for target in range(9, T):
        if method == "probability":
            shown = ids[:target][~is_user[:target]]
            logits = model(shown[None]).logits[0, -1]
            found.append(float(logits.softmax(-1)[ids[target]]))
            continue
        parts = []
        for inside in (~is_user, is_user):
            if method == "gradient":
                parts.append(abs(by_backward(model, ids, inside, target)))
            else:
                E = model.get_input_embeddings()(ids)
                moved = torch.where(
                    inside[:, None], mean_embedding(model.get_input_embeddings()), E
                )
                own = log_prob(model, E, target - 1, ids[target])
                parts.append(abs(float(own - log_prob(model, moved, target - 1, ids[target]))))
        aux, user = parts
        found.append((aux + 0.5) / (aux + user + 0.5))
    return found


@METHODS
def test_equals_one_backward_per_target_token(rows, method):
    model, ids, labels, is_user = rows
    r = token_relevance(model, plain_batch(ids, labels, is_user), method)
    expected = [by_hand(model, ids[b], is_user[b], method) for b in range(B)]
    assert r == pytest.approx(np.concatenate(expected), abs=2e-5)


@METHODS
@pytest.mark.parametrize("layout", ["left padded", "right padded", "packed", "alone"])
def test_the_layout_of_the_batch_changes_nothing(rows, method, layout):
    model, ids, labels, is_user = rows
    expected = token_relevance(model, plain_batch(ids, labels, is_user), method)
    pad = torch.zeros(B, 4, dtype=torch.long)
    parts = {"ids": (ids, pad), "labels": (labels, pad - 100), "user": (is_user, pad.bool())}
    parts["mask"] = (torch.ones_like(ids), pad)
    if layout == "left padded":
        batches = [plain_batch(*(torch.cat(pair[::-1], 1) for pair in parts.values()))]
    elif layout == "right padded":
        batches = [plain_batch(*(torch.cat(pair, 1) for pair in parts.values()))]
    elif layout == "packed":
        flat = [x.reshape(1, B * T) for x in (ids, labels, is_user)]
        batches = [plain_batch(*flat, position_ids=torch.arange(T).repeat(B)[None])]
    else:
        rows_alone = zip(ids.split(1), labels.split(1), is_user.split(1))
        batches = [plain_batch(*row) for row in rows_alone]
    found = np.concatenate([token_relevance(model, batch, method) for batch in batches])
    assert found == pytest.approx(expected, abs=2e-5)


def test_groups_are_laid_over_the_tokens(rows):
    model, ids, labels, is_user = rows
    batch = plain_batch(ids, labels, is_user)
    r = token_relevance(model, batch, "ablation")
    group, _, shares = cut(r, np.ones_like(r), 3)
    grid = on_tokens(group, batch, -1)
    assert ((grid >= 0) == (labels != -100).numpy()).all()
    assert grid[:, 9:].ravel().tolist() == group.tolist()
    assert shares == pytest.approx([1 / 3] * 3)
    assert r[group == 0].max() < r[group == 2].min()


def test_a_prompt_that_begins_with_a_target_is_refused(rows):
    _, ids, _, is_user = rows
    with pytest.raises(InputError, match="first token"):
        plain_batch(ids, ids, is_user)
