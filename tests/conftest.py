"""Shared by all tests: the repository's modules on the path, the marked suites, a small trained model."""
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that reaches for the Hub is marked network and unsets this

MARKED = {"slow": "minutes of CPU", "network": "needs PyPI", "gpu": "needs CUDA"}


def pytest_configure(config):
    for name, why in MARKED.items():
        config.addinivalue_line("markers", f"{name}: {why}")


def pytest_collection_modifyitems(config, items):
    """Marked tests run only when -m asks for them."""
    if config.option.markexpr:
        return
    for item in items:
        for name in MARKED:
            if name in item.keywords:
                item.add_marker(pytest.mark.skip(reason=f"{MARKED[name]}: run with -m {name}"))


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """(dataset, model, tokenizer, prompts): toy data and the tiny model, trained on it for an epoch."""
    import torch

    import gdrt
    from data import build_trees, load_dataset, make_prompts, positions
    torch.manual_seed(0)
    dataset = load_dataset("toy")
    model, tokenizer = gdrt.pretrain_tiny(dataset, gdrt.Job())
    prompts = make_prompts(dataset, tokenizer, positions(model))
    trees = build_trees(prompts, dataset.train)
    updates = gdrt.plan(trees, 128, 2, 0)
    table = torch.zeros(prompts.trie.path.shape, dtype=torch.long)
    gdrt.train(model, prompts, trees, updates, (0, len(updates)), table, gdrt.sft, 1, gdrt.Job())
    return dataset, model.eval(), tokenizer, prompts
