"""Faults, drawn at random: each changes one file and says what it did."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

Fault = Callable[[Path, random.Random], str]

# Values that are wrong almost everywhere. None of them asks for a long run where it is right.
VALUES: tuple[Any, ...] = (
    None, True, False, -1, 0, 3, 0.5, -0.0, 1e308, -1e308, float("nan"), float("inf"), "", " ", "x", "0", "1e-5", "nan",
    "null", "~", "~/x", "..", "../escape", "/dev/null", "/proc/self/mem", "a/b", "con\x00trol", "new\nline", "é\u2028ü",
    "[b]x[/b]", "{{ 7*7 }}", "%s%n", "x" * 5000, [], {}, [[]], [None], {"a": {"b": 1}}, [1, "two", {"3": 4}],
)  # fmt: skip
HUGE: tuple[Any, ...] = (10**9, 10**12, 2**63, 10**30, 10**400)  # for what is only looked at
TEXTS = (
    b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 123\n",
    b"<!DOCTYPE html><html><body>404</body></html>\n",
    b"{",
    b"[]",
    b"null",
    b"{}",
    b"\xff\xfe\x00",
    b"\x80\x04\x95",
    b"PK\x03\x04",
    b"- &a [*a]\n",
    b"\n\n\n",
    b"[" * 2000,
)


def any_fault(file: Path, rng: random.Random) -> str:
    """One that suits what the file is, or one that suits any file."""
    by_suffix: dict[str, Fault] = {
        ".json": json_fault,
        ".jsonl": line_fault,
        ".yaml": yaml_fault,
        ".safetensors": tensor_fault,
        ".txt": line_fault,
    }
    own = by_suffix.get(file.suffix)
    return own(file, rng) if own is not None and rng.random() < 0.7 else byte_fault(file, rng)


def byte_fault(file: Path, rng: random.Random) -> str:
    """Of a file as bytes, or of its place in the folder."""
    content = file.read_bytes()
    at = rng.randrange(len(content) + 1)
    match rng.randrange(9):
        case 0:
            file.write_bytes(content[:at])
            return f"cut at {at}"
        case 1:
            file.write_bytes(b"")
            return "empty"
        case 2:
            flipped = bytearray(content or b"\0")
            for _ in range(rng.choice((1, 8))):
                flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
            file.write_bytes(flipped)
            return "bits flipped"
        case 3:
            file.write_bytes(content[:at] + rng.randbytes(rng.choice((1, 64))) + content[at:])
            return f"noise at {at}"
        case 4:
            text = rng.choice(TEXTS)
            file.write_bytes(text)
            return f"is {text[:20]!r}"
        case 5:
            file.unlink()
            return "gone"
        case 6:
            file.unlink()
            file.mkdir()
            return "a folder"
        case 7:
            file.unlink()
            file.symlink_to(file.name)
            return "a link to itself"
        case _:
            file.write_bytes(content + content)
            return "twice"


def line_fault(file: Path, rng: random.Random) -> str:
    """Of a text, line by line; of JSON lines, a value of one."""
    lines = file.read_text(encoding="utf-8").splitlines()
    at = rng.randrange(len(lines)) if lines else 0
    match rng.randrange(4):
        case 0:
            value = rng.choice(VALUES)
            lines[at:at] = [json.dumps(value)]
            done = f"line {at + 1} is {value!r:.40}"
        case 1:
            value = rng.choice(VALUES)
            lines = [json.dumps({"text": value})] * len(lines) if rng.random() < 0.3 else lines
            lines[at : at + 1] = [json.dumps({"text": value, "messages": value})]
            done = f"text is {value!r:.40}"
        case 2:
            lines = lines[:1]
            done = "one line"
        case _:
            lines[at : at + 1] = ["\x00\x1b[31m" + "x" * rng.choice((1, 100_000))]
            done = f"line {at + 1} is odd"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return done


def json_fault(file: Path, rng: random.Random) -> str:
    tree = json.loads(file.read_text(encoding="utf-8"))
    tree, done = tree_fault(tree, rng, (*VALUES, *HUGE[:3]))
    file.write_text(json.dumps(tree), encoding="utf-8")
    return done


def yaml_fault(file: Path, rng: random.Random, values: tuple[Any, ...] = VALUES) -> str:
    """A value of a YAML file, or a piece of syntax beside one."""
    from ruamel.yaml import YAML

    yaml = YAML(typ="safe")
    yaml.allow_unicode = True
    text = file.read_text(encoding="utf-8")
    if rng.random() < 0.3:
        lines, odd = text.splitlines(), rng.choice(SYNTAX)
        at = rng.randrange(len(lines))
        lines[at : at + rng.randrange(2)] = [odd]
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return f"line {at + 1} is {odd[:50]!r}"
    tree, done = tree_fault(yaml.load(text), rng, values)
    written = io.StringIO()
    yaml.dump(tree, written)
    file.write_text(written.getvalue(), encoding="utf-8")
    return done


SYNTAX = (
    "x: !!python/object/apply:os.system ['touch ../canary']",
    "x: !!python/name:os.system",
    "x: !function code.question",
    "<<: *x",
    "<<: {name: y}",
    "x: &x [*x]",
    "\t- x",
    "%YAML 1.1",
    "---",
    "name: a\nname: b",
    "? [a, b]\n: c",
    "x: !!int ten",
    "x: !!binary 'x'",
    "extends: tiny.yaml",
    "extends: ../..",
    "x: " + "[" * 300 + "]" * 300,
    "x: " + "9" * 6000,
    "x: 2001-12-14t21:59:43.10-05:00",
    "x: 1:30:00",
    'x: "\\ud800"',
)


def tree_fault(tree: Any, rng: random.Random, values: tuple[Any, ...]) -> tuple[Any, str]:
    """Replace, remove, rename or add one value somewhere in mappings and lists."""
    places = list(_places(tree, ()))
    if not places:
        value = rng.choice(values)
        return value, f"all of it is {value!r:.40}"
    path = rng.choice(places)
    parent = tree
    for part in path[:-1]:
        parent = parent[part]
    shown, value = ".".join(map(str, path))[:60], rng.choice(values)
    what = rng.choice(("replace", "replace", "replace", "remove", "rename", "add"))
    if what == "remove":
        del parent[path[-1]]
        return tree, f"{shown} removed"
    if what == "rename" and isinstance(parent, dict):
        parent[f"{path[-1]}x"] = parent.pop(path[-1])
        return tree, f"{shown} renamed"
    if what == "add" and isinstance(parent, dict):
        parent["odd key"] = value
        return tree, f"a key beside {shown}"
    parent[path[-1]] = value
    return tree, f"{shown} is {value!r:.40}"


def _places(tree: Any, path: tuple[Any, ...]) -> Any:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from _places(value, (*path, key))


def tensor_fault(file: Path, rng: random.Random) -> str:
    """One tensor of a safetensors file: its values, dtype, shape or name."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    tensors = load_file(file)
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    name = rng.choice(sorted(tensors))
    tensor = tensors.pop(name)
    changes: dict[str, Callable[[], Any]] = {
        "gone": lambda: None,
        "empty": lambda: tensor.new_empty(0),
        "scalar": lambda: tensor.reshape(-1)[:1].reshape(()),
        "longer": lambda: torch.cat([tensor.reshape(-1)] * 2),
        "another axis": lambda: tensor[None],
        "float64": tensor.double,
        "int8": lambda: tensor.float().clamp(-100, 100).to(torch.int8),
        "bfloat16": tensor.bfloat16,
        "bool": tensor.bool,
        "zero": lambda: torch.zeros_like(tensor),
        "negative": lambda: -tensor.float() if tensor.is_floating_point() else tensor,
        "NaN": lambda: torch.full(tensor.shape, float("nan")),
        "infinite": lambda: torch.full(tensor.shape, float("inf")),
        "255": lambda: torch.full(tensor.shape, 255, dtype=torch.uint8),
    }
    done = rng.choice(sorted(changes))
    changed = changes[done]()
    if changed is not None:
        tensors[name] = changed.contiguous()
    save_file(tensors, file, metadata)
    return f"{name} is {done}"
