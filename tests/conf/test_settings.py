"""Settings that cannot be meant are refused when they are read, all at once and each by its name."""

import pytest

from conf.errors import SettingsError
from conf.settings import BacktestSettings, EvaluationSettings, JudgeSettings, PolicySettings, Settings, load_settings
from conf.tables import MERGE_POLICY
from jobs.exam import _taxonomy_judge

GRADED = "backtest.judges.editors={kind: graded}"
# an assignment on the demo's settings, the place that is named, and what is said of it
FAULTS = {
    "backtest.judges.taxonomy.level_grades=[0.2, 1.5, -1]": ("backtest.judges.taxonomy.level_grades.2", "greater than or equal to 0"),
    "backtest.judges.tags={kind: labels, ignored_labels: [fine, '(']}": (
        "backtest.judges.tags.ignored_labels.1",
        "not a regular expression",
    ),
    "backtest.blend_values=[0, -0.1]": ("backtest.blend_values.1", "greater than or equal to 0"),
    "backtest.content_shares=[0, 1.01]": ("backtest.content_shares.1", "less than or equal to 1"),
    "backtest.popularity_exponents=[-0.5]": ("backtest.popularity_exponents.0", "greater than or equal to 0"),
    "pairs.half_life_days=0": ("pairs.half_life_days", "wanted a half life > 0 days, very long for no decay; found 0"),
    "pairs.window={kind: time, window_seconds: -1800}": ("pairs.window.window_seconds", "the target at or before it; wanted a number > 0"),
    "evaluation.cutoffs=[10, 0]": ("evaluation.cutoffs.1", "greater than or equal to 1"),
    "pairs.signals={cart: {actions: [cart], window: {kind: session}, half_life_days: -1}}": (
        "pairs.signals.cart.half_life_days",
        "wanted a half life > 0 days, very long for no decay; found -1",
    ),
    GRADED: ("backtest.judges.editors.kind", "source.pair_relevance"),
}


def faults_of(*assignments: str) -> list[str]:
    with pytest.raises(SettingsError) as raised:
        load_settings("demo", assignments)
    head, *faults = str(raised.value).splitlines()
    assert head.endswith(f"has {len(faults)} fault(s):")
    return faults


@pytest.mark.parametrize("assignment", FAULTS)
def test_a_value_out_of_range_is_refused(assignment):
    where, what = FAULTS[assignment]
    assert any(fault.strip().startswith(f"{where}: ") and what in fault for fault in faults_of(assignment))


def test_all_faults_are_reported_together():
    merge = "merge=[{value: 2, kind: quota}, {value: 0.2, kind: quota, relevance_share: 0.1}]"
    faults = faults_of(*FAULTS, "evaluation.window={kind: never}", "training.seed=x", merge)
    assert len(faults) == len(FAULTS) + 1 + 4  # two of the grades are wrong
    for where in [
        *(where for where, _ in FAULTS.values()),
        "backtest.judges.taxonomy.level_grades.1",
        "evaluation.window.kind",
        "training.seed",
    ]:
        assert sum(fault.strip().startswith(f"{where}: ") for fault in faults) == 1, where
    assert any("a quota is a share in [0,1], found 2" in fault for fault in faults)
    assert any("the value of a quota, 0.2, is its relevance_share; found 0.1 too" in fault for fault in faults)


def test_policies_name_mapped_columns_and_start_a_table_that_rules():
    mapped, default = "source.items.columns.filters=[market]", "{value: 0.005}"
    (fault,) = faults_of(mapped, f"merge=[{default}, {{scope: 'markt=de', value: 1}}]")
    assert "merge has a row of scope 'markt=de'; source.items.columns.filters maps ['market']" in fault
    settings = load_settings("demo", [mapped, f"merge=[{default}, {{scope: 'market=de', value: 1}}, {{scope: toys, value: 1}}]"])
    assert settings.fingerprint() == load_settings("demo", [mapped]).fingerprint(), "another start of a table that rules is no other night"
    assert set(PolicySettings.model_fields) == set(MERGE_POLICY.column_names), "what has no column would be lost"


def test_filters_name_mapped_columns_and_lists_that_exist():
    mapped = "source.items.columns.filters=[stock, market]"
    fine = "retrieval.filters=[{column: stock, rule: none_of, values: ['no'], heads: [merged], scopes: [toys, market=de]}]"
    assert load_settings("demo", [mapped, fine, "retrieval.limits=[{by: category, at_most: 2}]"]).retrieval.filters[0].missing
    wrong = "retrieval.filters=[{column: price, rule: shared, heads: [purchase]}, {column: stock, rule: shared, scopes: [shop=1, toys]}]"
    limits = "retrieval.limits=[{by: category, at_most: 2}, {by: brand, at_most: 1, heads: [merged]}]"
    (fault,) = faults_of(mapped, wrong, limits)
    for text in (
        "filters[0] reads column 'price'",
        "filters[0] rules list 'purchase'",
        "filters[1] reads column 'shop'",
        "limits[1] reads column 'brand'",
        "2 limits rule list 'merged', wanted one",
        "source.items.columns.filters maps ['stock', 'market'], lists are ['engagement', 'relevance', 'merged']",
    ):
        assert text in fault
    (fault,) = faults_of(mapped, "retrieval.filters=[{column: stock, rule: any_of}]")
    assert "values belong to the rules any_of and none_of, which need some; found [] with any_of" in fault


def test_signals_are_those_that_are_counted_and_that_ingest_takes():
    heads = "model.heads.purchase={signals: {purchase: 1.0, click: 0}}"
    purchase, click = (f"pairs.signals.{name}={{actions: [{name}], window: {{kind: session}}}}" for name in ("purchase", "click"))
    both = "source.events.action_weights={click: 1, purchase: 5}"
    settings = load_settings("demo", [heads, purchase, click, both, "pairs.signals.purchase.half_life_days=7"])
    assert settings.model.signals == ["purchase"]
    assert settings.model.heads["purchase"].tasks == {"engagement": 0, "relevance": 0, "affinity": 0, "purchase": 1, "click": 0}
    assert (settings.pairs.half_life_of("purchase"), settings.pairs.half_life_of("click")) == (7, settings.pairs.half_life_days)
    (fault,) = faults_of(heads, purchase)
    assert "model.heads.purchase.signals names 'click', which is not among pairs.signals ['purchase']: define it there" in fault
    (fault,) = faults_of(click)
    assert "pairs.signals.click counts ['click'], but ingest takes ['purchase'] only: see source.events.columns.action" in fault
    (fault,) = faults_of(purchase.replace("signals.purchase", "signals.affinity"))
    assert "['affinity'] are tasks of heads already; call these signals something else" in fault
    (fault,) = faults_of(purchase.replace("signals.purchase", "signals.Buy-It"))
    assert "pattern" in fault


def test_the_ends_of_the_ranges_are_fine():
    judge = JudgeSettings(kind="labels", level_grades=[0, 1], ignored_labels=[r".*\d{4}|x"])
    assert BacktestSettings(judges={"tags": judge}, blend_values=[0, 7], content_shares=[0, 1], popularity_exponents=[0, 1])
    assert EvaluationSettings(cutoffs=[1])


def test_a_graded_judge_with_graded_pairs_is_fine():
    settings = load_settings("demo", [GRADED, "source.pair_relevance.path=labels"])
    assert settings.backtest.judges["editors"].kind == "graded"
    sections = {name: getattr(settings, name) for name in Settings.model_fields}
    assert Settings(**sections) == settings
    with pytest.raises(ValueError, match="pair_relevance, which is not set"):
        Settings(**sections | {"source": settings.source.model_copy(update={"pair_relevance": None})})


def test_paths_deeper_than_the_grades_are_a_fault_of_the_settings():
    judge = JudgeSettings(kind="taxonomy", level_grades=[0.5, 1.0])
    _taxonomy_judge("section", judge, [["food", "fruit"], None])
    with pytest.raises(
        SettingsError, match=r"found category paths of 3 levels, and 2 grades .* in backtest\.judges\.section\.level_grades"
    ):
        _taxonomy_judge("section", judge, [["food"], ["food", "fruit", "pear"], None])
