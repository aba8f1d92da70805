"""What every section of a config is made with: strict keys, and faults in the user's words."""

from __future__ import annotations

from pydantic import ConfigDict, with_config

from pipeline.errors import UserError

# Unknown keys are refused: a misspelt key that is ignored trains the wrong model.
strict = with_config(ConfigDict(extra="forbid"))


def require(condition: bool, key: str, value: object, allowed: str, fix: str = "") -> None:
    """Refuse a value of `key` unless the condition holds."""
    if not condition:
        raise UserError(f"{key}: {value!r}", allowed=allowed, fix=fix)
