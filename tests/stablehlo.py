"""Reading lowered programs, in which a kernel that is called several times is one function."""

import re
from collections.abc import Iterator


def lines_as_run(text: str) -> Iterator[str]:
    """The lines of a module's main function, with those of other functions wherever they are called."""
    bodies: dict[str, list[str]] = {}
    name = ""
    for line in text.splitlines():
        if begins := re.match(r"\s*func\.func (?:\w+ )?@(\w+)", line):
            name = begins[1]
        bodies.setdefault(name, []).append(line)

    def run(function: str) -> Iterator[str]:
        for line in bodies[function]:
            called = re.search(r"\bcall @(\w+)\(", line)
            yield from run(called[1]) if called else (line,)

    return run("main")
