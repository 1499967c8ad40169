"""Multi-token prediction: one extra block that predicts the token after next (V4 report section 2.1, V4.md 2.6).

Shapes: B batch, S sequence, C streams, M hidden.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from v4train.model.attention import INDEXED
from v4train.model.block import Block
from v4train.model.config import ModelConfig
from v4train.model.embedding import Embedding
from v4train.model.head import Head, OutputNorm
from v4train.model.losses import Losses
from v4train.model.norm import RMSNorm


def next_tokens(input_ids: Tensor, document_ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What MTP reads and predicts at each position: tokens t+1, documents, tokens t+2, each [B, S] int64.

    A position whose next token lies in another document, or beyond the row and unknown, becomes padding
    (document -1): it joins no attention, no loss and no load. The last column's next token is known from `targets`.

    targets: [B, S + 2] where more is known: the target of the token after these, and that token, each -100 where it
        belongs to another document.
    """
    length = input_ids.shape[1]
    last = targets[:, -1:]
    following = torch.cat([input_ids[:, 1:], last.clamp(min=0)], dim=1)
    documents = torch.cat([document_ids[:, 1:], torch.where(last >= 0, document_ids[:, -1:], -1)], dim=1)
    after = targets[:, 1 : length + 1] if targets.shape[1] > length else F.pad(targets[:, 1:], (0, 1), value=-100)
    known = (documents == document_ids) & (document_ids >= 0)
    return torch.where(known, following, 0), torch.where(known, document_ids, -1), torch.where(known, after, -100)


class MTP(nn.Module):
    """x' = P_token(norm(emb(t+1))) + P_hidden(norm(X)) per stream, one block (V4: swa), own collapse and norm.

    Embedding and output matrix are the model's own, called as modules (a sharded parameter is gathered by module).
    """

    def __init__(self, config: ModelConfig, losses: Losses, embedding: Embedding, head: Head) -> None:
        super().__init__()
        # Held outside the module tree: they are the main model's parameters, not this block's.
        object.__setattr__(self, "shared", (embedding, head))
        self.losses = losses
        self.token_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.hidden_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.token_projection = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.hidden_projection = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.block = Block(config, losses, config.mtp_layer, config.mtp_ffn, hashed=False)
        if isinstance(self.block.attention, INDEXED):
            self.block.attention.loss_count = "indexer_kl_mtp"  # it sees other tokens than the main model's layers
        self.output_norm = OutputNorm(config)

    def forward(
        self, streams: Tensor, input_ids: Tensor, document_ids: Tensor, targets: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Records `mtp_loss`; hands its inputs on unchanged."""
        embedding, head = self.shared
        token_ids, documents, after = next_tokens(input_ids, document_ids, targets)
        tokens = self.token_projection(self.token_norm(embedding.lookup(token_ids)))
        hidden = tokens[:, :, None] + self.hidden_projection(self.hidden_norm(streams))
        hidden, *_ = self.block(hidden, token_ids, documents, after)
        total, count = head.lm_head(self.output_norm(hidden), after)
        self.losses.record("mtp_loss", self.losses.mean("mtp_loss", total, count))
        return streams, input_ids, document_ids, targets
