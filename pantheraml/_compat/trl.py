"""Constructors of TRL's trainers and configs accept the keywords that older scripts give them.

Goes when scripts no longer say ``SFTTrainer(tokenizer=..., dataset_text_field=..., max_seq_length=...)``, and, for the
precision part, when TRL stops asking for bf16 on machines that have none.

The ``__init__`` of every public trainer and config class of TRL, and of ``transformers.TrainingArguments``, is wrapped
in place when its module is imported, so it does not matter who imports TRL first. A wrapped ``__init__`` translates
keywords, settles precision when none was given, and remembers which options the caller named. Nothing else of TRL or
transformers is touched (``touched()`` lists it). A model that PantheraML loaded additionally gets
``pantheraml.training.attach`` around the construction. ``PANTHERAML_TRL_SHIM=0`` turns all of it off.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from .. import env, log
from ..device import get_device
from ..errors import ArgumentError, ConfigError, ConflictError, unknown_arguments

# What stands above this layer, resolved when a trainer is made.
RECORD_OF = "pantheraml.models.record:record_of"
CONSTRUCTING = "pantheraml.training.attach:constructing"

# Attributes kept on a config: the option names the caller gave, and the plain values after construction.
EXPLICIT = "_pantheraml_explicit"
INITIAL = "_pantheraml_initial"

_MARK = "__pantheraml_shim__"
_BUSY = "_pantheraml_constructing"
_MODULE_PATTERNS = (
    "trainer/*_config.py",
    "trainer/*_trainer.py",
    "experimental/*/*_config.py",
    "experimental/*/*_trainer.py",
)
_ARGUMENTS_MODULE = "transformers.training_args"


@dataclasses.dataclass(frozen=True)
class Retired:
    """A keyword that TRL or transformers no longer takes.

    Attributes:
        now: Today's name, or None when nothing takes its place.
        convert: Turns the old value into the new one.
        note: What happens today, told once where there is no new name.
    """

    now: str | None = None
    convert: Callable[[Any], Any] = lambda value: value
    note: str = ""


def _warmup(ratio: float) -> float:
    if not 0 <= ratio < 1:
        raise ConfigError(f"warmup_ratio must be at least 0 and under 1, not {ratio!r}", where="argument warmup_ratio")
    return ratio


TRAINER_KEYWORDS: dict[str, str] = {"tokenizer": "processing_class"}

CONFIG_KEYWORDS: dict[str, Retired] = {
    "max_seq_length": Retired("max_length"),
    "evaluation_strategy": Retired("eval_strategy"),
    # A float under 1 is a share of the steps.
    "warmup_ratio": Retired("warmup_steps", _warmup),
    "no_cuda": Retired("use_cpu"),
    "per_gpu_train_batch_size": Retired("per_device_train_batch_size"),
    "per_gpu_eval_batch_size": Retired("per_device_eval_batch_size"),
    "push_to_hub_token": Retired("hub_token"),
    "push_to_hub_model_id": Retired("hub_model_id"),
    "use_liger": Retired("use_liger_kernel"),
    "use_liger_loss": Retired("use_liger_kernel"),
    "group_by_length": Retired("train_sampling_strategy", lambda value: "group_by_length" if value else "random"),
    "overwrite_output_dir": Retired(note="files in output_dir are always replaced"),
    "save_safetensors": Retired(note="weights are always saved as safetensors"),
    "max_prompt_length": Retired(note="TRL no longer shortens prompts: filter out those that are too long"),
    "logging_dir": Retired(note="set the environment variable TENSORBOARD_LOGGING_DIR instead"),
    "dataset_batch_size": Retired(note="rows are tokenised one by one"),
    "num_of_sequences": Retired(note="packing fills rows of max_length tokens"),
    "chars_per_token": Retired(note="packing fills rows of max_length tokens"),
    "include_tokens_per_second": Retired(note="tokens per second are in metrics.jsonl"),
}

# Options that transformers reads under another name, and still mirrors under this one.
RENAMED: dict[str, str] = {
    f"gradient_checkpointing{what}": f"activation_checkpointing{what}" for what in ("", "_kwargs")
}

# Options of TrainingArguments that trainers once took themselves.
MOVABLE: frozenset[str] = frozenset({"neftune_noise_alpha"})

_registered = False
_touched: dict[str, type] = {}


def register() -> None:
    """Wrap the constructors when TRL is imported, or now where it already is. A second call is void."""
    global _registered
    if _registered:
        return
    _registered = True
    import wrapt

    for module in [_ARGUMENTS_MODULE, *trl_modules()]:
        wrapt.register_post_import_hook(_wrap_module, module)


def trl_modules() -> list[str]:
    """The modules of the installed TRL that define trainers and configs, found by file name without importing any."""
    spec = importlib.util.find_spec("trl")
    names = []
    for root in spec.submodule_search_locations or [] if spec else []:
        for pattern in _MODULE_PATTERNS:
            paths = sorted(Path(root).glob(pattern))
            names += [".".join(("trl", *path.relative_to(root).with_suffix("").parts)) for path in paths]
    return names


def touched() -> list[str]:
    """Qualified names of the classes whose ``__init__`` is wrapped, sorted."""
    return sorted(_touched)


def _wrap_module(module: ModuleType) -> None:
    for name, value in list(vars(module).items()):
        if isinstance(value, type) and value.__module__ == module.__name__ and not name.startswith("_"):
            wrap(value)


def wrap(cls: type) -> None:
    """Wrap the constructor that ``cls`` itself defines, if it is a trainer or a config; a second call is void."""
    original = vars(cls).get("__init__")
    if original is None or hasattr(original, _MARK):
        return
    kinds = (
        (_ARGUMENTS_MODULE, "TrainingArguments", _config_constructor),
        ("transformers.trainer", "Trainer", _trainer_constructor),
    )
    for module, base, make in kinds:
        if module in sys.modules and issubclass(cls, getattr(sys.modules[module], base)):
            wrapped = make(cls, original)
            setattr(wrapped, _MARK, True)
            cls.__init__ = wrapped  # type: ignore[misc]
            _touched[f"{cls.__module__}.{cls.__qualname__}"] = cls
            return


# ---- configs


def explicit_names(args: Any) -> frozenset[str]:
    """The options of a config that the caller chose: named to the constructor, or assigned since.

    A config whose construction was not seen counts as chosen throughout, so that no default replaces any of it.
    """
    if not hasattr(args, EXPLICIT):
        return frozenset(field.name for field in dataclasses.fields(args))
    initial: Mapping[str, Any] = getattr(args, INITIAL)
    return getattr(args, EXPLICIT) | {name for name, value in initial.items() if getattr(args, name, value) != value}


def remember(args: Any, explicit: frozenset[str]) -> None:
    """Note on ``args`` which options the caller named, and the values as they are now."""
    setattr(args, EXPLICIT, explicit)
    plain = (bool, int, float, str, type(None))
    initial = {
        field.name: getattr(args, field.name, None)
        for field in dataclasses.fields(args)
        if "token" not in field.name and isinstance(getattr(args, field.name, None), plain)
    }
    setattr(args, INITIAL, initial)


def _options(cls: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(cls) if field.init]


def _translate(given: Mapping[str, Any], known: list[str], *, where: str) -> dict[str, Any]:
    """Rename retired keywords; leave the others as they are."""
    result = {name: value for name, value in given.items() if name in known or name not in CONFIG_KEYWORDS}
    for name in given.keys() - result.keys():
        retired, value = CONFIG_KEYWORDS[name], given[name]
        if retired.now is None:
            log.once(f"{where} no longer takes {name}: {retired.note}")
            continue
        if retired.now not in known:
            result[name] = value
            continue
        if value is None:
            continue
        value = retired.convert(value)
        present = result.get(retired.now)
        # TrainingArguments always let a number of warm-up steps win over the ratio.
        if name == "warmup_ratio" and retired.now in result:
            result[retired.now] = present or value
            continue
        if retired.now in result and present != value:
            raise ConflictError(
                f"{name}={value!r} and {retired.now}={present!r} disagree",
                where=where,
                why=f"{name} is the old name of {retired.now}",
                hint=f"give {retired.now} alone",
            )
        if name != "max_seq_length":
            log.once(f"{where}: {name} is called {retired.now} now; taken as {retired.now}={value!r}")
        result[retired.now] = value
    return result


def _settle_precision(given: dict[str, Any], *, where: str) -> None:
    """Choose bf16 on a GPU that has it when the caller chose nothing, and fp32 on a CPU that was told fp16."""
    device = get_device()
    if given.get("bf16") is None and not given.get("fp16"):
        given["bf16"] = device.is_gpu and device.bfloat16 and not given.get("use_cpu")
    elif device.type == "cpu" and given.get("fp16"):
        log.warning(f"{where}: fp16=True cannot be had on a CPU, which computes in fp32 instead")
        given["fp16"] = False
        given["bf16"] = bool(given.get("bf16"))
    if device.type == "cpu" and given.get("bf16"):
        given.setdefault("use_cpu", True)


def _settle_launch(given: dict[str, Any]) -> None:
    """Say that a launch of several processes computes on CPUs: transformers forms no group of them otherwise."""
    if env.world_size() > 1 and get_device().type == "cpu":
        given.setdefault("use_cpu", True)


def _settle_checkpointing(given: dict[str, Any], cls: Any) -> None:
    """Say by its new name what transformers calls differently now: TRL's defaults have the old one, which warns."""
    defaults = {field.name: field.default for field in dataclasses.fields(cls)}
    for old, new in RENAMED.items():
        value = given.get(old, defaults.get(old))
        if new in defaults and given.get(new) is None and value is not None:
            given[new] = value


def _config_constructor(cls: type, original: Callable[..., None]) -> Callable[..., None]:
    known = _options(cls)
    is_trl = cls.__module__ != _ARGUMENTS_MODULE

    @functools.wraps(original)
    def constructor(self: Any, *args: Any, **kwargs: Any) -> None:
        given = _bind(cls.__name__, known, args, kwargs)
        given = _translate(given, known, where=cls.__name__)
        unknown = given.keys() - set(known)
        if unknown:
            raise unknown_arguments(unknown, known, where=cls.__name__)
        explicit = frozenset(name for name, value in given.items() if not (name in ("bf16", "fp16") and value is None))
        if is_trl:
            _settle_precision(given, where=cls.__name__)
        _settle_launch(given)
        _settle_checkpointing(given, cls)
        original(self, **given)
        remember(self, explicit)

    return constructor


# ---- trainers


def _trainer_constructor(cls: type, original: Callable[..., None]) -> Callable[..., None]:
    accepted = _accepted(cls)

    @functools.wraps(original)
    def constructor(self: Any, *args: Any, **kwargs: Any) -> None:
        if _BUSY in vars(self):
            original(self, *args, **kwargs)
            return
        with _marked(self):
            given = _bind(cls.__name__, accepted, args, kwargs)
            given = _translate_trainer(cls, given, accepted)
            if _resolve(RECORD_OF)(given.get("model")) is None:
                original(self, **given)
                return
            if given.get("args") is None:
                config = config_class(cls)
                given["args"] = None if config is None else config()
            with _resolve(CONSTRUCTING)(self, given) as given:
                original(self, **given)

    return constructor


def _accepted(cls: type) -> list[str]:
    """The parameters of a constructor, and where it passes keywords on, those of the base class's."""
    names: list[str] = []
    for base in cls.__mro__:
        if "__init__" in vars(base):
            parameters = list(inspect.signature(vars(base)["__init__"]).parameters.values())[1:]
            names += [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
            if not any(p.kind is p.VAR_KEYWORD for p in parameters):
                break
    return list(dict.fromkeys(names))


@contextlib.contextmanager
def _marked(trainer: Any) -> Iterator[None]:
    """Mark the instance, so that the constructors of its base classes pass their arguments on as they are."""
    vars(trainer)[_BUSY] = True
    try:
        yield
    finally:
        vars(trainer).pop(_BUSY, None)


def _resolve(target: str) -> Callable[..., Any]:
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


def _bind(where: str, names: list[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Positional arguments under their names, then the keywords."""
    if len(args) > len(names):
        raise ArgumentError(f"{where} takes {len(names)} positional arguments, {len(args)} were given", where=where)
    given = dict(zip(names, args))
    twice = given.keys() & kwargs.keys()
    if twice:
        raise ArgumentError(f"{', '.join(sorted(twice))} given by position and by name", where=where)
    return given | dict(kwargs)


def config_class(trainer: type) -> type | None:
    """The config class that belongs to a trainer class: ``SFTConfig`` for ``SFTTrainer`` and what derives from it."""
    for base in trainer.__mro__:
        if base.__name__.endswith("Trainer") and base.__module__.startswith("trl."):
            name = base.__name__.removesuffix("Trainer") + "Config"
            found = getattr(sys.modules[base.__module__], name, None)
            if isinstance(found, type):
                return found
    return None


def _translate_trainer(cls: type, given: dict[str, Any], accepted: list[str]) -> dict[str, Any]:
    where = cls.__name__
    for old, new in TRAINER_KEYWORDS.items():
        if old in given and old not in accepted and new in accepted:
            value = given.pop(old)
            if value is not None and given.get(new) is not None and given[new] is not value:
                raise ConflictError(
                    f"{old} and {new} are two different objects",
                    where=where,
                    why=f"{old} is the old name of {new}",
                    hint=f"give {new} alone",
                )
            given[new] = value if given.get(new) is None else given[new]
    config = config_class(cls)
    moved = {name: given.pop(name) for name in list(given) if name not in accepted}
    base = set(_options(sys.modules[_ARGUMENTS_MODULE].TrainingArguments))
    movable = [name for name in _options(config) if name not in base or name in MOVABLE] if config else []
    moved = _translate(moved, movable, where=where)
    unknown = moved.keys() - set(movable)
    if unknown & base:
        raise ArgumentError(
            f"{', '.join(sorted(unknown & base))} cannot be given to the trainer itself",
            where=where,
            hint=f"give it to args={config.__name__ if config else 'TrainingArguments'}(...)",
        )
    if unknown:
        raise unknown_arguments(unknown, [*accepted, *TRAINER_KEYWORDS, *movable], where=where)
    if config is not None:
        given["args"] = _completed(config, given.get("args"))
        if moved:
            given["args"] = _with(config, given["args"], moved, given.get("model"), where=where)
        if given["args"] is None:
            del given["args"]
    return given


def _completed(config: Any, args: Any) -> Any:
    """Turn an object of one of the config's base classes, such as ``TrainingArguments``, into the config itself."""
    if args is None or isinstance(args, config) or not issubclass(config, type(args)):
        return args
    explicit = explicit_names(args)
    values = args.to_dict()
    values = {name: values[name] for name in _options(type(args)) if name in values}
    # to_dict() hides the tokens.
    values |= {name: getattr(args, name) for name in values if name.endswith("_token")}
    for name in {"bf16", "fp16"} - explicit:
        del values[name]
    completed = config(**values)
    remember(completed, explicit)
    return completed


def _with(config: Any, args: Any, moved: dict[str, Any], model: Any, *, where: str) -> Any:
    """A copy of ``args`` that holds the options that were given to the trainer."""
    if args is None:
        name = model if isinstance(model, str) else getattr(getattr(model, "config", None), "_name_or_path", "")
        kind = config.__name__.removesuffix("Config")
        created = config(output_dir=f"{Path(name).name or 'model'}-{kind}", **moved)
        remember(created, frozenset(moved))
        return created
    explicit = explicit_names(args)
    for name, value in moved.items():
        if name in explicit and getattr(args, name) != value:
            raise ConflictError(
                f"{name} is {value!r} here and {getattr(args, name)!r} in args",
                where=where,
                hint=f"give {name} in one place",
            )
    result = copy.copy(args)
    for name, value in moved.items():
        setattr(result, name, value)
    setattr(result, EXPLICIT, explicit | moved.keys())
    return result
