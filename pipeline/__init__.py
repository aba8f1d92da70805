"""diffembed: raw retrieval data to a scored text embedder, on one laptop or many nodes."""

__version__ = "0.1.0"
