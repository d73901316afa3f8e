"""Attribution and groups against one backward per target token, explicit forwards, and counting."""

import copy
import decimal
import itertools
import json

import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    continuations,
    in_order,
    prompt_of,
    random_prompts,
    random_windows,
    score,
    separate_logits,
    small_model,
)
from transformers.models.llama import modeling_llama

import attribution
import gdrt
from attribution import (
    ablations,
    attributions,
    cut,
    cut_groups,
    forward_mode,
    log_prob_derivative,
    ratio,
    relevance,
    sample_windows,
    segment_gradient,
)
from data import (
    BOS,
    TEMPLATE,
    TITLE,
    USER,
    InputError,
    Window,
    build_trees,
    build_trie,
    collate,
)

SEGMENTS = {"auxiliary": (TEMPLATE, TITLE), "user": (USER,)}


@pytest.fixture
def exact(toy, monkeypatch):
    """(model, prompts): toy's trained weights in float64 throughout.

    Left alone, Llama's softmax and norms would go through fp32.
    """

    def norm(self, x):
        power = x.pow(2).mean(-1, keepdim=True)
        return self.weight * x * torch.rsqrt(power + self.variance_epsilon)

    monkeypatch.setattr(modeling_llama.LlamaRMSNorm, "forward", norm)
    monkeypatch.setattr(torch.nn.functional, "softmax", lambda x, dim, dtype=None: x.softmax(dim))
    return copy.deepcopy(toy[1]).double(), toy[3]


def kinds_of(prompts, window):
    """Segment of every token of a prompt and its title, by hand."""
    kinds = [BOS] * len(prompts.bos) + [TEMPLATE] * len(prompts.task)
    for item in window.items[window.start : window.stop]:
        kinds += [USER] * len(prompts.titles[item] + prompts.separator)
    kinds += [TEMPLATE] * len(prompts.marker)
    return kinds + [TITLE] * len(prompts.titles[window.items[window.stop]])


def log_probs(model, prompts, window, segment, s, legal=None):
    """(log p (L,) of the target's tokens, the embeddings (T, D) they were read at, E - b (T, D)).

    The segment's embeddings are at s between the baseline and their own.
    """
    labels = prompts.titles[window.items[window.stop]]
    prompt = prompt_of(prompts, window)
    weight = model.get_input_embeddings().weight.detach()
    E = weight[torch.tensor(prompt + labels)]  # (T, D)
    delta = E - weight.mean(0)
    delta[[kind not in segment for kind in kinds_of(prompts, window)]] = 0
    embeds = (E - (1 - s) * delta).requires_grad_()
    logits = model(inputs_embeds=embeds[None], use_cache=False).logits[0, len(prompt) - 1 :]
    return score(logits, labels + [prompts.eos], legal), embeds, delta


def by_backwards(model, prompts, windows, segment, s, legal=None):
    """d log p / ds of every target token, one backward each, on separate prompts.

    Shape (N,), by window and place.
    """
    found = []
    for window in windows:
        with torch.enable_grad():
            out, embeds, delta = log_probs(model, prompts, window, segment, s, legal)
            for x in out:
                (gradient,) = torch.autograd.grad(x, embeds, retain_graph=True)
                found.append((gradient * delta).sum())
    return torch.stack(found)


def explicit_ablation(model, prompts, windows, segment, legal=None):
    """log p - log p with the segment at the baseline, (N,), by two forwards a window."""
    differences = []
    for window in windows:
        own, _, _ = log_probs(model, prompts, window, segment, 1.0, legal)
        without, _, _ = log_probs(model, prompts, window, segment, 0.0, legal)
        differences.append((own - without).detach())
    return torch.cat(differences)


@pytest.mark.parametrize(
    "name, pack, softmax",
    [("auxiliary", True, "full"), ("user", False, "full"), ("user", True, "trie")],
)
def test_forward_mode_equals_a_backward_per_target_token(
    toy, exact, monkeypatch, name, pack, softmax
):
    """At each of the three points of a path, from the baseline to the tokens' own embeddings."""
    model, prompts = exact
    legal = continuations(prompts) if softmax == "trie" else None
    windows = random_windows(len(toy[0].titles), 0, users=1, length=6) + toy[0].train[3:5]
    points = []

    def record(*args):
        points.append(log_prob_derivative(*args))
        return points[-1]

    monkeypatch.setattr(attribution, "log_prob_derivative", record)
    batch = collate(build_trees(prompts, windows, pack))
    with forward_mode(model):
        whole = segment_gradient(model, batch, SEGMENTS[name], 3, legal and prompts.trie)
        assert len(points) == 3
        for j, point in enumerate(points):
            expected = by_backwards(model, prompts, windows, SEGMENTS[name], (2 * j + 1) / 6, legal)
            assert expected.abs().max() > 0.1
            # A token without an alternative has the derivative 0, hence atol.
            assert torch.allclose(in_order(batch, point), expected, rtol=1e-6, atol=1e-12)
    assert torch.allclose(whole, sum(points) / 3)


@pytest.mark.parametrize("name", SEGMENTS)
def test_the_gradient_tends_to_the_ablation(toy, exact, name):
    """The midpoint rule's error is gone once the points are closer than the path's turns."""
    model, prompts = exact
    windows = random_windows(len(toy[0].titles), 0, users=1, length=6)[:1]
    batch = collate(build_trees(prompts, windows))
    error = {}
    with forward_mode(model):
        ablation = ablations(model, batch, (SEGMENTS[name],))[0, 0]
        for m in (2, 32, 128):
            gap = segment_gradient(model, batch, SEGMENTS[name], m) - ablation
            error[m] = float(gap.norm() / ablation.norm())
    assert error[32] < error[2] / 4 and error[128] < min(0.005, error[32] / 10)


@pytest.mark.parametrize("pack, softmax", [(True, "full"), (False, "full"), (True, "trie")])
@pytest.mark.parametrize("name", SEGMENTS)
def test_ablation_equals_explicit_forwards(toy, exact, name, pack, softmax):
    model, prompts = exact
    legal = continuations(prompts) if softmax == "trie" else None
    windows = toy[0].train[:6]
    batch = collate(build_trees(prompts, windows, pack))
    with forward_mode(model):
        expected = explicit_ablation(model, prompts, windows, SEGMENTS[name], legal)
        found = ablations(model, batch, (SEGMENTS[name],), (legal and prompts.trie,))[0, 0]
        assert (in_order(batch, found) - expected).abs().max() < 1e-9
        # BOS is never moved: with it at the baseline as well, the figures would differ.
        if name == "auxiliary" and prompts.bos:
            others = explicit_ablation(model, prompts, windows, (TEMPLATE, TITLE, BOS), legal)
            assert (others - expected).abs().max() > 1e-3


@pytest.mark.parametrize("kind, bos", [("gpt2", True), ("gpt2", False), ("llama", False)])
def test_other_kinds_of_models(kind, bos):
    model = small_model(kind)
    prompts = random_prompts(2, bos=bos)
    windows = random_windows(12, 3)
    batch = collate(build_trees(prompts, windows))
    with forward_mode(model):
        for segment in SEGMENTS.values():
            expected = by_backwards(model, prompts, windows, segment, 0.5)
            found = in_order(batch, segment_gradient(model, batch, segment, 1))
            assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
            expected = explicit_ablation(model, prompts, windows, segment)
            found = in_order(batch, ablations(model, batch, (segment,))[0, 0])
            assert (found - expected).abs().max() < 1e-4


@pytest.mark.slow
def test_the_default_is_near_the_ablation(toy):
    """With its default number of points, the gradient orders the tokens much as ablation does."""
    dataset, model, _, prompts = toy
    trees = build_trees(prompts, dataset.test[:20])
    r = [ratio(*attributions(model, trees, method)[:2]) for method in ("gradient", "ablation")]
    assert np.corrcoef(*(x.argsort().argsort() for x in r))[0, 1] > 0.7


@pytest.mark.parametrize("method", ["gradient", "ablation"])
def test_batched_equals_single(toy, method):
    """A token's figures do not depend on the other rows of the batch, whatever their lengths."""
    dataset, model, _, prompts = toy
    trees = build_trees(prompts, random_windows(len(dataset.titles), 5, users=5))
    aux, user, item, step, window = attributions(model, trees, method)
    together = dict(zip(zip(window, step), zip(aux, user)))
    assert len(together) == len(aux) == sum(len(tree.label) for tree in trees)
    for tree in trees:
        aux, user, item, step, window = attributions(model, [tree], method)
        for n, key in enumerate(zip(window, step)):
            assert together[key] == pytest.approx((aux[n], user[n]), abs=2e-4, rel=1e-4)


def test_dropout_has_no_part_in_it():
    model = small_model(dropout=0.5)
    prompts = random_prompts(2)
    trees = build_trees(prompts, random_windows(12, 3))
    expected = attributions(model, trees)
    assert all(np.array_equal(a, b) for a, b in zip(attributions(model.train(), trees), expected))


def test_the_model_is_left_as_it_was(toy):
    dataset, model, _, prompts = toy
    before = {name: p.clone() for name, p in model.named_parameters()}
    attention = model.config._attn_implementation
    model.train()
    attributions(model, build_trees(prompts, dataset.train[:3]))
    assert model.training and model.config._attn_implementation == attention
    model.eval()
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) and p.grad is None


# ---------------------------------------------------------------- saturated tokens


def by_decimals(logits, tangent, label):
    """dz_label - sum_v p_v dz_v in 80 digits."""
    with decimal.localcontext(decimal.Context(prec=80)):
        dz = [decimal.Decimal(float(x)) for x in tangent]
        weights = [decimal.Decimal(float(x)).exp() for x in logits]
        return float(dz[label] - sum(w * d for w, d in zip(weights, dz)) / sum(weights))


@pytest.mark.parametrize("lead", [0.0, 5.0, 15.0, 30.0, 60.0])
@pytest.mark.parametrize("some", [False, True])
def test_saturated_tokens_keep_their_digits(lead, some):
    """The label leads by `lead` nats; the exact values are computed in 80 digits.

    Near p = 1 the textbook form in fp32 is rounding noise, as the last assertion shows.
    some: only the first 25 of the 50 tokens are legal.
    """
    torch.manual_seed(0)
    logits = torch.randn(20, 50)
    tangent = torch.randn(20, 50) * 3
    label = torch.arange(20)
    logits[torch.arange(20), label] = logits.max(1).values + lead
    legal = None
    if some:
        owner = torch.arange(20).repeat_interleave(25)
        legal = (owner, torch.arange(25).repeat(20), 26 * torch.arange(20))
    ours = log_prob_derivative(logits, tangent, label, legal)
    if some:
        logits = logits[:, :25]
        tangent = tangent[:, :25]
    rows = [by_decimals(*row) for row in zip(logits, tangent, label)]
    exact = torch.tensor(rows, dtype=torch.float64)
    assert ours.dtype == torch.float32
    assert ((ours.double() - exact).abs() / exact.abs()).max() < 1e-4
    if lead >= 15:
        textbook = tangent[torch.arange(20), label] - (logits.softmax(-1) * tangent).sum(-1)
        assert ((textbook.double() - exact).abs() / exact.abs()).max() > 1e-2


def test_saturated_tokens_against_the_direct_form_in_float64():
    torch.manual_seed(1)
    logits = torch.randn(30, 50) * 2
    tangent = torch.randn(30, 50)
    label = torch.randint(0, 50, (30,))
    logits[torch.arange(30), label] += 10
    dz = tangent.double()
    direct = dz[torch.arange(30), label] - (logits.double().softmax(-1) * dz).sum(-1)
    ours = log_prob_derivative(logits, tangent, label).double()
    assert torch.allclose(ours, direct, rtol=1e-4, atol=0)


def test_ratio():
    aux = np.array([0.0, 1.0, -3.0, 0.0, 2.0])
    user = np.array([0.0, 1.0, 1.0, -2.0, 0.0])
    with np.errstate(all="raise"):
        assert ratio(aux, user).tolist() == pytest.approx([1, 0.6, 3.5 / 4.5, 0.2, 1])
        assert ratio(np.array([1e-9]), np.array([3e-9]))[0] == pytest.approx(1)  # all but certain


# ---------------------------------------------------------------- relevance


def test_probability_is_that_of_the_prompt_without_history(toy):
    dataset, model, _, prompts = toy
    windows = dataset.train[:30]
    r = relevance(model, prompts, windows, "probability")
    targets = {w.items[w.stop] for w in windows}
    legal = continuations(prompts)
    for item in range(len(dataset.titles)):
        if item not in targets:
            assert np.isnan(r[item]).all()
            continue
        with torch.no_grad():  # BOS, task, marker, title: no history, positions closed up
            logits = separate_logits(model, prompts, Window(0, (item,), 0, 0))
        p = score(logits, prompts.titles[item] + [prompts.eos], legal).exp()
        assert r[item, : len(p)] == pytest.approx(p.numpy(), abs=1e-5)
        assert np.isnan(r[item, len(p) :]).all()


def relevance_by_hand(model, prompts, window, method, legal):
    """r of each of one window's target tokens; a forced token has r = 1, which is our choice."""
    A = []
    for segment in SEGMENTS.values():
        if method == "ablation":
            A.append(explicit_ablation(model, prompts, [window], segment, legal))
            continue
        total = 0
        for j in range(attribution.POINTS):
            s = (j + 0.5) / attribution.POINTS
            total += by_backwards(model, prompts, [window], segment, s, legal)
        A.append(total / attribution.POINTS)
    title = prompts.titles[window.items[window.stop]]
    r = []
    for j, (aux, user) in enumerate(torch.stack(A).abs().T.tolist()):
        forced = len(legal[tuple(title[:j])]) == 1
        r.append(1.0 if forced else (aux + 0.5) / (aux + user + 0.5))
    return r


@pytest.mark.parametrize("method", ["gradient", "ablation"])
def test_relevance_is_the_mean_over_windows_of_a_target(method):
    """Each user has a target that the other lacks, so the sample is every window of both."""
    model = small_model()
    prompts = random_prompts(2, 6, letters=4)
    windows = []
    for user, items in enumerate([(0, 1, 2, 3), (3, 2, 4, 1)]):
        windows += [Window(user, items, 0, stop) for stop in (1, 2, 3)]
    legal = continuations(prompts)
    r = relevance(model, prompts, windows, method)
    expected = {}
    with forward_mode(model):
        for window in windows:
            by_hand = relevance_by_hand(model, prompts, window, method, legal)
            for j, value in enumerate(by_hand):
                expected.setdefault((window.items[window.stop], j), []).append(value)
    for (item, j), values in expected.items():
        assert r[item, j] == pytest.approx(sum(values) / len(values), abs=1e-3)
    assert (~np.isnan(r)).sum() == len(expected)
    forced = sum(values == [1.0, 1.0] for values in expected.values())
    assert 0 < forced < len(expected) / 2


def test_the_sample_covers_every_target_with_whole_trees(toy):
    windows = toy[0].train
    sample = sample_windows(windows, 0)
    assert {w.items[w.stop] for w in sample} == {w.items[w.stop] for w in windows}
    assert len(sample) < len(windows) / 2
    chosen = {(w.user, w.start) for w in sample}
    assert sample == [w for w in windows if (w.user, w.start) in chosen]  # whole, and in order
    assert sample == sample_windows(windows, 0) != sample_windows(windows, 1)


def area_under_curve(values, positive):
    """Chance that a positive's value lies above a negative's, a tie counting half, by ranks."""
    ranks = np.array([(values < x).sum() + ((values == x).sum() + 1) / 2 for x in values])
    n = positive.sum()
    return (ranks[positive].sum() - n * (n + 1) / 2) / (n * (len(values) - n))


def test_area_under_curve():
    positive = np.array([True, False, True, False])
    assert area_under_curve(np.array([4.0, 1.0, 3.0, 2.0]), positive) == 1
    assert area_under_curve(np.array([1.0, 2.0, 2.0, 3.0]), positive) == pytest.approx(1 / 8)


@pytest.mark.slow
def test_default_relevance_finds_the_planted_bias(toy):
    """Tokens that follow from prefix or frequency alone stand above those that taste explains.

    Most tokens are the only continuation, which makes it easy. results/relevance.md has the AUC
    among the 136 tokens with a choice, the first of each title, 16 of which are biased.
    """
    dataset, model, tokenizer, prompts = toy
    r = relevance(model, prompts, dataset.train)
    values = []
    bias = []
    for item, words in enumerate(dataset.planted["words"]):
        tokens = [tokenizer.decode([token]) for token in prompts.titles[item]]
        word = -1
        for j, text in enumerate([*tokens, None]):  # a word's further tokens and EOS are bias
            first = text is not None and (j == 0 or text.startswith(" "))
            word += first
            if not np.isnan(r[item, j]):
                values.append(r[item, j])
                bias.append(words[word] == "bias" if first else True)
    bias = np.array(bias)
    assert 50 < (~bias).sum() < len(bias) - 50
    assert area_under_curve(np.array(values), bias) >= 0.9


def opened_by(quote, model):
    """(prompts, windows): all titles but one open with the token `quote`, of which model is sure.

    Hardly any token but EOS is the only continuation. A bias gives the quote 8 nats more than any
    other token, at every place.
    """
    weight = model.lm_head.weight
    model.lm_head = torch.nn.Linear(weight.shape[1], weight.shape[0])
    model.lm_head.weight = weight
    torch.nn.init.zeros_(model.lm_head.bias)
    torch.nn.init.constant_(model.lm_head.bias[quote : quote + 1], 8.0)
    words = [[a, b, c] for a in (5, 6, 7) for b in (8, 9) for c in (10, 11)]
    titles = [[quote, *title] for title in words]
    titles[0][0] = quote + 1
    prompts = random_prompts(2)._replace(
        titles=titles, trie=build_trie([title + [1] for title in titles])
    )
    return prompts, random_windows(len(titles), 3, users=6, length=len(titles))


@pytest.mark.parametrize("method", ["gradient", "ablation", "probability"])
def test_a_token_that_is_all_but_certain_is_most_relevant(method):
    """SmolLM2's opening quote: a quotient of two tiny numbers would scatter it over the groups.

    r = 1 puts it into the highest group, with the tokens that the trie makes certain; at 0.9999 it
    would fall into the group below.
    """
    model = small_model()
    quote = 30
    prompts, windows = opened_by(quote, model)
    trees = build_trees(prompts, sample_windows(windows, 0))
    tries = (prompts.trie,)
    attribution_method = "ablation" if method == "probability" else method
    aux, user, item, place, _ = attributions(model, trees, attribution_method, tries)
    opens = np.array([title[0] == quote for title in prompts.titles])
    quotes = (place == 0) & opens[item]
    aux, user = np.abs(aux[quotes]), np.abs(user[quotes])
    assert max(aux.max(), user.max()) < 0.02
    without_floor = aux / (aux + user)
    assert without_floor.min() < 0.3 and without_floor.max() > 0.7

    r = relevance(model, prompts, windows, method)
    group, _, _ = cut_groups(r, windows, 3)
    measured = ~np.isnan(r[:, 0])
    assert (r[opens & measured, 0] == 1).all() and not r[0, 0] == 1
    assert (group[opens & measured, 0] == 2).all()
    assert group[0, 0] != 2


# ---------------------------------------------------------------- groups


def targets(times):
    """Windows in which item i is the target times[i] times."""
    return [Window(i, (item,), 0, 0) for item, n in enumerate(times) for i in range(n)]


def test_groups_are_equal_shares_of_the_training_tokens():
    """A title counts as often as it is a target; here its tokens are counted one by one."""
    random = np.random.default_rng(0)
    r = random.random((60, 5))
    times = random.integers(1, 9, 60)
    r[random.random(r.shape) < 0.3] = np.nan
    for k in (1, 2, 4, 7):
        group, cuts, shares = cut_groups(r, targets(times), k)
        assert (group[np.isnan(r)] == -1).all() and set(group[~np.isnan(r)]) == set(range(k))
        tokens = []  # (r, group) of every training token
        for i, j in zip(*np.nonzero(group >= 0)):
            tokens += [(r[i, j], group[i, j])] * times[i]
        by_relevance = [g for _, g in sorted(tokens)]
        assert by_relevance == sorted(by_relevance)  # group 0 is the least relevant
        for g in range(k):
            assert shares[g] == pytest.approx(sum(h == g for _, h in tokens) / len(tokens))
            assert abs(shares[g] * len(tokens) - len(tokens) / k) <= times.max()
            assert cuts[g] == min(x for x, h in tokens if h == g)


def test_equal_relevance_equal_group():
    r = np.random.default_rng(1).integers(0, 9, (40, 6)) / 8
    group, cuts, shares = cut_groups(r, targets([1] * 40), 4)
    for value in np.unique(r):
        assert len(set(group[r == value])) == 1
    assert sum(shares) == pytest.approx(1)
    assert cuts == sorted(cuts)
    assert max(shares) - min(shares) < 0.2


@pytest.mark.parametrize("share", [0.3, 0.5, 0.6, 0.9])
@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_a_large_tie_takes_one_group_and_leaves_the_others(share, value):
    """Many tokens are certain without the user (r = 1).

    They fill a group, and the rest is cut evenly all the same.
    """
    random = np.random.default_rng(2)
    r = random.random((100, 10))
    r[: int(100 * share)] = value
    k = 4
    group, _, shares = cut_groups(r, targets([1] * 100), k)
    tie = next(iter(set(group[r == value])))
    assert set(group.ravel()) == set(range(k)) and len(set(group[r == value])) == 1
    others = [s for g, s in enumerate(shares) if g != tie]
    assert shares[tie] >= share
    if value != 0.5:  # at an end all the others are on one side
        assert max(others) - min(others) < 0.01


@pytest.mark.parametrize("n", range(2, 30))
def test_equal_weights_that_are_fractions_are_cut_evenly(n):
    """Their sum is rounded, by which each alone may be heavier than its share of it."""
    for weight in 0.1, 0.7, 1 / n:
        group, _, shares = cut(np.linspace(0, 1, n), np.full(n, weight), n)
        assert group.tolist() == list(range(n)) and shares == pytest.approx(np.full(n, 1 / n))


def test_an_empty_group_is_an_error():
    r = np.array([[0.0, 1.0], [1.0, 1.0], [0.5, 0.5]])
    assert len(cut_groups(r, targets([2, 1, 1]), 3)[2]) == 3
    with pytest.raises(InputError, match="--groups 4"):
        cut_groups(r, targets([2, 1, 1]), 4)
    with pytest.raises(InputError, match="--groups 2"):
        cut_groups(np.ones((3, 4)), targets([1, 1, 1]), 2)


def test_agreement_of_relevance_between_samples_and_warmups(small, tmp_path, monkeypatch, capsys):
    """A run agrees with itself wholly, with another in part; other data is refused."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import relevance as study

    for name, seed in (("one", "0"), ("same", "0"), ("other", "1")):
        flags = f"--loss sft --seed {seed} --no-test --out {tmp_path} --name {name}"
        gdrt.main([*small, *flags.split()])
    one, same, other = (f"{tmp_path}/{name}/sft" for name in ("one", "same", "other"))
    out = tmp_path / "relevance.json"
    study.main([one, "--others", same, other, "--steps", "1", "--out", str(out)])
    found = json.loads(out.read_text())["agreement"]
    assert list(found) == [
        "another sample of windows",
        "the warm-up of same",
        "the warm-up of other",
    ]
    for method in study.METHODS:
        assert found["the warm-up of same"][method][:2] == pytest.approx([1, 1])
        assert found["the warm-up of other"][method][0] < 1
    assert "the warm-up of other" in capsys.readouterr().out
    config = tmp_path / "other" / "config.json"
    config.write_text(config.read_text().replace('"data": "', '"data": "x'))
    with pytest.raises(InputError, match="other/sft: other data"):
        study.main([one, "--others", other, "--out", str(out)])


@pytest.mark.parametrize("method", ["gradient", "ablation"])
def test_the_rule_of_99_percent_asks_for_p_and_not_for_r(monkeypatch, method):
    """All attributions are 1 nat, so r is 1.5 / 2.5, but for tokens that are certain."""
    model = small_model()
    model.lm_head = torch.nn.Linear(model.lm_head.weight.shape[1], 40)
    torch.nn.init.zeros_(model.lm_head.weight)
    torch.nn.init.zeros_(model.lm_head.bias)
    model.lm_head.bias.data[5] = 6.0  # of the first tokens 5 and 6, 5 has p = 0.9975
    titles = [[5, 7], [6, 7]]
    trie = build_trie([title + [1] for title in titles])
    prompts = random_prompts(2)._replace(titles=titles, trie=trie)
    windows = [Window(0, (1, 0), 0, 1), Window(1, (0, 1), 0, 1)]

    def one_nat(model, batch, *rest):
        return torch.ones(2, len(batch.label))

    monkeypatch.setattr(attribution, "segment_attributions", one_nat)
    r = relevance(model, prompts, windows, method)
    assert r[:, :3].tolist() == [[1, 1, 1], [pytest.approx(0.6), 1, 1]]


def test_the_seed_draws_the_windows_that_relevance_is_measured_on():
    prompts = random_prompts(2, 6, letters=4)
    histories = enumerate(itertools.permutations(range(6), 3))
    windows = [Window(user, items, 0, 2) for user, items in histories]
    args = small_model(), prompts, windows, "ablation"
    first, again, other = (relevance(*args, seed=seed) for seed in (0, 0, 1))
    assert np.array_equal(first, again, equal_nan=True)
    assert np.nanmax(np.abs(first - other)) > 1e-3


def test_the_sample_takes_the_tree_with_the_most_missing_targets():
    """Of the targets 1 2 3 4 8, 1 2 3 5 and 5 6 7, the first and the last are all."""
    windows = []
    for user, items in enumerate([(0, 1, 2, 3, 4, 8), (0, 1, 2, 3, 5), (0, 5, 6, 7)]):
        windows += [Window(user, items, 0, stop) for stop in range(1, len(items))]
    for seed in range(5):
        assert {window.user for window in sample_windows(windows, seed)} == {0, 2}
