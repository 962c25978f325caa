"""A backtest in plain English: what was judged and how, what came out, and every loss as plainly as every win."""

import math
from datetime import timedelta

from jobs.backtest_results import (
    INDEPENDENT,
    LOWER_IS_BETTER,
    SAME_SOURCE,
    Comparison,
    Report,
    Row,
    Verdict,
    name_of,
    number,
    percent,
)


def summary_words(report: Report) -> list[str]:
    """Paragraphs: the subject, the outcome, the figures, the judge, how often the slice was read, notes.

    What a verdict covers follows on lines of its own, within its paragraph.
    """
    notes = [f"Note: {note}" for note in report.notes]
    return [_subject(report), *_outcome(report), *_figures(report), _judges(report), _reads(report), *notes]


def _subject(report: Report) -> str:
    first = report.cut + timedelta(days=1)
    return (
        f"What was judged: lists made from everything known at the end of {report.cut} ({report.config}), for {report.num_triggers:,} "
        f"triggers, by the co-engagements from {first} to {report.until}. Every method ranks the full catalog, and a future partner that "
        f"is in no list counts as missed. {percent(report.unreachable_share)} of the future weight lies on targets that did not exist at "
        f"the cut: no method can find them, and they count as missed as well. Brackets are 95 % bootstrap intervals over triggers; "
        f"differences are paired over the same triggers."
    )


def _outcome(report: Report) -> list[str]:
    """A paragraph a verdict, an empty one too: that nothing is lost must be said, since silence would look the same."""
    if not report.comparisons:
        return ["Nothing was compared: this report has no paired difference, so it shows no win, no tie and no loss."]
    said: dict[Verdict, tuple[str, str]] = {
        "wins": ("MTMH wins", "is ahead of"),
        "ties": ("MTMH ties", "cannot be told apart from"),
        "loses": ("MTMH loses", "is behind"),
        "not measured": ("Not measured", "could not be set against"),
    }
    verdicts = {comparison.verdict for comparison in report.comparisons}
    return [_paragraph(report, verdict, *words) for verdict, words in said.items() if verdict != "not measured" or verdict in verdicts]


def _paragraph(report: Report, verdict: Verdict, title: str, relation: str) -> str:
    """The count, then a line for each pair of lists: measures of one pair, one by one, would be hard to read."""
    found = [comparison for comparison in report.comparisons if comparison.verdict == verdict]
    groups: dict[tuple[str, str, str], list[Comparison]] = {}
    for comparison in found:
        groups.setdefault((comparison.name, comparison.ours, comparison.theirs), []).append(comparison)
    sentences = [
        f"{_capital(name)}: {ours} {relation} {theirs} on {'; '.join(map(_difference, group))}."
        for (name, ours, theirs), group in groups.items()
    ]
    return "\n".join([f"{title}: {len(found) or 'none'} of {_counted(len(report.comparisons), 'comparison')}.", *sentences])


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _counted(count: int, thing: str) -> str:
    return f"{count} {thing}" if count == 1 else f"{count} {thing}s"


def _difference(of: Comparison) -> str:
    """E.g. `recall@100 by +0.0031 [+0.0011, +0.0051], +3.1 %`."""
    if of.verdict == "not measured":
        return of.what
    measure = f"{of.what}, where lower is better," if of.what in LOWER_IS_BETTER else of.what
    ends = f"[{number(of.low, signed=True)}, {number(of.high, signed=True)}]"
    relative = f", {percent(of.relative, signed=True)}" if math.isfinite(of.relative) else ""
    return f"{measure} {'at' if of.verdict == 'ties' else 'by'} {number(of.value, signed=True)} {ends}{relative}"


def _figures(report: Report) -> list[str]:
    """Our first head beside the best baseline, which is picked by this very slice and thereby flattered."""
    metrics = ("recall@100", "debiased_recall@100", report.relevance("relevance@100"), "coverage@10")
    figures = [text for metric in metrics if (text := _figure(report, metric))]
    if not figures:
        return []
    return [f"In figures, {name_of(report.our_heads[0])} beside the baseline that is best on this slice: {'; '.join(figures)}."]


def _figure(report: Report, metric: str) -> str:
    ours = report.find(report.our_heads[0], metric) if report.our_heads else None
    theirs = [row for method in report.baselines if (row := report.find(method, metric))]
    if ours is None:
        return ""
    best = max(theirs, key=lambda row: row.value, default=None)
    return f"{metric} {_value(ours)}" + (f" beside {_value(best)} of {name_of((best.method, best.head))}" if best else "")


def _value(row: Row) -> str:
    """With its interval if it has one: coverage and Gini are of all lists at once."""
    interval = f" [{number(row.low)}, {number(row.high)}]" if math.isfinite(row.low) else ""
    return f"{number(row.value)}{interval}"


def _judges(report: Report) -> str:
    independent, same_source = (" and ".join(report.judges_of(kind)) for kind in (INDEPENDENT, SAME_SOURCE))
    apart = f"judges, {same_source}, are" if len(report.judges_of(SAME_SOURCE)) > 1 else f"judge, {same_source}, is"
    aside = f" The same-source {apart} reported apart and never mixed in." if same_source else ""
    if independent:
        several = len(report.judges_of(INDEPENDENT)) > 1
        reads = "these judges read" if several else "this judge reads"
        words = f"Relevance is judged by {independent}, independent of the lists: they were made without what {reads}."
        return words + _leading(report, INDEPENDENT) + aside
    if same_source:
        return (
            f"No independent judge: relevance is judged by {same_source}, from the same source that the lists were made from. It says no "
            f"more than overlap with that source, and is named same_source for that.{_leading(report, SAME_SOURCE)}"
        )
    return "No independent judge, and no other: relevance was not judged, and this report says nothing about it."


def _leading(report: Report, kind: str) -> str:
    """Whose figures are shown where there is room for one judge only."""
    names = report.judges_of(kind)
    return f" Where no judge is named, relevance is that of {names[0]}; a table shows it judge by judge." if len(names) > 1 else ""


def _reads(report: Report) -> str:
    minutes = f"The backtest took {report.minutes:.0f} minutes."
    if not report.final:
        so_far = f"read {_times(report.num_reads)} so far" if report.num_reads else "not been read"
        return (
            f"This is a validation report: settings may still be chosen by it, so its figures flatter what was chosen. The final slice has "
            f"{so_far}. {minutes}"
        )
    caution = " Each reading after the first lets figures of this slice creep into decisions." if report.num_reads > 1 else ""
    return (
        f"This is the final report: settings were chosen on validation, before the cut. The final slice has been read "
        f"{_times(report.num_reads)}, this time included.{caution} {minutes}"
    )


def _times(count: int) -> str:
    return {1: "once", 2: "twice"}.get(count, f"{count} times")
