"""Reports of runs as one HTML page: `python -m train.report`."""
