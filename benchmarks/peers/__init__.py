"""Workers that run the dispatch benchmark of Figure 5 on other systems, each in its own environment."""
