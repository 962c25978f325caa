"""The search index of a night: its items by popularity, and their titles cut into trigrams. One SQLite file, built at publish.

A row's number is its popularity rank (from 1), so that the best known of all matching titles come first without sorting. Titles are folded:
case and accents do not count. A query that finds too little is corrected word by word, to words of the titles within one or two edits.
"""

import json
import random
import sqlite3
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any, Self

import pyarrow as pa
import pyarrow.compute as pc
from rapidfuzz import process
from rapidfuzz.distance import OSA

FILE = "items.sqlite"
FEATURES = ("item_id", "title", "categories", "tags", "attributes", "in_catalog", "eligible", "age_days", "num_user_days")
POPULARITY = ("item_id", "num_users", "first_engaged_date", "last_engaged_date")
TEXTS = ("item_id", "text")
"""What is read of item_features, of item_popularity, and of item_annotations as of the night."""
_SCHEMA = """
CREATE TABLE items (
  rank INTEGER PRIMARY KEY, item_id TEXT NOT NULL UNIQUE, title TEXT NOT NULL, category TEXT NOT NULL, num_user_days INTEGER NOT NULL,
  in_catalog INTEGER NOT NULL, image TEXT NOT NULL, facts TEXT NOT NULL);
CREATE VIRTUAL TABLE titles USING fts5(folded, content='', tokenize='trigram');
CREATE TABLE texts (item_id TEXT PRIMARY KEY, text TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE words (word TEXT PRIMARY KEY, num_titles INTEGER NOT NULL) WITHOUT ROWID;
"""
_MAX_WORDS = 200_000  # words that a query may be corrected to, the most frequent ones: comparing with more would be felt while typing
_MAX_TEXT = 2_000  # letters of a text that are kept
_MAX_MATCHES = 200  # matching titles that are looked at, the best known first
_TRIGRAM = 3
_HOT_SHARE, _COLD_SHARE = 0.01, 0.1


@dataclass(frozen=True, kw_only=True)
class Item:
    """An item as it is listed: rank 1 is the most engaged with; title is the id where there is none; category is the whole path.

    `image` is a URL on the web, or empty.
    """

    rank: int
    item_id: str
    title: str
    category: str
    num_user_days: int
    in_catalog: bool
    image: str
    facts: str

    @property
    def known(self) -> dict[str, Any]:
        """What else is known: tags, attributes, eligible, age_days, and where it was engaged with num_users and both dates (ISO)."""
        found: dict[str, Any] = json.loads(self.facts)
        return found


def unknown_item(item_id: str) -> Item:
    """An item that the night does not know, since it has left: called by its id, of rank 0."""
    return Item(rank=0, item_id=item_id, title=item_id, category="", num_user_days=0, in_catalog=False, image="", facts="{}")


def fold(text: str) -> str:
    """The text without case, accents and repeated spaces."""
    plain = "".join(letter for letter in unicodedata.normalize("NFKD", text) if not unicodedata.combining(letter))
    return " ".join(plain.casefold().split())


def build_catalog(features: pa.Table, popularity: pa.Table, texts: pa.Table, path: Path, *, image_attribute: str) -> None:
    """Write the index, in place of what was there; an interrupted build leaves no file of this name.

    Args:
        features: FEATURES of a night's item_features.
        popularity: POPULARITY of its item_popularity.
        texts: TEXTS, at most one of an item, null for none.
        path: the file to write; folders are made.
        image_attribute: name of the attribute that holds the URL of an item's image.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.unlink(missing_ok=True)
    with closing(sqlite3.connect(partial)) as connection:
        connection.executescript("PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;" + _SCHEMA)
        words = Counter[str]()
        for items in _batches(_joined(features, popularity), image_attribute):
            connection.executemany("INSERT INTO items VALUES (?, ?, ?, ?, ?, ?, ?, ?)", [astuple(item) for item in items])
            folded = [(item.rank, fold(f"{item.title} {item.item_id}")) for item in items if item.in_catalog]
            connection.executemany("INSERT INTO titles (rowid, folded) VALUES (?, ?)", folded)
            words.update(word for _, text in folded for word in set(_words(text)))
        connection.executemany("INSERT INTO words VALUES (?, ?)", words.most_common(_MAX_WORDS))
        for batch in texts.select(list(TEXTS)).filter(pc.is_valid(texts["text"])).to_batches(max_chunksize=50_000):
            cut = pc.utf8_slice_codeunits(batch["text"], 0, _MAX_TEXT)
            connection.executemany("INSERT INTO texts VALUES (?, ?)", zip(batch["item_id"].to_pylist(), cut.to_pylist(), strict=True))
        connection.commit()
    partial.replace(path)


def _joined(features: pa.Table, popularity: pa.Table) -> pa.Table:
    """All columns, the most engaged with first; an item that was never engaged with has nulls."""
    ordered = features.select(list(FEATURES)).sort_by([("num_user_days", "descending"), ("item_id", "ascending")])
    found = pc.index_in(ordered["item_id"], popularity["item_id"].combine_chunks().cast(ordered["item_id"].type))
    for name in POPULARITY[1:]:
        ordered = ordered.append_column(name, popularity[name].take(found))
    return ordered


def _batches(features: pa.Table, image_attribute: str) -> Iterator[list[Item]]:
    rank = 0
    for batch in features.to_batches(max_chunksize=50_000):
        rows: list[dict[str, Any]] = batch.to_pylist()
        yield [_item(row, rank + number, image_attribute) for number, row in enumerate(rows, start=1)]
        rank += len(rows)


def _item(row: Mapping[str, Any], rank: int, image_attribute: str) -> Item:
    attributes = dict(row["attributes"] or ())
    facts = {name: row[name] for name in ("tags", "eligible", "age_days")} | {"attributes": attributes}
    if row["num_users"] is not None:
        facts |= {"num_users": row["num_users"]} | {name: row[name].isoformat() for name in POPULARITY[2:]}
    return Item(
        rank=rank,
        item_id=row["item_id"],
        title=row["title"] or row["item_id"],
        category=" › ".join(row["categories"] or ()),
        num_user_days=row["num_user_days"],
        in_catalog=row["in_catalog"],
        image=_web_address(attributes.get(image_attribute)),
        facts=json.dumps(facts),
    )


def _web_address(text: str | None) -> str:
    """The text if it is an address that a browser may fetch as an image, else nothing."""
    return text if text and text.startswith(("https://", "http://")) else ""


def _words(folded: str) -> list[str]:
    """Runs of letters and digits of at least three, which is what trigrams can find."""
    return [word for word in "".join(letter if letter.isalnum() else " " for letter in folded).split() if len(word) >= _TRIGRAM]


@dataclass(frozen=True, kw_only=True)
class Catalog:
    """An opened index; may be used by any number of threads."""

    path: Path
    vocabulary: tuple[str, ...]
    num_items: int
    num_engaged: int

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open what `build_catalog` wrote; the words to correct to are read at once."""
        with closing(_connect(path)) as connection:
            words = [word for (word,) in connection.execute("SELECT word FROM words ORDER BY num_titles DESC, word")]
            num_items, num_engaged = connection.execute("SELECT count(*), count(*) FILTER (WHERE num_user_days > 0) FROM items").fetchone()
        return cls(path=path, vocabulary=tuple(words), num_items=num_items, num_engaged=num_engaged)

    def search(self, query: str, *, k: int) -> list[Item]:
        """At most k items of the catalog whose titles or ids hold the words of the query; if there are none, words spelled nearly so.

        First the item of exactly this id, then titles with words that begin like those of the query, the best known first.
        """
        folded = fold(query)
        if not folded:
            return []
        with closing(_connect(self.path)) as connection:
            found = {item.rank: item for item in _items(connection, "item_id = ?", query.strip())}
            words = _words(folded)
            if not words:
                start = folded.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_")
                begun = _items(connection, "in_catalog AND title LIKE ? ESCAPE '\\' ORDER BY rank LIMIT ?", f"{start}%", k)
                found |= {item.rank: item for item in begun}
            for match in self._matches(words):
                rows = _items(
                    connection, "rank IN (SELECT rowid FROM titles WHERE titles MATCH ? ORDER BY rowid LIMIT ?)", match, _MAX_MATCHES
                )
                found |= {item.rank: item for item in sorted(rows, key=lambda item: _order(item, words)) if item.rank not in found}
                if rows:
                    break
        return list(found.values())[:k]

    def _matches(self, words: Sequence[str]) -> Iterator[str]:
        """FTS queries, from the narrowest: the words as they are, then each of them or what it may have been meant to be."""
        if words:
            yield " AND ".join(f'"{word}"' for word in words)
            meant = [[word, *self._corrections(word, is_last=number == len(words))] for number, word in enumerate(words, start=1)]
            if any(len(alternatives) > 1 for alternatives in meant):
                yield " AND ".join("(" + " OR ".join(f'"{word}"' for word in alternatives) + ")" for alternatives in meant)

    def _corrections(self, word: str, *, is_last: bool) -> list[str]:
        """Words of titles within one edit (of a word up to five letters) or two; the last word may be the start of one."""
        edits = 1 if len(word) <= 5 else 2
        known: Iterable[str] = (other for other in self.vocabulary if abs(len(other) - len(word)) <= edits)
        if is_last:
            known = dict.fromkeys([*known, *(other[: len(word)] for other in self.vocabulary if len(other) > len(word))])
        found = process.extract(word, list(known), scorer=OSA.distance, score_cutoff=edits, limit=8)
        return [other for other, distance, _ in found if distance > 0]

    def item(self, item_id: str) -> Item | None:
        """The item of this id."""
        return next(iter(self.items([item_id]).values()), None)

    def text_of(self, item_id: str) -> str:
        """The beginning of the item's text; empty if it has none."""
        with closing(_connect(self.path)) as connection:
            found = connection.execute("SELECT text FROM texts WHERE item_id = ?", (item_id,)).fetchone()
        return found[0] if found else ""

    def items(self, item_ids: Iterable[str]) -> dict[str, Item]:
        """Those of these items that the night knows, by id."""
        wanted = list(item_ids)
        with closing(_connect(self.path)) as connection:
            rows = [row for start in range(0, len(wanted), 500) for row in _items_of(connection, wanted[start : start + 500])]
        return {item.item_id: item for item in rows}

    def known(self, item_ids: Sequence[str]) -> dict[str, Item]:
        """These items; one that this night does not know, as it has left, is called by its id."""
        found = self.items(item_ids)
        return {item_id: found.get(item_id) or unknown_item(item_id) for item_id in item_ids}

    def ids_of_ranks(self, ranks: Sequence[int]) -> dict[int, str]:
        """The ids of items of the catalog by popularity rank; an item that has left is left out."""
        with closing(_connect(self.path)) as connection:
            rows = (connection.execute("SELECT item_id FROM items WHERE rank = ? AND in_catalog", (rank,)).fetchone() for rank in ranks)
            return {rank: row[0] for rank, row in zip(ranks, rows, strict=True) if row is not None}

    def most_popular(self, k: int) -> list[Item]:
        """The most engaged items that may be offered."""
        wanted = "in_catalog AND json_extract(facts, '$.eligible') ORDER BY rank LIMIT ?"
        with closing(_connect(self.path)) as connection:
            return _items(connection, wanted, k)

    def random_item(self, kind: str) -> Item | None:
        """A `hot` item, of the most engaged hundredth, or a `cold` one: never engaged with, or else of the least engaged tenth."""
        with closing(_connect(self.path)) as connection:
            counts = "SELECT count(*), coalesce(sum(num_user_days = 0), 0) FROM items WHERE in_catalog"
            listed, unseen = connection.execute(counts).fetchone()
            hot = max(1, round(listed * _HOT_SHARE))
            cold = unseen or max(1, round(listed * _COLD_SHARE))
            order, among = ("rank", hot) if kind == "hot" else ("rank DESC", cold)
            chosen = random.randrange(max(1, among))  # noqa: S311 - nobody's secret
            return next(iter(_items(connection, f"in_catalog ORDER BY {order} LIMIT 1 OFFSET ?", chosen)), None)


def _connect(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro&immutable=1", uri=True)


def _items(connection: sqlite3.Connection, where: str, *values: object) -> list[Item]:
    rows = connection.execute(f"SELECT * FROM items WHERE {where}", values)  # noqa: S608 - conditions are those of this module
    names = [field.name for field in fields(Item)]
    found = (dict(zip(names, row, strict=True)) for row in rows)
    return [Item(**row | {"in_catalog": bool(row["in_catalog"])}) for row in found]


def _items_of(connection: sqlite3.Connection, item_ids: Sequence[str]) -> list[Item]:
    return _items(connection, f"item_id IN ({', '.join('?' * len(item_ids))})", *item_ids)


def _order(item: Item, words: Sequence[str]) -> tuple[int, int]:
    """Titles with more words that begin like those asked for come first, then the better known."""
    begun = f" {' '.join(_words(fold(item.title)))}"
    return -sum(f" {word}" in begun for word in words), item.rank
