"""Other people's files: what is read from each format, and what is refused by name."""

import json

import pytest

import data
from data import InputError, clean_title, load_dataset, parse_items, parse_ratings

USERS = 24
ITEMS = 12


def interactions(header="user_id:token\titem_id:token\trating:float\ttimestamp:float", last="5"):
    """RecBole's .inter: every user has nine of twelve items."""
    lines = [header]
    for user in range(USERS):
        for place in range(9):
            lines.append(f"{user}\t{(user + place) % ITEMS}\t{last}\t{100 * user + place}")
    return "\n".join(lines) + "\n"


def recbole(folder, items, inter=None, name="some"):
    folder.mkdir(parents=True, exist_ok=True)
    content = items if isinstance(items, bytes) else items.encode()
    (folder / f"{name}.item").write_bytes(content)
    (folder / f"{name}.inter").write_text(inter or interactions())
    return str(folder)


def item_file(header, rows):
    return "\n".join([header, *rows]) + "\n"


def titles_of(text, name="x.item"):
    return list(parse_items(text.encode(), name)[0].values())


# ------------------------------------------------ titles


@pytest.mark.parametrize("field, domain", data.TITLE_FIELDS.items())
def test_titles_of_every_known_field(field, domain, tmp_path):
    rows = [f"{i}\tThing number {i}" for i in range(ITEMS)]
    folder = recbole(tmp_path / "x", item_file(f"item_id:token\t{field}:token_seq", rows))
    dataset = load_dataset(folder)
    assert dataset.titles == [f"Thing number {i}" for i in range(ITEMS)]
    assert dataset.domain == (domain or "items")
    assert dataset.ids == [str(i) for i in range(ITEMS)]


def test_no_known_title_field_stops_and_lists_the_header(tmp_path):
    rows = [f"{i}\tThing {i}\t3" for i in range(ITEMS)]
    folder = recbole(tmp_path, item_file("item_id:token\tcaption:token\tprice:float", rows))
    with pytest.raises(InputError, match="item_id, caption, price .*rename the one that does"):
        load_dataset(folder)


def test_ids_that_do_not_meet_stop_and_list_the_header(tmp_path):
    """pandas writes 1 as 1.0 where the column has a gap."""
    rows = [f"{i}.0\tThing {i}" for i in range(ITEMS)]
    folder = recbole(tmp_path, item_file("item_id:token\ttitle:token", rows))
    with pytest.raises(InputError, match="12 of 12 items .*'0'.*'0.0'.*item_id, title"):
        load_dataset(folder)


def test_empty_titles_stop_and_list_the_header(tmp_path):
    rows = [f"{i}\t\tThing {i}" for i in range(ITEMS)]
    folder = recbole(tmp_path, item_file("item_id:token\ttitle:token\tcaption:token", rows))
    with pytest.raises(InputError, match="12 of 12 .* empty .*item_id, title, caption") as caught:
        load_dataset(folder)
    assert "same ids" not in str(caught.value)


@pytest.mark.parametrize("nothing", ["nan", "NaN", "None", "NULL", "N/A", "\\N", ""])
def test_what_means_nothing_is_no_title_no_year_and_no_genre(nothing, tmp_path):
    rows = [f"{i}\tThing {i}\t{nothing}\t{nothing}" for i in range(2, ITEMS)]
    rows += [f"0\t{nothing}\t1995\tDrama", f"1\t{nothing}\t{nothing}\tDrama"]
    header = "item_id:token\tmovie_name:token_seq\trelease_year:token\ttype:token_seq"
    dataset = load_dataset(recbole(tmp_path, item_file(header, rows)))
    assert dataset.titles[:3] == ["Untitled 0", "Untitled 1", "Thing 2"]
    assert dataset.genres[:3] == [("Drama",), ("Drama",), ()]


@pytest.mark.parametrize(
    "title, year, right",
    [
        ("Copper Lantern", "1995", "Copper Lantern (1995)"),
        ("Copper Lantern", "1995.0", "Copper Lantern (1995)"),
        ("Copper Lantern (1995)", "1995", "Copper Lantern (1995)"),
        ("Copper Lantern (1995)", "1995.0", "Copper Lantern (1995)"),
        ("Copper Lantern 1995", "1995", "Copper Lantern 1995"),
        ("Land (1995) (V)", "1995", "Land (1995) (V)"),
        ("Heat (1995) (TV)", "1995.0", "Heat (1995) (TV)"),
        ("Fargo [1995]", "1995", "Fargo [1995]"),
        ("Copper Lantern", "0", "Copper Lantern"),
        ("Copper Lantern", "0.0", "Copper Lantern"),
        ("Copper Lantern", "none", "Copper Lantern"),
        ("Copper Lantern", "nan", "Copper Lantern"),
        ("(1995)", "1995", ""),
        ("1995.0", "1995", ""),
        ("1984", "1984", "1984 (1984)"),
        ("2001: A Space Odyssey", "1968", "2001: A Space Odyssey (1968)"),
        ("", "1995", ""),
        ("nan", "1995", ""),
    ],
)
def test_years(title, year, right):
    text = f"item_id:token\tmovie_title:token_seq\trelease_year:token\n1\t{title}\t{year}\n"
    assert titles_of(text) == [right]


@pytest.mark.parametrize("written", ["(1995)", "[1995]", "( 1995 )", " (1995) ", "1995.0"])
def test_a_year_alone_is_no_title(written):
    assert clean_title(written) == ""
    assert clean_title("1984") == "1984"


@pytest.mark.parametrize(
    "written, right",
    [
        ("Usual Suspects, The (1995)", "The Usual Suspects (1995)"),
        ("Seven (a.k.a. Seven Sins, The) (1995)", "Seven (a.k.a. The Seven Sins) (1995)"),
        ("(500) Days of Summer, The (2009)", "The (500) Days of Summer (2009)"),
        ("Birds (Oiseaux, Les) II, The (1963)", "The Birds (Les Oiseaux) II (1963)"),
        ("Blechtrommel, Die (1979)", "Die Blechtrommel (1979)"),
        ("Tin Drum, The (Blechtrommel, Die) (1979)", "The Tin Drum (Die Blechtrommel) (1979)"),
        ("Live, Love, Die (2001)", "Live, Love, Die (2001)"),
        ("Foo (a.k.a. Live, Love, Die) (1999)", "Foo (a.k.a. Live, Love, Die) (1999)"),
        ("Us (You and Me and, I)", "Us (You and Me and, I)"),
        ("Ready to, Die (2001)", "Ready to, Die (2001)"),
        ("Vitelloni, I (1953)", "I Vitelloni (1953)"),
        ("Me, Myself, I (1992)", "Me, Myself, I (1992)"),
        ("Indifferenti, Gli (1964)", "Gli Indifferenti (1964)"),
        ("Giornata, Una (1977)", "Una Giornata (1977)"),
        ("Fremder, Ein (1999)", "Ein Fremder (1999)"),
        ("Frau, Eine (1999)", "Eine Frau (1999)"),
        ("Natt, En (1999)", "En Natt (1999)"),
        ("Aanslag, De (1986)", "De Aanslag (1986)"),
        ("Enfer, L' (1994)", "L'Enfer (1994)"),
        ("Paris, Texas (1984)", "Paris, Texas (1984)"),
    ],
)
def test_articles(written, right):
    assert clean_title(written, movie=True) == right


def test_entities_end_in_a_semicolon():
    assert clean_title("AT&T &copy 2 &amp; R&D &#39;x&#x27; &quot;y&quot;") == (
        "AT&T &copy 2 & R&D 'x' \"y\""
    )


# ------------------------------------------------ quotes, encodings, genres


def test_quotes_as_pandas_writes_them():
    text = (
        'item_id:token\ttitle:token\n1\t"The ""Lamp"" Kit"\n2\tShelf 3" wide\n'
        '3\t"Two\nLines"\n4\t"A\ttab"\n5\tplain\n'
    )
    assert [clean_title(title) for title in titles_of(text)] == [
        'The "Lamp" Kit',
        'Shelf 3" wide',
        "Two Lines",
        "A tab",
        "plain",
    ]


def test_a_quote_that_does_not_close_spoils_its_own_title_alone(capsys):
    """Each record is read as csv and pandas do, unless it would swallow what follows."""
    text = (
        'item_id:token\ttitle:token\tbrand:token\n1\t"Weird" Al\tx\n2\t"Open\tx\n'
        '3\t"The ""Lamp"" Kit"\tx\n4\t"Half\tx"\n5\tplain\t"y\n6\t"A\ttab"\tx\n'
    )
    assert titles_of(text) == ["Weird Al", '"Open', 'The "Lamp" Kit', '"Half', "plain", "A\ttab"]
    assert capsys.readouterr().err.count("read as plain characters") == 1


def test_one_bad_byte_spoils_one_letter():
    text = "item_id:token\ttitle:token\n1\tNotte è\n2\tRivière\n".encode()
    text += "3\tDéjà “vu”\n".encode("cp1252")
    titles = list(parse_items(text, "x.item")[0].values())
    assert titles == ["Notte è", "Rivière", "Déjà “vu”"]


@pytest.mark.parametrize(
    "kind, written, right",
    [
        ("token_seq", ["'Office Products'", "All Beauty"], ["Office Products", "All Beauty"]),
        ("token_seq", ["'Paper, Pens & Ink', 'Office'", "None"], ["Paper, Pens & Ink|Office", ""]),
        ("token_seq", ["['A b', 'C']", "['D']"], ["A b|C", "D"]),
        ("token", ["All Beauty", "Paper, Pens"], ["All Beauty", "Paper, Pens"]),
        (
            "token_seq",
            ["Animation Children's Comedy", "War"],
            ["Animation|Children's|Comedy", "War"],
        ),
        ("token_seq", ["(no genres listed)", "War Drama"], ["", "War|Drama"]),
        ("token", ["Drama|Film-Noir", "War"], ["Drama|Film-Noir", "War"]),
        ("token_seq", ['"Paper, Pens"', "War, Drama"], ["Paper, Pens", "War|Drama"]),
        ("token_seq", ['"Paper, Pens"', "War Drama"], ["Paper, Pens", "War|Drama"]),
        ("token_seq", ["\"Kids' Books\", 'Books'", "'A, b'"], ["Kids' Books|Books", "A, b"]),
        ("token_seq", ["'90s Rock, Pop", "War, Drama"], ["'90s Rock|Pop", "War|Drama"]),
        ("token_seq", ["'90s Rock|Pop", "War | Drama"], ["'90s Rock|Pop", "War|Drama"]),
        (
            "token_seq",
            ["Science Fiction, War", "Science Fiction"],
            ["Science Fiction|War", "Science Fiction"],
        ),
    ],
)
def test_genres(kind, written, right):
    rows = "".join(f"{i}\tThing\t{text}\n" for i, text in enumerate(written))
    text = f"item_id:token\ttitle:token\tcategories:{kind}\n{rows}"
    genres = parse_items(text.encode(), "x.item")[1].values()
    assert ["|".join(kinds) for kinds in genres] == right


def test_a_token_is_one_genre_whatever_is_in_it():
    text = "item_id:token\ttitle:token\tgenre:token\n1\tThing\tWar | Drama, 'x'\n"
    assert parse_items(text.encode(), "x.item")[1] == {"1": ("War | Drama, 'x'",)}


# ------------------------------------------------ ratings


def test_label_0_is_no_positive():
    text = (
        "user_id:token\titem_id:token\tlabel:float\ttimestamp:float\n1\t2\t0.0\t5\n1\t3\t1.0\t6\n"
    )
    ratings = parse_ratings(text.encode(), "x.inter")
    assert [row[2] >= 4 for row in ratings] == [False, True]
    with pytest.raises(InputError, match="x.inter:2: label"):
        parse_ratings(text.replace("0.0", "3.0").encode(), "x.inter")


def test_a_session_labelled_0_is_no_window():
    header = "user_id:token\titem_id_list:token_seq\titem_id:token\tlabel:float"
    text = f"{header}\nu\t1 2\t3\t0.0\nu\t1 2\t4\t1.0\n"
    assert data.parse_sessions(text.encode(), "x.train.inter") == [(0.0, "u", ["1", "2", "4"])]
    rated = text.replace("label", "rating")
    assert len(data.parse_sessions(rated.encode(), "x.train.inter")) == 2


@pytest.mark.parametrize("field", ["rating", "Rating", "ratings", "score", "STARS"])
def test_what_rates_is_read_as_the_rating(field, capsys):
    text = interactions(f"user_id:token\titem_id:token\t{field}:float\ttimestamp:float", last="2")
    assert {row[2] for row in parse_ratings(text.encode(), "x.inter")} == {2.0}
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("field", ["label", "Label", "click", "is_click"])
def test_a_click_is_read_as_a_label(field, capsys):
    text = interactions(f"user_id:token\titem_id:token\t{field}:float\ttimestamp:float", last="0")
    assert all(row[2] < 0 for row in parse_ratings(text.encode(), "x.inter"))
    assert capsys.readouterr().err == ""


def test_without_a_preference_every_row_is_positive_and_one_line_says_so(capsys):
    text = interactions("user_id:token\titem_id:token\tprice:float\ttimestamp:float")
    assert all(row[2] > 5 for row in parse_ratings(text.encode(), "x.inter"))
    told = capsys.readouterr().err
    assert told == "x.inter: no field rating or label, so every row counts as positive\n"


def test_movielens_csv(tmp_path):
    """As in ml-latest and ml-25m, titles with commas are quoted and genres are joined by bars."""
    films = "movieId,title,genres\n" + "".join(
        f'{i},"Film {i}, The (1999)",Drama|Sci-Fi\n' for i in range(1, ITEMS)
    )
    films += "0,Heat (1995),(no genres listed)\n"
    ratings = "userId,movieId,rating,timestamp\n" + "".join(
        f"{user},{(user + place) % ITEMS},4.5,{place}\n" for user in range(9) for place in range(9)
    )
    (tmp_path / "movies.csv").write_text(films)
    (tmp_path / "ratings.csv").write_text(ratings)
    dataset = load_dataset(str(tmp_path))
    assert dataset.domain == "movies"
    assert dataset.titles[:2] == ["Heat (1995)", "The Film 1 (1999)"]
    assert dataset.genres[:2] == [(), ("Drama", "Sci-Fi")]
    assert len(dataset.users) == 9


def test_recbole_split_files_stand_as_they_are(tmp_path):
    rows = [f"{i}\tThing {i}" for i in range(ITEMS)]
    (tmp_path / "x.item").write_text(item_file("item_id:token\ttitle:token", rows))
    header = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
    spans = {"train": range(6), "valid": range(6, 7), "test": range(7, 9)}
    for part, places in spans.items():
        lines = [f"{u}\t{(u + t) % ITEMS}\t5\t{t}\n" for u in range(5) for t in places]
        (tmp_path / f"x.{part}.inter").write_text(header + "".join(lines))
    dataset = load_dataset(str(tmp_path), history=4)
    for user in range(5):
        items = tuple((user + t) % ITEMS for t in range(9))
        stops = []
        for part in (dataset.train, dataset.valid, dataset.test):
            mine = [window for window in part if window.user == user]
            assert all(window.items == items for window in mine)
            stops.append([window.stop for window in mine])
        assert stops == [[3, 4, 5], [6], [7, 8]]
    (tmp_path / "x.item").write_text("item_id:token\ttitle:token\tprice:float\n0\t\t1\n")
    with pytest.raises(InputError, match="x.item has the fields item_id, title, price"):
        load_dataset(str(tmp_path))
    (tmp_path / "x.valid.inter").unlink()
    with pytest.raises(InputError, match="x.valid.inter is missing"):
        load_dataset(str(tmp_path))


def test_recbole_split_files_with_lists(tmp_path):
    rows = [f"{i}\tThing {i}" for i in range(ITEMS)]
    (tmp_path / "x.item").write_text(item_file("item_id:token\ttitle:token", rows))
    header = "user_id:token\titem_id_list:token_seq\titem_id:token\n"
    for part, target in (("train", 3), ("valid", 4), ("test", 5)):
        line = "u\t" + " ".join(map(str, range(target))) + f"\t{target}\n"
        (tmp_path / f"x.{part}.inter").write_text(header + line)
    dataset = load_dataset(str(tmp_path))
    for part, stop in ((dataset.train, 3), (dataset.valid, 4), (dataset.test, 5)):
        assert [window.items[: window.stop + 1] for window in part] == [tuple(range(stop + 1))]


# ------------------------------------------------ CSV of windows


def msl(folder, time=str, valid=False, names=None):
    """A folder like MSL's. time: writes a window's times; names: replace the usual titles."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = {"train": range(2, 5), "valid": range(5, 6), "test": range(6, 7)}
    for part, lengths in parts.items():
        if part == "valid" and not valid:
            continue
        lines = ["user_id,item_ids,timestamp"]
        for user in range(8):
            for length in lengths:
                ids = [(user + place) % ITEMS for place in range(length + 1)]
                lines.append(f'{user},"{ids}","{time(100 * length + user)}"')
        (folder / f"{part}.csv").write_text("\n".join(lines) + "\n")
    names = names or {str(i): f"Thing {i}" for i in range(ITEMS)}
    (folder / "id2name4Rec.json").write_text(json.dumps(names))
    return str(folder)


def test_valid_csv_validates(tmp_path):
    dataset = load_dataset(msl(tmp_path / "a", valid=True))
    assert [window.stop for window in dataset.valid] == [5] * 8
    assert len(dataset.train) == 24
    assert dataset.stats["split"] == "as given"
    without = load_dataset(msl(tmp_path / "b"))
    assert len(without.train) + len(without.valid) == 24


@pytest.mark.parametrize("name", ["val", "validation"])
def test_other_names_of_valid_csv(name, tmp_path):
    right = load_dataset(msl(tmp_path, valid=True)).digest
    (tmp_path / "valid.csv").rename(tmp_path / f"{name}.csv")
    assert load_dataset(str(tmp_path)).digest == right


def test_of_several_csv_one_is_to_be_kept(tmp_path):
    msl(tmp_path)
    (tmp_path / "train").mkdir()
    (tmp_path / "train.csv").rename(tmp_path / "train" / "Books.csv")
    (tmp_path / "train" / "Games.csv").write_text("")
    with pytest.raises(InputError, match="train/Books.csv and train/Games.csv .* keep one"):
        load_dataset(str(tmp_path))


def test_the_last_time_of_a_list_counts(tmp_path):
    single = load_dataset(msl(tmp_path / "a"))
    several = load_dataset(msl(tmp_path / "b", time=lambda last: [9999, 3, last]))
    assert single.digest == several.digest


def test_windows_of_one_time_leave_some_to_train_on(tmp_path):
    dataset = load_dataset(msl(tmp_path, time=lambda _: 77))
    assert len(dataset.train) == 22
    assert len(dataset.valid) == 2


def test_a_null_title_is_one_untitled_item(tmp_path):
    names = {str(i): f"Thing {i}" for i in range(ITEMS)} | {"7": None}
    dataset = load_dataset(msl(tmp_path, names=names))
    assert dataset.titles[7] == "Untitled 7"
    assert dataset.stats["items without title, named Untitled ID"] == 1
    with pytest.raises(InputError, match="item '7'"):
        load_dataset(msl(tmp_path, names=names | {"7": ["a"]}))


def test_long_csv_fields(tmp_path):
    """Python's csv module by default allows a field 131,072 characters."""
    folder = msl(tmp_path)
    with open(tmp_path / "train.csv", "a") as file:
        file.write('1,"' + str([i % ITEMS for i in range(60_000)]) + '",1\n')
    assert max(len(window.items) for window in load_dataset(folder).train) == 60_000


@pytest.mark.parametrize("name", ["train.csv", "test.csv", "id2name4Rec.json"])
def test_the_missing_file_is_named(name, tmp_path):
    folder = msl(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(InputError, match=name):
        load_dataset(folder)


@pytest.mark.parametrize("ids, nested", [(True, False), (False, False), (True, True)])
def test_d3_and_minionerec(ids, nested, tmp_path):
    """The CSV itself has the titles, whether it is train.csv or train/Books_2016.csv."""
    for part, length in (("train", 3), ("valid", 4), ("test", 5)):
        header = "user_id,history_item_title,item_title"
        header += ",history_item_id,item_id,timestamp" if ids else ""
        lines = [header]
        for user in range(6):
            items = [(user + place) % ITEMS for place in range(length)]
            titles = str([f"Tom's {i}" for i in items]).replace('"', '""')
            target = (user + length) % ITEMS
            line = f"""u{user},"{titles}",Tom's {target}"""
            line += f',"{items}",{target},{100 * length}' if ids else ""
            lines.append(line)
        path = tmp_path / part / "Books_2016.csv" if nested else tmp_path / f"{part}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines) + "\n")
    dataset = load_dataset(str(tmp_path))
    assert dataset.domain == ("book" if nested else "items")
    read = [dataset.titles[item] for item in dataset.test[0].items]
    assert read == [f"Tom's {i}" for i in range(6)]
    assert [len(part) for part in (dataset.train, dataset.valid, dataset.test)] == [6, 6, 6]


@pytest.mark.parametrize("written", ["['A', nan]", '["A", null]', "['A', None]", "['A', NaN]"])
def test_a_null_in_a_list_is_a_text_without_letters(written):
    assert data.read_list(written, "x.csv:2", "titles") == ["A", ""]
    assert data.read_list("['a, nan, b', nan]", "x.csv:2", "titles") == ["a, nan, b", ""]


def test_a_null_title_without_ids_is_left_out():
    header = "user_id,history_item_title,item_title\n"
    lines = ["""u,"['A', nan]",B""", """u,"['A']",nan""", """u,[nan],B""", """u,"['A']",C"""]
    windows, names = data.parse_histories((header + "\n".join(lines)).encode(), "train.csv")
    assert [ids for _, _, ids in windows] == [["A", "B"], ["A", "C"]]
    assert names == {"A": "A", "B": "B", "C": "C"}


def test_a_null_title_overwrites_none(tmp_path):
    header = "user_id,history_item_title,item_title,history_item_id,item_id\n"
    train = "".join(f"""u{user},"['A', 'B']",C,"[1, 2]",3\n""" for user in range(20))
    (tmp_path / "train.csv").write_text(header + train)
    (tmp_path / "test.csv").write_text(header + """u0,"['A', nan]",,"[1, 2]",3\n""")
    dataset = load_dataset(str(tmp_path))
    assert dataset.titles == ["A", "B", "C"]
    assert dataset.test[0].items == (0, 1, 2)


# ------------------------------------------------ what is refused rather than guessed

D3 = "user_id,history_item_title,item_title"
D3_IDS = D3 + ",history_item_id,item_id"


@pytest.mark.parametrize(
    "header, line, message",
    [
        (D3, """u,"['Pen', 'Ink']",Hammer, the red one""", "train.csv:3: 4 fields instead of 3"),
        (D3, """u,"['Pen', 'Ink']",\"3.5 inch disk""", "train.csv:3: 4 fields instead of 3"),
        (D3, """u,"['Pen', 'Ink']\"""", "train.csv:3: 2 fields instead of 3"),
        (D3_IDS, """u,"['Pen', 'Ink']",Cap""", "train.csv:3: 3 fields instead of 5"),
        (D3_IDS, """u,"['Pen', 'Ink']",Cap,,3""", "train.csv:3: history_item_id is empty"),
        (D3_IDS, """u,"['Pen', 'Ink']",Cap,"[1, 2]",""", "train.csv:3: item_id is empty"),
        (D3_IDS, """u,"['Pen', 'Ink']",Hat,"[1, 2]",3""", "train.csv:3: item '3' is called 'Hat'"),
        (D3_IDS, ""","['Pen', 'Ink']",Cap,"[1, 2]",3""", "train.csv:3: user_id is empty"),
        (D3 + ",timestamp", """u,"['Pen', 'Ink']",Cap,""", "train.csv:3: timestamp is empty"),
        (D3 + ",item_title", """u,"['Pen', 'Ink']",Cap,Hat""", "train.csv:1: .* 'item_title'"),
    ],
)
def test_a_line_of_a_csv_that_does_not_fit_is_named(header, line, message):
    ends = {D3_IDS: """,\"[1, 2]\",3""", D3: ""}
    whole = """u,"['Pen', 'Ink']",Cap""" + ends.get(header, ",7")
    text = "\n".join([header, whole, line, whole]) + "\n"
    with pytest.raises(InputError, match=message):
        data.parse_histories(text.encode(), "train.csv")


def test_two_csv_that_disagree_on_a_title(tmp_path):
    for part, title in (("train", "Cap"), ("test", "Hat")):
        line = f"""u,"['Pen', 'Ink']",{title},"[1, 2]",3\n"""
        (tmp_path / f"{part}.csv").write_text(f"{D3_IDS}\n{line * 20}")
    with pytest.raises(InputError, match="test.csv: item '3' is called 'Hat', but 'Cap' before"):
        load_dataset(str(tmp_path))


@pytest.mark.parametrize("field", ["user_id:token", "user_id", "userId"])
def test_a_field_named_twice_is_refused(field):
    header, *lines = interactions().splitlines()
    text = "\n".join([f"{header}\t{field}", *(f"{line}\tsame" for line in lines)])
    with pytest.raises(InputError, match="x.inter:1: several fields mean 'user_id'; keep one"):
        parse_ratings(text.encode(), "x.inter")


def test_fields_without_a_name_are_not_the_same_field():
    """pandas writes an index without a name, and reads it as Unnamed."""
    text = 'Unnamed: 0.1,Unnamed: 0,,,user_id,item_ids,timestamp\n0,0,0,0,u,"[1, 2]",5\n'
    assert data.parse_windows(text.encode(), "train.csv") == [(5.0, "u", ["1", "2"])]


def test_an_item_has_one_title():
    text = "item_id:token\ttitle:token\n1\tnan\n1\tPen &amp; Ink\n1\tPen  & Ink\n1\t\n"
    assert titles_of(text) == ["Pen &amp; Ink"]
    with pytest.raises(InputError, match="x.item:6: item '1' is called 'Cap', but 'Pen &amp; Ink'"):
        titles_of(text + "1\tCap\n")


@pytest.mark.parametrize(
    "beside, message",
    [
        (["y.inter"], "x.inter and y.inter are several data sets; keep one of them"),
        (["x.train.inter", "x.test.inter"], "x.inter and x.test.inter are several data sets"),
        (["u.data"], "u.data and x.inter are several data sets"),
        (["ratings.csv", "movies.csv"], "ratings.csv and x.inter are several data sets"),
        (["train.csv", "test.csv"], "train.csv and x.inter are several data sets"),
        (["train.csv", "train/a.csv"], "train.csv and train/a.csv are several files for train"),
        (["val.csv", "valid.csv"], "valid.csv and val.csv are several files for valid"),
    ],
)
def test_of_several_data_sets_none_is_chosen(beside, message, tmp_path):
    rows = [f"{i}\tThing {i}" for i in range(ITEMS)]
    folder = recbole(tmp_path, item_file("item_id:token\ttitle:token", rows), name="x")
    right = load_dataset(folder).digest
    # Neither hidden files nor the other files of a data set count.
    (tmp_path / "train").mkdir()
    for name in ("._x.inter", ".y.train.inter", "train/._a.csv", "x.user", "x.kg", "u1.base"):
        (tmp_path / name).write_text("")
    assert load_dataset(folder).digest == right
    for name in beside:
        (tmp_path / name).write_text("")
    with pytest.raises(InputError, match=message):
        load_dataset(folder)


@pytest.mark.parametrize("field", ["user_id", "item_id"])
def test_a_rating_without_an_id_is_refused(field):
    header = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
    row = {"user_id": "None", "item_id": "nan"}
    text = "{user_id}\t{item_id}\t5\t1\n"
    whole = header + text.format(**row)
    assert parse_ratings(whole.encode(), "x.inter") == [("None", "nan", 5.0, 1.0)]
    with pytest.raises(InputError, match=f"x.inter:3: {field} is empty"):
        parse_ratings((whole + text.format(**row | {field: " "})).encode(), "x.inter")


def test_a_file_without_rows_is_named(tmp_path):
    header = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
    rows = [f"{i}\tThing {i}" for i in range(ITEMS)]
    items = item_file("item_id:token\ttitle:token", rows)
    with pytest.raises(InputError, match="some.inter: holds no rows"):
        load_dataset(recbole(tmp_path / "a", items, inter=header))
    folder = msl(tmp_path / "b")
    (tmp_path / "b" / "test.csv").write_text("user_id,item_ids,timestamp\n")
    with pytest.raises(InputError, match="test.csv: holds no rows"):
        load_dataset(folder)


def test_line_ends_of_old_macs():
    text = interactions()
    old = text.replace("\n", "\r").encode()
    assert parse_ratings(old, "x.inter") == parse_ratings(text.encode(), "x.inter")


# ------------------------------------------------ domain and names


def test_the_domain_follows_the_data_not_letters_of_the_folder(tmp_path):
    rows = [f"{i}\tThing {i}\t'Books', 'Crime'" for i in range(ITEMS)]
    plain = item_file("item_id:token\ttitle:token", [row.rsplit("\t", 1)[0] for row in rows])
    assert load_dataset(recbole(tmp_path / "facebook-officers", plain)).domain == "items"
    told = item_file("item_id:token\ttitle:token\tcategories:token_seq", rows)
    folder = recbole(tmp_path / "office", told)
    assert load_dataset(folder).domain == "book"
    assert load_dataset(folder, domain="office").domain == "office"
    with pytest.raises(InputError, match="--domain shoes: choose movies"):
        load_dataset(folder, domain="shoes")
    assert load_dataset(msl(tmp_path / "Office_Products")).domain == "office"
