"""What every section of a config is made with: strict keys, and faults in the user's words."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, ConfigDict, with_config

from pipeline.errors import UserError

# Unknown keys are refused: a misspelt key that is ignored trains the wrong model.
strict = with_config(ConfigDict(extra="forbid"))


def require(condition: bool, key: str, value: object, allowed: str, fix: str = "") -> None:
    """Refuse a value of `key` unless the condition holds."""
    if not condition:
        raise UserError(f"{key}: {value!r}", allowed=allowed, fix=fix)


def expand_path(value: Any) -> Any:
    """Write out `~`, `$NAME` and `${NAME}` at a path, also behind `hub:`; URLs stay as they are.

    Raises:
        ValueError: there is no such user or variable, or the path is empty.
    """
    if not isinstance(value, str) or "://" in value:
        return value
    if not value.strip() or "\n" in value:
        raise ValueError("a path of one line")
    head = "hub:" if value.startswith("hub:") else ""
    path = os.path.expanduser(os.path.expandvars(value.removeprefix(head)))  # noqa: PTH111
    if missing := re.search(r"\$(\w+|\{\w*\})", path):
        raise ValueError(f"a path without {missing[0]}, which is not set in the environment")
    if path.startswith("~"):
        raise ValueError(f"a path without {path.partition('/')[0]}, who is no user here")
    return head + path


# Every path of a config is one of these two; a hub name may stand in the place of `PathText`.
UserPath = Annotated[Path, BeforeValidator(expand_path)]
PathText = Annotated[str, BeforeValidator(expand_path)]
