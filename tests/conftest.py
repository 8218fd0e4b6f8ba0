"""What several tests share: real data where there is some, and one painted cohort with the shards cut from it."""

import os
from pathlib import Path

import pytest

from shards import synthetic, write


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of real histology; a test that asks for it skips where there is none."""
    folder = Path(os.environ.get("SSL_DIST_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}; name its folder in SSL_DIST_DATA")
    return folder


@pytest.fixture(scope="session")
def slides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four painted slides of 1024 pixels at 0.5 mpp with their annotations, two for testing. Not to be changed."""
    folder = tmp_path_factory.mktemp("slides")
    synthetic.write_cohort(folder, patients=4, size=1024, seed=0, test_patients=2, workers=2)
    return folder


@pytest.fixture(scope="session")
def settings(slides: Path, tmp_path_factory: pytest.TempPathFactory) -> write.Settings:
    """What `shard` was written with."""
    return write.Settings(source=slides, out=tmp_path_factory.mktemp("shards") / "painted", dataset="painted", size=64,
                          mpp=1.0, labels="annotations", tar_samples=40, workers=2, organ="none", licence="Apache-2.0")


@pytest.fixture(scope="session")
def shard(settings: write.Settings) -> Path:
    """The shard folder of the painted slides, in several tars. Not to be changed: copy it first."""
    write.write(settings)
    return settings.out
