"""The network of Trajectory Transformer: a GPT over the tokens of transitions, whole or one token at a time.

Invariant: a token's logits are the same whether keys and values of the tokens before it are cached or computed again.

Shapes: R rows, T tokens, W width, N bins, S dimensions of a transition.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eval.baselines.trajectory_transformer.tokens import Config


class Block(nn.Module):
    """Pre-norm GPT block."""

    def __init__(self, config: Config):
        super().__init__()
        W = config.width
        self.heads, self.dropout = config.heads, config.dropout
        self.norm_1, self.norm_2 = nn.LayerNorm(W), nn.LayerNorm(W)
        self.qkv, self.out = nn.Linear(W, 3 * W), nn.Linear(W, W)
        self.up, self.down = nn.Linear(W, 4 * W), nn.Linear(4 * W, W)

    def heads_of(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys, values (R, heads, T, W / heads) of x (R, T, W)."""
        R, T, _ = x.shape
        q, k, v = self.qkv(self.norm_1(x)).view(R, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        return q, k, v

    def attend(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        rate = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=rate)
        x = x + F.dropout(self.out(y.transpose(1, 2).reshape(x.shape)), rate)
        return x + F.dropout(self.down(F.gelu(self.up(self.norm_2(x)))), rate)


class TrajectoryTransformer(nn.Module):
    """Tokens of whole transitions from the first dimension on -> logits over N + 1 of the next token.

    Value tokens are predicted, but no other token attends to them: at play past values are not known."""

    def __init__(self, config: Config, observations: int, actions: int):
        super().__init__()
        self.config, self.observations, self.actions, W = config, observations, actions, config.width
        self.dimensions = observations + actions + 2
        self.tokens = nn.Embedding(self.dimensions * config.bins + 1, W)  # the last row: the episode is over
        self.places = nn.Parameter(torch.zeros(self.dimensions * config.transitions, W))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(W)
        self.head = nn.Parameter(torch.empty(self.dimensions, config.bins + 1, W))  # one for each dimension
        nn.init.uniform_(self.head, -(W**-0.5), W**-0.5)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, 0.0, 0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        if config.smoothing:
            self._order_bins()

    @torch.no_grad()
    def _order_bins(self) -> None:
        """Start each dimension's embeddings as random mixtures of slow waves over its bins."""
        N, waves = self.config.bins, 8
        angles = torch.linspace(0, torch.pi, N)[:, None] * torch.arange(1, waves + 1)
        basis = torch.cat([angles.cos(), angles.sin()], dim=1) / torch.arange(1, waves + 1).repeat(2)
        mixtures = torch.randn(self.dimensions, 2 * waves, self.config.width) * 0.2
        self.tokens.weight[:-1] = (basis @ mixtures).flatten(0, 1)

    def embed(self, tokens: Tensor, places: Tensor) -> Tensor:
        """Tokens (R, T) in [0, N] at places (T,) to (R, T, W)."""
        rows = tokens + places % self.dimensions * self.config.bins
        rows = torch.where(tokens == self.config.bins, self.tokens.num_embeddings - 1, rows)
        return self.tokens(rows) + self.places[places]

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (R, T) -> logits (R, T, N + 1): at t those of token t + 1."""
        places = torch.arange(tokens.shape[1], device=tokens.device)
        x, _ = self.run(tokens, places)
        return torch.einsum("rtw,tnw->rtn", x, self.head[(places + 1) % self.dimensions])

    def run(self, tokens: Tensor, places: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Last hidden states (R, T, W), and each block's keys and values of all tokens that may be attended to."""
        visible = places % self.dimensions != self.dimensions - 1
        mask = visible & (places[:, None] >= places)
        x = F.dropout(self.embed(tokens, places), self.config.dropout if self.training else 0.0)
        cache = []
        for block in self.blocks:
            assert isinstance(block, Block)
            q, k, v = block.heads_of(x)
            x = block.attend(x, q, k, v, mask)
            cache.append((k[:, :, visible], v[:, :, visible]))
        return self.norm(x), cache

    def step(self, token: Tensor, place: int, cache: list[tuple[Tensor, Tensor]], filled: int) -> Tensor:
        """Token (R,) after `filled` cached ones -> logits (R, N + 1). The cache (R, heads, room, W / heads) gains
        the token unless it is a value."""
        value = place % self.dimensions == self.dimensions - 1
        x = self.embed(token[:, None], torch.tensor([place], device=token.device))
        for block, (keys, values) in zip(self.blocks, cache):
            assert isinstance(block, Block)
            q, k, v = block.heads_of(x)
            if not value:
                keys[:, :, filled : filled + 1], values[:, :, filled : filled + 1] = k, v
            stop = filled + (not value)
            x = block.attend(x, q, keys[:, :, :stop], values[:, :, :stop], None)
        return self.norm(x[:, 0]) @ self.head[(place + 1) % self.dimensions].T
