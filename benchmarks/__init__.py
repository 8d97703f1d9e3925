"""The benchmark harness: speed and accuracy of every engine against eager PyTorch."""
