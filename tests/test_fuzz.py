"""Files that were damaged at random: an error of ours that names the file, or the right answer; never a traceback."""

import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from shards.index import ShardError
from ssl_dist import checkpoint, config, schema
from ssl_dist.data.reader import Reader

ROOT = Path(__file__).resolve().parent.parent
WORDS = (b"null", b"-1", b"1e999", b".nan", b"[]", b"{}", b"''", b"true", b"\xff\xfe", b"\x00", b"${x}", b"&a", b"*a",
         b"!!", b": ", b"- ", b"9" * 30, b"../../x", b"\n")


def many(fast: int, all_of_them: int) -> Any:
    return pytest.mark.parametrize("count", [fast, pytest.param(all_of_them, marks=[
        pytest.mark.faults, pytest.mark.timeout(3600)])])


def damaged(content: bytes, chance: random.Random) -> bytes:
    """One to three accidents: what editors, disks and transfers do to a file."""
    found = bytearray(content)
    for _ in range(chance.randint(1, 3)):
        place, length = chance.randrange(len(found) + 1), chance.choice([1, 2, 8, 40, 512])
        what = chance.choice(["flip", "cut", "drop", "twice", "word", "zero", "lines"])
        if what == "flip" and place < len(found):
            found[place] ^= 1 << chance.randrange(8)
        elif what == "cut":
            del found[place:]
        elif what == "drop":
            del found[place:place + length]
        elif what == "twice":
            found[place:place] = found[place:place + length]
        elif what == "word":
            found[place:place + chance.choice([0, 1, 4])] = chance.choice(WORDS)
        elif what == "zero":
            found[place:place + length] = bytes(len(found[place:place + length]))
        elif what == "lines":
            lines = bytes(found).split(b"\n")
            chance.shuffle(lines)
            found = bytearray(b"\n".join(lines))
        if not found:
            break
    return bytes(found)


def survived(count: int, damage: Callable[[random.Random], None], use: Callable[[], Any],
             refusals: tuple[type[Exception], ...]) -> Iterator[Any]:
    """What `use` gave after each damage, None where it was refused in words."""
    for seed in range(count):
        damage(random.Random(seed))
        try:
            yield use()
        except refusals as refused:
            assert str(refused).strip(), f"seed {seed}: refused without a word"
            assert getattr(refused, "exit_code", 1) != 1, f"seed {seed}"
            yield None
        except Exception as error:
            raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}") from error


@many(60, 600)
@pytest.mark.parametrize("name", ["demo", "pretrain/dino_tcga"])
def test_a_damaged_config_is_a_config_or_is_refused(name: str, count: int, tmp_path: Path) -> None:
    plain, file = (ROOT / "configs" / f"{name}.yaml").read_bytes(), tmp_path / "mine.yaml"
    words = [f"data.shards=[{tmp_path}]", f"run={tmp_path}"]
    found = list(survived(count, lambda chance: void(file.write_bytes(damaged(plain, chance))),
                          lambda: config.load(config.Train, str(file), words), (schema.ConfigError,)))
    refused = sum(each is None for each in found)
    assert 0 < refused < count
    assert all(each.rules() == [] for each in found if each)


def void(_: object) -> None:
    return None


@pytest.fixture
def copy(shard: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shard, tmp_path / "copy"))


@many(60, 400)
@pytest.mark.parametrize("file", ["index.json", "samples.arrow", "a tar"])
def test_a_damaged_shard_folder_gives_the_same_tiles_or_is_refused(file: str, count: int, copy: Path) -> None:
    path = sorted(copy.glob("*.tar"))[0] if file == "a tar" else copy / file
    plain, sound = path.read_bytes(), Reader([copy])
    truth = [image.tobytes() for image in sound.read(sound.all_rows())]
    labels = sound.column("label", sound.all_rows())
    sound.close()

    def used() -> list[bytes]:
        reader = Reader([copy])
        try:
            reader.verify()
            assert reader.column("label", reader.all_rows()) == labels
            return [image.tobytes() for image in reader.read(reader.all_rows())]
        finally:
            reader.close()

    found = list(survived(count, lambda chance: void(path.write_bytes(damaged(plain, chance))), used, (ShardError,)))
    assert all(each == truth for each in found if each is not None), "other tiles, and no word"
    assert sum(each is None for each in found) > count // 2


class Numbers:
    """What a checkpoint asks of an engine."""

    def __init__(self, step: int) -> None:
        self.value = torch.full((50,), float(step))

    def weights(self) -> dict[str, Any]:
        return {"weight": self.value}

    buffers = moments = weights


@many(60, 400)
@pytest.mark.parametrize("file", ["MANIFEST.json", "state.json", "weights.safetensors", "rank-00000.safetensors"])
def test_of_a_damaged_checkpoint_the_one_before_is_taken(file: str, count: int, tmp_path: Path) -> None:
    for step in (2, 4):
        checkpoint.save(tmp_path, step, Numbers(step), {"identity": {}}, keep=2)        # type: ignore[arg-type]
    path = tmp_path / "step-000004" / file
    plain = path.read_bytes()

    def used() -> float:
        newest = checkpoint.newest(tmp_path)
        assert newest is not None
        assert checkpoint.state(newest)["step"] == float(checkpoint.weights(newest)["weight"][0])
        return float(checkpoint.weights(newest)["weight"][0])

    found = list(survived(count, lambda chance: void(path.write_bytes(damaged(plain, chance))), used, ()))
    assert set(found) <= {2.0, 4.0}
    assert found.count(2.0) > count // 2
