"""The recipes' settings: Hydra composes them, frozen dataclasses check them, before any cluster is used."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any, TypeVar, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from recipes.data import DataConfig
from recipes.models.gpt import GPTConfig
from recipes.optim import OptimConfig
from torchways.errors import ConfigError

T = TypeVar("T")

#: Tokens of the recipes whose tokens are bytes.
NUM_BYTES = 256


class Precision(enum.Enum):
    """What products are computed in."""

    fp32 = "fp32"
    bf16 = "bf16"


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelConfig:
    """How the model is laid over islands."""

    pipeline_stages: int = 2
    """Stages of the pipeline."""

    stages_per_island: int = 1
    """Stages that an island has. With two of them, stages go around the islands: 0, 1, 0, 1; or in a V, as the
    schedules ZBVZeroBubble and DualPipeV need it: 0, 1, 1, 0."""

    replicas: int = 1
    """Copies of the model, each on islands of its own, which share each batch."""

    bucket_cap_mb: float = 25.0
    """Gradients travel between replicas in buckets of up to so many megabytes."""

    reduce_dtype: Precision = Precision.fp32
    """What gradients travel between replicas as: fp32, or bf16, which halves the traffic."""

    n_microbatches: int = 1
    """Chunks of a replica's part of the batch that its stages work on at the same time; their gradients add up."""

    schedule: str = "1F1B"
    """Order in which a stage works on them: a name of `tw.microbatch`'s."""

    devices_per_stage: int | None = None
    """Devices of a stage's slice; null means all of the island's (eager mode: 1)."""

    tensor_parallel: int = 1
    """Devices that share each layer's products, in the mesh axis "tp"; the others, in "dp", share the batch."""

    fully_shard: bool = False
    """Whether parameters and optimizer state are split over "dp", instead of each device having them all."""

    init_on_slices: bool = False
    """Whether weights are drawn on the slices, each device its part; else on the host, as plain PyTorch draws them."""

    def __post_init__(self) -> None:
        at_least(
            1,
            pipeline_stages=self.pipeline_stages,
            stages_per_island=self.stages_per_island,
            replicas=self.replicas,
            n_microbatches=self.n_microbatches,
            devices_per_stage=self.devices_per_stage,
            tensor_parallel=self.tensor_parallel,
        )
        if self.pipeline_stages % self.stages_per_island:
            raise ValueError(
                f"pipeline_stages is {self.pipeline_stages} but must be a multiple of stages_per_island, "
                f"{self.stages_per_island}"
            )

    @property
    def num_islands(self) -> int:
        """Islands that the stages of all replicas are on."""
        return self.replicas * self.islands_per_replica

    @property
    def islands_per_replica(self) -> int:
        """Islands that the stages of a replica are on."""
        return self.pipeline_stages // self.stages_per_island

    def island_of(self, replica: int, stage: int) -> int:
        """Returns the island of a stage of a replica."""
        count = self.islands_per_replica
        turn, island = divmod(stage, count)
        is_back = turn % 2 == 1 and self.schedule.lower() in ("zbvzerobubble", "dualpipev")
        return replica * count + (count - 1 - island if is_back else island)

    @property
    def total_microbatches(self) -> int:
        """Chunks of a whole batch."""
        return self.replicas * self.n_microbatches


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """How long to train, and what to write down."""

    steps: int = 200
    """Updates of the weights."""

    batch_size: int = 16
    """Sequences of a step, over all devices of a stage, whose number divides it."""

    seed: int = 0
    """Seed of the weights and of the order of the data."""

    max_norm: float = 1.0
    """Gradients are scaled down to this global norm."""

    log_every: int = 10
    """Steps between two reads of the losses; between them the control plane runs ahead."""

    eval_every: int | None = 50
    """Steps between two evaluations; null evaluates at the end only."""

    eval_batches: int = 16
    """Batches of an evaluation."""

    trace_step: int | None = 20
    """Step whose trace is written; null writes none."""

    precision: Precision = Precision.fp32
    """fp32, or bf16: products are computed in bfloat16 (torch.autocast), while weights and their updates stay fp32."""

    peak_flops: float | None = None
    """Floating-point operations a second that all devices together can do. With it the metrics have the part that the
    model's products make of that; null leaves it out, and the metrics have the products' TFLOP/s only."""

    def __post_init__(self) -> None:
        at_least(
            1,
            steps=self.steps,
            batch_size=self.batch_size,
            log_every=self.log_every,
            eval_every=self.eval_every,
            eval_batches=self.eval_batches,
            trace_step=self.trace_step,
        )
        at_least(0, seed=self.seed)
        if not self.max_norm > 0.0:
            raise ValueError(f"max_norm is {self.max_norm} but must be above 0; .inf never scales gradients")
        if self.peak_flops is not None and not self.peak_flops > 0.0:
            raise ValueError(f"peak_flops is {self.peak_flops} but must be above 0; null if it is not known")


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointConfig:
    """What a run leaves to go on from."""

    every: int | None = None
    """Steps between two checkpoints. With it, one is also written at the end, and on SIGTERM and Ctrl-C; null writes
    none."""

    keep: int = 2
    """How many checkpoints there are at most; the oldest goes when a new one is complete."""

    resume: str | None = None
    """auto goes on from the latest checkpoint in `folder`, or starts anew if there is none; a path goes on from that
    checkpoint; null starts anew."""

    folder: str = "checkpoints"
    """Where checkpoints are; all machines of the cluster must see it."""

    def __post_init__(self) -> None:
        at_least(1, every=self.every, keep=self.keep)
        if not self.folder:
            raise ValueError("folder is empty; give a folder for checkpoints")


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterConfig:
    """The cluster that the script starts on this machine; it has no effect under twrun, which starts one itself."""

    islands: int = 2
    """Groups of devices."""

    devices_per_island: int = 2
    """Devices of each."""

    def __post_init__(self) -> None:
        at_least(1, islands=self.islands, devices_per_island=self.devices_per_island)


@dataclass(frozen=True, slots=True, kw_only=True)
class IslandsConfig:
    """How a model whose parts have islands of their own is laid over them."""

    islands: int = 2
    """Islands that the parts are on; all devices of an island share the batch."""

    n_microbatches: int = 1
    """Chunks of the batch; their gradients add up."""

    def __post_init__(self) -> None:
        at_least(1, islands=self.islands, n_microbatches=self.n_microbatches)

    def rows(self, batch_size: int) -> int:
        """Returns the sequences of a microbatch.

        Raises:
            ConfigError: the batch cannot be split evenly.
        """
        if batch_size % self.n_microbatches:
            raise ConfigError(
                f"train.batch_size is {batch_size} but parallel.n_microbatches is {self.n_microbatches}; set the one "
                "to a multiple of the other"
            )
        return batch_size // self.n_microbatches


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """All settings of a run of train_lm.py."""

    model: GPTConfig
    data: DataConfig
    optim: OptimConfig
    parallel: ParallelConfig
    cluster: ClusterConfig
    train: TrainConfig
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def __post_init__(self) -> None:
        _check_vocabulary(self.model)
        if self.parallel.pipeline_stages > self.model.n_layers:
            raise ConfigError(
                f"parallel.pipeline_stages is {self.parallel.pipeline_stages} but model.n_layers is "
                f"{self.model.n_layers}; a stage has a layer or more, so lower the one or raise the other"
            )
        if self.parallel.devices_per_stage is not None:
            self.mesh_shape(self.parallel.devices_per_stage)

    @property
    def seq_len(self) -> int:
        """Bytes of a window of text."""
        return self.model.seq_len

    def mesh_shape(self, num_devices: int) -> tuple[int, int]:
        """Returns the sizes of the mesh axes "dp" and "tp" of a stage with `num_devices` devices.

        Raises:
            ConfigError: the axes do not divide the devices, or the batch.
        """
        tensor_parallel = self.parallel.tensor_parallel
        if num_devices % tensor_parallel:
            raise ConfigError(
                f"parallel.tensor_parallel is {tensor_parallel} but a stage has {num_devices} devices; set it to a "
                "divisor of these"
            )
        self._check_batch(num_devices // tensor_parallel)
        return num_devices // tensor_parallel, tensor_parallel

    def _check_batch(self, num_devices: int) -> None:
        count = self.parallel.total_microbatches
        if self.train.batch_size % (count * num_devices):
            raise ConfigError(
                f"train.batch_size is {self.train.batch_size} but the {num_devices} devices of mesh axis 'dp' share "
                f"each of {count} microbatches evenly; set it to a multiple of {count * num_devices}, or set "
                "parallel.devices_per_stage"
            )

    def stage_starts(self) -> list[int]:
        """Returns the first layer of every stage but the first: 4 layers on 2 stages give [2]."""
        stages, layers = self.parallel.pipeline_stages, self.model.n_layers
        return [stage * layers // stages for stage in range(1, stages)]


@dataclass(frozen=True, slots=True, kw_only=True)
class IslandsSettings:
    """The settings that recipes with parts of a model on islands share; each has a section `model` of its own."""

    model: Any
    data: DataConfig
    optim: OptimConfig
    parallel: IslandsConfig
    cluster: ClusterConfig
    train: TrainConfig
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def __post_init__(self) -> None:
        _check_vocabulary(self.model)

    @property
    def seq_len(self) -> int:
        """Bytes of a window of text."""
        return int(self.model.seq_len)


def _check_vocabulary(model: Any) -> None:
    if isinstance(model, GPTConfig) and model.vocab_size < NUM_BYTES:  # others have their own tokens
        raise ConfigError(
            f"model.vocab_size is {model.vocab_size} but tokens are bytes, of which there are {NUM_BYTES}; set it to "
            f"{NUM_BYTES} or more"
        )


def read_settings(settings_class: type[T], cfg: DictConfig) -> T:
    """Returns the checked settings of a recipe: a dataclass with a field for each section.

    Raises:
        ConfigError: a value has the wrong type or is out of range.
    """
    sections = get_type_hints(settings_class)
    return settings_class(**{name: _section(section, cfg, name) for name, section in sections.items()})


def _section(cls: type[T], cfg: DictConfig, name: str) -> T:
    try:
        section = cfg[name]
        for key in sorted(OmegaConf.missing_keys(section)):
            raise ConfigError(f"{key} has no value and no default; give one: {key}=<value>")
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(cls), section))
    except OmegaConfBaseException as error:
        key = f"{name}.{error.full_key}" if error.full_key else name
        raise ConfigError(f"{key}: {str(error).splitlines()[0]}") from error  # further lines say where it arose
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{name}.{error}") from error


def at_least(minimum: int, **values: int | None) -> None:
    """Raises ValueError for a value that is neither None nor at least `minimum`."""
    for name, value in values.items():
        if value is not None and value < minimum:
            raise ValueError(f"{name} is {value} but must be at least {minimum}")
