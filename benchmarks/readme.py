"""Writes the parts of README.md and of docs/ that are generated: the tree from docstrings, the tables from
benchmarks/results.
"""

import ast
import json
import re
import statistics
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("shards", "ssl_dist", "launch")
WIDTH = 118


def tree() -> str:
    """The files of the packages, each with the first line of its docstring."""
    lines = []
    for package in PACKAGES:
        lines += [*_folder(ROOT / package, 0), ""]
    for name, about in (("configs/", "YAML, one screen each; the first comment says what, on what, how long"),
                        ("tests/", "flat; test_house.py holds the rules, test_journey.py goes from slide to report"),
                        ("benchmarks/", "the data path, cutting, training, what methods learn; results/ only grows"),
                        ("Makefile", "demo, test, test-faults, bench, learn, lint"),
                        ("constraints.txt", "the exact versions that were tested together")):
        lines.append(_line(0, name, about))
    return "```text\n" + "\n".join(lines) + "\n```"


def _folder(folder: Path, depth: int) -> Iterator[str]:
    package = folder / "__init__.py"
    yield _line(depth, f"{folder.name}/", _about(package))
    for path in sorted(folder.glob("*.py")):
        if path.stem not in ("__init__", "__main__"):
            yield _line(depth + 1, path.name, _about(path))
    for path in sorted(folder.iterdir()):
        if (path / "__init__.py").exists():
            yield from _folder(path, depth + 1)


def _line(depth: int, name: str, about: str) -> str:
    room = WIDTH - 22
    # What does not fit ends at the last pause that does.
    pause = max((about[:room + 1].rfind(mark) for mark in (". ", ": ", "; ", ", ")), default=-1)
    return f"{'  ' * depth + name:21} {about if len(about) <= room else about[:pause]}".rstrip(" .:;,")


def _about(path: Path) -> str:
    first = (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0]
    return re.sub(r"`(.+?)`", r"\1", first)


def demo() -> str:
    """The table of the demo: the newest result file, a row a seed."""
    rows = _newest("demo_")
    if not rows:
        return "Not measured yet."
    lines = ["| seed | SimCLR encoder | random initialisation | difference |", "|---|---|---|---|"]
    for row in rows["rows"]:
        own, random = row["accuracy"], row["random"]
        lines.append(f"| {row['seed']} | {own:.1%} | {random:.1%} | {100 * (own - random):+.1f} points |")
    means = [statistics.mean(row[name] for row in rows["rows"]) for name in ("accuracy", "random")]
    lines.append(f"| mean | {means[0]:.1%} | {means[1]:.1%} | {100 * (means[0] - means[1]):+.1f} points |")
    first = rows["rows"][0]
    return "\n".join(lines) + (
        f"\n\nkNN accuracy (k = {first['k']}) on {first['queries']} tiles of {first['query_patients']} patients whose "
        f"slides were never trained on; {first['bank']} labelled tiles of {first['bank_patients']} other patients vote "
        f"(counts of seed {first['seed']}). {rows['cpu']}, {rows['cpus']} cores, the whole line in "
        f"{max(row['seconds'] for row in rows['rows']):.0f} s at most; torch "
        f"{rows['versions']['torch']}, {rows['date']}.")


def data() -> str:
    """The tables of the data path: the newest result file of each kind of views."""
    newest = {found.get("views", "simclr"): found for found in map(_read, _files("data_"))}
    return "\n\n".join(_data(newest[views]) for views in sorted(newest, reverse=True)) or "Not measured yet."


def _data(found: dict) -> str:
    views = f"{found.get('views_a_tile', 2)} views of a tile ({found.get('views', 'simclr')})"
    lines = [f"| data path, {views} | images/s | against ours | images a CPU-second | against ours |",
             "|---|---|---|---|---|"]
    for row in found["contenders"]:     # the first results knew the clock only
        cpu = f"{row['images_per_cpu_second']:,.0f} | {row['cpu_ratio']:.2f}" if "cpu_ratio" in row else "|"
        lines.append(f"| {row['name']} | {row['images_per_second']:,.0f} | {row['ratio']:.2f} | {cpu} |")
    text = (f"{found['tiles']} {_tile(found)}, {found['rounds']} interleaved rounds, ratios are medians of the rounds' "
            "ratios. ")
    if bound := found.get("bound"):
        text += ("Were there nothing to do but the fastest decoder and our view kernels, it would be "
                 f"{bound['wall_images_per_second']:,.0f} images a second, {bound['cpu_images_per_second']:,.0f} a "
                 f"CPU-second; ours reaches {bound['wall_share']:.0%} and {bound['cpu_share']:.0%} of that. ")
    text += "".join(f"{row['name']}: {row['note']}. " for row in found["contenders"] if row.get("note"))
    return "\n".join(lines) + (
        f"\n\n{text}{found['cpu']}, {found['cpus']} cores; DALI {found['versions']['nvidia-dali-cuda130']}, OpenCV "
        f"{found['versions']['opencv-python-headless']}, {found['date']}. Plot: `benchmarks/results/{found['plot']}`.")


def _tile(found: dict) -> str:
    if "tile" not in found:
        return f"real tiles of {found['tile_size']} px"
    tile = found["tile"]
    return (f"{'real' if tile['real'] else 'painted'} tiles of {tile['pixels']} px ({tile['kind']}; "
            f"{tile['bytes'] / 1000:.0f} kB, {', '.join(tile['subsampling'])})")


def stream() -> str:
    """The tables of what comes before decoding: the newest result file."""
    found = _newest("stream_")
    if not found:
        return "Not measured yet."
    lines = ["| before a pixel is decoded | samples a second of one core |", "|---|---|"]
    lines += [f"| {row['name']} | {row['images_per_cpu_second']:,.0f} |"
              for row in (*found["order"], *found["up_to_decoding"])]
    catalogues = found["catalogues"]
    orders = list(catalogues[0]["orders"])
    names = ("first batch, s", "from a cold cache, s", *(f"private MB a rank, {order}" for order in orders))
    lines += ["", f"| samples in {catalogues[0]['folders']} datasets | {' | '.join(names)} |",
              "|---" * (1 + len(names)) + "|"]
    for one in catalogues:
        first = max(one["orders"]["natural"]["first_seconds"])
        memory = " | ".join(f"{max(one['orders'][order]['private_mb']):,.0f}" for order in orders)
        lines.append(f"| {one['samples']:,} | {first:.2f} | {max(one['cold']['first_seconds']):.2f} | {memory} |")
    faults = found["faults"]
    ratio = {row["name"]: row["ratio"] for row in faults["contenders"]}
    return "\n".join(lines) + (
        f"\n\nNumbers and reading: of two views, and with checksums, on {found['tiles']} {_tile(found)}. Catalogues: "
        "two ranks at once, after 200 batches of 1024; seconds from imports done to the bytes of the first batch; tars "
        f"are sparse files, so no disk is waited for. With {faults['bad']} of {faults['tiles']:,} tiles bad, all of "
        f"them listed, the loader is {ratio['damaged']:.3f} times as fast as with none (which is "
        f"{ratio['sound again']:.3f} times as fast as itself). {found['cpu']}, {found['cpus']} cores, "
        f"{found['rounds']} interleaved rounds, {found['date']}. Plot: `benchmarks/results/{found['plot']}`.")


def shard() -> str:
    """The table of the offline side: the newest result file."""
    found = _newest("shard_")
    if not found:
        return "Not measured yet."
    lines = ["| cutting | tiles | untouched | pass-through | re-encoding |", "|---|---|---|---|---|"]
    for part in found["cutting"]:
        ratio = {row["name"]: row["ratio"] for row in part["contenders"]}
        through = f"{ratio['pass-through']:.1f}" if part["untouched"] else "(not its tiles)"
        lines.append(f"| `{part['slide']}` | {part['tiles']} of {part['size']} px | {part['untouched']} | "
                     f"{through} | {ratio['re-encoding']:.2f} |")
    whole, checked = found["whole"], found["check"]
    return "\n".join(lines) + (
        f"\n\nTiles a CPU-second as multiples of OpenSlide's `read_region` and simplejpeg on the same tiles; finding "
        f"tissue and judging every tile are in ours. The whole job with tars, digests and index, on {whole['slides']} "
        f"painted slides ({whole['tiles']} tiles): {whole['ratio']:.1f} times that, and two workers are "
        f"{whole['two_workers']:.2f} times as fast as one. Two tiles of one slide meet in a batch of 256 "
        f"{found['same_slide_pairs']:.3f} times as often as by chance. `check` reads "
        f"{checked['megabytes_per_second']:,.0f} MB/s from memory. {found['cpu']}, {found['cpus']} cores, "
        f"{found['rounds']} interleaved rounds, {found['date']}. Plot: `benchmarks/results/{found['plot']}`.")


def train() -> str:
    """The tables of training: of each kind of device the newest result."""
    newest = {found["device"]: found for found in map(_read, _files("train_"))}
    return "\n\n".join(_train(found) for found in newest.values()) or "Not measured yet."


def _train(found: dict) -> str:
    sizes = found["of_ranks"]
    names = [f"{part['batch']} tiles: images/s | against DDP | of peak | MB a rank" for part in sizes]
    lines = [f"| {found['ranks']} ranks, {found['model']}, {found['size']} px, SimCLR | {' | '.join(names)} |",
             "|---" * (1 + 4 * len(sizes)) + "|"]
    for rows in zip(*(part["contenders"] for part in sizes), strict=True):
        cells = [f"{row['images_per_second']:,.0f} | {row['ratio']:.2f} | "
                 + (f"{row['peak_share']:.0%}" if "peak_share" in row else "")
                 + f" | {row.get('memory_mb', '')}" for row in rows]
        lines.append(f"| {rows[0]['name']} | {' | '.join(cells)} |")
    lines += ["", "| one rank, real tiles against the same kind in memory | images/s | ratio | wait for data |",
              "|---|---|---|---|"]
    for part in found["one_rank"]:
        row = next(row for row in part["contenders"] if row["name"] == "real")
        lines.append(f"| {part['batch']} tiles, {part['precision']} | {row['images_per_second']:,.0f} | "
                     f"{row['ratio']:.3f} | {part['data_wait']:.1%} |")
    where = f"{', '.join(found['gpus'])}, " if found["device"] == "cuda" else ""
    return "\n".join(lines) + (
        f"\n\nThe same model and batches for all, AdamW; every contender finds the norm of the gradient, but where it "
        "says so. DDP is as torch sets it, buffers broadcast at every step, but where it says so. Medians of "
        f"{found['rounds']} interleaved rounds, ratios of turns in one round. Of peak: operations "
        "of convolutions and matrix products against what the GPU's data sheet says or, on a CPU, against matrix "
        "products of the same precision on all ranks at once. Memory: what a rank holds at most beyond its imports. "
        f"{where}{found['cpu']}, {found['cpus']} cores, torch {found['versions']['torch']}, DeepSpeed "
        f"{found['versions']['deepspeed']}, {found['date']}. Plot: `benchmarks/results/{found['plot']}`.")


def safety() -> str:
    """The table of what safety costs: the newest result file."""
    found = _newest("safety_")
    if not found:
        return "Not measured yet."
    names = {"watch": "the watch: named points, statistics kept, what ranks agree on, signs of life",
             "ledger": "the ledger of samples (`debug.ledger`)", "digests": "the checksum of every tile",
             "checkpoints": "checkpoints at the default interval, written beside the training"}
    lines = ["| what safety costs | % of the time of training |", "|---|---|"]
    lines += [f"| {names[row['name']]} | {100 * row['share']:.2f} |" for row in found["costs"]]
    return "\n".join(lines) + (
        f"\n\nMedians of {found['rounds']} rounds of {found['steps']} steps. {found['model']}, {found['size']} px, "
        f"{found['batch']} tiles, {found['step']:.2f} s a step; a checkpoint of {found['bytes'] / 1e6:.0f} MB in "
        f"{found['interval']:,.0f} s. {found['cpu']}, {found['cpus']} cores, torch {found['versions']['torch']}, "
        f"{found['date']}. Plot: `benchmarks/results/{found['plot']}`.")


def start() -> str:
    """The table of what passes before the first step: the newest result file."""
    found = _newest("launch_")
    if not found:
        return "Not measured yet."
    names = {"typed": "the command", "waiting": "queue", "imports": "imports", "ranks": "ranks meet",
             "network": "network, folder, checks", "tiles": "first tiles", "step": "first step"}
    lines = [f"| seconds | {' | '.join(names.values())} | all |", "|---" * (2 + len(names)) + "|"]
    for row in found["launches"]:
        cells = [f"{row['seconds'][phase]:.1f}" for phase in names]
        lines.append(f"| `launch {row['name']}` | {' | '.join(cells)} | {sum(row['seconds'].values()):.1f} |")
    return "\n".join(lines) + (
        f"\n\nFrom the command to the first step, {found['ranks']} ranks, median of {found['rounds']} launches. The "
        "command: of `slurm`, what refuses a run that would fail (`--unchecked` leaves it out); of `local`, torchrun. "
        f"So many processes that import the libraries alone, of which imports are a part, take "
        f"{found['libraries']:.1f} s. {found['cpu']}, {found['cpus']} cores, {found['date']}. Plot: "
        f"`benchmarks/results/{found['plot']}`.")


def kills() -> str:
    """The table of runs that were struck: the newest result file."""
    found = _newest("kills_")
    if not found:
        return "Not measured yet."
    rows: dict[tuple[str, str], list[dict]] = {}
    for row in found["strikes"]:
        rows.setdefault((row["signal"], row["target"]), []).append(row)
    lines = ["| signal | to | strikes | samples as without | weights equal to the last bit | ranks that outlived it | "
             "seconds to the last end, at most |", "|---" * 7 + "|"]
    for (signal, target), own in sorted(rows.items()):
        lines.append(f"| {signal} | {target} | {len(own)} | {sum(row['ledger'] for row in own)} | "
                     f"{sum(row['weights'] for row in own)} | {sum(len(row['outlived']) for row in own)} | "
                     f"{max(row['seconds'] for row in own):.0f} |")
    every = found["strikes"]
    return "\n".join(lines) + (
        f"\n\n{len(every)} strikes at random times (seed {found['seed']}) on {len({row['run'] for row in every})} runs "
        f"of five methods, {found['world']} ranks, {found['steps']} steps, a checkpoint every two; every run was taken "
        "up again after each and then left to its end. Whoever is stopped can end nothing, and ranks that have not met "
        f"yet do not know who is missing: those, counted as outliving it, are their launcher's to end. "
        f"{found['cpu']}, {found['cpus']} cores, {found['date']}. Plot: "
        f"`benchmarks/results/{found['plot']}`.")


def learn() -> str:
    """The table of what methods learn: of each method and seed the newest result."""
    found = learnt()
    if not found:
        return "Not measured yet."
    lines = ["| method | network | tiles seen | kNN | untrained | linear | untrained | n | minutes |", "|---" * 9 + "|"]
    every = [run for runs in found.values() for run in runs.values()]
    for method in sorted(found, key=lambda method: -_mean(found[method].values(), "linear", "encoder")[0]):
        runs = list(found[method].values())
        figures = (_spread(*_mean(runs, protocol, what)) for protocol in ("knn", "linear")
                   for what in ("encoder", "random"))
        lines.append(f"| [{method}](configs/pretrain/{runs[0]['recipe']}.yaml) | "
                     f"{runs[0]['config']['encoder']['name'].removesuffix('_patch16_224')} | "
                     f"{runs[0]['tiles_seen']:,} | {' | '.join(figures)} | {len(runs)} | "
                     f"{statistics.median(run['seconds'] for run in runs) / 60:.1f} |")
    levels = [_spread(*_mean(every, protocol, "colours")) for protocol in ("knn", "linear")]
    lines.append(f"| colour histograms | none | 0 | {levels[0]} |  | {levels[1]} |  |  |  |")
    first = every[0]
    return "\n".join(lines) + (
        f"\n\nAccuracy in %, mean ± standard deviation over n seeds, on {first['counts']['queries']:,} tiles of "
        f"PatchCamelyon (two classes, half each) that were never trained on; {first['counts']['bank']:,} others, of "
        f"which training saw no labels, vote (k = {first['k']}) or teach the probe, all at {first['size']} px. Which "
        "slides tiles are of is lost, so tiles of one slide may be on both sides, for all rows alike. The recipes were "
        "chosen with an eye on these very tiles (one seed, a standard error of 1.3 points each). Untrained: the "
        f"same network with the weights that its training began with. Minutes: median of a training. {first['cpu']}, "
        f"{first['cpus']} cores, torch {first['versions']['torch']}, {max(run['date'] for run in every)}.")


def learnt() -> dict[str, dict[int, dict]]:
    """Of each method the newest result by seed; older recipes, which say nothing about this one, are left out."""
    results = [_read(path) for path in sorted(_files("learn_"), key=lambda path: path.stem.rpartition("_")[2])]
    told = {result["method"]: _told(result) for result in results}
    found: dict[str, dict[int, dict]] = {}
    for result in results:
        if _told(result) == told[result["method"]]:
            found.setdefault(result["method"], {})[result["seed"]] = result
    return found


def _told(result: dict) -> dict:
    """All that decides what a run learns and how it is asked, but for the seed."""
    return {**_recipe(result), "asked": [result["size"], result["k"]]}


def _recipe(result: dict) -> dict:
    """All that decides what a run learns, but for the seed."""
    config = {key: result["config"][key] for key in ("data", "method", "encoder", "optim", "steps", "epochs", "samples",
                                                     "precision", "accumulate")}
    return {**config, "data": {**config["data"], "shards": None}, "cut": result.get("cut", "half")}


def _mean(runs: Iterable[dict], protocol: str, what: str) -> tuple[float, float]:
    values = [100 * run[protocol][what] for run in runs]
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def _spread(mean: float, deviation: float) -> str:
    return f"{mean:.1f} ± {deviation:.1f}" if deviation else f"{mean:.1f}"


def worth() -> str:
    """The table of what encoders are worth: of each method the newest result."""
    found = valued()
    if not found:
        return "Not measured yet."
    columns = {"kNN": ("knn", "accuracy"), "linear": ("linear", "accuracy"), "AUROC": ("linear", "auroc"),
               "fine-tuned": ("finetune", "accuracy"), "other organ": ("bone", "balanced_accuracy")}
    shares = (0.01, 0.1)
    lines = [f"| encoder | {' | '.join(columns)} | {' | '.join(f'{share:.0%} of labels' for share in shares)} |",
             "|---" * (1 + len(columns) + len(shares)) + "|"]

    def line(name: str, result: dict, what: str) -> str:
        cells = []
        for protocol, metric in columns.values():
            part = result["protocols"].get(protocol, {})
            figures = part.get("metrics", {}) if what == "encoder" else part.get("baselines", {}).get(what, {})
            between = part.get("intervals", {}).get(metric) if what == "encoder" else None
            cells.append((f"{100 * figures[metric]:.1f}" + ("" if between is None else
                          f" ({100 * between[0]:.0f} to {100 * between[1]:.0f})")) if metric in figures else "")
        rows = {row.get("share"): row for row in result["protocols"]["low"]["curves"].get(what, [])}
        cells += [f"{100 * rows[share]['balanced_accuracy']['mean']:.1f} ± "
                  f"{100 * rows[share]['balanced_accuracy']['deviation']:.1f}" for share in shares]
        return f"| {name} | {' | '.join(cells)} |"

    for method, result in sorted(found.items(), key=lambda each: -each[1]["protocols"]["linear"]["metrics"]["auroc"]):
        lines.append(line(f"[{method}](configs/pretrain/{result['recipe']}.yaml)", result, "encoder"))
    networks: dict[str, dict] = {}
    for result in found.values():
        networks.setdefault(result["config"]["encoder"]["name"].removesuffix("_patch16_224"), result)
    lines += [line(f"{name}, untrained", result, "random") for name, result in networks.items()]
    first = next(iter(found.values()))
    lines.append(line("colour histograms", first, "colours"))
    counts, bone = (first["protocols"][name]["counts"] for name in ("linear", "bone"))
    return "\n".join(lines) + (
        f"\n\nIn %, of one training each (seed {first['seed']}). PatchCamelyon: {counts['bank']:,} tiles to learn from "
        f"and {counts['queries']:,} to be asked about; in brackets where 95 % of bootstraps lie (over tiles: which "
        "patients they are of is lost). Few labels: balanced accuracy of a linear probe, mean ± standard deviation of "
        f"five choices. Other organ: balanced accuracy on {bone['queries']:,} tiles of osteosarcoma of "
        f"{bone['query_patients']} patients, three classes, by their nearest of {bone['bank']:,} tiles of "
        f"{bone['bank_patients']} others: so few patients show what is possible, and rank nothing. Fine-tuned: two "
        "passes. "
        f"`python benchmarks/worth.py`; {first['cpu']}, {first['cpus']} cores, torch {first['versions']['torch']}, "
        f"{max(each['date'] for each in found.values())}.\n\n![balanced accuracy over labels](docs/labels.png)")


def extract() -> str:
    """A sentence on features a second: the newest result file."""
    found = _newest("features_")
    if not found:
        return "Not measured yet."
    seconds = found["seconds"]
    rates = {name: found["tiles"] / seconds[name] for name in ("data", "encoder", "extract")}
    return (f"Features: {rates['extract']:,.0f} tiles of {found['size']} px a second ({found['model']}, "
            f"{found['device']}), {found['of_best']:.2f} of what data path ({rates['data']:,.0f}) and encoder "
            f"({rates['encoder']:,.0f}) allow; the same {found['tiles']:,} read again in {seconds['kept']:.3f} s. "
            f"{found['cpu']}, {found['cpus']} cores, {found['rounds']} interleaved rounds, {found['date']}. Plot: "
            f"`benchmarks/results/{found['plot']}`.")


def embed() -> str:
    """The table of slides to vectors: the newest result file."""
    found = _newest("embed_")
    if not found:
        return "Not measured yet."
    lines = ["| slides | tiles/s | slides/hour | reading alone | encoder alone | of the best | of the best, by CPU | "
             "own JPEGs against read_region |", "|---|---|---|---|---|---|---|---|"]
    for name, row in found["sets"].items():
        lines.append(f"| {name} | {row['embed']:.1f} | {row['slides_an_hour']:,.0f} | {row['read']:.1f} | "
                     f"{row['encoder']:.1f} | {row['of_best']:.2f} | {row['of_best_cpu']:.2f} | "
                     f"{row['one_core']['ratio']:.1f} |")
    return "\n".join(lines) + (
        f"\n\nFrom slides to vectors ({found['model']}, {found['size']} px, {found['device']}). Reading finds tissue, "
        "judges and decodes tiles; the best is both one after the other on the same cores, by the clock and by the "
        "CPU-seconds of all processes (which tell more beside other jobs; loading the encoder is in them). Real: one "
        "small slide of Aperio under several names. On one core a slide's own JPEG tiles are decoded so many times as "
        f"fast as OpenSlide's `read_region` shows them. {found['cpu']}, {found['cpus']} cores, other jobs beside it "
        f"(load {found['load_before'][0]:.1f}), {found['rounds']} interleaved rounds, {found['date']}. Plot: "
        f"`benchmarks/results/{found['plot']}`.")


def mil() -> str:
    """The table of slides by their tiles: the newest result file."""
    found = _newest("mil_")
    if not found:
        return "Not measured yet."
    models = list(dict.fromkeys(row["model"] for row in found["tissue"]))
    lines = [f"| slides, vectors | {' | '.join(models)} |", "|---" * (1 + len(models)) + "|"]
    for tissue, vectors in dict.fromkeys((row["tissue"], row["vectors"]) for row in found["tissue"]):
        cells = []
        for model in models:
            rows = [row for row in found["tissue"] if (row["tissue"], row["vectors"], row["model"]) ==
                    (tissue, vectors, model)]
            values, between = [row["auroc"] for row in rows], rows[0]["interval"]
            cells.append(_spread(100 * statistics.mean(values), 100 * statistics.stdev(values) if values[1:] else 0)
                         + (f" ({100 * between[0]:.0f} to {100 * between[1]:.0f})" if between else ""))
        lines.append(f"| {tissue}, {vectors} | {' | '.join(cells)} |")
    planted = [f"one tile in {int(tiles):,}: " + ", ".join(
        f"{model} {statistics.mean(row[model] for row in rows):.2f}" for model in rows[0])
        for tiles, rows in found["planted"].items()]
    told = found["settings"]
    return "\n".join(lines) + (
        f"\n\nAUROC in %, {'of one seed' if found['seeds'] == 1 else 'mean ± standard deviation over several seeds'}; "
        "in brackets where 95 % of bootstraps over slides lie, of the first seed. pcam: "
        f"{told['made']} slides made up of {told['tiles']} PatchCamelyon tiles that were never trained on, in every "
        f"other {told['tumour']} of tumour. Osteosarcoma: 26 slides of four patients, whole patients held out, one way "
        "to deal them out: so few show what is possible, rank nothing, and have no interval. Vectors by an encoder "
        "(of a method's small recipe, and its seed), by the same network untrained, and histograms of colours. "
        + (f"Planted tiles in noise, mean over seeds: {'; '.join(planted)} (settings of deepmil and chowder were "
           "looked for, of the others never). " if planted else "")
        + f"`python benchmarks/mil.py`; {found['cpu']}, {found['cpus']} cores beside other jobs (load "
        f"{found['load_before'][0]:.1f}), torch {found['versions']['torch']}, {found['date']}.")


def chain() -> str:
    """What the chain on painted nodes came to: the newest result file."""
    found = _newest("chain_")
    if not found:
        return "Not measured yet."
    rows = found["rows"]
    models = ["deepmil", *rows[0]["baselines"]]
    steps = list(rows[0]["lines"])
    lines = [f"| nodes | {' | '.join(models)} | {' | '.join(f'{step}, s' for step in steps)} | all, min |",
             "|---" * (2 + len(models) + len(steps)) + "|"]
    for row in rows:
        low, high = row["intervals"]["auroc"]
        figures = [f"{100 * row['metrics']['auroc']:.0f} ({100 * low:.0f} to {100 * high:.0f})",
                   *(f"{100 * row['baselines'][model]['auroc']:.0f}" for model in models[1:])]
        cells = [*figures, *(f"{row['lines'][step]:.0f}" for step in steps), f"{row['seconds'] / 60:.1f}"]
        lines.append(f"| seed {row['seed']} | {' | '.join(cells)} |")
    counts = rows[0]["counts"]
    return "\n".join(lines) + (
        f"\n\nAUROC in % on {counts['asked_about']} painted slides, {counts['slides'] - counts['asked_about']} others "
        "learnt from; in brackets where "
        "95 % of bootstraps lie. They show that the way is whole, and rank nothing. `python benchmarks/chain.py`; "
        f"{found['cpu']}, {found['cpus']} cores (load {found['load_before'][0]:.1f} before), torch "
        f"{found['versions']['torch']}, {found['date']}.")


def gigassl() -> str:
    """What Giga-SSL takes and tells apart: the newest result file."""
    found = _newest("gigassl_")
    if not found:
        return "Not measured yet."
    lines = []
    if scale := found.get("scale"):
        learnt, looked, probe = scale["train"], scale["embed"], scale["probe"]
        count = scale["slides"]
        lines += [
            f"| {count:,} slides, {scale['draws']} draws of {scale['tiles']} tiles, {scale['width']} wide | |",
            "|---|---|",
            f"| stored, of which numbers and cells | {scale['tar_bytes'] / 1e6:,.0f} MB, "
            f"{scale['numbers_bytes_a_draw'] / scale['bytes_a_draw']:.1%} |",
            f"| indexed: table; seconds and memory until the first batch | {scale['table_bytes'] / 1e6:.1f} MB; "
            f"{scale['open_seconds']:.2f} s, {scale['open_mb']:.0f} MB |",
            f"| trained on, {learnt['steps']} steps of {learnt['batch']}, two views of five tiles | "
            f"{learnt['slides_per_second']:.0f} slides/s, waiting for data {learnt['data_wait']:.1%} of the time, "
            f"{learnt['mb']:,.0f} MB |",
            f"| embedded, {looked['views']} views of each | {count / looked['seconds']:.0f} slides/s, "
            f"{looked['mb']:,.0f} MB |",
            f"| their vectors, 512 numbers a slide | {looked['table_bytes'] / 1e6:.1f} MB |",
            f"| probed, ten splits, 50, 100, 250 slides and all | {probe['seconds']:.0f} s, {probe['mb']:,.0f} MB |",
            ""]
    names = {"sparse": "sparse convolution", "mlp": "each tile for itself", "mean": "mean of the tiles' vectors"}
    lines += [f"| slides differ in | {' | '.join(names.values())} |", "|---" * 4 + "|"]
    for kind, words in (("where", "where their special tiles lie"), ("what", "what their special tiles are")):
        rows = [row for row in found["apart"] if row["kind"] == kind]
        values = [[100 * row[name] for row in rows] for name in names]
        lines.append(f"| {words} | " + " | ".join(_spread(
            statistics.mean(own), statistics.stdev(own) if own[1:] else 0) for own in values) + " |")
    told = found["settings"]
    return "\n".join(lines) + (
        f"\n\nTold apart: AUROC in % of one probe of {told['slides']} made-up slides (three quarters or more learnt "
        "from, the rest asked about, in turn), by vectors of encoders that learnt on them without a label, over "
        f"{len(found['apart']) // 2} seeds; of {told['special']} special tiles among some 115. "
        f"Memory is the largest of any process. `python benchmarks/gigassl.py`; {found['cpu']}, {found['cpus']} cores "
        f"beside other jobs (load {found['load_before'][0]:.1f}), torch {found['versions']['torch']}, "
        f"{found['date']}. Plot: `benchmarks/results/{found['plot']}`.")


def valued() -> dict[str, dict]:
    """Of each method the newest result of what its encoder is worth."""
    results = [_read(path) for path in sorted(_files("worth_"), key=lambda path: path.stem.rpartition("_")[2])]
    return {result["method"]: result for result in results}


def segment() -> str:
    """The table of nuclei found without labels: the newest result of every seed."""
    found = segmented()
    if not found:
        return "Not measured yet."

    def dice(each: dict, name: str = "") -> float:
        return 100 * (each["baselines"][name] if name else each["metrics"])["dice"]

    def spread(values: list[float]) -> str:
        return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}" if len(values) > 1 else \
            f"{values[0]:.1f}"

    lines = ["| seed | Dice | step | chosen by labels | step | untrained | Otsu | best grey | minutes | of two cores |",
             "|---|---|---|---|---|---|---|---|---|---|"]
    runs = list(found.values())
    for seed, each in found.items():
        low, high = (100 * edge for edge in each["intervals"]["dice"])
        lines.append(f"| {seed} | {dice(each):.1f} ({low:.0f} to {high:.0f}) | {each['step']} | "
                     f"{dice(each, 'by_labels'):.1f} | {each['baselines']['by_labels']['step']} | "
                     f"{dice(each, 'random'):.1f} | {dice(each, 'otsu'):.1f} | {dice(each, 'grey'):.1f} | "
                     f"{each['seconds'] / 60:.1f} | {each['cpu_seconds'] / 120:.1f} |")
    lines.append(f"| mean | {spread([dice(each) for each in runs])} |  | "
                 f"{spread([dice(each, 'by_labels') for each in runs])} |  | "
                 f"{spread([dice(each, 'random') for each in runs])} | {dice(runs[0], 'otsu'):.1f} | "
                 f"{dice(runs[0], 'grey'):.1f} |  |  |")
    first = runs[0]
    how = {True: "cleaned", False: "as it is"}
    return "\n".join(lines) + (
        f"\n\nNuclei by [patch-contrastive segmentation](docs/segmentation.md) "
        f"([{first['recipe']}](configs/pretrain/{first['recipe']}.yaml)): mean Dice in % on regions of "
        f"{first['counts']['queries']} patients of MoNuSeg that were never trained on; in brackets where 95 % of "
        f"bootstraps over patients lie. Of {first['counts']['bank']} others the network saw pictures and no outline; "
        "those choose, beside it, the step and class that are best by labels, the level of grey, and whether a "
        f"threshold's map is cleaned (Otsu's on haematoxylin: {how[first['baselines']['otsu']['cleaned']]}; grey: "
        f"{how[first['baselines']['grey']['cleaned']]}). Untrained: the same network, its class chosen as here. The "
        "recipe was found on the training patients, with their outlines; the rule of when to stop was changed once "
        f"after a first result of seed 0, which is kept. {_variants()}Minutes: of training by the clock, beside "
        f"other jobs (load {max(each['load_while'][3] for each in runs):.0f} at most), and what its processors' time "
        f"would be on two cores of its own. `python benchmarks/patchseg.py`; {first['cpu']}, {first['cpus']} cores, "
        "torch "
        f"{first['versions']['torch']}, {max(each['date'] for each in runs)}.\n\n"
        "![separation and Dice over steps](docs/segmentation.png)")


def segmented() -> dict[int, dict]:
    """Of the recipe that was measured last the newest result of every seed; of older settings none."""
    results = [_read(path) for path in sorted(_files("patchseg_"), key=lambda path: path.stem.rpartition("_")[2])]
    same = [each for each in results if _recipe(each) == _recipe(results[-1])]
    return {each["seed"]: each for each in sorted(same, key=lambda each: each["seed"])}


def _variants() -> str:
    """What else was asked about on the same patients, so that who reads knows what was chosen among."""
    shown = {_as_seen(each) for each in segmented().values()}
    found: dict[tuple[str, str, str], dict[int, float]] = {}
    for path in sorted(_files("patchseg_"), key=lambda path: path.stem.rpartition("_")[2]):
        each = _read(path)
        if _as_seen(each) not in shown:
            found.setdefault(_as_seen(each), {})[each["seed"]] = 100 * each["metrics"]["dice"]
    several = [f"patches show {patches}, the network sees {sees}, cut at {cut}: {statistics.mean(own.values()):.1f}"
               for (patches, sees, cut), own in found.items() if len(own) > 2]
    return f"Variants that were asked about on the same patients, three seeds each: {'; '.join(several)}; why this " \
        "one was taken, and when, stands in [segmentation](docs/segmentation.md). " if several else ""


def _as_seen(result: dict) -> tuple[str, str, str]:
    """What patches show, what the network sees, and where its maps are cut."""
    method, args = result["config"]["method"], result["config"]["encoder"]["args"]
    return (method.get("shown", "ink" if method.get("ink") else "light"),
            args.get("sees", "colours" if args.get("own") else "light"), result.get("cut", "half"))


def _newest(prefix: str) -> dict | None:
    files = _files(prefix)
    return _read(files[-1]) if files else None


def nuclei() -> str:
    """The newest result file of nuclei: a table, pretrained and untrained, and how quickly they are parted."""
    found = _newest("nuclei_")
    if not found:
        return "Not measured yet."
    large, planted = found["large"], min(row["pq"] for row in found["planted"])
    return _encoders(found) + (
        f"Parting nuclei alone: 500 planted ellipses come back with a PQ of {planted:.3f} at least; "
        f"{large['side']:,} x {large['side']:,} px with {large['nuclei']:,} nuclei take {large['seconds']:.0f} s, "
        f"{large['cpu_seconds']:.0f} s of one core, and {large['peak_gb']:.1f} GB. `python benchmarks/nuclei.py`; "
        f"{found['cpu']}, {found['cpus']} cores, load {found['load_before'][0]:.0f} to {found['load_after'][0]:.0f}, "
        f"torch {found['versions']['torch']}, scikit-image {found['versions']['scikit-image']}, {found['date']}.")


def _encoders(found: dict) -> str:
    """What nuclei are found by an encoder and by the same network untrained."""
    rows = found["tissue"]
    if not rows:
        return ""
    lines = ["| encoder | PQ | AJI | Dice | F1 of detection |", "|---|---|---|---|---|"]
    for name, figures in ((found["method"], [row["metrics"] for row in rows]),
                          ("the same network, untrained", [row["baselines"]["random"] for row in rows])):
        cells = []
        for key in ("pq", "aji", "dice", "f1_detection"):
            values = [100 * each[key] for each in figures if key in each]
            deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{deviation}" if values else "")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    counts, several = rows[0]["counts"], len(rows) > 1
    seconds = statistics.median(row["seconds"] for row in rows) / 2
    apart = [row["against"]["random"]["pq"] for row in rows if "pq" in row["against"].get("random", {})]
    ahead = ", ".join("{:+.1f} ({:+.1f} to {:+.1f})".format(100 * each["difference"], *(
        100 * edge for edge in each["interval"])) for each in apart)
    return "\n".join(lines) + (
        f"\n\nIn %, {'mean ± standard deviation over ' if several else ''}{len(rows)} seed{'s' if several else ''}"
        + (f" (PQ pretrained less untrained, seed by seed, and where 95 % of bootstraps over patients lie: {ahead})"
           if ahead else "") + ": a "
        f"narrow HoVer-Net ({', '.join(found['settings'])}) learns from {counts['bank']} MoNuSeg images and is asked "
        f"about {counts['queries']} of other patients; {seconds:,.0f} s a "
        f"network, {found['threads']} thread{'s' if found['threads'] > 1 else ''}. So small, it compares encoders; a "
        "whole HoVer-Net is not measured. ")


def _files(prefix: str) -> list[Path]:
    return sorted(RESULTS.glob(f"{prefix}*.json"))


def _read(path: Path) -> dict:
    return json.loads(path.read_text())


PAGES = {"README.md": {"demo": demo, "learn": learn, "worth": worth, "mil": mil,
                       "segment": segment, "nuclei": nuclei, "tree": tree},
         "docs/gigassl.md": {"gigassl": gigassl}, "docs/mil.md": {"chain": chain},
         "docs/measured.md": {"data": data, "stream": stream, "train": train, "start": start, "features": extract,
                              "embed": embed, "safety": safety, "kills": kills, "shard": shard}}


def main() -> int:
    """Rewrites the pages, or with --check says whether they are up to date."""
    code = 0
    for page, parts in PAGES.items():
        path = ROOT / page
        text = fresh = path.read_text()
        for name, part in parts.items():
            pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
            if not pattern.search(fresh):
                sys.stderr.write(f"{page} has no <!-- {name} --> … <!-- end -->\n")
                return 1
            fresh = pattern.sub(lambda match, part=part: match[1] + part() + "\n" + match[2], fresh)
        if "--check" not in sys.argv:
            path.write_text(fresh)
        elif fresh != text:
            sys.stderr.write(f"{page} is not what the tree and the results say; run: make readme\n")
            code = 1
    return code


if __name__ == "__main__":
    sys.exit(main())
