"""Where results are kept: quality.jsonl, a line per run, and outcomes.npz, for the intervals.

    python benchmarks/outcomes.py FOLDER ...     take the runs of other folders into results/

outcomes.npz is a zip of arrays, read with numpy.load(..., allow_pickle=False). A run named KEY has

    KEY/test or KEY/valid     float32 (11, U): a row for each of FIELDS, a column for each user
    KEY/groups                int8 (items, L): the groups it was trained by, -1: no target token
    groups-KEY/groups         the same for the groups by which the rows of a seed report their NLL

Sums by user are enough: the bootstrap takes users with all their windows. An update writes the
whole new file beside the old one before replacing it, so an interruption leaves the old one intact.
Only one process may write to a folder at a time.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from data import InputError, run_command, write_atomic

KINDS = ("NDCG@10", "HR@10", "NLL", "legal NLL")
SUMS = ("windows", *KINDS)
FIELDS = ("user", *SUMS, *(f"seen {name}" for name in SUMS))  # seen: the target occurs in training

# Older runs are stored under the left-hand names. Their arguments, hence their keys, are unchanged.
ROWS_NOW = {
    "gdrt late uniform": "gdrt uniform, groups after SFT",
    "gdrt late": "gdrt, groups after SFT",
    "planted groups": "true groups",
}
EXPERIMENTS_NOW = {
    "tune": "tune-lr",
    "tune2": "tune-tau",
    "tune3": "tune-leave-one-out",
    "tune4": "tune-lr-msl",
    "tune5": "tune-groups",
    "tune6": "tune-epochs",
    "loo": "leave-one-out",
    "dose": "sweep",
}


def by_user(user, seen_target, values):
    """Outcomes by window -> (11, U) float32, the rows of FIELDS, users in ascending order.

    user, seen_target: (N,); values: {name of KINDS: (N,)}. A missing outcome becomes NaN.
    """
    users, index = np.unique(user, return_inverse=True)
    seen = np.asarray(seen_target, dtype=float)
    table = [users]
    for weight in (np.ones(len(seen)), seen):
        table.append(np.bincount(index, weights=weight))
        for name in KINDS:
            value = np.asarray(values.get(name, np.full(len(seen), np.nan)), dtype=float)
            table.append(np.bincount(index, weights=value * weight))
    return np.array(table, dtype=np.float32)  # (11, U)


def read_lines(results):
    """The lines of quality.jsonl, the last of each key, under the names of today."""
    path = Path(results) / "quality.jsonl"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    lines = {}
    for line in map(json.loads, text.splitlines()):
        line["experiment"] = EXPERIMENTS_NOW.get(line.get("experiment"), line.get("experiment"))
        for old, new in ROWS_NOW.items():
            if line["row"].startswith(old):
                line["row"] = new + line["row"][len(old) :]
                break
        lines[line["key"]] = line
    return list(lines.values())


def read_array(results, name):
    """One array of outcomes.npz, None where there is none."""
    path = Path(results) / "outcomes.npz"
    if not path.exists():
        return None
    with np.load(path, allow_pickle=False) as stored:
        return stored[name] if name in stored else None


def add_arrays(results, arrays):
    """Add {name: array} to outcomes.npz; an array of the same name is replaced."""
    path = Path(results) / "outcomes.npz"
    everything = {}
    if path.exists():
        with np.load(path, allow_pickle=False) as stored:
            everything = dict(stored)
    everything |= arrays
    write_atomic(path, lambda file: np.savez_compressed(file, **everything))


def add_lines(results, lines):
    """Append lines to quality.jsonl: all of them or, when interrupted, none."""
    path = Path(results) / "quality.jsonl"
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    write_atomic(path, before + "".join(json.dumps(line) + "\n" for line in lines))


# ------------------------------------------------------------------------------------------------
# other folders


def merge(folder, results):
    """Take the finished runs of `folder` that `results` lacks into it -> how many there were."""
    arrays = {}
    if (folder / "outcomes.npz").exists():
        with np.load(folder / "outcomes.npz", allow_pickle=False) as stored:
            arrays = dict(stored)
    there = {line["key"] for line in read_lines(results)}
    lines = [line for line in read_lines(folder) if line["key"] not in there]
    wanted = {line["key"] for line in lines}
    chosen = {}
    for name, array in arrays.items():
        run = name.split("/")[0]
        new_groups = run.startswith("groups-") and read_array(results, name) is None
        if run in wanted or new_groups:
            chosen[name] = array
    add_arrays(results, chosen)
    add_lines(results, lines)
    return len(lines)


def main(argv=None):
    p = argparse.ArgumentParser(description="Takes the finished runs of other folders in.")
    p.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="with quality.jsonl")
    p.add_argument("--results", type=Path, default=ROOT / "results", metavar="DIR")
    args = p.parse_args(argv)
    for folder in args.folders:
        if not (folder / "quality.jsonl").exists():
            raise InputError(f"{folder}: no quality.jsonl; name a folder that quality.py wrote")
        print(f"{folder}: {merge(folder, args.results)} runs added")


if __name__ == "__main__":
    run_command(main)
