"""What goes wrong ends in one sentence and exit code 2, and nothing that was written is lost."""

import ast
import contextlib
import json
import os
import pickle
import re
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, contents, json_lines, write_folder

import data
import gdrt
from data import InputError

LINUX = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="/dev/full is Linux's")


@pytest.fixture(scope="module")
def whole(small, tmp_path_factory):
    """(flags, contents of a run that nothing happened to)."""
    folder = tmp_path_factory.mktemp("whole")
    flags = [*small, "--loss", "gdrt"]
    gdrt.main([*flags, "--out", str(folder), "--name", "run"])
    return flags, contents(folder / "run")


# ---------------------------------------------------------------- the disk is full


@contextlib.contextmanager
def full_disk(module, part):
    """A real ENOSPC for all that `module` writes to files with `part` in their names."""

    def opener(path, mode="r", **more):
        return open("/dev/full" if part in str(path) and mode[0] in "wa" else path, mode, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "open", opener, raising=False)
        yield


@LINUX
@pytest.mark.parametrize(
    "module, part",
    [
        (gdrt, "metrics.jsonl"),
        (data, "metrics.jsonl"),
        (data, "checkpoint.pt"),
        (data, "groups.json"),
        (data, "predictions.jsonl"),
        (data, "evaluation.json"),
        (data, "metrics.json"),
        (data, "config.json"),
    ],
)
def test_a_full_disk_costs_nothing_that_was_there(whole, tmp_path, fails, module, part):
    flags, expected = whole
    flags = [*flags, "--out", str(tmp_path), "--name", "run"]
    # /dev/full takes no fsync either, which is all that an empty log asks of it.
    advice = "what was written before is whole: mend it and add --resume"
    if part == "config.json":  # the first file of a run
        advice = "choose another --out or --name"
    with full_disk(module, part):
        assert re.search(f"(No space left on device|Invalid argument); {advice}", fails(flags))
    gdrt.main([*flags, *(["--resume"] if (tmp_path / "run" / "config.json").exists() else [])])
    assert contents(tmp_path / "run") == expected


def test_a_full_disk_in_the_third_checkpoint_leaves_the_second(whole, tmp_path, fails, monkeypatch):
    flags, expected = whole
    flags = [*flags, "--out", str(tmp_path), "--name", "run"]
    saves = []
    save = torch.save

    def half(state, file):
        saves.append(state["step"])
        if len(saves) == 3:
            file.write(b"PK half")
            raise OSError(28, "No space left on device")
        save(state, file)

    monkeypatch.setattr(torch, "save", half)
    assert "No space left" in fails(flags)
    monkeypatch.undo()
    kept = torch.load(tmp_path / "run" / "warmup" / "checkpoint.pt", weights_only=True)
    assert kept["step"] == saves[1]
    assert not list(tmp_path.rglob(".*")), "half a file is left"
    gdrt.main([*flags, "--resume"])
    assert contents(tmp_path / "run") == expected


@contextlib.contextmanager
def small_files(size):
    """No file can grow beyond `size` bytes, whether Python, torch or safetensors writes it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_limit_on_file_size_costs_nothing_that_was_there(whole, tmp_path, fails):
    """Unlike /dev/full above, this also reaches writers that do not use Python's `open`."""
    flags, expected = whole
    flags = [*flags, "--out", str(tmp_path), "--name", "run"]
    with small_files(60_000):  # smaller than a checkpoint
        assert "File too large" in fails(flags)
    assert not list(tmp_path.rglob("*.pt"))
    gdrt.main([*flags, "--resume"])
    assert contents(tmp_path / "run") == expected


# ---------------------------------------------------------------- damaged runs


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


def change(path, **entries):
    """Give a checkpoint other entries."""
    torch.save(torch.load(path, weights_only=True) | entries, path)


def cut(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


DAMAGE = {
    "another format": lambda path: change(path, format=99),
    "cut": cut,
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("hello\n"),
    "a list": lambda path: torch.save([1], path),
    "another model": lambda path: change(path, model={}),
    "code": lambda path: path.write_bytes(pickle.dumps(Evil())),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_checkpoint_is_refused_and_left_alone(whole, tmp_path, fails, how, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags, expected = whole
    flags = [*flags, "--out", str(tmp_path), "--name", "run"]
    gdrt.main(flags)
    path = tmp_path / "run" / "gdrt" / "checkpoint.pt"
    DAMAGE[how](path)
    damaged = path.read_bytes()
    error = fails([*flags, "--resume"])
    other_format = "checkpoint format 99 where 3 belongs"
    assert (other_format if how == "another format" else "not a checkpoint of this run") in error
    assert str(path) in error
    assert path.read_bytes() == damaged
    assert not Path("evil").exists()
    path.unlink()  # as the sentence says
    gdrt.main([*flags, "--resume"])
    assert contents(tmp_path / "run") == expected


@pytest.mark.parametrize(
    "name", ["config.json", "groups.json", "gdrt/metrics.json", "before/evaluation.json"]
)
def test_damaged_json_of_a_run_is_named(whole, tmp_path, fails, name):
    flags, _ = whole
    flags = [*flags, "--out", str(tmp_path), "--name", "run"]
    gdrt.main(flags)
    path = tmp_path / "run" / name
    path.write_text(path.read_text()[:50])
    if name == "gdrt/metrics.json":  # derived from the others, so it is rebuilt
        gdrt.main([*flags, "--resume"])
        assert json.loads(path.read_text())["test"]
    else:
        assert f"{path}: not whole JSON" in fails([*flags, "--resume"])
        path.write_text("{}")
        assert f"{path}: not by gdrt.py" in fails([*flags, "--resume"])


def test_a_damaged_log_of_updates_is_named(whole, tmp_path, fails):
    flags = [*whole[0], "--out", str(tmp_path), "--name", "run"]
    gdrt.main(flags)
    path = tmp_path / "run" / "gdrt" / "metrics.jsonl"
    for text in "{}\n", "garbage\n", path.read_text().split("\n", 1)[1], "":
        path.write_text(text)
        assert "metrics.jsonl: not as gdrt.py wrote it" in fails([*flags, "--resume"])


# ---------------------------------------------------------------- other people's files


def test_a_folder_with_files_but_no_config_is_left_alone(whole, tmp_path, fails):
    """Neither are its files lost nor is what lies there taken for a part of the new run."""
    model = tmp_path / "run" / "gdrt" / "model"
    model.mkdir(parents=True)
    (model / "thesis.txt").write_text("precious")
    error = fails([*whole[0], "--out", tmp_path, "--name", "run"])
    assert "run holds files but no config.json; choose another --name" in error
    assert [path.name for path in tmp_path.rglob("*.*")] == ["thesis.txt"]


def test_resume_removes_half_written_files_and_no_others(whole, tmp_path):
    flags = [*whole[0], "--out", str(tmp_path), "--name", "run"]
    gdrt.main(flags)
    run = tmp_path / "run"
    (run / ".notes.2024-01.md").write_text("mine")
    (run / ".venv3.11").mkdir()
    (run / ".config.json.123.part").write_text("{")
    (run / "gdrt" / ".model.123.part").mkdir()
    gdrt.main([*flags, "--resume"])
    assert {path.name for path in run.rglob(".*")} == {".notes.2024-01.md", ".venv3.11"}


def test_of_two_runs_that_start_in_one_folder_the_second_is_refused(
    whole, tmp_path, fails, monkeypatch
):
    original = gdrt.prepare

    def prepare(*args):
        data.write_atomic(tmp_path / "run" / "config.json", "{}")  # the other was faster
        return original(*args)

    monkeypatch.setattr(gdrt, "prepare", prepare)
    error = fails([*whole[0], "--out", tmp_path, "--name", "run"])
    assert "holds a run that has just begun; choose another --name" in error
    assert (tmp_path / "run" / "config.json").read_text() == "{}"


def test_a_name_that_is_not_utf8_is_said_before_anything_is_trained(small, tmp_path, fails):
    for flag in "--name", "--dataset":
        error = fails([*small, "--out", tmp_path, flag, "caf\udce9"])
        assert f"{flag} 'caf\\udce9': not UTF-8" in error
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- training that fails


def test_nan_stops_with_step_and_batch_and_keeps_the_last_checkpoint(
    whole, tmp_path, fails, monkeypatch
):
    flags, expected = whole
    flags = [*flags, "--out", str(tmp_path), "--name", "run"]
    calls = []
    original = gdrt.token_nll

    def token_nll(*args):
        calls.append(1)
        return original(*args) * (float("nan") if len(calls) == 6 else 1)

    monkeypatch.setattr(gdrt, "token_nll", token_nll)
    sentence = r"update 5: loss nan with gradient norm nan on the batch of trees \d+, .*; "
    sentence += "the last checkpoint is kept; lower --lr"
    assert re.search(sentence, fails(flags))
    monkeypatch.undo()
    state = torch.load(tmp_path / "run" / "warmup" / "checkpoint.pt", weights_only=True)
    assert state["step"] in (4, 5)
    assert all(torch.isfinite(weight).all() for weight in state["model"].values())
    gdrt.main([*flags, "--resume"])
    assert contents(tmp_path / "run") == expected


def test_a_learning_rate_that_diverges_is_said(whole, tmp_path, fails):
    flags, _ = whole
    assert "lower --lr" in fails([*flags, "--out", tmp_path, "--lr", "1e30"])


def test_weights_that_the_last_update_of_a_stage_wrecks_are_not_kept(
    whole, tmp_path, fails, monkeypatch
):
    """No later loss would show it."""
    original = gdrt.save_checkpoint
    monkeypatch.setattr(gdrt, "save_checkpoint", lambda *args: saved.append(original(*args)))
    saved = []
    step = gdrt.training_step

    def wreck(model, *args):
        line = step(model, *args)
        next(model.parameters()).data[0, 0] = float("inf")
        return line

    monkeypatch.setattr(gdrt, "training_step", wreck)
    error = fails([*whole[0], "--out", tmp_path, "--save-every", "1"])
    assert "update 0: the weights are no longer finite" in error and "lower --lr" in error
    assert saved == []


def too_much_of_a_gpu(*args, **more):
    raise torch.OutOfMemoryError("CUDA out of memory")


def too_much_of_a_cpu(*args, **more):
    torch.empty(10**15)  # PyTorch raises a plain RuntimeError


TOO_MUCH = pytest.mark.parametrize("too_much", [too_much_of_a_gpu, too_much_of_a_cpu])


@TOO_MUCH
def test_memory_that_does_not_suffice_is_no_fault_of_the_model_or_a_file(
    whole, tmp_path, fails, monkeypatch, too_much
):
    flags = [*whole[0], "--out", str(tmp_path), "--name", "run"]
    for module, name in (data, "packing_error"), (data, "target_logits"), (gdrt, "target_logits"):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, too_much)
            assert "the device ran out of memory" in fails(flags)
    monkeypatch.setattr(torch, "load", too_much)
    with pytest.raises(RuntimeError):
        gdrt.load_checkpoint(tmp_path, None, None)
    monkeypatch.setattr(data.AutoModelForCausalLM, "from_pretrained", too_much)
    with pytest.raises(RuntimeError):
        data.load_model(tmp_path)
    with pytest.raises(SystemExit) as left:
        data.run_command(too_much)
    assert left.value.code == 2


def test_a_name_that_no_file_can_have_is_named(whole, fails, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "File name too long; choose another --out or --name" in fails(
        [*whole[0], "--name", "a" * 300]
    )


@TOO_MUCH
def test_memory_that_does_not_suffice_is_said_and_the_advice_helps(
    whole, tmp_path, fails, monkeypatch, too_much
):
    flags = [*whole[0], "--out", str(tmp_path), "--name", "run"]
    monkeypatch.setattr(gdrt, "token_nll", too_much)
    error = fails(flags)
    assert re.search("raise --accumulate, which .* alone, and give another --name", error)
    monkeypatch.undo()
    gdrt.main([*flags, "--accumulate", "2", "--name", "other"])
    assert list(contents(tmp_path / "other")) == list(whole[1])


# ---------------------------------------------------------------- datasets at the edge


def run_on(folder, small, tmp_path, flags=""):
    """The folder of the loss after a run of GDRT alone on `folder`."""
    usual = f"--dataset {folder} --out {tmp_path} --name run --loss gdrt"
    gdrt.main([*small, *usual.split(), *flags.split()])
    return tmp_path / "run" / "gdrt"


def test_fewer_titles_than_places_in_the_list(small, tmp_path):
    folder = write_folder(tmp_path / "films", users=8, items=8)
    done = run_on(folder, small, tmp_path, "--keep-seen")
    predictions = json_lines(done / "predictions.jsonl")
    assert {len(line["titles"]) for line in predictions} == {8}
    assert json.loads((done / "metrics.json").read_text())["test"]["HR@10"] == 1


def test_all_titles_but_the_target_seen(small, tmp_path):
    folder = write_folder(tmp_path / "films", users=8, items=8)
    predictions = json_lines(run_on(folder, small, tmp_path) / "predictions.jsonl")
    assert {len(line["titles"]) for line in predictions} == {1}


def test_one_user(small, tmp_path):
    folder = write_folder(tmp_path / "films", users=1)
    done = run_on(folder, small, tmp_path, "--batch 1 --groups 2")
    assert len(json_lines(done / "predictions.jsonl")) == 1


def test_one_item(small, tmp_path, fails):
    folder = write_folder(tmp_path / "films", items=1)
    assert "no user has 5 ratings" in fails([*small, "--dataset", folder, "--out", tmp_path])


@pytest.mark.parametrize("loss", ["gdrt", "group-dro"])
def test_groups_that_are_not_in_every_batch(small, tmp_path, loss):
    flags = f"--out {tmp_path} --name run --loss {loss} --no-test"
    flags += " --batch 1 --epochs 1 --windows 20 --groups 6"
    gdrt.main([*small, *flags.split()])
    lines = json_lines(tmp_path / "run" / loss / "metrics.jsonl")
    assert any(0 in line["n"] for line in lines)
    for line in lines:
        absent = [q for q, n in zip(line["q"], line["n"]) if n == 0]
        assert sum(line["q"]) == pytest.approx(1)
        assert not any(absent) if loss == "gdrt" else all(absent)


# ---------------------------------------------------------------- flags

BAD = [
    ("--groups 100000", "tokens; use fewer groups"),
    ("--groups 80", "use fewer groups"),
    ("--groups 0", "should be positive"),
    ("--groups 1.5", "invalid int value"),
    ("--tau 0", "should be positive"),
    ("--tau nan", "should be positive"),
    ("--tau -1", "should be positive"),
    ("--tau 1e-50", "too small for float32; give 1e-30 or more"),
    ("--tau warm", "invalid float value"),
    ("--warmup 2", "between 0 and 1"),
    ("--warmup 0", "between 0 and 1"),
    ("--warmup nan", "between 0 and 1"),
    ("--lr 0", "should be positive"),
    ("--lr -1", "should be positive"),
    ("--lr inf", "should be finite"),
    ("--seed abc", "--seed"),
    ("--seed -1", "should lie between 0"),
    ("--eta nan", "should be positive"),
    ("--eta 0.5", "--eta: nothing in this run reads it"),
    ("--temperature 2", "--temperature: nothing in this run reads it"),
    ("--loss sft --tau 2", "--tau: nothing in this run reads it"),
    ("--loss sft --prior share", "--prior: nothing in this run reads it"),
    ("--data-dir tests", "--data-dir: nothing in this run reads it"),
    ("--batch 0", "should be positive"),
    ("--temperature 0", "should be positive"),
    ("--accumulate 0", "should be positive"),
    ("--history 0", "should be positive"),
    ("--min-rating nan", "lower --min-rating"),
    ("--min-rating 9", "lower --min-rating"),
    ("--epochs 1e3", "invalid int value"),
    ("--windows 0", "should be positive"),
    ("--windows 1 --epochs 1", "leave the losses none"),
    ("--save-every 0", "should be positive"),
    ("--dataset nowhere", "--dataset nowhere: choose toy, ml-100k, ml-1m or an existing folder"),
    ("--dataset tests", "--dataset"),
    ("--dataset ml-100k --data-dir nowhere", "--data-dir"),
    ("--model no/such", "--model no/such: cannot be loaded"),
    ("--model tests", "--model tests: cannot be loaded"),
    ("--device tpu", "invalid choice"),
    ("--loss dpo", "invalid choice"),
    ("--loss", "expected at least one argument"),
    ("--split random", "invalid choice"),
    ("--nonsense", "unrecognized arguments"),
    ("--resum", "unrecognized arguments"),
    ("--resume", "there is no run in"),
    ("--name ..", "without slashes"),
    ("--name a/b", "without slashes"),
    pytest.param(
        "--device cuda",
        "shows no GPU",
        marks=pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU"),
    ),
]


@pytest.mark.parametrize("flags, words", BAD)
def test_bad_flags_end_in_one_sentence(small, tmp_path, fails, monkeypatch, flags, words):
    monkeypatch.chdir(ROOT)
    assert words in fails([*small, "--out", tmp_path / "out", *flags.split()])
    left = list(tmp_path.rglob("*.json"))
    assert not left or flags == "--groups 80", "a start that failed leaves a run behind"


def test_a_process_without_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(InputError, match="1 GPU to PyTorch, and process 1 needs one; start fewer"):
        gdrt.pick_device("cuda")


def test_a_built_in_name_does_not_stand_for_a_folder_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("toy", "tiny", "mine"):
        (tmp_path / name).mkdir()
    dataset = SimpleNamespace(digest="", domain="", stats={})
    recorded = {}
    for flags in ("--dataset toy --model tiny", "--dataset mine --model toy"):
        args = gdrt.parser().parse_args(flags.split())
        recorded[flags] = gdrt.new_config(args, dataset, gdrt.TrainConfig())["arguments"]
    built_in, folders = recorded.values()
    assert (built_in["dataset"], built_in["model"]) == ("toy", "tiny")
    assert (folders["dataset"], folders["model"]) == (str(tmp_path / "mine"), str(tmp_path / "toy"))


def test_an_output_folder_that_cannot_be_made(small, tmp_path, fails):
    (tmp_path / "file").write_text("")
    error = fails([*small, "--out", tmp_path / "file" / "out"])
    assert "Not a directory; choose another --out" in error


# ---------------------------------------------------------------- what the code never does

RUNS_CODE = (
    r"^(pickle|marshal|shelve|dill|joblib)\.",
    r"^(eval|exec|compile|__import__)$",
    r"\.(load_pickle|read_pickle)$",
    r"^os\.(system|popen|spawn\w*|exec\w*)$|getoutput$",
)


def dangers_of_call(node):
    """The forbidden things that a call does."""
    name = ast.unparse(node.func)
    words = {word.arg: ast.unparse(word.value) for word in node.keywords}
    if name.endswith("torch.load") and words.get("weights_only") != "True":
        yield "torch.load without weights_only=True"
    if any(re.search(pattern, name) for pattern in RUNS_CODE):
        yield name
    if {"trust_remote_code", "allow_pickle"} & set(words) or words.get("shell", "False") != "False":
        yield ast.unparse(node)
    if re.search(r"^subprocess\.(run|Popen|call|check\w*)$", name):
        if not isinstance(node.args[0], (ast.List, ast.Name)):
            yield "a command that is not a list"
    for word in ("verify", "context"):
        if words.get(word) in ("False", "None"):
            yield "a connection that is not checked"


def dangers(source):
    """The forbidden things that a module does: [(line, what)]."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            found += [(node.lineno, danger) for danger in dangers_of_call(node)]
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if re.search(r"\b(http|ftp)://", node.value):
                found.append((node.lineno, node.value))
    return found


@pytest.mark.parametrize("name", ["data.py", "attribution.py", "evaluate.py", "gdrt.py"])
def test_no_pickles_no_remote_code_no_shell_https_only(name):
    assert dangers((ROOT / name).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "pickle.load(f)",
        "eval('1')",
        "os.system('ls')",
        "subprocess.run('ls')",
        "subprocess.run(['ls'], shell=True)",
        "X.from_pretrained(n, trust_remote_code=True)",
        "a = 'http://x.org'",
        "np.load(f, allow_pickle=True)",
        "requests.get(url, verify=False)",
    ],
)
def test_the_check_above_sees(line):
    assert dangers(line)


def listing(folder):
    """{path: (size, mtime)} of a folder's files, without byte code, git's files and test caches."""
    return {
        str(path): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file()
        and not {"__pycache__", ".git", ".pytest_cache", ".hypothesis"} & set(path.parts)
    }


def writes_nothing_else(flags, tmp_path):
    """Run gdrt.py in empty folders -> the process; only --out and --cache may be written to."""
    places = [tmp_path / name for name in ("home", "tmp", "cwd", "out", "cache")]
    for place in places:
        place.mkdir()
    home, temporary, cwd, out, cache = places
    hidden = {
        "HOME": str(home),
        "TMPDIR": str(temporary),
        "XDG_CACHE_HOME": str(home / "c"),
        "XDG_CONFIG_HOME": str(home / "d"),
        "OMP_NUM_THREADS": "1",
    }
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("HF_", "XDG_", "MPL", "TORCH"))
    }
    before = listing(ROOT)
    script = [sys.executable, "-B", ROOT / "gdrt.py"]
    done = subprocess.run(
        [*script, *flags, "--out", out, "--cache", cache],
        cwd=cwd,
        text=True,
        capture_output=True,
        timeout=300,
        env=kept | hidden | {"HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    left = []
    for place in (home, temporary, cwd):
        left += [path for path in place.rglob("*") if not path.name.startswith("torchinductor_")]
    assert left == []  # torch's empty folder, which importing it makes in TMPDIR, is left out
    assert listing(ROOT) == before and any(out.rglob("report.html"))
    return done


def test_nothing_is_written_outside_out_and_cache(small, tmp_path):
    flags = [flag for flag in small if flag != "--no-report"]
    done = writes_nothing_else([*flags, "--loss", "gdrt"], tmp_path)
    assert "GDRT" in done.stdout


@pytest.mark.slow
def test_nothing_is_written_outside_out_and_cache_by_the_first_look(tmp_path):
    writes_nothing_else(["--dataset", "toy", "--windows", "200", "--epochs", "1"], tmp_path)
    assert [path.name[:5] for path in (tmp_path / "cache").iterdir()] == ["tiny-"]
