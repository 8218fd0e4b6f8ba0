"""Fine-tuning: the encoder and a linear layer learn the classes together, the encoder's first layers slowest.

AdamW, half a cosine after a tenth of warmup, tiles turned and mirrored at random. A fifth of the bank's patients is
held out (or a split is given, `data.valid`), and the weights of the pass that is best there are asked about the
queries.

Q queries   B tiles of a step   C classes
"""

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_dist import schedule
from ssl_dist.eval import features, linear, metrics, protocol
from ssl_dist.eval.features import Split
from ssl_dist.eval.protocol import Progress, Source, Verdict
from ssl_dist.eval.settings import Finetune
from ssl_dist.models.encoder import EncoderError

WARMUP = 0.1            # of all steps


def run(settings: Finetune, device: torch.device, threads: int, progress: Progress) -> dict[str, Any]:
    """The protocol: the encoder learns, then every baseline from its own weights, by the same rules."""
    def judged(source: Source, bank: Split, query: Split) -> Verdict:
        return tuned(source, bank, query, settings, device, threads, functools.partial(progress, source.name))

    return protocol.compare(settings, judged, functools.partial(allow, settings))


def allow(settings: Finetune, bank: Split) -> None:
    """Refuses a bank of which no part can be held out to choose by."""
    linear.parted(bank, settings.seed)


def tuned(source: Source, bank: Split, query: Split, settings: Finetune, device: torch.device, threads: int,
          progress: Callable[[int, int], None]) -> Verdict:
    """What one encoder guesses once it has learnt, and how good each pass was on the patients held out."""
    labels_S = bank.labels_S
    learn, held = linear.parted(bank, settings.seed)
    torch.manual_seed(settings.seed)
    encoder = source.network(settings.seed)
    head = nn.Linear(encoder.width, len(bank.classes))
    nn.init.zeros_(head.weight)         # the first guesses are even, and the encoder's first steps gentle
    network = nn.Sequential(encoder, head).to(device).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW([*encoder.groups(settings.lr, settings.weight_decay, settings.layer_decay),
                                   {"params": head.parameters(), "lr": settings.lr,
                                    "weight_decay": settings.weight_decay}])
    tops = [group["lr"] for group in optimizer.param_groups]
    numbers, rows = np.random.default_rng(settings.seed), []
    # A last batch of one tile would have no spread for a BatchNorm.
    steps_a_pass = max(1, len(learn) // settings.batch)
    steps, best, kept = settings.epochs * steps_a_pass, -1.0, copy.deepcopy(network.state_dict())
    look = functools.partial(features.tiles, size=source.size, batch=settings.batch, threads=threads)
    for epoch in range(settings.epochs):
        network.train()
        order = numbers.permutation(learn)[:steps_a_pass * settings.batch]
        for step, (places, pixels) in enumerate(look(bank, order), epoch * steps_a_pass):
            for group, top in zip(optimizer.param_groups, tops, strict=True):
                group["lr"] = schedule.warmup_cosine(step / steps, top, 0.0, WARMUP)
            with torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
                guess_BC = network(turned(pixels, numbers).to(device))
            loss = F.cross_entropy(guess_BC.float(), labels_S[places].to(device))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            progress(step + 1, steps)
        truth = labels_S[held].numpy()
        figures = metrics.classification(truth, _scores(network, look(bank, held), device))(None)
        rows.append({"epoch": epoch + 1, "loss": round(float(loss.detach()), 5),
                     "balanced_accuracy_held_out": round(figures["balanced_accuracy"], 4)})
        if figures["balanced_accuracy"] > best:
            best, kept = figures["balanced_accuracy"], copy.deepcopy(network.state_dict())
    network.load_state_dict(kept)
    scores_QC = _scores(network, look(query, np.arange(len(query.rows))), device)
    return Verdict(scores_QC, {"best_epoch": 1 + int(np.argmax([row["balanced_accuracy_held_out"] for row in rows])),
                               "balanced_accuracy_held_out": round(best, 4)}, rows)


def turned(pixels_BHW3: Tensor, numbers: np.random.Generator) -> Tensor:
    """Every tile as it would look from another side of the table, or from below the glass: one of eight."""
    kinds = numbers.integers(0, 8, len(pixels_BHW3))
    found = [torch.rot90(tile.flip(0) if kind >= 4 else tile, int(kind % 4), (0, 1))
             for tile, kind in zip(pixels_BHW3, kinds, strict=True)]
    return torch.stack(found)


@torch.inference_mode()
def _scores(network: nn.Module, batches: Iterator[tuple[np.ndarray, Tensor]], device: torch.device) -> np.ndarray:
    network.eval()
    found = torch.cat([network(pixels.to(device)).float().softmax(dim=1).cpu() for _, pixels in batches])
    if not bool(found.isfinite().all()):
        raise EncoderError("fine-tuning gives guesses that are no numbers: the weights are damaged, or lr is too large")
    return found.double().numpy()
