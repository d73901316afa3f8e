"""The loop against autograd through the losses, and against a plain loop over separate prompts."""

import inspect
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import (
    continuations,
    in_order,
    random_prompts,
    random_windows,
    separate_logits,
    separate_nll,
    small_model,
)

import attribution
import gdrt
from data import (
    build_trees,
    by_shared_prefix,
    collate,
    load_dataset,
    target_logits,
    tiny_tokenizer,
)


def step(model, trees, prompts, group, objective, log_q, job=gdrt.TrainConfig()):
    """gdrt.training_step without a change of weights -> (gradients, log_q, diagnostics)."""
    kept = []
    optimizer = SimpleNamespace(
        step=lambda: kept.extend(p.grad.clone() for p in model.parameters()),
        zero_grad=lambda set_to_none: model.zero_grad(),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gdrt, "CLIP", math.inf)  # so the gradient is not clipped
        log_q, line = gdrt.training_step(
            model, optimizer, trees, prompts, group, objective, log_q, job
        )
    return kept, log_q, line


def furthest(ours, theirs):
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs))


def close(ours, theirs):
    return furthest(ours, theirs) < 1e-5 * (1 + max(float(x.abs().max()) for x in theirs))


@pytest.fixture
def world():
    """(model, prompts, windows, group (items, L), the windows' groups (N,)).

    Group 3 is given to no token.
    """
    prompts = random_prompts(2)
    windows = random_windows(12, 4, users=4)
    group = torch.randint(0, 3, prompts.trie.path.shape, generator=torch.Generator().manual_seed(0))
    own = []
    for window in windows:
        target = window.items[window.stop]
        own.append(group[target, : len(prompts.titles[target]) + 1])
    return small_model(), prompts, windows, group, torch.cat(own)


def all_nll(model, prompts, windows):
    return torch.cat([separate_nll(model, prompts, window) for window in windows])


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("tau, prior", [(1.0, "uniform"), (0.3, "share"), (math.inf, "uniform")])
def test_an_update_equals_autograd_through_the_loss(world, tau, prior, accumulate):
    model, prompts, windows, group, own = world
    trees = build_trees(prompts, windows)
    cfg = gdrt.TrainConfig(accumulate=accumulate)
    rule = gdrt.gdrt_rule(tau, prior)
    gradient, _, line = step(model, trees, prompts, group, rule, torch.zeros(4), cfg)
    nll = all_nll(model, prompts, windows)
    loss, q, means = gdrt.gdrt_loss(nll, own, 4, tau, prior)
    assert close(gradient, torch.autograd.grad(loss, list(model.parameters())))
    assert line["q"] == pytest.approx(q.tolist(), abs=1e-5)
    assert line["group_nll"] == pytest.approx(means.tolist(), abs=1e-5)
    assert line["loss"] == pytest.approx(float((q * means).sum()), abs=1e-5)
    assert line["nll"] == pytest.approx(float(nll.mean().detach()), abs=1e-5)
    assert line["n"] == [int((own == g).sum()) for g in range(4)]
    norm = math.sqrt(sum(float((x**2).sum()) for x in gradient))
    assert line["grad_norm"] == pytest.approx(norm, rel=1e-4)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_sft_is_the_plain_mean(world, accumulate):
    model, prompts, windows, group, own = world
    trees = build_trees(prompts, windows)
    cfg = gdrt.TrainConfig(accumulate=accumulate)
    gradient, _, line = step(model, trees, prompts, group, gdrt.sft_rule, torch.zeros(4), cfg)
    loss = all_nll(model, prompts, windows).mean()
    assert close(gradient, torch.autograd.grad(loss, list(model.parameters())))
    assert line["loss"] == pytest.approx(loss.item(), abs=1e-5)
    assert line["nll"] == pytest.approx(loss.item(), abs=1e-5)
    assert line["q"] == pytest.approx([float((own == g).float().mean()) for g in range(4)])


@pytest.mark.parametrize("accumulate", [1, 4])
def test_group_dro_moves_q_once_an_update(world, accumulate):
    model, prompts, windows, group, own = world
    trees = build_trees(prompts, windows)
    cfg = gdrt.TrainConfig(accumulate=accumulate)
    eta = 0.5
    q = [0.25] * 4
    log_q = torch.full((4,), -math.log(4))
    for _ in range(2):
        rule = gdrt.group_dro_rule(eta)
        gradient, log_q, line = step(model, trees, prompts, group, rule, log_q, cfg)
        nll = all_nll(model, prompts, windows)
        means = [nll[own == g].mean() if (own == g).any() else torch.tensor(0.0) for g in range(4)]
        q = [weight * math.exp(eta * float(mean.detach())) for weight, mean in zip(q, means)]
        q = [weight / sum(q) for weight in q]
        assert log_q.exp().tolist() == pytest.approx(q, abs=1e-5)
        assert line["q"] == pytest.approx(q, abs=1e-5)
        loss = sum(weight * mean for weight, mean in zip(q, means))
        assert line["loss"] == pytest.approx(float(loss.detach()), abs=1e-5)
        assert close(gradient, torch.autograd.grad(loss, list(model.parameters())))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_accumulation_replays_dropout(world, kind):
    """The pass that finds the group means and the pass with gradient drop the same values.

    Hence the update is that of one pass over the parts with the same seed.
    """
    _, prompts, windows, group, own = world
    model = small_model(kind, dropout=0.1).train()
    trees = build_trees(prompts, windows)
    objective = gdrt.gdrt_rule(0.5, "uniform")
    job = gdrt.TrainConfig(accumulate=4)
    assert len(trees) == 4
    torch.manual_seed(7)
    gradient, _, line = step(model, trees, prompts, group, objective, torch.zeros(4), job)
    after = torch.rand(1)

    torch.manual_seed(7)
    nlls = []
    groups = []
    for tree in trees:
        part = collate([tree])
        log_p = target_logits(model, part).log_softmax(-1)  # (N, V)
        nlls.append(-log_p[torch.arange(len(part.label)), part.label])
        groups.append(group[part.item, part.place])
    loss, q, _ = gdrt.gdrt_loss(torch.cat(nlls), torch.cat(groups), 4, 0.5)
    assert close(gradient, torch.autograd.grad(loss, list(model.parameters()), allow_unused=True))
    assert line["q"] == pytest.approx(q.tolist(), abs=1e-5)
    assert torch.equal(torch.rand(1), after)  # two passes used up the random numbers of one
    again = step(model, trees, prompts, group, objective, torch.zeros(4), job)[0]
    assert furthest(again, gradient) > 1e-4  # dropout does have an effect


def test_one_batch_equals_four_micro_batches(world):
    model, prompts, windows, group, _ = world
    trees = build_trees(prompts, windows)
    rule = gdrt.gdrt_rule(0.5, "uniform")
    results = []
    for accumulate in (1, 2, 4, 9):
        cfg = gdrt.TrainConfig(accumulate=accumulate)
        results.append(step(model, trees, prompts, group, rule, torch.zeros(4), cfg))
    whole, _, first = results[0]
    for gradient, _, line in results[1:]:
        assert close(gradient, whole)
        assert line["loss"] == pytest.approx(first["loss"], abs=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.4])
def test_trie_softmax_is_over_the_legal_tokens(temperature):
    """log-softmax of z / temperature over what can follow in some title.

    Token by token on the separate prompts.
    """
    model = small_model()
    prompts = random_prompts(5, 12, letters=4)
    windows = random_windows(12, 2)
    legal = continuations(prompts)
    expected = []
    for window in windows:
        tokens = prompts.titles[window.items[window.stop]] + [prompts.eos]
        for j, z in enumerate(separate_logits(model, prompts, window) / temperature):
            choices = legal[tuple(tokens[:j])]
            expected.append(-torch.log_softmax(z[choices], 0)[choices.index(tokens[j])])
    batch = collate(build_trees(prompts, windows))
    cfg = gdrt.TrainConfig(softmax="trie", temperature=temperature)
    nll = gdrt.token_nll(model, batch, prompts, cfg)
    expected = torch.stack(expected)
    assert (in_order(batch, nll) - expected).abs().max() < 1e-5
    weights = list(model.parameters())
    gradient = torch.autograd.grad(nll.mean(), weights)
    assert close(gradient, torch.autograd.grad(expected.mean(), weights))
    full = gdrt.token_nll(model, batch, prompts, gdrt.TrainConfig())
    assert (in_order(batch, full) - all_nll(model, prompts, windows)).abs().max() < 1e-5


# ---------------------------------------------------------------- learning rate and batches


def test_learning_rate():
    """The lower of two lines: up to the peak over a twentieth, and from the peak down to 0."""
    rates = [gdrt.learning_rate(step, 200, 3.0) for step in range(200)]
    assert rates[:9] == pytest.approx([0.3 * (step + 1) for step in range(9)])
    assert max(rates) <= 3 and rates.index(max(rates)) == 9
    assert rates[10:] == pytest.approx([3 * (200 - step) / 200 for step in range(10, 200)])
    assert 0 < rates[-1] < 0.02
    assert gdrt.learning_rate(200, 200, 3.0) == 0
    for steps in (1, 2, 19):  # too few for a warm-up
        assert gdrt.learning_rate(0, steps, 3.0) == 3


def fake_trees(seed, n=300):
    """What make_batches reads of a tree: n of them, of 20 to 399 tokens and 1 to 10 windows."""
    random = np.random.default_rng(seed)
    trees = []
    for _ in range(n):
        ids = [0] * int(random.integers(20, 400))
        window = np.repeat(np.arange(random.integers(1, 11)), 4)
        trees.append(SimpleNamespace(ids=ids, window=window))
    return trees


@pytest.mark.parametrize("batch", [1, 32, 10_000])
def test_plan_visits_every_tree_once_an_epoch(batch):
    trees = fake_trees(0)
    updates = gdrt.make_batches(trees, batch, 3, 0)
    windows = np.array([len(set(tree.window)) for tree in trees])
    visited = [i for update in updates for i in update]
    epochs = [visited[:300], visited[300:600], visited[600:]]
    assert all(sorted(epoch) == list(range(300)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    sizes = [windows[update].sum() for update in updates]
    assert min(sizes) > 0 and max(sizes) < batch + 10
    chunks = 3 * (windows.sum() // (20 * batch) + 2)
    assert sum(size < batch for size in sizes) <= chunks  # only the last of a chunk may be smaller
    assert updates == gdrt.make_batches(trees, batch, 3, 0)
    assert updates != gdrt.make_batches(trees, batch, 3, 1)


def test_plan_wastes_little_padding():
    trees = fake_trees(1, 2000)
    updates = gdrt.make_batches(trees, 100, 1, 0)
    length = np.array([len(tree.ids) for tree in trees])
    padded = sum(len(update) * length[update].max() for update in updates)
    assert padded < 1.15 * length.sum()
    # Yet short and long batches come in random order.
    means = [length[update].mean() for update in updates]
    assert abs(np.corrcoef(means[1:], means[:-1])[0, 1]) < 0.4


def test_draw_windows_takes_whole_trees_up_to_a_limit():
    windows = load_dataset("toy").train
    assert gdrt.draw_windows(windows, None, 0) == gdrt.draw_windows(windows, 10**6, 0) == windows
    drawn = gdrt.draw_windows(windows, 500, 0)
    assert len(drawn) == 500
    assert drawn == gdrt.draw_windows(windows, 500, 0) != gdrt.draw_windows(windows, 500, 1)
    place = {(w.user, w.stop): i for i, w in enumerate(windows)}
    places = [place[w.user, w.stop] for w in drawn]
    assert places == sorted(set(places))
    whole = {tuple(group) for group in by_shared_prefix(windows)}
    cut = 0
    for group in by_shared_prefix(drawn):
        cut += tuple(places[i] for i in group) not in whole
    assert cut <= 1  # the last tree fills up what is left


# ---------------------------------------------------------------- whole runs, evaluation left out


@pytest.fixture
def launch(tmp_path, monkeypatch):
    """launch(*flags) -> {loss: lines of metrics.jsonl} of a run of a small model on toy.

    `launch.seen` has its batches.
    """
    tokenizer = tiny_tokenizer(load_dataset("toy"))
    seen = []
    real = gdrt.training_step

    def update(model, optimizer, trees, *rest):
        seen.append(sorted((tuple(tree.ids), tuple(tree.window)) for tree in trees))
        return real(model, optimizer, trees, *rest)

    def start_model(*_):
        return small_model(vocabulary=len(tokenizer), scale=0.05), tokenizer

    monkeypatch.setattr(gdrt, "training_step", update)
    monkeypatch.setattr(gdrt, "start_model", start_model)
    monkeypatch.setattr(gdrt, "evaluate_and_audit", lambda *_: {"valid": {}, "seconds": 0})
    monkeypatch.setattr(gdrt, "evaluate_baselines", lambda *_: {"before": {}})
    monkeypatch.setattr(gdrt, "result_table", lambda *_: (("",), []))

    def launch(*flags):
        seen.clear()
        name = f"run{len(list(tmp_path.iterdir()))}"
        usual = "--dataset toy --windows 120 --batch 30 --epochs 2 --no-report"
        usual += f" --device cpu --precision fp32 --out {tmp_path} --name {name}"
        gdrt.main([*usual.split(), *flags])
        lines = {}
        for path in (tmp_path / name).glob("*/metrics.jsonl"):
            lines[path.parent.name] = list(map(json.loads, path.read_text().splitlines()))
        return lines

    launch.seen = seen
    return launch


def test_all_losses_see_the_same_batches(launch):
    lines = launch("--loss", "sft", "gdrt", "group-dro")
    assert set(lines) == {"warmup", "sft", "gdrt", "group-dro"}
    shared = len(lines["warmup"])
    own = len(lines["sft"])  # updates after the warm-up
    assert shared >= 1 and own >= 4 and len(launch.seen) == shared + 3 * own
    sft, gdrt_, dro = (launch.seen[i : i + own] for i in range(shared, shared + 3 * own, own))
    assert sft == gdrt_ == dro and len({str(batch) for batch in sft}) > 2
    for loss in ("sft", "gdrt", "group-dro"):
        assert [line["step"] for line in lines[loss]] == list(range(shared, shared + own))
        assert [line["n"] for line in lines[loss]] == [line["n"] for line in lines["sft"]]
        # One shared start.
        assert lines[loss][0]["group_nll"] == lines["sft"][0]["group_nll"]
    assert lines["sft"][-1]["group_nll"] != lines["gdrt"][-1]["group_nll"]


def test_the_noise_of_an_update_depends_on_its_number_the_seed_and_the_rank_alone():
    def noise(step, **where):
        gdrt.seed_dropout(step, gdrt.TrainConfig(**where))
        return torch.rand(4).tolist()

    first = noise(5)
    assert noise(5) == first
    assert first not in (noise(6), noise(5, seed=1), noise(5, rank=1))


@pytest.mark.slow  # test_trees.py has a small version
def test_no_pack_follows_the_same_curve(launch):
    packed = launch("--loss", "sft", "gdrt")
    windows = []
    for batch in launch.seen:
        windows.append(sum(len(set(window)) for _, window in batch))
    separate = launch("--loss", "sft", "gdrt", "--no-pack")
    # Each row is now one prompt, and a batch has as many windows as before.
    assert windows == [len(batch) for batch in launch.seen]
    for loss in ("warmup", "sft", "gdrt"):
        assert len(packed[loss]) == len(separate[loss])
        for ours, theirs in zip(packed[loss], separate[loss]):
            assert ours["n"] == theirs["n"]
            assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-4)
            assert ours["group_nll"] == pytest.approx(theirs["group_nll"], abs=1e-4)


def test_training_has_the_models_dropout():
    """The model arrives in evaluation mode, as from_pretrained leaves it."""
    prompts = random_prompts(2)
    trees = build_trees(prompts, random_windows(12, 4, users=2))
    group = torch.zeros(prompts.trie.path.shape, dtype=torch.long)
    model = small_model().eval()
    modes = []
    model.register_forward_hook(lambda layer, *_: modes.append(layer.training))
    updates = [list(range(len(trees)))], (0, 1)
    gdrt.train(model, prompts, trees, *updates, group, gdrt.sft_rule, 1, gdrt.TrainConfig())
    assert modes and all(modes)


def test_two_stages_are_one_adamw(tmp_path):
    """Written out after Loshchilov and Hutter (2019), over separate prompts.

    The second stage goes on with the moments, the count of updates and the schedule of the first.
    """
    prompts = random_prompts(2)
    windows = random_windows(12, 4, users=2)
    trees = build_trees(prompts, windows)
    group = torch.zeros(prompts.trie.path.shape, dtype=torch.long)
    model = small_model().double()
    before = [p.detach().clone() for p in model.parameters()]
    batches = [list(range(len(trees)))] * 4
    cfg = gdrt.TrainConfig(lr=0.01)
    for number, span in enumerate([(0, 2), (2, 4)]):
        folder = tmp_path / str(number)
        folder.mkdir()
        begin = tmp_path / "0" / "checkpoint.pt" if number else None
        rest = span, group, gdrt.sft_rule, 1, cfg, folder, begin
        gdrt.train(model, prompts, trees, batches, *rest)

    own = small_model().double()
    weights = [p.detach().clone() for p in own.parameters()]
    mean = [torch.zeros_like(w) for w in weights]
    square = [torch.zeros_like(w) for w in weights]
    for t, rate in enumerate([0.01, 0.0075, 0.005, 0.0025], start=1):
        loss = all_nll(own, prompts, windows).mean()
        gradient = torch.autograd.grad(loss, list(own.parameters()))
        norm = math.sqrt(sum(float((g**2).sum()) for g in gradient))
        for i, g in enumerate(gradient):
            g = g / max(1, norm)
            mean[i] = 0.9 * mean[i] + 0.1 * g
            square[i] = 0.99 * square[i] + 0.01 * g**2
            step = mean[i] / (1 - 0.9**t) / ((square[i] / (1 - 0.99**t)).sqrt() + 1e-8)
            weights[i] = weights[i] - rate * (step + 0.01 * weights[i])
        with torch.no_grad():
            for p, w in zip(own.parameters(), weights):
                p.copy_(w)
    after = torch.cat([p.detach().flatten() for p in model.parameters()])
    expected = torch.cat([w.flatten() for w in weights])
    way = expected - torch.cat([w.flatten() for w in before])
    assert (after - expected).norm() < 1e-4 * way.norm()


def setup_of(small, seed, *more):
    """(arguments, TrainConfig, Dataset, Setup) of a run with adapters, by its flags."""
    args = gdrt.parser().parse_args([*small, "--lora", "4", "--seed", str(seed), *more])
    cfg = gdrt.make_train_config(args)
    dataset = gdrt.load_dataset(args.dataset, min_rating=args.min_rating)
    return args, cfg, dataset, gdrt.prepare(args, dataset, cfg)


def test_windows_batches_and_adapters_are_drawn_by_the_runs_seed(small):
    """Each of them: with one seed fixed, runs of two seeds would differ by the others."""

    def drawn(seed, *more):
        setup = setup_of(small, seed, *more)[3]
        layer = next(iter(gdrt.adapted_layers(setup.model).values()))
        return setup.windows, setup.batches, layer.lora_A.tolist()

    first = drawn(5, "--windows", "60")
    assert first == drawn(5, "--windows", "60")
    other = drawn(6, "--windows", "60")
    assert other[0] != first[0] and other[2] != first[2]
    assert drawn(5)[1] != drawn(6)[1]  # of the same windows, all of them


def test_what_is_measured_and_the_noise_are_drawn_by_the_runs_seed(small, tmp_path, monkeypatch):
    args, cfg, dataset, setup = setup_of(small, 7)
    seeds = {"noise": cfg.seed}

    def watch(name):
        function = getattr(gdrt, name)
        place = list(inspect.signature(function).parameters).index("seed")

        def watched(*given, **more):
            seeds[name] = more["seed"] if "seed" in more else given[place]
            return function(*given, **more)

        monkeypatch.setattr(gdrt, name, watched)

    for name in "diagnose", "relevance", "audit":
        watch(name)
    groups = gdrt.form_groups(setup, args, cfg, tmp_path / "groups.json")
    gdrt.evaluate_and_audit(setup, dataset, args, cfg, groups, tmp_path / "before")
    assert seeds == {"noise": 7, "diagnose": 7, "relevance": 7, "audit": 7}


def test_relevance_is_that_of_the_model_after_the_warm_up(small, tmp_path):
    flags = "--lora 4 --lr 0.02 --relevance ablation --loss sft --no-test --name run --out"
    gdrt.main([*small, *flags.split(), str(tmp_path)])
    kept = torch.load(tmp_path / "run" / "warmup" / "checkpoint.pt", weights_only=True)
    setup = setup_of(small, 0)[3]
    read = setup.model, setup.prompts, setup.windows, "ablation"
    before = attribution.relevance(*read, seed=0)
    gdrt.load_trained(setup.model, kept["model"])
    after = attribution.relevance(*read, seed=0)
    stored = json.loads((tmp_path / "run" / "groups.json").read_text())["r"]
    assert np.array(stored, dtype=float) == pytest.approx(after, abs=1e-4, nan_ok=True)
    assert np.nanmax(np.abs(before - after)) > 1e-2
