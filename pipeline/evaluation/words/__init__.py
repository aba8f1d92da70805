"""What a linear classifier reads off an export about single words."""
