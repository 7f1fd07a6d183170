"""The one training loop and its parts; a method gives it a batch builder and an objective."""
