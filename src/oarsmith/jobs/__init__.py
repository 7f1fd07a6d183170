"""One file a command: reads a config, wires the parts, runs."""
