"""The base model's licence, in the form that the hub accepts in the header of a model card."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError

from pipeline.config import ModelConfig
from pipeline.errors import say_warning

# What `license` may say on the hub (hf.co/docs/hub/repositories-licenses); it refuses other words.
HUB_LICENCES = {
    "afl-3.0", "agpl-3.0", "apache-2.0", "apple-amlr", "apple-ascl", "artistic-2.0",
    "bigcode-openrail-m", "bigscience-bloom-rail-1.0", "bigscience-openrail-m", "bsd",
    "bsd-2-clause", "bsd-3-clause", "bsd-3-clause-clear", "bsl-1.0", "c-uda", "cc", "cc-by-2.0",
    "cc-by-2.5", "cc-by-3.0", "cc-by-4.0", "cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0",
    "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0", "cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0",
    "cc-by-nd-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc0-1.0", "cdla-permissive-1.0",
    "cdla-permissive-2.0", "cdla-sharing-1.0", "creativeml-openrail-m", "deepfloyd-if-license",
    "ecl-2.0", "epl-1.0", "epl-2.0", "etalab-2.0", "eupl-1.1", "eupl-1.2",
    "fair-noncommercial-research-license", "gemma", "gfdl", "gpl", "gpl-2.0", "gpl-3.0",
    "grok2-community", "h-research", "intel-research", "isc", "lgpl", "lgpl-2.1", "lgpl-3.0",
    "lgpl-lr", "llama2", "llama3", "llama3.1", "llama3.2", "llama3.3", "llama4", "lppl-1.3c",
    "mit", "mpl-2.0", "ms-pl", "ncsa", "odbl", "odc-by", "ofl-1.1", "openmdw-1.0", "openrail",
    "openrail++", "osl-3.0", "other", "pddl", "postgresql", "unknown", "unlicense", "wtfpl",
    "zlib",
}  # fmt: skip


def base_licence(config: ModelConfig) -> dict[str, Any]:
    """Return the licence keys for the card of a model made from this base; none where unknown.

    A card that cannot be read is no reason to lose an export: it is named on standard error.
    """
    local = Path(config.path)
    source = local / "README.md" if local.is_dir() else config.path
    if local.is_dir() and not source.exists():  # type: ignore[union-attr]
        return {}
    try:
        data = ModelCard.load(source, ignore_metadata_errors=True).data.to_dict()
        return licence_keys(data)
    except (OSError, HfHubHTTPError):
        return {}  # the hub is out of reach
    except (ValueError, AttributeError, TypeError, yaml.YAMLError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        say_warning(
            f"the model card of {config.path} cannot be read ({reason}); the export's card names "
            "no licence"
        )
        return {}


def licence_keys(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return `license`, `license_name` and `license_link` as the hub accepts them.

    Args:
        data: the header of the base model's card.
    """
    found = data.get("license")
    words = [str(word) for word in (found if isinstance(found, list) else [found]) if word]
    ids = [_hub_id(word) for word in words]
    name, link = data.get("license_name"), data.get("license_link")
    given = {"license_name": name, "license_link": link}
    kept = {key: str(value) for key, value in given.items() if value}
    if not words and not kept:
        return {}
    if words and None not in ids:
        return {"license": ids[0] if len(ids) == 1 else ids, **kept}
    return {"license": "other", "license_name": _slug(" ".join(words) or "unnamed"), **kept}


def licence_words(keys: Mapping[str, Any]) -> str:
    """Return the licence as a reader would name it."""
    found = keys.get("license_name") or keys["license"]
    return " and ".join(f"`{word}`" for word in ([found] if isinstance(found, str) else found))


def _hub_id(word: str) -> str | None:
    slug = _slug(word)
    return slug if slug in HUB_LICENCES else None


def _slug(word: str) -> str:
    return re.sub(r"[^a-z0-9.+]+", "-", word.lower()).strip("-")
