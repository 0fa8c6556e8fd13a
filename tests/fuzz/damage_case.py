"""What can happen to a file's bytes: one to four edits of it, or of one member of a zip."""

from __future__ import annotations

import io
import json
import random
import zipfile
from collections.abc import Callable
from typing import Any

Edit = Callable[[bytearray, random.Random], bytearray]


def flip(content: bytearray, rng: random.Random) -> bytearray:
    for _ in range(rng.choice([1, 1, 2, 8])):
        if content:
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return content


def cut(content: bytearray, rng: random.Random) -> bytearray:
    at = rng.randrange(len(content) + 1)
    return content[:at] if rng.random() < 0.5 else content[at:]


def splice(content: bytearray, rng: random.Random) -> bytearray:
    a, b, c = (rng.randrange(len(content) + 1) for _ in range(3))
    a, b = sorted((a, b))
    return (
        content[:c] + content[a:b] + content[c:]
        if rng.random() < 0.5
        else content[:a] + content[b:]
    )


def put(content: bytearray, rng: random.Random) -> bytearray:
    """What numbers and counts in files are made of."""
    at = rng.randrange(len(content) + 1)
    word = rng.choice(
        [
            b"\xff" * rng.choice([1, 2, 4, 8]),
            b"\0" * rng.choice([1, 2, 4, 8]),
            b"\x7f",
            b"99999999999",
            b"-1",
            b"1e999",
            b"NaN",
            b"[",
            b'"',
            b"}",
            b")",
            b"\n",
            b"../",
            rng.randbytes(rng.randrange(1, 9)),
        ]
    )
    return content[:at] + word + content[at + len(word) * rng.randrange(2) :]


def other_value(content: bytearray, rng: random.Random) -> bytearray:
    """A JSON value for another one; other bytes get flipped."""
    try:
        found = json.loads(bytes(content))
    except ValueError:
        return flip(content, rng)
    holders = list(containers(found))
    if not holders:
        return content
    holder = rng.choice(holders)
    keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
    word = rng.choice(
        [
            None,
            True,
            -1,
            0,
            2**70,
            1.5,
            float("inf"),
            "",
            "x",
            "../x",
            [],
            {},
            [[]],
            {"a": 1},
            [0.5] * 3,
        ]
    )
    what = rng.randrange(3)
    if keys and what == 0:
        del holder[rng.choice(keys)]
    elif keys and what == 1:
        holder[rng.choice(keys)] = word
    elif isinstance(holder, dict):
        holder[rng.choice(["surprise", "n", "files"])] = word
    else:
        holder.append(word)
    return bytearray(json.dumps(found).encode())


def containers(value: Any) -> Any:
    if isinstance(value, (dict, list)):
        if value:
            yield value
        for item in value.values() if isinstance(value, dict) else value:
            yield from containers(item)


EDITS: list[Edit] = [flip, cut, splice, put, other_value]


def damaged(content: bytes, members_too: bool, rng: random.Random) -> bytes:
    edits = rng.choices(EDITS, k=rng.choice([1, 1, 1, 2, 4]))
    if not members_too or rng.random() < 0.4:
        for edit in edits:
            content = bytes(edit(bytearray(content), rng))
        return content
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = rng.choice(list(members))
    if rng.random() < 0.1:
        del members[name]
    else:
        for edit in edits:
            members[name] = bytes(edit(bytearray(members[name]), rng))
    made = io.BytesIO()
    with zipfile.ZipFile(
        made, "w", rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
    ) as archive:
        for key, value in members.items():
            archive.writestr(key, value)
    return made.getvalue()
