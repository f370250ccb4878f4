"""`python -m torchways.launch`."""

from torchways.launch.node import main

main()
