"""Metrics, comparison and predictions against hand-made lists with known values and against plain loops.

`python tests/method/test_metrics.py` writes example_predictions.jsonl anew: lists of a first-order Markov chain on toy.
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
    """What another system's file looks like: lines with the titles that most often follow the user's last one."""
    follows, often, longest = {}, Counter(), {}
    for w in dataset.train:
        longest[w.user] = w.items[: w.stop + 1]
    for items in longest.values():
        often.update(items)
        for a, b in zip(items, items[1:]):
            follows.setdefault(a, Counter())[b] += 1
    for w in dataset.test:
        after = follows.get(w.items[w.stop - 1], Counter())
        best = sorted(
            set(often) - set(w.items[: w.stop]),
            key=lambda i: (-after[i], -often[i], dataset.titles[i]),
        )[:10]
        yield {
            "user": dataset.users[w.user],
            "position": w.stop,
            "titles": [dataset.titles[i] for i in best],
        }


def small(
    train=((0, (0, 1, 2, 3), 3), (1, (0, 4, 1, 5), 3)),
    test=((0, (0, 1, 2, 3, 4), 4), (1, (0, 4, 1, 5, 2), 4)),
    items=8,
    genres=None,
):
    """A hand-made Dataset: windows as (user, items, stop)."""
    parts = [[Window(user, row, 0, stop) for user, row, stop in part] for part in (train, test)]
    return Dataset(
        "small",
        "movies",
        [f"Title {i}" for i in range(items)],
        genres or [()] * items,
        ["ann", "bob"],
        parts[0],
        parts[1],
        parts[1],
        {},
        None,
        "",
    )


# ------------------------------------------------------------------------------------------------ accuracy


def one(items, target, scores=None, k=(5, 10)):
    items = np.array([items])
    scores = (
        -np.arange(items.shape[1], dtype=float)[None]
        if scores is None
        else np.array([scores], dtype=float)
    )
    return {name: value[0] for name, value in evaluate.accuracy(items, scores, [target], k).items()}


def test_known_values():
    assert one([7, 8, 9, 1, 2, 3], 7) == {
        f"{name}@{k}": 1 for k in (5, 10) for name in ("HR", "NDCG", "MRR")
    }
    third = one([7, 8, 9, 1, 2, 3], 9)
    assert (
        third["HR@5"] == 1
        and third["NDCG@5"] == pytest.approx(0.5)
        and third["MRR@10"] == pytest.approx(1 / 3)
    )
    sixth = one([7, 8, 9, 1, 2, 3], 3)
    assert sixth["HR@5"] == sixth["NDCG@5"] == sixth["MRR@5"] == 0
    assert (
        sixth["HR@10"] == 1
        and sixth["NDCG@10"] == pytest.approx(1 / math.log2(7))
        and sixth["MRR@10"] == pytest.approx(1 / 6)
    )
    assert not any(one([7, 8, 9, 1, 2, 3], 5).values())
    assert not any(one([4, -1, -1, -1], 5, [0, -np.inf, -np.inf, -np.inf]).values())


def test_ties_take_the_mean_rank():
    for place in range(
        4
    ):  # wherever the target stands among equals, its rank is (1 + 2 + 3 + 4) / 4
        items = [1, 2, 3, 4]
        items[place] = 0
        assert one(items, 0, [1, 1, 1, 1])["MRR@5"] == pytest.approx(1 / 2.5)
    assert one([5, 6, 0, 7], 0, [3, 2, 2, 1])["NDCG@5"] == pytest.approx(1 / math.log2(3.5))
    constant = one(list(range(10)), 0, [0] * 10)
    assert (
        constant["HR@5"] == 0
        and constant["HR@10"] == 1
        and constant["MRR@10"] == pytest.approx(1 / 5.5)
    )  # not 1


def test_nan_scores_are_an_error():
    with pytest.raises(InputError, match="NaN"):
        one([0, 1], 0, [np.nan, 1])


def test_accuracy_equals_a_loop():
    source = random.Random(1)
    for _ in range(200):
        length = source.randint(1, 10)
        items = source.sample(range(30), length) + [-1] * (10 - length)
        scores = sorted((source.choice([0, -1, -2, -3.5]) for _ in range(length)), reverse=True) + [
            -math.inf
        ] * (10 - length)
        target = source.choice(items[:length] + [29])
        wanted = {f"{name}@{k}": 0.0 for k in (5, 10) for name in ("HR", "NDCG", "MRR")}
        if target in items:
            own = scores[items.index(target)]
            places = [i + 1 for i in range(length) if scores[i] == own]
            rank = sum(places) / len(places)
            for k in (5, 10):
                if rank <= k:
                    wanted |= {
                        f"HR@{k}": 1.0,
                        f"NDCG@{k}": 1 / math.log2(rank + 1),
                        f"MRR@{k}": 1 / rank,
                    }
        assert one(items, target, scores) == pytest.approx(wanted)


# ------------------------------------------------------------------------------------------------ fairness


def test_training_positives_count_once():
    shared, other = (0, 1, 2, 3, 4, 5, 6), (1, 2, 3, 7)
    dataset = small(
        train=((0, shared, 3), (0, shared, 4), (1, other, 2), (1, other, 3)),
        test=((0, shared, 6), (1, (1, 2, 3, 7, 0), 4)),
    )
    assert evaluate.training_positives(dataset).tolist() == [
        [0, 0],
        [0, 1],
        [0, 2],
        [0, 3],
        [0, 4],
        [1, 1],
        [1, 2],
        [1, 3],
        [1, 7],
    ]


def test_training_positives_of_sliding_windows():
    """CSV folders give a tuple a window; a pair stands in many of them."""
    dataset = small(train=((0, (0, 1, 2), 2), (0, (1, 2, 3), 2), (1, (5, 6, 7), 2)))
    assert evaluate.training_positives(dataset).tolist() == [
        [0, 0],
        [0, 1],
        [0, 2],
        [0, 3],
        [1, 5],
        [1, 6],
        [1, 7],
    ]


def test_popularity_groups():
    count, titles = np.array([5, 0, 3, 3, 9, 1, 0, 7, 2, 4]), list("jihgfedcba")
    names, member = evaluate.popularity_groups(count, titles)
    assert (
        member.sum(0).tolist() == [2] * 5 and member.sum(1).tolist() == [1] * 10 and len(names) == 5
    )
    assert [sorted(np.flatnonzero(g)) for g in member.T] == [[1, 6], [5, 8], [2, 3], [0, 9], [4, 7]]
    split = evaluate.popularity_groups(np.zeros(10), titles)[
        1
    ]  # equal counts: by title, a before b
    assert [sorted(np.flatnonzero(g)) for g in split.T] == [[8, 9], [6, 7], [4, 5], [2, 3], [0, 1]]


def test_genres_count_in_fractions():
    names, member = evaluate.genre_groups(
        [("War", "Drama"), ("Drama",), (), ("War", "Drama", "Comedy")]
    )
    assert names == ["Comedy", "Drama", "War"]
    assert member == pytest.approx(np.array([[0, 1 / 2, 1 / 2], [0, 1, 0], [0, 0, 0], [1 / 3] * 3]))


def test_known_mgu_and_dgu():
    mgu, dgu = evaluate.fairness(
        np.array([0.5, 0.3, 0.2, 0, 0]), np.array([0.1, 0.2, 0.2, 0.2, 0.3])
    )
    assert mgu == pytest.approx((0.4 + 0.1 + 0 + 0.2 + 0.3) / 5) and dgu == pytest.approx(0.4 + 0.3)
    assert evaluate.fairness(np.array([0.2] * 5), np.array([0.2] * 5)) == (0, 0)
    assert evaluate.fairness(np.array([1.0, 0]), np.array([0, 1.0])) == (
        1,
        2,
    )  # the largest: 2 / G, and 2


def test_list_metrics_by_hand():
    """Ten items, one training positive of items 0..3 and two of 4: quintiles {5 6}, {7 8}, {9 0}, {1 2}, {3 4}."""
    dataset = small(
        train=((0, (0, 1, 2, 4), 3), (1, (3, 4), 1)),
        test=((0, (0, 1, 2, 4, 9), 4), (1, (3, 4, 9), 2)),
        items=10,
        genres=[("A",)] * 5 + [("A", "B")] * 5,
    )
    items = np.array([[9, 5, 6, 3, -1], [8, 9, 5, 3, -1]])
    metrics, per_window = evaluate.list_metrics(
        dataset, dataset.test, items, np.where(items >= 0, -np.arange(5.0), -np.inf)
    )
    # of 6 positives none, none, 1, 2, 3; of 8 listed 3, 1, 2, 0, 2
    GU = [3 / 8, 1 / 8, 2 / 8 - 1 / 6, -2 / 6, 2 / 8 - 3 / 6]
    assert metrics["MGU@5"] == pytest.approx(sum(map(abs, GU)) / 5) and metrics[
        "DGU@5"
    ] == pytest.approx(3 / 8 + 2 / 6)
    assert metrics["exposure"]["GP@5"] == pytest.approx([3 / 8, 1 / 8, 2 / 8, 0, 2 / 8])
    assert metrics["exposure"]["GH"] == pytest.approx([0, 0, 1 / 6, 2 / 6, 3 / 6])
    # genre B: 6 of 8 listed count half; no positive has it
    assert metrics["genre MGU@5"] == pytest.approx(3 / 8) and metrics[
        "genre DGU@5"
    ] == pytest.approx(6 / 8)
    assert metrics["coverage@5"] == 5 / 10
    assert metrics["HR@5"] == 1 and metrics["NDCG@5"] == pytest.approx((1 + 1 / math.log2(3)) / 2)
    assert per_window["MRR@5"].tolist() == [1, 0.5]
    json.dumps(metrics)


def test_lists_without_any_title():
    dataset = small(genres=[("A",), ()] * 4)
    metrics, _ = evaluate.list_metrics(
        dataset, dataset.test, np.full((2, 10), -1), np.full((2, 10), -np.inf)
    )
    assert metrics["HR@10"] == metrics["coverage@10"] == 0 and math.isfinite(metrics["MGU@10"])


def test_mgu_depends_on_the_number_of_groups():
    """What NOTE says: G groups bound MGU by 2 / G; splitting groups never lowers MGU * G / 2."""
    source = np.random.default_rng(0)
    for _ in range(100):
        GP, GH = source.dirichlet(np.ones(20)), source.dirichlet(np.ones(20))
        wrong = []
        for G in (20, 10, 5):
            mgu, dgu = evaluate.fairness(GP.reshape(G, -1).sum(1), GH.reshape(G, -1).sum(1))
            assert mgu <= 2 / G and dgu <= 2
            wrong.append(mgu * G / 2)
        assert wrong[0] >= wrong[1] >= wrong[2]


def test_thirds():
    count, gain = np.array([1, 2, 2, 2, 3, 4, 5, 6, 9]), np.arange(9.0)
    parts = evaluate.by_tercile(count, {"NDCG@10": gain})
    assert {name: (p["n"], p["from"], p["to"]) for name, p in parts.items()} == {
        "tail": (4, 1, 2),
        "middle": (2, 3, 4),
        "head": (3, 5, 9),
    }
    assert [p["NDCG@10"] for p in parts.values()] == [1.5, 4.5, 7]
    assert evaluate.by_tercile(np.array([3, 3]), {"HR@5": np.array([0.0, 1])}) == {
        "tail": {"n": 2, "from": 3, "to": 3, "HR@5": 0.5}
    }


def test_popularity_lists():
    dataset = small(
        train=((0, (0, 1, 2, 3), 3), (1, (1, 2, 4), 2)),
        test=((0, (0, 1, 2, 3, 7), 4), (1, (1, 2, 4, 7), 3)),
    )
    items, scores = evaluate.popularity_lists(dataset, dataset.test, 5)
    assert items.tolist() == [
        [4, 5, 6, 7, -1],
        [0, 3, 5, 6, 7],
    ]  # seen ones out, equal counts by title
    assert scores.tolist() == [[1, 0, 0, 0, -math.inf], [1, 1, 0, 0, 0]]
    assert (
        evaluate.popularity_lists(dataset, dataset.test, 3, keep_seen=True)[0].tolist()
        == [[1, 2, 0]] * 2
    )


# ------------------------------------------------------------------------------------------------ comparison


def test_interval_of_a_known_case():
    """One window a user, one seed: the interval of a mean is +- 1.96 sd / sqrt(n)."""
    x = np.random.default_rng(5).normal(3, 2, (1, 900))
    value, low, high = evaluate.interval(x, np.arange(900))
    half = 1.96 * x.std() / 30
    assert value == pytest.approx(x.mean()) and low == pytest.approx(
        x.mean() - half, abs=0.1 * half
    )
    assert high == pytest.approx(x.mean() + half, abs=0.1 * half)


def test_interval_covers():
    """The 95% interval holds the truth in about 95% of repetitions, windows of a user being alike."""
    source, held = np.random.default_rng(6), 0
    for _ in range(200):
        user = np.repeat(np.arange(60), 3)
        x = source.normal(0, 1, 60)[user] + source.normal(0, 0.3, 180)
        _, low, high = evaluate.interval(x[None], user)
        held += low <= 0 <= high
    assert (
        178 <= held <= 198
    )  # 200 * 0.94 +- 3 sd; resampling windows instead of users holds it 74% of the time


def test_users_keep_their_windows():
    """Five copies of every window of a user tell nothing new."""
    x = np.random.default_rng(7).normal(size=(1, 100))
    assert evaluate.interval(x, np.arange(100)) == pytest.approx(
        evaluate.interval(np.repeat(x, 5, 1), np.repeat(np.arange(100), 5))
    )


def test_resample_equals_a_loop():
    """The vectorised bootstrap, draw by draw, from the same counts: of users in the order in which they come."""
    source = np.random.default_rng(8)
    users, values = np.array([4, 4, 9, 2, 2, 2]), source.normal(size=(2, 6, 3))
    statistic = lambda mean: np.abs(mean).max(-1)  # noqa: E731
    drawn = evaluate.resample(values, users, statistic, seed=3)
    taken, seeds = evaluate.draws(3, 3), evaluate.draws(2, 4)
    for i in range(0, evaluate.DRAWS, 97):
        total = 0.0
        for s in range(2):
            picked = [
                values[s, j]
                for u, times in zip((4, 9, 2), taken[i])
                for _ in range(int(times))
                for j in np.flatnonzero(users == u)
            ]
            total += (
                seeds[i, s]
                / 2
                * max(abs(sum(p[g] for p in picked)) / len(picked) for g in range(3))
            )
        assert drawn[i] == pytest.approx(total)
    assert (taken.sum(1) == 3).all() and (seeds.sum(1) == 2).all()


def test_ids_draw_as_indices_do():
    """A user's number and its name, which sort differently, give the same interval: report and command agree."""
    x, users = np.random.default_rng(4).normal(size=(1, 30)), np.arange(30)
    assert evaluate.interval(x, users) == evaluate.interval(x, [str(u) for u in users])


def test_interval_of_a_size_covers():
    """Lists that are nearly fair: chance adds to MGU, twice where lists are drawn from lists, and the interval allows for it."""
    source, GH, truth = np.random.default_rng(2), np.full(5, 0.2), 0.004
    users, statistic, held, percentiles = (
        np.arange(150),
        lambda mean: evaluate.fairness(mean, GH)[0],
        0,
        0,
    )
    for _ in range(100):
        lists = source.multinomial(10, [0.21, 0.19, 0.2, 0.2, 0.2], 150)[None] / 10  # (1, n, G)
        _, low, high = evaluate.interval(lists, users, statistic)
        held += 0 <= low <= truth <= high
        low, high = np.percentile(evaluate.resample(lists, users, statistic), (2.5, 97.5))
        percentiles += low <= truth <= high
    assert held >= 78 and percentiles <= 37  # expected 88 and 24, each with 3 sd
    flat = np.tile(
        np.array([0.6, 0.1, 0.1, 0.1, 0.1]), (1, 9, 1)
    )  # no chance in it: the interval is the value
    assert evaluate.interval(flat, np.arange(9), statistic) == pytest.approx((0.16, 0.16, 0.16))
    fair = np.full((1, 9, 5), 0.2)
    assert evaluate.interval(fair, np.arange(9), statistic, against=flat) == pytest.approx(
        (-0.16, -0.16, -0.16)
    )  # a difference has a sign


def test_seeds_are_crossed():
    """Values that depend on the seed alone: the interval is that of the mean of the seeds."""
    x = np.repeat(np.array([[0.0], [1.0]]), 50, 1)
    assert evaluate.interval(x, np.arange(50)) == (0.5, 0, 1)


def test_differences_are_paired():
    """A constant lead over a noisy base is certain; unpaired it would drown."""
    base = np.random.default_rng(9).normal(0, 5, (3, 200))
    assert evaluate.interval(base + 0.1, np.arange(200), against=base) == pytest.approx(
        (0.1, 0.1, 0.1)
    )
    value, low, high = evaluate.interval(
        base[:2], np.arange(200), against=base
    )  # other seeds: users stay paired
    assert low < value < high


def test_interval_is_reproducible():
    x, users = np.random.default_rng(1).normal(size=(2, 30)), np.arange(30)
    first = evaluate.interval(x, users)
    evaluate.draws.cache_clear()
    assert evaluate.interval(x, users) == first
    assert (evaluate.resample(x, users, seed=1) != evaluate.resample(x, users)).any()


def fake_run(loss, seed, items, dataset, **arguments):
    metrics, per_window = evaluate.list_metrics(
        dataset,
        dataset.test,
        items,
        -np.tile(np.arange(items.shape[1], dtype=float), (len(items), 1)),
    )
    return {
        "loss": loss,
        "folder": Path(f"{loss}{seed}"),
        "config": {"arguments": {"seed": seed, "tau": 1.0, "loss": ["sft", "gdrt"]} | arguments},
        "metrics": metrics,
        "per_window": per_window,
        "items": items,
    }


def test_seeds_of_one_configuration_are_pooled():
    dataset, lists = small(), np.array([[4, 5, 6, 7, 3], [2, 3, 6, 7, 0]])
    runs = [
        fake_run("sft", 0, lists, dataset),
        fake_run("gdrt", 1, lists, dataset),
        fake_run("sft", 1, lists[:, ::-1], dataset),
        fake_run("gdrt", 0, lists, dataset),
    ]
    assert [(name, len(members)) for name, members in evaluate.pool(runs).items()] == [
        ("sft seeds 0,1", 2),
        ("gdrt seeds 0,1", 2),
    ]
    assert list(evaluate.pool([*runs[:2], fake_run("gdrt", 1, lists, dataset, tau=3.0)])) == [
        "sft tau=1.0 seed 0",
        "gdrt tau=1.0 seed 1",
        "gdrt tau=3.0 seed 1",
    ]
    with pytest.raises(InputError, match="once"):
        evaluate.pool([runs[0], runs[0]])
    header, rows = evaluate.comparison(evaluate.pool(runs), dataset, dataset.test)
    table = {row[0]: row[1:] for row in rows}
    assert header == ("", "sft seeds 0,1", "gdrt seeds 0,1", "gdrt seeds 0,1 less sft seeds 0,1")
    assert (
        table["HR@5"][0].startswith("1.0000 [1.0000")
        and table["NDCG@5"][1].startswith("1.0000")
        and table["coverage@5"][2] == ""
    )
    assert evaluate.format_table(header, rows).count("\n") == len(rows) + 1


def test_thirds_of_a_pool_are_means_over_seeds():
    dataset, lists = small(), np.array([[4, 5, 6, 7, 3], [2, 3, 6, 7, 0]])
    seeds = [
        fake_run("sft", seed, rows, dataset)["metrics"]
        for seed, rows in enumerate((lists, lists[:, ::-1]))
    ]
    one, two = (seed["by user activity"]["tail"]["NDCG@10"] for seed in seeds)
    assert one != two
    header, rows = evaluate.tercile_table({"sft": seeds, "first": seeds[:1]}, "by user activity")
    assert header == ("by user activity", "training positives", "n", "sft", "first")
    assert rows == [("tail", "4 to 4", 2, f"{(one + two) / 2:.4f}", f"{one:.4f}")]


def test_mgu_of_resampled_lists():
    """The point value of a pool is the metric of each seed's lists, averaged over seeds."""
    dataset, source = small(items=20), np.random.default_rng(3)
    runs = [
        fake_run("sft", seed, np.stack([source.permutation(20)[:10] for _ in range(2)]), dataset)
        for seed in range(3)
    ]
    for metric, (values, statistic) in evaluate.sampled(dataset, runs).items():
        value, low, high = evaluate.interval(values, np.array([0, 1]), statistic)
        assert value == pytest.approx(np.mean([run["metrics"][metric] for run in runs])), metric
        assert low <= high


# ------------------------------------------------------------------------------------------------ predictions

ANN, BOB = (
    {"user": "ann", "position": 4, "titles": ["Title 4", "Title 5", "Title 6", "Title 7"]},
    {"user": "bob", "position": 4, "titles": ["Title 3", "Title 2", "Title 6", "Title 7"]},
)


def read(tmp_path, *lines, **options):
    dataset, path = small(), tmp_path / "lists.jsonl"
    path.write_text(
        "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines),
        encoding="utf-8",
    )
    return evaluate.read_predictions(path, dataset, dataset.test, **options)


def test_predictions_of_any_system(tmp_path):
    items, scores, missing = read(tmp_path, BOB, ANN | {"scores": [3, 2, 2, 1.5]})
    assert items[:, :5].tolist() == [[4, 5, 6, 7, -1], [3, 2, 6, 7, -1]] and not any(
        missing.values()
    )
    assert scores[:, :5].tolist() == [[3, 2, 2, 1.5, -math.inf], [0, -1, -2, -3, -math.inf]]
    shuffled, _, _ = read(
        tmp_path, ANN, {key: BOB[key] for key in ("user", "titles")} | {"target": "Title 2"}
    )  # one window a user: position is known
    assert (shuffled == items).all()


@pytest.mark.parametrize(
    "lines, says",
    [
        ([], "holds no line"),
        ([ANN, '{"user": "bob", '], "lists.jsonl:2: not JSON"),
        ([ANN, "[" * 100_000], "lists.jsonl:2: not JSON"),
        ([ANN, "17"], "lists.jsonl:2: should be an object"),
        ([ANN, BOB | {"titles": "Title 2"}], "should be an object"),
        ([ANN, BOB | {"user": "eve"}], "user eve, position 4 is no test window"),
        ([ANN, BOB | {"position": 3}], "user bob, position 3 is no test window"),
        ([ANN, BOB | {"position": [4]}], "is no test window"),
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
    """The whole catalogue with one score, the target first: its mean rank among all is no hit. A longer list changes nothing else."""
    dataset, path = small(items=40), tmp_path / "lists.jsonl"

    def metrics(scores):
        titles = [
            [f"Title {i}" for i in range(40) if i not in range(4)],
            [f"Title {i}" for i in (2, *range(6, 40), 3)],
        ]
        path.write_text(
            "".join(
                json.dumps({"user": user, "titles": row, "scores": [scores(i) for i in range(36)]})
                + "\n"
                for user, row in zip(("ann", "bob"), titles)
            )
        )
        items, given, missing = evaluate.read_predictions(path, dataset, dataset.test)
        assert not any(missing.values())
        return evaluate.list_metrics(dataset, dataset.test, items, given)[0], items.shape

    constant, shape = metrics(lambda i: 0.5)
    assert constant["HR@10"] == constant["MRR@10"] == 0 and shape == (2, 36)
    falling, shape = metrics(lambda i: -i)
    assert falling["MRR@10"] == 1 and shape == (2, 10)
    tied, shape = metrics(lambda i: -min(i, 8))  # from the ninth on
    assert (
        tied["MRR@10"] == 1
        and shape == (2, 36)
        and tied["coverage@10"] == falling["coverage@10"]
        and tied["MGU@10"] == falling["MGU@10"]
    )


def test_files_refused(tmp_path):
    (tmp_path / "latin").write_bytes(b'{"user": "\xe9"}\n')
    for name, says in ("absent", "No such file"), (".", "directory"), ("latin", "UTF-8"):
        with pytest.raises(InputError, match=says):
            evaluate.read_lines(tmp_path / name)


def test_missing_lists_count_as_misses(tmp_path):
    items, scores, missing = read(
        tmp_path, ANN | {"titles": ["Title 5", "Title 4"]}, allow_missing=True
    )
    assert missing == {"windows without a list": 1, "lists under 10 titles": 1}
    dataset = small()
    metrics, _ = evaluate.list_metrics(dataset, dataset.test, items, scores)
    assert metrics["HR@5"] == 0.5 and metrics["MRR@5"] == 0.25


def test_windows_that_share_user_and_position(tmp_path):
    """CSV folders: the target tells such windows apart, or else their order."""
    dataset = small(test=((0, (0, 1, 2), 2), (0, (4, 1, 3), 2), (1, (4, 1, 3), 2)))
    path, lists = (
        tmp_path / "lists.jsonl",
        [
            {"user": "ann", "position": 2, "titles": [f"Title {i}" for i in range(j, 8)]}
            for j in range(3)
        ],
    )

    def read(lines):
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return evaluate.read_predictions(path, dataset, dataset.test, k=5)[0][:2, 0].tolist()

    bob = lists[2] | {"user": "bob"}
    assert read([lists[0], lists[1], bob]) == [0, 1]
    assert read([lists[0] | {"target": "Title 3"}, lists[1] | {"target": "Title 2"}, bob]) == [1, 0]
    with pytest.raises(InputError, match="twice"):
        read([lists[0], lists[1], lists[2], bob])
    with pytest.raises(InputError, match="several test windows"):
        read([{key: lists[0][key] for key in ("user", "titles")}, bob])


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
    items, path = (
        np.stack(
            [
                source.permutation(np.setdiff1d(range(14), w.items[: w.stop]))[:10]
                for w in dataset.test
            ]
        ),
        tmp_path / "p.jsonl",
    )
    scores = -np.sort(source.random((2, 10)))
    items[1, 9], scores[1, 9] = -1, -np.inf
    evaluate.write_predictions(
        path,
        dataset,
        dataset.test,
        evaluate.Ranking(items, scores, None),
        {"NLL": [1.0, 2.0], "legal NLL": [0.5, 1.0]},
    )
    again, same, missing = evaluate.read_predictions(
        path, dataset, dataset.test, allow_missing=True
    )
    assert (
        (again == items).all() and (same == scores).all() and missing["lists under 10 titles"] == 1
    )
    assert json.loads(path.read_text().split("\n")[0])["history"] == [
        "Title 0",
        "Title 1",
        "Title 2",
        "Title 3",
    ]


def test_bundled_example(capsys):
    """The example is what the chain lists on toy, and scores what README says."""
    dataset = load_dataset("toy")
    assert [json.loads(line) for line in EXAMPLE.read_text(encoding="utf-8").splitlines()] == list(
        markov_lists(dataset)
    )
    evaluate.main(["--dataset", "toy", "--predictions", str(EXAMPLE)])
    printed = {
        line.split()[0]: line.split()[1]
        for line in capsys.readouterr().out.split("\n")
        if line.startswith(("HR", "NDCG"))
    }
    assert {name: float(printed[name]) for name in SCORE} == pytest.approx(SCORE, abs=5e-5)


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


def test_two_files_of_one_name(tmp_path):
    copy = tmp_path / EXAMPLE.name
    copy.write_bytes(EXAMPLE.read_bytes())
    with pytest.raises(InputError, match="rename the file"):
        evaluate.main(["--dataset", "toy", "--predictions", str(EXAMPLE), str(copy)])


def test_a_run_without_model(tmp_path):
    for make, says in (
        (lambda: None, "no model in it"),
        (lambda: (tmp_path / "config.json").write_text("{"), "not whole JSON"),
    ):
        make()
        with pytest.raises(InputError, match=says):
            evaluate.main([str(tmp_path)])


if __name__ == "__main__":
    EXAMPLE.write_text(
        "".join(json.dumps(line) + "\n" for line in markov_lists(load_dataset("toy"))),
        encoding="utf-8",
    )
