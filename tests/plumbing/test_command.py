"""Every flag of the three commands is run; models of other kinds go through all of gdrt.py."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
from conftest import json_lines, small_model

import attribution
import evaluate
import gdrt
from data import InputError, load_dataset, tiny_tokenizer

METHOD = {
    "loss": ["sft", "gdrt", "group-dro"],
    "relevance": "ablation",
    "groups": 3,
    "tau": 2.0,
    "prior": "share",
    "eta": 0.1,
    "warmup": 0.3,
    "domain": "book",
    "split": "time",
    "history": 4,
    "windows": 90,
    "lr": 0.001,
    "seed": 3,
    "rank_softmax": "full",
    "keep_seen": True,
}
REST = {
    "loss": ["gdrt"],
    "relevance": "probability",
    "train_softmax": "trie",
    "temperature": 0.7,
    "accumulate": 2,
    "no_pack": True,
    "no_test": True,
    "lora": 4,
}


def words(arguments):
    """{"no_pack": True, "seed": 3} -> ["--no-pack", "--seed", "3"]."""
    found = []
    for name, value in arguments.items():
        found.append(f"--{name.replace('_', '-')}")
        if value is not True:
            found += map(str, value if isinstance(value, list) else [value])
    return found


def unseen_flags(parser, *lines):
    """The flags of a parser that none of the lines uses."""
    flags = {action.option_strings[-1] for action in parser._actions if action.option_strings}
    return flags - {"--help"} - set().union(*lines)


@pytest.fixture(scope="module")
def runs(small, tmp_path_factory):
    """{name: (flags, folder)} of two runs; with those of `small`, nearly all flags are used."""
    out = tmp_path_factory.mktemp("runs")
    done = {}
    for name, arguments in (("method", METHOD), ("rest", REST)):
        places = {"out": out, "name": name, "cache": out / "cache"}
        flags = [*small, *words(arguments | places)]
        gdrt.main(flags)
        done[name] = (flags, out / name)
    return done


def test_help_names_a_default_of_zero():
    for flag in re.split(r"\n  (?=-)", gdrt.parser().format_help()):
        if flag.startswith(("--seed", "--lora")):
            assert "(default: 0)" in " ".join(flag.split())


def test_every_flag_is_run(runs):
    lines = [flags for flags, _ in runs.values()]
    elsewhere = {"--data-dir"}  # in test_data.py, on files of MovieLens' form; --resume is below
    assert unseen_flags(gdrt.parser(), *lines, ["--resume"]) == elsewhere


@pytest.mark.parametrize("name, wanted", [("method", METHOD), ("rest", REST)])
def test_a_run_says_what_it_was_given(runs, name, wanted):
    arguments = json.loads((runs[name][1] / "config.json").read_text())["arguments"]
    assert {key: arguments[key] for key in wanted} == wanted


def test_flags_do_what_they_say(runs):
    folder = runs["method"][1]
    lines = {loss: json_lines(folder / loss / "metrics.jsonl") for loss in METHOD["loss"]}
    shared = len(json_lines(folder / "warmup" / "metrics.jsonl"))
    assert shared == round(0.3 * (shared + len(lines["sft"])))
    assert {len(logged) for logged in lines.values()} == {len(lines["sft"])}
    for line in lines["gdrt"]:  # q_g is proportional to share_g exp(L_g / 2)
        weight = [n * math.exp(L / 2.0) for n, L in zip(line["n"], line["group_nll"])]
        assert len(weight) == 3
        assert line["q"] == pytest.approx([w / sum(weight) for w in weight], rel=1e-4)
    for line in lines["sft"]:
        assert line["q"] == pytest.approx([n / sum(line["n"]) for n in line["n"]])
    seen = json_lines(folder / "gdrt" / "predictions.jsonl")
    assert any(set(line["history"]) & set(line["titles"]) for line in seen)  # --keep-seen
    assert max(len(line["history"]) for line in seen) <= 2 * 4 - 1  # --history 4
    rest = json.loads((runs["rest"][1] / "gdrt" / "metrics.json").read_text())
    assert "valid" in rest and "test" not in rest and rest["audit"]["after"] is None
    for name, relevance, n_groups in (("method", "ablation", 3), ("rest", "probability", 4)):
        groups = json.loads((runs[name][1] / "groups.json").read_text())
        assert groups["relevance"] == relevance
        assert len(groups["shares"]) == n_groups


def test_resume_of_a_finished_run_prints_its_table_again(runs, capsys):
    flags, folder = runs["method"]
    before = (folder / "gdrt" / "metrics.json").read_text()
    gdrt.main([*flags, "--resume"])
    shown = capsys.readouterr().out
    for name in ("popularity", "before fine-tuning", "SFT", "GDRT", "group-dro"):
        assert name in shown
    after = (folder / "gdrt" / "metrics.json").read_text()
    assert json.loads(after)["test"] == json.loads(before)["test"]


def test_attribution_takes_every_flag(small, runs, tmp_path, capsys):
    folder = runs["method"][1] / "gdrt"
    line = json_lines(folder / "predictions.jsonl")[-1]
    page = tmp_path / "a.html"
    flags = f"--method gradient --steps 3 --html {page} --dataset {small[1]}"
    # Where the data is a folder, neither of these two is read.
    flags += f" --cache {tmp_path} --data-dir {tmp_path}"
    flags = [*flags.split(), "--user", line["user"], "--title", line["target"]]
    attribution.main([str(folder), *flags])
    assert line["target"] in capsys.readouterr().out and page.exists()
    assert not unseen_flags(attribution.parser(), flags)


@pytest.mark.parametrize("steps", ["0", "1000000"])
def test_attribution_refuses_paths_of_too_many_points(runs, steps):
    with pytest.raises(InputError, match=f"--steps {steps}: give a number from 1 to 4,096"):
        attribution.main([str(runs["method"][1] / "gdrt"), "--steps", steps])


def test_names_of_users_do_not_command_the_terminal(small):
    dataset = load_dataset(small[1])
    dataset.users[:] = [f"\x1b[31m{user}" for user in dataset.users]
    with pytest.raises(InputError) as error:
        attribution.choose_window(dataset, "nobody")
    assert "[31m" in str(error.value) and "\x1b" not in str(error.value)


def test_evaluate_takes_every_flag(runs, tmp_path, capsys):
    folder = runs["method"][1] / "gdrt"
    dataset = json.loads((folder.parent / "config.json").read_text())["arguments"]["dataset"]
    page = tmp_path / "r.html"
    lists = tmp_path / "lists.jsonl"
    lists.write_text("\n".join((folder / "predictions.jsonl").read_text().splitlines()[1:]) + "\n")
    theirs = f"--predictions {lists} --allow-missing"
    beside = f"{folder} {theirs} --report {page} --cache {tmp_path} --data-dir {tmp_path}".split()
    alone = f"--dataset {dataset} --split time --min-rating 3 --domain movies {theirs}".split()
    for flags in (beside, alone):
        evaluate.main(flags)
        assert "1 windows without a list, counted as misses" in capsys.readouterr().out
    assert page.exists()
    assert not unseen_flags(evaluate.parser(), beside, alone)


def test_data_that_moved_is_read_where_it_is_now(small, runs, tmp_path, capsys):
    """The run's config.json names a folder that is gone; --dataset says where its data is."""
    moved = tmp_path / "moved" / Path(small[1]).name
    shutil.copytree(small[1], moved)
    run = tmp_path / "run"
    shutil.copytree(runs["method"][1], run)
    config = json.loads((run / "config.json").read_text())
    assert Path(config["arguments"]["dataset"]).is_absolute()
    config["arguments"]["dataset"] = str(tmp_path / "gone")
    (run / "config.json").write_text(json.dumps(config))
    for main in (evaluate.main, attribution.main):
        with pytest.raises(InputError, match="gone"):
            main([str(run / "gdrt")])
    evaluate.main([str(run / "gdrt"), "--dataset", str(moved)])
    assert "metrics equal those that training wrote" in capsys.readouterr().out
    attribution.main([str(run / "gdrt"), "--dataset", str(moved)])
    assert "attribution by gradient" in capsys.readouterr().out
    for option in (["--split", "time"], ["--min-rating", "2"], ["--domain", "book"]):
        with pytest.raises(InputError, match="a RUN has its own"):
            evaluate.main([str(run / "gdrt"), *option])


@pytest.mark.parametrize("kind, tied", [("gpt2", True), ("llama", False), ("mamba", False)])
def test_other_models_from_a_folder(small, tmp_path, kind, tied, capsys):
    """Models with learned positions, untied heads or no attention run through the whole command."""
    tokenizer = tiny_tokenizer(load_dataset(small[1]))
    small_model(kind, len(tokenizer), tied).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    flags = f"--model {tmp_path}/model --out {tmp_path} --name run"
    flags += " --relevance ablation --loss gdrt --windows 24"
    gdrt.main([*small, *flags.split()])
    shown = capsys.readouterr()
    assert "GDRT" in shown.out and ("each runs by itself" in shown.err) == (kind == "mamba")
    evaluate.main([str(tmp_path / "run")])
    assert "metrics equal those that training wrote" in capsys.readouterr().out
