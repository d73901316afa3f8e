"""Our attributions against captum's and against plain backwards: the same figures, faster.

    pip install -r benchmarks/requirements.txt
    python benchmarks/attribution_peer.py [RUN]     into results/attribution_peer.json;
                                                    exit code 1 where they disagree

All sides have the same model, prompts and baselines (the mean embedding), in fp32, but for the
values of the backwards, which are compared in float64. captum's LLMAttribution replaces tokens by a
token, so its copy of the model has one more, whose embedding is the mean. It cannot touch the
title's prefix, so the auxiliary segment, which holds the prefix, is compared with captum's
FeatureAblation over the embeddings.
"""

import argparse
import copy
import functools
import json
import sys
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import speed

import gdrt
from attribution import AUXILIARY, ablations, format_table, forward_mode, segment_gradient
from data import (
    BOS,
    TEMPLATE,
    USER,
    InputError,
    build_trees,
    by_length,
    collate,
    run_command,
    write_atomic,
)

AGREE = 1e-4  # nats
FASTER = 20  # times


# ---------------------------------------------------------------- captum


def with_mean_token(model):
    """(copy of the model with one more input token, that token's id).

    Its embedding is the mean of the others.
    """
    longer = copy.deepcopy(model)
    weight = model.get_input_embeddings().weight.detach()  # (V, D)
    # Untied: the head keeps its V outputs.
    head = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    head.weight = torch.nn.Parameter(model.get_output_embeddings().weight.detach())
    rows = torch.cat([weight, weight.mean(0, keepdim=True)])  # (V + 1, D)
    longer.set_input_embeddings(torch.nn.Embedding.from_pretrained(rows))
    longer.set_output_embeddings(head)
    return longer, len(weight)


def numbers(size):
    """A tokeniser whose text is the token ids, '17 4 256'.

    Our prompts are encoded piece by piece, so there may be no text with their ids.
    """
    tokenizer = Tokenizer(WordLevel({str(i): i for i in range(size)}, unk_token="0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def llm_attribution(model, ids, mean, tree, **options):
    """LLMAttribution of one prompt -> {segment: (N,)}.

    Each target token is attributed to the template's tokens and to the user's, as one feature each.
    """
    from captum.attr import FeatureAblation, LLMAttribution, TextTokenInput

    prompt = int(tree.predict_at[0]) + 1  # the tokens before the title
    given = TextTokenInput(" ".join(map(str, tree.ids[:prompt])), ids, baselines=mean)
    features = torch.tensor(tree.segment[:prompt])[None]
    attribution = LLMAttribution(FeatureAblation(model), ids)
    target = torch.tensor(tree.label)
    done = attribution.attribute(given, target, feature_mask=features, **options)
    found = {}
    for segment in (TEMPLATE, USER):
        first = (features[0] == segment).nonzero()[0, 0]
        found[segment] = done.token_attr[:, first]
    return found


def embedding_ablation(model, tree):
    """FeatureAblation over the embeddings of one prompt and its title -> {segment tuple: (N,)}."""
    from captum.attr import FeatureAblation

    one = collate([tree])
    embedding = model.get_input_embeddings()
    E = embedding(one.ids)  # (1, T, D)

    def log_prob(embeds):  # (1, T, D) -> (1, N)
        logits = model(inputs_embeds=embeds, use_cache=False).logits[:, one.predict_at]
        return logits.log_softmax(-1).gather(-1, one.label[None, :, None])[..., 0]

    feature = torch.tensor([{BOS: 0, USER: 1}.get(int(s), 2) for s in tree.segment])  # (T,)
    options = {
        "baselines": embedding.weight.mean(0).expand_as(E),
        "feature_mask": feature[None, :, None].expand_as(E),
    }
    found = FeatureAblation(log_prob).attribute(E, **options)  # (N, T, D)
    first = {kinds: int(np.isin(tree.segment, kinds).argmax()) for kinds in (AUXILIARY, (USER,))}
    return {kinds: found[:, token, 0] for kinds, token in first.items()}


# ---------------------------------------------------------------- ours, whole batches at once


def prompt_by_prompt(model, prompts, windows, measure):
    """measure(model, batch) over packed trees -> (n windows) list of (N,) tensors."""
    trees = build_trees(prompts, windows)
    found = [None] * len(windows)
    with forward_mode(model):
        for indices in by_length(trees):
            batch = collate([trees[i] for i in indices])
            values = measure(model, batch)
            for i in batch.window.unique().tolist():
                found[i] = values[batch.window == i]
    return found


MEASURES = {  # ours; an audit needs the ablation of both segments, made at once
    "ablation": lambda model, batch: ablations(model, batch, (AUXILIARY, (USER,)))[0].T,  # (N, 2)
    "template": lambda model, batch: ablations(model, batch, ((TEMPLATE,),))[0].T,  # (N, 1)
    "gradient": lambda model, batch: segment_gradient(model, batch, (USER,), points=1),  # (N,)
}


def measure_ours(model, prompts, windows):
    """({name of MEASURES: values by window}, {name: seconds}), over all prompts at once."""
    found = {}
    seconds = {}
    for name, measure in MEASURES.items():
        work = (prompt_by_prompt, model, prompts, windows, measure)
        speed.seconds_of(*work)  # warms up
        seconds[name], found[name] = speed.seconds_of(*work)
    return found, seconds


def captum_peers(model):
    """{name: function of a tree -> {segment, or tuple of segments: (N,)}}."""
    longer, mean = with_mean_token(model)
    ids = numbers(mean + 1)
    given = functools.partial(llm_attribution, longer, ids, mean)
    # LLMAttribution caches outputs by default, which breaks with transformers 5.24: it passes a
    # cache_position that no model reads any more.
    return {
        "LLMAttribution": functools.partial(given, use_cached_outputs=False),
        "LLMAttribution, whole title at once": functools.partial(given, forward_in_tokens=False),
        "FeatureAblation": functools.partial(embedding_ablation, model),
    }


def largest(ours, theirs):
    """The largest absolute difference between two lists of tensors."""
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs))


def compare_ablations(model, trees, ours):
    """({what: largest difference in nats}, {peer: seconds}) of captum's and our ablations."""
    auxiliary, user = zip(*(values.unbind(1) for values in ours["ablation"]))
    (template,) = zip(*(values.unbind(1) for values in ours["template"]))
    mine = {AUXILIARY: auxiliary, (USER,): user, USER: user, TEMPLATE: template}
    words = {AUXILIARY: "auxiliary", (USER,): "user", USER: "user", TEMPLATE: "template"}
    differences = {}
    times = {}
    for name, peer in captum_peers(model).items():
        peer(trees[0])  # warms up
        times[name], found = speed.seconds_of(lambda: [peer(tree) for tree in trees])
        for kinds in found[0]:
            theirs = [values[kinds] for values in found]
            differences[f"{name}, {words[kinds]}"] = largest(mine[kinds], theirs)
    return differences, times


def compare(model, prompts, windows):
    """({what: largest difference in nats}, {who: seconds a prompt}).

    Ours measures both segments of all prompts at once; the peers go prompt by prompt.
    """
    ours, seconds = measure_ours(model, prompts, windows)
    single = build_trees(prompts, windows, pack=False)
    differences, times = compare_ablations(model, single, ours)
    speed.token_backwards(model, prompts, windows[:1])  # warms up
    backwards = (speed.token_backwards, model, prompts, windows)
    times["backward per token"], _ = speed.seconds_of(*backwards)
    exact = copy.deepcopy(model).double()  # in fp32 the peer's own rounding is 1e-4
    some = windows[:20]
    mine = torch.cat(prompt_by_prompt(exact, prompts, some, MEASURES["gradient"]))
    theirs = speed.token_backwards(exact, prompts, some)
    differences["backward per token, user, float64"] = largest([mine], [theirs])
    times |= {"ours, ablation": seconds["ablation"], "ours, gradient": seconds["gradient"]}
    return differences, {name: s / len(windows) for name, s in times.items()}


# ---------------------------------------------------------------- the command


def parser():
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    run = (
        "a finished loss folder, such as runs/ml-100k-tiny-seed0/gdrt "
        f"(default: a model trained here for {speed.MINUTE} s)"
    )
    p.add_argument("run", nargs="?", help=run)
    prompts = "ml-100k training windows, whole trees of them (default: 200)"
    p.add_argument("--prompts", type=int, default=200, help=prompts)
    threads = "of PyTorch, for all sides (default: PyTorch's own)"
    p.add_argument("--threads", type=int, help=threads)
    p.add_argument("--out", default=ROOT / "results" / "attribution_peer.json", metavar="FILE")
    return p


def print_comparison(differences, times, ratio, least):
    rows = [(what, f"{nats:.1e}") for what, nats in differences.items()]
    print(format_table(("against ours", "largest difference, nats"), rows))
    rows = [(who, f"{1000 * s:.2f}") for who, s in times.items()]
    print(format_table(("all target tokens of a prompt", "ms"), rows))
    print(
        f"ours is {ratio:.1f} times as fast as LLMAttribution token by token (goal: {FASTER}), "
        f"{least:.1f} times as fast as with forward_in_tokens=False"
    )


def main(argv=None):
    args = parser().parse_args(argv)
    try:
        import captum
    except ImportError:
        raise InputError("captum is missing; pip install -r benchmarks/requirements.txt") from None
    if args.threads:
        torch.set_num_threads(args.threads)
    model, _, prompts = speed.trained("ml-100k", args.run)
    windows = gdrt.draw_windows(speed.dataset_of("ml-100k").train, args.prompts, 0)
    differences, times = compare(model.requires_grad_(False), prompts, windows)
    ratio = times["LLMAttribution"] / times["ours, ablation"]
    least = times["LLMAttribution, whole title at once"] / times["ours, ablation"]
    machine = gdrt.environment()
    machine["versions"]["captum"] = captum.__version__
    result = {
        "prompts": len(windows),
        "largest difference, nats": differences,
        "s a prompt": times,
        "ratio": ratio,
        "ratio to its fastest setting": least,
        "processor": speed.processor(),
        **machine,
    }
    write_atomic(args.out, json.dumps(result, indent=1) + "\n")
    print_comparison(differences, times, ratio, least)
    if max(differences.values()) > AGREE:
        sys.exit(1)


if __name__ == "__main__":
    run_command(main)
