"""Exact search against its definition, every title by itself, and beam search that is exact."""

import copy

import numpy as np
import pytest
import torch
from conftest import (
    continuations,
    prompt_of,
    random_prompts,
    random_windows,
    separate_logits,
    small_model,
)
from transformers import DynamicCache

from data import (
    InputError,
    Window,
    build_trie,
    fall_back_to_unpacked,
    load_dataset,
    make_prompts,
    positions,
)
from evaluate import compress, rank, rank_by_definition

GAP = 1e-4  # nats; titles closer than this may stand in either order


def title_scores(logits, title, prompts, legal):
    """Logits (L, V) along one title -> {softmax: sum of its tokens' log-probabilities}."""
    tokens = [*title, prompts.eos]
    total = {"full": 0.0, "trie": 0.0}
    for j, token in enumerate(tokens):
        z = logits[j].double()
        total["full"] += float(z[token] - z.logsumexp(0))
        total["trie"] += float(z[token] - z[legal[tuple(tokens[:j])]].logsumexp(0))
    return total


@torch.no_grad()
def score_all(model, prompts, windows):
    """Every title for every window, a forward pass each -> {softmax: (windows, titles)}."""
    legal = continuations(prompts)
    found = {"full": np.empty((len(windows), len(prompts.titles)))}
    found["trie"] = np.empty_like(found["full"])
    for i, window in enumerate(windows):
        for j, title in enumerate(prompts.titles):
            logits = separate_logits(model, prompts, window, title=title)
            for softmax, score in title_scores(logits, title, prompts, legal).items():
                found[softmax][i, j] = score
    return found


def check(ranking, truth, windows, k, keep_seen):
    """Each list holds the k best unseen titles and their scores, give or take gaps under GAP."""
    for items, scores, true, window in zip(ranking.items, ranking.scores, truth, windows):
        true = true.copy()
        if not keep_seen:
            true[list(window.items[: window.stop])] = -np.inf
        n = min(k, int((true > -np.inf).sum()))
        assert (items[n:] == -1).all() and (scores[n:] == -np.inf).all()
        assert (items[:n] >= 0).all() and len(set(items[:n])) == n
        assert scores[:n] == pytest.approx(np.sort(true)[::-1][:n], abs=GAP)
        assert true[items[:n]] == pytest.approx(scores[:n], abs=GAP)


@pytest.fixture(scope="module")
def scored(toy):
    """(windows, scores of every title): windows of toy, most with short histories to save time."""
    dataset, model, _, prompts = toy
    windows = [w._replace(start=w.stop - 2 - i % 3) for i, w in enumerate(dataset.test[:6])]
    windows += [dataset.test[6], dataset.valid[5]]
    return windows, score_all(model, prompts, windows)


@pytest.mark.parametrize("softmax", ["trie", "full"])
@pytest.mark.parametrize(
    "width, rows, keep_seen",
    [(1, 7, False), (8, 1, True), (8, 7, False), (64, 7, True), (64, 1, False), (1, 1, True)],
)
def test_top_ten_equals_scoring_every_title(toy, scored, softmax, width, rows, keep_seen):
    _, model, _, prompts = toy
    windows, truth = scored
    ranking = rank(model, prompts, windows, 10, softmax, keep_seen, width, rows)
    check(ranking, truth[softmax], windows, 10, keep_seen)


def test_most_prefixes_of_a_branching_catalogue_are_never_read():
    """And the lists are exact all the same."""
    model = small_model()
    prompts = random_prompts(2, 200, letters=6)
    windows = random_windows(200, 3, users=4)
    edges = len(compress(prompts.trie).item)
    for softmax, truth in score_all(model, prompts, windows).items():
        ranking = rank(model, prompts, windows, 10, softmax, keep_seen=True, width=1)
        assert (ranking.forwarded < edges / 2).all()
        check(ranking, truth, windows, 10, keep_seen=True)


def test_the_two_normalisations_differ(scored):
    _, truth = scored
    assert np.abs(truth["full"] - truth["trie"]).max() > 0.01
    assert (truth["full"] <= truth["trie"] + 1e-9).all()


# (titles, lengths, letters): many shared prefixes, long edges, titles that begin other titles.
CATALOGUES = {
    "bushy": (30, (1, 5), 3),
    "long runs": (12, (4, 12), 4),
    "one letter": (9, (1, 10), 1),
    "one item": (1, (3, 4), 5),
    "two": (2, (1, 4), 2),
}


@pytest.mark.parametrize("softmax", ["trie", "full"])
@pytest.mark.parametrize("name", CATALOGUES)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_odd_catalogues(name, kind, softmax):
    n, lengths, letters = CATALOGUES[name]
    prompts = random_prompts(4, n, lengths=lengths, letters=letters, bos=kind == "llama")
    model = small_model(kind, scale=0.5)
    random = np.random.default_rng(0)
    windows = []
    for user in range(3):
        items = tuple(random.permutation(n)[: 1 + user * n // 6].tolist())
        windows.append(Window(user, items + (0,), 0, len(items)))
    truth = score_all(model, prompts, windows)[softmax]
    for k, width, keep_seen in ((1, 2, True), (5, 1, False), (n + 3, 8, True), (n + 3, 3, False)):
        ranking = rank(model, prompts, windows, k, softmax, keep_seen, width, 2)
        check(ranking, truth, windows, k, keep_seen)


def same_lists(model, prompts, windows, k, **options):
    """The definition and the batched search: the same titles in the same order, scores to 1e-5."""
    ranking = rank(model, prompts, windows, k, **options)
    for items, scores, window in zip(ranking.items, ranking.scores, windows):
        best = rank_by_definition(model, prompts, window, k)
        assert items[: len(best)].tolist() == [item for item, _ in best]
        assert scores[: len(best)] == pytest.approx([score for _, score in best], abs=1e-5)
        assert (items[len(best) :] == -1).all()


def test_the_batched_search_lists_what_the_definition_lists(toy):
    dataset, model, _, prompts = toy
    same_lists(model, prompts, dataset.test[:4], 10)


@pytest.mark.parametrize("name", CATALOGUES)
def test_the_definition_on_odd_catalogues(name):
    n, lengths, letters = CATALOGUES[name]
    prompts = random_prompts(4, n, lengths=lengths, letters=letters)
    model = small_model(scale=0.5)
    items = tuple(np.random.default_rng(1).permutation(n).tolist())
    windows = [Window(0, items[:1] * 2, 0, 1), Window(1, items + items[:1], 0, n // 2 + 1)]
    for k in (1, 5, n + 3):
        same_lists(model, prompts, windows, k, width=3, rows=2)


def test_a_title_that_begins_another():
    titles = [[5, 6], [5], [5, 6, 7], [5, 6, 7, 8, 9], [6], [6, 5]]
    trie = build_trie([title + [1] for title in titles])
    prompts = random_prompts(0, 6)._replace(titles=titles, trie=trie)
    model = small_model()
    windows = [Window(0, (4, 0), 0, 1), Window(1, (0, 3, 2, 1), 1, 3)]
    truth = score_all(model, prompts, windows)
    for softmax in ("trie", "full"):
        for width in (1, 4):
            ranking = rank(model, prompts, windows, 4, softmax, True, width)
            check(ranking, truth[softmax], windows, 4, True)


@pytest.mark.parametrize("softmax", ["trie", "full"])
def test_a_model_that_follows_no_mask_is_read_prompt_by_prompt(softmax):
    """Mamba has no attention, so no mask to follow."""
    prompts = random_prompts(4, 20, lengths=(1, 5), letters=3)
    model = small_model("mamba", scale=0.5)
    windows = []
    for user in range(4):
        items = np.random.default_rng(user).permutation(20)[: 3 + user].tolist()
        windows.append(Window(user, tuple(items), 0, 2 + user))
    prompts = fall_back_to_unpacked(model, prompts, windows)
    assert not prompts.packed
    truth = score_all(model, prompts, windows)[softmax]
    for width, rows in ((1, 4), (5, 2)):
        ranking = rank(model, prompts, windows, 10, softmax, False, width, rows)
        check(ranking, truth, windows, 10, False)


def test_scores_over_legal_tokens_are_a_distribution():
    prompts = random_prompts(5, 20, letters=4)
    windows = [Window(0, (1, 2, 3), 0, 2)]
    scores = rank(small_model(), prompts, windows, 20, "trie", True).scores
    assert np.exp(scores).sum() == pytest.approx(1, abs=1e-5)


def test_all_titles_seen_gives_an_empty_list():
    windows = [Window(0, (0, 1, 2, 0), 0, 3), Window(1, (0, 1), 0, 1)]
    ranking = rank(small_model(), random_prompts(6, 3), windows, 2)
    assert (ranking.items[0] == -1).all()
    assert (ranking.scores[0] == -np.inf).all()
    assert set(ranking.items[1]) == {1, 2}


def test_seen_can_be_given():
    prompts = random_prompts(6, 8)
    model = small_model()
    window = Window(0, (0, 1, 2), 0, 2)
    assert set(rank(model, prompts, [window], 8).items[0]) == {-1, 2, 3, 4, 5, 6, 7}
    assert set(rank(model, prompts, [window], 8, seen=[(5, 6, 7)]).items[0]) == {-1, 0, 1, 2, 3, 4}


def test_training_mode_makes_no_difference():
    prompts = random_prompts(6, 8)
    model = small_model(dropout=0.5)
    window = Window(0, (0, 1, 2), 0, 2)
    before = rank(model, prompts, [window], 8).scores
    assert np.array_equal(rank(model.train(), prompts, [window], 8).scores, before)


@pytest.mark.parametrize("softmax", ["trie", "full"])
def test_scores_that_are_not_numbers_are_an_error(softmax):
    prompts = random_prompts(7, 8)
    model = small_model()
    windows = [Window(0, (0, 1, 2), 0, 2), Window(1, (3, 4, 5), 0, 2)]
    broken = copy.deepcopy(model)
    with torch.no_grad():  # one user's history alone
        broken.get_input_embeddings().weight[prompts.titles[4][0]] = torch.nan
    with pytest.raises(InputError, match="NaN"):
        rank(broken, prompts, windows, 3, softmax)
    with torch.no_grad():
        model.get_output_embeddings().weight.fill_(torch.nan)
    with pytest.raises(InputError, match="NaN"):
        rank(model, prompts, windows, 3, softmax)


@pytest.mark.parametrize("softmax", ["trie", "full"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_agrees_with_beam_search_wide_enough_to_be_exact(kind, softmax):
    """generate() with a beam for every prefix; renormalize_logits: over the legal tokens."""
    n = 14
    prompts = random_prompts(8, n, letters=6, lengths=(2, 5))
    model = small_model(kind, scale=0.5)
    legal = continuations(prompts)
    for window in (Window(0, (3, 1, 4, 5), 0, 3), Window(1, (2, 7, 0), 0, 2)):
        prompt = torch.tensor([prompt_of(prompts, window)])
        start = prompt.shape[1]
        out = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            num_beams=4 * n,
            num_return_sequences=n,
            do_sample=False,
            length_penalty=0.0,
            max_new_tokens=6,
            early_stopping="never",
            renormalize_logits=softmax == "trie",
            eos_token_id=1,
            pad_token_id=1,
            return_dict_in_generate=True,
            output_scores=True,
            prefix_allowed_tokens_fn=lambda _, ids: legal.get(tuple(ids[start:].tolist()), [1]),
        )
        theirs = {}
        for ids, score in zip(out.sequences[:, start:].tolist(), out.sequences_scores.tolist()):
            title = ids[: ids.index(1)] if 1 in ids else ids
            if title in prompts.titles:
                theirs.setdefault(prompts.titles.index(title), score)
        ours = rank(model, prompts, [window], n, softmax, True)
        assert set(theirs) == set(range(n))
        assert ours.scores[0] == pytest.approx(sorted(theirs.values(), reverse=True), abs=GAP)
        assert [theirs[item] for item in ours.items[0]] == pytest.approx(ours.scores[0], abs=GAP)


# ---------------------------------------------------------------- real data


@torch.no_grad()
def score_all_cached(model, prompts, window, legal, rows=128):
    """score_all for one window of a large catalogue: the prompt is read once, then copied."""
    first = DynamicCache(config=model.config)
    prompt = torch.tensor([prompt_of(prompts, window)])
    start = model(prompt, cache=first, use_cache=True).logits[0, -1:]
    by_length = {}  # so that there is no padding
    for i, title in enumerate(prompts.titles):
        by_length.setdefault(len(title), []).append(i)
    found = {softmax: np.empty(len(prompts.titles)) for softmax in ("full", "trie")}
    for items in by_length.values():
        for at in range(0, len(items), rows):
            some = items[at : at + rows]
            cache = copy.deepcopy(first)
            cache.batch_repeat_interleave(len(some))
            ids = torch.tensor([prompts.titles[i] for i in some])
            logits = model(ids, cache=cache, use_cache=True).logits
            for i, z in zip(some, logits):
                scores = title_scores(torch.cat([start, z]), prompts.titles[i], prompts, legal)
                for softmax, score in scores.items():
                    found[softmax][i] = score
    return found


@pytest.mark.slow
@pytest.mark.network
def test_top_ten_of_fifty_users_of_ml_100k():
    import gdrt
    from data import build_trees

    dataset = load_dataset("ml-100k")
    model, tokenizer = gdrt.start_model("tiny", dataset)
    prompts = make_prompts(dataset, tokenizer, positions(model))
    windows = gdrt.draw_windows(dataset.train, 2000, 0)
    trees = build_trees(prompts, windows)
    updates = gdrt.make_batches(trees, 128, 1, 0)
    table = torch.zeros(prompts.trie.path.shape, dtype=torch.long)
    span = (0, len(updates))
    cfg = gdrt.TrainConfig()
    gdrt.train(model, prompts, trees, updates, span, table, gdrt.sft_rule, 1, cfg)
    chosen = dataset.test[::19][:50]
    legal = continuations(prompts)
    model.eval()
    truth = [score_all_cached(model, prompts, window, legal) for window in chosen]
    for softmax in ("trie", "full"):
        ranking = rank(model, prompts, chosen, 10, softmax)
        check(ranking, [scores[softmax] for scores in truth], chosen, 10, False)


def test_titles_seen_before_the_history_are_left_out():
    """The history is 2 and 3; 0 and 1 were seen earlier."""
    window = Window(0, (0, 1, 2, 3, 4), 2, 4)
    items = rank(small_model(), random_prompts(6, 8), [window], 8).items[0]
    assert set(items) == {-1, 4, 5, 6, 7}
