"""`python -m torchways.island`."""

from torchways.island.server import main

main()
