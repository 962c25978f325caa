"""Bad sources and settings: one clear error each, and nothing half-written."""

import json
from dataclasses import replace
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from pyspark.sql import SparkSession

from conf.errors import BrokenGateError, GateError, MachineError, MtmhError, SettingsError, SourceError
from conf.settings import load_settings
from conf.tables import ENGAGEMENTS, ITEM_ANNOTATIONS, REJECTED_ROWS
from jobs.arguments import parse
from jobs.ingest import ingest
from jobs.progress import Display
from jobs.session import check_java
from jobs.stage import Night, make_night, run_stage
from tests.worlds import BundleWorld, write_config

NIGHT = date(2024, 3, 31)
WORLD = BundleWorld(num_users=20, sessions_per_user=4)


def _night(spark: SparkSession, config: Path) -> Night:
    display = Display(seconds_per_line=3600)
    return make_night(load_settings(str(config)), NIGHT, spark=spark, display=display, now=datetime(2024, 6, 1, tzinfo=UTC))


def _source(folder: Path, **over: Any) -> dict[str, Any]:
    events = {"path": str(folder / "events"), "columns": {"user_id": "who", "item_id": "what", "engaged_at": "at", "session_id": "basket"}}
    items = {"path": str(folder / "items"), "columns": {"item_id": "sku", "title": "name"}}
    return {"events": events | over.get("events", {}), "items": items | over.get("items", {})}


@pytest.mark.parametrize(
    ("over", "error", "says"),
    [
        ({"events": {"path": "nowhere/events"}}, SourceError, ["events table", "nowhere/events", "source.events.path"]),
        ({"items": {"path": "nowhere/items"}}, SourceError, ["items table", "nowhere/items", "source.items.path"]),
        (
            {"events": {"columns": {"user_id": "who", "item_id": "sku", "engaged_at": "when"}}},
            SourceError,
            ["sku", "when", "have", "what", "source.events.columns"],
        ),
        ({"items": {"columns": {"item_id": "sku", "title": "caption"}}}, SourceError, ["caption", "have", "name", "source.items.columns"]),
        (
            {"events": {"columns": {"user_id": "who", "item_id": "what", "engaged_at": "flag"}}},
            SourceError,
            ["flag", "boolean", "engaged_at"],
        ),
    ],
    ids=["missing events", "missing items", "missing event columns", "missing item column", "wrong type"],
)
def test_unusable_sources(spark: SparkSession, tmp_path: Path, over: dict[str, Any], error: type[MtmhError], says: list[str]) -> None:
    WORLD.write(tmp_path)
    WORLD.events().assign(flag=True).to_parquet(tmp_path / "events" / "part-0.parquet", index=False)
    night = _night(spark, write_config(tmp_path, source=_source(tmp_path, **over)))
    with pytest.raises(error) as raised:
        run_stage(night, "ingest", ingest)
    assert all(text in str(raised.value) for text in says), str(raised.value)
    assert not night.lake.exists(ENGAGEMENTS)
    assert night.ledger.records(run_id=night.run_id)[0].status == "failed"


def test_unreadable_file(spark: SparkSession, tmp_path: Path) -> None:
    WORLD.write(tmp_path)
    (tmp_path / "events" / "part-0.parquet").write_bytes(b"not parquet at all")
    night = _night(spark, write_config(tmp_path))
    with pytest.raises(
        SourceError, match=r"cannot read the events table: .*part-0\.parquet is not a Parquet file.*\n.*source\.events\.path"
    ):
        run_stage(night, "ingest", ingest)


def test_no_events_and_no_items(spark: SparkSession, tmp_path: Path) -> None:
    WORLD.write(tmp_path)
    config = write_config(tmp_path)
    early = make_night(load_settings(str(config)), date(2020, 1, 1), spark=spark, display=Display(), now=datetime(2024, 6, 1, tzinfo=UTC))
    with pytest.raises(GateError, match="num_engagements: found 0"):
        run_stage(early, "ingest", ingest)
    assert early.lake.read(ITEM_ANNOTATIONS).count() == 0  # taken back
    WORLD.items().head(0).to_parquet(tmp_path / "items" / "part-0.parquet", index=False)
    with pytest.raises(GateError, match="num_items: found 0"):
        run_stage(_night(spark, config), "ingest", ingest)


def test_bad_rows_are_refused_with_their_reason_and_counted(spark: SparkSession, tmp_path: Path) -> None:
    WORLD.write(tmp_path)
    good = WORLD.events().assign(strength=1.0)
    bad = [
        ({"who": None}, "user_id"),
        ({"what": ""}, "item_id"),
        ({"what": "   "}, "item_id"),
        ({"at": pd.NaT}, "engaged_at"),
        ({"at": pd.Timestamp("2031-01-01", tz="UTC")}, "future"),
        ({"strength": float("nan")}, "weight"),
        ({"strength": float("inf")}, "weight"),
        ({"strength": -1.0}, "weight"),
        ({"strength": 0.0}, "weight"),
    ]
    rows = [good.iloc[0].to_dict() | over for over, _ in bad]
    frame = pd.concat([good, pd.DataFrame(rows)], ignore_index=True)
    frame["at"] = frame["at"].astype("datetime64[us, UTC]")
    frame.to_parquet(tmp_path / "events" / "part-0.parquet", index=False)
    columns = {"user_id": "who", "item_id": "what", "engaged_at": "at", "session_id": "basket", "weight": "strength"}
    config = write_config(tmp_path, source=_source(tmp_path, events={"columns": columns}) | {"max_rejected_share": 0.5})
    night = _night(spark, config)
    record = run_stage(night, "ingest", ingest)
    assert record.metrics["num_rejected_events"] == len(bad)
    refused = night.lake.read(REJECTED_ROWS).collect()
    assert sum(row["num_rows"] for row in refused) == len(bad)
    for _, word in bad:
        assert any(word in row["reason"] for row in refused), word
    assert not any(user in row["row"] for row in refused for user in good["who"].unique())  # user ids are hashed


def test_duplicate_items_with_different_content(spark: SparkSession, tmp_path: Path) -> None:
    WORLD.write(tmp_path)
    items = WORLD.items()
    twin = items.head(1).assign(name="Something else")
    pd.concat([items, items.tail(1), twin]).to_parquet(tmp_path / "items" / "part-0.parquet", index=False)
    night = _night(spark, write_config(tmp_path))
    record = run_stage(night, "ingest", ingest)
    assert record.metrics["num_rejected_items"] == 1
    assert record.metrics["num_items"] == len(items)
    reasons = [row["reason"] for row in night.lake.read(REJECTED_ROWS).collect()]
    assert reasons == ["duplicate item_id with different content"]


def test_too_many_refused_rows_stop_the_night(spark: SparkSession, tmp_path: Path) -> None:
    WORLD.write(tmp_path)
    events = WORLD.events()
    events.loc[events.index % 4 == 0, "who"] = None
    events.to_parquet(tmp_path / "events" / "part-0.parquet", index=False)
    night = _night(spark, write_config(tmp_path))
    with pytest.raises(GateError, match="rejected_events_share"):
        run_stage(night, "ingest", ingest)
    assert night.lake.read(ENGAGEMENTS).count() == 0  # taken back, as if the night had not been
    assert night.lake.read(REJECTED_ROWS).count() > 0  # but what was refused can be looked at
    _goes_on_for_a_reason(night)


def _goes_on_for_a_reason(night: Night) -> None:
    """The same night with `--accept`: what failed and why is in `runs`; a check that broke is not accepted."""
    accepting = replace(night, accept="the till lost its customers' cards")
    record = run_stage(accepting, "ingest", ingest)
    assert record.status == "succeeded"
    assert accepting.lake.read(ENGAGEMENTS).count() > 0
    kept = night.ledger.records(run_id=night.run_id, status="succeeded")[-1]
    accepted = [note for note in kept.notes if note.startswith("accepted")]
    assert len(accepted) == 1
    assert accepted[0].startswith("accepted (the till lost its customers' cards): rejected_events_share: found 0.2")
    failed = [result["metric"] for result in json.loads(kept.gates or "")["results"] if not result["passed"]]
    assert failed == ["rejected_events_share"]
    assert run_stage(night, "ingest", ingest) == kept  # what was accepted is done, also for the command without the reason
    with pytest.raises(GateError, match="rejected_events_share"):
        run_stage(night, "ingest", ingest, force=True)
    with pytest.raises(BrokenGateError, match="num_items: could not be checked"):
        run_stage(accepting, "ingest", lambda run: run.gate({"num_duplicate_keys": 1}), force=True)


def test_a_failing_gate_is_not_accepted_without_a_reason(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--config", "demo", "--run-date", "2017-11-30"]
    assert parse([*flags, "--accept", "a range left"], description="a night").accept == "a range left"
    assert parse(flags, description="a night").accept is None
    for nothing in ("", "  "):
        with pytest.raises(SettingsError, match="--accept is empty; wanted the reason"):
            parse([*flags, "--accept", nothing], description="a night")
    with pytest.raises(SystemExit) as stopped:
        parse([*flags, "--accept"], description="a night")
    assert stopped.value.code == 2
    assert "--accept: expected one argument" in capsys.readouterr().err


def test_a_bad_second_file_and_bad_labels_leave_nothing_behind(spark: SparkSession, tmp_path: Path) -> None:
    WORLD.write(tmp_path)
    (tmp_path / "items" / "part-1.parquet").write_bytes((tmp_path / "items" / "part-0.parquet").read_bytes()[:-2000] + b"x" * 2000)
    night = _night(spark, write_config(tmp_path))
    with pytest.raises(SourceError, match=r"cannot read .*part-1\.parquet"):
        run_stage(night, "ingest", ingest)
    assert not night.lake.exists(ENGAGEMENTS) or night.lake.read(ENGAGEMENTS).count() == 0
    (tmp_path / "items" / "part-1.parquet").unlink()
    WORLD.items().assign(other=WORLD.items()["sku"], grade=0.5).to_parquet(tmp_path / "labels.parquet")
    labels = {"path": str(tmp_path / "labels.parquet"), "columns": {"item_id": "sku", "other_item_id": "other", "source": "by"}}
    graded = _night(spark, write_config(tmp_path, source=_source(tmp_path) | {"pair_relevance": labels}))
    with pytest.raises(SourceError, match=r"missing columns \['by', 'rated_at'\] in pair_relevance"):
        run_stage(graded, "ingest", ingest)
    assert not graded.lake.exists(ENGAGEMENTS) or graded.lake.read(ENGAGEMENTS).count() == 0


def test_new_files_below_a_glob_are_seen(spark: SparkSession, tmp_path: Path) -> None:
    WORLD.write(tmp_path)
    config = write_config(tmp_path, source=_source(tmp_path, events={"path": str(tmp_path / "events" / "*.parquet")}))
    before = _night(spark, config).run_id
    WORLD.events().head(3).to_parquet(tmp_path / "events" / "part-1.parquet", index=False)
    assert _night(spark, config).run_id != before
    with pytest.raises(SourceError, match=r"cannot list nowhere://bucket/events"):
        _night(spark, write_config(tmp_path, source=_source(tmp_path, events={"path": "nowhere://bucket/events"})))


def test_a_change_of_any_source_makes_another_night(spark: SparkSession, tmp_path: Path) -> None:
    WORLD.write(tmp_path)
    more = {}
    for name, columns in (
        ("pair_relevance", ["item_id", "other_item_id", "grade", "source", "rated_at"]),
        ("impressions", ["user_id", "trigger_item_id", "item_id", "shown_at"]),
    ):
        more[name] = {"path": str(tmp_path / f"{name}.parquet"), "columns": dict(zip(columns, columns, strict=True))}
        pd.DataFrame({column: ["x"] for column in columns}).to_parquet(more[name]["path"])
    config = write_config(tmp_path, source=_source(tmp_path) | more)
    ids = [_night(spark, config).run_id]
    for path in ("events/part-0.parquet", "items/part-0.parquet", "pair_relevance.parquet", "impressions.parquet"):
        rows = pd.read_parquet(tmp_path / path)
        pd.concat([rows, rows.head(1)]).to_parquet(tmp_path / path)
        ids.append(_night(spark, config).run_id)
    assert len(set(ids)) == 5
    assert _night(spark, config).run_id == ids[-1]


def test_a_lake_at_a_uri_needs_a_shared_folder(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"set lake\.artifacts to a mounted path"):
        load_settings("demo", ["lake.root=s3a://bucket/lake"])
    assert load_settings("demo", ["lake.root=s3a://bucket/lake", f"lake.artifacts={tmp_path}"]).lake.artifacts == str(tmp_path)


def test_lake_that_cannot_be_written(spark: SparkSession, tmp_path: Path) -> None:
    WORLD.write(tmp_path)
    (tmp_path / "file").touch()
    config = write_config(tmp_path, lake={"root": str(tmp_path / "file" / "lake")})
    with pytest.raises(MachineError, match=r"cannot write the lake at .*lake\.root"):
        _night(spark, config)


def test_settings_errors_are_reported_together(tmp_path: Path) -> None:
    with pytest.raises(SettingsError) as raised:
        load_settings("demo", ["pairs.half_life_days=-1", "pairs.windw.kind=session", "retrieval.list_length=0", "training.seed=x"])
    for text in ("4 fault(s)", "pairs.half_life_days", "pairs.windw", "retrieval.list_length", "training.seed"):
        assert text in str(raised.value)
    with pytest.raises(SettingsError, match=r"no configuration named 'nope'; have .*demo"):
        load_settings("nope")
    (tmp_path / "tabs.yaml").write_text("lake:\n\t- x")
    with pytest.raises(SettingsError, match=r"tabs\.yaml is not valid YAML"):
        load_settings(str(tmp_path / "tabs.yaml"))


def test_java_missing_or_too_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MachineError, match=r"no java found.*apt-get install openjdk-17"):
        check_java()
    old = tmp_path / "java"
    old.write_text("#!/bin/sh\necho 'openjdk version \"1.8.0_392\"' >&2\n")
    old.chmod(0o755)
    with pytest.raises(MachineError, match=r"1\.8\.0_392.*Java 17 or 21"):
        check_java()
