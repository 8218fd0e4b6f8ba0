"""The doctor: every trouble is one line that names it, and a sound machine has none."""

import io
import json
import types
from pathlib import Path

import pytest
from rich.console import Console

from ssl_dist import doctor


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """No variables of a launcher, whatever the test run was started from."""
    for name in (*doctor.LAUNCHED, "SLURM_NTASKS", "SLURM_JOB_ID", "GLOO_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)


def program(path: Path, body: str) -> None:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


@pytest.mark.usefixtures("bare")
def test_this_machine_has_no_problem(tmp_path: Path) -> None:
    findings = doctor.examine(tmp_path)
    assert [one for one in findings if one.state == "problem"] == []
    assert doctor.exit_code(findings) == 0
    names = [one.name for one in findings]
    assert len(names) == len(set(names)), f"two findings share a name: {names}"
    assert {"python", "packages", "dali", "gloo", "disk", "slurm"} <= set(names)
    assert list(tmp_path.iterdir()) == [], "the disk check left something behind"


def test_a_broken_check_becomes_a_problem_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def open_files() -> doctor.Finding:
        raise RuntimeError("first line\n  second line")

    quick = doctor.Finding("any", "ok", "")
    for check in ("packages", "gpu", "torchvision", "dali", "openslide", "gloo"):
        monkeypatch.setattr(doctor, check, lambda: quick)
    monkeypatch.setattr(doctor, "open_files", open_files)
    findings = doctor.examine(tmp_path)
    (broken,) = [one for one in findings if one.name == "open files"]
    assert broken.state == "problem"
    assert broken.found == "RuntimeError: first line second line"
    assert broken.advice
    assert doctor.exit_code(findings) == 1
    assert len(findings) == 14, "the checks after the broken one were not run"


def test_warnings_alone_do_not_fail() -> None:
    assert doctor.exit_code([doctor.Finding("a", "ok", ""), doctor.Finding("b", "warning", "", "do")]) == 0


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="no /proc")
def test_a_folder_that_is_not_writable_is_named() -> None:
    found = doctor.disk(Path("/proc"))  # not even root may write there
    assert found.state == "problem"
    assert "/proc" in found.found
    assert found.advice


def test_a_folder_that_is_missing_is_named(tmp_path: Path) -> None:
    found = doctor.disk(tmp_path / "nowhere")
    assert (found.state, str(tmp_path / "nowhere") in found.found) == ("problem", True)


def test_an_old_and_a_missing_package_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["numpy>=2.0", "rich>=999", "no-such-thing-at-all>=1", "pytest>=999; extra == 'test'"]
    monkeypatch.setattr(doctor, "requirements", lambda: ("a test", lines))
    found = doctor.packages()
    assert found.state == "problem"
    assert "missing: no-such-thing-at-all>=1" in found.found
    assert "rich " in found.found
    assert ">=999" in found.found
    assert "numpy" not in found.found
    assert "pytest" not in found.found, "an extra nobody asked for is not needed"
    assert found.advice == "pip install 'rich>=999' 'no-such-thing-at-all>=1'"


def test_two_dali_wheels_are_a_problem_and_either_one_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "driver", lambda: "")
    here = {"nvidia-dali-cuda120": "2.4.0", "nvidia-dali-cuda130": "2.4.0"}
    monkeypatch.setattr(doctor, "installed", lambda name: here.get(name, ""))
    monkeypatch.setattr(doctor, "requirements", lambda: ("a test", ["nvidia-dali-cuda130>=2.4"]))
    both = doctor.dali_wheels()
    assert both.state == "problem"
    assert "uninstall" in both.advice
    del here["nvidia-dali-cuda130"]
    assert doctor.dali_wheels().state == "ok"
    assert doctor.packages().state == "ok", "the CUDA 12 wheel stands in for the other"
    here["nvidia-dali-cuda130"] = here.pop("nvidia-dali-cuda120")
    monkeypatch.setattr(doctor, "driver", lambda: "570.86.15")
    assert doctor.dali_wheels().state == "warning", "CUDA 13 on a driver that is too old for it"
    here.clear()
    assert doctor.dali_wheels().state == "problem"


@pytest.mark.parametrize(
    ("cuda", "hidden", "word"),
    [("13.2", None, "driver"), (None, None, "CPU build"), ("13.2", "", "CUDA_VISIBLE_DEVICES")],
)
def test_a_gpu_that_torch_cannot_see_is_explained(
    monkeypatch: pytest.MonkeyPatch, cuda: str | None, hidden: str | None, word: str
) -> None:
    torch = types.SimpleNamespace(
        __version__="9.9",
        version=types.SimpleNamespace(cuda=cuda),
        cuda=types.SimpleNamespace(is_available=lambda: False),
    )
    monkeypatch.setattr(doctor.importlib, "import_module", lambda _: torch)
    monkeypatch.setattr(doctor, "device_files", lambda: [Path("/dev/nvidia0")])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if hidden is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    found = doctor.gpu()
    assert found.state == "warning"
    assert "/dev/nvidia0" in found.found
    assert word in found.advice
    monkeypatch.setattr(doctor, "device_files", lambda: [])
    assert doctor.gpu().state == "ok", "a machine without a GPU is a sound machine"


@pytest.mark.usefixtures("bare")
def test_gloo_on_a_wrong_interface_is_a_problem_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "no-such-interface")
    found = doctor.gloo()
    assert found.state == "problem"
    assert "GLOO_SOCKET_IFNAME=lo" in found.advice


def test_the_cgroup_quota_is_the_least_on_the_way_up(tmp_path: Path) -> None:
    inner = tmp_path / "tree" / "slurm" / "job"
    inner.mkdir(parents=True)
    own = tmp_path / "own"
    own.write_text("0::/slurm/job\n")
    assert doctor.cgroup_quota(tmp_path / "tree", own) is None
    (inner / "cpu.max").write_text("max 100000\n")
    (inner.parent / "cpu.max").write_text("150000 100000\n")
    (tmp_path / "tree" / "cpu.max").write_text("800000 100000\n")
    assert doctor.cgroup_quota(tmp_path / "tree", own) == 1.5
    version_1 = tmp_path / "old" / "cpu" / "docker"
    version_1.mkdir(parents=True)
    (version_1 / "cpu.cfs_quota_us").write_text("250000\n")
    (version_1 / "cpu.cfs_period_us").write_text("100000\n")
    own.write_text("4:memory:/elsewhere\n3:cpu,cpuacct:/docker\n")
    assert doctor.cgroup_quota(tmp_path / "old", own) == 2.5


@pytest.mark.usefixtures("bare")
def test_slurm_without_accounting_is_a_warning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor.slurm().state == "ok", "no SLURM is not a fault"
    program(tmp_path / "sbatch", "echo slurm 22.05.8")
    assert doctor.slurm().state == "warning", "srun is missing"
    program(tmp_path / "srun", "true")
    program(tmp_path / "sacct", "echo Slurm accounting storage is disabled >&2; exit 1")
    found = doctor.slurm()
    assert found.state == "warning"
    assert "accounting storage is disabled" in found.found
    program(tmp_path / "sacct", "true")
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    found = doctor.slurm()
    assert (found.state, found.found) == ("ok", "slurm 22.05.8, inside job 77; sacct answers")


@pytest.mark.usefixtures("bare")
def test_variables_left_by_a_launcher_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.environment().state == "ok"
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("SLURM_NTASKS", "1")
    found = doctor.environment()
    assert found.state == "warning"
    assert "WORLD_SIZE=8" in found.found
    assert "SLURM" not in found.found, "a job of one task waits for nobody"
    assert "unset WORLD_SIZE" in found.advice


def test_both_renderings_hold_every_word() -> None:
    disk = doctor.Finding("disk", "problem", "no [bold]space[/bold]", "free some")
    findings = [disk, doctor.Finding("cpus", "ok", "8")]
    assert json.loads(doctor.as_json(findings)) == [
        {"name": "disk", "state": "problem", "found": "no [bold]space[/bold]", "advice": "free some"},
        {"name": "cpus", "state": "ok", "found": "8", "advice": ""},
    ]
    console = Console(width=100, file=io.StringIO(), record=True)
    console.print(doctor.table(findings))
    drawn = console.export_text()
    for word in ("disk", "problem", "no [bold]space[/bold]", "free some", "cpus", "ok", "8"):
        assert word in drawn, f"{word!r} is not in the table"
