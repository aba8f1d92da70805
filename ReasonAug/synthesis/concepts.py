"""List the concepts to write about: from files, ours, and proposed by the model."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline.config.loading import read_yaml
from pipeline.errors import UserError, say_warning
from ReasonAug.concepts import CONCEPTS
from ReasonAug.files import read_jsonl, require_texts
from ReasonAug.splits import slug
from ReasonAug.synthesis.answers import Proposed
from ReasonAug.synthesis.calls import Calls, NotAskedError, Unanswered
from ReasonAug.synthesis.config import ProposeConfig, SynthesisConfig

Item = dict[str, Any]

STAGE = "concepts"
_KNOWN_NAMES = 200  # names in a prompt for more


def concept_id(domain: str, name: str) -> str:
    """Return the id of a concept: the same for names that differ in case and punctuation only."""
    words = " ".join(re.findall(r"\w+", f"{domain}\0{name}".casefold()))
    return f"{slug(name)[:60].strip('-') or 'concept'}-{digest(words).hex()[:8]}"


def digest(text: str) -> bytes:
    """Return a hash of a text that is the same in every process."""
    return hashlib.sha256(text.encode()).digest()


def listed_concepts(config: SynthesisConfig) -> Iterator[Item]:
    """Yield the concepts of the files, then ours; names may repeat.

    Raises:
        UserError: a file is missing, damaged, or of another form.
    """
    for path in config.concepts.files:
        found = list(_read_file(path, config.concepts.domain))
        if not found:
            raise UserError(f"concepts.files: {path}: no concept in it")
        for domain, name, definition in found:
            yield _item(config, domain, name, definition, "file")
    if config.concepts.builtin:
        for concept in CONCEPTS:
            definition = concept.definition_body()
            yield _item(config, concept.domain, concept.name, definition, "built-in")


def _item(config: SynthesisConfig, domain: str, name: str, definition: str, origin: str) -> Item:
    return {
        "id": concept_id(domain, name),
        "domain": domain,
        "kind": config.kind(domain),
        "concept": name,
        "origin": origin,
        "definition": definition,
        "dropped": None,
    }


async def all_concepts(
    config: SynthesisConfig, calls: Calls, *, limit: int | None, unknown: list[str]
) -> list[Item]:
    """Return all concepts in order; one whose name is there already is dropped as repeated.

    Args:
        config: the config.
        calls: asks the model.
        limit: propose no more than this many per domain, for a sample.
        unknown: in a dry run, receives the domain of each concept that would be proposed.
    """
    found: dict[str, Item] = {}
    repeated: list[Item] = []
    for item in listed_concepts(config):
        if item["id"] in found:
            repeated.append({**item, "dropped": "repeated"})
        else:
            found[item["id"]] = item
    for wanted in config.concepts.propose:
        own = [item["concept"] for item in found.values() if item["domain"] == wanted.domain]
        names, missing = await _propose(calls, wanted, own, limit)
        unknown.extend([wanted.domain] * missing)
        if len(names) + missing < (wanted.count if limit is None else min(wanted.count, limit)):
            say_warning(
                f"concepts.propose: {len(names):,} of {wanted.count:,} concepts of "
                f"{wanted.domain!r}: the model has proposed no other"
            )
        for name in names:
            item = _item(config, wanted.domain, name, "", "model")
            found.setdefault(item["id"], item)
    kept = list(found.values())[: config.concepts.max_count]
    return [*kept, *repeated]


async def _propose(
    calls: Calls, wanted: ProposeConfig, known: Sequence[str], limit: int | None
) -> tuple[list[str], int]:
    """Return names that the model proposes, and how many a dry run does not know yet."""
    ids = {concept_id(wanted.domain, name) for name in known}
    names: list[str] = []
    target = wanted.count if limit is None else min(wanted.count, limit)
    turn = 0
    while len(names) < target:
        listed = [*known, *names][-_KNOWN_NAMES:]
        turn += 1
        try:
            answer = await calls.ask(
                STAGE,
                "propose",
                Proposed,
                item=f"{slug(wanted.domain)}/{turn}",
                domain=wanted.domain,
                count=str(wanted.per_call),
                known="\n".join(f"- {name}" for name in listed) or "(none)",
            )
        except NotAskedError:
            return names, target - len(names)
        except Unanswered:
            # The same question would get the same recorded answer.
            break
        before = len(names)
        for name in answer.concepts:
            name = re.sub(r"^\s*(?:[-*]|\d+[.)])\s*", "", name).strip()
            identity = concept_id(wanted.domain, name)
            if name and identity not in ids:
                ids.add(identity)
                names.append(name)
        if len(names) == before:
            break  # the next question would be this one
    return names[:target], 0


def _read_file(path: Path, domain: str) -> Iterator[tuple[str, str, str]]:
    """Yield (domain, name, definition) of one file."""
    suffix = path.suffix.lower()
    if suffix == ".jsonl":
        rows = read_jsonl(path, fix="name a file of concepts in concepts.files")
        require_texts(path, rows, ("domain", "concept"))
        for number, row in enumerate(rows, 1):
            definition = row.get("definition") or ""
            if not isinstance(definition, str):
                raise UserError(f"{path}: object {number}: 'definition' is no text")
            yield _checked(path, number, row["domain"], row["concept"], definition)
    elif suffix in (".yaml", ".yml"):
        yield from _read_yaml_file(path)
    elif suffix == ".txt":
        yield from _read_text_file(path, domain)
    else:
        raise UserError(f"concepts.files: {path}", allowed="a file .txt, .jsonl, .yaml or .yml")


def _read_yaml_file(path: Path) -> Iterator[tuple[str, str, str]]:
    if not path.is_file():
        raise UserError(f"concepts.files: {path}: no such file")
    tree = read_yaml(path)
    allowed = "DOMAIN: a list of names, or of {concept: …, definition: …}"
    if not isinstance(tree, dict):
        raise UserError(f"{path}: {type(tree).__name__} at the top", allowed=allowed)
    for domain, names in tree.items():
        if not isinstance(names, list):
            raise UserError(f"{path}: {domain}: {type(names).__name__}", allowed=allowed)
        for number, entry in enumerate(names, 1):
            if isinstance(entry, str):
                entry = {"concept": entry}
            if (
                not isinstance(entry, dict)
                or not entry.keys() <= {"concept", "definition"}
                or not all(isinstance(value, str) for value in entry.values())
                or "concept" not in entry
            ):
                raise UserError(f"{path}: {domain}: entry {number}: {entry!r:.80}", allowed=allowed)
            yield _checked(path, number, str(domain), entry["concept"], entry.get("definition", ""))


def _read_text_file(path: Path, domain: str) -> Iterator[tuple[str, str, str]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"concepts.files: {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"concepts.files: {path}: not UTF-8, byte {error.start}") from error
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        own, tab, name = line.partition("\t")
        if not tab:
            own, name = domain, line
        if not own.strip():
            raise UserError(
                f"{path}:{number}: {name.strip()!r} has no domain",
                allowed="DOMAIN tab NAME, or concepts.domain for the whole file",
            )
        yield _checked(path, number, own, name, "")


def _checked(
    path: Path, number: int, domain: str, name: str, definition: str
) -> tuple[str, str, str]:
    domain, name = domain.strip(), name.strip()
    if not domain or not name or "\n" in name or len(name) > 200:
        raise UserError(
            f"{path}: entry {number}: {name!r:.60} of {domain!r:.40}",
            allowed="a domain and a name of one line each",
        )
    return domain, name, definition.strip()
