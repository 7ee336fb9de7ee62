"""Changes of a directory of files with a manifest: each says which files may be named for it."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

from ekfac_dist.factors.layout import MANIFEST


def stored(store: Path) -> list[str]:
    return sorted(str(p.relative_to(store)) for p in store.rglob("*") if p.is_file())


def cut(store: Path, draw: random.Random) -> list[str]:
    file = draw.choice(stored(store))
    content = (store / file).read_bytes()
    (store / file).write_bytes(content[: draw.randrange(len(content))])
    return [file]


def lengthen(store: Path, draw: random.Random) -> list[str]:
    file = draw.choice(stored(store))
    with (store / file).open("ab") as opened:
        opened.write(draw.randbytes(draw.randint(1, 100)))
    return [file]


def flip(store: Path, draw: random.Random) -> list[str]:
    file = draw.choice([*stored(store), *[MANIFEST] * 6])
    content = bytearray((store / file).read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    (store / file).write_bytes(content)
    return [file]


def scribble(store: Path, draw: random.Random) -> list[str]:
    file = draw.choice(stored(store))
    content = bytearray((store / file).read_bytes())
    start = draw.randrange(len(content))
    end = min(len(content), start + draw.randint(1, 64))
    content[start:end] = draw.randbytes(end - start)
    (store / file).write_bytes(content)
    return [file]


def swap(store: Path, draw: random.Random) -> list[str]:
    one, other = draw.sample(stored(store), 2)
    contents = (store / one).read_bytes(), (store / other).read_bytes()
    (store / one).write_bytes(contents[1])
    (store / other).write_bytes(contents[0])
    return [one, other]


def copy_over(store: Path, draw: random.Random) -> list[str]:
    one, other = draw.sample(stored(store), 2)
    shutil.copyfile(store / one, store / other)
    return [other]


def remove(store: Path, draw: random.Random) -> list[str]:
    file = draw.choice(stored(store))
    (store / file).unlink()
    return [file]


def edit(store: Path, draw: random.Random) -> list[str]:
    """Changes one value of the manifest, or takes it out."""
    manifest = json.loads((store / MANIFEST).read_text())
    holder: Any = manifest
    while True:
        key = draw.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
        inner = holder[key]
        if not isinstance(inner, (dict, list)) or not inner or draw.random() < 0.1:
            break
        holder = inner
    if draw.random() < 0.3:
        del holder[key]
    else:
        others = [None, 3, -1.5, "x", [], {}, True, {"a": {"b": []}}, 10**40]
        holder[key] = draw.choice([value for value in others if value != inner])
    (store / MANIFEST).write_text(json.dumps(manifest))
    return [MANIFEST, str(store)]
