"""The backtest against worlds with known answers: recall and relevance come out exactly, leaks are caught, shuffled time is chance.

In the bundle world every future partner is one of the four others of the bundle, and the words of an item tell its category, which the
judge reads and the model is not shown.
"""

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from pyspark.sql import SparkSession

from conf.errors import GateError, SettingsError
from conf.settings import load_settings
from conf.tables import EVALUATION, ITEM_NEIGHBORS, ITEM_NEIGHBORS_HISTORY
from jobs.ablate import ablate, differences
from jobs.backtest import Backtest, backtest_settings
from jobs.backtest_lists import KeptLists
from jobs.backtest_measures import meaning_of
from jobs.backtest_results import FINAL, VALIDATION, Report, Row
from jobs.leaks import check_leaks
from jobs.progress import Display
from models.contest import TRAINED
from tests.worlds import BundleWorld, write_config

pytestmark = [pytest.mark.night, pytest.mark.timeout(1800)]  # the first test waits for four trainings
NOW = datetime(2024, 6, 1, tzinfo=UTC)
WORLD = BundleWorld(num_bundles=30, num_users=150, sessions_per_user=8)
JUDGE = {"section": {"kind": "taxonomy", "level_grades": [1.0], "withhold": ["categories"]}}


@dataclass(frozen=True, kw_only=True)
class Done:
    backtest: Backtest
    final: Report

    def value(self, method: str, head: str, metric: str, part: str = "all") -> float:
        return _row(self.final, method, head, metric, part).value


def _backtest(spark: SparkSession, folder: Path, **backtest: object) -> Backtest:
    quick = {"judges": JUDGE, "slice_share": 0.15, "blend_values": [0.0, 0.01, 1.0], "content_shares": [0.0, 0.5], **backtest}
    # more dimensions than bundles, and a relevance head of content alone: only then are the answers exact
    model = {"dimension": 48, "hidden_dimension": 16, "heads": {"relevance": {"relevance": 1.0, "affinity": 0.0}}}
    config = write_config(folder, backtest=quick, model=model, retrieval={"list_length": 10})
    settings = backtest_settings(load_settings(str(config)))
    return Backtest(settings=settings, spark=spark, display=Display(seconds_per_line=3600), now=NOW)


def _row(report: Report, method: str, head: str, metric: str, part: str = "all") -> Row:
    (found,) = (r for r in report.rows if (r.method, r.head, r.metric, r.slice) == (method, head, metric, part))
    return found


@pytest.fixture(scope="module")
def done(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Done:
    folder = tmp_path_factory.mktemp("backtest")
    WORLD.write(folder)
    backtest = _backtest(spark, folder, churn=True)
    return Done(backtest=backtest, final=backtest.run(final=True))


def test_recall_and_relevance_come_out_exactly(done: Done) -> None:
    assert done.value("mtmh", "engagement", "recall@10") == pytest.approx(1.0)
    assert done.value("counts", "-", "recall@10") == pytest.approx(1.0)
    for vectors in ("encoder", "distilled"):
        assert done.value("mtmh", vectors, "recall@10") == pytest.approx(1.0), vectors
    assert done.value("content", "-", "relevance@10") == pytest.approx(1.0)  # 29 others are in the category
    assert done.value("content", "-", "rel_ndcg@10") == pytest.approx(1.0)
    assert done.value("content", "-", "recall@10") == 0  # nobody of the category is in the bundle
    assert done.value("content", "-", "relevance@100") == pytest.approx(0.29)
    assert done.value("content", "-", "coverage@10") == pytest.approx(11 / 30)  # of thirty equals the first ten, or the eleventh for one
    # the first four of an engagement list are the bundle, all of other categories; at most six of ten can be relevant
    assert done.value("mtmh", "engagement", "relevance@10") <= 0.6
    assert done.value("mtmh", "relevance", "relevance@100") == pytest.approx(0.29)


def test_the_blend_reaches_both_ends(done: Done) -> None:
    recall = {mix: r.value for mix, r, _ in done.final.families["mtmh_blend"]}
    relevance = {mix: r.value for mix, _, r in done.final.families["mtmh_blend"]}
    assert list(recall) == ["0", "0.01", "1"]
    assert recall["0"] == pytest.approx(1.0)
    assert relevance["1"] == pytest.approx(0.29)  # everything relevant is shown
    assert relevance["0"] < 0.29
    assert done.final.chosen["mtmh_blend at recall kept"] != "0"  # four partners and 29 relevant items fit into one list
    held = next(c for c in done.final.comparisons if (c.name, c.what) == ("relevance at recall kept", "relevance@100"))
    assert held.verdict == "wins"
    ours = {f"mtmh_{family}" for family in ("blend", "share", "rrf", "dial", "new_pairs", "new_items")}
    alone = {c.name for c in done.final.comparisons if "vectors alone" in c.name}
    assert alone == {f"{vectors} vectors alone against the best baseline" for vectors in ("engagement", "distilled")}
    assert ours | {"late_blend", "rrf", "quota"} == set(done.final.families)


def test_lists_change_little_from_one_night_to_the_next(done: Done) -> None:
    # both nights show the four partners among ten, so that at least 4 of at most 16 are shared
    assert 0 < done.value("mtmh", "merged", "churn@10") <= 12 / 16


def test_cuts_split_time_and_every_look_at_the_last_slice_is_counted(done: Done) -> None:
    final = done.final
    assert final.final
    assert final.num_reads == 1
    assert final.judges == {"section": "independent"}
    assert final.unreachable_share == 0
    validation = done.backtest.run(final=False)
    assert validation.cut < validation.until == final.cut < final.until
    assert not validation.final
    assert validation.num_reads == 1  # a validation report says so too
    assert final.chosen["smooth"] == validation.chosen["smooth"]
    again = done.backtest.run(final=True)
    ledger = done.backtest.night(final.cut).ledger
    pages = {row.stage: Path(row.report or "").read_text() for stage in (VALIDATION, FINAL) for row in ledger.records(stage=stage)}
    assert [f"{kind} report" in pages[stage] for kind, stage in (("validation", VALIDATION), ("final", FINAL))] == [True, True]
    assert again.num_reads == 2
    values = [np.array([row.value for row in report.rows]) for report in (again, final)]
    np.testing.assert_allclose(*values, atol=1e-9)  # NaN where NaN was


def test_it_lies_in_a_lake_of_its_own_and_publishes_nothing(done: Done) -> None:
    lake = done.backtest.night(done.final.cut).lake
    assert lake.root.endswith("/lake/backtest")
    assert not lake.exists(ITEM_NEIGHBORS)
    assert not lake.exists(ITEM_NEIGHBORS_HISTORY)
    rows = lake.read(EVALUATION)
    assert {(r["method"], r["head"]) for r in rows.select("method", "head").distinct().collect()} >= {
        ("mtmh", "merged"),
        ("smooth_svd", "-"),
        ("swing", "-"),
        ("late_blend", "0.01"),
    }
    assert rows.groupBy(*EVALUATION.key).count().where("count > 1").count() == 0


def test_every_measure_has_a_meaning(done: Done) -> None:
    assert {row.metric for row in done.final.rows if not meaning_of(row.metric, row.slice)} == set(), "add it to jobs/backtest_measures.py"


def test_lists_of_trained_baselines_are_kept_for_the_explorer(done: Done) -> None:
    kept = KeptLists.latest(done.backtest.settings.lake.model_copy(update={"variant": ""}))
    assert kept is not None
    assert kept.cut == done.final.cut
    assert {"smooth", "smooth_svd", "ease"} <= set(kept.methods) <= set(TRAINED)
    item_id = WORLD.item_id(3, 2)
    assert WORLD.bundle_of(item_id) <= set(kept.ids_of(item_id, "smooth_svd")[:10])
    assert kept.ids_of("unknown", "smooth_svd") == kept.ids_of(item_id, "unknown") == []


def test_a_model_that_is_shown_the_judges_field_is_caught(done: Done) -> None:
    trained = done.backtest.trained_cold(done.final.cut)
    compared = check_leaks(trained, ["categories"])  # withheld: permuting it changes nothing
    assert compared["item_embeddings"] == 3 * len(WORLD.items())
    with pytest.raises(GateError, match=r"permuting \['text'\].*content_vector.*trigger_vector"):
        check_leaks(trained, ["text"])  # not withheld: the model reads it


def test_without_an_independent_judge_there_is_nothing_to_leak(spark: SparkSession, tmp_path: Path) -> None:
    WORLD.write(tmp_path)
    with pytest.raises(SettingsError, match="no judge of own withholds anything"):
        _backtest(spark, tmp_path, judges={"title": {"kind": "words"}}).check_leaks()


def test_shuffled_time_is_chance(spark: SparkSession, tmp_path: Path) -> None:
    WORLD.write(tmp_path)
    events = WORLD.events()
    shuffled = events[["at", "basket", "who"]].sample(frac=1, random_state=1).reset_index(drop=True)
    pd.concat([events[["what"]], shuffled], axis=1).to_parquet(tmp_path / "events" / "part-0.parquet", index=False)
    report = _backtest(spark, tmp_path, external_baselines=False).run(final=False)
    chance = 10 / (len(WORLD.items()) - 1)
    for method, head in (("mtmh", "engagement"), ("mtmh", "merged"), ("counts", "-"), ("smooth_svd", "-"), ("content", "-")):
        assert _row(report, method, head, "recall@10").value == pytest.approx(chance, abs=0.06), method


def test_an_ablation_trains_on_the_same_pairs_and_is_paired_with_the_default(done: Done) -> None:
    settings = done.backtest.settings
    apart = settings.model_copy(update={"model": settings.model.model_copy(update={"encoder": "separate"})})
    still = settings.model_copy(update={"training": settings.training.model_copy(update={"num_steps": 0})})
    runs = len(done.backtest.night(done.final.cut).ledger.records(stage="build_pairs"))
    found = dict(ablate(done.backtest, {"default": settings, "apart": apart, "still": still}, [settings.training.seed]))
    rows = {(row["variant"], row["head"], row["metric"], row["slice"]): row for row in differences(found, num_resamples=50, seed=0)}
    assert "difference" not in rows["default", "merged", "recall@100", "all"]
    for name in ("apart", "still"):
        row = rows[name, "engagement", "recall@100", "all"]
        assert row["low"] <= row["difference"] <= row["high"]
        assert row["difference"] == pytest.approx(row["value"] - rows["default", "engagement", "recall@100", "all"]["value"])
    assert rows["still", "encoder", "recall@100", "all"]["value"] == pytest.approx(1.0)  # the bundle is in the factorization already
    after = done.backtest.night(done.final.cut).ledger.records(stage="build_pairs")
    assert len(after) - runs <= 1, "pairs are counted for the default alone"
