"""Networks that judge a slide by the vectors of its tiles: multiple-instance learning.

Tiles of several slides stand one after the other and `counts` says how many are of each, so nothing is padded and
nothing needs a mask. In which order the tiles of a slide stand changes nothing.

Where a value comes from: paper = Dehaene et al. 2020, Supplementary Table 3, as two public repositories have it; code =
owkin/HistoSSLscaling or, of Clam and TransMil, their authors' own; recalled = not verified; default = ours.

T tiles of all slides   N tiles of one   B slides   D width of a vector   H hidden   C outputs   K chosen tiles
"""

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class HeadError(ValueError):
    """What a network is told or shown does not go with it."""

    exit_code = 2


class Answer(NamedTuple):
    """What a network makes of slides."""

    outputs_BC: Tensor          # logits, or of survival the risk
    shown_T: Tensor             # of every tile what a map shows: attention, which sums to 1 over a slide, or a score
    extra: Tensor | float = 0.0         # a loss of its own, beside that of the outputs


class MeanPool(nn.Module):
    """The mean of the vectors, and one layer."""

    SHOWS = "score"
    WEIGHT = 1.0            # of the loss of the outputs, beside the network's own

    def __init__(self, width: int, outputs: int, *, hidden: Sequence[int] = ()):        # code: none
        super().__init__()
        self.layers = _mlp([width, *hidden, outputs], nn.ReLU)

    def forward(self, tiles_TD: Tensor, counts: list[int], labels_B: Tensor | None = None) -> Answer:  # noqa: ARG002
        mean_BD = torch.stack([own_ND.mean(dim=0) for own_ND in tiles_TD.split(counts)])
        return Answer(self.layers(mean_BD), self.layers(tiles_TD)[:, -1])


class Weldon(nn.Module):
    """A score a tile; the slide's is the mean of the highest and the lowest."""

    SHOWS = "score"
    WEIGHT = 1.0

    def __init__(self, width: int, outputs: int, *,
                 top: int = 10,             # recalled: about 10
                 bottom: int = 10):         # recalled
        super().__init__()
        self.top, self.bottom = top, bottom
        self.score = nn.Linear(width, outputs)

    def forward(self, tiles_TD: Tensor, counts: list[int], labels_B: Tensor | None = None) -> Answer:  # noqa: ARG002
        scores_TC = self.score(tiles_TD)
        return Answer(extremes(scores_TC, counts, self.top, self.bottom).mean(dim=1), scores_TC[:, -1])


class Chowder(nn.Module):
    """A score a tile; a small network sees the highest and the lowest, in their order (Courtiol et al. 2018)."""

    SHOWS = "score"
    WEIGHT = 1.0

    def __init__(self, width: int, outputs: int, *,
                 top: int = 10,                             # code
                 bottom: int = 10,                          # code
                 tile: Sequence[int] = (128,),              # code
                 hidden: Sequence[int] = (128, 64)):        # code
        super().__init__()
        self.top, self.bottom = top, bottom
        self.score = _mlp([width, *tile, outputs], nn.Sigmoid)                  # code
        self.layers = _mlp([top + bottom, *hidden, 1], nn.Sigmoid)              # code
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)                           # code
                nn.init.zeros_(layer.bias)                                      # code

    def forward(self, tiles_TD: Tensor, counts: list[int], labels_B: Tensor | None = None) -> Answer:  # noqa: ARG002
        scores_TC = self.score(tiles_TD)
        chosen_BCK = extremes(scores_TC, counts, self.top, self.bottom).transpose(1, 2)
        return Answer(self.layers(chosen_BCK).squeeze(2), scores_TC[:, -1])


class DeepMil(nn.Module):
    """Gated attention weighs the tiles (Ilse et al. 2018), as Dehaene et al. have it."""

    SHOWS = "attention"
    WEIGHT = 1.0

    def __init__(self, width: int, outputs: int, *,
                 narrow: int = 128,                         # paper
                 attention: int = 128,                      # paper
                 hidden: Sequence[int] = (128, 64)):        # paper
        super().__init__()
        self.embed = nn.Linear(width, narrow)
        self.attention = Attention(narrow, attention)
        self.layers = _mlp([narrow, *hidden, outputs], nn.ReLU)                 # paper

    def forward(self, tiles_TD: Tensor, counts: list[int], labels_B: Tensor | None = None) -> Answer:  # noqa: ARG002
        narrow_TH = self.embed(tiles_TD)
        weights_T = softmax(self.attention(narrow_TH), counts)
        return Answer(self.layers(pooled(narrow_TH, weights_T, counts)), weights_T)


class Clam(nn.Module):
    """CLAM-SB (Lu et al. 2021): gated attention, and a loss on tiles: of the slide's class those most attended to are
    held to be, and those least not. Of survival there is no such class, and no such loss."""

    SHOWS = "attention"
    WEIGHT = 0.7            # recalled: of the slide's loss; what is left is the tiles'

    def __init__(self, width: int, outputs: int, *,
                 narrow: int = 512,             # code: "small"
                 attention: int = 256,          # code: "small"
                 dropout: float = 0.25,         # recalled: of the commands in its README; its network begins with 0
                 chosen: int = 8):              # code
        super().__init__()
        self.chosen = chosen
        self.embed = nn.Sequential(nn.Linear(width, narrow), nn.ReLU(), nn.Dropout(dropout))
        self.attention = Attention(narrow, attention, dropout)
        self.layers = nn.Linear(narrow, outputs)
        self.instances = nn.ModuleList(nn.Linear(narrow, 2) for _ in range(max(outputs, 2)))

    def forward(self, tiles_TD: Tensor, counts: list[int], labels_B: Tensor | None = None) -> Answer:
        narrow_TH = self.embed(tiles_TD)
        scores_T = self.attention(narrow_TH)
        weights_T = softmax(scores_T, counts)
        outputs_BC = self.layers(pooled(narrow_TH, weights_T, counts))
        if labels_B is None:
            return Answer(outputs_BC, weights_T)
        losses = []
        for own_NH, own_N, label in zip(narrow_TH.split(counts), scores_T.split(counts), labels_B.tolist(),
                                        strict=True):
            count = max(1, min(self.chosen, len(own_N) // 2))       # of few tiles none is both
            order_N = own_N.argsort(descending=True)
            shown_KH = own_NH[torch.cat([order_N[:count], order_N[-count:]])] if len(own_N) > 1 else own_NH
            truth_K = torch.tensor([1] * count + [0] * (len(shown_KH) - count), device=own_NH.device)
            losses.append(F.cross_entropy(self.instances[int(label)](shown_KH), truth_K))        # code: its default
        return Answer(outputs_BC, weights_T, torch.stack(losses).mean())


class TransMil(nn.Module):
    """Tiles of a slide attend to each other (Shao et al. 2021), and a word of its own to all.

    Theirs approximates attention (Nyström); this is the exact one, in memory that grows with the tiles and time that
    grows with their square, for slides of MOST tiles at most. Theirs also folds the tiles, in the order in which they
    happen to stand, into a square and convolves it (PPEG); this does not, so that order changes nothing.
    """

    SHOWS = "attention"
    WEIGHT = 1.0
    MOST = 30_000

    def __init__(self, width: int, outputs: int, *,
                 narrow: int = 512,         # code
                 heads: int = 8,            # code
                 layers: int = 2):          # code
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(width, narrow), nn.ReLU())
        self.word = nn.Parameter(torch.randn(narrow))       # code
        self.blocks = nn.ModuleList(_Block(narrow, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(narrow)
        self.layers = nn.Linear(narrow, outputs)

    def forward(self, tiles_TD: Tensor, counts: list[int], labels_B: Tensor | None = None) -> Answer:  # noqa: ARG002
        if max(counts) > self.MOST:
            raise HeadError(f"a slide has {max(counts):,} tiles, and every tile attends to every other of at most "
                             f"{self.MOST:,}; take another model, or larger tiles")
        words, shown = [], []
        for own_ND in tiles_TD.split(counts):
            own_NH = torch.cat([self.word[None], self.embed(own_ND)])
            for block in self.blocks:
                own_NH, weights_N = block(own_NH)
            words.append(self.norm(own_NH[0]))
            shown.append(weights_N[1:] / weights_N[1:].sum())
        return Answer(self.layers(torch.stack(words)), torch.cat(shown))


class _Block(nn.Module):
    """Attention of all to all, added to what was there; no layers between, as TransMIL has it."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width, bias=False), nn.Linear(
            width, width)

    def forward(self, own_NH: Tensor) -> tuple[Tensor, Tensor]:
        """The tiles anew, and how much the first attends to each."""
        queries, keys, values = self.qkv(self.norm(own_NH)).unflatten(1, (3, self.heads, -1)).permute(1, 2, 0, 3)
        mixed = F.scaled_dot_product_attention(queries[None], keys[None], values[None])[0]
        first = (queries[:, :1] @ keys.transpose(1, 2) / queries.shape[-1]**0.5).softmax(dim=-1).mean(dim=(0, 1))
        return own_NH + self.out(mixed.transpose(0, 1).flatten(1)), first


class Attention(nn.Module):
    """Gated attention: a number for each tile."""

    def __init__(self, width: int, hidden: int, dropout: float = 0.0):
        super().__init__()
        self.what = nn.Sequential(nn.Linear(width, hidden), nn.Tanh(), nn.Dropout(dropout))
        self.gate = nn.Sequential(nn.Linear(width, hidden), nn.Sigmoid(), nn.Dropout(dropout))
        self.weigh = nn.Linear(hidden, 1)

    def forward(self, tiles_TH: Tensor) -> Tensor:
        """Scores (T)."""
        return self.weigh(self.what(tiles_TH) * self.gate(tiles_TH)).squeeze(1)


def softmax(scores_T: Tensor, counts: list[int]) -> Tensor:
    """Weights that are positive and sum to 1 over each slide."""
    slide_T = _slides(counts, scores_T.device)
    highest_B = torch.full((len(counts),), -torch.inf, dtype=scores_T.dtype, device=scores_T.device).scatter_reduce(
        0, slide_T, scores_T.detach(), "amax")
    weights_T = (scores_T - highest_B[slide_T]).exp()
    return weights_T / torch.zeros_like(highest_B).index_add(0, slide_T, weights_T)[slide_T]


def pooled(tiles_TH: Tensor, weights_T: Tensor, counts: list[int]) -> Tensor:
    """(B, H): of each slide the sum of its tiles under weights."""
    empty_BH = tiles_TH.new_zeros(len(counts), tiles_TH.shape[1])
    return empty_BH.index_add(0, _slides(counts, tiles_TH.device), tiles_TH * weights_T[:, None])


def extremes(scores_TC: Tensor, counts: list[int], top: int, bottom: int) -> Tensor:
    """(B, K, C): the highest scores of each slide and the lowest, of every output, from high to low. Of a slide that
    has fewer tiles than that the last it has stands in for those that lack."""
    found = []
    for own_NC in scores_TC.split(counts):
        last = len(own_NC) - 1
        places = [min(each, last) for each in range(top)] + [max(last - each, 0) for each in reversed(range(bottom))]
        found.append(own_NC.sort(dim=0, descending=True).values[places])
    return torch.stack(found)


def _slides(counts: list[int], device: torch.device) -> Tensor:
    return torch.arange(len(counts), device=device).repeat_interleave(torch.tensor(counts, device=device))


def _mlp(widths: Sequence[int], activation: type[nn.Module]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in zip(widths[:-1], widths[1:], strict=True):
        layers += [nn.Linear(before, after), activation()]
    return nn.Sequential(*layers[:-1])


MODELS: dict[str, Any] = {"mean": MeanPool, "weldon": Weldon, "chowder": Chowder, "deepmil": DeepMil, "clam": Clam,
                          "transmil": TransMil}


def build(name: str, width: int, outputs: int, args: dict[str, Any]) -> nn.Module:
    """A network by its name, with fresh weights."""
    kind = MODELS[name]
    known = [each.name for each in inspect.signature(kind).parameters.values() if each.kind is each.KEYWORD_ONLY]
    if strange := [each for each in args if each not in known]:
        raise HeadError(f"args has {strange[0]!r}, which {name} does not take; it takes {', '.join(known)}")
    return kind(width, outputs, **args)
