"""run.json and last words: of this attempt alone, and never over another's."""

import json
import logging
from pathlib import Path

import pytest
import torch

from shards.folder import FolderInUse
from ssl_dist import lock
from ssl_dist import run as runs

GONE = RuntimeError("Connection closed by peer [127.0.0.1]:4711")


def of(path: Path, token: str) -> lock.Owner:
    owner = lock.Owner(path, token)
    owner.write()
    return owner


def begun(path: Path, owner: lock.Owner) -> runs.Run:
    return runs.Run(path, owner, 10, torch.device("cpu"), {})


def told(path: Path) -> dict:
    return json.loads((path / "run.json").read_text())


def test_who_was_taken_over_says_nothing_over_the_other_s_account(tmp_path: Path,
                                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "HEARTBEAT", -1.0)
    mine = begun(tmp_path, of(tmp_path, "mine"))
    begun(tmp_path, of(tmp_path, "theirs")).alive(3)
    before = told(tmp_path)
    mine.fails(FolderInUse("taken over"))
    mine.breaks_off("failed", 6, "hung")
    for write in (lambda: mine.starts_at(1), lambda: mine.alive(4), lambda: mine.ends("done", 0)):
        with pytest.raises(FolderInUse, match="was taken over by process"):
            write()
    assert told(tmp_path) == before
    assert not list(tmp_path.glob("logs/*.exit.json"))
    assert [each["outcome"] for each in before["attempts"]] == ["killed", None]


def test_a_survivor_of_an_old_attempt_does_not_speak_in_a_new_one(tmp_path: Path,
                                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "PATIENCE", 1)
    begun(tmp_path, of(tmp_path, "old"))
    monkeypatch.setenv("RANK", "1")
    survivor = begun(tmp_path, lock.Owner(tmp_path, "old"))
    survivor.owner.check()
    monkeypatch.setenv("RANK", "0")
    begun(tmp_path, of(tmp_path, "new"))
    monkeypatch.setenv("RANK", "1")
    survivor.fails(runs.PeerDied("rank 0 ended"))
    assert (told(tmp_path)["state"], told(tmp_path)["exit_code"]) == ("running", None)


def test_a_survivor_speaks_where_rank_0_of_its_own_attempt_says_nothing(tmp_path: Path,
                                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "PATIENCE", 1)
    begun(tmp_path, of(tmp_path, "ours"))
    monkeypatch.setenv("RANK", "1")
    begun(tmp_path, lock.Owner(tmp_path, "ours")).fails(runs.PeerDied("rank 0 ended"))
    assert (told(tmp_path)["state"], told(tmp_path)["exit_code"]) == ("failed", 7)


def test_last_words_that_are_cleared_away_or_torn_are_none(tmp_path: Path) -> None:
    owner = of(tmp_path, "ours")
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "rank-00000.exit.json").write_text('{"exit')
    (tmp_path / "logs" / "rank-00001.exit.json").symlink_to(tmp_path / "gone")
    assert "is gone without a word" in str(runs.cause(GONE, tmp_path, owner))


def test_last_words_of_an_earlier_attempt_are_no_peer_s(tmp_path: Path) -> None:
    runs.last_words(tmp_path, of(tmp_path, "old"), 9, "the disk was full")
    owner = of(tmp_path, "new")
    assert "is gone without a word" in str(runs.cause(GONE, tmp_path, owner))
    runs.last_words(tmp_path, owner, 8, "no number")
    failure = runs.cause(GONE, tmp_path, owner)
    assert (str(failure), failure.exit_code) == ("rank 0 ended: no number", 8)


def test_a_second_run_of_one_process_has_a_log_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As in a notebook."""
    log = logging.getLogger("ssl_dist.somewhere")
    for name in ("first", "second"):
        with runs.logged(tmp_path / name):
            log.warning("said in the %s", name)
        assert f"said in the {name}" in (tmp_path / name / "logs" / "rank-00000.log").read_text()
    assert (tmp_path / "first" / "logs" / "rank-00000.log").read_text().count("said in") == 1
    assert capsys.readouterr().err.count("said in the second") == 1
