"""From a checkpoint to a bundle: graphs, weights, validation."""
