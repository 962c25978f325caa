"""A user's own tables by configuration alone: formats and times, slices, and the two development sets."""

from datetime import UTC, date, datetime
from pathlib import Path

import pytest
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from conf.settings import load_settings
from conf.tables import ENGAGEMENTS, ITEM_ANNOTATIONS, ITEM_NEIGHBORS, ITEM_POPULARITY
from jobs.ingest import ingest
from jobs.nightly import run_night
from jobs.progress import Display
from jobs.stage import Night, make_night, run_stage
from tests.conftest import ROOT
from tests.worlds import BundleWorld, write_config

NIGHT = date(2024, 3, 31)
NOW = datetime(2024, 6, 1, tzinfo=UTC)
WORLD = BundleWorld(num_users=20)


def _night(spark: SparkSession, config: str, run_date: date, *assignments: str, now: datetime = NOW) -> Night:
    return make_night(load_settings(config, assignments), run_date, spark=spark, display=Display(seconds_per_line=3600), now=now)


def test_csv_and_delta_give_the_tables_that_parquet_gives(spark: SparkSession, tmp_path: Path) -> None:
    """CSV with epoch milliseconds and a tag text, Delta with ISO text: the same engagements, the same catalog."""
    WORLD.write(tmp_path)
    events, items = WORLD.events(), WORLD.items()
    (tmp_path / "csv").mkdir()
    events.assign(at=events["at"].astype("int64") // 1000).to_csv(tmp_path / "csv" / "events.csv", index=False)
    items.assign(labels=items["section"] + "|all").to_csv(tmp_path / "csv" / "items.csv", index=False)
    text = events.assign(at=events["at"].dt.strftime("%Y-%m-%dT%H:%M:%S+00:00"))
    spark.createDataFrame(text).write.format("delta").save(str(tmp_path / "delta" / "events"))
    spark.createDataFrame(items).write.format("delta").save(str(tmp_path / "delta" / "items"))
    config = str(write_config(tmp_path))
    csv = ["source.events.format=csv", f"source.events.path={tmp_path}/csv/events.csv", "source.events.time_format=epoch_milliseconds"]
    csv += ["source.items.format=csv", f"source.items.path={tmp_path}/csv/items.csv", "source.items.columns.tags=labels"]
    delta = ["source.events.format=delta", f"source.events.path={tmp_path}/delta/events"]
    delta += ["source.items.format=delta", f"source.items.path={tmp_path}/delta/items"]
    found = {}
    for name, assignments in (("parquet", []), ("csv", csv), ("delta", delta)):
        night = _night(spark, config, NIGHT, f"lake.root={tmp_path}/lake-{name}", *assignments)
        run_stage(night, "ingest", ingest)
        engagements = night.lake.read(ENGAGEMENTS).orderBy(*ENGAGEMENTS.key).collect()
        columns = ("item_id", "title", "text", "categories", "eligible")
        found[name] = (engagements, night.lake.read(ITEM_ANNOTATIONS).orderBy("item_id").select(*columns).collect())
        tags = {tuple(row["tags"] or ()) for row in night.lake.read(ITEM_ANNOTATIONS).select("tags").collect()}
        assert tags == ({(f"section {c}", "all") for c in range(WORLD.num_categories)} if name == "csv" else {()})
    assert found["csv"] == found["parquet"]
    assert found["delta"] == found["parquet"]
    assert len(found["parquet"][0]) == len(events[events["at"] < "2024-04-01"].drop_duplicates(["who", "what", "at"]))


def test_a_slice_takes_whole_users(spark: SparkSession, tmp_path: Path) -> None:
    WORLD.write(tmp_path)
    night = _night(spark, str(write_config(tmp_path)), NIGHT, "source.user_share=0.5", "gates.min_events=1")
    run_stage(night, "ingest", ingest)
    kept = {row["user_id"]: row["count"] for row in night.lake.read(ENGAGEMENTS).groupBy("user_id").count().collect()}
    events = WORLD.events()
    events = events[events["at"] < "2024-04-01"].drop_duplicates(["who", "what", "at"])
    assert 0 < len(kept) < WORLD.num_users
    assert kept == events[events["who"].isin(kept)].groupby("who").size().to_dict()


@pytest.mark.stranger
@pytest.mark.parametrize(("config", "run_date"), [("retail_gifts", date(2011, 10, 31)), ("ifdb_games", date(2024, 12, 31))])
def test_development_sets_run_by_configuration_alone(
    spark: SparkSession, shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: str, run_date: date
) -> None:
    """A slice of the users through the whole night: sessions, and a time window with tags; new items are raised to the front."""
    monkeypatch.chdir(ROOT)  # the overlays' paths are relative to the checkout
    assert (shared_data / config).is_dir()
    fast = ["source.user_share=0.1", "training.num_steps=5", "model.dimension=32", "features.content_dimensions=32",
            "training.num_validation_triggers=100", "training.num_threads=1"]  # fmt: skip
    fresh = ["retrieval.list_length=20", "merge=[{value: 0.005, new_item_bonus: 10}]"]
    night = _night(spark, config, run_date, f"lake.root={tmp_path}/lake", *fresh, *fast, now=datetime.now(UTC))
    run_night(night)
    lists = night.lake.read(ITEM_NEIGHBORS).where("head = 'merged'")
    assert lists.count() > 3_000
    assert lists.where(F.size("neighbors") == 20).count() == lists.count()
    first = lists.select("item_id", F.col("neighbors")[0].neighbor_id.alias("neighbor_id"))
    known = night.lake.read(ITEM_POPULARITY).where("num_user_days >= 5").withColumnRenamed("item_id", "neighbor_id")
    assert first.join(known, "neighbor_id").count() < 0.1 * lists.count()
