"""A stand-in for vLLM: small enough to read, passes the contract, and can be imported without torch."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import zipfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from vllm_gdn_plugin.decide.contract import GDN_CLASSES

GDN, OLD_GDN = GDN_CLASSES

LAYER = '''
import torch

from vllm.model_executor.custom_op import PluggableLayer
from vllm.model_executor.layers.linear import MergedColumnParallelLinear

CAPABILITY = torch.cuda.get_device_capability()  # as in vLLM, importing this module initialises CUDA


class ChunkRule:
    def forward_cuda(self, q, k):
        return q + k


@PluggableLayer.register("qwen_gated_delta_net_attention")
class QwenGatedDeltaNetAttention(PluggableLayer):
    def __init__(self, prefix):
        self.prefix = prefix
        self.fused_decode = False
        self.in_proj_qkvz = MergedColumnParallelLinear(6)
        self.in_proj_ba = MergedColumnParallelLinear(2)
        self._forward_method = self.forward_cuda

    def forward(self, hidden_states):
        return self._forward_method(hidden_states)

    def forward_cuda(self, hidden_states):
        """Input projection, core attention, output projection."""
        num_tokens = hidden_states.size(0)
        mixed_qkvz, _ = self.in_proj_qkvz(hidden_states)
        ba, _ = self.in_proj_ba(hidden_states)

        if self.fused_decode and hidden_states.dtype == "bfloat16":
            return self._output_projection([num_tokens, hidden_states.device], ba)
        query, z = self.split_qkvz(mixed_qkvz)
        core = [num_tokens, query, ba, hidden_states.dtype, hidden_states.device, hidden_states.shape[0]]
        return self._output_projection(core, z)

    def forward_cpu(self, hidden_states):
        qkvz, _ = self.in_proj_qkvz(hidden_states)
        gates, _ = self.in_proj_ba(hidden_states)
        return self._output_projection([qkvz, gates], None)

    def forward_xpu(self, hidden_states):
        return [self.in_proj_ba(hidden_states + i) for i in range(2)]

    def split_qkvz(self, mixed_qkvz):
        return mixed_qkvz, self.prefix

    def _output_projection(self, core, z):
        return ("stock", core, z)
'''

LORA_BODY = '''\
        """0.20: with LoRA, qkv and z are projections of their own."""
        num_tokens = hidden_states.size(0)
        if hasattr(self, "in_proj_qkv"):
            mixed_qkv, _ = self.in_proj_qkv(hidden_states)
            ba, _ = self.in_proj_ba(hidden_states)
            z, _ = self.in_proj_z(hidden_states)
        else:
            mixed_qkvz, _ = self.in_proj_qkvz(hidden_states)
            ba, _ = self.in_proj_ba(hidden_states)
            mixed_qkv, z = self.split_qkvz(mixed_qkvz)
        output[:num_tokens] = self._output_projection([mixed_qkv, ba], z)
'''

SOURCES = {
    "vllm": 'import torch\n\n__version__ = "0.32.0"\n',
    "vllm.config": "from vllm.config.vllm import get_current_vllm_config\n",
    "vllm.config.vllm": """
from types import SimpleNamespace as Config

config = Config(
    compilation_config=Config(cudagraph_mode=Config(name="FULL")),
    model_config=Config(dtype="torch.bfloat16", enforce_eager=False),
    lora_config=None,
    parallel_config=Config(use_ubatching=False),
    speculative_config=None,
    offload_config=Config(uva=Config(cpu_offload_gb=0), prefetch=Config(offload_group_size=0)),
)


def get_current_vllm_config():
    return config
""",
    "vllm.distributed.parallel_state": """
class Group:
    def __init__(self, rank_in_group, world_size):
        self.rank_in_group, self.world_size = rank_in_group, world_size
        self.is_first_rank = rank_in_group == 0


TP = Group(0, 1)
PCP = Group(0, 1)
PP = Group(0, 1)
INITIALIZED = True


def model_parallel_is_initialized():
    return INITIALIZED


def get_tp_group():
    assert INITIALIZED
    return TP


def get_pcp_group():
    assert INITIALIZED
    return PCP


def get_pp_group():
    assert INITIALIZED
    return PP
""",
    "vllm.envs": """
VLLM_BATCH_INVARIANT = False
VLLM_CACHE_ROOT = "/nowhere"
VLLM_USE_BREAKABLE_CUDAGRAPH = False
environment_variables = {"VLLM_OWN": lambda: "own"}


def compile_factors():
    return {name: value() for name, value in environment_variables.items()}
""",
    "vllm.forward_context": """
from typing import Any


class ForwardContext:
    no_compile_layers: dict[str, Any]


def get_forward_context():
    return ForwardContext()
""",
    "vllm.logger": """
lines = []


class Logger:
    def __getattr__(self, level):
        return lambda text, *args: lines.append((level, text % args))


def init_logger(name):
    return Logger()
""",
    "vllm.model_executor.custom_op": """
op_registry_oot = {}


class PluggableLayer:
    def __new__(cls, *args, **kwargs):
        if cls.__name__ not in op_registry_oot:
            layer_class = cls
        else:
            layer_class = op_registry_oot[cls.__name__]
        return super().__new__(layer_class)

    @classmethod
    def register(cls, name):
        return lambda layer: layer

    @classmethod
    def register_oot(cls, name):
        def decorator(layer):
            assert name not in op_registry_oot, f"Duplicate layer name: {name}"
            op_registry_oot[name] = layer
            return layer

        return decorator
""",
    "vllm.model_executor.layers.linear": """
class UnquantizedLinearMethod:
    def apply(self, layer, x):
        return x


class MergedColumnParallelLinear:
    bias, gather_output, return_bias, params_dtype = None, False, True, "torch.bfloat16"
    input_size = 4096

    def __init__(self, size):
        self.output_size_per_partition = size
        self.quant_method = UnquantizedLinearMethod()

    def __call__(self, hidden_states):
        return ("projected", self.output_size_per_partition), None
""",
    "vllm.model_executor.layers.quantization.base_config": """
class QuantizeMethodBase:
    def process_weights_after_loading(self, layer):
        pass
""",
    "vllm.platforms": """
class Platform:
    def __init__(self, name):
        self.device_name = self.device_type = name

    def is_cuda(self):
        return self.device_name == "cuda"

    def is_rocm(self):
        return self.device_name == "rocm"

    def is_xpu(self):
        return self.device_name == "xpu"

    def is_cpu(self):
        return self.device_name == "cpu"

    def get_device_name(self):
        return "Stub Device"


current_platform = Platform("cuda")
""",
    "vllm.utils.torch_utils": """
from types import SimpleNamespace as Streams

try:
    from torch import opaque
except ImportError:
    opaque = None

if opaque is None:
    LayerNameType = str
    _encode_layer_name = _resolve_layer_name = str
else:
    LayerNameType = opaque.Name


_current_stream_tls = Streams()


def aux_stream():
    return None


def direct_register_custom_op(*arguments, **options):
    pass
""",
    GDN: LAYER,
    "torch": """
from types import SimpleNamespace

from torch import cuda as cuda

__version__ = "2.13.0+stub"
Generator, Tensor, device = (type(name, (), {}) for name in ("Generator", "Tensor", "device"))
compiler = SimpleNamespace(is_compiling=lambda: False)
library = SimpleNamespace(Library=lambda *names: None)
nn = SimpleNamespace(Module=type("Module", (), {}))
""",
    "torch.cuda": """
from contextlib import nullcontext as stream

touched = []
Event, Stream = type("Event", (), {"record": lambda self: None}), type("Stream", (), {})


def __getattr__(name):
    return lambda *args: touched.append(name)
""",
}


class Sources:
    """The sources of a ``vllm``, and of a ``torch`` beside it whose ``cuda`` notes every call, that a test can edit."""

    def __init__(self) -> None:
        self.texts: dict[str, bytes] = {}
        for module, source in SOURCES.items():
            self.write(module, source)

    def write(self, module: str, source: str | bytes) -> None:
        self.texts[module] = source.encode() if isinstance(source, str) else source

    def remove(self, module: str) -> None:
        del self.texts[module]

    def edit(self, module: str, *replacements: tuple[str, str]) -> None:
        source = self.texts[module].decode()
        for old, new in replacements:
            assert old in source, f"{module} has no {old!r}: this edit changes nothing"
            source = source.replace(old, new)
        self.write(module, source)

    def version(self, version: str) -> None:
        self.edit("vllm", ("0.32.0", version))

    def platform(self, name: str) -> None:
        self.edit("vllm.platforms", ('Platform("cuda")', f'Platform("{name}")'))

    def make_old(self) -> None:
        """Turn them into what 0.20 looks like: another module, class, signature and a LoRA branch."""
        head, rest = self.texts[GDN].decode().split("    def forward_cuda(self, hidden_states):\n")
        tail = rest[rest.index("    def split_qkvz") :]
        old = f"{head}    def forward_cuda(self, hidden_states, output):\n{LORA_BODY}\n{tail}"
        self.write(OLD_GDN, old.replace(GDN_CLASSES[GDN], GDN_CLASSES[OLD_GDN]))
        self.remove(GDN)

    @staticmethod
    def file(module: str) -> str:
        is_package = any(other.startswith(f"{module}.") for other in SOURCES)
        return module.replace(".", "/") + ("/__init__.py" if is_package else ".py")

    def zipped(self, file: Any, compression: int = zipfile.ZIP_STORED) -> None:
        with zipfile.ZipFile(file, "w", compression) as archive:
            for module, source in self.texts.items():
                if module.partition(".")[0] == "vllm":
                    archive.writestr(self.file(module), source)

    @property
    def package(self) -> Any:
        wheel = BytesIO()
        self.zipped(wheel)
        return zipfile.Path(zipfile.ZipFile(wheel), "vllm/")


class Tree(Sources):
    """The same as files below ``root``."""

    def __init__(self, root: Path) -> None:
        self.root = root
        super().__init__()

    @property
    def package(self) -> Path:
        return self.root / "vllm"

    def path(self, module: str) -> Path:
        return self.root / self.file(module)

    def write(self, module: str, source: str | bytes) -> None:
        super().write(module, source)
        path = self.path(module)
        folder = path.parent
        folder.mkdir(parents=True, exist_ok=True)
        while folder != self.root and not (folder / "__init__.py").exists():
            (folder / "__init__.py").touch()
            folder = folder.parent
        path.write_bytes(self.texts[module])

    def remove(self, module: str) -> None:
        super().remove(module)
        self.path(module).unlink()

    def wheel(self, compression: int = zipfile.ZIP_STORED) -> Path:
        path = self.root / "vllm-0.32.0-py3-none-any.whl"
        self.zipped(path, compression)
        return path


class Plugin:
    """The plugin, freshly imported beside a ``vllm`` that is a :class:`Tree`."""

    def __init__(self, tree: Tree) -> None:
        self.tree = tree

    @property
    def install(self) -> ModuleType:
        return importlib.import_module("vllm_gdn_plugin.install")

    def register(self) -> None:
        importlib.import_module("vllm_gdn_plugin").register()

    def vllm(self, name: str) -> ModuleType:
        return importlib.import_module(f"vllm.{name}")

    def import_gdn(self, module: str = GDN) -> Any:
        """Import the GDN module, as a model file does, and return its class."""
        return getattr(importlib.import_module(module), GDN_CLASSES[module])

    @property
    def said(self) -> list[tuple[str, str]]:
        """(level, message) of every line that was logged."""
        lines: list[tuple[str, str]] = self.vllm("logger").lines
        return lines

    @property
    def registry(self) -> dict[str, Any]:
        """vLLM's registry of classes that replace its layers."""
        registry: dict[str, Any] = self.vllm("model_executor.custom_op").op_registry_oot
        return registry

    @property
    def replaced(self) -> list[str]:
        """The imported GDN classes in place of which vLLM builds the plugin's."""
        layers = importlib.import_module("vllm_gdn_plugin.host.layers")
        classes = [getattr(sys.modules.get(module), name, None) for module, name in GDN_CLASSES.items()]
        return [known.__name__ for known in classes if known is not None and layers.is_built_in_place_of(known)]

    @staticmethod
    def load(*layers: Any) -> None:
        """Call what vLLM's loaders call, with the weights in place."""
        for layer in layers:
            module = layer.gdn_after_loading
            module.quant_method.process_weights_after_loading(module)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("VLLM_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("VLLM_LOGGING_STREAM", "ext://sys.stderr")  # the command line sets it: put back afterwards


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """`bench` takes over SIGINT and SIGTERM; a test gives them back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def sources() -> Sources:
    return Sources()


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path / "host")


@pytest.fixture
def isolated(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No ``vllm``, ``torch`` or plugin imported yet; what was, and the import system, is put back afterwards."""

    def ours() -> list[str]:
        return [name for name in sys.modules if name.partition(".")[0] in ("vllm", "torch", "vllm_gdn_plugin")]

    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    modules, meta_path = {name: sys.modules.pop(name) for name in ours()}, list(sys.meta_path)
    yield
    monkeypatch.undo()  # now: what it puts back into sys.modules is to go, too
    for name in ours():
        del sys.modules[name]
    sys.modules.update(modules)
    sys.meta_path[:] = meta_path


@pytest.fixture
def host(tree: Tree, isolated: None, monkeypatch: pytest.MonkeyPatch) -> Tree:
    """The tree, where ``import vllm`` and ``import torch`` find it."""
    monkeypatch.syspath_prepend(str(tree.root))
    return tree


@pytest.fixture
def plugin(host: Tree) -> Plugin:
    return Plugin(host)
