"""`python -m torchways`: the command-line program."""

from torchways.cli.main import main

main()
