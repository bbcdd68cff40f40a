"""Methods as they are written on a command line."""

from __future__ import annotations

import ast
import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

from ..methods import METHODS, resolve


class Spec(NamedTuple):
    """A method for a model.

    Attributes:
        label: as it was written.
        method: the config of most layers.
        layers: configs of single layers.
    """

    label: str
    method: Any
    layers: dict[int, Any]

    def of(self, layer: int) -> Any:
        """The config of one layer."""
        return self.layers.get(layer, self.method)

    @property
    def family(self) -> str:
        """The method's name: settings of a family make one line in a picture."""
        return self.label if self.layers else self.method.name

    @property
    def setting(self) -> str:
        """What distinguishes the label from others of its family."""
        return self.label.partition(":")[2] or "defaults"


def parse(text: str) -> Spec:
    """`name`, `name:field=value,...`, or a JSON file {"method": name, "options": {...}, "layers":
    {number: {...}}} of options for all layers and for single ones.

    Raises ValueError; the message names what is wrong.
    """
    if text.endswith(".json"):
        return read(Path(text))
    name, _, options = text.partition(":")
    fields = {}
    for part in filter(None, options.split(",")):
        field, equals, value = part.partition("=")
        if not equals:
            raise ValueError(f"{text}: expected field=value, got {part!r}")
        try:
            fields[field] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            fields[field] = value  # a word
    return Spec(text, configure(name, fields, text), {})


def read(path: Path) -> Spec:
    """A file that `calibrate` wrote."""
    try:
        found = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(found, dict) or not isinstance(found.get("method"), str):
        raise ValueError(f"{path}: expected a JSON object with the name of a method")
    shared = found.get("options", {})
    layers = {
        int(layer): configure(found["method"], {**shared, **options}, str(path))
        for layer, options in found.get("layers", {}).items()
    }
    return Spec(path.name, configure(found["method"], shared, str(path)), layers)


def configure(name: str, fields: dict[str, Any], where: str) -> Any:
    """A config from its fields; lists become tuples, as frozen configs want them."""
    if name not in METHODS:
        raise ValueError(f"{where}: no such method {name!r}; there are {sorted(METHODS)}")
    known = [field.name for field in dataclasses.fields(METHODS[name])]
    unknown = sorted(set(fields) - set(known))
    if unknown:
        raise ValueError(f"{where}: {name} has no {unknown}; it has {known}")
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    try:
        return METHODS[name](**fields)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise ValueError(f"{where}: {error}") from None


def defaults() -> list[Spec]:
    """Every method that needs nothing but its name."""
    found = []
    for name in METHODS:
        try:
            found.append(Spec(name, resolve(name), {}))
        except (TypeError, ValueError):
            continue
    return found
