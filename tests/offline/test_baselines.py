"""The baselines of `d2moe compare` against whole models in plain transformers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from compression import TINY
from families import CONFIGS, load_stock, quantize_fp8, write_family
from torch import Tensor, nn

from d2moe_vllm.format.kinds import ROLES
from d2moe_vllm.hf.conversion import decoder_of
from offline.compare.baselines import (
    by_frequency,
    by_output_norm,
    cluster,
    fewer_experts,
    stored_ratio,
    weight_distances,
    write_fewer,
)
from offline.compare.rewriting import RECORD_FILE
from offline.errors import UnreachableError
from offline.io.progress import Steps
from offline.run.usage import Usage, count_usage
from offline.source.dense import open_dense
from offline.source.families import FAMILIES

TOKENS = torch.randint(0, 4096, (3, 24), generator=torch.Generator().manual_seed(1))
CPU = torch.device("cpu")
ROUTERS = (".gate.weight", ".router.weight", ".router.layer.weight", ".router.proj.weight")


def stock(folder: Path) -> nn.Module:
    """As a user would load it, without anything of ours."""
    return load_stock(folder, dtype=torch.float32).eval()


def made_up_usage(folder: Path) -> dict[int, Usage]:
    shape = open_dense(str(folder)).shape
    generator = torch.Generator().manual_seed(5)
    tokens = [torch.randperm(shape.num_experts, generator=generator).double() + 1 for _ in shape.layers]
    return {layer: Usage(count, count) for layer, count in zip(shape.layers, tokens, strict=True)}


def prune(folder: Path, out: Path, name: str, experts: int) -> dict[int, list[list[int]]]:
    """Writes the smaller model; returns which old experts each new one is made from."""
    write_fewer(open_dense(str(folder)), name, experts, made_up_usage(folder), out, Steps(10))
    return {int(layer): made for layer, made in json.loads((out / RECORD_FILE).read_text())["layers"].items()}


@contextmanager
def masked(model: nn.Module, dropped: dict[int, list[int]], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The whole model, whose routers find some of their experts impossible."""
    routers = {}
    for layer, experts in dropped.items():
        for name, parameter in decoder_of(model).layers[layer].state_dict(keep_vars=True).items():
            if f".{name}".endswith(ROUTERS):
                routers[parameter.data_ptr()] = experts
            if name.endswith(("e_score_correction_bias", "expert_bias")):
                parameter.view(-1)[experts] = float("-inf")
    linear = nn.functional.linear

    def impossible(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        found = linear(x, weight, bias)
        if weight.data_ptr() in routers:
            found[..., routers[weight.data_ptr()]] = float("-inf")
        return found

    with monkeypatch.context() as patch:
        patch.setattr(nn.functional, "linear", impossible)
        yield
    assert len(routers) == len(dropped)


@pytest.mark.parametrize("family", ["trained", *CONFIGS])
@torch.no_grad()
def test_pruned_is_the_model_that_never_routes_to_them(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits of the smaller checkpoint in stock transformers are those of the whole model with -inf for the dropped
    experts in its routers. All else on disk is as it was; the new number of experts stands in config.json."""
    source = TINY
    if family != "trained":
        source = write_family(tmp_path / "source", family, dtype=torch.float32)
    model = open_dense(str(source))
    experts = max(model.shape.num_experts // 2, model.shape.experts_per_token)
    made = prune(source, tmp_path / "pruned", "frequency", experts)
    assert all(len(kept) == experts for kept in made.values())
    dropped = {
        layer: [old for old in range(model.shape.num_experts) if [old] not in kept] for layer, kept in made.items()
    }
    whole = stock(source)
    with masked(whole, dropped, monkeypatch):
        expected = whole(TOKENS).logits
    found = stock(tmp_path / "pruned")(TOKENS).logits
    assert float((found - expected).norm() / expected.norm()) < 1e-5
    assert float((found - stock(source)(TOKENS).logits).norm() / expected.norm()) > 1e-2
    pruned = open_dense(str(tmp_path / "pruned"))
    assert pruned.shape.num_experts == experts
    assert 1 - pruned.reader.nbytes / model.reader.nbytes == stored_ratio(model, experts)
    same = [name for name, spec in model.other_tensors.items() if pruned.other_tensors[name] == spec]
    assert len(model.other_tensors) - len(same) in (len(made), 2 * len(made))  # routers, and biases of them
    assert all(torch.equal(pruned.other_tensor(name), model.other_tensor(name)) for name in same)


@torch.no_grad()
def test_usage_is_what_the_whole_model_does(tmp_path: Path) -> None:
    """Routed tokens and mean gate * ||E(x)||, against hooks in transformers' model; and what is kept by them."""
    model, whole = open_dense(str(TINY)), stock(TINY)
    tokens, norms = torch.zeros(2, model.num_layers, model.shape.num_experts, dtype=torch.float64)

    def hook(number: int, module: nn.Module, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
        for x, chosen, gates in zip(*inputs, strict=True):
            for expert, gate in zip(chosen.tolist(), gates.tolist(), strict=True):
                first, second = (module.gate_up_proj[expert] @ x).chunk(2)
                tokens[number, expert] += 1
                norms[number, expert] += gate * float(
                    (module.down_proj[expert] @ (module.act_fn(first) * second)).norm()
                )

    for number, layer in enumerate(whole.get_decoder().layers):
        layer.mlp.experts.register_forward_pre_hook(lambda module, inputs, number=number: hook(number, module, inputs))
    whole(TOKENS)
    found = count_usage(model, TOKENS, CPU, tmp_path, Steps(100))
    for number, usage in found.items():
        assert torch.equal(usage.tokens, tokens[number])
        assert torch.allclose(usage.output, norms[number], rtol=1e-4)
        means = (norms[number] / tokens[number].clamp(min=1)).tolist()
        best = sorted(sorted(range(8), key=lambda expert: -means[expert])[:3])
        assert by_output_norm(model, number, usage, 3) == [[expert] for expert in best]
        often = sorted(sorted(range(8), key=lambda expert: (-int(tokens[number, expert]), expert))[:5])
        assert by_frequency(model, number, usage, 5) == [[expert] for expert in often]
    assert list(found) == list(range(4))
    assert not list(tmp_path.iterdir())


def test_clusters_are_those_of_average_linkage() -> None:
    """Against SciPy, on distances of random points."""
    hierarchy = pytest.importorskip("scipy.cluster.hierarchy")
    distance = pytest.importorskip("scipy.spatial.distance")
    generator = torch.Generator().manual_seed(2)
    for size, count in ((8, 3), (20, 7), (5, 5), (6, 1)):
        points = torch.randn(size, 4, generator=generator, dtype=torch.float64)
        labels = hierarchy.fcluster(hierarchy.linkage(points.numpy(), "average"), count, "maxclust")
        expected = {tuple(n for n in range(size) if labels[n] == label) for label in set(labels)}
        matrix = torch.from_numpy(distance.squareform(distance.pdist(points.numpy())))
        found = cluster(matrix, count)
        assert {tuple(members) for members in found} == expected
        assert found == sorted(found)


def test_merged_experts_are_weighted_means(tmp_path: Path) -> None:
    """Weights and router rows, by the tokens routed to each; the nearest two experts are together."""
    model, usage = open_dense(str(TINY)), made_up_usage(TINY)
    made = prune(TINY, tmp_path / "merged", "merge", 5)
    merged = open_dense(str(tmp_path / "merged"))
    for layer, clusters in made.items():
        weights = {role: torch.stack([model.weight(layer, e, role).double() for e in range(8)]) for role in ROLES}
        flat = torch.cat([weights[role].flatten(1) for role in ROLES], dim=1)
        distances = torch.cdist(flat, flat)
        assert torch.allclose(weight_distances(model, layer), distances, atol=1e-3)
        first, second = divmod(int(distances.fill_diagonal_(1e9).argmin()), 8)
        assert any({first, second} <= set(members) for members in clusters)
        router = f"{FAMILIES['mixtral'].experts_prefix(layer).removesuffix('.experts')}.gate.weight"
        for new, members in enumerate(clusters):
            share = usage[layer].tokens[members] / usage[layer].tokens[members].sum()
            for role in ROLES:
                expected = torch.einsum("e,eoi->oi", share, weights[role][members])
                assert torch.allclose(merged.weight(layer, new, role).double(), expected, atol=1e-4, rtol=1e-2)
            row = share @ model.other_tensor(router)[members].double()
            assert torch.allclose(merged.other_tensor(router)[new].double(), row, atol=1e-4, rtol=1e-2)
    assert float(stock(tmp_path / "merged")(TOKENS).logits.detach().std()) > 0


@pytest.mark.parametrize(("family", "stacked"), [("mixtral", True), ("granitemoe", True), ("deepseek_v3", False)])
def test_other_forms_on_disk(family: str, stacked: bool, tmp_path: Path) -> None:
    """Stacks as transformers writes them, and fp8: the smaller model lies in the released layout, dequantised, with
    the kept experts bit by bit."""
    source = write_family(tmp_path / "source", family, stacked=stacked)
    if family == "deepseek_v3":
        quantize_fp8(source, block=16)
    model = open_dense(str(source))
    made = prune(source, tmp_path / "fewer", "frequency", 4 if family == "deepseek_v3" else 2)
    fewer = open_dense(str(tmp_path / "fewer"))
    assert "quantization_config" not in fewer.config
    assert fewer.experts.layout == FAMILIES[family].layouts[0]
    for layer, kept in made.items():
        for new, (old,) in enumerate(kept):
            for role in ROLES:
                assert torch.equal(fewer.weight(layer, new, role), model.weight(layer, old, role))
    assert bool(torch.isfinite(stock(tmp_path / "fewer")(TOKENS).logits.detach()).all())


def test_groups_keep_equal_sizes(tmp_path: Path) -> None:
    """DeepSeek-V3's router chooses groups first: every group gives up as many experts as the others."""
    source = write_family(tmp_path / "source", "deepseek_v3")
    for name in ("frequency", "merge"):
        for made in prune(source, tmp_path / name, name, 4).values():
            assert [sum(members[0] // 4 == group for members in made) for group in (0, 1)] == [2, 2]
            assert all(len({old // 4 for old in members}) == 1 for members in made)


def test_the_largest_number_that_reaches_the_ratio() -> None:
    model = open_dense(str(TINY))
    shares = {experts: stored_ratio(model, experts) for experts in range(2, 8)}
    for experts, share in shares.items():
        assert fewer_experts(model, share) == experts
        if experts > 2:
            assert fewer_experts(model, share + 1e-6) == experts - 1
    with pytest.raises(UnreachableError) as refused:
        fewer_experts(model, shares[2] + 1e-6)
    assert refused.value.most == shares[2]
