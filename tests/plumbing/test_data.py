"""Sources, parsers, titles, splits, windows. References are written by hand, not by data.py."""

import hashlib
import http.server
import io
import json
import os
import subprocess
import sys
import threading
import time
import zipfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import data
from data import (
    InputError,
    clean_title,
    load_dataset,
    parse_histories,
    parse_items,
    parse_names,
    parse_ratings,
    parse_sessions,
    parse_windows,
    split_windows,
    write_atomic,
)

GENRES = data.FLAGS
FILMS = [  # id, title as GroupLens writes it, genres, RecBole's title and year, title we want
    (
        "1",
        "Usual Suspects, The (1995)",
        ["Crime", "Thriller"],
        "Usual Suspects, The",
        "1995",
        "The Usual Suspects (1995)",
    ),
    (
        "2",
        "Misérables, Les (1995)",
        ["Drama", "Musical"],
        "Misérables, Les",
        "1995",
        "Les Misérables (1995)",
    ),
    ("3", "unknown", ["unknown"], "unkonwn", "unkonwn", "unknown"),
    (
        "4",
        "Land Before Time III (1995) (V)",
        ["Animation"],
        "Land Before Time III (1995)",
        "V",
        "Land Before Time III (1995) (V)",
    ),
    ("5", "Chasing Amy (1997) ", ["Drama"], "Chasing Amy", "1997", "Chasing Amy (1997)"),
    ("6", "Chasing Amy (1997)", ["Drama"], "Chasing Amy", "1997", "Chasing Amy (1997)"),
    (
        "7",
        "Big Blue, The (Grand bleu, Le) (1988)",
        ["Drama"],
        "Big Blue, The (Grand bleu, Le)",
        "1988",
        "The Big Blue (Le Grand bleu) (1988)",
    ),
    ("8", "Enfer, L' (1994)", ["Drama"], "Enfer, L'", "1994", "L'Enfer (1994)"),
    ("9", "Paris, Texas (1984)", ["Drama"], "Paris, Texas", "1984", "Paris, Texas (1984)"),
]
RATINGS = []
for user in (1, 2, 3):
    for film in range(1, 10):
        moment = 1000 * (film // 2) + 9000 * (user == 3)
        RATINGS.append((user, film, 5 - (user + film) % 2, moment))
RATINGS += [(1, 9, 4, 77), (2, 8, 4, 77)]


def grouplens(ratings=RATINGS, films=FILMS):
    items = ""
    for film in films:
        flags = "|".join(str(int(genre in film[2])) for genre in GENRES)
        items += f"{film[0]}|{film[1]}|01-Jan-1995||http://us.imdb.com/?{film[0]}|{flags}\n"
    return {
        "u.data": "".join("\t".join(map(str, row)) + "\n" for row in ratings).encode(),
        "u.item": items.encode("latin-1"),
    }


def recbole(ratings=RATINGS, films=FILMS, name="ml-100k"):
    items = "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n" + "".join(
        "\t".join((film[0], film[3], film[4], " ".join(film[2]))) + "\n" for film in reversed(films)
    )
    inter = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n" + "".join(
        "\t".join(map(str, row)) + "\n" for row in reversed(ratings)
    )
    return {f"{name}.inter": inter.encode(), f"{name}.item": items.encode()}


def fill(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def zipped(files):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(f"ml-100k/{name}", content)
    return buffer.getvalue()


@pytest.fixture
def small(monkeypatch):
    """Let the small data above stand for ml-100k, and return its zip."""
    archive = zipped(grouplens())
    parsed = sorted((str(u), str(i), float(r), float(t)) for u, i, r, t in RATINGS)
    digest = hashlib.sha256(json.dumps(parsed).encode()).hexdigest()
    monkeypatch.setitem(
        data.PUBLISHED, "ml-100k", (3, 9, 29, digest, (hashlib.sha256(archive).hexdigest(),))
    )
    return archive


# ------------------------------------------------ content


def test_both_sources_give_one_dataset(tmp_path, small):
    (tmp_path / "ml.zip").write_bytes(small)
    sets = [
        load_dataset("ml-100k", data_dir=source)
        for source in (
            tmp_path / "ml.zip",
            fill(tmp_path / "a", grouplens()),
            fill(tmp_path / "b" / "ml-100k", recbole()).parent,
        )
    ]
    assert len({dataset.digest for dataset in sets}) == 1
    first = sets[0]
    assert first.titles == list(dict.fromkeys(film[5] for film in FILMS)) and first.genres[0] == (
        "Crime",
        "Thriller",
    )
    assert (
        first.stats["ids merged with another of the same title"] == 1 and first.domain == "movies"
    )
    assert first.genres == sets[2].genres and first.train == sets[2].train


def test_windows_follow_the_definition(tmp_path):
    ratings = [(user, film, 4, film) for user in (1, 2, 12) for film in range(1, 38 - user)]
    films = [(str(i), f"Film {i}", [], f"Film {i}", "", "") for i in range(1, 40)]
    for H in (1, 3, 10):
        dataset = load_dataset(str(fill(tmp_path, recbole(ratings, films))), history=H)
        assert dataset.users == ["1", "2", "12"]
        for user, n in enumerate((36, 35, 25)):
            train, valid, test = (
                list(filter(lambda w: w.user == user, part))
                for part in (dataset.train, dataset.valid, dataset.test)
            )
            assert [w.stop for w in train] == list(range(3, n - 2))
            assert [w.stop for w in valid + test] == [n - 2, n - 1]
            for w in train + valid + test:
                assert w.items == tuple(range(n)) and w.items is train[0].items
                assert (
                    w.stop - w.start == w.stop if w.stop < 2 * H else H <= w.stop - w.start < 2 * H
                )
                assert w.start % H == 0


def test_thresholds(tmp_path):
    ratings = (
        [(1, i, 4, i) for i in range(1, 6)]
        + [(2, i, 4, i) for i in range(1, 5)]
        + [(3, 1, 3, 1)]
        + [(4, i, 3.5, i) for i in range(1, 9)]
    )
    folder = fill(tmp_path, recbole(ratings, FILMS, "x"))
    with pytest.raises(
        InputError, match="no window is left to train on"
    ):  # user 1 has just enough to validate and test
        load_dataset(str(folder))
    dataset = load_dataset(str(folder), min_rating=3.5)
    assert dataset.users == ["1", "4"] and dataset.stats["users dropped, under 5 positives"] == 2
    assert dataset.stats["targets dropped, under 3 positives before them"] == 6


def test_twins_keep_the_first_occurrence(tmp_path):
    films = [
        (
            str(i),
            f"Film {'A' if i in (3, 7) else i}",
            [],
            f"Film {'A' if i in (3, 7) else i}",
            "",
            "",
        )
        for i in range(1, 9)
    ]
    dataset = load_dataset(str(fill(tmp_path, recbole([(1, i, 5, i) for i in range(1, 9)], films))))
    assert [dataset.titles[i] for i in dataset.test[0].items] == [f"Film {x}" for x in "12A4568"]
    assert data.order_positives(
        [("1", i, 5, moment) for i, moment in (("a", 9), ("b", 3), ("c", 1))],
        {"a": 0, "b": 1, "c": 0},
        4,
        0,
    ) == {"1": [(1, 0), (3, 1)]}


def test_ties_are_broken_by_the_seed_alone(tmp_path):
    tied = [(user, film, 5, 60) for user in range(1, 9) for film in range(1, 10)]
    orders = []
    for i, (rows, seed) in enumerate([(tied, 0), (tied[::-1], 0), (tied, 1)]):
        folder = fill(tmp_path / str(i), recbole(rows))
        orders.append([w.items for w in load_dataset(str(folder), seed=seed).test])
    assert orders[0] == orders[1] != orders[2] and len(set(orders[0])) > 1
    assert load_dataset(str(tmp_path / "0")).stats["users whose last positive is tied"] == 1.0


@pytest.mark.slow
def test_windows_do_not_depend_on_pythons_hash_seed(tmp_path):
    fill(tmp_path, recbole([(user, film, 5, 60) for user in range(1, 9) for film in range(1, 10)]))
    again = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys, data; print(data.load_dataset(sys.argv[1]).digest)",
            tmp_path,
        ],
        capture_output=True,
        text=True,
        cwd=Path(data.__file__).parent,
        env={"PYTHONHASHSEED": "7"},
    )
    assert again.stdout.strip() == load_dataset(str(tmp_path)).digest


def test_time_split_never_cuts_a_timestamp(tmp_path):
    ratings = [
        (user, film, 5, (7 * user + 3 * film) // 4)
        for user in range(1, 21)
        for film in range(1, 10)
    ]
    films = [(str(i), f"Film {i}", [], f"Film {i}", "", "") for i in range(1, 10)]
    dataset = load_dataset(str(fill(tmp_path, recbole(ratings, films))), split="time")
    moment = {(str(u), f"Film {i}"): t for u, i, _, t in ratings}

    def moments(windows):
        return [moment[dataset.users[w.user], dataset.titles[w.items[w.stop]]] for w in windows]

    train = moments(dataset.train)
    valid = moments(dataset.valid)
    test = moments(dataset.test)
    assert max(train) < min(valid) and max(valid) < min(test)
    assert len(train) + len(valid) + len(test) == 20 * 6
    assert 0.6 < len(train) / 120 <= 0.8


def test_titles():
    assert clean_title("Fun &amp;amp; Games\t &quot;Live&quot;\n") == 'Fun & Games "Live"'
    assert clean_title("Caf\x65\u0301") == "Café"
    assert clean_title("a\ud800b") == "a?b"
    assert clean_title(" \x00 ") == ""
    assert clean_title("Book, The") == "Book, The"
    assert clean_title("Book, A", movie=True) == "A Book"
    no_article = "Cry, the Beloved Country (1995)"
    assert clean_title(no_article, movie=True) == no_article
    assert clean_title("千と千尋の神隠し (2001)", movie=True) == "千と千尋の神隠し (2001)"


def csv_files(train, test, names):
    def text(part):
        rows = "".join(f'{user},"{ids}",{moment}\n' for user, ids, moment in part)
        return f"user_id,item_ids,timestamp\n{rows}".encode()

    names = json.dumps(names).encode()
    return {"train.csv": text(train), "test.csv": text(test), "id2name4Rec.json": names}


def test_csv_windows_stand_as_they_are(tmp_path):
    train = [(9, [1, 2, 3], 10), (7, [1, 2], 11), (9, [1, 2, 3, 4], 12), (9, [2, 3, 4, 5], 13)] + [
        (5, [4, i % 5 + 1], 14 + i) for i in range(16)
    ]
    names = {
        "1": "Pen &amp; Ink",
        "2": "Pen & Ink",
        "3": " ",
        "4": 'A "B"',
        "5": "x" * 900,
        "6": "rest",
    }
    dataset = load_dataset(
        str(fill(tmp_path / "Office", csv_files(train, [(7, [1, 4], 99), (7, [6, 8], 99)], names)))
    )
    assert (
        dataset.titles == ["Pen & Ink", "Untitled 3", 'A "B"', "x" * 900, "rest", "Untitled 8"]
        and dataset.domain == "office"
    )
    assert len(dataset.train) == 18 and [w.items[w.stop] for w in dataset.valid] == [
        3,
        0,
    ]  # the latest two of twenty
    ours = [w for w in dataset.train if dataset.users[w.user] == "9"]
    assert [w.items[w.start : w.stop + 1] for w in ours] == [(0, 0, 1), (0, 0, 1, 2), (0, 1, 2, 3)]
    assert ours[0].items is ours[1].items and ours[1].items is not ours[2].items
    assert (
        dataset.stats["ids merged with another of the same title"] == 1
        and dataset.stats["test targets never in training"] == 1
    )


def test_toy_is_what_it_says():
    start = time.process_time()
    dataset = load_dataset("toy")
    assert time.process_time() - start < 1
    assert dataset.digest == load_dataset("toy").digest != load_dataset("toy", seed=1).digest
    assert 120 <= len(dataset.titles) <= 200
    assert len({title.split()[0] for title in dataset.titles}) == len(dataset.titles)
    tastes = [dataset.planted["tastes"][user] for user in dataset.users]
    targets = [(w.user, w.items[w.stop]) for w in dataset.train]
    for item, (title, words) in enumerate(zip(dataset.titles, dataset.planted["words"])):
        assert len(words) == len(title.split()) and words[1:] == ["bias"] * (len(words) - 1)
    taste = [(user, item) for user, item in targets if dataset.planted["words"][item][0] == "taste"]
    assert all(dataset.genres[item][0] in tastes[user] for user, item in taste)
    assert 0.75 < len(taste) / len(targets) < 0.9


def test_the_shop_is_planted_as_it_says():
    """toy_table itself: 8 tastes of 15 products and 16 bestsellers for everybody."""
    table, planted = data.toy_table(0)
    kind = {item: genres[0] for item, genres in table.genres.items()}
    count = Counter(kind.values())
    assert count.pop(data.BESTSELLER) == 16
    assert count == {taste: 15 for taste in data.TASTES} and len(count) == 8
    for item, words in enumerate(planted["words"]):
        bestseller = kind[str(item)] == data.BESTSELLER
        assert words == ["bias" if bestseller else "taste"] + ["bias"] * 11
        brand, *what = table.titles[str(item)].split()
        named = "Gift Card" if bestseller else data.TASTES[kind[str(item)]]
        assert " ".join(what).startswith(named) and len([brand, *what]) == 12
    bought = {}
    for user, item, _, moment in table.ratings:
        bought.setdefault(user, []).append((moment, kind[item]))
    assert len(bought) == len(planted["tastes"]) == 500
    sizes = sorted(map(len, bought.values()))
    assert sizes[:250] == [5] * 250 and min(sizes[250:]) >= 12 and max(sizes) <= 24
    by_taste = 0
    for user, purchases in bought.items():
        assert len({moment for moment, _ in purchases}) == len(purchases)  # no ties in time
        assert len(set(planted["tastes"][user])) == 2
        kinds = {what for _, what in purchases}
        assert kinds <= {*planted["tastes"][user], data.BESTSELLER}
        by_taste += sum(what != data.BESTSELLER for _, what in purchases)
    # A draw is by taste in 85% of cases, or a little less as a user's 30 products run out.
    assert 0.75 < by_taste / len(table.ratings) < 0.87


# ------------------------------------------------ sources


class Source(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        status, body, pause = self.server.answer
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        for i in range(0, len(body), 99 if pause else 1 << 20):
            time.sleep(pause)
            self.wfile.write(body[i : i + (99 if pause else 1 << 20)])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Source)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setattr(data, "GROUPLENS", f"http://127.0.0.1:{server.server_port}/{{}}.zip")
    monkeypatch.setattr(data, "SILENCE", 0.2), monkeypatch.setattr(data, "DEADLINE", 0.5)
    monkeypatch.setattr(
        subprocess,
        "run",
        lambda *_, **__: subprocess.CompletedProcess("pip", 1, "", "ERROR: offline"),
    )
    yield server
    server.shutdown(), server.server_close()


@pytest.mark.parametrize("answer", ["404", "html", "half", "another", "hanging", "trickle"])
def test_bad_answers(answer, server, small, tmp_path, capsys):
    another = zipped(
        grouplens(films=[("1", "Toy Story (1995)", *FILMS[0][2:]), *FILMS[1:]])
    )  # whole, with the right ratings
    server.answer = {
        "404": (404, b"gone", 0),
        "html": (200, b"<html>busy</html>", 0),
        "half": (200, small[:500], 0),
        "another": (200, another, 0),
        "hanging": (200, small, 3),
        "trickle": (200, small, 0.15),
    }[answer]
    start = time.monotonic()
    with pytest.raises(
        InputError,
        match="--dataset ml-100k: no source answers; "
        "download ml-100k.zip .* --data-dir ml-100k.zip",
    ):
        load_dataset("ml-100k", cache=tmp_path / "cache")
    told = capsys.readouterr().err
    assert time.monotonic() - start < 2 and not (tmp_path / "cache").exists()
    assert (
        told.count("reading") == 2
        and told.count("skipped") == 2
        and "pip download failed: ERROR: offline" in told
    )


def test_cache(server, small, tmp_path, capsys):
    server.answer = 200, small, 0
    digest = load_dataset("ml-100k", cache=tmp_path).digest
    assert [path.name for path in tmp_path.iterdir()] == ["ml-100k.zip"]
    server.answer = 404, b"", 0
    assert load_dataset("ml-100k", cache=tmp_path).digest == digest  # no source needed now
    for damage in (small[:300], small[:300] + b"!" + small[301:], b""):
        (tmp_path / "ml-100k.zip").write_bytes(damage)
        server.answer = 404, b"", 0
        with pytest.raises(InputError):
            load_dataset("ml-100k", cache=tmp_path)
        server.answer = 200, small, 0
        assert (
            load_dataset("ml-100k", cache=tmp_path).digest == digest
            and (tmp_path / "ml-100k.zip").read_bytes() == small
        )
    (tmp_path / "file").touch()
    capsys.readouterr()
    assert (
        load_dataset("ml-100k", cache=tmp_path / "file").digest == digest
    )  # a cache that cannot be written
    assert "going on without a cache" in capsys.readouterr().err


def test_write_atomic_writes_through_links_and_into_files_alone(tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write_atomic(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_text() == "new"
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in "pipe", "folder":
        with pytest.raises(OSError, match="not a regular file") as error:
            write_atomic(tmp_path / name, "new")
        assert error.value.filename == str(tmp_path / name)
    assert (tmp_path / "pipe").is_fifo()


@pytest.mark.parametrize("fault", ["write", "fsync", "replace"])
def test_write_atomic_keeps_the_old_file(fault, tmp_path, monkeypatch):
    write_atomic(tmp_path / "sub" / "a", "old")

    def fail(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(data.os, "fsync" if fault == "write" else fault, fail)
        with pytest.raises(OSError):
            write_atomic(tmp_path / "sub" / "a", b"new")
    assert [(path.name, path.read_text()) for path in (tmp_path / "sub").iterdir()] == [
        ("a", "old")
    ]
    write_atomic(tmp_path / "sub" / "a", b"new")
    assert (tmp_path / "sub" / "a").read_text() == "new"


# ------------------------------------------------ faults


def test_flags_and_folders(tmp_path, small):
    for arguments in (
        {"name": "ml-10m"},
        {"name": "toy", "split": "random"},
        {"name": "toy", "history": 0},
        {"name": str(tmp_path)},
        {"name": "toy", "min_rating": 6},
        {"name": "ml-100k", "data_dir": tmp_path},
        {"name": "ml-100k", "data_dir": tmp_path / "none.zip"},
        {"name": "ml-1m", "data_dir": fill(tmp_path / "wrong", recbole(name="ml-1m"))},
        {"name": "ml-100k", "data_dir": fill(tmp_path / "short", grouplens(RATINGS[1:]))},
        {
            "name": "ml-100k",
            "data_dir": fill(tmp_path / "other", grouplens([(1, 1, 1, 1), *RATINGS[1:]])),
        },
    ):
        with pytest.raises(InputError) as caught:
            load_dataset(**arguments)
        assert str(caught.value).startswith("--") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "ratings, films",
    [
        ([(1, 1, 5, 1)], FILMS),
        ([(1, i, 5, i) for i in range(1, 10)], FILMS[:1]),
        ([(1, 1, 5, i) for i in range(9)], FILMS[:1]),
        ([(i, 1, 5, i) for i in range(9)], FILMS[:1]),
        ([], FILMS),
        (RATINGS, []),
    ],
)
def test_tiny_folders_work_or_say_why(ratings, films, tmp_path):
    for split in ("leave-one-out", "time"):
        try:
            dataset = load_dataset(str(fill(tmp_path, recbole(ratings, films))), split=split)
            assert dataset.train and dataset.valid and dataset.test
            assert all(
                0 <= w.start < w.stop < len(w.items)
                for w in dataset.train + dataset.valid + dataset.test
            )
        except InputError as error:
            assert "--dataset" in str(error)


def test_errors_name_file_and_line():
    for parse, name, content, place in [
        (parse_ratings, "u.data", b"1\t2\t3\t4\n1\t2\t3\n", "u.data:2"),
        (parse_ratings, "u.data", b"1\t2\tnan\t4", "u.data:1"),
        (parse_ratings, "u.data", b"1\t2\t3\t-1e999\n", "u.data:1"),
        (parse_items, "u.item", b"\n1|Toy Story (1995)|x", "u.item:2"),
        (parse_ratings, "ratings.dat", b"1::2::3", "ratings.dat:1"),
        (parse_ratings, "x.inter", b"user_id:token\titem_id:token\n", "x.inter:1.*timestamp"),
        (parse_items, "x.item", b"item_id:token\ttitle:token\n1\ta\tb", "x.item:2"),
        (parse_windows, "train.csv", b"user_id,item_ids,timestamp\n1,[2],3", "train.csv:2"),
        (parse_windows, "train.csv", b"user_id,timestamp\n1,3", "train.csv:1.*item_ids"),
        (parse_names, "id2name4Rec.json", b'{"1": "a", "1": "b"}', "item '1' is called 'b'"),
        (parse_names, "id2name4Rec.json", b'{"1": ', "not whole JSON"),
    ]:
        with pytest.raises(InputError, match=place):
            parse(content, name)


WHOLE = {
    **grouplens(),
    **recbole(name="x"),
    "movies.dat": b"1::Toy Story (1995)::Animation|Comedy\n",
    "ratings.dat": b"1::1::5::978300760\n",
    "train.csv": b'user_id,item_ids,timestamp\n1,"[2, 3, 4]",5\n',
    "id2name4Rec.json": b'{"1": "Pen", "2": "Ink"}',
    "ratings.csv": b"userId,movieId,rating,timestamp\n1,1,4.5,978300760\n",
    "movies.csv": b'movieId,title,genres\n1,"Film, The (1995)",War|Drama\n',
    "d3.csv": b"user_id,history_item_title,item_title,history_item_id,item_id,timestamp\n"
    b"1,\"['Pen', 'Ink']\",Cap,\"[3, 4]\",5,77\n",
    "x.train.inter": b"user_id:token\titem_id_list:token_seq\titem_id:token\n1\t2 3\t4\n",
}
PIECES = [
    b"\t",
    b"|",
    b"::",
    b"\n",
    b"\r",
    b",",
    b'"',
    b"[1, 2]",
    b"{",
    b"}",
    b'{"1": "a"}',
    b"[" * 2000,
    b"1",
    b"-1e999",
    b"nan",
    b"\x00",
    b"\xff",
    b"\xef\xbb\xbf",
    b"user_id:token",
    b"item_id:token",
    b"timestamp:float",
    b"rating:float",
    b"movie_title:token_seq",
    b"item_ids",
    b"item_id_list:token_seq",
    b"history_item_title",
    b"['a', None]",
    b"label:float",
    b"release_year:token",
    b"genre:token_seq",
    b"\\N",
    b"&#99999999999;",
    b"x",
]


@pytest.mark.parametrize(
    "parse, name",
    [
        (parse_ratings, "u.data"),
        (parse_items, "u.item"),
        (parse_ratings, "ratings.dat"),
        (parse_items, "movies.dat"),
        (parse_ratings, "x.inter"),
        (parse_items, "x.item"),
        (parse_windows, "train.csv"),
        (parse_names, "id2name4Rec.json"),
        (parse_ratings, "ratings.csv"),
        (parse_items, "movies.csv"),
        (parse_histories, "d3.csv"),
        (parse_sessions, "x.train.inter"),
    ],
)
@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_parsers_refuse_or_read_anything(parse, name, draw):
    noise = draw.draw(
        st.binary(max_size=60) | st.lists(st.sampled_from(PIECES), max_size=12).map(b"".join)
    )
    at = draw.draw(st.integers(0, len(WHOLE[name])))
    cut = draw.draw(st.integers(0, 80))
    spoiled = WHOLE[name][:at] + noise + WHOLE[name][at + cut :]
    content = draw.draw(st.sampled_from([noise, spoiled]))
    try:
        parsed = parse(content, name)
    except InputError as error:
        assert str(error).startswith(name) and "\n" not in str(error)
        return
    if parse is parse_ratings:
        data.order_positives(parsed, {row[1]: 0 for row in parsed}, 4, 0)
    elif parse is parse_items:
        assert all(data.merge_titles(*parsed, movie=True)[0])
        assert data.find_domain(content, name, parsed[1]) in (None, *data.DOMAINS)
    elif parse is parse_histories:
        assert all(data.merge_titles(parsed[1], {})[0]) or not parsed[1]
    elif parse is parse_names:
        json.dumps(data.merge_titles(parsed, {})[0]).encode()


@pytest.mark.network
def test_ml_100k_arrives(tmp_path):
    dataset = load_dataset("ml-100k", cache=tmp_path)
    assert (
        len(dataset.titles) == 1664
        and dataset.stats["ids merged with another of the same title"] == 18
    )
    assert (len(dataset.train), len(dataset.valid), len(dataset.test)) == (50505, 938, 938)
    assert dataset.digest == load_dataset("ml-100k", cache=tmp_path).digest
    assert not [
        title
        for title in dataset.titles
        if title.split(" (")[0].endswith((", The", ", A", ", Les"))
    ]


def test_a_split_by_time_is_8_to_1_to_1():
    positives = []
    for user in range(4):
        positives.append([(100 * t + user, t) for t in range(13)])  # 10 targets each
    assert [len(part) for part in split_windows(positives, "time", 10)] == [32, 4, 4]
