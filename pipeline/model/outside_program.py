"""Embed texts with an export, without this package; `export_check.py` starts this program.

It reads one JSON request a line on standard input and writes one JSON answer a line:

    (at the start)                               true if sentence-transformers can be imported
    {"folder", "library", "dtype", "batches"}    {"vectors"}: one list per batch
    any request that fails                       {"error"}
"""

from __future__ import annotations

import json
import os
import re
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# The line of a card's code that sets prompt and texts.
_TEXTS_LINE = re.compile(r"^prompt, texts = .*$", re.MULTILINE)


class _NoPackage:
    """An import finder that hides the package that wrote the export, wherever it is installed."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        """Refuse one import; leave all others to the next finder."""
        if name.partition(".")[0] == "pipeline":
            raise ModuleNotFoundError(f"{name}: an export must load without it")


def _with_sentence_transformers(request: dict[str, Any]) -> list[Any]:
    from sentence_transformers import SentenceTransformer

    dtype = {"dtype": request["dtype"]}
    # Some callers always trust code. Even then the folder must not name code that it lacks.
    model = SentenceTransformer(
        request["folder"], device="cpu", model_kwargs=dtype, trust_remote_code=True
    ).float()
    vectors = []
    for batch in request["batches"]:
        name = batch.get("prompt_name")
        prompt = {"prompt_name": name} if name else {"prompt": batch.get("prompt")}
        vectors.append(model.encode(batch["texts"], batch_size=8, **prompt).tolist())
    return vectors


def _with_transformers(request: dict[str, Any]) -> list[Any]:
    """Run the code of the model card as a reader would, in float32 and with our texts."""
    import torch

    folder, dtype = request["folder"], request["dtype"]
    card = (Path(folder) / "README.md").read_text()
    code = "import torch" + card.split("```python\nimport torch")[1].split("```")[0]
    code = code.replace('"PATH"', repr(folder)).replace("model.eval()", "model.float().eval()")
    code = re.sub(r"(AutoModel\.from_pretrained\([^()]*)\)", rf"\1, dtype={dtype!r})", code)
    vectors = []
    for batch in request["batches"]:
        given = f"prompt, texts = {batch.get('prompt') or ''!r}, {batch['texts']!r}"
        scope: dict[str, Any] = {}
        with torch.no_grad():
            # Doubled, because a replacement of `re` reads its backslashes as escapes.
            exec(_TEXTS_LINE.sub(given.replace("\\", r"\\"), code), scope)
        vectors.append(scope["vectors"].tolist())
    return vectors


_LIBRARIES = {
    "sentence-transformers": _with_sentence_transformers,
    "transformers": _with_transformers,
}


def main() -> None:
    """Answer requests until standard input ends."""
    sys.meta_path.insert(0, _NoPackage())
    # Standard output is for answers only, and libraries print to it, too: their lines go to
    # standard error.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    print(json.dumps(find_spec("sentence_transformers") is not None), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        answer: dict[str, Any]
        try:
            answer = {"vectors": _LIBRARIES[request["library"]](request)}
        except Exception as error:
            reason = (str(error).strip().splitlines() or [""])[0]
            answer = {"error": f"{type(error).__name__}: {reason}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
