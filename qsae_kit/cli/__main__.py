"""`python -m qsae_kit.cli.app`: the same as `qsae`."""

from qsae_kit.cli.app import main

main()
