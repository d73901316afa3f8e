"""Metrics, comparison and predictions against hand-made lists and plain loops.

`python tests/method/test_metrics.py` writes example_predictions.jsonl anew: lists of a first-order
Markov chain on toy.
"""

import json
import math
import random
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import evaluate
from data import Dataset, InputError, Window, load_dataset

EXAMPLE = Path(__file__).parents[1] / "example_predictions.jsonl"
SCORE = {"HR@10": 0.2160, "NDCG@10": 0.1112}  # what README says of the example


def markov_lists(dataset):
    """What another system's file looks like.

    Each line has the titles that most often follow the user's last one.
    """
    follows = {}
    often = Counter()
    longest = {}
    for w in dataset.train:
        longest[w.user] = w.items[: w.stop + 1]
    for items in longest.values():
        often.update(items)
        for a, b in zip(items, items[1:]):
            follows.setdefault(a, Counter())[b] += 1
    for w in dataset.test:
        after = follows.get(w.items[w.stop - 1], Counter())
        unseen = set(often) - set(w.items[: w.stop])
        best = sorted(unseen, key=lambda i: (-after[i], -often[i], dataset.titles[i]))
        titles = [dataset.titles[i] for i in best[:10]]
        yield {"user": dataset.users[w.user], "position": w.stop, "titles": titles}


def small(
    train=((0, (0, 1, 2, 3), 3), (1, (0, 4, 1, 5), 3)),
    test=((0, (0, 1, 2, 3, 4), 4), (1, (0, 4, 1, 5, 2), 4)),
    items=8,
    genres=None,
):
    """A hand-made Dataset: windows as (user, items, stop)."""
    test = [Window(user, row, 0, stop) for user, row, stop in test]
    return Dataset(
        name="small",
        domain="movies",
        titles=[f"Title {i}" for i in range(items)],
        genres=genres or [()] * items,
        users=["ann", "bob"],
        train=[Window(user, row, 0, stop) for user, row, stop in train],
        valid=test,
        test=test,
        stats={},
        planted=None,
        digest="",
    )


# ---------------------------------------------------------------- accuracy


def one(items, target, scores=None, k=(5, 10)):
    """{metric: value} of one list; without scores, they fall by one from place to place."""
    scores = -np.arange(len(items)) if scores is None else scores
    found = evaluate.accuracy(np.array([items]), np.array([scores], dtype=float), [target], k)
    return {name: value[0] for name, value in found.items()}


def test_known_values():
    first = one([7, 8, 9, 1, 2, 3], 7)
    assert len(first) == 6 and set(first.values()) == {1}
    third = one([7, 8, 9, 1, 2, 3], 9)
    assert third["HR@5"] == 1
    assert third["NDCG@5"] == pytest.approx(0.5)
    assert third["MRR@10"] == pytest.approx(1 / 3)
    sixth = one([7, 8, 9, 1, 2, 3], 3)
    assert sixth["HR@5"] == sixth["NDCG@5"] == sixth["MRR@5"] == 0
    assert sixth["HR@10"] == 1
    assert sixth["NDCG@10"] == pytest.approx(1 / math.log2(7))
    assert sixth["MRR@10"] == pytest.approx(1 / 6)
    assert not any(one([7, 8, 9, 1, 2, 3], 5).values())
    assert not any(one([4, -1, -1, -1], 5, [0, -np.inf, -np.inf, -np.inf]).values())


def test_ties_take_the_mean_rank():
    # Wherever the target stands among equals, its rank is (1 + 2 + 3 + 4) / 4.
    for place in range(4):
        items = [1, 2, 3, 4]
        items[place] = 0
        assert one(items, 0, [1, 1, 1, 1])["MRR@5"] == pytest.approx(1 / 2.5)
    assert one([5, 6, 0, 7], 0, [3, 2, 2, 1])["NDCG@5"] == pytest.approx(1 / math.log2(3.5))
    constant = one(list(range(10)), 0, [0] * 10)
    assert constant["HR@5"] == 0
    assert constant["HR@10"] == 1
    assert constant["MRR@10"] == pytest.approx(1 / 5.5)  # not 1


def test_nan_scores_are_an_error():
    with pytest.raises(InputError, match="NaN"):
        one([0, 1], 0, [np.nan, 1])


def test_accuracy_equals_a_loop():
    source = random.Random(1)
    for _ in range(200):
        length = source.randint(1, 10)
        items = source.sample(range(30), length) + [-1] * (10 - length)
        scores = sorted((source.choice([0, -1, -2, -3.5]) for _ in range(length)), reverse=True)
        scores += [-math.inf] * (10 - length)
        target = source.choice(items[:length] + [29])
        rank = math.inf
        if target in items:
            own = scores[items.index(target)]
            places = [i + 1 for i in range(length) if scores[i] == own]
            rank = sum(places) / len(places)
        wanted = {}
        for k in (5, 10):
            hit = float(rank <= k)
            wanted |= {f"HR@{k}": hit, f"NDCG@{k}": hit / math.log2(rank + 1)}
            wanted |= {f"MRR@{k}": hit / rank}
        assert one(items, target, scores) == pytest.approx(wanted)


# ---------------------------------------------------------------- fairness


def test_training_positives_count_once():
    shared = (0, 1, 2, 3, 4, 5, 6)
    other = (1, 2, 3, 7)
    dataset = small(
        train=((0, shared, 3), (0, shared, 4), (1, other, 2), (1, other, 3)),
        test=((0, shared, 6), (1, (1, 2, 3, 7, 0), 4)),
    )
    user, item = evaluate.training_positives(dataset).T.tolist()
    assert user == [0] * 5 + [1] * 4
    assert item == [0, 1, 2, 3, 4, 1, 2, 3, 7]


def test_training_positives_of_sliding_windows():
    """In CSV folders each window has a tuple of its own, so a pair may be in many of them."""
    dataset = small(train=((0, (0, 1, 2), 2), (0, (1, 2, 3), 2), (1, (5, 6, 7), 2)))
    user, item = evaluate.training_positives(dataset).T.tolist()
    assert user == [0] * 4 + [1] * 3
    assert item == [0, 1, 2, 3, 5, 6, 7]


def test_popularity_groups():
    count = np.array([5, 0, 3, 3, 9, 1, 0, 7, 2, 4])
    titles = list("jihgfedcba")
    names, member = evaluate.popularity_groups(count, titles)
    assert len(names) == 5
    assert member.sum(0).tolist() == [2] * 5
    assert member.sum(1).tolist() == [1] * 10
    assert [sorted(np.flatnonzero(g)) for g in member.T] == [[1, 6], [5, 8], [2, 3], [0, 9], [4, 7]]
    _, split = evaluate.popularity_groups(np.zeros(10), titles)  # equal counts: a before b
    assert [sorted(np.flatnonzero(g)) for g in split.T] == [[8, 9], [6, 7], [4, 5], [2, 3], [0, 1]]


def test_genres_count_in_fractions():
    genres = [("War", "Drama"), ("Drama",), (), ("War", "Drama", "Comedy")]
    names, member = evaluate.genre_groups(genres)
    assert names == ["Comedy", "Drama", "War"]
    assert member == pytest.approx(np.array([[0, 1 / 2, 1 / 2], [0, 1, 0], [0, 0, 0], [1 / 3] * 3]))


def test_known_mgu_and_dgu():
    listed = np.array([0.5, 0.3, 0.2, 0, 0])
    mgu, dgu = evaluate.fairness(listed, np.array([0.1, 0.2, 0.2, 0.2, 0.3]))
    assert mgu == pytest.approx((0.4 + 0.1 + 0 + 0.2 + 0.3) / 5)
    assert dgu == pytest.approx(0.4 + 0.3)
    assert evaluate.fairness(np.array([0.2] * 5), np.array([0.2] * 5)) == (0, 0)
    # The largest there are: 2 / G, and 2.
    assert evaluate.fairness(np.array([1.0, 0]), np.array([0, 1.0])) == (1, 2)


def test_list_metrics_by_hand():
    """Ten items; in training, items 0 to 3 are a positive once and item 4 twice.

    Hence the quintiles {5 6}, {7 8}, {9 0}, {1 2}, {3 4}.
    """
    dataset = small(
        train=((0, (0, 1, 2, 4), 3), (1, (3, 4), 1)),
        test=((0, (0, 1, 2, 4, 9), 4), (1, (3, 4, 9), 2)),
        items=10,
        genres=[("A",)] * 5 + [("A", "B")] * 5,
    )
    items = np.array([[9, 5, 6, 3, -1], [8, 9, 5, 3, -1]])
    scores = np.where(items >= 0, -np.arange(5.0), -np.inf)
    metrics, per_window = evaluate.list_metrics(dataset, dataset.test, items, scores)
    # By quintile: 0, 0, 1, 2 and 3 of the 6 positives; 3, 1, 2, 0 and 2 of the 8 listed.
    GU = [3 / 8, 1 / 8, 2 / 8 - 1 / 6, -2 / 6, 2 / 8 - 3 / 6]
    assert metrics["MGU@5"] == pytest.approx(sum(map(abs, GU)) / 5)
    assert metrics["DGU@5"] == pytest.approx(3 / 8 + 2 / 6)
    assert metrics["exposure"]["GP@5"] == pytest.approx([3 / 8, 1 / 8, 2 / 8, 0, 2 / 8])
    assert metrics["exposure"]["GH"] == pytest.approx([0, 0, 1 / 6, 2 / 6, 3 / 6])
    # Genre B: 6 of the 8 listed count half for it, and no positive has it.
    assert metrics["genre MGU@5"] == pytest.approx(3 / 8)
    assert metrics["genre DGU@5"] == pytest.approx(6 / 8)
    assert metrics["coverage@5"] == 5 / 10
    assert metrics["HR@5"] == 1
    assert metrics["NDCG@5"] == pytest.approx((1 + 1 / math.log2(3)) / 2)
    assert per_window["MRR@5"].tolist() == [1, 0.5]
    json.dumps(metrics)


def test_lists_without_any_title():
    dataset = small(genres=[("A",), ()] * 4)
    nothing = (np.full((2, 10), -1), np.full((2, 10), -np.inf))
    metrics, _ = evaluate.list_metrics(dataset, dataset.test, *nothing)
    assert metrics["HR@10"] == metrics["coverage@10"] == 0
    assert math.isfinite(metrics["MGU@10"])


def test_mgu_depends_on_the_number_of_groups():
    """As NOTE says: G groups bound MGU by 2 / G; splitting groups never lowers MGU * G / 2."""
    source = np.random.default_rng(0)
    for _ in range(100):
        GP, GH = source.dirichlet(np.ones(20), 2)
        wrong = []
        for G in (20, 10, 5):
            mgu, dgu = evaluate.fairness(GP.reshape(G, -1).sum(1), GH.reshape(G, -1).sum(1))
            assert mgu <= 2 / G and dgu <= 2
            wrong.append(mgu * G / 2)
        assert wrong[0] >= wrong[1] >= wrong[2]


def test_thirds():
    count = np.array([1, 2, 2, 2, 3, 4, 5, 6, 9])
    parts = evaluate.by_tercile(count, {"NDCG@10": np.arange(9.0)})
    assert {name: (p["n"], p["from"], p["to"]) for name, p in parts.items()} == {
        "tail": (4, 1, 2),
        "middle": (2, 3, 4),
        "head": (3, 5, 9),
    }
    assert [p["NDCG@10"] for p in parts.values()] == [1.5, 4.5, 7]
    tied = evaluate.by_tercile(np.array([3, 3]), {"HR@5": np.array([0.0, 1])})
    assert tied == {"tail": {"n": 2, "from": 3, "to": 3, "HR@5": 0.5}}


def test_popularity_lists():
    dataset = small(
        train=((0, (0, 1, 2, 3), 3), (1, (1, 2, 4), 2)),
        test=((0, (0, 1, 2, 3, 7), 4), (1, (1, 2, 4, 7), 3)),
    )
    items, scores = evaluate.popularity_lists(dataset, dataset.test, 5)
    # Seen items are left out, and equal counts are ordered by title.
    assert items.tolist() == [[4, 5, 6, 7, -1], [0, 3, 5, 6, 7]]
    assert scores.tolist() == [[1, 0, 0, 0, -math.inf], [1, 1, 0, 0, 0]]
    items, _ = evaluate.popularity_lists(dataset, dataset.test, 3, keep_seen=True)
    assert items.tolist() == [[1, 2, 0]] * 2


# ---------------------------------------------------------------- comparison


def test_interval_of_a_known_case():
    """One window a user, one seed: the interval of a mean is +- 1.96 sd / sqrt(n)."""
    x = np.random.default_rng(5).normal(3, 2, (1, 900))
    value, low, high = evaluate.interval(x, np.arange(900))
    half = 1.96 * x.std() / 30
    assert value == pytest.approx(x.mean())
    assert low == pytest.approx(x.mean() - half, abs=0.1 * half)
    assert high == pytest.approx(x.mean() + half, abs=0.1 * half)


def test_interval_covers():
    """The 95% interval holds the truth about that often, though a user's windows are alike."""
    source = np.random.default_rng(6)
    held = 0
    for _ in range(200):
        user = np.repeat(np.arange(60), 3)
        x = source.normal(0, 1, 60)[user] + source.normal(0, 0.3, 180)
        _, low, high = evaluate.interval(x[None], user)
        held += low <= 0 <= high
    # 200 * 0.94 +- 3 sd. Resampling windows instead of users holds it 74% of the time.
    assert 178 <= held <= 198


def test_users_keep_their_windows():
    """Five copies of every window of a user tell nothing new."""
    x = np.random.default_rng(7).normal(size=(1, 100))
    users = np.arange(100)
    copied = evaluate.interval(np.repeat(x, 5, 1), np.repeat(users, 5))
    assert evaluate.interval(x, users) == pytest.approx(copied)


def test_resample_equals_a_loop():
    """The vectorised bootstrap, draw by draw, from the same counts.

    Users are counted in the order in which they come.
    """
    values = np.random.default_rng(8).normal(size=(2, 6, 3))
    users = np.array([4, 4, 9, 2, 2, 2])

    def statistic(mean):
        return np.abs(mean).max(-1)

    drawn = evaluate.resample(*evaluate.sums_by_user(values, users), statistic, seed=3)
    taken = evaluate.draws(3, 3)
    for i in range(0, evaluate.DRAWS, 97):
        total = 0.0
        for s in range(2):
            picked = []
            for u, times in zip((4, 9, 2), taken[i]):
                picked += list(values[s, users == u]) * int(times)
            total += max(abs(sum(picked)) / len(picked)) / 2
        assert drawn[i] == pytest.approx(total)
    assert (taken.sum(1) == 3).all()


def test_ids_draw_as_indices_do():
    """A user's number and its name, which sort differently, give the same interval."""
    x = np.random.default_rng(4).normal(size=(1, 30))
    users = np.arange(30)
    assert evaluate.interval(x, users) == evaluate.interval(x, [str(u) for u in users])


def test_interval_of_a_size_covers():
    """Chance adds to the MGU of nearly fair lists, and once more when the bootstrap redraws them.

    The interval allows for both; the percentiles of the draws do not.
    """
    source = np.random.default_rng(2)
    users = np.arange(150)
    truth = 0.004
    held = 0
    percentiles = 0

    def statistic(mean):
        return evaluate.fairness(mean, np.full(5, 0.2))[0]

    for _ in range(100):
        lists = source.multinomial(10, [0.21, 0.19, 0.2, 0.2, 0.2], 150)[None] / 10  # (1, n, G)
        _, low, high = evaluate.interval(lists, users, statistic)
        held += 0 <= low <= truth <= high
        drawn = evaluate.resample(lists, np.ones(150), statistic)
        low, high = np.percentile(drawn, (2.5, 97.5))
        percentiles += low <= truth <= high
    assert held >= 78 and percentiles <= 37  # expected 88 and 24, each with 3 sd
    # Without chance the interval is the value, and a difference has a sign.
    flat = np.tile(np.array([0.6, 0.1, 0.1, 0.1, 0.1]), (1, 9, 1))
    found = evaluate.interval(flat, np.arange(9), statistic)
    assert found == pytest.approx((0.16, 0.16, 0.16))
    fair = np.full((1, 9, 5), 0.2)
    found = evaluate.interval(fair, np.arange(9), statistic, against=flat)
    assert found == pytest.approx((-0.16, -0.16, -0.16))


def test_values_by_seed_alone():
    """Values that depend on the seed alone: the interval is Student's t of the seeds' mean."""
    x = np.repeat(np.array([[0.0], [1.0], [5.0]]), 50, 1)
    half = 4.303 * np.std([0, 1, 5], ddof=1) / 3**0.5
    assert evaluate.interval(x, np.arange(50)) == pytest.approx((2, 2 - half, 2 + half))
    # Of runs of unequal numbers of seeds, both are uncertain.
    base = np.repeat(np.array([[0.0], [1.0]]), 50, 1)
    both = np.hypot(half, 12.706 * np.std([0, 1], ddof=1) / 2**0.5)
    found = evaluate.interval(x, np.arange(50), against=base)
    assert found == pytest.approx((1.5, 1.5 - both, 1.5 + both))


@pytest.mark.parametrize("between_seeds", [0, 1, 10])
def test_interval_of_three_seeds_covers(between_seeds):
    """However much of the difference is due to the seed, at three of them as well."""
    source = np.random.default_rng(5)
    users = np.arange(40)
    held = 0
    for _ in range(300):
        of_user = source.normal(size=40)
        of_seed = between_seeds * source.normal(size=(3, 1)) / 40**0.5
        values = of_user + of_seed + 0.3 * source.normal(size=(3, 40))
        _, low, high = evaluate.interval(values, users)
        held += low <= 0 <= high
    assert held >= 0.91 * 300  # 95% less three standard errors


def test_differences_are_paired():
    """A constant lead over a noisy base is certain; unpaired it would drown."""
    base = np.random.default_rng(9).normal(0, 5, (3, 200))
    users = np.arange(200)
    lead = evaluate.interval(base + 0.1, users, against=base)
    assert lead == pytest.approx((0.1, 0.1, 0.1))
    # With other seeds, users stay paired.
    value, low, high = evaluate.interval(base[:2], users, against=base)
    assert low < value < high


def test_interval_is_reproducible():
    x = np.random.default_rng(1).normal(size=(2, 30))
    users = np.arange(30)
    first = evaluate.interval(x, users)
    evaluate.draws.cache_clear()
    assert evaluate.interval(x, users) == first
    one = np.ones(30)
    assert (evaluate.resample(x, one, seed=1) != evaluate.resample(x, one)).any()


def fake_run(loss, seed, items, dataset, **arguments):
    """What evaluate.py reads of a run with these lists, for `pool`."""
    scores = -np.tile(np.arange(items.shape[1], dtype=float), (len(items), 1))
    metrics, per_window = evaluate.list_metrics(dataset, dataset.test, items, scores)
    # The data may have lain elsewhere for each seed: the runs are pooled all the same.
    given = {"seed": seed, "tau": 1.0, "loss": ["sft", "gdrt"], "dataset": f"place{seed}"}
    return {
        "loss": loss,
        "folder": Path(f"{loss}{seed}"),
        "config": {"arguments": given | arguments},
        "metrics": metrics,
        "per_window": per_window,
        "items": items,
    }


def test_seeds_of_one_configuration_are_pooled():
    dataset = small()
    lists = np.array([[4, 5, 6, 7, 3], [2, 3, 6, 7, 0]])
    runs = [
        fake_run("sft", 0, lists, dataset),
        fake_run("gdrt", 1, lists, dataset),
        fake_run("sft", 1, lists[:, ::-1], dataset),
        fake_run("gdrt", 0, lists, dataset),
    ]
    pooled = {name: len(members) for name, members in evaluate.pool(runs).items()}
    assert list(pooled.items()) == [("sft seeds 0,1", 2), ("gdrt seeds 0,1", 2)]
    other = fake_run("gdrt", 1, lists, dataset, tau=3.0)
    names = ["sft tau=1.0 seed 0", "gdrt tau=1.0 seed 1", "gdrt tau=3.0 seed 1"]
    assert list(evaluate.pool([*runs[:2], other])) == names
    newer = fake_run("sft", 0, lists, dataset, lora=8)  # a flag that the first run did not know
    assert list(evaluate.pool([runs[0], newer])) == ["sft lora=None seed 0", "sft lora=8 seed 0"]
    pair = [fake_run("sft", seed, lists, dataset) for seed in (0, 1)]
    for run, precision in zip(pair, ["fp32", "bf16"]):  # what --precision auto stood for
        run["config"]["precision"] = precision
    names = ["sft precision=fp32 seed 0", "sft precision=bf16 seed 1"]
    assert list(evaluate.pool(pair)) == names
    with pytest.raises(InputError, match="once"):
        evaluate.pool([runs[0], runs[0]])
    runs[0]["metrics"]["worst group NLL"] = 2.0
    runs[1]["metrics"]["worst group NLL"] = None  # no test title was a target of training
    header, rows = evaluate.comparison(evaluate.pool(runs), dataset, dataset.test)
    table = {row[0]: row[1:] for row in rows}
    assert header == ("", "sft seeds 0,1", "gdrt seeds 0,1", "gdrt seeds 0,1 less sft seeds 0,1")
    assert table["HR@5"][0].startswith("1.0000 [1.0000")
    assert table["NDCG@5"][1].startswith("1.0000")
    assert table["coverage@5"][2] == ""
    assert table["worst group NLL"] == ("2.0000", "", "")
    assert evaluate.format_table(header, rows).count("\n") == len(rows) + 1


def test_thirds_of_a_pool_are_means_over_seeds():
    dataset = small()
    lists = np.array([[4, 5, 6, 7, 3], [2, 3, 6, 7, 0]])
    runs = [fake_run("sft", 0, lists, dataset), fake_run("sft", 1, lists[:, ::-1], dataset)]
    seeds = [run["metrics"] for run in runs]
    one, two = (seed["by user activity"]["tail"]["NDCG@10"] for seed in seeds)
    assert one != two
    header, rows = evaluate.tercile_table({"sft": seeds, "first": seeds[:1]}, "by user activity")
    assert header == ("by user activity", "training positives", "n", "sft", "first")
    assert rows == [("tail", "4 to 4", 2, f"{(one + two) / 2:.4f}", f"{one:.4f}")]


def test_mgu_of_resampled_lists():
    """The point value of a pool is the metric of each seed's lists, averaged over seeds."""
    dataset = small(items=20)
    source = np.random.default_rng(3)
    runs = []
    for seed in range(3):
        lists = np.stack([source.permutation(20)[:10], source.permutation(20)[:10]])
        runs.append(fake_run("sft", seed, lists, dataset))
    for metric, (values, statistic) in evaluate.sampled(dataset, runs).items():
        value, low, high = evaluate.interval(values, np.array([0, 1]), statistic)
        assert value == pytest.approx(np.mean([run["metrics"][metric] for run in runs])), metric
        assert low <= high


# ---------------------------------------------------------------- predictions

ANN = {"user": "ann", "position": 4, "titles": ["Title 4", "Title 5", "Title 6", "Title 7"]}
BOB = {"user": "bob", "position": 4, "titles": ["Title 3", "Title 2", "Title 6", "Title 7"]}


def write_lines(path, lines):
    """A file with these lines; what is not text is written as JSON."""
    text = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("".join(line + "\n" for line in text), encoding="utf-8")


def read(tmp_path, *lines, **options):
    dataset = small()
    path = tmp_path / "lists.jsonl"
    write_lines(path, lines)
    return evaluate.read_predictions(path, dataset, dataset.test, **options)


def test_predictions_of_any_system(tmp_path):
    items, scores, missing = read(tmp_path, BOB, ANN | {"scores": [3, 2, 2, 1.5]})
    assert items[:, :5].tolist() == [[4, 5, 6, 7, -1], [3, 2, 6, 7, -1]]
    assert not any(missing.values())
    assert scores[:, :5].tolist() == [[3, 2, 2, 1.5, -math.inf], [0, -1, -2, -3, -math.inf]]
    # With one window a user, the position is known.
    bob = {"user": "bob", "titles": BOB["titles"], "target": "Title 2"}
    shuffled, _, _ = read(tmp_path, ANN, bob)
    assert (shuffled == items).all()


@pytest.mark.parametrize(
    "lines, says",
    [
        ([], "holds no line"),
        ([ANN, '{"user": "bob", '], "lists.jsonl:2: not JSON"),
        ([ANN, "[" * 100_000], "lists.jsonl:2: not JSON"),
        ([ANN, "17"], "lists.jsonl:2: should be an object"),
        ([ANN, BOB | {"titles": "Title 2"}], "should be an object"),
        ([ANN, BOB | {"user": "eve"}], "user eve, position 4 is none of the 2 windows to rank"),
        ([ANN, BOB | {"position": 3}], "user bob, position 3 is none of the 2 windows to rank"),
        ([ANN, BOB | {"position": [4]}], "is none of the 2 windows to rank"),
        ([ANN, BOB | {"target": "Title 7"}], "another target than 'Title 7'"),
        ([ANN, BOB, ANN], "lists.jsonl:3: user ann, position 4 is there twice"),
        (
            [ANN, BOB | {"titles": ["Title 3", "Nowhere", "Title 6", "Title 7"]}],
            "'Nowhere' is no title",
        ),
        ([ANN, BOB | {"titles": ["Title 3", 5, "Title 6", "Title 7"]}], "5 is no title"),
        (
            [ANN, BOB | {"titles": ["Title 3", "Title 3", "Title 6", "Title 7"]}],
            "'Title 3' is listed twice",
        ),
        ([ANN, BOB | {"scores": [1, 0]}], "scores should be 4 finite numbers"),
        ([ANN, BOB | {"scores": [3, 2, math.nan, 0]}], "NaN is no score"),
        ([ANN, BOB | {"scores": [3, 2, "1", 0]}], "scores should be 4 finite"),
        ([ANN, BOB | {"scores": [0, 1, 2, 3]}], "scores rise"),
        ([ANN], "of 2 windows 1 have no list"),
        ([ANN, BOB | {"titles": ["Title 3"]}], "1 lists have under 10 titles"),
        ([ANN, BOB | {"titles": []}], "1 lists have under 10 titles"),
    ],
)
def test_predictions_refused(tmp_path, lines, says):
    with pytest.raises(InputError) as error:
        read(tmp_path, *lines)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_equal_scores_beyond_the_tenth_find_nothing(tmp_path):
    """All unseen titles with one score, the target first: its mean rank among them is no hit.

    A longer list changes nothing else.
    """
    dataset = small(items=40)
    path = tmp_path / "lists.jsonl"
    ann = {"user": "ann", "titles": [f"Title {i}" for i in range(4, 40)]}
    bob = {"user": "bob", "titles": [f"Title {i}" for i in (2, *range(6, 40), 3)]}

    def metrics(score):
        scores = {"scores": [score(i) for i in range(36)]}
        write_lines(path, [ann | scores, bob | scores])
        items, given, missing = evaluate.read_predictions(path, dataset, dataset.test)
        assert not any(missing.values())
        return evaluate.list_metrics(dataset, dataset.test, items, given)[0], items.shape

    constant, shape = metrics(lambda i: 0.5)
    assert constant["HR@10"] == constant["MRR@10"] == 0 and shape == (2, 36)
    falling, shape = metrics(lambda i: -i)
    assert falling["MRR@10"] == 1 and shape == (2, 10)
    tied, shape = metrics(lambda i: -min(i, 8))  # tied from the ninth on
    assert tied["MRR@10"] == 1 and shape == (2, 36)
    assert tied["coverage@10"] == falling["coverage@10"]
    assert tied["MGU@10"] == falling["MGU@10"]


def test_files_refused(tmp_path):
    (tmp_path / "latin").write_bytes(b'{"user": "\xe9"}\n')
    for name, says in ("absent", "No such file"), (".", "directory"), ("latin", "UTF-8"):
        with pytest.raises(InputError, match=says):
            evaluate.read_lines(tmp_path / name)


def test_missing_lists_count_as_misses(tmp_path):
    short = ANN | {"titles": ["Title 5", "Title 4"]}
    items, scores, missing = read(tmp_path, short, allow_missing=True)
    assert missing == {"windows without a list": 1, "lists under 10 titles": 1}
    dataset = small()
    metrics, _ = evaluate.list_metrics(dataset, dataset.test, items, scores)
    assert metrics["HR@5"] == 0.5 and metrics["MRR@5"] == 0.25


def test_windows_that_share_user_and_position(tmp_path):
    """CSV folders: the target tells such windows apart, or else their order."""
    dataset = small(test=((0, (0, 1, 2), 2), (0, (4, 1, 3), 2), (1, (4, 1, 3), 2)))
    path = tmp_path / "lists.jsonl"
    titles = [f"Title {i}" for i in range(8)]
    lists = [{"user": "ann", "position": 2, "titles": titles[j:]} for j in range(3)]

    def read(lines):
        write_lines(path, lines)
        return evaluate.read_predictions(path, dataset, dataset.test, k=5)[0][:2, 0].tolist()

    bob = lists[2] | {"user": "bob"}
    assert read([lists[0], lists[1], bob]) == [0, 1]
    assert read([lists[0] | {"target": "Title 3"}, lists[1] | {"target": "Title 2"}, bob]) == [1, 0]
    with pytest.raises(InputError, match="twice"):
        read([lists[0], lists[1], lists[2], bob])
    with pytest.raises(InputError, match="several windows to rank"):
        read([{"user": "ann", "titles": titles}, bob])


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(10**308, 10**400)
    | st.floats()
    | st.text(max_size=6),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)
LINES = st.fixed_dictionaries(
    {},
    optional={
        "user": st.sampled_from(["ann", "bob", "eve\n"]) | JSON_VALUES,
        "position": st.sampled_from([4, 3, None]) | JSON_VALUES,
        "target": JSON_VALUES,
        "titles": st.permutations([f"Title {i}" for i in range(8)]).map(lambda titles: titles[:4])
        | st.lists(JSON_VALUES, max_size=3)
        | JSON_VALUES,
        "scores": st.lists(st.integers() | st.floats(), min_size=4, max_size=4) | JSON_VALUES,
    },
)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(
        LINES.map(json.dumps) | JSON_VALUES.map(json.dumps) | st.text(max_size=20), max_size=4
    ),
    st.booleans(),
)
def test_predictions_refused_or_read_whatever_they_hold(tmp_path, lines, allow):
    dataset = small()
    file = tmp_path / "lists.jsonl"
    file.write_text("\n".join(lines), encoding="utf-8", errors="replace")
    try:
        items, scores, _ = evaluate.read_predictions(
            file, dataset, dataset.test, allow_missing=allow
        )
    except InputError as error:
        assert str(error).startswith(str(file)) and "\n" not in str(error)
        return
    assert items.shape == scores.shape == (2, 10) and items.max() < 8 and not np.isnan(scores).any()


def test_written_predictions_are_read_back(tmp_path):
    dataset = small(items=14)
    source = np.random.default_rng(0)
    lists = []
    for w in dataset.test:
        lists.append(source.permutation(np.setdiff1d(range(14), w.items[: w.stop]))[:10])
    items = np.stack(lists)
    scores = -np.sort(source.random((2, 10)))
    items[1, 9] = -1
    scores[1, 9] = -np.inf
    path = tmp_path / "p.jsonl"
    ranking = evaluate.Ranking(items, scores, None, None, None)
    nll = {"NLL": [1.0, 2.0], "legal NLL": [0.5, 1.0]}
    evaluate.write_predictions(path, dataset, dataset.test, ranking, nll)
    again, same, missing = evaluate.read_predictions(
        path, dataset, dataset.test, allow_missing=True
    )
    assert (again == items).all() and (same == scores).all()
    assert missing["lists under 10 titles"] == 1
    first = json.loads(path.read_text().split("\n")[0])
    assert first["history"] == ["Title 0", "Title 1", "Title 2", "Title 3"]


def test_bundled_example(capsys):
    """The example is what the chain lists on toy, and scores what README says."""
    dataset = load_dataset("toy")
    lines = EXAMPLE.read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == list(markov_lists(dataset))
    evaluate.main(["--dataset", "toy", "--predictions", str(EXAMPLE)])
    printed = {}
    for line in capsys.readouterr().out.split("\n"):
        if line.startswith(("HR", "NDCG")):
            name, value, *_ = line.split()
            printed[name] = float(value)
    assert {name: printed[name] for name in SCORE} == pytest.approx(SCORE, abs=5e-5)


@pytest.mark.parametrize(
    "argv, says",
    [
        ([], "name one RUN"),
        (["nowhere"], "nowhere: no such run"),
        (["--predictions", str(EXAMPLE)], "--dataset"),
        (["--dataset", "toy", "--predictions", "nowhere.jsonl"], "nowhere.jsonl: No such file"),
        (["--dataset", "toi", "--predictions", str(EXAMPLE)], "--dataset toi"),
        (["--dataset", "toy", "--predictions", str(EXAMPLE), "--report"], "--report"),
    ],
)
def test_command_refuses(argv, says, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as error:
        evaluate.main(argv)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_the_domain_says_how_titles_are_spelt(tmp_path, capsys):
    """As a run with --domain movies writes them; the files do not say that these are films."""
    folder = tmp_path / "things"
    folder.mkdir()
    names = [f"Film {i}, The" for i in range(8)]
    items = "".join(f"{i}\t{name}\n" for i, name in enumerate(names))
    (folder / "a.item").write_text("item_id:token\ttitle:token_seq\n" + items)
    header = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
    ratings = "".join(f"ann\t{i}\t5\t{i}\n" for i in range(6))
    (folder / "a.inter").write_text(header + ratings)
    lists = tmp_path / "lists.jsonl"
    lists.write_text(json.dumps({"user": "ann", "titles": ["The Film 5"]}))
    flags = ["--dataset", str(folder), "--predictions", str(lists), "--allow-missing"]
    with pytest.raises(InputError, match="The Film 5"):
        evaluate.main(flags)
    evaluate.main([*flags, "--domain", "movies"])
    assert capsys.readouterr().out.count("1.0000 [1.0000, 1.0000]") == 6


def test_two_files_of_one_name(tmp_path):
    copy = tmp_path / EXAMPLE.name
    copy.write_bytes(EXAMPLE.read_bytes())
    with pytest.raises(InputError, match="rename the file"):
        evaluate.main(["--dataset", "toy", "--predictions", str(EXAMPLE), str(copy)])


def test_a_run_without_model(tmp_path):
    with pytest.raises(InputError, match="no model in it"):
        evaluate.main([str(tmp_path)])
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match="not whole JSON"):
        evaluate.main([str(tmp_path)])


if __name__ == "__main__":
    write_lines(EXAMPLE, markov_lists(load_dataset("toy")))


# ---------------------------------------------------------------- by hand


def test_thirds_count_training_positives_alone():
    """Ann has 4 of them and Bob 2; item 4 is one twice, and item 7, a test target, never."""
    train = [(0, (0, 1, 2, 4), 3), (1, (3, 4), 1)]
    test = [(0, (0, 1, 2, 4, 7), 4), (1, (3, 4), 1)]
    dataset = small(train, test)
    items = np.array([[7, 5, 6], [3, 5, 6]])  # Ann's target is found, Bob's is not
    scores = -np.tile(np.arange(3.0), (2, 1))
    metrics, _ = evaluate.list_metrics(dataset, dataset.test, items, scores)
    expected = {
        "by item popularity": [(0, 0, 1), (2, 2, 0)],
        "by user activity": [(2, 2, 0), (4, 4, 1)],
    }
    for by, rows in expected.items():
        found = [(part["from"], part["to"], part["HR@5"]) for part in metrics[by].values()]
        assert found == rows


def test_equally_popular_titles_stand_in_the_order_of_their_titles():
    dataset = small([(0, (0, 1, 2, 3), 3)], [(1, (5, 4), 1)])
    dataset.titles.reverse()
    items, _ = evaluate.popularity_lists(dataset, dataset.test, 8)
    assert items.tolist() == [[3, 2, 1, 0, 7, 6, 4, -1]]


def test_users_and_seeds_add_in_quadrature():
    """Users make 3 to either side, or 3 and 6, and seeds 4."""
    drawn = np.linspace(-3 / 0.95, 3 / 0.95, 4001)
    assert evaluate.ends_of(drawn, 4.0) == pytest.approx((-5, 5))
    assert evaluate.ends_of(np.where(drawn > 0, 2 * drawn, drawn), 0.0) == pytest.approx((-3, 6))


STUDENTS_T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306}


@pytest.mark.parametrize("n, t", [*STUDENTS_T.items(), (10, 2.262), (15, 2.262)])
def test_seeds_have_the_interval_of_students_t(n, t):
    """Of n - 1 degrees of freedom, from a printed table; that of nine serves for more."""
    x = np.arange(float(n))
    assert evaluate.seed_half_width(x) == pytest.approx(t * x.std(ddof=1) / n**0.5)
