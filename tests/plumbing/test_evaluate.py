"""Held-out likelihood and the audit against separate prompts and forwards; the command."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    continuations,
    prompt_of,
    random_prompts,
    random_windows,
    score,
    separate_logits,
    small_model,
    target_tokens,
)
from transformers import AutoModelForCausalLM

import attribution
import evaluate
import gdrt
from attribution import log_probs_of
from data import Dataset, InputError, Window, build_trees, load_dataset, run_command


def world(users=5, seed=0):
    """(model, prompts, windows, dataset): a random Llama, random titles, four windows a user."""
    prompts = random_prompts(seed)
    windows = random_windows(len(prompts.titles), seed, users)
    titles = [f"Title {i}" for i in range(len(prompts.titles))]
    dataset = Dataset(
        "small",
        "movies",
        titles,
        [("A",)] * len(titles),
        [f"u{i}" for i in range(users)],
        windows,
        windows,
        windows,
        {},
        None,
        "",
    )
    return small_model(seed=seed), prompts, windows, dataset


def by_hand(model, prompts, window):
    """(full, legal) NLL (L,) of the target's tokens, EOS included, on the separate prompt."""
    labels = target_tokens(prompts, window)
    with torch.no_grad():
        logits = separate_logits(model, prompts, window).double()
    full = -score(logits, labels)
    return full.tolist(), (-score(logits, labels, continuations(prompts))).tolist()


# ---------------------------------------------------------------- held-out likelihood


def test_nlls_are_those_of_separate_prompts():
    model, prompts, windows, dataset = world()
    group = np.random.default_rng(1).integers(0, 3, (len(prompts.titles), 8))  # group 3 is empty
    parts = {"all": windows}
    found = evaluate.evaluate_parts(model, prompts, dataset, parts, group, 4)
    metrics, per_window, ranking = found["all"]
    full = []
    legal = []
    groups = {g: [] for g in range(4)}
    for window in windows:
        tokens = by_hand(model, prompts, window)
        full.append(sum(tokens[0]))
        legal.append(sum(tokens[1]))
        for j, pair in enumerate(zip(*tokens)):
            groups[group[window.items[window.stop], j]].append(pair)
    assert per_window["NLL"] == pytest.approx(full, abs=1e-4) and per_window[
        "legal NLL"
    ] == pytest.approx(legal, abs=1e-4)
    assert metrics["NLL"] == pytest.approx(np.mean(full), abs=1e-4) and metrics[
        "legal NLL"
    ] == pytest.approx(np.mean(legal), abs=1e-4)
    means = [np.mean(groups[g], 0) for g in range(3)]
    assert metrics["group NLL"] == [*(pytest.approx(m[0], abs=1e-4) for m in means), None]
    assert metrics["group legal NLL"] == [*(pytest.approx(m[1], abs=1e-4) for m in means), None]
    assert metrics["worst group NLL"] == pytest.approx(max(m[0] for m in means), abs=1e-4)
    assert metrics["NDCG@10"] == pytest.approx(per_window["NDCG@10"].mean()) and len(
        ranking.items
    ) == len(windows)
    json.dumps(metrics)


def test_parts_evaluated_together_are_as_each_alone():
    """Validation and test of a user share a history and so a tree; the figures stay their own."""
    model, prompts, windows, dataset = world(seed=2)
    group = np.random.default_rng(1).integers(0, 3, (len(prompts.titles), 8))
    parts = {"valid": windows[::2], "test": windows[1::2][:-1]}
    together = evaluate.evaluate_parts(model, prompts, dataset, parts, group, 3)
    assert list(together) == ["valid", "test"]
    for name, part in parts.items():
        alone = evaluate.evaluate_parts(model, prompts, dataset, {name: part}, group, 3)
        metrics, per_window, ranking = alone[name]
        ours, our_windows, our_ranking = together[name]
        assert (our_ranking.items == ranking.items).all()
        for field in "scores", "nll", "legal_nll":
            alone = getattr(ranking, field)
            assert getattr(our_ranking, field) == pytest.approx(alone, abs=1e-5, nan_ok=True)
        assert list(our_windows) == list(per_window) and list(ours) == list(metrics)
        for metric in "NDCG@10", "MGU@5", "coverage@10", "worst group NLL", "legal NLL":
            assert ours[metric] == pytest.approx(metrics[metric], abs=1e-5)


def test_parts_evaluated_together_read_a_shared_history_once(monkeypatch):
    model, prompts, windows, dataset = world()
    read = []
    collate = evaluate.collate

    def counted(trees, device):
        read.append(len(trees))
        return collate(trees, device)

    monkeypatch.setattr(evaluate, "collate", counted)
    parts = {"valid": windows[::2], "test": windows[1::2]}
    evaluate.evaluate_parts(model, prompts, dataset, parts, None, 0)
    assert sum(read) == len({w.user for w in windows}) < len(windows)


@pytest.mark.parametrize("kind", ["llama", "mamba"])
def test_likelihood_of_the_search_is_that_of_a_pass_of_its_own(kind):
    """The logits that start the search also give the target's NLL; Mamba reads separate prompts."""
    _, prompts, windows, _ = world()
    model = small_model(kind)
    prompts = prompts._replace(packed=kind == "llama")
    trees = build_trees(prompts, windows)
    legal, full, _, place, window = log_probs_of(model, prompts, trees)
    ranking = evaluate.rank(model, prompts, windows, 3, rows=6)
    assert ranking.nll[window, place] == pytest.approx(-full, abs=1e-5)
    assert ranking.legal_nll[window, place] == pytest.approx(-legal, abs=1e-5)
    assert (~np.isnan(ranking.nll)).sum() == len(full)


# ---------------------------------------------------------------- audit


def attribution_by_hand(model, prompts, window, points=None):
    """{"aux" | "user": A (L,)} on the separate prompt.

    By ablation, or with `points` by one backward per token at each midpoint of the path.
    """
    labels = prompts.titles[window.items[window.stop]] + [prompts.eos]
    prompt = prompt_of(prompts, window)
    weight = model.get_input_embeddings().weight.detach()
    E = weight[torch.tensor(prompt + labels[:-1])]  # (T, D)
    first = len(prompts.bos + prompts.task)
    last = len(prompt) - len(prompts.marker)
    user = torch.zeros(len(E), 1)
    user[first:last] = 1
    aux = 1 - user
    aux[: len(prompts.bos)] = 0

    def log_prob(embeds):
        logits = model(inputs_embeds=embeds[None], use_cache=False).logits[0, len(prompt) - 1 :]
        return logits.log_softmax(-1)[torch.arange(len(labels)), torch.tensor(labels)]

    found = {}
    for name, inside in (("aux", aux), ("user", user)):
        delta = (E - weight.mean(0)) * inside
        if points is None:
            with torch.no_grad():
                found[name] = (log_prob(E) - log_prob(E - delta)).numpy()
            continue
        total = np.zeros(len(labels))
        for j in range(points):
            s = torch.tensor((j + 0.5) / points, requires_grad=True)
            out = log_prob(E - (1 - s) * delta)
            total += [float(torch.autograd.grad(x, s, retain_graph=True)[0]) for x in out]
        found[name] = total / points
    return found


def test_auxiliary_shares_by_hand():
    """A share, of all tokens or some, is one quotient of sums of |A| over the windows."""
    model, prompts, windows, _ = world(users=3)
    group = np.random.default_rng(1).integers(0, 3, (len(prompts.titles), 8))
    found = evaluate.audit(model, prompts, windows, group, 4, np.zeros(len(windows)))
    for method, points in (("ablation", None), ("gradient", 4)):
        tokens = []  # (step, group, |A_aux|, |A_user|)
        for window in windows[:: evaluate.GRADIENT_EVERY if method == "gradient" else 1]:
            A = attribution_by_hand(model, prompts, window, points)
            for j, (a, u) in enumerate(zip(A["aux"], A["user"])):
                tokens.append((j, group[window.items[window.stop], j], abs(a), abs(u)))

        def share(some):
            aux = sum(token[2] for token in tokens if some(token))
            user = sum(token[3] for token in tokens if some(token))
            return pytest.approx(aux / (aux + user), rel=1e-3) if aux + user else None

        assert found[method]["auxiliary share"] == share(lambda token: True)
        assert found[method]["auxiliary share first"] == share(lambda token: token[0] == 0)
        assert found[method]["by group"] == [
            share(lambda token, g=g: token[1] == g) for g in range(4)
        ]
        places = min(8, 1 + max(token[0] for token in tokens))
        assert found[method]["by position"] == [
            share(lambda token, j=j: token[0] == j) for j in range(places)
        ]
    assert found["ablation"]["by group"][3] is None and found["windows"] == len(windows)
    assert found["legal ablation"]["auxiliary share"] != found["ablation"]["auxiliary share"]


def test_the_audit_reads_a_sample(monkeypatch):
    model, prompts, windows, _ = world(users=3)
    monkeypatch.setattr(evaluate, "AUDITED", 5)
    chosen = sorted(np.random.default_rng(0).permutation(len(windows))[:5].tolist())
    sampled = evaluate.audit(model, prompts, windows, None, 0, np.arange(12.0))
    some = [windows[i] for i in chosen]
    alone = evaluate.audit(model, prompts, some, None, 0, np.array(chosen, dtype=float))
    assert sampled == alone and sampled["windows"] == 5 and "by group" not in sampled["ablation"]


@pytest.mark.parametrize("counts", [[1] * 9, [4] * 6, [7, 1, 1, 5, 1], [3, 3], [2, 1, 1]])
def test_histories_are_shuffled_between_users(counts):
    """Each history is used once and never by its own user; targets stay."""
    windows = [
        Window(user, tuple(range(20 * user, 20 * user + 12)), j, j + 3)
        for user, n in enumerate(counts)
        for j in range(n)
    ]
    source = np.random.default_rng(0)
    windows = [windows[i] for i in source.permutation(len(windows))]
    for seed in range(5):
        shuffled = evaluate.shuffle_histories(windows, seed)
        for own, got in zip(windows, shuffled):
            assert (
                got.items[got.stop] == own.items[own.stop]
                and got.user == own.user
                and len(got.items[got.start : got.stop]) == 3
            )
            assert all(item // 20 != own.user for item in got.items[got.start : got.stop])
        assert sorted(w.items[w.start : w.stop] for w in shuffled) == sorted(
            w.items[w.start : w.stop] for w in windows
        )


def test_what_shuffled_histories_lose():
    """The loss is the given NDCG@10 minus that with shuffled histories.

    Every user's own seen titles stay left out.
    """
    model, prompts, windows, _ = world()
    own = np.linspace(0.5, 1, len(windows))
    found = evaluate.audit(model, prompts, windows, None, 0, own)[
        "NDCG@10 lost by shuffled histories"
    ]
    total = 0.0
    for window, mixed in zip(windows, evaluate.shuffle_histories(windows, 0)):
        target = window.items[window.stop]
        scores = {}
        for item in set(range(len(prompts.titles))) - set(window.items[: window.stop]):
            scores[item] = -sum(
                by_hand(model, prompts, mixed._replace(items=mixed.items[: mixed.stop] + (item,)))[
                    1
                ]
            )
        rank = 1 + sum(score > scores[target] for score in scores.values())
        total += 1 / np.log2(rank + 1) if rank <= 10 else 0
    assert found == pytest.approx(own.mean() - total / len(windows), abs=1e-6)


# ---------------------------------------------------------------- the command, on real runs


@pytest.fixture(scope="module")
def runs(small, tmp_path_factory):
    """Runs of gdrt.py: `zero` and `one`, of two seeds, and `untested`, with --no-test."""
    folder = tmp_path_factory.mktemp("runs")
    for name, flags in (
        ("zero", ["--seed", "0"]),
        ("one", ["--seed", "1"]),
        ("untested", ["--no-test", "--loss", "sft"]),
    ):
        gdrt.main([*small, *flags, "--epochs", "1", "--out", str(folder), "--name", name])
    return folder


def table_of(text):
    """The rows of the printed comparison: {metric: [cells]}, over all of its tables.

    A cell with an interval is (value, low, high). A table's header stands above a rule of dashes.
    """
    rows = {}
    lines = text[: text.index(evaluate.NOTE[:40])].split("\n")
    start = next(i for i, line in enumerate(lines) if line.startswith("----"))
    for line in lines[start:]:
        if line.strip() and line[0] not in " -":
            name, *cells = [cell.strip() for cell in line.split("  ") if cell.strip()]
            numbers = [cell.translate(str.maketrans("", "", "[],*")).split() for cell in cells]
            rows.setdefault(name, []).extend(tuple(map(float, row)) for row in numbers)
    return rows


def test_recomputed_metrics_equal_those_of_training(runs, capsys):
    evaluate.main([str(runs / "zero")])
    out = capsys.readouterr().out
    for loss in "sft", "gdrt":
        assert f"{runs / 'zero' / loss}: metrics equal those that training wrote" in out
        written = json.loads((runs / "zero" / loss / "metrics.json").read_text())["test"]
        found = evaluate.evaluate_run(runs / "zero" / loss)
        assert (
            found["moved"] == {}
            and found["part"] == "test"
            and list(found["metrics"]) == list(written)
        )
        assert (
            json.loads(json.dumps(found["metrics"])) == written
        )  # on one machine they agree to the last digit
        rows = table_of(out)
        for metric in (
            "NDCG@10",
            "MGU@5",
            "genre DGU@10",
            "coverage@10",
            "legal NLL",
            "worst group NLL",
        ):
            assert rows[metric][["sft", "gdrt"].index(loss)][0] == pytest.approx(
                written[metric], abs=6e-5
            ), metric
    for words in ("sft seed 0", "gdrt seed 0 less sft seed 0", "by user activity"):
        assert words in out
    assert "by item popularity" in out
    assert max(len(line) for line in out.split("\n") if not line.startswith(str(runs))) <= 100


def test_other_figures_are_named(runs, tmp_path, capsys):
    """Figures unlike those of metrics.json are named, whether the file or the model was changed."""
    shutil.copytree(runs / "zero", tmp_path / "run")
    path = tmp_path / "run" / "sft" / "metrics.json"
    written = json.loads(path.read_text())
    was = written["test"]["NDCG@10"]
    written["test"]["NDCG@10"] = was + 0.01
    del written["test"]["MGU@5"]
    path.write_text(json.dumps(written))
    assert list(evaluate.evaluate_run(path.parent)["moved"]) == ["NDCG@10", "MGU@5"]
    evaluate.main([str(path.parent)])
    assert (
        f"{path.parent}: training wrote other figures: "
        f"NDCG@10 {was + 0.01:.4f} and now {was:.4f}, MGU@5 nan" in capsys.readouterr().out
    )
    shutil.rmtree(tmp_path / "run" / "gdrt" / "model")
    shutil.copytree(runs / "one" / "sft" / "model", tmp_path / "run" / "gdrt" / "model")
    evaluate.main([str(tmp_path / "run" / "gdrt")])
    assert "training wrote other figures" in capsys.readouterr().out


def test_seeds_are_pooled_and_named(runs, capsys):
    evaluate.main([str(runs / "zero"), str(runs / "one")])
    out = capsys.readouterr().out
    assert "sft seeds 0,1" in out and "gdrt seeds 0,1 less sft seeds 0,1" in out
    rows = table_of(out)

    def mean(loss, metric):
        paths = [runs / run / loss / "metrics.json" for run in ("zero", "one")]
        return np.mean([json.loads(path.read_text())["test"][metric] for path in paths])

    for metric in "NDCG@10", "MGU@10", "NLL":
        (value, low, high), _, (difference, below, above) = rows[metric]
        sft = mean("sft", metric)
        assert value == pytest.approx(sft, abs=6e-5) and low <= high
        ahead = mean("gdrt", metric) - sft
        assert difference == pytest.approx(ahead, abs=6e-5) and below <= above


def test_predictions_beside_a_run(runs, capsys, tmp_path):
    """The run's own lists, given as another system's, score what the run does."""
    lists = shutil.copy(runs / "zero" / "gdrt" / "predictions.jsonl", tmp_path / "theirs.jsonl")
    evaluate.main([str(runs / "zero" / "gdrt"), "--predictions", str(lists)])
    rows = table_of(capsys.readouterr().out)
    for metric in "HR@5", "NDCG@10", "MRR@10", "MGU@5", "genre MGU@10":
        ours, theirs, difference = rows[metric]
        assert ours == theirs and not any(difference), metric
    lines = lists.read_text().splitlines()
    lists.write_text("\n".join(lines[1:]) + "\n")
    with pytest.raises(InputError, match="of 24 windows 1 have no list, and 0 lists"):
        evaluate.main([str(runs / "zero" / "gdrt"), "--predictions", str(lists)])
    evaluate.main([str(runs / "zero" / "gdrt"), "--predictions", str(lists), "--allow-missing"])
    out = capsys.readouterr().out
    gained = evaluate.evaluate_run(runs / "zero" / "gdrt")["per_window"]["HR@10"][0]
    assert "1 windows without a list, counted as misses" in out
    assert table_of(out)["HR@10"][2][0] == pytest.approx(-gained / 24, abs=6e-5)


def test_a_run_without_test_is_compared_on_validation(runs, capsys):
    evaluate.main([str(runs / "untested")])
    assert "24 valid windows of" in capsys.readouterr().out
    with pytest.raises(InputError, match="other data or windows"):
        evaluate.main([str(runs / "zero"), str(runs / "untested")])


def test_attribution_leaves_the_test_windows_alone_as_the_run_did(small, runs, capsys):
    dataset = load_dataset(small[1], min_rating=3)
    attribution.main([str(runs / "untested" / "sft"), "--method", "ablation"])
    window = dataset.valid[0]
    title = dataset.titles[window.items[window.stop]]
    assert f"user {dataset.users[window.user]}, title {title}: " in capsys.readouterr().out


def test_report_from_the_command(runs, tmp_path, capsys):
    evaluate.main([str(runs / "zero"), "--report", str(tmp_path / "page.html")])
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert f"report: {tmp_path / 'page.html'}" in capsys.readouterr().out
    assert all(
        f'<section id="{name}">' in page
        for name in (
            "results",
            "training",
            "groups",
            "attribution",
            "exposure",
            "users",
            "heat-map",
            "settings",
        )
    )
    with pytest.raises(InputError, match="one run"):
        evaluate.main([str(runs / "zero"), str(runs / "one"), "--report"])


@pytest.mark.parametrize(
    "harm, says",
    [
        (
            lambda run: shutil.rmtree(run / "sft" / "model"),
            "no model in it; give the folder of a loss",
        ),
        (lambda run: (run / "sft" / "metrics.json").unlink(), "metrics.json: No such file"),
        (lambda run: (run / "groups.json").unlink(), "groups.json: No such file"),
        (lambda run: (run / "config.json").write_text("{}}"), "config.json: not whole JSON"),
        (
            lambda run: (run / "config.json").write_text('{"model_type": "llama"}'),
            'config.json: not by gdrt.py, since it has no "arguments"; give runs/NAME',
        ),
        (
            lambda run: (run / "sft" / "model" / "model.safetensors").write_text("half"),
            "away, and gdrt.py --resume writes it anew",
        ),
        (
            lambda run: (run / "config.json").write_text(
                (run / "config.json").read_text().replace('"data": "', '"data": "x')
            ),
            "is not this run's, or has changed since",
        ),
    ],
)
def test_damaged_runs_are_refused(runs, tmp_path, harm, says):
    shutil.copytree(runs / "zero", tmp_path / "run")
    harm(tmp_path / "run")
    with pytest.raises(InputError) as error:
        evaluate.main([str(tmp_path / "run" / "sft")])
    assert says in str(error.value) and "\n" not in str(error.value)


def test_a_runs_model_folder_is_no_run(runs):
    """Its config.json is the model's."""
    with pytest.raises(InputError, match="not by gdrt.py"):
        evaluate.main([str(runs / "zero" / "sft" / "model")])


def test_losses_of_other_windows_are_not_compared(runs, tmp_path):
    shutil.copytree(runs / "zero", tmp_path / "run")
    path = tmp_path / "run" / "gdrt" / "predictions.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:5]))
    with pytest.raises(InputError, match="predictions.jsonl: not of the windows"):
        evaluate.main([str(tmp_path / "run"), "--report", str(tmp_path / "page.html")])
    assert not (tmp_path / "page.html").exists()


def test_a_reader_that_has_seen_enough_is_no_fault():
    """As in `evaluate.py RUN | head`, whose end of the pipe is closed early."""
    code = "import data; data.run_command(lambda: print('x' * 10**6))"
    shell = f'{sys.executable} -c "{code}" | true'
    done = subprocess.run(shell, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_ctrl_c_ends_without_a_traceback(capsys):
    def main():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as left:
        run_command(main)
    assert left.value.code == 130
    assert capsys.readouterr().err.strip() == "interrupted"


def test_unfinished_losses_are_left_out(runs, tmp_path, capsys):
    shutil.copytree(runs / "zero", tmp_path / "run")
    (tmp_path / "run" / "gdrt" / "metrics.json").unlink()
    evaluate.main([str(tmp_path / "run")])
    assert "gdrt" not in capsys.readouterr().out


def test_nan_weights_are_refused(runs, tmp_path):
    shutil.copytree(runs / "zero", tmp_path / "run")
    folder = tmp_path / "run" / "sft" / "model"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.get_input_embeddings().weight.data[:] = float("nan")
    model.save_pretrained(folder)
    with pytest.raises(InputError, match="NaN"):
        evaluate.main([str(folder.parent)])


def test_one_sentence_and_exit_code_2(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "runs/nowhere"])
    with pytest.raises(SystemExit) as left:
        run_command(evaluate.main)
    said = capsys.readouterr().err
    assert (
        left.value.code == 2
        and said.startswith("evaluate.py: ")
        and "nowhere: no such run" in said
        and said.count("\n") == 1
    )


# ---------------------------------------------------------------- seeds of what is drawn


def test_another_seed_pairs_other_users():
    windows = [Window(user, (2 * user, 2 * user + 1), 0, 1) for user in range(20)]
    first = evaluate.shuffle_histories(windows, 0)
    assert first == evaluate.shuffle_histories(windows, 0)
    assert first != evaluate.shuffle_histories(windows, 1)


def test_the_windows_of_the_audit_are_drawn_by_its_seed(monkeypatch):
    windows = random_windows(12, 0, 3)
    read = {}

    def shares(model, prompts, some, *rest):
        read["windows"] = some
        return {}

    def ndcg(model, prompts, some, seed, **options):
        read["seed"] = seed
        return np.zeros(len(some))

    monkeypatch.setattr(evaluate, "AUDITED", 5)
    monkeypatch.setattr(evaluate, "shares_by_method", shares)
    monkeypatch.setattr(evaluate, "shuffled_ndcg", ndcg)
    for seed in 0, 3:
        evaluate.audit(None, None, windows, None, 0, np.zeros(12), seed=seed)
        chosen = np.random.default_rng(seed).permutation(12)[:5]
        assert read == {"windows": [windows[i] for i in sorted(chosen)], "seed": seed}
