"""What all inputs share: frozen, validated by pydantic, readable from and writable to JSON-able data.

``@input_type`` makes a class a frozen pydantic dataclass whose errors are `InvalidInput` messages that name the
field, the value and the rule.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import cache, wraps
from numbers import Real
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast, dataclass_transform, get_args, get_type_hints

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from fluidopt.errors import InvalidInput

T = TypeVar("T")


def _not_bool(value: Any) -> Any:
    """Refuse true and false, which Python would take for 1 and 0."""
    if isinstance(value, bool):
        raise ValueError(f"must be a number; got {value!r}")
    return value


def _in_range(value: float) -> float:
    """Refuse sizes whose products and quotients could leave the range of floating point."""
    if abs(value) > LARGEST:
        raise ValueError(f"must be at most {LARGEST:g} in size; got {value!r}")
    return value


def _divisor(value: float) -> float:
    """Refuse a number above 0 that is so small that nothing can be divided by it."""
    if 0.0 < value < SMALLEST:
        raise ValueError(f"must be at least {SMALLEST:g}; got {value!r}")
    return value


_Number = BeforeValidator(_not_bool)
_Size = AfterValidator(_in_range)
MOST = 10**9
"""Largest count of anything that comes in whole numbers."""
SMALLEST, LARGEST = 1e-30, 1e30
"""Sizes that other numbers may have: whatever the unit, nothing that is measured lies outside."""
Finite = Annotated[float, Field(allow_inf_nan=False), _Number, _Size]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False), _Number, _Size, AfterValidator(_divisor)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False), _Number, _Size]
PositiveInt = Annotated[int, Field(ge=1, le=MOST), _Number]
NonNegativeInt = Annotated[int, Field(ge=0, le=MOST), _Number]
Name = Annotated[str, Field(min_length=1, max_length=200)]

MOST_BYTES = 1 << 28
"""Size of a file that is read as a whole: that of a scenario of a million classes."""
MOST_FAULTS = 20
"""Faults of an input that a message names."""

_CONFIG = ConfigDict(extra="forbid", use_attribute_docstrings=True)

_RULES: Mapping[str, str] = {
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "finite_number": "must be a finite number",
    "float_parsing": "must be a number",
    "float_type": "must be a number",
    "int_parsing": "must be a whole number",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "string_type": "must be a text",
    "string_too_short": "must not be empty",
    "string_too_long": "must have at most {max_length} characters",
    "union_tag_invalid": "must have {discriminator} among {expected_tags}",
    "union_tag_not_found": "must have {discriminator}, which says what it is",
    "bool_parsing": "must be true or false",
    "bool_type": "must be true or false",
    "dict_type": "must be a table",
    "model_attributes_type": "must be a table of fields",
    "too_short": "must have at least {min_length} entry",
    "literal_error": "must be {expected}",
    "tuple_type": "must be a list",
}
_REQUIRED = {"missing", "missing_argument", "missing_keyword_only_argument"}
_TYPES: set[str] = set()
_UNKNOWN = {"extra_forbidden", "unexpected_keyword_argument"}


@dataclass_transform(frozen_default=True)
def input_type(cls: type[T]) -> type[T]:
    """Make ``cls`` a frozen pydantic dataclass that raises `InvalidInput`."""
    made: Any = dataclass(frozen=True, config=_CONFIG)(cls)
    _TYPES.add(cls.__name__)
    _TYPES.update(field.default for field in fields(made) if field.name == "kind" and isinstance(field.default, str))
    validate: Callable[..., None] = made.__init__

    @wraps(validate)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            validate(self, *args, **kwargs)
        except ValidationError as error:
            label = args[0] if args else kwargs.get("name")
            raise InvalidInput(explain(error, cls, label=label)) from None

    made.__init__ = __init__
    return cast(type[T], made)


def is_number(value: object) -> bool:
    """Whether ``value`` is a finite real number, and not a truth value."""
    if type(value) is bool or not isinstance(value, Real):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond the range of float
        return False


def is_whole(value: object, *, least: int, most: int = MOST) -> bool:
    """Whether ``value`` is a whole number between ``least`` and ``most``, of whatever type."""
    return is_number(value) and float(value) == int(value) and least <= value <= most  # type: ignore[arg-type, operator, call-overload]


def parse(cls: type[T], data: object, *, source: str | None = None) -> T:
    """Validate JSON-able ``data`` (for instance a parsed scenario file) as ``cls``.

    Raises:
        InvalidInput: naming each offending field by its path, its value and the rule it breaks.
    """
    try:
        return cast(T, adapter(cast(Any, cls)).validate_python(data))
    except ValidationError as error:
        message = explain(error, cls)
        raise InvalidInput(f"{source}: {message}" if source else message) from None


def dump(value: object) -> Any:
    """Return ``value`` (an input) as JSON-able data, leaving out fields that are None."""
    return adapter(cast(Any, type(value))).dump_python(value, mode="json", exclude_none=True)


@cache
def adapter(cls: Any) -> TypeAdapter[Any]:
    """The pydantic adapter of an input type, made once."""
    return TypeAdapter(cls)


def read_text(path: Path, *, encoding: str = "utf-8") -> str:
    """The content of a file that is read as a whole.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not text in this encoding, or too large.
    """
    with path.open("rb") as file:
        content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise ValueError(f"the file has more than {MOST_BYTES >> 20} MiB")
    return content.decode(encoding)


def explain(error: ValidationError, cls: type, *, label: object = None) -> str:
    """Rewrite a pydantic error as sentences: which field, which rule, which value."""
    where = f"{cls.__name__} {label!r}" if isinstance(label, str) and label else cls.__name__
    entries = error.errors(include_url=False)
    entries = [entry for entry in entries if not _other_branch(entry)] or entries
    shown = "; ".join(dict.fromkeys(_sentence(entry, cls) for entry in entries[:MOST_FAULTS]))
    more = f"; and {len(entries) - MOST_FAULTS:,} more" if len(entries) > MOST_FAULTS else ""
    return f"{where}: {shown}{more}"


def _other_branch(entry: Any) -> bool:
    """Whether an error only says that a table is not the list (or a list not the table) that a union also admits."""
    value, kind = entry["input"], entry["type"]
    return (kind == "tuple_type" and isinstance(value, dict)) or (
        kind == "dataclass_type" and isinstance(value, list | tuple)
    )


def _sentence(entry: Any, cls: type) -> str:
    place, known = list(entry["loc"]), _fields(cls)
    if place and isinstance(place[0], int) and place[0] < len(known):
        place[0] = known[place[0]]
    # A union names the branch it tried by its type; that is no part of the user's path.
    place = [part for part in place if not (isinstance(part, str) and (part in _TYPES or "[" in part))]
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).lstrip(".")
    kind, value = entry["type"], entry["input"]
    if kind == "value_error":
        text = str(entry["ctx"]["error"])
        return f"{path}{' ' if text.startswith('must') else ': '}{text}" if path else text
    if kind in _UNKNOWN:
        near = difflib.get_close_matches(str(entry["loc"][-1]), _siblings(cls, entry["loc"][:-1]), n=1)
        return f"{path} is not a field" + (f"; did you mean {near[0]!r}?" if near else "")
    if kind == "unexpected_positional_argument":
        return f"{path} must be given by name ({path}=...)"
    if kind in _REQUIRED:
        return f"{path} is required"
    if kind == "dataclass_type":
        name = entry["ctx"]["class_name"]
        article = "an" if name[0] in "AEIOU" else "a"
        return f"{path or 'the input'} must be {article} {name}, or a table with its fields; got {_brief(value)}"
    rule = _RULES.get(kind)
    limits = {name: f"{limit:g}" if isinstance(limit, float) else limit for name, limit in entry.get("ctx", {}).items()}
    text = rule.format(**limits) if rule else entry["msg"]
    return f"{path or 'the input'} {text}; got {_brief(value)}"


def _siblings(cls: type, place: Sequence[Any]) -> list[str]:
    """The fields that an unknown one may have been meant for: those of the types admitted at its place."""
    types = {cls}
    for part in place:
        owners = [each for each in types if isinstance(part, str) and part in _fields(each)]
        if owners:
            types = {inner for each in owners for inner in _inner_types(get_type_hints(each)[part])}
        elif any(each.__name__ == part for each in types):
            types = {each for each in types if each.__name__ == part}
    return sorted({name for each in types for name in _fields(each)})


def _fields(cls: type) -> list[str]:
    return [field.name for field in fields(cls)] if is_dataclass(cls) else []


def _inner_types(hint: Any) -> Iterator[type]:
    """The input types inside an annotation such as ``tuple[Mode, ...] | None``."""
    if is_dataclass(hint):
        yield cast(type, hint)
    for part in get_args(hint):
        yield from _inner_types(part)


def _brief(value: object, most: int = 200) -> str:
    """The value as Python writes it, its middle left out where that is long."""
    text = repr(value)
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 4 :]}"
