"""Methods as they are written on a command line."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import NamedTuple

from ..methods import METHODS
from ..settings import Settings, build, configure, read
from ..squeezed.context import Parameters


class Spec(NamedTuple):
    """Methods for a model, and how they were written."""

    label: str
    settings: Settings
    context: Parameters | None = None  # how that of a method is prepared that needs one

    @property
    def family(self) -> str:
        """The method's name: settings of a family make one line in a picture."""
        return self.label if self.settings.layers else self.settings.method.name

    @property
    def decodes(self) -> bool:
        """Whether the method also chooses for single queries on a cache."""
        configs = (self.settings.method, *self.settings.layers.values())
        return self.context is not None or any(getattr(c, "takes_cache", False) for c in configs)

    @property
    def setting(self) -> str:
        """What distinguishes the label from others of its family."""
        return self.label.partition(":")[2] or "defaults"


def parse(text: str) -> Spec:
    """`name`, `name:field=value,...`, or a file of settings; ValueError names what is wrong."""
    if text.endswith(".json"):
        return Spec(Path(text).name, read(text))
    name, _, options = text.partition(":")
    fields = {}
    for part in filter(None, separate(options)):
        field, equals, value = part.partition("=")
        if not equals or field in fields:
            raise ValueError(f"{text}: expected field=value, each field once, got {part!r}")
        try:
            fields[field] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            fields[field] = value  # a word
    if getattr(METHODS.get(name), "needs_context", False):
        return Spec(text, Settings(METHODS[name](), {}), build(Parameters, name, fields, text))
    return Spec(text, Settings(configure(name, fields, text), {}))


def separate(options: str) -> list[str]:
    """Options at the commas between them; a comma in a list separates nothing."""
    return re.split(r",(?![^(\[]*[)\]])", options)


def defaults() -> list[Spec]:
    """Every method at its defaults."""
    return [parse(name) for name in METHODS]
