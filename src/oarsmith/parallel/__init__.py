"""Training on many processes: axes of a mesh, and what each of them splits."""
