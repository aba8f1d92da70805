"""Turn configs into Slurm jobs, and keep a training job alive through restarts.

    chain ──> jobs (text of batch scripts) ──> submit ──> slurm ──> sbatch, squeue, scontrol
    slurm/train.sbatch ──> restart ──> allocation ──> health on every node
    slurm/synthesize.sbatch ──> serving ──> servers, ReasonAug, restart

`submit`, `restart`, `serving`, `allocation` and `health` are also programs:
`python -m pipeline.submission.X`.
"""
