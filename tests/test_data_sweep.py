"""The choice of a decoder for a GPU: the fastest, asked once a machine and kind of tile."""

import json
from pathlib import Path

import numpy as np
import pytest

from ssl_dist.data import dali, sweep

RATES = {"slow": 10.0, "fast": 30.0, "middling": 20.0}


def tiles(kilobytes: float, count: int = 4) -> list[np.ndarray]:
    return [np.zeros(int(1000 * kilobytes), np.uint8)] * count


class Asked:
    """Rates, and how often each was asked for."""

    def __init__(self, rates: dict[str, float]):
        self.rates, self.calls = rates, []

    def __call__(self, way: str) -> float:
        self.calls.append(way)
        if self.rates[way] == 0:
            raise RuntimeError("no such engine")
        return self.rates[way]


def test_the_fastest_way_is_taken_and_asked_for_once(tmp_path: Path) -> None:
    kept, asked = tmp_path / "deep" / "decode.json", Asked(RATES)
    assert sweep.fastest(RATES, "a GPU", tiles(20), asked, kept) == "fast"
    assert asked.calls == ["slow", "fast", "middling"] * sweep.ROUNDS, "in turns: what slows the machine slows all"
    again = Asked({"slow": 99, "fast": 1, "middling": 1})
    assert sweep.fastest(RATES, "a GPU", tiles(22), again, kept) == "fast"
    assert not again.calls


@pytest.mark.parametrize(("machine", "encoded"), [("another GPU", tiles(20)), ("a GPU", tiles(200)),
                                                  ("a GPU", tiles(20, 64))])
def test_another_machine_or_other_tiles_are_another_question(machine: str, encoded: list, tmp_path: Path) -> None:
    sweep.fastest(RATES, "a GPU", tiles(20), Asked(RATES), tmp_path / "decode.json")
    other = Asked({"slow": 99, "fast": 1, "middling": 1})
    assert sweep.fastest(RATES, machine, encoded, other, tmp_path / "decode.json") == "slow"
    assert sweep.fastest(RATES, "a GPU", tiles(20), other, tmp_path / "decode.json") == "fast", "and forgets neither"


def test_a_way_that_fails_is_not_taken(tmp_path: Path) -> None:
    assert sweep.fastest(RATES, "a GPU", tiles(20), Asked({**RATES, "fast": 0}), tmp_path / "decode.json") == \
        "middling"


@pytest.mark.parametrize("content", ["", "{", "[]", '{"a GPU, 4 tiles of 16 kB": "gone with an older version"}',
                                     '{"a GPU, 4 tiles of 16 kB": 7}'])
def test_a_file_of_answers_that_is_none_is_written_anew(content: str, tmp_path: Path) -> None:
    kept = tmp_path / "decode.json"
    kept.write_text(content)
    assert sweep.fastest(RATES, "a GPU", tiles(16), Asked(RATES), kept) == "fast"
    assert json.loads(kept.read_text()) == {"a GPU, 4 tiles of 16 kB": "fast"}


def test_where_nothing_can_be_kept_it_is_asked_each_time(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    for _ in range(2):
        asked = Asked(RATES)
        assert sweep.fastest(RATES, "a GPU", tiles(20), asked, tmp_path / "file" / "decode.json") == "fast"
        assert asked.calls


def test_the_answers_lie_where_the_users_other_caches_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert sweep.home() == tmp_path / "ssl_dist" / "decode.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert sweep.home() == tmp_path / ".cache" / "ssl_dist" / "decode.json"


def test_a_drawer_without_views_decodes_and_complains_as_one_with_views(data: Path) -> None:
    encoded = [np.fromfile(path, np.uint8) for path in sorted((data / "pcam_subset_96px/valid").rglob("*.jpg"))[:4]]
    only = dali.Drawer((), 4, 1, None)
    assert only(encoded, []) == []
    with pytest.raises(RuntimeError):
        only([*encoded[:3], encoded[0][:40]], [])
