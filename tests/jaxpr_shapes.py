"""What a traced program computes, inner programs included: array shapes, and what its loops repeat."""

import math
from collections.abc import Iterator
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr


def intermediate_shapes(closed: ClosedJaxpr) -> set[tuple[int, ...]]:
    """Shapes of everything computed inside scans, `shard_map`, remat and all other inner programs too.

    Inside `shard_map` they are one device's shapes. What only passes through the outermost program is not counted.
    """
    return {tuple(shape) for shape in _shapes(closed.jaxpr)}


def repeated(closed: ClosedJaxpr, primitive: str) -> list[tuple[int, ...]]:
    """Shapes of what operations of that name compute within loops."""
    return [
        equation.outvars[0].aval.shape for equation in _in_loops(closed.jaxpr) if equation.primitive.name == primitive
    ]


def has_elements(shape: tuple[int, ...], *sizes: int) -> bool:
    """Whether an array of this shape holds at least the product of `sizes` elements."""
    return math.prod(shape) >= math.prod(sizes)


def _shapes(jaxpr: Jaxpr) -> Iterator[tuple[int, ...]]:
    for equation in jaxpr.eqns:
        for variable in equation.outvars:
            yield getattr(variable.aval, "shape", ())
        for inner in _jaxprs(list(equation.params.values())):
            for variable in inner.invars:
                yield getattr(variable.aval, "shape", ())
            yield from _shapes(inner)


def _in_loops(jaxpr: Jaxpr, *, is_loop: bool = False) -> Iterator[Any]:
    for equation in jaxpr.eqns:
        if is_loop:
            yield equation
        for inner in _jaxprs(list(equation.params.values())):
            yield from _in_loops(inner, is_loop=is_loop or equation.primitive.name in ("scan", "while"))


def _jaxprs(value: Any) -> Iterator[Jaxpr]:
    if isinstance(value, ClosedJaxpr):
        yield value.jaxpr
    elif isinstance(value, Jaxpr):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _jaxprs(item)
