"""Training recipes: plain PyTorch, public torchways names only, composed by Hydra from `configs/`."""
