"""The sweep over layers: a model runs over windows of text with one decoder layer's weights in memory at a time, and a
visitor does what the sweep is made for.

Forwards, every layer's output becomes the next one's input. Backwards, the layers' inputs come from a sweep forwards,
which keeps one of every few (offline/plan/states.py); then each layer is run once more from the last one down, and its
input's gradient handed to the layer below. The inputs of a stretch of layers are computed anew when it is their turn.
Hidden states and gradients lie in files: in the working folder of a run that can be continued, which goes on with what
is there, else in a temporary folder.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from offline.algebra.products import Products, multiplying
from offline.io.memory import give_back
from offline.io.progress import Steps
from offline.plan.plan import BATCH_TOKENS
from offline.plan.states import States
from offline.source.layerwise import LayerwiseModel, next_token_loss
from offline.work.activations import Rows
from offline.work.distributed import Group
from offline.work.workdir import WorkDir

Experts = Callable[[int], nn.Module | None]
"""Builds what runs as a layer's experts."""
Entered = Callable[[slice], None]


class Windows(Protocol):
    """Windows of tokens: a tensor int64 [windows, seq], or what gives parts of one that is not in memory."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, windows: slice, /) -> Tensor: ...


class StoredWindows:
    """Windows of a text of any length, from a file of int32 numbers; at least `count` of `length` lie there."""

    def __init__(self, path: Path, count: int, length: int) -> None:
        self._rows = Rows(path, count, length, torch.int32)
        self.shape = self._rows.shape

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, windows: slice, /) -> Tensor:
        return self._rows.read(windows).long()


class Visitor:
    """What a sweep does at its layers; as it stands, nothing: the model runs as it is.

    name: what has been done to a finished layer, for a user; layers: those there is work at, ascending; backwards:
    whether a layer runs backwards too, with the log-likelihood's gradient at its output; replaces: whether the layers
    above see what `replacement` gives instead of what the layer gave while it was visited (forwards only).
    """

    name = "visited"
    layers: Sequence[int] = ()
    backwards = False
    replaces = False

    def done(self, layer: int) -> bool:
        """Whether an earlier run has finished the layer."""
        return False

    def recorded(self, layer: int) -> bool:
        """Whether an earlier run left all that running an unfinished layer gives: it is not run again."""
        return False

    def experts(self, layer: int) -> nn.Module | None:
        """What takes the place of the layer's experts while it is visited; None for a layer that has none."""
        raise NotImplementedError

    def entered(self, rows: slice) -> None:
        """Before the layer runs over each batch; rows: of all windows' tokens."""

    def visited(self, layer: int) -> None:
        """The layer has run over all windows and is not in memory any more."""

    def replacement(self, layer: int) -> nn.Module:
        """The experts that the layers above are to see in a finished layer."""
        raise NotImplementedError


class Scratch:
    """Holds the hidden states of a run that is not continued, as a WorkDir does: in one file of `folder`, overwritten
    batch by batch with the next layer's."""

    def __init__(self, folder: Path) -> None:
        self.group = Group()
        self._path, self._name = folder / "hidden.rows", ""

    def has(self, name: str) -> bool:
        return name == self._name

    def rows(self, name: str, rows: int, width: int, dtype: torch.dtype = torch.float32) -> Rows:
        return Rows(self._path, rows, width, dtype)

    def create(self, name: str, rows: int, width: int, dtype: torch.dtype = torch.float32) -> Rows:
        array = self.rows(name, rows, width, dtype)
        if not self._name:
            array.allocate()
        return array

    def publish(self, name: str, array: Rows) -> None:
        self._name = name

    def discard(self, *names: str) -> None:
        """The next layer's states need the place."""


def batches(windows: int, length: int, tokens: int = BATCH_TOKENS) -> Iterator[slice]:
    """Windows that run together, about `tokens` tokens at a time."""
    step = max(1, tokens // length)
    for start in range(0, windows, step):
        yield slice(start, min(start + step, windows))


def _name(what: str, layer: int) -> str:
    """Of an array: hidden states at a layer's input, or the log-likelihood's gradient there."""
    return f"{what}-{layer:05d}"


@dataclass
class Sweep:
    """A model that runs over windows, layer by layer; several processes share the windows out.

    experts: a layer's experts, None for one that has none; tokens: the windows; forward_work, backward_work:
    what running one layer over all windows counts in `steps`; products: how layers, and the head where its gradient is
    wanted, are multiplied; dtype: in which states and gradients lie in files; every: which states a
    sweep backwards keeps (see `States`); head_work: what the head's gradient counts.
    """

    model: LayerwiseModel
    experts: Experts
    tokens: Windows
    arrays: WorkDir | Scratch
    steps: Steps
    forward_work: float
    backward_work: float = 0.0
    batch_tokens: int = BATCH_TOKENS
    products: Products = "float32"
    dtype: torch.dtype = torch.float32
    every: int = 0
    head_work: float = 0.0
    batches: list[slice] = field(init=False)

    def __post_init__(self) -> None:
        # Windows are shared out in whole batches, so that every process count makes the same sums.
        every = list(batches(len(self.tokens), self.tokens.shape[1], self.batch_tokens))
        self.batches = [every[number] for number in self.arrays.group.own(range(len(every)))]

    @property
    def states(self) -> States:
        """Which hidden states a sweep backwards keeps."""
        return States(self.model.num_layers, self.every)

    def run(
        self,
        visitor: Visitor,
        upto: int | None = None,
        *,
        states: str = "hidden",
        keep: bool = False,
        work: float = 0.0,
    ) -> None:
        """Runs, or resumes, until the visitor has finished all of its layers.

        upto: without layers to visit, the layer whose input is wanted (their number for the last one's output); states:
        name of the hidden states; keep: whether what a sweep backwards starts from stays for a next one; work: what all
        of it counts in `steps`, of which an earlier run's part is skipped.
        """
        pending = [layer for layer in visitor.layers if not visitor.done(layer)]
        if finished := len(visitor.layers) - len(pending):
            note = f"resuming: {finished} of {len(visitor.layers)} MoE layers are {visitor.name}"
            self.steps.skip(work * finished / len(visitor.layers), note)
        if pending and visitor.backwards:
            self._backwards(visitor, pending, keep=keep)
        elif pending or upto is not None:
            last = self.model.num_layers if keep else pending[-1] if upto is None else upto
            self._forwards(visitor, pending, last, states, keep=keep)
        # What a process is about to look for, no other one is to discard any more.
        self.arrays.group.barrier()

    def forget(self, *what: str) -> None:
        """Discards what an earlier sweep kept and none will start from: "hidden" states, a "gradient"."""
        layers = range(self.model.num_layers + 1)
        self.arrays.discard(*(_name(name, layer) for name in what for layer in layers))
        self.arrays.group.barrier()

    @torch.no_grad()
    def loss(self) -> float:
        """Summed negative log-likelihood of all windows, once the last layer's output is there."""
        self._begin("head")
        total = 0.0
        for window, _, loss in self._losses():
            total += float(loss)
            self._advance(window, self.forward_work)
        return total

    def label(self, layer: int, what: str) -> None:
        """What is done from now on, at a layer."""
        self._begin(f"layer {layer + 1}/{self.model.num_layers}: {what}")

    def _begin(self, what: str) -> None:
        """What was done before holds no memory any more."""
        give_back()
        self.steps.label(what)

    def _forwards(
        self, visitor: Visitor, pending: Sequence[int], upto: int, states: str, *, keep: bool = False
    ) -> None:
        """keep: what a sweep backwards starts from, else an input is discarded when the next one is there."""
        start = self._nearest(states, pending[0] if pending else upto)
        for layer in range(start, upto + 1):
            above = _name(states, layer + 1)
            if layer in pending:
                into = None if layer == upto or visitor.replaces or self.arrays.has(above) else above
                self._visit(visitor, layer, states, into)
            if layer < upto and not self.arrays.has(above):
                replaced = visitor.replaces and layer in visitor.layers
                self.label(layer, "compressed forward" if replaced else "forward")
                self._run(layer, visitor.replacement if replaced else self.experts, states, above)
            if not (keep and layer in self.states.start):
                self.arrays.discard(_name(states, layer))

    def _nearest(self, states: str, layer: int) -> int:
        """The last layer up to `layer` whose input is there; the first one's is made where there is none."""
        found = [number for number in range(layer + 1) if self.arrays.has(_name(states, number))]
        if not found:
            self._embed(_name(states, 0))
        return max(found, default=0)

    def _backwards(self, visitor: Visitor, pending: Sequence[int], *, keep: bool) -> None:
        """A layer's input and the gradient at its output are discarded when it is done, but for what is kept."""
        lowest, highest, layers = pending[0], pending[-1], self.model.num_layers
        # Where gradients have to come down from: the lowest that an earlier run left, else the head's.
        known = [layer for layer in range(highest, layers) if self.arrays.has(_name("gradient", layer + 1))]
        top = min(known, default=layers - 1)
        if not known:
            self._keep_only(self.states.start | {self._nearest("hidden", layers)})
            self._forwards(Visitor(), (), layers, "hidden", keep=True)
            self._head_gradient()
        above = {layer for layer in range(top + 1, layers) if keep and self.states.is_kept(layer)}
        self._keep_only(self.states.there(top) | above)
        for layer in range(top, lowest - 1, -1):
            self._recompute(layer)
            into = _name("gradient", layer) if layer > lowest else None
            if layer in pending:
                self._visit(visitor, layer, None, into)
            else:
                self.label(layer, "gradient")
                self._run(layer, self.experts, None, into)
            if not (keep and layer + 1 == layers):
                self.arrays.discard(_name("gradient", layer + 1))
            if not (keep and self.states.is_kept(layer)):
                self.arrays.discard(_name("hidden", layer))
        if not keep:
            self.arrays.discard(*(_name("hidden", layer) for layer in range(lowest)))

    def _keep_only(self, layers: Collection[int]) -> None:
        """Of the layers' inputs; where a run that had more room on its disk began, more are there."""
        self.arrays.group.barrier()  # every process has seen what is there
        surplus = (layer for layer in range(self.model.num_layers + 1) if layer not in layers)
        self.arrays.discard(*(_name("hidden", layer) for layer in surplus))
        self.arrays.group.barrier()

    def _recompute(self, layer: int) -> None:
        """The inputs of the layers from the last one that is there up to `layer`."""
        for number in range(self._nearest("hidden", layer), layer):
            self.label(number, "forward again")
            self._run(number, self.experts, "hidden", _name("hidden", number + 1))
            if number not in self.states.there(layer):
                self.arrays.discard(_name("hidden", number))

    def _visit(self, visitor: Visitor, layer: int, states: str | None, into: str | None) -> None:
        if visitor.recorded(layer):
            self.steps.skip(self._work(states))
        else:
            self.label(layer, "calibration")
            self._run(layer, visitor.experts, states, into, visitor.entered)
        visitor.visited(layer)

    def _run(
        self, layer: int, experts: Experts, states: str | None, into: str | None, entered: Entered | None = None
    ) -> None:
        """One layer over all windows: forwards on these hidden states, or, where they are None, backwards. into: name
        under which its output, or the gradient at its input, is kept."""
        # Embeddings and head are not to be in memory together with a layer.
        self.model.prepare((batch.stop - batch.start, self.tokens.shape[1]) for batch in self.batches)
        module = self.model.load_layer(layer, experts(layer))
        array = self._create(into) if into else None
        for batch in self.batches:
            if entered:
                entered(self._rows(batch))
            values = self._forward(layer, module, states, batch) if states else self._backward(layer, module, batch)
            if array:
                self._write(array, batch, values)
            self._advance(batch, self._work(states))
        if into and array:
            self.arrays.publish(into, array)

    @torch.no_grad()
    def _forward(self, layer: int, module: nn.Module, states: str, batch: slice) -> Tensor:
        with multiplying(self.products):
            return self.model.run_layer(layer, module, self._read(states, layer, batch))

    def _backward(self, layer: int, module: nn.Module, batch: slice) -> Tensor:
        inputs = self._read("hidden", layer, batch).requires_grad_()
        with multiplying(self.products):
            output = self.model.run_layer(layer, module, inputs)
            return torch.autograd.grad(output, inputs, self._read("gradient", layer + 1, batch))[0]

    def _embed(self, name: str) -> None:
        self._begin("embeddings")
        array = self._create(name)
        for batch in self.batches:
            self._write(array, batch, self.model.embed(self.tokens[batch]))
        self.arrays.publish(name, array)

    def _head_gradient(self) -> None:
        """Gradient of every window's summed log-likelihood at the last layer's output."""
        self._begin("head gradient")
        last = self.model.num_layers
        array = self._create(_name("gradient", last))
        with multiplying(self.products):
            for window, hidden, loss in self._losses():
                self._write(array, window, torch.autograd.grad(-loss, hidden)[0])
                self._advance(window, self.head_work)
        self.arrays.publish(_name("gradient", last), array)
        self.arrays.discard(_name("hidden", last))

    def _losses(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Every window, the last layer's output, and its summed negative log-likelihood: logits of more than one would
        be too many, they are as wide as the vocabulary."""
        for number in (number for batch in self.batches for number in range(batch.start, batch.stop)):
            window = slice(number, number + 1)
            hidden = self._read("hidden", self.model.num_layers, window).requires_grad_(torch.is_grad_enabled())
            yield window, hidden, next_token_loss(self.model.logits(hidden), self.tokens[window].to(hidden.device))

    # Arrays

    @property
    def _count(self) -> int:
        """Tokens of all windows."""
        return self.tokens.shape[0] * self.tokens.shape[1]

    def _rows(self, batch: slice) -> slice:
        length = self.tokens.shape[1]
        return slice(batch.start * length, batch.stop * length)

    def _create(self, name: str) -> Rows:
        return self.arrays.create(name, self._count, self.model.hidden_size, self.dtype)

    def _read(self, what: str, layer: int, batch: slice) -> Tensor:
        """[windows, seq, hidden], on the model's device."""
        array = self.arrays.rows(_name(what, layer), self._count, self.model.hidden_size, self.dtype)
        rows = array.read(self._rows(batch))
        return rows.view(batch.stop - batch.start, self.tokens.shape[1], -1).to(self.model.device)

    def _write(self, array: Rows, batch: slice, values: Tensor) -> None:
        array.write(self._rows(batch), values.flatten(0, 1))

    def _work(self, states: str | None) -> float:
        return self.forward_work if states else self.backward_work

    def _advance(self, batch: slice, work: float) -> None:
        self.steps.advance(work * (batch.stop - batch.start) / len(self.tokens) * self.arrays.group.size)
