"""Tasks: data, loss and loop wired together, each for one kind of fine-tuning."""
