"""Co-engagement of single actions: counted in tables of its own, night after night, and learned by a head of its own."""

from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from pyspark.sql import SparkSession

from conf.errors import SourceError
from conf.settings import load_settings
from conf.tables import CO_ENGAGEMENT_PAIRS, table_named, tables_with
from jobs.night_report import NightReport
from jobs.nightly import STAGES, run_night
from jobs.pair_state import Signal
from jobs.progress import Display
from jobs.query import register_views
from jobs.reader import neighbors_of
from jobs.stage import make_night
from tests.features.test_pairs import FIRST, world
from tests.jobs.test_build_pairs import Shop, shop  # noqa: F401  # a fixture
from tests.worlds import START, BundleWorld, write_config

HOURS = {"kind": "time", "window_seconds": 21_600}


def test_a_signal_is_counted_as_if_there_were_no_other_events(shop: Callable[..., Shop]) -> None:  # noqa: F811
    """Night after night; what changes its settings counts it again and nothing else; without its settings its tables are empty."""
    pool = world(seed=9, num_events=400, num_items=12)
    bought = pool[pool.action == "buy"]
    buy = {"actions": ["buy", "gift"], "window": HOURS, "half_life_days": 9}
    mine, alone = shop("mine", signals={"buy": buy}), shop("alone", window=HOURS, half_life_days=9)
    late = bought.index[bought.event_date == FIRST + timedelta(days=2)][:2]
    first = mine.build(5, pool.drop(index=late))
    counted = "pairs of signal buy are counted from nothing"
    assert first.notes == [
        "pairs are counted from nothing: no night has counted pairs before",
        "pairs of signal buy: no engagement up to 2024-03-05 has action gift; there are buy, view",
        f"{counted}: no night has counted pairs before",
    ]
    second = mine.build(6, pool)
    assert [note for note in second.notes if "signal buy" in note and "counted" in note] == []
    assert 0 < second.metrics["buy_touched_pairs_share"] < 1
    alone.build(6, bought)
    signal = Signal.all_of(mine.night(6).settings.pairs)[1]
    for table in (signal.daily, signal.days, signal.totals, signal.pairs, signal.popularity):
        kept, wanted = mine.content(table), alone.content(table_named(table.name.partition("__")[0]))
        kept, wanted = (frame.drop(columns="counted_by", errors="ignore") for frame in (kept, wanted))
        pd.testing.assert_frame_equal(kept, wanted, rtol=1e-9, obj=table.name)

    third = mine.build(6, pool, "pairs.signals.buy.window.window_seconds=7200")
    assert [note for note in third.notes if "counted" in note] == [
        f"{counted}: the code, or a setting that decides counts (window, max_items_per_user_day, max_triggers_per_target, "
        "min_users_per_pair, hash key, actions), has changed"
    ]
    assert (third.metrics["buy_built_from_nothing"], third.metrics["built_from_nothing"]) == (1, 0)
    with pytest.raises(
        SourceError, match=r"pairs.signals.buy counts actions \['rent'\], which no engagement .* wanted some of \['buy', 'view'\]"
    ):
        mine.build(6, pool, "pairs.signals.buy.actions=[rent]")
    assert len(mine.content(signal.pairs)) == third.metrics["buy_num_pairs"]  # taken back
    fourth = mine.build(6, pool, "pairs.signals={}")
    assert f"{signal.daily.name} is emptied: its signal is no longer among pairs.signals" in fourth.notes
    assert all(mine.content(table).empty for table in (signal.daily, signal.days, signal.totals, signal.pairs, signal.popularity))


def two_actions(bundles: BundleWorld) -> pd.DataFrame:
    """Clicks inside a bundle, in sessions; an item is bought days before or after its twin, which is of another bundle."""
    rng = np.random.default_rng(5)
    clicks = bundles.events().assign(verb="click")
    rows = []
    for buyer in range(240):
        bundle, category = buyer % bundles.num_bundles, buyer // bundles.num_bundles % bundles.num_categories
        at = START + timedelta(days=int(rng.integers(25)), hours=int(rng.integers(24)))
        pair = [(bundle, at), ((bundle + bundles.num_bundles // 2) % bundles.num_bundles, at + timedelta(days=int(rng.integers(1, 6))))]
        rows += [(f"p{buyer:03d}", bundles.item_id(which, category), when, f"p{buyer:03d}", "purchase") for which, when in pair]
    bought = pd.DataFrame(rows, columns=[*bundles.events().columns, "verb"])
    return pd.concat([clicks, bought.assign(at=bought["at"].astype("datetime64[us]").dt.tz_localize("UTC"))])


@pytest.mark.night
def test_a_head_finds_the_partners_of_its_action(spark: SparkSession, tmp_path: Path) -> None:
    bundles = BundleWorld()
    bundles.write(tmp_path)
    two_actions(bundles).to_parquet(tmp_path / "events" / "part-0.parquet", index=False)
    month = {"kind": "time", "window_seconds": 30 * 86_400, "symmetric": True}
    purchase = {"actions": ["purchase"], "window": month}
    config = write_config(
        tmp_path, pairs={"window": {"kind": "session", "symmetric": True}, "half_life_days": 30, "signals": {"purchase": purchase}}
    )
    content = yaml.safe_load(config.read_text())
    content["source"]["events"]["columns"]["action"] = "verb"
    content["model"]["heads"]["purchase"] = {"signals": {"purchase": 1.0}}
    content["online"] = {"enabled": False}
    config.write_text(yaml.safe_dump(content))
    night = make_night(
        load_settings(str(config)),
        date(2024, 4, 5),
        spark=spark,
        display=Display(seconds_per_line=3600),
        now=datetime(2024, 6, 1, tzinfo=UTC),
    )
    records = run_night(night)
    assert {record.stage for record in records} <= set(STAGES)

    twins = {item: item.replace(item[:3], f"b{(int(item[1:3]) + 6) % 12:02d}") for item in bundles.items()["sku"]}
    pairs = night.lake.read(CO_ENGAGEMENT_PAIRS.of_signal("purchase")).collect()
    assert {(row["trigger_item_id"], row["target_item_id"]) for row in pairs} == set(twins.items())
    assert {table.name for table in tables_with(["purchase"]) if "__" in table.name} == {
        name for record in records for name in record.output_versions if "__" in name
    }
    lists = neighbors_of(night.lake.root, list(twins))
    heads = {head for _, head in lists}
    assert heads == {"engagement", "relevance", "purchase", "merged"}
    found = {head: np.mean([lists[item, head][0]["neighbor_id"] == twin for item, twin in twins.items()]) for head in heads}
    together = [
        bundles.bundle_of(item) | {twin} == {row["neighbor_id"] for row in lists[item, "engagement"][:5]} for item, twin in twins.items()
    ]
    assert found["purchase"] > 0.9, found
    assert found["engagement"] < 0.5, found
    assert np.mean(together) > 0.8
    report = NightReport.of(night, list(STAGES))
    assert [name for record in report.records for name, _, meaning in report.metrics(record) if not meaning] == []
    register_views(night.lake, signals=night.settings.pairs.signals)
    assert night.spark.sql("SELECT count(*) AS num FROM co_engagement_pairs__purchase").first()["num"] == len(twins)
