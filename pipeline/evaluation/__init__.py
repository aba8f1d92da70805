"""Exports in, FollowIR, LongEmbed and BRIGHT scores out, by local loop or job array.

tasks      what is asked: tasks of mteb, their data, texts and wording
models     what is scored: exports, told apart, fitted to a GPU and loaded
blocks     shares texts out: every distinct text once, embedded by an array
vectors    texts of a user's own file as vectors
words      tags of words, read off an export
score      runs tasks, from a model or from blocks
report     tables and plots of what score wrote

A room imports those above it only; blocks, vectors and words do not know each other.
"""
