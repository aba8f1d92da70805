"""Every distinct text of all tasks once, in blocks: planned, embedded by an array, looked up."""
