"""Finished results as tables, plots and pages; scores nothing."""
