"""From a bundle to one for a single engine: precisions, fusions, files of each runtime."""
