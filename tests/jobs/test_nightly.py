"""One small night in the bundle world, run twice, read every way, judged, and stopped by a gate."""

import json
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, time, timedelta
from pathlib import Path

import duckdb
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import yaml
from playwright.sync_api import expect
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from conf.errors import GateError, SettingsError, SourceError, TableError
from conf.settings import load_settings
from conf.tables import (
    ENGAGEMENTS,
    EVALUATION,
    ITEM_NEIGHBORS,
    ITEM_NEIGHBORS_HISTORY,
    PAIR_RELEVANCE,
    RELEVANCE_EXAMPLES,
    RELEVANCE_FEEDBACK,
    TABLES,
    Table,
)
from features import store
from jobs.backtest_report import REPORTS, write_json
from jobs.evaluate import evaluate
from jobs.explorer import catalog
from jobs.explorer.app import Explorer
from jobs.export import export
from jobs.ingest import ingest
from jobs.ledger import StageRecord
from jobs.look_up import Lookup
from jobs.maintain import maintain
from jobs.night_report import NightReport, write_report
from jobs.nightly import STAGES, plan, plan_sources, run_night, summary
from jobs.online import lists_served_at, open_feature_store
from jobs.progress import Display
from jobs.query import register_views
from jobs.reader import neighbors_of, open_table, rows_where
from jobs.remerge import remerge
from jobs.rollback import roll_back
from jobs.show import side_by_side
from jobs.stage import Night, StageRun, finished, make_night, run_stage
from jobs.status import last_nights
from jobs.train_model import previous_model
from jobs.write_docs import duckdb_sql, example
from tests.browser import needs_chromium, open_browser, served, sticking_out, watched
from tests.conftest import ROOT
from tests.jobs.test_backtest_report import family
from tests.jobs.test_backtest_report import report as judged_lists
from tests.lakes import write_table
from tests.worlds import BundleWorld, write_config

pytestmark = pytest.mark.night
NIGHT = date(2024, 3, 31)
NOW = datetime(2024, 6, 1, tzinfo=UTC)


# days from the night, the category of the other item (that of the first one is 2), grade
VOTES = [(-2, 2, 0.0), (-1, 2, 1.0), (-2, 1, 1.0), (0, 1, None), (2, 0, 1.0)]
"""A vote that is changed, one that is taken back, and one that is cast only after the night."""


@dataclass(frozen=True, kw_only=True)
class Done:
    world: BundleWorld
    folder: Path
    config: Path
    night: Night
    records: list[StageRecord]


def _night(spark: SparkSession, config: Path, run_date: date, *assignments: str) -> Night:
    return make_night(load_settings(str(config), assignments), run_date, spark=spark, display=Display(seconds_per_line=3600), now=NOW)


def _vote(world: BundleWorld, days: int, category: int, grade: float | None) -> dict[str, object]:
    at = datetime.combine(NIGHT, time(12), UTC) + timedelta(days=days)
    return {"item_id": world.item_id(3, 2), "other_item_id": world.item_id(7, category), "rated_at": at, "grade": grade}


def _items(world: BundleWorld, *sold_out: str) -> pd.DataFrame:
    """The catalog with a stock, and two items of one category that are variants of each other."""
    items, variants = world.items(), {world.item_id(8, 0), world.item_id(9, 0)}
    parents = [("one" if sku in variants else sku) for sku in items["sku"]]
    return items.assign(stock=["no" if sku in sold_out else "yes" for sku in items["sku"]], parent=parents)


@pytest.fixture(scope="module")
def done(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Done:
    """The world after one night, with two torch processes."""
    folder = tmp_path_factory.mktemp("night")
    world = BundleWorld()
    world.write(folder)
    training = {"num_steps": 20, "batch_size": 64, "num_processes": 2, "num_validation_triggers": 20, "num_threads": 1}
    in_stock = {"column": "stock", "rule": "any_of", "values": ["yes"]}
    variants = {"column": "parent", "rule": "different", "heads": ["merged"]}
    retrieval = {"list_length": 10, "filters": [in_stock, variants], "limits": [{"by": "category", "at_most": 9, "heads": ["merged"]}]}
    config = write_config(folder, training=training, retrieval=retrieval)
    content = yaml.safe_load(config.read_text())
    content["source"]["items"]["columns"]["filters"] = ["stock", "parent"]
    config.write_text(yaml.safe_dump(content))
    _items(world).to_parquet(folder / "items" / "part-0.parquet", index=False)
    night = _night(spark, config, NIGHT)
    night.lake.create(RELEVANCE_FEEDBACK)
    write_table(Path(night.lake.root), RELEVANCE_FEEDBACK, [_vote(world, *vote) for vote in VOTES])
    return Done(world=world, folder=folder, config=config, night=night, records=run_night(night))


def _content(night: Night, table: Table) -> pd.DataFrame:
    frame = night.lake.read(table).toPandas()
    return frame.sort_values(list(table.key)).reset_index(drop=True)


def _lists(done: Done, head: str) -> dict[str, list[dict[str, object]]]:
    ids = done.world.items()["sku"].tolist()
    return {item: neighbors for (item, name), neighbors in neighbors_of(done.night.lake.root, ids).items() if name == head}


def test_every_stage_leaves_its_row_and_its_tables(done: Done) -> None:
    assert [record.stage for record in done.records] == list(STAGES)
    assert all(record.status == "succeeded" and record.attempt == 1 for record in done.records)
    gated = {record.stage for record in done.records if record.gates and json.loads(record.gates)["results"]}
    assert gated == set(STAGES) - {"evaluate"}  # nothing to judge on the first night
    assert "no lists of 2024-03-24 to judge: nothing was evaluated" in done.records[-1].notes
    for table in TABLES.values():
        if table is EVALUATION:
            continue
        written = done.night.lake.read(table)
        assert written.columns == list(table.column_names)
        assert {field.name: field.metadata.get("comment") for field in written.schema} == {c.name: c.comment for c in table.columns}
    assert summary(done.records).row_count == len(STAGES) + 1


def test_readers_without_spark_find_every_row_by_every_column(done: Done) -> None:
    """A file whose statistics name some columns only would be skipped by all others; Spark itself states no ends of booleans."""
    for table in TABLES.values():
        if table is EVALUATION:
            continue
        rows = open_table(done.night.lake.root, table).to_pyarrow_dataset().to_table()
        for column in rows.schema:
            if pa.types.is_nested(column.type) or pa.types.is_boolean(column.type):
                continue
            for value in pc.unique(rows[column.name].drop_null())[:3].to_pylist():
                wanted = pc.sum(pc.equal(rows[column.name], value)).as_py()
                found = rows_where(done.night.lake.root, table, column.name, [value])
                assert found.num_rows == wanted, f"{table.name}.{column.name} = {value}"


def test_lists_are_the_known_neighbors(done: Done) -> None:
    engagement, relevance, merged = (_lists(done, head) for head in ("engagement", "relevance", "merged"))
    assert len(merged) == done.world.num_bundles * done.world.num_categories
    for item_id in merged:
        bundle, category = done.world.bundle_of(item_id), done.world.category_of(item_id)
        assert {neighbor["neighbor_id"] for neighbor in engagement[item_id][: len(bundle)]} == bundle
        found = {neighbor["neighbor_id"] for neighbor in relevance[item_id][: len(category)]}
        assert len(found & category) >= 0.8 * min(len(category), len(found))
        assert bundle <= {neighbor["neighbor_id"] for neighbor in merged[item_id]}
        assert item_id not in {neighbor["neighbor_id"] for neighbor in merged[item_id]}


def test_reasons_say_what_is_true(done: Done) -> None:
    fans: dict[str, set[str]] = {}
    for row in done.night.lake.read(ENGAGEMENTS).select("item_id", "user_id").distinct().collect():
        fans.setdefault(row["item_id"], set()).add(row["user_id"])
    said = 0
    for item_id, neighbors in _lists(done, "merged").items():
        for neighbor in neighbors:
            assert (f", together on {neighbor['num_user_days']} user-days" in neighbor["reason"]) == (neighbor["num_user_days"] > 0)
            of_both = len(fans.get(item_id, set()) & fans.get(neighbor["neighbor_id"], set()))
            known = of_both >= done.night.settings.pairs.min_users_per_pair and not neighbor["filled"]
            assert neighbor["reason"].startswith(f"{of_both} users engaged with both") == known
            said += known
            same = neighbor["neighbor_id"] in done.world.category_of(item_id)
            assert same == ("section" in neighbor["reason"])
    assert said > 100


def test_votes_become_the_most_trusted_labels(done: Done) -> None:
    first, other = done.world.item_id(3, 2), done.world.item_id(7, 2)
    labels = done.night.lake.read(PAIR_RELEVANCE).drop("rated_at").collect()
    assert [row.asDict() for row in labels] == [
        {"item_id": first, "other_item_id": other, "source": "human", "grade": 1.0, "source_version": "explorer"}
    ]
    example = done.night.lake.read(RELEVANCE_EXAMPLES).where((F.col("item_id") == first) & (F.col("other_item_id") == other)).collect()
    assert [(row["source"], row["target"]) for row in example] == [("human", 1.0)]


def test_mixing_anew_at_the_value_of_the_policy_gives_the_published_lists(done: Done) -> None:
    assert (done.night.artifacts("explorer") / catalog.FILE).is_file()
    remixer = Explorer(settings=done.night.settings).remixer()
    published = _lists(done, "merged")
    for item_id in list(published)[::12]:
        mixes = remixer.mixes(item_id)
        again = [(neighbor.item.item_id, neighbor.score, neighbor.reason) for neighbor in mixes.lists[mixes.own]]
        assert again == [(row["neighbor_id"], pytest.approx(row["score"]), row["reason"]) for row in published[item_id]]
        assert mixes.own == done.night.settings.merge[0].value
        most_relevant = {neighbor.item.item_id for neighbor in mixes.lists[1.0][:5]}
        assert len(most_relevant & done.world.category_of(item_id)) > len(most_relevant & done.world.bundle_of(item_id))
    with pytest.raises(TableError, match="item 'unknown' is not in the index"):
        remixer.mixes("unknown")


def test_mixing_says_when_the_scorer_is_of_another_release(done: Done) -> None:
    with _scorer_of_another_release(done.night):
        Explorer(settings=done.night.settings).remixer().mixes(done.world.item_id(3, 2))


@contextmanager
def _scorer_of_another_release(night: Night) -> Iterator[None]:
    """What is done with the night's index inside must say that its scorer reads other features than this code computes."""
    scorer = night.artifacts("index") / "scorer.json"
    ours = scorer.read_text()
    scorer.write_text(ours.replace("log_days_apart", "log_clicks"))
    try:
        with pytest.raises(TableError, match=r"scorer.json is of other code.*log_clicks.*run the night again"):
            yield
    finally:
        scorer.write_text(ours)


@needs_chromium
def test_the_mix_is_moved_by_keyboard_and_kept_in_the_address(done: Done) -> None:
    with served(done.night.settings) as address, open_browser() as context:
        page, faults = watched(context)
        page.goto(f"{address}/?item={done.world.item_id(3, 2)}")
        first = page.locator("#list-merged .neighbor").all_inner_texts()
        slider = page.get_by_role("slider", name="Mix")
        own, values = done.night.settings.merge[0].value, done.night.settings.backtest.blend_values
        expect(slider).to_have_attribute("aria-valuetext", f"λ = {own:g} (as published)")
        slider.focus()
        page.keyboard.press("End")
        expect(slider).to_have_attribute("aria-valuetext", "λ = 1")
        moved = page.locator("#list-merged .neighbor .what > a").all_inner_texts()
        assert page.url.endswith("&mix=1")
        page.reload()
        expect(slider).to_have_attribute("aria-valuetext", "λ = 1")
        assert page.locator("#list-merged .neighbor .what > a").all_inner_texts() == moved
        slider.press("Home")
        assert page.url.endswith("&mix=0")
        for _ in range(sorted(values).index(own)):
            page.keyboard.press("ArrowRight")
        assert "mix" not in page.url
        assert page.locator("#list-merged .neighbor").all_inner_texts() == first, "reasons included"
        assert faults == []


@needs_chromium
@pytest.mark.parametrize(("width", "dark"), [(1200, False), (360, True)])
def test_the_report_opens_from_the_disk_and_explains_every_number(done: Done, width: int, dark: bool) -> None:
    assert {record.report for record in done.records} == {str(done.night.report_path)}
    with open_browser(width=width, dark=dark) as context:
        page, faults = watched(context)
        asked = list[str]()
        page.on("request", lambda request: asked.append(request.url))
        page.goto(done.night.report_path.as_uri())
        assert asked == [done.night.report_path.as_uri()]
        assert page.locator("h1").inner_text() == "Night 2024-03-31: published"
        settings = page.get_by_text("keep_nights: 60")
        expect(settings).to_be_hidden()
        page.emulate_media(media="print")
        expect(settings).to_be_visible()  # nobody can unfold paper
        page.emulate_media(media="screen")
        for summary in page.locator("summary").all():
            summary.click()
        number = r"/^[-−–]?[\d.,]+( of [\d,]+)?%?$/"
        bare = f"[...document.querySelectorAll('td, b')].filter(e => {number}.test(e.innerText.trim()) && !e.closest('[title]'))"
        assert page.locator("td[title], b[title], div[title]").count() > 60
        assert page.evaluate(f"{bare}.map(e => e.outerHTML)") == []
        assert page.locator("svg").count() == 1
        assert page.get_by_text("Nothing to compare: no night was published before.").count() == 1
        assert page.get_by_text("No backtest of own at var/backtest/own.json").count() == 1
        tally = page.locator(".tally [title]").first
        tally.focus()
        expect(page.get_by_role("tooltip")).to_have_text(tally.get_attribute("title") or "")
        assert sticking_out(page) == []
        assert faults == []


@needs_chromium
def test_the_report_explains_itself_to_a_finger_when_the_explorer_serves_it(done: Done) -> None:
    with served(done.night.settings) as address, open_browser(width=390, touch=True) as context:
        page, faults = watched(context)
        page.goto(f"{address}/report")
        cell = page.locator("td[title]").filter(visible=True).last
        cell.tap()
        expect(page.get_by_role("tooltip")).to_have_text(cell.get_attribute("title") or "")
        assert faults == []


def test_every_metric_of_a_night_has_a_meaning(done: Done) -> None:
    report = NightReport.of(done.night, list(STAGES))
    unexplained = [name for record in report.records for name, _, meaning in report.metrics(record) if not meaning]
    assert unexplained == [], "add them to METRICS in jobs/night_words.py, or give them a rule in validation/suites.py"


def test_a_repeated_night_changes_nothing_and_says_so(done: Done) -> None:
    versions = {name: done.night.lake.version(table) for name, table in TABLES.items() if table is not EVALUATION and name != "runs"}
    again = _night(done.night.spark, done.config, NIGHT)
    assert again.run_id == done.night.run_id
    records = run_night(again)
    assert [record.ended_at for record in records] == [record.ended_at for record in done.records]
    assert versions == {name: again.lake.version(TABLES[name]) for name in versions}
    assert len(again.ledger.records(run_id=again.run_id)) == len(STAGES)
    assert list(plan(again).columns[1].cells) == ["done"] * len(STAGES)
    assert list(plan(again, force=True).columns[1].cells) == ["to do"] * len(STAGES)


def test_a_plan_looks_at_the_columns_of_the_sources(done: Done) -> None:
    sources = plan_sources(done.night)
    assert list(sources.columns[0].cells) == ["events", "items"]
    assert "user_id: who" in next(iter(sources.columns[3].cells))
    mistaken = load_settings(str(done.config), ["source.items.columns.title=titel"])
    with pytest.raises(SourceError, match=r"missing columns \['titel'\] in items"):
        plan_sources(replace(done.night, settings=mistaken))


def test_a_forced_night_writes_equal_tables_and_doubles_nothing(done: Done) -> None:
    names = ("engagements", "co_engagement_pairs", "item_features", "relevance_examples", "item_neighbors_history", "item_neighbors")
    before = {name: _content(done.night, TABLES[name]) for name in names}
    run_night(done.night, force=True)
    for name in names:
        pd.testing.assert_frame_equal(before[name].map(_rounded), _content(done.night, TABLES[name]).map(_rounded), rtol=1e-6, obj=name)


def _rounded(value: object) -> object:
    """Floats inside arrays and structs to 1e-6, so that frames compare by content."""
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    if hasattr(value, "asDict"):
        return _rounded(value.asDict())
    if hasattr(value, "tolist"):
        return _rounded(value.tolist())
    return [_rounded(inner) for inner in value] if isinstance(value, list) else value


def test_one_list_read_five_ways(done: Done) -> None:
    item_id, root = done.world.item_id(3, 2), done.night.lake.root
    by_delta_rs = [neighbor["neighbor_id"] for neighbor in neighbors_of(root, [item_id])[(item_id, "merged")]]
    register_views(done.night.lake)
    rows = done.night.spark.sql("SELECT item_id, rank, neighbor_id FROM item_neighbor_rows WHERE head = 'merged'")
    by_sql = [row["neighbor_id"] for row in rows.where(F.col("item_id") == item_id).orderBy("rank").collect()]
    files = open_table(root, ITEM_NEIGHBORS).file_uris()
    query = "SELECT list_transform(neighbors, lambda n: n.neighbor_id) FROM read_parquet(?) WHERE item_id = ? AND head = 'merged'"
    by_duckdb = duckdb.execute(query, [files, item_id]).fetchone()[0]
    feature_store = open_feature_store(done.night.settings)
    by_feast = store.lookup_online(feature_store, [item_id, "unknown"], heads=["merged"], k=100)
    export(root, str(done.folder / "lists.parquet"))
    exported = pd.read_parquet(done.folder / "lists.parquet").query("item_id == @item_id and head == 'merged'").sort_values("rank")
    assert by_delta_rs == by_sql == by_duckdb == by_feast[item_id]["merged"]["ids"] == exported["neighbor_id"].tolist()
    assert exported["rank"].tolist() == list(range(1, len(exported) + 1))
    assert by_feast["unknown"]["merged"]["ids"] == []
    assert by_feast[item_id]["run_id"] == done.night.run_id
    assert side_by_side(root, item_id, heads=["engagement", "relevance", "merged"], k=5).row_count == 5


def test_offers_next_to_one_and_to_several_triggers(done: Done) -> None:
    shelf = Lookup.open(str(done.config))
    first, second = done.world.item_id(3, 2), done.world.item_id(5, 1)
    alone = shelf.lookup([first], k=100)
    assert [offer.neighbor_id for offer in alone] == [neighbor["neighbor_id"] for neighbor in _lists(done, "merged")[first]]
    assert {offer.run_id for offer in alone} == {done.night.run_id}
    bought = alone[0].neighbor_id
    basket = shelf.lookup([first, second, first, "unknown"], exclude=[bought], k=6, max_per_trigger=3)
    assert len({offer.neighbor_id for offer in basket}) == 6
    assert not {offer.neighbor_id for offer in basket} & {first, second, bought}
    assert [sum(offer.trigger_id == trigger for offer in basket) for trigger in (first, second)] == [3, 3]
    assert [offer.rank for offer in basket] == sorted(offer.rank for offer in basket)
    assert shelf.lookup(["unknown"]) == []
    assert shelf.lookup([first], max_age_days=7, today=NIGHT + timedelta(days=8)) == []
    assert len(shelf.lookup([first], k=2, max_age_days=7, today=NIGHT + timedelta(days=7))) == 2
    with pytest.raises(SettingsError, match=r"no list named 'nearest'; have \['engagement', 'relevance', 'merged'\]"):
        shelf.lookup([first], head="nearest")


def test_offline_lists_are_served_from_their_publication_on(done: Done) -> None:
    item_id = done.world.item_id(3, 2)
    published = done.night.ledger.last_success(stage="publish_neighbors", run_id=done.night.run_id)
    assert published is not None
    moments = [
        datetime(2024, 4, 1, tzinfo=UTC),
        published.ended_at + timedelta(seconds=1),
    ]  # the day after the night, but before publication
    entities = done.night.spark.createDataFrame([(item_id, at) for at in moments], "item_id string, event_timestamp timestamp")
    before, after = lists_served_at(done.night, entities).orderBy("event_timestamp").collect()
    assert before["merged_ids"] is None
    assert after["merged_ids"] == [neighbor["neighbor_id"] for neighbor in _lists(done, "merged")[item_id]]
    assert (after["run_id"], after["as_of"]) == (done.night.run_id, "2024-03-31")


def test_lists_are_judged_by_what_followed(done: Done, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    later = _night(done.night.spark, done.config, NIGHT + timedelta(days=7))
    run_stage(later, "ingest", ingest)
    record = run_stage(later, "evaluate", evaluate)
    rows = {(r["method"], r["head"], r["metric"]): r for r in later.lake.read(EVALUATION).collect()}
    engagement, popularity = rows["mtmh", "engagement", "recall@5"], rows["popularity", "-", "recall@5"]
    # every future partner is one of the four others of the bundle, and the first five hold all four
    assert engagement["value"] == pytest.approx(1.0)
    assert engagement["low"] <= engagement["value"] <= engagement["high"]
    assert popularity["value"] < 0.5
    assert record.metrics["num_triggers"] == engagement["num_triggers"] > 10
    alike = {head: rows["mtmh", head, "same_source_relevance@5"]["value"] for head in ("engagement", "relevance")}
    assert alike["relevance"] > 0.9 > 0.5 > alike["engagement"]  # text tells the category, and nothing of the bundle
    monkeypatch.chdir(tmp_path)  # where a backtest has left its report
    backtest = judged_lists(
        config="own",
        families={"mtmh_blend": family("mtmh_blend", "", 0, ("0", "0.005", "0.02", "0.1", "0.3", "1"))},
        title="Backtest of own",
    )
    write_json(backtest, REPORTS / "own.json")
    _is_drawn_on_two_axes(later)
    (REPORTS / "own.json").write_text("{}")
    assert "no report of a backtest as this code writes it" in write_report(later, list(STAGES)).read_text()
    # judging has brought in later events: the night itself is still done, at the version it had pinned
    assert all(r.ended_at <= record.ended_at for r in run_night(_night(done.night.spark, done.config, NIGHT)))
    assert len(later.ledger.records(run_id=done.night.run_id, stage="ingest")) <= 2


def _is_drawn_on_two_axes(later: Night) -> None:
    report = NightReport.of(later, list(STAGES)).judged
    assert report is not None
    assert (report.cut, report.depth, [head for _, head in report.our_heads]) == (NIGHT, 5, ["merged", "engagement", "relevance"])
    page = write_report(later, list(STAGES)).read_text()
    assert "<h3>The lists of 2024-03-31</h3>\n<p>Judged by the co-engagements from then to 2024-04-07" in page
    assert ">recall@5  →  more of the future partners found<" in page
    assert "Cut 2017-11-16, judged until 2017-11-30" in page
    assert ">the mix of merge_policy<" not in page  # which leaves places to relevance, and is no point of the line
    assert re.search(r'<td class="best" title="share of a trigger&#x27;s future partners that are among the first 5[^>]*>1.0000', page)


def test_a_failed_gate_keeps_the_published_table(done: Done) -> None:
    before = done.night.lake.version(ITEM_NEIGHBORS)
    bad = _night(done.night.spark, done.config, NIGHT, "retrieval.list_length=9", "gates.min_items=1000")
    with pytest.raises(GateError, match=r"num_items: found 60, wanted .*1,?000"):
        run_night(bad)
    failed = bad.ledger.records(run_id=bad.run_id)
    assert [(record.stage, record.status) for record in failed] == [("ingest", "failed")]
    assert "GateError" in (failed[0].error or "")
    assert json.loads(failed[0].gates or "{}")["stage"] == "ingest"
    page = bad.report_path.read_text()
    assert "not published: ingest failed" in page
    assert "The lists of 2024-03-31 stay the current ones." in page
    assert re.search(r"num_items</span></td><td [^>]*>60</td><td [^>]*>at least 1,000</td><td [^>]*>failed", page)
    assert page.count("not reached") == len(STAGES) - 1
    assert done.night.lake.version(ITEM_NEIGHBORS) == before


def test_house_keeping_changes_no_row_and_status_names_the_published_night(done: Done) -> None:
    kept = (ITEM_NEIGHBORS, ITEM_NEIGHBORS_HISTORY, RELEVANCE_FEEDBACK, RELEVANCE_EXAMPLES)
    before = [_content(done.night, table) for table in kept]
    maintain(done.night.settings)
    for table, rows in zip(kept, before, strict=True):
        pd.testing.assert_frame_equal(_content(done.night, table), rows)
    assert all(finished(done.night, stage) for stage in STAGES)  # a night resumes as before
    states = {night["run_id"]: (night["state"], night["published"]) for night in last_nights(done.night.settings, 10)}
    assert states[done.night.run_id] == ("done", True)
    assert ("failed in ingest", False) in states.values()


def _documented(done: Done, kind: str) -> list[str]:
    """Commands or programs of all pages but the tutorial, for this lake: its items, its night."""
    pages = [ROOT / "README.md", *(page for page in sorted((ROOT / "docs").rglob("*.md")) if page.name != "tutorial.md")]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    first, second, third = (done.world.item_id(number, 2) for number in (3, 4, 5))
    ids = {"1029743": first, "SKU-1": first, "1082185": second, "995242": third}
    places = {"var/lake/demo": done.night.lake.root, '"demo"': f'"{done.config}"', "--config demo": f"--config {done.config}"}
    places |= {"--config my.yaml": f"--config {done.config}", "2017-11-30-1a2b3c4d": done.night.run_id, "RUN_ID": done.night.run_id}
    places |= {"2024-05-31": str(NIGHT), "2017-11-30": str(NIGHT)}
    for named, mine in (ids | places).items():
        text = text.replace(named, mine)
    if kind == "python":
        return re.findall(r"```python\n(.*?)```", text, re.S)
    return [
        found.split("   #")[0] for found in re.findall(r"^.*?(?:^|[` ])((?:MTMH_\w+=\S+ )?(?:\S*/)?python -m jobs\.[^`\n]*)", text, re.M)
    ]


def test_programs_of_the_docs_run_and_find_what_spark_finds(done: Done, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those over a table that has no file yet are left out: DuckDB cannot read it."""
    monkeypatch.chdir(tmp_path)
    done.night.lake.create(EVALUATION)
    register_views(done.night.lake)
    compared, names = set[str](), dict[str, object]()
    for program in _documented(done, "python"):
        table = next((TABLES[name] for name in re.findall(rf"{re.escape(done.night.lake.root)}/(\w+)\"", program) if name in TABLES), None)
        if table is not None and not open_table(done.night.lake.root, table).file_uris():
            continue
        exec(program, names)
        if table is not None and "sql" in names:
            assert names["sql"] == duckdb_sql(table).replace("1029743", done.world.item_id(3, 2))
            by_spark = done.night.spark.sql(example(table)[1].replace("1029743", done.world.item_id(3, 2))).toArrow()
            by_duckdb = duckdb.sql(str(names["sql"]), params={"files": names["files"]})
            assert (by_duckdb.columns, len(by_duckdb.fetchall())) == (by_spark.column_names, len(by_spark))
            compared.add(table.name)
    assert len(compared) >= len(TABLES) - 3
    merged = next(row for row in names["rows"] if row["head"] == "merged")  # type: ignore[attr-defined]
    assert names["by_duckdb"] == [neighbor["neighbor_id"] for neighbor in merged["neighbors"]][:5]
    statement = next(command for command in _documented(done, "sh") if "SELECT rank" in command)
    by_sql = done.night.spark.sql(shlex.split(statement.partition(" -m ")[2])[1]).collect()
    assert [row["neighbor_id"] for row in by_sql] == names["by_duckdb"]


def _a_failed_publish_gate_publishes_nothing(done: Done, later: Night) -> None:
    """The same night with a gate that one lost item fails: its lists stay in history, and yesterday's are the current ones."""
    before = later.lake.version(ITEM_NEIGHBORS)
    for name in ("ingest", "build_pairs", "build_features", "train_model"):
        run_stage(later, name, STAGES[name])
    strict = _night(done.night.spark, done.config, later.run_date, "gates.max_volume_drop=0")
    assert strict.run_id == later.run_id
    with pytest.raises(GateError, match="num_items: found 59, wanted at least 60"):
        run_stage(strict, "publish_neighbors", STAGES["publish_neighbors"])
    assert later.lake.version(ITEM_NEIGHBORS) == before
    assert later.lake.read(ITEM_NEIGHBORS_HISTORY).where(f"run_id = '{later.run_id}'").count() > 0


def test_an_item_that_left_has_no_lists_and_an_older_night_goes_to_history_only(done: Done) -> None:
    """Runs last: it changes the sources."""
    gone, sold_out = done.world.item_id(0, 0), done.world.item_id(1, 1)
    items = _items(done.world, sold_out)
    items[items["sku"] != gone].to_parquet(done.folder / "items" / "part-0.parquet", index=False)
    later = _night(done.night.spark, done.config, NIGHT + timedelta(days=1))
    _a_failed_publish_gate_publishes_nothing(done, later)
    run_night(later)
    text = later.report_path.read_text()
    assert "Night 2024-04-01: published" in text
    assert re.search(r"alone\">0</b> items are new and\s+<b [^>]*>1</b> gone", text)
    assert "most changed triggers" in text
    offered = {
        neighbor["neighbor_id"] for (_, _), found in neighbors_of(later.lake.root, items["sku"].tolist()).items() for neighbor in found
    }
    assert not offered & {gone, sold_out}
    lists = neighbors_of(later.lake.root, [sold_out, done.world.item_id(8, 0)])
    assert len(lists[sold_out, "merged"]) == 10  # not offered, yet a trigger
    variant = done.world.item_id(9, 0)
    assert variant not in {neighbor["neighbor_id"] for neighbor in lists[done.world.item_id(8, 0), "merged"]}
    assert variant in offered
    online = store.lookup_online(open_feature_store(later.settings), [gone], heads=["merged"], k=5)
    assert online[gone]["merged"]["ids"] == []
    assert online[gone]["run_id"] == later.run_id  # a tombstone of this night, not the list of the last one
    published = later.lake.version(ITEM_NEIGHBORS)
    older = _night(done.night.spark, done.config, NIGHT - timedelta(days=1))
    run_night(older)
    assert older.lake.version(ITEM_NEIGHBORS) == published
    assert 'Night 2024-03-30: <span class="not">not published' in older.report_path.read_text()
    assert older.lake.read(ITEM_NEIGHBORS_HISTORY).where(f"run_id = '{older.run_id}'").count() > 0
    _the_current_night_follows_a_changed_policy_and_is_rolled_back(done, later)
    _training_starts_from_the_night_before_unless_somebody_was_deleted(done, later)


def _the_current_night_follows_a_changed_policy_and_is_rolled_back(done: Done, later: Night) -> None:
    """What jobs without Spark publish, Spark reads; each night has one publication in the offline view, and one more by the rollback."""
    spark, item_id = later.spark, done.world.item_id(3, 2)
    register_views(later.lake)
    spark.sql("UPDATE merge_policy SET kind = 'rrf', value = 1.0 WHERE scope = 'default'")
    with _scorer_of_another_release(later):
        remerge(later.settings, display=later.display)
    again = remerge(later.settings, display=later.display)
    assert again.run_id.startswith(f"{later.run_id}.m")
    register_views(later.lake)
    rows = spark.sql("SELECT run_id, head, rank, neighbor_id FROM item_neighbor_rows").where(F.col("item_id") == item_id).collect()
    assert {row["run_id"] for row in rows} == {again.run_id}
    merged, relevance = ({row["rank"]: row["neighbor_id"] for row in rows if row["head"] == head} for head in ("merged", "relevance"))
    assert [merged[rank] for rank in (1, 2, 3)] == [relevance[rank] for rank in (1, 2, 3)]
    assert store.lookup_online(open_feature_store(later.settings), [item_id], heads=["merged"], k=5)[item_id]["run_id"] == again.run_id
    roll_back(later.settings, done.night.run_id, display=later.display)
    gone = done.world.item_id(0, 0)
    assert later.lake.read(ITEM_NEIGHBORS).where(F.col("item_id") == gone).count() == 3
    assert store.lookup_online(open_feature_store(later.settings), [gone], heads=["merged"], k=5)[gone]["run_id"] == done.night.run_id
    publications = [r.run_id for r in later.ledger.records(status="succeeded") if ITEM_NEIGHBORS.name in r.output_versions]
    assert publications[-2:] == [again.run_id, done.night.run_id]
    entities = spark.createDataFrame([(item_id, datetime.now(UTC))], "item_id string, event_timestamp timestamp")
    assert lists_served_at(later, entities).collect()[0]["run_id"] == done.night.run_id


def _training_starts_from_the_night_before_unless_somebody_was_deleted(done: Done, later: Night) -> None:
    trained = later.ledger.last_success(stage="train_model", run_id=later.run_id)
    assert trained is not None
    assert f"starts from the weights and the scorer of {done.night.run_id}" in trained.notes
    events = done.folder / "events" / "part-0.parquet"
    for deleted, wanted in ((False, f"{later.run_id}/model"), (True, "None")):
        if deleted:  # and as many others came late, so that there are no fewer of them
            known = pd.read_parquet(events)
            known["who"] = known["who"].replace("u003", "u003b")
            known.to_parquet(events, index=False)
        following = _night(done.night.spark, done.config, later.run_date + timedelta(days=1))
        run_stage(following, "ingest", STAGES["ingest"])
        probe = StageRun(night=following, stage="train_model")
        assert str(previous_model(probe)).endswith(wanted)
    assert re.search(r"starts cold: \d+ engagements up to 2024-04-01 that .* was trained on have been deleted", probe.notes[0])
