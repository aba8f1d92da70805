"""Backbones, pooling and packing: token ids in, unit vectors out, a folder anyone can load."""
