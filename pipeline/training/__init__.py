"""One exact optimizer step after another, on any ZeRO stage and any number of ranks."""
