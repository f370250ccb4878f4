"""Runs any model of the `transformers` library on a slice and in eager PyTorch, and says how that went.

As a script, `python -m tests.architectures.sweep CAUSAL_LM MASKED_LM [--only REGEX]`, it prints a line a class.
"""

import argparse
import copy
import json
import re
import signal
import time
import traceback
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from torch.utils import _pytree as pytree
from transformers import CONFIG_MAPPING
from transformers.models.auto import modeling_auto

import torchways as tw
from tests.architectures.batches import BATCH, NUM_LABELS, batch_of
from tests.architectures.configurations import shrink
from torchways.capture.tracing.objects import open_objects
from torchways.errors import UserError

NUM_STEPS = 3
#: So much further than eager PyTorch may ours be from the results in float64.
FLOAT64_FACTOR = 3.0
SECONDS = 240


@dataclass
class Outcome:
    """How a model went.

    Attributes:
        name: its class.
        kind: "agree", "differ", "refused", "crash", "slow", "random" (runs, but has no one result to compare with) or
            "not eager" (eager PyTorch does not run the small configuration).
        detail: the error.
        seconds: what all took, eager PyTorch as well.
        first_seconds: what the first training step took on the slice, with its loss.
    """

    name: str
    kind: str
    detail: str = ""
    seconds: float = 0.0
    first_seconds: float = 0.0


class NotEager(Exception):
    """Eager PyTorch does not run the model."""


class Random(Exception):
    """The model's result depends on random numbers."""


def classes_of(task):
    """Returns the names of a task's classes and their model types."""
    mapping = modeling_auto.MODEL_MAPPING_NAMES if task == "BASE" else None
    mapping = mapping or getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES")
    found = {}
    for model_type, names in mapping.items():
        for name in (names,) if isinstance(names, str) else names:
            found.setdefault(name, model_type)
    return found


def build(name, task, model_type):
    """Returns a small model with random weights, no dropout, and a function that makes its batches."""
    cls = getattr(transformers, name)
    config = shrink(cls.config_class or CONFIG_MAPPING[model_type])
    config.num_labels = 2 if task == "QUESTION_ANSWERING" else NUM_LABELS
    if "CLASSIFICATION" in task and getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = 0
    torch.manual_seed(0)
    model = cls(config)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    num_image_tokens = 0

    def data(seed):
        return batch_of(model, task, torch.Generator().manual_seed(seed), num_image_tokens)

    candidates = [0]
    for num_image_tokens in candidates:  # each architecture computes in its own way how many there must be
        try:
            with torch.no_grad():
                model.eval()(**data(0))
            break
        except ValueError as error:
            found = re.search(r"tokens: .*features:?\D*(\d+)", str(error))
            if found is None or num_image_tokens == candidates[-1] != 0:
                raise
            if num_image_tokens == 0:
                width = model.config.get_text_config().hidden_size
                candidates += [int(found[1]) // BATCH, int(found[1]) // BATCH // width]
    return model, data


def loss_of(out):
    """A model's loss; of one without, the mean of squares of its results."""
    if getattr(out, "loss", None) is not None:
        return out.loss if out.loss.dim() == 0 else out.loss.sum()
    leaves = [leaf for leaf in pytree.tree_leaves(open_objects(out)) if isinstance(leaf, torch.Tensor)]
    return sum(leaf.square().mean() for leaf in leaves if leaf.is_floating_point() and leaf.requires_grad)


def train(model, batches, wrap, eps=1e-4, on_first=None):
    # Some gradients are zero but for rounding (biases of keys, what comes before a batch norm); with its usual epsilon,
    # Adam makes steps of that noise.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=eps)

    def train_step(**batch):
        loss = loss_of(model(**batch))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    step = wrap(train_step)
    first = step(**batches[0])
    if on_first is not None:
        first.item()
        on_first()
    losses = [first, *(step(**batch) for batch in batches[1:])]
    return torch.tensor([loss.item() for loss in losses], dtype=torch.float64)


def eager_forward(model, batch, seed):
    torch.manual_seed(seed)
    with torch.no_grad():
        return pytree.tree_leaves(open_objects(model.eval()(**batch)))


def run_eager(model, data):
    """Returns results of the model's forward, and the losses and the model after training.

    Raises:
        NotEager: it cannot.
        Random: it gives other results each time.
    """
    try:
        forward = eager_forward(model, data(0), 0)
        again = eager_forward(model, data(0), 1)
        trained = copy.deepcopy(model).train()
        torch.manual_seed(0)
        losses = train(trained, [data(seed) for seed in range(NUM_STEPS)], lambda step: step)
        other = copy.deepcopy(model).train()
        torch.manual_seed(1)
        losses_again = train(other, [data(seed) for seed in range(NUM_STEPS)], lambda step: step)
    except Exception as error:
        raise NotEager(f"{type(error).__name__}: {error}") from error
    if not losses.isfinite().all():
        raise NotEager(f"losses {losses.tolist()}")
    tensors = [(a, b) for a, b in zip(forward, again, strict=True) if isinstance(a, torch.Tensor)]
    if not torch.equal(losses, losses_again) or not all(torch.equal(a, b) for a, b in tensors):
        raise Random
    return forward, losses, trained


def compare(model, data, mesh):
    """Returns the seconds to the first loss; raises if the model on a slice and in eager PyTorch do not agree."""
    random = False
    try:
        forward, losses, trained = run_eager(model, data)
    except Random:
        random = True
    ours = tw.function(copy.deepcopy(model).eval(), mesh=mesh)
    leaves = pytree.tree_leaves(open_objects(ours(**data(0))))
    leaves = [leaf.cpu() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
    if not random:
        check_forward(leaves, forward, model, data)
    ours = tw.function(copy.deepcopy(model).train(), mesh=mesh)
    started, first = time.monotonic(), []
    batches = [data(seed) for seed in range(NUM_STEPS)]
    our_losses = train(ours, batches, tw.program, on_first=lambda: first.append(time.monotonic() - started))
    state = ours.state_dict()
    if random:
        raise Random
    pairs = [("losses", our_losses, losses, 1e-4, 0.0)]
    pairs += [(key, state[key], value, 0.0, 1e-5) for key, value in trained.state_dict().items()]
    if any(not torch.allclose(found, other, rtol, atol) for _, found, other, rtol, atol in pairs):
        check_by_float64(pairs, model, batches, mesh)
    for status in tw.executor_status():
        assert status.fallback_counters == {}, f"fallback: {status.fallback_counters}"
    return first[0]


def check_forward(leaves, forward, model, data):
    """Raises if the results of forward differ from eager PyTorch's."""
    exact = None
    for number, (leaf, other) in enumerate(zip(leaves, forward, strict=True)):
        if not isinstance(other, torch.Tensor):
            assert leaf == other
        elif not torch.allclose(leaf, other, 1e-4, 1e-5, equal_nan=True):
            if exact is None:
                batch = pytree.tree_map_only(torch.Tensor, _doubled, data(0))
                exact = eager_forward(copy.deepcopy(model).double(), batch, 0)
            check_distance(f"result {number}", leaf, other, exact[number])


def check_distance(name, found, other, exact):
    ours, eager = ((value - exact).abs().max().item() for value in (found, other))
    assert ours <= FLOAT64_FACTOR * eager, f"{name}: {ours:.1e} from float64's, eager {eager:.1e}"


def check_by_float64(pairs, model, batches, mesh):
    """Raises if what differs from eager PyTorch is more than rounding.

    Where a result is ill-conditioned (a batch norm over eight elements), two right float32 computations differ by more
    than any tolerance. Both are then about as far from the result in float64, which decides; or rounding is multiplied
    so much that even that is chance: then both must give the same in float64, to eight digits. (Levit does not: its
    losses change in the sixth digit if weights change by one part in 10^15. Ten times such a change is allowed.)
    """
    batches = [pytree.tree_map_only(torch.Tensor, _doubled, batch) for batch in batches]

    def in_float64(change):
        exact = copy.deepcopy(model).double().train()
        with torch.no_grad():
            for parameter in exact.parameters():
                parameter.mul_(1 + change)
        return {"losses": train(exact, batches, lambda step: step), **exact.state_dict()}

    results = in_float64(0.0)
    far = ""
    for name, found, other, rtol, atol in pairs:
        ours, eager = ((value - results[name]).abs().max().item() for value in (found, other))
        if not torch.allclose(found, other, rtol, atol) and ours > FLOAT64_FACTOR * eager:
            far = far or f"{name}: {ours:.1e} from float64's, eager {eager:.1e}"
    if far:
        ours = tw.function(copy.deepcopy(model).double().train(), mesh=mesh)
        found = {"losses": train(ours, batches, tw.program), **ours.state_dict()}
        nearby = in_float64(1e-15)
        for name, value in results.items():
            sensitivity = 10 * (nearby[name] - value).abs().max().item()
            agrees = torch.allclose(found[name], value, 1e-8, max(1e-8, sensitivity))
            assert agrees, f"{far}; in float64, {name} differs by {(found[name] - value).abs().max():.1e}"


def _doubled(tensor):
    return tensor.double() if tensor.is_floating_point() else tensor


@contextmanager
def time_limit(seconds):
    """Raises TimeoutError in the main thread after so long."""

    def expire(*_):
        raise TimeoutError(f"longer than {seconds} s")

    saved = signal.signal(signal.SIGALRM, expire)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, saved)


def outcome_of(name, task, model_type, mesh, seconds=SECONDS):
    """Runs a model of `transformers` and returns how that went."""
    return outcome_of_model(name, lambda: build(name, task, model_type), mesh, seconds)


def outcome_of_model(name, make, mesh, seconds=SECONDS):
    """Runs a model and returns how that went.

    Args:
        make: returns it and a function that makes its batches.
    """
    start, first = time.monotonic(), 0.0
    kind, detail = "agree", ""
    try:
        with time_limit(seconds):
            try:
                model, data = make()
            except TimeoutError:
                raise
            except Exception as error:
                raise NotEager(f"{type(error).__name__}: {error}") from error
            first = compare(model, data, mesh)
    except NotEager as error:
        kind, detail = "not eager", str(error)
    except Random:
        kind = "random"
    except UserError as error:
        if isinstance(error.__cause__, TimeoutError):
            return Outcome(name, "slow", str(error), round(time.monotonic() - start, 1))
        kind, detail = "refused" if ".py:" in str(error) else "crash", f"{type(error).__name__}: {error}"
    except TimeoutError:
        kind, detail = "slow", "".join(traceback.format_exc().splitlines(keepends=True)[-12:])
    except AssertionError as error:
        kind, detail = "differ", str(error) or traceback.format_exc()[-800:]
    except Exception as error:
        kind, detail = "crash", f"{type(error).__name__}: {error}\n{traceback.format_exc()[-1500:]}"
    return Outcome(name, kind, detail, round(time.monotonic() - start, 1), round(first, 1))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tasks", nargs="+")
    parser.add_argument("--only", default="")
    parser.add_argument("--out", default="/dev/null")
    parser.add_argument("--part", default="0/1")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--seconds", type=int, default=SECONDS, help="limit of each")
    parser.add_argument("--eager", action="store_true", help="only whether eager PyTorch runs them")
    parser.add_argument("--skip", default="", help="file of names")
    options = parser.parse_args()
    part, parts = map(int, options.part.split("/"))
    done = set(Path(options.skip).read_text().split()) if options.skip else set()
    work = []
    for task in options.tasks:
        for name, model_type in classes_of(task).items():
            if re.search(options.only, name) and name not in done:
                done.add(name)
                work.append((name, task, model_type))
    mesh = None
    for number, (name, task, model_type) in enumerate(work[part::parts]):
        if not options.eager and (mesh is None or number % 40 == 0):
            mesh = restart(options.devices)
        if options.eager:
            outcome = eager_outcome_of(name, task, model_type)
        else:
            outcome = outcome_of(name, task, model_type, mesh, options.seconds)
            if outcome.kind in ("crash", "slow"):
                mesh = restart(options.devices)
        with open(options.out, "a") as file:
            file.write(json.dumps({**asdict(outcome), "task": task}) + "\n")
        print(f"{outcome.kind:10} {outcome.seconds:6.1f} {task} {name} {outcome.detail[:300]!r}", flush=True)
    tw.shutdown()


def eager_outcome_of(name, task, model_type):
    start = time.monotonic()
    kind, detail = "agree", ""
    try:
        with time_limit(SECONDS):
            model, data = build(name, task, model_type)
            run_eager(model, data)
    except Random:
        kind = "random"
    except Exception as error:
        kind, detail = "not eager", f"{type(error).__name__}: {error}"
        where = traceback.extract_tb(error.__traceback__)[-1]
        detail += f" {where.filename[-40:]}:{where.lineno}"
    return Outcome(name, kind, detail, round(time.monotonic() - start, 1))


def restart(devices):
    tw.shutdown()
    tw.init(islands=1, devices_per_island=devices)
    return tw.init_device_mesh((devices,), mesh_dim_names=("dp",), island=0)


if __name__ == "__main__":
    main()
