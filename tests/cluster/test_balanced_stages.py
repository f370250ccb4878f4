"""A GPT-2 of `transformers`, split by `tw.balanced_stages`, trains as the whole model does."""

import copy

import pytest
import torch
import transformers

import torchways as tw
from tests.cluster.test_hugging_face import GPT2, VOCABULARY

#: With "auto", the schedule changes after some calls.
NUM_STEPS = {"1F1B": 4, "auto": 8}


@pytest.mark.parametrize("schedule", ["1F1B", pytest.param("auto", marks=pytest.mark.slow)])
def test_a_gpt2_in_two_balanced_stages_trains_as_the_whole(cluster, schedule):
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**GPT2, "n_layer": 4}))
    ids = torch.randint(0, VOCABULARY, (8, 12))
    split = tw.balanced_stages(model, 2, ids[:2], labels=ids[:2])
    assert list(split) == ["transformer.h.2"]
    slices = [tw.init_device_mesh((1,), mesh_dim_names=("dp",), island=island) for island in (0, 1)]
    ours = tw.pipeline(copy.deepcopy(model), split_spec=split, meshes=slices)

    def make_step(model):
        opt = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-4)

        def forward_backward(ids):
            loss = model(input_ids=ids, labels=ids).loss / 4
            loss.backward()
            return loss

        def step(ids):
            losses = tw.microbatch(forward_backward, ids, n_microbatches=4, schedule=schedule)
            opt.step()
            opt.zero_grad()
            return losses.sum()

        return step

    step, whole = tw.program(make_step(ours)), make_step(model)
    losses = [[run(ids).cpu() for _ in range(NUM_STEPS[schedule])] for run in (step, whole)]
    torch.testing.assert_close(torch.stack(losses[0]), torch.stack(losses[1]), rtol=1e-4, atol=0)
    assert losses[0][-1] < losses[0][0]
    [loop] = step.report().loops
    assert len(loop.stages) == 2
    state = ours.state_dict()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(state[name].cpu(), value, rtol=1e-3, atol=1e-5)
