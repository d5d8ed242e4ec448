"""One output folder: checkpoints, records, results, pages."""
