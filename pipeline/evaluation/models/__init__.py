"""What is scored: exports, told one from another, fitted to a GPU, loaded as mteb wants them."""
