"""What the documentation's generator (mkdocs) does beyond its own: roles in docstrings, tables from the source."""
