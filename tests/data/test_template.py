"""Training and evaluation feed a model the same tokens for the same text."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from data_support import write_jsonl

from pipeline.config import ModelConfig, PrepareConfig, SourceConfig, Template
from pipeline.data.prepare import prepare
from pipeline.data.shards import Dataset
from pipeline.errors import UserError
from pipeline.evaluation.models import TemplatedEmbedder
from pipeline.model.load_export import load_export
from pipeline.tokenizer import cut_before, load_tokenizer
from tests.tiny_models import export_tiny, tiny_starter

INSTRUCTION = "Find the place"
ROWS = [
    {
        "query": f"where is stone {k}" * (1 + 9 * k),
        "positives": [f"stone {k} lies " * (1 + 30 * k)],
    }
    for k in range(3)
]


class Recorder(torch.nn.Module):
    """An encoder that records its inputs."""

    def __init__(self, width: int, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.scale = torch.nn.Parameter(torch.ones(width))
        self.rows: list[list[int]] = []

        self.skipped: list[int] = []

    def forward(
        self, input_ids: torch.Tensor, lengths: torch.Tensor, skipped: torch.Tensor
    ) -> torch.Tensor:
        self.rows += [piece.tolist() for piece in torch.split(input_ids, lengths.tolist())]
        self.skipped += skipped.tolist()
        return self.scale.expand(len(lengths), -1)

    def shown(self) -> list[tuple[list[int], int]]:
        """Rows and their instruction tokens, sorted."""
        return sorted(zip(self.rows, self.skipped, strict=True))


@pytest.fixture(scope="module")
def starter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("starter")
    return tiny_starter(folder / "model", write_jsonl(folder / "rows.jsonl", ROWS), num_layers=1)


@pytest.mark.parametrize("append_eos", [False, True])
@pytest.mark.parametrize(
    "template",
    [
        Template(),
        Template(query="Task: {instruction}; {text}", document="Passage: {text}"),
        Template(query="[INST] {instruction}; {text} [/INST]", document="[INST] {text} [/INST]"),
    ],
)
def test_an_export_tokenises_texts_as_the_shards_hold_them(
    starter: Path, template: Template, append_eos: bool, tmp_path: Path
) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    source = SourceConfig(name="s", format="columns", path=str(path), instruction=INSTRUCTION)
    prepared = PrepareConfig(
        output_dir=tmp_path / "shards",
        tokenizer=str(starter),
        sources=(source,),
        template=template,
        max_query_length=48,
        max_document_length=48,
        append_eos=append_eos,
    )
    dataset = Dataset.open(prepare(prepared, num_workers=1))
    config = ModelConfig(path=str(starter), dtype="float32", pool_instruction=False)
    exported = export_tiny(
        config,
        tmp_path / "export",
        tokenizer=dataset.tokenizer,
        template=dataset.template,
        max_length=48,
    )
    loaded = load_export(exported, max_tokens=1)
    recorder = Recorder(loaded.num_dimensions, loaded.encoder.config)
    model = dataclasses.replace(loaded, encoder=recorder)  # type: ignore[arg-type]
    embedder = TemplatedEmbedder(encoder=model, template=loaded.template)
    every = np.arange(len(ROWS))
    queries = dataset.examples.views("query", every)
    documents = dataset.documents.views("tokens", every)
    embedder.embed("query", INSTRUCTION, [row["query"] for row in ROWS])  # type: ignore[misc]
    counts = dataset.examples.scalars("instruction_tokens", every).tolist()
    assert recorder.shown() == sorted(zip(map(list, queries), counts, strict=True))
    assert min(counts) > 0
    assert max(map(len, recorder.rows)) == 48  # one is cut
    recorder.rows.clear()
    recorder.skipped.clear()
    embedder.embed("document", "", [row["positives"][0] for row in ROWS])
    counts = dataset.documents.scalars("instruction_tokens", every).tolist()
    assert recorder.shown() == sorted(zip(map(list, documents), counts, strict=True))
    assert (min(counts) > 0) == (template.document != "{text}")


def test_what_follows_the_text_is_kept_when_the_text_is_cut(starter: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    template = Template(query="[INST] {instruction}; {text} [/INST]", document="({text} )")
    prepared = PrepareConfig(
        output_dir=tmp_path / "shards",
        tokenizer=str(starter),
        sources=(
            SourceConfig(name="s", format="columns", path=str(path), instruction=INSTRUCTION),
        ),
        template=template,
        max_query_length=48,
        max_document_length=48,
    )
    dataset = Dataset.open(prepare(prepared, num_workers=1))
    tokenizer = load_tokenizer(str(starter))
    for view in dataset.examples.views("query", np.arange(3)):
        written = tokenizer.decode(view)
        assert written.startswith("[INST] Find the place; where") and written.endswith(" [/INST]")
    documents = dataset.documents.views("tokens", np.arange(3))
    assert max(map(len, documents)) == 48
    for view in documents:
        whole = tokenizer.decode(view)
        assert whole.startswith("(stone") and whole.endswith(" )")
        # The cut takes the last tokens of the text, no others.
        row = next(r for r in ROWS if whole.removesuffix(" )")[1:] in r["positives"][0])
        ids = tokenizer(template.format_document(row["positives"][0]))["input_ids"]
        assert view.tolist()[:-1] == ids[: len(view) - 1] and view[-1] == ids[-1]


def test_a_limit_without_room_for_the_end_of_the_template_is_refused() -> None:
    with pytest.raises(UserError, match="the end of the template takes 3"):
        cut_before([5, 6, 7, 8], [(0, 1), (1, 3), (3, 5), (5, 6)], num_characters=1, max_length=3)
