"""Tables: created with their comments, replaced in part, fenced when published, and readable outside Spark."""

import shutil
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import duckdb
import pyarrow.parquet as pq
import pytest
from pyspark.sql import DataFrame, Row, SparkSession

from conf.errors import TableError
from conf.settings import LakeSettings
from conf.tables import CO_ENGAGEMENT_PAIRS, ITEM_NEIGHBORS, ITEM_POPULARITY, RUNS
from features.file_stats import FileStats
from features.pair_files import KnownFile
from jobs import lake as lake_module
from jobs.lake import Lake, open_lake
from jobs.ledger import Ledger, StageRecord
from jobs.reader import changes_since, first_row, known_changes, open_table, rows_where, same_rows

NOT_FOR_READERS_OUTSIDE_SPARK = {"deletionVectors", "columnMapping", "v2Checkpoint", "typeWidening"}


@pytest.fixture
def lake(spark: SparkSession, tmp_path: Path) -> Lake:
    return open_lake(spark, LakeSettings(root=str(tmp_path / "lake")))


def _popularity(lake: Lake, *items: tuple[str, float]) -> DataFrame:
    day = date(2024, 1, 2)
    rows = [(item, weight, day, 1, 0.0, day, 1, day, day, day) for item, weight in items]
    return lake.spark.createDataFrame(rows, list(ITEM_POPULARITY.column_names))


def test_replace_where_casts_and_keeps_the_rest(lake: Lake) -> None:
    assert lake.replace(ITEM_POPULARITY, _popularity(lake, ("a", 1.0), ("b", 2.0))) == 1  # version 0 is the creation
    assert lake.replace(ITEM_POPULARITY, _popularity(lake, ("b", 5.0)), where="item_id = 'b'") == 2
    rows = {row["item_id"]: row["weight"] for row in lake.read(ITEM_POPULARITY).collect()}
    assert rows == {"a": 1.0, "b": 5.0}
    assert {row["item_id"]: row["weight"] for row in lake.read(ITEM_POPULARITY, 1).collect()} == {"a": 1.0, "b": 2.0}
    (lake.spark.createDataFrame([("a", 1.0)], "item_id string, weight double").write.format("delta").save(lake.path(CO_ENGAGEMENT_PAIRS)))
    with pytest.raises(TableError, match=r"co_engagement_pairs under .* lacks columns \['as_of', .*an earlier version of this code"):
        lake.create(CO_ENGAGEMENT_PAIRS)
    with pytest.raises(TableError, match=r"missing columns \['as_of'\] for table item_popularity; have"):
        lake.replace(ITEM_POPULARITY, _popularity(lake, ("c", 1.0)).drop("as_of"))


def test_tables_carry_comments_and_no_feature_that_other_readers_lack(lake: Lake) -> None:
    lake.create(ITEM_NEIGHBORS)
    details = lake.spark.sql(f"DESCRIBE DETAIL delta.`{lake.path(ITEM_NEIGHBORS)}`").first()
    assert details["description"] == ITEM_NEIGHBORS.comment
    assert not NOT_FOR_READERS_OUTSIDE_SPARK & set(details["tableFeatures"] or [])
    assert (details["minReaderVersion"], details["minWriterVersion"]) == (1, 2)


def test_readers_outside_spark_see_only_the_current_rows(lake: Lake) -> None:
    lake.replace(ITEM_POPULARITY, _popularity(lake, ("a", 1.0), ("b", 2.0)))
    lake.replace(ITEM_POPULARITY, _popularity(lake, ("c", 3.0)))
    table = open_table(lake.root, ITEM_POPULARITY)
    assert table.to_pyarrow_dataset().to_table(columns=["item_id"]).to_pydict() == {"item_id": ["c"]}
    assert duckdb.execute("SELECT item_id, weight FROM read_parquet(?)", [table.file_uris()]).fetchall() == [("c", 3.0)]
    with pytest.raises(TableError, match=r"no table co_engagement_pairs under .*jobs\.nightly"):
        open_table(lake.root, CO_ENGAGEMENT_PAIRS)
    with pytest.raises(TableError, match="no table co_engagement_pairs"):
        lake.read(CO_ENGAGEMENT_PAIRS)


def test_files_are_named_with_their_sizes_unless_rows_in_them_are_deleted(lake: Lake) -> None:
    lake.replace(ITEM_POPULARITY, _popularity(lake, ("a", 1.0), ("b", 2.0)))
    lake.append(ITEM_POPULARITY, _popularity(lake, ("c", 3.0)))
    first, second = (lake.file_sizes(ITEM_POPULARITY, version) for version in (1, 2))
    assert first.items() < second.items()
    assert second == {path: Path(path).stat().st_size for path in second}
    assert {row[0] for path in second for row in duckdb.execute("SELECT item_id FROM read_parquet(?)", [path]).fetchall()} == set("abc")
    lake.spark.sql(f"ALTER TABLE delta.`{lake.path(ITEM_POPULARITY)}` SET TBLPROPERTIES ('delta.enableDeletionVectors' = true)")
    with pytest.raises(TableError, match=r"item_popularity under .* has deletion vectors, which mtmh does not read; run ALTER TABLE"):
        lake.file_sizes(ITEM_POPULARITY, lake.version(ITEM_POPULARITY))


def test_the_first_row_is_one_of_the_run_that_is_asked_for(lake: Lake) -> None:
    for run_id, item in (("one", "a"), ("two", "b")):
        row = (date(2024, 1, 2), run_id, item, "merged", [], "model", f"hash of {item}", 1)
        lake.append(ITEM_NEIGHBORS, lake.spark.createDataFrame([row], ITEM_NEIGHBORS.ddl))
    table = open_table(lake.root, ITEM_NEIGHBORS)
    assert first_row(table, ["item_id"], run_id="two") == {"item_id": "b"}
    assert first_row(table, ["run_id"]) in ({"run_id": "one"}, {"run_id": "two"})
    assert first_row(table, ["run_id"], run_id="three") is None


def test_a_version_outlives_the_files_that_a_compaction_replaced(lake: Lake) -> None:
    """A night pins a version; house-keeping compacts it, and, once that is long ago, removes its first files."""
    for item in "abc":
        lake.append(ITEM_POPULARITY, _popularity(lake, (item, 1.0)))
    pinned = lake.version(ITEM_POPULARITY)
    table = open_table(lake.root, ITEM_POPULARITY)
    assert table.optimize.compact()["numFilesRemoved"] == 3
    assert len(table.vacuum(retention_hours=0, dry_run=False, enforce_retention_duration=False)) == 3
    lake.append(ITEM_POPULARITY, _popularity(lake, ("d", 1.0)))
    assert {row["item_id"] for row in lake.read(ITEM_POPULARITY, pinned).collect()} == set("abc")
    assert rows_where(lake.root, ITEM_POPULARITY, "item_id", ["b", "d"], ["item_id"], pinned).to_pydict() == {"item_id": ["b"]}
    assert len(lake.file_sizes(ITEM_POPULARITY, pinned)) == 1


def test_tables_say_how_long_their_versions_stay_and_a_gap_in_their_log_is_no_silence(spark: SparkSession, lake: Lake) -> None:
    """Delta keeps logs for 30 days and names of replaced files for 7 by itself, whatever nights are kept."""
    lake.replace(ITEM_POPULARITY, _popularity(lake, ("a", 1.0)))
    names = ("delta.logRetentionDuration", "delta.deletedFileRetentionDuration")
    assert open_table(lake.root, ITEM_POPULARITY).metadata().configuration == dict.fromkeys(names, "interval 60 days")
    fewer = open_lake(spark, LakeSettings(root=lake.root, keep_nights=2))
    seen = fewer.version(ITEM_POPULARITY)
    for _ in range(2):
        fewer.create(ITEM_POPULARITY)
    assert open_table(lake.root, ITEM_POPULARITY).metadata().configuration == dict.fromkeys(names, "interval 7 days")
    assert fewer.version(ITEM_POPULARITY) == seen + 1
    assert changes_since(lake.root, ITEM_POPULARITY, seen) == []
    for item in "bc":
        fewer.replace(ITEM_POPULARITY, _popularity(lake, (item, 1.0)))
    table, log = open_table(lake.root, ITEM_POPULARITY), Path(lake.path(ITEM_POPULARITY), "_delta_log")
    table.create_checkpoint()
    for number in range(seen + 3):
        (log / f"{number:020d}.json").unlink()
    for look in (changes_since, same_rows):
        with pytest.raises(TableError, match=r"the log of item_popularity under .* goes back to version 4, wanted 1, .*--force"):
            look(lake.root, ITEM_POPULARITY, seen)
    assert [commit["version"] for commit in known_changes(lake.root, ITEM_POPULARITY)] == [seen + 3]


def _file_of(lake: Lake, item: str) -> Row:
    """A file with one item in the folder of item_popularity that no commit names, as a task leaves it."""
    scratch, name = Path(lake.root) / "scratch", f"part-{item}.parquet"
    _popularity(lake, (item, 1.0)).coalesce(1).write.parquet(str(scratch))
    (found,) = scratch.glob("*.parquet")
    path = found.rename(Path(lake.path(ITEM_POPULARITY)) / name)
    shutil.rmtree(scratch)
    stats = FileStats()
    stats.add(pq.read_table(path))
    return Row(kind="daily", name=name, size=path.stat().st_size, num_rows=1, stats=stats.as_json())


@pytest.mark.parametrize("compacted", [False, True])
def test_files_are_exchanged_also_where_a_compaction_came_between(lake: Lake, compacted: bool) -> None:
    for item in "abc":
        lake.append(ITEM_POPULARITY, _popularity(lake, (item, 1.0)))
    version = lake.version(ITEM_POPULARITY)
    files = {
        duckdb.execute("SELECT item_id FROM read_parquet(?)", [uri]).fetchone()[0]: uri for uri in lake.files(ITEM_POPULARITY, version)
    }
    assert lake.files(ITEM_POPULARITY, version)[files["a"]] == KnownFile(Path(files["a"]).stat().st_size)
    if compacted:
        assert open_table(lake.root, ITEM_POPULARITY).optimize.compact()["numFilesRemoved"] == 3
    exchange = {"removed": {Path(files["b"]).name}, "version": version}
    now = lake.exchange_files(ITEM_POPULARITY, [_file_of(lake, "d")], **exchange)
    assert now == lake.version(ITEM_POPULARITY) > version
    assert sorted(row["item_id"] for row in lake.read(ITEM_POPULARITY).collect()) == ["a", "c", "d"]
    assert lake.exchange_files(ITEM_POPULARITY, [], removed=set(), version=now) == now, "nothing to change, no commit"
    with pytest.raises(TableError, match=r"somebody else changed item_popularity under .* while this stage wrote it"):
        lake.exchange_files(ITEM_POPULARITY, [_file_of(lake, "e")], **exchange)
    with pytest.raises(TableError, match=r"has no files \['part-of-nobody.parquet'\]"):
        lake.exchange_files(ITEM_POPULARITY, [], removed={"part-of-nobody.parquet"}, version=now)
    assert sorted(row["item_id"] for row in lake.read(ITEM_POPULARITY).collect()) == ["a", "c", "d"]


def test_rows_that_come_while_files_are_exchanged_are_not_lost(lake: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    lake.append(ITEM_POPULARITY, _popularity(lake, ("a", 1.0)))
    version, looked = lake.version(ITEM_POPULARITY), lake_module.changes_since

    def looks_and_is_overtaken(*arguments: Any) -> list[dict[str, Any]]:
        found = looked(*arguments)
        monkeypatch.setattr(lake_module, "changes_since", looked)
        lake.append(ITEM_POPULARITY, _popularity(lake, ("late", 1.0)))
        return found

    new = _file_of(lake, "d")
    monkeypatch.setattr(lake_module, "changes_since", looks_and_is_overtaken)
    with pytest.raises(TableError, match=r"somebody else changed item_popularity under .* while this stage wrote it"):
        lake.exchange_files(ITEM_POPULARITY, [new], removed=set(), version=version)
    assert sorted(row["item_id"] for row in lake.read(ITEM_POPULARITY).collect()) == ["a", "late"]


def test_the_ledger_finds_the_newest_success(lake: Lake) -> None:
    ledger = Ledger(root=lake.root)
    assert ledger.last_success(stage="ingest") is None
    lake.create(RUNS)
    for attempt, status in ((1, "succeeded"), (2, "succeeded"), (3, "failed")):
        at = datetime(2024, 1, 2, attempt, tzinfo=UTC)
        ledger.append(
            StageRecord(
                run_id="r",
                run_date=date(2024, 1, 1),
                stage="ingest",
                attempt=attempt,
                status=status,
                started_at=at,
                ended_at=at,
                seconds=1.0,
                input_versions={},
                output_versions={"engagements": attempt},
                fingerprint="f",
                settings_fingerprint="s",
                metrics={"num_items": 2.0},
            )
        )
    found = ledger.last_success(stage="ingest", run_id="r")
    assert found is not None
    assert (found.attempt, found.output_versions, found.metrics) == (2, {"engagements": 2}, {"num_items": 2.0})
    assert lake.version(RUNS) == 3
