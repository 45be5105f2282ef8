"""`python -m qsae_kit.cli`: the same as `qsae`."""

from qsae_kit.cli.app import main

main()
