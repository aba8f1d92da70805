"""Models: packed token ids to unit vectors, and exports that other programs load."""
