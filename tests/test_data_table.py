"""Tables of their owners': as a spreadsheet writes them, and refused by line where they are torn."""

from pathlib import Path

import pytest

from shards.index import ShardError
from ssl_dist.data import table


def test_a_table_is_read_as_spreadsheets_write_it(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes("\ufeffslide, label ,note\r\nS1,a,\"one, two\"\r\n,,\r\nS2, b ,µ\r\n\r\n".encode())
    assert table.lines(path, ["slide", "label"]) == (["slide", "label", "note"], [
        (2, {"slide": "S1", "label": "a", "note": "one, two"}), (4, {"slide": "S2", "label": "b", "note": "µ"})])


@pytest.mark.parametrize(("content", "said"), [
    (b"slide;label\nS1;a\n", "separated by semicolons; save it as CSV"),
    (b"slide\tlabel\nS1\ta\n", "separated by tabs"),
    (b"slide,name\nS1,a\n", "begins with slide, name; it has no column label"), (b"", "begins with nothing"),
    (b"slide,label\nS1,a\nS2\n", "line 3 has 1 cells and the first 2"),
    (b"slide,label,label\nS1,a,b\n", "two columns 'label'"), (b"slide,label\n\xff,a\n", "no table .*UTF-8")])
def test_what_is_no_such_table_is_refused_in_words(content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(ShardError, match=said):
        table.lines(tmp_path / "t.csv", ["slide", "label"])
    with pytest.raises(ShardError, match="no table"):
        table.lines(tmp_path / "none.csv")
