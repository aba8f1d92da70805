"""Contrastive losses over the global batch, and gradient caching that knows no engine."""
