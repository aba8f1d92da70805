"""Damages to files and configs: functions of a random generator that tell what they did."""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

Place = tuple[str | int, ...]

# Values that people and programs put in the wrong place.
JUNK: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 3.7, -0.5, 10**9, 10**30, -(10**30), math.nan, math.inf),
    *(-math.inf, "", "   ", [], [1], [None], {}, {"a": 1}, "日本語 😀 é", "a\x00b", "\x1b[31m\x07"),
    *("data", "data/rows.jsonl", "no/such/place", datetime.date(2024, 1, 31), "null", "1e3", "7"),
    *("x" * 5000, "two\nlines", "~", "{text}", "-", "true"),
)
LFS = (
    "version https://git-lfs.github.com/spec/v1\n"
    "oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\n"
    "size 12345\n"
)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Damage:
    """A change of a file; of a config also the key that was changed, and its value now."""

    file: str
    kind: str
    told: str
    key: Place = ()
    value: Any = None


def damage_file(folder: Path, file: str, rng: random.Random) -> Damage:
    """Damage one file of a folder."""
    path = folder / file
    kinds: dict[str, Callable[[Path, random.Random], str]] = dict(_BYTES)
    if path.suffix == ".json":
        # As often as all kinds of damage to its bytes.
        kinds |= dict.fromkeys((f"value {number}" for number in range(len(_BYTES))), _damage_json)
    elif path.suffix == ".jsonl":
        kinds |= dict.fromkeys((f"value {number}" for number in range(5)), _damage_line)
        kinds["half a line"] = _half_line
    elif path.suffix == ".safetensors":
        kinds |= {"header": _damage_header, "no numbers": _damage_weights}
    elif path.suffix == ".parquet":
        kinds |= {"column": _damage_column}
    elif path.suffix in (".npy", ".npz"):
        kinds |= {"array": _damage_array}
    kind = rng.choice(list(kinds))
    told = kinds[kind](path, rng)
    return Damage(file=file, kind=kind, told=f"{file}: {told}")


def _flip(path: Path, rng: random.Random) -> str:
    data = bytearray(path.read_bytes())
    places = (
        sorted(rng.randrange(len(data)) for _ in range(rng.choice((1, 1, 1, 4)))) if data else []
    )
    for place in places:
        data[place] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    return f"bits flipped in bytes {places}"


def _cut(path: Path, rng: random.Random) -> str:
    data = path.read_bytes()
    end = rng.randrange(len(data)) if data else 0
    path.write_bytes(data[:end])
    return f"cut to {end} of {len(data)} bytes"


def _zeros(path: Path, rng: random.Random) -> str:
    data = bytearray(path.read_bytes())
    start = rng.randrange(len(data)) if data else 0
    end = min(len(data), start + rng.choice((1, 16, 512, 4096)))
    data[start:end] = bytes(end - start)
    path.write_bytes(data)
    return f"zeros in bytes {start} to {end}"


def _insert(path: Path, rng: random.Random) -> str:
    data = path.read_bytes()
    place = rng.randrange(len(data) + 1)
    new = rng.choice((b"\xff", b"\x00", b"}", b"0", rng.randbytes(7), b"\n", b"\xef\xbb\xbf"))
    path.write_bytes(data[:place] + new + data[place:])
    return f"{new!r} inserted at {place}"


def _empty(path: Path, rng: random.Random) -> str:
    path.write_bytes(b"")
    return "emptied"


def _delete(path: Path, rng: random.Random) -> str:
    path.unlink()
    return "deleted"


def _pointer(path: Path, rng: random.Random) -> str:
    path.write_text(LFS)
    return "replaced by a Git LFS pointer"


def _folder(path: Path, rng: random.Random) -> str:
    path.unlink()
    path.mkdir()
    return "replaced by a folder"


def _swap(path: Path, rng: random.Random) -> str:
    others = [
        other
        for other in sorted(path.parent.iterdir())
        if other.is_file() and other != path and other.read_bytes() != path.read_bytes()
    ]
    if not others:
        return _pointer(path, rng)
    other = rng.choice(others)
    shutil.copy2(other, path)
    return f"replaced by {other.name}"


_BYTES = {
    "flipped bits": _flip,
    "cut": _cut,
    "zeros": _zeros,
    "inserted": _insert,
    "emptied": _empty,
    "deleted": _delete,
    "LFS pointer": _pointer,
    "a folder": _folder,
    "swapped": _swap,
}


def places_of(tree: Any, at: Place = ()) -> Iterator[Place]:
    """Paths of all values of a tree of mappings and lists."""
    if isinstance(tree, dict | list):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield (*at, key)
            yield from places_of(value, (*at, key))


def value_at(tree: Any, at: Place) -> Any:
    for part in at:
        tree = tree[part]
    return tree


def _pick(tree: Any, rng: random.Random) -> Place:
    """A place in a tree; as often near its top as deep inside."""
    places = list(places_of(tree))
    shallow = [place for place in places if len(place) <= 2]
    return rng.choice(rng.choice((places, shallow)))


def _json_junk(rng: random.Random) -> Any:
    return rng.choice([value for value in JUNK if not isinstance(value, datetime.date)])


def damage_tree(tree: Any, rng: random.Random) -> str:
    """Change one value or key of a JSON tree in place; the tree must hold something."""
    place = _pick(tree, rng)
    parent, key = value_at(tree, place[:-1]), place[-1]
    name = ".".join(map(str, place))
    kind = rng.choice(("drop", "rename", "junk", "junk", "junk"))
    if kind == "drop":
        del parent[key]
        return f"{name} dropped"
    if kind == "rename" and isinstance(parent, dict):
        parent[f"{key}x"] = parent.pop(key)
        return f"{name} misspelt"
    parent[key] = _json_junk(rng)
    return f"{name} = {parent[key]!r:.60}"


def _damage_json(path: Path, rng: random.Random) -> str:
    tree = json.loads(path.read_text())
    if not tree or not isinstance(tree, dict | list) or rng.random() < 0.1:
        top = _json_junk(rng)
        path.write_text(json.dumps(top))
        return f"{top!r:.60} at the top"
    told = damage_tree(tree, rng)
    path.write_text(json.dumps(tree, indent=1, ensure_ascii=False))
    return told


def _damage_line(path: Path, rng: random.Random) -> str:
    lines = path.read_text().splitlines()
    number = rng.randrange(len(lines)) if lines else 0
    if not lines:
        return _pointer(path, rng)
    row = json.loads(lines[number])
    told = damage_tree(row, rng)
    lines[number] = json.dumps(row, ensure_ascii=False)
    path.write_text("\n".join(lines) + "\n")
    return f"line {number + 1}: {told}"


def _half_line(path: Path, rng: random.Random) -> str:
    lines = path.read_text().splitlines()
    if not lines:
        return _pointer(path, rng)
    number = rng.randrange(len(lines))
    lines[number] = lines[number][: rng.randrange(1, len(lines[number]))]
    path.write_text("\n".join(lines) + "\n")
    return f"line {number + 1} cut"


def _damage_header(path: Path, rng: random.Random) -> str:
    """Change the JSON in front of a safetensors file, with a length that fits it."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    tree = json.loads(data[8 : 8 + size])
    told = damage_tree(tree, rng)
    header = json.dumps(tree).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + size :])
    return f"header: {told}"


def _damage_weights(path: Path, rng: random.Random) -> str:
    """Put NaN or infinity into the tensors."""
    data = bytearray(path.read_bytes())
    first = 8 + int.from_bytes(data[:8], "little")
    if first + 4 > len(data):
        return _pointer(path, rng)
    new = rng.choice((b"\x00\x00\xc0\x7f", b"\x00\x00\x80\x7f"))
    for place in range(first, len(data) - 3, 4 * rng.choice((1, 50, 5000))):
        data[place : place + 4] = new
    path.write_bytes(data)
    return f"tensors hold {'NaN' if new[2] == 0xC0 else 'infinity'}"


def _damage_column(path: Path, rng: random.Random) -> str:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(path, use_threads=False)
    name = rng.choice(table.column_names)
    at, count = table.column_names.index(name), len(table)
    kinds: dict[str, Any] = {
        "numbers": pa.array(range(count)),
        "nulls": pa.nulls(count),
        "null strings": pa.nulls(count, pa.string()),
        "lists": pa.array([[1]] * count),
        "mappings": pa.array([{"a": 1}] * count),
        "dates": pa.array([datetime.date(2024, 1, 31)] * count),
        "bytes": pa.array([b"\xff\xfe"] * count),
        "empty strings": pa.array([""] * count),
    }
    kind = rng.choice(["dropped", "misspelt", *kinds])
    if kind == "dropped":
        table = table.drop_columns([name])
    elif kind == "misspelt":
        table = table.rename_columns([f"{n}x" if n == name else n for n in table.column_names])
    else:
        table = table.set_column(at, name, kinds[kind])
    pq.write_table(table, path)
    return f"column {name}: {kind}"


def _damage_array(path: Path, rng: random.Random) -> str:
    """Another shape, type or values, well-formed."""
    import numpy as np

    if path.suffix == ".npz":
        with np.load(path) as file:
            arrays = dict(file)
        name = rng.choice(sorted(arrays))
    else:
        arrays, name = {"": np.load(path)}, ""
    array = arrays[name]
    extreme = np.iinfo(array.dtype).max if array.dtype.kind in "iu" else np.nan
    changed: dict[str, Any] = {
        "half": array[: len(array) // 2],
        "as float64": array.astype(np.float64),
        "as strings": array.astype(str),
        "one dimension": array.reshape(-1),
        "empty": array[:0],
        "large": np.full_like(array, extreme),
    }
    kind = rng.choice([*changed, *(["dropped"] if name else [])])
    arrays.pop(name)
    if kind != "dropped":
        arrays[name] = changed[kind]
    if path.suffix == ".npz":
        np.savez(path.with_suffix(""), **arrays)
    else:
        np.save(path, arrays[name])
    return f"array {name}: {kind}"


def damage_config(folder: Path, file: str, rng: random.Random) -> Damage:
    """Drop, double, misspell or junk one key of a YAML or JSON config."""
    path = folder / file
    tree = yaml.safe_load(path.read_text())
    place = _pick(tree, rng)
    parent, key = value_at(tree, place[:-1]), place[-1]
    name = ".".join(map(str, place))
    kind = rng.choice(("dropped", "doubled", "misspelt", "added", *["junk"] * 8))
    value: Any = None
    if kind in ("misspelt", "added", "doubled") and not isinstance(parent, dict):
        kind = "junk"
    if kind == "dropped":
        del parent[key]
    elif kind == "misspelt":
        parent[f"{key}s"] = parent.pop(key)
    elif kind == "added":
        parent["surprise"] = value = rng.choice(JUNK)
    elif kind == "junk":
        parent[key] = value = rng.choice(JUNK)
    text = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=10**6)
    if kind == "doubled":
        value = rng.choice([parent[key], *JUNK])
        again = yaml.safe_dump(
            {"again": value}, allow_unicode=True, default_flow_style=True, width=10**6
        )
        text = _doubled(tree, place, again.strip()[len("{again: ") : -1])
    path.write_text(text)
    told = f"{file}: {name} {kind}" + (f" {value!r:.60}" if kind != "dropped" else "")
    return Damage(file=file, kind=f"key {kind}", told=told, key=place, value=value)


def _doubled(tree: Any, place: Place, again: str) -> str:
    """The YAML text with a key of `place` given twice, the second time with another value."""
    mark = "doubled-here"
    value_at(tree, place[:-1])[mark] = 0
    text = yaml.safe_dump(
        tree, sort_keys=False, allow_unicode=True, default_flow_style=True, width=10**6
    )
    return text.replace(f"{mark}: 0", f"{place[-1]}: {again}", 1)
