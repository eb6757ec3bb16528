"""jaxft: fine-tuning in JAX. A method is what it attaches to the model, plus which leaves of the pytree it trains."""

from . import data, losses, quant, rewards, testing
from .embedding import embed
from .errors import (
    BatchError,
    CheckpointError,
    ConfigError,
    DataError,
    GenerationError,
    JaxftError,
    MeshError,
    MethodError,
    OptimizerError,
    PartitionError,
    RewardError,
    RunError,
    SelectionError,
)
from .generation.generate import generate, generate_ids
from .interop.export import save_model
from .interop.folder import load_adapter, save_adapter
from .interop.sentence_transformers import save_sentence_transformer
from .interop.serving import save_serving
from .loading import load
from .methods import IA3, Adapter, BitFit, Full, LoRA, Method, PrefixTuning, PromptTuning, PTuning, PTuningV2
from .methods.average import average_adapters
from .methods.merge import merge, unmerge
from .methods.method import adapters, attach, detach
from .methods.partition import combine, leaves, partition, select, trainable_mask
from .methods.report import ParameterReport, parameter_report
from .methods.switch import set_adapter
from .methods.weighted import add_weighted_adapter
from .parallel import make_mesh
from .train.optimizer import decay_mask
from .train.state import TrainState
from .train.step import make_train_step

__version__ = "0.1.0"

__all__ = [
    "IA3",
    "Adapter",
    "BatchError",
    "BitFit",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "Full",
    "GenerationError",
    "JaxftError",
    "LoRA",
    "MeshError",
    "Method",
    "MethodError",
    "OptimizerError",
    "PTuning",
    "PTuningV2",
    "ParameterReport",
    "PartitionError",
    "PrefixTuning",
    "PromptTuning",
    "RewardError",
    "RunError",
    "SelectionError",
    "TrainState",
    "adapters",
    "add_weighted_adapter",
    "attach",
    "average_adapters",
    "combine",
    "data",
    "decay_mask",
    "detach",
    "embed",
    "generate",
    "generate_ids",
    "leaves",
    "load",
    "load_adapter",
    "losses",
    "make_mesh",
    "make_train_step",
    "merge",
    "parameter_report",
    "partition",
    "quant",
    "rewards",
    "save_adapter",
    "save_model",
    "save_sentence_transformer",
    "save_serving",
    "select",
    "set_adapter",
    "testing",
    "trainable_mask",
    "unmerge",
]
