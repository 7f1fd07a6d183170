"""Continue a text, greedily: python generate.py "Once upon a time" """

import json
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch.export.pt2_archive._package import load_pt2

here = Path(__file__).parent
facts = json.loads((here / "package.json").read_text())
functions = load_pt2(here / "model.pt2", load_weights_from_disk=True).aoti_runners
read, step = functions["read"], functions["step"]
tokenizer = Tokenizer.from_file(str(here / "tokenizer.json"))
ids = tokenizer.encode(sys.argv[1]).ids
places = len(ids) + 64  # for the text and what is added to it
torch.set_default_device(facts["device"])
dtype = getattr(torch, facts["dtype"])
cache = [[torch.zeros(1, places, *slot, dtype=dtype) for slot in layer] for layer in facts["cache"]]
logits = (read if len(ids) > 1 else step)(torch.tensor([ids]), torch.tensor([0]), cache)
while (token := int(logits[0].argmax())) not in facts["stop_ids"] and len(ids) < places:
    logits = step(torch.tensor([[token]]), torch.tensor([len(ids)]), cache)
    ids.append(token)
print(tokenizer.decode(ids))
