"""Find, verify and load checkpoints: hub layouts, safetensors only, and every key accounted for.

A checkpoint that does not fit raises `WeightsError` naming what is missing, unexpected or mis-shaped; nothing is
loaded in part. Layouts and key names: `video-models.md` section 1A.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from engines.checkpoints.source import DType, Source
from engines.errors import WeightsError

Tensors = dict[str, Tensor]

MAX_NAMES = 8
"""How many keys of a kind an error lists; it only counts further ones."""


def torch_dtype(name: DType) -> torch.dtype:
    """The dtype of that name."""
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def locate(source: Source, patterns: Iterable[str]) -> Path:
    """The folder of a checkpoint; a hub repo's files that match `patterns` are downloaded into the hub's cache first.

    Raises `WeightsError` if there is no such folder, no revision is pinned, or the hub does not answer.
    """
    if source.folder is not None:
        if not source.folder.is_dir():
            raise WeightsError(f"there is no folder {source.folder}")
        return source.folder
    if source.repo is None:
        raise WeightsError("a checkpoint needs a folder or a repo")
    if source.revision is None:
        raise WeightsError(f"{source.repo}: name a revision, so that a render can be repeated")
    try:
        return Path(snapshot_download(source.repo, revision=source.revision, allow_patterns=list(patterns)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as exc:
        raise WeightsError(f"{source.repo} at {source.revision} could not be downloaded: {exc}") from exc


def file_patterns(stem: str, variant: str | None, prefix: str = "") -> list[str]:
    """The names under which hub repos store one model: whole or in shards, plain or as a variant."""
    name = f"{stem}.{variant}" if variant else stem
    index = f"{stem}.safetensors.index.{variant}.json" if variant else f"{stem}.safetensors.index.json"
    return [f"{prefix}{pattern}" for pattern in ("config.json", f"{name}.safetensors", f"{name}-*.safetensors", index)]


def read_json(path: Path) -> dict[str, Any]:
    """A config file. Raises `WeightsError` if it is absent or not a JSON object."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as exc:
        raise WeightsError(f"{path} cannot be read: {exc}") from exc
    if not isinstance(value, dict):
        raise WeightsError(f"{path} is not a JSON object")
    return value


def read_tensors(folder: Path, stem: str, variant: str | None = None) -> Tensors:
    """All tensors of one model in `folder`, from one file or from shards. Pickles are never opened."""
    whole, _, index = (folder / name for name in file_patterns(stem, variant)[1:])
    if whole.is_file():
        return read_file(whole)
    if index.is_file():
        tensors: Tensors = {}
        for shard in sorted(set(read_json(index)["weight_map"].values())):
            tensors |= read_file(folder / Path(shard).name)
        return tensors
    raise WeightsError(f"{folder} holds no {whole.name}; only .safetensors files are read")


def read_file(path: Path) -> Tensors:
    """The tensors of one .safetensors file."""
    if path.suffix != ".safetensors":
        raise WeightsError(f"{path}: only .safetensors files are read; `reelray convert-weights` makes one from a pickle")
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (not a dict)
    except (OSError, SafetensorError) as exc:
        raise WeightsError(f"{path} cannot be read: {exc}") from exc


def read_source_file(source: Source) -> Tensors:
    """The tensors of a source that is one file. Raises `WeightsError` if it names none."""
    if source.file is None:
        raise WeightsError(f"{source.folder or source.repo}: name the file")
    return read_file(locate(source, [source.file]) / source.file)


def require(config: Mapping[str, Any], needs: Mapping[str, Any], where: str) -> None:
    """Raises `WeightsError` if a config asks for what our layers do not compute; an absent key means diffusers' default."""
    for name, needed in needs.items():
        if (value := config.get(name, needed)) != needed:
            raise WeightsError(f"{where}: {name} is {value!r}; only {needed!r} is served")


def union(where: str, *parts: Tensors) -> Tensors:
    """All parts' tensors. Raises `WeightsError` if two parts hold the same key."""
    whole: Tensors = {}
    for part in parts:
        if twice := whole.keys() & part.keys():
            raise WeightsError(f"{where}: {_some('stored twice', twice)}")
        whole |= part
    return whole


def build(make: Callable[[], nn.Module]) -> nn.Module:
    """A module without storage, for `load_strict` to fill: no parameter is initialised only to be overwritten."""
    with torch.device("meta"):
        return make()


def load_strict(module: nn.Module, tensors: Tensors, where: str, dtype: torch.dtype, optional: str | None = None) -> None:
    """Give `module` its tensors, cast to `dtype`; the key sets and all shapes must be equal.

    optional: a regular expression of keys that may be absent; they are left as they are.
    Raises `WeightsError` listing missing, unexpected and mis-shaped keys.
    """
    wanted = module.state_dict()
    missing = [key for key in wanted.keys() - tensors.keys() if not (optional and re.search(optional, key))]
    unexpected = tensors.keys() - wanted.keys()
    misshaped = [
        f"{key} {tuple(tensors[key].shape)} instead of {tuple(wanted[key].shape)}"
        for key in wanted.keys() & tensors.keys()
        if tensors[key].shape != wanted[key].shape
    ]
    faults = [
        _some(kind, keys) for kind, keys in (("missing", missing), ("unexpected", unexpected), ("mis-shaped", misshaped)) if keys
    ]
    if faults:
        raise WeightsError(f"{where}: {'; '.join(faults)}")
    module.load_state_dict({key: value.to(dtype) for key, value in tensors.items()}, strict=False, assign=True)
    module.requires_grad_(False).eval()


def _some(kind: str, keys: Iterable[str]) -> str:
    names = sorted(keys)
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return f"{len(names)} {kind}: {', '.join(names[:MAX_NAMES])}{more}"


_LORA_KEY = re.compile(
    r"^(?:lora_unet_|unet\.|base_model\.model\.)*(?P<module>.+?)"
    r"(?:\.processor)?(?:[._](?P<proj>to_(?:q|k|v|out))_lora)?(?:[._]lora(?:_linear_layer)?)??"
    r"(?:\.(?P<alpha>alpha)|(?:[._]lora)?[._](?P<role>down|up|A|B)(?:\.default)?\.weight)$"
)
_LORA_ROLES = {"down": "down", "A": "down", "up": "up", "B": "up"}

_PEFT_METADATA = "lora_adapter_metadata"
"""Where diffusers keeps peft's config in a .safetensors file, with the keys of its parts' models in front."""
_PEFT_REFUSED = ("alpha_pattern", "use_rslora", "use_dora", "lora_bias")
"""Settings of peft that scale or add otherwise than `fold_lora`."""


def read_lora(source: Source) -> tuple[Tensors, float | None]:
    """A LoRA's tensors, and the alpha of its layers if the file's metadata state one, as peft's do.

    Raises `WeightsError` for a file that cannot be read, and for settings of peft that are not served.
    """
    tensors = read_source_file(source)
    with safe_open(locate(source, [str(source.file)]) / str(source.file), framework="pt") as file:
        stated = (file.metadata() or {}).get(_PEFT_METADATA, "{}")
    try:
        settings = {key.rpartition(".")[2]: value for key, value in json.loads(stated).items()}
        alpha = settings.get("lora_alpha")
        faults = [name for name in _PEFT_REFUSED if settings.get(name)]
        if faults:
            raise WeightsError(f"{source.file}: {', '.join(faults)} in its metadata is not served")
        return tensors, None if alpha is None else float(alpha)
    except (ValueError, TypeError, AttributeError) as exc:
        raise WeightsError(f"{source.file}: {_PEFT_METADATA} in its metadata cannot be read") from exc


def fold_lora(weights: Tensors, lora: Mapping[str, Tensor], scale: float, where: str, alpha: float | None = None) -> None:
    """Fold a LoRA into `weights` in place: W <- W + scale * (alpha / rank) * up @ down.  LoRA, arXiv 2106.09685, eq. 3.

    lora: kohya style (`lora_unet_down_blocks_0_..._to_q.lora_down.weight`, `.lora_up.weight`, `.alpha`) or diffusers and
    peft style (`unet.down_blocks.0....to_q.lora_A.weight`, `.lora.down.weight`, `.lora_linear_layer.down.weight`,
    `.processor.to_q_lora.down.weight`, `.lora.alpha`), also after `base_model.model.`. A convolution's pair folds as up (1x1)
    after down (k x k). alpha: of layers that store none; None is their rank.
    Raises `WeightsError` for a key that matches no weight, half a pair, or shapes that do not fit.
    """
    by_flat_name = {key.removesuffix(".weight").replace(".", "_"): key for key in weights if key.endswith(".weight")}
    pairs: dict[str, dict[str, Tensor]] = {}
    unmatched: list[str] = []
    for key, value in lora.items():
        name, role = _lora_target(key)
        target = by_flat_name.get(name.replace(".", "_")) if role else None
        if target is None:
            unmatched.append(key)
        else:
            pairs.setdefault(target, {})[role] = value
    if unmatched:
        raise WeightsError(f"{where}: {_some('matching no weight', unmatched)}")
    for target, pair in pairs.items():
        if "down" not in pair or "up" not in pair:
            raise WeightsError(f"{where}: half a pair for {target}")
        weight = weights[target]
        precise = torch.promote_types(weight.dtype, torch.float32)
        up, down = pair["up"].to(precise), pair["down"].to(precise)
        rank = down.shape[0]
        factor = scale * float(pair.get("alpha", alpha if alpha is not None else rank)) / rank
        if up.shape[1] != rank or up.shape[0] != weight.shape[0] or down[0].numel() != weight[0].numel():
            raise WeightsError(f"{where}: {target} {tuple(weight.shape)} cannot take {tuple(up.shape)} x {tuple(down.shape)}")
        delta = up.reshape(up.shape[0], rank) @ down.reshape(rank, -1)
        weights[target] = (weight.to(precise) + factor * delta.reshape(weight.shape)).to(weight.dtype)


def _lora_target(key: str) -> tuple[str, str]:
    """The module a LoRA key belongs to, with dots or flattened, and its role; an empty role for a key of no known style."""
    match = _LORA_KEY.match(key)
    if match is None:
        return key, ""
    projection = match["proj"] and ("to_out.0" if match["proj"] == "to_out" else match["proj"])
    module = f"{match['module']}.{projection}" if projection else match["module"]
    return module, _LORA_ROLES.get(match["role"], "alpha")
