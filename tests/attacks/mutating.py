"""Seeded random mutations of bytes, of JSON values, of their spelling, and of zip files."""

from __future__ import annotations

import copy
import hashlib
import io
import json
import zipfile
from collections.abc import Callable
from random import Random
from typing import Any

from mamba_int.files import canonical_json
from zk.field import PRIME

Mutation = Callable[[Random, bytes], bytes]


def edited_bytes(random: Random, raw: bytes) -> bytes:
    """One to four bytes or runs of bytes flipped, set, inserted, removed, copied, swapped or cut off."""
    content = bytearray(raw)
    for _ in range(random.randint(1, 4)):
        here, there = sorted(random.randrange(len(content) + 1) for _ in range(2))
        there = min(there, here + random.choice((1, 2, 32, 64)))
        run = content[here:there]
        kind = random.choice(("flip", "set", "insert", "remove", "copy", "swap", "cut"))
        if kind == "flip" and run:
            content[here] ^= 1 << random.randrange(8)
        elif kind == "set":
            content[here:there] = random.choice((b"\0", b"\xff", b"0", b"9")) * len(run)
        elif kind == "insert":
            content[here:here] = random.randbytes(random.choice((1, 2, 32)))
        elif kind == "remove":
            del content[here:there]
        elif kind == "copy":
            target = random.randrange(len(content) + 1)
            content[target:target] = run
        elif kind == "swap" and here + 2 <= len(content):
            content[here], content[here + 1] = content[here + 1], content[here]
        elif kind == "cut" and random.random() < 0.1:
            del content[here:]
    return bytes(content)


# -- JSON values -----------------------------------------------------------------------------------------


def _places(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of everything inside a JSON value."""
    keys = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    found = [(value, key) for key in keys]
    return found + [place for container, key in found for place in _places(container[key])]


def _other_number(random: Random, number: int | float) -> Any:
    return random.choice(
        (
            number + 1,
            number - 1,
            -number,
            -number - 1,
            number * 2,
            number + random.getrandbits(random.choice((4, 64, 253))),
            int(number) + PRIME,
            int(number) - PRIME,
            float(number) + 0.5,
            float(number),
            str(number),
            bool(number),
            [number],
            None,
        )
    )


def _other_text(random: Random, text: str) -> Any:
    here = random.randrange(len(text) + 1)
    letter = random.choice("0123456789abcdefABCDEF")
    return random.choice(
        (
            text[:here] + letter + text[here + 1 :],
            text[:here] + letter + text[here + 1 :],
            text[:here] + text[here + 2 :],
            text[:here] + letter * random.choice((1, 2, 64)) + text[here:],
            text[64:] + text[:64],
            text[:here],
            text.upper(),
            text[::-1],
            text + " ",
            "\u202e" + text,
            random.randbytes(len(text) // 2).hex(),
            0,
            None,
        )
    )


def _other_list(random: Random, items: list[Any]) -> Any:
    changed = list(items)
    kind = random.choice(("swap", "remove", "repeat", "reverse", "empty", "append", "wrap"))
    if kind == "swap" and len(changed) > 1:
        i, j = random.sample(range(len(changed)), 2)
        changed[i], changed[j] = changed[j], changed[i]
    elif kind == "remove" and changed:
        del changed[random.randrange(len(changed))]
    elif kind == "repeat" and changed:
        changed.append(random.choice(changed))
    elif kind == "reverse":
        changed.reverse()
    elif kind == "append":
        changed.append(random.choice((0, 1, None, "", [], {})))
    elif kind == "wrap":
        changed = [changed]
    else:
        changed = []
    return changed


def _other_object(random: Random, fields: dict[str, Any]) -> Any:
    changed = dict(fields)
    kind = random.choice(("swap", "remove", "rename", "add", "add", "empty", "list"))
    names = sorted(changed)
    if kind == "swap" and len(names) > 1:
        a, b = random.sample(names, 2)
        changed[a], changed[b] = changed[b], changed[a]
    elif kind == "remove" and names:
        del changed[random.choice(names)]
    elif kind == "rename" and names:
        name = random.choice(names)
        changed[random.choice((name.upper(), name + "_", name[:-1], ""))] = changed.pop(name)
    elif kind == "add":
        changed[random.choice(("anchor", "extra", "version ", "__proto__", "\u0000"))] = random.choice(
            (0, [], [0])
        )
    elif kind == "list":
        return list(changed.values())
    else:
        changed = {}
    return changed


def edited_value(random: Random, value: Any) -> Any:
    """A copy of a JSON value with one or two places in it changed."""
    changed = {"root": copy.deepcopy(value)}
    for _ in range(random.choice((1, 1, 1, 2))):
        container, key = random.choice(_places(changed))
        held = container[key]
        if isinstance(held, bool) or held is None:
            container[key] = random.choice((True, False, None, 0, 1, "true"))
        elif isinstance(held, int | float):
            container[key] = _other_number(random, held)
        elif isinstance(held, str):
            container[key] = _other_text(random, held)
        elif isinstance(held, list):
            container[key] = _other_list(random, held)
        else:
            container[key] = _other_object(random, held)
    return changed["root"]


def edited_proof(random: Random, raw: bytes) -> bytes:
    """A proof file whose content is changed, in canonical form."""
    return canonical_json(edited_value(random, json.loads(raw))) + b"\n"


# -- other spellings of the same JSON --------------------------------------------------------------------


def _respell_number(random: Random, text: str) -> str:
    starts = [i for i in range(1, len(text)) if text[i].isdigit() and text[i - 1] in ":[,"]
    start = random.choice(starts)
    end = next(i for i in range(start, len(text)) if not text[i].isdigit())
    number = text[start:end]
    after = ("e0", "E+00", "0e-1", ".0", "n", "_0")
    before = ("0", "+", "-", "0x")
    others = ("NaN", "Infinity", "-Infinity", "1e999", "-0", "9" * 5000)
    spelled = random.choice(
        [*(number + tail for tail in after), *(head + number for head in before), *others]
    )
    return text[:start] + spelled + text[end:]


def _respell_letter(random: Random, text: str) -> str:
    here = random.choice([i for i, letter in enumerate(text) if letter.isalnum()])
    return text[:here] + f"\\u{ord(text[here]):04x}" + text[here + 1 :]


def _repeat_key(random: Random, text: str) -> str:
    here = random.choice([i for i, letter in enumerate(text) if letter == "{"])
    end = text.index(":", here)
    key = text[here + 1 : end]
    return text[: here + 1] + f"{key}:{random.choice(('0', '[]', 'null', '{}'))}," + text[here + 1 :]


def _space(random: Random, text: str) -> str:
    here = random.choice([i for i, letter in enumerate(text) if letter in '{}[],:"'])
    return text[:here] + random.choice((" ", "\t", "\n", "\r", "\u00a0", "\ufeff", "/**/")) + text[here:]


def _reorder(random: Random, text: str) -> str:
    items = list(json.loads(text).items())
    random.shuffle(items)
    return json.dumps(dict(items), separators=(",", ":")) + "\n"


def respelled(random: Random, raw: bytes) -> bytes:
    """The same JSON, or what a lax parser would take for it, in other bytes."""
    text = raw.decode()
    way = random.choice((_respell_number, _respell_letter, _repeat_key, _space, _space, _reorder))
    changed = way(random, text)
    if random.random() < 0.05:
        return changed.encode(random.choice(("utf-16", "utf-8-sig", "utf-32-le")))
    return changed.encode()


# -- zip files -------------------------------------------------------------------------------------------


def unzipped(raw: bytes) -> dict[str, bytes]:
    """The members of a zip."""
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def zipped(members: dict[str, bytes], **options: Any) -> bytes:
    """A zip with our metadata unless ``options`` say otherwise."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in members.items():
            info = zipfile.ZipInfo(name, options.get("date", (1980, 1, 1, 0, 0, 0)))
            info.create_system = options.get("system", 3)
            info.external_attr = options.get("mode", 0o644) << 16
            info.compress_type = options.get("compression", zipfile.ZIP_STORED)
            info.comment = options.get("comment", b"")
            info.extra = options.get("extra", b"")
            archive.writestr(info, data)
        archive.comment = options.get("archive_comment", b"")
    return buffer.getvalue()


_OPTIONS: tuple[dict[str, Any], ...] = (
    {"compression": zipfile.ZIP_DEFLATED},
    {"compression": zipfile.ZIP_BZIP2},
    {"compression": zipfile.ZIP_LZMA},
    {"date": (2001, 2, 3, 4, 5, 6)},
    {"mode": 0o120777},
    {"system": 0},
    {"comment": b"x"},
    {"archive_comment": b"x"},
    {"extra": b"\x99\x99\x02\0xx"},
)


def rezipped(random: Random, raw: bytes) -> bytes:
    """A valid zip of changed members, names, order or metadata."""
    members = unzipped(raw)
    name = random.choice(list(members))
    kind = random.choice(("content", "content", "rename", "remove", "add", "order", "swap", "metadata"))
    if kind == "content":
        members[name] = edited_bytes(random, members[name])
    elif kind == "rename":
        other = random.choice(
            (name.upper(), f"../{name}", f"/{name}", f"{name} ", f"{name}/", f"./{name}", "")
        )
        members = {other if key == name else key: data for key, data in members.items()}
    elif kind == "remove":
        del members[name]
    elif kind == "add":
        members[random.choice(("x", "../x", "card.json/x", "proof.json"))] = random.randbytes(
            random.randrange(99)
        )
    elif kind == "order":
        names = list(members)
        random.shuffle(names)
        members = {key: members[key] for key in names}
    elif kind == "swap":
        other = random.choice(list(members))
        members[name], members[other] = members[other], members[name]
    options = random.choice(_OPTIONS) if kind == "metadata" or random.random() < 0.1 else {}
    return zipped(members, **options)


def _hashed(members: dict[str, bytes]) -> dict[str, Any]:
    """The card with the true hashes of the other members."""
    card: dict[str, Any] = json.loads(members["card.json"])
    card["settings_sha256"] = hashlib.sha256(members["settings.json"]).hexdigest()
    card["vk_sha256"] = hashlib.sha256(members["vk.key"]).hexdigest()
    card["srs"]["verifying_sha256"] = hashlib.sha256(members["verifying.srs"]).hexdigest()
    return card


def consistent(random: Random, raw: bytes) -> bytes:
    """A package of other content in canonical form, whose card names the right hashes, if it still can."""
    members = unzipped(raw)
    name = random.choice(list(members))
    if name == "settings.json":
        members[name] = canonical_json(edited_value(random, json.loads(members[name])))
    elif name != "card.json":
        members[name] = edited_bytes(random, members[name])
    card = _hashed(members)
    members["card.json"] = canonical_json(edited_value(random, card) if name == "card.json" else card)
    return zipped(members)


def respelled_inside(random: Random, raw: bytes) -> bytes:
    """A package whose card or settings are spelled otherwise, with the right hashes."""
    members = unzipped(raw)
    if random.random() < 0.5:
        members["settings.json"] = respelled(random, members["settings.json"])
        members["card.json"] = canonical_json(_hashed(members))
    else:
        members["card.json"] = respelled(random, members["card.json"])
    return zipped(members)
