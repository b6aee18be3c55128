"""What pydantic finds wrong with a configuration file, said in one line."""

import difflib
import json
from collections.abc import Iterator, Mapping
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError


def explain(error: ValidationError, root: type[BaseModel]) -> str:
    """The first thing that is wrong, in one line, with the nearest known key for an unknown one."""
    errors = error.errors(include_url=False, include_context=False)
    # An unknown key is often why another one is missing, so it comes first.
    first = next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])
    loc = tuple(p for p in first["loc"] if p != "[key]")
    where = ".".join(str(p) for p in loc)
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    if first["type"] == "extra_forbidden":
        known = sorted(_keys_at(root, loc[:-1]))
        near = difflib.get_close_matches(str(loc[-1]), known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(known)}"
        return f"{where}: unknown key, {hint}{more}"
    message = first["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    got = first["input"]
    secret = "password" in where
    if first["type"] != "missing" and not isinstance(got, Mapping) and not secret:
        message += f", got {json.dumps(got, default=str)}"
    return f"{where}: {message}{more}" if where else f"{message}{more}"


def _keys_at(root: type[BaseModel], loc: tuple[int | str, ...]) -> set[str]:
    """Keys of the section that `loc` leads to."""
    model: type[BaseModel] = root
    rest = list(loc)
    while rest:
        annotation = model.model_fields[str(rest.pop(0))].annotation
        found = next(_models_in(annotation))
        if get_origin(annotation) is dict:
            rest.pop(0)
        model = found
    return {f.alias or name for name, f in model.model_fields.items()}


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) in (Union, UnionType, Annotated, dict, tuple, list):
        for argument in get_args(annotation):
            yield from _models_in(argument)
