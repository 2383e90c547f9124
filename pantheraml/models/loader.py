"""The public loaders: ``FastLanguageModel``, ``FastModel`` and the names of families that Unsloth scripts import.

The interface is Unsloth's (https://github.com/unslothai/unsloth), so that its scripts run with the import changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..parallel.config import MultiGPUConfig
from . import adapters, inference
from .context import DEFAULT_MAX_SEQ_LENGTH
from .load import load
from .quantize import LOAD_IN_4BIT_DEFAULT
from .request import LoadRequest
from .targets import EVERYTHING, Scopes


def _request(values: dict[str, Any]) -> LoadRequest:
    extra = values.pop("kwargs")
    given = {name: extra.pop(name) for name in list(extra) if name in LoadRequest.__dataclass_fields__}
    return LoadRequest(**values, **given, extra=extra)


class FastLanguageModel:
    """Load a causal language model and put adapters on it."""

    @staticmethod
    def from_pretrained(
        model_name: str = "unsloth/Llama-3.2-1B-Instruct",
        max_seq_length: int | None = DEFAULT_MAX_SEQ_LENGTH,
        dtype: Any = None,
        load_in_4bit: bool = LOAD_IN_4BIT_DEFAULT,
        load_in_8bit: bool = False,
        load_in_16bit: bool = False,
        full_finetuning: bool = False,
        token: str | None = None,
        device_map: Any = "sequential",
        rope_scaling: dict[str, Any] | None = None,
        fix_tokenizer: bool = True,
        trust_remote_code: bool = False,
        use_gradient_checkpointing: bool | str = "unsloth",
        resize_model_vocab: int | None = None,
        revision: str | None = None,
        use_exact_model_name: bool = False,
        offload_embedding: bool = False,
        float32_mixed_precision: bool | None = None,
        fast_inference: bool = False,
        gpu_memory_utilization: float = 0.5,
        float8_kv_cache: bool = False,
        random_state: int | None = 3407,
        max_lora_rank: int = 64,
        disable_log_stats: bool = True,
        qat_scheme: str | None = None,
        load_in_fp8: bool | str = False,
        unsloth_tiled_mlp: bool | str = False,
        text_only: bool = False,
        auto_device_map: bool = True,
        max_memory: dict[Any, Any] | None = None,
        use_multi_gpu: bool | None = None,
        use_tpu: bool | None = None,
        tpu_cores: int = 8,
        multi_gpu_config: MultiGPUConfig | None = None,
        **kwargs: Any,
    ) -> tuple[Any, Any]:
        """Load a model and its tokenizer, ready for ``get_peft_model``, training or generation.

        The model is a stock transformers model (PEFT's wrapper of one when ``model_name`` is an adapter) whose
        modules run faster implementations where there are any; ``model.adapt_report`` lists them.

        Args:
            model_name: Hub id, local folder, or a folder or repository that holds a LoRA adapter, whose base is then
                loaded too and whose weights stay trainable.
            max_seq_length: Longest sequence in tokens; beyond the model's maximum RoPE is scaled. None takes the
                model's maximum, and so does the default where the model's is shorter than 2048.
            dtype: ``torch.float16``, ``torch.bfloat16``, ``torch.float32`` or their names; None takes bfloat16 where
                it is native, else float16 on GPUs, else float32.
            load_in_4bit: Hold the weights, stacked experts of a mixture too, in nf4 with double quantisation
                (bitsandbytes); a 16-bit checkpoint is quantised while it loads. The default gives way to any other
                choice; given explicitly it does not (``load_in_fp8=True`` besides it is a choice of its own, see
                there).
            load_in_8bit: Hold the weights in int8 (bitsandbytes).
            load_in_16bit: Hold the weights unquantised.
            full_finetuning: Train every weight; unquantised.
            token: Hub token for private and gated repositories; used for this load only.
            device_map: ``"sequential"``, ``"auto"``, ``"balanced"``, ``"balanced_low_0"``, a device or a dict. Each
                process of a launch takes its own device.
            rope_scaling: RoPE parameters that replace the derived scaling, e.g. ``{"rope_type": "yarn", "factor": 4}``.
            fix_tokenizer: Give the tokenizer a padding token of its own.
            trust_remote_code: Run Python code that comes with the repository. Never asked for interactively.
            use_gradient_checkpointing: ``"unsloth"``, ``"pantheraml"``, ``"auto"``, True or False.
            resize_model_vocab: Rows the embedding is resized to.
            revision: Branch, tag or commit of ``model_name``.
            use_exact_model_name: Names are never mapped to others here, so both values do the same.
            offload_embedding: Keep the input embedding in host memory; a CPU only for now.
            float32_mixed_precision: With ``full_finetuning``, True holds the trained weights in fp32.
            fast_inference: Generate with vLLM; not available yet.
            gpu_memory_utilization: Share of memory for vLLM.
            float8_kv_cache: vLLM; not available yet.
            random_state: Seed of weights that start at random (new heads).
            max_lora_rank: vLLM.
            disable_log_stats: vLLM.
            qat_scheme: With ``full_finetuning``, a scheme of quantisation-aware training: the model computes with
                what torchao will round its linear layers to. ``"int4"``, ``"int8"``, ``"int8-int4"``,
                ``"fp8-int4"``, ``"fp8-fp8"`` or ``"phone-deployment"``.
            load_in_fp8: Hold the decoder's linear layers in fp8 (e4m3) and multiply them in fp8, inputs quantised as
                they come: True with a scale for each row of a weight, ``"block"`` for each 128 x 128 tile. Head,
                embeddings, norms, routers and stacked experts stay in ``dtype``. A 16-bit checkpoint is quantised
                while it loads; one that is in fp8 already loads as it is. With ``load_in_4bit=True``, both given
                explicitly, weights are stored in nf4 and multiplied in fp8. Needs compute capability 8.9 and bfloat16;
                a CPU computes the same roundings, slowly.
            unsloth_tiled_mlp: MLP in tiles; not available yet.
            text_only: Load the text decoder of a multimodal model alone.
            auto_device_map: Spread a model that does not fit one GPU over those of this process.
            max_memory: Cap in each GPU of this process, e.g. ``{0: "10GB", 1: "10GB"}``.
            use_multi_gpu: True spreads the model over all GPUs of this process, False keeps it on one.
            use_tpu: True insists on a TPU, False refuses one.
            tpu_cores: TPU cores expected.
            multi_gpu_config: How several GPUs are used, for the load and the trainer of the model. With
                ``strategy="fsdp"`` each rank of the launch keeps its part of the weights as they are read, so that no
                GPU and no host ever holds the model; the model runs once a trainer has been made of it.
            **kwargs: ``quantization_config``, ``config``, ``num_labels``, ``id2label``, ``label2id``, ``problem_type``
                (these give a sequence-classification model), ``attn_implementation``, ``cache_dir``,
                ``local_files_only``, ``force_download``, ``subfolder``, ``variant``, ``gguf_file``, ``torch_dtype``,
                ``use_safetensors``, ``tokenizer_name``, ``activation_memory_fraction`` (share of the free device
                memory that kept activations may fill, default 0.9), and any field of the model's configuration.

        Returns:
            The model and its tokenizer (the processor of a multimodal model). The tokenizer pads on the left.

        Raises:
            ModelNotFoundError: the folder, repository, configuration, weights or tokenizer is not there.
            UnknownArchitectureError: the installed transformers does not know the model.
            ConfigError: a value that cannot be used.
            ArgumentError: an unknown keyword, or a value of the wrong type.
            ConflictError: options contradict each other.
            MissingDependencyError: an optional package is needed.
            UnsupportedError: not on this device, with this model or in this release.
            CheckpointError: files are damaged or lead out of their folder.
        """
        return load(_request(dict(locals())))

    @staticmethod
    def get_peft_model(
        model: Any,
        r: int = 16,
        target_modules: Sequence[str] | str | None = adapters.DEFAULT_TARGETS,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        bias: str = "none",
        layers_to_transform: int | Sequence[int] | None = None,
        layers_pattern: str | None = None,
        use_gradient_checkpointing: bool | str = "unsloth",
        random_state: int | None = 3407,
        max_seq_length: int = 2048,
        use_rslora: bool = False,
        modules_to_save: Sequence[str] | None = None,
        init_lora_weights: bool | str = True,
        loftq_config: Any = None,
        temporary_location: str = "_unsloth_temporary_saved_buffers",
        qat_scheme: str | None = None,
        target_parameters: Sequence[str] | None = None,
        ensure_weight_tying: bool = False,
        finetune_last_n_layers: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Put LoRA on a model (https://arxiv.org/abs/2106.09685) and make it ready for training.

        LoRA weights are fp32, the base is frozen as it is. On a model that has the same LoRA already the call changes
        nothing; a model loaded with ``full_finetuning=True`` is returned as it is.

        Args:
            model: What ``from_pretrained`` returned.
            r: Rank.
            target_modules: Names of linear layers, a regular expression over whole module names, or ``"all-linear"``.
                ``gate_proj``, ``up_proj`` and ``down_proj`` include the experts of a mixture of experts.
                ``embed_tokens`` is trained in full instead.
            lora_alpha: Numerator of the scale ``lora_alpha / r``.
            lora_dropout: Dropout on the adapter's input.
            bias: ``"none"``, ``"all"`` or ``"lora_only"``: which biases are trained.
            layers_to_transform: Indices of the decoder layers to adapt; None for all.
            layers_pattern: Name of the list of decoder layers, where it cannot be told.
            use_gradient_checkpointing: ``"unsloth"``, ``"pantheraml"``, ``"auto"``, True or False.
            random_state: Seed set before the adapter is made; None leaves the generators alone.
            max_seq_length: Has no effect; the model's own applies.
            use_rslora: Scale by ``lora_alpha / sqrt(r)`` (https://arxiv.org/abs/2312.03732).
            modules_to_save: ``embed_tokens`` and ``lm_head``, trained in full and saved with the adapter.
            init_lora_weights: True, False, ``"gaussian"``, ``"loftq"``, ``"corda"``, ``"pissa"``, ``"olora"`` or
                ``"orthogonal"``.
            loftq_config: PEFT's ``LoftQConfig`` for ``init_lora_weights="loftq"``.
            temporary_location: Has no effect; nothing is written.
            qat_scheme: A scheme of quantisation-aware training, as in ``from_pretrained``: what is rounded is the
                weight with the adapter in it.
            target_parameters: Names of parameters (stacked experts) to adapt, instead of the rule above.
            ensure_weight_tying: Train a tied embedding and head as one; done for tied models in any case.
            finetune_last_n_layers: Adapt the last n decoder layers only.
            **kwargs: Further fields of PEFT's ``LoraConfig``, e.g. ``use_dora``, ``exclude_modules``, ``rank_pattern``,
                and ``task_type``.

        Returns:
            A PEFT model in training mode.

        Raises:
            ArgumentError: a value of the wrong type, an unknown keyword, or a different LoRA is there already.
            ConfigError: a value that cannot be used, or target modules that match nothing.
            ConflictError: options contradict each other.
            UnsupportedError: not with this model or in this release.
        """
        named = {"task_type": kwargs.pop("task_type")} if "task_type" in kwargs else {}
        request = adapters.AdapterRequest(
            r=r,
            target_modules=list(target_modules) if isinstance(target_modules, tuple) else target_modules,
            lora_alpha=lora_alpha,
            lora_dropout=lora_dropout,
            bias=bias,
            layers_to_transform=layers_to_transform,
            layers_pattern=layers_pattern,
            finetune_last_n_layers=finetune_last_n_layers,
            use_gradient_checkpointing=use_gradient_checkpointing,
            random_state=random_state,
            use_rslora=use_rslora,
            modules_to_save=modules_to_save,
            init_lora_weights=init_lora_weights,
            loftq_config=loftq_config,
            qat_scheme=qat_scheme,
            target_parameters=target_parameters,
            ensure_weight_tying=ensure_weight_tying,
            extra=kwargs,
            **named,
        )
        return adapters.make_peft_model(model, request)

    @staticmethod
    def for_inference(model: Any) -> Any:
        """Put a model into inference; see ``pantheraml.models.inference.for_inference``."""
        return inference.for_inference(model)

    @staticmethod
    def for_training(model: Any, use_gradient_checkpointing: bool | str = True) -> Any:
        """Put a model into training; see ``pantheraml.models.inference.for_training``."""
        return inference.for_training(model, use_gradient_checkpointing)


class FastModel:
    """Load a model of any kind that transformers knows: text, vision, speech, classification."""

    @staticmethod
    def from_pretrained(
        model_name: str = "unsloth/Llama-3.2-11B-Vision-Instruct-bnb-4bit",
        max_seq_length: int | None = DEFAULT_MAX_SEQ_LENGTH,
        dtype: Any = None,
        load_in_4bit: bool = LOAD_IN_4BIT_DEFAULT,
        load_in_8bit: bool = False,
        load_in_16bit: bool = False,
        full_finetuning: bool = False,
        token: str | None = None,
        device_map: Any = "sequential",
        rope_scaling: dict[str, Any] | None = None,
        fix_tokenizer: bool = True,
        trust_remote_code: bool = False,
        use_gradient_checkpointing: bool | str = "unsloth",
        resize_model_vocab: int | None = None,
        revision: str | None = None,
        return_logits: bool = False,
        fullgraph: bool = True,
        use_exact_model_name: bool = False,
        auto_model: Any = None,
        whisper_language: str | None = None,
        whisper_task: str | None = None,
        unsloth_force_compile: bool = False,
        offload_embedding: bool = False,
        float32_mixed_precision: bool | None = None,
        fast_inference: bool = False,
        gpu_memory_utilization: float = 0.5,
        float8_kv_cache: bool = False,
        random_state: int | None = 3407,
        max_lora_rank: int = 64,
        disable_log_stats: bool = True,
        qat_scheme: str | None = None,
        load_in_fp8: bool | str = False,
        unsloth_tiled_mlp: bool | str = False,
        target_parameters: Sequence[str] | None = None,
        text_only: bool = False,
        auto_device_map: bool = True,
        max_memory: dict[Any, Any] | None = None,
        use_multi_gpu: bool | None = None,
        use_tpu: bool | None = None,
        tpu_cores: int = 8,
        multi_gpu_config: MultiGPUConfig | None = None,
        **kwargs: Any,
    ) -> tuple[Any, Any]:
        """Load a model and its tokenizer or processor; the arguments are those of ``FastLanguageModel`` and these.

        Args:
            model_name: See ``FastLanguageModel.from_pretrained``, as for all arguments not named here.
            return_logits: Logits are computed whenever they are read, so both values do the same.
            fullgraph: Nothing is compiled as a whole graph, so both values do the same.
            auto_model: Class to load with, e.g. ``transformers.AutoModelForSequenceClassification``.
            whisper_language: Language of a Whisper model's transcripts.
            whisper_task: ``"transcribe"`` or ``"translate"`` for a Whisper model.
            unsloth_force_compile: Not available.
            target_parameters: Give it to ``get_peft_model``.

        Returns:
            The model and its tokenizer, or processor if it has one.

        Raises:
            PantheraMLError: as ``FastLanguageModel.from_pretrained``.
        """
        return load(_request(dict(locals())))

    @staticmethod
    def get_peft_model(
        model: Any,
        r: int = 16,
        target_modules: Sequence[str] | str | None = None,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        bias: str = "none",
        finetune_vision_layers: bool = True,
        finetune_language_layers: bool = True,
        finetune_attention_modules: bool = True,
        finetune_mlp_modules: bool = True,
        layers_to_transform: int | Sequence[int] | None = None,
        layers_pattern: str | None = None,
        use_gradient_checkpointing: bool | str = "unsloth",
        random_state: int | None = 3407,
        max_seq_length: int = 2048,
        use_rslora: bool = False,
        modules_to_save: Sequence[str] | None = None,
        init_lora_weights: bool | str = True,
        loftq_config: Any = None,
        task_type: Any = "CAUSAL_LM",
        temporary_location: str = "_unsloth_temporary_saved_buffers",
        qat_scheme: str | None = None,
        target_parameters: Sequence[str] | None = None,
        ensure_weight_tying: bool = False,
        finetune_last_n_layers: int | None = None,
        finetune_audio_layers: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Put LoRA on a model of any kind; the arguments are those of ``FastLanguageModel`` and these.

        Args:
            model: What ``from_pretrained`` returned; one that has an adapter already is refused.
            r: See ``FastLanguageModel.get_peft_model``, as for all arguments not named here.
            target_modules: Names, a regular expression, ``"all-linear"`` (every part), or None for the linear layers
                of the parts that the flags leave on.
            finetune_vision_layers: Adapt the vision tower.
            finetune_language_layers: Adapt the language model.
            finetune_attention_modules: Adapt attention projections.
            finetune_mlp_modules: Adapt MLP projections.
            modules_to_save: Any modules, trained in full and saved with the adapter.
            task_type: PEFT's task type, or None.
            finetune_audio_layers: Adapt the audio tower.

        Returns:
            A PEFT model in training mode.

        Raises:
            ConflictError: the model has an adapter already, or options contradict each other.
            PantheraMLError: otherwise as ``FastLanguageModel.get_peft_model``.
        """
        scopes = Scopes(
            vision=finetune_vision_layers,
            language=finetune_language_layers,
            attention=finetune_attention_modules,
            mlp=finetune_mlp_modules,
            audio=finetune_audio_layers,
        )
        request = adapters.AdapterRequest(
            r=r,
            target_modules=list(target_modules) if isinstance(target_modules, tuple) else target_modules,
            lora_alpha=lora_alpha,
            lora_dropout=lora_dropout,
            bias=bias,
            layers_to_transform=layers_to_transform,
            layers_pattern=layers_pattern,
            finetune_last_n_layers=finetune_last_n_layers,
            use_gradient_checkpointing=use_gradient_checkpointing,
            random_state=random_state,
            use_rslora=use_rslora,
            modules_to_save=modules_to_save,
            init_lora_weights=init_lora_weights,
            loftq_config=loftq_config,
            task_type=task_type,
            qat_scheme=qat_scheme,
            target_parameters=target_parameters,
            ensure_weight_tying=ensure_weight_tying,
            scopes=EVERYTHING if target_modules == "all-linear" else scopes,
            only_embeddings_saved=False,
            second_call_raises=True,
            extra=kwargs,
        )
        return adapters.make_peft_model(model, request)

    for_inference = FastLanguageModel.for_inference
    for_training = FastLanguageModel.for_training


class FastVisionModel(FastModel):
    """The same as ``FastModel``, by the name that vision scripts use."""


class FastTextModel(FastModel):
    """The same as ``FastModel``, by the name that text scripts use."""


class FastLlamaModel(FastLanguageModel):
    """``FastLanguageModel`` with the model's own maximum as default length; every family's name below is this class."""

    @staticmethod
    def from_pretrained(
        model_name: str = "unsloth/Llama-3.2-1B-Instruct",
        max_seq_length: int | None = None,
        *args: Any,
        max_lora_rank: int = 64,
        **kwargs: Any,
    ) -> tuple[Any, Any]:
        """Load a model; see ``FastLanguageModel.from_pretrained``.

        Args:
            model_name: Hub id or folder, of any family.
            max_seq_length: Longest sequence in tokens; None takes the model's maximum.
            *args: Further positional arguments of ``FastLanguageModel.from_pretrained``.
            max_lora_rank: vLLM.
            **kwargs: Further arguments, and ``tokenizer_name``, ``tokenizer_revision``.

        Returns:
            The model and its tokenizer.
        """
        return FastLanguageModel.from_pretrained(
            model_name, max_seq_length, *args, max_lora_rank=max_lora_rank, **kwargs
        )


FastMistralModel = FastQwen2Model = FastQwen3Model = FastQwen3MoeModel = FastLlamaModel
FastGemmaModel = FastGemma2Model = FastGraniteModel = FastCohereModel = FastFalconH1Model = FastLlamaModel
