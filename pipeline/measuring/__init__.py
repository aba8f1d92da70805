"""Measure how fast this machine is, for plans: `diffembed plan calibrate`."""
