"""Elements in, results out: each task scored by unmodified mteb, with every query its own share."""
