"""Vectors on a plane: along their two main directions (PCA), or neighbours beside neighbours (UMAP).

S tiles   D width of a vector
"""

import io
import warnings
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.decomposition import PCA
from sklearn.preprocessing import normalize

from shards import folder

WORDS = 9           # of a column, that have a colour of their own
SAID = {"pca": "All tiles along the two directions in which their vectors differ most.",
        "umap": "All tiles, those beside each other that the encoder holds to be alike (UMAP): near is meaningful, "
                "distances between groups are not."}


def drawn(vectors_SD: np.ndarray, names: list[str], seed: int) -> tuple[dict[str, tuple[np.ndarray, list[str]]],
                                                                        list[str]]:
    """By name a place (S, 2) of each tile with what the axes say; and what could not be drawn."""
    found, remarks = {}, []
    unit_SD = normalize(vectors_SD)
    if "pca" in names:
        pca = PCA(2, random_state=seed).fit(unit_SD)
        found["pca"] = pca.transform(unit_SD), [f"{part:.0%} of the variance" for part in pca.explained_variance_ratio_]
    if "umap" in names:
        try:
            from umap import UMAP
        except ImportError:
            remarks.append("no UMAP: umap-learn is not installed (pip install 'ssl_dist[maps]'), or say maps=[pca]")
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")         # that a seed costs its threads
                place_S2 = UMAP(n_neighbors=min(15, len(unit_SD) - 1), metric="cosine", random_state=seed,
                                n_jobs=1).fit_transform(unit_SD)
            found["umap"] = np.asarray(place_S2, np.float64), ["", ""]
    return found, remarks


def draw(place_S2: np.ndarray, axes: list[str], words: dict[str, list[str]], colours_S3: np.ndarray | None,
         out: Path) -> None:
    """One map, coloured once by each column, and once as the tiles themselves are."""
    panels: list[tuple[str, list[str] | None]] = [*words.items(), *([("the tiles' own colours", None)]
                                                                    if colours_S3 is not None else [])]
    panels = panels or [("tiles", [""] * len(place_S2))]
    across = min(2, len(panels))
    down = -(-len(panels) // across)
    figure = Figure(figsize=(5.2 * across, 4.2 * down), layout="constrained")
    for number, (title, values) in enumerate(panels):
        axis = figure.add_subplot(down, across, number + 1)
        if values is None:
            axis.scatter(place_S2[:, 0], place_S2[:, 1], c=colours_S3, s=9, lw=0)
        else:
            _coloured(axis, place_S2, np.array(values))
        axis.set_title(title, fontsize=11, loc="left")
        axis.set(xticks=[], yticks=[], xlabel=axes[0], ylabel=axes[1])
        axis.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    folder.write(out, buffer.getvalue())


def _coloured(axis: Axes, place_S2: np.ndarray, words_S: np.ndarray) -> None:
    """The commonest words each in a colour, all others and no word in grey, drawn in an order that hides none."""
    found, word_S, counts = np.unique(words_S, return_inverse=True, return_counts=True)
    order = [each for each in np.argsort(-counts, kind="stable") if found[each]]
    common = sorted(order[:WORDS], key=lambda each: str(found[each]))
    rank = {int(each): number for number, each in enumerate(common)}
    colour_S = np.array([f"C{rank[int(word)]}" if int(word) in rank else "0.75" for word in word_S])
    mixed = np.random.default_rng(0).permutation(len(words_S))
    axis.scatter(place_S2[mixed, 0], place_S2[mixed, 1], c=colour_S[mixed], s=6, lw=0, alpha=0.8)
    for each in common:
        axis.scatter([], [], c=f"C{rank[int(each)]}", s=20, lw=0, label=f"{str(found[each])[:24]} ({counts[each]:,})")
    without = int((words_S == "").sum())
    if rest := [*([f"{len(order) - len(common)} others"] if len(order) > len(common) else []),
                *([f"none ({without:,})"] if without else [])]:
        axis.scatter([], [], c="0.75", s=20, lw=0, label=", ".join(rest))
    axis.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5), handletextpad=0.2)
