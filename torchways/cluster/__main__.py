"""`python -m torchways.cluster`."""

from torchways.cluster.server import main

main()
