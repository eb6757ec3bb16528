"""Text out of a model: sampling, and the loop over a key/value cache."""
