"""From a YAML file and ``--set`` values to checked settings.

A problem becomes one sentence that names the setting, what was found and what would be right.
"""

import difflib
import re
import types
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

import yaml
from pydantic import PositiveInt, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from rwkv_train.assets import find_asset_folder
from rwkv_train.config.base import Config
from rwkv_train.config.finetune import FinetuneConfig
from rwkv_train.config.instruct import InstructDataConfig
from rwkv_train.config.methods import FreezeMethod, FullMethod, LoraMethod, PrefixMethod, StateMethod
from rwkv_train.config.model import ModelConfig, RwkvConfig
from rwkv_train.config.train import TrainConfig
from rwkv_train.errors import ConfigError

Tree = dict[str, Any]
"""Settings as they stand in a YAML file: nested mappings of plain values."""

_ARCHITECTURES: dict[str, type[RwkvConfig]] = {
    config.model_fields["arch"].default: config for config in get_args(get_args(ModelConfig)[0])
}

_METHODS: dict[str, type[Config]] = {
    "full": FullMethod,
    "freeze": FreezeMethod,
    "lora": LoraMethod,
    "state": StateMethod,
    "prefix": PrefixMethod,
}

_TAGS: dict[str, type[Config] | None] = {
    **_ARCHITECTURES,
    **_METHODS,
    **dict.fromkeys(("four ranks", "rule", "corpus", "mixture", "parts")),
}
"""Names of union members in pydantic's locations, and the class that each one selects."""

_LENGTHS = ("trainer.max_steps", "trainer.max_tokens", "trainer.max_epochs")
"""Settings of which a run has exactly one."""

NOT_IN_WEIGHTS = frozenset({"ctx_len", "init_from", "embedding_scale", "initialization", "dropout"})
"""Settings of the model that no file of weights holds."""

_NOT_IN_PUBLISHED_WEIGHTS = frozenset({"head_size_divisor"})
"""Settings of the model that only our own files of weights hold: the file of settings may differ from these."""


def list_presets(*, of_finetuning: bool = False) -> dict[str, Path]:
    """Return the shipped configurations of pretraining, or of finetuning: name (the file's stem) -> path."""
    folder = find_asset_folder("configs")
    paths = [
        path for path in sorted(folder.rglob("*.yaml")) if (path.parent.name == "finetune") == of_finetuning
    ]
    return {path.stem: path for path in paths}


def read_tree(config: str, overrides: Sequence[str] = (), *, of_finetuning: bool = False) -> Tree:
    """Read a YAML file and change single values, without checking names and types yet.

    Args:
        config: path of a YAML file, or the name of a shipped preset such as ``"quickstart"``.
        overrides: ``"section.name=value"``, the value written as in YAML; later ones win. A length of the run
            (``trainer.max_steps``, ``max_tokens``, ``max_epochs``) takes the place of the file's length, and
            another ``model.arch`` that of the file's settings which the new one does not have.
        of_finetuning: whether a name is that of a preset of ``configs/finetune``.

    Raises:
        ConfigError: there is no such file or preset, it is not YAML, or an override is malformed.
    """
    tree = _parse_file(_find_config(config, list_presets(of_finetuning=of_finetuning)))
    _make_room_for_arch(tree, overrides)
    if any(override.startswith(_LENGTHS) for override in overrides) and isinstance(tree.get("trainer"), dict):
        for length in _LENGTHS:
            tree["trainer"].pop(length.removeprefix("trainer."), None)
    for override in overrides:
        _apply(tree, override)
    return tree


def check_tree(tree: Tree) -> TrainConfig:
    """Turn plain values into settings.

    Raises:
        ConfigError: a name is unknown, a value has the wrong type, or values contradict each other; all
            problems are named, joined by ``"; "``.
    """
    try:
        return TrainConfig.model_validate(tree)
    except ValidationError as error:
        raise _as_config_error(error) from None


def check_model(section: Tree) -> ModelConfig:
    """Turn the ``model`` section alone into settings, as :func:`check_tree` does the whole."""
    try:
        model: ModelConfig = TypeAdapter(ModelConfig).validate_python(section)
    except ValidationError as error:
        raise _as_config_error(error, "model") from None
    return model


def load_train_config(config: str, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read and check the settings of a run that starts from scratch (see :func:`read_tree`)."""
    return check_tree(read_tree(config, overrides))


def check_finetune_tree(tree: Tree) -> FinetuneConfig:
    """Turn plain values into the settings of a finetuning run, as :func:`check_tree` those of pretraining."""
    try:
        return FinetuneConfig.model_validate(tree)
    except ValidationError as error:
        raise _as_config_error(error, root=FinetuneConfig) from None


def load_chat_data(config: str, overrides: Sequence[str] = ()) -> tuple[InstructDataConfig, int]:
    """Read and check the section ``data`` of a finetuning run alone, whose file may have no others.

    Returns:
        The section, and ``model.ctx_len``, the tokens of a row.

    Raises:
        ConfigError: as :func:`read_tree` and :func:`check_tree`.
    """
    tree = read_tree(config, overrides, of_finetuning=True)
    model = tree.get("model")
    try:
        seen = _ChatData.model_validate(
            {
                "data": tree.get("data"),
                "model": {"ctx_len": model["ctx_len"]}
                if isinstance(model, dict) and "ctx_len" in model
                else {},
            }
        )
    except ValidationError as error:
        raise _as_config_error(error, root=_ChatData) from None
    return seen.data, seen.model.ctx_len


class _Row(Config):
    ctx_len: PositiveInt = RwkvConfig.model_fields["ctx_len"].default


class _ChatData(Config):
    data: InstructDataConfig
    model: _Row


def fill_sizes(tree: Tree, sizes: Mapping[str, Any]) -> Tree:
    """Return ``tree`` with the sizes of the weights that ``model.init_from`` names.

    Args:
        tree: settings as read from the file.
        sizes: the ``model`` section that the weights imply.

    Raises:
        ConfigError: a size that the file gives differs from that of the weights.
    """
    model = dict(tree.get("model") or {})
    for name, size in sizes.items():
        if name in NOT_IN_WEIGHTS:
            continue
        if model.setdefault(name, size) != size and name not in _NOT_IN_PUBLISHED_WEIGHTS:
            raise ConfigError(
                f"model.{name} is {model[name]!r} but {size!r} in the weights of model.init_from "
                f"({model['init_from']}); leave it out or set it to {size!r}"
            )
    return {**tree, "model": model}


def _find_config(name: str, presets: Mapping[str, Path]) -> Path:
    path = Path(name).expanduser()
    if path.is_file():
        return path
    if name in presets:
        return presets[name]
    if path.suffix in {".yaml", ".yml"} or path.parent != Path():
        raise ConfigError(f"--config: there is no file {name}")
    near = difflib.get_close_matches(name, presets, n=1)
    hint = f"did you mean '{near[0]}'?" if near else f"presets are {', '.join(presets)}"
    raise ConfigError(f"--config: '{name}' is neither a file nor a preset; {hint}")


class _Loader(yaml.SafeLoader):
    """YAML as people read it: 3e-4 is a number (PyYAML takes it for text), a repeated key is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise ConfigError(
                    f"{node.start_mark.name}: '{key}' is set twice in the section that begins at "
                    f"{_place(node.start_mark)}; keep one"
                )
        return super().construct_mapping(node, deep=deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*)(?:\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def _parse_yaml(text: str, where: str) -> Any:
    try:
        loader = _Loader(text)
        loader.name = where
        return loader.get_single_data()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = "" if mark is None else f" ({_place(mark)})"
        raise ConfigError(f"{where} is not valid YAML{place}: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from None


def _place(mark: yaml.Mark) -> str:
    return f"line {mark.line + 1}, column {mark.column + 1}"


def _parse_file(path: Path) -> Tree:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    tree = _parse_yaml(text, str(path))
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold sections such as 'model:' and 'trainer:', found {_show(tree)}")
    return tree


def _apply(tree: Tree, override: str) -> None:
    name, equals, text = override.partition("=")
    *sections, last = name.strip().split(".")
    if not equals or not last or not all(sections):
        raise ConfigError(f"--set {override}: write it as section.name=value, e.g. optim.lr=3e-4")
    here = tree
    for section in sections:
        here = here.setdefault(section, {})
        if not isinstance(here, dict):
            raise ConfigError(f"--set {override}: '{section}' is a single value, not a section")
    here[last] = _parse_yaml(text, f"--set {override}: the value")


def _make_room_for_arch(tree: Tree, overrides: Sequence[str]) -> None:
    """Drop the file's settings that the architecture named on the command line lacks or has in another form."""
    model = tree.get("model")
    named = [text.strip() for name, _, text in (o.partition("=") for o in overrides) if name == "model.arch"]
    wanted = _ARCHITECTURES.get(named[-1]) if named else None
    if wanted is None or not isinstance(model, dict) or model.get("arch") == named[-1]:
        return
    for other in _classes_in(ModelConfig):
        for name, field in other.model_fields.items():
            same = wanted.model_fields.get(name)
            if name != "arch" and (same is None or same.annotation != field.annotation):
                model.pop(name, None)


def _as_config_error(error: ValidationError, *section: str, root: type[Config] = TrainConfig) -> ConfigError:
    problems = [
        _sentence(detail, (*section, *detail["loc"]), root)
        for detail in error.errors(include_url=False)
        if detail["type"] != "default_factory_not_called"  # it follows from another problem
    ]
    return ConfigError("; ".join(dict.fromkeys(problems)))


def _sentence(detail: ErrorDetails, location: tuple[int | str, ...], root: type[Config]) -> str:
    """Say what is wrong with one setting, by its dotted name."""
    owner, names = _follow(location, root)
    name = ".".join(names) or "the settings"
    found = detail["input"]
    match detail["type"]:
        case "extra_forbidden":
            return f"{name}: no such setting; {_nearest(names[-1], owner, root)}"
        case "missing":
            return f"{name}: it must be set"
        case "union_tag_not_found" | "union_tag_invalid" if names == ["model"] and found.get("arch") is None:
            return f"{name}.arch: it must be set, to {_architecture_names()}"
        case "model_type" | "model_attributes_type" | "dict_type":
            return f"{name} is {_show(found)} but must be a section of settings"
        case "union_tag_not_found" | "union_tag_invalid" if names[-1:] == ["finetune"]:
            known = _listed([repr(method) for method in _METHODS], "or")
            there = (
                "it must be set, to"
                if found.get("method") is None
                else f"there is no {_show(found['method'])}; use"
            )
            return f"{name}.method: {there} {known}"
        case "union_tag_invalid":
            return f"{name}.arch: there is no {_show(found.get('arch'))}; use {_architecture_names()}"
        case "value_error":
            return f"{name}: {detail['msg'].removeprefix('Value error, ')}"
        case _:
            wanted = detail["msg"].removeprefix("Input ")
            return f"{name} is {_show(found)} but {wanted[0].lower()}{wanted[1:]}"


def _follow(location: tuple[int | str, ...], root: type[Config]) -> tuple[type[Config], list[str]]:
    """Walk pydantic's location, dropping the tags of unions, which no user wrote.

    Returns:
        The settings class that should hold the last name, and the names.
    """
    classes: tuple[type[Config], ...] = (root,)
    owner = root
    names: list[str] = []
    for part in map(str, location):
        if part in _TAGS:
            classes = tuple(c for c in classes if _TAGS[part] in (None, c))
            continue
        names.append(part)
        if part.isdigit():  # a place in a list, whose entries the classes are of
            continue
        owner = classes[0] if classes else owner
        field = owner.model_fields.get(part)
        classes = _classes_in(field.annotation) if field is not None else ()
    return owner, names


def _classes_in(annotation: Any) -> tuple[type[Config], ...]:
    if get_origin(annotation) in (Union, types.UnionType):
        return tuple(c for arg in get_args(annotation) for c in _classes_in(arg))
    if get_origin(annotation) in (Annotated, list):
        return _classes_in(get_args(annotation)[0])
    return (annotation,) if isinstance(annotation, type) and issubclass(annotation, Config) else ()


def _nearest(name: str, owner: type[Config], root: type[Config]) -> str:
    having = [arch for arch, config in _ARCHITECTURES.items() if name in config.model_fields]
    if having and issubclass(owner, RwkvConfig):
        return f"only {_listed(having, 'and')} {'has' if len(having) == 1 else 'have'} it"
    for section, field in root.model_fields.items():
        for config in _classes_in(field.annotation):
            if name in config.model_fields:
                return f"did you mean '{section}.{name}'?"
    near = difflib.get_close_matches(name, owner.model_fields, n=1)
    if near:
        return f"did you mean '{near[0]}'?"
    return f"there are {', '.join(owner.model_fields)}"


def _architecture_names() -> str:
    return _listed([repr(name) for name in _ARCHITECTURES], "or")


def _listed(names: Sequence[str], conjunction: str) -> str:
    return f" {conjunction} ".join(", ".join(names).rsplit(", ", 1))


def _show(value: Any) -> str:
    """A value as a user wrote it, shortened."""
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
