"""`make bench-offline`: one layer of Mixtral-8x7B's shapes through merge, prune and factor, beside the paper's recipe.

Synthetic weights and statistics of realistic spectra, made expert by expert, because their making is not timed and
their memory would hide ours. The paper's recipe for the deltas (METHODS 1.3: S = chol(G), SVD of delta S, the inverse
of S) runs on the first expert's three matrices. Each of them is factored by both sides in turn, since other work on
the machine would favour one of two separate runs; its time is then taken times the number of experts. Results:
build/bench/offline.json. Options: --help.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from d2moe_vllm.format.kinds import ROLES, Role
from offline.algebra.factorization import shrink_gram, whitened_factors
from offline.algebra.merging import MERGES, MergeOptions
from offline.algebra.pruning import column_scores, select_columns
from offline.methods.options import base_columns
from offline.plan.budget import paper_kept_share
from offline.source.families import MoEShape
from offline.source.sites import SITES, Site

RESULTS = Path(__file__).resolve().parent.parent / "build" / "bench" / "offline.json"
SELECTIONS: tuple[tuple[Role, ...], ...] = (("gate", "up"), ("down",))
SPARSITY, GROUPS, SHRINKAGE = 0.1, 8, 0.1
MIXTRAL_LAYERS, MIXTRAL_OTHERS = 32, 0.0344
"""Mixtral-8x7B: decoder layers, and the share of its parameters that are not experts."""


@dataclass(frozen=True)
class Settings:
    hidden: int
    intermediate: int
    experts: int
    ratio: float
    paper_dtype: str
    device: str
    seed: int

    @property
    def shape(self) -> MoEShape:
        return MoEShape(self.experts, 2, self.hidden, self.intermediate, tuple(range(MIXTRAL_LAYERS)))

    @property
    def multiple(self) -> int:
        return 16 if self.hidden >= 1024 else 1

    def rank(self, role: Role) -> int:
        """At the ratio, of what is stored: half of the base's sparsity is really removed. Always of 8 experts."""
        whole = MoEShape(8, 2, self.hidden, self.intermediate, self.shape.layers)
        experts = 8 * MIXTRAL_LAYERS * whole.expert_parameters
        share = paper_kept_share(whole, int(experts / (1 - MIXTRAL_OTHERS)), self.ratio, SPARSITY / 2)
        out_features, in_features = self.shape.projection(role)
        rank = int(share * out_features * in_features / (out_features + in_features))
        return rank // self.multiple * self.multiple


class Synthetic:
    """What a checkpoint and calibration would give, made anew at each call."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def _generator(self, *key: int) -> torch.Generator:
        seed = self.settings.seed
        for part in key:
            seed = seed * 1009 + part + 1
        return torch.Generator(self.settings.device).manual_seed(seed)

    def _normal(self, generator: torch.Generator, *shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=self.settings.device)

    def weight(self, expert: int, role: Role) -> Tensor:
        """bfloat16: a part common to all experts, a difference whose spectrum falls, and a little noise."""
        out_features, in_features = self.settings.shape.projection(role)
        weight = self._normal(self._generator(ROLES.index(role)), out_features, in_features)
        generator = self._generator(ROLES.index(role), expert)
        inner = min(out_features, in_features) // 2
        spectrum = torch.arange(1, inner + 1, device=self.settings.device) ** -0.7
        left = self._normal(generator, out_features, inner) * (spectrum / spectrum.norm())
        weight.addmm_(left, self._normal(generator, inner, in_features), alpha=0.7)
        weight += self._normal(generator, out_features, in_features).mul_(0.1)
        return weight.mul_(0.02).bfloat16()

    def fisher(self, expert: int, role: Role) -> Tensor:
        """Positive, over several orders of magnitude: squared gradients times squared inputs."""
        out_features, in_features = self.settings.shape.projection(role)
        generator = self._generator(ROLES.index(role), expert, 1)
        fisher = self._normal(generator, out_features, in_features).square_()
        fisher *= self._normal(generator, out_features, 1).square() * self.tokens(expert)
        return fisher.mul_(self._normal(generator, 1, in_features).square())

    def tokens(self, expert: int) -> int:
        return 20000 + 5000 * expert

    def gram(self, expert: int, site: Site) -> Tensor:
        """float32, of correlated inputs: directions of falling energy, some channels far louder than others."""
        size = self.settings.hidden if site == "input" else self.settings.intermediate
        generator = self._generator(10 + len(site), expert)
        inner = size // 4
        energy = torch.arange(1, inner + 1, device=self.settings.device) ** -0.5
        loudness = (0.5 * self._normal(generator, size)).exp()
        loudness[:4] *= 10
        directions = self._normal(generator, size, inner) * (energy / energy.norm()) * loudness[:, None]
        gram = directions @ directions.T
        gram.diagonal().add_(0.1 * loudness.square())
        return gram

    def input_energy(self, site: Site) -> Tensor:
        size = self.settings.hidden if site == "input" else self.settings.intermediate
        return self._normal(self._generator(20 + len(site)), size).exp()


@dataclass(frozen=True)
class Seconds:
    """wall: as a user waits; cpu: of all threads, which other work on the machine hardly changes."""

    wall: float = 0.0
    cpu: float = 0.0

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(self.wall + other.wall, self.cpu + other.cpu)


class Ours:
    """Our side, one step per call; each returns its own time only."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        self.settings, self.folder, self.data = settings, folder, Synthetic(settings)
        options = MergeOptions(device=torch.device(settings.device))
        self.merges = {r: MERGES["fisher"](*settings.shape.projection(r), settings.experts, options) for r in ROLES}
        self.bases: dict[Role, Tensor] = {}
        self.held: tuple[int, Site, Tensor] | None = None

    def merge(self, expert: int) -> Seconds:
        total, seconds = sum(map(self.data.tokens, range(self.settings.experts))), Seconds()
        for role in ROLES:
            weight, fisher = self.data.weight(expert, role), self.data.fisher(expert, role)
            with timed(self.settings) as clock:
                self.merges[role].add(weight, self.data.tokens(expert), total, fisher)
            seconds += clock[0]
        return seconds

    def prune(self) -> tuple[Seconds, Seconds]:
        """Time of the merges' results, and for static pruning down to the bfloat16 that is stored."""
        with timed(self.settings) as merging:
            merged = {role: merge.result() for role, merge in self.merges.items()}
            self.merges.clear()
        with timed(self.settings) as pruning:
            for selection in SELECTIONS:
                columns = base_columns(merged[selection[0]].shape[1], SPARSITY, GROUPS, self.settings.multiple)
                norms = torch.stack([merged[role].norm(dim=0) for role in selection]).norm(dim=0)
                energy = self.data.input_energy(SITES[selection[0]])
                kept = select_columns(column_scores(norms, energy.sqrt()), columns.kept, GROUPS).long()
                for role in selection:
                    base = merged.pop(role)
                    self.bases[role] = torch.zeros_like(base, dtype=torch.bfloat16)
                    self.bases[role][:, kept] = base[:, kept].bfloat16()
        return merging[0], pruning[0]

    def factor(self, expert: int, role: Role, keep: bool) -> Seconds:
        """keep: write delta and factors for the other side to judge."""
        weight, gram, seconds = self.data.weight(expert, role), *self._gram(expert, SITES[role])
        with timed(self.settings) as clock:
            delta = weight.float().sub_(self.bases[role])
            u, v = whitened_factors(delta, gram, self.settings.rank(role))
        if keep:
            tensors = {"delta": delta, "u": u, "v": v}
            save_file({name: t.contiguous().cpu() for name, t in tensors.items()}, self.folder / f"{role}.safetensors")
        return seconds + clock[0]

    def _gram(self, expert: int, site: Site) -> tuple[Tensor, Seconds]:
        """Shrunk, and the time that took; gate and up share one."""
        if self.held is not None and self.held[:2] == (expert, site):
            return self.held[2], Seconds()
        self.held = None
        gram = self.data.gram(expert, site)
        with timed(self.settings) as clock:
            shrink_gram(gram, self.data.tokens(expert), SHRINKAGE)
        self.held = (expert, site, gram)
        return gram, clock[0]

    def peak(self) -> dict[str, float]:
        """GiB: what this process ever held, data of the expert at hand included."""
        peak = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
        if self.settings.device != "cpu":
            peak["device"] = torch.cuda.max_memory_allocated() / 2**30
        return peak


class Paper:
    """The other side, on the first expert."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        self.settings, self.folder, self.data = settings, folder, Synthetic(settings)

    def factor(self, role: Role) -> tuple[Seconds, float, float]:
        """Time, its whitened relative error and ours."""
        tensors = {
            name: t.to(self.settings.device) for name, t in load_file(self.folder / f"{role}.safetensors").items()
        }
        gram = shrink_gram(self.data.gram(0, SITES[role]), self.data.tokens(0), SHRINKAGE)
        delta, rank = tensors["delta"], tensors["u"].shape[1]
        dtype = getattr(torch, self.settings.paper_dtype)
        with timed(self.settings) as clock:
            scale = torch.linalg.cholesky(gram.double())
            left, values, right = torch.linalg.svd(delta.to(dtype) @ scale.to(dtype), full_matrices=False)
            inverse = torch.linalg.inv(scale.to(dtype))
            root = values[:rank].sqrt()
            u, v = left[:, :rank] * root, root[:, None] * (right[:rank] @ inverse)
        del left, right, inverse, gram
        outputs = float((delta.double() @ scale).norm())

        def error(u: Tensor, v: Tensor) -> float:
            return float(((delta.double() - u.double() @ v.double()) @ scale).norm()) / outputs

        return clock[0], error(u, v), error(tensors["u"], tensors["v"])


@contextmanager
def timed(settings: Settings) -> Iterator[list[Seconds]]:
    """Yields a list that holds the time afterwards."""
    clock: list[Seconds] = []

    def now() -> tuple[float, float]:
        if settings.device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter(), time.process_time()

    wall, cpu = now()
    yield clock
    end = now()
    clock.append(Seconds(end[0] - wall, end[1] - cpu))


class Side:
    """One side in a process of its own, so that the memory measured is its alone."""

    def __init__(self, kind: Callable[..., Any], settings: Settings, folder: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(other, kind, settings, folder), daemon=True)
        self.process.start()
        other.close()

    def __call__(self, method: str, *arguments: object) -> Any:
        self.pipe.send((method, arguments))
        try:
            return self.pipe.recv()
        except EOFError:
            sys.exit(f"the process of {method} died; its message is above")


def _serve(pipe: Any, kind: Callable[..., Any], settings: Settings, folder: Path) -> None:
    with torch.inference_mode():
        side = kind(settings, folder)
        while True:
            try:
                method, arguments = pipe.recv()
            except EOFError:
                return  # the other end is done
            pipe.send(getattr(side, method)(*arguments))


def measure(settings: Settings) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        ours, paper = Side(Ours, settings, Path(name)), Side(Paper, settings, Path(name))
        steps = {"merge": Seconds(), "prune": Seconds(), "factor": Seconds()}
        for expert in range(settings.experts):
            steps["merge"] += ours("merge", expert)
        result, steps["prune"] = ours("prune")
        steps["merge"] += result
        say(f"merge {steps['merge'].wall:.1f} s, prune {steps['prune'].wall:.1f} s")
        compared: dict[Role, dict[str, Any]] = {}
        for expert in range(settings.experts):
            for role in ROLES:
                seconds = ours("factor", expert, role, expert == 0)
                steps["factor"] += seconds
                say(f"expert {expert}: {role} at rank {settings.rank(role)} {seconds.wall:.1f} s")
                if expert == 0:
                    their_seconds, their_error, our_error = paper("factor", role)
                    compared[role] = {"rank": settings.rank(role)}
                    compared[role]["ours"] = {**asdict(seconds), "error": our_error}
                    compared[role]["paper"] = {**asdict(their_seconds), "error": their_error}
                    say(f"          paper {their_seconds.wall:.1f} s; errors {our_error:.9f}, paper {their_error:.9f}")
        peak = ours("peak")
    first = {
        side: {clock: sum(compared[role][side][clock] for role in ROLES) for clock in ("wall", "cpu")}
        for side in ("ours", "paper")
    }
    return {
        "settings": asdict(settings),
        "threads": torch.get_num_threads(),
        "seconds": {step: asdict(seconds) for step, seconds in steps.items()},
        "paper_factor_seconds": {clock: value * settings.experts for clock, value in first["paper"].items()},
        "speedup": {clock: value / first["ours"][clock] for clock, value in first["paper"].items()},
        "compared": compared,
        "error_ratio": max(each["ours"]["error"] / each["paper"]["error"] for each in compared.values()),
        "peak_gib": peak,
    }


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=14336)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--ratio", type=float, default=0.4)
    parser.add_argument("--paper-dtype", choices=["float64", "float32"], default="float64")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = vars(parser.parse_args())
    if arguments["experts"] < 2:
        parser.error("--experts 1: a base of one expert leaves no deltas; take at least 2")
    out: Path = arguments.pop("out")
    result = measure(Settings(**arguments))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print("seconds         wall      CPU")
    times = {**result["seconds"], "paper's factor": result["paper_factor_seconds"]}
    for step, seconds in times.items():
        print(f"{step:14} {seconds['wall']:7.1f}  {seconds['cpu']:7.1f}")
    print(
        f"the paper's recipe takes {result['speedup']['wall']:.2f} (CPU: {result['speedup']['cpu']:.2f}) times as long"
    )
    print(f"our error is {result['error_ratio']:.9f} of the paper's")
    print("peak     " + ", ".join(f"{name} {gib:.2f} GiB" for name, gib in result["peak_gib"].items()))
    print(f"written to {os.path.relpath(out)}")


if __name__ == "__main__":
    main()
