"""``python -m fluidopt``: the same as the ``fluidopt`` command."""

from fluidopt.cli import main

main()
