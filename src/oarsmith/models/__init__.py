"""One decoder for every family: specs, parts and the families that fill them."""
