"""Exports in, FollowIR, LongEmbed and BRIGHT scores out, by local loop or job array.

score a task        array, elements -> task -> search, encoder, snapshots, scoring, instructions
share texts out     plan -> listing, distinct, keys, cuts; embed -> store -> score
write a report      report -> tables, plots, references, bootstrap, by_step, examples, merge
vectors in a file   encode, encode_job
tags of words       probe, words

What loads an export on the device of this process, for all of them, is `place`.
"""
