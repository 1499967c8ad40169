"""Text from the model as it stands, by recomputing the whole context for each token (a few dozen tokens only).

`v4train.generation` has the cache, but stops early: here every rank must call the model equally often.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from v4train.data import Tokenizer
from v4train.generation import sample


def generate(
    logits_of: Callable[[Tensor], Tensor], tokenizer: Tokenizer, prompt: str, length: int, temperature: float, seed: int
) -> str:
    """Prompt and continuation as text.

    Args:
        logits_of: token ids [1, S] to logits [1, S, V]. Called the same number of times on every rank, since a forward
            may hold collectives. Logits that are not finite end the text.
        length: tokens to add.
        temperature: 0 takes the likeliest token.
        seed: of the sampling; the result is a function of it and the model.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = [tokenizer.bos_id, *tokenizer.encode(prompt).tolist()]
    for _ in range(length):
        # The corpus may have filled fewer entries than the model embeds.
        logits = logits_of(torch.tensor([ids]))[0, -1, : tokenizer.vocab_size].cpu()
        try:
            ids.append(sample(logits, temperature, 1.0, generator))
        except FloatingPointError:  # a diverged model has nothing to say
            break
    end = ids.index(tokenizer.eos_id) if tokenizer.eos_id in ids else len(ids)
    return tokenizer.decode(ids[1:end])
