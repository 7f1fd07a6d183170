"""Methods: a batch builder and an objective each; the loop is not theirs."""
