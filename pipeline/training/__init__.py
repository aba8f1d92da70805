"""One exact optimizer step after another, on any ZeRO stage and any number of ranks.

a run       trainer -> run_checkpoints, run_identity, signals, metrics, evaluations
a step      objective -> step (contrastive), token_prediction -> engine, stages, agreement
DeepSpeed   zero -> gradient_sums; ds_config, optim
on disk     checkpoint, saving, retention; export
"""
