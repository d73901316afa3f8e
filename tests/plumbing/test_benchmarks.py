"""The evidence: quality.py runs, skips and records on toy; tables.py finds what was put in."""

import copy
import itertools
import json
import sys
from argparse import Namespace
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT, random_prompts, random_windows, separate_nll, small_model

sys.path.insert(0, str(ROOT / "benchmarks"))

import outcomes
import quality
import relevance
import tables

from attribution import sample_windows
from data import InputError, load_dataset, make_prompts, tiny_tokenizer

ROWS = (
    "popularity",
    "before",
    "sft",
    "gdrt",
    "gdrt, groups after SFT",
    "random groups",
    "position groups",
    "untuned NLL groups",
    "fixed weights",
    "focal",
    "gdrt + msl",
    "true groups",
    "permuted groups uniform",
)


# ------------------------------------------------------------------------------------------------
# quality.py on toy


@pytest.fixture(scope="module")
def little():
    """(toy, an untrained thin model, tokenizer, prompts): no test needs a good model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dataset = load_dataset("toy")
    tokenizer = tiny_tokenizer(dataset)
    shape = {"hidden_size": 32, "intermediate_size": 64, "max_position_embeddings": 1024}
    shape |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape))
    yield dataset, model.eval(), tokenizer, make_prompts(dataset, tokenizer, 1024)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def done(little, tmp_path_factory):
    """(results folder, options, runs) after every row of seed 0 on a few windows of toy."""
    dataset, model, tokenizer, _ = little
    patch = pytest.MonkeyPatch()
    results = tmp_path_factory.mktemp("results")
    small = replace(dataset, valid=dataset.valid[:24], test=dataset.test[:24])
    patch.setattr(quality, "load_dataset", lambda *_, **__: small)
    patch.setattr(quality.gdrt, "start_model", lambda *_: (copy.deepcopy(model), tokenizer))
    quality.start.cache_clear()
    setting = {"dataset": "toy", "split": "leave-one-out", "windows": 100, "batch": 32, "epochs": 2}
    runs = quality.table_of(ROWS, setting, 1)
    options = Namespace(
        results=results,
        experiment="toy",
        dry_run=False,
        paths={},
        data_dir=None,
        cache=None,
        device="cpu",
        precision="fp32",
    )
    quality.run_all(runs, options)
    yield results, options, runs
    quality.start.cache_clear()
    patch.undo()


def by_row(results):
    return {line["row"]: line for line in tables.read_lines(results)}


def test_every_row_leaves_a_line_and_outcomes_that_agree(done):
    results, _, runs = done
    lines = by_row(results)
    assert set(lines) == set(ROWS)
    for row, line in lines.items():
        kept = dict(zip(outcomes.FIELDS, outcomes.read_array(results, f"{line['key']}/test")))
        assert kept["windows"].sum() == 24
        for name in outcomes.KINDS[:2] if row == "popularity" else outcomes.KINDS:
            assert kept[name].sum() / 24 == pytest.approx(line["test"][name], rel=1e-6)
        assert {"versions", "commit", "machine", "seconds", "arguments", "data"} <= set(line)
    assert lines["before"]["test"]["legal NLL"] != lines["sft"]["test"]["legal NLL"]
    # Each loss and each table of groups made another model.
    trained = set(ROWS) - {"popularity", "before"}
    assert len({lines[row]["test"]["legal NLL"] for row in trained}) == len(trained)


def test_rows_are_what_the_command_makes(done, little, tmp_path, monkeypatch):
    lines = by_row(done[0])
    monkeypatch.setattr(quality.gdrt, "load_dataset", quality.load_dataset)
    a = lines["gdrt"]["arguments"]
    flags = f"--precision fp32 --device cpu --no-report --out {tmp_path} --name x".split()
    for name in "dataset windows batch epochs lr warmup history seed".split():
        flags += [f"--{name}", str(a[name])]
    for name in "relevance groups tau prior".split():
        flags += [f"--{name}", str(a[name])]
    quality.gdrt.main(flags)
    for loss in ("sft", "gdrt"):
        line = lines[loss]
        metrics = json.loads((tmp_path / "x" / loss / "metrics.json").read_text())
        for name in ("NDCG@10", "legal NLL", "NLL", "MGU@5", "coverage@10"):
            assert line["test"][name] == pytest.approx(metrics["test"][name], rel=1e-6), name
        theirs = metrics["audit"]["after"]["ablation"]["auxiliary share"]
        assert line["audit"]["ablation"]["auxiliary share"] == pytest.approx(theirs)
    before = metrics["baselines"]["before"]["test"]["NLL"]
    assert lines["before"]["test"]["NLL"] == pytest.approx(before, rel=1e-6)


def test_losses_share_the_warm_up_and_fixed_weights_hold_gdrts_mean_q(done):
    lines = by_row(done[0])
    warmups = {line["seconds"]["warm-up"] for row, line in lines.items() if row != "gdrt + msl"}
    assert len(warmups) == 1
    assert lines["fixed weights"]["mean q"] == pytest.approx(lines["gdrt"]["mean q"], abs=1e-6)
    assert lines["random groups"]["shares"] == pytest.approx([0.25] * 4, abs=0.02)
    assert lines["focal"]["training group NLL"] != lines["sft"]["training group NLL"]


def test_a_run_keeps_the_groups_that_it_was_trained_by(done):
    lines = by_row(done[0])
    after_sft = lines["gdrt, groups after SFT"]
    (late,) = tables.group_tables(done[0], [after_sft], "late")
    (drawn,) = tables.group_tables(done[0], [lines["random groups"]], "random")
    assert set(np.unique(late)) == set(np.unique(drawn)) == {-1, 0, 1, 2, 3}
    assert ((late < 0) == (drawn < 0)).all()
    assert (late != drawn).any()
    assert tables.group_tables(done[0], [after_sft], "gradient") == []


def test_permuted_groups_are_gradients_dealt_out_anew(done):
    lines = by_row(done[0])
    (gradient,) = tables.group_tables(done[0], [lines["gdrt"]], "gradient")
    (dealt,) = tables.group_tables(done[0], [lines["permuted groups uniform"]], "permuted")
    assert (np.bincount(gradient[gradient >= 0]) == np.bincount(dealt[dealt >= 0])).all()
    assert ((gradient < 0) == (dealt < 0)).all()
    assert (gradient != dealt).any()
    assert sum(lines["permuted groups uniform"]["shares"]) == pytest.approx(1)


def test_late_relevance_is_that_of_the_finished_sft_model(done):
    _, options, runs = done
    run = next(run for run in runs if run["row"] == "sft")
    quality.perform(run, options)  # leaves the finished model
    begun = quality.begin(run["arguments"], options)
    setup = begun.setup
    r = quality.relevance(setup.model, setup.prompts, setup.windows, "gradient", seed=0)
    assert np.allclose(quality.measured(begun, "late", 0)[0], r, atol=1e-6, equal_nan=True)
    assert not np.allclose(quality.measured(begun, "gradient", 0)[0], r, atol=1e-2, equal_nan=True)


def test_finished_runs_are_skipped_and_a_lost_one_is_done_again(done, monkeypatch):
    results, options, runs = done
    path = results / "quality.jsonl"
    text = path.read_text()
    before = by_row(results)["sft"]
    performed = []
    real = quality.perform

    def perform(run, options):
        performed.append(run["row"])
        return real(run, options)

    monkeypatch.setattr(quality, "perform", perform)
    quality.run_all(runs, options)
    assert performed == [] and path.read_text() == text
    lost = [line for line in text.splitlines(keepends=True) if json.loads(line)["row"] != "sft"]
    path.write_text("".join(lost))
    quality.run_all(runs, options)
    assert performed == ["sft"]
    again = by_row(results)["sft"]
    assert again["test"] == before["test"]  # whatever ran before it in the process
    assert again["key"] == before["key"]


def test_rows_of_a_seed_report_by_one_kept_table_of_groups(done):
    results, options, runs = done
    path = results / "outcomes.npz"
    whole = path.read_bytes()
    run = next(run for run in runs if run["row"] == "sft")
    with np.load(path, allow_pickle=False) as stored:
        (name,) = [name for name in stored if name.startswith("groups-")]
    group = outcomes.read_array(results, name)
    # As if another machine had measured it.
    outcomes.add_arrays(results, {name: np.where(group < 0, -1, 1 - group)})
    try:
        swapped = quality.perform(run, options)[0]["test"]["group legal NLL"]
    finally:
        path.write_bytes(whole)
    assert swapped == pytest.approx(by_row(results)["sft"]["test"]["group legal NLL"][::-1])
    sft = by_row(results)["sft"]
    gdrt = by_row(results)["gdrt"]
    difference = tables.group_zero(gdrt) - tables.group_zero(sft)
    assert tables.group_zero_to_sft({0: gdrt}, {0: sft})[0] == difference
    assert np.isnan(tables.group_zero_to_sft({0: gdrt | {"held groups": "others"}}, {0: sft})).all()


def test_tables_of_a_real_run(done, capsys):
    tables.main(["toy-shop", "--results", str(done[0])])
    text = capsys.readouterr().out
    assert all(f"\n| {row} |" in text for row in ROWS)
    assert text.count("\n| ") == len(ROWS) + 2  # the header and the rule below it
    places = [text.index(f"| {row} |") for row in ("before", "sft", "gdrt", "focal")]
    assert places == sorted(places)
    assert len({line.count("|") for line in text.splitlines() if line.startswith("|")}) == 1


def test_tuning_leaves_test_alone_and_gives_sft_as_many_trials():
    for names in (("tune-lr", "tune-tau"), ("tune-leave-one-out",)):
        runs = list(itertools.chain(*map(quality.experiments, names)))
        keys = {"sft": set(), "gdrt": set()}
        for run in runs:
            assert run["arguments"]["no_test"]
            keys[run["arguments"]["loss"]].add(quality.key(run["arguments"]))
        assert len(keys["sft"]) == len(keys["gdrt"]) == len(runs) / 2


def test_relevance_against_the_planted_bias():
    bias = np.array([True, False, True, False])
    assert relevance.area_under_curve(np.array([4.0, 1.0, 3.0, 2.0]), bias) == 1
    ties = relevance.area_under_curve(np.array([1.0, 2.0, 2.0, 3.0]), bias)
    assert ties == pytest.approx(1 / 8)


@pytest.mark.parametrize("method", ["gradient", "ablation"])
def test_the_study_derives_the_default_relevance(method):
    """From attributions along a square's four edges; by ablation, they add up to 0 around it.

    The study lacks the rule that r = 1 for a token certain without a user, so the test adds it.
    """
    model = small_model().double()  # fp32 rounds by 1e-6
    prompts = random_prompts(2, 12, letters=4)
    windows = random_windows(12, 3)
    sample = quality.sample_windows(windows, 0)
    found = relevance.measure(model, prompts, sample, method)
    r, _ = relevance.definitions(found, method, prompts)[f"{method}, floor 0.5"]
    expected = quality.relevance(model, prompts, windows, method)
    r[quality.relevance(model, prompts, windows, "probability") == 1] = 1
    assert np.array_equal(np.isnan(r), np.isnan(expected))
    assert np.nanmax(np.abs(r - expected)) < 1e-6
    auxiliary, user, auxiliary_alone, user_alone = found["edges"]
    gap = np.abs(auxiliary + user_alone - user - auxiliary_alone)
    assert method == "gradient" or gap.max() < 1e-4


def test_the_studys_tables_are_those_of_its_file():
    results = ROOT / "results"
    found = json.loads((results / "relevance-shop.json").read_text(encoding="utf-8"))
    shown = (results / "relevance.md").read_text(encoding="utf-8")
    assert relevance.readme_tables(found) in shown


def test_a_part_of_an_experiment(capsys, tmp_path):
    quality.main(f"grid --rows sft gdrt --seeds 2 --dry-run --results {tmp_path}".split())
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["sft", "gdrt"] * 2
    assert sum("seed1" in line for line in lines) == 2


def test_quick_is_the_headline_on_three_seeds(capsys, tmp_path):
    quality.main(["--quick", "--dry-run", "--results", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["popularity", "before", *["sft", "gdrt"] * 3]
    for wrong in ([], ["grid", "--quick"]):
        with pytest.raises(SystemExit) as stop:
            quality.main([*wrong, "--dry-run", "--results", str(tmp_path)])
        assert stop.value.code == 2 and "or --quick" in capsys.readouterr().err


def test_lora_is_part_of_a_key_and_of_a_start_only_where_it_is_used():
    setting = quality.SETTINGS["smollm2-10k"]
    without = {name: value for name, value in setting.items() if name != "lora"}
    for seed, row in ((0, "sft"), (1, "gdrt uniform by ablation")):
        plain, zero, eight = (
            quality.make_run(row, s, seed) for s in (without, without | {"lora": 0}, setting)
        )
        assert quality.key(plain["arguments"]) == quality.key(zero["arguments"])
        assert quality.key(plain["arguments"]) != quality.key(eight["arguments"])
        assert eight["reference"]["lora"] == 8 and "lora" not in plain["reference"]
    stored = set(quality.finished(quality.ROOT / "results"))
    wanted = [quality.key(run["arguments"]) for run in quality.experiments("smollm2")]
    assert set(wanted) <= stored, "the keys of finished runs are as they were"
    trials = [run["arguments"] for run in quality.experiments("tune-lr-lora")]
    assert all(run["no_test"] and run["lora"] == 8 for run in trials)
    usual = [run for run in trials if run["batch"] == setting["batch"]]
    rates = [run["lr"] for run in usual if run["loss"] == "sft"]
    assert rates == [run["lr"] for run in usual if run["loss"] == "gdrt"], "the same for both"


def test_a_run_with_lora_trains_from_its_start_and_leaves_the_weights(little, tmp_path):
    """SFT starts in the same place before and after a run of GDRT by ablation."""
    dataset, model, tokenizer, _ = little
    small = replace(dataset, valid=dataset.valid[:12], test=dataset.test[:12])
    setting = {"dataset": "toy", "split": "leave-one-out", "windows": 200, "batch": 64}
    setting |= {"epochs": 2, "lora": 4}
    runs = quality.table_of(("sft", "gdrt uniform by ablation", "sft"), setting, 1)
    options = Namespace(results=tmp_path, experiment="lora", dry_run=False, paths={})
    vars(options).update(data_dir=None, cache=None, device="cpu", precision="fp32")
    quality.start.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quality, "load_dataset", lambda *_: small)
        patch.setattr(quality.gdrt, "start_model", lambda *_: (copy.deepcopy(model), tokenizer))
        lines = [quality.perform(run, options)[0] for run in runs]
        begun = quality.begin(runs[0]["arguments"], options)
    quality.start.cache_clear()
    assert len(begun.before) == len(begun.warm) == 4  # A and B of one layer's two projections
    own = begun.setup.model.state_dict()
    assert all(torch.equal(own[name], w) for name, w in model.state_dict().items())
    first, gdrt, again = (line["test"]["NLL"] for line in lines)
    assert first == again != gdrt


def test_a_sweep_at_its_usual_value_is_the_grids_own_run():
    grid = {quality.key(run["arguments"]): run["row"] for run in quality.experiments("grid")}
    shared = [run for run in quality.experiments("sweep") if quality.key(run["arguments"]) in grid]
    assert shared and all(run["row"] == grid[quality.key(run["arguments"])] for run in shared)


# ------------------------------------------------------------------------------------------------
# controls


def test_fixed_weights_and_focal_against_the_written_formula(monkeypatch):
    count = torch.tensor([2.0, 1.0, 0.0, 2.0])  # group 2 is absent
    q, _ = quality.fixed_rule([0.4, 0.1, 0.3, 0.2])(torch.rand(4), count, None)
    assert q.tolist() == pytest.approx([0.4 / 0.7, 0.1 / 0.7, 0, 0.2 / 0.7])
    nll = torch.tensor([0.5, 2.0, 1.0, 3.0, 0.1])
    p = torch.exp(-nll)
    # The mean's gradient: d/dnll (1 - p)^2 nll = (1 - p)^2 + 2 (1 - p) p nll; gamma 0: plain mean.
    expected = {2.0: ((1 - p) ** 2 + 2 * (1 - p) * p * nll) / 5, 0.0: torch.full((5,), 0.2)}
    monkeypatch.setattr(quality.gdrt, "token_nll", lambda x: x)
    for gamma, wanted in expected.items():
        leaf = nll.clone().requires_grad_()
        with quality.focal_loss(gamma):
            loss = quality.gdrt.token_nll(leaf).mean()
        (found,) = torch.autograd.grad(loss, leaf)
        assert found.tolist() == pytest.approx(wanted.tolist(), rel=1e-5)
        assert quality.gdrt.token_nll(1) == 1  # what was there is back


def test_control_groups_sort_what_they_say(little):
    dataset, model, _, prompts = little
    windows = dataset.train[:120]
    setup = quality.gdrt.Setup(copy.deepcopy(model), None, prompts, windows, [], [], 1)
    weights = quality.copied(model)
    cfg = Namespace(device="cpu")
    begun = quality.Start(dataset, setup, cfg, None, weights, weights, 0.0, {}, {})
    targets = {w.items[w.stop] for w in windows}
    for name in ("random", "position", "nll", "planted"):
        r, _ = quality.measured(begun, name, 0)
        known = np.zeros(r.shape, dtype=bool)
        for item in targets:
            known[item, : len(prompts.titles[item]) + 1] = True
        assert (~np.isnan(r) == known).all()
        if name == "position":
            assert (r[known] == np.nonzero(known)[1]).all()
    sample = sample_windows(windows, 0)
    times = Counter(w.items[w.stop] for w in sample)
    window = next(w for w in sample if times[w.items[w.stop]] == 1)  # its title's only window
    with torch.no_grad():
        nll = separate_nll(model, prompts, window)
    r = quality.measured(begun, "nll", 0)[0][window.items[window.stop], : len(nll)]
    assert r.tolist() == pytest.approx((-nll).tolist(), abs=1e-4)


# ------------------------------------------------------------------------------------------------
# statistics


def by_user_sums(several, user):
    """([sums (S, U) of each of several (S, N)], windows (U,)), as tables.py reads them."""
    sums = []
    for values in several:
        stored = [outcomes.by_user(user, user >= 0, {"NDCG@10": row}) for row in values]
        sums.append(np.array(stored, dtype=float)[:, outcomes.FIELDS.index("NDCG@10")])
    return sums, stored[0][outcomes.FIELDS.index("windows")].astype(float)


def test_interval_against_a_plain_bootstrap():
    random = np.random.default_rng(1)
    # Users have unequal numbers of windows and come in descending order.
    user = np.repeat(np.arange(30), random.integers(1, 9, 30))[::-1]
    base = random.random((4, len(user))) + random.random(30)[user]
    lead = 0.1 + 0.3 * random.standard_normal(30)[user]
    ours = base + lead + 0.1 * random.standard_normal((4, 1))
    sums, sizes = by_user_sums((ours, base), user)
    relative, absolute = tables.interval(*sums, sizes)
    drawn = []
    for _ in range(1500):
        rows = np.concatenate([np.nonzero(user == u)[0] for u in random.integers(0, 30, 30)])
        drawn.append((ours[:, rows].mean(), base[:, rows].mean()))
    a, b = np.array(drawn).T

    def widened(mean, drawn, by_seed):
        half = 3.182 * np.std(by_seed, ddof=1) / 2  # Student's t at four seeds
        low, high = np.percentile(drawn, (2.5, 97.5))
        return mean - np.hypot(mean - low, half), mean + np.hypot(high - mean, half)

    mean = (ours - base).mean()
    ends = widened(mean, a - b, (ours - base).mean(1))
    width = np.ptp(ends)
    assert absolute[0] == pytest.approx(mean)
    assert absolute[1:] == pytest.approx(ends, abs=0.08 * width)
    ratio = ours.mean() / base.mean() - 1
    # What leaving a seed out moves tells how the ratio varies with the seeds (the jackknife).
    pseudo = []
    for i in range(4):
        without = ours[np.arange(4) != i].mean() / base[np.arange(4) != i].mean() - 1
        pseudo.append(4 * ratio - 3 * without)
    ends = widened(ratio, a / b - 1, pseudo)
    assert relative[0] == pytest.approx(ratio)
    assert relative[1:] == pytest.approx(ends, abs=0.08 * np.ptp(ends))
    # If windows were taken as independent, the interval would be clearly too narrow.
    sums, sizes = by_user_sums((ours, base), random.permutation(user))
    shuffled = tables.interval(*sums, sizes)[1]
    assert np.ptp(shuffled[1:]) < 0.9 * width


def test_seed_interval_and_power():
    half = 4.303 / 3**0.5
    assert tables.seed_interval([1.0, 2.0, 3.0]) == pytest.approx((2.0, 2 - half, 2 + half))
    assert np.isnan(tables.seed_interval([1.0])[1]) and np.isnan(tables.seed_interval([])[0])
    random = np.random.default_rng(0)
    user = np.repeat(np.arange(400), 3)

    def detectable(values):  # (5, 400), a value a user, on which her three windows agree
        (sums,), sizes = by_user_sums([values[:, user]], user)
        return tables.detectable(sums, sizes)

    found = [detectable(random.standard_normal((5, 400))) for _ in range(20)]
    exact = 2.8 * (2 / 5 / 400) ** 0.5
    # detectable takes the larger of two estimates, which lies above the exact value.
    assert min(found) > 0.95 * exact and np.mean(found) < 1.35 * exact
    wide = detectable(random.standard_normal((5, 400)) + np.array([[0.0, 1, 2, 3, 4]]).T)
    assert wide == pytest.approx(2.8 * np.std([0, 1, 2, 3, 4], ddof=1) * (2 / 5) ** 0.5, rel=0.2)


@pytest.mark.parametrize(
    "triple, claimed, expected",
    [
        ((0.2, 0.1, 0.3), 0.24, "Confirmed"),
        ((0.05, 0.01, 0.3), 0.24, "weaker"),
        ((0.1, 0.05, 0.15), 0.24, "weaker"),
        ((0.1, -0.01, 0.3), 0.24, "not found"),
        ((-0.2, -0.3, -0.1), 0.24, "not found"),
        ((-0.3, -0.4, -0.2), -0.37, "Confirmed"),
        ((-0.1, -0.2, -0.05), -0.37, "weaker"),
        ((0.3, 0.2, 0.4), -0.37, "not found"),
        ((-0.01, -0.02, -0.001), -1e-9, "Confirmed"),
    ],
)
def test_verdicts(triple, claimed, expected):
    assert tables.verdict(*triple, claimed) == expected


# ------------------------------------------------------------------------------------------------
# tables from made-up results


def made_up_rows():
    """[(row, seed, arguments, NDCG@10, MGU@5, auxiliary to user attribution)]."""
    usual = {"tau": 1.0, "groups": 4, "relevance": "gradient", "prior": "uniform"}
    specs = [("before", 0, {"loss": "before"}, 0.02, 0.10, 1)]
    for seed in range(3):
        specs += [
            ("sft", seed, {"loss": "sft"}, 0.05, 0.10, 6),
            ("gdrt", seed, {"loss": "gdrt"} | usual, 0.06, 0.06, 3),
            ("gdrt tau=10", seed, {"loss": "gdrt"} | usual | {"tau": 10.0}, 0.05, 0.10, 6),
            ("sft epochs=8", seed, {"loss": "sft", "epochs": 8}, 0.04, 0.10, 6),
            ("gdrt epochs=8", seed, {"loss": "gdrt", "epochs": 8} | usual, 0.05, 0.10, 6),
            ("sft", seed, {"loss": "sft", "windows": None}, 0.05, 0.10, 6),
            ("gdrt", seed, {"loss": "gdrt", "windows": None} | usual, 0.055, 0.10, 6),
        ]
    return specs


@pytest.fixture
def made_up(tmp_path):
    """Results where GDRT's NDCG@10 is 0.01 above SFT's 0.05 for every window.

    MGU is 40% lower; auxiliary over user attribution is 1 before training, 6 for SFT, 3 for GDRT.
    """
    random = np.random.default_rng(0)
    user = np.repeat(np.arange(20), 5)
    grid = {"dataset": "ml-100k", "split": "time", "windows": 10_000, "epochs": 4}
    lines = []
    arrays = {}
    for i, (row, seed, arguments, ndcg, mgu, ratio) in enumerate(made_up_rows()):
        noise = np.random.default_rng(seed).standard_normal(100) * 0.01
        kept = {
            "NDCG@10": ndcg + noise,
            "HR@10": ndcg + noise,
            "NLL": 7 - ndcg + noise,
            "legal NLL": 6 - ndcg + noise,
        }
        arrays[f"k{i}/test"] = outcomes.by_user(user, user < 10, kept)
        test = {name: float(x.mean()) for name, x in kept.items()} | {
            "MGU@5": mgu + 0.001 * random.random(),
            "DGU@5": 2 * mgu,
            "coverage@10": 0.3,
            "group legal NLL": [3 - ndcg + 0.001 * random.random(), 1, 0.5, 0.2],
        }
        share = ratio / (1 + ratio) * (1 + 0.001 * random.random())
        line = {"key": f"k{i}", "row": row, "arguments": grid | {"seed": seed} | arguments}
        shares = {"auxiliary share": share}
        line |= {"test": test, "audit": {"ablation": shares, "legal ablation": shares}}
        line["seconds"] = {"warm-up": 10, "train": 40, "relevance": 4 if row == "gdrt" else 0}
        lines.append(line)
    outcomes.add_arrays(tmp_path, arrays)
    outcomes.add_lines(tmp_path, lines)
    return tmp_path


def test_groups_of_two_seeds_are_compared_where_tokens_have_a_choice(made_up):
    groups = [
        [[0, 1, 2, 3], [-1, 2, 0, 3]],
        [[0, 1, 1, 3], [0, 0, 0, 3]],
        [[0, 1, 2, 3], [-1, 2, 0, 3]],
    ]
    sft = tables.pick(tables.read_lines(made_up), **tables.GRID)["sft"]
    for line, group in zip(sft.values(), groups):
        outcomes.add_arrays(made_up, {f"groups-{line['key']}/groups": np.array(group)})
    cells = tables.sections(made_up, ("groups",))["groups"].splitlines()[2].split(" | ")
    assert cells[1:5] == ["gradient", "3", "5", f"{(3 / 5 + 3 / 5 + 1) / 3:.2f}"]
    assert cells[5] == f"{(2 * (2 * 3 + 1 * 2 + 2 * 0) / 25 + (4 + 1 + 4) / 25) / 3:.2f}"


def test_statements_find_what_was_put_in(made_up):
    text = tables.sections(made_up, ("statements",))["statements"]
    lines = [line for line in text.splitlines() if line.startswith("|")]
    header, _, *rows = [line.strip("| ").split(" | ") for line in lines]
    assert header[1] == "grid"
    verdicts = [row[1].split(": ")[1] for row in rows]
    assert verdicts == ["*weaker*"] + ["*Confirmed*"] * 6  # 20% where 24.29% is stated
    assert rows[0][1].startswith("**+20.0% [") and rows[-1][1].startswith("**+8% [")


def test_grid_leaves_sweeps_to_their_table_and_pages_keep_the_rest(made_up, capsys):
    text = tables.sections(made_up, ("grid", "sweep"))
    assert "=" not in text["grid"] and text["grid"].count("\n| gdrt |") == 1
    assert [line.split("|")[1:3] for line in text["sweep"].splitlines()[2:]] == [
        [" tau ", " 1 "],
        [" tau ", " 10 "],
        [" groups ", " 4 "],
        [" windows ", " 10000 "],
        [" windows ", " all "],
        [" epochs ", " 4 "],
        [" epochs ", " 8 "],
    ]
    # Against SFT with as many epochs: 0.05 to 0.04.
    last = text["sweep"].splitlines()[-1].split("|")
    assert last[3].startswith(" 0.04") and last[5].startswith(" **+25.0 [")
    old = "# A\n<!-- quality: grid -->\nold\n<!-- /quality: grid -->\nafter \\1\n"
    for name in ("README.md", "older.md"):
        (made_up / name).write_text(old)
    tables.main(["--results", str(made_up), "--pages", "--figures"])
    tables.main(["--results", str(made_up), "--pages"])  # a second time changes nothing
    for name in ("README.md", "older.md"):
        page = (made_up / name).read_text()
        assert "old" not in page
        assert page.startswith("# A\n<!-- q")
        assert page.endswith("after \\1\n")
        assert page.count("| sft |") == 1
    assert "<svg" in (made_up / "figures" / "dose.svg").read_text()
    whole = (made_up / "tables.md").read_text()
    assert all(f"## {name}\n" in whole for name in text) and text["sweep"] in whole


def test_a_page_has_the_tables_without_their_columns_of_detail():
    body = "words\n\n|  | HR@10 | NDCG@10 |\n| --- | --- | --- |\n| sft | 0.3 | 0.2 |\n\n"
    body += "| to SFT | DGU@5 |\n| --- | --- |\n| +1 | 2 |"
    narrow = "words\n\n|  | NDCG@10 |\n| --- | --- |\n| sft | 0.2 |\n\n"
    assert tables.narrow(body) == narrow + "| to SFT |\n| --- |\n| +1 |"


def test_a_changed_configuration_does_not_mix_with_the_old_one(made_up):
    path = made_up / "quality.jsonl"
    line = next(json.loads(text) for text in path.read_text().splitlines() if '"sft"' in text)
    line |= {"key": "new", "arguments": line["arguments"] | {"lr": 0.5, "seed": 7}}
    path.write_text(path.read_text() + json.dumps(line) + "\n")
    assert list(tables.pick(tables.read_lines(made_up), **tables.GRID)["sft"]) == [7]


def test_without_results_one_sentence(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        tables.main(["--results", str(tmp_path)])
    assert stop.value.code == 2 and "run benchmarks/quality.py first" in capsys.readouterr().err
    with pytest.raises(InputError, match="--data"):
        quality.main(["transfer"])


# ------------------------------------------------------------------------------------------------
# stored results


def test_older_lines_have_the_names_of_today(tmp_path):
    labels = ["gdrt late", "gdrt late uniform", "gdrt late tau=1", "planted groups", "gdrt"]
    lines = [{"key": label, "row": label, "experiment": "tune5"} for label in labels]
    outcomes.add_lines(tmp_path, lines)
    read = outcomes.read_lines(tmp_path)
    assert [line["row"] for line in read] == [
        "gdrt, groups after SFT",
        "gdrt uniform, groups after SFT",
        "gdrt, groups after SFT tau=1",
        "true groups",
        "gdrt",
    ]
    assert {line["experiment"] for line in read} == {"tune-groups"}


def test_an_interrupted_update_leaves_the_arrays_as_they_were(tmp_path, monkeypatch):
    outcomes.add_arrays(tmp_path, {"a/test": np.arange(3)})
    whole = (tmp_path / "outcomes.npz").read_bytes()

    def half(file, **arrays):
        file.write(b"half of it")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(np, "savez_compressed", half)
        outcomes.add_arrays(tmp_path, {"b/test": np.arange(4)})
    assert (tmp_path / "outcomes.npz").read_bytes() == whole
    assert [path.name for path in tmp_path.iterdir()] == ["outcomes.npz"]
    outcomes.add_arrays(tmp_path, {"b/test": np.arange(4)})
    assert outcomes.read_array(tmp_path, "a/test").tolist() == [0, 1, 2]
    assert outcomes.read_array(tmp_path, "b/test").tolist() == [0, 1, 2, 3]


def test_runs_of_another_folder_are_taken_in_once(made_up, tmp_path):
    together = tmp_path / "together"
    counts = [outcomes.merge(made_up, together) for _ in range(2)]
    assert counts == [len(tables.read_lines(made_up)), 0]
    mine, theirs = (tables.sections(folder, ("grid",)) for folder in (together, made_up))
    assert mine == theirs


def test_validation_runs_of_untrained_models_are_compared_at_equal_epochs(tmp_path):
    setting = tables.UNTRAINED["main"]
    metrics = {"MGU@5": 0.1, "DGU@5": 0.2, "coverage@10": 0.3, "group legal NLL": [3, 1, 1, 0]}
    runs = [("sft epochs=1", 1, 0.2), ("gdrt uniform epochs=1", 1, 0.3), ("sft", 2, 0.4)]
    for i, (row, epochs, ndcg) in enumerate(runs):
        arguments = setting | {"seed": 0, "epochs": epochs, "no_test": True}
        seconds = {"warm-up": 1, "train": 2, "relevance": 0}
        line = {"key": str(i), "row": row, "arguments": arguments, "seconds": seconds}
        outcomes.add_lines(tmp_path, [line | {"valid": metrics | {"NDCG@10": ndcg}}])
        values = {"NDCG@10": np.full(9, ndcg), "HR@10": np.ones(9), "legal NLL": np.ones(9)}
        table = outcomes.by_user(np.arange(9) // 3, np.ones(9), values)
        outcomes.add_arrays(tmp_path, {f"{i}/valid": table})
    rows = tables.sections(tmp_path, ("epochs",))["epochs"].splitlines()[2:]
    cells = [row.strip("| ").split(" | ") for row in rows]
    assert [cell[:2] for cell in cells[:3]] == [["1", "sft"], ["1", "gdrt uniform"], ["2", "sft"]]
    assert [cell[3] for cell in cells[:3]] == ["0.2000", "0.3000", "0.4000"]
    assert cells[1][4] == "+50.0 [+50.0, +50.0]", "not bold: one seed"
    # And each loss after the epochs that are best for it.
    assert [cell[:2] for cell in cells[3:]] == [["best: 2", "sft"], ["best: 1", "gdrt uniform"]]
    assert cells[4][4].startswith("-25.0")


def diagnosed_line(row, seed, ndcg, share, **changes):
    """A trial on toy's validation windows with what was diagnosed after its warm-up."""
    arguments = {"dataset": "toy", "windows": None, "epochs": 2, "batch": 64, "seed": seed}
    arguments |= {"model": "tiny", "start": "untrained", "lr": 1.0, "no_test": True} | changes
    arguments["loss"] = "sft" if row == "sft" else "gdrt"
    if row != "sft":
        arguments["relevance"] = row.split(" by ")[1] if " by " in row else "gradient"
    valid = {"NDCG@10": ndcg, "HR@10": ndcg, "legal NLL": 4.0, "MGU@5": 0.1}
    return {
        "key": f"{row}{seed}{arguments['model']}{arguments['lr']}",
        "row": row,
        "experiment": "toy-epochs",
        "arguments": arguments,
        "valid": valid,
        "diagnosis": {"user information": 0.05, "language share": share},
    }


def test_diagnosis_stands_beside_the_gain_and_epochs_are_drawn(tmp_path, capsys):
    """The tiny model's gain is that of groups by gradient, a larger one's by probability."""
    by = "gdrt uniform by "
    rows = [("sft", 0.1), ("gdrt uniform", 0.15), (by + "ablation", 0.9), (by + "probability", 0.2)]
    trials = itertools.product(({}, {"model": "smollm2"}), ((0, 0.8), (1, 0.9)), rows)
    at_another_rate = (({"lr": 9.0}, (0, 0.1), ("sft", 0.7)),)  # which is paired with nothing
    for changes, (seed, share), (row, ndcg) in (*trials, *at_another_rate):
        line = diagnosed_line(row, seed, ndcg, share, **changes)
        outcomes.add_lines(tmp_path, [line])
        values = {name: np.full(6, ndcg) for name in outcomes.KINDS}
        table = outcomes.by_user(np.arange(6), np.ones(6), values)
        outcomes.add_arrays(tmp_path, {f"{line['key']}/valid": table})
    tables.main(["diagnosis", "--results", str(tmp_path), "--figures"])
    shown = capsys.readouterr().out.strip().splitlines()[-2:]
    tiny, larger = (row.strip("| ").split(" | ") for row in shown)
    assert tiny[:7] == ["toy", "all", "2", "1", "2", "0.050", "85%"]
    assert tiny[7].startswith("**+50 ")
    assert larger[0] == "toy, smollm2, all weights" and larger[7].startswith("**+100 ")
    assert "<svg" in (tmp_path / "figures" / "epochs.svg").read_text()
