"""What the order of training data does to what a model learns."""
