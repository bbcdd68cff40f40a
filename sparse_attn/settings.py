"""Methods of a model's layers as a readable file, which `register` and `evaluate` take.

    {"method": "flex_prefill",
     "options": {"min_budget": 128},
     "layers": {"0": {"gamma": 0.98}, "1": {"method": "dense"}},
     "measured": ...}

`options` are fields of the method in all layers, `layers` what differs in single ones. A list in
place of a number has one for each query head, where the method takes that. `measured` is for
readers.
"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from .methods import METHODS, meant


class Settings(NamedTuple):
    """The method of a model.

    Attributes:
        method: the config of most layers.
        layers: configs of single layers, by number from 0.
    """

    method: Any
    layers: dict[int, Any]

    def of(self, layer: int | None) -> Any:
        """The config of one layer."""
        return self.method if layer is None else self.layers.get(layer, self.method)


def configure(name: str, fields: dict[str, Any], where: str) -> Any:
    """A method's config from its fields; lists become tuples, as frozen configs want them.

    ValueError says what is wrong, after `where`.
    """
    if name not in METHODS:
        near = meant(name, METHODS)
        raise ValueError(f"{where}: no such method {name!r}; there are {sorted(METHODS)}{near}")
    return build(METHODS[name], name, fields, where)


def build(kind: type, name: str, fields: dict[str, Any], where: str) -> Any:
    """A dataclass of a method's options from these; raises as `configure`."""
    known = [field.name for field in dataclasses.fields(kind)]
    unknown = sorted(set(fields) - set(known))
    if unknown:
        near = meant(unknown[0], known)
        raise ValueError(f"{where}: {name} has no {unknown}; it has {known}{near}")
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    try:
        return kind(**fields)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise ValueError(f"{where}: {error}") from None


def read(path: str | Path) -> Settings:
    """The methods in a file; ValueError says what is wrong with it."""
    try:
        found = json.loads(Path(path).read_text())
    except (OSError, ValueError, RecursionError) as error:  # ValueError: not JSON, or not UTF-8
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(found, dict) or not isinstance(found.get("method"), str):
        raise ValueError(f"{path}: expected a JSON object with the name of a method")
    name, shared, by_layer = found["method"], found.get("options", {}), found.get("layers", {})
    for what, given in (("options", shared), ("layers", by_layer)):
        if not isinstance(given, dict):
            raise ValueError(f"{path}: {what}: got {given!r}, expected an object")
    layers = {}
    for layer, differs in by_layer.items():
        where = f"{path}: layer {layer}"
        if not re.fullmatch("0|[1-9][0-9]{0,8}", layer) or not isinstance(differs, dict):
            raise ValueError(f"{where}: expected a number and an object of options")
        if not isinstance(differs.get("method", name), str):
            raise ValueError(f"{where}: expected the name of a method")
        if differs.get("method", name) == name:
            options = {k: v for k, v in {**shared, **differs}.items() if k != "method"}
            layers[int(layer)] = configure(name, options, where)
        else:
            options = {k: v for k, v in differs.items() if k != "method"}
            layers[int(layer)] = configure(differs["method"], options, where)
    return Settings(configure(name, shared, str(path)), layers)


def write(path: str | Path, settings: Settings, measured: Any = None) -> None:
    """Writes a file that `read` understands: of options only those that are not the defaults, of a
    layer those that are not alike in all layers.
    """
    method, layers = settings.method, {}
    alike = [c for c in settings.layers.values() if c.name == method.name]
    vary = [
        field.name
        for field in dataclasses.fields(method)
        if any(getattr(config, field.name) != getattr(method, field.name) for config in alike)
    ]
    for layer, config in sorted(settings.layers.items()):
        if config.name == method.name:
            layers[str(layer)] = {name: getattr(config, name) for name in vary}
        else:
            layers[str(layer)] = {"method": config.name, **changed(config)}
    found = {"method": method.name, "options": changed(method), "layers": layers}
    Path(path).write_text(json.dumps(found | {"measured": measured}, indent=1) + "\n")


def changed(config: Any) -> dict[str, Any]:
    """The fields that differ from their defaults."""
    default = type(config)()
    names = [field.name for field in dataclasses.fields(config)]
    return {n: getattr(config, n) for n in names if getattr(config, n) != getattr(default, n)}
