"""Published retrieval data in, one reproducible global batch at a time out."""
