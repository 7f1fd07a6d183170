"""The tokens by which a model says how good a step is. No PyTorch here."""

from __future__ import annotations

from oarsmith.config.preferences import ProcessKeys
from oarsmith.errors import ConfigError
from oarsmith.text import Tokenizer


def reward_ids(keys: ProcessKeys, tokenizer: Tokenizer) -> tuple[int, int]:
    """The ids of the tokens for good and bad.

    Raises:
        ConfigError: there are not two of them, or one is no single token.
    """
    names, ids = keys.reward_tokens, list[int]()
    for name in names:
        found = tokenizer.encode(name, add_special_tokens=False)
        index = found[0] if len(found) == 1 else tokenizer.token_to_id(name)
        if index is None:
            what = f"{name!r} is {len(found)} tokens, not one"
            raise ConfigError(what, where="reward_tokens", fix="choose words that are single tokens of this model")
        ids.append(index)
    if len(set(ids)) != 2 or len(ids) != 2:
        what = f"{', '.join(names) or 'nothing'} is not two different tokens"
        raise ConfigError(what, where="reward_tokens", fix="give the one for good and the one for bad: +,-")
    return ids[0], ids[1]
