"""An original whose family has no row: what it is told by, and the row that it could have.

Looked at are config.json, the names and shapes in the headers of the weight files, and transformers' class of the
model, built without weights. Nothing is guessed: what does not fit is named, and a row is proposed, never used.
"""

from __future__ import annotations

import ast
import copy
import dataclasses
import inspect
import itertools
import re
import textwrap
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from d2moe_vllm.families import auto_map, stock_model_class
from d2moe_vllm.format.config import first_error
from d2moe_vllm.format.familyrow import FamilyRow
from d2moe_vllm.format.kinds import ROLES, TensorSpec
from offline.errors import InputError
from offline.source.agreement import TEXT
from offline.source.families import DENSE_KEYS, from_row, known, moe_layers, read_shape, unsupported
from offline.source.family import Family, predicts_further
from offline.source.layerwise import blueprint, check_parameters, read_unknown_config
from offline.source.served import served_by
from offline.source.stored import SourceReader, find_experts

PAIRS = (("gate_proj", "up_proj"), ("w1", "w3"), ("gate", "up"), ("gate_linear", "up_linear"), ("w1", "v1"))
"""What gate and up are called; down is the third, told by its shape."""
FUSED = (("gate_up_proj", "down_proj"), ("input_linear", "output_linear"))
"""What a matrix of gate's outputs and then up's is called, and the one of down beside it."""
UNGATED = (("up_proj", "down_proj"), ("up", "down"), ("w1", "w2"))
"""What up and down of experts without a gate are called."""
USUAL = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
"""Names of compressed projections where the original has none of its own."""
NUM_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts")
PER_TOKEN = (
    "num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "moe_top_k", "top_k_experts", "top_k",
)  # fmt: skip
SIZES = ("moe_intermediate_size", "expert_intermediate_size", "moe_ffn_hidden_size", "intermediate_size")
CLAMPS = ("swiglu_limit", "swiglu_limits", "swiglu_limits_shared", "moe_swiglu_limit")
"""Settings by which an expert's inner values are cut off."""
BIAS = re.compile(r"(^|\.)experts\.(\d+\.(.*\.)?bias|\w+_proj_bias|\w+_proj\.bias)$")
"""Names of experts' biases; routers have some too, by which they choose."""
FORWARD = ["hidden_states", "top_k_index", "top_k_weights"]
"""What transformers' experts are called with."""


class ProposalError(InputError):
    """A model of a family that has no row, and the row that it could have; notes: lines on what that stands on."""

    def __init__(self, row: FamilyRow, notes: Sequence[str]) -> None:
        name = row.model_type
        super().__init__(
            f"model_type {name!r} has no row in d2moe, but it fits one: `d2moe plan SRC > {name}.yaml` writes it; read "
            f"it, and add --family-file {name}.yaml"
        )
        self.row, self.notes = row, tuple(notes)


class _LackError(Exception):
    """What a model has that we lack, in one line."""


def propose(reader: SourceReader, config: Mapping[str, Any]) -> InputError:
    """What to raise for a model whose family has no row: a ProposalError, or what names what speaks against one."""
    try:
        return ProposalError(*_look(reader, config))
    except (_LackError, InputError) as error:
        return unsupported(config, str(error))


@dataclass(frozen=True)
class _Modules:
    """Of transformers' class: the decoder's path, the experts' path in a layer, those that have any, one of them."""

    decoder: str
    path: str
    layers: tuple[int, ...]
    experts: nn.Module

    @property
    def gated(self) -> bool:
        return hasattr(self.experts, "gate_up_proj")


@dataclass(frozen=True)
class _Disk:
    """Of the tensors: the row's fields on experts, the layers that have them, and their sizes; notes: what was chosen
    because the original has no name for it."""

    fields: Mapping[str, Any]
    layers: tuple[int, ...]
    num_experts: int
    intermediate_size: int
    notes: tuple[str, ...] = ()


def _look(reader: SourceReader, config: Mapping[str, Any]) -> tuple[FamilyRow, list[str]]:
    """The row, and notes on it. Raises _LackError, and InputError where it fits but the model is not whole."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise _LackError("config.json says no model_type")
    if bias := next((name for name in reader.specs if BIAS.search(name)), None):
        raise _LackError(f"its experts have biases ({bias})")
    for settings in (config, config.get(TEXT)):
        _refuse_settings(settings if isinstance(settings, dict) else {})
    hf_config, model = _stock(reader, model_type)
    modules = _modules(model)
    settings = config[TEXT] if "." in modules.decoder and isinstance(config.get(TEXT), dict) else config
    _check_module(modules)
    hidden, num_layers = _number(settings, "hidden_size"), _number(settings, "num_hidden_layers")
    disk = _tensors(reader.specs, modules, hidden, num_layers)
    if disk.layers != modules.layers:
        raise _LackError(
            f"layers {_listed(disk.layers)} have experts on disk, {_listed(modules.layers)} in transformers"
        )
    activation = next((name for name in ACTIVATIONS if _computes(modules.experts, name)), None)
    if activation is None:
        raise _LackError(
            f"transformers' {type(modules.experts).__name__} computes something else than {_formula('silu', modules)}"
        )
    fields: dict[str, Any] = {
        "model_type": model_type,
        "decoder": modules.decoder,
        "experts_module": modules.path,
        "activation": activation,
        **disk.fields,
        "num_experts_key": _key(settings, disk.num_experts, NUM_EXPERTS, "the number of experts"),
        "experts_per_token_key": _per_token(settings, disk.num_experts),
        "intermediate_size_key": _key(settings, disk.intermediate_size, SIZES, "the experts' intermediate size"),
    }
    family = _family(fields)
    fields["dense_keys"] = _dense_keys(family, settings, disk.layers, num_layers)
    fields["renames"] = _renames(reader.specs, model, family)
    family = _family(fields)
    with known(family):  # as it would be opened with this row
        shape = read_shape(family, config)
        experts = find_experts(family, shape, reader, shape.layers)
        check_parameters(family, hf_config, reader, shape.layers, experts.names)
    assert family.row is not None
    notes = [
        f"{shape.num_experts} experts of {shape.intermediate_size} channels, {shape.experts_per_token} a token, in "
        f"{len(shape.layers)} of {num_layers} layers; every tensor has its place in transformers' "
        f"{type(model).__name__}",
        f"{type(modules.experts).__name__}, tried with small random weights, computes {_formula(activation, modules)}",
        *disk.notes,
        served_by(config),
    ]
    if unread := [key for key in _present(settings) if key not in family.dense_keys]:
        notes.append(f"left out, as it does not say which layers have experts: {', '.join(unread)}")
    return family.row, notes


def _formula(activation: str, modules: _Modules) -> str:
    return f"down({activation}(gate) * up)" if modules.gated else f"down({activation}(up))"


def _family(fields: Mapping[str, Any]) -> Family:
    try:
        return from_row(FamilyRow(**fields))
    except ValidationError as error:
        raise _LackError(first_error(error)) from None


def _number(settings: Mapping[str, Any], key: str) -> int:
    value = settings.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise _LackError(f"config.json: {key} is {value!r}, not a positive number")
    return value


def _listed(numbers: Iterable[int]) -> str:
    first = list(numbers)
    more = f" and {len(first) - 8} more" if len(first) > 8 else ""
    return ", ".join(map(str, first[:8])) + more or "none"


def _and(names: Sequence[str]) -> str:
    return " and ".join(names)


def _stock(reader: SourceReader, model_type: str) -> tuple[Any, Any]:
    """transformers' configuration, and its model without weights."""
    from transformers import __version__

    release = f"transformers {__version__}"
    try:
        config = read_unknown_config(reader.folder, model_type)
    except KeyError:
        raise _LackError(f"{release} has no class of it, and code that comes with a model is not run") from None
    try:
        stock = stock_model_class(config)
        names = auto_map(model_type)
    except KeyError:
        raise _LackError(f"{release} has no causal language model of it") from None
    if not names["AutoModelForCausalLM"].endswith(("ForCausalLM", "ForConditionalGeneration")):
        raise _LackError(f"transformers' class of it is called {names['AutoModelForCausalLM'].rpartition('.D2')[2]}")
    if not stock._supports_sdpa:
        raise _LackError(
            f"transformers' {stock.__name__} does not attend by scaled_dot_product_attention, as we run it"
        )
    return config, blueprint(config)


def _modules(model: Any) -> _Modules:
    from d2moe_vllm.hf.conversion import decoder_of

    name, decoder = type(model).__name__, decoder_of(model)
    path = next((path for path, module in model.named_modules() if module is decoder), "")
    layers = getattr(decoder, "layers", None)
    if path.partition(".")[0] != "model" or not isinstance(layers, nn.ModuleList):
        raise _LackError(f"transformers' {name} has its decoder in {path or 'itself'}, not in model.layers")
    found: dict[int, str] = {}
    for number, layer in enumerate(layers):
        inside = [one for one, _ in layer.named_modules() if one.rpartition(".")[2] == "experts"]
        if len(inside) > 1:
            raise _LackError(f"layer {number} of transformers' {name} has experts in {_and(inside)}")
        if inside:
            found[number] = inside[0]
    for kind in {type(layer): None for layer in layers}:
        if _returns_more(kind):
            raise _LackError(f"layers of transformers' {kind.__name__} give more than hidden states")
    if not found:
        raise _LackError(f"it has no routed experts: no layer of transformers' {name} has a module called experts")
    if len(paths := sorted(set(found.values()))) > 1:
        raise _LackError(f"layers of transformers' {name} have experts in {_and(paths)}")
    first = min(found)
    return _Modules(path, found[first], tuple(found), layers[first].get_submodule(found[first]))


def _returns_more(kind: type[nn.Module]) -> bool:
    """Whether a decoder layer gives, by its code, more than hidden states, or what nobody can tell: something between
    the layers that a run layer by layer would have to know."""
    try:
        source = textwrap.dedent(inspect.getsource(inspect.unwrap(kind.forward)))
    except (OSError, TypeError):
        return True
    values = [node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Return)]
    tensor = "Tensor" in str(inspect.signature(kind.forward).return_annotation).partition("[")[0]
    states = all(isinstance(value, ast.Name) and value.id == "hidden_states" for value in values)
    return not values or any(isinstance(value, ast.Tuple) for value in values) or not (tensor or states)


def _refuse_settings(settings: Mapping[str, Any]) -> None:
    """What config.json alone tells. Raises _LackError."""
    for key in CLAMPS:
        if value := settings.get(key):
            raise _LackError(f"its experts' values are clamped ({key} {value!r})")
    if value := settings.get("zero_expert_num"):
        raise _LackError(f"tokens may go to experts that are none (zero_expert_num {value!r})")
    for key in ("hidden_act", "hidden_activation"):
        if (value := settings.get(key)) not in (*ACTIVATIONS, None):
            raise _LackError(f"its experts' activation is {value!r} ({key}), not silu")


def _check_module(modules: _Modules) -> None:
    """That transformers' experts hold and take what ours do. Raises _LackError."""
    name = type(modules.experts).__name__
    held = {key: parameter.dim() for key, parameter in modules.experts.named_parameters()}
    if bias := next((key for key in held if "bias" in key), None):
        raise _LackError(f"its experts have biases (transformers' {name} holds {bias})")
    takes = list(inspect.signature(type(modules.experts).forward).parameters)[1:]
    if takes != FORWARD:
        raise _LackError(f"transformers' {name} takes ({', '.join(takes)}), not ({', '.join(FORWARD)})")
    if held not in ({"gate_up_proj": 3, "down_proj": 3}, {"up_proj": 3, "down_proj": 3}):
        told = ", ".join([*held][:4]) + (", ..." if len(held) > 4 else "")
        raise _LackError(f"transformers' {name} holds {told or 'nothing'}, not gate_up_proj and down_proj")


def _relu2(rows: Tensor) -> Tensor:
    return nn.functional.relu(rows).square()


ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {"silu": nn.functional.silu, "relu2": _relu2}
"""Of a row."""


@torch.no_grad()
def _computes(experts: nn.Module, activation: str) -> bool:
    """Whether a module of experts, of its own code, computes what ours compute: tried on small random weights in its
    weights' places, with inputs so large that a value that is cut off anywhere shows."""
    probe: Any = copy.deepcopy(experts)
    gated, act = hasattr(probe, "gate_up_proj"), ACTIVATIONS[activation]
    first = "gate_up_proj" if gated else "up_proj"
    count, second, third = getattr(probe, first).shape
    flipped = gated and (third, second) == (2 * probe.down_proj.shape[1], probe.down_proj.shape[2])
    generator = torch.Generator().manual_seed(0)
    gate, up = torch.randn(2, count, 8, 16, generator=generator)
    down = torch.randn(count, 16, 8, generator=generator)
    for name, stack in ((first, torch.cat([gate, up], 1) if gated else up), ("down_proj", down)):
        setattr(probe, name, nn.Parameter((stack.mT if flipped else stack).contiguous(), requires_grad=False))
    if hasattr(probe, "config"):
        probe.config._experts_implementation = "eager"
    chosen = torch.stack([torch.randperm(count, generator=generator)[: min(2, count)] for _ in range(6)])
    weights = torch.rand(chosen.shape, generator=generator)
    for scale in (0.1, 1.0, 100.0, 10_000.0):
        rows = scale * torch.randn(6, 16, generator=generator)
        expected = torch.zeros_like(rows)
        for row, expert in itertools.product(range(6), range(chosen.shape[1])):
            e = chosen[row, expert]
            inner = act(gate[e] @ rows[row]) * (up[e] @ rows[row]) if gated else act(up[e] @ rows[row])
            expected[row] += weights[row, expert] * (down[e] @ inner)
        try:
            found = probe(rows, chosen, weights)
        except Exception as error:  # of its own code, which may want what a probe has not
            reason = " ".join(str(error).split())[:200]
            raise _LackError(f"transformers' {type(experts).__name__} cannot be tried alone ({reason})") from None
        if not isinstance(found, Tensor) or found.shape != rows.shape or found.is_meta:
            return False
        if not float((found - expected).norm()) <= 1e-4 * float(expected.norm()):
            return False
    return True


def _tensors(specs: Mapping[str, TensorSpec], modules: _Modules, hidden: int, num_layers: int) -> _Disk:
    """Where the routed experts lie."""
    prefix = f"{modules.decoder}.layers."
    singles: dict[str, dict[int, dict[int, dict[str, str]]]] = defaultdict(
        lambda: defaultdict(lambda: defaultdict(dict))
    )
    stacks: dict[str, dict[int, str]] = defaultdict(dict)
    rests: dict[str, str] = {}
    for name, spec in specs.items():
        number, _, rest = name.removeprefix(prefix).partition(".")
        if not name.startswith(prefix) or not number.isdigit() or int(number) >= num_layers:
            continue
        parts, layer = rest.split("."), int(number)
        rests[name] = rest
        at = next((i for i in range(1, len(parts)) if parts[i].isdigit() and "expert" in parts[i - 1]), None)
        if at and not parts[at - 1].startswith("shared"):
            singles[".".join(parts[:at])][layer][int(parts[at])][".".join(parts[at + 1 :])] = name
        # A convolution's weights have a dimension of one.
        elif len(spec.shape) == 3 and 1 not in spec.shape:
            stacks[rest][layer] = name
    if not rests:
        raise _LackError(
            f"its tensors are not named {prefix}<number>... as transformers' modules are ({next(iter(specs), '')})"
        )
    if len(singles) > 1:
        raise _LackError(f"its layers have several kinds of experts: {', '.join(sorted(singles))}")
    if singles:
        ((path, group),) = singles.items()
        inside = (name for name, rest in rests.items() if rest.startswith(f"{path}."))
        if odd := next((name for name in inside if not name.split(f".{path}.")[1].partition(".")[0].isdigit()), None):
            raise _LackError(f"{odd} lies among its experts and is none of them")
        return _of_matrices(specs, prefix, path, group, hidden, modules.gated)
    if stacks:
        return _of_stacks(specs, prefix, stacks, hidden, modules.gated)
    raise _LackError("no tensor of it is called after an expert's number, and none is a stack of experts")


def _of_matrices(
    specs: Mapping[str, TensorSpec],
    prefix: str,
    path: str,
    group: Mapping[int, Mapping[int, Mapping[str, str]]],
    hidden: int,
    gated: bool,
) -> _Disk:
    """Experts with tensors of their own; group: layer -> expert -> what is behind its number -> name."""
    layers = tuple(sorted(group))
    for layer in layers:
        if lost := set(range(max(group[layer]) + 1)) - set(group[layer]):
            raise _LackError(f"layer {layer} has no expert {min(lost)}, but an expert {max(group[layer])}")
        if len(group[layer]) != len(group[layers[0]]):
            raise _LackError(
                f"layer {layers[0]} has {len(group[layers[0]])} experts, layer {layer} has {len(group[layer])}"
            )
    first = group[layers[0]][0]
    for layer, expert in itertools.product(layers, range(len(group[layers[0]]))):
        here = group[layer][expert]
        if odd := set(here) ^ set(first):
            raise _LackError(f"expert {expert} of layer {layer} and the first one do not both have {min(odd)}")
        for end, name in here.items():
            if specs[name].shape != specs[first[end]].shape:
                raise _LackError(
                    f"experts differ in size: {first[end]} is {list(specs[first[end]].shape)}, {name} is "
                    f"{list(specs[name].shape)}"
                )
    ends = {end.removesuffix(".weight"): specs[name].shape for end, name in first.items()}
    if other := next((name for end, name in first.items() if not end.endswith(".weight") or end.count(".") != 1), None):
        raise _LackError(f"an expert holds {other}, which is no weight of a projection")
    experts = f"{prefix}{{layer}}.{path}"
    sizes = layers, len(group[layers[0]])
    if gated and (fused := next((pair for pair in FUSED if set(pair) == set(ends)), None)):
        size = _fused_size(ends[fused[0]], ends[fused[1]], hidden, fused[0])
        both, down = (f"{experts}.{{expert}}.{name}.weight" for name in fused)
        released = {"gate": both, "up": both, "down": down}
        return _Disk({"experts": experts, "projections": USUAL, "released": released}, *sizes, size, _named(experts))
    if gated != (len(ends) > 2):
        has = "a gate in transformers" if gated else "no gate in transformers"
        raise _LackError(f"its experts have {'no gate, only ' * gated}{_and(sorted(ends))} on disk, and {has}")
    projections = _roles(ends)
    size = _size({role: ends[name] for role, name in projections.items()}, hidden, path)
    return _Disk({"experts": experts, "projections": projections}, *sizes, size)


def _of_stacks(
    specs: Mapping[str, TensorSpec], prefix: str, stacks: Mapping[str, Mapping[int, str]], hidden: int, gated: bool
) -> _Disk:
    """Stacks of experts; stacks: what is behind the layer's number -> layer -> name."""
    ends = {rest.removesuffix(".weight").rpartition(".")[2]: rest for rest in stacks}
    fused = next((pair for pair in FUSED if gated and set(pair) <= set(ends)), None)
    roles = dict(zip(("gate", "up", "down"), (fused[0], *fused), strict=True)) if fused else _roles(ends)
    shapes: dict[str, tuple[int, ...]] = {}
    if gated != ("gate" in roles):
        raise _LackError(
            f"its experts have {_and(sorted(ends))} on disk, and {'a' if gated else 'no'} gate in transformers"
        )
    layers = tuple(sorted(stacks[ends[roles["up"]]]))
    for role, end in roles.items():
        names = stacks[ends[end]]
        if tuple(sorted(names)) != layers:
            raise _LackError(f"not every layer that has {roles['up']} has {end}")
        first = names[layers[0]]
        shapes[role] = specs[first].shape
        for name in names.values():
            if specs[name].shape != shapes[role]:
                raise _LackError(f"{first} is {list(shapes[role])}, {name} is {list(specs[name].shape)}")
    if len({shape[0] for shape in shapes.values()}) > 1:
        raise _LackError(f"its stacks are of different numbers of experts: {', '.join(map(str, shapes.values()))}")
    inner = {role: shape[1:] for role, shape in shapes.items()}
    turned = {role: shape[::-1] for role, shape in inner.items()}

    def size(matrices: Mapping[str, tuple[int, ...]]) -> int:
        if fused:
            return _fused_size(matrices["gate"], matrices["down"], hidden, fused[0])
        return _size(matrices, hidden, ends[roles["down"]])

    try:
        transposed, channels = False, size(inner)
    except _LackError:
        transposed, channels = True, size(turned)
    parent = ends[roles["down"]].removesuffix(".weight").rpartition(".")[0]
    path = parent if parent.rpartition(".")[2] == "experts" else f"{parent}.experts"
    experts = f"{prefix}{{layer}}.{path}"
    released = {role: f"{prefix}{{layer}}.{ends[end]}" for role, end in roles.items()} | {"transposed": transposed}
    fields = {"experts": experts, "projections": USUAL if fused else roles, "released": released}
    return _Disk(fields, layers, shapes["down"][0], channels, _named(experts))


def _named(experts: str) -> tuple[str, ...]:
    return (
        f"the original has no tensor for each projection of an expert: experts and projections are the usual names, "
        f"{experts.replace('{layer}', '0')}.0.gate_proj; vLLM's loader has to know them",
    )


def _roles(ends: Iterable[str]) -> dict[str, str]:
    """Three names by their roles, or two of experts without a gate."""
    names = sorted(ends)
    if both := next((pair for pair in UNGATED if set(pair) == set(names)), None):
        return dict(zip(("up", "down"), both, strict=True))
    pair = next((pair for pair in PAIRS if set(pair) <= set(names)), None)
    if pair is None or len(names) != 3:
        raise _LackError(
            f"which of {', '.join(names)} is an expert's gate, and which its up, is not known by these names"
        )
    return {"gate": pair[0], "up": pair[1], "down": next(name for name in names if name not in pair)}


def _size(shapes: Mapping[str, tuple[int, ...]], hidden: int, where: str) -> int:
    """The intermediate size of experts with matrices of these shapes [out, in]."""
    found = {role: tuple(shapes[role]) for role in ROLES if role in shapes}
    up, down = found["up"], found["down"]
    if len(down) != 2 or down[0] != hidden or up != down[::-1] or found.get("gate", up) != up:
        raise _LackError(
            f"{_and(list(found))} of {where} are {_and([str(list(shape)) for shape in found.values()])}: with "
            f"hidden_size {hidden} they do not make an expert"
        )
    return down[1]


def _fused_size(both: tuple[int, ...], down: tuple[int, ...], hidden: int, where: str) -> int:
    """Likewise of a matrix of gate and up, and one of down."""
    if len(both) != 2 or len(down) != 2 or both[0] % 2:
        raise _LackError(f"{where} is {list(both)} beside a down of {list(down)}, which do not make an expert")
    half = (both[0] // 2, both[1])
    return _size({"gate": half, "up": half, "down": down}, hidden, where)


def _key(settings: Mapping[str, Any], value: int, names: Sequence[str], what: str) -> str:
    """The key that says a value which the tensors tell."""

    def says(key: str) -> bool:
        return settings.get(key) == value and not isinstance(settings[key], bool)

    if found := next((key for key in names if says(key)), None):
        return found
    others = sorted(key for key in settings if says(key))
    raise _LackError(
        f"config.json says {what}, {value} by its tensors, under none of {', '.join(names)}"
        + (f" (perhaps under {', '.join(others[:4])})" if others else "")
    )


def _per_token(settings: Mapping[str, Any], num_experts: int) -> str:
    present = {key: settings[key] for key in PER_TOKEN if settings.get(key) is not None}
    if not present:
        raise _LackError(f"config.json says under none of {', '.join(PER_TOKEN)} how many experts a token goes to")
    key, value = next(iter(present.items()))
    if len(set(map(str, present.values()))) > 1:
        raise _LackError(f"config.json says {' and '.join(f'{key} {value!r}' for key, value in present.items())}")
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= num_experts:
        raise _LackError(f"config.json: {key} is {value!r}, where a number of experts is expected")
    return key


def _present(settings: Mapping[str, Any]) -> list[str]:
    return [key for key in DENSE_KEYS if settings.get(key) is not None]


def _dense_keys(
    family: Family, settings: Mapping[str, Any], layers: tuple[int, ...], num_layers: int
) -> tuple[str, ...]:
    """Of the keys that may say which layers have experts as many as do say it."""
    present = _present(settings)
    for count in range(len(present), -1, -1):
        for keys in itertools.combinations(present, count):
            try:
                if moe_layers(dataclasses.replace(family, dense_keys=keys), settings, num_layers) == layers:
                    return keys
            except InputError:
                continue
    other = [key for key in settings if "layer" in key and ("expert" in key or "moe" in key) and key not in DENSE_KEYS]
    raise _LackError(
        f"layers {_listed(layers)} of {num_layers} have experts, which no key says that is known here "
        f"({', '.join(DENSE_KEYS)}){f', but perhaps {_and(other)}' if other else ''}"
    )


def _renames(specs: Mapping[str, TensorSpec], model: Any, family: Family) -> dict[str, str]:
    """Parts of names on disk -> the same in transformers' modules, as transformers itself renames when it loads."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [one for one in mapping if isinstance(one, WeightRenaming)]
    converters = [one for one in mapping if isinstance(one, WeightConverter)]
    state, found = set(model.state_dict()), {}
    names = {getattr(layout, role) for layout in family.layouts for role in family.roles}
    experts = tuple({name.partition("{expert}")[0].partition("{layer}")[2] for name in names})
    for name in specs:
        if name in state or predicts_further(name) or any(part in name for part in experts):
            continue
        target = rename_source_key(name, renamings, converters)[0]
        if target in state:
            disk, module = _difference(name, target)
            found[disk] = module
    renamed = dataclasses.replace(family, renames=found)
    for name in specs:
        if renamed.disk_name(renamed.module_name(name)) != name:
            raise _LackError(f"transformers renames its tensors in a way that does not lead back ({name})")
    return found


def _difference(name: str, target: str) -> tuple[str, str]:
    """The parts in which two names differ, with one more on either side where one of the two has none there."""
    one, other = name.split("."), target.split(".")
    start = next((i for i, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), 0)
    rest = min(len(one), len(other)) - start
    backwards = zip(one[::-1][:rest], other[::-1][:rest], strict=False)
    end = next((i for i, pair in enumerate(backwards) if pair[0] != pair[1]), rest)
    if start in (len(one) - end, len(other) - end):
        start, end = max(start - 1, 0), max(end - 1, 0)

    def part(names: list[str]) -> str:
        return ("." if start else "") + ".".join(names[start : len(names) - end]) + ("." if end else "")

    return part(one), part(other)
