"""LoRA against W + alpha/r B A written out, against the merged model, and against peft itself."""

import copy
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import contents, random_prompts, random_windows, separate_nll, small_model
from safetensors.torch import load_file
from torch.func import functional_call
from transformers import AutoConfig, AutoModelForCausalLM

import attribution
import evaluate
import gdrt
from attribution import forward_mode, log_probs_of, relevance, segment_gradient
from data import (
    TEMPLATE,
    TITLE,
    USER,
    InputError,
    Window,
    build_trees,
    collate,
    load_dataset,
    load_model,
    target_logits,
    tiny_tokenizer,
)
from evaluate import rank

RANK = 3
CFG = gdrt.TrainConfig()
KINDS = [("llama", False), ("llama", True), ("gpt2", True)]


def adapted(kind="llama", tied=False, B=0.1, **more):
    """A random model with adapters. Their B are random, of size `B`; training starts from 0."""
    model = small_model(kind, tied=tied, **more)
    gdrt.add_lora(model, RANK, 0, CFG)
    generator = torch.Generator().manual_seed(7)
    for layer in gdrt.adapted_layers(model).values():
        layer.lora_B.data = B * torch.randn(layer.lora_B.shape, generator=generator)
    return model.eval()


def merged(model, kind="llama", tied=False):
    """A plain model with the merged weights."""
    plain = small_model(kind, tied=tied, seed=99)
    plain.load_state_dict(gdrt.merged_weights(model))
    return plain


def logits_of(model):
    ids = torch.randint(0, 40, (3, 11), generator=torch.Generator().manual_seed(1))
    return model(ids, use_cache=False).logits


def written_out(weights, kind):
    """{name: W + 2 B A} of a state_dict with adapters, by a plain model's names; alpha is 2 r."""
    plain = {name: w for name, w in weights.items() if "lora" not in name}
    for name in [name for name in weights if name.endswith("lora_A")]:
        change = 2 * weights[name.replace("lora_A", "lora_B")] @ weights[name]
        target = name.replace("lora_A", "weight")
        plain[target] = plain[target] + (change.T if kind == "gpt2" else change)
    return plain


# ------------------------------------------------ the model


@pytest.mark.parametrize("kind, tied", KINDS)
def test_at_the_start_the_model_is_as_it_was(kind, tied):
    model = adapted(kind, tied, B=0)
    assert torch.equal(logits_of(model), logits_of(small_model(kind, tied=tied)))
    assert logits_of(adapted(kind, tied)).sub(logits_of(model)).abs().max() > 0.1


def test_only_the_adapters_are_trained_and_the_seed_draws_them():
    model = adapted()
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    layers = [f"model.layers.{i}.self_attn.{q}_proj" for i in range(2) for q in "qv"]
    assert names == [f"{layer}.lora_{part}" for layer in layers for part in "AB"]
    shapes = {name: tuple(model.get_parameter(name).shape) for name in names[2:4]}
    assert list(shapes.values()) == [(RANK, 32), (16, RANK)]  # v_proj: 32 to two heads of 8
    a = [layer.lora_A for layer in gdrt.adapted_layers(model).values()]
    assert all(x.detach().abs().max() <= 32**-0.5 for x in a)
    assert all(torch.equal(*pair) for pair in zip(a, first_matrices(seed=0)))
    assert not any(torch.equal(*pair) for pair in zip(a, first_matrices(seed=1)))


def first_matrices(seed):
    model = small_model()
    gdrt.add_lora(model, RANK, seed, CFG)
    return [layer.lora_A for layer in gdrt.adapted_layers(model).values()]


@pytest.mark.parametrize("kind, tied", KINDS)
def test_logits_are_those_of_the_weights_written_out_and_of_the_merged_model(kind, tied):
    model = adapted(kind, tied)
    plain = small_model(kind, tied=tied)
    expected = logits_of(model)
    explicit = written_out(model.state_dict(), kind)
    ids = torch.randint(0, 40, (3, 11), generator=torch.Generator().manual_seed(1))
    found = functional_call(plain, explicit, (ids,), {"use_cache": False}, tie_weights=False).logits
    assert torch.allclose(found, expected, atol=1e-4)
    assert torch.allclose(logits_of(merged(model, kind, tied)), expected, atol=1e-4)
    assert torch.equal(logits_of(model), expected), "merging leaves the adapted model as it was"


OTHERS = {
    "gpt_neox": ("query_key_value", {"num_key_value_heads": 4}),
    "mpt": ("Wqkv", {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64}),
    "phi3": ("qkv_proj", {"num_key_value_heads": 2, "pad_token_id": 0}),
    "gpt2": ("c_attn", {"n_embd": 32, "n_layer": 2, "n_head": 4}),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_names_are_adapted_and_said(kind, capsys):
    """Fused projections: a Linear, or GPT-2's layer with its weight the other way round."""
    name, shape = OTHERS[kind]
    shape = shape | {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 64}
    if kind != "mpt":
        shape |= {"num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, bos_token_id=0, eos_token_id=1, **shape)
    model = AutoModelForCausalLM.from_config(config).eval()
    before = logits_of(model)
    gdrt.add_lora(model, RANK, 0, CFG)
    (said,) = capsys.readouterr().err.splitlines()
    assert said == f"--lora: no q_proj and v_proj in this model, so {name} is adapted"
    assert {layer.rpartition(".")[2] for layer in gdrt.adapted_layers(model)} == {name}
    assert torch.equal(logits_of(model), before)
    for layer in gdrt.adapted_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.3)
    expected = logits_of(model)
    assert (expected - before).abs().max() > 1e-3
    plain = AutoModelForCausalLM.from_config(config).eval()
    plain.load_state_dict(gdrt.merged_weights(model))
    assert torch.allclose(logits_of(plain), expected, atol=1e-5)


def test_a_model_without_attention_is_refused(small, tmp_path, fails):
    tokenizer = tiny_tokenizer(load_dataset(small[1]))
    small_model("mamba", len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    flags = [*small, "--model", tmp_path / "model", "--out", tmp_path, "--name", "run"]
    sentence = fails([*flags, "--lora", 8])
    assert "--lora 8: the model has none of q_proj, v_proj, " in sentence
    assert not (tmp_path / "run").exists()


def test_a_rank_that_no_matrix_has_is_refused():
    with pytest.raises(InputError, match="--lora 17: the smallest matrix to adapt has 16 rows"):
        gdrt.add_lora(small_model(), 17, 0, CFG)


# ------------------------------------------------ training


@pytest.fixture
def world():
    """(adapted model, prompts, windows, trees, group (items, L))."""
    prompts, windows = random_prompts(2), random_windows(12, 4, users=4)
    generator = torch.Generator().manual_seed(0)
    group = torch.randint(0, 3, prompts.trie.path.shape, generator=generator)
    return adapted(), prompts, windows, build_trees(prompts, windows), group


def one_step(model, prompts, trees, group, cfg=CFG):
    """({name: clipped gradient}, line) of one GDRT step, whose optimizer only records."""
    seen = {}

    class Watching(torch.optim.SGD):
        def step(self):
            for name, p in model.named_parameters():
                if p.grad is not None:
                    seen[name] = p.grad.clone()

    rule = gdrt.gdrt_rule(0.7, "uniform")
    optimizer = Watching(gdrt.trainable(model), lr=0.1)
    state = torch.zeros(3)
    return seen, gdrt.training_step(model, optimizer, trees, prompts, group, rule, state, cfg)[1]


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("packed", [True, False])
def test_the_gradient_is_that_of_the_weights_written_out(world, accumulate, packed):
    """GDRT's own step, packed or not, against autograd through W + 2 B A on separate prompts."""
    model, prompts, windows, _, group = world
    trees = build_trees(prompts, windows, packed)
    seen, line = one_step(model, prompts, trees, group, CFG._replace(accumulate=accumulate))
    leaves = {}
    for name, weight in model.state_dict().items():
        leaves[name] = weight.clone().requires_grad_("lora" in name)
    plain = small_model()

    def explicit(ids, **more):
        return functional_call(plain, written_out(leaves, "llama"), (ids,), more)

    nll = torch.cat([separate_nll(explicit, prompts, w) for w in windows])
    own = []
    for w in windows:
        target = w.items[w.stop]
        own.append(group[target, : len(prompts.titles[target]) + 1])
    loss, q, _ = gdrt.gdrt_loss(nll, torch.cat(own), 3, 0.7)
    loss.backward()
    expected = {name: leaf.grad for name, leaf in leaves.items() if "lora" in name}
    assert seen.keys() == expected.keys()
    norm = torch.cat([x.flatten() for x in expected.values()]).norm()
    assert line["q"] == pytest.approx(q.tolist(), rel=1e-4)
    assert line["grad_norm"] == pytest.approx(float(norm), rel=1e-4)
    for name, gradient in seen.items():
        clipped = expected[name] * min(1, gdrt.CLIP / norm)
        assert (gradient - clipped).norm() < 1e-4 * clipped.norm(), name


def test_dropout_is_of_training_alone_and_the_second_pass_repeats_it(world, monkeypatch):
    model, prompts, _, trees, group = world
    batch = collate(trees)
    with torch.no_grad():
        assert torch.equal(target_logits(model, batch), target_logits(model, batch))
        model.train()
        assert not torch.equal(target_logits(model, batch), target_logits(model, batch))
    nlls = []
    token_nll = gdrt.token_nll

    def watched(*args):
        nlls.append(token_nll(*args))
        return nlls[-1]

    monkeypatch.setattr(gdrt, "token_nll", watched)
    one_step(model, prompts, trees, group, CFG._replace(accumulate=2))
    first, second, *again = nlls
    assert len(again) == 2
    assert torch.equal(first, again[0]) and torch.equal(second, again[1])
    monkeypatch.setattr(gdrt, "LORA_DROPOUT", 0.0)
    with torch.no_grad():
        assert torch.equal(target_logits(model, batch), target_logits(model, batch))


def train_a_little(model, prompts, trees, cfg=CFG, folder=None):
    batches = [[0, 1], [2, 3], [1, 2]]
    one_group = torch.zeros(prompts.trie.path.shape, dtype=torch.long)
    torch.manual_seed(0)
    span = 0, len(batches)
    gdrt.train(model, prompts, trees, batches, span, one_group, gdrt.sft_rule, 1, cfg, folder)


def test_training_moves_the_adapter_and_nothing_else(world, tmp_path):
    model, prompts, _, trees, _ = world
    before = copy.deepcopy(model.state_dict())
    train_a_little(model, prompts, trees, folder=tmp_path)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name]) == ("lora" not in name), name
    kept = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert kept["model"].keys() == {name for name in before if "lora" in name}
    assert len(kept["optimizer"]["param_groups"][0]["params"]) == len(kept["model"]) == 8
    gdrt.load_trained(model, {name: before[name] for name in kept["model"]})
    assert torch.equal(logits_of(model.eval()), logits_of(adapted()))
    with pytest.raises(RuntimeError):  # the checkpoint of another model
        gdrt.load_trained(model, {name: before[name] for name in list(kept["model"])[1:]})


@pytest.mark.parametrize("kind, tied", KINDS)
def test_frozen_weights_in_bf16_train_the_same_to_the_bit(world, kind, tied):
    """In training they take two bytes each and the adapter's four; outside it all are fp32."""
    _, prompts, _, trees, _ = world
    bf16 = CFG._replace(precision="bf16")
    models = {}
    for frozen in "fp32", "bf16":
        model = small_model(kind, tied=tied)
        for p in model.parameters():
            if p.dim() > 1:
                p.data = p.data.bfloat16().float()
        cfg = bf16._replace(frozen=frozen)
        gdrt.add_lora(model, RANK, 0, cfg)
        bytes_seen = set()
        model.get_output_embeddings().register_forward_pre_hook(
            lambda head, args, model=model: bytes_seen.add(frozen_bytes(model))
        )
        train_a_little(model, prompts, trees, cfg)
        models[frozen] = model
        whole = sum(p.numel() for p in model.parameters() if not p.requires_grad and p.dim() > 1)
        assert bytes_seen == {whole * (2 if frozen == "bf16" else 4)}
        assert {p.dtype for p in model.parameters()} == {torch.float32}
    ours, theirs = (models[frozen].state_dict() for frozen in ("bf16", "fp32"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def frozen_bytes(model):
    """Bytes of the matrices that are not trained; the trained ones are fp32."""
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    frozen = [p for p in model.parameters() if not p.requires_grad and p.dim() > 1]
    return sum(p.numel() * p.element_size() for p in frozen)


@pytest.mark.parametrize(
    "flags, frozen",
    [("", "fp32"), ("--precision fp32", "fp32"), ("--precision bf16", "bf16")],
)
def test_on_a_cpu_bf16_is_kept_where_it_is_asked_for(flags, frozen):
    args = gdrt.parser().parse_args(["--device", "cpu", "--lora", "4", *flags.split()])
    assert gdrt.make_train_config(args).frozen == frozen


# ------------------------------------------------ relevance and search


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("name", ["auxiliary", "user"])
def test_forward_mode_through_adapters_equals_a_backward_per_target_token(kind, name):
    """The derivative of every target token's log p along the path, at one point of it."""
    model, prompts = adapted(kind), random_prompts(2)
    batch = collate(build_trees(prompts, random_windows(12, 4, users=2)))
    segment = {"auxiliary": (TEMPLATE, TITLE), "user": (USER,)}[name]
    with forward_mode(model):
        found = segment_gradient(model, batch, segment, points=1)
        E, delta = attribution.path_ends(model, batch, segment)
        with torch.enable_grad():
            s = torch.tensor(0.5, requires_grad=True)
            logits = target_logits(model, batch, E - (1 - s) * delta)
            log_p = logits.log_softmax(-1).gather(-1, batch.label[:, None])[:, 0]
            expected = [torch.autograd.grad(x, s, retain_graph=True)[0] for x in log_p]
    assert found.abs().max() > 0.1
    assert torch.allclose(found, torch.stack(expected), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", ["gradient", "ablation", "probability"])
@pytest.mark.parametrize("kind, tied", KINDS)
def test_relevance_is_that_of_the_merged_model(kind, tied, method):
    model, prompts = adapted(kind, tied).train(), random_prompts(2)
    windows = random_windows(12, 4, users=4)
    ours = relevance(model, prompts, windows, method)
    theirs = relevance(merged(model, kind, tied), prompts, windows, method)
    assert np.nanstd(ours) > 0.05
    assert np.allclose(ours, theirs, atol=1e-3, equal_nan=True)


def test_ranking_and_likelihood_are_those_of_the_merged_model():
    model, prompts, windows = adapted(), random_prompts(4, 30), random_windows(30, 0)
    ours, theirs = (rank(m, prompts, windows, 10) for m in (model, merged(model)))
    assert np.array_equal(ours.items, theirs.items)
    assert ours.scores == pytest.approx(theirs.scores, abs=1e-4)
    trees = build_trees(prompts, [Window(0, (i,), 0, 0) for i in range(30)])
    likelihoods = [log_probs_of(m, prompts, trees)[0] for m in (model, merged(model))]
    assert likelihoods[0] == pytest.approx(likelihoods[1], abs=1e-4)


# ------------------------------------------------ the command


@pytest.fixture(scope="module")
def run(small, tmp_path_factory):
    """(flags, folder) of a run of the small data with adapters."""
    out = tmp_path_factory.mktemp("lora")
    flags = [*small, "--lora", "4", "--lr", "0.02", "--out", str(out)]
    gdrt.main([*flags, "--name", "run"])
    return flags, out / "run"


def base_model(flags):
    """Folder of the model that the run started from."""
    return Path(flags[flags.index("--model") + 1])


def test_the_folder_model_is_merged_and_plain_and_the_adapter_lies_beside(run):
    flags, folder = run
    base = load_file(base_model(flags) / "model.safetensors")
    whole = load_file(folder / "gdrt" / "model" / "model.safetensors")
    adapter = load_file(folder / "gdrt" / "adapter" / "adapter_model.safetensors")
    name = "base_model.model.model.layers.0.self_attn.{}_proj.lora_{}.weight"
    assert set(adapter) == {name.format(q, part) for q in "qv" for part in "AB"}
    assert whole.keys() == base.keys()
    for key, weight in whole.items():
        q = key.split(".")[-2][0]
        if key.endswith(("q_proj.weight", "v_proj.weight")):
            change = 2 * adapter[name.format(q, "B")] @ adapter[name.format(q, "A")]
            assert change.abs().max() > 1e-3
            assert torch.allclose(weight, base[key] + change, atol=1e-6)
        else:
            assert torch.equal(weight, base[key]), key
    checkpoint = torch.load(folder / "gdrt" / "checkpoint.pt", weights_only=True)
    assert len(checkpoint["model"]) == 4


def test_the_losses_share_the_warm_up_and_differ_after_it(run):
    _, folder = run
    states = {}
    for stage in "warmup", "sft", "gdrt":
        kept = torch.load(folder / stage / "checkpoint.pt", weights_only=True)
        states[stage] = torch.cat([w.flatten() for w in kept["model"].values()])
        lines = (folder / stage / "metrics.jsonl").read_text().splitlines()
        states[stage, "steps"] = [json.loads(line)["step"] for line in lines]
    assert states["warmup", "steps"][0] == 0
    assert states["sft", "steps"] == states["gdrt", "steps"]
    assert states["sft", "steps"][0] == states["warmup", "steps"][-1] + 1
    for pair in ("warmup", "sft"), ("warmup", "gdrt"), ("sft", "gdrt"):
        assert (states[pair[0]] - states[pair[1]]).abs().max() > 1e-3, pair


def test_before_fine_tuning_the_metrics_are_those_of_the_model_itself(run, small):
    flags, folder = run
    gdrt.main([*flags, "--lora", "0", "--loss", "sft", "--name", "all weights"])
    others = folder.parent / "all weights"
    found = []
    for made in folder, others:
        metrics = json.loads((made / "before" / "evaluation.json").read_text())["test"]
        found.append({name: x for name, x in metrics.items() if "group" not in name})
    assert found[0] == found[1] and "NLL" in found[0], "their groups alone may differ"
    assert not (others / "sft" / "adapter").exists()


def test_evaluate_and_attribution_read_the_run(run, tmp_path, capsys):
    _, folder = run
    evaluate.main([str(folder)])
    assert capsys.readouterr().out.count("metrics equal those that training wrote") == 2
    attribution.main([str(folder / "gdrt"), "--html", str(tmp_path / "a.html")])
    assert (tmp_path / "a.html").exists()


@pytest.mark.parametrize("stage, updates", [("warm-up", 2), ("loss", 12)])
def test_an_interrupted_run_ends_like_one_that_was_left_alone(
    run, tmp_path, monkeypatch, stage, updates
):
    """The run has dropout in its attention and adapters, so it depends on the random state."""
    flags, folder = run
    flags = [*flags, "--out", str(tmp_path), "--name", "run"]
    step, calls = gdrt.training_step, []

    def falling(*args):
        calls.append(1)
        if len(calls) > updates:
            raise ZeroDivisionError
        return step(*args)

    monkeypatch.setattr(gdrt, "training_step", falling)
    with pytest.raises(ZeroDivisionError):
        gdrt.main(flags)
    assert (tmp_path / "run" / "groups.json").exists() == (stage == "loss")
    monkeypatch.setattr(gdrt, "training_step", step)
    gdrt.main([*flags, "--resume"])
    found, expected = contents(tmp_path / "run"), contents(folder)
    assert list(found) == list(expected)
    assert [path for path in expected if found[path] != expected[path]] == []


def test_a_run_in_bf16_resumes_and_is_evaluated_alike(run, tmp_path, monkeypatch, capsys):
    flags, _ = run
    flags = [*flags, "--precision", "bf16", "--loss", "gdrt", "--no-test", "--out", str(tmp_path)]
    gdrt.main([*flags, "--name", "whole"])
    evaluate.main([str(tmp_path / "whole")])
    assert "metrics equal those that training wrote" in capsys.readouterr().out
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(gdrt, "relevance", lambda *args, **more: 1 / 0)
        gdrt.main([*flags, "--name", "run"])
    gdrt.main([*flags, "--name", "run", "--resume"])
    found, expected = contents(tmp_path / "run"), contents(tmp_path / "whole")
    assert [path for path in expected if found[path] != expected[path]] == []


def test_another_rank_on_resume_is_refused(run, fails):
    flags, folder = run
    sentence = fails([*flags, "--name", "run", "--resume", "--lora", 5])
    assert "--resume: --lora is 5 now and was 4" in sentence


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_peft_reads_the_adapter(kind, small, tmp_path, capsys):
    """The base model with the adapter, as peft loads it, has the logits of the folder model/."""
    if importlib.util.find_spec("peft") is None:
        pytest.skip("peft is not installed: pip install peft")
    from peft import PeftModel

    tokenizer = tiny_tokenizer(load_dataset(small[1]))
    small_model(kind, len(tokenizer)).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    flags = [*small, "--model", str(tmp_path / "base"), "--lora", "4", "--lr", "0.02"]
    flags += ["--out", str(tmp_path), "--name", "run", "--loss", "gdrt", "--no-test"]
    gdrt.main([*flags, "--relevance", "probability", "--windows", "24"])
    base, _ = load_model(tmp_path / "base")
    own = logits_of(base)
    with_peft = PeftModel.from_pretrained(base, tmp_path / "run" / "gdrt" / "adapter").eval()
    ours, _ = load_model(tmp_path / "run" / "gdrt" / "model")
    assert torch.allclose(logits_of(with_peft), logits_of(ours.eval()), atol=1e-4)
    assert (logits_of(with_peft) - own).abs().max() > 0.01
    loaded = with_peft.peft_config["default"]
    assert (loaded.r, loaded.lora_alpha, loaded.lora_dropout) == (4, 8, 0.05)
    assert loaded.base_model_name_or_path == str(tmp_path / "base")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_run_with_adapters_on_the_gpu(run, tmp_path, monkeypatch):
    """--precision auto on CUDA is bf16, frozen weights too; the first loss is nearly the CPU's."""
    flags, folder = run
    flags = [*flags, "--lora", "8", "--out", str(tmp_path), "--precision", "auto"]
    dtypes = set()
    token_nll = gdrt.token_nll

    def watched(model, *args):
        dtypes.update((p.requires_grad, p.dtype) for p in model.parameters() if p.dim() > 1)
        return token_nll(model, *args)

    monkeypatch.setattr(gdrt, "token_nll", watched)
    gdrt.main([*flags, "--name", "gpu", "--device", "cuda", "--relevance", "gradient"])
    assert dtypes == {(True, torch.float32), (False, torch.bfloat16)}
    gdrt.main([*flags, "--name", "cpu", "--precision", "fp32", "--loss", "sft", "--no-test"])
    curves = []
    for name in "gpu", "cpu":
        lines = (tmp_path / name / "warmup" / "metrics.jsonl").read_text().splitlines()
        curves.append([json.loads(line)["nll"] for line in lines])
    assert curves[0][0] == pytest.approx(curves[1][0], rel=0.05)
    assert all(np.isfinite(curves[0]))
    evaluate.main([str(tmp_path / "gpu")])


def test_adapters_are_drawn_as_peft_draws_them():
    """A evenly between plus and minus one over the root of its inputs, which are 32 here."""
    model = small_model()
    gdrt.add_lora(model, 8, 0, CFG)
    for layer in gdrt.adapted_layers(model).values():
        A = layer.lora_A.detach() * 32**0.5  # 256 draws
        assert 0.97 < A.abs().max() <= 1
        assert float(A.std()) == pytest.approx(3**-0.5, rel=0.1)


def test_one_in_twenty_of_an_adapters_inputs_is_dropped():
    layer = torch.nn.Linear(1000, 1000, bias=False)
    layer.lora_A = torch.nn.Parameter(torch.eye(1000))
    layer.lora_B = torch.nn.Parameter(torch.eye(1000))
    torch.manual_seed(0)
    with torch.no_grad():
        change = gdrt.add_low_rank_term(layer.train(), [torch.ones(1, 1000)], torch.zeros(1, 1000))
    assert 0.03 < (change == 0).float().mean() < 0.07
    assert change.max().item() == pytest.approx(2 / 0.95)
