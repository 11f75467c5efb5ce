"""The networks this project can build itself, one family per file, under the catalogue's names."""
