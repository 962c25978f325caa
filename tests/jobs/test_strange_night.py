"""A whole night on what real sources hold: odd ids and times, refused rows of every kind, items without text, one user's private pair.

Users carry a mark in their ids, so that the night can be searched for them, byte by byte.
"""

import io
import json
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, timedelta
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F

from conf.errors import GateError
from conf.settings import LogSettings, load_settings
from conf.tables import (
    CO_ENGAGEMENT_DAILY,
    CO_ENGAGEMENT_PAIRS,
    CO_ENGAGEMENT_TOTALS,
    ENGAGEMENTS,
    ITEM_ANNOTATIONS,
    ITEM_FEATURES,
    ITEM_NEIGHBORS,
    PAIR_RELEVANCE,
    REJECTED_ROWS,
)
from features import store
from features.pair_kernels import keyed_hash
from jobs import logs
from jobs.build_pairs import build_pairs
from jobs.explorer.app import Explorer
from jobs.ingest import ingest
from jobs.ledger import StageRecord
from jobs.nightly import STAGES, run_night
from jobs.online import open_feature_store
from jobs.progress import Display
from jobs.publish_neighbors import publish_lists
from jobs.reader import neighbors_of, rows_where
from jobs.stage import Night, StageRun, make_night, run_stage
from tests.worlds import BundleWorld, write_config

pytestmark = pytest.mark.night
NIGHT = date(2024, 3, 31)
NOW = datetime(2024, 6, 1, tzinfo=UTC)
MARK, SECRET = "Zq7user", "a key that nobody may see"
PLAIN = "b00-c0"
Taken = None
"""A row that is no fault."""

ODD_IDS = {
    "quotes": "a'b\"c`d",
    "a statement": "x'); DROP TABLE engagements; --",
    "newlines and tabs": "two\nlines\tand a tab",
    "separators": "a,b;c|d/e\\f",
    "path": "../../etc/passwd",
    "emoji": "\U0001f9c0\U0001f468\u200d\U0001f373",
    "right to left": "\u05d2\u05d1\u05d9\u05e0\u05d4",
    "composed": "\u00e9",
    "decomposed": "e\u0301",
    "markup": "<script>alert(1)</script>",
    "markup of the terminal": "[bold]x[/bold]",
    "a wildcard": "%_*?[a]",
    "braces": "{config} ${HOME} %s",
    "the word null": "null",
    "a null byte": "a\x00b",
    "a number with zeros": "007",
    "a number with a point": "7.0",
    "blanks around": " 7 ",
    "a unit separator": "a\x1fb",
    "very long": "x" * 5_000,
}
ODD_TIMES = ["1970-01-01T00:00:{}Z", "2024-02-29T12:00:{}Z", "2024-03-10T02:30:{}-05:00", "2024-03-31T02:30:{}+01:00"]
"""The first minute of all, a leap day, and two moments of clocks going forward; a second for each id, as equal ones would be one event."""

# what the row says instead, and the reason it is refused for
EVENTS: dict[str, tuple[dict[str, object], str | None]] = {
    "no user": ({"who": None}, "user_id is null or empty"),
    "an empty user": ({"who": ""}, "user_id is null or empty"),
    "a blank user": ({"who": " \t\n"}, "user_id is null or empty"),
    "a user in Latin-1": ({"who": b"caf\xe9"}, "user_id is not the UTF-8"),
    "no item": ({"what": None}, "item_id is null or empty"),
    "an empty item": ({"what": ""}, "item_id is null or empty"),
    "a blank item": ({"what": "   "}, "item_id is null or empty"),
    "an item in Latin-1": ({"what": b"caf\xe9"}, "item_id is not the UTF-8"),
    "half an emoji": ({"what": b"\xf0\x9f\xa7"}, "item_id is not the UTF-8"),
    "an item that was mangled before": ({"what": "caf\ufffd"}, "item_id is not the UTF-8"),
    "no time": ({"at": None}, "engaged_at is missing"),
    "an empty time": ({"at": ""}, "engaged_at is missing"),
    "a word": ({"at": "yesterday"}, "engaged_at is missing"),
    "a time of day": ({"at": "12:30:00"}, "engaged_at is missing"),
    "a number": ({"at": "1711843200"}, "engaged_at is missing"),
    "the 30th of February": ({"at": "2024-02-30"}, "engaged_at is missing"),
    "a leap day of another year": ({"at": "2023-02-29"}, "engaged_at is missing"),
    "a month 13": ({"at": "2024-13-01"}, "engaged_at is missing"),
    "hour 25": ({"at": "2024-03-01T25:00:00"}, "engaged_at is missing"),
    "a day first": ({"at": "31.03.2024"}, "engaged_at is missing"),
    "before 1970": ({"at": "1969-12-31T23:59:59Z"}, "engaged_at is before 1970"),
    "the year 1": ({"at": "0001-01-01"}, "engaged_at is before 1970"),
    "in the future": ({"at": "2031-01-01"}, "engaged_at is in the future"),
    "the year 99999": ({"at": "+99999-01-01"}, "engaged_at is in the future"),
    "no weight": ({"strength": None}, "weight is missing"),
    "an empty weight": ({"strength": ""}, "weight is missing"),
    "a weight in words": ({"strength": "heavy"}, "weight is missing"),
    "a comma": ({"strength": "1,5"}, "weight is missing"),
    "not a number": ({"strength": "NaN"}, "weight is missing"),
    "infinite": ({"strength": "Infinity"}, "weight is missing"),
    "minus infinite": ({"strength": "-Infinity"}, "weight is missing"),
    "beyond a double": ({"strength": "1e400"}, "weight is missing"),
    "beyond a double with its action": ({"strength": "1e308"}, "weight is missing"),
    "zero": ({"strength": "0"}, "weight is not above 0"),
    "minus zero": ({"strength": "-0.0"}, "weight is not above 0"),
    "negative": ({"strength": "-1"}, "weight is not above 0"),
    "below a double": ({"strength": "1e-400"}, "weight is not above 0"),
    "nothing right": (
        {"who": "", "what": None, "at": "?", "strength": "-1"},
        "user_id is null or empty; item_id is null or empty; engaged",
    ),
    "an item nobody sells": ({"what": "not in the catalog"}, Taken),
    "a small weight": ({"strength": "1e-300"}, Taken),
    "microseconds": ({"at": "2024-03-30T23:59:59.999999Z"}, Taken),
    "a day as time": ({"at": "2024-03-30"}, Taken),
    "the last moment": ({"at": "2024-03-31T23:59:59.999999Z"}, Taken),
}
ITEMS: dict[str, tuple[dict[str, object], str | None]] = {
    "i-null": ({"sku": None}, "item_id is null or empty"),
    "i-empty": ({"sku": ""}, "item_id is null or empty"),
    "i-blank": ({"sku": "\t "}, "item_id is null or empty"),
    "i-latin": ({"sku": b"\xe9t\xe9"}, "item_id is not the UTF-8"),
    "i-eligible": ({"sold": "perhaps"}, "eligible is not a boolean"),
    "i-time": ({"since": "soon"}, "event_timestamp is missing"),
    "i-empty-time": ({"since": ""}, "event_timestamp is missing"),
    "i-1969": ({"since": "1969-12-31"}, "event_timestamp is before 1970"),
    "i-future": ({"since": "2031-01-01"}, Taken),
    "i-no-title": ({"name": None}, Taken),
    "i-blank-title": ({"name": "  "}, Taken),
    "i-nothing": ({"name": None, "words": None, "section": None, "tags": None, "sold": None}, Taken),
    "i-title-in-latin": ({"name": b"Caf\xe9"}, Taken),
    "i-long-title": ({"name": "tea " * 25_000}, Taken),
    "i-null-byte": ({"name": "a\x00b", "words": "c\x00d"}, Taken),
    "i-markup": ({"name": "<img src=x onerror=alert(1)>", "words": "]]> <!-- {{7*7}}"}, Taken),
    "i-no-category": ({"section": []}, Taken),
    "i-null-category": ({"section": [None]}, Taken),
    "i-empty-category": ({"section": ["", "section 1"]}, Taken),
    "i-gap-in-the-path": ({"section": ["section 1", " ", "below"]}, Taken),
    "i-deep": ({"section": [f"level {number}" for number in range(300)]}, Taken),
    "i-separator": ({"section": ["a>b", "c\x1fd"]}, Taken),
    "i-latin-category": ({"section": [b"caf\xe9"]}, Taken),
    "i-tags": ({"tags": ["", None, "x", "x", " x "]}, Taken),
}
LABELS: dict[str, tuple[dict[str, object], str | None]] = {
    "l-none": ({"grade": None}, "grade is not a number"),
    "l-nan": ({"grade": float("nan")}, "grade is not a number"),
    "l-infinite": ({"grade": float("inf")}, "grade is not a number"),
    "l-above": ({"grade": 1.0000001}, "grade is not a number"),
    "l-below": ({"grade": -0.1}, "grade is not a number"),
    "l-itself": ({"sku": "l-itself"}, "item_id and other_item_id are the same"),
    "l-nobody": ({"sku": ""}, "item_id is null or empty"),
    "l-by-nobody": ({"by": None}, "source is null or empty"),
    "l-tomorrow": ({"at": "2031-01-01"}, "rated_at is in the future"),
    "l-unknown-items": ({}, Taken),
}


def _text(values: Sequence[object]) -> pa.Array:
    """Text that may be no UTF-8, as a careless writer leaves it in a file."""
    return pa.array([value.encode() if isinstance(value, str) else value for value in values], pa.binary()).view(pa.string())


def _written(path: Path, rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> None:
    columns = {}
    for name in names:
        values = [row[name] for row in rows]
        if any(isinstance(value, list) for value in values):
            flat = _text([inner for value in values for inner in value or []])
            offsets = np.cumsum([0, *(len(value or []) for value in values)]).astype(np.int32)  # null is empty here
            columns[name] = pa.ListArray.from_arrays(pa.array(offsets), flat)
        else:
            columns[name] = pa.array(values) if name == "grade" else _text(values)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)


def _events(world: BundleWorld) -> list[dict[str, object]]:
    """The world's, those of the odd ids, a pair that one user alone engages with time and again, and one that two users do."""
    plain = [
        {"who": f"{MARK}-{row.who}", "what": row.what, "at": row.at.isoformat(), "basket": row.basket, "strength": "1"}
        for row in world.events().itertuples()
    ]
    base = {"who": f"{MARK}-odd", "at": "2024-03-30T10:00:00Z", "strength": "1"}
    odd = [
        base
        | {
            "who": f"{MARK}-'{user}",
            "what": what,
            "at": ODD_TIMES[number % len(ODD_TIMES)].format(f"{number:02d}"),
            "basket": f"odd {number} {user}",
        }
        for number, item_id in enumerate(ODD_IDS.values())
        for user in range(2)
        for what in (item_id, PLAIN)
    ]
    alone = [
        base | {"who": f"{MARK}-alone", "what": what, "at": f"2024-03-{day}T10:00:00Z", "basket": f"alone {day}"}
        for day in range(10, 20)
        for what in ("b01-c0", "b02-c1")
    ]
    two = [
        base | {"who": f"{MARK}-two-{user}", "what": what, "at": "2024-03-20T10:00:00Z", "basket": f"two {user}"}
        for user in range(2)
        for what in ("b03-c0", "b04-c1")
    ]
    kinds = [base | {"what": PLAIN, "basket": kind} | row for kind, (row, _) in EVENTS.items()]
    return [*plain, *odd, *alone, *two, *kinds, *([base | {"what": PLAIN, "basket": "the same row", "at": "2024-03-29"}] * 3)]


def _items(world: BundleWorld) -> list[dict[str, object]]:
    usual = {"since": "1970-01-01", "sold": "true", "tags": ["tag"]}
    known = [
        usual | {"sku": row.sku, "name": row.name, "words": row.words, "section": [row.section]}
        for row in world.items().itertuples(index=False)
    ]
    base = usual | {"name": "Apple Pie", "words": "apple pie", "section": ["section 0"]}
    named = [base | {"sku": item_id, "name": f"odd {name}"} for name, item_id in ODD_IDS.items()]
    kinds = [base | {"sku": kind} | row for kind, (row, _) in ITEMS.items()]
    return [
        *known,
        *named,
        *kinds,
        base | {"sku": "i-twice"},
        base | {"sku": "i-twice"},
        base | {"sku": "i-two", "name": "another"},
        base | {"sku": "i-two"},
    ]


@dataclass(frozen=True, kw_only=True)
class Strange:
    folder: Path
    night: Night
    records: list[StageRecord]
    log: str

    def metric(self, stage: str, name: str) -> float:
        return next(record for record in self.records if record.stage == stage).metrics[name]


def _config(folder: Path) -> Path:
    config = write_config(
        folder, pairs={"window": {"kind": "session", "symmetric": True}, "half_life_days": 10, "rebuild_below": 0, "max_stale_share": 0.5}
    )
    content = yaml.safe_load(config.read_text())
    content["log"] = {"format": "json"}
    source = content["source"]
    source["max_rejected_share"] = 0.9
    source["events"] |= {"action_weights": {"engage": 100.0}}
    source["events"]["columns"]["weight"] = "strength"
    source["items"]["columns"] |= {"categories": "section", "tags": "tags", "eligible": "sold", "event_timestamp": "since"}
    columns = {"item_id": "sku", "other_item_id": "other", "source": "by", "rated_at": "at"}
    source["pair_relevance"] = {"path": str(folder / "labels"), "columns": columns}
    config.write_text(yaml.safe_dump(content))
    return config


@pytest.fixture(scope="module")
def strange(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Strange]:
    folder, world, lines = tmp_path_factory.mktemp("strange"), BundleWorld(), io.StringIO()
    _written(folder / "events" / "part-0.parquet", _events(world), ["who", "what", "at", "basket", "strength"])
    _written(folder / "items" / "part-0.parquet", _items(world), ["sku", "name", "words", "section", "tags", "sold", "since"])
    label = {"sku": PLAIN, "by": "human", "at": "2024-03-01", "grade": 0.5}
    labels = [label | {"other": kind} | row for kind, (row, _) in LABELS.items()]
    _written(folder / "labels" / "part-0.parquet", labels, ["sku", "other", "by", "at", "grade"])
    settings = load_settings(str(_config(folder)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(settings.pairs.user_hash_key_env, SECRET)
        logs.configure(LogSettings(format="json"), stream=lines)
        night = make_night(settings, NIGHT, spark=spark, display=Display(seconds_per_line=3600), now=NOW)
        records = run_night(night)
        logs.configure(LogSettings())
        yield Strange(folder=folder, night=night, records=records, log=lines.getvalue())


def test_there_are_enough_kinds() -> None:
    assert len(EVENTS) + len(ITEMS) + len(LABELS) + len(ODD_IDS) >= 90


def _reasons(strange: Strange, source: str, key: str) -> dict[object, str]:
    rows = strange.night.lake.read(REJECTED_ROWS).where(f"source = '{source}'").collect()
    return {json.loads(row["row"])[key]: row["reason"] for row in rows}


def test_every_event_is_taken_or_refused_with_its_reason(strange: Strange) -> None:
    refused = _reasons(strange, "events", "basket")
    wanted = {kind: reason for kind, (_, reason) in EVENTS.items() if reason}
    assert {kind for kind, reason in wanted.items() if reason not in refused.get(kind, "")} == set()
    assert refused.keys() == wanted.keys()
    assert strange.metric("ingest", "num_rejected_events") == len(wanted)
    found = strange.night.lake.read(ENGAGEMENTS).toPandas().set_index("session_id")
    assert {kind for kind, (_, reason) in EVENTS.items() if not reason} <= set(found.index)
    assert "the same row" in found.index
    assert isinstance(found.loc["the same row"], pd.Series)  # once
    moments = {"a day as time": "2024-03-30", "microseconds": "2024-03-30 23:59:59.999999", "the last moment": "2024-03-31 23:59:59.999999"}
    assert {kind: found.loc[kind, "engaged_at"] for kind in moments} == {kind: pd.Timestamp(moment) for kind, moment in moments.items()}


def test_every_item_and_label_is_taken_or_refused_with_its_reason(strange: Strange) -> None:
    reasons = strange.night.lake.read(REJECTED_ROWS).where("source = 'items'").select("reason").collect()
    wanted = [reason for _, reason in ITEMS.values() if reason]
    found = [row["reason"] for row in reasons]
    assert all(any(reason in text for text in found) for reason in wanted), found
    assert len(found) == len(wanted) + 1  # one of the two that contradict each other
    assert strange.metric("ingest", "num_rejected_items") == len(wanted) + 1
    items = {row["item_id"]: row for row in strange.night.lake.read(ITEM_ANNOTATIONS).collect()}
    assert {kind for kind, (_, reason) in ITEMS.items() if not reason} <= items.keys()
    assert items["i-title-in-latin"]["title"] == "Caf\ufffd"
    assert items["i-latin-category"]["categories"] == ["caf\ufffd"]
    assert items["i-tags"]["tags"] == ["x"]
    paths = {"i-no-category": None, "i-null-category": None, "i-empty-category": None, "i-gap-in-the-path": ["section 1"]}
    assert {kind: items[kind]["categories"] for kind in paths} == paths
    assert len(items["i-deep"]["categories"]) == 300
    labels = _reasons(strange, "pair_relevance", "other")
    assert {kind: reason in labels.get(kind, "") for kind, (_, reason) in LABELS.items() if reason} == {
        kind: True for kind, (_, reason) in LABELS.items() if reason
    }
    assert [row["other_item_id"] for row in strange.night.lake.read(PAIR_RELEVANCE).collect()] == ["l-unknown-items"]


def test_odd_ids_and_times_are_taken_as_they_are(strange: Strange) -> None:
    night, ids = strange.night, list(ODD_IDS.values())
    assert [record.stage for record in strange.records] == list(STAGES)
    pairs = night.lake.read(CO_ENGAGEMENT_PAIRS).toPandas()
    assert set(pairs.loc[pairs["trigger_item_id"] == PLAIN, "target_item_id"]) >= set(ids)
    lists = neighbors_of(night.lake.root, ids)
    online = store.lookup_online(open_feature_store(night.settings), ids, heads=["merged"], k=100)
    explorer = Explorer(settings=night.settings)
    found = explorer.night().catalog.known(ids)
    days = {str(row["event_date"]) for row in night.lake.read(ENGAGEMENTS).where("session_id LIKE 'odd %'").collect()}
    assert days == {"1970-01-01", "2024-02-29", "2024-03-10", "2024-03-31"}
    for name, item_id in ODD_IDS.items():
        assert rows_where(night.lake.root, CO_ENGAGEMENT_PAIRS, "trigger_item_id", [item_id]).num_rows >= 1, name
        merged = [neighbor["neighbor_id"] for neighbor in lists[item_id, "merged"]]
        assert PLAIN in merged, name
        assert online[item_id]["merged"]["ids"] == merged, name
        assert found[item_id].title == f"odd {name}"


def test_items_about_which_nothing_is_known_have_lists_and_ones_not_yet_valid_have_none(strange: Strange) -> None:
    features = {row["item_id"]: row for row in strange.night.lake.read(ITEM_FEATURES).collect()}
    assert not any(features["i-nothing"]["content_vector"])
    assert "i-future" not in features or not features["i-future"]["in_catalog"]
    lists = neighbors_of(strange.night.lake.root, ["i-nothing", "i-future", "i-long-title", "i-deep", "i-markup"])
    assert len(lists["i-nothing", "merged"]) == 10
    assert ("i-future", "merged") not in lists
    assert strange.metric("publish_neighbors", "coverage") == 1.0
    page = strange.night.report_path.read_text()
    assert "<img src=x" not in page
    assert "<script>alert(1)" not in page


def test_the_log_is_one_object_a_line_about_each_stage(strange: Strange) -> None:
    lines = [json.loads(line) for line in strange.log.splitlines()]
    assert {line["level"] for line in lines} <= {"info", "warning"}
    assert list(dict.fromkeys(line["stage"] for line in lines if "stage" in line)) == list(STAGES)
    assert {line["run_id"] for line in lines} == {strange.night.run_id}


# --- gates ---


def _broken(lists: DataFrame) -> DataFrame:
    """Lists as defects would leave them: all of other items, some lost, one doubled, single ones with what no list may hold."""
    ids = sorted(row["item_id"] for row in lists.select("item_id").distinct().collect())
    moved = F.create_map(*(F.lit(text) for pair in zip(ids, ids[37:] + ids[:37], strict=True) for text in pair))
    neighbors, item = F.col("neighbors"), F.col("item_id")

    def first(**changes: Column) -> Column:
        changed = F.transform(F.slice(neighbors, 1, 1), lambda n: reduce(lambda n, c: n.withField(*c), changes.items(), n))
        return F.concat(changed, F.slice(neighbors, 2, 100))

    faults = {
        ids[10]: first(neighbor_id=F.lit(ids[10])),
        ids[11]: F.concat(neighbors, F.slice(neighbors, 1, 1)),
        ids[12]: first(neighbor_id=F.lit("nobody sells it")),
        ids[13]: F.reverse("neighbors"),
        ids[14]: first(score=F.lit(float("nan"))),
    }
    rows = lists.withColumn("item_id", moved[item]).where(~item.isin(ids[20:30]))
    wrong = reduce(lambda column, fault: F.when(item == fault[0], fault[1]).otherwise(column), faults.items(), neighbors)
    return rows.withColumn("neighbors", wrong).unionByName(rows.where(item == ids[15]))


def test_lists_that_defects_have_spoilt_are_not_published(strange: Strange) -> None:
    settings = strange.night.settings
    strict = settings.model_copy(update={"gates": settings.gates.model_copy(update={"min_counted_share": 0.6})})  # of a small world
    night, before = replace(strange.night, settings=strict), strange.night.lake.version(ITEM_NEIGHBORS)
    lists = night.lake.read(ITEM_NEIGHBORS).select("item_id", "head", "neighbors", "list_hash").localCheckpoint()
    assert strange.metric("publish_neighbors", "counted_share") > 0.9
    run = StageRun(night=night, stage="publish_neighbors")
    with pytest.raises(GateError):
        publish_lists(run, _broken(lists), lambda batches: batches, model_version="spoilt", expected=before)
    assert run.report is not None
    assert {failure.rule.metric for failure in run.report.failures} == {
        "coverage",
        "num_self_neighbors",
        "num_duplicate_neighbors",
        "num_ineligible_neighbors",
        "num_unordered",
        "num_nonfinite",
        "num_duplicate_keys",
        "counted_share",
    }
    assert night.lake.version(ITEM_NEIGHBORS) == before


# --- privacy ---


def _texts(path: Path) -> bytes:
    """What a file says, with what its format compresses or encodes."""
    if path.suffix == ".parquet":
        table = pq.read_table(path)
        return path.read_bytes() + repr(table.to_pydict()).encode("utf-8", "replace") + str(table.schema).encode()
    if path.suffix == ".npz":
        with zipfile.ZipFile(path) as archive:
            return b"".join(archive.read(name) for name in archive.namelist())
    return path.read_bytes()


def _holding(root: Path, word: str) -> set[str]:
    """The first folder below the lake of every file that holds a word; UTF-32 is how numpy keeps text."""
    wanted = [word.encode(), word.encode("utf-32-le"), word.encode("utf-16-le")]
    files = [path for path in root.rglob("*") if path.is_file()]
    return {path.relative_to(root).parts[0] for path in files if any(form in _texts(path) for form in wanted)}


def test_no_user_id_and_no_secret_is_in_any_byte_that_is_published_or_kept(strange: Strange) -> None:
    root = Path(strange.night.lake.root)
    assert _holding(root, MARK) == {ENGAGEMENTS.name}
    assert _holding(root, PLAIN) > {ENGAGEMENTS.name, ITEM_NEIGHBORS.name, "_feast", "_artifacts"}  # the search finds what is there
    assert _holding(root, SECRET) == set()
    assert MARK not in strange.log
    assert SECRET not in strange.log


def test_hashes_of_users_are_in_restricted_tables_and_of_refused_rows_alone(strange: Strange) -> None:
    users = strange.night.lake.read(ENGAGEMENTS).select("user_id").distinct().collect()
    hashes = [keyed_hash(row["user_id"], key=SECRET.encode()) for row in users]
    holding = set[str]()
    for number in [*hashes[:5], keyed_hash(f"{MARK}-odd", key=SECRET.encode())]:
        for form in (str(number), f"{number % 2**64:016x}"):
            holding |= _holding(Path(strange.night.lake.root), form)
    assert holding <= {CO_ENGAGEMENT_DAILY.name, REJECTED_ROWS.name}
    assert REJECTED_ROWS.name in holding


def test_a_pair_of_one_user_surfaces_nowhere(strange: Strange) -> None:
    night, alone = strange.night, {"b01-c0", "b02-c1"}
    assert night.lake.read(CO_ENGAGEMENT_DAILY).where("trigger_item_id = 'b01-c0' AND target_item_id = 'b02-c1'").count() == 10
    for table in (CO_ENGAGEMENT_PAIRS, CO_ENGAGEMENT_TOTALS):
        pairs = {(row["trigger_item_id"], row["target_item_id"]) for row in night.lake.read(table).collect()}
        assert ("b03-c0", "b04-c1") in pairs  # two users are enough
        assert not pairs & {("b01-c0", "b02-c1"), ("b02-c1", "b01-c0")}
    for (item_id, _), neighbors in neighbors_of(night.lake.root, sorted(alone)).items():
        for neighbor in neighbors:
            if neighbor["neighbor_id"] in alone - {item_id}:
                assert neighbor["num_user_days"] == 0
                assert "counts" not in neighbor["sources"]
                assert "together" not in neighbor["reason"]


def test_a_deleted_user_is_gone_from_the_current_tables_after_the_next_night(strange: Strange) -> None:
    """Runs last: it changes the source."""
    path, gone = strange.folder / "events" / "part-0.parquet", f"{MARK}-two-1"
    table = pq.read_table(path)
    keep = [user != gone.encode() for user in table["who"].cast(pa.binary()).to_pylist()]
    pq.write_table(table.filter(pa.array(keep)), path)
    before = strange.night
    night = make_night(before.settings, NIGHT + timedelta(days=1), spark=before.spark, display=before.display, now=NOW)
    run_stage(night, "ingest", ingest)
    record = run_stage(night, "build_pairs", build_pairs)
    assert record.metrics["built_from_nothing"] == 0.0
    assert night.lake.read(ENGAGEMENTS).where(f"user_id = '{gone}'").count() == 0
    hashed = keyed_hash(gone, key=SECRET.encode())
    daily = night.lake.read(CO_ENGAGEMENT_DAILY).where("event_date = '2024-03-20' AND trigger_item_id = 'b03-c0'").collect()
    assert hashed not in {number for row in daily for number in row["user_hashes"]}
    kept = {
        number
        for row in before.lake.read(CO_ENGAGEMENT_DAILY, before.pinned_version(CO_ENGAGEMENT_DAILY)).collect()
        for number in row["user_hashes"]
    }
    assert hashed in kept  # the older version, until house-keeping removes it
    for name in (CO_ENGAGEMENT_PAIRS, CO_ENGAGEMENT_TOTALS):
        assert night.lake.read(name).where("trigger_item_id = 'b03-c0' AND target_item_id = 'b04-c1'").count() == 0
