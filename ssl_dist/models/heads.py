"""Small networks on top of an encoder."""

from torch import nn


def projector(widths: list[int], *, norm: bool, bias: bool = True) -> nn.Sequential:
    """Linear layers of the given widths with ReLU (and BatchNorm, where `norm`) between them."""
    layers: list[nn.Module] = []
    for before, after in zip(widths[:-2], widths[1:-1], strict=True):
        layers += [nn.Linear(before, after, bias=bias and not norm)]
        layers += [nn.BatchNorm1d(after)] if norm else []
        layers += [nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.Linear(widths[-2], widths[-1], bias=bias))
