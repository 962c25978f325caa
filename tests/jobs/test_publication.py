"""Nights published, rolled back and merged again in a lake without Spark: what each reader sees, and what is refused."""

from datetime import date
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pytest
from deltalake import DeltaTable, Field, write_deltalake

from conf.errors import PublishError, SettingsError, TableError
from conf.tables import ITEM_NEIGHBORS, ITEM_NEIGHBORS_HISTORY, MERGE_POLICY
from features import store
from jobs import publication
from jobs.ledger import Ledger
from jobs.look_up import Lookup
from jobs.online import feature_store_folder, open_feature_store
from jobs.progress import Display
from jobs.publication import kept_runs, publish_run, published, run_files
from jobs.reader import artifacts_of, open_table
from jobs.remerge import remerge
from jobs.rollback import roll_back
from tests.list_world import ListWorld

QUIET = Display(seconds_per_line=3600)
FIRST, SECOND = date(2024, 3, 30), date(2024, 3, 31)


@pytest.fixture
def world(tmp_path: Path) -> ListWorld:
    return ListWorld(folder=tmp_path)


def online(world: ListWorld, item_id: str) -> dict[str, object]:
    settings = world.settings
    return store.lookup_online(open_feature_store(settings), [item_id], heads=settings.list_names, k=100)[item_id]


def served(world: ListWorld, item_id: str) -> bool:
    """The online store holds what Delta holds."""
    found, rows = online(world, item_id), world.current()
    wanted = {head: rows[item_id, head] for head in world.settings.list_names}
    same = all(found[head]["ids"] == [n["neighbor_id"] for n in row["neighbors"]] for head, row in wanted.items())
    return same and {found["run_id"]} == {row["run_id"] for row in wanted.values()}


def test_a_publication_is_the_runs_files_in_one_fenced_commit(world: ListWorld) -> None:
    first = world.night(FIRST, seed=1)
    before = published(world.root)
    second = world.night(SECOND, seed=2)
    assert {row["run_id"] for row in world.current().values()} == {second}
    table, history = open_table(world.root, ITEM_NEIGHBORS), open_table(world.root, ITEM_NEIGHBORS_HISTORY)
    assert table.to_pyarrow_table().num_rows == 3 * world.num_items
    assert len(table.file_uris()) == len(run_files(history, second) or []) == 2
    assert not {Path(uri).name for uri in table.file_uris()} & {Path(uri).name for uri in history.file_uris()}
    assert all(Path(uri).stat().st_nlink == 2 for uri in table.file_uris()), "links, not copies"
    # the file statistics went along: a reader skips the file that cannot hold the item
    bounds = pa.table(table.get_add_actions(flatten=True)).select(["min.item_id", "max.item_id", "num_records"]).to_pylist()
    assert sum(row["num_records"] for row in bounds) == 3 * world.num_items
    assert sum(row["min.item_id"] <= "i003" <= row["max.item_id"] for row in bounds) == 1
    with pytest.raises(PublishError, match=r"item_neighbors is at version 2, this run expected 1: another run was published in between"):
        publish_run(world.root, first, expected=before.version, inputs={})
    with pytest.raises(TableError, match="holds no lists of run 2023"):
        publish_run(world.root, "2023-01-01-ffffffff", expected=2, inputs={})
    assert published(world.root).run_id == second
    assert kept_runs(world.root) == {first: FIRST, second: SECOND}


def test_a_publication_while_another_looks_at_the_table_is_not_overwritten(world: ListWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = world.night(FIRST, seed=1), world.night(SECOND, seed=2, publish=False)
    seen = published(world.root).version
    looked = publication.changes_since

    def looks_and_is_overtaken(*arguments: Any) -> list[dict[str, Any]]:
        found = looked(*arguments)
        monkeypatch.setattr(publication, "changes_since", looked)
        publish_run(world.root, second, expected=seen, inputs={})
        return found

    monkeypatch.setattr(publication, "changes_since", looks_and_is_overtaken)
    with pytest.raises(PublishError, match="another run was published in between"):
        publish_run(world.root, first, expected=seen, inputs={})
    assert published(world.root).run_id == second


def test_a_compacted_history_is_published_by_rows(world: ListWorld) -> None:
    first = world.night(FIRST, seed=1)
    wanted = world.current()
    world.night(SECOND, seed=2)
    DeltaTable(f"{world.root}/{ITEM_NEIGHBORS_HISTORY.name}").optimize.compact()
    assert run_files(open_table(world.root, ITEM_NEIGHBORS_HISTORY), first) is None
    publish_run(world.root, first, expected=published(world.root).version, inputs={})
    assert world.current() == wanted


def test_rolling_back_and_forth_in_delta_and_online(world: ListWorld) -> None:
    first = world.night(FIRST, seed=1)
    wanted = world.current()
    second = world.night(SECOND, seed=2, num_items=80)  # ten items have left
    roll_back(world.settings, second, display=QUIET)  # current in Delta, not yet online
    assert served(world, "i005")
    assert online(world, "i085")["merged"] == {"ids": [], "scores": []}  # a tombstone of the night
    assert online(world, "i085")["run_id"] == second
    version = roll_back(world.settings, first, display=QUIET)
    assert world.current() == wanted
    assert world.metadata() == {
        "run_id": first,
        "run_date": "2024-03-30",
        "model_version": "model-1",
        "inputs": {"merge_policy": "1", "item_features": "7"},
        "rolled_back_from": second,
    }
    assert served(world, "i005")
    assert served(world, "i085")
    done = world.ledger.records(run_id=first, status="succeeded")
    assert [record.stage for record in done] == ["publish_neighbors", "rollback", "publish_online"]
    assert done[1].output_versions[ITEM_NEIGHBORS.name] == version == done[2].input_versions[ITEM_NEIGHBORS.name]
    with pytest.raises(PublishError, match=f"run {first} is the current one .*nothing to roll back"):
        roll_back(world.settings, first, display=QUIET)


def test_runs_that_cannot_be_rolled_back_to(world: ListWorld) -> None:
    kept, failed = world.night(FIRST, seed=1), world.night(SECOND, seed=3, status="failed")
    gone = world.night(date(2024, 1, 1), seed=4, publish=False)
    DeltaTable(f"{world.root}/{ITEM_NEIGHBORS_HISTORY.name}").delete(f"run_id = '{gone}'")
    for run, message in (
        (failed, rf"run {failed} failed, .*GateError: coverage.*\nruns to roll back to: {kept}$"),
        (gone, f"lists of run {gone} are not in the history any more"),
        ("2020-01-01-00000000", "no run 2020-01-01-00000000 has written lists"),
    ):
        with pytest.raises(PublishError, match=message):
            roll_back(world.settings, run, display=QUIET)
    assert published(world.root).run_id == kept
    assert [record.stage for record in world.ledger.records()] == ["publish_neighbors"] * 3


def test_a_lookup_before_the_first_publication_says_what_to_run(world: ListWorld) -> None:
    online(world, "i001")  # makes the folder and the definitions
    folder = Path(feature_store_folder(world.settings.lake))
    (folder / "registry.db").unlink()
    with pytest.raises(TableError, match=r"no lists are online yet: the registry in .*_feast has no item_neighbors; run .*nightly"):
        Lookup.open(str(world.config)).lookup(["i001"])


def test_new_items_are_raised_without_retrieval(world: ListWorld, tmp_path: Path) -> None:
    def new_of(lists: dict[tuple[str, str], dict[str, object]]) -> dict[str, int]:
        """New neighbors by trigger: every fifth item is new."""
        merged = {item: row["neighbors"] for (item, head), row in lists.items() if head == "merged"}
        return {item: sum(int(n["neighbor_id"][1:]) % 5 == 0 for n in neighbors) for item, neighbors in merged.items()}

    world.night(SECOND, seed=2)
    few = new_of(world.current())
    world.set_policy(kind="blend", value=0.01, new_item_bonus=10.0)
    remerge(world.settings, display=QUIET)
    again = ListWorld(folder=tmp_path / "again")
    again.set_policy(kind="blend", value=0.01, new_item_bonus=10.0)
    again.night(SECOND, seed=2)
    lists = {key: row["neighbors"] for key, row in world.current().items()}
    assert lists == {key: row["neighbors"] for key, row in again.current().items()}, "what a retrieval would have published"
    many = new_of(world.current())
    assert all(many[item] >= few[item] for item in few)
    assert sum(many.values()) > 2 * sum(few.values())


def test_an_index_of_another_release_is_refused_and_nothing_changes(world: ListWorld) -> None:
    run_id = world.night(SECOND, seed=2)
    before = published(world.root)
    (artifacts_of(world.settings.lake, run_id) / "index" / "new.npy").unlink()
    world.set_policy(kind="blend", value=0.3)
    with pytest.raises(TableError, match=r"found no .*new.npy, .* the index is of another release; run the night again"):
        remerge(world.settings, display=QUIET)
    assert published(world.root) == before


def test_a_policy_table_of_an_earlier_release_has_no_shares(world: ListWorld) -> None:
    world.night(SECOND, seed=2)
    world.set_policy(kind="blend", value=0.3)
    remerge(world.settings, display=QUIET)
    lists = {key: row["neighbors"] for key, row in world.current().items()}
    table = open_table(world.root, MERGE_POLICY).to_pyarrow_table()
    added = ["relevance_share", "new_pair_bonus", "new_item_bonus"]
    assert all(table[name].null_count == 1 for name in added)
    old = table.drop_columns(added)
    write_deltalake(f"{world.root}/{MERGE_POLICY.name}", old, mode="overwrite", schema_mode="overwrite")
    remerge(world.settings, display=QUIET)
    assert {key: row["neighbors"] for key, row in world.current().items()} == lists
    open_table(world.root, MERGE_POLICY).alter.add_columns([Field("relevance_share", "double", nullable=True)])
    open_table(world.root, MERGE_POLICY).update(updates={"relevance_share": "0.5"})
    remerge(world.settings, display=QUIET)
    assert {key: row["neighbors"] for key, row in world.current().items()} != lists


def test_a_changed_policy_is_followed_without_retrieval(world: ListWorld) -> None:
    night = world.night(SECOND, seed=2)
    before = world.current()
    version = world.set_policy(kind="quota", value=0.5)
    done = remerge(world.settings, display=QUIET)
    assert done.run_id == f"{night}.m{version}"
    after = world.current()
    assert after.keys() == before.keys()
    for key, row in after.items():
        if key[1] == "merged":
            assert row["run_id"] == done.run_id
        else:  # the heads' lists stay as they are
            assert row == before[key] | {"run_id": done.run_id}
    # what a retrieval under the new policy would have published
    again = ListWorld(folder=world.folder / "again")
    again.set_policy(kind="quota", value=0.5)
    again.night(SECOND, seed=2)
    same = {key: row | {"run_id": ""} for key, row in again.current().items()}
    assert {key: row | {"run_id": ""} for key, row in after.items()} == same
    changed = [key for key in after if after[key]["list_hash"] != before[key]["list_hash"]]
    assert 0 < len(changed) <= world.num_items, "a consumer takes only these"
    assert served(world, "i005")
    assert kept_runs(world.root) == {night: SECOND, done.run_id: SECOND}, "the history still has what was served before"
    metadata = world.metadata()
    assert (metadata["run_id"], metadata["merged_again_from"], metadata["inputs"]["merge_policy"]) == (done.run_id, night, str(version))
    assert remerge(world.settings, display=QUIET) == done, "nothing to do"
    assert [record.stage for record in world.ledger.records()] == ["publish_neighbors", "remerge", "publish_online"]
    roll_back(world.settings, night, display=QUIET)
    assert world.current() == before
    assert served(world, "i005")
    world.set_policy(kind="rrf", value=0.2)
    assert remerge(world.settings, display=QUIET).run_id == f"{night}.m{version + 1}"


def test_a_merge_that_was_killed_before_its_row_is_told_the_next_time(world: ListWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    night = world.night(SECOND, seed=2)
    version = world.set_policy(kind="quota", value=0.5)

    def append(*_: object) -> None:
        raise OSError("no room")

    with monkeypatch.context() as dying:
        dying.setattr(Ledger, "append", append)
        with pytest.raises(OSError, match="no room"):
            remerge(world.settings, display=QUIET)
    assert published(world.root).run_id == f"{night}.m{version}"
    assert [record.stage for record in world.ledger.records()] == ["publish_neighbors"]
    remerge(world.settings, display=QUIET)
    _, row, online = world.ledger.records()
    assert (row.stage, row.status, row.run_id, row.input_versions["merge_policy"]) == (
        "remerge",
        "succeeded",
        f"{night}.m{version}",
        version,
    )
    assert "was killed before it could say so" in row.notes[0]
    assert (online.stage, online.status) == ("publish_online", "succeeded")
    assert served(world, "i005")
    roll_back(world.settings, night, display=QUIET)
    roll_back(world.settings, row.run_id, display=QUIET)
    assert published(world.root).run_id == row.run_id


def test_a_policy_with_faults_or_without_candidates_changes_nothing(world: ListWorld) -> None:
    night = world.night(SECOND, seed=2)
    before = published(world.root)
    world.set_policy(kind="mix", value=2.0)
    with pytest.raises(SettingsError, match="unknown kind 'mix'"):
        remerge(world.settings, display=QUIET)
    world.set_policy(kind="blend", value=2.0)
    (Path(world.root) / "_artifacts" / night / "candidates").rename(world.folder / "elsewhere")
    with pytest.raises(PublishError, match=f"no kept candidates of run {night} .*jobs.nightly --run-date 2024-03-31"):
        remerge(world.settings, display=QUIET)
    assert published(world.root) == before


def test_example_queries_outside_spark(world: ListWorld) -> None:
    world.night(SECOND, seed=2)
    table = open_table(world.root, ITEM_NEIGHBORS)
    rows = world.current()
    query = """
        SELECT item_id, rank, neighbors[rank].neighbor_id AS neighbor_id, neighbors[rank].score AS score
        FROM read_parquet(?), unnest(range(1, len(neighbors) + 1)) AS ranks(rank)
        WHERE head = 'merged' AND item_id = ? ORDER BY rank
    """
    found = duckdb.execute(query, [table.file_uris(), "i007"]).fetchall()
    assert [row[2] for row in found] == [neighbor["neighbor_id"] for neighbor in rows["i007", "merged"]["neighbors"]]
    popular = """
        SELECT neighbor.neighbor_id AS item_id, count(*) AS num_lists
        FROM (SELECT unnest(neighbors) AS neighbor FROM read_parquet(?) WHERE head = 'merged') GROUP BY ALL ORDER BY num_lists DESC LIMIT 3
    """
    assert len(duckdb.execute(popular, [table.file_uris()]).fetchall()) == 3


def test_lookup_follows_the_published_night(world: ListWorld) -> None:
    world.night(FIRST, seed=1)
    second = world.night(SECOND, seed=2)
    roll_back(world.settings, second, display=QUIET)
    offers = Lookup.open(str(world.config)).lookup(["i001", "i002", "i001"], k=8, max_per_trigger=5)
    assert {offer.run_id for offer in offers} == {second}
    assert len({offer.neighbor_id for offer in offers}) == len(offers) == 8
