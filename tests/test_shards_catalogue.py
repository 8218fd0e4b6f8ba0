"""The registry of datasets: 57 records, each held against files that lie as it says; and jobs over many of them."""

import json
import os
import re
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from shards import catalogue, check, index, sources, synthetic
from shards.settings import CUT, Settings
from ssl_dist import cli, schema

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs"
REGISTRY = CONFIGS / "datasets"
NAMES = """
    acdc-lunghp adipocyte adp anhir bach bach-wsi bcss breakhis breastpathq brecahad camelyon16 camelyon17 consep cpm-15
    cpm-17 cptac-brca cptac-ccrcc cptac-coad cptac-lscc cptac-luad crag crc-tp crchisto digestpath-signet
    digestpath-tissue glas gleason-arvaniti gleason2019 her2 herohe janowczyk kather-msi kimia-path24 kumar lc25000
    lymph lyon19 mbm mitos-atypia monusac monuseg nct-crc-he nuclick osteosarcoma paip2019 paip2020 panda pannuke pcam
    post-nat-brca sln-breast tcga tcga-ucec tnbc tupac16 tupac16-aux ucsb""".split()        # noqa: SIM905
DOWNSTREAM = ("bach", "lymph", "breakhis", "nct-crc-he", "gleason2019", "digestpath-tissue", "breastpathq")
CUTTING = ("size=64", "min_focus=0", "min_tissue=0.1")
RECORDS = catalogue.records(REGISTRY)
SETS = {f"sets/{name}": record for name, record in catalogue.records(CONFIGS / "shards" / "sets").items()}


@pytest.fixture(scope="session")
def painting() -> synthetic.Painting:
    return synthetic.paint(3, 0, 0, size=512)


@pytest.fixture(scope="session")
def slide(painting: synthetic.Painting, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One painted slide, to lie under many names."""
    path = tmp_path_factory.mktemp("painted") / "slide.svs"
    synthetic.write_slide(path, painting)
    return path


def picture(seed: int, size: int = 40) -> Image.Image:
    """Smooth noise, different for every seed."""
    small = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), np.uint8)
    return Image.fromarray(small).resize((size, size), Image.Resampling.BICUBIC)


def put(path: Path, content: object, slide: Path | None = None) -> Path:
    """One file of a dataset: a table, an array, a slide or a picture, as its name and `content` say."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, str):
        path.write_text(content)
    elif path.suffix == ".h5":
        with h5py.File(path, "w") as file:
            if path.stem.endswith("_y"):
                file["y"] = np.arange(3, dtype=np.uint8).reshape(3, 1, 1, 1) % 2
            else:
                file["x"] = np.stack([np.asarray(picture(len(path.stem) + number, 16)) for number in range(3)])
    elif slide is not None and path.suffix in sources.SUFFIXES["slides"]:
        os.link(slide, path)
    else:
        picture(zlib.crc32(path.name.encode())).save(path)
    return path


def tree(record: catalogue.Record, root: Path, slide: Path) -> Path:
    """A small copy of the dataset in the layout that its record tells."""
    for name, known in record.example.items():
        put(root / record.folder / name, None if known == "skipped" else known,
            slide if record.kind == "slides" else None)
    return root / record.folder


def told(record: catalogue.Record, source: Path, **more: object) -> Settings:
    values = {**catalogue.job(record, source), "source": str(source), "out": str(source.parent / "out"), **more}
    return schema.build(Settings, values, where=record.name)


def ssl_dist(*words: object) -> Result:
    return CliRunner().invoke(cli.app, [str(word) for word in words])


def reasons(shard: Path) -> list[str]:
    return [json.loads(line)["reason"] for line in (shard / "rejected.jsonl").read_text().splitlines()]


# --- what the registry says


def test_there_are_57_records_and_each_is_one_screen() -> None:
    assert len(NAMES) == 57 and list(RECORDS) == sorted(NAMES)
    assert {path.stem for path in REGISTRY.iterdir()} == {*NAMES, "README"}
    assert len({record.title for record in RECORDS.values()}) == 57
    for path in REGISTRY.glob("*.yaml"):
        lines = path.read_text().splitlines()
        assert lines[0].startswith("# ") and len(lines) <= 40 and max(map(len, lines)) <= 120, path


@pytest.mark.parametrize("name", NAMES)
def test_every_fact_is_there_with_how_sure_we_are_and_a_source_that_the_readme_explains(name: str) -> None:
    record, readme = RECORDS[name], (REGISTRY / "README.md").read_text()
    assert tuple(record.facts) == catalogue.FACTS
    for fact in record.facts.values():
        assert fact.value and fact.evidence in catalogue.EVIDENCE
        for mark in re.split(", ", re.split("[:;]", fact.source)[0]):
            assert f"\n| {mark} |" in readme, f"{name}: nobody explains {mark!r}"
        if fact.source == "-" or fact.value == catalogue.UNKNOWN:
            assert fact.evidence == "unverified", f"{name}: {fact}"


def test_only_what_was_seen_in_a_primary_place_is_called_confirmed() -> None:
    confirmed = {(name, fact) for name, record in RECORDS.items() for fact, said in record.facts.items()
                 if said.evidence == "confirmed"}
    assert confirmed == {
        ("tcga-ucec", "membership"), *((name, "membership") for name in DOWNSTREAM),
        # held against the copies, below
        ("osteosarcoma", "layout"), ("osteosarcoma", "labels"), ("osteosarcoma", "patients"), ("monuseg", "patients")}
    candidates = [record.fact("membership") for record in RECORDS.values() if "candidate" in record.fact("membership")]
    assert len(candidates) == 49
    assert all("pretraining: unknown" in RECORDS[name].fact("membership") for name in DOWNSTREAM)


def test_the_readme_says_that_the_papers_list_could_not_be_read() -> None:
    readme = (REGISTRY / "README.md").read_text()
    assert "not the list of the paper" in readme and "could not be read" in readme


def test_what_is_taken_by_the_generic_rule_is_what_the_readme_names() -> None:
    readme = " ".join((REGISTRY / "README.md").read_text().split())
    named = re.search(r"They are ([a-z0-9, -]+), and (\w+),", readme)
    generic = [name for name, record in RECORDS.items()
               if "not known" in record.fact("layout") or "cannot be read" in record.fact("layout")]
    assert generic == sorted([*named[1].split(", "), named[2]])
    for name in generic:
        assert RECORDS[name].shard.get("names", "") in ("", "(?P<patient>)"), name


# --- each record against files in its layout


@pytest.mark.parametrize("name", [*NAMES, *SETS])
def test_files_that_lie_as_a_record_says_are_read_as_it_says(name: str, tmp_path: Path, slide: Path) -> None:
    record = {**RECORDS, **SETS}[name]
    source = tree(record, tmp_path, slide)
    found = {each.path.relative_to(source).as_posix(): each for each in sources.sources(told(record, source))}
    expected = {path: known for path, known in record.example.items() if isinstance(known, dict)}
    assert set(found) == set(expected), "masks and the like are left out, and nothing else"
    for path, known in expected.items():
        stem = Path(path).stem
        whole = {"slide": stem, "patient": known.get("slide", stem) if record.kind == "slides" else "", "site": "",
                 "split": "", "label": "", **known}
        assert {word: getattr(found[path], word) for word in whole} == whole, path
    assert catalogue.present(record, tmp_path) == len(expected)


@pytest.mark.parametrize("name", NAMES)
def test_a_record_alone_is_a_job_but_for_where_things_are(name: str, tmp_path: Path) -> None:
    settings = told(RECORDS[name], tmp_path)
    assert settings.dataset == name and settings.licence and settings.organ and settings.about
    if settings.kind == "slides":
        assert settings.mpp
    assert (settings.licence == "unknown") == (RECORDS[name].fact("licence") == "unknown")


def test_the_names_of_real_files_are_as_the_record_says(data: Path) -> None:
    found = sources.sources(told(RECORDS["osteosarcoma"], data / "osteosarcoma_tcia_1024px"))
    assert len(found) == 60
    assert {each.patient for each in found} == {"Case-3", "Case-4", "Case-48-P5", "P9"}
    assert len({each.slide for each in found}) == 26
    assert {each.label for each in found} == {"Non-Tumor", "Non-Viable-Tumor", "Viable"}


def test_real_barcodes_tell_patient_and_site(data: Path) -> None:
    source = data / "monuseg2018" / "train" / "images"
    found = sources.sources(told(RECORDS["monuseg"], source, names=""))
    assert len({each.patient for each in found}) == 30
    assert all(re.fullmatch("TCGA-[A-Z0-9]{2}-[A-Z0-9]{4}", each.patient) for each in found)
    assert all(each.site == each.patient[5:7] for each in found)


def test_a_table_that_is_not_there_is_no_error_and_nobodys_slides_csv(tmp_path: Path, slide: Path) -> None:
    source = tree(RECORDS["panda"], tmp_path, slide)
    (source / "train.csv").unlink()
    (source / "slides.csv").write_text("slide,label\n0005f7aaab2800f6170c399693a96917,mine\n")
    assert [each.label for each in sources.sources(told(RECORDS["panda"], source))] == ["mine"]


def test_a_table_may_lie_beside_the_record_and_one_in_the_dataset_goes_before_it(tmp_path: Path) -> None:
    record = tmp_path / "records" / "mine.yaml"
    put(record, "title: Mine\nshard:\n  kind: tiles\n  table: splits.csv\n  columns: {slide: image}\n")
    put(record.with_name("splits.csv"), "image,split\na,train\nb,test\n")
    source = tmp_path / "mine"
    for name in ("a", "b"):
        put(source / "deep" / f"{name}.png", None)

    def splits() -> list[str]:
        return [each.split for each in sources.sources(told(catalogue.read(record), source))]

    assert splits() == ["train", "test"]
    put(source / "deep" / "splits.csv", "image,split\na,valid\n")
    assert splits() == ["valid", ""]
    record.with_name("splits.csv").unlink()
    (source / "deep" / "splits.csv").unlink()
    assert splits() == ["", ""]


# --- mistakes in a record


def test_all_mistakes_of_a_record_come_at_once_with_key_and_file(tmp_path: Path) -> None:
    path = tmp_path / "odd.yaml"
    path.write_text("titel: x\nfacts:\n  license: [a, quoted, b]\n  organ: [liver, quotd, b]\n  stain: red\n"
                    "shard:\n  kind: tile\n  nmaes: x\n  skip: '('\n  out: here\nexample:\n  a.png: {slid: a}\n")
    with pytest.raises(catalogue.RecordError) as error:
        catalogue.read(path)
    assert error.value.exit_code == 2
    lines = str(error.value).splitlines()
    for part in ("titel is not a key; did you mean title?", "title is not set", "facts.license",
                 "did you mean licence?", "did you mean quoted?", "facts.stain='red'",
                 "shard.kind='tile' is not one of", "shard.skip='('", "did you mean names?",
                 "shard.out is not for a record", "example.a.png"):
        assert len([line for line in lines if part in line]) == 1, part
    assert all(line.endswith(f"[{path}]") for line in lines)


@pytest.mark.parametrize(("name", "text", "part"), [
    ("Upper.yaml", "title: x\nshard: {}\n", "'Upper'"), ("a.yaml", "- 1\n", "no keys and values"),
    ("a.yaml", "title: [", "not YAML"), ("a.yaml", "title: 3\nshard: {}\n", "put it in quotes"),
    ("a.yaml", "title: a\nshard: 3\n", "shard=3 is not a group"),
])
def test_a_file_that_is_no_record_is_refused_by_name(tmp_path: Path, name: str, text: str, part: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(catalogue.RecordError) as error:
        catalogue.records(tmp_path)
    assert len(error.value.problems) == 1 and part in str(error.value) and name in str(error.value)


def test_a_folder_without_records_is_refused(tmp_path: Path) -> None:
    done = ssl_dist("datasets", f"records={tmp_path}")
    assert done.exit_code == 2 and "holds no record" in done.stderr


# --- one dataset of each kind, from files to shards


def test_slides_regions_tiles_and_arrays_are_written_by_their_records(tmp_path: Path, slide: Path,
                                                                      painting: synthetic.Painting) -> None:
    root, out = tmp_path / "in", tmp_path / "out"
    for name in ("tcga-ucec", "pcam", "nct-crc-he"):
        tree(RECORDS[name], root, slide)
    region = put(root / "consep" / "CoNSeP/Train/Images/train_1.png", None)
    Image.fromarray(painting.pixels).save(region)
    for name in ("tcga-ucec", "consep", "nct-crc-he", "pcam"):
        done = ssl_dist("shard", f"datasets/{name}", f"source={root / name}", f"out={out / name}",
                        "workers=2", *(CUTTING if catalogue.read(ROOT / f"configs/datasets/{name}.yaml").kind in CUT
                                       else []), *(["mpp=0.5"] if name == "consep" else []))
        assert done.exit_code == 0, done.stderr
        assert not check.check(out / name)
        card = index.read(out / name).datasets[0]
        assert (card["name"], card["organ"]) == (name, RECORDS[name].fact("organ"))
        rows = index.samples(out / name)
        assert rows.num_rows > 0
        known = {word: set(rows[word].to_pylist()) for word in ("patient", "split", "mpp")}
        assert known == {"tcga-ucec": {"patient": {"TCGA-AJ-A3NC", "TCGA-BK-A0C9"}, "split": {""}, "mpp": {0.5}},
                         "consep": {"patient": {""}, "split": {"Train"}, "mpp": {0.5}},
                         "nct-crc-he": {"patient": {""}, "split": {"NCT-CRC-HE-100K", "CRC-VAL-HE-7K"}, "mpp": {0.5}},
                         "pcam": {"patient": {""}, "split": {"train", "test"}, "mpp": {1.0}}}[name]
    assert set(index.read(out / "nct-crc-he").datasets[0]["classes"]) == {"ADI", "TUM"}


def test_what_is_typed_goes_before_what_the_record_says(tmp_path: Path, slide: Path) -> None:
    source = tree(RECORDS["glas"], tmp_path, slide)
    done = ssl_dist("shard", REGISTRY / "glas.yaml", f"source={source}", f"out={tmp_path / 'out'}", "mpp=0.5",
                    "dataset=mine", "--print-config")
    assert done.exit_code == 0, done.stderr
    path = tmp_path / "again.yaml"
    path.write_text(done.stdout)
    settings = schema.load(Settings, path, [])
    assert (settings.mpp, settings.dataset, settings.kind) == ([0.5], "mine", "tiles")
    assert settings.names == RECORDS["glas"].shard["names"] and settings.columns == RECORDS["glas"].shard["columns"]
    assert settings.table == source / "Warwick_QU_Dataset" / "Grade.csv"
    done = ssl_dist("shard", "datasets/glas", f"source={source}", f"out={tmp_path / 'out'}", "--dry-run")
    assert "2 tiles of 2 patients" in done.stdout


# --- many datasets


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three datasets of tiles; crc-tp holds one that adipocyte holds too, and nuclick a file that is no image."""
    root = tmp_path / "root"
    for name in ("1", "2", "3"):
        put(root / "adipocyte" / f"{name}.jpg", None)
    put(root / "crc-tp" / "own.png", None)
    shutil.copy(root / "adipocyte" / "2.jpg", root / "crc-tp" / "copy.jpg")
    put(root / "nuclick" / "IHC" / "images" / "Train" / "1.png", "no image")
    return root


def test_what_is_present_is_written_what_fails_is_told_and_what_is_missing_is_named(root: Path) -> None:
    out = root.parent / "out"
    done = ssl_dist("shard", "shards/all57", f"root={root}", f"out={out}", "workers=2")
    assert done.exit_code == 3, done.output
    lines = done.stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == ["adipocyte", "crc-tp", "nuclick", "2 of 57 datasets are written, "
                                                      "1 failed", f"not under {root}"]
    assert "failed" in lines[2] and "Traceback" not in done.stderr
    assert lines[4].split(": ")[1].split(", ") == [name for name in NAMES
                                                   if name not in ("adipocyte", "crc-tp", "nuclick")]
    assert index.samples(out / "adipocyte").num_rows == 3
    assert index.samples(out / "crc-tp")["key"].to_pylist() == ["own"], "the first dataset keeps what two hold"
    assert reasons(out / "crc-tp") == ["duplicate"]
    assert not (out / "nuclick" / "index.json").exists()

    (root / "nuclick" / "IHC" / "images" / "Train" / "1.png").unlink()
    put(root / "nuclick" / "IHC" / "images" / "Train" / "2.png", None)
    done = ssl_dist("shard", "shards/all57", f"root={root}", f"out={out}", "workers=2")
    assert done.exit_code == 0, done.output
    assert [("complete before" in line) for line in done.stdout.splitlines()[:3]] == [True, True, False]


def test_a_58th_dataset_is_one_file_and_undoes_nothing(root: Path) -> None:
    out, mine = root.parent / "out", root.parent / "mine"
    words = ["shard", "shards/all57", f"root={root}", f"out={out}", "workers=2", f"records={mine}"]
    mine.mkdir()
    (mine / "zebra.yaml").write_text("# Zebras\ntitle: Zebras\nshard:\n  kind: tiles\n")
    put(root / "zebra" / "z.png", None)
    assert ssl_dist(*words, "only=[adipocyte,crc-tp,zebra]").exit_code == 0
    # It comes first by name, and holds what others hold: they were first.
    (mine / "aardvark.yaml").write_text("# Aardvarks\ntitle: Aardvarks\nfolder: pigs\nshard:\n  kind: tiles\n")
    put(root / "pigs" / "own.jpg", None)
    shutil.copy(root / "adipocyte" / "1.jpg", root / "pigs" / "copy.jpg")
    done = ssl_dist(*words, "only=[aardvark,adipocyte,crc-tp,zebra]")
    assert done.exit_code == 0, done.output
    assert done.stdout.count("complete before") == 3
    assert index.samples(out / "aardvark")["key"].to_pylist() == ["own"]
    assert index.read(out / "aardvark").datasets[0]["licence"] == "unknown"


def test_copies_may_be_kept(root: Path) -> None:
    out = root.parent / "out"
    done = ssl_dist("shard", "shards/all57", f"root={root}", f"out={out}", "workers=2", "only=[adipocyte,crc-tp]",
                    "duplicates=keep")
    assert done.exit_code == 0, done.output
    assert index.samples(out / "crc-tp").num_rows == 2


def test_a_dry_run_over_many_tells_and_touches_nothing(root: Path) -> None:
    done = ssl_dist("shard", "shards/all57", f"root={root}", f"out={root.parent / 'out'}", "--dry-run")
    assert done.exit_code == 0, done.stderr
    assert f"adipocyte: 3 tiles in {root / 'adipocyte'}" in done.stdout and "3 of 57" in done.stdout
    assert not (root.parent / "out").exists()


def test_a_root_without_any_dataset_is_refused_with_the_names_that_are_looked_for(tmp_path: Path) -> None:
    (tmp_path / "bach").mkdir()
    done = ssl_dist("shard", "shards/all57", f"root={tmp_path}", "out=x")
    assert done.exit_code == 2 and done.stderr.count("\n") == 1
    assert f"root={tmp_path} holds none of the 57 datasets" in done.stderr and "bach, " in done.stderr


@pytest.mark.parametrize(("word", "parts"), [
    ("only=[bahc]", ("'bahc'", "did you mean bach?")), ("max_tiles=0", ("max_tiles=0", "out of range")),
    ("rot=x", ("rot", "did you mean root?")), ("mpp=[0.5,0.5]", ("names one resolution twice", "record of bcss")),
])
def test_a_mistake_in_a_job_over_many_is_told_before_anything_is_written(tmp_path: Path, word: str,
                                                                         parts: tuple[str, ...]) -> None:
    put(tmp_path / "root" / "bcss" / "TCGA-A1-A0SK-DX1.png", None)
    done = ssl_dist("shard", "shards/all57", f"root={tmp_path / 'root'}", f"out={tmp_path / 'out'}", word)
    assert done.exit_code == 2 and all(part in done.stderr for part in parts), done.stderr
    assert not (tmp_path / "out").exists()


def test_the_job_cuts_slides_as_it_says_and_regions_no_finer_than_they_are(tmp_path: Path) -> None:
    many = catalogue.Many(root=tmp_path, out=tmp_path / "out", mpp=[0.5, 0.25], size=224, max_tiles=7, quality=80)
    names = ["panda", "consep", "osteosarcoma", "lymph", "tnbc"]
    panda, consep, osteosarcoma, lymph, tnbc = catalogue.jobs(many, RECORDS, names)
    assert panda["mpp"] == [0.5, 0.25] and (panda["size"], panda["max_tiles"]) == (224, 7)
    assert consep["mpp"] == [0.5, 0.25], "0.25 is what these regions are"
    assert osteosarcoma["mpp"] == [], "regions of 1 µm/px hold no tile of 0.5: they are cut as they are"
    assert lymph["mpp"] == [], "and so are those that do not tell"
    assert tnbc["mpp"] == 0.25 and not {"size", "max_tiles"} & tnbc.keys(), "tiles stay what they are"
    assert {values["quality"] for values in (panda, consep, osteosarcoma, lymph, tnbc)} == {80}


# --- the verb


def test_datasets_are_listed_with_licence_and_how_many_files_lie_under_a_root(root: Path) -> None:
    done = ssl_dist("datasets", f"root={root}", "--json")
    rows = {row["name"]: row for row in json.loads(done.stdout)}
    assert list(rows) == NAMES
    assert rows["adipocyte"]["files"] == 3 and rows["bach"]["files"] == 0
    assert rows["bach"]["licence"] == "CC BY-NC-ND 4.0" and rows["bach-wsi"]["licence"].endswith("(unverified)")
    lines = ssl_dist("datasets", f"root={root}").stdout.splitlines()
    assert len(lines) >= 59 and lines[-1] == f"3 of 57 lie under {root}"
    without = json.loads(ssl_dist("datasets", "--json").stdout)
    assert {row["files"] for row in without} == {None}


def test_datasets_are_listed_without_anything_heavy() -> None:
    program = ("import sys, ssl_dist.cli as cli\n"
               "try:\n    cli.app(['datasets', '--json'])\nexcept SystemExit:\n    pass\n"
               "print(sorted({'torch', 'openslide', 'numpy', 'h5py', 'pyarrow'} & set(sys.modules)))")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_records_do_not_drown_the_recipes() -> None:
    listed = ssl_dist("recipes").stdout
    assert "shards/all57" in listed and "datasets/" not in listed


# --- recipes


@pytest.mark.parametrize(("name", "expected"), [
    ("ciga", {"max_tiles": 100, "size": 224}), ("kang", {"max_tiles": 1000, "mpp": [0.5, 0.25], "size": 512}),
    ("gigassl", {"max_tiles": None, "mpp": [1.0]}), ("dehaene", {"max_tiles": None, "mpp": [0.5], "size": 224}),
])
def test_the_recipe_of_a_paper_cuts_as_the_paper_did(name: str, expected: dict, tmp_path: Path) -> None:
    settings = schema.load(Settings, CONFIGS / "shards" / f"{name}.yaml", [f"source={tmp_path}"])
    assert {key: getattr(settings, key) for key in expected} == expected
    comment = "".join(line for line in (CONFIGS / "shards" / f"{name}.yaml").read_text().splitlines()
                      if line.startswith("#"))
    assert "confirmed" in comment and ("unverified" in comment or "ours" in comment)
