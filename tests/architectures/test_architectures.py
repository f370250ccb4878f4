"""Small configurations of the `transformers` library's models against eager PyTorch: forward, and three AdamW steps.

One class stands for each model type: that of the first task in `TASKS` with a class for it. They are 305, of which
eager PyTorch runs 246. `make test-architectures` runs them two at a time, in some 70 minutes on two cores;
docs/coverage.md has the outcomes of a whole run. `pytest -m slow tests/architectures -k IMAGE_CLASSIFICATION` runs a
task's; `python -m tests.architectures.sweep TASK ...` runs any classes, on several devices too.

Each outcome is a property of its test in the file that `--junitxml=FILE` names.
"""

from collections import Counter
from dataclasses import asdict

import pytest

import torchways as tw
from tests.architectures.sweep import classes_of, outcome_of, restart

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

TASKS = ("SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ", "IMAGE_TEXT_TO_TEXT", "CAUSAL_LM", "AUDIO_CLASSIFICATION")
TASKS += ("MASKED_LM", "IMAGE_CLASSIFICATION", "SEMANTIC_SEGMENTATION", "OBJECT_DETECTION", "CTC")
TASKS += ("SEQUENCE_CLASSIFICATION", "QUESTION_ANSWERING", "TOKEN_CLASSIFICATION")

#: What does not agree, how it goes and why. An entry that no longer holds fails.
KNOWN = {
    "BigBirdPegasusForConditionalGeneration": (
        "refused",
        "transformers, compiled and without a decoder's attention mask, makes a causal mask of one column too many",
    ),
    "ConditionalDetrForObjectDetection": ("refused", "asks computed values for infinities"),
    "DeformableDetrForObjectDetection": ("refused", "asks computed values for infinities, in training"),
    "DeepseekV2ForCausalLM": ("refused", "asks computed values whether an expert has tokens"),
    "DetrForObjectDetection": ("refused", "asks computed values for infinities"),
    "HGNetV2ForImageClassification": ("slow", "XLA compiles its convolutions for longer than the limit"),
    "IBertForMaskedLM": ("refused", "asks computed values whether a range has been measured"),
    "Idefics2ForConditionalGeneration": ("refused", "leaves out images by their values"),
    "Idefics3ForConditionalGeneration": ("refused", "as Idefics2"),
    "MobileViTForImageClassification": ("slow", "as HGNetV2"),
    "PegasusXForConditionalGeneration": ("refused", "as BigBirdPegasus"),
    "RecurrentGemmaForCausalLM": ("differ", "losses to 3e-4: transformers computes something else when it is compiled"),
    "SmolVLMForConditionalGeneration": ("refused", "as Idefics2"),
    "SplinterForQuestionAnswering": ("refused", "changes its argument start_positions in place, which is on the host"),
    "SwitchTransformersForConditionalGeneration": ("refused", "asks how many tokens an expert has"),
    "TableTransformerForObjectDetection": ("refused", "asks computed values for infinities"),
    "UdopForConditionalGeneration": ("refused", "indexes a tensor with tuples of elements that it computes"),
}


def work():
    """Yields a class of each model type, with the task it is of."""
    seen = set()
    for task in TASKS:
        classes = {name: model_type for name, model_type in classes_of(task).items() if model_type not in seen}
        seen.update(classes.values())
        for name, model_type in classes.items():
            yield pytest.param(name, task, model_type, id=f"{task}-{name}")


@pytest.fixture(scope="module")
def outcomes(request):
    """What came out so far; printed at the end."""
    found = []
    yield found
    tw.shutdown()
    write = request.config.get_terminal_writer().line
    write()
    write(f"architectures: {dict(Counter(outcome.kind for outcome in found))}")
    for outcome in found:
        if outcome.kind not in ("agree", "not eager"):
            write(f"  {outcome.kind} {outcome.name} {outcome.detail[:120]!r}")


@pytest.fixture(scope="module")
def slices():
    """The slice in use: one for some models, and another after a crash."""
    return []


@pytest.mark.parametrize(("name", "task", "model_type"), work())
def test_agrees_with_eager(name, task, model_type, outcomes, slices, record_property):
    if not slices or len(outcomes) % 40 == 0 or outcomes[-1].kind in ("crash", "slow"):
        slices[:] = [restart(1)]
    outcome = outcome_of(name, task, model_type, slices[0])
    outcomes.append(outcome)
    for key, value in {**asdict(outcome), "task": task}.items():
        record_property(key, value)
    if outcome.kind == "not eager":
        pytest.skip(outcome.detail)
    expected, _ = KNOWN.get(name, ("agree", ""))
    assert outcome.kind in ((expected, "random") if expected == "agree" else (expected,)), outcome.detail
