"""Trees against separate prompts, put together here and run through the model's causal mask."""

import copy
import types

import numpy as np
import pytest
import torch
from conftest import (
    in_order,
    prompt_of,
    random_prompts,
    random_windows,
    separate_nll,
    small_model,
)
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import gdrt
from data import (
    TITLE,
    InputError,
    Window,
    build_tree,
    build_trees,
    build_trie,
    by_shared_prefix,
    collate,
    is_branching,
    legal_continuations,
    legal_tokens,
    load_dataset,
    log_softmax_over,
    longest_windows,
    make_prompts,
    one_prompt,
    supports_packing,
    target_logits,
)

KINDS = [
    (kind, tied, bos)
    for kind in ("llama", "gpt2")
    for tied in (True, False)
    for bos in (True, False)
]


def tree_nll(model, batch):
    """NLL (N,) of a batch's targets."""
    return -target_logits(model, batch).log_softmax(-1)[torch.arange(len(batch.label)), batch.label]


def gradients(model, loss):
    return torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)


def furthest(ours, theirs):
    """Largest difference of two lists of tensors; None stands for zeros."""
    pairs = [(a, b) for a, b in zip(ours, theirs) if a is not None or b is not None]
    return max(
        float(((0 if a is None else a) - (0 if b is None else b)).abs().max()) for a, b in pairs
    )


def compare(model, prompts, windows, tamper=lambda batch: batch, pack=True):
    """(NLL difference, gradient difference) of trees and separate prompts, for the mean NLL."""
    batch = tamper(collate(build_trees(prompts, windows, pack)))
    packed = in_order(batch, tree_nll(model, batch))
    separate = torch.cat([separate_nll(model, prompts, window) for window in windows])
    assert packed.shape == separate.shape
    nll = float((packed - separate).detach().abs().max())
    return nll, furthest(gradients(model, packed.mean()), gradients(model, separate.mean()))


def causal(batch):
    """The batch with a plain causal mask: branches see one another."""
    T = batch.ids.shape[1]
    mask = torch.full((T, T), torch.finfo(torch.float32).min).triu(1)
    return batch._replace(mask=mask.expand(len(batch.ids), 1, T, T).clone())


def absolute(batch):
    """The batch with positions counted along the row, not along the path."""
    return batch._replace(position=torch.arange(batch.ids.shape[1]).expand_as(batch.ids))


def path_to(tree, node):
    """Nodes from the root of a tree to `node`."""
    path = [node]
    while path[-1] > 0:
        path.append(int(tree.parent[path[-1]]))
    return path[::-1]


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("pack", [True, False])
def test_trees_are_the_prompts_packed(bos, pack):
    """Read from the root to each target, a tree is the prompt of its window, with its segments."""
    prompts = random_prompts(2, bos=bos)
    windows = random_windows(12, 2)
    found = set()
    trees = build_trees(prompts, windows, pack)
    assert any(map(is_branching, trees)) == pack
    for tree in trees:
        for n, label in enumerate(tree.label.tolist()):
            ids, segments, first = one_prompt(prompts, windows[tree.window[n]])
            path = path_to(tree, int(tree.predict_at[n]))
            stop = first + int(tree.place[n])
            assert tree.ids[path].tolist() + [label] == ids[: stop + 1]
            assert tree.segment[path].tolist() == segments[:stop]
            assert tree.position[path].tolist() == list(range(stop))
            found.add((int(tree.window[n]), stop))
    expected = set()
    for i, window in enumerate(windows):
        ids, segments, first = one_prompt(prompts, window)
        assert segments[first:] == [TITLE] * (len(ids) - first)
        expected |= {(i, stop) for stop in range(first, len(ids))}
    assert found == expected


def test_the_trie_is_the_legal_continuations_packed():
    """Each target's flat list holds the legal tokens; log-softmax over it is -inf elsewhere."""
    prompts = random_prompts(5, n=30, letters=6)
    batch = collate(build_trees(prompts, random_windows(30, 5)))
    legal = legal_continuations([title + [prompts.eos] for title in prompts.titles])
    owner, token, chosen = legal_tokens(batch, prompts.trie)
    logits = torch.randn(len(batch.label), 40)
    flat = log_softmax_over(logits, owner, token)
    for n, (item, place) in enumerate(zip(batch.item.tolist(), batch.place.tolist())):
        allowed = legal[tuple(prompts.titles[item][:place])]
        assert sorted(token[owner == n].tolist()) == sorted(allowed)
        masked = torch.full((40,), -torch.inf)
        masked[sorted(allowed)] = logits[n, sorted(allowed)]
        expected = masked.log_softmax(-1)[batch.label[n]]
        assert flat[chosen[n]].item() == pytest.approx(expected.item(), abs=1e-5)
    assert np.unique(owner).tolist() == list(range(len(batch.label)))


@pytest.mark.parametrize("pack", [True, False])
def test_trees_equal_separate_prompts_on_trained_weights(toy, pack):
    dataset, model, _, prompts = toy
    for seed in range(3):
        nll, gradient = compare(
            model, prompts, random_windows(len(dataset.titles), seed), pack=pack
        )
        assert nll < 1e-5 and gradient < 1e-5


def test_trees_equal_separate_prompts_on_the_data_itself(toy):
    dataset, model, _, prompts = toy
    assert len(by_shared_prefix(dataset.train[:12])) < 4  # or nothing is packed
    nll, gradient = compare(model, prompts, dataset.train[:12])
    assert nll < 1e-5 and gradient < 1e-5


@pytest.mark.parametrize("tamper", [causal, absolute])
def test_a_wrong_mask_or_wrong_positions_are_seen(toy, tamper):
    dataset, model, _, prompts = toy
    for seed in range(3):
        nll, gradient = compare(model, prompts, random_windows(len(dataset.titles), seed), tamper)
        assert nll > 1e-3 and gradient > 1e-3


@pytest.mark.parametrize("kind, tied, bos", KINDS)
def test_kinds_of_models_and_tokenisers(kind, tied, bos):
    model = small_model(kind, tied=tied)
    prompts = random_prompts(1, bos=bos)
    windows = random_windows(12, 1)
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
    nll, gradient = compare(model, prompts, windows)
    assert nll < 1e-5 and gradient < 1e-5
    assert supports_packing(model, prompts, windows)
    for tamper in (causal, absolute):
        assert compare(model, prompts, windows, tamper)[0] > 1e-3


@pytest.mark.parametrize("objective", [gdrt.gdrt_rule(1.0, "uniform")])
def test_packed_and_separate_trees_train_alike(toy, objective):
    """Packed or not: the same losses and, after four updates of SGD, the same weights."""
    dataset, model, _, prompts = toy
    table = torch.arange(prompts.trie.path.size).reshape(prompts.trie.path.shape) % 3
    batches = [dataset.train[i : i + 20] for i in range(0, 80, 20)]
    results = []
    for pack in (True, False):
        trained = copy.deepcopy(model)
        losses = []
        log_q = torch.zeros(3)
        cfg = gdrt.TrainConfig()
        optimizer = torch.optim.SGD(trained.parameters(), lr=0.3)
        for windows in batches:
            trees = build_trees(prompts, windows, pack)
            log_q, line = gdrt.training_step(
                trained, optimizer, trees, prompts, table, objective, log_q, cfg
            )
            losses.append(line["loss"])
        results.append((losses, [p.detach() for p in trained.parameters()]))
    (packed, weights), (separate, others) = results
    assert packed == pytest.approx(separate, abs=1e-4)
    assert furthest(weights, others) < 1e-4
    assert furthest(weights, [p.detach() for p in model.parameters()]) > 1e-2  # they did move


# ---------------------------------------------------------------- pieces of a prompt


def word_tokenizer(words, bos="<s>", eos="</s>", adds_bos=False):
    """One token a word; adds_bos: like many of Llama's, it puts BOS first unless told not to."""
    names = [name for name in (bos, eos, "<unk>") if name] + sorted(words)
    tokenizer = Tokenizer(WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    if adds_bos:
        tokenizer.post_processor = TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, names.index(bos))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, unk_token="<unk>"
    )


def words_of(dataset):
    words = set("products bought recommend the".split())
    for title in dataset.titles:
        words.update(f'"{title}"'.split())
    return words


@pytest.mark.parametrize("bos, adds_bos", [("<s>", True), ("<s>", False), (None, False)])
def test_a_prompt_has_one_bos_where_there_is_one(bos, adds_bos):
    dataset = load_dataset("toy")
    tokenizer = word_tokenizer(words_of(dataset), bos, adds_bos=adds_bos)
    prompts = make_prompts(dataset, tokenizer, 512)
    window = dataset.train[5]
    ids = build_tree(prompts, [window], [0]).ids.tolist()
    assert ids == prompt_of(prompts, window) + prompts.titles[window.items[window.stop]]
    assert ids.count(tokenizer.bos_token_id) == (bos is not None)
    assert bos is None or ids[0] == tokenizer.bos_token_id
    for item in window.items[window.start : window.stop]:
        assert f'"{dataset.titles[item]}"' in tokenizer.decode(ids)


def test_the_prompt_reads_as_the_template_says(toy):
    dataset, _, tokenizer, prompts = toy
    window = dataset.train[5]
    history = "\n".join(f'"{dataset.titles[i]}"' for i in window.items[window.start : window.stop])
    text = tokenizer.decode(build_tree(prompts, [window], [0]).ids.tolist())
    assert text == (
        "<bos>### Instruction:\n"
        "Given the products a user has bought, oldest first, recommend the next one.\n\n"
        "### Input:\n"
        f'{history}\n\n### Response:\n"{dataset.titles[window.items[window.stop]]}"'
    )


def test_titles_of_equal_tokens_are_an_error():
    with pytest.raises(InputError, match="items 0 and 2"):
        build_trie([[5, 6, 1], [5, 1], [5, 6, 1]])
    dataset = load_dataset("toy")
    strangers = word_tokenizer(set())  # all words are unknown: titles of three words look the same
    with pytest.raises(InputError, match="same title tokens"):
        make_prompts(dataset, strangers, 512)


def test_a_tokenizer_without_eos_is_an_error():
    dataset = load_dataset("toy")
    with pytest.raises(InputError, match="EOS"):
        make_prompts(dataset, word_tokenizer(words_of(dataset), eos=None), 512)


# ---------------------------------------------------------------- short models, stubborn models


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("pack", [True, False])
def test_a_history_longer_than_the_model_loses_its_oldest_titles(kind, pack):
    """A window keeps the longest end of its history that leaves room for the longest title."""
    model = small_model(kind, places=32)
    prompts = random_prompts(3, n=14, longest=32, lengths=(2, 5))
    items = tuple(range(14))
    windows = [Window(0, items, 0, stop) for stop in range(1, 14)]
    room = 32 - max(map(len, prompts.titles))

    def skipped(window):
        return next(skip for skip in range(99) if len(prompt_of(prompts, window, skip)) <= room)

    skips = [skipped(window) for window in windows]
    assert skips[0] == 0 and skips[-1] > 3
    trees = build_trees(prompts, windows, pack)
    batch = collate(trees)
    assert batch.position.max() < 32
    separate = [separate_nll(model, prompts, *pair) for pair in zip(windows, skips)]
    separate = torch.cat(separate)
    assert (in_order(batch, tree_nll(model, batch)) - separate).abs().max() < 1e-5
    for tree in trees:
        assert tree.dropped == max(skips[i] for i in set(tree.window.tolist()))


def test_a_model_too_short_for_any_title_is_an_error():
    dataset = load_dataset("toy")
    with pytest.raises(InputError, match="positions"):
        make_prompts(dataset, word_tokenizer(words_of(dataset)), 8)


def deaf(model, *names):
    """The model's class with a forward that ignores the arguments called `names`."""

    class Deaf(type(model)):
        def forward(self, *args, **kwargs):
            kept = {key: value for key, value in kwargs.items() if key not in names}
            return super().forward(*args, **kept)

    return types.new_class("Deaf", (Deaf,))(model.config).eval()


@pytest.mark.parametrize("name", ["attention_mask", "position_ids"])
def test_a_model_that_ignores_the_mask_is_noticed(name):
    torch.manual_seed(0)
    model = small_model()
    prompts = random_prompts(1)
    windows = random_windows(12, 1)
    assert supports_packing(model, prompts, windows)
    assert not supports_packing(deaf(model, name), prompts, windows)


def test_it_is_noticed_though_the_first_users_have_one_target():
    """A tree with one branch is a plain prompt: it tells nothing about the mask."""
    model = small_model()
    prompts = random_prompts(1)
    windows = [random_windows(12, user)[0] for user in range(20)] + random_windows(12, 1)
    assert not supports_packing(deaf(model, "attention_mask"), prompts, windows)


def test_a_model_that_refuses_the_mask_is_noticed():
    class Refuses(LlamaForCausalLM):
        def forward(self, *args, attention_mask=None, **kwargs):
            if attention_mask is not None and attention_mask.dim() > 2:
                raise ValueError("attention_mask should have 2 dimensions")
            return super().forward(*args, attention_mask=attention_mask, **kwargs)

    model = Refuses(small_model().config).eval()
    assert not supports_packing(model, random_prompts(1), random_windows(12, 1))


def test_too_little_memory_is_no_verdict_on_the_model():
    class Fails(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            raise torch.OutOfMemoryError

    model = Fails(small_model().config).eval()
    with pytest.raises(torch.OutOfMemoryError):
        supports_packing(model, random_prompts(1), random_windows(12, 1))


def test_a_model_in_float64_reads_trees_as_prompts():
    model = small_model().double()
    prompts = random_prompts(1)
    windows = random_windows(12, 1, users=3)
    batch = collate(build_trees(prompts, windows))
    with torch.no_grad():
        nll = gdrt.token_nll(model, batch, prompts, gdrt.TrainConfig())  # (N,)
        expected = torch.cat([separate_nll(model, prompts, window) for window in windows])
    assert in_order(batch, nll).tolist() == pytest.approx(expected.tolist(), abs=1e-5)


def test_windows_of_one_user_with_other_items_share_no_tree():
    """As CSV files have them: a user's second window need not go on from the first."""
    model = small_model()
    prompts = random_prompts(1)
    windows = [Window(0, (1, 2, 3), 0, 2), Window(0, (4, 5, 6, 7), 0, 3)]
    batch = collate(build_trees(prompts, windows))
    with torch.no_grad():
        nll = gdrt.token_nll(model, batch, prompts, gdrt.TrainConfig())  # (N,)
        for i, window in enumerate(windows):
            expected = separate_nll(model, prompts, window)
            assert nll[batch.window == i].tolist() == pytest.approx(expected.tolist(), abs=1e-5)


def test_the_windows_of_a_tree_may_stand_in_any_order():
    prompts = random_prompts(1)
    items = tuple(range(9))
    windows = [Window(0, items, 0, stop) for stop in (8, 3, 5)]
    (tree,) = build_trees(prompts, windows)
    for i, window in enumerate(windows):
        path = path_to(tree, tree.predict_at[tree.window == i][-1])
        ids, _, _ = one_prompt(prompts, window)
        assert tree.ids[path].tolist() == ids[:-1]


def test_one_title_too_many_costs_shorter_histories_nothing():
    prompts = random_prompts(3, n=14, lengths=(2, 5))
    items = tuple(range(14))
    windows = [Window(0, items, 0, stop) for stop in (3, 6)]
    room = len(prompt_of(prompts, windows[1])) + max(map(len, prompts.titles))
    trees = build_trees(prompts._replace(max_positions=room - 1), windows)
    assert [tree.dropped for tree in trees] == [0, 1]
    assert len(build_trees(prompts._replace(max_positions=room), windows)) == 1


def test_the_longest_history_is_the_one_of_most_tokens():
    titles = [[5], [6], [7], [8] * 6]
    trie = build_trie([title + [1] for title in titles])
    prompts = random_prompts(2)._replace(titles=titles, trie=trie)
    windows = [Window(0, (0, 1, 2), 0, 2), Window(1, (3, 0), 0, 1)]
    assert [window.user for window in longest_windows(prompts, windows, 1)] == [1]


@pytest.mark.parametrize("level", [0.0, 120.0, -120.0])
def test_the_softmax_over_legal_tokens_at_any_level_of_the_logits(level):
    """GPT-2's logits are all about -100, where exp in fp32 is 0."""
    logits = torch.randn(3, 9, generator=torch.Generator().manual_seed(0))
    owner = torch.tensor([0, 0, 1, 1, 1, 2])
    token = torch.tensor([1, 5, 0, 3, 8, 4])
    found = log_softmax_over(logits + level, owner, token)
    for row in range(3):
        expected = logits[row, token[owner == row]].double().log_softmax(0)
        assert found[owner == row].tolist() == pytest.approx(expected.tolist(), abs=1e-4)
