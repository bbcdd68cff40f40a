"""Operators: one schema, one overload per backend, and the choice between them.

An operator file (`sparse_attn/ops/<op>.py`) declares an `Op`, its fake kernel, its validation and
a row per implementation. A row states for which device it is and, through `when`, why it cannot
serve a call. The first row without an objection serves it; a forced backend never falls back.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
from torch._library import simple_registry
from torch._library.autograd import Info, make_autograd_impl
from torch.autograd import forward_ad

from . import _ext, env

NS = "sparse_attn"
BACKENDS = ("cuda", "triton", "cpp", "reference")
LIBRARY = torch.library.Library(NS, "FRAGMENT")
DISPATCH_KEYS = {"cpu": "CPU", "cuda": "CUDA", "any": "CompositeExplicitAutograd"}
OPS: dict[str, Op] = {}


def _always(*args: Any) -> bool:
    return True


@dataclass
class Impl:
    """One implementation of one operator."""

    backend: str
    device: str  # "cpu", "cuda" or "any"
    when: Callable[..., bool | str]
    unasked: Callable[..., bool | str]  # whether also where nobody asked for it by name
    overload: Any  # torch.ops.sparse_attn.<op>.<backend>
    missing: str | None  # why it cannot be loaded here at all

    def is_for(self, device: str) -> bool:
        return self.device in ("any", device)


@dataclass
class Op:
    """An operator: `torch.ops.sparse_attn.<name>` and its overloads.

    `schema` is what follows the name: "(Tensor x, int n=1) -> Tensor". Calling the object checks
    the arguments, picks an implementation in plain Python (so that torch.compile records the
    overload itself) and calls it; `.default` makes the same choice at run time.
    """

    name: str
    schema: str
    impls: list[Impl] = field(default_factory=list)
    _fake: Callable[..., Any] | None = None
    _validate: Callable[..., None] | None = None
    _signature: inspect.Signature | None = None
    _defaults: tuple[Any, ...] = ()
    _required: int = 0
    _autocast: int = 0  # how many leading tensor arguments autocast casts
    is_composite: bool = False  # calls other operators, has no kernel of its own

    def __post_init__(self) -> None:
        OPS[self.name] = self
        LIBRARY.define(f"{self.name}{self.schema}")
        for backend in BACKENDS:
            LIBRARY.define(f"{self.name}.{backend}{self.schema}")
        self.default = self._overload(self.name)

    @property
    def overloads(self) -> list[str]:
        return [self.name, *(f"{self.name}.{b}" for b in BACKENDS)]

    def fake(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """Registers shapes and dtypes of the results, for every overload."""
        self._fake = fn
        self._signature = inspect.signature(fn)
        self._defaults = tuple(p.default for p in self._signature.parameters.values())
        self._required = sum(default is inspect.Parameter.empty for default in self._defaults)
        source = f"{fn.__code__.co_filename}:{fn.__code__.co_firstlineno}"
        for overload in self.overloads:
            # as torch.library.register_fake, which would parse the caller's file each time
            holder = simple_registry.singleton.find(f"{NS}::{overload}").fake_impl
            holder.register(fn, source, lib=LIBRARY)
        LIBRARY.impl(self.name, self._run_default, "CompositeExplicitAutograd")
        return fn

    def validate(self, fn: Callable[..., None]) -> Callable[..., None]:
        """Registers the check that every call passes before a kernel runs."""
        self._validate = fn
        return fn

    def empty(self, *args: Any) -> tuple[torch.Tensor, ...]:
        """Tensors for the results of a call, without values."""
        assert self._fake is not None
        return self._fake(*args)

    def check(self, *args: Any) -> None:
        """Raises ValueError or TypeError, naming the argument, if a call is not legal."""
        if self._validate is not None:
            self._validate(*args)

    def impl(
        self,
        backend: str,
        device: str,
        when: Callable[..., bool | str] = _always,
        missing: str | None = None,
        unasked: Callable[..., bool | str] = _always,
    ) -> None:
        """Adds an implementation; the order of the calls is the order of preference.

        `when` says whether it can serve a call, `unasked` whether it may where no backend is named;
        each returns True or the reason why not.

        `cpp` and `cuda` kernels register themselves from C++; `reference`, `triton` and, where
        the CUDA extension was not built, `cuda` are functions with the operator's name in
        `sparse_attn.reference.<op>`, `.triton_kernels.<op>`, `.nvrtc.<op>`, imported at the first
        call.
        """
        in_python = {"reference": "reference", "triton": "triton_kernels"}
        if _ext.cuda_extension_missing:
            in_python["cuda"] = "nvrtc"
        if backend in in_python:
            # the interpreter runs Triton's kernels on CPU tensors too
            key = "any" if backend == "triton" else device
            module = f"{__package__}.{in_python[backend]}.{self.name}"
            self._register_python(backend, key, module)
        found = {"cpp": _ext.cpp_missing, "cuda": _ext.cuda_missing, "triton": _ext.triton_missing}
        self._add(backend, device, when, unasked, missing or found.get(backend))

    def _register_python(self, backend: str, device: str, module: str) -> None:
        name = self.name

        def kernel(*args: Any) -> Any:
            refuse_tangents(name, args)
            return getattr(importlib.import_module(module), name)(*args)

        LIBRARY.impl(f"{name}.{backend}", kernel, DISPATCH_KEYS[device])

    def composite(
        self,
        backend: str,
        device: str,
        fn: Callable[..., Any],
        of: tuple[Op, ...],
        when: Callable[..., bool | str] = _always,
        unasked: Callable[..., bool | str] = _always,
    ) -> None:
        """Adds an implementation that calls the operators `of` with the same backend.

        `fn(backend, *args)`; it can be loaded where all of them can.
        """

        def kernel(*args: Any) -> Any:
            # the dispatcher drops trailing arguments that equal their defaults
            return fn(backend, *self.bind(*args))

        LIBRARY.impl(f"{self.name}.{backend}", kernel, DISPATCH_KEYS["any"])
        missing = None
        for part in of:
            row = next((i for i in part.impls if i.backend == backend), None)
            why = f"{part.name} has no {backend} kernel" if row is None else row.missing
            missing = missing or why
        self.is_composite = True
        self._add(backend, device, when, unasked, missing)

    def _add(
        self,
        backend: str,
        device: str,
        when: Callable[..., bool | str],
        unasked: Callable[..., bool | str],
        missing: str | None,
    ) -> None:
        overload = self._overload(f"{self.name}.{backend}")
        self.impls.append(Impl(backend, device, when, unasked, overload, missing))

    def no_grad(self, advice: str) -> None:
        """Makes every overload raise in backward instead of losing the gradient in silence."""
        name = self.name

        def backward(ctx: Any, *grads: Any) -> Any:
            raise NotImplementedError(f"{NS}::{name} has no backward. {advice}")

        for overload in self.overloads:
            self._register_autograd(overload, None, backward)

    def autograd(self, setup_context: Callable[..., None], backward: Callable[..., Any]) -> None:
        """Gives every overload a gradient, as torch.library.register_autograd does.

        `backward(backend, ctx, *grads)`; backend is None where the default overload was called.
        """
        for overload in self.overloads:
            fn = partial(backward, overload.partition(".")[2] or None)
            self._register_autograd(overload, setup_context, fn)

    def _register_autograd(
        self,
        overload: str,
        setup_context: Callable[..., None] | None,
        backward: Callable[..., Any],
    ) -> None:
        """As torch.library.register_autograd, which would build two classes for each overload.

        They are a third of the time that the import takes, so they are built at the first call.
        """
        target = self._overload(overload)

        @cache
        def kernel() -> Callable[..., Any]:
            return make_autograd_impl(target, Info(backward, setup_context))

        LIBRARY.impl(overload, lambda *args: kernel()(*args), "Autograd", with_keyset=True)

    def _overload(self, overload: str) -> Any:
        name, _, variant = overload.partition(".")
        return getattr(getattr(getattr(torch.ops, NS), name), variant or "default")

    def autocast(self, tensors: int) -> None:
        """Under autocast the first `tensors` arguments are cast to its dtype, on every path."""
        self._autocast = tensors
        for overload in self.overloads:
            target = self._overload(overload)
            for device, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
                LIBRARY.impl(overload, self._autocast_kernel(target, device, key), key)

    def _autocast_kernel(self, target: Any, device: str, key: str) -> Callable[..., Any]:
        keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

        def kernel(*args: Any) -> Any:
            with torch._C._ExcludeDispatchKeyGuard(keys):
                return target(*self._cast(args, device))

        return kernel

    def _cast(self, args: tuple[Any, ...], device: str) -> tuple[Any, ...]:
        dtype = torch.get_autocast_dtype(device)
        return tuple(
            a.to(dtype)
            if i < self._autocast and isinstance(a, torch.Tensor) and a.is_floating_point()
            else a
            for i, a in enumerate(args)
        )

    def cast(self, *args: Any) -> tuple[Any, ...]:
        """The arguments as autocast wants them; unchanged outside of it."""
        device = args[0].device.type if isinstance(args[0], torch.Tensor) else "cpu"
        if self._autocast and device in ("cpu", "cuda") and torch.is_autocast_enabled(device):
            return self._cast(args, device)
        return args

    def bind(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """All arguments of the schema, in order, defaults filled in."""
        assert self._signature is not None
        if not kwargs and self._required <= len(args) <= len(self._defaults):
            return (*args, *self._defaults[len(args) :])  # several times faster, and common
        bound = self._signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return bound.args

    def reasons(self, args: tuple[Any, ...], asked: bool = True) -> dict[str, str | None]:
        """For each backend None if it can serve the call, otherwise why it cannot.

        Where it is `asked` for by name; without, why it does not.
        """
        found = {row.backend: self._refusal(row, args, asked) for row in self.impls}
        for backend in BACKENDS:
            found.setdefault(backend, "not implemented for this operator")
        return found

    def refusal(self, backend: str, args: tuple[Any, ...], asked: bool = True) -> str | None:
        """`reasons` of one backend that has an implementation."""
        row = next(row for row in self.impls if row.backend == backend)
        return self._refusal(row, args, asked)

    def _refusal(self, row: Impl, args: tuple[Any, ...], asked: bool) -> str | None:
        device = next(a.device.type for a in args if isinstance(a, torch.Tensor))
        if not row.is_for(device) and not (row.backend == "triton" and env.interpreted()):
            return f"runs on {row.device} tensors, these are on {device}"
        if row.missing is not None:
            return row.missing
        verdict = row.when(*args)
        if verdict is True and not asked:
            verdict = row.unasked(*args)
        return None if verdict is True else str(verdict)

    def select(self, args: tuple[Any, ...], backend: str | None = None) -> Impl:
        """The implementation that serves a call; raises with every reason if there is none."""
        backend = requested(backend)
        asked = backend is not None
        device = args[0].device.type
        for row in self.impls:
            # off its device, under Triton's interpreter, a row serves on request only
            chosen = row.backend == backend if asked else row.is_for(device)
            if chosen and self._refusal(row, args, asked) is None:
                return row
        reasons = self.reasons(args, asked)
        shown = reasons if backend is None else {backend: reasons[backend]}
        lines = "\n".join(f"  {name}: {why}" for name, why in shown.items())
        raise NotImplementedError(f"{NS}::{self.name} cannot serve\n{_describe(args)}\n{lines}")

    def __call__(self, *args: Any, backend: str | None = None, **kwargs: Any) -> Any:
        bound = self.cast(*self.bind(*args, **kwargs))
        refuse_tangents(self.name, bound)
        self.check(*bound)
        return self.select(bound, backend).overload(*bound)

    def prefer(self, backend: str | None, *args: Any) -> Any:
        """A call by `backend` where it can serve it, otherwise by one that is chosen.

        So with SPARSE_ATTN_BACKEND, too: what it names serves the forward, perhaps not the rest.
        """
        bound = self.bind(*args)
        asked, reasons = requested(backend), self.reasons(bound)
        if asked is None or reasons[asked] is not None:
            device = next(a.device.type for a in bound if isinstance(a, torch.Tensor))
            served = (r for r in self.impls if r.is_for(device) and reasons[r.backend] is None)
            asked = next((row.backend for row in served), None)
        return self(*bound, backend=asked)

    def _run_default(self, *args: Any) -> Any:
        return self(*args)


def refuse_tangents(name: str, args: tuple[Any, ...]) -> None:
    """Raises where forward-mode differentiation would lose a tangent in silence.

    Not where torch.func.jvp meets `torch.ops.sparse_attn.<op>` itself: PyTorch takes the tangents
    away before a kernel is called.
    """
    if forward_ad._current_level < 0:  # nobody differentiates: the cost of nearly every call
        return
    for x in args:
        if isinstance(x, torch.Tensor) and forward_ad.unpack_dual(x).tangent is not None:
            raise NotImplementedError(
                f"{NS}::{name} has no forward-mode derivative (torch.func.jvp, dual tensors): "
                "call it on forward_ad.unpack_dual(x).primal"
            )


def requested(backend: str | None) -> str | None:
    """The backend asked for by the argument, else by SPARSE_ATTN_BACKEND; None leaves it open."""
    for name, asked in (("backend", backend), ("SPARSE_ATTN_BACKEND", env.forced_backend())):
        if asked is not None and asked not in BACKENDS:
            raise ValueError(f"{name}: got {asked!r}, expected one of {sorted(BACKENDS)}")
        if asked is not None:
            return asked
    return None


def _describe(args: tuple[Any, ...]) -> str:
    shown = [
        f"{tuple(a.shape)} {a.dtype} {a.device}" if isinstance(a, torch.Tensor) else repr(a)
        for a in args
    ]
    return "  (" + ", ".join(shown) + ")"
