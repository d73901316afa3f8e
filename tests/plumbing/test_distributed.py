"""Ranks and micro-batches change nothing: real gloo processes against one process.

Gradients, q, training curves, metrics, the audit and relevance are compared.
"""

import json
import os
import re
import shlex
import signal
import subprocess
import sys

import pytest
import torch
from conftest import (
    ROOT,
    command,
    json_lines,
    on_ranks,
    random_prompts,
    random_windows,
    small_model,
    start,
)

import attribution
import evaluate
import gdrt
from data import Dataset, build_trees

K = 4
OBJECTIVES = {
    "sft": gdrt.sft_rule,
    "gdrt": gdrt.gdrt_rule(0.7, "uniform"),
    "gdrt by share": gdrt.gdrt_rule(0.7, "share"),
    "group-dro": gdrt.group_dro_rule(0.5),
}


def world():
    """(model, prompts, trees, group table), with trees of uneven length.

    Group 3 occurs only in the first tree, group 2 only in the second.
    """
    torch.manual_seed(0)
    model = small_model(seed=1, scale=0.2)
    prompts = random_prompts(0, n=60)
    trees = build_trees(prompts, random_windows(60, seed=3, users=7))
    group = torch.randint(0, 2, prompts.trie.path.shape, generator=torch.Generator().manual_seed(5))
    targets = [set(tree.item.tolist()) for tree in trees]
    for g, tree in (3, 0), (2, 1):
        for item in targets[tree] - set.union(
            *(items for other, items in enumerate(targets) if other != tree)
        ):
            group[item] = g
    return model, prompts, trees, group


class Watched(torch.optim.SGD):
    """Keeps the gradient that it is given."""

    def step(self):
        self.seen = torch.cat(
            [p.grad.flatten() for group in self.param_groups for p in group["params"]]
        )


def gradients(job, trees):
    """{objective: (gradient, line, log_q)} of one update on `trees`."""
    found = {}
    for name, objective in OBJECTIVES.items():
        model, prompts, every, group = world()
        optimizer = Watched(model.parameters(), lr=0.1)
        log_q = torch.log_softmax(torch.tensor([0.1, 0.5, -0.3, 0.2]), 0)
        batch = [every[i] for i in trees]
        rest = (prompts, group, objective, log_q, job)
        log_q, line = gdrt.training_step(model.train(), optimizer, batch, *rest)
        found[name] = optimizer.seen, line, log_q
    return found


def curves(job):
    """{objective: (lines of six updates, weights after them)}.

    The last update is on a tree that only rank 0 gets.
    """
    found = {}
    for name, objective in OBJECTIVES.items():
        model, prompts, trees, group = world()
        updates = [[0, 1, 2, 3], [4, 5, 6], [2, 0, 1], [3, 4], [6, 5, 1, 0], [2]]
        lines = []
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        log_q = torch.full((K,), 0.25).log()
        for update in updates:
            batch = [trees[i] for i in update]
            rest = (prompts, group, objective, log_q, job)
            log_q, line = gdrt.training_step(model.train(), optimizer, batch, *rest)
            lines.append(line)
        found[name] = lines, torch.cat([p.detach().flatten() for p in model.parameters()])
    return found


BATCHES = {
    "uneven, groups on one rank": [0, 1, 2, 3, 4, 5, 6],
    "groups absent": [4, 5],
    "a rank without a tree": [0],
}


def all_cases(job):
    return {name: gradients(job, trees) for name, trees in BATCHES.items()} | {
        "curves": curves(job)
    }


def save_all_cases(folder):
    job = gdrt.make_train_config(
        gdrt.parser().parse_args(["--device", "cpu", "--precision", "fp32"])
    )
    for accumulate in 1, 2:
        torch.save(
            all_cases(job._replace(accumulate=accumulate)), f"{folder}/{accumulate}-{job.rank}.pt"
        )


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """{(ranks, accumulate): what all_cases found}."""
    folder = tmp_path_factory.mktemp("ranks")
    assert on_ranks(2, save_all_cases, lambda rank: (folder,)) == [0, 0]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = {
        (1, accumulate): all_cases(gdrt.TrainConfig(accumulate=accumulate)) for accumulate in (1, 2)
    }
    torch.set_num_threads(threads)
    for accumulate in 1, 2:
        found[2, accumulate] = torch.load(folder / f"{accumulate}-0.pt", weights_only=True)
        other = torch.load(folder / f"{accumulate}-1.pt", weights_only=True)
        for name in OBJECTIVES:
            assert torch.equal(found[2, accumulate]["curves"][name][1], other["curves"][name][1]), (
                "ranks drift apart"
            )
    return found


def test_the_cases_are_what_they_are_meant_to_be():
    _, _, trees, group = world()
    tokens = [len(tree.label) for tree in trees]
    groups = [set(group[tree.item, tree.place].tolist()) for tree in trees]
    assert len(set(tokens)) > 3 and 3 in groups[0] and 2 in groups[1]
    assert all(3 not in g for g in groups[1:]) and all(2 not in g for g in groups[:1] + groups[2:])


@pytest.mark.parametrize(
    "setting", [(1, 2), (2, 1), (2, 2)], ids=["accumulated", "2 ranks", "2 ranks, accumulated"]
)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradients_and_q_are_those_of_one_pass(cases, setting, name):
    for batch in BATCHES:
        gradient, line, log_q = cases[setting][batch][name]
        expected, single, single_log_q = cases[1, 1][batch][name]
        assert expected.norm() > 0.01
        assert (gradient - expected).norm() < 1e-5 * expected.norm(), batch
        assert torch.allclose(log_q, single_log_q, atol=1e-5), batch
        assert line["n"] == single["n"] and (0 in line["n"]) == (
            batch != "uneven, groups on one rank"
        )
        for key in "loss", "nll", "group_nll", "q", "grad_norm":
            assert line[key] == pytest.approx(single[key], rel=1e-5, abs=1e-6), (batch, key)


@pytest.mark.parametrize(
    "setting", [(1, 2), (2, 1), (2, 2)], ids=["accumulated", "2 ranks", "2 ranks, accumulated"]
)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_training_curves_are_those_of_one_pass(cases, setting, name):
    lines, weights = cases[setting]["curves"][name]
    single, expected = cases[1, 1]["curves"][name]
    for i, (line, other) in enumerate(zip(lines, single, strict=True)):
        for key in "loss", "nll", "group_nll", "q":
            assert line[key] == pytest.approx(other[key], rel=1e-5, abs=1e-5), (i, key)
    assert (weights - expected).norm() < 1e-5 * expected.norm()


def test_gradient_of_one_pass_is_autograd_through_the_copied_loss(cases):
    """The tests above rely on one pass; here that pass is checked by autograd through gdrt_loss."""
    model, prompts, trees, group = world()
    batch = gdrt.collate(trees)
    nll = torch.nn.functional.cross_entropy(
        gdrt.target_logits(model, batch), batch.label, reduction="none"
    )
    loss, q, _ = gdrt.gdrt_loss(nll, group[batch.item, batch.place], K, 0.7)
    loss.backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()])
    expected *= min(1, gdrt.CLIP / expected.norm())
    gradient, line, _ = cases[1, 1]["uneven, groups on one rank"]["gdrt"]
    assert (gradient - expected).norm() < 1e-5 * expected.norm()
    assert line["q"] == pytest.approx(q.tolist(), rel=1e-5)


# ---------------------------------------------------------------- evaluation and relevance


def evaluations():
    """All that ranks share out, on seven trees (uneven shares) and on one (a rank has none)."""
    model, prompts, _, group = world()
    windows = random_windows(60, seed=3, users=7)
    titles = [f"Title {i}" for i in range(60)]
    users = [f"u{i}" for i in range(7)]
    dataset = Dataset("small", "movies", titles, [()] * 60, users, windows, [], [], {}, None, "")
    found = {}
    for name, some in ("uneven", windows), ("a rank without a window", windows[:4]):
        parts = {"valid": some[::2], "test": some[1::2]}
        evaluated = evaluate.evaluate_parts(model, prompts, dataset, parts, group.numpy(), K)
        ndcg = evaluated["test"][1]["NDCG@10"]
        audited = evaluate.audit(model, prompts, parts["test"], group.numpy(), K, ndcg)
        r = attribution.relevance(model, prompts, some)
        tensors = {"r": torch.tensor(r)}
        for part, (_, _, ranking) in evaluated.items():
            for field, values in ranking._asdict().items():
                tensors[f"{part} {field}"] = torch.tensor(values)
        metrics = {part: metrics for part, (metrics, _, _) in evaluated.items()}
        found[name] = json.dumps({**metrics, "audit": audited}), tensors
    return found


def save_evaluations(folder):
    cfg = gdrt.make_train_config(gdrt.parser().parse_args(["--device", "cpu"]))
    torch.save(evaluations(), f"{folder}/{cfg.rank}.pt")


def leaves(value):
    """The numbers and words of a JSON value, in order."""
    if isinstance(value, (dict, list)):
        inner = value.values() if isinstance(value, dict) else value
        return [leaf for child in inner for leaf in leaves(child)]
    return [value]


def test_ranks_evaluate_and_measure_relevance_as_one_process_does(tmp_path):
    assert on_ranks(2, save_evaluations, lambda rank: (tmp_path,)) == [0, 0]
    alone = evaluations()
    for rank in 0, 1:
        shared = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name, (text, tensors) in alone.items():
            told, theirs = shared[name]
            ours, others = json.loads(text), json.loads(told)
            assert leaves(others) == pytest.approx(leaves(ours), abs=1e-5), name
            for key, values in tensors.items():
                assert torch.allclose(theirs[key], values, atol=1e-5, equal_nan=True), (name, key)


# ---------------------------------------------------------------- LoRA


def adapter_step(job):
    """(gradient of the adapters, numbers that the ranks sent each other) of a GDRT step."""
    gdrt.LORA_DROPOUT = 0.0  # ranks draw different masks for different windows
    model, prompts, trees, group = world()
    gdrt.add_lora(model, 4, 0, job)
    for layer in gdrt.adapted_layers(model).values():
        torch.nn.init.constant_(layer.lora_B, 0.05)
    optimizer, sent = Watched(gdrt.trainable(model), lr=0.1), []
    all_reduce = gdrt.all_reduce

    def counted(tensor, job):
        sent.append(tensor.numel())
        all_reduce(tensor, job)

    gdrt.all_reduce = counted
    rule, state = OBJECTIVES["gdrt"], torch.zeros(K)
    gdrt.training_step(model.train(), optimizer, trees, prompts, group, rule, state, job)
    gdrt.all_reduce = all_reduce
    return optimizer.seen, sent


def save_adapter_step(folder):
    job = gdrt.make_train_config(
        gdrt.parser().parse_args(["--device", "cpu", "--precision", "fp32"])
    )
    torch.save(adapter_step(job), f"{folder}/{job.rank}.pt")


def test_ranks_add_up_the_gradients_of_the_adapters_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(gdrt, "LORA_DROPOUT", gdrt.LORA_DROPOUT)  # put back what is set above
    assert on_ranks(2, save_adapter_step, lambda rank: (tmp_path,)) == [0, 0]
    expected, _ = adapter_step(gdrt.TrainConfig())
    assert expected.norm() > 0.01
    for rank in 0, 1:
        gradient, sent = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert (gradient - expected).norm() < 1e-5 * expected.norm()
        assert sent == [2 * K, len(expected)]


# ---------------------------------------------------------------- the command


def lines_of(folder, stage):
    return json_lines(folder / stage / "metrics.jsonl")


@pytest.fixture(scope="module")
def one(steady, tmp_path_factory):
    """(flags, folder with the run `one` of one process)."""
    folder = tmp_path_factory.mktemp("ranks")
    flags = [*steady, "--loss", "sft", "gdrt", "group-dro", "--out", str(folder)]
    process = start(command, [*flags, "--name", "one"], folder / "log")
    process.join(180)
    assert process.exitcode == 0, (folder / "log").read_text()
    return flags, folder


def test_torchrun_trains_what_one_process_trains(one):
    """The whole command under the real torchrun: all ranks evaluate, rank 0 alone writes."""
    flags, folder = one
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            str(ROOT / "gdrt.py"),
            *flags,
            "--name",
            "two",
        ],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.count("popularity") == 1, "both ranks print"
    assert sorted(
        str(p.relative_to(folder / "two")) for p in (folder / "two").rglob("*")
    ) == sorted(str(p.relative_to(folder / "one")) for p in (folder / "one").rglob("*"))
    for stage in "warmup", "sft", "gdrt", "group-dro":
        stages = (lines_of(folder / name, stage) for name in ("one", "two"))
        for a, b in zip(*stages, strict=True):
            assert a["step"] == b["step"] and a["n"] == b["n"]
            for key in "loss", "nll", "group_nll", "q":
                assert a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-5), (stage, a["step"], key)
    metrics = [
        json.loads((folder / name / "gdrt" / "metrics.json").read_text())["test"]
        for name in ("one", "two")
    ]
    assert metrics[0]["NLL"] == pytest.approx(metrics[1]["NLL"], rel=1e-4)


def patient():
    job = gdrt.make_train_config(gdrt.parser().parse_args(["--device", "cpu"]))
    gdrt.barrier(job)  # rank 0 holds the store: if it left early, rank 1 could not start
    options = torch.distributed.group.WORLD._get_backend(torch.device("cpu")).options
    assert options._timeout.total_seconds() > 86400, (
        "ranks that wait for an evaluation of hours give up"
    )


def test_ranks_wait_as_long_as_an_evaluation_takes():
    assert on_ranks(2, patient, lambda rank: ()) == [0, 0]


def test_an_error_on_rank_0_does_not_hang_the_others(one):
    """Only rank 0 sees that the run exists. torchrun, which would end all ranks, is not used."""
    flags, folder = one
    codes = on_ranks(2, command, lambda rank: ([*flags, "--name", "one"], folder / f"log{rank}"))
    assert codes[0] == 2 and codes[1] != 0
    assert "holds a run: add --resume" in (folder / "log0").read_text()


def fail_on_rank_0(name):
    original = getattr(gdrt, name)

    def failing(*args, **more):
        if os.environ["RANK"] == "0":
            raise OSError(28, "No space left on device", "checkpoint.pt")
        return original(*args, **more)

    setattr(gdrt, name, failing)


@pytest.mark.parametrize("name", ["save_checkpoint", "evaluate_parts"])
def test_a_full_disk_on_rank_0_does_not_hang_the_others(steady, tmp_path, name):
    flags = [*steady, "--loss", "sft", "--out", str(tmp_path)]
    codes = on_ranks(
        2, command, lambda rank: (flags, tmp_path / f"log{rank}", fail_on_rank_0, name)
    )
    assert codes[0] == 2 and codes[1] != 0
    said = (tmp_path / "log0").read_text().splitlines()[-1]
    assert said.startswith("gdrt.py: checkpoint.pt: No space left on device;")


def press_on_rank_1(number):
    original = gdrt.training_step
    calls = []

    def pressed(*args, **more):
        calls.append(1)
        if len(calls) == number and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)  # which torchrun sends on Ctrl-C
        return original(*args, **more)

    gdrt.training_step = pressed


def test_a_signal_to_one_rank_stops_all_and_they_go_on_as_if_left_alone(small, tmp_path):
    """The model has dropout, whose noise differs from rank to rank."""
    usual = "--loss gdrt --windows 60 --no-test --name"
    flags = [*small, "--out", str(tmp_path), *usual.split(), "two"]
    assert on_ranks(
        2, command, lambda rank: (flags, tmp_path / f"log{rank}", press_on_rank_1, 2)
    ) == [130, 130]
    assert torch.load(tmp_path / "two" / "warmup" / "checkpoint.pt", weights_only=True)["step"] == 2
    words = (tmp_path / "log0").read_text().splitlines()[-1]
    again = re.fullmatch(
        r"interrupted; go on with: torchrun --nproc-per-node 2 gdrt.py (.* --resume)", words
    )[1]
    assert "interrupted" not in (tmp_path / "log1").read_text()
    assert on_ranks(2, command, lambda rank: (shlex.split(again), tmp_path / f"log{rank}")) == [
        0,
        0,
    ]
    flags[-1] = "whole"
    assert on_ranks(2, command, lambda rank: (flags, tmp_path / f"log{rank}")) == [0, 0]
    losses = {}
    for name in "two", "whole":
        lines = lines_of(tmp_path / name, "warmup") + lines_of(tmp_path / name, "gdrt")
        assert [line["step"] for line in lines] == list(range(len(lines))) and len(lines) > 6
        losses[name] = [(line["loss"], line["grad_norm"]) for line in lines]
    assert losses["two"] == losses["whole"]
