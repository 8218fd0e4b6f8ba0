"""Values from YAML files and the command line, held against a dataclass: every mistake at once, each with its place.

OmegaConf reads and merges; this file is the layer that OmegaConf lacks: ranges, choices, rules across fields, `None`
written as a word, and the nearest right name for a mistyped key. A field's metadata says what may stand there:
range=(low, high), choices=(...), pattern="regex", exists=True, regex=True, one=True (of a list: one value stands for a
list of one), expand=function (of what was written, before it is looked at), help="...".
"""

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

COMMAND_LINE = "command line"
MISSING = "???"


class ConfigError(ValueError):
    """One or more mistakes in a config, a line each."""

    exit_code = 2

    def __init__(self, problems: list[str]):
        super().__init__(problems)
        self.problems = problems

    def __str__(self) -> str:
        return "\n".join(self.problems)


def load(schema: type, file: Path | None, overrides: list[str]) -> Any:
    """An instance of `schema` from a YAML file and key=value words, or a ConfigError that lists all that is wrong."""
    values, places = read(schema, file, overrides)
    return build(schema, values, places, where=str(file) if file else COMMAND_LINE)


def read(schema: type, file: Path | None, overrides: list[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """What a file and key=value words say, as nested dictionaries, and where each key was written."""
    values, places = _file(file) if file else ({}, {})
    problems = []
    for word in overrides:
        name, equals, _ = word.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_][\w.]*", name):
            problems.append(f"{word!r} is not key=value; write, for example, seed=1")
            continue
        try:
            text = word.partition("=")[2]
            if _is_text(schema, name, text) and text not in ("null", MISSING):
                given = _nested(name, _unquoted(text))      # as typed: YAML would see a comment in "a #2"
            else:
                given = typing.cast(dict, OmegaConf.to_container(OmegaConf.from_dotlist([word])))
            values = _merge(values, given)
        except (OmegaConfBaseException, yaml.YAMLError) as error:
            problems.append(f"{word!r} cannot be read as key=value ({_first_line(error)})")
            continue
        places[name] = COMMAND_LINE
    if problems:
        raise ConfigError(problems)
    try:
        values = typing.cast(dict, OmegaConf.to_container(OmegaConf.create(values), resolve=True))
    except OmegaConfBaseException as error:
        raise ConfigError([f"{file}: {_first_line(error)}"]) from None
    return values, places


def build(schema: type, values: dict[str, Any], places: dict[str, str] | None = None, *, where: str,
          prefix: str = "") -> Any:
    """An instance of the dataclass `schema` from nested dictionaries; `places` says where each key was written."""
    reader = _Reader(places or {}, where, schema, prefix)
    instance = reader.dataclass(schema, values, prefix)
    if reader.problems:
        raise ConfigError(reader.problems)
    if broken := list(_rules(instance, prefix)):
        # A rule is about several values; whoever typed one of them must not be sent to the file alone.
        typed = where != COMMAND_LINE and COMMAND_LINE in (places or {}).values()
        raise ConfigError([f"{rule} [{COMMAND_LINE + ', ' if typed else ''}{where}]" for rule in broken])
    return instance


def dump(instance: Any) -> str:
    """The resolved tree as YAML that `load` reads back."""
    return OmegaConf.to_yaml(OmegaConf.create(plain(instance)))


def plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _file(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The content of a YAML file, and for every key the line it stands on."""
    try:
        text = path.read_text(encoding="utf-8")
        values = OmegaConf.to_container(OmegaConf.create(text)) if text.strip() else {}
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except OSError as error:
        raise ConfigError([f"{path} cannot be read: {error.strerror}"]) from None
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ConfigError([f"{path} is not YAML: {_first_line(error)}"]) from None
    if not isinstance(values, dict):
        raise ConfigError([f"{path} holds a {type(values).__name__}, not keys and values"])
    return typing.cast(dict, values), {key: f"{path}:{line}" for key, line in _lines(node, "")}


def _lines(node: Any, prefix: str) -> Iterator[tuple[str, int]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield prefix + str(key.value), key.start_mark.line + 1
            yield from _lines(value, f"{prefix}{key.value}.")


def _merge(base: dict[str, Any], over: Any) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _is_text(schema: type, name: str, text: str) -> bool:
    """Whether a dotted key names a path or a word, or several words of which one stands there, in no brackets."""
    hint: Any = schema
    for part in name.split("."):
        hints = typing.get_type_hints(hint) if dataclasses.is_dataclass(hint) else {}
        fields = {field.name: field for field in dataclasses.fields(hint)} if hints else {}
        hint = hints.get(part)
    if hint == list[str] and fields[part].metadata.get("one"):
        return not (text.startswith("[") and text.endswith("]"))
    return hint in (str, Path) or (typing.get_origin(hint) in (types.UnionType, typing.Union)
                                   and bool({str, Path} & set(typing.get_args(hint))))


def _nested(name: str, value: Any) -> dict[str, Any]:
    for part in reversed(name.split(".")):
        value = {part: value}
    return value


def _unquoted(text: str) -> str:
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" else text


def _rules(instance: Any, prefix: str) -> Iterator[str]:
    if hasattr(instance, "rules"):
        yield from (f"{prefix}{rule}" for rule in instance.rules())
    for field in dataclasses.fields(instance):
        value = getattr(instance, field.name)
        if dataclasses.is_dataclass(value):
            yield from _rules(value, f"{prefix}{field.name}.")
        elif isinstance(value, list | tuple):
            for number, item in enumerate(value):
                if dataclasses.is_dataclass(item):
                    yield from _rules(item, f"{prefix}{field.name}[{number}].")


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split("\n    full_key")[0].split())


def _kind(value: Any) -> str:
    return {bool: "yes/no", int: "a whole number", float: "a number", str: "a word", list: "a list", dict: "a group",
            type(None): "nothing"}.get(type(value), type(value).__name__)


class _Reader:
    """Walks values and types side by side and collects what does not fit."""

    def __init__(self, places: dict[str, str], where: str, schema: type, prefix: str):
        self.places, self.where, self.problems = places, where, []      # type: ignore[var-annotated]
        self.known = list(_keys(schema, prefix))

    def problem(self, key: str, value: Any, text: str) -> None:
        place, parent = self.places.get(key), re.sub(r"\[\d+\]", "", key)
        place = place or self.places.get(parent)
        while place is None and "." in parent:
            parent = parent.rpartition(".")[0]
            place = self.places.get(parent)
        place = place or self.where
        if any(name.startswith(f"{parent}.") and typed == COMMAND_LINE for name, typed in self.places.items()):
            place = COMMAND_LINE        # of a group that is wrong as a whole, a part was typed
        place = f"{place}, {self.where}" if place == COMMAND_LINE and self.where != COMMAND_LINE else place
        shown = f"={value!r}" if not isinstance(value, dict) else ""
        self.problems.append(f"{key}{shown} {text} [{place}]")

    def dataclass(self, schema: type, values: Any, prefix: str) -> Any:
        if not isinstance(values, dict):
            self.problem(prefix.rstrip("."), values, f"is {_kind(values)}, but holds keys: "
                         f"{', '.join(field.name for field in dataclasses.fields(schema))}")
            return None
        fields = {field.name: field for field in dataclasses.fields(schema)}
        for name in values:
            if name not in fields:
                self.problem(f"{prefix}{name}", values[name], f"is not a key{self._nearest(schema, prefix, str(name))}")
        hints = typing.get_type_hints(schema)
        result = {}
        for name, field in fields.items():
            key = prefix + name
            if name in values and values[name] != MISSING:
                before = len(self.problems)
                given = values[name]
                if field.metadata.get("one") and isinstance(given, str if hints[name] == list[str] else int | float):
                    given = [given]         # one value stands for a list of one
                if "expand" in field.metadata:
                    try:
                        given = field.metadata["expand"](given)
                    except ValueError as error:
                        self.problem(key, {}, f"cannot be taken: {error}")
                        continue
                result[name] = self.value(hints[name], given, key)
                if len(self.problems) == before:
                    self.limits(field.metadata, result[name], key)
            elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
                if dataclasses.is_dataclass(hints[name]):
                    result[name] = self.dataclass(typing.cast(type, hints[name]), {}, f"{key}.")
                    continue
                hint = f" ({field.metadata['help']})" if "help" in field.metadata else ""
                self.problems.append(f"{key} is not set{hint}; give {key}=... [{self.where}]")
        return schema(**result) if not self.problems else None

    def _nearest(self, schema: type, prefix: str, name: str) -> str:
        known = self.known if any(key.startswith(prefix) for key in self.known) else list(_keys(schema, prefix))
        mine = {key[len(prefix):].lower(): key for key in known if key.startswith(prefix)}
        everywhere = {key.lower(): key for key in self.known} | {key.rpartition(".")[2].lower(): key
                                                                 for key in self.known}
        for names in ({key: full for key, full in mine.items() if "." not in key}, everywhere):
            if close := difflib.get_close_matches(name.lower(), names, n=1):
                return f"; did you mean {names[close[0]]}?"
        siblings = sorted(full for key, full in mine.items() if "." not in key)
        return f"; known here: {', '.join(siblings)}" if siblings else ""

    def value(self, hint: Any, value: Any, key: str) -> Any:
        origin, arguments = typing.get_origin(hint), typing.get_args(hint)
        if hint is Any:
            return value
        if origin in (types.UnionType, typing.Union):
            if value is None and type(None) in arguments:
                return None
            if str in arguments and Path in arguments and isinstance(value, str) and "://" in value:
                return value        # a URL: a path would lose one of its slashes
            return self.value(next(each for each in arguments if each is not type(None)), value, key)
        if isinstance(value, str) and value.lower() in ("none", "null", "nil"):
            return self.problem(key, value, "is a word here; for nothing at all write null")
        if dataclasses.is_dataclass(hint):
            return self.dataclass(typing.cast(type, hint), value, f"{key}.")
        if origin in (list, tuple):
            return self._sequence(origin, arguments, value, key)
        if origin is dict:
            return value if isinstance(value, dict) else self.problem(key, value, f"is {_kind(value)}, needs a group")
        return self._leaf(hint, value, key)

    def _sequence(self, origin: Any, arguments: tuple[Any, ...], value: Any, key: str) -> Any:
        if not isinstance(value, list | tuple):
            return self.problem(key, value, f"is {_kind(value)}, needs a list such as {key}=[a,b]")
        if origin is tuple and arguments[-1] is not Ellipsis and len(value) != len(arguments):
            return self.problem(key, value, f"has {len(value)} items, needs {len(arguments)}")
        return origin(self.value(arguments[0], item, f"{key}[{number}]") for number, item in enumerate(value))

    def _leaf(self, hint: Any, value: Any, key: str) -> Any:
        wanted = {bool: "true or false", int: "a whole number", float: "a number", str: "a word", Path: "a path"}[hint]
        if hint is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        right = isinstance(value, str if hint is Path else hint) and not (hint is int and isinstance(value, bool))
        if not right:
            return self.problem(key, value, f"is {_kind(value)}, needs {wanted}"
                                + ("; put it in quotes" if hint is str and isinstance(value, int | float) else ""))
        if isinstance(value, float) and not math.isfinite(value):
            return self.problem(key, value, "is not a finite number")
        if hint is Path and not value:
            return self.problem(key, value, "is empty, needs a path")
        return Path(value).expanduser() if hint is Path else value

    def limits(self, allowed: Any, value: Any, key: str) -> None:
        if isinstance(value, list | tuple):
            if not value and allowed.get("some"):
                self.problem(key, value, "is empty; name at least one")
            for number, item in enumerate(value):
                self.limits(allowed, item, f"{key}[{number}]")
            return
        if value is None:
            return
        if "range" in allowed:
            low, high = allowed["range"]
            if not low <= value <= high:
                self.problem(key, value, f"is out of range; allowed: {low} to {high}")
        if "choices" in allowed and value not in allowed["choices"]:
            close = difflib.get_close_matches(str(value).lower(), allowed["choices"], n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            self.problem(key, value, f"is not one of {', '.join(map(repr, allowed['choices']))}{hint}")
        if "pattern" in allowed and not re.fullmatch(allowed["pattern"], value):
            self.problem(key, value, f"must match {allowed['pattern']}")
        if allowed.get("exists") and isinstance(value, Path) and not value.exists():
            self.problem(key, str(value), f"does not exist (looked in {Path.cwd()}){allowed.get('otherwise', '')}")
        if allowed.get("regex"):
            try:
                re.compile(value)
            except re.error as error:
                self.problem(key, value, f"is not a regular expression: {error}")


def _keys(schema: type, prefix: str) -> Iterator[str]:
    hints = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        yield prefix + field.name
        if dataclasses.is_dataclass(hints[field.name]):
            yield from _keys(hints[field.name], f"{prefix}{field.name}.")
