"""A result in lines for people."""

from collections.abc import Iterator
from typing import Any


def lines(result: dict[str, Any]) -> Iterator[str]:
    """What was found, how sure it is, what it is to be held against, and where it is written."""
    counts = result["counts"]
    if result["protocol"] in ("embed", "slide_embed"):
        yield "{tiles} tiles of {slides} slides, {width} numbers each".format(**counts)
    elif result["protocol"] == "look":
        yield "{tiles} tiles of {slides} slides: ".format(**counts) + ", ".join(result["pictures"])
        yield "neighbours of the same " + ", ".join(
            f"{by} {each['neighbours']:.0%} (by chance {each['chance']:.0%})" for by, each in result["same"].items())
    elif result["protocol"] == "outline":
        yield "{nuclei:,} nuclei of {slides} slides".format(**counts)
    elif result["protocol"] == "confidence":
        yield "{slides} slides, class {number}, cut at {cut}".format(**counts, number=result["class"],
                                                                     cut=result["cut"])
    else:
        yield from _figures(result)
    for words in result["warnings"]:
        yield f"warning: {words}"
    for name, figures in result["baselines"].items():
        leaked = any((result.get("seen_by_baselines", {}).get(name) or {}).values())
        yield f"{name}{', on tiles seen in pretraining' * leaked}: " + ", ".join(
            f"{key} {figures[key]:.3f}" for key in result["metrics"] if key in figures)
        if apart := result["against"].get(name):
            yield f"  {result.get('model', 'the encoder')} has " + ", ".join(
                "{} {:+.3f} ({:+.3f} to {:+.3f}, p {:g})".format(key, told["difference"], *told["interval"], told["p"])
                for key, told in apart.items())
    if result["protocol"] == "low":
        for name, rows in result["curves"].items():
            yield f"{name}, balanced accuracy with few labels: " + ", ".join(
                (f"{row['share']:.0%}" if "share" in row else f"{row['per_class']} a class")
                + " {mean:.3f} ± {deviation:.3f}".format(**row["balanced_accuracy"]) for row in rows)
    if result["protocol"] == "slide_linear":
        for name, rows in result["curves"].items():
            yield f"{name}, AUROC learnt from few slides: " + ", ".join(
                "{} {mean:.3f} ± {deviation:.3f}".format(row.get("slides", "all"), **row["auroc"]) for row in rows)
    for name, rows in result.get("labels", {}).items():
        if len(rows) > 1:
            yield f"{name}, by the part of the labels: " + ", ".join(
                f"{row['share']:.0%} " + " ".join(f"{key} {row[key]:.3f}" for key in ("pq", "aji", "dice")
                                                  if key in row) for row in rows)
    yield f"written to {result['written']}"


def _figures(result: dict[str, Any]) -> Iterator[str]:
    knows = ", knowing all labels" if result["protocol"] == "low" else ""
    if result["protocol"] == "mil":
        knows = ", {model}, {slides} slides of {patients} patients, {tiles} tiles".format(**result, **result["counts"])
    leaked = ", on tiles seen in pretraining" if any((result["seen_in_pretraining"] or {}).values()) else ""
    between = {name: " ({:.3f} to {:.3f})".format(*edges) for name, edges in result["intervals"].items()}
    yield f"{result['protocol']}{knows}{leaked}: " + ", ".join(
        f"{name} {value:.3f}{between.get(name, '')}" for name, value in result["metrics"].items())
    if "seen_in_pretraining" in result and result["protocol"] != "slide_linear":
        seen = result["seen_in_pretraining"]
        yield "of what is guessed, seen in pretraining: " + (
            "not known" if seen is None else ", ".join(f"{count} {kind}" for kind, count in seen.items() if count)
            or "nothing")
    for what, figures in result.get("seeds", {}).items():
        yield f"{what}, over seeds: " + ", ".join(f"{name} {each['mean']:.3f} ± {each['deviation']:.3f}"
                                                  for name, each in figures.items())
