"""Contrastive losses over the global batch; nothing here knows an engine."""
