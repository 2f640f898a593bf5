"""`RowReader` returns the same values as pyarrow."""

from typing import Any

import pyarrow as pa
import pytest

from dpo_jax.data.store.arrow_rows import RowReader
from dpo_jax.data.store.prepared import RECORDS

COLUMNS: dict[str, list[Any]] = {
    "caption": ["a", "", "häuser am see \U0001f600", "d" * 300, "e", "f", "g"],
    "captions": [None, ["x", "y"], None, [""], None, None, None],
    "images": [[0, 1], [2], [], [5, 4, 3], [2**31 - 1], [7], [8, 9]],
    "preference": [[1.0, 0.0], [1.0], [], [0.5, 0.25, 0.25], [0.1], [0.0], [0.5, 0.5]],
    "models": [["m", "n"], [""], [], ["o", "p", "q"], ["r"], ["s"], ["t", "u"]],
    "split": ["train"] * 6 + ["validation"],
    "where": [f"row {i}" for i in range(7)],
}


@pytest.mark.parametrize("chunk", [1, 2, 3, 7])
@pytest.mark.parametrize("first", [0, 1, 4])
def test_every_cell_of_any_chunks(chunk: int, first: int) -> None:
    whole = pa.table(COLUMNS, RECORDS)
    table = pa.concat_tables([whole.slice(start, chunk) for start in range(0, 7, chunk)]).slice(first)
    rows = RowReader(table)
    expected = table.to_pylist()
    assert [rows.read(i, RECORDS.names) for i in range(len(expected))] == expected
    assert rows.read(1, ("images", "where")) == {name: expected[1][name] for name in ("images", "where")}


def test_columns_may_be_cut_into_chunks_of_their_own() -> None:
    """This is the case if judges' order replaces a few columns."""
    arrays = {name: pa.array(COLUMNS[name], RECORDS.field(name).type) for name in RECORDS.names}
    arrays["images"] = pa.chunked_array([arrays["images"][:5], arrays["images"][5:]])
    table = pa.table(arrays, RECORDS)
    assert [RowReader(table).read(i, RECORDS.names) for i in range(7)] == table.to_pylist()


def test_a_row_that_is_not_there_is_refused() -> None:
    with pytest.raises(IndexError):
        RowReader(pa.table(COLUMNS, RECORDS)).read(7, ("caption",))
