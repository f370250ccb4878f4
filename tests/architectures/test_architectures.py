"""Small configurations of the `transformers` library's models against eager PyTorch: forward, and three AdamW steps.

`python -m tests.architectures.sweep TASK ...` runs other tasks, parts of them, and several devices.
"""

from collections import Counter

import pytest

import torchways as tw
from tests.architectures.sweep import classes_of, outcome_of, restart

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

TASKS = ("CAUSAL_LM", "MASKED_LM", "SEQ_TO_SEQ_CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "IMAGE_CLASSIFICATION")
TASKS += ("SPEECH_SEQ_2_SEQ", "SEMANTIC_SEGMENTATION", "OBJECT_DETECTION")

#: What does not agree, how it goes and why. An entry that no longer holds fails.
KNOWN = {
    "AriaTextForCausalLM": ("refused", "histc has no lowering"),
    "BigBirdPegasusForConditionalGeneration": ("refused", "shapes that do not broadcast at capture; not explained"),
    "CTRLLMHeadModel": ("differ", "a parameter to 1.7e-4; not explained"),
    "ConditionalDetrForObjectDetection": ("refused", "asks computed values for infinities"),
    "CpmAntForCausalLM": ("differ", "the forward to 6e-5; not explained"),
    "DeformableDetrForObjectDetection": ("differ", "to 5e-4; not explained"),
    "DetrForObjectDetection": ("refused", "asks computed values for infinities"),
    "Idefics2ForConditionalGeneration": ("refused", "leaves out images by their values"),
    "Lfm2VlForConditionalGeneration": ("refused", "_upsample_bilinear2d_aa has no lowering"),
    "Qwen3NextForCausalLM": ("slow", "a loop over 64 positions a layer, each of which writes in place"),
    "RecurrentGemmaForCausalLM": ("differ", "losses to 3e-4; not explained"),
    "TableTransformerForObjectDetection": ("refused", "asks computed values for infinities"),
    "YolosForObjectDetection": ("differ", "one element, 1.05e-5"),
}

WORK = {name: (task, model_type) for task in reversed(TASKS) for name, model_type in classes_of(task).items()}


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


@pytest.mark.parametrize("name", WORK)
def test_agrees_with_eager(name, outcomes, slices):
    if not slices or len(outcomes) % 40 == 0 or outcomes[-1].kind in ("crash", "slow"):
        slices[:] = [restart(1)]
    outcome = outcome_of(name, *WORK[name], slices[0])
    outcomes.append(outcome)
    if outcome.kind == "not eager":
        pytest.skip(outcome.detail)
    expected, _ = KNOWN.get(name, ("agree", ""))
    assert outcome.kind in ((expected, "random") if expected == "agree" else (expected,)), outcome.detail
