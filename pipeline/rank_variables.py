"""What a launcher or Slurm tells the processes of a job, to be kept from those that start anew."""

from __future__ import annotations

import re
from collections.abc import Mapping

_OF_A_RANK = re.compile(
    r"(SLURM|SRUN|OMPI|PMI\w*|PRTE|TORCHELASTIC)_.*|(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)"
    r"|MASTER_(ADDR|PORT)"
)
# Where Slurm itself is found.
_KEPT = {"SLURM_CONF", "SLURM_CLUSTERS"}


def without_rank(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables for a process that must not take itself for a rank of another one's job."""
    return {
        name: value
        for name, value in environ.items()
        if name in _KEPT or not _OF_A_RANK.fullmatch(name)
    }
