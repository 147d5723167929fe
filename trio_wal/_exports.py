"""What public things say of where they are from.

Law: values only.  Tracebacks, ``help()``, pickles and the documentation show a class by its
module; users know it as ``trio_wal.X``, and so it says that, as trio's own classes do.
"""

from __future__ import annotations

import contextlib
import types
from abc import ABCMeta
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NoReturn, TypeVar, cast, get_type_hints

T = TypeVar("T")


class NoPublicConstructor(ABCMeta):
    """The metaclass of classes whose objects are made by calls such as ``open_wal`` only."""

    def __call__(cls, *_: Any, **__: Any) -> NoReturn:
        raise TypeError(f"{cls.__module__}.{cls.__qualname__} has no public constructor")


def constructor(cls: type[T]) -> Callable[..., T]:
    """What makes an object of a class that has no public constructor; as cheap as one."""
    return cast("Callable[..., T]", partial(type.__call__, cls))


def say_public(module: str, namespace: Mapping[str, object]) -> None:
    """Have the classes and functions of a public module, and their methods, say that they are
    that module's."""
    for name, value in namespace.items():
        if not name.startswith("_") and isinstance(value, (type, types.FunctionType)):
            _say(module, value)


def publish(*things: type | types.FunctionType | Callable[..., object]) -> None:
    """Have classes and functions, and their methods, say that they are ``trio_wal``'s; called
    where they are written, because nobody knows who loads that module, and what for."""
    for thing in things:
        _say("trio_wal", thing)


def _annotations(cls: type) -> Iterable[object]:
    """Those that stand there already: Python 3.14 finds the others when it is asked for them."""
    found: Mapping[str, object] = vars(cls).get("__annotations__", {})
    return found.values()


def _say(module: str, value: Any) -> None:
    if not value.__module__.startswith("trio_wal."):
        return
    if isinstance(value, type) and any(isinstance(of, str) for of in _annotations(value)):
        # What they name is known where the class was written, and not in the public module.
        with contextlib.suppress(NameError):
            hints = get_type_hints(value, include_extras=True)
            value.__annotations__ = {name: hints[name] for name in value.__annotations__}
    value.__module__ = module
    if isinstance(value, type):
        # Also those that it has of a base class, which nobody is told of.
        bases = [base for base in value.__mro__ if base.__module__.startswith("trio_wal._")]
        for part in [part for cls in (value, *bases) for part in vars(cls).values()]:
            inner = part.fget if isinstance(part, property) else getattr(part, "__func__", part)
            if isinstance(inner, types.FunctionType):
                inner.__module__ = module
