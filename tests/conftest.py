"""Shared by all tests: the modules on the path, the marked suites, a small trained model."""

import multiprocessing
import os
import shutil
import socket
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
# A test that reaches for the Hub is marked network and unsets this.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:
    # Before torch is imported: one worker a core, one thread a worker.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

MARKED = {"slow": "minutes of CPU", "network": "needs PyPI", "gpu": "needs CUDA"}
TOY_WINDOWS = 800


def pytest_configure(config):
    for name, why in MARKED.items():
        config.addinivalue_line("markers", f"{name}: {why}")


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(config, items):
    """Marked tests run only when -m asks for them.

    Under xdist, a file's tests share a process, and so share what its fixtures have made.
    """
    for item in items:
        item.add_marker(pytest.mark.xdist_group(item.path.stem))
    if config.option.markexpr:
        return
    for item in items:
        for name in MARKED:
            if name in item.keywords:
                item.add_marker(pytest.mark.skip(reason=f"{MARKED[name]}: run with -m {name}"))


@pytest.fixture(scope="session")
def toy():
    """(dataset, model, tokenizer, prompts): the toy shop and a tiny model tuned on a part of it.

    One epoch over TOY_WINDOWS windows in small batches: enough for the model to use the user.
    """
    import torch

    import gdrt
    from data import build_trees, load_dataset, make_prompts, positions, start_model

    torch.manual_seed(0)
    dataset = load_dataset("toy")
    model, tokenizer = start_model("tiny", dataset)
    prompts = make_prompts(dataset, tokenizer, positions(model))
    trees = build_trees(prompts, gdrt.draw_windows(dataset.train, TOY_WINDOWS, 0))
    batches = gdrt.make_batches(trees, 16, 1, 0)
    span = 0, len(batches)
    one_group = torch.zeros(prompts.trie.path.shape, dtype=torch.long)
    cfg = gdrt.TrainConfig()
    gdrt.train(model, prompts, trees, batches, span, one_group, gdrt.sft_rule, 1, cfg)
    return dataset, model.eval(), tokenizer, prompts


# ---------------------------------------------------------------- plain references and small worlds


def prompt_of(prompts, window, skip=0):
    """Token ids of a window's prompt up to the response marker, its pieces put side by side.

    skip: how many of the oldest titles are left out.
    """
    ids = prompts.bos + prompts.task
    for item in window.items[window.start + skip : window.stop]:
        ids = ids + prompts.titles[item] + prompts.separator
    return ids + prompts.marker


def separate_logits(model, prompts, window, skip=0, title=None):
    """Logits (L, V) of a target's L tokens, EOS included.

    One prompt in one row, with the model's own mask and positions.
    """
    import torch

    prompt = prompt_of(prompts, window, skip)
    title = prompts.titles[window.items[window.stop]] if title is None else title
    return model(torch.tensor([prompt + title]), use_cache=False).logits[0, len(prompt) - 1 :]


def separate_nll(model, prompts, window, skip=0):
    """NLL (L,) of a target's tokens, EOS included."""
    import torch

    labels = torch.tensor(target_tokens(prompts, window))
    log_p = separate_logits(model, prompts, window, skip).log_softmax(-1)  # (L, V)
    return -log_p[torch.arange(len(labels)), labels]


def in_order(batch, values):
    """Values (N,) of a batch sorted by window and place, the order of the separate prompts."""
    order = sorted(range(len(values)), key=lambda n: (int(batch.window[n]), int(batch.place[n])))
    return values[order]


def target_tokens(prompts, window):
    """The token ids that a window's target is made of, EOS included."""
    return prompts.titles[window.items[window.stop]] + [prompts.eos]


def score(logits, labels, legal=None):
    """log p (L,) of a title's tokens from logits (L, V).

    Over the vocabulary, or over the continuations {prefix: tokens} where they are given.
    """
    import torch

    if legal is None:
        return logits.log_softmax(-1)[torch.arange(len(labels)), torch.tensor(labels)]
    found = []
    for j, (z, y) in enumerate(zip(logits, labels)):
        found.append(z[y] - z[legal[tuple(labels[:j])]].logsumexp(0))
    return torch.stack(found)


def continuations(prompts):
    """{prefix: tokens that follow it in some title}, EOS included."""
    legal = {}
    for title in prompts.titles:
        tokens = [*title, prompts.eos]
        for j, token in enumerate(tokens):
            legal.setdefault(tuple(tokens[:j]), set()).add(token)
    return {prefix: sorted(tokens) for prefix, tokens in legal.items()}


def random_windows(n_items, seed, users=2, length=12):
    """Windows of random histories.

    Each user has a random order of items, a random start, and some of the targets after it.
    """
    import numpy as np

    from data import Window

    random = np.random.default_rng(seed)
    windows = []
    for user in range(users):
        items = tuple(random.permutation(n_items)[:length].tolist())
        start = int(random.integers(0, 3))
        stops = sorted(random.choice(np.arange(start + 1, len(items)), 4, replace=False).tolist())
        windows += [Window(user, items, start, stop) for stop in stops]
    return windows


def random_prompts(
    seed=0, n=12, vocabulary=40, bos=True, longest=10**6, lengths=(1, 6), letters=30
):
    """Prompts of random pieces: token 0 is BOS and 1 EOS; the titles differ from one another.

    letters: how many different tokens the titles are made of.
    """
    import numpy as np

    from data import Prompts, build_trie

    random = np.random.default_rng(seed)

    def draw(low, high):
        return random.integers(2, 2 + letters, random.integers(low, high)).tolist()

    titles = []
    while len(titles) < n:
        title = draw(*lengths)
        if title not in titles:
            titles.append(title)
    return Prompts(
        [0] if bos else [],
        draw(3, 6),
        [vocabulary - 1],
        [vocabulary - 2, vocabulary - 1],
        titles,
        1,
        longest,
        build_trie([title + [1] for title in titles]),
    )


def small_model(
    kind="llama", vocabulary=40, tied=False, seed=0, scale=0.3, places=512, dropout=0.0
):
    """A random model in evaluation mode, its weights of size `scale`.

    Llama has rotary positions, GPT-2 learned ones, Mamba none.
    """
    import torch
    from transformers import (
        GPT2Config,
        GPT2LMHeadModel,
        LlamaConfig,
        LlamaForCausalLM,
        MambaConfig,
        MambaForCausalLM,
    )

    torch.manual_seed(seed)
    common = {
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
        "initializer_range": scale,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    if kind == "gpt2":
        shape = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": places}
        return GPT2LMHeadModel(GPT2Config(attn_pdrop=dropout, **shape, **common)).eval()
    if kind == "mamba":
        shape = {"hidden_size": 32, "state_size": 4, "num_hidden_layers": 1}
        return MambaForCausalLM(MambaConfig(**shape, **common)).eval()
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=places,
        attention_dropout=dropout,
        **common,
    )
    return LlamaForCausalLM(config).eval()


# ---------------------------------------------------------------- runs of the whole command


def write_folder(folder, users=24, items=14, seed=0):
    """RecBole files of random ratings: each user rates 9 to 12 films, or all if there are fewer."""
    import numpy as np

    random = np.random.default_rng(seed)
    kinds = ("Crime", "Comedy", "War")
    ratings = ["user_id:token\titem_id:token\trating:float\ttimestamp:float"]
    for user in range(users):
        for place, item in enumerate(random.permutation(items)[: random.integers(9, 13)]):
            ratings.append(f"{user}\t{item}\t{random.integers(3, 6)}\t{100 * user + place}")
    films = ["item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq"]
    for item in range(items):
        title = f"Film of {'abcdefghijklmnop'[item]}{item * 7}"
        films.append(f"{item}\t{title}\t{1950 + item}\t{kinds[item % 3]}")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "small.inter").write_text("\n".join(ratings) + "\n")
    (folder / "small.item").write_text("\n".join(films) + "\n")
    return folder


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """Flags of a run that takes a second: 24 users, 14 films, a random Llama of one layer.

    The model has dropout, so that a run depends on the random state, too.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from data import load_dataset, tiny_tokenizer

    folder = tmp_path_factory.mktemp("small")
    data = write_folder(folder / "films")
    model = folder / "model"
    tokenizer = tiny_tokenizer(load_dataset(str(data)))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        initializer_range=0.1,
        attention_dropout=0.1,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(model)
    tokenizer.save_pretrained(model)
    flags = "--min-rating 3 --batch 8 --epochs 2 --save-every 2 --precision fp32 --device cpu"
    return ["--dataset", str(data), "--model", str(model), *flags.split(), "--no-report"]


@pytest.fixture(scope="session")
def steady(small, tmp_path_factory):
    """The flags of `small` with a model that has no dropout.

    Packing, ranks and micro-batches change nothing for such a model.
    """
    source = Path(small[small.index("--model") + 1])
    model = tmp_path_factory.mktemp("steady") / "model"
    shutil.copytree(source, model)
    config = (source / "config.json").read_text()
    dropped = config.replace('"attention_dropout": 0.1', '"attention_dropout": 0.0')
    assert dropped != config
    (model / "config.json").write_text(dropped)
    return [*small, "--model", str(model)]


@pytest.fixture
def fails(capsys):
    """fails(flags) -> the one sentence with which gdrt.py ends, exit code 2."""
    import gdrt

    def run(flags):
        with pytest.raises(SystemExit) as end:
            gdrt.main([str(flag) for flag in flags])
        assert end.value.code == 2
        error = capsys.readouterr().err
        assert "Traceback" not in error
        return error.splitlines()[-1]

    return run


def json_lines(path):
    """What the lines of a .jsonl file hold."""
    import json

    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# Keys of what a clock or git says; all else is equal if the seed is.
OUTSIDE = {"seconds", "windows_per_s", "time", "commit"}


def reproducible(value):
    """A JSON value without what a clock or git says, at any depth."""
    if isinstance(value, dict):
        return {key: reproducible(inner) for key, inner in value.items() if key not in OUTSIDE}
    return [reproducible(inner) for inner in value] if isinstance(value, list) else value


def contents(folder):
    """{path: what it holds} of a run folder.

    Checkpoints with tensors as lists, JSON without times, and the bytes of all other files.
    """
    import json

    import torch

    def read(path):
        if path.suffix == ".pt":
            return flat(torch.load(path, weights_only=True))
        if path.suffix == ".jsonl":
            return reproducible(json_lines(path))
        if path.suffix == ".json" and path.parent.name != "model":
            return reproducible(json.loads(path.read_text()))
        return path.read_bytes()

    def flat(value):
        if isinstance(value, dict):
            return {str(key): flat(inner) for key, inner in value.items()}
        if isinstance(value, (list, tuple)):
            return [flat(inner) for inner in value]
        return value.tolist() if isinstance(value, torch.Tensor) else value

    return {
        str(path.relative_to(folder)): read(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# ---------------------------------------------------------------- real processes

# The fork server imports torch once, so that a new process takes milliseconds.
processes = multiprocessing.get_context("forkserver")


def start(function, *args):
    """A process of its own that calls function(*args)."""
    processes.set_forkserver_preload(["gdrt"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))  # for the preload
        process = processes.Process(target=function, args=args)
        process.start()
    return process


def command(argv, log, before=None, *args):
    """For `start`: gdrt.py with these flags on one thread, its output in the file `log`.

    before(*args) is called first.
    """
    import torch

    import gdrt

    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open(log, "w", buffering=1)
    if before:
        before(*args)
    gdrt.main(argv)


def as_rank(rank, ranks, port, function, *args):
    """For `start`: function(*args) as this rank of `ranks`."""
    import torch

    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    function(*args)


def on_ranks(ranks, function, args_of_rank):
    """function(*args_of_rank(rank)) on every rank -> exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = [
        start(as_rank, rank, ranks, port, function, *args_of_rank(rank)) for rank in range(ranks)
    ]
    for process in started:
        process.join(180)
    hung = [rank for rank, process in enumerate(started) if process.is_alive()]
    for process in started:
        process.kill()
    assert not hung, f"ranks {hung} hang"
    return [process.exitcode for process in started]
