"""A folder's promises: files whole or absent, refusals that say what to do, one writer over all processes."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from shards import folder

ROOT = Path(folder.__file__).parents[1]


def test_a_written_file_is_whole_and_alone(tmp_path: Path) -> None:
    folder.write(tmp_path / "a", b"\x00\xff")
    folder.write(tmp_path / "b", "stain µ")
    folder.write(tmp_path / "b", "again")
    folder.write_json(tmp_path / "c", {"tumour": [1, "µ"]})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {
        "a": b"\x00\xff", "b": b"again", "c": '{\n  "tumour": [\n    1,\n    "µ"\n  ]\n}\n'.encode()}


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                                 broken: str) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    folder.write(tmp_path / "a", "old")
    monkeypatch.setattr(os if broken == "fsync" else Path, broken, full)
    with pytest.raises(folder.StorageError, match=r"a: the disk is full: free some space"):
        folder.write(tmp_path / "a", "new")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "old"}


def test_a_file_larger_than_the_system_allows_leaves_nothing_behind(tmp_path: Path) -> None:
    """A true refusal by the kernel in the middle of a file, not one that we made up."""
    code = ("import resource, signal, sys; from pathlib import Path; from shards import folder\n"
            "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
            "folder.write(Path(sys.argv[1]), bytes(100_000))")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "File too large" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_reader_never_sees_half_a_file_however_the_writer_dies(tmp_path: Path) -> None:
    code = ("import os, signal, sys; from pathlib import Path; from shards import folder\n"
            "os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)\n"
            "folder.write(Path(sys.argv[1]), 'new')")
    folder.write(tmp_path / "a", "old")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a")], cwd=ROOT)
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / "a").read_text() == "old"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_device_is_said_to_be_full() -> None:
    with (pytest.raises(folder.StorageError, match=r"^/dev/full: the disk is full: free some space"),
          folder.storage(Path("/dev/full")), Path("/dev/full").open("wb") as handle):
        handle.write(b"a")
        handle.flush()


@pytest.mark.parametrize(("number", "advice"), [
    (errno.ENOSPC, "the disk is full"), (errno.EDQUOT, "your quota is used up"), (errno.EACCES, "no permission"),
    (errno.EPERM, "no permission"), (errno.EROFS, "the file system is read-only"), (errno.ENOTDIR, "a file stands"),
])
def test_refusals_of_the_system_become_one_sentence(number: int, advice: str) -> None:
    with pytest.raises(folder.StorageError, match=f"/a/b: {advice}.*: ") as caught, folder.storage(Path("/x")):
        raise OSError(number, os.strerror(number), "/a/b")
    assert caught.value.exit_code == 9
    assert caught.value.errno == number
    with pytest.raises(folder.StorageError, match="/x: "), folder.storage(Path("/x")):
        raise OSError(number, os.strerror(number))


def test_what_is_no_refusal_of_the_storage_passes_as_it_is() -> None:
    with pytest.raises(FileNotFoundError), folder.storage(Path("/x")):
        raise FileNotFoundError(errno.ENOENT, "gone")
    with pytest.raises(ZeroDivisionError), folder.storage(Path("/x")):
        1 / 0       # noqa: B018
    inner = folder.StorageError(errno.ENOSPC, "said before")
    with pytest.raises(folder.StorageError) as caught, folder.storage(Path("/x")):
        raise inner
    assert caught.value is inner


def test_a_folder_is_made_with_its_parents_or_refused_with_what_to_do(tmp_path: Path,
                                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    assert folder.make(tmp_path / "a" / "b") == folder.make(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert (tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").write_text("")
    for wrong in (tmp_path / "file", tmp_path / "file" / "b"):
        with pytest.raises(folder.StorageError, match="a file stands where a folder is needed"):
            folder.make(wrong)
    monkeypatch.setattr(os, "access", lambda *_: False)     # root may write everywhere
    with pytest.raises(folder.StorageError, match=r"a/b: no permission to write there: choose a folder of your own"):
        folder.make(tmp_path / "a" / "b")


def hold(path: Path) -> subprocess.Popen:
    code = ("import sys, time; from pathlib import Path; from shards import folder\n"
            "with folder.hold(Path(sys.argv[1]), 'lock'): print('held', flush=True); sys.stdin.read()")
    return subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, stdin=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, cwd=ROOT)


def test_a_folder_has_one_writer_and_the_kernel_frees_it_when_that_one_dies(tmp_path: Path) -> None:
    with hold(tmp_path) as first:
        assert first.stdout.readline() == "held\n"
        with hold(tmp_path) as second:
            said = f"is being written by process {first.pid} on {os.uname().nodename}; wait for it"
            assert said in second.stderr.read()
            assert second.wait() == 1
        with pytest.raises(folder.FolderInUse, match=f"process {first.pid} ") as caught, folder.hold(tmp_path, "lock"):
            pass
        assert caught.value.exit_code == 10
        with folder.hold(tmp_path, "another"):
            pass
        first.kill()
        first.wait()
        with folder.hold(tmp_path, "lock"), pytest.raises(folder.FolderInUse, match=f"process {os.getpid()} "), \
                folder.hold(tmp_path, "lock"):
            pass
        with folder.hold(tmp_path, "lock"):
            assert (tmp_path / "lock").read_text() == f"process {os.getpid()} on {os.uname().nodename}\n"
