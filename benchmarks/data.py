"""Images per second along the data path, contenders in turns in one run, on real tiles in the page cache.

    python benchmarks/data.py [--tiles monuseg|pcam|slides|painted] [--views simclr|dino] [--rounds N] [--steps N]

    ours                        our loader as training uses it: pread, libjpeg-turbo, one fused OpenCV function a view
    webdataset + OpenCV         the webdataset library, worker processes, OpenCV decode, the same fused function
    webdataset + torchvision    PIL decode, torchvision's v2 transforms on PIL images or tensors, whichever is faster
    torch DataLoader + PIL      a map-style dataset that reads the tars in place; PIL and nothing else
    DALI alone                  DALI's own webdataset reader, operators and random numbers
    decode alone, ...           what is in memory already: simplejpeg in threads, our decoder, DALI's
    views alone                 our view kernels on tiles that are decoded already
    read alone, ...             our reader, and a plain loop of pread and crc32 over the same ranges

Every contender makes batches of the same shapes, uint8, in this process. They draw the same kinds of crops, colours,
blurs and flips; the result says where one does less, or draws in another order. Nobody can be faster than the fastest
decoder and the kernels one after the other: of that bound our share is given.
"""

import argparse
import io
import itertools
import os
import random
import sys
import tempfile
import warnings
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import cv2
import matplotlib.pyplot as plt
import measure
import numpy as np
import nvidia.dali.fn as fn
import nvidia.dali.types as types
import simplejpeg
import torch
import webdataset
from measure import CORES, Turn
from nvidia.dali.pipeline import Pipeline
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torch.utils.data import DataLoader, Dataset, RandomSampler, default_collate
from torchvision.transforms import v2

from shards import index
from ssl_dist.config import Data
from ssl_dist.data import augment, dali, decode, opencv
from ssl_dist.data.batch import View, each
from ssl_dist.data.loader import Loader
from ssl_dist.data.presets import PRESETS
from ssl_dist.data.quarantine import Quarantine
from ssl_dist.data.reader import Reader
from ssl_dist.data.stream import Stream

BATCH = 64
AHEAD = Data.ahead      # batches, ours and of every worker process
IN_MEMORY = 1024        # tiles for the views alone, decoded: 200 MB of 256 px
VIEWS = {"simclr": (View(count=2, stain=0.05),), "dino": PRESETS["dino"].views}

Made = Iterator[tuple[list[Any], list[Any]]]        # a batch: its pictures, an array a view; and the names of its tiles


@dataclass
class Setting:
    """What all contenders are given."""

    shards: list[Path]
    views: tuple[View, ...]
    encoded: list[np.ndarray]
    rows: np.ndarray                                # of the encoded tiles, in the catalogue
    decoded: list[np.ndarray] = field(default_factory=list)
    device: str = "cpu"

    @property
    def tars(self) -> list[Path]:
        return sorted(path for shard in self.shards for path in shard.glob("*.tar"))


def setting(shards: list[Path], views: tuple[View, ...]) -> Setting:
    """All tiles in memory, as bytes and, as many as there is room for, as pixels."""
    rows, encoded = measure.everything(shards)
    return Setting(shards, views, encoded, rows,
                   [simplejpeg.decode_jpeg(image, "RGB") for image in encoded[:IN_MEMORY]])


# --- the whole path

def ours(given: Setting, **how: Any) -> Made:
    """Our loader, as training uses it."""
    reader = Reader(given.shards, readers=Data.readers)
    stream = Stream(reader.counts, seed=0, window=Data.window, batch=BATCH)
    with tempfile.TemporaryDirectory() as folder:
        loader = Loader(reader, stream, given.views, rank=0, world=1, device=torch.device(given.device),
                        threads=CORES, ahead=AHEAD,
                        quarantine=Quarantine(Path(folder) / "quarantine.jsonl", 0), **how)
        try:
            for batch in loader.batches(0, 10**9):
                yield batch.views, batch.rows.tolist()
        finally:
            loader.close()


def workers(data: Any, **more: Any) -> DataLoader:
    """Worker processes of torch's, one a core, which begin as copies of this process: nothing is imported anew."""
    return DataLoader(data, num_workers=CORES, prefetch_factor=AHEAD, multiprocessing_context="fork",
                      worker_init_fn=lambda _: opencv.one_thread(), **more)


def library(given: Setting) -> Made:
    """webdataset with worker processes that decode and draw; numbers for a batch at a time, as ours."""
    data = _samples(given).batched(BATCH, partial=False, collation_fn=list).map(partial(_drawn, given.views))
    for *views, names in workers(data, batch_size=None):
        yield views, names


def _samples(given: Setting) -> Any:
    return webdataset.WebDataset([str(path) for path in given.tars], shardshuffle=100, empty_check=False) \
        .repeat().shuffle(200)


def _drawn(views: tuple[View, ...], samples: list[dict]) -> tuple:
    numbers = [opencv.strokes(augment.numbers(view, np.random.default_rng().random((len(samples), augment.UNIFORMS))))
               for view in views]
    out = [np.empty((len(samples), view.size, view.size, 3), np.uint8) for view in views]
    for row, sample in enumerate(samples):
        image = cv2.imdecode(np.frombuffer(sample["jpg"], np.uint8), cv2.IMREAD_COLOR_RGB)
        for view, own, pictures in zip(views, numbers, out, strict=True):
            opencv.draw(image, own[row], view.size, pictures[row])
    return *out, [sample["__key__"] for sample in samples]


def torchvision(given: Setting, tensors: bool) -> Made:
    """webdataset with torchvision's transforms in worker processes. No stain step."""
    data = _samples(given).map(partial(_transformed, _transforms(given.views, tensors)))
    for *views, names in workers(data.batched(BATCH, partial=False, collation_fn=default_collate), batch_size=None):
        yield [view.permute(0, 2, 3, 1) for view in views], names


def _transforms(views: tuple[View, ...], tensors: bool) -> list[v2.Transform]:
    """The same steps in torchvision's words; its jitter shuffles their order, and its blur has one window for all."""
    made = []
    for view in views:
        window = 2 * int(np.ceil(3 * view.sigma[1])) + 1
        jitter = v2.ColorJitter(view.brightness, view.contrast, view.saturation, view.hue)
        steps = [v2.RandomResizedCrop(view.size, view.scale, view.ratio), v2.RandomApply([jitter], view.jitter),
                 v2.RandomGrayscale(view.grey),
                 v2.RandomApply([v2.GaussianBlur(window, view.sigma)], view.blur),
                 v2.RandomSolarize(128, view.solarise),
                 v2.RandomHorizontalFlip(view.horizontal), v2.RandomVerticalFlip(view.vertical)]
        made.append(v2.Compose([v2.PILToTensor(), *steps] if tensors else [*steps, v2.PILToTensor()]))
    return made


def _transformed(transforms: list[v2.Transform], sample: dict) -> tuple:
    image = Image.open(io.BytesIO(sample["jpg"])).convert("RGB")
    return *(transform(image) for transform in transforms), sample["__key__"]


def faster(given: Setting) -> bool:
    """Whether torchvision's transforms are faster here on tensors than on PIL images: two short turns of each."""
    spent = [[measure.turn(checked(torchvision(given, tensors), True, given.views, Seen()), 8).rate_cpu
              for tensors in (False, True)] for _ in range(2)]
    pillow, tensors = map(max, zip(*spent, strict=True))
    return tensors > pillow


def plain(given: Setting) -> Made:
    """torch's DataLoader and PIL. No stain step."""
    data = Tiles(given.shards, given.views)
    sampler = RandomSampler(data, replacement=True, num_samples=10**9)
    for *views, names in workers(data, batch_size=BATCH, sampler=sampler):
        yield views, names.tolist()


class Tiles(Dataset):
    """The tiles of shard folders, read where they lie in their tars."""

    def __init__(self, shards: list[Path], views: tuple[View, ...]):
        self.views, self.places = views, ranges(shards)
        self.files: dict[Path, int] = {}

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, row: int) -> tuple:
        path, offset, size, _ = self.places[row]
        if path not in self.files:
            self.files[path] = os.open(path, os.O_RDONLY)
        image = Image.open(io.BytesIO(os.pread(self.files[path], size, offset))).convert("RGB")
        return *(np.asarray(pillow(image, view)) for view in self.views), row


def ranges(shards: list[Path]) -> list[tuple[Path, int, int, int]]:
    """Where every tile lies: tar, first byte, size; and its checksum."""
    places = []
    for shard in shards:
        tars, columns = index.read(shard).tars, index.samples(shard).to_pydict()
        places += [(shard / tars[tar].name, offset, size, crc32) for tar, offset, size, crc32 in
                   zip(*(columns[name] for name in ("tar", "offset", "size", "crc32")), strict=True)]
    return places


def pillow(image: Image.Image, view: View) -> Image.Image:
    """One view, as somebody would write it with PIL."""
    width, height = image.size
    box = (0.0, 0.0, float(width), float(height))
    for _ in range(augment.ATTEMPTS):
        area, shape = random.uniform(*view.scale), np.exp(random.uniform(*np.log(view.ratio)))
        w, h = np.sqrt(area * shape) * width, np.sqrt(area / shape) * height
        if w <= width and h <= height:
            x, y = random.uniform(0, width - w), random.uniform(0, height - h)
            box = (x, y, x + w, y + h)
            break
    image = image.resize((view.size, view.size), Image.Resampling.BILINEAR, box)
    if random.random() < view.jitter:
        for kind, strength in ((ImageEnhance.Brightness, view.brightness), (ImageEnhance.Contrast, view.contrast),
                               (ImageEnhance.Color, view.saturation)):
            image = kind(image).enhance(1 + random.uniform(-strength, strength))
        hue, saturation, value = image.convert("HSV").split()
        turn = int(256 * random.uniform(-view.hue, view.hue))
        hue = hue.point([(number + turn) % 256 for number in range(256)])
        image = Image.merge("HSV", (hue, saturation, value)).convert("RGB")
    if random.random() < view.grey:
        image = image.convert("L").convert("RGB")
    if random.random() < view.blur:
        image = image.filter(ImageFilter.GaussianBlur(random.uniform(*view.sigma)))
    if random.random() < view.solarise:
        image = ImageOps.solarize(image)
    if random.random() < view.horizontal:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if random.random() < view.vertical:
        image = image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    return image


def native(given: Setting) -> Made:
    """DALI alone: reader, decoder, operators, random numbers; the stain step as three of its operators."""
    pipeline = Pipeline(batch_size=BATCH, num_threads=CORES, device_id=None, seed=0)
    with pipeline:
        encoded = fn.readers.webdataset(paths=[str(tar) for tar in given.tars], ext=["jpg"], random_shuffle=True,
                                        index_paths=[str(tar.with_suffix(".idx")) for tar in given.tars],
                                        initial_fill=200, tensor_init_bytes=32768)
        image = fn.decoders.image(encoded, device="cpu", output_type=types.RGB)
        names = fn.get_property(encoded, key="source_info")
        pipeline.set_outputs(names, *(_native(image, view) for view in given.views))
    pipeline.build()
    while True:
        names, *views = pipeline.run()
        yield ([torch.from_dlpack(view.as_tensor()) for view in views],
               [names.at(number).tobytes() for number in range(len(names))])


def _native(image: Any, view: View) -> Any:
    drawn = fn.random_resized_crop(image, size=view.size, random_area=view.scale, random_aspect_ratio=view.ratio,
                                   antialias=False)
    if view.stains:
        light = dali.dmath.max(fn.cast(drawn, dtype=types.FLOAT), 1.0) / 255.0
        density = fn.coord_transform(-dali.dmath.log(light), M=np.eye(3).ravel().tolist(), T=[0.01, 0.01, 0.01])
        drawn = fn.reshape(_bytes(dali.dmath.exp(-density) * 255.0), layout="HWC")
    jitter = fn.random.coin_flip(probability=view.jitter)
    colour = {name: 1 + jitter * fn.random.uniform(range=(-strength, strength)) for name, strength in
              (("brightness", view.brightness), ("contrast", view.contrast), ("saturation", view.saturation))}
    colour["saturation"] *= 1 - fn.random.coin_flip(probability=view.grey)
    drawn = fn.color_twist(drawn, hue=jitter * fn.random.uniform(range=(-360 * view.hue, 360 * view.hue)), **colour)
    if view.blur:
        sigma = fn.random.uniform(range=view.sigma)
        window = 2 * fn.cast(dali.dmath.ceil(3 * sigma), dtype=types.INT32) * fn.random.coin_flip(probability=view.blur)
        drawn = fn.gaussian_blur(drawn, sigma=sigma, window_size=window + 1)
    if view.solarise:
        signed = fn.cast(drawn, dtype=types.INT32)
        inverted = fn.cast(drawn >= 128, dtype=types.INT32) * fn.random.coin_flip(probability=view.solarise)
        drawn = fn.cast(signed + inverted * (255 - 2 * signed), dtype=types.UINT8)
    return fn.flip(drawn, horizontal=fn.random.coin_flip(probability=view.horizontal),
                   vertical=fn.random.coin_flip(probability=view.vertical))


def _bytes(values: Any) -> Any:
    return fn.cast(dali.dmath.clamp(values, 0.0, 255.0), dtype=types.UINT8)


# --- bounds

def decode_simple(given: Setting) -> Made:
    """libjpeg-turbo, called directly, in threads."""
    return _decoded(given, lambda some: lambda row: simplejpeg.decode_jpeg(some[row], "RGB"))


def decode_ours(given: Setting) -> Made:
    """Our decoder, as the loader calls it."""
    return _decoded(given, decode.Decoder(BATCH, CORES).open)


def _decoded(given: Setting, opened: Callable[[list[np.ndarray]], Callable[[int], np.ndarray]]) -> Made:
    with ThreadPoolExecutor(CORES) as pool:
        for some in _portions(given.encoded):
            picture, pictures = opened(some), [None] * BATCH

            def one(row: int, picture: Callable = picture, pictures: list = pictures) -> None:
                pictures[row] = picture(row)

            opencv.spread(pool, one, range(BATCH))
            yield pictures, []


def decode_dali(given: Setting) -> Made:
    """DALI's decoder on the CPU."""
    decoder = dali.Decoder(BATCH, CORES)
    for some in _portions(given.encoded):
        yield decoder(some), []


def views_alone(given: Setting) -> Made:
    """Our kernels; pixels and numbers lie ready."""
    sizes = [view.size for view in given.views]
    numbers = [[augment.numbers(view, augment.uniforms(0, 0, number, BATCH * batch, BATCH))
                for number, view in enumerate(given.views)] for batch in range(16)]
    with ThreadPoolExecutor(CORES) as pool:
        for own, some in zip(itertools.cycle(numbers), _portions(given.decoded)):
            yield [torch.from_numpy(view) for view in opencv.views(some.__getitem__, own, sizes, pool)], []


def read_ours(given: Setting) -> Made:
    """Our reader, as the loader calls it."""
    reader = Reader(given.shards, readers=Data.readers)
    try:
        for rows in _portions(given.rows):
            yield reader.read(rows), rows.tolist()
    finally:
        reader.close()


def read_plain(given: Setting) -> Made:
    """The same bytes by the shortest loop that checks them."""
    places = ranges(given.shards)
    files = {path: os.open(path, os.O_RDONLY) for path in {place[0] for place in places}}
    wanted = [(files[path], size, offset, crc32) for path, offset, size, crc32 in (places[row] for row in given.rows)]
    try:
        for start in _starts(len(wanted)):
            images = []
            for file, size, offset, crc32 in wanted[start:start + BATCH]:
                content = os.pread(file, size, offset)
                assert zlib.crc32(content) == crc32
                images.append(np.frombuffer(content, np.uint8))
            yield images, given.rows[start:start + BATCH].tolist()
    finally:
        for file in files.values():
            os.close(file)


def _portions(things: Any) -> Iterator[Any]:
    """Batches of things, round and round."""
    return (things[start:start + BATCH] for start in _starts(len(things)))


def _starts(count: int) -> Iterator[int]:
    return (start % (count - BATCH + 1) for start in itertools.count(0, BATCH))


# --- on a GPU

def on_gpu(given: Setting) -> dict[str, Callable[[], Made]]:
    """The whole path with every way of decoding, and what it is made of."""
    gpu = replace(given, device="cuda:0")
    nothing = replace(gpu, views=tuple(replace(view, stain=0.0, jitter=0.0, grey=0.0, blur=0.0, solarise=0.0)
                                       for view in given.views))
    made: dict[str, Callable[[], Made]] = {}
    for way in dali.WAYS:
        try:
            next(decode_to_gpu(gpu, way))
        except RuntimeError as error:       # no JPEG engine on this GPU, or not for such tiles
            sys.stderr.write(f"decode {way}: left out ({str(error)[:200]})\n")
            continue
        made[f"ours on the GPU, decode {way}"] = partial(ours, gpu, way=way)
        made[f"decode alone to the GPU, {way}"] = partial(decode_to_gpu, gpu, way)
    return made | {"ours on the GPU, crops only": partial(ours, nothing)}


def decode_to_gpu(given: Setting, way: str) -> Made:
    """Bytes in memory to pixels on the GPU; by the CPU's cores it is a decode and a copy."""
    drawer = dali.Drawer((), BATCH, CORES, torch.device(given.device).index, way)
    for some in _portions(given.encoded):
        drawer(some, [])
        yield [], []


# --- the run

WHOLE: dict[str, Callable[[Setting], Made]] = {
    "ours": ours, "webdataset + OpenCV": library, "torch DataLoader + PIL": plain, "DALI alone": native}
PARTS: dict[str, Callable[[Setting], Made]] = {
    "decode alone, simplejpeg": decode_simple, "decode alone, ours": decode_ours, "decode alone, DALI": decode_dali,
    "views alone": views_alone,
    "read alone, ours": read_ours, "read alone, a plain loop": read_plain}
NOTES = {
    "webdataset + torchvision": "jitter in random order, contrast about the picture's own mean: another distribution; "
                                "resize with antialias; a blur window of 13 for all",
    "torch DataLoader + PIL": "contrast about the picture's own mean; resize with antialias",
    "DALI alone": "jitter in DALI's order",
}
UNSTAINED = {"webdataset + torchvision": "no stain step", "torch DataLoader + PIL": "no stain step",
             "DALI alone": "the stain step is the same for all tiles"}


@dataclass
class Seen:
    """What a contender made, over all its turns: enough to see that it is what it should be."""

    tiles: int = 0
    names: set[Any] = field(default_factory=set)
    colours: list[list[float]] = field(default_factory=list)       # mean and deviation of batches that were looked at


def checked(made: Made, whole: bool, views: tuple[View, ...], seen: Seen) -> measure.Batches:
    """Counts a contender's tiles and looks at its pictures: at the first batches, before the clock runs."""
    try:
        for number, (pictures, names) in enumerate(made):
            if number < measure.LOOK:
                look(pictures, whole, views, seen)
            seen.names.update(names)
            seen.tiles += BATCH
            yield BATCH
    finally:
        made.close()        # type: ignore[attr-defined]


def look(pictures: list[Any], whole: bool, views: tuple[View, ...], seen: Seen) -> None:
    """Refuses what is not a batch of different pictures, every view of its own."""
    arrays = [np.asarray(each.cpu() if isinstance(each, torch.Tensor) else each) for each in pictures]
    assert all(each.dtype == np.uint8 and each.std() > 1 for each in arrays), "constant, or no bytes"
    if not whole:
        assert len({each.tobytes() for each in arrays}) == len(arrays)
        return
    assert [each.shape for each in arrays] == [(BATCH, view.size, view.size, 3) for view in views]
    for drawn in arrays:
        # Of a blank tile two crops may be equal, and now and then one is drawn twice.
        assert len({each.tobytes() for each in drawn}) > 0.5 * BATCH, "tiles are repeated within a batch"
    for one, other in itertools.pairwise(arrays):
        if one.shape == other.shape:
            assert sum(np.array_equal(a, b) for a, b in zip(one, other, strict=True)) < 0.1 * BATCH, "views are equal"
    seen.colours.append([float(value) for value in (np.mean([each.mean() for each in arrays]),
                                                    np.mean([each.std() for each in arrays]))])


def bound(turns: dict[str, list[Turn]]) -> dict[str, Any]:
    """Tiles a second if the fastest decoder and our kernels were all there is to do, and our share of it, by rounds."""
    found: dict[str, Any] = {}
    for key, rate in (("wall", Turn.rate.fget), ("cpu", Turn.rate_cpu.fget)):       # type: ignore[attr-defined]
        decoders = [own for name, own in turns.items() if name.startswith("decode alone, ")]
        fastest = [max(map(rate, each)) for each in zip(*decoders, strict=True)]
        bounds = [1 / (1 / one + 1 / rate(views)) for one, views in zip(fastest, turns["views alone"], strict=True)]
        shares = [rate(own) / most for own, most in zip(turns["ours"], bounds, strict=True)]
        found |= {f"{key}_images_per_second": round(median(bounds), 1), f"{key}_share": round(median(shares), 3),
                  f"{key}_share_quartiles": [round(value, 3) for value in measure.quartiles(shares)]}
    return found


def plot(found: dict[str, Any]) -> Any:
    """Bars by the clock and by CPU-second, a dot a round."""
    rows = found["contenders"][::-1]
    figure, axes = plt.subplots(1, 2, figsize=(11, 0.8 + 0.32 * len(rows)), layout="constrained", sharey=True)
    for axis, key, name in ((axes[0], "", "images_per_second"), (axes[1], "cpu_", "images_per_cpu_second")):
        # Reading is a hundred times as fast as all else, and would leave it no room.
        room = 1.15 * max(max(row[f"{key}rounds"]) for row in rows if not row["name"].startswith("read"))
        for height, row in enumerate(rows):
            axis.barh(height, row[name], color="#7a4f8a" if row["whole"] else "#b9b3bd")
            axis.plot(row[f"{key}rounds"], [height] * len(row[f"{key}rounds"]), ".", color="black", markersize=3)
            away = row[name] > room
            axis.text(room if away else max(row[f"{key}rounds"]), height, f"  {row[f'{key}ratio']:.2f}  ",
                      ha="right" if away else "left", va="center", fontsize=8)
        axis.set_xlim(0, room)
        axis.set_xlabel(f"tiles a {'CPU-second' if key else 'second'} (bars: medians, numbers: against ours)")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(rows)), [row["name"] for row in rows])
    figure.suptitle(f"{found['tiles']} tiles of {found['tile']['pixels']} px ({found['tile']['kind']}), "
                    f"{found['views_a_tile']} views ({found['views']}), {found['cpus']} cores", fontsize=10)
    return figure


def main() -> None:
    """Cuts the tiles, runs the rounds, appends the result and its plot."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tiles", choices=measure.TILES, default="monuseg", help="monuseg: with osteosarcoma")
    parser.add_argument("--views", choices=VIEWS, default="simclr")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=60, help=f"batches of {BATCH} a turn")
    parser.add_argument("--results", type=Path, default=measure.RESULTS, help="folder to write to")
    told = parser.parse_args()
    warnings.filterwarnings("ignore", "The given NumPy array is not writable")      # PIL's, which are copied at once
    found: dict[str, Any] = measure.machine("webdataset", "simplejpeg", "pillow")
    with tempfile.TemporaryDirectory() as folder:
        given = setting(measure.shards(told.tiles, Path(folder)), each(VIEWS[told.views]))
        opencv.one_thread()
        tensors = faster(given)
        whole = {name: partial(make, given) for name, make in WHOLE.items()}
        whole["webdataset + torchvision"] = partial(torchvision, given, tensors)
        parts = {name: partial(make, given) for name, make in PARTS.items()}
        gpu = on_gpu(given) if torch.cuda.is_available() else {}
        # The first again at the end: how far two runs of the same program differ.
        everyone: dict[str, Callable[[], Made]] = {**whole, **parts, **gpu, "ours again": partial(ours, given)}
        complete = {name for name in everyone if not name.startswith(("decode", "read"))}
        seen = {name: Seen() for name in everyone}
        turns = measure.interleave(
            {name: lambda name=name, make=make: checked(make(), name in complete, given.views, seen[name])
             for name, make in everyone.items()}, told.rounds, told.steps,
            torch.cuda.synchronize if gpu else lambda: None)
    rows = measure.summary(turns, "ours")
    notes = NOTES | {"webdataset + torchvision": NOTES["webdataset + torchvision"] + "; on "
                     + ("tensors" if tensors else "PIL images")}
    if any(view.stains for view in given.views):
        notes |= {name: f"{how}; {notes[name]}" for name, how in UNSTAINED.items()}
    for row in rows:
        own = seen[row["name"]]
        row |= {"whole": row["name"] in complete - {"views alone"}, "note": notes.get(row["name"], ""),
                "made": own.tiles, "distinct": len(own.names) or None,
                "mean_and_deviation": np.mean(own.colours, axis=0).round(1).tolist() if own.colours else None}
    found |= {"tiles": len(given.encoded), "tile": measure.described(told.tiles, given.encoded),
              "views": told.views, "views_a_tile": len(given.views), "batch": BATCH, "steps": told.steps,
              "rounds": told.rounds, "contenders": rows, "bound": bound(turns)}
    sys.stderr.write(f"{measure.keep(found, 'data', plot, told.results)}\n")


if __name__ == "__main__":
    main()
