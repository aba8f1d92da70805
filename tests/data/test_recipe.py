"""A second prepare notices what changed by content, and leaves alone what only looks changed."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import io
import json
import os
import shutil
import threading
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
from data_support import ConfigMaker, reasonaug_rows, write_jsonl
from transformers import AutoTokenizer

from pipeline.config import DecontaminateConfig, EvaluationSetConfig, PrepareConfig, SourceConfig
from pipeline.data.prepare import STEPS, Step, prepare
from pipeline.data.prepare import recipe as recipes
from pipeline.data.prepare.recipe import prepare_status
from pipeline.data.shards import Dataset
from pipeline.errors import UserError
from pipeline.files import hold_lock


@pytest.fixture
def config(make_config: ConfigMaker, tokenizer_path: Path, tmp_path: Path) -> PrepareConfig:
    """One source of each kind of reference to files, a tokenizer folder, and an evaluation set."""
    write_jsonl(tmp_path / "real.jsonl", reasonaug_rows(20))
    (tmp_path / "linked.jsonl").symlink_to(tmp_path / "real.jsonl")
    beir = tmp_path / "beir"
    (beir / "qrels").mkdir(parents=True)
    write_jsonl(beir / "corpus.jsonl", [{"_id": "d1", "text": "a"}, {"_id": "d2", "text": "b"}])
    write_jsonl(beir / "queries.jsonl", [{"_id": "q1", "text": "what is it"}])
    (beir / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td1\t1\n")
    rows = [{"query": f"query {k}", "positives": [f"answer {k}"]} for k in range(4)]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    write_jsonl(tmp_path / "test.jsonl", [{"text": "a question of the evaluation set"}])
    shutil.copytree(tokenizer_path, tmp_path / "tokenizer")
    named = {
        "linked": ("reasonaug", "linked.jsonl"),
        "beir": ("mteb", "beir"),
        "saved": ("columns", "saved"),
    }
    return make_config(
        *(
            SourceConfig(
                name=name,
                format=kind,
                path=f"{'hub:' if name == 'saved' else ''}{tmp_path / path}",
            )
            for name, (kind, path) in named.items()
        ),
        tokenizer=str(tmp_path / "tokenizer"),
        decontaminate=DecontaminateConfig(
            sets=(EvaluationSetConfig(name="mine", path=str(tmp_path / "test.jsonl")),)
        ),
    )


def replace_bytes(path: Path, old: bytes, new: bytes) -> None:
    """Edit a file in place; its size and its modification time stay."""
    before = path.stat()
    content = path.read_bytes()
    assert len(old) == len(new) and old in content
    with path.open("rb+") as file:
        file.write(content.replace(old, new))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


# File, bytes that it has, bytes in their place, and the key in the message.
EDITS = (
    ("real.jsonl", b"algorithm", b"Algorithm", "sources.linked"),  # behind a link
    ("beir/corpus.jsonl", b'"a"', b'"c"', "sources.beir"),
    ("beir/qrels/train.tsv", b"d1", b"d2", "sources.beir"),
    ("saved/data-00000-of-00001.arrow", b"answer 1", b"answer 9", "sources.saved"),
    ("test.jsonl", b"question", b"Question", "decontaminate.mine"),
    ("tokenizer/tokenizer.json", b'"<eos>"', b'"<EOS>"', ""),
)


def test_a_change_of_equal_size_and_time_is_noticed_and_named(
    config: PrepareConfig, tmp_path: Path
) -> None:
    folder = prepare(config, num_workers=1)
    assert prepare_status(config) == "whole"
    for name, old, new, key in EDITS:
        path = tmp_path / name
        replace_bytes(path, old, new)
        assert prepare_status(config) == "other", name
        if key:
            with pytest.raises(UserError, match=f"{key}: .* has changed"):
                prepare(config, num_workers=1)
        replace_bytes(path, new, old)
        assert prepare_status(config) == "whole", name
    # A file that is touched, or copied to another place on the disk, is the same file.
    (tmp_path / "test.jsonl").touch()
    shutil.copy(tmp_path / "real.jsonl", tmp_path / "new").replace(tmp_path / "real.jsonl")
    before = (folder / "manifest.json").stat().st_mtime_ns
    assert (prepare(config, num_workers=1) / "manifest.json").stat().st_mtime_ns == before


def test_another_tokenizer_in_the_same_folder_is_refused_and_a_rewritten_one_is_not(
    config: PrepareConfig, tmp_path: Path
) -> None:
    prepare(config, num_workers=1)
    file = tmp_path / "tokenizer" / "tokenizer.json"
    tree = json.loads(file.read_text())
    file.write_text(json.dumps(tree))
    prepare(config, num_workers=1)
    tree["normalizer"] = {"type": "Lowercase"}
    file.write_text(json.dumps(tree))
    with pytest.raises(UserError, match=r"tokenizer: .* has changed"):
        prepare(config, num_workers=1)


def test_a_folder_that_comes_to_lower_case_its_texts_has_another_tokenizer(
    config: PrepareConfig, tmp_path: Path
) -> None:
    settings = tmp_path / "tokenizer" / "sentence_bert_config.json"
    settings.write_text('{"do_lower_case": false}')
    (tmp_path / "tokenizer" / "modules.json").write_text("[]")
    prepare(config, num_workers=1)
    assert prepare_status(config) == "whole"
    settings.write_text('{"do_lower_case": true}')
    assert prepare_status(config) == "other"
    with pytest.raises(UserError, match=r"tokenizer: .* has changed"):
        prepare(config, num_workers=1)


def test_unchanged_inputs_are_not_read_again(
    config: PrepareConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As if the files had been old when they were hashed; fresh ones are hashed again to be sure.
    monkeypatch.setattr(recipes, "_TICK_NS", -(10**12))
    recipe = recipes.read_recipe(prepare(config, num_workers=1))
    assert all(entry.stamp for entry in recipe.inputs)
    forged = [dataclasses.replace(entry, sha256="kept") for entry in recipe.inputs]
    assert recipes.find_change(config, dataclasses.replace(recipe, inputs=tuple(forged))) is None


def test_a_new_file_a_missing_one_and_another_setting_are_named(
    make_config: ConfigMaker, tmp_path: Path
) -> None:
    for name in ("a", "b"):
        (tmp_path / "rows").mkdir(exist_ok=True)
        write_jsonl(tmp_path / "rows" / f"{name}.jsonl", reasonaug_rows(5))
    source = SourceConfig(name="mine", format="reasonaug", path=str(tmp_path / "rows"))
    prepare(make_config(source), num_workers=1)
    longer = make_config(source, max_query_length=50)
    assert prepare_status(longer) == "other"
    with pytest.raises(UserError, match="max_query_length was 48 and is 50"):
        prepare(longer, num_workers=1)
    (tmp_path / "rows" / "b.jsonl").rename(tmp_path / "rows" / "c.jsonl")
    with pytest.raises(UserError, match=r"sources.mine: c.jsonl is new"):
        prepare(make_config(source), num_workers=1)
    (tmp_path / "rows" / "c.jsonl").unlink()
    with pytest.raises(UserError, match=r"sources.mine: b.jsonl is gone"):
        prepare(make_config(source), num_workers=1)
    assert prepare_status(make_config(source, name="elsewhere")) == "missing"


def test_half_built_shards_of_changed_data_are_started_over(
    config: PrepareConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def change(*_: object) -> None:
        replace_bytes(tmp_path / "test.jsonl", b"question", b"Question")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        prepare(config, num_workers=1, steps=(*STEPS[:2], Step("dedup", change, lambda build: 1)))
    assert ".dataset.building; the same command continues it" in capsys.readouterr().err
    prepare(config, num_workers=1)
    assert "starting over: decontaminate.mine: " in capsys.readouterr().err
    assert prepare_status(config) == "whole"


def test_inputs_that_change_during_the_work_make_no_dataset(
    config: PrepareConfig, tmp_path: Path
) -> None:
    def change(*_: object) -> None:
        replace_bytes(tmp_path / "test.jsonl", b"question", b"Question")

    with pytest.raises(UserError, match="has changed, while it was prepared"):
        prepare(config, num_workers=1, steps=(*STEPS, Step("change", change, lambda build: 1)))
    assert prepare_status(config) == "missing"


def test_of_two_prepares_of_one_folder_the_second_waits_and_finds_it_whole(
    config: PrepareConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lock = tmp_path / ".dataset.lock"
    # Not `capsys`: text that is printed while it empties its buffer is lost.
    with hold_lock(lock, tell=print), contextlib.redirect_stderr(io.StringIO()) as printed:
        second = threading.Thread(target=prepare, args=(config,), kwargs={"num_workers": 1})
        second.start()
        while (
            "waiting for another process that writes this folder (process" not in printed.getvalue()
        ):
            assert second.is_alive()
            time.sleep(0.01)
        assert not (tmp_path / ".dataset.building").exists()
    prepare(config, num_workers=1)
    second.join()
    output = capsys.readouterr().out
    assert "dataset is complete: " in output and output.count("-> ") == 2
    assert not lock.exists()


def test_a_config_that_cannot_be_built_leaves_nothing_behind(
    make_config: ConfigMaker, tmp_path: Path
) -> None:
    source = SourceConfig(name="mine", format="jsonl", path=str(tmp_path / "rows.jsonl"))
    # A wrong format is found before a tokenizer is looked for.
    with pytest.raises(UserError, match=r"sources.mine.format: 'jsonl'"):
        prepare(make_config(source, tokenizer="an/unknown-tokenizer"), num_workers=1)
    assert list(tmp_path.iterdir()) == []


def test_an_output_folder_that_cannot_be_written_is_refused_first(
    make_config: ConfigMaker, tmp_path: Path
) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", reasonaug_rows(5))
    source = SourceConfig(name="mine", format="reasonaug", path=str(path))
    for place in (path / "shards", tmp_path / ("x" * 250), Path("/")):
        with pytest.raises(UserError, match="output_dir"):
            prepare(make_config(source, output_dir=place, tokenizer="none"), num_workers=1)


def test_an_output_folder_may_be_a_link(make_config: ConfigMaker, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", reasonaug_rows(5))
    source = SourceConfig(name="mine", format="reasonaug", path=str(path))
    (tmp_path / "disk").mkdir()
    (tmp_path / "dataset").symlink_to(tmp_path / "disk")
    prepare(make_config(source), num_workers=1)
    assert (tmp_path / "disk" / "manifest.json").is_file()
    assert prepare_status(make_config(source)) == "whole"


def test_files_of_one_name_in_several_folders_are_told_apart(
    make_config: ConfigMaker, tmp_path: Path
) -> None:
    """The parts of a saved DatasetDict, and train/ and dev/ of a folder."""
    rows = [{"query": f"query {k}", "positives": [f"answer {k}"]} for k in range(4)]
    whole = datasets.Dataset.from_list(rows)
    parts = {"train": whole, "test": whole.select([0])}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    files = [tmp_path / "rows" / folder / "a.jsonl" for folder in ("train", "dev", "train/more")]
    for number, file in enumerate(files):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(file, rows[number : number + 2])
    sources = [
        SourceConfig(name=name, format="columns", path=str(tmp_path / name))
        for name in ("saved", "rows")
    ]
    config = make_config(*sources)
    prepare(config, num_workers=1)
    assert prepare_status(config) == "whole"
    first, second = files[0].read_bytes(), files[2].read_bytes()
    files[0].write_bytes(second)
    files[2].write_bytes(first)
    assert prepare_status(config) == "other"
    files[0].write_bytes(first)
    files[2].write_bytes(second)
    assert prepare_status(config) == "whole"


def test_the_end_says_what_was_kept_dropped_and_left_out(
    make_config: ConfigMaker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"query": "a", "positives": ["one"], "lang": "en"},
        {"query": "b", "positives": ["two"], "negatives": ["two", ""], "lang": "en"},
        {"query": "a question of the test set", "positives": ["three"], "lang": "en"},
        {"query": "c", "positives": ["four"], "lang": "de"},
    ]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    write_jsonl(tmp_path / "test.jsonl", [{"text": "a question of the test set"}])
    source = SourceConfig(name="mine", format="columns", path=str(path), where={"lang": "en"})
    rule = DecontaminateConfig(
        sets=(EvaluationSetConfig(name="test", path=str(tmp_path / "test.jsonl")),)
    )
    folder = prepare(make_config(source, decontaminate=rule), num_workers=1)
    out, err = capsys.readouterr()
    assert out.startswith("2 examples, 2 documents, 3 dropped (1 ")
    for part in ("1 equals a positive", "1 empty", "1 in an evaluation set", "dataset/report.md"):
        assert part in out
    assert "records left out by `where`: 1\n" in err
    assert "prepare: collect: 3 rows, " in err
    assert "Records left out by `where`, not listed below: 1." in (folder / "report.md").read_text()


def test_files_written_again_are_read_again_in_one_process(
    make_config: ConfigMaker, tmp_path: Path, tokenizer_path: Path
) -> None:
    """Judgements, corpus, saved data sets and earlier datasets under the same paths."""
    decode = AutoTokenizer.from_pretrained(tokenizer_path).decode

    def texts(folder: Path) -> dict[str, tuple[list[str], list[str]]]:
        dataset = Dataset.open(folder)
        ids = np.arange(dataset.num_examples)

        def documents(column: str) -> list[list[str]]:
            lists = dataset.examples.views(column, ids)
            return [list(map(decode, dataset.documents.views("tokens", row))) for row in lists]

        queries = map(decode, dataset.examples.views("query", ids))
        pairs = zip(documents("positives"), documents("negatives"), strict=True)
        return dict(zip(queries, pairs, strict=True))

    beir, saved = tmp_path / "beir", tmp_path / "saved"
    (beir / "qrels").mkdir(parents=True)
    write_jsonl(beir / "queries.jsonl", [{"_id": "q", "text": "fox"}])
    found = []
    for word, score in (("one", "0"), ("two", "1")):
        write_jsonl(beir / "corpus.jsonl", [{"_id": d, "text": f"{d} {word}"} for d in "ab"])
        judged = f"q\ta\t{score}\nq\tb\t{1 - int(score)}\n"
        (beir / "qrels" / "train.tsv").write_text(judged)
        shutil.rmtree(saved, ignore_errors=True)
        rows = [{"query": f"wolf {word}", "positives": f"c {word}"}]
        datasets.Dataset.from_list(rows).save_to_disk(str(saved))
        sources = (
            SourceConfig(name="beir", format="mteb", path=str(beir)),
            SourceConfig(name="saved", format="columns", path=str(saved)),
        )
        folder = prepare(make_config(*sources), num_workers=1)
        found.append(texts(folder))
        shutil.rmtree(folder)
    assert found == [
        {"fox": (["b one"], ["a one"]), "wolf one": (["c one"], [])},
        {"fox": (["a two"], ["b two"]), "wolf two": (["c two"], [])},
    ]
