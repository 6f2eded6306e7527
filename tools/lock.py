"""Prints the lock: the version in this environment of everything that kdc and its extras need.

It follows the requirements from kdc on, so that tools which only happen to be installed stay out.
"""

from __future__ import annotations

import re
from importlib.metadata import distribution

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

# What torch brings along on Linux alone is left to torch, so that the lock installs elsewhere too.
LEFT_TO_TORCH = re.compile(r"(nvidia|cuda)-|triton$")


def follow(requirement: Requirement, seen: dict[tuple[str, str], str]) -> None:
    name = canonicalize_name(requirement.name)
    if LEFT_TO_TORCH.match(name):
        return
    found = distribution(name)
    for extra in ("", *requirement.extras):
        if (name, extra) in seen:
            continue
        # "+cpu" and the like name a build, not a version.
        seen[name, extra] = f"{found.metadata['Name']}=={found.version.partition('+')[0]}"
        for text in found.requires or []:
            needed = Requirement(text)
            if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                follow(needed, seen)


if __name__ == "__main__":
    pins: dict[tuple[str, str], str] = {}
    follow(Requirement("kdc[book,test]"), pins)
    ours = {pin for (name, _), pin in pins.items() if name != "kdc"}
    print("\n".join(sorted(ours, key=str.lower)))
