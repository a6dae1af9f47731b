"""Scripts that run once and write a manifest or a model folder: `python -m prepare.NAME --help`."""
