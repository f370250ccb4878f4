"""`python -m torchways.executor`."""

from torchways.executor.server import main

main()
