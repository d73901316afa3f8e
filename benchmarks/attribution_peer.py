"""Our attributions against captum's and against plain backwards: the same figures, sooner.

    pip install -r benchmarks/requirements.txt
    python benchmarks/attribution_peer.py [RUN]          into results/attribution_peer.json; exit code 1 where they disagree

Same model, prompts and baselines (the mean embedding) on all sides, fp32. captum's LLMAttribution replaces tokens by a
token, so its copy of the model has one more, whose embedding is the mean; it cannot touch the title's prefix, so the
auxiliary segment, which holds the prefix, is compared with captum's FeatureAblation over the embeddings.
"""

import argparse
import copy
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

AGREE, FASTER = 1e-4, 20  # nats; times


# ------------------------------------------------------------------------------------------------ captum


def with_mean_token(model):
    """(copy of the model with one more input token, whose embedding is the mean of the others; that token's id)."""
    longer, weight = copy.deepcopy(model), model.get_input_embeddings().weight.detach()
    head = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    head.weight = torch.nn.Parameter(
        model.get_output_embeddings().weight.detach()
    )  # untied: the head keeps its V outputs
    longer.set_input_embeddings(
        torch.nn.Embedding.from_pretrained(torch.cat([weight, weight.mean(0, keepdim=True)]))
    )
    longer.set_output_embeddings(head)
    return longer, len(weight)


def numbers(size):
    """A tokeniser whose text is the token ids, '17 4 256': our prompts are pieces encoded one by one, no text gives them back."""
    tokenizer = Tokenizer(WordLevel({str(i): i for i in range(size)}, unk_token="0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def llm_attribution(model, ids, mean, tree, **options):
    """LLMAttribution of one prompt -> {segment: (N,)}: each target token to the template's tokens and to the user's, as one feature each."""
    from captum.attr import FeatureAblation, LLMAttribution, TextTokenInput

    prompt = int(tree.predict_at[0]) + 1  # the tokens before the title
    given = TextTokenInput(" ".join(map(str, tree.ids[:prompt])), ids, baselines=mean)
    features = torch.tensor(tree.segment[:prompt])[None]
    done = LLMAttribution(FeatureAblation(model), ids).attribute(
        given, torch.tensor(tree.label), feature_mask=features, **options
    )
    return {
        segment: done.token_attr[:, (features[0] == segment).nonzero()[0, 0]]
        for segment in (TEMPLATE, USER)
    }


def embedding_ablation(model, tree):
    """FeatureAblation over the embeddings of one prompt and its title -> {segment tuple: (N,)}."""
    from captum.attr import FeatureAblation

    one = collate([tree])
    E = model.get_input_embeddings()(one.ids)  # (1, T, D)

    def log_prob(embeds):  # (1, T, D) -> (1, N)
        logits = model(inputs_embeds=embeds, use_cache=False).logits[:, one.predict_at]
        return logits.log_softmax(-1).gather(-1, one.label[None, :, None])[..., 0]

    feature = torch.tensor([{BOS: 0, USER: 1}.get(int(s), 2) for s in tree.segment])[
        None, :, None
    ].expand_as(E)
    baseline = model.get_input_embeddings().weight.mean(0).expand_as(E)
    found = FeatureAblation(log_prob).attribute(
        E, baselines=baseline, feature_mask=feature
    )  # (N, T, D)
    return {
        kinds: found[:, int(np.isin(tree.segment, kinds).argmax()), 0]
        for kinds in (AUXILIARY, (USER,))
    }


# ------------------------------------------------------------------------------------------------ ours, whole batches at once


def prompt_by_prompt(model, prompts, windows, measure):
    """measure(model, batch) over packed trees -> (n windows) list of (N,) tensors."""
    trees, found = build_trees(prompts, windows), [None] * len(windows)
    with forward_mode(model):
        for indices in by_length(trees):
            batch = collate([trees[i] for i in indices])
            values = measure(model, batch)
            for i in batch.window.unique().tolist():
                found[i] = values[batch.window == i]
    return found


def compare(model, prompts, windows):
    """-> (differences: {what: nats}, seconds a prompt: {who: s}). Ours measures both segments of all prompts; peers prompt by prompt."""
    single, (longer, mean) = build_trees(prompts, windows, pack=False), with_mean_token(model)
    ids = numbers(mean + 1)
    segments = AUXILIARY, (USER,), (TEMPLATE,)
    measures = {
        "ablation": lambda model, batch: (
            ablations(model, batch, segments[:2])[0].T
        ),  # (N, 2): what an audit needs
        "template": lambda model, batch: ablations(model, batch, segments[2:])[0].T,
        "gradient": lambda model, batch: segment_gradient(model, batch, (USER,), points=1),
    }
    ours, seconds = {}, {}
    for name, measure in measures.items():
        prompt_by_prompt(model, prompts, windows, measure)  # warms up
        seconds[name], ours[name] = speed.seconds_of(
            prompt_by_prompt, model, prompts, windows, measure
        )
    ablated = {
        kinds: [values[:, i] for values in ours["ablation"]] for i, kinds in enumerate(segments[:2])
    }
    ablated[TEMPLATE,] = [values[:, 0] for values in ours["template"]]
    # its default of cached outputs breaks with transformers 5.24: it passes a cache_position that no model reads any more
    peers = {
        "LLMAttribution": lambda tree: llm_attribution(
            longer, ids, mean, tree, use_cached_outputs=False
        ),
        "LLMAttribution, whole title at once": lambda tree: llm_attribution(
            longer, ids, mean, tree, forward_in_tokens=False
        ),
        "FeatureAblation": lambda tree: embedding_ablation(model, tree),
    }
    times, differences = {}, {}
    for name, peer in peers.items():
        peer(single[0])
        times[name], found = speed.seconds_of(lambda: [peer(tree) for tree in single])
        for kinds in found[0]:
            mine = ablated[kinds if isinstance(kinds, tuple) else (kinds,)]
            words = {TEMPLATE: "template", USER: "user", (USER,): "user", AUXILIARY: "auxiliary"}[
                kinds
            ]
            differences[f"{name}, {words}"] = max(
                float((a - b[kinds]).abs().max()) for a, b in zip(mine, found)
            )
    speed.token_backwards(model, prompts, windows[:1])
    times["backward per token"], _ = speed.seconds_of(
        speed.token_backwards, model, prompts, windows
    )
    exact, some = (
        copy.deepcopy(model).double(),
        windows[:20],
    )  # in fp32 the peer's own rounding is 1e-4
    found = speed.token_backwards(exact, prompts, some)
    differences["backward per token, user, float64"] = float(
        (torch.cat(prompt_by_prompt(exact, prompts, some, measures["gradient"])) - found)
        .abs()
        .max()
    )
    times |= {"ours, ablation": seconds["ablation"], "ours, gradient": seconds["gradient"]}
    return differences, {name: s / len(windows) for name, s in times.items()}


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    p.add_argument(
        "run",
        nargs="?",
        help=f"a finished loss folder, such as runs/ml-100k-tiny-seed0/gdrt (default: a model trained here "
        f"for {speed.MINUTE} s)",
    )
    p.add_argument(
        "--prompts",
        type=int,
        default=200,
        help="ml-100k training windows, whole trees of them (default: 200)",
    )
    p.add_argument("--threads", type=int, help="of PyTorch, for all sides (default: PyTorch's own)")
    p.add_argument("--out", default=ROOT / "results" / "attribution_peer.json", metavar="FILE")
    args = p.parse_args(argv)
    try:
        import captum
    except ImportError:
        raise InputError("captum is missing; pip install -r benchmarks/requirements.txt") from None
    if args.threads:
        torch.set_num_threads(args.threads)
    model, _, prompts = speed.trained("ml-100k", args.run)
    windows = gdrt.draw_windows(speed.dataset_of("ml-100k").train, args.prompts, 0)
    differences, times = compare(model.requires_grad_(False), prompts, windows)
    ratio, least = (
        times[name] / times["ours, ablation"]
        for name in ("LLMAttribution", "LLMAttribution, whole title at once")
    )
    machine = gdrt.environment()
    machine["versions"]["captum"] = captum.__version__
    write_atomic(
        args.out,
        json.dumps(
            {
                "prompts": len(windows),
                "largest difference, nats": differences,
                "s a prompt": times,
                "ratio": ratio,
                "ratio to its fastest setting": least,
                "processor": speed.processor(),
                **machine,
            },
            indent=1,
        )
        + "\n",
    )
    print(
        format_table(
            ("against ours", "largest difference, nats"),
            [(k, f"{v:.1e}") for k, v in differences.items()],
        )
    )
    print(
        format_table(
            ("all target tokens of a prompt", "ms"),
            [(k, f"{1000 * v:.2f}") for k, v in times.items()],
        )
    )
    print(
        f"ours is {ratio:.1f} times as fast as LLMAttribution token by token (goal: {FASTER}), {least:.1f} times as fast as with forward_in_tokens=False"
    )
    if max(differences.values()) > AGREE:
        sys.exit(1)


if __name__ == "__main__":
    run_command(main)
