"""Exports in, FollowIR, LongEmbed and BRIGHT scores out, by local loop or job array."""
