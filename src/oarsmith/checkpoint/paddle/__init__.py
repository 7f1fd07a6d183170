"""PaddleNLP's model files, read and written under its own names and layouts."""
