"""torch.distributed.pipelining over gloo, a process with one thread for each slice: the steps of training.py.

Stages are eager PyTorch, of the layers that torchways_pipeline.py gives them.
"""

from typing import Any

import gloo_processes
import protocol
import torch
import torch.distributed as dist
import training
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import PipelineScheduleMulti, get_schedule_class


class LlamaStage(torch.nn.Module):
    """Some layers of a Llama; the first stage has its embedding, and the last one its norm and its head.

    It computes what the whole model does, from token ids, int64 of [batch, length], or activations of
    [batch, length, width] to activations or logits.
    """

    def __init__(self, model: Any, first: int, end: int) -> None:
        super().__init__()
        whole = model.model
        self.embed = whole.embed_tokens if first == 0 else None
        self.layers = whole.layers[first:end]
        self.rotary = whole.rotary_emb
        self.norm, self.head = (whole.norm, model.lm_head) if end == len(whole.layers) else (None, None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.embed is not None:
            x = self.embed(x)
        positions = torch.arange(x.shape[1], device=x.device)[None]
        rotation = self.rotary(x, positions)
        for layer in self.layers:
            # Attention without a mask is causal.
            x = layer(x, attention_mask=None, position_ids=positions, position_embeddings=rotation)
        if self.head is not None:
            x = self.head(self.norm(x))
        return x


class GlooStage(PipelineStage):
    """A stage that sends nothing to connect: torch 2.9.1 sends 8 bytes to a receiver of 4, which gloo refuses."""

    def _get_init_p2p_neighbors_ops(self) -> list[dist.P2POp]:
        return []


class StageTrainer:
    """A process's stages."""

    def __init__(self, workload: training.Workload) -> None:
        model: Any = training.build_model(workload)
        rank, count = dist.get_rank(), workload.num_microbatches
        homes = training.slices_of_stages(workload.schedule, dist.get_world_size(), count)
        layers = model.model.layers
        firsts = [*training.first_layers(len(layers), len(homes)), len(layers)]
        mine = [stage for stage, home in enumerate(homes) if home == rank]
        modules = [LlamaStage(model, firsts[stage], firsts[stage + 1]) for stage in mine]
        stages = [
            GlooStage(module, stage, len(homes), torch.device("cpu"))
            for module, stage in zip(modules, mine, strict=True)
        ]

        def loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            return model.loss_function(logits, labels, vocab_size=training.VOCABULARY)

        make: Any = get_schedule_class(workload.schedule)
        is_multi = issubclass(make, PipelineScheduleMulti)
        self._schedule = make(stages if is_multi else stages[0], n_microbatches=count, loss_fn=loss)
        parameters = [parameter for module in modules for parameter in module.parameters()]
        self._optimizer = torch.optim.AdamW(parameters, lr=training.LEARNING_RATE)
        self._is_first, self._is_last, self._rank_of_last = 0 in mine, len(homes) - 1 in mine, homes[-1]

    def steps(self, batches: list[dict[str, torch.Tensor]]) -> torch.Tensor:
        losses = torch.stack([self._step(**batch) for batch in batches])
        dist.broadcast(losses, src=self._rank_of_last)
        dist.barrier()
        return losses

    def _step(self, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        losses: list[torch.Tensor] = []
        inputs = (input_ids,) if self._is_first else ()
        self._schedule.step(*inputs, **({"target": labels, "losses": losses} if self._is_last else {}))
        self._optimizer.step()
        self._optimizer.zero_grad()
        return torch.stack(losses).mean().detach() if losses else torch.zeros(())


if __name__ == "__main__":
    arguments = protocol.argument_parser(__doc__).parse_args()
    training.serve(lambda: gloo_processes.open_system(StageTrainer, arguments.devices))
