"""Images per second along the data path on real tiles, contenders interleaved in one run; two views of 224 px a tile.

    python benchmarks/data.py [FOLDER_OF_SLIDES] [ROUNDS]

Contenders draw the same crops, colours, blurs and flips from the same numbers where they can take them:

    ours             our loader: pread, DALI decode, one fused OpenCV function a view, threads
    webdataset       the webdataset library, OpenCV decode, the same fused function, worker processes
    dali             DALI's own webdataset reader, operators and random numbers
    decode only      our reader and DALI's decoder, no view: what the loader could reach if views were free
"""

import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import cv2
import matplotlib
import numpy as np
import nvidia.dali.fn as fn
import nvidia.dali.types as types
import torch
import webdataset
from nvidia.dali.pipeline import Pipeline

from shards import write
from ssl_dist import run
from ssl_dist.data import augment, dali, opencv
from ssl_dist.data.batch import View
from ssl_dist.data.loader import Loader
from ssl_dist.data.reader import Reader
from ssl_dist.data.stream import Stream

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).resolve().parent / "results"
VIEW = View(size=224, stain=0.05)
BATCH = 64
STEPS = 60              # a round of one contender: some seconds
SIZE = 256
CORES = len(os.sched_getaffinity(0))

Contender = Callable[[], Iterator[tuple[int, ...]]]     # a fresh, endless supply of batches; yields their shape


def ours(shard: Path) -> Contender:
    """Our loader, as training uses it."""
    reader = Reader([shard])
    stream = Stream(reader.counts, seed=0, window=16, batch=BATCH)
    loader = Loader(reader, stream, (VIEW, VIEW), rank=0, world=1, device=torch.device("cpu"), threads=CORES, ahead=3)
    return lambda: (tuple(batch.views[0].shape) for batch in loader.batches(0, 10**6))


def decode_only(shard: Path) -> Contender:
    """Reader and decoder, without views."""
    reader = Reader([shard])
    stream = Stream(reader.counts, seed=0, window=16, batch=BATCH)
    decoder = dali.Decoder(BATCH, CORES)

    def batches() -> Iterator[tuple[int, ...]]:
        for step in itertools.count():
            images = decoder(reader.read(reader.rows(*stream.locate(stream.epoch(step), stream.positions(step)))))
            yield (len(images), VIEW.size, VIEW.size, 3)

    return batches


def _two_views(sample: dict) -> tuple[np.ndarray, np.ndarray]:
    image = cv2.cvtColor(cv2.imdecode(np.frombuffer(sample["jpg"], np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
    pair = np.empty((2, VIEW.size, VIEW.size, 3), np.uint8)
    for number in range(2):
        random = np.random.default_rng().random((1, augment.UNIFORMS))
        opencv.draw(image, augment.numbers(VIEW, random), 0, VIEW.size, pair[number])
    return pair[0], pair[1]


def library(shard: Path) -> Contender:
    """webdataset with worker processes that decode and draw."""
    urls = [str(path) for path in sorted(shard.glob("*.tar"))]

    def batches() -> Iterator[tuple[int, ...]]:
        data = webdataset.WebDataset(urls, shardshuffle=False, nodesplitter=None, workersplitter=None,
                                     empty_check=False)
        data = data.repeat().shuffle(200).map(_two_views).batched(BATCH, partial=False)
        for first, _ in torch.utils.data.DataLoader(data, batch_size=None, num_workers=CORES, prefetch_factor=3,
                                                    worker_init_fn=lambda _: opencv.one_thread()):
            yield tuple(first.shape)

    return batches


def native(shard: Path) -> Contender:
    """DALI alone: reader, decoder, operators, random numbers; the stain step as three of its operators."""
    tars = sorted(shard.glob("*.tar"))
    pipeline = Pipeline(batch_size=BATCH, num_threads=CORES, device_id=None, seed=0)
    with pipeline:
        encoded = fn.readers.webdataset(paths=[str(tar) for tar in tars], ext=["jpg"], random_shuffle=True,
                                        index_paths=[str(tar.with_suffix(".idx")) for tar in tars], initial_fill=200,
                                        tensor_init_bytes=32768)
        image = fn.decoders.image(encoded, device="cpu", output_type=types.RGB)
        views = []
        for _ in range(2):
            view = fn.random_resized_crop(image, size=VIEW.size, random_area=VIEW.scale, random_aspect_ratio=VIEW.ratio,
                                          antialias=False)
            light = dali.dmath.max(fn.cast(view, dtype=types.FLOAT), 1.0) / 255.0
            density = fn.coord_transform(-dali.dmath.log(light), M=np.eye(3).ravel().tolist(),
                                         T=[0.01, 0.01, 0.01])
            view = dali._pixels(dali.dmath.exp(-density) * 255.0)
            view = fn.color_twist(fn.reshape(view, layout="HWC"), brightness=fn.random.uniform(range=(0.8, 1.2)),
                                  contrast=fn.random.uniform(range=(0.8, 1.2)),
                                  saturation=fn.random.uniform(range=(0.8, 1.2)),
                                  hue=fn.random.uniform(range=(-18, 18)))
            blurred = fn.random.coin_flip(probability=VIEW.blur)
            sigma = fn.random.uniform(range=VIEW.sigma)
            window = 2 * fn.cast(dali.dmath.ceil(3 * sigma), dtype=types.INT32) * blurred + 1
            view = fn.gaussian_blur(view, sigma=sigma, window_size=window)
            views.append(fn.flip(view, horizontal=fn.random.coin_flip(), vertical=fn.random.coin_flip()))
        pipeline.set_outputs(*views)
    pipeline.build()

    def batches() -> Iterator[tuple[int, ...]]:
        while True:
            first, _ = pipeline.run()
            yield (len(first), *first.at(0).shape)

    return batches


CONTENDERS = {"ours": ours, "webdataset + the same OpenCV": library, "DALI alone": native,
              "ours, decode only": decode_only}


def main() -> None:
    """Cuts the tiles, runs the rounds, appends the result and its plot."""
    source = Path(sys.argv[1] if len(sys.argv) > 1 else os.environ.get("SSL_DIST_DATA", "../shared/data") + "/wsi_svs")
    rounds = int(sys.argv[2]) if len(sys.argv) > 2 else 7
    with tempfile.TemporaryDirectory() as folder:
        shard = Path(folder) / "tiles"
        done = write.write(write.Settings(source=source, out=shard, dataset="real", size=SIZE, mpp=0.5, slide_mpp=0.5,
                                          tar_samples=64, subsampling="4:2:0"))
        contenders = {name: make(shard) for name, make in CONTENDERS.items()}
        rates: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(rounds):
            for name, contender in contenders.items():
                rates[name].append(_rate(contender()))
    now = datetime.now(UTC)
    environment = run.environment()
    plot = f"data_{now:%Y%m%dT%H%M%S}.png"
    rows = [{"name": name, "images_per_second": round(statistics.median(values), 1),
             "ratio": round(statistics.median(a / b for a, b in zip(values, rates["ours"], strict=True)), 3),
             "rounds": [round(value, 1) for value in values]} for name, values in rates.items()]
    result = {"date": f"{now:%Y-%m-%d}", "cpu": environment["cpu"], "cpus": environment["cpus"],
              "gpus": environment["gpus"], "versions": environment["packages"], "tiles": done.samples,
              "tile_size": SIZE, "batch": BATCH, "rounds": rounds, "contenders": rows, "plot": plot}
    (RESULTS / plot).with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")
    _plot(rows, RESULTS / plot)


def _rate(batches: Iterator[tuple[int, ...]]) -> float:
    """Tiles a second over STEPS batches. Each round begins anew and ends its threads and processes: what one contender
    prepares ahead would otherwise be made in another's time. The first batches, which wait for that start, do not
    count."""
    for _ in range(4):
        next(batches)
    started = time.perf_counter()
    for _ in range(STEPS):
        assert next(batches) == (BATCH, VIEW.size, VIEW.size, 3)
    seconds = time.perf_counter() - started
    batches.close()
    return STEPS * BATCH / seconds


def _plot(rows: list[dict], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(7, 2.6), layout="constrained")
    names = [row["name"] for row in rows][::-1]
    axes.barh(names, [row["images_per_second"] for row in rows][::-1], color="#7a4f8a")
    for height, row in enumerate(reversed(rows)):
        axes.plot(row["rounds"], [height] * len(row["rounds"]), ".", color="black", markersize=3)
        axes.text(max(row["rounds"]), height, f"  {row['ratio']:.2f}", va="center")
    axes.set_xlabel("tiles a second (dots: rounds, bars: medians, numbers: against ours)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
