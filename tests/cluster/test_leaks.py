"""Nothing in an executor grows with the number of runs."""

import gc
import time

import torch
import torch.nn as nn

import torchways as tw


def quiet_entries(loss):
    """Reads the last result, waits for the releases to arrive, and returns what each executor's collections hold."""
    loss.item()
    gc.collect()  # arrays in cycles, also those of tests before this one
    deadline = time.monotonic() + 10
    before, quiet = None, 0
    while time.monotonic() < deadline:
        entries = [(status.executor_id, status.num_entries) for status in tw.executor_status()]
        # Ids of dropped buffers are remembered, up to a number.
        entries = [(name, {key: n for key, n in each.items() if not key.startswith("gone")}) for name, each in entries]
        quiet += 1
        if entries != before:
            before, quiet = entries, 0
        elif quiet == 5:  # releases are sent a moment after arrays are dropped
            return entries
        time.sleep(0.1)
    raise AssertionError(before)


def test_a_pipeline_that_runs_ahead_leaves_nothing_behind(meshes):
    torch.manual_seed(0)
    model = tw.pipeline(
        nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)),
        split_spec={"2": tw.SplitPoint.BEGINNING},
        meshes=meshes,
    )
    opt = torch.optim.AdamW(model.parameters(), lr=1e-2)

    @tw.program
    def step(x):
        loss = model(x).square().mean()
        loss.backward()
        opt.step()
        opt.zero_grad()
        return loss

    x = torch.randn(4, 4)
    for _ in range(20):
        loss = step(x)
    few = quiet_entries(loss)
    for _ in range(180):
        loss = step(x)
    assert quiet_entries(loss) == few


def test_calls_chained_over_slices_keep_no_buffers(meshes):
    there = tw.function(lambda x: x + 1, mesh=meshes[0])
    back = tw.function(lambda x: x * 0.5, mesh=meshes[1])
    x = torch.ones(16)
    for _ in range(20):
        x = back(there(x))
    few = quiet_entries(x.sum())
    for _ in range(180):
        x = back(there(x))
    assert quiet_entries(x.sum()) == few
    assert all(entries["expected"] == 0 for _, entries in few)
    torch.testing.assert_close(x.cpu(), torch.ones(16))
