"""Models of the recipes, in plain PyTorch; they know nothing of torchways."""
