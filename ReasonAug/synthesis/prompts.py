"""Read prompts from Markdown files, fill them in, and name their version by a hash.

A file has the headings `# System` and `# User`; `{name}` is filled in, other braces stay. `{form}`
is replaced by the file FORM-KIND.md of the prompt: what an answer looks like depends on how its
solution will be verified.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

from pipeline.errors import UserError

_FOLDER = Path(__file__).parents[1] / "prompts"
_PLACE = re.compile(r"\{([a-z_]{2,})\}")  # longer than the arguments of a formula
_HEADINGS = re.compile(r"^# (System|User)[ \t]*\n", re.MULTILINE)

# The values that each prompt is filled with.
VALUES: dict[str, frozenset[str]] = {
    name: frozenset(values.split())
    for name, values in {
        "propose": "domain count known",
        "definition": "domain concept",
        "problem": "domain concept definition context difficulty length persona number",
        "check": "concept definition problem",
        "rewrite": "domain concept definition problem reason",
        "tests": "problem count function",
        "solve-coding": "problem function attempt",
        "solve-numeric": "problem attempt",
        "judge": "problem solution attempt",
        "negative": "concept definition problem domain",
        "forum": "problem",
        "exam": "problem",
        "repair": "keys reason text",
    }.items()
}
# The files that replace `{form}`.
_FORMS = {"definition": "definition", "problem": "form", "rewrite": "form"}


@dataclasses.dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt; its version changes with every change of its text."""

    name: str
    version: str
    system: str
    user: str

    @property
    def label(self) -> str:
        """Name and version, as records name them."""
        return f"{self.name}@{self.version}"

    def messages(self, values: Mapping[str, str]) -> list[dict[str, str]]:
        """Return the messages of a chat, with all values filled in."""
        filled = _PLACE.sub(lambda place: values.get(place[1], place[0]), self.user)
        system = {"role": "system", "content": self.system}
        return [*([system] if self.system else []), {"role": "user", "content": filled}]


class Prompts:
    """All prompts, from a user's folder where it has them, else the shipped ones.

    Raises:
        UserError: a file lacks a heading, or names a value that this prompt is not filled with.
    """

    def __init__(self, folder: Path | None = None) -> None:
        if folder is not None:
            _refuse_unknown_files(folder)
        self._folder = folder
        self._read: dict[tuple[str, str], Prompt] = {}
        for name in VALUES:
            for kind in ("coding", "numeric", "text") if name in _FORMS else ("",):
                self._read[name, kind] = self._compose(name, kind)

    def get(self, name: str, kind: str = "") -> Prompt:
        """Return a prompt; the kind matters only where its file has a `{form}`."""
        return self._read[name, kind if name in _FORMS else ""]

    def versions(self) -> dict[str, str]:
        """Return the version of every prompt, by name and kind."""
        return {f"{name} {kind}".strip(): p.version for (name, kind), p in self._read.items()}

    def labels(self) -> set[str]:
        """Return name and version of every prompt."""
        return {prompt.label for prompt in self._read.values()}

    def _compose(self, name: str, kind: str) -> Prompt:
        text = self._text(name)
        if kind:
            text = text.replace("{form}", self._text(f"{_FORMS[name]}-{kind}").strip())
        path = f"prompt {name}.md"
        parts = _HEADINGS.split(text)
        bodies = {parts[i]: parts[i + 1].strip() for i in range(1, len(parts) - 1, 2)}
        if not bodies.get("User") or parts[0].strip():
            raise UserError(
                f"{path}: no text under a heading '# User'", allowed="'# System', then '# User'"
            )
        unknown = set(_PLACE.findall(bodies["User"])) - VALUES[name]
        if unknown:
            raise UserError(
                f"{path}: {{{min(unknown)}}} is not known to this prompt",
                allowed=", ".join(f"{{{value}}}" for value in sorted(VALUES[name])),
            )
        system = bodies.get("System", "")
        version = hashlib.sha256(f"{system}\0{bodies['User']}".encode()).hexdigest()[:12]
        return Prompt(name=name, version=version, system=system, user=bodies["User"])

    def _text(self, name: str) -> str:
        own = None if self._folder is None else self._folder / f"{name}.md"
        path = own if own is not None and own.exists() else _FOLDER / f"{name}.md"
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: {error}", fix="write the prompt as UTF-8 text") from error


def _refuse_unknown_files(folder: Path) -> None:
    if not folder.is_dir():
        raise UserError(f"prompts: {folder}: no such folder")
    shipped = {path.name for path in _FOLDER.glob("*.md")}
    # A misspelt name would silently leave the shipped prompt in use.
    for path in sorted(folder.glob("*.md")):
        if path.name not in shipped:
            raise UserError(f"prompts: {path}", allowed=", ".join(sorted(shipped)))
