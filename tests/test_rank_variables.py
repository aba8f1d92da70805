from __future__ import annotations

from pipeline.launch import discover_world, without_rank


def test_a_process_that_starts_anew_is_no_rank_under_any_launcher() -> None:
    launchers = {
        "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
        "mpirun": tuple(f"OMPI_COMM_WORLD_{what}" for what in ("RANK", "SIZE", "LOCAL_RANK")),
        "srun": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
    }
    for launcher, names in launchers.items():
        environ = {**dict.fromkeys(names, "1"), names[1]: "2", "HF_HOME": "1", "SLURM_CONF": "c"}
        assert discover_world(environ).world_size == 2, launcher
        found = without_rank(environ)
        assert found == {"HF_HOME": "1", "SLURM_CONF": "c"}
        assert not discover_world(found).launched
