"""Texts of a user's own file as vectors in one Arrow file."""
