"""The one module that knows vLLM's names. Everything here imports vLLM when it is called, never before."""

import importlib.util
import logging
import re
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from vllm_gdn_plugin.decide.checkpoint import digest
from vllm_gdn_plugin.decide.plan import LayerFacts, ProjectionFacts


def package_directory() -> Path:
    """Where the installed package ``vllm`` lies, without importing it. Raises ModuleNotFoundError."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("there is no module named vllm")
    return Path(next(iter(spec.submodule_search_locations)))


def version() -> str:
    """``vllm.__version__``: the truth also for rebuilds whose distribution has another name."""
    import vllm

    return str(vllm.__version__)


def platform() -> str:
    """vLLM's platform: ``cuda``, ``cpu``, ``rocm``, ``xpu`` or the name that an out-of-tree one gives itself."""
    from vllm.platforms import current_platform

    for name in ("cuda", "rocm", "xpu", "cpu"):
        if getattr(current_platform, f"is_{name}")():
            return name
    return str(current_platform.device_name or current_platform.device_type or "unspecified")


LOGGER = "vllm.vllm_gdn_plugin"


def logger() -> logging.Logger:
    """A logger below vLLM's own, so that its format and level apply to our lines."""
    from vllm.logger import init_logger

    log: logging.Logger = init_logger(LOGGER)
    return log


def is_first_rank() -> bool:
    """Whether this process speaks for its engine, which is one data-parallel replica: its first rank."""
    return is_first_rank_of_stage() and not pipeline_stage()


def is_first_rank_of_stage() -> bool:
    """Whether this process speaks for the layers of its pipeline stage: the stage's other ranks have the same ones."""
    from vllm.distributed.parallel_state import get_pcp_group, get_tp_group, model_parallel_is_initialized

    return not model_parallel_is_initialized() or bool(get_tp_group().is_first_rank and get_pcp_group().is_first_rank)


def pipeline_stage() -> int | None:
    """The pipeline stage of this process, counted from 0, or None where there is only one."""
    from vllm.distributed.parallel_state import get_pp_group, model_parallel_is_initialized

    several = model_parallel_is_initialized() and get_pp_group().world_size > 1
    return int(get_pp_group().rank_in_group) if several else None


def declare_variables(variables: dict[str, Callable[[], Any]]) -> None:
    """Make environment variables known to vLLM.

    vLLM hashes every known variable into its compile-cache keys (``vllm.envs.compile_factors``), so that an
    artifact compiled with other values, or without the plugin, is never loaded; and it warns of unknown ones.
    """
    from vllm import envs

    envs.environment_variables.update(variables)


def replacement_of(class_name: str) -> Any | None:
    """The class that is registered to be built in place of ``class_name``, if any."""
    from vllm.model_executor.custom_op import op_registry_oot

    return op_registry_oot.get(class_name)


def replace(class_name: str, replacement: Any) -> None:
    """Have vLLM build ``replacement`` wherever it builds ``class_name``."""
    from vllm.model_executor.custom_op import PluggableLayer

    PluggableLayer.register_oot(name=class_name)(replacement)


def withdraw(variables: Iterable[str], class_names: Iterable[str]) -> None:
    """Take back what :func:`declare_variables` and :func:`replace` have done, be it all, a part or nothing."""
    known = getattr(sys.modules.get("vllm.envs"), "environment_variables", {})
    for name in variables:
        known.pop(name, None)
    replacements = getattr(sys.modules.get("vllm.model_executor.custom_op"), "op_registry_oot", {})
    for name in class_names:
        if getattr(replacements.get(name), "is_gdn_plugin", False):
            del replacements[name]


def layer_facts(layer: Any, requested_platform: str) -> LayerFacts:
    """The facts about a GDN layer that vLLM has just constructed."""
    from vllm import envs
    from vllm.config.vllm import get_current_vllm_config

    config = get_current_vllm_config()
    graphs = getattr(config.compilation_config, "cudagraph_mode", None)
    offload = config.offload_config
    return LayerFacts(
        platform=requested_platform,
        qkvz=_projection_facts(getattr(layer, "in_proj_qkvz", None)),
        ba=_projection_facts(getattr(layer, "in_proj_ba", None)),
        activation_dtype=_dtype_name(config.model_config.dtype),
        lora=config.lora_config is not None,
        cuda_graphs=not config.model_config.enforce_eager and getattr(graphs, "name", "NONE") != "NONE",
        batch_invariant=bool(envs.VLLM_BATCH_INVARIANT),
        offload=offload.uva.cpu_offload_gb > 0 or offload.prefetch.offload_group_size > 0,
        weights_in_place=_on_one_device(layer),
        breakable_graphs=bool(getattr(envs, "VLLM_USE_BREAKABLE_CUDAGRAPH", False)),
        quantization=_quantization(config.model_config),
    )


def _quantization(model: Any) -> str:
    checkpoint = getattr(model, "hf_config", None)
    text = getattr(checkpoint, "text_config", None)
    return digest(getattr(checkpoint, "quantization_config", None) or getattr(text, "quantization_config", None))


def _on_one_device(layer: Any) -> bool:
    weights = [getattr(getattr(layer, name, None), "weight", None) for name in ("in_proj_qkvz", "in_proj_ba")]
    devices = {str(getattr(weight, "device", None)) for weight in weights}
    return len(devices) == 1 and not devices & {"meta", "None"}


def _projection_facts(linear: Any) -> ProjectionFacts:
    from vllm.model_executor.layers.linear import MergedColumnParallelLinear

    plain = (
        type(linear) is MergedColumnParallelLinear
        and linear.bias is None
        and not linear.gather_output
        and linear.return_bias
    )
    method = getattr(linear, "quant_method", None)
    return ProjectionFacts(
        linear_method=_linear_method(method),
        dtype=_dtype_name(getattr(linear, "params_dtype", None)),
        output_size=int(getattr(linear, "output_size_per_partition", 0)),
        plain=plain,
    )


def _linear_method(method: Any) -> str:
    """Class name of a linear method, and the GEMM that an unquantised one was told to use if it is not torch's."""
    gemm = getattr(method, "_gemm_impl", None)
    gemm = getattr(gemm, "func", gemm)
    default = ("default_unquantized_gemm", "cpu_unquantized_gemm")
    suffix = "" if gemm is None or gemm.__name__ in default else f" with {gemm.__name__}"
    return type(method).__name__ + suffix


def _dtype_name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def after_loading(layer: Any, action: Callable[[Any], None]) -> Any:
    """A module for ``layer`` to hold, whose ``quant_method`` vLLM's loaders call once the weights are in place.

    All but tensorizer's, after which a layer runs as planned, the report is left out, and an allocation of fused
    weights that is not used up stays as it is. It has no parameters: vLLM excuses those below a module with such a
    method where a checkpoint lacks them, so the layer itself must have none.
    """
    import torch
    from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

    class AfterLoading(QuantizeMethodBase):  # type: ignore[misc]
        supports_pre_processed_weights = True
        requires_device_loading = False

        def create_weights(self, layer: Any, *args: Any, **kwargs: Any) -> None:
            """The layer itself has no weights of ours."""

        def apply(self, layer: Any, *args: Any, **kwargs: Any) -> Any:
            raise NotImplementedError("a GDN layer is called by its forward")

        def process_weights_after_loading(self, layer: Any) -> None:
            action(known())

    known = weakref.ref(layer)  # the layer holds the module, which must not hold the layer
    module = torch.nn.Module()
    module.quant_method = AfterLoading()
    return module


def hold_first(layer: Any, module: Any) -> None:
    """Have ``layer`` hold the module of :func:`after_loading` before all others: in this order vLLM comes to them, and
    a projection that it has come to may have its weight packed."""
    layer.gdn_after_loading = module
    modules = vars(layer).get("_modules", {})
    for name in [name for name in modules if modules[name] is not module]:
        modules[name] = modules.pop(name)


def captured_sizes() -> tuple[int, ...]:
    """The numbers of tokens for which vLLM will capture a CUDA graph, as far as its configuration tells; none where
    the model's memory is vLLM's own allocator's (sleep mode), in which nothing else should be captured meanwhile.

    With speculative decoding vLLM rounds them up to whole requests, for graphs that only decode, once the model is
    loaded: both are told.
    """
    from vllm.config.vllm import get_current_vllm_config

    config = get_current_vllm_config()
    # A draft model has a configuration of its own, and is loaded into the memory of its target.
    target = getattr(getattr(config, "speculative_config", None), "target_model_config", None)
    if any(
        getattr(m, "enable_sleep_mode", False) or getattr(m, "enable_cumem_allocator", False)
        for m in (config.model_config, target)
    ):
        return ()
    sizes = set(getattr(config.compilation_config, "cudagraph_capture_sizes", None) or ())
    request = 1 + config.num_speculative_tokens
    rounded = {-(-size // request) * request for size in sizes}
    return tuple(sorted(sizes | {size for size in rounded if size <= max(sizes)}))


@contextmanager
def unchanged_stream() -> Iterator[None]:
    """Leave the current stream, and what vLLM knows of it, as they were: an engine whose stream nobody has set takes
    one of its own when vLLM first asks for it."""
    import torch
    from vllm.utils.torch_utils import _current_stream_tls

    stream, known = torch.cuda.current_stream(), getattr(_current_stream_tls, "value", None)
    try:
        yield
    finally:
        torch.cuda.set_stream(stream)
        _current_stream_tls.value = known


_thread = threading.local()


def prepare_aux_stream() -> None:
    """Have this thread's cuBLAS allocate its workspace for the auxiliary stream, once, outside a capture.

    One that is allocated within a capture belongs to the graphs' memory pool, and outlives the graphs there: a pool
    that is still in use when its owner has given it up fails the next capture.
    """
    if getattr(_thread, "prepared", False):
        return
    import torch
    from vllm.utils.torch_utils import aux_stream

    with unchanged_stream(), torch.cuda.stream(aux_stream()):
        torch.cuda.current_blas_handle()
    _thread.prepared = True


def cuda_graphs_exist() -> bool:
    """Whether there is memory of a CUDA graph in this process."""
    import torch

    try:
        return any(segment["segment_pool_id"] != (0, 0) for segment in torch.cuda.memory_snapshot())
    except Exception:  # an allocator that cannot tell, such as cudaMallocAsync
        return True


def release_workspaces() -> None:
    """Give back the workspaces that cuBLAS has by now, one for each stream that it was used on, and all else that
    PyTorch keeps for later. cuBLAS gets new ones where it needs them. Does not touch the workspaces while there are
    CUDA graphs, which go on using those that they were captured with."""
    import torch

    global _thread
    torch.cuda.synchronize()
    torch.cuda.empty_cache()  # first, for graphs that are gone leave their memory in it
    if cuda_graphs_exist():
        return
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    _thread = threading.local()


def tuning_directory() -> Path:
    """Where the plugin keeps its times, below vLLM's cache root."""
    from vllm import envs

    return Path(envs.VLLM_CACHE_ROOT) / "vllm_gdn_plugin"


def gpu() -> str:
    """The name of this process's GPU, or of the first one where CUDA is not initialised; this does not do it."""
    import torch
    from vllm.platforms import current_platform

    # vLLM counts the devices of this engine, one data-parallel replica, and torch those of the machine.
    return str(torch.cuda.get_device_name() if torch.cuda.is_initialized() else current_platform.get_device_name())


NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")


def driver() -> str:
    """The version of NVIDIA's driver; empty where it does not show, as in WSL."""
    try:
        found = re.search(r"\b\d+\.\d+(\.\d+)?\b", NVIDIA_DRIVER.read_text())
    except OSError:
        return ""
    return found[0] if found else ""


def layer_by_name(layer_name: Any) -> Any:
    """The layer that a custom op was given the name of, in the current forward pass, for which vLLM has imported both
    modules: to import from them at each call would cost more than all the rest of it."""
    name = sys.modules["vllm.utils.torch_utils"]._resolve_layer_name(layer_name)
    return sys.modules["vllm.forward_context"].get_forward_context().no_compile_layers[name]


def breakable_capture() -> bool:
    """Whether a breakable CUDA-graph capture is active (vLLM 0.22 and later have them)."""
    breakable = sys.modules.get("vllm.compilation.breakable_cudagraph")
    return breakable is not None and bool(breakable.BreakableCUDAGraphCapture.is_active())


def when_imported(module_names: tuple[str, ...], action: Callable[[ModuleType], bool]) -> None:
    """Call ``action(module)`` right after one of the modules is executed, or at once where it already is.

    Nothing is imported for it: a process that never needs the module never pays for it. The watch ends when the
    action answers True. A second call replaces the first.
    """
    stop_watching()
    if not any(action(sys.modules[name]) for name in module_names if name in sys.modules):
        sys.meta_path.insert(0, _ImportWatch(module_names, action))


def stop_watching() -> None:
    """Take back what :func:`when_imported` has done."""
    for finder in [f for f in sys.meta_path if isinstance(f, _ImportWatch)]:
        sys.meta_path.remove(finder)


class _ImportWatch(MetaPathFinder):
    """Lets the other finders find a watched module, and adds a step after its execution."""

    def __init__(self, module_names: tuple[str, ...], action: Callable[[ModuleType], bool]) -> None:
        self.module_names = module_names
        self.action = action

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in self.module_names:
            return None
        for finder in sys.meta_path:
            find = getattr(finder, "find_spec", None)
            spec: ModuleSpec | None = find(name, path, target) if find and finder is not self else None
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _LoaderWithStep(spec.loader, self)
                return spec
        return None


class _LoaderWithStep(Loader):
    def __init__(self, loader: Loader, watch: _ImportWatch) -> None:
        self.loader = loader
        self.watch = watch

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        spec = module.__spec__
        assert spec is not None
        spec.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        if self.watch.action(module) and self.watch in sys.meta_path:
            sys.meta_path.remove(self.watch)
