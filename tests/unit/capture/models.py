"""A small model with attention, and its training step, for several tests."""

import torch
import torch.nn.functional as F
from torch import nn

from torchways.controller.function import make_pipeline


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x):
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm(x)).view(batch, length, 3, 2, width // 2).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.out(y.transpose(1, 2).reshape(batch, length, width))


class Model(nn.Module):
    def __init__(self, tied=False):
        super().__init__()
        self.embed = nn.Embedding(17, 8)
        self.layers = nn.ModuleList(Block(8) for _ in range(3))
        self.head = nn.Linear(8, 17, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, x):
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def pipelined(session, module, split_spec, meshes):
    return make_pipeline(module, split_spec, meshes, None, lambda: session)


def make_step(model, optimizer, clip):
    def step(x, y):
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5) if clip else loss.detach() * 0
        optimizer.step()
        optimizer.zero_grad()
        return loss, norm

    return step


def make_sgd_step(model, loss_of):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step(x):
        loss = loss_of(x)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step
