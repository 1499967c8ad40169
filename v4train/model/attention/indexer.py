"""Lightning indexer of CSA: scores compressed entries for each query (V4 report eqs. 13-17). And its loss, DSA's too.

Shapes: B batch, S sequence, M hidden, N entries, I indexer heads, J their width.
"""

from typing import Any

from torch import Tensor, nn

from v4train.model.attention.compressor import Compressor
from v4train.model.attention.core import IndexUse, attend
from v4train.model.config import ModelConfig
from v4train.model.losses import Losses
from v4train.model.rope import rotate


class Indexer(nn.Module):
    """Own compressor for keys, queries from the attention's latent, one weight per head.

    The Hadamard rotation of the released model is orthogonal and serves only quantisation: left out.
    """

    def __init__(self, config: ModelConfig, ratio: int) -> None:
        super().__init__()
        options = config.attention.indexer
        self.head_dim = options.head_dim
        self.scale = options.num_heads**-0.5 * options.head_dim**-0.5
        self.compressor = Compressor(config.hidden_size, options.head_dim, ratio, True, config.norm_eps)
        width = options.num_heads * options.head_dim
        self.query = nn.Linear(config.attention.q_lora_rank, width, bias=False)
        self.query.weight.head_rows = options.head_dim
        self.head_weight = nn.Linear(config.hidden_size, options.num_heads, bias=False)

    def forward(self, x: Tensor, latent: Tensor, rotation: Tensor, keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs of `index_scores`.

        Args:
            x: [B, S, M]; latent: [B, S, q_lora_rank]; both detached by the caller.
            rotation: complex64 rotations of the tokens.
            keys: [B, N, J], from `compressor`, rotated.

        Returns:
            query [B, S, I, J], keys [B, N, J], head weights [B, S, I] with I^-0.5 * J^-0.5 included.
        """
        query = rotate(self.query(latent).unflatten(-1, (-1, self.head_dim)), rotation)
        return query, keys, self.head_weight(x) * self.scale


def attend_indexed(
    losses: Losses,
    query: Tensor,
    *,
    sink: Tensor | None,
    index: IndexUse | None,
    mean_over: tuple[str, Tensor],
    weight: float,
    **inputs: Any,
) -> Tensor:
    """Output of `attend`; where `index` has a loss, backward also trains the indexer, and how well it does is recorded.

    Args:
        mean_over: what the loss is a mean over: its name among `losses.denominators`, and this batch's own count.
        weight: of the loss.
        inputs: further arguments of `attend`.
    """
    with losses.for_indexer() as alone:
        sink = sink.detach() if alone and sink is not None else sink
        attended = attend(query, sink=sink, index=index, **inputs)
        if index is None or not index.with_loss:
            return attended.output
        losses.record_share("indexer_captured", attended.uniform_kl - attended.kl, attended.uniform_kl)
        losses.record_share("indexer_recall", attended.recalled, attended.recallable)
        name, count = mean_over
        return losses.attach(attended.output, "indexer_kl", losses.mean(name, attended.kl, count), weight)
