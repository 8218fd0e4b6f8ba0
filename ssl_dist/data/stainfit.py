"""What stains and colours shard folders hold, from a sample of their tiles: the numbers behind `ssl-dist stain-fit`.

Stains by Macenko et al. (2009), slide by slide; colour statistics in LAB as RandStainNA has them (Shen et al. 2022,
after Reinhard et al. 2001), tile by tile, with a Gaussian mixture over them. Every slide gives as many tiles as any
other that has so many, and the sample is bounded: of thirty million tiles, a hundred thousand are decoded.

N pixels   M those of tissue   T tiles   K components   rows of a stain matrix: haematoxylin, eosin
"""

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np

from shards import index
from shards.index import ShardError
from ssl_dist.data import order, stain
from ssl_dist.data.decode import Decoder, Pictures
from ssl_dist.data.reader import Reader

Progress = Callable[[str, int, int], None]

LIMIT = 100_000         # tiles in all; with more slides than that, so many slides
PIXELS = 100_000        # of a slide: a thousand lie beyond each extreme angle
AT_ONCE = 1 << 20       # rows of the catalogue that are looked at together; a multiple of four, see `sample`
BATCH = 64              # tiles read together

# Natural optical density, the mean of the three bands. The usual codes ask 0.15 of every band: that drops pale eosin,
# which hardly absorbs red (on painted slides, eosin was found 4.3 degrees off, instead of 3.6).
GLASS = 0.15
EXTREMES = 1, 99        # percentiles of the angle, as in the paper
STRENGTH = 99           # percentile of the amounts, robust as the extremes are
LEAST_TISSUE = 1000     # pixels: ten of them beyond each extreme
# Degrees between the two stains. On slides they were 12 to 39; grey pictures with a camera's noise came to 7.
LEAST_ANGLE = 8.0

# How many components the paper's mixture has is not known to us: the Bayesian criterion chooses, up to so many.
MOST_COMPONENTS = 10
FREEDOMS = 28           # of a component: a weight, 6 means, 21 covariances; the criterion gets as many tiles for each
LEAST_SPREAD = 0.1      # levels: grey pictures have no spread of colour at all, and a density must not be infinite

# The last word of Philox's counter; order.py, mixture.py, augment.py and quarantine.py use 0 to 4.
SLIDES, TILES, PLACES = 5, 6, 7

DENSITY = -np.log(np.maximum(np.arange(256), 1) / 255)


def tissue(pixels_N3: np.ndarray) -> np.ndarray:
    """The density (M, 3) of the pixels that are not glass."""
    density_N3 = DENSITY[pixels_N3]
    return density_N3[density_N3.mean(axis=1) >= GLASS]


def macenko(pixels_N3: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Unit vectors (2, 3) of haematoxylin and eosin and the 99th percentiles (2) of their amounts, by Macenko et al.

    None where the pixels (uint8 RGB) hold too little tissue, or a single stain.
    """
    density_M3 = tissue(pixels_N3)
    if len(density_M3) < LEAST_TISSUE:
        return None
    # Of the covariance, as in the usual codes, not of second moments: glass that is not quite white moves all densities
    # alike, and leaves the plane where it is.
    normal_3 = np.linalg.eigh(np.cov(density_M3, rowvar=False))[1][:, 0]
    mean_3 = density_M3.mean(axis=0)
    along_3 = unit(mean_3 - mean_3 @ normal_3 * normal_3)       # angles from the mean's: none is near the turn at 180
    plane_23 = np.stack([along_3, np.cross(normal_3, along_3)])
    along, across = plane_23 @ density_M3.T
    angles_2 = np.percentile(np.arctan2(across, along), EXTREMES)
    if np.ptp(angles_2) < np.radians(LEAST_ANGLE):
        return None
    found_23 = np.stack([np.cos(angles_2), np.sin(angles_2)], axis=1) @ plane_23
    found_23 = unit(np.maximum(found_23, 0))        # no stain gives light: what is below zero is noise
    # By red alone, which eosin lets through: in re-compressed tiles the share of blue has misled us.
    stains_23 = found_23[np.argsort(-found_23[:, 0], kind="stable")]
    strength_2 = np.percentile(density_M3 @ np.linalg.pinv(stains_23), STRENGTH, axis=0)
    return (stains_23, strength_2) if strength_2.min() > 0 else None


def unit(vectors: np.ndarray) -> np.ndarray:
    """The rows at unit length."""
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def lab_statistics(image_HW3: np.ndarray) -> np.ndarray:
    """Means of L, a, b and then their standard deviations (6), over the pixels of an RGB tile."""
    lab = stain.lab(image_HW3).reshape(-1, 3)
    return np.concatenate([lab.mean(axis=0), lab.std(axis=0)])


def mixture(statistics_T6: np.ndarray, components: int, seed: int,
            progress: Progress = lambda what, done, total: None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights (K), means (K, 6) and covariances (K, 6, 6) of a Gaussian mixture, the heaviest component first.

    0 components: as many as the Bayesian information criterion likes best.
    """
    # Here and not above: scikit-learn takes a second to import, and who trains needs none of it.
    from sklearn.mixture import GaussianMixture

    tiles = len(statistics_T6)
    if max(components, 1) >= tiles:
        raise ShardError(f"{tiles} tiles are too few for a mixture of {max(components, 1)} components; look at more "
                         "tiles, or ask for fewer components")
    # The six differ by their size; a start by distances, and a floor under the covariance, ask for one scale.
    centre_6, scale_6 = statistics_T6.mean(axis=0), np.maximum(statistics_T6.std(axis=0), LEAST_SPREAD)
    scaled_T6 = (statistics_T6 - centre_6) / scale_6
    counts = [components] if components else range(1, max(1, min(MOST_COMPONENTS, tiles // FREEDOMS)) + 1)
    fits = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")     # of EM that would go on a little, and of fewer different tiles than asked
        for done, count in enumerate(counts):
            progress("fitting the mixture", done, len(counts))
            fits.append(GaussianMixture(count, reg_covar=1e-3, max_iter=300, random_state=seed).fit(scaled_T6))
    progress("fitting the mixture", len(counts), len(counts))
    best = min(fits, key=lambda fitted: fitted.bic(scaled_T6)) if len(fits) > 1 else fits[0]
    heaviest = np.argsort(-best.weights_, kind="stable")
    covariances_K66 = (best.covariances_ * np.outer(scale_6, scale_6))[heaviest]
    return (best.weights_[heaviest] / best.weights_.sum(), best.means_[heaviest] * scale_6 + centre_6,
            (covariances_K66 + covariances_K66.swapaxes(1, 2)) / 2)


@dataclass
class Seen:
    """What the sample showed."""

    slides: dict[tuple[str, str], tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    statistics: list[np.ndarray] = field(default_factory=list)
    left_out: Counter = field(default_factory=Counter)


def fit(folders: list[Path], *, tiles: int = 32, components: int = 0, seed: int = 0, split: str = "", threads: int = 1,
        progress: Progress = lambda what, done, total: None) -> stain.Fit:
    """What `tiles` of each slide of the shard folders (of a split, where one is named) say of stains and colours."""
    import sklearn.mixture  # noqa: F401  # its libraries must be loaded for the next line to reach them
    import threadpoolctl

    reader = Reader(folders, split)
    reader.verify()
    try:
        # Sums in as many parts as there are threads differ in their last bits; the same file is wanted everywhere.
        with threadpoolctl.threadpool_limits(1):
            seen = look(reader, tiles, seed, threads, progress)
            return _fit(reader, seen, {"tiles": tiles, "components": components, "seed": seed, "split": split},
                        progress)
    finally:
        reader.close()


def _fit(reader: Reader, seen: Seen, settings: dict, progress: Progress) -> stain.Fit:
    where = ", ".join(map(str, reader.folders))
    told = ", ".join(f"{count} {reason}" for reason, count in sorted(seen.left_out.items()))
    if not seen.statistics:
        raise ShardError(f"no tile of {where} could be read ({told}); run: ssl-dist check {reader.folders[0]} --decode")
    if not seen.slides:
        raise ShardError(f"no slide of {where} shows two stains ({told}); are they stained with haematoxylin and "
                         "eosin, and in colour? Where tiles are small, look at more of each slide")
    statistics_T6 = np.stack(seen.statistics)
    weights_K, means_K6, covariances_K66 = mixture(statistics_T6, settings["components"], settings["seed"], progress)
    stains_S23, strength_S2 = map(np.stack, zip(*seen.slides.values(), strict=True))
    return stain.Fit(
        lab_mean_6=statistics_T6.mean(axis=0), lab_std_6=statistics_T6.std(axis=0),
        weights_K=weights_K, means_K6=means_K6, covariances_K66=covariances_K66,
        reference_23=unit(np.median(stains_S23, axis=0)), reference_strength_2=np.median(strength_S2, axis=0),
        slides=seen.slides, shards=[found.fingerprint for found in reader.indexes], tiles=len(statistics_T6),
        settings={**settings, "limit": LIMIT, "pixels": PIXELS, "glass": GLASS, "extremes": list(EXTREMES),
                  "strength": STRENGTH, "least_tissue": LEAST_TISSUE, "least_angle": LEAST_ANGLE},
        left_out=dict(seen.left_out))


def look(reader: Reader, tiles: int, seed: int, threads: int, progress: Progress) -> Seen:
    """Decodes the sample, slide by slide; memory holds the pixels of a few slides and a batch of tiles."""
    slides, rows_T, slides_T, left = sample(reader, tiles, seed)
    seen = Seen(left_out=Counter({"slides beyond the limit": left} if left else {}))
    wanted_T = -(-PIXELS // np.bincount(slides_T)[slides_T])
    pixels: list[np.ndarray] = []
    waiting: list[tuple[int, Future]] = []
    done = 0

    def tile(pictures: Pictures, place: int, wanted: int) -> tuple[np.ndarray, np.ndarray] | None:
        picture_HW3 = pictures(place)
        if place in pictures.bad:
            return None
        flat = picture_HW3.reshape(-1, 3)
        return lab_statistics(picture_HW3), flat[places(seed, len(flat), wanted)]

    with ThreadPoolExecutor(threads) as pool:
        decoder = Decoder(BATCH, threads)
        for first in range(0, len(rows_T), BATCH):
            encoded = reader.fetch(rows_T[first:first + BATCH])
            pictures = decoder.open([np.empty(0, np.uint8) if each is None else each for each in encoded])
            jobs = [pool.submit(tile, pictures, place, int(wanted_T[first + place])) for place in range(len(encoded))]
            for content, job in zip(encoded, jobs, strict=True):
                if (found := job.result()) is not None:
                    seen.statistics.append(found[0])
                    pixels.append(found[1])
                else:
                    seen.left_out["tiles changed on disk" if content is None else "tiles that cannot be decoded"] += 1
                done += 1
                if done == len(rows_T) or slides_T[done] != slides_T[done - 1]:
                    waiting.append((int(slides_T[done - 1]), pool.submit(_stains, pixels)))
                    pixels = []
            progress("looking at tiles", done, len(rows_T))
        for slide, fitted in waiting:
            if isinstance(stains := fitted.result(), str):
                seen.left_out[stains] += 1
            else:
                seen.slides[slides[slide]] = stains
    return seen


def _stains(pixels: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray] | str:
    """The stains of a slide from the pixels of its tiles, or why there are none."""
    pixels_N3 = np.concatenate([np.empty((0, 3), np.uint8), *pixels])
    if (found := macenko(pixels_N3)) is not None:
        return found
    return "slides with too little tissue" if len(tissue(pixels_N3)) < LEAST_TISSUE else "slides of a single stain"


@lru_cache(maxsize=16)
def places(seed: int, pixels: int, wanted: int) -> np.ndarray:
    """Which `wanted` of the pixels of a tile are taken: the same of every tile of a size, and spread over all of it."""
    return np.sort(order.permutation(seed, 0, PLACES, 0, pixels)[:wanted])


def sample(reader: Reader, tiles: int, seed: int) -> tuple[list[tuple[str, str]], np.ndarray, np.ndarray, int]:
    """All slides (dataset and name); of each tile chosen its row and its slide, in order; and how many slides are none.

    A slide's tiles are those of the smallest random words, so that the catalogue is gone through in pieces and only
    what may still be chosen is kept.
    """
    slides, _ = _codes(reader)
    here = np.zeros(len(slides), bool)
    for _, _, numbers in _pieces(reader):
        here[numbers] = True
    there = np.flatnonzero(here)
    if len(there) > LIMIT:
        here[:] = False
        here[there[order.permutation(seed, 0, SLIDES, 0, len(there))[:LIMIT]]] = True
    each = min(tiles, max(1, LIMIT // len(there)))
    held = np.empty((3, 0), np.uint64)      # slide, random word, row
    for first, rows, numbers in _pieces(reader):
        # Four words a counter, as in augment.py: the words of a row do not depend on where pieces begin.
        words = np.random.Philox(key=[seed, 0], counter=[first // 4, 0, 0, TILES]).random_raw(len(rows))
        held = np.concatenate([held, np.stack([numbers.astype(np.uint64), words,
                                               rows.astype(np.uint64)])[:, here[numbers]]], axis=1)
        held = held[:, np.lexsort((held[1], held[0]))]
        rank = np.arange(held.shape[1]) - np.searchsorted(held[0], held[0])
        held = held[:, rank < each]
    held = held[:, np.lexsort((held[2], held[0]))]
    return slides, held[2].astype(np.int64), held[0].astype(np.int64), len(there) - int(here.sum())


def _codes(reader: Reader) -> tuple[list[tuple[str, str]], list[np.ndarray]]:
    """Every slide that the folders name, sorted, and for each folder the numbers of its codes among them."""
    words = [(found.datasets[0]["name"], index.column(table, "slide").dictionary.to_pylist())
             for found, table in zip(reader.indexes, reader.tables, strict=True)]
    slides = sorted({(dataset, word) for dataset, some in words for word in some})
    number = {slide: place for place, slide in enumerate(slides)}
    return slides, [np.array([number[dataset, word] for word in some], np.int64) for dataset, some in words]


def _pieces(reader: Reader) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """The split, a piece at a time: the place of its first tile, the rows of all, and the numbers of their slides."""
    _, numbers_of = _codes(reader)
    codes = [index.column(table, "slide").indices.to_numpy() for table in reader.tables]
    base = np.cumsum([0, *(table.num_rows for table in reader.tables)])
    edges = np.cumsum([0, *reader.counts])
    for first in range(0, int(edges[-1]), AT_ONCE):
        members = np.arange(first, min(first + AT_ONCE, int(edges[-1])))
        tars = np.searchsorted(edges, members, side="right") - 1
        rows = reader.rows(tars, members - edges[tars])
        folders, numbers = np.searchsorted(base, rows, side="right") - 1, np.empty(len(rows), np.int64)
        for folder in np.unique(folders).tolist():
            here = folders == folder
            numbers[here] = numbers_of[folder][codes[folder][rows[here] - base[folder]]]
        yield first, rows, numbers
