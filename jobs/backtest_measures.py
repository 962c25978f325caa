"""What the measures of judged lists mean, in plain words: for the pages of nights and of backtests."""

from collections.abc import Mapping

from models.scoreboard import COLD_USER_DAYS

_MEASURES: Mapping[str, str] = {
    "recall": "share of a trigger's future partners that are among the first {k} of its list, mean over triggers",
    "debiased_recall": "recall among the first {k} in which a partner weighs one over the root of its popularity, mean over triggers",
    "micro_recall": "share of all future partners of all triggers that are among the first {k} of the lists",
    "relevance": "mean grade of the first {k} by a judge of whom the model was shown nothing; a missing place counts 0",
    "rel_ndcg": "grades of the first {k}, early places weighing more, as a share of what the best order of the catalog has",
    "coverage": "share of the catalog that is among the first {k} of at least one judged list",
    "gini": "how unequally the first {k} places are spread over the catalog: 0 evenly, 1 all to one item; lower is better",
    "tail_share": "share of the first {k} places that go to items outside the most popular ones, which have 80 % of engagement",
    "diversity": "mean distance in content, 1 - cosine, between the first {k} of a list",
    "overlap": "share of the first {k} that the engagement list has too; of the engagement list itself, that the relevance list has",
    "churn": "share of change of the first {k} against the lists of the day before: 1 - Jaccard index, mean over triggers",
    "hypervolume": "area under the family's frontier of recall and relevance",
}
_SAME_SOURCE = "same_source_"
_PARTS: Mapping[str, str] = {
    "new_pairs": "only of partners never seen together with the trigger before",
    "cold_triggers": f"only of triggers with fewer than {COLD_USER_DAYS} user-days before",
    "cold_targets": f"only of partners with fewer than {COLD_USER_DAYS} user-days before",
}


def meaning_of(metric: str, part: str = "all") -> str:
    """The definition of a measure of `evaluation`, e.g. recall@100, and of the slice that it is taken on; empty if nobody wrote one."""
    name, _, k = metric.partition("@")
    same_source = name.startswith(_SAME_SOURCE)
    words = _MEASURES.get(name.removeprefix(_SAME_SOURCE), "").format(k=k)
    if same_source:
        words = words.replace("of whom the model was shown nothing", "that reads what the model has read too")
    return "; ".join(filter(None, [words, _part_words(part)])) if words else ""


def _part_words(part: str) -> str:
    if part.startswith("judge:"):
        return f"by the judge {part.removeprefix('judge:')}"
    side, _, decile = part.partition("_decile_")
    if decile:
        return f"only of {side}s in this tenth by popularity, 1 the least popular"
    return _PARTS.get(part, "")
