"""Pictures of batches, kernels, predictions and neighbours."""
