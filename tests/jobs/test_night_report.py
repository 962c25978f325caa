"""What a night's report says of settings and errors; the page itself is tested on real nights in test_nightly."""

from datetime import UTC, date, datetime
from pathlib import Path

import pytest
from pyspark.sql import SparkSession

from conf.settings import load_settings
from jobs.backtest_report import REPORTS, Report, frontier_svg, write_json
from jobs.night_picture import curves_svg
from jobs.night_report import NightReport, published_mix, settings_text
from jobs.night_words import first_line, listed
from jobs.progress import Display
from jobs.stage import make_night
from tests.jobs.test_backtest_report import family
from tests.jobs.test_backtest_report import report as judged_lists


def test_the_settings_of_a_report_are_settings_again_and_hide_secrets(tmp_path: Path) -> None:
    secret = ["source.items.options={fs.s3a.secret.key: hunter2, header: 'yes'}", "spark.settings={spark.my.password: hunter3}"]
    shown = settings_text(load_settings("demo", secret))
    assert "hunter" not in shown
    assert shown.count("(hidden)") == 2
    settings = load_settings("demo", ["source.user_share=0.1", "model.heads.deals={affinity: 1.0}"])
    path = tmp_path / "night.yaml"
    path.write_text(settings_text(settings))
    assert load_settings(str(path)) == settings


def test_errors_are_named_only_where_they_are_not_ours() -> None:
    assert first_line("GateError: the gate of stage ingest failed.\n  num_items") == "the gate of stage ingest failed"
    assert first_line("ZeroDivisionError: division by zero") == "ZeroDivisionError: division by zero"
    assert first_line("KeyboardInterrupt: ") == "KeyboardInterrupt"
    assert [listed(names) for names in ([], ["a"], ["a", "b"], ["a", "b", "c"])] == ["", "a", "a and b", "a, b and c"]


def test_curves_show_losses_alone() -> None:
    steps = [{"loss": 2.0 - step, "<b>/engagement": 1.0, "engagement/taught_share": 0.3, "cosine a b": 0.1} for step in range(3)]
    picture = curves_svg(steps)
    assert "all tasks, weighted" in picture
    assert "&lt;b&gt; head: engagement" in picture
    assert "share" not in picture
    assert "cosine" not in picture
    assert curves_svg([]) == ""


def test_the_published_mix_is_a_point_of_the_frontier_only_as_a_blend_for_all_places() -> None:
    row = {"scope": "default", "kind": "blend", "value": 0.02, "popularity_exponent": 0.0}  # as tables of earlier releases have it
    assert published_mix([{**row, "scope": "toys", "value": 0.5}, row], exponent=0.0) == "0.02"
    assert published_mix([row | {"relevance_share": 0.0}], exponent=0.0) == "0.02"
    assert published_mix([row | {"relevance_share": 0.1}], exponent=0.0) == ""
    assert published_mix([row | {"new_item_bonus": 1.5}], exponent=0.0) == ""
    assert published_mix([row | {"new_pair_bonus": 0.3}], exponent=0.0) == ""
    assert published_mix([row | {"kind": "quota"}], exponent=0.0) == ""
    assert published_mix([row], exponent=0.04) == ""  # the sweep was of another discount


@pytest.mark.parametrize(("share", "rings"), [(0.0, 1), (0.1, 0)])
def test_the_published_mix_is_ringed(
    spark: SparkSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float, rings: int
) -> None:
    monkeypatch.chdir(tmp_path)  # where a backtest has left its report
    merge = f"merge=[{{kind: blend, value: 0.005, relevance_share: {share}, popularity_exponent: 0.04}}]"
    settings = load_settings("demo", [f"lake.root={tmp_path / 'lake'}", merge])
    mixes = family("mtmh_blend", "", 0, ("0", "0.005", "0.02", "0.1", "0.3", "1"))
    write_json(judged_lists(config=settings.name, families={"mtmh_blend": mixes}), REPORTS / f"{settings.name}.json")
    night = make_night(
        settings, date(2024, 3, 31), spark=spark, display=Display(seconds_per_line=3600), now=datetime(2024, 4, 1, tzinfo=UTC)
    )
    report = NightReport.of(night, ["ingest"]).backtest
    assert isinstance(report, Report)
    assert frontier_svg(report).count(">the mix of merge_policy<") == rings
