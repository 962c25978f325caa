"""A published night as the explorer reads it: an item's lists, what has changed since a kept night, its facts. No Spark."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, time, timedelta
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from conf.errors import TableError
from conf.settings import Settings
from conf.tables import (
    CO_ENGAGEMENT_PAIRS,
    ITEM_ANNOTATIONS,
    ITEM_FEATURES,
    ITEM_NEIGHBORS,
    ITEM_NEIGHBORS_HISTORY,
    ITEM_POPULARITY,
    RELEVANCE_FEEDBACK,
    RUNS,
)
from jobs.backtest_lists import KeptLists
from jobs.explorer import catalog
from jobs.explorer.catalog import Catalog, Item
from jobs.publication import base_run
from jobs.reader import artifacts_of, first_row, lake_root, neighbors_of, open_table, rows_where, table_exists

COUNTS, POPULARITY, CONTENT = "counts", "popularity", "content"
_SCORES = {COUNTS: "weight"} | {c.name: c.name for c in CO_ENGAGEMENT_PAIRS.columns if c.type == "double" and "weight" not in c.name}
"""Baselines that are an order of counted pairs, and the column that gives it."""
_MEANT = {column.name: column.comment for column in CO_ENGAGEMENT_PAIRS.columns}
BASELINES = {
    **{name: _MEANT[column] for name, column in _SCORES.items()},
    POPULARITY: "The same for every item: the items with the most user-days.",
    CONTENT: "Nearest by cosine of content vectors, whatever was engaged with.",
}
"""What can be made from the tables and the index of a night, without training, and what it means."""
LISTS = {
    "merged": "What is offered: the engagement and the relevance of all candidates, put together as merge_policy says.",
    "engagement": "What users of the item are most likely to engage with, too, whether it is alike or not.",
    "relevance": "What is most alike by text, categories, tags and labels, whether it is engaged with or not.",
}
"""What each list is for; a further head of the settings is a list by the tasks that it was trained on."""
SCORES = {
    "merged": "What the merged list is ordered by: of a blend the probability of engagement plus lambda times the relevance; but for the "
    "share of its places that merge_policy gives to the most relevant, wherever their score would put them.",
    "engagement": "Probability that an engagement next to the item goes to this neighbor, among all candidates of the item.",
    "relevance": "Likeness as the relevance head has learned it, from -1 to 1.",
}
"""What the score of each list means; of others, that the order is by it."""
FOUND_BY = (
    "Why it is here. Found by counts: engaged with together inside the window; users: known to the same users; engagement, relevance: the "
    "search of that head; content: near in text and labels; popularity: one of the most engaged items."
)


@dataclass(frozen=True, kw_only=True)
class Neighbor:
    """A place in a list. `score` is None where only the order was kept.

    `change` says how the place compares with another list: `new`, `+3` for three places up, `-2` for two down, empty for no change;
    `both` that the engagement list and the relevance list hold the neighbor; `vote` is the grade given here, None for none.
    """

    rank: int
    item: Item
    score: float | None
    reason: str = ""
    sources: tuple[str, ...] = ()
    num_user_days: int = 0
    relevance: float | None = None
    filled: bool = False
    both: bool = False
    change: str = ""
    vote: float | None = None


@dataclass(frozen=True, kw_only=True)
class KeptNight:
    """A night whose lists are kept in history."""

    run_id: str
    run_date: date


@dataclass(frozen=True, kw_only=True)
class PublishedNight:
    """The night in `item_neighbors` at one version, with the versions of the tables that it was made from."""

    settings: Settings
    root: str
    version: int
    run_id: str
    run_date: date
    versions: Mapping[str, int]
    catalog: Catalog

    @classmethod
    def open(cls, settings: Settings) -> Self:
        """Open the current night; its search index is built here only if the night was made by code that built none.

        Raises:
            TableError: nothing is published yet, or the ledger does not know the night.
        """
        root = lake_root(settings.lake)
        table = open_table(root, ITEM_NEIGHBORS)
        first = first_row(table, ["run_id", "run_date"])
        if first is None:
            raise TableError(f"item_neighbors under {root} is empty; run `python -m jobs.nightly`")
        versions = pinned_versions(root, first["run_id"])
        path = artifacts_of(settings.lake, base_run(first["run_id"])) / "explorer" / catalog.FILE
        if not path.is_file():
            index_titles(root, versions, path, run_date=first["run_date"], image_attribute=settings.explorer.image_attribute)
        return cls(settings=settings, root=root, version=table.version(), **first, versions=versions, catalog=Catalog.open(path))

    @property
    def artifacts(self) -> Path:
        """Files of this night that are not tables."""
        return artifacts_of(self.settings.lake, base_run(self.run_id))

    def lists(self, item_id: str, *, since: str | None = None) -> dict[str, list[Neighbor]]:
        """Every list of an item by head, the merged one first; `since` a kept night's run id marks what has changed."""
        found = {head: neighbors for (_, head), neighbors in neighbors_of(self.root, [item_id]).items()}
        order = sorted(found, key=lambda head: self._list_names.index(head) if head in self._list_names else len(found))
        lists = {head: self.described(found[head]) for head in order}
        if since is None:
            return lists
        before = self.ids_of(item_id, since)
        return {head: marked(neighbors, before.get(head, ())) for head, neighbors in lists.items()}

    @cached_property
    def _list_names(self) -> list[str]:
        return ["merged", *self.settings.model.heads]

    def described(self, neighbors: Sequence[Mapping[str, Any]]) -> list[Neighbor]:
        """Neighbors as item_neighbors holds them, with what the catalog knows of each."""
        items = self.catalog.known([neighbor["neighbor_id"] for neighbor in neighbors])
        return [
            Neighbor(
                rank=rank,
                item=items[neighbor["neighbor_id"]],
                score=neighbor["score"],
                reason=neighbor["reason"] or "",
                sources=tuple(neighbor["sources"] or ()),
                num_user_days=neighbor["num_user_days"],
                relevance=neighbor["relevance"],
                filled=neighbor["filled"],
            )
            for rank, neighbor in enumerate(neighbors, start=1)
        ]

    def ids_of(self, item_id: str, run_id: str) -> dict[str, list[str]]:
        """Neighbor ids by head in a kept night."""
        dataset = open_table(self.root, ITEM_NEIGHBORS_HISTORY).to_pyarrow_dataset()
        mine = (ds.field("item_id") == item_id) & (ds.field("run_id") == run_id)
        rows = dataset.to_table(columns=["head", "neighbors"], filter=mine).to_pylist()
        return {row["head"]: [neighbor["neighbor_id"] for neighbor in row["neighbors"]] for row in rows}

    def kept_nights(self) -> list[KeptNight]:
        """Other nights whose lists are in history, the newest first."""
        columns = ["run_id", "run_date", "status", "output_versions"]
        rows = rows_where(self.root, RUNS, "stage", ["publish_neighbors", "remerge"], columns).to_pylist()
        newest = max((row["run_date"] for row in rows), default=self.run_date)
        nights = {
            KeptNight(run_id=row["run_id"], run_date=row["run_date"])
            for row in rows
            if row["status"] == "succeeded" and (newest - row["run_date"]).days <= self.settings.lake.keep_nights
        }
        others = (night for night in nights if night.run_id != self.run_id)
        return sorted(others, key=lambda night: (night.run_date, night.run_id), reverse=True)

    def pairs_of(self, item_id: str, columns: Sequence[str]) -> pa.Table:
        """The counted pairs of a trigger, as the night read them."""
        version = self.versions[CO_ENGAGEMENT_PAIRS.name]
        return rows_where(self.root, CO_ENGAGEMENT_PAIRS, "trigger_item_id", [item_id], columns, version)

    def baseline(self, item_id: str, by: str, *, k: int) -> list[Neighbor]:
        """What a trigger gets by one of BASELINES, but for content, which only the index knows."""
        if by == POPULARITY:
            best = [item for item in self.catalog.most_popular(k + 1) if item.item_id != item_id][:k]
            return [Neighbor(rank=rank, item=item, score=item.num_user_days) for rank, item in enumerate(best, start=1)]
        column = _SCORES[by]
        pairs = self.pairs_of(item_id, list(dict.fromkeys(["target_item_id", "num_user_days", column])))
        rows = pairs.sort_by([(column, "descending"), ("target_item_id", "ascending")]).slice(0, k).to_pylist()
        items = self.catalog.known([row["target_item_id"] for row in rows])
        return [
            Neighbor(rank=rank, item=items[row["target_item_id"]], score=row[column], num_user_days=row["num_user_days"])
            for rank, row in enumerate(rows, start=1)
        ]

    def trained(self, item_id: str, method: str) -> list[Neighbor]:
        """What a trigger got by a trained baseline of the latest backtest, as of its cut; empty if it was not judged there."""
        ids = self.kept.ids_of(item_id, method) if self.kept else []
        items = self.catalog.known(ids)
        return [Neighbor(rank=rank, item=items[other], score=None) for rank, other in enumerate(ids, start=1)]

    @cached_property
    def kept(self) -> KeptLists | None:
        """Lists of the trained baselines, if a backtest has been run on this lake."""
        return KeptLists.latest(self.settings.lake)

    def votes(self, item_id: str) -> dict[str, float]:
        """The latest grade given to each neighbor of a trigger; what was withdrawn is not there."""
        if not table_exists(self.root, RELEVANCE_FEEDBACK):
            return {}
        rows = rows_where(self.root, RELEVANCE_FEEDBACK, "item_id", [item_id], ["other_item_id", "rated_at", "grade"])
        latest = {row["other_item_id"]: row["grade"] for row in rows.sort_by("rated_at").to_pylist()}
        return {other: grade for other, grade in latest.items() if grade is not None}


def index_titles(root: str, versions: Mapping[str, int], path: Path, *, run_date: date, image_attribute: str) -> None:
    """Build the search index from the versions of item_features, item_popularity and item_annotations that a night reads."""
    features = open_table(root, ITEM_FEATURES, versions[ITEM_FEATURES.name]).to_pyarrow_table(columns=list(catalog.FEATURES))
    popularity = open_table(root, ITEM_POPULARITY, versions[ITEM_POPULARITY.name]).to_pyarrow_table(columns=list(catalog.POPULARITY))
    texts = _texts(root, versions[ITEM_ANNOTATIONS.name], run_date)
    catalog.build_catalog(features, popularity, texts, path, image_attribute=image_attribute)


def _texts(root: str, version: int, run_date: date) -> pa.Table:
    """item_id and its text as known at the end of the run date."""
    end = pa.scalar(datetime.combine(run_date + timedelta(days=1), time(), UTC))
    known = (ds.field("event_timestamp") < end) & (ds.field("created_timestamp") < end)
    dataset = open_table(root, ITEM_ANNOTATIONS, version).to_pyarrow_dataset()
    rows = dataset.to_table(columns=["item_id", "event_timestamp", "text"], filter=known).sort_by("event_timestamp")
    latest = rows.group_by("item_id", use_threads=False).aggregate([("text", "last", pc.ScalarAggregateOptions(skip_nulls=False))])
    return latest.rename_columns({"text_last": "text"})


def pinned_versions(root: str, run_id: str) -> dict[str, int]:
    """The version of every table that a night read or wrote.

    Raises:
        TableError: the ledger has no succeeded stage of this run.
    """
    rows = (
        rows_where(root, RUNS, "run_id", [run_id], ["status", "sequence", "input_versions", "output_versions"])
        .sort_by("sequence")
        .to_pylist()
    )
    good = [row for row in rows if row["status"] == "succeeded"]
    if not good:
        raise TableError(f"table runs under {root} has no succeeded stage of the published run {run_id}; run `python -m jobs.nightly`")
    versions: dict[str, int] = {}
    for row in good:
        versions |= dict(row["input_versions"]) | dict(row["output_versions"])
    return versions


def marked(neighbors: Sequence[Neighbor], before: Sequence[str]) -> list[Neighbor]:
    """The neighbors with what has changed against another list's ids; nothing is marked if that list is empty."""
    if not before:
        return list(neighbors)
    places = {item_id: rank for rank, item_id in enumerate(before, start=1)}
    return [replace(neighbor, change=_change(neighbor, places.get(neighbor.item.item_id))) for neighbor in neighbors]


def _change(neighbor: Neighbor, before: int | None) -> str:
    if before is None:
        return "new"
    return "" if before == neighbor.rank else f"{before - neighbor.rank:+d}"


def with_votes_and_both(neighbors: Iterable[Neighbor], *, votes: Mapping[str, float], both: set[str]) -> list[Neighbor]:
    """The neighbors with the grades given here, and marked where both heads found them."""
    return [
        replace(neighbor, vote=votes.get(neighbor.item.item_id), both=neighbor.item.item_id in both and not neighbor.filled)
        for neighbor in neighbors
    ]


def found_by_both(lists: Mapping[str, Sequence[Neighbor]]) -> set[str]:
    """Ids that both the engagement list and the relevance list hold."""
    engagement, relevance = ({neighbor.item.item_id for neighbor in lists.get(head, ())} for head in ("engagement", "relevance"))
    return engagement & relevance


def to_rows(item_id: str, lists: Mapping[str, Sequence[Neighbor]]) -> list[dict[str, Any]]:
    """Lists as flat rows, one a neighbor, for exports."""
    return [
        {
            "item_id": item_id,
            "head": head,
            "rank": neighbor.rank,
            "neighbor_id": neighbor.item.item_id,
            "title": neighbor.item.title,
            "score": neighbor.score,
            "relevance": neighbor.relevance,
            "num_user_days": neighbor.num_user_days,
            "reason": neighbor.reason,
            "change": neighbor.change,
        }
        for head, neighbors in lists.items()
        for neighbor in neighbors
    ]
