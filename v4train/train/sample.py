"""Text from the model as it stands, by recomputing the whole context for each token (a few dozen tokens only)."""

from collections.abc import Callable

import torch
from torch import Tensor

from v4train.data import Tokenizer


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
        logits = logits_of(torch.tensor([ids]))[0, -1].float().cpu()
        if not torch.isfinite(logits).all():  # a diverged model has nothing to say
            break
        logits[tokenizer.vocab_size :] = -torch.inf  # the corpus may have filled fewer entries than the model embeds
        if temperature == 0:
            ids.append(int(logits.argmax()))
        else:
            probabilities = (logits / temperature).softmax(-1)
            ids.append(int(torch.multinomial(probabilities, 1, generator=generator)))
    end = ids.index(tokenizer.eos_id) if tokenizer.eos_id in ids else len(ids)
    return tokenizer.decode(ids[1:end])
