"""Batches for any model of the `transformers` library, made by what its `forward` takes and its configuration."""

import inspect

import torch

from tests.architectures.configurations import NUM_WORDS

BATCH = 2
LENGTH = 16
NUM_LABELS = 4


def batch_of(model, task, generator, num_image_tokens=0):
    """Returns arguments of a model's `forward`, with labels for its task where it takes any.

    Args:
        model: the model.
        task: the name of its auto mapping, as "CAUSAL_LM".
        generator: of random numbers.
        num_image_tokens: tokens of each text that stand for an image.
    """
    names = inspect.signature(model.forward).parameters
    config = model.config
    batch = {}
    make = _Maker(model, generator)
    if "input_ids" in names and model.main_input_name in ("input_ids", "pixel_values", "inputs"):
        batch.update(make.text(names, num_image_tokens))
    if "inputs" in names:
        batch["inputs"] = batch.pop("input_ids", None) if "input_ids" in batch else make.tokens(LENGTH)
        batch["attention_mask"] = torch.ones(BATCH, LENGTH, dtype=torch.int64)
    for name, method in (
        ("pixel_values", make.pixel_values),
        ("input_features", make.input_features),
        ("input_values", make.input_values),
        ("past_values", make.past_values),
    ):
        if name in names:
            batch.update(method(names))
    if "bbox" in names:
        batch["bbox"] = torch.tensor([1, 2, 5, 7]).expand(BATCH, LENGTH, 4).clone()
    makes_decoder_inputs = task in ("SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ", "CTC")  # of its labels
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in names and not makes_decoder_inputs:
        batch["decoder_input_ids"] = make.tokens(LENGTH)
    batch.update(make.labels(names, task, batch))
    return batch


class _Maker:
    def __init__(self, model, generator):
        self.model = model
        self.config = model.config
        self.generator = generator
        self.vision = getattr(self.config, "vision_config", None) or self.config

    def tokens(self, length, *size):
        vocabulary = min(NUM_WORDS, getattr(self.config.get_text_config(), "vocab_size", NUM_WORDS) or NUM_WORDS)
        return torch.randint(3, vocabulary, (BATCH, *size, length), generator=self.generator)

    def normal(self, *size):
        return torch.randn(BATCH, *size, generator=self.generator)

    def text(self, names, num_image_tokens):
        ids, mask = self.tokens(LENGTH), torch.ones(BATCH, LENGTH, dtype=torch.int64)
        mask[1, -3:] = 0
        if num_image_tokens:
            images = torch.full((BATCH, num_image_tokens), self.image_token())
            ids = torch.cat([ids[:, :4], images, ids[:, 4:]], 1)
            mask = torch.cat([torch.ones_like(images), mask], 1)
        return {"input_ids": ids, **({"attention_mask": mask} if "attention_mask" in names else {})}

    def image_token(self):
        for name in ("image_token_id", "image_token_index", "image_token"):
            if isinstance(token := getattr(self.config, name, None), int):
                return token
        raise LookupError("no image token")

    def image_size(self):
        for config in (self.vision, self.config, getattr(self.config, "backbone_config", None)):
            for name in ("image_size", "img_size", "input_size", "resolution"):
                size = getattr(config, name, None)
                if isinstance(size, (list, tuple)) and len(size) == 2:
                    return tuple(size)
                if isinstance(size, int):
                    return size, size
        return 64, 64

    def pixel_values(self, names):
        config = self.vision
        channels = getattr(config, "num_channels", None) or getattr(config, "in_channels", None) or 3
        channels = channels if isinstance(channels, int) else 3
        if "image_grid_thw" in names:
            patch = config.patch_size**2 * channels * getattr(config, "temporal_patch_size", 1)
            grid = torch.tensor([[1, 4, 4]] * BATCH)
            return {"pixel_values": torch.randn(BATCH * 16, patch, generator=self.generator), "image_grid_thw": grid}
        if "pixel_attention_mask" in names and "spatial_shapes" in names:  # images as patches
            shapes, mask = torch.tensor([[4, 4]] * BATCH), torch.ones(BATCH, 16, dtype=torch.int64)
            patches = self.normal(16, config.patch_size**2 * channels)
            return {"pixel_values": patches, "spatial_shapes": shapes, "pixel_attention_mask": mask}
        if "image_sizes" in names and self.config.model_type != "llava":
            sizes = torch.tensor([self.image_size()] * BATCH)
            return {"pixel_values": self.normal(channels, *self.image_size()), "image_sizes": sizes}
        if "pixel_attention_mask" in names:  # several images a text
            return {"pixel_values": self.normal(1, channels, *self.image_size())}
        frames = [getattr(config, "num_frames", None) or 2] if "Video" in type(self.model).__name__ else []
        return {"pixel_values": self.normal(*frames, channels, *self.image_size())}

    def input_features(self, names):
        config = getattr(self.config, "audio_config", None) or self.config
        for name in ("num_mel_bins", "feature_projection_input_dim", "input_feat_per_channel", "mel_bins"):
            if size := getattr(config, name, None):
                break
        else:
            size = 16
        if hasattr(config, "max_source_positions") and "whisper" in config.model_type:
            return {"input_features": self.normal(size, 2 * config.max_source_positions)}
        return {"input_features": self.normal(32, size)}

    def input_values(self, names):
        if bins := getattr(self.config, "num_mel_bins", None):
            if getattr(self.config, "max_length", None) and hasattr(self.config, "frequency_stride"):
                return {"input_values": self.normal(self.config.max_length, bins)}
            if "speecht5" not in self.config.model_type:
                return {"input_values": self.normal(32, bins)}
        return {"input_values": self.normal(256)}

    def past_values(self, names):
        config = self.config
        if "past_time_features" not in names:
            channels = getattr(config, "num_input_channels", 1)
            length = getattr(config, "context_length", LENGTH)
            batch = {"past_values": self.normal(length, channels)}
            if "future_values" in names:
                batch["future_values"] = self.normal(config.prediction_length, channels)
            return batch
        length = config.context_length + max(config.lags_sequence)
        features = config.num_time_features + config.num_dynamic_real_features
        future = config.prediction_length
        batch = {
            "past_values": self.normal(length).abs(),
            "past_time_features": self.normal(length, features),
            "past_observed_mask": torch.ones(BATCH, length),
            "future_values": self.normal(future).abs(),
            "future_time_features": self.normal(future, features),
        }
        return batch

    def classes(self, *size):
        return torch.randint(0, NUM_LABELS, (BATCH, *size), generator=self.generator)

    def labels(self, names, task, batch):
        ids, mask = batch.get("input_ids"), batch.get("attention_mask")
        if task == "QUESTION_ANSWERING" and "start_positions" in names:
            return {"start_positions": self.classes(), "end_positions": self.classes() + 4}
        if task == "NEXT_SENTENCE_PREDICTION" or task == "MULTIPLE_CHOICE":
            if task == "MULTIPLE_CHOICE":
                for key, value in batch.items():
                    batch[key] = torch.stack([value, value.flip(0)], 1)
            return {"labels": torch.tensor([0, 1])}
        if task in ("PRETRAINING", "KEYPOINT_DETECTION") or "labels" not in names:
            return {"return_loss": True} if "return_loss" in names else {}
        if task in ("SEQUENCE_CLASSIFICATION", "IMAGE_CLASSIFICATION", "AUDIO_CLASSIFICATION", "VIDEO_CLASSIFICATION"):
            return {"labels": self.classes()}
        if task == "AUDIO_XVECTOR":
            return {"labels": self.classes()}
        if task == "TOKEN_CLASSIFICATION":
            return {"labels": self.classes(ids.shape[1])}
        if task in ("SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ", "CTC"):
            return {"labels": self.tokens(8)}
        if task in ("CAUSAL_LM", "MASKED_LM", "IMAGE_TEXT_TO_TEXT", "VISION_2_SEQ") and ids is not None:
            if mask is None:
                return {"labels": ids.clone()}
            return {"labels": ids.masked_fill((mask == 0) | (ids >= NUM_WORDS), -100)}
        if task == "SEMANTIC_SEGMENTATION":
            return {"labels": self.classes(*batch["pixel_values"].shape[-2:])}
        return {}
