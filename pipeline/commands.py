"""Groups of `diffembed` subcommands, and the arguments they share."""
