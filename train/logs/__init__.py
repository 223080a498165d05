"""What a training says of itself: on the terminal, and to TensorBoard or Weights & Biases."""
