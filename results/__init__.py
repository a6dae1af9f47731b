"""What the experiments of RESULTS.md are run and analysed with: `python -m results.validate --help`."""
