"""Methods as they are written on a command line."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import NamedTuple

from ..methods import METHODS, resolve
from ..settings import Settings, configure, read


class Spec(NamedTuple):
    """Methods for a model, and how they were written."""

    label: str
    settings: Settings

    @property
    def family(self) -> str:
        """The method's name: settings of a family make one line in a picture."""
        return self.label if self.settings.layers else self.settings.method.name

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
    return Spec(text, Settings(configure(name, fields, text), {}))


def separate(options: str) -> list[str]:
    """Options at the commas between them; a comma in a list separates nothing."""
    return re.split(r",(?![^(\[]*[)\]])", options)


def defaults() -> list[Spec]:
    """Every method that needs nothing but its name."""
    return [
        Spec(name, Settings(resolve(name), {}))
        for name, method in METHODS.items()
        if not getattr(method, "needs_context", False)
    ]
