"""Will the method help here? The two figures after the warm-up, and what a loss has over SFT."""

import json

import numpy as np
import pytest
import torch
from conftest import (
    continuations,
    random_prompts,
    random_windows,
    score,
    separate_logits,
    small_model,
    target_tokens,
)

import attribution
from attribution import diagnose, mean_embedding
from gdrt import paired_differences

# ---------------------------------------------------------------- the diagnosis


@pytest.fixture
def world():
    """(model, prompts of titles that share prefixes, windows)."""
    return small_model(), random_prompts(5, 12, letters=4), random_windows(12, 4, users=4)


def nats_of_history(model, prompts, window, legal):
    """log p(title | history) - log p(title | no history), by two separate prompts."""
    tokens = target_tokens(prompts, window)
    with torch.no_grad():
        informed = separate_logits(model, prompts, window)  # (L, V)
        uninformed = separate_logits(model, prompts, window, skip=window.stop - window.start)
    return float(score(informed, tokens, legal).sum() - score(uninformed, tokens, legal).sum())


def test_user_information_is_what_the_history_is_worth(world):
    model, prompts, windows = world
    legal = continuations(prompts)
    found = diagnose(model, prompts, windows)["user information"]
    expected = np.mean([nats_of_history(model, prompts, window, legal) for window in windows])
    assert abs(expected) > 1e-3
    assert found == pytest.approx(expected, abs=1e-4)


def test_language_share_is_the_loss_of_tokens_without_a_choice(world):
    """The loss is over the whole vocabulary: over legal tokens a forced one costs nothing."""
    model, prompts, windows = world
    legal = continuations(prompts)
    forced = 0.0
    everything = 0.0
    for window in windows:
        tokens = target_tokens(prompts, window)
        with torch.no_grad():
            nll = -score(separate_logits(model, prompts, window), tokens)  # (L,)
        for j in range(len(tokens)):
            everything += float(nll[j])
            if len(legal[tuple(tokens[:j])]) == 1:
                forced += float(nll[j])
    assert 0.1 < forced / everything < 0.9
    found = diagnose(model, prompts, windows)["language share"]
    assert found == pytest.approx(forced / everything, abs=1e-5)


def test_without_a_loss_on_forced_tokens_no_loss_is_language(world):
    assert diagnose(*world, softmax="trie")["language share"] == 0


def test_the_diagnosis_reads_a_seeded_sample(world, monkeypatch):
    model, prompts, windows = world
    monkeypatch.setattr(attribution, "DIAGNOSED", 5)
    chosen = sorted(np.random.default_rng(3).permutation(len(windows))[:5].tolist())
    found = diagnose(model, prompts, windows, seed=3)
    assert found == diagnose(model, prompts, [windows[i] for i in chosen], seed=3)
    assert found != diagnose(model, prompts, windows, seed=4)


# ---------------------------------------------------------------- the baseline of the attribution


class Scaled(torch.nn.Embedding):
    """An embedding layer that multiplies what it looks up, as Gemma's does."""

    def forward(self, ids):
        return 8 * super().forward(ids)


@pytest.mark.parametrize("size", [5, 8192, 20_000])
def test_the_mean_embedding_is_of_what_the_layer_returns(size):
    """Also when there are more than the 8,192 tokens that are looked up at once."""
    torch.manual_seed(0)
    layer = Scaled(size, 3)
    with torch.no_grad():
        expected = 8 * layer.weight.double().mean(0)
        assert torch.allclose(mean_embedding(layer).double(), expected, atol=1e-5)


def test_the_mean_embedding_is_summed_in_fp32():
    """In bf16 a sum of ones stops at 256."""
    layer = torch.nn.Embedding(1000, 2, dtype=torch.bfloat16)
    with torch.no_grad():
        layer.weight.fill_(1)
        mean = mean_embedding(layer)
    assert mean.tolist() == [1, 1] and mean.dtype == torch.bfloat16


# ---------------------------------------------------------------- what a loss has over SFT


def write_predictions(folder, loss, places, nlls, scores=range(0, -10, -1)):
    """predictions.jsonl of a loss: user i's target is at place places[i], or not listed if None."""
    lines = []
    for user, (place, nll) in enumerate(zip(places, nlls)):
        titles = [f"title {i}" for i in range(10)]
        target = "elsewhere" if place is None else titles[place - 1]
        line = {"user": str(user), "titles": titles, "target": target}
        line |= {"scores": list(scores), "legal NLL": nll, "NLL": 10 - nll}
        lines.append(json.dumps(line) + "\n")
    (folder / loss).mkdir()
    (folder / loss / "predictions.jsonl").write_text("".join(lines))


def test_a_lead_for_every_user_is_a_difference(tmp_path):
    """Place 1 against place 3 is NDCG 1 against 1 / log2(4) = 0.5, for every user alike."""
    write_predictions(tmp_path, "sft", [3] * 6, [4.0, 5.0, 6.0, 7.0, 8.0, 9.0])
    write_predictions(tmp_path, "gdrt", [1] * 6, [3.75, 4.75, 5.75, 6.75, 7.75, 8.75])
    first, ndcg, nll, whole = paired_differences(tmp_path, ["sft", "gdrt"])
    assert first == "GDRT less SFT, 6 test windows of this seed:"
    assert ndcg == "  NDCG@10 +0.5000, 95% interval [+0.5000, +0.5000]: a difference"
    assert nll.startswith(
        "  title NLL over legal continuations -0.2500, 95% interval [-0.2500, -0."
    )
    assert nll.endswith(": a difference")
    assert whole.startswith("  title NLL over the vocabulary +0.2500, 95% interval [+0.2")


def test_what_one_user_gains_and_another_loses_is_no_difference(tmp_path):
    """NDCG: 0.5 to 0 for half of the users, 0 to 0.5 for the rest."""
    write_predictions(tmp_path, "sft", [3, None] * 4, [5.0, 6.0] * 4)
    write_predictions(tmp_path, "gdrt", [None, 3] * 4, [6.0, 5.0] * 4)
    _, ndcg, nll, _ = paired_differences(tmp_path, ["sft", "gdrt"])
    for sentence in (ndcg, nll):
        assert sentence.endswith("no difference seen")
    assert "NDCG@10 +0.0000" in ndcg


def test_titles_of_equal_scores_share_their_mean_rank(tmp_path):
    """As in the table. Listed first and second with one score: 1 / log2(1.5 + 1), not 1."""
    write_predictions(tmp_path, "sft", [None] * 3, [5.0] * 3)
    write_predictions(tmp_path, "gdrt", [1, 2, 1], [5.0] * 3, scores=[0, 0, *range(-2, -10, -1)])
    ndcg = paired_differences(tmp_path, ["sft", "gdrt"])[1]
    assert ndcg.startswith("  NDCG@10 +0.7565, 95% interval [+0.7565, +0.7565]")


def test_without_sft_or_test_windows_nothing_is_said(tmp_path):
    write_predictions(tmp_path, "gdrt", [1], [3.0])
    assert paired_differences(tmp_path, ["gdrt"]) == []
    assert paired_differences(tmp_path, ["sft", "gdrt"]) == []
