"""Check that Slurm answers, that its limits fit, and that it accepts slurm/cluster.env's flags."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from pipeline.config import EvaluateConfig, load_config
from pipeline.config.explain import kind_of
from pipeline.doctor.finding import Finding, Level, fail, guarded, ok, warn
from pipeline.errors import UserError
from pipeline.submission import slurm
from pipeline.submission.jobs import FLAG_ARRAYS, Site, read_site

_SECONDS = 10
_SCRIPT = "#!/bin/bash\n{flags}\ntrue\n"


def check_slurm(config: Path | None = None) -> Iterator[Finding]:
    """Yield nothing without Slurm, or its limits and its answer to each kind of job.

    Args:
        config: of an evaluation, whose array must fit; others are ignored.
    """
    if shutil.which("sbatch") is None:
        return
    try:
        shown = slurm.check_output("scontrol", "show", "config", patience=_SECONDS)
    except UserError as error:
        # A machine may have the programs of Slurm and no cluster.
        level: Level = "fail" if "SLURM_JOB_ID" in os.environ else "warn"
        yield Finding("slurm", level, error.found, error.fix)
        return
    settings = slurm.parse_settings(shown)
    name = settings.get("ClusterName", "without a name")
    yield ok("slurm", f"cluster {name} answers")
    if settings.get("JobRequeue", "1") == "0":
        yield warn(
            "slurm requeue",
            "JobRequeue=0: jobs are not queued again unless their script asks, as ours do",
            "where even `scontrol requeue` is forbidden, a training submits its own successor",
        )
    yield from guarded("slurm arrays", lambda: _arrays(settings, config))
    yield from guarded("cluster.env", _flags)


def _arrays(settings: dict[str, str], config: Path | None) -> Iterator[Finding]:
    limit = int(settings.get("MaxArraySize", "1001"))
    number = _num_elements(config)
    if number > limit:
        yield fail(
            "slurm arrays",
            f"{config} has {number:,} elements, MaxArraySize is {limit:,}",
            "fewer models in one config, or `diffembed submit evaluate --texts N`",
        )
    else:
        elements = f", {config} has {number:,}" if number else ""
        found = f"up to {limit:,} elements{elements}"
        yield ok("slurm arrays", found)


def _num_elements(config: Path | None) -> int:
    try:
        if config is None or kind_of(config) != "evaluate":
            return 0
        from pipeline.evaluation.run import num_elements

        return num_elements(load_config(EvaluateConfig, config))
    except UserError:
        return 0  # the check of the config names the fault


def _flags() -> Iterator[Finding]:
    """Ask Slurm whether it could ever run a job with each array of flags: GRES, time, account."""
    try:
        site = read_site()
    except UserError as error:
        if "no such file" in error.found:
            fix = "go to the folder that holds slurm/"
            yield warn("cluster.env", error.found, fix)
            return
        raise
    for name in FLAG_ARRAYS:
        if name != "SITE_FLAGS":
            yield from guarded(f"cluster.env {name}", partial(_accepted, site, name))


def _accepted(site: Site, name: str) -> Iterator[Finding]:
    words = [" ".join(flag.words) for flag in site.flags_of(name)]
    text = _SCRIPT.format(flags="\n".join(f"#SBATCH {word}" for word in words))
    check = f"cluster.env {name}"
    try:
        slurm.check_text(name, text)
    except slurm.NoAnswerError:
        raise
    except UserError as error:
        # A site need not have every kind of node; jobs of the other kinds still run.
        fix = f"change {name} in {site.path}, if you submit such jobs"
        yield warn(check, error.found, fix)
        return
    yield ok(check, " ".join(words))
