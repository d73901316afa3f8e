"""Runs that are killed or interrupted go on and end like one that was left alone.

Real processes, real signals.
"""

import json
import os
import random
import shlex
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import command, contents, start

import gdrt

LOSSES = ["--loss", "sft", "gdrt", "group-dro"]


def finish(argv, log, *before):
    """Run gdrt.py to its end in a process -> its exit code, minus the signal that ended it."""
    process = start(command, argv, log, *before)
    process.join(180)
    return process.exitcode


@pytest.fixture(scope="module")
def whole(small, tmp_path_factory):
    """(flags, folder of a run that was left alone, seconds it took)."""
    folder = tmp_path_factory.mktemp("whole")
    flags = [*small, *LOSSES]
    began = time.perf_counter()
    code = finish([*flags, "--out", str(folder), "--name", "run"], folder / "log")
    assert code == 0, (folder / "log").read_text()
    return flags, folder / "run", time.perf_counter() - began


def assert_same(folder, whole):
    """The two runs agree in every file but for times, from weights and optimizer to the lists."""
    found = contents(folder)
    expected = contents(whole)
    assert list(found) == list(expected)
    assert [path for path in expected if found[path] != expected[path]] == []


def test_the_run_holds_what_the_comparison_is_about(whole):
    _, folder, _ = whole
    files = contents(folder)
    for loss in "sft", "gdrt", "group-dro":
        for name in (
            "checkpoint.pt",
            "metrics.jsonl",
            "metrics.json",
            "predictions.jsonl",
            "model/model.safetensors",
        ):
            assert files[f"{loss}/{name}"]
    config = json.loads(files["gdrt/model/config.json"])
    assert config["attention_dropout"] > 0, "there is noise that resuming must repeat"
    warm = len(files["warmup/metrics.jsonl"])
    rest = len(files["gdrt/metrics.jsonl"])
    lines = files["warmup/metrics.jsonl"] + files["gdrt/metrics.jsonl"]
    assert [line["step"] for line in lines] == list(range(warm + rest))
    assert warm > 3 and rest > 3, "long enough to have checkpoints inside"


# ---------------------------------------------------------------- SIGKILL


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def die_in(module, name, number, match=""):
    """SIGKILL at the `number`th call of module.name, counted from 1.

    match: a text; calls without it in their arguments are not counted.
    """
    module = sys.modules[module]
    calls = []
    original = getattr(module, name)

    def deadly(*args, **more):
        calls.extend([1] if match in " ".join(map(str, args)) else [])
        if len(calls) == number:
            if name == "save":  # half a checkpoint
                args[1].write(b"PK\3\4 half")
                args[1].flush()
            die()
        return original(*args, **more)

    setattr(module, name, deadly)


MOMENTS = {  # in the order in which one run meets them
    "before config.json": ("gdrt", "write_atomic", 1, "config.json"),
    "in the first update": ("gdrt", "training_step", 1),
    "in the write of a checkpoint": ("torch", "save", 2),
    "in the relevance": ("gdrt", "relevance", 1),
    "in the first evaluation": ("gdrt", "evaluate_parts", 2),
    "before the rename of a checkpoint": ("os", "replace", 2, "checkpoint.pt"),
    "between two checkpoints": ("gdrt", "training_step", 4),
    "in the write of a model": ("os", "replace", 1, "/model"),
    "after the rename of a model": ("gdrt", "evaluate_parts", 1),
    "in the audit after training": ("gdrt", "audit", 1),
    "in the last loss": ("gdrt", "training_step", 15),
    "before the table": ("gdrt", "result_table", 1),
}


def test_a_run_killed_at_every_kind_of_moment_ends_alike(whole, tmp_path):
    """One run, killed and resumed again and again.

    Each process goes on where the one before was killed.
    """
    flags, folder, _ = whole
    flags = [*flags, "--out", str(tmp_path), "--name", "run"]
    for moment, where in MOMENTS.items():
        resume = ["--resume"] if (tmp_path / "run" / "config.json").exists() else []
        assert finish([*flags, *resume], tmp_path / "log", die_in, *where) == -signal.SIGKILL, (
            f"{moment}: {(tmp_path / 'log').read_text()}"
        )
    assert finish([*flags, "--resume"], tmp_path / "log") == 0, (tmp_path / "log").read_text()
    assert_same(tmp_path / "run", folder)


def kill_at_random(whole, tmp_path, seed):
    """Kill a run after a seeded share of its usual time, resume it and compare."""
    flags, folder, seconds = whole
    delay = random.Random(seed).uniform(0, seconds)
    for attempt in range(9):  # a suddenly faster machine finishes before the kill
        argv = [*flags, "--out", str(tmp_path), "--name", f"run{attempt}"]
        process = start(command, argv, tmp_path / "log")
        time.sleep(delay / 2**attempt)
        process.kill()
        process.join()
        if process.exitcode == -signal.SIGKILL:
            break
    else:
        pytest.fail("never killed in time")
    resume = ["--resume"] if (tmp_path / f"run{attempt}" / "config.json").exists() else []
    assert finish([*argv, *resume], tmp_path / "log") == 0, (tmp_path / "log").read_text()
    assert_same(tmp_path / f"run{attempt}", folder)


def test_a_run_killed_at_a_random_moment_ends_alike(whole, tmp_path):
    kill_at_random(whole, tmp_path, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 12))
def test_a_run_killed_at_more_random_moments_ends_alike(whole, tmp_path, seed):
    kill_at_random(whole, tmp_path, seed)


# ---------------------------------------------------------------- Ctrl-C


def press(name, number):
    """Ctrl-C at the `number`th call of gdrt.name, counted from 1."""
    original = getattr(gdrt, name)
    calls = []
    # A shell starts its background jobs with the signal ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def pressed(*args, **more):
        calls.append(1)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGINT)
        return original(*args, **more)

    setattr(gdrt, name, pressed)


@pytest.mark.parametrize("name, number", [("prepare", 1), ("training_step", 3), ("audit", 2)])
def test_ctrl_c_keeps_what_was_done_and_says_how_to_go_on(whole, tmp_path, name, number):
    flags, folder, _ = whole
    argv = [*flags, "--out", str(tmp_path / "a folder"), "--name", "run"]
    log = tmp_path / "log"
    assert finish(argv, log, press, name, number) == 130
    words = log.read_text().splitlines()[-1]
    assert words.startswith("interrupted; go on with: python gdrt.py --dataset")
    assert ("--resume" in words) == (name != "prepare"), "before config.json there is no run"
    assert "Traceback" not in log.read_text()
    if name == "training_step":  # --save-every is 2, so Ctrl-C wrote this checkpoint
        path = tmp_path / "a folder" / "run" / "warmup" / "checkpoint.pt"
        assert torch.load(path, weights_only=True)["step"] == 3
    assert finish(shlex.split(words.split("gdrt.py ")[1]), log) == 0, log.read_text()
    assert_same(tmp_path / "a folder" / "run", folder)


# ---------------------------------------------------------------- what --resume refuses

CHANGED = {
    "split": "time",
    "history": "5",
    "min_rating": "4",
    "windows": "50",
    "device": "auto",
    "precision": "bf16",
    "loss": "sft",
    "relevance": "ablation",
    "groups": "3",
    "tau": "2",
    "prior": "share",
    "eta": "0.1",
    "warmup": "0.4",
    "train_softmax": "trie",
    "temperature": "2",
    "epochs": "3",
    "batch": "9",
    "accumulate": "2",
    "lr": "0.01",
    "no_pack": None,
    "seed": "1",
    "rank_softmax": "full",
    "keep_seen": None,
    "no_test": None,
    "model": "tiny",
    "lora": "4",
    "dataset": "toy",
    "domain": "book",
}


def test_a_changed_argument_is_refused_by_its_name(whole, fails):
    flags, folder, _ = whole
    argv = [*flags, "--out", str(folder.parent), "--name", "run", "--resume"]
    names = vars(gdrt.parser().parse_args([]))
    before = contents(folder)
    assert set(CHANGED) == set(names) - set(gdrt.MAY_DIFFER), (
        "an argument that this test does not know"
    )
    for name, value in CHANGED.items():
        option = "--" + name.replace("_", "-")
        changed = [option, value] if value else [option]
        assert f"--resume: {option} is " in fails([*argv, *changed]), option
    assert contents(folder) == before


def test_changed_data_is_refused(whole, tmp_path, fails):
    flags, folder, _ = whole
    inter = next(iter(folder.parent.parent.glob("small*/films/small.inter")))
    text = inter.read_text()
    try:
        inter.write_text(text.rsplit("\n", 2)[0] + "\n")
        error = fails([*flags, "--out", folder.parent, "--name", "run", "--resume"])
    finally:
        inter.write_text(text)
    assert "the data of --dataset" in error and "has changed" in error


def test_the_same_folder_is_accepted_by_another_path(whole, tmp_path, monkeypatch):
    flags, folder, _ = whole
    before = contents(folder)
    films = Path(flags[flags.index("--dataset") + 1]).resolve()
    argv = [*flags, "--out", str(folder.parent), "--name", "run", "--resume"]
    link = tmp_path / "link"
    link.symlink_to(films)
    copied = tmp_path / "copied" / "books"  # the name would suggest another domain
    shutil.copytree(films, copied)
    monkeypatch.chdir(films.parent)
    for place in (films.name, link, copied):
        gdrt.main([*argv, "--dataset", str(place)])
    assert contents(folder) == before
    assert json.loads((folder / "config.json").read_text())["arguments"]["dataset"] == str(films)


@pytest.mark.parametrize("name", ["weights", "prompts", "device", "precision", "world size"])
def test_another_start_or_machine_is_refused(whole, fails, name):
    """Of a model, its tokeniser, or what `auto` stands for; config.json shows the old one."""
    flags, folder, _ = whole
    path = folder / "config.json"
    text = path.read_text()
    assert name in json.loads(text)
    try:
        path.write_text(json.dumps(json.loads(text) | {name: "other"}))
        error = fails([*flags, "--out", folder.parent, "--name", "run", "--resume"])
    finally:
        path.write_text(text)
    digests = f"the {name} that this run starts from have changed"
    assert (digests if name in ("weights", "prompts") else f"the {name} is") in error


def test_resume_needs_a_run_and_a_run_needs_resume(whole, tmp_path, fails):
    flags, folder, _ = whole
    error = fails([*flags, "--out", tmp_path, "--name", "run", "--resume"])
    assert "--resume: there is no run in" in error
    error = fails([*flags, "--out", folder.parent, "--name", "run"])
    assert "holds a run: add --resume" in error
    assert list(tmp_path.iterdir()) == []


def test_a_folder_whose_model_others_have_changed_is_kept(whole, tmp_path, fails):
    """--resume writes a model that is missing, and does not delete what it did not write."""
    flags, folder, _ = whole
    shutil.copytree(folder, tmp_path / "run")
    flags = [*flags, "--out", str(tmp_path), "--name", "run", "--resume"]
    model = tmp_path / "run" / "gdrt" / "model"
    own = contents(model)
    (model / "notes.json").write_text("{}")
    assert f"{model}: holds other files than were saved; move it away" in fails(flags)
    assert (model / "notes.json").exists()
    model.rename(tmp_path / "away")
    gdrt.main(flags)
    assert contents(model) == own


def test_resuming_a_finished_run_elsewhere_changes_nothing(whole, tmp_path, capsys):
    flags, folder, _ = whole
    before = contents(folder)
    folder.rename(tmp_path / "moved")
    try:
        moved = f"--out {tmp_path} --name moved --resume --save-every 7"
        gdrt.main([*flags, *moved.split()])
        assert contents(tmp_path / "moved") == before
    finally:
        (tmp_path / "moved").rename(folder)


# ---------------------------------------------------------------- one seed, one result


def test_one_seed_gives_one_result_and_another_seed_another(whole, tmp_path):
    flags, folder, _ = whole
    for name, seed in (("same", "0"), ("other", "1")):
        argv = [*flags, "--out", str(tmp_path), "--name", name, "--seed", seed]
        assert finish(argv, tmp_path / "log") == 0
    assert_same(tmp_path / "same", folder)
    other = contents(tmp_path / "other")
    expected = contents(folder)
    for path in (
        "groups.json",
        "gdrt/metrics.jsonl",
        "gdrt/model/model.safetensors",
        "gdrt/predictions.jsonl",
    ):
        assert other[path] != expected[path], f"{path} does not depend on the seed"


def test_config_records_what_a_result_depends_on(whole):
    config = json.loads((whole[1] / "config.json").read_text())
    assert config["machine"]["threads"] == 1  # `command` sets it
    assert config["versions"]["torch"] == torch.__version__
    assert config["arguments"]["seed"] == 0
    assert len(config["data"]) == 64
