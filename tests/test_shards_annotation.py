"""A pathologist's regions: three formats, one map, held against plain loops and against masks that others drew."""

import gzip
import json
import math
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shards import annotation, tissue
from shards.annotation import Annotation
from shards.index import ShardError

Ring = list[tuple[float, float]]
FINE = tissue.MASK_MPP      # of a slide whose pixels are those of the map


def square(left: float, top: float, side: float) -> Ring:
    return [(left, top), (left + side, top), (left + side, top + side), (left, top + side)]


def inside(x: float, y: float, ring: Ring) -> bool:
    """The even-odd rule, as any textbook has it."""
    odd = False
    for (x0, y0), (x1, y1) in pairwise([*ring, ring[0]]):
        if (y0 > y) != (y1 > y) and x < x0 + (y - y0) / (y1 - y0) * (x1 - x0):
            odd = not odd
    return odd


def by_loops(regions: list[tuple[str, Ring, list[Ring]]], width: int, height: int) -> list[list[str]]:
    """The class of every pixel's centre: the last region that holds it outside of its holes."""
    return [[next((name for name, outline, holes in reversed(regions) if inside(x + 0.5, y + 0.5, outline)
                   and not any(inside(x + 0.5, y + 0.5, hole) for hole in holes)), "")
             for x in range(width)] for y in range(height)]


def told(drawn: Annotation, width: int, height: int) -> list[list[str]]:
    """The class of every pixel, asked for one by one."""
    return [[drawn.of(x, y, 1, 1.0) for x in range(width)] for y in range(height)]


def read(path: Path, width: int = 60, height: int = 50, mpp: float = FINE) -> Annotation:
    return Annotation.read(path, (width, height), mpp)


# --- writing the formats, as their programs do


def geojson(path: Path, regions: list[tuple[str, Ring, list[Ring]]]) -> Path:
    path = path.with_suffix(".geojson")
    features = [feature(name, "Polygon", [[*ring, ring[0]] for ring in (outline, *holes)])
                for name, outline, holes in regions]
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    return path


def feature(name: str | None, kind: str, coordinates: object, **known: object) -> dict:
    told = {} if name is None else {"classification": {"name": name, "color": [200, 0, 0]}}
    return {"type": "Feature", "properties": {"objectType": "annotation", **told, **known},
            "geometry": {"type": kind, "coordinates": coordinates}}


def asap(path: Path, regions: list[tuple[str, Ring]], kind: str = "Polygon") -> Path:
    def one(group: str, ring: Ring, number: int) -> str:
        corners = [f'<Coordinate Order="{order}" X="{x}" Y="{y}" />' for order, (x, y) in enumerate(ring)]
        # Order counts, and not the place in the file.
        return (f'<Annotation Name="Annotation {number}" Type="{kind}" PartOfGroup="{group}" Color="#F4FA58">'
                f'<Coordinates>{"".join(reversed(corners))}</Coordinates></Annotation>')

    path = path.with_suffix(".xml")
    path.write_text('<?xml version="1.0"?><ASAP_Annotations><Annotations>'
                    + "".join(one(name, ring, number) for number, (name, ring) in enumerate(regions))
                    + '</Annotations><AnnotationGroups><Group Name="Tumor" PartOfGroup="None" Color="#00ff00">'
                    '<Attributes /></Group></AnnotationGroups></ASAP_Annotations>')
    return path


def imagescope(path: Path, layers: list[tuple[str, list[tuple[str, Ring, bool]]]], kind: int = 0,
               described: str = "") -> Path:
    """Layers of (name, regions), regions of (text, ring, whether it cuts)."""
    def one(text: str, ring: Ring, cuts: bool) -> str:
        corners = "".join(f'<Vertex X="{x}" Y="{y}" Z="0"/>' for x, y in ring)
        return (f'<Region Id="1" Type="{kind}" Text="{text}" NegativeROA="{int(cuts)}">'
                f'<Attributes><Attribute Name="Description" Value="of the region"/></Attributes>'
                f'<Vertices>{corners}</Vertices></Region>')

    path = path.with_suffix(".xml")
    path.write_text('<Annotations MicronsPerPixel="0.25">' + "".join(
        f'<Annotation Id="1" Name="{name}" Type="4"><Attributes><Attribute Name="Description" Value="{described}"/>'
        f'</Attributes><Regions><RegionAttributeHeaders><AttributeHeader Id="9999" Name="Region"/>'
        f'</RegionAttributeHeaders>{"".join(one(*region) for region in regions)}</Regions><Plots/></Annotation>'
        for name, regions in layers) + "</Annotations>")
    return path


STAR = [(30 + 24 * math.sin(turn), 24 - 24 * math.cos(turn)) for turn in (0, 2.513, 5.027, 1.257, 3.770)]
HOLE = square(20.3, 15.2, 9.9)
REGIONS: list[tuple[str, Ring, list[Ring]]] = [
    ("stroma", square(-20, -7.5, 45), [HOLE]), ("tumour", [(55, 3), (58.2, 47), (31, 44.4), (44.7, 20)], []),
    ("star", STAR, []), ("tumour", square(50, 40, 10_000), []), ("fat", square(3, 4, 0.2), []),
]


# --- the map


def test_the_map_is_what_the_even_odd_rule_says_of_every_centre(tmp_path: Path) -> None:
    drawn = read(geojson(tmp_path / "a", REGIONS))
    assert drawn.classes == ["stroma", "tumour", "star", "fat"]
    assert drawn.drawn.shape == (50, 60) and drawn.drawn.dtype == np.uint8
    truth = by_loops(REGIONS, 60, 50)
    assert told(drawn, 60, 50) == truth
    assert {word for row in truth for word in row} == {"", "stroma", "tumour", "star"}
    assert truth[24][30] == "", "the middle of a star lies in it twice"
    assert truth[20][25] == "", "a hole"


def test_a_thousand_random_polygons_are_what_the_even_odd_rule_says() -> None:
    rng = np.random.default_rng(0)
    for _ in range(1000):
        ring = rng.uniform(-4, 16, (rng.integers(3, 9), 2))
        if rng.random() < 0.5:
            ring = ring.round()     # corners on the edges of pixels, edges along them
        truth = [[inside(x + 0.5, y + 0.5, ring.tolist()) for x in range(12)] for y in range(10)]
        assert annotation.inside(ring, 12, 10).tolist() == truth


def test_three_formats_of_the_same_regions_are_the_same_map(tmp_path: Path) -> None:
    plain = [("stroma", square(2, 3, 40), []), ("tumour", STAR, []), ("stroma", square(30, 30, 25), [])]
    truth = read(geojson(tmp_path / "a", plain))
    for path in (asap(tmp_path / "a", [(name, ring) for name, ring, _ in plain]),
                 asap(tmp_path / "a", [(name, ring) for name, ring, _ in plain], "Spline"),
                 imagescope(tmp_path / "b", [(name, [("", ring, False)]) for name, ring, _ in plain]),
                 imagescope(tmp_path / "c", [("", [(name, ring, False) for name, ring, _ in plain])])):
        drawn = read(path)
        assert drawn.classes == truth.classes == ["stroma", "tumour"]
        assert (drawn.drawn == truth.drawn).all()
    assert told(truth, 60, 50) == by_loops(plain, 60, 50)


def test_holes_are_holes_in_three_formats(tmp_path: Path) -> None:
    """In all three what lies beneath a hole shows through it; ASAP's Exclusion goes through everything."""
    lower, upper, hole = square(1, 1, 48), square(10, 10, 30), square(15, 15, 12)
    shown = read(geojson(tmp_path / "a", [("stroma", lower, []), ("tumour", upper, [hole])]))
    cut = read(imagescope(tmp_path / "a", [("stroma", [("", lower, False)]),
                                           ("tumour", [("", hole, True), ("", upper, False)])]))
    assert (shown.drawn == cut.drawn).all()
    assert (shown.of(20, 20, 1, 1), shown.of(11, 11, 1, 1)) == ("stroma", "tumour")
    through = read(asap(tmp_path / "a", [("Exclusion", hole), ("stroma", lower), ("tumour", upper)]))
    assert through.classes == ["stroma", "tumour"]
    assert told(through, 60, 50) == by_loops([("stroma", lower, [hole]), ("tumour", upper, [hole])], 60, 50)


def test_a_hole_of_one_layer_is_none_of_another(tmp_path: Path) -> None:
    everywhere, hole = square(0, 0, 50), square(10, 10, 10)
    drawn = read(imagescope(tmp_path / "a", [("b", [("", everywhere, False)]), ("a", [("", hole, True)])]))
    assert drawn.of(10, 10, 10, 1) == "b"


def test_later_regions_lie_over_earlier_ones(tmp_path: Path) -> None:
    regions = [("tumour", square(320, 320, 320), []), ("stroma", square(64, 64, 896), [square(320, 320, 320)]),
               ("fat", square(64, 64, 128), []), ("fat", square(832, 832, 500), []),
               ("outside", square(-900, -900, 800), [])]
    drawn = read(geojson(tmp_path / "a", regions), 1024, 1024, 0.5)
    inner = {(448, 448): "tumour", (80, 80): "fat", (870, 870): "fat", (870, 980): "fat", (980, 870): "fat",
             (980, 980): "fat"}
    for place in ((x, y) for x in (0, 80, 200, 448, 870, 980) for y in (0, 80, 200, 448, 870, 980)):
        ring = "stroma" if all(64 <= edge <= 896 for edge in place) else ""
        assert drawn.of(*place, 64, 0.75) == inner.get(place, ring), place
    assert drawn.of(64 + 16, 320 - 32, 64, 0.9) == "stroma"
    assert drawn.of(320, 320 - 32, 64, 0.75) == "", "half tumour, half stroma"
    assert drawn.of(320, 320 - 32, 64, 0.4) in ("tumour", "stroma")
    assert drawn.covers(320, 320 - 32, 64, 1.0), "and together all of it"


def test_a_tile_of_four_map_pixels_is_measured_to_its_edges(tmp_path: Path) -> None:
    """64 pixels of 0.25 microns on a map of 4: a corner anywhere, and the cover is still that of the square."""
    drawn = read(geojson(tmp_path / "a", [("a", square(160, 160, 320), [])]), 800, 800, 0.25)
    for x in range(60, 500, 7):
        part = max(0, min(x + 64, 480) - max(x, 160)) / 64
        for share in (part - 0.01, part + 0.01):
            assert (drawn.of(x, 200, 64, share) == "a") == (part > max(share, 0)), (x, part, share)
            assert drawn.covers(x, 200, 64, share) == (part > max(share, 0))


def test_nothing_is_never_enough(tmp_path: Path) -> None:
    drawn = read(geojson(tmp_path / "a", [("a", square(0, 0, 10), [])]))
    assert (drawn.of(0, 0, 5, 0.0), drawn.of(30, 30, 5, 0.0)) == ("a", "")
    assert (drawn.covers(0, 0, 5, 0.0), drawn.covers(30, 30, 5, 0.0)) == (True, False)
    for x, y in ((-100, 0), (0, -100), (100, 0), (0, 100), (1e9, 1e9)):
        assert drawn.of(x, y, 5, 0.0) == "" and not drawn.covers(x, y, 5, 0.0)


# --- what has no class


@pytest.mark.parametrize("known", [{}, {"classification": None}, {"classification": {}}, {"name": "ROI 1"},
                                   {"classification": {"name": "Region*"}}])
def test_a_region_without_a_class_is_inside_and_gives_no_label(tmp_path: Path, known: dict) -> None:
    frame = {**feature(None, "Polygon", [square(0, 0, 40)]), "properties": known}
    named = feature("tumour", "Polygon", [square(10, 10, 10)])
    for order in ([frame, named], [named, frame]):
        (tmp_path / "a.geojson").write_text(json.dumps({"features": order}))
        drawn = read(tmp_path / "a.geojson")
        assert drawn.classes == ["tumour"]
        assert (drawn.of(30, 30, 5, 0.5), drawn.covers(30, 30, 5, 1.0)) == ("", True)
        assert (drawn.of(12, 12, 5, 1.0), drawn.covers(12, 12, 5, 1.0)) == ("tumour", True), "a class lies over a frame"
        assert not drawn.covers(45, 45, 4, 0.1)


def test_in_xml_no_name_is_no_class(tmp_path: Path) -> None:
    for path in (imagescope(tmp_path / "a", [("", [("", square(0, 0, 40), False)])]),
                 imagescope(tmp_path / "b", [(" ", [("  ", square(0, 0, 40), False)])]),
                 asap(tmp_path / "c", [("None", square(0, 0, 40))]), asap(tmp_path / "d", [("", square(0, 0, 40))])):
        drawn = read(path)
        assert drawn.classes == [] and drawn.of(0, 0, 40, 0.1) == "" and drawn.covers(0, 0, 40, 1.0)


def test_what_qupath_ignores_is_cut_out(tmp_path: Path) -> None:
    drawn = read(geojson(tmp_path / "a", [("Ignore*", square(10, 10, 10), []), ("tumour", square(0, 0, 40), [])]))
    assert told(drawn, 60, 50) == by_loops([("tumour", square(0, 0, 40), [square(10, 10, 10)])], 60, 50)
    assert not drawn.covers(10, 10, 10, 0.1)


def test_an_imagescope_layer_is_named_before_its_regions_are(tmp_path: Path) -> None:
    regions = [("from the text", square(0, 0, 9), False)]
    assert read(imagescope(tmp_path / "a", [("of the layer", regions)], described="said")).classes == ["of the layer"]
    assert read(imagescope(tmp_path / "a", [("", regions)], described="said")).classes == ["said"]
    assert read(imagescope(tmp_path / "a", [("", regions)])).classes == ["from the text"]


# --- CAMELYON


def test_camelyon16_means_tumour_by_its_older_groups_and_only_its_own_files_do(tmp_path: Path) -> None:
    regions = [("_2", square(15, 15, 10)), ("_0", square(10, 10, 20)), ("_1", square(30, 10, 15))]
    drawn = read(asap(tmp_path / "tumor_014", regions))
    assert drawn.classes == ["Tumor"]
    assert told(drawn, 60, 50) == by_loops([("Tumor", square(10, 10, 20), [square(15, 15, 10)]),
                                            ("Tumor", square(30, 10, 15), [])], 60, 50)
    assert drawn.of(28, 12, 5, 1.0) == "Tumor", "half in _0, half in _1"
    assert read(asap(tmp_path / "slide_14", regions)).classes == ["_2", "_0", "_1"]
    assert read(imagescope(tmp_path / "tumor_014", [("_2", [("", square(0, 0, 9), False)])])).classes == ["_2"]


def test_camelyon17_has_normal_tissue_within_its_metastases(tmp_path: Path) -> None:
    inner, outer = ("normal", square(10, 10, 10)), ("metastases", square(0, 0, 40))
    for regions in ([inner, outer], [outer, inner]):
        drawn = read(asap(tmp_path / "patient_004_node_4", regions))
        assert (drawn.of(10, 10, 10, 1.0), drawn.of(25, 25, 10, 1.0)) == ("normal", "metastases")


# --- shapes


def test_a_multipolygon_and_a_collection_are_one_region_in_pieces(tmp_path: Path) -> None:
    hole = square(3, 3, 4)
    pieces = [[square(0, 0, 10), hole], [square(20, 20, 10)]]
    several = feature("a", "MultiPolygon", pieces)
    collection = {**feature("a", "GeometryCollection", None), "geometry": {"type": "GeometryCollection", "geometries": [
        {"type": "Polygon", "coordinates": rings} for rings in pieces] + [{"type": "Point", "coordinates": [1, 2]}]}}
    truth = by_loops([("a", square(0, 0, 10), [hole]), ("a", square(20, 20, 10), [])], 60, 50)
    for content in ({"features": [several]}, {"features": [collection]}, [several], several):
        (tmp_path / "a.geojson").write_text(json.dumps(content))
        assert told(read(tmp_path / "a.geojson"), 60, 50) == truth


@pytest.mark.parametrize("write", [
    lambda path, corners: asap(path, [("a", corners)], "Rectangle"),
    lambda path, corners: imagescope(path, [("a", [("", corners, False)])], kind=1),
])
def test_a_rectangle_has_two_corners_or_four(tmp_path: Path, write: Callable[[Path, Ring], Path]) -> None:
    for corners in (square(5, 7, 20), [(25, 7), (5, 27)]):
        assert told(read(write(tmp_path / "a", corners)), 60, 50) == by_loops([("a", square(5, 7, 20), [])], 60, 50)


def test_an_ellipse_has_the_area_of_an_ellipse(tmp_path: Path) -> None:
    drawn = read(imagescope(tmp_path / "a", [("mitosis", [("", [(5, 5), (55, 45)], False)])], kind=2))
    assert np.count_nonzero(drawn.drawn) == pytest.approx(math.pi * 25 * 20, rel=0.01)
    assert drawn.of(29, 24, 2, 1.0) == "mitosis" and drawn.of(6, 6, 2, 0.1) == ""


def test_points_lines_arrows_and_what_a_program_found_are_no_regions(tmp_path: Path) -> None:
    cell = feature("a", "Polygon", [square(0, 0, 40)], objectType="cell")
    (tmp_path / "a.geojson").write_text(json.dumps({"features": [
        feature("a", "Point", [1, 2]), feature("a", "LineString", [[1, 2], [30, 40], [5, 6]]), cell,
        feature("a", "Polygon", []), feature("a", "Polygon", [[[1, 1], [9, 9]]]), {**cell, "geometry": None}]}))
    for path in (tmp_path / "a.geojson", asap(tmp_path / "b", [("a", square(0, 0, 40))], "PointSet"),
                 asap(tmp_path / "c", [("a", square(0, 0, 40))], "Measurement"),
                 imagescope(tmp_path / "d", [("a", [("", square(0, 0, 40), False)])], kind=3)):
        drawn = read(path)
        assert drawn.classes == [] and not drawn.covers(0, 0, 40, 0.0)


@pytest.mark.parametrize("text", ['{"features": []}', "[]", "<Annotations/>",
                                  "<ASAP_Annotations><Annotations/><AnnotationGroups/></ASAP_Annotations>"])
def test_a_file_without_a_region_is_legal(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.xml").write_text(text)
    drawn = read(tmp_path / "a.xml")
    assert drawn.classes == [] and drawn.of(0, 0, 60, 0.0) == "" and not drawn.covers(0, 0, 60, 0.0)


def test_words_of_every_language_and_of_two_qupaths_are_classes(tmp_path: Path) -> None:
    several = feature(None, "Polygon", [square(0, 0, 5)], classification={"names": ["Tumor", "Positive"]})
    (tmp_path / "a.geojson").write_bytes(b"\xef\xbb\xbf" + json.dumps({"features": [
        several, feature("Drüse", "Polygon", [square(9, 9, 5)])]}, ensure_ascii=False).encode())
    assert read(tmp_path / "a.geojson").classes == ["Tumor: Positive", "Drüse"]
    path = asap(tmp_path / "b", [("Drüse", square(0, 0, 9))])
    for encoding in ("utf-8", "utf-16", "iso-8859-1"):
        path.write_text(path.read_text("utf-8").replace("?>", f' encoding="{encoding}"?>'), encoding)
        assert read(path).classes == ["Drüse"]
        path = asap(tmp_path / "b", [("Drüse", square(0, 0, 9))])


def test_three_hundred_classes_are_told_apart(tmp_path: Path) -> None:
    drawn = read(geojson(tmp_path / "a", [(f"c{n}", square(n, 0, 1), []) for n in range(300)]), 300, 1)
    assert [drawn.of(n, 0, 1, 1.0) for n in range(300)] == drawn.classes == [f"c{n}" for n in range(300)]
    (tmp_path / "a.geojson").write_text(json.dumps([feature(f"{n}", "Polygon", [square(0, 0, 9)])
                                                    for n in range(65_600)]))
    with pytest.raises(ShardError, match="names 65600 classes, of 65533 at most"):
        read(tmp_path / "a.geojson")


# --- resolution


def test_the_map_has_four_microns_and_never_more_pixels_than_the_slide(tmp_path: Path) -> None:
    path = geojson(tmp_path / "a", REGIONS)
    assert Annotation.read(path, (16_000, 8_001), 0.25).drawn.shape == (501, 1000)
    assert Annotation.read(path, (16_000, 8_001), 0.5).drawn.shape == (1001, 2000)
    assert Annotation.read(path, (100, 80), 8.0).drawn.shape == (80, 100)
    assert Annotation.read(path, (16_000, 8_000), math.nan).drawn.shape == (1000, 2000), "an eighth"


def test_a_slide_of_ten_million_pixels_a_side_has_a_map_that_fits(tmp_path: Path) -> None:
    drawn = Annotation.read(geojson(tmp_path / "a", [("a", square(0, 0, 5_000_000), [])]), (10**7, 10**7), 0.25)
    assert drawn.drawn.size < 2.6e8
    assert (drawn.of(10**6, 10**6, 10**5, 1.0), drawn.of(6 * 10**6, 10**6, 10**5, 0.1)) == ("a", "")


# --- what is damaged, or means harm


BOMB = """<?xml version="1.0"?><!DOCTYPE Annotations [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;">
<!ENTITY c "&b;&b;&b;&b;&b;&b;&b;&b;">]><Annotations><Annotation Name="&c;"/></Annotations>"""
OUTSIDE = '<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]><Annotations>&x;</Annotations>'


@pytest.mark.parametrize(("text", "says"), [
    ("", "it is empty"), ("  \n", "it is empty"), ("{}", "no 'geometry'"), ("{", "JSON|Expecting"), ("[3]", "get"),
    ('{"features": [{}]}', "no 'geometry'"), ('{"features": null}', "NoneType"),
    ("[" * 100_000, "recursion"), ("tumour, 3, 4", "not well-formed|syntax error"), ("\0\0\0\0", "not well-formed"),
    ("<html><body/></html>", "first element is <html>"), ("<Annotations>", "no element found"),
    (BOMB, "DOCTYPE"), (OUTSIDE, "DOCTYPE"),
    (json.dumps(feature("a", "Polygon", [[[0, 0], [math.nan, 1], [1, 1]]])), "x=nan, y=1 is on no slide"),
    (json.dumps(feature("a", "Polygon", [[[0, 0], [math.inf, 1], [1, 1]]])), "x=inf, y=1 is on no slide"),
    (json.dumps(feature("a", "Polygon", [[[0, 0], [1e300, 1], [1, 1]]])), r"x=1e\+300, y=1 is on no slide"),
    (json.dumps(feature("a", "Polygon", [[[0, 0], [10**400, 1], [1, 1]]])), "too large|int"),
    (json.dumps(feature("a", "Polygon", [[[0, 0], ["left", 1], [1, 1]]])), "left"),
    (json.dumps(feature("a", "Polygon", [[[0], [1], [1, 1]]])), "inhomogeneous"),
    (json.dumps(feature("a", "Polygon", [[{"x": 1}]])), "slice|unhashable|KeyError"),
    (json.dumps(feature("a", "Circle", [1, 2])), "geometry of type 'Circle'"),
    ('<Annotations><Annotation><Regions><Region><Vertices><Vertex X="1"/></Vertices></Region></Regions></Annotation>'
     '</Annotations>', "no 'Y'"),
    ('<Annotations><Annotation><Regions><Region><Vertices><Vertex X="1" Y="nan"/></Vertices></Region></Regions>'
     '</Annotation></Annotations>', "y=nan is on no slide"),
    ('<Annotations><Annotation><Regions><Region><Vertices><Vertex X="1" Y="2,5"/></Vertices></Region></Regions>'
     '</Annotation></Annotations>', "2,5"),
])
def test_what_is_no_annotation_is_refused_in_a_line_that_names_it(tmp_path: Path, text: str, says: str) -> None:
    for name in ("a.xml", "a.geojson"):
        (tmp_path / name).write_text(text)
        with pytest.raises(ShardError, match=f"{name} is not an annotation as QuPath.*({says}).*; export it again"
                           ) as caught:
            read(tmp_path / name)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    for data in (b'{"features": "\xff\xfe"}', b"<Annotations Name='\xff'/>", bytes(range(256)) * 9):
        (tmp_path / "a.xml").write_bytes(data)
        with pytest.raises(ShardError, match=r"a\.xml is not an annotation"):
            read(tmp_path / "a.xml")


def test_any_cut_of_a_file_is_refused_and_nothing_else_is_raised(tmp_path: Path) -> None:
    for path in (geojson(tmp_path / "a", REGIONS), asap(tmp_path / "b", [("a", STAR)]),
                 imagescope(tmp_path / "c", [("a", [("", STAR, False)])])):
        whole = path.read_bytes()
        for keep in range(0, len(whole) - 1, 11):
            path.write_bytes(whole[:keep])
            with pytest.raises(ShardError, match="is not an annotation"):
                read(path)


def test_a_file_that_no_person_drew_is_refused_before_it_is_read(tmp_path: Path) -> None:
    with (tmp_path / "a.geojson").open("wb") as handle:
        handle.truncate(200 * 2**20)
    with pytest.raises(ShardError, match=r"has 200 MiB, which no person drew .at most 128.*without the objects"):
        read(tmp_path / "a.geojson")


def test_corners_far_beyond_the_slide_cost_neither_memory_nor_time(tmp_path: Path) -> None:
    """In a process of its own that may not have more than 1 GiB: polygons of 10^9 pixels, and a comb."""
    far = 9e8
    zigzag = [(x / 10, -far if x % 2 else far) for x in range(3000)]
    path = geojson(tmp_path / "a", [("far", square(-far, -far, 1.8 * far), [square(100, 100, 50)]),
                                    ("zigzag", [(-far, 0), (far, far), (far, 10_000)], []), ("comb", zigzag, [])])
    # VmHWM, for ru_maxrss remembers how large the process was that started this one.
    code = (f"import pathlib, re; from shards.annotation import Annotation\n"
            f"drawn = Annotation.read(pathlib.Path({str(path)!r}), (100_000, 100_000), 0.25)\n"
            f"print(drawn.of(90_000, 110, 10, 1.0), drawn.of(60_000, 40_000, 100, 1.0))\n"
            f"print(re.search(r'VmHWM:\\s+(\\d+)', pathlib.Path('/proc/self/status').read_text())[1])")
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path.cwd(),
                          preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (2**30, 2**30)))
    said, peak = done.stdout.splitlines()
    assert said.split() == ["far", "zigzag"]
    assert int(peak) < 800_000 and time.monotonic() - start < 60


# --- finding it


def test_an_annotation_is_found_by_the_name_of_its_slide(tmp_path: Path) -> None:
    slide, folder = tmp_path / "a.b.svs", tmp_path / "drawn"
    folder.mkdir()
    with pytest.raises(ShardError, match=r"none of a\.b\.geojson, a\.b\.xml, a\.b\.json in .*; name their folder with "
                                         r"annotations=.*labels=names"):
        annotation.find(slide, None)
    for name in ("a.b.json", "a.b.xml", "a.b.geojson"):     # what else may be there counts less
        (tmp_path / name).write_text("[]")
        assert annotation.find(slide, None) == tmp_path / name
    with pytest.raises(ShardError, match=f"in {folder}"):
        annotation.find(slide, folder)
    (folder / "a.b.xml").write_text("")
    assert annotation.find(slide, folder) == folder / "a.b.xml"
    with pytest.raises(ShardError, match=r"no annotation at .*gone\.xml"):
        read(tmp_path / "gone.xml")


# --- real data


def test_real_outlines_of_nuclei_cover_what_their_masks_cover(data: Path, tmp_path: Path) -> None:
    """Aperio files of MoNuSeg against the masks that its own authors drew of them.

    A corner that is on the border of a pixel there and in its middle here moves an outline by half a pixel: nuclei of
    about 22 pixels across have a border of 13 % of their area a pixel, so half of that is what may differ, and a tenth
    is allowed. A wrong scale, a shift of two pixels, or a missing region is more.
    """
    paths = sorted((data / "monuseg2018/train/annotations_xml").glob("*.xml.gz"))
    assert len(paths) == 13
    for path in paths:
        name = path.name.removesuffix(".xml.gz")
        plain = tmp_path / f"{name}.xml"
        plain.write_bytes(gzip.decompress(path.read_bytes()))
        mask = np.asarray(Image.open(data / f"monuseg2018/train/masks_binary/{name}.png").convert("L")) > 0
        drawn = Annotation.read(plain, mask.shape[::-1], FINE)
        assert drawn.classes == [] and drawn.drawn.shape == mask.shape
        found = drawn.drawn > 0
        assert (found & mask).sum() / (found | mask).sum() > 0.9, name
        assert found.sum() == pytest.approx(mask.sum(), rel=0.1), name
        for x in range(0, 1000, 250):
            for y in range(0, 1000, 250):
                part = mask[y:y + 250, x:x + 250].mean()
                assert drawn.covers(x, y, 250, part * 0.88) and not drawn.covers(x, y, 250, part * 1.12), (name, x, y)
