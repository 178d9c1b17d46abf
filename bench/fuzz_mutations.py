"""Random changes to files: to bytes, to documents of keys and values, to protobuf messages."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

_HUGE_VARINT = b"\xff\xff\xff\xff\xff\xff\xff\xff\x7f"
_LENGTHS = (b"\x00", b"\x7f", b"\xff\xff\x03", b"\xff\xff\xff\xff\x07", _HUGE_VARINT)

LONG_NAME = "n" * 10_000
NAMES = (
    "",
    "x",
    "0",
    ".",
    "../secret.bin",
    "/etc/hostname",
    "secret.bin\0",
    "a/b\\c",
    "\N{SNOWMAN}é\N{GRINNING FACE}",
    "\N{RIGHT-TO-LEFT OVERRIDE}abc",
    "\x1b[31m[bold]",
    "%s{0}",
    LONG_NAME,
)
NUMBERS = (0, 1, -1, 2, 7, 127, 255, 256, 2**31 - 1, 2**31, -(2**31), 2**62, 2**63 - 1, -(2**63))
REALS = (0.0, -0.0, 1e-45, 1e-38, 3.5e38, 1e308, -1.5, math.inf, -math.inf, math.nan)

# Text that stands in a document as it is: what a writer of JSON or TOML would not write.
_RAW = (
    "[" * 300 + "]" * 300,
    "[" * 50_000,
    "[" * 50_000 + "]" * 50_000,
    '{"a":' * 2000 + "1" + "}" * 2000,
    "9" * 5000,
    "-" + "9" * 400,
    "1e999",
    "NaN",
    "nan",
    "inf",
    "0x1f",
    "1979-05-27T07:32:00Z",
    '"\\ud800"',
    '"\\u0000"',
    "true",
    "null",
)
_PLACE = "@raw{}@"


def mutate_bytes(content: bytes, others: Sequence[bytes], random: Random) -> bytes:
    """One to eight changes.

    Args:
        content: of a file.
        others: files to splice with.
        random: where choices come from.
    """
    data = bytearray(content)
    for _ in range(random.choice((1, 1, 1, 2, 3, 8))):
        random.choice(_CHANGES)(data, others, random)
    return bytes(data)


def _place(data: bytearray, random: Random) -> int:
    return random.randrange(len(data) + 1)


def _span(data: bytearray, random: Random) -> slice:
    start = _place(data, random)
    longest = random.choice((1, 4, 32, 512, len(data)))
    return slice(start, start + random.randint(0, longest))


def _flip(data: bytearray, others: Sequence[bytes], random: Random) -> None:
    if data:
        data[random.randrange(len(data))] ^= 1 << random.randrange(8)


def _set(data: bytearray, others: Sequence[bytes], random: Random) -> None:
    if data:
        data[random.randrange(len(data))] = random.choice((0, 1, 127, 128, 255))


def _truncate(data: bytearray, others: Sequence[bytes], random: Random) -> None:
    del data[_place(data, random) :]


def _delete(data: bytearray, others: Sequence[bytes], random: Random) -> None:
    del data[_span(data, random)]


def _duplicate(data: bytearray, others: Sequence[bytes], random: Random) -> None:
    copied = data[_span(data, random)]
    place = _place(data, random)
    data[place:place] = copied


def _insert(data: bytearray, others: Sequence[bytes], random: Random) -> None:
    place = _place(data, random)
    data[place:place] = random.randbytes(random.choice((1, 2, 8, 64)))


def _splice(data: bytearray, others: Sequence[bytes], random: Random) -> None:
    other = bytearray(random.choice(others))
    data[_span(data, random)] = other[_span(other, random)]


def _length(data: bytearray, others: Sequence[bytes], random: Random) -> None:
    """A number of protobuf, such as the length of what follows, becomes another."""
    place = _place(data, random)
    data[place : place + 1] = random.choice(_LENGTHS)


_CHANGES: tuple[Callable[[bytearray, Sequence[bytes], Random], None], ...] = (
    _flip,
    _set,
    _truncate,
    _delete,
    _duplicate,
    _insert,
    _splice,
    _length,
)


# -------------------------------------------------------------------------------------- documents


def mutate_document(document: Any, random: Random) -> Any:
    """A copy of nested dictionaries and lists with one to four changes."""
    document = copy.deepcopy(document)
    for _ in range(random.choice((1, 1, 2, 4))):
        parents = list(_containers(document))
        if not parents:
            break
        _change_container(random.choice(parents), random)
    return document


def _containers(document: Any) -> list[dict[str, Any] | list[Any]]:
    """Every dictionary and list that holds anything, the outermost first."""
    found: list[dict[str, Any] | list[Any]] = []
    waiting = [document]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict | list) and item:
            found.append(item)
            waiting += item.values() if isinstance(item, dict) else item
    return found


def _change_container(parent: dict[str, Any] | list[Any], random: Random) -> None:
    keys: list[Any] = list(parent) if isinstance(parent, dict) else list(range(len(parent)))
    key: Any = random.choice(keys)
    change = random.randrange(8)
    if change == 0:
        del parent[key]
    elif change == 1 and isinstance(parent, dict):
        parent[random.choice(NAMES)] = parent.pop(key)
    elif change == 1 and isinstance(parent, list):
        parent += [parent[key]] * random.choice((1, 100))
    elif change == 2:
        parent[key] = copy.deepcopy(parent[random.choice(keys)])
    elif change == 3 and isinstance(parent[key], int | float):
        parent[key] += random.choice((-1, 1, 0.5))
    else:
        parent[key] = _value(random)


def _value(random: Random) -> Any:
    kinds: tuple[Sequence[Any], ...] = (
        NAMES,
        NUMBERS,
        REALS,
        (True, [], {}, [[]], {"": {}}, [1, "x"]),
    )
    if random.random() < 0.3:
        return _PLACE.format(random.randrange(len(_RAW)))
    return copy.deepcopy(random.choice(random.choice(kinds)))


def to_json(document: Any) -> bytes:
    """A document as JSON, with what ``mutate_document`` wants to stand there as it is."""
    return _with_raw(json.dumps(document, ensure_ascii=False))


def to_toml(document: dict[str, Any]) -> bytes:
    """A document as TOML, a line for each key of the outermost table."""
    lines = [f"{_toml_key(key)} = {_toml(value)}" for key, value in document.items()]
    return _with_raw("\n".join(lines) + "\n")


def _toml_key(key: str) -> str:
    return json.dumps(key, ensure_ascii=False)


def _toml(value: Any) -> str:
    match value:
        case dict():
            rows = (f"{_toml_key(key)} = {_toml(item)}" for key, item in value.items())
            return "{" + ", ".join(rows) + "}"
        case list() | tuple():
            return "[" + ", ".join(map(_toml, value)) + "]"
        case float() if not math.isfinite(value):
            return str(value)
    return json.dumps(value, ensure_ascii=False)


def _with_raw(text: str) -> bytes:
    return re.sub(r'"@raw(\d+)@"', lambda match: _RAW[int(match[1])], text).encode()


# --------------------------------------------------------------------------------------- messages


def mutate_message(message: Any, random: Random) -> None:
    """One to four changes to fields anywhere in a protobuf message, in place."""
    for _ in range(random.choice((1, 1, 2, 4))):
        _change_field(_inner(message, random), random)


def _inner(message: Any, random: Random) -> Any:
    """A message somewhere within one: the way down is drawn step by step."""
    while True:
        children = [
            (field, value)
            for field, value in message.ListFields()
            if field.type == field.TYPE_MESSAGE
        ]
        if not children or random.random() < 0.1:
            return message
        field, value = random.choice(children)
        message = random.choice(value) if field.is_repeated else value


def _change_field(message: Any, random: Random) -> None:
    present = message.ListFields()
    fields = message.DESCRIPTOR.fields
    field = (
        random.choice(present)[0] if present and random.random() < 0.8 else random.choice(fields)
    )
    if field.is_repeated:
        _change_repeated(message, field, random)
    elif field.type == field.TYPE_MESSAGE:
        if random.random() < 0.5:
            message.ClearField(field.name)
        else:
            getattr(message, field.name).SetInParent()
    elif random.random() < 0.1:
        message.ClearField(field.name)
    else:
        setattr(message, field.name, _scalar(field, random))


def _change_repeated(message: Any, field: Any, random: Random) -> None:
    items = getattr(message, field.name)
    change = random.randrange(5)
    if not items or change == 0:
        if field.type == field.TYPE_MESSAGE:
            items.add()
        else:
            items.append(_scalar(field, random))
    elif change == 1:
        del items[random.randrange(len(items))]
    elif change == 2:  # the same twice
        items.extend([items[random.randrange(len(items))]])
    elif change == 3 and len(items) > 1:  # another order
        shuffled = list(items)
        first, second = random.sample(range(len(items)), 2)
        shuffled[first], shuffled[second] = shuffled[second], shuffled[first]
        shuffled = [copy.deepcopy(item) for item in shuffled]
        del items[:]
        items.extend(shuffled)
    elif field.type == field.TYPE_MESSAGE:
        index, other = (random.randrange(len(items)) for _ in range(2))
        items[index].CopyFrom(copy.deepcopy(items[other]))
    else:
        items[random.randrange(len(items))] = _scalar(field, random)


def _scalar(field: Any, random: Random) -> Any:
    kind = field.cpp_type
    if kind == field.CPPTYPE_STRING and field.type == field.TYPE_BYTES:
        return random.choice((b"", b"\xff", b"nearest", random.randbytes(16), bytes(10_000)))
    if kind == field.CPPTYPE_STRING:
        return random.choice((*NAMES, "weights.bin", "Identity", "MatMul", "If", "Constant"))
    if kind in (field.CPPTYPE_FLOAT, field.CPPTYPE_DOUBLE):
        return random.choice(REALS)
    numbers = [*NUMBERS, *range(40)]
    if kind == field.CPPTYPE_ENUM:
        return random.choice([value.number for value in field.enum_type.values])
    if kind in (field.CPPTYPE_INT32,):
        numbers = [number for number in numbers if -(2**31) <= number < 2**31]
    if kind in (field.CPPTYPE_UINT32, field.CPPTYPE_UINT64):
        numbers = [number for number in numbers if 0 <= number < 2**31]
    return random.choice(numbers)
