"""What all inputs share: frozen, validated by pydantic, readable from and writable to JSON-able data.

``@input_type`` makes a class a frozen pydantic dataclass whose errors are `InvalidInput` messages that name the
field, the value and the rule.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import cache, wraps
from typing import Annotated, Any, TypeVar, cast, dataclass_transform

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from fluidopt.errors import InvalidInput

T = TypeVar("T")

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
Name = Annotated[str, Field(min_length=1, max_length=200)]

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
    "too_short": "must have at least {min_length} entry",
    "literal_error": "must be {expected}",
    "dataclass_type": "must be of type {class_name}, or a table with its fields",
    "tuple_type": "must be a list",
}
_REQUIRED = {"missing", "missing_argument", "missing_keyword_only_argument"}
# Every field name of every input type: what a misspelt key in a scenario file may have meant.
_FIELDS: set[str] = set()
_TYPES: set[str] = set()
_UNKNOWN = {"extra_forbidden", "unexpected_keyword_argument"}


@dataclass_transform(frozen_default=True)
def input_type(cls: type[T]) -> type[T]:
    """Make ``cls`` a frozen pydantic dataclass that raises `InvalidInput`."""
    made: Any = dataclass(frozen=True, config=_CONFIG)(cls)
    _FIELDS.update(field.name for field in fields(made))
    _TYPES.add(cls.__name__)
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


def explain(error: ValidationError, cls: type, *, label: object = None) -> str:
    """Rewrite a pydantic error as sentences: which field, which rule, which value."""
    where = f"{cls.__name__} {label!r}" if isinstance(label, str) and label else cls.__name__
    known = [field.name for field in fields(cls)] if is_dataclass(cls) else []
    entries = error.errors(include_url=False)
    entries = [entry for entry in entries if not _other_branch(entry)] or entries
    return f"{where}: " + "; ".join(dict.fromkeys(_sentence(entry, known) for entry in entries))


def _other_branch(entry: Any) -> bool:
    """Whether an error only says that a table is not the list (or a list not the table) that a union also admits."""
    value, kind = entry["input"], entry["type"]
    return (kind == "tuple_type" and isinstance(value, dict)) or (
        kind == "dataclass_type" and isinstance(value, list | tuple)
    )


def _sentence(entry: Any, known: Sequence[str]) -> str:
    place = list(entry["loc"])
    if place and isinstance(place[0], int) and place[0] < len(known):
        place[0] = known[place[0]]
    # A union names the branch it tried by its type; that is no part of the user's path.
    place = [part for part in place if not (isinstance(part, str) and (part in _TYPES or "[" in part))]
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).lstrip(".")
    kind, value = entry["type"], entry["input"]
    if kind == "value_error":
        text = str(entry["ctx"]["error"])
        return f"{path}: {text}" if path else text
    if kind in _UNKNOWN:
        near = difflib.get_close_matches(str(place[-1]), sorted(_FIELDS), n=1)
        return f"{path} is not a field" + (f"; did you mean {near[0]!r}?" if near else "")
    if kind == "unexpected_positional_argument":
        return f"{path} must be given by name ({path}=...)"
    if kind in _REQUIRED:
        return f"{path} is required"
    rule = _RULES.get(kind)
    text = rule.format(**entry.get("ctx", {})) if rule else entry["msg"]
    return f"{path} {text}; got {value!r}"
