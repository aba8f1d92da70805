"""Offline synthesis of reasoning-intensive retrieval data."""
