"""Write what is generated in `docs/`: a page per table and one of all settings, from `conf/`, and the pictures of the method.

A test holds them up to date.
"""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from conf.settings import Section, Settings, base_content
from conf.tables import TABLES, Table
from jobs.arguments import report_errors
from jobs.method_pictures import pictures
from jobs.session import ROOT

_BY_HAND = "<!-- written by `python -m jobs.write_docs` from conf/: change it there -->"
EXAMPLES: Mapping[str, tuple[str, str]] = {
    "engagements": (
        "Engagements per day.",
        "SELECT event_date, count(*) AS num_events, count(DISTINCT user_id) AS num_users FROM engagements GROUP BY event_date ORDER BY 1",
    ),
    "item_annotations": (
        "What has been known about an item, in time.",
        "SELECT event_timestamp, title, categories FROM item_annotations WHERE item_id = '1029743' ORDER BY event_timestamp",
    ),
    "pair_relevance": (
        "How each source grades.",
        "SELECT source, count(*) AS num_pairs, avg(grade) AS mean_grade FROM pair_relevance GROUP BY source",
    ),
    "relevance_feedback": (
        "Latest votes of the explorer.",
        "SELECT rated_at, item_id, other_item_id, grade FROM relevance_feedback ORDER BY rated_at DESC LIMIT 10",
    ),
    "rejected_rows": (
        "Why rows were refused, most frequent first.",
        "SELECT source, reason, sum(num_rows) AS num_rows FROM rejected_rows GROUP BY source, reason ORDER BY num_rows DESC",
    ),
    "impressions": (
        "What was shown most often.",
        "SELECT item_id, count(*) AS num_shown FROM impressions GROUP BY item_id ORDER BY num_shown DESC LIMIT 10",
    ),
    "exposure_pairs": (
        "Offers that people keep ignoring.",
        "SELECT trigger_item_id, target_item_id, num_shown, num_ignored FROM exposure_pairs ORDER BY num_ignored DESC LIMIT 10",
    ),
    "co_engagement_daily": (
        "How many pairs each day brought.",
        "SELECT event_date, count(*) AS num_pairs FROM co_engagement_daily GROUP BY event_date ORDER BY event_date",
    ),
    "co_engagement_pairs": (
        "Best partners of an item by one of the association scores.",
        "SELECT target_item_id, num_user_days, cosine FROM co_engagement_pairs WHERE trigger_item_id = '1029743' ORDER BY 3 DESC LIMIT 10",
    ),
    "item_popularity": (
        "The most engaged items.",
        "SELECT item_id, num_user_days, num_users FROM item_popularity ORDER BY num_user_days DESC, item_id LIMIT 10",
    ),
    "item_features": (
        "Items about which nothing is known but their text.",
        "SELECT item_id, title FROM item_features WHERE in_catalog AND num_user_days = 0 ORDER BY item_id LIMIT 10",
    ),
    "relevance_examples": (
        "What the relevance head learns from.",
        "SELECT source, mined_by, count(*) AS num_pairs, avg(target) AS mean_target FROM relevance_examples GROUP BY source, mined_by",
    ),
    "item_embeddings": (
        "Vectors per head, and the checkpoint they come from.",
        "SELECT head, model_version, count(*) AS num_items FROM item_embeddings GROUP BY head, model_version",
    ),
    "item_neighbors": (
        "The lists of an item.",
        "SELECT head, run_date, neighbors FROM item_neighbors WHERE item_id = '1029743' ORDER BY head",
    ),
    "item_neighbors_history": (
        "On which nights an item's merged list changed: equal hashes are equal lists.",
        "SELECT run_date, run_id, list_hash FROM item_neighbors_history WHERE item_id = '1029743' AND head = 'merged' ORDER BY run_date",
    ),
    "merge_policy": ("How lists are merged.", "SELECT * FROM merge_policy ORDER BY scope"),
    "runs": (
        "What the last nights did, and where their reports lie.",
        "SELECT run_date, run_id, stage, status, seconds, report FROM runs ORDER BY sequence DESC LIMIT 20",
    ),
    "evaluation": (
        "How past lists met what followed.",
        "SELECT run_date, method, head, metric, value, low, high FROM evaluation WHERE slice = 'all' ORDER BY 1, 4, 5",
    ),
}
"""A question and the SQL that answers it, which Spark and DuckDB both understand; a table without one is simply looked into."""
_ABOUT_SETTINGS = (
    "A configuration is `conf/base.yaml`, then one overlay (`--config demo`, or a file of yours), then `--set section.key=value`.",
    "An unknown key is an error. Defaults are those after `base.yaml`; *required* ones are yours to give.",
)


_WHERE_TABLES_LIE = (
    "Each is a folder `<lake.root>/<table>`, or `<lake.root>/<lake.variant>/<table>`; by default `lake.root` is `var/lake/<name of the "
    "settings file>`, from the working directory. What is no table lies beside them in `_artifacts` and `_feast`."
)


def pages() -> dict[str, str]:
    """Every page by its path below docs/."""
    found = {f"tables/{name}.md": _table_page(table) for name, table in TABLES.items()}
    return found | {"tables/README.md": _tables_page(), "settings.md": _settings_page()}


def _tables_page() -> str:
    rows = [f"| [`{name}`]({name}.md) | {', '.join(table.key)} | {_cell(table.comment)} |" for name, table in TABLES.items()]
    head = ["# Tables", "", _BY_HAND, "", _WHERE_TABLES_LIE, "", "| table | key | holds |", "|---|---|---|"]
    return "\n".join([*head, *rows]) + "\n"


def _table_page(table: Table) -> str:
    question, sql = example(table)
    columns = [f"| `{c.name}` | `{c.type}` | {'yes' if c.nullable else ''} | {_cell(c.comment)} |" for c in table.columns]
    about = [f"Key: {', '.join(f'`{name}`' for name in table.key)}."]
    if table.order_by:
        about.append(f"Sorted inside each file by {', '.join(f'`{name}`' for name in table.order_by)}.")
    if table.restricted:
        about.append("Restricted: it holds state of single users, and is never exported.")
    if table.per_signal:
        about.append(f"One more of its kind for each of `pairs.signals`, e.g. `{table.of_signal('purchase').name}`.")
    lines = [f"# {table.name}", "", _BY_HAND, "", table.comment, "", " ".join(about), ""]
    lines += ["| column | type | may be null | meaning |", "|---|---|---|---|", *columns, "", question, ""]
    lines += ["```sh", f'.venv/bin/python -m jobs.query "{sql}" --config demo', "```", ""]
    lines += ["The same without Spark, by DuckDB over the files of the current version:", "", "```python", *_duckdb(table), "```"]
    return "\n".join(lines) + "\n"


def example(table: Table) -> tuple[str, str]:
    """A question and its SQL."""
    return EXAMPLES.get(table.name) or ("Its first rows.", " ".join(("SELECT * FROM", table.name, "LIMIT 10")))


def duckdb_sql(table: Table) -> str:
    """The example over `$files`, the files of the table's current version."""
    return example(table)[1].replace(f"FROM {table.name}", "FROM read_parquet($files)")


def _duckdb(table: Table) -> Iterator[str]:
    yield "import duckdb"
    yield "from deltalake import DeltaTable"
    yield ""
    yield f'files = DeltaTable("var/lake/demo/{table.name}").file_uris()'
    yield f'sql = "{duckdb_sql(table)}"'
    yield 'duckdb.sql(sql, params={"files": files}).show()'


def _settings_page() -> str:
    lines = ["# Settings", "", _BY_HAND, "", *_ABOUT_SETTINGS, ""]
    for name, field in Settings.model_fields.items():
        if section := _section_in(field.annotation):
            given, nested = base_content().get(name), _nested(field.annotation)
            lines += [f"## {name}", "", _cell(section.__doc__ or ""), ""]
            if nested and given:
                lines += [f"`base.yaml` gives `{json.dumps(given)}`; what a row leaves out is the default below.", ""]
            lines += ["| setting | type | default | meaning |", "|---|---|---|---|"]
            lines += [*_rows(name + nested, section, None if nested else given), ""]
    return "\n".join(lines)


def _rows(path: str, section: type[Section], base: Any) -> Iterator[str]:
    """A row a setting; a section within is described by rows of its own."""
    for name, field in section.model_fields.items():
        inner, given = _section_in(field.annotation), base.get(name) if isinstance(base, Mapping) else None
        where = f"{path}.{name}"
        cells = (f"`{where}`", _cell(_type(field.annotation, field.metadata)), _default(field, given), _cell(field.description or ""))
        yield f"| {' | '.join(cells)} |"
        if inner:
            nested = _nested(field.annotation)
            yield from _rows(where + nested, inner, None if nested else given)


def _nested(annotation: Any) -> str:
    """What stands between the name of a setting that holds several sections and the names of theirs."""
    return {dict: ".<name>", list: "[]"}.get(get_origin(_plain(annotation)), "")


def _plain(annotation: Any) -> Any:
    """Without Annotated and without None."""
    if get_origin(annotation) is Annotated:
        return _plain(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        rest = [kind for kind in get_args(annotation) if kind is not NoneType]
        return _plain(rest[0]) if len(rest) == 1 else annotation
    return annotation


def _section_in(annotation: Any) -> type[Section] | None:
    """The section that a field holds: itself, as an option, in a list or by name."""
    plain = _plain(annotation)
    if isinstance(plain, type) and issubclass(plain, Section):
        return plain
    return next((found for kind in get_args(plain) if (found := _section_in(kind))), None) if get_origin(plain) in (list, dict) else None


def _type(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(arguments[0], [*metadata, *arguments[1:]])
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin in (Union, UnionType):
        return " or ".join("null" if kind is NoneType else _type(kind) for kind in arguments) + _range(metadata)
    if origin is list:
        return f"list of {_type(arguments[0])}"
    if origin is dict:
        return f"mapping to {_type(arguments[1])}"
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return "section"
    return {str: "text", int: "integer", float: "number", bool: "true or false"}[annotation] + _range(metadata)


def _range(metadata: Sequence[Any]) -> str:
    """Bounds in words; those inside the annotations of pydantic are collected by it into `metadata`."""
    flat = [part for of in metadata for part in (of.metadata if isinstance(of, FieldInfo) else [of])]
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    bounds = [f"{sign} {getattr(of, name):g}" for of in flat for name, sign in signs.items() if getattr(of, name, None) is not None]
    return f", {' and '.join(bounds)}" if bounds else ""


def _default(field: FieldInfo, given: Any) -> str:
    value = given if given is not None else field.get_default(call_default_factory=True, validated_data={})
    if value is PydanticUndefined:
        return "*required*" if _section_in(field.annotation) is None else ""
    by_rows = _section_in(field.annotation) is not None and not (_nested(field.annotation) and given)  # rows below say it
    if isinstance(value, Section) or (by_rows and value is not None):
        return ""
    return f"`{_cell(json.dumps(value, ensure_ascii=False))}`"


def _cell(text: str) -> str:
    """Text for one cell of a table."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def write_pages(folder: Path) -> int:
    """Write all pages and pictures, remove those of tables that are gone, and return how many there are."""
    made = pages() | pictures()
    for name in ("tables", "pictures"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for stale in (folder / "tables").glob("*.md"):
        if f"tables/{stale.name}" not in made:
            stale.unlink()
    for name, text in made.items():
        (folder / name).write_text(text, encoding="utf-8")
    return len(made)


def main(argv: Sequence[str] | None = None) -> None:
    """Write the pages of this checkout."""
    argparse.ArgumentParser(description="pages of docs/ from conf/, and pictures of the method").parse_args(argv)
    report_errors(lambda: print(f"{write_pages(ROOT / 'docs')} pages and pictures in docs/"))


if __name__ == "__main__":
    main()
