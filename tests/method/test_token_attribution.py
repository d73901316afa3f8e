"""The attribution of one prompt, token by token, against forwards and backwards one at a time."""

from types import SimpleNamespace

import pytest
import torch
from conftest import prompt_of, random_prompts, score, small_model, target_tokens

import attribution
from data import Window


@pytest.fixture(scope="module")
def explained():
    """A prompt of a small model, what its log p is made of, and its record by each method.

    embeds (T, D): of the prompt and the title's prefix; delta (T, D): what lies between them and
    the baseline; log_p: a function of embeddings (T, D) -> (N,), of the target tokens.
    """
    model = small_model()
    prompts = random_prompts(2, lengths=(4, 7))
    window = Window(0, (0, 1, 2, 3, 4, 5), 1, 5)
    labels = target_tokens(prompts, window)
    prompt = prompt_of(prompts, window)
    ids = torch.tensor(prompt + labels[:-1])
    assert len(ids) > 2 * attribution.CHUNK
    weight = model.get_input_embeddings().weight.detach()
    embeds = weight[ids]
    delta = embeds - weight.mean(0)
    delta[0] = 0  # BOS stays

    def log_p(embeds):
        logits = model(inputs_embeds=embeds[None], use_cache=False).logits
        return score(logits[0, len(prompt) - 1 :], labels)

    names = SimpleNamespace(batch_decode=lambda rows: [str(row[0]) for row in rows])
    found = {}
    for method in "gradient", "ablation":
        record = attribution.token_attribution(model, names, prompts, window, method, steps=64)
        found[method] = record
    return SimpleNamespace(
        prompts=prompts, window=window, embeds=embeds, delta=delta, log_p=log_p, **found
    )


def test_a_token_by_ablation_is_the_difference_of_two_forwards(explained):
    record = explained.ablation
    with torch.no_grad():
        own = explained.log_p(explained.embeds)  # (N,)
        assert record["log_prob"] == pytest.approx(own.tolist(), abs=1e-4)
        for t in range(len(explained.embeds)):
            without = explained.embeds.clone()
            without[t] -= explained.delta[t]
            expected = own - explained.log_p(without)
            found = [row[t] for row in record["values"]]
            assert found == pytest.approx(expected.tolist(), abs=1e-4)
    assert record["gap"] is None


def test_a_token_by_gradient_is_a_sum_over_the_path(explained):
    """By 50 midpoints, and one backward a target token and point."""
    expected = 0
    for j in range(50):
        embeds = explained.embeds - (1 - (j + 0.5) / 50) * explained.delta
        embeds.requires_grad_()
        rows = []
        for value in explained.log_p(embeds):
            (gradient,) = torch.autograd.grad(value, embeds, retain_graph=True)
            rows.append((gradient * explained.delta).sum(-1))  # (T,)
        expected = expected + torch.stack(rows) / 50  # (N, T)
    values = torch.tensor(explained.gradient["values"])  # (N, T)
    assert expected.abs().max() > 0.1
    assert (values - expected).abs().max() < 0.01 * expected.abs().max()
    assert explained.gradient["gap"] < 0.01
    assert (values[:, 0] == 0).all()  # BOS is not moved


def test_spans_are_the_pieces_of_the_prompt(explained):
    prompts = explained.prompts
    record = explained.ablation
    pieces = [("BOS", "bos", prompts.bos), ("task", "template", prompts.task)]
    for item in explained.window.items[1:5]:
        pieces.append((item, "user", prompts.titles[item] + prompts.separator))
    pieces.append(("response marker", "template", prompts.marker))
    pieces.append(("title prefix", "title", prompts.titles[5]))
    sums = attribution.span_sums(record)
    for span, piece, row in zip(record["spans"], pieces, sums, strict=True):
        assert (span["name"], span["kind"]) == piece[:2]
        inside = slice(span["start"], span["end"])
        assert record["tokens"][inside] == [str(token) for token in piece[2]]
        by_target = [sum(values[inside]) for values in record["values"]]
        assert row.tolist() == pytest.approx([*by_target, sum(by_target)])
