"""Update rules, one file each, over named parameters; ``training/optimizer.py`` is where others find them."""
