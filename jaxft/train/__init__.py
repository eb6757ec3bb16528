"""The state, the batch and the step of training."""
