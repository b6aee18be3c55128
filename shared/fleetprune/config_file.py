"""Configuration files: TOML, read whole, checked strictly, refused in one line."""

import difflib
import json
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    ValidationError,
    ValidationInfo,
)

from fleetprune.errors import ConfigError

Loc = tuple[int | str, ...]

GUIDE = "docs/bring-your-own.md"
NAMED = 5  # missing keys that a refusal names at most


def _from_base(path: Path, info: ValidationInfo) -> Path:
    base: Path | None = (info.context or {}).get("base")
    return path if base is None else base / path


LocalPath = Annotated[Path, AfterValidator(_from_base)]
"""A path; a relative one starts at the folder of the configuration file."""


class Section(BaseModel):
    """Base of all sections: frozen, no unknown keys, finite numbers only."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


S = TypeVar("S", bound=Section)


def read_toml(path: Path) -> dict[str, Any]:
    """What a configuration file says, unchecked; ConfigError if it cannot be read or parsed."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise ConfigError(
            f"{path}: cannot be read: {e.strerror}; {GUIDE} says what such a file holds"
        ) from e
    except UnicodeDecodeError as e:
        raise ConfigError(f"{path}: byte {e.start} is not UTF-8") from e
    except tomllib.TOMLDecodeError as e:
        raise ConfigError(f"{path}: not TOML: {e}") from e


def load_section(path: Path, root: type[S], data: Mapping[str, Any] | None = None) -> S:
    """Read and check a configuration file.

    Args:
        path: The file.
        root: What it must hold.
        data: What it says, where `read_toml` has read it already.

    Returns:
        The settings; their local paths are absolute.

    Raises:
        ConfigError: The file cannot be read or parsed, a key is unknown, missing or has a wrong
            value; one line with the file and the key.
    """
    data = read_toml(path) if data is None else data
    try:
        # As strict JSON: "8" is no number and 1 is no truth, but a list is a tuple.
        return root.model_validate_json(
            json.dumps(data, default=str), strict=True, context={"base": path.absolute().parent}
        )
    except ValidationError as e:
        raise ConfigError(f"{path}: {explain(e, root)}") from e


def explain(error: ValidationError, root: type[BaseModel]) -> str:
    """The first thing that is wrong, in one line, with the nearest known key for an unknown one.

    Where that is a key that is missing, the others that are missing are named with it.
    """
    errors = error.errors(include_url=False, include_context=False)
    # An unknown key is often why another one is missing, so it comes first.
    first = next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])
    loc = tuple(p for p in first["loc"] if p != "[key]")
    unknown = first["type"] == "extra_forbidden"
    section, shown = _follow(root, loc[:-1] if unknown else loc)
    missing = [e for e in errors if e["type"] == first["type"] == "missing"][:NAMED]
    left = len(errors) - max(1, len(missing))
    more = f" (and {left} more)" if left else ""
    if missing:
        names = (".".join(_follow(root, e["loc"])[1]) for e in missing)
        return f"{', '.join(names)}: field required{more}"
    if unknown:
        where = ".".join((*shown, str(loc[-1])))
        known = sorted({f.alias or name for name, f in section.model_fields.items()})
        near = difflib.get_close_matches(str(loc[-1]), known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(known)}"
        return f"{where}: unknown key, {hint}{more}"
    where = ".".join(shown)
    if first["type"] == "union_tag_invalid":  # says both in words that only pydantic's users know
        kinds = error.errors(include_url=False)[errors.index(first)]["ctx"]
        key, kind = kinds["discriminator"].strip("'"), json.dumps(kinds["tag"])
        expected = kinds["expected_tags"].replace("'", "")
        return f"{where}.{key}: expected one of {expected}, got {kind}{more}"
    message = first["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    got = first["input"]
    secret = "password" in where
    if not isinstance(got, Mapping) and not secret:
        message += f", got {json.dumps(got, default=str)}"
    return f"{where}: {message}{more}" if where else f"{message}{more}"


def _follow(root: type[BaseModel], loc: Loc) -> tuple[type[BaseModel], tuple[str, ...]]:
    """The innermost section that `loc` leads to, and `loc` as the file has it.

    Of a section that may be one of several, pydantic puts the kind into `loc`; the file has no
    such level.
    """
    section: type[BaseModel] = root
    shown: list[str] = []
    rest = list(loc)
    while rest:
        part = str(rest.pop(0))
        shown.append(part)
        field = section.model_fields.get(part)
        models = list(_models_in(field.annotation)) if field is not None else []
        if field is None or not models:
            break
        if get_origin(field.annotation) is dict and rest:
            shown.append(str(rest.pop(0)))
        if len(models) > 1:
            if not rest:
                break
            kind = str(rest.pop(0))
            models = [m for m in models if _has_kind(m, kind)]
        section = models[0]
    return section, (*shown, *map(str, rest))


def _has_kind(model: type[BaseModel], kind: str) -> bool:
    return any(
        get_origin(f.annotation) is Literal and kind in get_args(f.annotation)
        for f in model.model_fields.values()
    )


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) in (Union, UnionType, Annotated, dict, tuple, list):
        for argument in get_args(annotation):
            yield from _models_in(argument)
