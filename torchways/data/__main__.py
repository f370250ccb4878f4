"""`python -m torchways.data`: a data process; a node agent starts it."""

from torchways.data.server import main

main()
