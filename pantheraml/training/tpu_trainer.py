"""``PantheraMLTrainer`` with its use of TPU cores said in one object, and what the cores hold and did."""

from __future__ import annotations

from typing import Any

from .. import log, xla_runtime
from ..errors import ArgumentError
from ..models.record import record_of
from ..parallel import xla
from .trainer import PantheraMLTrainer, PantheraMLTrainingArguments

_GIB = 1024**3


class PantheraMLTPUTrainer(PantheraMLTrainer):
    """``PantheraMLTrainer`` that takes a ``MultiTPUConfig``.

    Any ``SFTTrainer`` trains a model of ``FastLanguageModel`` on XLA devices; this one also applies a config.
    ``per_device_train_batch_size`` is of each core along the mesh's axis ``fsdp``.

    Args:
        *args: As for ``trl.SFTTrainer``.
        tpu_config: How the cores are used, default: what was set up before, else ``MultiTPUConfig()``.
        **kwargs: As for ``trl.SFTTrainer``, and the older keywords that ``PantheraMLTrainer`` takes.

    Raises:
        MissingDependencyError: torch_xla is not installed.
        UnsupportedError: this process computes on something else.
        ArgumentError: the model was not loaded by PantheraML, or ``tpu_config`` is something else.
    """

    def __init__(self, *args: Any, tpu_config: xla.MultiTPUConfig | None = None, **kwargs: Any) -> None:
        where = type(self).__name__
        if tpu_config is not None and not isinstance(tpu_config, xla.MultiTPUConfig):
            raise ArgumentError(f"tpu_config must be a MultiTPUConfig, not {type(tpu_config).__name__}", where=where)
        self.tpu_config = xla.setup_multi_tpu(tpu_config)
        model = args[0] if args else kwargs.get("model")
        if model is None or record_of(model) is None:
            raise ArgumentError(
                "the model was not loaded by PantheraML", where=where, hint="load it with FastLanguageModel"
            )
        if len(args) < 2 and kwargs.get("args") is None:
            kwargs["args"] = PantheraMLTrainingArguments()
        if not self.tpu_config.use_gradient_checkpointing:
            (args[1] if len(args) > 1 else kwargs["args"]).gradient_checkpointing = False
        super().__init__(*args, **kwargs)

    def get_model_memory_usage(self) -> dict[str, dict[str, Any]]:
        """Memory of this process's first core.

        Returns:
            ``{"tpu_core": ...}`` with ``rank``, ``world_size``, ``device`` and, in GiB, ``used``, ``limit`` and
            ``peak``, which are None where the backend does not count.
        """
        info = xla.get_tpu_memory_info()
        row = {name: info[name] for name in ("rank", "world_size", "device")}
        figures = {name: info[name] / _GIB if info["available"] else None for name in ("used", "limit", "peak")}
        return {"tpu_core": row | figures}

    def print_memory_stats(self) -> None:
        """Tell the memory of this process's first core in one line, on the main process."""
        row = self.get_model_memory_usage()["tpu_core"]
        if row["used"] is None:
            figures = f"the backend {xla_runtime.kind()} does not count its memory"
        else:
            figures = f"{row['used']:.2f} GiB used, {row['peak']:.2f} at most, of {row['limit']:.2f}"
        if xla.is_tpu_main_process():
            log.info(f"core {row['rank']} of {row['world_size']} ({row['device']}): {figures}")

    def get_performance_metrics(self) -> dict[str, Any]:
        """What the runtime did since the process began.

        Returns:
            ``compilations``, ``executions`` and ``host_reads`` (counts), and ``fallbacks`` (names of operations that
            ran on the host).
        """
        counters = xla_runtime.counters()
        names = ("compilations", "executions", "host_reads", "fallbacks")
        return {name: getattr(counters, name) for name in names}

    def cleanup(self) -> None:
        """Wait for the cores and forget the mesh."""
        xla.cleanup_multi_tpu()
