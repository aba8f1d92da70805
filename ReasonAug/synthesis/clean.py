"""Drop problems that occur in an evaluation set, by the rules of `diffembed prepare`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ReasonAug.synthesis.calls import Item
from ReasonAug.synthesis.config import SynthesisConfig
from ReasonAug.synthesis.stages import CLEAN, Context, Stage

if TYPE_CHECKING:
    from pipeline.data.prepare.contamination import ContaminationIndex


class Clean:
    """The last stage before rows; makes no calls."""

    def __init__(self, config: SynthesisConfig, folder: Path) -> None:
        self._config, self._folder = config, folder / "contamination"
        self._index: ContaminationIndex | None = None

    def stage(self) -> Stage:
        """Return the stage."""
        return Stage(name=CLEAN, work=self._work, prompts=lambda config, item: [])

    async def _work(self, context: Context, item: Item) -> Item:
        if self._config.decontaminate is None:
            return item
        if self._index is None:
            # Slow to import.
            from pipeline.data.prepare.contamination import ContaminationIndex, build_index

            self._folder.mkdir(parents=True, exist_ok=True)
            build_index(self._config.decontaminate, self._folder)
            self._index = ContaminationIndex(self._config.decontaminate, self._folder)
        if self._is_contaminated(item["problem"], is_query=True) or self._is_contaminated(
            item["solution"], is_query=False
        ):
            return {**item, "dropped": "contaminated"}
        return {
            **item,
            "rewrites": {form: self._kept(text) for form, text in item["rewrites"].items()},
            "written_negative": self._kept_negative(item["written_negative"]),
        }

    def _is_contaminated(self, text: str, *, is_query: bool) -> bool:
        assert self._index is not None
        return self._index.find(text, is_query=is_query) is not None

    def _kept(self, text: Any) -> Any:
        is_text = isinstance(text, str) and text
        return "" if is_text and self._is_contaminated(text, is_query=True) else text

    def _kept_negative(self, written: dict[str, str] | None) -> dict[str, str] | None:
        if written is None or self._is_contaminated(written["problem"], is_query=True):
            return None
        return written
