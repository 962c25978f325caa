"""The explorer's inbox: thumbs up and down, each one row of `relevance_feedback`, which the next ingest reads."""

from datetime import UTC, datetime
from typing import Self

import pyarrow as pa
from deltalake import write_deltalake
from pydantic import BaseModel, ConfigDict, Field, model_validator

from conf.tables import RELEVANCE_FEEDBACK
from jobs.reader import open_table


class Vote(BaseModel):
    """What the page sends: the trigger, the neighbor, 1 for thumbs up, 0 for down, null to take the vote back, and the list looked at."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    item_id: str = Field(min_length=1, max_length=1000)
    other_item_id: str = Field(min_length=1, max_length=1000)
    grade: float | None = Field(ge=0, le=1)
    head: str = Field(min_length=1, max_length=200)

    @model_validator(mode="after")
    def _two_items(self) -> Self:
        if self.item_id == self.other_item_id:
            raise ValueError("an item is no neighbor of itself")
        return self


def append_vote(root: str, vote: Vote, *, run_id: str) -> None:
    """Write one row, in one commit.

    Raises:
        TableError: no ingest has made the inbox yet.
    """
    table = open_table(root, RELEVANCE_FEEDBACK)
    row = vote.model_dump() | {"rated_at": datetime.now(UTC), "run_id": run_id}
    write_deltalake(table, pa.Table.from_pylist([row], schema=pa.schema(table.schema().to_arrow())), mode="append")
