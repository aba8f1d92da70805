"""Share the types and checks of config fields: strict sections, paths, rules between keys.

The range of a single number is part of its type (`PositiveInt`, `Field(ge=2)`); `require` is for
rules between keys. Both end as one line of found, allowed and fix.
"""

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
    """Expand `~`, `$NAME` and `${NAME}` in a path, also after `hub:`; leave URLs unchanged.

    Raises:
        ValueError: there is no such user or variable, or the path is empty.
    """
    # A Path comes from Python code, which means exactly this path.
    if not isinstance(value, str) or "://" in value:
        return value
    if not value.strip() or "\n" in value:
        raise ValueError("a path of one line")
    head = "hub:" if value.startswith("hub:") else ""
    path = os.path.expanduser(os.path.expandvars(value.removeprefix(head)))  # noqa: PTH111
    # Left over because the variable is not set: a folder named `$DATA` is never meant.
    if missing := re.search(r"\$(\w+|\{\w*\})", path):
        raise ValueError(f"a path without {missing[0]}, which is not set in the environment")
    if path.startswith("~"):
        raise ValueError(f"a path without {path.partition('/')[0]}, which is not a user here")
    return head + path


# Every path of a config is one of these two; `PathText` may also be a name on the hub.
UserPath = Annotated[Path, BeforeValidator(expand_path)]
PathText = Annotated[str, BeforeValidator(expand_path)]
