"""README's "In your own trainer": its blocks, executed as they stand, train by GDRT.

One batch of eight rows, however it is cut up, must give the gradient that autograd gives through
`gdrt_loss`; a naive paste does not.
"""

import copy
import json
import re
from functools import partial

import numpy as np
import pytest
import torch
import transformers
from conftest import (
    ROOT,
    on_ranks,
    prompt_of,
    small_model,
    target_tokens,
)
from transformers import DataCollatorForSeq2Seq, TrainingArguments

import attribution
import data
import gdrt
from attribution import grouped_nll, plain_batch, token_relevance, with_group
from data import (
    InputError,
    build_trees,
    build_trie,
    load_dataset,
    make_prompts,
    positions,
    tiny_tokenizer,
)

SECTION = re.search(
    "## In your own trainer\n.*?(?=\n## )", (ROOT / "README.md").read_text(encoding="utf-8"), re.S
)[0]
BLOCKS = re.findall("```python\n(.*?)```", SECTION, re.S)
K = 4  # groups
TAU = 4.0
LENGTHS = 9, 14, 11, 17, 8, 12, 15, 10


def names(**more):
    """What the blocks may use: the modules' functions, and what a user has at hand."""
    known = {"torch": torch, "np": np, "partial": partial}
    return known | vars(data) | vars(attribution) | vars(gdrt) | more


class Rows(list):
    """A list with the method of a `datasets.Dataset` that README uses."""

    def add_column(self, name, values):
        return Rows({**row, name: value} for row, value in zip(self, values, strict=True))


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer(load_dataset("toy"))


def example_rows():
    """(eight rows of unequal lengths, the groups of each one's targets); group 3 is rare."""
    random = np.random.default_rng(0)
    rows = Rows()
    groups = []
    for length in LENGTHS:
        ids = random.integers(2, 40, length).tolist()
        targets = 3 + length % 3
        labels = [-100] * (length - targets) + ids[-targets:]
        rows.append({"input_ids": ids, "attention_mask": [1] * length, "labels": labels})
        groups.append(random.choice(K, targets, p=[0.4, 0.3, 0.25, 0.05]).tolist())
    groups[2][0] = 3
    return rows, groups


def world_model(**more):
    return small_model(scale=0.1, **more)


def gradient_of(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def weights_of(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def expected_gradient(model, rows, groups):
    """By autograd through gdrt_loss, one row at a time without any padding."""
    model = copy.deepcopy(model).eval()
    model.zero_grad()
    nll = []
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        labels = torch.tensor(row["labels"])
        log_p = model(ids).logits[0, :-1].log_softmax(-1)  # (T - 1, V)
        target = labels[1:] != -100
        nll.append(-log_p[target, labels[1:][target]])
    group = torch.tensor(sum(groups, []))
    loss, _, _ = gdrt.gdrt_loss(torch.cat(nll), group, K, TAU)
    loss.backward()
    return gradient_of(model)


class KeepGradient(transformers.TrainerCallback):
    """The gradient of every update, and every line that is logged."""

    def __init__(self):
        self.gradients = []
        self.lines = []

    def on_pre_optimizer_step(self, args, state, control, model, **more):
        self.gradients.append(gradient_of(model))

    def on_log(self, args, state, control, logs, **more):
        self.lines.append(dict(logs))


def arguments(folder, size=8, accumulate=1, make=TrainingArguments, **more):
    settings = {
        "per_device_train_batch_size": size,
        "gradient_accumulation_steps": accumulate,
        "remove_unused_columns": False,
        "max_steps": 1,
        "max_grad_norm": 0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return make(str(folder), **settings | more)


def make_trainer(model, args, rows, groups, collate, base=transformers.Trainer, **more):
    """The README's second block with these names -> (names afterwards, what the trainer keeps)."""
    at_hand = names(Trainer=base, model=model, args=args, rows=rows, groups=groups, K=K, tau=TAU)
    at_hand |= {"collate": collate} | more
    definition = re.search(r"(?m)^def weigh.*?\n(?=\S)", BLOCKS[0], re.S)[0]
    exec(definition + "\n" + BLOCKS[1], at_hand)
    kept = KeepGradient()
    at_hand["trainer"].add_callback(kept)
    return at_hand, kept


def one_update(folder, size, accumulate, tokenizer, model=None, base=transformers.Trainer, **more):
    """(gradient of GDRTTrainer's update on the example rows, the logged loss)."""
    rows, groups = example_rows()
    args = arguments(folder, size, accumulate, **more)
    model = model or world_model()
    collate = DataCollatorForSeq2Seq(tokenizer)
    at_hand, kept = make_trainer(model, args, rows, groups, collate, base, tokenizer=tokenizer)
    at_hand["trainer"].train()
    return kept.gradients[0], kept.lines[0]["loss"]


def distance(a, b):
    return float((a - b).norm() / b.norm())


# ---------------------------------------------------------------- the section, and your own loop


def test_the_section_is_short():
    assert SECTION.rstrip().count("\n") + 1 <= 40
    assert max(map(len, SECTION.splitlines())) <= 100


def own_loop(model, batches):
    """Run the first block as it stands: groups of some rows, weights, gradients -> its names."""
    ids = torch.randint(2, 40, (3, 12), generator=torch.Generator().manual_seed(0))
    labels = torch.where(torch.arange(12) < 9, -100, ids)
    is_user = (torch.arange(12) // 4 == 1).expand(3, 12)
    at_hand = names(
        model=model,
        batches=batches,
        input_ids=ids,
        labels=labels,
        is_user=is_user,
        attention_mask=torch.ones_like(ids),
        item=torch.arange(3)[:, None].expand(3, 12),
        titles=ids[:, 9:].tolist(),
        K=K,
        tau=TAU,
    )
    exec(BLOCKS[0], at_hand)
    return at_hand


def collated(tokenizer, cuts):
    """The example rows, with groups, as batches of so many rows."""
    rows, groups = example_rows()
    rows = rows.add_column("group", groups)
    collate = partial(with_group, DataCollatorForSeq2Seq(tokenizer))
    return [collate(rows[a:b]) for a, b in zip(cuts, cuts[1:])]


@pytest.mark.parametrize("cuts", [[0, 8], [0, 2, 4, 6, 8], [0, 1, 6, 8]], ids=str)
def test_your_own_loop_has_the_gradient_of_the_global_batch(tokenizer, cuts):
    model = world_model().double()
    own_loop(model, collated(tokenizer, cuts))
    expected = expected_gradient(model, *example_rows())
    assert distance(gradient_of(model), expected) < 1e-12


def test_a_stream_that_has_ended_gives_no_batch_to_weigh(tokenizer):
    """Trainer asks an IterableDataset for batches past its end: no error, nothing to train on."""
    model = world_model()
    at_hand = own_loop(model, collated(tokenizer, [0, 8]))
    assert at_hand["weigh"](model, [], K, TAU).shape == (K,)


def test_the_groups_of_the_block_are_cuts_of_each_tokens_relevance(tokenizer):
    model = world_model()
    at_hand = own_loop(model, collated(tokenizer, [0, 8]))
    trie = build_trie(at_hand["titles"])
    tensors = (at_hand[name].split(1) for name in ("input_ids", "labels", "is_user", "item"))
    rows = [plain_batch(*row, item=item) for *row, item in zip(*tensors)]
    r = np.concatenate([token_relevance(model, row, trie=trie) for row in rows])
    assert at_hand["r"] == pytest.approx(r, abs=1e-5)
    forced = np.tile([False, True, True], 3)  # the titles part at their first tokens
    assert ((r == 1) == forced).all()
    assert at_hand["shares"] == pytest.approx([1 / 9, 1 / 9, 1 / 9, 6 / 9])
    assert at_hand["cuts"] == sorted(at_hand["cuts"])


def test_packed_rows_have_the_nll_of_separate_ones(tokenizer):
    """Only position_ids part the prompts of a row: a cache would let them see one another."""
    model = world_model()
    (batch,) = collated(tokenizer, [0, 8])
    separate = grouped_nll(model, batch)
    real = batch["attention_mask"].bool()
    packed = {name: batch[name][real][None] for name in ("input_ids", "labels", "group")}
    packed["position_ids"] = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    nll, group = grouped_nll(model, packed)
    assert torch.allclose(nll, separate[0], atol=1e-5) and torch.equal(group, separate[1])


@pytest.mark.parametrize("side", ["left", "right"])
def test_ids_go_where_labels_are(tokenizer, side):
    rows, groups = example_rows()
    padded = copy.deepcopy(tokenizer)
    padded.padding_side = side
    batch = with_group(DataCollatorForSeq2Seq(padded), rows.add_column("group", groups))
    assert torch.equal(batch["group"] >= 0, batch["labels"] != -100)
    assert batch["group"][batch["group"] >= 0].tolist() == sum(groups, [])
    whole = []  # the same, with an id or -1 for every token
    for row, group in zip(rows, groups):
        whole.append([-1] * (len(row["labels"]) - len(group)) + group)
    other = with_group(DataCollatorForSeq2Seq(padded), rows.add_column("group", whole))
    assert torch.equal(other["group"], batch["group"])


def test_groups_of_other_labels_are_refused(tokenizer):
    """As when the trainer truncates the labels but not the groups."""
    rows, groups = example_rows()
    groups[3] = groups[3][:-1]
    with pytest.raises(InputError, match="ids for .* target tokens"):
        with_group(DataCollatorForSeq2Seq(tokenizer), rows.add_column("group", groups))


# ---------------------------------------------------------------- transformers' Trainer


@pytest.fixture(scope="module")
def expected():
    return expected_gradient(world_model(), *example_rows())


@pytest.mark.parametrize("size, accumulate", [(8, 1), (2, 4), (3, 3)], ids=str)
def test_the_trainer_has_the_gradient_of_the_global_batch(
    tmp_path, tokenizer, expected, size, accumulate
):
    """One batch of 8, 4 of 2, and the uneven 3, 3, 2; the logged loss is GDRT's."""
    gradient, logged = one_update(tmp_path, size, accumulate, tokenizer)
    assert distance(gradient, expected) < 1e-6
    model = world_model()
    rows, groups = example_rows()
    nll, group = grouped_nll(
        model, with_group(DataCollatorForSeq2Seq(tokenizer), rows.add_column("group", groups))
    )
    assert logged == pytest.approx(gdrt.gdrt_loss(nll, group, K, TAU)[0].item(), rel=1e-5)


def save_gradient(folder, size, accumulate):
    """For `on_ranks`: the gradient of one update, as this rank has it."""
    torch.set_num_threads(1)
    tokenizer = tiny_tokenizer(load_dataset("toy"))
    gradient, logged = one_update(folder, size, accumulate, tokenizer)
    rank = torch.distributed.get_rank()
    assert torch.distributed.get_world_size() == 2
    torch.save((gradient, logged), f"{folder}/{rank}.pt")


@pytest.mark.parametrize("size, accumulate", [(4, 1), (1, 4)], ids=str)
def test_two_ranks_have_the_gradient_of_the_global_batch(tmp_path, expected, size, accumulate):
    assert on_ranks(2, save_gradient, lambda rank: (str(tmp_path), size, accumulate)) == [0, 0]
    for rank in 0, 1:
        gradient, _ = torch.load(tmp_path / f"{rank}.pt")
        assert distance(gradient, expected) < 1e-6


class NaiveTrainer(transformers.Trainer):
    """What one would paste: the loss of each micro-batch by itself."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return gdrt.gdrt_loss(*grouped_nll(model, inputs), K, TAU)[0]


@pytest.mark.parametrize("scaled", [None, False], ids=["as pasted", "averaged"])
def test_control_the_naive_paste_has_another_gradient(tmp_path, tokenizer, expected, scaled):
    rows, groups = example_rows()
    trainer = NaiveTrainer(
        world_model(),
        arguments(tmp_path, 2, 4),
        partial(with_group, DataCollatorForSeq2Seq(tokenizer)),
        rows.add_column("group", groups),
    )
    trainer.loss_is_scaled_for_ga = scaled
    kept = KeepGradient()
    trainer.add_callback(kept)
    trainer.train()
    assert distance(kept.gradients[0], expected) > 0.2


def test_control_without_the_scaling_flag_the_gradient_is_divided(tmp_path, tokenizer, expected):
    rows, groups = example_rows()
    at_hand, kept = make_trainer(
        world_model(),
        arguments(tmp_path, 2, 4),
        rows,
        groups,
        DataCollatorForSeq2Seq(tokenizer),
        tokenizer=tokenizer,
    )
    at_hand["trainer"].loss_is_scaled_for_ga = False
    at_hand["trainer"].train()
    assert distance(4 * kept.gradients[0], expected) < 1e-6


def test_a_dropped_column_is_an_error_and_not_plain_fine_tuning(tmp_path, tokenizer):
    with pytest.raises(InputError, match="remove_unused_columns=False"):
        one_update(tmp_path, 2, 4, tokenizer, remove_unused_columns=True)


@pytest.mark.parametrize("precision", [{}, {"bf16": True}], ids=["fp32", "bf16"])
def test_the_gradients_pass_repeats_the_dropout_of_the_weights_pass(
    tmp_path, tokenizer, monkeypatch, precision
):
    """And its precision: every micro-batch has the same NLL twice, to the bit."""
    seen = []

    def watched(model, inputs):
        nll, group = grouped_nll(model, inputs)
        seen.append((torch.is_grad_enabled(), nll.detach()))
        return nll, group

    monkeypatch.setattr(attribution, "grouped_nll", watched)
    model = world_model(dropout=0.3)
    one_update(tmp_path, 2, 4, tokenizer, model, **precision)
    weights = [nll for gradient, nll in seen if not gradient]
    gradients = [nll for gradient, nll in seen if gradient]
    assert len(weights) == len(gradients) == 4
    assert all(torch.equal(a, b) for a, b in zip(weights, gradients))
    (batch,) = collated(tokenizer, [0, 8])
    assert not torch.equal(grouped_nll(model, batch)[0], grouped_nll(model, batch)[0])


def test_an_evaluation_is_the_plain_loss_of_rows_without_groups(tmp_path, tokenizer):
    """The plain loss is the mean NLL of all target tokens."""
    rows, groups = example_rows()
    args = arguments(tmp_path, 8, per_device_eval_batch_size=8)
    collate = DataCollatorForSeq2Seq(tokenizer)
    at_hand, _ = make_trainer(world_model(), args, rows, groups, collate, tokenizer=tokenizer)
    found = at_hand["trainer"].evaluate(rows)["eval_loss"]
    (batch,) = collated(tokenizer, [0, 8])
    assert found == pytest.approx(grouped_nll(world_model(), batch)[0].mean().item(), rel=1e-5)


# ---------------------------------------------------------------- the same training as our loop


def test_the_trainer_trains_as_our_loop_does(tokenizer, tmp_path):
    """Same start, batches and groups on toy: the same losses to 1e-4, and the same weights."""
    dataset = load_dataset("toy")
    model = world_model(vocabulary=len(tokenizer))
    prompts = make_prompts(dataset, tokenizer, positions(model))
    size = 16
    updates = 20
    windows = gdrt.draw_windows(dataset.train, size * updates, 1)
    trees = build_trees(prompts, windows, pack=False)
    batches = gdrt.make_batches(trees, size, 1, 0)
    assert [len(batch) for batch in batches] == [size] * updates
    r = attribution.relevance(model, prompts, windows, "probability")
    group_of = torch.from_numpy(attribution.cut_groups(r, windows, K)[0])  # (items, L)

    ours = copy.deepcopy(model)
    cfg = gdrt.TrainConfig()
    rule = gdrt.gdrt_rule(TAU, "uniform")
    span = 0, updates
    gdrt.train(ours, prompts, trees, batches, span, group_of, rule, K, cfg, tmp_path)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    expected = [json.loads(line)["loss"] for line in lines]
    plain = [json.loads(line)["nll"] for line in lines]

    rows = Rows()
    groups = []
    for tree in sum(batches, []):
        window = windows[int(trees[tree].window[0])]
        title = target_tokens(prompts, window)
        prompt = prompt_of(prompts, window)
        labels = [-100] * len(prompt) + title
        rows.append({"input_ids": prompt + title, "labels": labels})
        groups.append(group_of[window.items[window.stop], : len(title)].tolist())
    theirs = copy.deepcopy(model)
    args = arguments(
        tmp_path,
        size // 4,
        4,
        max_steps=updates,
        max_grad_norm=gdrt.CLIP,
        train_sampling_strategy="sequential",
    )
    optimizer = torch.optim.AdamW(
        theirs.parameters(), lr=cfg.lr, betas=gdrt.BETAS, weight_decay=gdrt.WEIGHT_DECAY
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: gdrt.learning_rate(min(step, updates - 1), updates, 1.0)
    )
    collate = DataCollatorForSeq2Seq(tokenizer)
    at_hand, kept = make_trainer(theirs, args, rows, groups, collate, tokenizer=tokenizer)
    at_hand["trainer"].optimizer = optimizer
    at_hand["trainer"].lr_scheduler = schedule
    at_hand["trainer"].train()
    found = [line["loss"] for line in kept.lines if "loss" in line]
    assert found == pytest.approx(expected, abs=1e-4)
    assert max(expected) - min(expected) > 0.1
    assert min(abs(a - b) for a, b in zip(expected, plain)) > 1e-3  # it is not plain fine-tuning
    a = weights_of(ours)
    assert (a - weights_of(theirs)).norm() < 0.01 * (a - weights_of(model)).norm()


# ---------------------------------------------------------------- TRL's SFTTrainer


@pytest.fixture(scope="module")
def trl():
    return pytest.importorskip("trl", reason="needs pip install -r tests/requirements.txt")


def shop_texts():
    """Eight rows of text as TRL has them: prompt and completion."""
    titles = load_dataset("toy").titles
    rows = []
    for i in range(8):
        history = "".join(f' "{title}"' for title in titles[3 * i : 3 * i + 2 + i % 3])
        rows.append({"prompt": f"The user bought{history}; next:", "completion": f'"{titles[-i]}"'})
    return rows


def sft_trainer(trl, folder, tokenizer, settings):
    """(model, args, rows, trainer): TRL's own, before anything of GDRT."""
    import datasets

    rows = datasets.Dataset.from_list(shop_texts())
    model = world_model(vocabulary=len(tokenizer))
    args = arguments(folder, make=trl.SFTConfig, bf16=False, **{"max_length": 128} | settings)
    trainer = trl.SFTTrainer(copy.deepcopy(model), args, None, rows, processing_class=tokenizer)
    return model, args, rows, trainer


def groups_of(trainer, model):
    """One list of group ids for each of the trainer's rows, by the README's lines.

    Four of every seven tokens count as the user's: any mask will do here.
    """
    r = []
    for row in trainer.train_dataset:
        batch = trainer.data_collator([row])
        position = batch.get("position_ids")
        is_user = torch.arange(batch["labels"].shape[1])[None] % 7 < 4
        plain = plain_batch(batch["input_ids"], batch["labels"], is_user, position_ids=position)
        r.append(token_relevance(model, plain, "ablation"))
    flat = np.concatenate(r)
    group, _, _ = attribution.cut(flat, np.ones_like(flat), K)
    ends = np.cumsum(list(map(len, r)))
    return [part.tolist() for part in np.split(group, ends[:-1])]


def apart(rows, groups):
    """The trainer's rows as separate prompts with their groups, packed or not."""
    prompts = []
    of_prompt = []
    for row, group in zip(rows, groups):
        start = 0
        for length in row.get("seq_lengths") or [len(row["input_ids"])]:
            at = slice(start, start + length)
            prompts.append({name: row[name][at] for name in ("input_ids", "labels")})
            count = sum(label != -100 for label in prompts[-1]["labels"])
            of_prompt.append(group[:count])
            group = group[count:]
            start += length
    return prompts, of_prompt


LAYOUTS = {"padded": {}, "padding free": {"padding_free": True, "max_length": None}}
LAYOUTS["packed"] = {"packing": True}


@pytest.mark.parametrize("size, accumulate", [(8, 1), (2, 4)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_trls_trainer_has_the_gradient_of_the_global_batch(
    trl, tokenizer, tmp_path, layout, size, accumulate
):
    """With the labels that TRL makes, of completions alone, and rows packed as it packs them."""
    settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulate}
    model, args, rows, plain = sft_trainer(trl, tmp_path, tokenizer, settings | LAYOUTS[layout])
    prepared = list(plain.train_dataset)
    assert (len(prepared) < len(rows)) == (layout == "packed")
    groups = groups_of(plain, model)
    prompts, of_prompt = apart(prepared, groups)
    expected = expected_gradient(model, prompts, of_prompt)
    texts = sorted(row["completion"] + tokenizer.eos_token for row in rows)
    completions = []
    for row in prompts:
        completions.append(tokenizer.decode([y for y in row["labels"] if y != -100]))
    assert sorted(completions) == texts
    at_hand, kept = make_trainer(
        model, args, rows, groups, None, trl.SFTTrainer, tokenizer=tokenizer
    )
    at_hand["trainer"].train()
    assert distance(kept.gradients[0], expected) < 1e-6


def test_an_evaluation_in_trls_trainer_is_the_plain_loss(trl, tokenizer, tmp_path):
    settings = {"per_device_eval_batch_size": 8}
    model, args, rows, plain = sft_trainer(trl, tmp_path, tokenizer, settings)
    groups = groups_of(plain, model)
    at_hand, _ = make_trainer(model, args, rows, groups, None, trl.SFTTrainer, tokenizer=tokenizer)
    expected = plain.evaluate(rows)["eval_loss"]
    assert at_hand["trainer"].evaluate(rows)["eval_loss"] == pytest.approx(expected, rel=1e-5)
