"""A user's waiting time, next to mteb and sentence-transformers, all with their defaults.

    python tests/benchmarks/bench_job.py [evaluation] [sharing] [encode] [--scale 0.0005]

evaluation: FollowIR, LongEmbed at three lengths, BRIGHT v1.1 and v1, standard and long, with the
texts of the real ones at a small share: `diffembed evaluate plan`, `embed` and `score` against
`mteb.evaluate` task by task and length by length. sharing: the plan of that alone, which takes
`--scale 1` too. encode: `diffembed encode` of a file against `SentenceTransformer.encode`. On a GPU
both take it by themselves. On a busy CPU, OMP_NUM_THREADS=1 gives both one thread, so that CPU
seconds compare.

Whatever is heavy is imported inside functions: the processes that we start import this file too.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).parents[2]))

# Of LongEmbed; MiniLM reads no more than the last one.
LENGTHS = (128, 256, 512)
PRECISIONS: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")
TASKS = ("FollowIR", "LongEmbed", "BRIGHT", "BRIGHT-long", "BRIGHT-v1", "BRIGHT-v1-long")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Spent:
    """Wall-clock, and CPU seconds of this process and of those it started."""

    wall: float
    cpu: float

    def over(self, ours: Spent) -> str:
        """Return the ratio to what we need."""
        return (
            f"{self.wall / ours.wall:.2f} ({self.wall:.1f} s / {ours.wall:.1f} s); "
            f"CPU {self.cpu / ours.cpu:.2f} ({self.cpu:.1f} s / {ours.cpu:.1f} s)"
        )


def timed(work: Callable[[], Any]) -> tuple[Any, Spent]:
    """The result of a piece of work, and its cost."""
    wall, cpu = time.perf_counter(), sum(os.times()[:4])
    value = work()
    return value, Spent(wall=time.perf_counter() - wall, cpu=sum(os.times()[:4]) - cpu)


def recorded(function: Callable[..., Any], calls: list[Spent]) -> Callable[..., Any]:
    """The function, which also notes what each call takes."""

    def call(*arguments: Any, **keywords: Any) -> Any:
        value, spent = timed(lambda: function(*arguments, **keywords))
        calls.append(spent)
        return value

    return call


def config_of(folder: Path, hub: Path, precision: Any = "float32") -> Any:
    """The evaluation that is measured, with its results in a folder."""
    from bench_support import minilm_path

    from pipeline.config import EvaluateConfig, EvaluatedModel

    return EvaluateConfig(
        output_dir=folder / "out",
        models=(EvaluatedModel(name="minilm", path=minilm_path(), precision=precision),),
        tasks=TASKS,
        snapshots=hub,
        max_length=256,
        lengths={"LongEmbed": LENGTHS},
    )


def evaluation(folder: Path, scale: float) -> list[Any]:
    """All benchmarks: scores first, then time."""
    import full_size_hub
    from bench_support import Figure, minilm_path
    from sentence_transformers import SentenceTransformer

    from pipeline.evaluation.tasks import list_elements

    hub = full_size_hub.write_hub(folder / "hub", scale=scale)
    reference = SentenceTransformer(str(minilm_path()))
    elements = list_elements(config_of(folder, hub))

    def theirs() -> list[float]:
        scores = []
        for element in elements:
            reference.max_seq_length = element.max_length
            scores.append(direct(reference, element.task, hub))
        return scores

    encoding: list[Spent] = []
    reference.encode = recorded(reference.encode, encoding)
    wanted, slow = timed(theirs)
    slow_encoding = Spent(
        wall=sum(spent.wall for spent in encoding), cpu=sum(spent.cpu for spent in encoding)
    )
    names = [f"{element.task} at {element.max_length}" for element in elements]
    figures = []
    for precision in PRECISIONS:
        config = config_of(folder / precision, hub, precision)
        (scores, saved, embedding), fast = timed(lambda config=config: whole(config))
        gaps = [abs(one - other) for one, other in zip(wanted, scores, strict=True)]
        exact = precision == "float32"
        figures += [
            Figure(name=f"{precision}: largest difference of {len(gaps)} scores, mean",
                   asked="<= 1e-3" if exact else "",
                   measured=f"{max(gaps):.1e} ({names[gaps.index(max(gaps))]}), "
                            f"{sum(gaps) / len(gaps):.1e}",
                   ok=max(gaps) <= 1e-3 if exact else None, gate=exact),
            Figure(name=f"{precision}: work with repetitions / work embedded", measured=saved),
            Figure(name=f"{precision}: embedding, mteb + sentence-transformers / ours",
                   asked=">= 3", measured=slow_encoding.over(embedding),
                   ok=slow_encoding.wall >= 3 * embedding.wall),
            Figure(name=f"{precision}: ... with loading and scoring", measured=slow.over(fast)),
        ]  # fmt: skip
    return figures


def quick_or_full(quick: bool) -> list[Any]:
    """Return the figures of `evaluation`, for run.py."""
    with tempfile.TemporaryDirectory() as folder:
        return evaluation(Path(folder), 0.0003 if quick else 0.01)


def whole(config: Any) -> tuple[list[float], str, Spent]:
    """`diffembed evaluate plan`, `embed` and `score`.

    Returns:
        The scores, what sharing texts saves, and what embedding takes with the start of processes.
    """
    from pipeline.evaluation.run import embed, plan, score_all

    written = plan(config)
    _, embedding = timed(lambda: embed(config, 0, 1))
    scores = [float(result["score"]) for result in score_all(config)]
    return scores, _saved(written), embedding


def sharing(folder: Path, scale: float) -> list[Any]:
    """Return how often mteb would embed what is embedded once."""
    import full_size_hub
    from bench_support import Figure

    from pipeline.evaluation.run import plan

    hub = full_size_hub.write_hub(folder / "hub", scale=scale)
    saved = _saved(plan(config_of(folder, hub)))
    return [Figure(name="work with repetitions / work embedded", measured=saved)]


def _saved(plan: Any) -> str:
    return f"{plan.occurrence_cost / sum(plan.block_costs):.2f}"


def encode(folder: Path, scale: float) -> list[Any]:
    """A file of texts of mixed lengths to a file of vectors."""
    import full_size_hub
    import numpy as np
    import pyarrow as pa
    from bench_support import Figure, minilm_path
    from sentence_transformers import SentenceTransformer

    from pipeline.evaluation.encode import EncodeJob, encode_file

    texts = full_size_hub.mixed_texts(max(64, round(2_000_000 * scale)))
    source = folder / "texts.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))

    def theirs() -> np.ndarray:
        model = SentenceTransformer(str(minilm_path()))
        lines = source.read_text().splitlines()
        vectors = model.encode([json.loads(line)["text"] for line in lines])
        np.save(folder / "theirs.npy", vectors)
        return np.asarray(vectors)

    wanted_ND, slow = timed(theirs)
    figures = []
    for precision in PRECISIONS:
        job = EncodeJob(
            model=minilm_path(),
            input=str(source),
            output=folder / f"{precision}.arrow",
            precision=precision,
        )
        path, fast = timed(lambda job=job: encode_file(job))
        with pa.memory_map(str(path)) as file:
            column = pa.ipc.open_file(file).read_all()["vector"].combine_chunks()
        found_ND = np.asarray(column.flatten()).reshape(wanted_ND.shape)
        gap = float(abs(found_ND - wanted_ND).max())
        exact = precision == "float32"
        figures += [
            Figure(name=f"{precision}: largest difference of the vectors",
                   asked="<= 1e-5" if exact else "", measured=f"{gap:.1e}",
                   ok=gap <= 1e-5 if exact else None, gate=exact),
            Figure(name=f"{precision}: {len(texts)} texts, {len(texts) / fast.wall:.0f} a second; "
                        "sentence-transformers / ours",
                   measured=slow.over(fast)),
        ]  # fmt: skip
    return figures


def direct(reference: Any, task: str, snapshots: Path | None) -> float:
    """mteb's score of a sentence-transformers model, by mteb's own path and its defaults."""
    import mteb

    from pipeline.evaluation.datasets import get_task, localise, private_cache

    # datasets would take an earlier replica of the same name from its own cache.
    with tempfile.TemporaryDirectory() as scratch, private_cache(Path(scratch)):
        result = mteb.evaluate(
            reference,
            localise(get_task(task), snapshots),
            cache=None,
            co2_tracker=False,
            show_progress_bar=False,
        )[0]
    return float(result.get_score())


PARTS = {"evaluation": evaluation, "sharing": sharing, "encode": encode}


def run_parts(
    parts: Mapping[str, Callable[[Path, float], list[Any]]],
    *,
    description: str | None,
    scale: float,
) -> None:
    """Run the parts named on the command line, or all; exit code 1 where results differ.

    Args:
        parts: figures by (folder for data, share of the real sizes).
        description: of the command.
        scale: where none is given.
    """
    from bench_support import print_table

    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(parts))
    parser.add_argument("--scale", type=float, default=scale, help="share of the real sizes")
    parser.add_argument("--folder", type=Path, help="where the data go; default: a temporary one")
    options = parser.parse_args()
    if unknown := [name for name in options.parts if name not in parts]:
        parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(parts)}")
    failed = []
    for name in options.parts or parts:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            figures = parts[name](Path(folder), options.scale)
        print_table(name, figures)
        failed += [figure.name for figure in figures if figure.gate and not figure.ok]
    if failed:
        sys.exit(f"results differ that should be equal: {'; '.join(failed)}")


if __name__ == "__main__":
    run_parts(PARTS, description=__doc__, scale=0.0005)
