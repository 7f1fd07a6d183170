"""Records to conversations to samples to packs to batches, with a report of every row."""
