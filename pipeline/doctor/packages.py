"""Check installed versions against the declared ranges and the table of known-bad versions."""

from __future__ import annotations

import dataclasses
import platform
import re
import tomllib
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from pipeline.config import read_yaml
from pipeline.doctor.finding import Finding, Level, ok
from pipeline.files import check_kind

_NAME = "diffembed"
_PYPROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"
KNOWN_BAD = Path(__file__).with_name("known_bad.yaml")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class KnownBad:
    """An entry of known_bad.yaml; the file explains the keys."""

    package: str
    versions: str
    level: Level
    reason: str
    fix: str = ""
    without: tuple[str, ...] = ()
    gpu: bool = False


def read_known_bad() -> tuple[KnownBad, ...]:
    """Return the table of versions that do not work."""
    return check_kind(
        read_yaml(KNOWN_BAD), tuple[KnownBad, ...], where=str(KNOWN_BAD), fix="install it again"
    )


def declared() -> tuple[str, dict[str, Requirement]]:
    """Return the declared Python versions, and the requirements by canonical name.

    Optional packages are among them: they must fit where they are installed. A checkout's own
    file comes first, because an editable installation keeps the ranges it was made with.
    """
    if _PYPROJECT.is_file():
        project = tomllib.loads(_PYPROJECT.read_text())["project"]
        python = str(project["requires-python"])
        texts = list(project["dependencies"])
        optional = project.get("optional-dependencies", {})
        texts += [f"{text}; extra == 'x'" for name in optional for text in optional[name]]
    else:
        package = metadata.metadata(_NAME)
        python, texts = str(package["Requires-Python"]), metadata.requires(_NAME) or []
    found: dict[str, Requirement] = {}
    for text in texts:
        requirement = Requirement(text.replace("; sys_platform == 'linux'; ", "; "))
        found.setdefault(canonicalize_name(requirement.name), requirement)
    return python, found


def is_optional(requirement: Requirement) -> bool:
    """Return True for a package of an extra."""
    return requirement.marker is not None and "extra" in str(requirement.marker)


def check_packages(*, has_gpu: bool) -> Iterator[Finding]:
    """Yield a finding for each version that is missing, out of range or known to be bad."""
    python, requirements = declared()
    if platform.python_version() not in SpecifierSet(python, prereleases=True):
        yield _finding("python", "fail", platform.python_version(), f"needs {python}", "")
    installed = {name: _version(name) for name in requirements}
    faults = list(_range_faults(requirements, installed))
    named = {finding.check for finding in faults}
    for entry in read_known_bad():
        if entry.package not in named and _applies(entry, installed, has_gpu=has_gpu):
            version = installed[entry.package]
            faults.append(_finding(entry.package, entry.level, version, entry.reason, entry.fix))
    yield from faults
    if not faults:
        core = ("torch", "deepspeed", "transformers", "mteb", "flash-attn")
        shown = [f"{name} {version}" for name in core if (version := installed.get(name))]
        yield ok(
            "versions",
            f"Python {platform.python_version()}, {', '.join(shown)}; "
            f"{sum(map(bool, installed.values()))} packages within their ranges",
        )


def _range_faults(
    requirements: Mapping[str, Requirement], installed: Mapping[str, str | None]
) -> Iterator[Finding]:
    for name, requirement in requirements.items():
        version, optional = installed[name], is_optional(requirement)
        wanted = str(requirement.specifier) or "any version"
        marker = requirement.marker
        if version is None:
            if not optional and (marker is None or marker.evaluate()):
                yield _finding(name, "fail", None, f"needs {wanted}", "")
        elif not requirement.specifier.contains(version, prereleases=True):
            reasons = [
                entry.reason
                for entry in read_known_bad()
                if entry.package == name and _contains(entry, version)
            ]
            reason = "; ".join([f"needs {wanted}", *reasons])
            yield _finding(name, "warn" if optional else "fail", version, reason, "")


def _applies(entry: KnownBad, installed: Mapping[str, str | None], *, has_gpu: bool) -> bool:
    version = installed.get(entry.package)
    if version is None or (entry.gpu and not has_gpu) or not _contains(entry, version):
        return False
    return not any(_version(other) for other in entry.without)


def _contains(entry: KnownBad, version: str) -> bool:
    # Builds are named like 2.13.0+cu130, and nightly ones 2.14.0.dev1.
    return SpecifierSet(entry.versions).contains(version, prereleases=True)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _finding(name: str, level: Level, version: str | None, reason: str, fix: str) -> Finding:
    wanted = re.match(r"needs ([^;]*)", reason)
    range_of = wanted[1].replace("any version", "") if wanted else ""
    return Finding(
        name,
        level,
        f"{version or 'not installed'}: {reason}" if version else f"not installed, {reason}",
        fix or f"pip install '{name}{range_of}'",
    )
