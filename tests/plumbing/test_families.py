"""Two-layer models of many decoder-only families give the same packed as one prompt at a time.

`FAMILIES` is the list in the README. Its first three run with the fast tests, the others with
`-m slow`.
"""

import json
import pickle

import numpy as np
import pytest
import torch
from conftest import (
    continuations,
    random_prompts,
    random_windows,
    score,
    separate_logits,
    separate_nll,
)
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

import data
import gdrt
from attribution import (
    ablations,
    forward_mode,
    has_derivative,
    label_log_prob,
    log_probs_of,
    path_ends,
    plain_batch,
    segment_gradient,
    token_relevance,
)
from data import TITLE, USER, InputError, build_trees, collate, fall_back_to_unpacked, target_logits
from evaluate import rank

COMMON = {
    "vocab_size": 48,  # the tokenisers of some families add a token of their own
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
WINDOW = "as long as the longest prompt"
HEAD = {"head_dim": 8}
EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
}
SLIDING = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
GEMMA = {"query_pre_attn_scalar": 8, **HEAD}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}
DEEPSEEK = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
ALTUP = {"vocab_size_per_layer_input": 48, "hidden_size_per_layer_input": 8, "laurel_rank": 4}
ALTUP |= {"num_kv_shared_layers": 0, "altup_num_inputs": 2}
ALTUP |= {"activation_sparsity_pattern": [0.0, 0.0]}
DBRX = {
    "d_model": 32,
    "n_heads": 4,
    "n_layers": 2,
    "max_seq_len": 512,
    "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
}

# Name -> (model type of transformers, config entries on top of COMMON).
FAMILIES = {
    "Mistral": ("mistral", {"sliding_window": WINDOW, **HEAD}),
    "Mixtral": ("mixtral", EXPERTS | HEAD),
    "GPT-Neo": (
        "gpt_neo",
        {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "num_heads": 4},
    ),
    "Llama": ("llama", HEAD),
    "Llama 4": (
        "llama4_text",
        EXPERTS
        | HEAD
        | {"intermediate_size_mlp": 64, "attention_chunk_size": WINDOW, "no_rope_layers": [1, 0]},
    ),
    "Qwen2": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    ),
    "Qwen3": ("qwen3", HEAD),
    "Qwen3-MoE": ("qwen3_moe", EXPERTS | HEAD),
    "Qwen3-Next": ("qwen3_next", EXPERTS | HEAD | LINEAR | {"shared_expert_intermediate_size": 32}),
    "Gemma": ("gemma", HEAD),
    "Gemma 2": ("gemma2", {"sliding_window": WINDOW, **GEMMA}),
    "Gemma 3": ("gemma3_text", SLIDING | GEMMA),
    "Gemma 3n": ("gemma3n_text", ALTUP | SLIDING | HEAD),
    "Phi": ("phi", {}),
    "Phi-3": ("phi3", {"sliding_window": WINDOW}),
    "Phi-3.5-MoE": ("phimoe", EXPERTS),
    "OLMo 2": ("olmo2", {}),
    "OLMo 3": ("olmo3", SLIDING),
    "OLMoE": ("olmoe", EXPERTS),
    "gpt-oss": ("gpt_oss", EXPERTS | SLIDING | HEAD),
    "DeepSeek-V2": ("deepseek_v2", EXPERTS | DEEPSEEK | HEAD),
    "DeepSeek-V3": ("deepseek_v3", EXPERTS | DEEPSEEK | HEAD),
    "DeepSeek-V3.2": (
        "deepseek_v32",
        EXPERTS | DEEPSEEK | HEAD | {"index_n_heads": 2, "index_head_dim": 16},
    ),
    "SmolLM3": ("smollm3", HEAD),
    "Cohere 2": ("cohere2", SLIDING | HEAD),
    "Granite": ("granite", {}),
    "Granite MoE": ("granitemoe", EXPERTS),
    "GLM-4": ("glm4", HEAD),
    "EXAONE 4": ("exaone4", SLIDING | HEAD),
    "StarCoder2": ("starcoder2", {"sliding_window": WINDOW}),
    "StableLM": ("stablelm", {}),
    "Nemotron": ("nemotron", {}),
    "DBRX": ("dbrx", DBRX),
    "GPT-2": ("gpt2", GPT),
    "GPT-J": ("gptj", GPT | {"rotary_dim": 8}),
    "GPT-NeoX": ("gpt_neox", {"rotary_pct": 0.5}),
    "OPT": ("opt", {"ffn_dim": 64, "word_embed_proj_dim": 32}),
    "BLOOM": ("bloom", {"n_layer": 2, "n_head": 4}),
    "Falcon": ("falcon", {"multi_query": True}),
    "MPT": ("mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 512}),
    "XGLM": ("xglm", {"d_model": 32, "ffn_dim": 64, "num_layers": 2, "attention_heads": 4}),
    "CTRL": ("ctrl", GPT | {"dff": 64}),
    "Mamba": ("mamba", {"state_size": 4}),
    "LFM2": ("lfm2", {"layer_types": ["conv", "full_attention"]}),
    "Jamba": (
        "jamba",
        EXPERTS
        | {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2}
        | {"expert_layer_offset": 1, "mamba_d_state": 4, "mamba_dt_rank": 4},
    ),
    "RecurrentGemma": (
        "recurrent_gemma",
        {"lru_width": 32, "attention_window_size": 512, "block_types": ["recurrent", "attention"]},
    ),
}
FAST = list(FAMILIES)[:3]
# They cannot run packed: no position ids, local layers of their own, a cache of more than keys and
# values, or layers without attention.
UNPACKED = {"BLOOM", "MPT", "GPT-Neo", "DeepSeek-V3.2"}
UNPACKED |= {"Mamba", "LFM2", "Jamba", "Qwen3-Next", "RecurrentGemma"}
WITHOUT_DERIVATIVE = {"BLOOM", "RecurrentGemma"}  # their own autograd functions have no jvp

PROMPTS = random_prompts(1, n=20)
WINDOWS = random_windows(20, 1)
LONGEST = data.longest_prompt(PROMPTS, WINDOWS)
WORDS = PreTrainedTokenizerFast(
    tokenizer_object=Tokenizer(WordLevel({f"t{i}": i for i in range(40)}, unk_token="t2")),
    bos_token="t0",
    eos_token="t1",
    unk_token="t2",
)


def random_model(kind, changes, window=LONGEST):
    """A model in evaluation mode; `window` stands for WINDOW in its config."""
    torch.manual_seed(0)
    settings = COMMON | {"num_attention_heads": 4} | changes
    settings = {name: window if value == WINDOW else value for name, value in settings.items()}
    config = AutoConfig.for_model(kind, **settings)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for weight in model.parameters():
        if weight.dim() > 1 and weight.std() == 0:  # some experts start at zero
            torch.nn.init.normal_(weight, std=0.3)
    return model


def saved(model, folder):
    """The folder, with the model and a tokeniser of forty words in it."""
    data.save_model(folder, model, WORDS)
    return folder


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in FAMILIES
    ],
)
def family(request, tmp_path_factory):
    """(name, model as built, the same read from its folder, prompts packed if it allows that)."""
    built = random_model(*FAMILIES[request.param])
    model, _ = data.load_model(saved(built, tmp_path_factory.mktemp("family") / "model"))
    return request.param, built, model, fall_back_to_unpacked(model, PROMPTS, WINDOWS)


def test_a_saved_model_gives_the_same_logits(family):
    _, built, model, _ = family
    ids = torch.tensor([data.one_prompt(PROMPTS, WINDOWS[0])[0]])
    with torch.no_grad():
        before, after = (some(ids, use_cache=False).logits for some in (built, model))
    assert (after - before).abs().max() < 1e-5 * before.abs().max()


def check_nll(model, prompts):
    """The NLL from trees, packed or not, is that of the prompts run one by one."""
    _, log_p, _, place, window = log_probs_of(model, prompts, build_trees(prompts, WINDOWS))
    with torch.no_grad():
        alone = torch.cat([separate_nll(model, prompts, window) for window in WINDOWS])
    assert -log_p[np.lexsort((place, window))] == pytest.approx(alone.numpy(), abs=1e-4)


def check_rank(model, prompts, softmax, windows=WINDOWS[::3], k=6):
    """The search finds the k best unseen titles, judged by each title's score in its own prompt."""
    legal = continuations(prompts) if softmax == "trie" else None
    ranking = rank(model, prompts, windows, k, softmax, width=4)
    for window, items, scores in zip(windows, ranking.items, ranking.scores):
        truth = []
        for title in prompts.titles:
            with torch.no_grad():
                logits = separate_logits(model, prompts, window, title=title)
            truth.append(float(score(logits, [*title, prompts.eos], legal).sum()))
        truth = np.array(truth)
        assert truth[items] == pytest.approx(scores, abs=1e-4)
        truth[list(window.items[: window.stop])] = -np.inf
        assert np.sort(truth)[::-1][:k] == pytest.approx(scores, abs=1e-4)


def test_packed_is_separate(family):
    name, _, model, prompts = family
    assert prompts.packed == (name not in UNPACKED)
    check_nll(model, prompts)


@pytest.mark.parametrize("softmax", ["trie", "full"])
def test_the_search_is_the_whole_catalogue(family, softmax):
    _, _, model, prompts = family
    check_rank(model, prompts, softmax)


def check_derivative(model, prompts):
    """Forward mode for all targets at once equals one backward per target at both path points."""
    batch = collate(build_trees(prompts, WINDOWS[:2]))
    expected = np.zeros(len(batch.label))
    with forward_mode(model):
        found = segment_gradient(model, batch, (USER,), points=2).numpy()  # (N,)
        E, delta = path_ends(model, batch, (USER,))
        for s in (0.25, 0.75):
            with torch.enable_grad():
                inside = (E - (1 - s) * delta).requires_grad_()  # (B, T, D)
                log_p = label_log_prob(target_logits(model, batch, inside), batch.label)
                terms = log_p.unbind()  # N scalars
            for n, one in enumerate(terms):
                (gradient,) = torch.autograd.grad(one, inside, retain_graph=True)
                expected[n] += float((gradient * delta).sum()) / 2
    largest = np.abs(expected).max()
    assert largest > 1e-3
    assert found == pytest.approx(expected, abs=1e-4 * largest)


def test_the_derivative_is_one_backward_a_token(family):
    name, _, model, prompts = family
    assert has_derivative(model, prompts, WINDOWS) == (name not in WITHOUT_DERIVATIVE)
    if name not in WITHOUT_DERIVATIVE:
        check_derivative(model, prompts)


# ------------------------------------------------ windows of attention


@pytest.mark.parametrize("name", ["Mistral", "Gemma 3", "gpt-oss", "Llama 4"])
def test_prompts_longer_than_a_window_run_alone(name):
    """Our mask replaces the model's own, and would show it tokens that its window hides."""
    model = random_model(*FAMILIES[name], window=LONGEST - 1)
    prompts = fall_back_to_unpacked(model, PROMPTS, WINDOWS)
    assert not prompts.packed
    check_nll(model, prompts)
    for softmax in ("trie", "full"):
        check_rank(model, prompts, softmax)


def test_the_longest_prompt_decides():
    """It is taken over all windows and titles: the search puts every title after every history."""
    model = random_model(*FAMILIES["Mistral"], window=LONGEST)
    lengths = []
    for window in WINDOWS:
        for item in range(len(PROMPTS.titles)):
            other = window._replace(items=window.items[: window.stop] + (item,))
            lengths.append(len(data.build_tree(PROMPTS, [other], [0]).ids))
    assert max(lengths) == LONGEST
    short = min(WINDOWS, key=lambda window: window.stop - window.start)
    longer = short._replace(start=0, stop=len(short.items) - 1)
    assert fall_back_to_unpacked(model, PROMPTS, WINDOWS).packed
    assert fall_back_to_unpacked(model, PROMPTS, [short]).packed
    size = data.longest_prompt(PROMPTS, [longer])
    model.config.sliding_window = size - 1
    assert fall_back_to_unpacked(model, PROMPTS, [short]).packed
    assert not fall_back_to_unpacked(model, PROMPTS, [short, longer]).packed


def plain_rows(length=9):
    """Two rows of random tokens, the first ones the user's and the last ones targets."""
    torch.manual_seed(0)
    ids = torch.randint(2, 40, (2, length))
    labels = torch.where(torch.arange(length) < 6, -100, ids)
    return ids, labels, torch.arange(length).expand(2, -1) < 3


def test_a_plain_batch_longer_than_a_window_is_refused():
    model = random_model(*FAMILIES["Gemma 3"], window=8)
    batch = plain_batch(*plain_rows(9))
    with pytest.raises(InputError, match="a prompt of 9 tokens is longer than .* window of 8"):
        token_relevance(model, batch)
    assert len(token_relevance(model, plain_batch(*plain_rows(8)))) == 4


# ------------------------------------------------ faults found before training starts


def run_of(small, model, folder, *more):
    """Flags of a small run with a random model that has the run's tokeniser."""
    dataset = data.load_dataset(small[1])
    tokenizer = data.tiny_tokenizer(dataset)
    kind, changes = model
    built = random_model(kind, changes | {"vocab_size": len(tokenizer)}, window=4096)
    data.save_model(folder / "model", built, tokenizer)
    flags = [*small, "--model", folder / "model", "--out", folder, "--name", "run", *more]
    return [str(flag) for flag in flags]


def test_a_model_without_forward_mode_names_the_other_relevance(small, tmp_path, fails):
    flags = run_of(small, FAMILIES["BLOOM"], tmp_path, "--loss", "sft")
    assert "add --relevance ablation" in fails(flags)
    assert not (tmp_path / "run").exists()
    gdrt.main([*flags, "--relevance", "ablation"])
    metrics = json.loads((tmp_path / "run" / "sft" / "metrics.json").read_text())
    assert "gradient" not in metrics["audit"]["after"]
    assert 0 < metrics["audit"]["after"]["ablation"]["auxiliary share"] < 1


def test_a_step_that_autocast_breaks_names_fp32(small, tmp_path, fails):
    """DBRX adds its experts' bf16 outputs to an fp32 tensor."""
    flags = run_of(small, FAMILIES["DBRX"], tmp_path)
    assert "cannot be trained" in (sentence := fails([*flags, "--precision", "bf16"]))
    assert sentence.endswith("add --precision fp32")
    assert not (tmp_path / "run").exists()


def test_the_step_that_is_tried_leaves_nothing_behind():
    model = random_model("llama", HEAD | {"attention_dropout": 0.5})
    trees = build_trees(PROMPTS, WINDOWS)
    digest = data.weights_digest(model)
    gdrt.try_update(model, trees, "llama", gdrt.TrainConfig())
    assert data.weights_digest(model) == digest
    assert all(weight.grad is None for weight in model.parameters())
    assert not model.training


def test_a_step_that_fails_is_one_sentence():
    model = random_model("llama", HEAD)
    model.model.layers[1].register_full_backward_hook(lambda *_: 1 / 0)
    with pytest.raises(InputError, match="--model X: cannot be trained .*choose another model"):
        trees = build_trees(PROMPTS, WINDOWS)
        gdrt.try_update(model, trees, "X", gdrt.TrainConfig())


def test_a_model_that_cannot_read_the_longest_prompt_is_one_sentence():
    places = LONGEST - 1
    model = random_model("gpt2", GPT | {"n_positions": places, "max_position_embeddings": places})
    with pytest.raises(InputError, match=f"longest prompt, {LONGEST} tokens.*another model"):
        fall_back_to_unpacked(model, PROMPTS, WINDOWS)


def test_experts_run_as_before_after_an_attribution():
    model = random_model(*FAMILIES["Mixtral"])
    before = model.get_experts_implementation()
    assert before != {"": "eager"}
    assert has_derivative(model, PROMPTS, WINDOWS)
    assert model.get_experts_implementation() == before


# ------------------------------------------------ peculiar embeddings and positions


def gemma_3n(**changes):
    kind, config = FAMILIES["Gemma 3n"]
    return random_model(kind, config | changes)


def test_padding_never_touches_a_target():
    """Gemma 3n has norms whose derivative at zero is NaN, and padding's embedding is zero."""
    model = gemma_3n(pad_token_id=0)
    prompts = PROMPTS._replace(bos=[])
    with torch.no_grad():
        model.get_input_embeddings().weight[0] = 0
    batch = collate(build_trees(prompts, WINDOWS))
    with forward_mode(model):
        assert segment_gradient(model, batch, (USER,), points=1).isfinite().all()
    check_derivative(model, prompts)
    ids, labels, is_user = plain_rows()
    pad = torch.nn.functional.pad
    padded = pad(ids, (0, 4)), pad(labels, (0, 4), value=-100), pad(is_user, (0, 4))
    seen = pad(torch.ones_like(ids), (0, 4))
    r = token_relevance(model, plain_batch(*padded, attention_mask=seen))
    assert r == pytest.approx(token_relevance(model, plain_batch(ids, labels, is_user)), abs=1e-4)


def test_a_model_that_scales_its_embeddings_in_place_gets_fresh_ones():
    """CTRL scales its input in place, so that every pass needs a fresh copy."""
    model = random_model(*FAMILIES["CTRL"])
    batch = collate(build_trees(PROMPTS, WINDOWS[:2]))
    check_derivative(model, PROMPTS)
    with forward_mode(model):
        one, two, again = ablations(model, batch, ((USER,), (TITLE,), (USER,)))[0]
    assert torch.equal(one, again)
    assert not torch.equal(one, two)


@pytest.mark.parametrize(
    "kind, changes, found",
    [
        ("mpt", FAMILIES["MPT"][1] | {"max_seq_len": 77}, 77),
        ("gpt2", GPT | {"n_positions": 77}, 77),
        ("opt", FAMILIES["OPT"][1] | {"max_position_embeddings": 77}, 77),
        ("roberta", {"is_decoder": True, "max_position_embeddings": 77, "pad_token_id": 1}, 75),
        ("bart", {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4}, 1024),
        ("rwkv", {"attention_hidden_size": 32}, 10**6),
    ],
)
def test_positions_are_found(kind, changes, found):
    """The model reads that many tokens and, with learned positions, not one more."""
    changes = {"max_position_embeddings": found} | changes
    model = random_model(kind, changes)
    assert data.positions(model) == found
    if found < 10**6:
        with torch.no_grad():
            model(torch.full((1, found), 5), use_cache=False)
    if kind in ("gpt2", "opt", "roberta", "bart"):
        with pytest.raises((IndexError, RuntimeError), match="out of"):
            model(torch.full((1, found + 1), 5), use_cache=False)


def test_a_model_that_finds_the_tokens_of_embeddings_is_refused(tmp_path):
    """Gemma 4 recovers token ids from the embeddings."""
    layers = {"sliding_window": 512, "layer_types": ["sliding_attention", "full_attention"]}
    four = {"vocab_size_per_layer_input": 48, "hidden_size_per_layer_input": 8}
    four |= {"num_kv_shared_layers": 0, "global_head_dim": 8}
    with pytest.raises(InputError, match="cannot be run on embeddings alone"):
        data.load_model(saved(random_model("gemma4_text", four | HEAD | layers), tmp_path / "4"))


def test_a_model_that_makes_more_of_tokens_than_of_embeddings_is_refused():
    class Reads(LlamaForCausalLM):
        def forward(self, input_ids=None, **kwargs):
            found = super().forward(input_ids=input_ids, **kwargs)
            if input_ids is not None:
                found.logits = found.logits + input_ids[..., None] % 3 * torch.arange(48)
            return found

    model = random_model("llama", HEAD)
    assert not data.reads_tokens(model)
    with pytest.raises(InputError, match="--model X: reads token ids as well as"):
        data.check_model("X", Reads(model.config), WORDS)


def test_what_gemma_3n_looks_up_for_every_layer_is_kept():
    """Our passes on embeddings look up what the token ids would; the bare model does not."""
    model = gemma_3n()
    for name, weight in model.named_parameters():
        if name.endswith("correct_output_scale"):  # starts at zero, which hides the lookup
            torch.nn.init.normal_(weight)
    assert not data.reads_tokens(model)
    batch = collate(build_trees(PROMPTS, WINDOWS[:2]))
    with torch.no_grad():
        of_tokens = target_logits(model, batch)
        embeds = model.get_input_embeddings()(batch.ids)
        assert (target_logits(model, batch, embeds) - of_tokens).abs().max() < 1e-5
        alone = model(inputs_embeds=embeds[:, :9]).logits
        assert (model(batch.ids[:, :9]).logits - alone).abs().max() > 0.01
    check_derivative(model, PROMPTS)


class Malicious:
    def __reduce__(self):
        return print, ("code was run",)


def test_weights_that_would_run_code_are_refused(tmp_path, capsys):
    folder = saved(random_model("llama", HEAD), tmp_path / "model")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Malicious()))
    with pytest.raises(InputError, match="cannot be loaded"):
        data.load_model(folder)
    assert "code was run" not in capsys.readouterr().out
