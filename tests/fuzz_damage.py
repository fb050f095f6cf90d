"""How `fuzz_cli` damages command lines and files: every choice comes from a seeded generator."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import random
import re
import shutil
from pathlib import Path

from dalle.cli import COMMANDS, load_target
from dalle.configs import field_types
from dalle.files import to_json
from dalle.options import option_names

NUMBERS = ["nan", "inf", "-inf", "1e999", "-1", "0", "1", "2", "3", "1.5", "-0.0", "1e-320",
           "99999999999999999999", "9" * 5000, "0x10", "1_0", "\u0661", "\u00bd",
           "1e9"]  # fmt: skip
SIZES = ["4", "8", "16", "17", "32", "64", "100", "1000", "4096", "16384", "65536", "1000000",
         "1000000000", "2147483648", "9223372036854775807", "9223372036854775808"]  # fmt: skip
NASTY = [
    *NUMBERS, "", " ", "true", "None", "null", "[]", "{}", "a" * 300, "a" * 9000, "/dev/zero",
    "a/" * 2000,
    "/dev/full", "/dev/null", "/proc/self/mem", "pipe.fifo", "sock", "loop",
    "dangling", "caf\udce9", "\u00e9\u5706\U0001f469", "\x1b[2J\x07", "\u202egnp", "a\nb", "a\rb",
    "--", "-", "---", "-x", "-h", "--help", "--out", "--out=", "--=", "=", "@file",
    "--config", "--config=options.yaml", "--no-", "shapes", "emoji", "file", "empty", "broken",
    "bombs", "odd", "pairs", "pipe", "tok", "cut", "badtok", "pipe/vae", "run-prior", "cuda",
    "cuda:99", "meta", "cpu:-1", "nonsense", "--seed", "--json", "\0", "a\0b", "=1", "x=y",
]  # fmt: skip
VALUES = [None, True, False, -1, 0, 1, 3, 1.5, 1e308, 10**30, float("nan"), "x", "", "\ud800", [],
          {}, [[]], [1, 2], {"a": 1}, "a" * 9000, 2**31, 65536, "Prior", [None]]  # fmt: skip
LONG = {
    "--accumulate",
    "--image-size",
    "--steps",
    "--dvae-steps",
    "--ranker-steps",
    "--prior-steps",
    "--num-samples",
    "--count",
    "--limit",
    "--columns",
    "--num-candidates",
    "--batch-size",
}

SHORT = {  # without these a command of few words is a whole training, or draws hundreds
    ("train",): "--dvae-steps 2 --ranker-steps 2 --prior-steps 2 --num-samples 1",
    ("demo",): "--preset smoke",
    ("reproduce",): "--only figure_10",
    ("dvae", "train"): "--steps 2",
    ("prior", "train"): "--steps 2",
    ("ranker", "train"): "--steps 2",
    ("data", "make-shapes"): "--count 3",
    ("eval", "overlap"): "--steps 2",
    ("eval", "rerank"): "--num-candidates 2",
}


def nasty_for(option: str, rng: random.Random, verb: tuple[str, ...] = ()) -> str:
    """A bad value, mostly one that its type takes; none that makes the work long."""
    types = option_types(load_target(verb)[1]) if verb in COMMANDS else {}
    wanted = str(types.get(option.strip("-").replace("-", "_"), ""))
    numeric = "int" in wanted or "float" in wanted
    pool = [n for n in NUMBERS if "float" in wanted or re.fullmatch(r"-?\d+", n)] + SIZES
    while True:
        value = rng.choice(pool if numeric and rng.random() < 0.8 else NASTY)
        if option not in LONG or not re.fullmatch(r"[1-9][\d_]{2,9}|1e9", value):
            return value


def option_types(config_type: type) -> dict[str, object]:
    """Name -> annotation of all options, those of inner dataclasses too."""
    found: dict[str, object] = {}
    for name, wanted in field_types(config_type).items():
        inner = dataclasses.is_dataclass(wanted)
        found |= option_types(wanted) if inner else {name: wanted}
    return found


def verb_of(words: list[str]) -> tuple[str, ...]:
    return tuple(words[:2]) if tuple(words[:2]) in COMMANDS else tuple(words[:1])


def damage_words(words: list[str], rng: random.Random) -> None:
    verb = verb_of(words)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        place = rng.randrange(len(words) + 1) if words else 0
        kind = rng.choice(["option"] * 5 + ["value", "value", "drop", "twice", "put"])
        if kind == "option" and verb in COMMANDS:
            option = f"--{rng.choice(sorted(option_names(load_target(verb)[1])))}"
            value = nasty_for(option, rng, verb)
            words += rng.choice([[option, value]] * 4 + [[f"{option}={value}"], [option]])
        elif kind == "value" and place < len(words):
            words[place] = nasty_for(words[place - 1], rng, verb)
        elif kind == "drop" and place < len(words):
            del words[place]
        elif kind == "twice" and place < len(words):
            words.insert(place, words[place])
        else:
            words.insert(place, nasty_for("", rng))
    shorten(words)


def shorten(words: list[str]) -> None:
    """Says how much work it is where the words left, of another command perhaps, do not."""
    given, said = SHORT.get(verb_of(words), "").split(), {word.partition("=")[0] for word in words}
    for option, value in zip(given[::2], given[1::2], strict=True):
        words += [option, value] if option not in said else []
    if words[:1] == ["eval"] and said & {"shapes", "emoji"} and "--count" not in said:
        words += ["--count", "8"]  # of 20,000


def leaves(value: object, path: tuple = ()) -> list[tuple]:
    """Paths of all values inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    found = []
    for key, inner in items:
        found.append((*path, key))
        if isinstance(inner, (dict, list)):
            found += leaves(inner, (*path, key))
    return found


def damage_json(data: bytes, rng: random.Random) -> bytes:
    value = json.loads(data)
    if not isinstance(value, (dict, list)) or rng.random() < 0.1:
        return json.dumps(rng.choice(VALUES)).encode()
    for _ in range(rng.choice([1, 1, 2])):
        paths = leaves(value)
        if not paths:
            break
        *before, last = rng.choice(paths)
        holder = value
        for key in before:
            holder = holder[key]
        kind = rng.randrange(4)
        if kind == 0:
            del holder[last]
        elif kind == 1 and isinstance(holder, dict):
            holder[rng.choice(["x", "class", ""])] = rng.choice(VALUES)
        else:
            holder[last] = rng.choice(VALUES)
    return json.dumps(value).encode()


def damage_bytes(data: bytes, path: Path, rng: random.Random) -> bytes:
    place = rng.randrange(len(data) + 1)
    kind = rng.randrange(8)
    if path.suffix in (".json", ".jsonl") and rng.random() < 0.7:
        with contextlib.suppress(ValueError):
            if path.suffix == ".json":
                return damage_json(data, rng)
            lines = data.splitlines(keepends=True)
            at = rng.randrange(len(lines))
            lines[at] = damage_json(lines[at], rng) + rng.choice([b"\n", b""])
            return b"".join(lines)
    if kind == 0:
        return data[:place]
    if kind == 1:
        return data[:place] + rng.randbytes(rng.choice([1, 8, 300])) + data[place:]
    if kind == 2:
        return data[:place] + bytes([rng.randrange(256)]) + data[place + 1 :]
    if kind == 3:
        return rng.randbytes(rng.choice([0, 1, 8, 1000]))
    if kind == 4:
        return rng.choice([b"[", b'{"a":', b"\xff\xfe", b"\xef\xbb\xbf", b"\0"]) * 20_000
    if kind == 5:
        return data + data
    if kind == 6:
        return data.decode("latin-1").encode("utf-16")
    return data[:place] + b"\x1b[2J\r\n\0" + data[place:]


YAML = [
    "&a [*a, *a]", "!!int x", "!!float ''", "!!timestamp x", "!!bool x", "2001-99-99", "!!set {a}",
    "!!binary x", "{a: b}", "[1, [2]]", "!!python/name:os.system", "0o9", "1:99:99", "'\\0'",
    "\"\\0\"", "\"\\ud800\"", "~", "", "|\n  two\n  lines", "!!omap [a]", "<<: 3", "9" * 5000,
]  # fmt: skip


def damage_yaml(line: list[str], path: Path, rng: random.Random) -> None:
    names = sorted(option_names(load_target(verb_of(line))[1]))
    rows = []
    for _ in range(rng.choice([1, 2, 5])):
        name = rng.choice([*names, "recipe", "cluster", "x", "? [a]", "1", "~"])
        value = rng.choice(YAML) if rng.random() < 0.6 else json.dumps(rng.choice(VALUES))
        rows.append(f"{name.replace('-', '_')}: {value}")
    rows = [
        row
        for row in rows
        if not (
            f"--{row.partition(':')[0].replace('_', '-')}" in LONG and re.search(r": \d{3}", row)
        )
    ]
    path.unlink()
    path.write_text("\n".join(rows), encoding="utf-8", errors="surrogatepass")


def forge(path: Path) -> None:
    """Makes the hash that guards a damaged file fit it again, so that its readers see it."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
        if path.name == "manifest.json":
            manifest = json.loads(path.read_bytes())
            manifest.pop("sha256", None)
            digest = hashlib.sha256(to_json(manifest)).hexdigest()
            rewrite(path, to_json({**manifest, "sha256": digest}))
            return
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        key = {"tokenizer.json": "tokenizer_sha256", "model.safetensors": "weights_sha256"}
        head = path.with_name("config.json")
        if path.name in key and head.exists():
            rewrite(head, to_json({**json.loads(head.read_bytes()), key[path.name]: digest}))
        manifest = path.with_name("manifest.json")
        if manifest.exists():
            whole = json.loads(manifest.read_bytes())
            whole["files"][path.name] = {"sha256": digest, "bytes": path.stat().st_size}
            rewrite(manifest, to_json(whole))
            forge(manifest)


def rewrite(path: Path, data: bytes) -> None:
    """A new file: the old one may be a hard link to that of the next case."""
    path.unlink()
    path.write_bytes(data)


def damage_out(folder: Path, rng: random.Random) -> str:
    """Puts something in the way of what a command writes."""
    names = ["metrics.jsonl", "training.lock", "pictures", "model", "prior", "step-00000002", "",
             "config.json", "tokenizer.json", "samples.json", "00-word.png", "00-word", "pairs",
             "scores.json", "sorted.png", "sheet.png", "x.png", "vae", "model.safetensors",
             "step-00000002.tmp-00000000", "facts.json"]  # fmt: skip
    name = rng.choice(names)
    path = folder / "out" / name if name else folder / "out"
    path.parent.mkdir(exist_ok=True)
    kind = rng.randrange(6)
    if kind == 0:
        os.mkfifo(path)
    elif kind == 1:
        path.symlink_to(rng.choice(["/dev/full", "/dev/zero", "nowhere", path.name, ".."]))
    elif kind == 2:
        (path / "inside").mkdir(parents=True)
    elif kind == 3:
        path.write_bytes(rng.randbytes(100))
    elif kind == 4:
        path.touch()
        os.truncate(path, 1 << 40)
    else:
        path.write_text(json.dumps(rng.choice(VALUES)))
    return f"out/{name} ({kind})"


def damage_file(words: list[str], folder: Path, rng: random.Random) -> str:
    """Damages a file that the command would read; says what and how."""
    named = [folder / word for word in words if "\0" not in word and len(word) < 99]
    roots = [p for p in named if p.exists() and p != folder and not p.is_relative_to("/dev")]
    files = sorted({f for r in roots for f in ([r] if r.is_file() else r.rglob("*"))})
    files = [f for f in files if f.is_relative_to(folder) and not f.is_symlink()]
    if not files:
        return "nothing"
    weighty = [f for f in files if f.suffix in (".json", ".jsonl", ".yaml", ".safetensors")]
    path = rng.choice(weighty if weighty and rng.random() < 0.7 else files)
    said = str(path.relative_to(folder))
    if path.name == "options.yaml":
        damage_yaml(words, path, rng)
        return said
    data = path.read_bytes() if path.is_file() else b""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    kind = rng.randrange(12)
    if kind == 0:
        os.mkfifo(path)
    elif kind == 1:
        path.symlink_to(rng.choice(["/dev/zero", "/dev/full", "/dev/null", "nowhere", path.name]))
    elif kind == 2:
        path.mkdir()
    elif kind == 3:
        path.touch()
        os.truncate(path, 1 << 40)
    elif kind > 4:  # 4 leaves it missing
        path.write_bytes(damage_bytes(data, path, rng))
        if rng.random() < 0.5:
            forge(path)
    return f"{said} ({kind})"
