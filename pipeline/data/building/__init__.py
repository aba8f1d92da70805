"""Steps from raw files to shards; each is a set of tasks whose outputs appear by rename."""
